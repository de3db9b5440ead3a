"""`make mutants`: break the control logic in many small ways, one at a time, and see whether a test notices.

A mutant is one module with one expression changed: a comparison turned, a condition of a conjunction left out, a
`where` that always takes one side, a constant off by one. Each is run against the test files that own its module, until
the first failure. One that no test notices is alive: a test is missing, or the change makes no difference, which
`mutants_alive.md` then explains. At most 5 % may be alive.

    python tests/mutants.py                           all of the sample, one process after the other
    python tests/mutants.py _guard recovery/_ladder    of these modules alone
    python tests/mutants.py --list                    what would be run

Which are drawn depends on the mutant's own text alone, so that an edit elsewhere leaves the sample as it is. Results
are kept in `.mutants/` with the first test that failed: a run that was stopped goes on, and survivors are tried again
once their tests have changed.
"""

import argparse
import ast
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "optax_guard"
RESULTS = ROOT / ".mutants" / "results.jsonl"
PROGRAMS = ROOT / ".mutants" / "programs"  # compiled before: most mutants leave most programs as they are
OUTPUT = ROOT / ".mutants" / "output.txt"
ALIVE = ROOT / "tests" / "mutants_alive.md"
SECONDS = 400  # of CPU time for one mutant, so that a loaded machine changes nothing: beyond it hangs, which is noticed
MOST_ALIVE = 0.05

# The modules under attack, by path in the package, and the tests that own each, the cheapest and most decisive first:
# random states against the rules in plain Python, single conditions, messages. One mutant costs seconds.
_LADDER = (
    "recovery/test_ladder_decisions.py",
    "recovery/test_rungs.py::test_wrong_arguments_are_named_with_function_value_and_range",
    "recovery/test_control_logic.py",
    "recovery/test_ladder.py::test_replicas_that_share_gradient_and_state_trace_with_a_snapshot_in_the_hosts_memory",
    "recovery/test_ladder.py::test_snapshots_lie_in_the_memory_that_was_asked_for",
    "recovery/test_ladder.py::test_a_learning_rate_is_found_and_one_set_by_hand_outlives_a_rewind",
    "recovery/test_ladder.py::test_keys_in_the_optimizers_state_are_kept_in_snapshots",
    "recovery/test_ladder.py::test_parameters_too_coarse_for_their_updates_are_counted_and_not_reset",
    "recovery/test_rungs.py::test_a_reset_starts_moments_and_their_age_anew_and_keeps_all_else",
    "recovery/test_rungs.py::test_back_off_alone_scales_zeroes_what_is_not_finite_and_asks_for_no_loss",
    "recovery/test_rungs.py::test_when_rewinds_do_not_help_the_guard_halts_and_says_why",
    "recovery/test_rungs.py::test_after_a_rewind_training_is_bit_identical_to_the_snapshot",
    "recovery/test_rungs.py::test_a_copy_in_bfloat16_comes_back_in_the_parameters_dtype",
    "recovery/test_rungs.py::test_through_update_the_rewind_is_right_to_rounding",
    "recovery/test_ladder.py::test_a_snapshot_in_the_hosts_memory_comes_back_to_the_replica_that_needs_it",
)
_CYCLE = (
    "accumulation/test_accumulation_decisions.py",
    "accumulation/test_calls.py::test_bad_input_is_refused_by_name",
    "accumulation/test_calls.py::test_flush_and_reduction_refuse_what_they_cannot_use",
    "accumulation/test_calls.py::test_flush_in_linen_train_state_and_with_frozen_leaves",
    "accumulation/test_calls.py::test_a_clip_inside_acts_on_the_mean_and_without_one_nothing_does",
    "accumulation/test_calls.py::test_every_1_gives_the_inner_updates_bit_for_bit",
    "accumulation/test_calls.py::test_complex_gradients_keep_their_imaginary_part",
    "accumulation/test_calls.py::test_the_least_weight_whose_inverse_is_finite_steps",
    "recovery/test_control_logic.py::test_a_cycle_that_kept_no_loss_records_the_last_one",
    "guard/test_overflow.py::test_a_sum_of_float16_gradients_that_leaves_float16_loses_its_cycle",
    "guard/test_overflow.py::test_unscaling_by_a_scale_below_1_holds_what_overflows",
    "guard/test_overflow.py::test_losses_and_weights_whose_products_and_sums_overflow_have_a_mean",
    "attention/test_composition.py::test_accumulate_keeps_the_largest_logits_of_the_micro_batches_that_it_keeps",
)
_GUARD = (
    "guard/test_guard_decisions.py",
    "guard/test_order.py::test_the_refusal_shows_the_right_order",
    "guard/test_order.py::test_the_errors_of_a_step_of_stabilize_name_it",
    "guard/test_own_gradients.py::test_without_the_check_the_halt_says_where_the_nan_is_and_what_would_have_held_it",
    "guard/test_loss.py::test_the_halt_says_that_it_was_the_loss",
    "guard/test_overflow.py::test_the_halt_says_what_it_was",
    "state/test_states.py::test_a_guard_that_sees_some_of_the_leaves_names_the_right_one",
    "state/test_states.py::test_a_nan_that_multi_steps_never_loses_is_called_so",
    "state/test_states.py::test_a_halt_looks_at_parameters_and_moments",
    "state/test_states.py::test_a_state_of_many_runs_reads_as_those_of_its_members",
    "recovery/test_control_logic.py",
    "guard/test_guard.py::test_halted_holds_every_later_step_until_the_host_clears_it",
    "guard/test_guard.py::test_clear_halt_reaches_a_guard_inside_a_guard",
    "guard/test_guard.py::test_a_held_step_leaves_every_array_bit_identical",
    "rules/test_masked.py::test_a_masked_guard_equals_one_that_never_met_the_frozen_leaves",
    "recovery/test_rungs.py::test_when_rewinds_do_not_help_the_guard_halts_and_says_why",
    "guard/test_loss.py::test_a_loss_called_loss_goes_in_as_it_came_and_as_value",
    "host/test_flax.py::test_a_halt_is_cleared_in_place_also_for_a_cached_step",
    "recovery/test_rungs.py::test_through_update_the_rewind_is_right_to_rounding",
)
OWNERS = {
    "_guard.py": _GUARD,
    "_halt.py": _GUARD,
    "recovery/_ladder.py": _LADDER,
    "recovery/_back_off.py": _LADDER,
    "recovery/_reset.py": _LADDER,
    "recovery/_rewind.py": _LADDER,
    "_step/moments.py": _LADDER,
    "recovery/_loss_watch.py": (
        "recovery/test_ladder_decisions.py",
        "recovery/test_rungs.py::test_the_watch_follows_its_equations_and_notices_in_the_stated_time",
    ),
    "accumulation/_calls.py": (*_CYCLE, "rules/test_masked.py::test_the_gradient_of_a_frozen_leaf_is_never_read"),
    "accumulation/_sums.py": _CYCLE,
    "_step/gradient.py": (
        "guard/test_guard_decisions.py",
        "guard/test_loss_scaling.py",
        "accumulation/test_accumulation_decisions.py",
        "rules/test_masked.py",
    ),
    "_loss_scaling.py": (
        "guard/test_loss_scaling.py",
        "guard/test_loss.py::test_a_loss_called_loss_goes_in_as_it_came_and_as_value",
        "guard/test_overflow.py::test_unscaling_by_a_scale_below_1_holds_what_overflows",
        "common/test_forms.py",
    ),
}

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Add}
FUNCTIONS = {"minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any", "zeros": "ones", "ones": "zeros"}


class Mutant(NamedTuple):
    """One change."""

    module: str
    function: str
    before: str
    after: str
    occurrence: int  # which of several alike in the function
    source: Callable[[], str]

    @property
    def name(self) -> str:
        number = f" ({self.occurrence + 1})" if self.occurrence else ""
        return f"{self.module} {self.function}: `{self.before}` -> `{self.after}`{number}"

    @property
    def key(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of an expression."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, (ast.BinOp, ast.BoolOp)):
        if isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield node.left
            yield node.right
        elif type(node.op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Invert, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield ast.Constant(_other(node.value))
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name, three = node.func.attr, len(node.args) == 3
        if name == "where" and three:
            yield node.args[1]
            yield node.args[2]
        elif name == "cond" and three:
            yield ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)
        elif name in FUNCTIONS:
            yield ast.Call(ast.Attribute(node.func.value, FUNCTIONS[name], ast.Load()), node.args, node.keywords)


def _other(value: bool | float) -> bool | float:
    if isinstance(value, bool):
        return not value
    return 2 * value if isinstance(value, float) and value else value + 1


class Places(ast.NodeVisitor):
    """The expressions of a module that decide something: not defaults, annotations, messages or what is raised."""

    def __init__(self) -> None:
        self.function: list[str] = []
        self.found: list[tuple[str, ast.AST]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.function.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.function.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_FunctionDef(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr) and not (isinstance(node, ast.BinOp) and not self.function):  # a union of types
            self.found.append((".".join(self.function) or "(module)", node))
        super().generic_visit(node)


def mutants_of(module: str) -> list[Mutant]:
    tree = ast.parse((PACKAGE / module).read_text())
    places = Places()
    places.visit(tree)
    found: list[Mutant] = []
    seen: dict[tuple[str, str, str], int] = {}
    for function, node in places.found:
        for new in changes(node):
            before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(copy.deepcopy(new)))
            occurrence = seen.get((function, before, after), 0)
            seen[function, before, after] = occurrence + 1
            source = functools.partial(_exchanged, tree, node, new)
            found.append(Mutant(module, function, before, after, occurrence, source))
    return found


def _exchanged(tree: ast.Module, old: ast.AST, new: ast.AST) -> str:
    changed = copy.deepcopy(tree, {id(old): copy.deepcopy(new)})  # what `deepcopy` finds there it takes for the copy
    return ast.unparse(ast.fix_missing_locations(changed))


def sample(modules: list[str], count: int) -> list[Mutant]:
    """The `count` first in the order of their hashes, over all modules; of those, the ones of `modules`."""
    everything = [mutant for module in OWNERS for mutant in mutants_of(module)]
    return [each for each in sorted(everything, key=lambda each: each.key)[:count] if each.module in modules]


def run_tests(mutant: Mutant | None, tests: Iterable[str]) -> tuple[int, str]:
    """The status of the tests and the first that failed; in a process of its own, which has JAX already."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (Path(folder) / PACKAGE.name / mutant.module).write_text(mutant.source())
        child = os.fork()
        if child == 0:
            if mutant is not None:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            _in_child(folder, tests)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", OUTPUT.read_text(errors="replace"), re.MULTILINE)
    return status, failed[1] if failed else ""


def _in_child(folder: str, names: Iterable[str]) -> None:
    import jax
    import pytest

    status = 99
    try:
        os.chdir(ROOT)
        sys.path.insert(0, folder)
        sys.dont_write_bytecode = True
        with OUTPUT.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        tests = [str(ROOT / "tests" / name) for name in names]
        early = "ignore::pytest.PytestAssertRewriteWarning"  # the parent has imported plugins
        status = pytest.main(
            [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "not slow",
                "-p",
                "no:hypothesispytest",
                "-p",
                "no:xdist",
                "-W",
                early,
                *tests,
            ]
        )
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(int(status))


def tests_hash(module: str) -> str:
    return hashlib.sha256(
        b"".join((ROOT / "tests" / name.split("::")[0]).read_bytes() for name in OWNERS[module])
    ).hexdigest()[:12]


def known_results() -> dict[str, dict]:
    if not RESULTS.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="as `recovery/_ladder`; all without")
    parser.add_argument("--count", type=int, default=240, help="mutants in the sample over all modules")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    modules = [module for module in OWNERS if not options.modules or module.removesuffix(".py") in options.modules]
    drawn = sample(modules, options.count)
    if options.list:
        print(*(mutant.name for mutant in drawn), sep="\n")
        return 0
    import chex  # noqa: F401 (so that each process has them already)
    import flax.linen  # noqa: F401
    import hypothesis  # noqa: F401
    import optax  # noqa: F401

    RESULTS.parent.mkdir(exist_ok=True)
    known, alive = known_results(), []
    left = [each for each in drawn if each.key not in known or known[each.key]["alive"]]
    if left:
        status, failed = run_tests(None, sorted({name for each in left for name in OWNERS[each.module]}))
        if status != 0:
            print(f"the tests fail as the package is: {failed}; see {OUTPUT}")
            return 2
    for number, mutant in enumerate(sorted(drawn, key=lambda each: each.key in known), 1):  # survivors at the end
        tests, row = tests_hash(mutant.module), known.get(mutant.key)
        if row is None or (row["alive"] and row["tests"] != tests):
            start = time.monotonic()
            status, failed = run_tests(mutant, OWNERS[mutant.module])
            row = {"key": mutant.key, "name": mutant.name, "alive": status == 0, "tests": tests, "failed": failed}
            row["seconds"] = round(time.monotonic() - start, 1)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if row["alive"]:
            alive.append(mutant)
        print(f"{number}/{len(drawn)} {'ALIVE ' if row['alive'] else 'killed'} {mutant.name}", flush=True)
    explained = ALIVE.read_text()
    bare = [mutant.name for mutant in alive if mutant.name not in explained]
    print(f"\n{len(alive)} of {len(drawn)} alive, {len(bare)} of them without an explanation in {ALIVE.name}")
    print(*bare, sep="\n")
    return int(len(alive) > MOST_ALIVE * len(drawn) or bool(bare))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The count of bytes on programs whose bytes are known by hand, the ordinary step's branches, and the page."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from running import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.accelerators import environment
from benchmarks.accelerators.bounds import BOUNDS, Bound, broken, worse
from benchmarks.accelerators.hlo import Sent, count, parsed, sent
from benchmarks.accelerators.measure import Measured, read_records
from benchmarks.accelerators.ordinary import chooser, places, taken
from benchmarks.accelerators.page import ROOT as PAGES
from benchmarks.accelerators.page import regions
from benchmarks.accelerators.pod import CLIP, GUARD, POD_STEPS, PodRow, missed, pod_parameters, read_pods
from benchmarks.accelerators.steps import BARE, STEPS, fast, parameters, plain, step_arguments
from benchmarks.accelerators.training import TRAINING
from benchmarks.marked import marked

KILO = 1024  # elements of f32[1024]
ARRAY = 4 * KILO


def program(body: str, arguments: str = "x: f32[1024]", computations: str = "") -> str:
    return f"HloModule m\n\n{computations}\nENTRY %main ({arguments}) -> f32[1024] {{\n{body}\n}}\n"


X = "  %x = f32[1024]{0} parameter(0)\n"
ADD = """%add (p: f32[1024], q: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %q = f32[1024]{0} parameter(1)
  ROOT %sum = f32[1024]{0} add(%p, %q)
}
"""


def test_a_kernel_reads_each_operand_once_and_writes_its_result() -> None:
    body = X + "  %y = f32[1024]{0} parameter(1)\n  ROOT %z = f32[1024]{0} fusion(%x, %y), kind=kLoop, calls=%add"
    counted = count(parsed(program(body, "x: f32[1024], y: f32[1024]", ADD)))
    assert (counted.bytes, counted.main, counted.kernels, counted.copies) == (3 * ARRAY, 3 * ARRAY, 1, 0)
    twice = body.replace("%x, %y)", "%x, %x)")
    assert count(parsed(program(twice, "x: f32[1024], y: f32[1024]", ADD))).bytes == 2 * ARRAY


@pytest.mark.parametrize(
    ("kind", "bits"), [("f32", 32), ("bf16", 16), ("s4", 4), ("pred", 8), ("f8e4m3fn", 8), ("c64", 64), ("u64", 64)]
)
def test_bytes_of_an_element(kind: str, bits: int) -> None:
    text = program(X + "  ROOT %y = f32[1024]{0} negate(%x)").replace("f32[", f"{kind}[")
    assert count(parsed(text)).bytes == 2 * KILO * bits // 8


def test_what_is_renamed_or_one_number_moves_nothing() -> None:
    body = (
        X
        + "  %i = s32[] constant(1)\n  %j = s32[] add(%i, %i)\n  %b = f32[32,32]{1,0} bitcast(%x)\n"
        + "  %t = (f32[1024]{0}, s32[]) tuple(%x, %j)\n"
        + '  %c = f32[1024]{0} custom-call(%x), custom_call_target="ConcatBitcast"\n'
        + "  ROOT %r = f32[1024]{0} get-tuple-element(%t), index=0"
    )
    assert count(parsed(program(body)))[:4] == (0, 0, 0, 0)


def test_copies_and_transfers_to_the_fast_memory() -> None:
    there = "f32[1024]{0:T(1024)S(1)}"
    body = (
        X
        + f"  %s = ({there}, f32[1024]{{0:T(1024)}}, u32[]{{:S(2)}}) copy-start(%x)\n"
        + f"  %d = {there} copy-done(%s)\n"
        + "  %h = ((f32[1024]{0}), f32[256]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:256]}\n"
        + f"  %n = {there} negate(%d)\n"
        + "  %e = f32[1024]{0:T(1024)} negate(%n)\n"
        + "  ROOT %k = f32[1024]{0:T(1024)} copy(%e)"
    )
    counted = count(parsed(program(body)))
    # The first transfer, the quarter, from fast to fast, from fast to main, the copy.
    assert counted.bytes == (2 + 0.5 + 2 + 2 + 2) * ARRAY
    assert counted.main == (1 + 0.25 + 0 + 1 + 2) * ARRAY
    assert counted.copies == 1  # within the main memory


UPDATE = """%update (p: f32[1024], q: f32[8], i: s32[]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %old = f32[8]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={8}
  %new = f32[8]{0} add(%old, %q)
  ROOT %r = f32[1024]{0} dynamic-update-slice(%p, %new, %i)
}
"""
ROW = "  %q = f32[8]{0} parameter(1)\n  %i = s32[] parameter(2)\n"


@pytest.mark.parametrize("inside", [True, False])
def test_of_an_aliased_buffer_the_part_counts_that_is_written(inside: bool) -> None:
    fused = "  ROOT %r = f32[1024]{0} fusion(%x, %q, %i), kind=kLoop, calls=%update"
    alone = "  ROOT %r = f32[1024]{0} dynamic-update-slice(%x, %q, %i)"
    text = program(X + ROW + (fused if inside else alone), "x: f32[1024], q: f32[8], i: s32[]", UPDATE)
    # Fused: the old eight, the new eight, the index; and the eight that are written.
    assert count(parsed(text)).bytes == (32 + 32 + 4 + 32 if inside else 32 + 32)


def test_a_buffer_that_is_also_read_whole_counts_whole() -> None:
    text = program(
        X + ROW + "  ROOT %r = f32[1024]{0} fusion(%x, %q, %i), kind=kLoop, calls=%update",
        "x: f32[1024], q: f32[8], i: s32[]",
        UPDATE.replace("ROOT %r", "%all = f32[1024]{0} negate(%p)\n  ROOT %r"),
    )
    assert count(parsed(text)).bytes == ARRAY + 32 + 4 + 32


BRANCHES = """%act (t: (f32[1024])) -> (f32[1024]) {
  %t = (f32[1024]{0}) parameter(0)
  %g = f32[1024]{0} get-tuple-element(%t), index=0
  %one = f32[1024]{0} negate(%g)
  %two = f32[1024]{0} negate(%one)
  ROOT %r = (f32[1024]{0}) tuple(%two)
}

%hold (t: (f32[1024])) -> (f32[1024]) {
  %t = (f32[1024]{0}) parameter(0)
  %g = f32[1024]{0} get-tuple-element(%t), index=0
  %same = f32[1024]{0} copy(%g)
  ROOT %r = (f32[1024]{0}) tuple(%same)
}
"""
FRAMES = """FileNames
1 "/a/step.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}

StackFrames
5 {file_location_id=1 parent_frame_id=1}

"""


def conditional(attributes: str) -> str:
    body = (
        X
        + "  %ok = pred[] parameter(1)\n  %t = (f32[1024]{0}) tuple(%x)\n"
        + f"  %c = (f32[1024]{{0}}) conditional(%ok, %t, %t), {attributes}, metadata={{stack_frame_id=5}}\n"
        + "  ROOT %r = f32[1024]{0} get-tuple-element(%c), index=0"
    )
    return FRAMES + program(body, "x: f32[1024], ok: pred[]", BRANCHES)


@pytest.mark.parametrize(
    "attributes", ["branch_computations={%hold, %act}", "true_computation=%act, false_computation=%hold"]
)
def test_of_a_conditional_the_branch_of_an_ordinary_step_counts(attributes: str) -> None:
    text = conditional(attributes)
    assert places(text) == {"5": ("/a/step.py", 7)}
    hlo = parsed(text)
    assert count(hlo).bytes == 4 * ARRAY  # the dearer branch, unless something chooses
    for outcome, arrays in ((True, 4), (False, 2)):
        choose, unclear = chooser(text, {("/a/step.py", 7): {outcome}})
        assert count(hlo, choose).bytes == arrays * ARRAY
        assert not unclear
        other, _ = chooser(text, {("/a/step.py", 7): {outcome}}, otherwise=True)
        assert count(hlo, other).bytes == (6 - arrays) * ARRAY
    for untold in ({}, {("/a/step.py", 7): {True, False}}):
        choose, unclear = chooser(text, untold)
        counted = count(hlo, choose)
        assert counted.bytes == 4 * ARRAY
        assert unclear == [each.instruction.name for each in counted.conditionals] == ["c"]


def test_a_loop_counts_as_often_as_it_turns_and_a_call_once() -> None:
    attributes = 'condition=%hold, body=%act, backend_config={"known_trip_count":{"n":"3"}}'
    loop = conditional("X").replace("conditional(%ok, %t, %t), X", f"while(%t), {attributes}")
    assert count(parsed(loop)).bytes == 3 * 6 * ARRAY
    call = conditional("X").replace("conditional(%ok, %t, %t), X", "call(%t), to_apply=%act")
    assert count(parsed(call)).bytes == 4 * ARRAY


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parsed("HloModule m\n")


def test_programs_compiled_for_this_machine() -> None:
    """The counter reads what XLA prints: an addition, and two reductions of one array in a conditional."""
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    array = 4 * 256 * 512
    added = jax.jit(lambda x, y: 2 * x + y).lower(x, x).compile()
    assert count(parsed(added.as_text())).bytes == 3 * array
    assert count(parsed(added.as_text())).kernels == 1

    def branching(x: jax.Array, ok: jax.Array) -> jax.Array:
        return jax.lax.cond(ok, lambda: jnp.sin(x), lambda: x)

    chosen = jax.jit(branching, donate_argnums=0).lower(x, jax.ShapeDtypeStruct((), bool)).compile()
    text = chosen.as_text()
    assert "conditional(" in text
    if not places(text):
        pytest.skip("this JAX does not print where in the source an operation stands")
    here = next(place for place in places(text).values() if place[0].endswith("test_accelerators.py"))
    ways = {place: {True} for place in places(text).values() if place[0] == here[0]}
    choose, unclear = chooser(text, ways)
    assert 2 * array <= count(parsed(text), choose).bytes <= 4 * array
    assert not unclear


def test_the_ordinary_step_is_one_that_is_taken(standard_promotion: None) -> None:
    """A guard written by hand and its mirror image: the predicates are opposite, and so are the branches."""
    by_name = {step.name: step for step in STEPS}
    (act,) = taken(by_name["by hand: `lax.cond(finite, act, hold)`"], "gpu").values()
    (hold,) = taken(by_name["by hand: `lax.cond(trouble, hold, act)`"], "gpu").values()
    assert (act, hold) == ({True}, {False})
    assert taken(by_name[BARE], "gpu") == {}


def test_every_step_can_be_traced_and_has_a_name_of_its_own(standard_promotion: None) -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        if step.take in (fast, plain) and "rewind" not in step.name:
            continue  # the others are one line each; these take a value, another order, or a branch by hand
        arguments = step_arguments(step, parameters(8))
        out = jax.eval_shape(step.take(step.tx()), *arguments)
        first = arguments[:2][::-1] if step.state_first else arguments[:2]
        assert jax.tree.structure(out) == jax.tree.structure(first)


def test_bounds_are_those_of_rows() -> None:
    names = {step.name for step in STEPS}
    for bounds in BOUNDS.values():
        assert set(bounds) <= names
        assert {bound.of for bound in bounds.values()} - {""} <= names


def row(name: str, moved: float, temporaries: float = 0.0, conditionals: int = 0) -> Measured:
    return Measured(name, moved, moved, moved, temporaries, 1, conditionals, 0, 0, 1.0)


def test_a_bound_is_broken_by_what_is_above_it() -> None:
    rows = {BARE: row(BARE, 7.0), "guard": row("guard", 8.0, 0.02, 1)}
    assert broken(rows["guard"], Bound(8.0, 0.02, 1), rows) == []
    assert broken(rows["guard"], Bound(7.9, 0.01, 0), rows) == ["bytes", "temporaries", "conditionals"]
    assert broken(rows["guard"], Bound(1.0, of=BARE, plus=1.0), rows) == []
    assert broken(rows["guard"], Bound(1.1, of=BARE), rows) == ["bytes"]
    assert broken(rows["guard"], Bound(1.2, of="absent"), rows) == ["bytes"]


def test_what_missed_its_bound_before_may_miss_it_as_much_and_no_more() -> None:
    rows = {BARE: row(BARE, 7.0), "guard": row("guard", 9.0, 0.02, 1)}
    assert worse(rows["guard"], Bound(9.0, 0.02, 1), rows, {}) == []
    recorded = {"guard": row("guard", 9.0, 0.02, 1)}
    assert worse(rows["guard"], Bound(8.0, 0.0, 0), rows, recorded) == []
    now = row("guard", 9.1, 0.03, 2)
    assert worse(now, Bound(8.0, 0.0, 0), rows, recorded) == [
        "guard: bytes 9.1, at most 9",
        "guard: temporaries 0.03, at most 0.02",
        "guard: conditionals 2, at most 1",
    ]
    assert worse(now, Bound(8.0), rows, {"guard": row("guard", 7.9)}) == ["guard: bytes 9.1, at most 8"]


def test_collectives_are_counted_where_they_start_with_what_goes_in() -> None:
    body = (
        X
        + "  %s = f32[1024]{0} all-reduce-start(%x), to_apply=%add\n  %d = f32[1024]{0} all-reduce-done(%s)\n"
        + "  %g = f32[4096]{0} all-gather(%d), dimensions={0}\n  %p = f32[1024]{0} collective-permute(%d)\n"
        + "  ROOT %r = f32[1024]{0} all-reduce(%p), to_apply=%add"
    )
    assert sent(parsed(program(body))) == Sent(all_reduces=2, all_gathers=1, others=1, bytes=4 * ARRAY)


def test_the_pod_s_tree_is_that_of_a_decoder_of_8_billion() -> None:
    leaves = jax.tree.leaves(pod_parameters(), is_leaf=lambda x: isinstance(x, tuple))
    assert len(leaves) == 291
    assert sum(math.prod(shape) for shape, _ in leaves) == 8_030_261_248
    assert len({step.name for step in POD_STEPS}) == len(POD_STEPS)


def test_the_pod_s_bounds_are_those_of_the_clip() -> None:
    def over_pod(name: str, seconds: float, **figures: float) -> PodRow:
        return PodRow(name, **({"all_reduces": 2, "all_gathers": 0, "temporaries": 0.24} | figures), others=0, sent=8,
                      conditionals=0, seconds=seconds)  # fmt: skip

    rows = {name: over_pod(name, 100.0) for name in (BARE, CLIP)}
    assert missed(over_pod(GUARD, 125.0), rows) == []
    worse_row = over_pod(GUARD, 126.0, all_reduces=3, all_gathers=1, temporaries=0.3)
    assert missed(worse_row, rows) == ["all_reduces", "all_gathers", "temporaries", "seconds"]
    assert missed(worse_row._replace(name=BARE), rows) == []


@pytest.mark.slow
def test_the_bounds_of_the_tpu_hold() -> None:
    """By its compiler, in the environment of `make accelerators`."""
    problem = environment.missing(["--tpu"])
    if problem is not None:
        pytest.skip(f"THE BOUNDS OF THE TPU WERE NOT CHECKED: {problem}")
    command = [str(environment.PYTHON), "-m", "benchmarks.accelerators", "--tpu", "--check"]
    bare = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=bare | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_page_is_what_the_results_say() -> None:
    records = read_records()
    assert records
    for page, parts in regions(records, read_pods()).items():
        for name, content in parts.items():
            written = marked((PAGES / page).read_text(), name)
            assert written == content.strip(), "python -m benchmarks.accelerators --write-pages"
    for record in records:
        assert {step.name for step in STEPS} <= set(record.rows) <= {step.name for step in (*STEPS, *TRAINING)}


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "HERE", tmp_path / ".venv-accelerators")
    monkeypatch.setattr(environment, "PYTHON", tmp_path / "absent")
    monkeypatch.setattr(environment, "python312", lambda: None)
    monkeypatch.setattr(sys, "argv", ["environment.py", "--tpu"])
    assert environment.main() == 1
    assert "no Python 3.12" in capsys.readouterr().err
    monkeypatch.setattr(environment, "python312", lambda: sys.executable)
    monkeypatch.setattr(environment, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(environment, "installed", lambda module: module == "flax")
    monkeypatch.setattr(environment, "install", lambda *_: False)
    assert environment.main() == 1
    assert "jax[tpu]" in capsys.readouterr().err

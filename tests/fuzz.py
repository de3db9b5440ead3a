"""Random stacks of everything public under random faults, and what must hold whatever comes.

    python tests/fuzz.py --seconds 3600        batches of new stacks, until the time is over
    python tests/fuzz.py --seed 7 --stack 12   one of them again, with its description

A stack is an optimizer in its penalties, noise and wrappers, in a guard with rules and rungs, in whatever goes around
a guard; and the dtype of its parameters, the way in which its steps are taken, and twelve gradients, losses and weights
with faults in them. Parts are dealt like cards, from shuffled decks that are used up before they are shuffled again:
so a batch of `BATCH` stacks uses all of them, those that join the registry later too.

Four things must hold (`check` and `compare`):

- A held step keeps every bit of the parameters and of what the guard guards; a rewind gives those of its snapshot back.
- Counters agree with the flight log, and `keep_if_held` with both.
- No state ever holds NaN or Inf, and neither do the parameters.
- All ways of stepping agree.
"""

import argparse
import collections
import contextlib
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
from compiling import quick_jit
from registry import ENTRIES, adamw, momentum

import optax_guard as og
from optax_guard._step.record import HELD, read_rows

BATCH = 40
STEPS = 12
GUARDS = ("guard", "stabilize", "accumulate", "loss_scaling")  # built here, with parts from the decks
# These work on finished updates.
AFTER = ("limit_step", "clip_by_update_norm", "published.clip_by_update_norm", "clippy", "langevin_noise", "back_off")
RUNGS: dict[str, Callable[[], Any]] = {
    "reset_moments": lambda: og.reset_moments(after=2, check_every=3),
    "back_off": lambda: og.back_off(recover_after=3, diverged=2.0),
    "rewind": lambda: og.rewind(every=2, after=3, keep=2, diverged=4.0),
}
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "momentum": momentum,
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": adamw,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "lion": optax.lion,
    "adafactor": optax.adafactor,
    "lamb": optax.lamb,
    "scheduled": lambda rate: optax.sgd(optax.linear_schedule(rate, rate / 2, 5), momentum=0.9, nesterov=True),
}
PLAIN = ("momentum", "sgd", "scheduled")  # stock optimizers that work for complex and for all 16-bit parameters
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128", "mixed")
REAL_AND_WIDE = ("float32", "bfloat16", "float64", "mixed")  # what every stock optimizer works for
WAYS = ("update", "scan", "vmap", "donated")  # each compared with a loop of jitted `apply_gradients`
OUTSIDE = (
    ("guard",),
    ("guard", "accumulate"),
    ("accumulate",),
    ("guard", "loss_scaling"),
    ("guard", "accumulate", "loss_scaling"),
    ("loss_scaling",),
    ("stabilize",),
    ("guard", "guard"),
    ("guard", "chain"),
    ("stabilize", "accumulate"),
)
FAULTS = (
    *("nan", "inf", "-inf", "huge", "overflow", "spike", "tiny", "zero"),
    *("nan loss", "inf loss", "high loss", "nan weight", "zero weight", "negative weight"),
)
ON_NONFINITE = ("drop_micro", "drop_cycle", "propagate")


class Stack(NamedTuple):
    """What is dealt; everything else follows from it."""

    name: str  # seed and number, to deal it again
    optimizer: str
    around: str  # a registered wrapper of the optimizer, "" for none
    before: tuple[str, ...]  # registered transformations of the gradient, before the optimizer
    after: tuple[str, ...]  # of the update
    rules: tuple[str, ...]
    rungs: tuple[str, ...]
    outside: tuple[str, ...]  # what is around the optimizer, innermost first
    patience: int
    halt_after: int
    check_updates: bool
    every: int
    on_nonfinite: str
    dtype: str
    way: str
    faults: tuple[str, ...]  # one per step; "" for none

    def __str__(self) -> str:
        faults = ", ".join(f"{step}: {fault}" for step, fault in enumerate(self.faults) if fault)
        fields = {k: v for k, v in self._asdict().items() if k not in ("name", "faults") and v not in ("", ())}
        return f"{self.name}: {fields} faults={{{faults}}}"


class Deck:
    """Cards in random order, shuffled again when all were drawn."""

    def __init__(self, rng: random.Random, cards: Sequence[Any]) -> None:
        self.rng, self.cards, self.left = rng, list(cards), []

    def draw(self) -> Any:
        if not self.left:
            self.left = self.rng.sample(self.cards, len(self.cards))
        return self.left.pop()

    def hand(self, most: int) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(self.draw() for _ in range(self.rng.randint(1, most))))


def deal(seed: int, count: int = BATCH) -> list[Stack]:
    """`count` stacks that between them use every card."""
    rng = random.Random(seed)

    def deck(cards: Sequence[Any]) -> Deck:
        return Deck(rng, cards)

    entries = [entry for entry in ENTRIES if entry.name not in GUARDS]
    wrappers = deck([str(e) for e in entries if e.wraps])
    rules = deck([str(e) for e in entries if e.is_rule])
    alone = deck([str(e) for e in entries if not e.wraps and e.name not in AFTER])
    after = deck([str(e) for e in entries if not e.wraps and e.name in AFTER])
    outside, dtypes, ways = deck(OUTSIDE), deck(DTYPES), deck(WAYS)
    optimizers, plain, rungs = deck(tuple(OPTIMIZERS)), deck(PLAIN), deck(tuple(RUNGS))
    everies, policies, faults = deck((1, 2, 3)), deck(ON_NONFINITE), deck(FAULTS)
    stacks = []
    for number in range(count):
        around, dtype = outside.draw(), dtypes.draw()
        has_guard = "guard" in around or "stabilize" in around
        wraps = number % 4 == 0
        stacks.append(
            Stack(
                name=f"--seed {seed} --stack {number}",
                optimizer="" if wraps else (optimizers if dtype in REAL_AND_WIDE else plain).draw(),
                around=wrappers.draw() if wraps else "",
                before=() if wraps and number % 8 else alone.hand(2),
                after=after.hand(1) if number % 3 == 1 else (),
                rules=rules.hand(3) if "guard" in around else (),
                rungs=rungs.hand(3) if has_guard and number % 2 else (),
                outside=around,
                patience=rng.choice((0, 1, 10)),
                halt_after=rng.choice((3, 50)),
                check_updates="guard" in around and (dtype == "float16" or rng.random() < 0.3),
                every=everies.draw() if "accumulate" in around else 1,
                on_nonfinite=policies.draw() if has_guard and "accumulate" in around else "drop_micro",
                dtype=dtype,
                way=ways.draw(),
                faults=tuple(faults.draw() if rng.random() < 0.4 else "" for _ in range(STEPS)),
            )
        )
    return stacks


def coverage(stacks: Sequence[Stack]) -> dict[str, collections.Counter[str]]:
    """What the stacks use, by kind; of registered parts the public name."""
    public = {str(entry): entry.name for entry in ENTRIES}
    counts: dict[str, collections.Counter[str]] = {
        kind: collections.Counter() for kind in ("public names", "optimizers", "dtypes", "ways", "outside", "faults")
    }
    for stack in stacks:
        parts = (
            [stack.around, *stack.before, *stack.after, *stack.rules]
            if stack.around
            else [*stack.before, *stack.after, *stack.rules]
        )
        wrappers = [name for name in stack.outside if name in GUARDS]
        counts["public names"].update({*(public[part] for part in parts), *stack.rungs, *wrappers})
        counts["optimizers"][stack.around or stack.optimizer] += 1
        counts["dtypes"][stack.dtype] += 1
        counts["ways"].update(["apply_gradients", stack.way])
        counts["outside"][" in ".join(stack.outside)] += 1
        counts["faults"].update({fault for fault in stack.faults if fault})
    return counts


def build(stack: Stack) -> optax.GradientTransformation:
    """The transformation of a stack."""
    by_name = {str(entry): entry for entry in ENTRIES}
    optimizer = by_name[stack.around].make() if stack.around else OPTIMIZERS[stack.optimizer](0.01)
    parts = [*(by_name[n].make() for n in stack.before), optimizer, *(by_name[n].make() for n in stack.after)]
    tx = optax.chain(*parts) if len(parts) > 1 else optimizer
    rules = [by_name[name].make() for name in stack.rules]
    ladder = {"recovery": tuple(RUNGS[name]() for name in stack.rungs)}
    limits = {"patience": stack.patience, "halt_after": stack.halt_after, "recorder_rows": 2 * STEPS}
    for position, name in enumerate(stack.outside):
        if name == "guard" and position == 0:
            tx = og.guard(tx, *rules, **ladder, **limits, check_updates=stack.check_updates)
        elif name == "guard":
            tx = og.guard(tx, og.clip_by_global_norm(2.0), recorder_rows=2 * STEPS)
        elif name == "stabilize":
            bound = {"max_change": None} if "proximal" in stack.around else {}  # which stabilize would refuse
            tx = og.stabilize(tx, max_norm=5.0, **bound, **ladder, **limits)
        elif name == "accumulate":
            tx = og.accumulate(tx, stack.every, on_nonfinite=stack.on_nonfinite)
        elif name == "loss_scaling":
            tx = og.loss_scaling(tx, init=4.0, growth_interval=3)
        elif name == "chain":
            tx = optax.chain(optax.identity(), tx)
    return tx


class Data(NamedTuple):
    """One step's, or with a leading axis all steps'."""

    grads: Any
    value: Any
    weight: Any


def dtypes_of(stack: Stack) -> dict[str, str]:
    return {"b": "bfloat16", "k": "float32"} if stack.dtype == "mixed" else dict.fromkeys("bk", stack.dtype)


SHAPES = {"b": (2,), "k": (3, 2)}


def parameters(stack: Stack, rng: np.random.Generator) -> Any:
    return {name: jnp.asarray(_normal(rng, SHAPES[name], dtype), dtype) for name, dtype in dtypes_of(stack).items()}


def steps_of(stack: Stack, rng: np.random.Generator) -> Data:
    """Gradients of about 1, a loss of about 1 and weights of 1 to 4, with the stack's faults."""
    rows = []
    for fault in stack.faults:
        grads = {name: _normal(rng, SHAPES[name], dtype) for name, dtype in dtypes_of(stack).items()}
        value, weight, leaf = 1 + 0.1 * rng.standard_normal(), float(rng.integers(1, 5)), rng.choice(list(SHAPES))
        half = any(dtype == "float16" for dtype in dtypes_of(stack).values())
        factor = {
            "huge": 1e3 if half else 1e15,
            "overflow": 1e4 if half else 1e25,
            "spike": 100.0,
            "tiny": 1e-6,
            "zero": 0.0,
        }
        number = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
        if fault in factor:
            grads = {name: factor[fault] * grad for name, grad in grads.items()}
        if fault in number:
            grads[leaf] = np.where(np.arange(grads[leaf].size).reshape(SHAPES[leaf]) == 0, number[fault], grads[leaf])
        value = {"nan loss": np.nan, "inf loss": np.inf, "high loss": 50.0}.get(fault, value)
        weight = {"nan weight": np.nan, "zero weight": 0.0, "negative weight": -1.0}.get(fault, weight)
        rows.append(Data(grads, value, weight))
    grads = {n: jnp.asarray(np.stack([row.grads[n] for row in rows]), dtype) for n, dtype in dtypes_of(stack).items()}
    return Data(grads, *(jnp.asarray([row[i] for row in rows], jnp.float32) for i in (1, 2)))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if dtype.startswith("complex") else np.asarray(real)


Moment = tuple[Any, Any, Any]  # parameters, state and whether the step was held, on the host


def run(stack: Stack) -> tuple[list[Moment], list[Moment]]:
    """The parameters and states of a loop of `apply_gradients`, and those of the stack's own way."""
    tx: Any = build(stack)
    rng = np.random.default_rng([ord(letter) for letter in stack.name])
    params, data = parameters(stack, rng), steps_of(stack, rng)
    state = jax.jit(tx.init)(params)

    def step(params: Any, state: Any, now: Data) -> Moment:
        extra = {"weight": now.weight} if "accumulate" in stack.outside else {}
        if stack_way == "update":
            updates, state = tx.update(now.grads, state, params, value=now.value, **extra)
            params = optax.apply_updates(params, updates)
        else:
            params, state = og.apply_gradients(tx, now.grads, state, params, value=now.value, **extra)
        return params, state, og.keep_if_held(state, jnp.array(False), jnp.array(True))

    stack_way = "loop"
    start = (*jax.device_get((params, state)), np.array(False))
    reference = [start, *_loop(quick_jit(step), start, data)]
    stack_way = stack.way
    ways: dict[str, Callable[[], list[Moment]]] = {
        "update": lambda: _loop(quick_jit(lambda *a: step(*a)), start, data),
        "scan": lambda: _scan(step, start, data),
        "vmap": lambda: _replicas(step, start, data),
        "donated": lambda: _loop(quick_jit(lambda *a: step(*a), donate_argnums=(0, 1)), start, data),
    }
    return reference, [start, *ways[stack.way]()]


def _at(data: Data, index: Any) -> Data:
    return jax.tree.map(lambda x: x[index], data)


def _loop(step: Callable[..., Moment], start: Moment, data: Data) -> list[Moment]:
    params, state = jax.tree.map(jnp.array, start[:2])
    moments = []
    for index in range(STEPS):
        params, state, held = step(params, state, _at(data, index))
        moments.append(jax.device_get((params, state, held)))
        moments[-1] = jax.tree.map(np.array, moments[-1])  # a donated buffer must not stay shared
    return moments


def _scan(step: Callable[..., Moment], start: Moment, data: Data) -> list[Moment]:
    def body(carry: Any, now: Data) -> Any:
        result = step(*carry, now)
        return result[:2], result

    results = quick_jit(lambda carry, data: jax.lax.scan(body, carry, data)[1])(start[:2], data)
    return [jax.tree.map(lambda x, i=i: np.asarray(x)[i], results) for i in range(STEPS)]


def _replicas(step: Callable[..., Moment], start: Moment, data: Data) -> list[Moment]:
    """Two replicas, whose faults come at different times; those of the first."""
    params, state = jax.tree.map(lambda x: jnp.stack([x, x]), start[:2])
    both = quick_jit(jax.vmap(step))
    moments = []
    for index in range(STEPS):
        pair = jax.tree.map(lambda x, i=index: jnp.stack([x[i], x[(i + 5) % STEPS]]), data)
        params, state, held = both(params, state, pair)
        moments.append(jax.tree.map(lambda x: np.asarray(x)[0], (params, state, held)))
    return moments


def check(stack: Stack, history: list[Moment]) -> None:
    """Held bits, counters, finite numbers, from the states alone."""
    for index, (before, after) in enumerate(itertools.pairwise(history)):
        where = f"step {index} ({stack.faults[index] or 'no fault'}) of {stack}"
        _check_finite(stack, after, where)
        pairs = zip(guards(before[1]), guards(after[1]), strict=True)
        rows = [row for row in (_check_guard(old, new, where) for old, new in pairs) if row is not None]
        waits = any(not each.emitted for each in accumulators(after[1]))
        held = any(row["event"] in HELD for row in rows) or (bool(after[2]) and not accumulators(after[1]))
        if any("rewind" in str(row["recovery"]) for row in rows):
            if len(stack.outside) == 1:
                snapshots = guards(after[1])[0].recovery_state.rewind_state.snapshot_steps
                then = [history[step][0] for step in snapshots if step >= 0]
                assert any(same_bits(after[0], params) for params in then), f"a rewind, but to no snapshot: {where}"
        elif waits or held:
            assert same_bits(before[0], after[0]), f"a held step moved the parameters: {where}"
    _check_counters(stack, history)


def _check_finite(stack: Stack, moment: Moment, where: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(moment[:2]):
        name = jax.tree_util.keystr(path)
        if _may_hold_nan(stack, name):
            continue
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert np.isfinite(leaf.astype(np.complex128)).all(), f"{name} is {leaf}: {where}"


def _may_hold_nan(stack: Stack, name: str) -> bool:
    """As documented: neither the sum nor the mean loss is looked at before the cycle ends."""
    return stack.on_nonfinite == "propagate" and ("gradient_sum" in name or "value_mean" in name)


def _check_guard(old: og.state.GuardState, new: og.state.GuardState, where: str) -> Any:
    """The row that this guard wrote; None if it was not asked."""
    if new.guard_step == old.guard_step:
        assert same_bits(old, new), f"a guard that was not asked changed: {where}"
        return None
    assert new.guard_step == old.guard_step + 1, where
    row = read_rows(new.recorder)[-1]
    acted = {part.split("_")[0] for part in str(row["recovery"]).split("+")} & {"reset", "rewind"}
    if row["event"] in HELD and not acted:
        assert same_bits(old.guarded_state, new.guarded_state), f"{row} changed the guarded state: {where}"
    if old.halted:
        assert row["event"] == "halted", f"a halted guard went on: {where}"
        assert same_bits(old.rule_states, new.rule_states), f"a halted guard's rules learn: {where}"
    return row


def _check_counters(stack: Stack, history: list[Moment]) -> None:
    last = history[-1][1]
    for guard in guards(last):
        rows = read_rows(guard.recorder)
        count = collections.Counter(str(event) for event in rows["event"])
        assert len(rows) == guard.guard_step, stack
        assert guard.skipped_total == sum(count[event] for event in HELD), (stack, count)
        assert guard.let_through_total == count["let_through"], (stack, count)
        assert 0 <= guard.clipped_total - count["clipped"] <= count["let_through"], (stack, count)
        bad = guard.nonfinite_total - count["nonfinite"] - count["nonfinite_update"]
        assert 0 <= bad <= count["halted"], (stack, count)
        assert np.all(rows["step"] == np.arange(len(rows))), stack
    states = [moment[1] for moment in history[1:]]
    for index, each in enumerate(accumulators(last)):
        if stack.outside[-1] == "accumulate":
            assert each.emitted_total == sum(accumulators(s)[index].emitted for s in states), stack
    if stack.outside[-1] == "loss_scaling":
        assert last.overflow_total == sum(s.overflowed for s in states), stack
    if len(stack.outside) == 1 and guards(last):
        held = [bool(moment[2]) for moment in history[1:]]
        assert held == [row["event"] in HELD for row in read_rows(guards(last)[0].recorder)], stack


def guards(state: Any) -> list[og.state.GuardState]:
    """Outer before inner, without those in snapshots."""
    nodes = [
        n
        for n in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, og.state.GuardState))
        if isinstance(n, og.state.GuardState)
    ]
    return [each for node in nodes for each in (node, *guards(node.guarded_state))]


def accumulators(state: Any) -> list[og.accumulation.AccumulateState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, og.accumulation.AccumulateState))
    return [n for n in leaves if isinstance(n, og.accumulation.AccumulateState)]


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def compare(stack: Stack, one: list[Moment], other: list[Moment]) -> None:
    """Both ways agree: whole numbers exactly, others up to the roundings of twelve steps.

    Those are of float32 at least, in which schedules and factors are; through `update` of the narrowest dtype, since
    Optax's updates come in the parameters'.
    """
    narrow = max(float(jnp.finfo(dtype).eps) for dtype in dtypes_of(stack).values())
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            name = jax.tree_util.keystr(path)
            if "parameter_sums" in name or _may_hold_nan(stack, name):
                continue  # sums of bits
            if jnp.issubdtype(x.dtype, jnp.inexact):
                wide = np.result_type(x.dtype if x.dtype.kind == "c" else np.float64, np.float64)
                eps = max(float(jnp.finfo(t).eps) for t in (x.dtype, jnp.float32))
                eps = max(eps, narrow) if stack.way == "update" else eps
                error = np.abs(x.astype(wide) - y.astype(wide)).max(initial=0)
                agree = error <= 32 * eps * max(np.abs(x.astype(wide)).max(initial=0), 1e-6)
            else:
                agree = np.array_equal(x, y)
            assert agree, f"after step {index - 1} {name} is {x} in a loop, {y} by {stack}"


def attack(stack: Stack) -> None:
    """Raises an AssertionError that describes what does not hold."""
    with settings(stack):
        reference, other = run(stack)
    check(stack, reference)
    check(stack, other)
    compare(stack, reference, other)


@contextlib.contextmanager
def settings(stack: Stack) -> Iterator[None]:
    wide = stack.dtype in ("float64", "complex128")
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def table(stacks: Sequence[Stack]) -> str:
    lines = [f"{len(stacks)} stacks use"]
    for kind, counts in coverage(stacks).items():
        lines.append(f"  {len(counts)} {kind}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--stack", type=int, default=None)
    options = parser.parse_args()
    end, failures, done = time.monotonic() + options.seconds, 0, 0
    first = time.time_ns() // 10**9 % 10**6 if options.seed is None else options.seed
    for seed in range(first, first + 10**6):
        stacks = deal(seed)
        for stack in stacks if options.stack is None else stacks[options.stack : options.stack + 1]:
            if time.monotonic() > end:
                break
            done += 1
            try:
                attack(stack)
            except Exception as error:  # each is a finding, and the others go on
                failures += 1
                print(f"FAILED {stack}\n  {type(error).__name__}: {str(error)[:1500]}", flush=True)
            jax.clear_caches()
        if options.stack is not None or time.monotonic() > end:
            break
    print(f"{done} stacks from seed {first} on, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

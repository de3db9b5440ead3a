"""What the ladder decides, before a step and after it, against its rules in plain Python, over random states.

One compilation each: all cases at once, under `vmap`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og
from optax_guard._step.moments import fingerprints, moves_float32, reset_state
from optax_guard._step.record import RECOVERIES
from optax_guard.recovery import _ladder, _reset
from optax_guard.recovery._start import Start

CASES = 800
KEEP, RESET_AFTER, DOWN_AFTER, BACK_AFTER, ATTEMPTS, OWES, EVERY, LOOKS = 3, 3, 2, 4, 2, 4, 5, 4
RUNGS = (
    og.reset_moments(RESET_AFTER, check_every=LOOKS),
    og.back_off(0.5, OWES, after=DOWN_AFTER, lowest=0.3, diverged=2.0),
    og.rewind(EVERY, keep=KEEP, after=BACK_AFTER, attempts=ATTEMPTS, diverged=3.0),
)
LADDER = _ladder.as_ladder("guard", (*RUNGS, Start()), optax.sgd(0.1, momentum=0.5), 50, None)
ONE = jnp.ones(())
PARAMS = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}
MOST_OWED = math.floor(OWES * math.log(0.3) / math.log(0.5))


def ints(rng: Any, low: int, high: int, *shape: int) -> Any:
    return rng.integers(low, high + 1, (CASES, *shape)).astype(np.int32)


def flags(rng: Any, share: float, *shape: int) -> Any:
    return rng.random((CASES, *shape)) < share


def levels(rng: Any, *shape: int) -> Any:
    size = rng.uniform(0.2, 5, (CASES, *shape))
    return (rng.choice([1.0, -1.0], size.shape, p=[0.8, 0.2]) * size).astype("f")


def random_cases(seed: int) -> tuple[Any, _ladder.Seen]:
    """States of the ladder, and what is seen of a step, with a leading axis of cases."""
    rng = np.random.default_rng(seed)
    one = _ladder.init_ladder(LADDER, PARAMS, LADDER.inner.init(PARAMS))
    state = jax.tree.map(lambda x: np.broadcast_to(x, (CASES, *x.shape)), one)
    reset = state.reset_state._replace(
        parameter_sums=rng.choice([2.0, 4.0, 5.0], (CASES, 2, 2), p=[0.45, 0.45, 0.1]).astype("f"),
        leaf_moved=flags(rng, 0.7, 2),
        moments_finite=flags(rng, 0.9),
        parameters_frozen=flags(rng, 0.1),
        frozen_leaves=ints(rng, 0, 2),
        standing_still=ints(rng, 3, 4),
        reset_total=ints(rng, 0, 9),
        silent_death_total=ints(rng, 0, 9),
    )
    back = state.back_off_state._replace(healthy_steps_owed=ints(rng, 0, MOST_OWED), back_off_total=ints(rng, 0, 9))
    rewind = state.rewind_state._replace(
        snapshot_steps=ints(rng, 0, 99, KEEP),
        snapshot_losses=levels(rng, KEEP),
        newest_snapshot=ints(rng, 0, KEEP - 1),
        snapshots_held=ints(rng, 0, KEEP),
        snapshot_due_in=ints(rng, 0, 2),
        rewinds_in_row=ints(rng, 0, ATTEMPTS + 1),
        rewind_total=ints(rng, 0, 9),
    )
    smoothed, best = levels(rng), levels(rng)
    smoothed[:100], best[:100] = 2 * np.abs(best[:100]), np.abs(best[:100])  # just not above twice the best
    watch = state.loss_watch._replace(
        smoothed_loss=smoothed, best_loss=best, first_loss=levels(rng), losses_seen=ints(rng, 0, 60)
    )
    state = state._replace(
        trouble_in_row=ints(rng, 0, 8),
        bad_update_before=flags(rng, 0.1),
        reset_state=reset,
        back_off_state=back,
        rewind_state=rewind,
        loss_watch=watch,
        start_state=state.start_state._replace(spoilt=flags(rng, 0.2)),
    )
    value = np.where(flags(rng, 0.1), rng.choice([0.0, np.nan, np.inf, 3e37], CASES), levels(rng))
    return state, _ladder.Seen(
        step=ints(rng, 0, 12),
        finite=flags(rng, 0.7),
        refused=flags(rng, 0.3),
        alive=flags(rng, 0.9),
        has_gradient=flags(rng, 0.8, 2),
        value=value.astype("f"),
    )


def case(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def fields(state: Any) -> dict[str, Any]:
    """Every number in the ladder's state by its name."""
    found: dict[str, Any] = {}
    for part in (state, *(x for x in state if isinstance(x, tuple) and x != ())):
        found |= {name: x for name, x in part._asdict().items() if isinstance(x, np.ndarray)}
    return found


def watched(w: Any, value: float, learns: bool) -> dict[str, float]:
    s, b, first, n = float(w.smoothed_loss), float(w.best_loss), float(w.first_loss), int(w.losses_seen)
    if learns and abs(value) < 1e37 and value != 0:
        first = value if n == 0 else first
        capped = value if n == 0 else min(value, s + 3 * max(abs(s), abs(first) / 100))
        s += max(1 / (n + 1), 1 / 50) * (capped - s)
        b, n = (s if n < 10 else min(b, s)), n + 1
    return {"smoothed_loss": s, "best_loss": b, "first_loss": first, "losses_seen": n}


def above(w: dict[str, float], factor: float) -> bool:
    size = max(abs(w["best_loss"]), abs(w["first_loss"]) / 100)
    return w["losses_seen"] >= 25 and w["smoothed_loss"] - w["best_loss"] > (factor - 1) * size


def planned(state: Any, seen: Any) -> dict[str, Any]:
    """The rules of docs/recovery/index.md."""
    reset, back, rewind, alive = state.reset_state, state.back_off_state, state.rewind_state, bool(seen.alive)
    bad = not seen.finite or seen.refused or state.bad_update_before
    row = int(state.trouble_in_row)
    row = (row + 1 if bad else 0) if alive else row
    bad = bad and alive
    before = {name: float(x) for name, x in state.loss_watch._asdict().items()}
    watch = watched(state.loss_watch, float(seen.value), alive and bool(seen.finite))
    may = rewind.rewinds_in_row < ATTEMPTS and rewind.snapshots_held > 0
    diverged = alive and bool(seen.finite) and above(watch, 3.0)
    reason = {
        "reset_refused": bad and row == RESET_AFTER,
        "reset_nonfinite": alive and not reset.moments_finite,
        "reset_frozen": alive and bool(reset.parameters_frozen),
        "rewind_refused": bad and row % BACK_AFTER == 0 and may,
        "rewind_diverged": diverged and may,
        "gave_up": diverged and rewind.rewinds_in_row >= ATTEMPTS,
    }
    rewinds = reason["rewind_refused"] or reason["rewind_diverged"]
    if rewinds or reason["gave_up"]:
        reason.update(reset_refused=False, reset_nonfinite=False, reset_frozen=False)
    dead = reason["reset_nonfinite"] or reason["reset_frozen"]
    resets = dead or reason["reset_refused"]
    reason["reset_start"] = (
        alive and bool(state.start_state.spoilt) and not (bad or resets or rewinds or reason["gave_up"])
    )
    rises = alive and above(watch, 2.0) and not above(before, 2.0)
    down = dead or rewinds or (bad and row == DOWN_AFTER) or rises
    owed = min(int(back.healthy_steps_owed) + OWES * down, MOST_OWED)
    one_before = rewind.rewinds_in_row > 0 and rewind.snapshots_held > 1
    place = (int(rewind.newest_snapshot) - one_before) % KEEP
    if rewinds:
        watch.update(smoothed_loss=rewind.snapshot_losses[place], best_loss=rewind.snapshot_losses[place])
    return {
        "reason": {name for name, on in {**reason, "back_off": down}.items() if on},
        "replaces": resets or rewinds or reason["gave_up"],
        "trouble_in_row": row,
        "moments_finite": bool(reset.moments_finite) or resets,
        "parameters_frozen": bool(reset.parameters_frozen) and not resets,
        "reset_total": int(reset.reset_total) + resets,
        "silent_death_total": int(reset.silent_death_total) + dead,
        "healthy_steps_owed": owed,
        "back_off_total": int(back.back_off_total) + down,
        "update_scale": 0.5 ** (owed / OWES),
        "newest_snapshot": place if rewinds else int(rewind.newest_snapshot),
        "snapshots_held": int(rewind.snapshots_held) - (rewinds and one_before),
        "snapshot_due_in": EVERY - 1 if rewinds else int(rewind.snapshot_due_in),
        "rewinds_in_row": int(rewind.rewinds_in_row) + rewinds,
        "rewind_total": int(rewind.rewind_total) + rewinds,
        **watch,
    }


def test_before_a_step_the_ladder_decides_by_its_rules() -> None:
    states, seen = random_cases(0)

    def plan(state: Any, seen: Any) -> dict[str, Any]:
        planned = _ladder.plan(LADDER, state, seen, PARAMS)
        return {**planned._asdict(), "replaces": planned.replaces}

    got = jax.device_get(quick_jit(jax.vmap(plan))(states, seen))
    numbers, happened = fields(got["state"]), dict.fromkeys(RECOVERIES, 0)
    for i in range(CASES):
        expected = planned(case(states, i), case(seen, i))
        reason = {name for position, name in enumerate(RECOVERIES) if got["reason"][i] >> position & 1}
        assert reason == expected.pop("reason"), i
        assert got["replaces"][i] == expected.pop("replaces"), i
        for name, number in expected.items():
            assert numbers[name][i] == pytest.approx(number, rel=1e-5, abs=1e-6), (i, name)
        for name in reason:
            happened[name] += 1
    assert min(happened.values()) > CASES // 100


def finished(state: Any, seen: Any, applied: bool, bad_update: bool, finite: bool, sums: Any) -> dict[str, Any]:
    reset, back, rewind, alive = state.reset_state, state.back_off_state, state.rewind_state, bool(seen.alive)
    due = alive and seen.step % LOOKS == 0
    moved = np.array([any(a != b) for a, b in zip(sums, reset.parameter_sums, strict=True)]) & (seen.step > 0)
    expected: dict[str, Any] = {"bad_update_before": bad_update and seen.has_gradient.any()}
    if not alive:
        expected["bad_update_before"] = state.bad_update_before
    if due:
        expected |= {"moments_finite": finite, "parameter_sums": sums}
    if due and applied:
        eligible = reset.leaf_moved & seen.has_gradient
        frozen = int((eligible & ~moved).sum())
        expected |= {"leaf_moved": moved, "frozen_leaves": frozen, "standing_still": 0}
        expected["parameters_frozen"] = frozen > 0 and 2 * frozen >= eligible.sum()
    elif due:
        expected["leaf_moved"] = reset.leaf_moved | moved
    healthy = applied and not seen.refused
    expected["healthy_steps_owed"] = max(int(back.healthy_steps_owed) - healthy, 0)
    watch = {name: float(x) for name, x in state.loss_watch._asdict().items()}
    healthy = healthy and not above(watch, 2.0)  # half of the way to 3
    wait = int(rewind.snapshot_due_in)
    takes = healthy and wait <= 0 and finite
    expected["snapshot_due_in"] = EVERY - 1 if takes else max(wait - healthy, 0)
    place = (int(rewind.newest_snapshot) + 1) % KEEP
    if takes:
        steps, losses = rewind.snapshot_steps.copy(), rewind.snapshot_losses.copy()
        steps[place], losses[place] = seen.step + 1, watch["smoothed_loss"]
        expected |= {"newest_snapshot": place, "snapshot_steps": steps, "snapshot_losses": losses, "rewinds_in_row": 0}
        expected["snapshots_held"] = min(int(rewind.snapshots_held) + 1, KEEP)
    kept = [place == i and takes for i in range(KEEP)]
    return {**expected, "snapshots": kept}


def test_after_a_step_the_ladder_looks_and_remembers_by_its_rules() -> None:
    states, seen = random_cases(1)
    states = states._replace(start_state=())  # tests/recovery/test_start.py
    rng = np.random.default_rng(2)
    applied, bad_update, finite = flags(rng, 0.6), flags(rng, 0.2), flags(rng, 0.8)
    inner = LADDER.inner.init(PARAMS)
    sums = np.array([[2.0, 2.0], [4.0, 4.0]])

    def finish(state: Any, seen: Any, applied: Any, bad_update: Any, finite: Any) -> Any:
        moments = jax.tree.map(lambda x: jnp.where(finite | (x.ndim == 1), x + 2, jnp.inf), inner)
        plan = _ladder.plan(LADDER, state, seen, PARAMS)._replace(state=state)
        after = _ladder.After(applied, bad_update, ONE, ONE, lambda: PARAMS, moments, lambda *_: PARAMS)
        events = _ladder._has_events(LADDER, plan, seen, applied)
        ends = (_ladder.finish(LADDER, plan, seen, after, quiet) for quiet in (False, True))
        return *ends, events, plan.resets | plan.rewinds

    got, quiet, events, recovers = jax.device_get(
        quick_jit(jax.vmap(finish))(states, seen, applied, bad_update, finite)
    )
    before, after, after_quiet = fields(states), fields(got), fields(quiet)
    assert 0.1 < events.mean() < 0.9
    assert events[recovers].all()
    for i in range(CASES):
        assert events[i] or all(np.array_equal(numbers[i], after_quiet[name][i]) for name, numbers in after.items()), i
        expected = finished(case(states, i), case(seen, i), applied[i], bad_update[i], bool(finite[i]), sums)
        for snapshot, written in zip(got.rewind_state.snapshots, expected.pop("snapshots"), strict=True):
            numbers = {
                float(x) for leaf in snapshot for x in np.concatenate([np.ravel(y[i]) for y in jax.tree.leaves(leaf)])
            }
            assert numbers == ({1.0, 2.0} if written else {0.0}), i
        for name, numbers in after.items():
            assert np.array_equal(numbers[i], expected.get(name, before[name][i])), (i, name)


def test_a_new_ladder_has_seen_and_done_nothing() -> None:
    state = jax.device_get(_ladder.init_ladder(LADDER, PARAMS, LADDER.inner.init(PARAMS)))
    known = {"moments_finite": 1, "update_scale": 1, "snapshot_steps": -1, "newest_snapshot": KEEP - 1}
    for name, numbers in fields(state).items():
        np.testing.assert_array_equal(numbers, known.get(name, 0), err_msg=name)
    for rung, field in zip(RUNGS, ("reset_state", "back_off_state", "rewind_state"), strict=True):
        alone = _ladder.as_ladder("guard", (rung,), LADDER.inner, 50, None)
        state = _ladder.init_ladder(alone, PARAMS, LADDER.inner.init(PARAMS))._asdict()
        there = {field} | ({"loss_watch"} if field != "reset_state" else set())
        assert {name for name in state if name.endswith(("_state", "_watch")) and state[name] != ()} == there


def test_without_a_loss_nothing_diverges() -> None:
    states, seen = random_cases(3)
    plan = quick_jit(jax.vmap(lambda state, seen: _ladder.plan(LADDER, state, seen, PARAMS)._asdict()))
    got = jax.device_get(plan(states, seen._replace(value=None)))
    for name in ("rewind_diverged", "gave_up"):
        assert not (got["reason"] >> RECOVERIES.index(name) & 1).any()
    jax.tree.map(np.testing.assert_array_equal, got["state"].loss_watch.losses_seen, states.loss_watch.losses_seen)


def test_only_a_leaf_of_sixteen_bits_can_be_too_coarse_for_its_update() -> None:
    params = {"coarse": jnp.ones(2, jnp.bfloat16), "fine": jnp.ones(2)}
    updates = {"coarse": jnp.full(2, 1e-4), "fine": jnp.full(2, 1e-4)}
    still = jnp.array([True, True])
    after = _ladder.After(jnp.array(True), jnp.array(False), ONE, ONE, lambda: params, (), lambda *_: updates)
    got = _reset._rounded(still, after, None)
    np.testing.assert_array_equal(got, [True, False])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_update_moves_what_is_at_most_a_rounding_of_float32_larger(dtype: Any) -> None:
    pairs = [(0.0, 0.0, False), (1e-30, 0.0, True), (2.0**-24, 1.0, True), (2.0**-25, 1.0, False), (-1.0, -8.0, True)]
    updates, params = ([jnp.full(2, pair[k], dtype).at[0].set(0) for pair in pairs] for k in (0, 1))
    np.testing.assert_array_equal(moves_float32(updates, params, None), [pair[2] for pair in pairs])
    assert not moves_float32([jnp.ones(1), jnp.ones(1, int)], [jnp.ones(1, int), jnp.ones(1)], None).any()


def test_the_sums_of_a_leaf_that_are_not_finite_count_as_zero() -> None:
    tree = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([1.0, jnp.inf]), "c": None}
    np.testing.assert_array_equal(fingerprints(tree, None), [[10, 2], [0, 0], [0, 0]])
    assert fingerprints({}, None).shape == (0, 2)


def test_a_complex_leaf_has_moved_if_its_imaginary_part_has() -> None:
    before, after = (fingerprints([jnp.full(2, z, jnp.complex64)], None) for z in (1 + 1j, 1 + 2j))
    np.testing.assert_array_equal(before, [[4, 2]])
    np.testing.assert_array_equal(after, [[10, 2]])


class Optimizer(NamedTuple):
    """A state with one of everything beside its moment."""

    moment: Any
    age: Any  # i32[]
    estimate: Any  # f32[], as of a learning rate
    key: Any  # u32[2]
    flag: Any  # bool[]
    by_leaf: Any  # i32[1]


def test_a_reset_reaches_moments_and_their_age_and_nothing_beside_them() -> None:
    def init(params: Any) -> Any:
        moment, none = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)
        return Optimizer(moment, none, none.astype(jnp.float32), jnp.zeros(2, jnp.uint32), none > 0, none[None] + none)

    params = {"w": jnp.ones(2)}
    inner = optax.GradientTransformation(init, optax.identity().update)
    used = jax.tree.map(lambda x: x + 1 if x.dtype != bool else ~x, init(params))
    reset = reset_state(inner, used, params)
    jax.tree.map(np.testing.assert_array_equal, reset, used._replace(moment={"w": jnp.zeros(2)}, age=0))
    apart = {"counter": used.age, "optimizer": used}  # a counter beside no moment is a schedule's
    inner = optax.GradientTransformation(lambda p: {"counter": init(p).age, "optimizer": init(p)}, inner.update)
    assert reset_state(inner, apart, params)["counter"] == 1


def test_a_narrow_snapshot_narrows_real_floats_alone() -> None:
    ladder = _ladder.as_ladder("guard", (og.rewind(keep=1, dtype=jnp.bfloat16),), LADDER.inner, 50, None)
    state = _ladder.init_ladder(ladder, {"z": jnp.ones(2, jnp.complex64), "w": jnp.ones(2)}, jnp.zeros((), jnp.int32))
    (snapshot,) = state.rewind_state.snapshots
    assert {leaf.dtype for leaf in jax.tree.leaves(snapshot)} == {
        jnp.dtype(x) for x in ("complex64", "bfloat16", "int32")
    }

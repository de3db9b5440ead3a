"""What the guard makes of a step: verdict, counters and the row of its log, against its rules in plain Python.

Random states, gradients, losses and verdicts of rules. One compilation for each guard: all cases at once, under `vmap`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og
from optax_guard._step.record import EVENTS

CASES, PATIENCE, HALT_AFTER, HISTORY = 300, 2, 3, 5
SPOILS = 7.0  # a gradient of which the optimizer makes NaN
LARGEST = {"bias": 65504.0, "kernel": float(np.finfo(np.float32).max)}
SQUARABLE = float(np.sqrt(np.finfo(np.float32).max))
DTYPES = {"bias": np.float16, "kernel": np.float32}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def spoiling() -> optax.GradientTransformation:
    def update(updates: Any, step: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda x: jnp.where(x == SPOILS, jnp.nan, -x).astype(x.dtype), updates), step + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def told(position: int, **options: Any) -> Any:
    """A rule that answers what the call says, and counts what it learns of."""

    def judge(statistics: Any, state: Any, params: Any = None, *, scales: Any, skips: Any, **extra: Any) -> Any:
        return og.Verdict(scales[position], skips[position]), state + 1

    return og.rule(lambda _: jnp.zeros((), jnp.int32), judge, **options)


RULES = (told(0), told(1, sees_nonfinite=True), told(2))


def built(rules: Any, **options: Any) -> Any:
    return og.guard(spoiling(), *rules, patience=PATIENCE, halt_after=HALT_AFTER, recorder_rows=HISTORY, **options)


def random_cases(tx: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def ints(high: int) -> Any:
        return rng.integers(0, high + 1, CASES).astype(np.int32)

    def drawn(*shares: tuple[float, float], dtype: Any = np.float32, size: Any = CASES) -> Any:
        numbers, weights = zip(*shares, strict=True)
        return rng.choice(np.array(numbers), size, p=np.array(weights) / sum(weights)).astype(dtype)

    def leaf(name: str, *shape: int) -> Any:
        large = (1e30, 0.3) if name == "kernel" else (-3e4, 2.0)
        common = (0.5, 4.0), (3.0, 2.0), (0.0, 1.0), (SPOILS, 0.6), (np.nan, 0.3), (np.inf, 0.3)
        whole = drawn(large, *common, dtype=DTYPES[name])
        return np.broadcast_to(whole.reshape(-1, *[1] * len(shape)), (CASES, *shape))

    one = tx.init({"bias": jnp.ones(2, jnp.float16), "kernel": jnp.ones((2, 2))})
    state = jax.tree.map(lambda x: np.broadcast_to(x, (CASES, *x.shape)), one)
    totals = ("guard_step", "clipped_total", "skipped_total", "nonfinite_total", "let_through_total", "guarded_state")
    state = state._replace(
        **{name: ints(9) for name in totals},
        rule_states=tuple(ints(9) for _ in state.rule_states),
        refused_in_row=ints(PATIENCE + 1),
        nonfinite_in_row=ints(HALT_AFTER),
        halted=rng.random(CASES) < 0.15,
    )
    bias = drawn((1.0, 1.0), (6e4, 1.0), dtype=np.float16)[:, None]
    return {
        "params": {"bias": np.repeat(bias, 2, 1), "kernel": np.full((CASES, 2, 2), 2.0, np.float32)},
        "state": state,
        "grads": {"bias": leaf("bias", 2), "kernel": leaf("kernel", 2, 2)},
        "value": drawn((0.25, 8.0), (-2.0, 1.0), (np.nan, 0.3), (np.inf, 0.3)),
        "scales": drawn((1.0, 12.0), (0.5, 2.0), (2.0, 1.0), (np.nan, 0.2), (1e20, 0.2), (1e-20, 0.1), size=(CASES, 3)),
        "skips": rng.random((CASES, 3)) < 0.12,
    }


def expected(case: dict[str, Any], rules: int, checks: bool) -> dict[str, Any]:
    """The rules of the docstrings of `guard`, `GuardState` and `Row`."""
    state, names = case["state"], ("bias", "kernel")
    with np.errstate(all="ignore"):
        norms = [np.linalg.norm(case["grads"][name].astype(float)) for name in names]
        scales, skips = case["scales"][:rules].astype(float), case["skips"][:rules]
        partial = np.cumprod(np.concatenate([[1.0], scales]), dtype=np.float32).astype(float)
        bad = [not norm <= SQUARABLE for norm in norms]
        finite = not any(bad) and np.isfinite(case["value"]) and np.isfinite(scales).all()
        finite = bool(finite and all(norm * part <= LARGEST["kernel"] for norm in norms for part in partial))
        scale = partial[-1]
        for name, norm in zip(names, norms, strict=True):
            finite = finite and norm * scale <= (min(SQUARABLE, LARGEST[name]) if scale > 1 else SQUARABLE)
        refused, clipped, halted = bool(skips.any()), scale != 1, bool(state.halted)
        goes_on = finite and not halted and (not refused or state.refused_in_row >= PATIENCE)
        updates = {}
        for name in names:
            gradient = (case["grads"][name].astype(np.float32) * np.float32(scale)).astype(DTYPES[name])
            updates[name] = np.where(gradient == SPOILS, np.nan, -gradient).astype(DTYPES[name])
        sums = [case["params"][name] + updates[name] for name in names]
    bad_sums = [not np.isfinite(total).all() for total in sums]
    bad_update = goes_on and checks and any(bad_sums)
    applied = goes_on and not bad_update
    nonfinite = not finite or bad_update
    in_row = int(state.nonfinite_in_row) if halted else (int(state.nonfinite_in_row) + 1) * nonfinite
    held_by_rule = finite and refused and not goes_on and not halted
    event = "applied" if not clipped else "clipped"
    for name, holds in (
        ("let_through", refused),
        ("skipped", held_by_rule),
        ("nonfinite_update", bad_update),
        ("nonfinite", not finite),
        ("halted", halted),
    ):
        event = name if holds else event
    total = norms[0] if np.isnan(norms[0]) else norms[1] if np.isnan(norms[1]) else np.inf
    acting = [*np.flatnonzero(skips), *np.flatnonzero(scales != 1), -1]
    worst = bad.index(True) if any(bad) else int(np.argmax(norms))
    return {
        "guard_step": state.guard_step + 1,
        "refused_in_row": 0 if applied else state.refused_in_row + held_by_rule,
        "nonfinite_in_row": in_row,
        "clipped_total": state.clipped_total + (applied and clipped),
        "skipped_total": state.skipped_total + (not applied),
        "nonfinite_total": state.nonfinite_total + nonfinite,
        "let_through_total": state.let_through_total + (applied and refused),
        "halted": halted or in_row >= HALT_AFTER,
        "guarded_state": state.guarded_state + applied,
        "rule_states": [x + (k == 1 or (finite and not halted)) for k, x in enumerate(state.rule_states)],
        "updates": updates if applied else {name: np.zeros_like(x) for name, x in updates.items()},
        "row": {
            "step": state.guard_step,
            "event": event,
            "rule": acting[0],
            "worst_leaf": bad_sums.index(True) if bad_update else worst,
            "value": case["value"],
            "grad_norm": total if any(bad) else np.hypot(norms[0], norms[1]),
            "clipped_norm": np.hypot(norms[0], norms[1]) * scale if applied else 0,
            "scale": min(scale, 1) if applied else 0,
            "recovery": "",
        },
    }


@pytest.mark.parametrize(
    ("rules", "checks", "fast"),
    [(RULES, True, True), (RULES, False, False), ((), True, False)],
    ids=["apply_gradients", "unchecked update", "update without rules"],
)
def test_a_step_is_judged_and_counted_by_the_rules(rules: Any, checks: bool, fast: bool) -> None:
    tx = built(rules, check_updates=checks)

    def step(case: dict[str, Any]) -> Any:
        extra = {"value": case["value"]} | ({"scales": case["scales"], "skips": case["skips"]} if rules else {})
        if fast:
            params, state = og.apply_gradients(tx, case["grads"], case["state"], case["params"], **extra)
            return jax.tree.map(jnp.subtract, params, case["params"]), state
        return tx.update(case["grads"], case["state"], case["params"], **extra)

    cases = random_cases(tx, seed=len(rules) + 10 * checks)
    updates, after = jax.device_get(quick_jit(jax.vmap(step))(cases))
    happened = dict.fromkeys(EVENTS, 0)
    for i in range(CASES):
        case, got = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (cases, after))
        wanted = expected(case, len(rules), checks)
        row = wanted.pop("row")
        for name, update in wanted.pop("updates").items():
            if fast:  # what of it is left after the rounding of the sum
                update = (case["params"][name] + update) - case["params"][name]
            np.testing.assert_allclose(updates[name][i], update, rtol=1e-3, err_msg=f"{i} {name}")
        for name, number in wanted.items():
            np.testing.assert_array_equal(getattr(got, name), number, err_msg=f"{i} {name}")
        logged = og.flight_log(got)
        logged = logged[logged["step"] == row["step"]][-1]
        for name, number in row.items():
            same = (
                logged[name] == number if isinstance(number, str) else np.isclose(logged[name], number, 1e-3, 0, True)
            )
            assert same, (i, name, logged[name], number)
        happened[row["event"]] += 1
    del happened["recovery"]
    never = (set() if checks else {"nonfinite_update"}) | (set() if rules else {"clipped", "skipped", "let_through"})
    assert all((count == 0) == (name in never) for name, count in happened.items()), happened


def test_a_new_guard_has_counted_nothing() -> None:
    og.guard(spoiling(), patience=0, halt_after=1, recorder_rows=1)  # the least of each
    state = built(RULES).init({"bias": jnp.ones(2)})._replace(recorder=(), seen_leaves=())
    assert not any(x.any() for x in jax.tree.leaves(state))


def test_the_optimizer_gets_the_largest_logits_in_float32_and_only_if_they_were_given() -> None:
    seen: list[dict[str, Any]] = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.append(extra)
        return updates, state

    tx = og.guard(optax.GradientTransformationExtraArgs(optax.identity().init, update))
    state = tx.init(jnp.ones(1))
    jax.eval_shape(lambda: tx.update(jnp.ones(1), state))
    assert not any("max_logits" in extra for extra in seen)
    seen.clear()
    jax.eval_shape(lambda: tx.update(jnp.ones(1), state, max_logits={"layer": jnp.ones(2, jnp.bfloat16)}))
    assert {extra["max_logits"]["layer"].dtype for extra in seen} == {jnp.dtype("float32")}

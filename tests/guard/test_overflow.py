"""Finite numbers that leave the range of their dtype on the way: held and counted, never applied."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import in_place, quick_jit
from registry import momentum

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")


def scaling(factor: float, of_leaf: int | None = None) -> og.Rule:
    """A rule that multiplies the gradient, or one leaf of it."""

    def judge(statistics: Any, state: Any, params: Any = None, **extra: Any) -> tuple[og.Verdict, Any]:
        scale = jnp.float32(factor)
        if of_leaf is not None:
            scale = jnp.where(jnp.arange(statistics.finite.size) == of_leaf, scale, 1)
        return og.Verdict(scale=scale, skip=jnp.zeros((), bool)), state

    return og.rule(optax.identity().init, judge)


def step(tx: Any, grads: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
    return quick_jit(lambda g, p: og.apply_gradients(tx, g, tx.init(p), p, **extra))(grads, params)


# dtype, gradient, scale, whether it fits: its norm within the dtype and, under guard, its squares within float32
SCALED = [
    ("float32", 1e15, 1e30, False, False),
    ("float32", 1e15, 1e10, True, False),  # 1e25 is a number, its square is not
    ("float32", 1e15, 1e3, True, True),
    ("bfloat16", 1e15, 1e30, False, False),
    ("bfloat16", 1e15, 1e3, True, True),
    ("float16", 1e3, 1e2, False, False),
    ("float16", 1e3, 10.0, True, True),
    ("complex64", 1e15, 1e30, False, False),
    ("float32", 0.0, 1e30, True, True),
]


@pytest.mark.parametrize(("dtype", "size", "factor", "alone", "guarded"), SCALED)
def test_a_rule_that_scales_up_never_makes_an_inf(
    dtype: str, size: float, factor: float, alone: bool, guarded: bool
) -> None:
    grads, params = (
        {"a": jnp.full(2, 1e-3 * size, dtype), "b": jnp.full(2, size, dtype)},
        {"a": jnp.ones(2), "b": jnp.ones(2)},
    )
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    for rule in (scaling(factor), scaling(factor, of_leaf=1)):
        updates = quick_jit(lambda g, rule=rule: rule.update(g, rule.init(g))[0])(grads)
        chex.assert_tree_all_finite(updates)
        expected = np.asarray(grads["b"]) * np.asarray(factor, dtype) if alone else np.zeros(2)
        np.testing.assert_allclose(updates["b"].astype(jnp.complex64), expected.astype(np.complex64), rtol=1e-2)
        after, state = step(og.guard(momentum(1e-8), rule), grads, params)
        chex.assert_tree_all_finite((after, state))
        assert og.flight_log(state)["event"][0] == ("clipped" if guarded else "nonfinite")
        assert int(state.nonfinite_total) == (not guarded)
        if not guarded:
            chex.assert_trees_all_equal(after, params)


def test_a_later_clip_does_not_hide_an_overflow_on_the_way() -> None:
    tx = og.guard(optax.sgd(1.0), scaling(1e30), og.clip_by_global_norm(1.0))
    _, state = step(tx, jnp.full(2, 1e15), jnp.ones(2))
    assert og.flight_log(state)["event"][0] == "nonfinite"
    _, state = step(og.guard(optax.sgd(1.0), scaling(1e3), og.clip_by_global_norm(1.0)), jnp.full(2, 1e18), jnp.ones(2))
    assert og.flight_log(state)["event"][0] == "clipped"


def test_the_halt_says_what_it_was() -> None:
    _, state = step(og.guard(optax.sgd(1.0), scaling(1e30), halt_after=1), jnp.full(2, 1e15), jnp.ones(2))
    with pytest.raises(og.TrainingHalted, match=r"the gradient was finite, but a rule .* made it overflow"):
        og.raise_if_halted(state)


def test_rules_that_only_scale_down_see_no_new_bound() -> None:
    """A float16 gradient whose norm exceeds its largest number, and a float32 one just below what can be squared."""
    for grads in (jnp.full(64, 6e4, jnp.float16), jnp.full(1, 1.8e19)):
        for rules in ((), (og.clip_by_global_norm(1e9),)):
            _, state = step(og.guard(momentum(1e-19), *rules), grads, jnp.ones_like(grads))
            assert og.flight_log(state)["event"][0] in ("applied", "clipped")


@pytest.mark.parametrize("inner", [momentum(1e-20), og.guard(momentum(1e-20))], ids=["plain", "guard"])
def test_unscaling_by_a_scale_below_1_holds_what_overflows(inner: Any) -> None:
    tx = og.loss_scaling(inner, init=1e-30, min_scale=1e-30)
    for size, moves in ((1e15, False), (1e-15, True)):
        params, state = step(tx, jnp.full(2, size), jnp.ones(2))
        chex.assert_tree_all_finite((params, state))
        assert bool(jnp.all(params == 1)) != moves
        assert int(state.overflow_total) == (not moves)
    tx = og.loss_scaling(og.accumulate(inner, 1), init=1e-30, min_scale=1e-30)
    params, state = step(tx, jnp.full(2, 1e15), jnp.ones(2))
    chex.assert_tree_all_finite((params, state))
    assert og.metrics(state)["accumulate/dropped_total"] == 1


@pytest.mark.parametrize("guarded", [True, False])
def test_a_sum_of_float16_gradients_that_leaves_float16_loses_its_cycle(guarded: bool) -> None:
    inner = og.guard(momentum(1e-3)) if guarded else momentum(1e-3)
    tx, params = og.accumulate(inner, 2, reduction="sum"), jnp.ones(2, jnp.float16)
    for size, emitted in ((6e4, False), (3e4, True)):
        run = quick_jit(lambda g, p, s: og.apply_gradients(tx, g, s, p))
        after, state = params, tx.init(params)
        for _ in range(2):
            after, state = run(jnp.full(2, size, jnp.float16), after, state)
        chex.assert_tree_all_finite((after, state))
        assert (bool(state.emitted), int(state.empty_total)) == (emitted, not emitted)
        if guarded:
            assert og.metrics(state)["guard/nonfinite_total"] == (not emitted)


def test_losses_and_weights_whose_products_and_sums_overflow_have_a_mean() -> None:
    tx = og.accumulate(og.guard(optax.sgd(1.0)), 2)
    run = quick_jit(lambda g, p, s, v, w: og.apply_gradients(tx, g, s, p, value=v, weight=w))
    params, state = jnp.ones(1), tx.init(jnp.ones(1))
    for loss, weight in ((1e38, 4.0), (3e38, 4.0)):
        params, state = run(jnp.ones(1), params, state, loss, weight)
        chex.assert_tree_all_finite(state)
    np.testing.assert_allclose(og.flight_log(state)["value"], [2e38], rtol=1e-6)
    most = float(1 / np.finfo(np.float32).tiny)  # 8.5e37
    for weights, dropped in (((most / 2, most / 2), 0), ((most, 1e37), 1), ((2.0 * most, most), 1), ((3e38, 3e38), 2)):
        params, before = jnp.zeros(1), int(state.dropped_total)
        for weight in weights:
            params, state = run(jnp.full(1, 1e-25), params, state, 1.0, weight)
            chex.assert_tree_all_finite(state)
        assert int(state.dropped_total) - before == dropped  # beyond it, the inverse of the sum would be 0
        np.testing.assert_allclose(params, [-1e-25 if dropped < 2 else 0.0], rtol=1e-6)


# parameter, update: each finite, their sum beyond the dtype
SUMS = {
    "float16": (6e4, 3e4),
    "bfloat16": (3.2e38, 1e38),
    "float32": (3.2e38, 1e38),
    "complex64": (3.2e38 + 1j, 3e38 + 1j),
    "float8_e4m3fn": (320, 256),  # without Inf: NaN is what lies beyond
    "float8_e5m2": (49152, 32768),
}


def going(by: Any) -> optax.GradientTransformation:
    """An optimizer whose update is `by` on the second element, whatever the gradient."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.zeros_like(u).at[1].set(by), updates))


@pytest.mark.parametrize("dtype", SUMS)
def test_a_finite_parameter_plus_a_finite_update_is_never_an_inf(dtype: str) -> None:
    number, by = SUMS[dtype]
    params = jnp.array([1.0, number, -0.0], dtype)
    grads, inner = jnp.ones_like(params), going(jnp.asarray(by, dtype))
    largest = jnp.finfo(dtype).max

    @quick_jit
    def steps(params: Any) -> Any:
        taken = {}
        for check in (True, False):
            tx = og.guard(inner, check_updates=check)
            taken[f"fast {check}"] = og.apply_gradients(tx, grads, tx.init(params), params)
            updates, state = tx.update(grads, tx.init(params), params)
            taken[f"optax {check}"] = optax.apply_updates(params, updates), state
        taken["bare"] = og.apply_gradients(inner, grads, inner.init(params), params)
        return taken

    taken = jax.device_get(steps(params))
    for way in ("fast True", "optax True"):
        after, state = taken[way]
        assert after.tobytes() == np.asarray(params).tobytes()
        assert og.flight_log(state)["event"][0] == "nonfinite_update"
        assert int(state.nonfinite_total) == 1
    for way in ("fast False", "bare"):
        after = taken[way][0]
        assert after[1].real == largest
        assert np.isfinite(after[1])
        np.testing.assert_array_equal(after[[0, 2]], np.asarray(params)[[0, 2]])
    assert not np.isfinite(taken["optax False"][0][1])  # the sum is Optax's


def test_what_was_not_finite_before_stays_visible() -> None:
    """Saturation hides no parameter that is NaN or Inf and no NaN; of an Inf update it keeps finite what was finite."""
    params, grads = jnp.array([jnp.inf, jnp.nan, 1.0, 1.0]), jnp.ones(4)
    by = optax.stateless(lambda *_: jnp.array([1.0, 1.0, jnp.inf, jnp.nan]))
    after, _ = step(by, grads, params)
    np.testing.assert_array_equal(after, [np.inf, np.nan, np.finfo(np.float32).max, np.nan])
    frozen = optax.stateless(lambda *_: jnp.zeros(4))
    _, state = step(og.guard(frozen, check_updates=True), grads, params)
    assert og.flight_log(state)["event"][0] == "applied"  # the step is not to blame for what was there before


@in_place
def test_saturation_costs_neither_bytes_nor_temporaries() -> None:
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(4)}
    tx = og.guard(optax.adamw(1e-3), og.clip_by_global_norm(1.0))
    step = jax.jit(lambda p, s, g: og.apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
    compiled = step.lower(params, tx.init(params), params).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * size
    # read the gradient twice, parameters and two moments once; write three: 8 times, and a little
    assert compiled.cost_analysis()["bytes accessed"] < 12 * size

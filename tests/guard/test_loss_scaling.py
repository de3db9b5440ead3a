"""Loss scaling: the scale's schedule against a plain Python one, and what other libraries got wrong."""

from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"w": jnp.zeros(3)}
SLOW = (
    16.0,
    2,
    4.0,
    0.5,
    1.0,
    256.0,
    3,
)  # grows by another factor than it falls by, and only from the third overflow on


def oracle(
    finite: list[bool],
    init: float,
    interval: int,
    growth: float,
    backoff: float,
    low: float,
    high: float,
    hysteresis: int,
) -> list[float]:
    """The scale after each step: `GradScaler`, with bounds, and the hysteresis of Megatron-LM."""
    scale, clean, left, scales = init, 0, hysteresis, []
    for good in finite:
        clean = clean + 1 if good else 0
        left = left if good else left - 1
        if not good and left <= 0:
            scale = max(scale * backoff, low)
        elif clean == interval:
            scale, clean, left = min(scale * growth, high), 0, hysteresis
        scales.append(scale)
    return scales


@pytest.mark.parametrize("settings", [(8.0, 3, 2.0, 0.5, 1.0, 64.0, 1), (16.0, 1, 4.0, 0.25, 2.0, 64.0, 1), SLOW])
@pytest.mark.parametrize("inner", [optax.sgd(1.0), og.guard(optax.sgd(1.0))], ids=["plain", "guard"])
def test_the_schedule_of_the_scale_and_unscaling_with_the_scale_used(settings: Any, inner: Any) -> None:
    """Growth exactly at the interval (flax grows one late), from the next step on (mpx unscales with the new one)."""
    tx = og.loss_scaling(inner, *settings[:-1], hysteresis=settings[-1])
    rng = np.random.default_rng(0)
    finite = list(rng.random(40) < 0.8) + [True] * 20 + [False] * 10
    step = quick_jit(
        lambda p, s, bad: og.apply_gradients(
            tx, jax.grad(lambda p: og.scale_loss(s, jnp.sum(p["w"]) * jnp.where(bad, jnp.nan, 1.0)))(p), s, p
        )
    )
    params, state, scales = PARAMS, tx.init(PARAMS), []
    for i, good in enumerate(finite):
        params, state = step(params, state, not good)
        scales.append(float(state.loss_scale))
        np.testing.assert_allclose(params["w"], -sum(finite[: i + 1]))  # each finite step moved by exactly 1
    assert scales == oracle(finite, *settings)
    assert int(state.overflow_total) == finite.count(False)
    chex.assert_tree_all_finite((params, state))


def test_the_scale_never_leaves_its_bounds() -> None:
    """flax's scale went to Inf (2547) and may go to 1e-38."""
    tx = og.loss_scaling(optax.sgd(0.0), init=4.0, growth_interval=1)
    step = quick_jit(lambda p, s, g: og.apply_gradients(tx, {"w": jnp.full(3, g)}, s, p))
    for gradient, end in ((1.0, 2.0**24), (jnp.inf, 1.0)):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(40):
            params, state = step(params, state, gradient)
        assert float(state.loss_scale) == end


def test_an_overflow_leaves_no_trace() -> None:
    tx = og.loss_scaling(optax.adam(0.1))
    params, state = og.apply_gradients(tx, {"w": jnp.ones(3)}, tx.init(PARAMS), PARAMS)
    for fast in (True, False):
        bad = {"w": jnp.array([1.0, jnp.inf, jnp.nan])}
        if fast:
            new, after = og.apply_gradients(tx, bad, state, params)
        else:
            updates, after = tx.update(bad, state, params)
            new = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(new, params)
        chex.assert_trees_all_equal(after.unscaled_state, state.unscaled_state)


def test_float16_gradients_reach_an_optimizer_that_works_in_float32() -> None:
    """Unscaled in float16, 2^-10 / 2^24 would be 0; Adam's second moment of it would be 0 anyway."""
    params = {"w": jnp.ones(3, jnp.float16)}
    tx = og.loss_scaling(optax.adam(0.5), init=2.0**24)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.unscaled_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    grads = {"w": jnp.full(3, 2.0**-4, jnp.float16)}
    new, after = og.apply_gradients(tx, grads, state, params)
    np.testing.assert_allclose(optax.tree.get(after, "mu")["w"], 0.1 * 2.0**-28, rtol=1e-5)
    assert new["w"].dtype == jnp.float16
    updates, _ = tx.update(grads, state, params)
    assert updates["w"].dtype == jnp.float16
    wide = {"w": jnp.ones(3)}
    updates, _ = tx.update(grads, tx.init(wide), wide)
    assert updates["w"].dtype == jnp.float32  # float32 parameters must not get updates rounded to float16


def test_with_accumulation_each_micro_gradient_is_unscaled_with_its_own_scale() -> None:
    """The scale doubles at every call: 4, 8, 16, 32; a NaN in the fifth call is dropped and halves it."""
    inner = og.accumulate(og.guard(optax.sgd(1.0)), 4)
    tx = og.loss_scaling(inner, init=4.0, growth_interval=1)
    params, state = PARAMS, tx.init(PARAMS)
    step = quick_jit(
        lambda p, s, x, w: og.apply_gradients(
            tx, jax.grad(lambda p: og.scale_loss(s, jnp.sum(p["w"]) * x))(p), s, p, weight=w
        )
    )
    for x, weight in ((1.0, 1.0), (2.0, 3.0), (4.0, 1.0), (8.0, 3.0)):
        params, state = step(params, state, x, weight)
    np.testing.assert_allclose(params["w"], -(1 + 6 + 4 + 24) / 8, rtol=1e-6)
    for x in (jnp.nan, 3.0, 3.0, 6.0):
        before = float(state.loss_scale)
        params, state = step(params, state, x, 1.0)
        assert float(state.loss_scale) == (before / 2 if np.isnan(x) else before * 2)
    np.testing.assert_allclose(params["w"], -35 / 8 - 4, rtol=1e-6)
    metrics = og.metrics(state)
    assert int(metrics["accumulate/dropped_total"]) == int(metrics["loss_scaling/overflow_total"]) == 1
    assert int(metrics["guard/nonfinite_total"]) == 0


def test_inside_accumulation_it_learns_of_a_cycle_lost_to_overflow() -> None:
    tx = og.accumulate(og.loss_scaling(optax.sgd(1.0), init=8.0, growth_interval=1), 2)
    params, state = PARAMS, tx.init(PARAMS)
    for gradient in (jnp.inf, jnp.nan, 8.0, 4.0):
        params, state = og.apply_gradients(tx, {"w": jnp.full(3, gradient)}, state, params)
    np.testing.assert_allclose(params["w"], -6.0 / 4.0)
    assert float(state.accumulated_state.loss_scale) == 8.0  # 8, halved, doubled


def test_a_mean_that_overflows_by_its_small_weights_is_held() -> None:
    """Each share and their sum are within bounds; nothing looks at the micro-batches themselves."""
    tx = og.accumulate(og.loss_scaling(optax.sgd(1.0), init=1.0), 2, on_nonfinite="propagate")
    step = quick_jit(lambda p, s: og.apply_gradients(tx, {"w": jnp.full(3, 1e21)}, s, p, weight=1e-3))
    params, state = step(*step(PARAMS, tx.init(PARAMS)))
    np.testing.assert_array_equal(params["w"], 0)
    assert state.accumulated_state.overflow_total == 1


def test_below_a_scale_of_1_the_loss_and_every_leaf_are_judged() -> None:
    tx = og.loss_scaling(optax.sgd(1.0), init=2.0**-30, min_scale=2.0**-40)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    step = quick_jit(lambda p, s, a, v: og.apply_gradients(tx, {"a": a, "b": jnp.ones(1)}, s, p, value=v))
    state = tx.init(params)
    for size, loss, held in ((1e15, 1.0, 1), (1.0, jnp.nan, 2), (1.0, 1.0, 2)):
        params, state = step(params, state, jnp.full(1, size), jnp.float32(loss))
        assert state.overflow_total == held
        assert (params["b"] != 0) == (held == 2 and loss == 1)


def test_parameters_keep_their_dtype_under_gradients_of_a_wider_one() -> None:
    tx, params = og.loss_scaling(optax.sgd(0.5), init=1.0), jnp.ones(1, jnp.float16)
    new, _ = og.apply_gradients(tx, jnp.ones(1, jnp.float32), tx.init(params), params)
    assert (new, new.dtype) == (0.5, jnp.float16)


@pytest.mark.parametrize("bound", ["init", "min_scale", "max_scale"])
def test_the_bounds_of_the_scale_are_known_before_a_step(bound: str) -> None:
    with pytest.raises(ValueError, match=f"loss_scaling: `{bound}` must be a number in .*traced"):
        jax.eval_shape(lambda x: og.loss_scaling(optax.sgd(1.0), **{bound: x}).init(PARAMS), 2.0)


def test_a_new_scale_has_seen_no_overflow() -> None:
    state = tuple(og.loss_scaling(optax.identity(), init=4.0, hysteresis=3).init(PARAMS))
    assert [x.item() for x in state[1:]] == [4.0, 0, 3, False, 0]


def test_a_leaf_of_integers_stays_one() -> None:
    params = {"w": jnp.ones(1, jnp.float16), "n": jnp.ones(1, jnp.int32)}
    tx = og.loss_scaling(optax.trace(0.9), init=1.0)
    state = tx.init(params)
    grads = {"w": jnp.ones(1, jnp.float16), "n": np.zeros(1, jax.dtypes.float0)}
    chex.assert_trees_all_equal_dtypes(
        og.apply_gradients(
            og.loss_scaling(optax.identity()), grads, og.loss_scaling(optax.identity()).init(params), params
        )[0],
        params,
    )
    assert state.unscaled_state.trace["n"].dtype == jnp.int32


def test_a_guard_inside_halts_on_a_stream_that_is_bad_at_every_scale() -> None:
    tx = og.loss_scaling(og.guard(optax.sgd(1.0), halt_after=3), init=2.0)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = og.apply_gradients(tx, {"w": jnp.full(3, jnp.nan)}, state, params)
    with pytest.raises(og.TrainingHalted):
        og.raise_if_halted(state, params)
    assert float(state.loss_scale) == 1.0


def test_bounds_and_interval_survive_jit_and_checkpoints() -> None:
    """jmp forgets `min_loss_scale` in every `jit`; here they are in the function, and the state is arrays."""
    tx = og.loss_scaling(optax.sgd(1.0), init=4.0, min_scale=2.0)
    step = quick_jit(lambda p, s: og.apply_gradients(tx, {"w": jnp.full(3, jnp.nan)}, s, p))
    params, state = step(PARAMS, tx.init(PARAMS))
    saved = flax.serialization.to_bytes(state)
    state = flax.serialization.from_bytes(tx.init(PARAMS), saved)
    for _ in range(3):
        params, state = step(params, state)
    assert float(state.loss_scale) == 2.0


def test_scale_loss_works_in_float32_and_counts_in_the_derivative() -> None:
    state = og.loss_scaling(optax.sgd(1.0)).init(PARAMS)
    scaled = og.scale_loss((optax.EmptyState(), state), jnp.float16(40.0))
    assert (scaled.dtype, float(scaled)) == (jnp.float32, 40.0 * 2**15)  # Inf in float16
    assert float(jax.grad(lambda x: og.scale_loss(state, x))(jnp.float32(1.0))) == 2**15
    with pytest.raises(ValueError, match="expected one `loss_scaling` in this state, found 0"):
        og.scale_loss(optax.sgd(1.0).init(PARAMS), jnp.float32(1.0))
    with pytest.raises(ValueError, match="`loss` must be real"):
        og.scale_loss(state, jnp.complex64(1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": 0.5}, r"`init` must be a number in \[1, 1.67772e\+07\] \(`min_scale` to `max_scale`\); got 0.5"),
        ({"init": 2.0**25}, "`init` must be"),
        ({"growth_interval": 0}, "`growth_interval` must be a whole number >= 1; got 0"),
        ({"growth_factor": 1.0}, r"`growth_factor` must be a number in \(1, inf\); got 1.0"),
        ({"backoff_factor": 1.0}, r"`backoff_factor` must be a number in \(0, 1\); got 1.0"),
        ({"hysteresis": 0}, "`hysteresis` must be a whole number >= 1; got 0"),
        (
            {"min_scale": 0.0},
            r"`min_scale` must be a number in \[1.17549e-38, 8.50706e\+37\] \(2\^-126 to 2\^126\); got 0.0",
        ),
        ({"max_scale": 0.5}, r"`max_scale` must be a number in \[1, 8.50706e\+37\] \(`min_scale` to 2\^126\); got 0.5"),
        ({"inner": 3}, "`inner` must be"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"loss_scaling: {message}"):
        og.loss_scaling(**{"inner": optax.sgd(1.0), **arguments})

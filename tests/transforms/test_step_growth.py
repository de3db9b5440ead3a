"""`limit_step_growth` against its equation in float64, and what it lets pass: a warm-up, and no jump."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit

import optax_guard as og

RNG = np.random.default_rng(0)
PARAMS = {
    "bias": np.zeros(3, np.float32),
    "kernel": RNG.normal(size=(4, 3)).astype(np.float32),
    "scale": np.float32(2.0),
    "small": np.full((3, 1, 2), 1e-3, np.float32),
}
DIRECTION = jax.tree.map(lambda x: np.asarray(RNG.normal(size=x.shape), np.float32), PARAMS)
TX = og.limit_step_growth()
STEP = quick_jit(lambda update, state, params: TX.update(update, state, params))


def of_layers(tree: Any) -> float:
    return float(sum(np.sum(np.square(np.abs(np.asarray(tree[name], np.float64)))) for name in ("kernel", "small")))


def reference() -> float:
    return max(of_layers(PARAMS), np.sqrt(12.0) + np.sqrt(6.0)) ** 0.5


def run(changes: Any) -> tuple[list[float], Any]:
    """The relative changes that come out, and the last state, for those that go in."""
    state, passed = TX.init(PARAMS), []
    unit = np.float32(of_layers(DIRECTION) ** 0.5 / reference())
    for change in changes:
        update, state = STEP(jax.tree.map(lambda x, c=change: x * np.float32(c) / unit, DIRECTION), state, PARAMS)
        passed.append(of_layers(update) ** 0.5 / reference())
        scales = [np.asarray(u) / d for u, d in zip(jax.tree.leaves(update), jax.tree.leaves(DIRECTION), strict=True)]
        np.testing.assert_allclose(np.concatenate([s.ravel() for s in scales]), passed[-1] / unit, rtol=1e-5)
    return passed, state


def oracle(changes: Any) -> tuple[list[float], float, int]:
    average, passed, bounded, t = 0.0, [], 0, -1
    for r in changes:
        bound = max(0.01, 3 * average)
        passed.append(min(r, bound))
        t += r > 0
        if r == 0:
            continue
        if r <= bound:
            average += 2 / (t + 2) * (r - average)
        else:
            bounded += 1
    return passed, average, bounded


RISES = {
    "noise": 0.02 * np.exp(RNG.normal(0, 1.0, 60)) * np.minimum(np.arange(60) / 30, 1),
    "too large at once": np.full(30, 0.5),
    "as large as allowed, then more": np.r_[np.full(40, 0.0099), np.full(40, 0.025), np.full(40, 0.06)],
    "a ramp of 5 % a step, late": np.r_[np.full(200, 0.008), 0.008 * 1.05 ** np.arange(80)],
    "none, then a jump": np.r_[np.zeros(10), np.full(5, 1.0)],
}


@pytest.mark.parametrize("name", RISES)
def test_it_follows_its_equation(name: str) -> None:
    passed, state = run(RISES[name])
    expected, average, bounded = oracle(np.asarray(RISES[name], np.float32).astype(np.float64))
    np.testing.assert_allclose(passed, expected, rtol=1e-4, atol=1e-9)
    numbers = og.metrics(state)
    np.testing.assert_allclose(numbers["limit_step_growth/average"], average, rtol=1e-4, atol=1e-9)
    assert numbers["limit_step_growth/bound_total"] == bounded
    assert numbers["limit_step_growth/step"] == np.sum(RISES[name] > 0)
    np.testing.assert_allclose(
        numbers["limit_step_growth/scale"], expected[-1] / max(RISES[name][-1], 1e-30), rtol=1e-4
    )


@pytest.mark.parametrize("first", [1e-4, 0.0071])
def test_a_linear_warm_up_to_any_height_passes_with_noise_and_keeps_its_bits(first: float) -> None:
    rise = first * np.arange(1, 101) * RNG.uniform(1.0, 1.4, 100)
    state = TX.init(PARAMS)
    unit = np.float32(of_layers(DIRECTION) ** 0.5 / reference())
    for change in rise:
        update = jax.tree.map(lambda x, c=change: x * np.float32(c) / unit, DIRECTION)
        got, state = STEP(update, state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, got, update)
    assert og.metrics(state)["limit_step_growth/bound_total"] == 0


@pytest.mark.parametrize("every", [1, 4])
def test_a_warm_up_from_zero_passes_also_where_most_calls_do_not_move(every: int) -> None:
    rise = np.zeros(30 * every)
    rise[::every] = 0.008 * np.arange(30)
    np.testing.assert_allclose(run(rise)[0], rise, rtol=1e-4)


def test_squares_that_overflow_only_together_do_not_enter() -> None:
    large = {name: jnp.full((2, 2), 9e18) for name in "ab"}
    _, state = TX.update(large, TX.init(large), large)
    assert og.metrics(state)["limit_step_growth/average"] == 0


def test_doubles_are_compared_as_doubles() -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        weights = jnp.asarray(RNG.normal(size=(4, 4)))
        for tx in (TX, og.limit_step_growth(jnp.float64(0.01))):
            update, _ = tx.update(weights * 0.01 * (1 - 1e-15), tx.init(weights), weights)
            np.testing.assert_array_equal(update, weights * 0.01 * (1 - 1e-15))


def test_a_late_ramp_is_bounded_and_an_early_one_of_a_warm_up_is_not() -> None:
    late, _ = run(RISES["a ramp of 5 % a step, late"])
    assert max(late) < 0.05 < RISES["a ramp of 5 % a step, late"][-1] / 4
    exponential = 1e-3 * 1.2 ** np.arange(20)  # to 0.03 within 20 steps
    np.testing.assert_allclose(run(exponential)[0], exponential, rtol=1e-4)


def test_a_layer_that_starts_at_zero_may_grow_as_one_that_is_initialised() -> None:
    params = {"kernel": jnp.zeros((16, 4))}
    got, _ = TX.update({"kernel": jnp.ones((16, 4))}, TX.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(got["kernel"]), 0.01 * 64**0.25, rtol=1e-5)


def test_without_a_layer_nothing_is_bounded() -> None:
    params = {"a": jnp.ones(5), "b": jnp.ones(())}
    update = {"a": jnp.full(5, 1e9), "b": jnp.full((), -3.0)}
    got, state = TX.update(update, TX.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, got, update)
    assert [float(x) for x in og.metrics(state).values()] == [0, 0, 0, 1]
    empty, _ = TX.update({"a": None}, TX.init({"a": None}), {"a": None})
    assert empty == {"a": None}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_finite_does_not_raise_the_bound(bad: float) -> None:
    _, state = run([0.004] * 5)
    update = jax.tree.map(lambda x: x * np.float32(1e-3), DIRECTION)
    update["kernel"] = update["kernel"].copy()
    update["kernel"][1, 1] = bad
    got, after = STEP(update, state, PARAMS)
    seen = og.metrics(after)
    if np.isnan(bad):  # the leaf is left as it is, and the others are within the bound
        np.testing.assert_array_equal(got["kernel"], update["kernel"])
        np.testing.assert_array_equal(got["small"], update["small"])
    else:
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(got))
        assert seen["limit_step_growth/bound_total"] == 1
        assert seen["limit_step_growth/average"] == og.metrics(state)["limit_step_growth/average"]
    assert np.isfinite(seen["limit_step_growth/average"])
    assert seen["limit_step_growth/average"] <= og.metrics(state)["limit_step_growth/average"]


def test_the_bound_is_below_start_for_no_history() -> None:
    passed, _ = run([0.0] * 50 + [0.0099])
    np.testing.assert_allclose(passed[-1], 0.0099, rtol=1e-4)
    zero = og.limit_step_growth(0.0)
    update, _ = zero.update(DIRECTION, zero.init(PARAMS), PARAMS)
    assert not any(np.any(x) for x in jax.tree.leaves(update))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: og.limit_step_growth(-0.1), "limit_step_growth: `start` -0.1"),
        (lambda: og.limit_step_growth(0.1, 0.9), "limit_step_growth: `factor` 0.9"),
        (lambda: og.limit_step_growth(np.nan), "limit_step_growth: `start` nan"),
        (lambda: TX.update(PARAMS, TX.init(PARAMS)), "limit_step_growth: needs the parameters"),
    ],
)
def test_wrong_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert all(word in str(caught.value) for word in words.split()), str(caught.value)

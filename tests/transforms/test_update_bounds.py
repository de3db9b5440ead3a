"""Bounds on the finished update: NumPy oracles, the guarantees of the docstrings, and a rate that is far too large."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

RNG = np.random.default_rng(0)
PARAMS = {
    "bias": np.zeros(8, np.float32),
    "kernel": RNG.standard_normal((8, 4)).astype(np.float32),
    "scale": np.full(3, 5.0, np.float32),
}


def draw(size: float) -> dict[str, np.ndarray]:
    return {k: (size * RNG.standard_normal(v.shape)).astype(np.float32) for k, v in PARAMS.items()}


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree))))


def once(tx: optax.GradientTransformation, updates: Any, params: Any = PARAMS) -> Any:
    return quick_jit(lambda u: tx.update(u, tx.init(params), params)[0])(updates)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e12])
def test_limit_step_follows_its_equation(size: float) -> None:
    update = draw(size)
    count = sum(x.size for x in PARAMS.values())
    factor = min(1, 0.1 * max(norm(PARAMS), 0.01 * np.sqrt(count)) / norm(update))
    got = once(og.limit_step(0.1), update)
    leafwise = once(og.limit_step(0.1, scope="leaf"), update)
    for k, u in update.items():
        np.testing.assert_allclose(got[k], u * factor, rtol=2e-6)
        leaf = min(1, 0.1 * max(norm(PARAMS[k]), 0.01 * np.sqrt(u.size)) / norm(u))
        np.testing.assert_allclose(leafwise[k], u * leaf, rtol=2e-6)
        if size < 1e-3 and k != "bias":
            assert np.asarray(leafwise[k]).tobytes() == u.tobytes()


def test_limit_step_lets_zeros_grow_to_the_floor_and_takes_a_schedule() -> None:
    tx = optax.chain(optax.sgd(1.0), og.limit_step(lambda step: 0.1 / (1 + step.astype(jnp.float32)), scope="leaf"))
    params, state = jnp.zeros(4), tx.init(jnp.zeros(4))
    lengths = []
    for _ in range(2):
        update, state = tx.update(-jnp.ones(4), state, params)
        lengths.append(norm(update))
    np.testing.assert_allclose(lengths, [0.1 * 0.02, 0.05 * 0.02], rtol=1e-6)
    constant, weights = og.limit_step(0.1, scope="leaf"), np.zeros(4, np.float32)
    for _ in range(10):
        weights = weights + np.asarray(once(constant, np.ones(4, np.float32), weights))
    np.testing.assert_allclose(weights, 0.01, rtol=1e-5)


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_limit_step_with_numbers_that_are_none(scope: str) -> None:
    tx = og.limit_step(0.1, scope=scope)
    update = draw(10.0)
    clean = once(tx, {**update, "bias": np.zeros(8, np.float32)})
    got = once(tx, {**update, "bias": np.full(8, np.nan, np.float32)})
    assert np.all(np.isnan(got["bias"]))
    np.testing.assert_allclose(got["kernel"], clean["kernel"], rtol=1e-6)
    huge = once(tx, {**update, "scale": np.full(3, 1e30, np.float32)})
    np.testing.assert_array_equal(huge["scale"], 0)
    broken = once(tx, update, {**PARAMS, "kernel": np.full((8, 4), np.inf, np.float32)})
    assert np.all(np.isfinite(broken["kernel"]))
    np.testing.assert_array_equal(once(og.limit_step(0.0, scope=scope), update)["kernel"], 0)
    assert np.all(np.isnan(once(og.limit_step(lambda _: np.nan, scope=scope), update)["kernel"]))
    np.testing.assert_array_equal(once(og.limit_step(jnp.float32(-1.0), scope=scope), update)["kernel"], 0)
    np.testing.assert_array_equal(once(og.limit_step(np.inf, scope=scope), update)["kernel"], update["kernel"])


def test_limit_step_holds_a_rate_that_is_far_too_large() -> None:
    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.square(w) - 1))

    def train(tx: optax.GradientTransformation) -> float:
        def body(carry: Any, _: Any) -> Any:
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.linspace(0.5, 3.0, 8)
        return float(loss(jax.lax.scan(body, (start, tx.init(start)), None, 300)[0][0]))

    assert not train(optax.sgd(1.0)) < 1
    bounded = og.limit_step(optax.exponential_decay(0.05, 100, 0.1))
    assert train(optax.chain(optax.sgd(1.0), bounded)) < 0.1


def replay(norms: np.ndarray, make: Any = og.clip_by_update_norm, **arguments: Any) -> np.ndarray:
    tx = make(**arguments)

    def body(state: Any, x: Any) -> Any:
        update, state = tx.update(x[None], state)
        return state, (update[0], state)

    updates, states = quick_jit(lambda xs: jax.lax.scan(body, tx.init(None), xs)[1])(np.asarray(norms, np.float32))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states))
    return np.asarray(updates)


def history() -> np.ndarray:
    norms = np.exp(0.3 * np.random.default_rng(1).standard_normal(500))
    norms[[150, 151, 250]] *= [1000, 800, 10]
    norms[350:] *= 5
    return norms.astype(np.float32)


def test_the_published_clip_by_update_norm_is_levanters() -> None:
    norms = history().astype(np.float64)
    expected = []
    for t, x in enumerate(norms):
        past = norms[max(0, t - 128) : t]
        limit = past.mean() + 3 * max(past.std(), 1e-6) if len(past) >= 64 else np.inf
        expected.append(min(x, limit))
    np.testing.assert_allclose(replay(norms, og.published.clip_by_update_norm), expected, rtol=1e-5)
    assert expected[151] > 100  # the second spike of two is let through, as published


def test_the_default_clip_by_update_norm_follows_its_equations() -> None:
    norms = history()
    kept, recent, expected = [], [], []
    for x in np.log(norms.astype(np.float64)):
        last, few, limit = np.sort(kept[-128:]), np.sort(recent[-15:]), np.inf
        if len(last) >= 15:
            middle, n = np.median(last), len(last)
            margin = max(3 * (last[9 * n // 10] - middle) / 1.2815516 * (1 + 8 / n), np.log(2))
            limit = middle + margin
            if len(few) == 15 and few[7] > limit:
                limit = few[7] + max(3 * 1.4826022 * np.median(np.abs(few - few[7])), margin)
        kept.append(min(x, limit))
        recent.append(x)
        expected.append(np.exp(min(x, limit)))
    got = replay(norms)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert max(got[150:152]) < 5
    np.testing.assert_allclose(got[365:], norms[365:], rtol=0.5)  # a lasting rise is followed


def test_one_bad_update_changes_no_later_one() -> None:
    norms = history()
    bad = np.insert(norms, 100, [np.nan, np.inf, 1e30])
    got = replay(bad)
    np.testing.assert_allclose(np.delete(got, [100, 101, 102]), replay(norms), rtol=1e-6)
    assert got[102] == 0
    constant = replay(np.concatenate([np.ones(100), [1e6], np.ones(20)]))
    np.testing.assert_allclose(constant, np.where(np.arange(121) == 100, 2, 1), rtol=1e-5)
    for value in (0.0, np.nan):
        np.testing.assert_array_equal(replay(np.full(200, value)), np.full(200, value))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e12])
def test_clippy_follows_the_paper(size: float) -> None:
    update = draw(size)
    got = once(og.clippy(0.1, absolute=1e-3), update)
    for k, u in update.items():
        allowed = 0.1 * np.abs(PARAMS[k].astype(np.float64)) + 1e-3
        np.testing.assert_allclose(got[k], u * min(1, np.min(allowed / np.abs(u))), rtol=2e-6)
        assert np.all(np.abs(got[k]) <= allowed * (1 + 1e-6))


def test_clippy_with_zeros_and_numbers_that_are_none() -> None:
    update = draw(1.0)
    np.testing.assert_allclose(np.max(np.abs(once(og.clippy(), update)["bias"])), 1e-7, rtol=1e-5)
    np.testing.assert_array_equal(once(og.clippy(), {k: 0 * v for k, v in update.items()})["kernel"], 0)
    update["kernel"][0, 0] = np.nan
    update["kernel"][0, 1] = np.inf
    got = once(og.clippy(), update)["kernel"]
    assert np.isnan(got[0, 0])
    assert np.isinf(got[0, 1])
    assert np.all(np.abs(got[1:]) <= 0.1 * np.abs(PARAMS["kernel"][1:]) * (1 + 1e-5) + 1e-7)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("limit_step", lambda: og.limit_step(lambda step: 0.1 + 0.0 * step.astype(jnp.float32))),
        ("clippy", lambda: og.clippy(0.1, absolute=1e-3)),
        ("update_norm", lambda: og.clip_by_update_norm(8, accept_after=2)),
    ],
)
def test_metrics_tell_how_often_a_bound_takes_hold(name: str, make: Any) -> None:
    tx = og.guard(optax.chain(optax.sgd(1.0), make()))
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    state, scales = tx.init(params), []
    step = quick_jit(lambda g, s: tx.update(jax.tree.map(lambda x: x * g, params), s, params)[1])
    for size in (0.05, 0.05, 0.05, 0.05, 1.0, 0.05, np.nan, 0.05, 2.0):
        state = step(size, state)
        scales.append(float(og.metrics(state)[f"{name}/scale"]))
    seen = og.metrics(state)
    assert [scale < 1 for scale in scales] == [False] * 4 + [True, False, False, False, True]
    assert (seen[f"{name}/bound_total"], seen.get(f"{name}/step", 8)) == (2, 8)  # held steps are not seen
    if name == "limit_step":
        np.testing.assert_allclose(scales[-1], 0.1 / 2.0, rtol=1e-5)


def test_the_factor_of_a_bound_that_is_nan_counts_as_0_in_the_state() -> None:
    tx = og.limit_step(lambda _: np.nan)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert (state.limit_step_scale, state.limit_step_bound_total) == (0, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: og.limit_step(-0.1), "limit_step: `max_change` must be a number in .0, inf.; got -0.1"),
        (lambda: og.limit_step(0.1, scope="row"), "limit_step: `scope` must be one of 'tree', 'leaf'; got 'row'"),
        (lambda: og.limit_step(0.1, floor=0.0), "limit_step: `floor` .* 0.0"),
        (lambda: og.clip_by_update_norm(0), "clip_by_update_norm: `window` must be a whole number >= 2; got 0"),
        (lambda: og.clip_by_update_norm(deviations=-1.0), "clip_by_update_norm: `deviations` .* -1.0"),
        (lambda: og.clip_by_update_norm(accept_after=0), "clip_by_update_norm: `accept_after` .* 0"),
        (lambda: og.published.clip_by_update_norm(1), "published.clip_by_update_norm: `window` .* >= 2; got 1"),
        (lambda: og.clippy(-1.0), "clippy: `relative` .* -1.0"),
        (lambda: og.clippy(absolute=0.0), "clippy: `absolute` .* 0.0"),
        (lambda: og.guard(optax.sgd(0.1), og.limit_step(0.1)), r"guard: `rules\[0\]` must be made by `rule`"),
        (lambda: og.guard(optax.sgd(0.1), og.clip_by_update_norm()), r"guard: `rules\[0\]` must be made by `rule`"),
    ],
)
def test_wrong_arguments_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()

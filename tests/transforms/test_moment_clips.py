"""Clips by the second moment: oracles of the equations, guarantees, wrong input (published forms: test_fidelity.py)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

B1, B2, EPS = 0.9, 0.999, 1e-6
PARAMS = np.zeros(4, np.float32)


@pytest.fixture(autouse=True)
def _standard(standard_promotion: None) -> None:
    """Stock Adam inside."""


def history(steps: int = 60) -> np.ndarray:
    gradients = np.random.default_rng(0).standard_normal((steps, 4)).astype(np.float32)
    gradients[30, 1] = 1e4
    gradients[31, :2] = -1e3
    gradients[:, 3] = 0
    gradients[35:, 3] = 1  # an element that was not seen before
    return gradients


def replay(tx: optax.GradientTransformation, gradients: np.ndarray) -> tuple[np.ndarray, Any]:
    def body(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, PARAMS)
        return state, (updates, state)

    updates, states = quick_jit(lambda g: jax.lax.scan(body, tx.init(PARAMS), g)[1])(gradients)
    return np.asarray(updates), states


def test_spam_follows_its_equations() -> None:
    m, v, count, expected = np.zeros(4), np.zeros(4), 0, []
    for s, g in enumerate(history().astype(np.float64), start=1):
        if s % 40 == 0:
            m, v, count = np.zeros(4), np.zeros(4), 0
        bound = np.sqrt(50.0 * v / (1 - B2**count)) if count else np.zeros(4)
        bound = np.where(bound > 0, bound, bound.max() if bound.max() > 0 else np.inf)
        g = np.sign(g) * np.minimum(np.abs(g), bound)
        m, v, count = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2, count + 1
        k = s % 40
        rate = 0.495 * (1 + np.cos(np.pi * k / 11)) if s >= 40 and k < 10 else 0
        expected.append(-0.1 * (1 - rate) * m / (1 - B1**count) / (np.sqrt(v / (1 - B2**count)) + EPS))
    got, _ = replay(og.spam_clip(optax.adam(0.1, B1, B2, EPS), 50.0, restart_every=40, warmup=10), history())
    np.testing.assert_allclose(got, expected, rtol=3e-4, atol=1e-6)


def test_spam_keeps_numbers_that_are_none_out_of_the_optimizer_and_schedules_go_on_over_a_restart() -> None:
    gradients = history()
    gradients[25] = [np.nan, np.inf, -np.inf, 1e30]
    adam = optax.adam(optax.constant_schedule(0.1), B1, B2, EPS)
    got, states = replay(og.spam_clip(adam, restart_every=40), gradients)
    assert np.all(np.isfinite(got))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states))
    assert states.spam_inner_state[0].count[-1] == 21  # the moments' own count restarted at call 40
    assert states.spam_inner_state[1].count[-1] == 60


def test_without_a_spike_or_a_restart_spam_is_the_optimizer() -> None:
    gradients = np.random.default_rng(3).uniform(1, 2, (60, 4)).astype(np.float32)
    adam = optax.adam(0.1)
    expected = replay(adam, gradients)[0]
    for tx in (og.spam_clip(adam, restart_every=None), og.clip_by_update_rms(adam, 2.0)):
        np.testing.assert_allclose(replay(tx, gradients)[0], expected, rtol=1e-6)  # to a fused multiply-add


def stable_spam_oracle(gradients: np.ndarray) -> np.ndarray:
    """AdaClip and AdaGN in float64, with SGD behind them."""
    top, m, n, out = 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        most = np.abs(g).max()
        taken = most if t == 1 else min(most, 10 * top / (1 - 0.999 ** (t - 1)))
        top = 0.999 * top + 0.001 * taken
        bound = top / (1 - 0.999**t)
        g = np.where(np.abs(g) > bound, g / most * bound, g)
        norm = np.linalg.norm(g)
        m, n = 0.7 * m + 0.3 * norm, 0.9 * n + 0.1 * norm**2
        out.append(-g / norm * (m / (1 - 0.7**t)) / (np.sqrt(n / (1 - 0.9**t)) + 1e-8))
    return np.array(out)


def test_stable_spam_follows_its_equations() -> None:
    got, _ = replay(og.stable_spam(optax.sgd(1.0), restart_every=40), history(300))
    np.testing.assert_allclose(got, stable_spam_oracle(history(300)), rtol=3e-4, atol=1e-5)


def test_stable_spam_bounds_what_a_burst_does_and_keeps_numbers_that_are_none_out() -> None:
    gradients = np.random.default_rng(2).standard_normal((1500, 4)).astype(np.float32)
    spiked = gradients.copy()
    spiked[1200:1205] *= 1e6
    spiked[1300] = [np.nan, np.inf, 1e30, 0]
    tx = og.stable_spam(optax.sgd(1.0), restart_every=None)
    got, states = replay(tx, spiked)
    _, clean = replay(tx, gradients)
    assert np.all(np.isfinite(got))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states))
    assert states.largest_average[1204, 0] / clean.largest_average[1204, 0] <= 1.07
    _, published = replay(og.published.stable_spam(optax.sgd(1.0), restart_every=None), spiked[:1290])
    assert published.largest_average[1204, 0] > 1000 * clean.largest_average[1204, 0]
    for value in (0.0, np.nan):
        updates, states = replay(tx, np.full((5, 4), value, np.float32))
        np.testing.assert_array_equal(updates, 0)
        assert states.leaf_steps[-1, 0] == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_clip_by_update_rms_is_stable_adamw(weight_decay: float) -> None:
    gradients = history()
    m, v, expected, ratios = np.zeros(4), np.zeros(4), [], []
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        b1, b2 = B1 * (1 - B1 ** (t - 1)) / (1 - B1**t), B2 * (1 - B2 ** (t - 1)) / (1 - B2**t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, 1e-16)))
        ratios.append(rms)
        expected.append(-0.1 / max(1, rms) * (m / (np.sqrt(v) + EPS) + weight_decay * 0))  # the parameters are 0
    adam = optax.adamw(0.1, B1, B2, EPS, weight_decay=weight_decay)
    got, _ = replay(og.clip_by_update_rms(adam, b2=B2), gradients)
    np.testing.assert_allclose(got, expected, rtol=3e-4, atol=1e-6)
    assert max(ratios) > 1.5


def test_clip_by_update_rms_scales_weight_decay_too_and_leaves_other_leaves_alone() -> None:
    tx: Any = og.clip_by_update_rms(optax.adamw(0.1, weight_decay=0.1))
    params = {"calm": jnp.ones(2), "loud": jnp.ones(2)}
    state = tx.init(params)
    bare: Any = optax.adamw(0.1, weight_decay=0.1)
    for size in [1.0] * 8 + [50.0]:
        gradient = {"calm": jnp.ones(2), "loud": jnp.full(2, size)}
        expected = bare.update(gradient, state, params)[0]
        updates, state = tx.update(gradient, state, params)
    np.testing.assert_array_equal(updates["calm"], expected["calm"])
    v = optax.tree.get(state, "nu")["loud"] / (1 - 0.999**9)
    np.testing.assert_allclose(updates["loud"], expected["loud"] / (50 / np.sqrt(v)), rtol=1e-4)
    broken = {"calm": jnp.ones(2), "loud": jnp.array([np.nan, 1.0])}
    assert np.all(np.isfinite(tx.update(broken, state, params)[0]["calm"]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: og.spam_clip(optax.adam), "spam_clip: `inner` must be an optax.GradientTransformation"),
        (lambda: og.spam_clip(optax.adam(0.1), 0.0), "spam_clip: `threshold` .* 0.0"),
        (lambda: og.spam_clip(optax.adam(0.1), restart_every=1), "spam_clip: `restart_every` .* >= 2; got 1"),
        (lambda: og.spam_clip(optax.adam(0.1), warmup=-1), "spam_clip: `warmup` .* >= 0; got -1"),
        (lambda: og.spam_clip(optax.adam(0.1), b2=1.5), "spam_clip: `b2` .* 1.5"),
        (lambda: og.published.spam_clip(optax.adam(0.1), warmup=-1), "published.spam_clip: `warmup` .* -1"),
        (lambda: og.stable_spam(optax.adam(0.1), gamma1=-0.1), "stable_spam: `gamma1` .* -0.1"),
        (lambda: og.stable_spam(optax.adam(0.1), restart_every=0), "stable_spam: `restart_every` .* 0"),
        (lambda: og.stable_spam(0.1), "stable_spam: `inner` .* 0.1"),
        (lambda: og.clip_by_update_rms(optax.adam(0.1), 0.0), "clip_by_update_rms: `max_rms` .* 0.0"),
        (lambda: og.clip_by_update_rms(optax.adam(0.1), eps=-1.0), "clip_by_update_rms: `eps` .* -1.0"),
    ],
)
def test_wrong_arguments_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("wrap", [og.spam_clip, og.clip_by_update_rms])
def test_an_optimizer_without_a_second_moment_is_refused(wrap: Any) -> None:
    tx = wrap(optax.sgd(0.1))
    with pytest.raises(ValueError, match="has none for leaf"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)

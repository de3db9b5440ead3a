"""Noise added to the gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og


def once(tx: optax.GradientTransformation, grads: Any, params: Any = None) -> Any:
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def noise_of(tx: optax.GradientTransformation, size: int, steps: int) -> list[np.ndarray]:
    state, draws = tx.init(jnp.zeros(size)), []
    for _ in range(steps):
        draw, state = tx.update(jnp.zeros(size), state)
        draws.append(np.asarray(draw))
    return draws


def test_noise_has_mean_0_and_the_variance_of_the_paper() -> None:
    """Variance eta / (1 + t)^gamma, t from 0: within five standard errors, and normal in its tails."""
    size = 200_000
    for t, draw in enumerate(noise_of(og.noise_injection(0.3, 0.55, key=5), size, 4)):
        variance = 0.3 / (1 + t) ** 0.55
        assert abs(draw.mean()) < 5 * np.sqrt(variance / size)
        assert abs(draw.var() / variance - 1) < 5 * np.sqrt(2 / size)
        z = draw / np.sqrt(variance)
        assert abs(np.mean(np.abs(z) > 3) - 0.0027) < 5 * np.sqrt(0.0027 / size)
        assert len(np.unique(draw)) > 0.9 * size


def test_noise_is_a_function_of_key_step_and_path_alone() -> None:
    tx = og.noise_injection(1.0, key=3)
    alone = once(tx, {"m": {"w": jnp.zeros(5)}})["m"]["w"]
    among = once(tx, {"a": jnp.zeros(2), "m": {"b": jnp.zeros(7), "w": jnp.zeros(5)}, "z": jnp.zeros(1)})
    np.testing.assert_array_equal(alone, among["m"]["w"])
    assert not np.any(np.isin(among["m"]["b"][:5], alone))  # another leaf draws other numbers
    for key in (jax.random.key(3), jax.random.PRNGKey(3), np.int64(3), jnp.asarray(3)):
        np.testing.assert_array_equal(
            alone, once(og.noise_injection(1.0, key=key), {"m": {"w": jnp.zeros(5)}})["m"]["w"]
        )
    assert not np.array_equal(alone, once(og.noise_injection(1.0, key=4), {"m": {"w": jnp.zeros(5)}})["m"]["w"])


def test_noise_resumes_from_its_step_and_differs_between_steps() -> None:
    tx = og.noise_injection(1.0, 0.0, key=3)
    first, second, third = noise_of(tx, 5, 3)
    assert not np.array_equal(first, second)
    resumed = og.NoiseState(noise_key=tx.init(jnp.zeros(5)).noise_key, noise_step=jnp.asarray(2, jnp.int32))
    np.testing.assert_array_equal(tx.update(jnp.zeros(5), resumed)[0], third)


@pytest.mark.parametrize("shards", [2, 8])
def test_noise_is_the_same_for_any_sharding(shards: int) -> None:
    tx = og.noise_injection(1.0, key=9)
    mesh = jax.make_mesh((shards,), ("x",), devices=jax.devices()[:shards], axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(jnp.zeros(64), NamedSharding(mesh, PartitionSpec("x")))
    np.testing.assert_array_equal(jax.jit(lambda g: once(tx, g))(sharded), once(tx, jnp.zeros(64)))


def test_the_norm_of_the_noise_is_bounded_absolutely_or_by_the_gradient() -> None:
    grads = {"a": jnp.full(300, 0.01), "b": jnp.full(100, -0.01)}  # norm 0.2
    for options, bound in (({}, 0.05), ({"relative_to": "gradient"}, 0.01)):
        noisy = once(og.noise_injection(1.0, key=1, max_norm=0.05, **options), grads)
        difference = jax.tree.map(jnp.subtract, noisy, grads)
        np.testing.assert_allclose(og.global_norm(difference), bound, rtol=1e-4)
    free, loose = once(og.noise_injection(1e-6), grads), once(og.noise_injection(1e-6, max_norm=1e3), grads)
    np.testing.assert_array_equal(free["a"], loose["a"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_below_the_resolution_of_16_bits_still_acts_on_average(dtype: Any) -> None:
    """1 + N(0, 1e-8) in bfloat16, whose next number is 1.0078: rounding to nearest would change nothing."""
    size, sigma = 1_000_000, 1e-4
    noisy = np.asarray(once(og.noise_injection(sigma**2, key=2), jnp.ones(size, dtype)), np.float64)
    gap = float(jnp.finfo(dtype).eps)
    changed = np.mean(noisy != 1)
    np.testing.assert_allclose(changed, sigma * 0.3989 * (1 / gap + 2 / gap), rtol=0.1)  # E|n| / gap above and below 1
    assert abs(noisy.mean() - 1) < 5 * np.sqrt(sigma * gap / size)


def test_noise_on_complex_leaves_is_split_between_the_parts() -> None:
    draw = np.asarray(once(og.noise_injection(0.5, key=2), jnp.zeros(100_000, jnp.complex64)))
    np.testing.assert_allclose([draw.real.var(), draw.imag.var()], 0.25, rtol=0.03)


def test_noise_mask_and_a_nan_leaf_beside_others() -> None:
    grads = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3), "c": jnp.ones(3)}
    mask = {"a": True, "b": False, "c": True}
    noisy = once(og.noise_injection(1.0, max_norm=0.1, relative_to="gradient", mask=mask), grads)
    np.testing.assert_array_equal(noisy["b"], 1)
    assert np.isnan(noisy["a"][1])
    assert np.all(np.isfinite(noisy["c"]))
    assert not np.array_equal(noisy["c"], grads["c"])


def test_clip_then_noise_keeps_the_gradient_that_noise_then_clip_throws_away() -> None:
    grads = {"w": jnp.zeros(40_000).at[0].set(1.0)}
    good = once(optax.chain(og.clip_by_global_norm(1.0), og.noise_injection(0.01)), grads)["w"][0]
    lost = once(optax.chain(og.noise_injection(0.01), og.clip_by_global_norm(1.0)), grads)["w"][0]
    assert good > 0.5
    assert lost < 0.1


def test_noise_is_not_drawn_for_a_held_step() -> None:
    tx = og.guard(optax.chain(og.noise_injection(1.0), optax.sgd(1.0)))
    params = jnp.zeros(3)
    state = tx.init(params)
    params, state = og.apply_gradients(tx, jnp.full(3, jnp.nan), state, params)
    assert state.guarded_state[0].noise_step == 0

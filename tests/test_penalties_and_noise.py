"""What is added to the gradient on purpose: L1 and noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og

PARAMS = {
    "kernel": jnp.array([[2.0, 0.0], [-3.0, -0.0]]),
    "bias": jnp.array([1.0, -1.0]),
    "deep": {"k": jnp.ones((1, 2, 2))},
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def once(tx: optax.GradientTransformation, grads: Any, params: Any = None) -> Any:
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def test_l1_adds_the_sign_and_leaves_exact_zeros_and_vectors_alone() -> None:
    updates = once(og.l1_penalty(0.1), ZEROS, PARAMS)
    np.testing.assert_allclose(updates["kernel"], [[0.1, 0], [-0.1, 0]])
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_allclose(updates["deep"]["k"], 0.1)
    assert jax.grad(lambda w: jnp.abs(w))(0.0) == 1  # why it is not written as a loss term


@pytest.mark.parametrize(
    "mask",
    [
        {"kernel": False, "bias": True, "deep": False},  # a prefix of the tree
        {"kernel": False, "bias": True, "deep": {"k": False}},
        lambda params: jax.tree.map(lambda x: x.ndim == 1, params),
    ],
)
def test_l1_mask_by_tree_prefix_or_function(mask: Any) -> None:
    updates = once(og.l1_penalty(0.5, mask=mask), ZEROS, PARAMS)
    np.testing.assert_array_equal(updates["kernel"], 0)
    np.testing.assert_allclose(updates["bias"], [0.5, -0.5])
    np.testing.assert_array_equal(updates["deep"]["k"], 0)


def test_l1_bad_masks_are_named() -> None:
    with pytest.raises(ValueError, match=r"l1_penalty: `mask` lacks leaf `deep/k`"):
        og.l1_penalty(0.1, mask={"kernel": True, "bias": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"`mask` must hold True or False; at `bias` it holds 2"):
        og.l1_penalty(0.1, mask={"kernel": True, "bias": 2, "deep": True}).init(PARAMS)
    with pytest.raises(ValueError, match="not passing `params`"):
        once(og.l1_penalty(0.1), ZEROS)


def test_l1_strength_as_a_schedule_and_in_float16() -> None:
    tx = og.l1_penalty(lambda step: 0.25 * step.astype(float))
    state = tx.init(PARAMS)
    for expected in (0.0, 0.25, 0.5):
        updates, state = tx.update(ZEROS, state, PARAMS)
        np.testing.assert_allclose(updates["kernel"][0, 0], expected)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS)
    assert once(og.l1_penalty(0.1), half, half)["kernel"].dtype == jnp.float16


def test_l1_shrinks_weights_that_the_data_do_not_hold() -> None:
    """Lasso by subgradient: towards the optimum, without exact zeros."""
    tx = optax.chain(og.l1_penalty(0.1), optax.sgd(0.05))
    params, target = {"w": jnp.full((1, 2), 3.0)}, jnp.array([[0.02, 2.0]])
    state = tx.init(params)
    for _ in range(400):
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[0.0, 1.9]], atol=6e-3)


# Noise


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

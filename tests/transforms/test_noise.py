"""Noise added to the gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import once
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og
from optax_guard._common.prng import Words, threefry


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
    resumed = og.transforms.NoiseState(noise_key=tx.init(jnp.zeros(5)).noise_key, noise_step=jnp.asarray(2, jnp.int32))
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


# What every kind of noise shares


def test_the_bits_are_those_of_jax_random() -> None:
    key = jax.random.key_data(jax.random.key(42))
    counter = jnp.arange(8, dtype=jnp.uint32)
    ours = threefry(Words(key[0], key[1]), Words(counter, counter + jnp.uint32(100)))
    expected = threefry2x32_p.bind(key[0], key[1], counter, counter + jnp.uint32(100))
    np.testing.assert_array_equal(ours, expected)


KINDS = {
    "gaussian": lambda **options: og.noise_injection(1.0, 0.0, **options),
    "ball": lambda **options: og.noise_injection(1e4, 0.0, distribution="uniform_ball", **options),
    "anticorrelated": lambda **options: og.anticorrelated_noise(1.0, **options),
    "langevin": lambda **options: og.langevin_noise(0.5, **options),
}


def test_kinds_leaves_steps_and_elements_are_independent_under_one_key() -> None:
    """Every pair of streams has correlation 0 within five standard errors."""
    size = 20_000
    streams = []
    for make in KINDS.values():
        tx: Any = make(key=5)
        grads = {"a": jnp.zeros(size), "b": jnp.zeros((size // 10, 10))}
        state = tx.init(grads)
        for _ in range(2):
            noise, state = tx.update(grads, state)
            streams += [np.ravel(noise["a"]), np.ravel(noise["b"])]
    streams.append(np.roll(streams[0], 1))
    correlation = np.corrcoef(streams)
    # An anticorrelated stream's consecutive steps share a draw: -1/2 by construction.
    first = list(KINDS).index("anticorrelated") * 4
    expected = np.eye(len(streams))
    for leaf in range(2):
        expected[first + leaf, first + 2 + leaf] = expected[first + 2 + leaf, first + leaf] = -0.5
    np.testing.assert_allclose(correlation, expected, atol=5 / np.sqrt(size))


@pytest.mark.parametrize("distribution", KINDS)
def test_noise_sharded_explicitly_inside_jit_equals_unsharded(distribution: str) -> None:
    tx = KINDS[distribution](key=9)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(jnp.zeros((16, 3)), NamedSharding(mesh, PartitionSpec("x")))
        noisy = jax.jit(lambda g: once(tx, g))(sharded)
    assert len(noisy.addressable_shards) == 8
    assert noisy.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_allclose(noisy, once(tx, jnp.zeros((16, 3))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distribution", KINDS)
def test_noise_of_a_zero_schedule_or_a_masked_leaf_changes_no_bit(distribution: str) -> None:
    grads = {"a": jnp.array([-0.0, 1e-40, 3.0]), "b": jnp.array([1, 2])}
    masked = once(KINDS[distribution](mask={"a": False, "b": True}), grads)
    np.testing.assert_array_equal(np.asarray(masked["a"]).view(np.uint32), np.asarray(grads["a"]).view(np.uint32))
    np.testing.assert_array_equal(masked["b"], grads["b"])  # integers pass


def test_a_pattern_masks_by_path_and_must_match_something() -> None:
    grads = {"decoder": {"kernel": jnp.zeros(3)}, "encoder": {"kernel": jnp.zeros(3)}}
    noisy = once(og.noise_injection(1.0, mask="decoder/*"), grads)
    assert np.all(noisy["decoder"]["kernel"] != 0)
    np.testing.assert_array_equal(noisy["encoder"]["kernel"], 0)
    with pytest.raises(ValueError, match=r"`mask` 'dekoder/\*' matches no leaf; the leaves are \['decoder/kernel'"):
        og.noise_injection(1.0, mask="dekoder/*").init(grads)


def test_noise_is_drawn_once_per_emitted_step() -> None:
    tx = og.accumulate(optax.chain(og.noise_injection(1.0, 0.0, key=4), optax.sgd(1.0)), every=3)
    params = jnp.zeros(5)
    state = tx.init(params)
    for _ in range(6):
        params, state = og.apply_gradients(tx, jnp.zeros(5), state, params)
    assert optax.tree.get(state, "noise_step") == 2
    first, second = noise_of(og.noise_injection(1.0, 0.0, key=4), 5, 2)
    np.testing.assert_allclose(params, -first - second, rtol=1e-6)


def test_the_ball_is_filled_uniformly() -> None:
    """P(||n|| <= r) = (r / sigma)^dimension, over the whole tree as one vector; sigma^2 = eta / (1 + t)^gamma."""
    tx = og.noise_injection(4.0, 0.0, key=1, distribution="uniform_ball")
    grads = {"a": jnp.zeros(2), "b": jnp.zeros(1)}

    def draw(state: Any, _: Any) -> tuple[Any, Any]:
        noise, state = tx.update(grads, state)
        return state, jnp.concatenate([noise["a"], noise["b"]])

    draws = np.asarray(jax.lax.scan(draw, tx.init(grads), length=4000)[1], np.float64)
    radii = np.linalg.norm(draws, axis=1) / 2
    assert radii.max() <= 1 + 1e-6
    assert scipy.stats.kstest(radii**3, "uniform").pvalue > 1e-3
    directions = draws / (2 * radii[:, None])
    np.testing.assert_allclose(directions.T @ directions / len(draws), np.eye(3) / 3, atol=0.03)


def test_float64_noise_has_more_than_32_bits() -> None:
    with jax.enable_x64(True):
        draw = once(og.noise_injection(1.0, key=jax.random.key(2)), jnp.zeros(200_000, jnp.float64))
        assert draw.dtype == jnp.float64
        assert len(np.unique(draw)) == draw.size
        np.testing.assert_allclose([draw.mean(), draw.var()], [0, 1], atol=0.02)


# Anticorrelated noise


@pytest.mark.parametrize("sigma", [0.5, lambda step: 0.5 / (1.0 + jnp.asarray(step, jnp.float32))])
def test_anticorrelated_noise_leaves_two_draws_behind_whatever_the_step(sigma: Any) -> None:
    """The sum of the first t updates is sigma_t xi_t - sigma_0 xi_0."""
    tx = og.anticorrelated_noise(sigma, key=3)
    draws = noise_of(tx, 50_000, 8)
    at = sigma if callable(sigma) else lambda _: sigma
    total = np.sum(draws, axis=0)
    np.testing.assert_allclose(total.var(), at(8) ** 2 + at(0) ** 2, rtol=0.03)
    np.testing.assert_allclose(draws[0].var(), at(1) ** 2 + at(0) ** 2, rtol=0.03)


# Langevin noise


def test_langevin_noise_samples_the_stationary_distribution() -> None:
    """Loss w^2 / 2 at temperature T: w <- (1 - lr) w + sqrt(2 lr T) z has variance T / (1 - lr / 2), exactly."""
    rate, temperature, size = 0.1, 0.7, 20_000
    tx = optax.chain(optax.sgd(rate), og.langevin_noise(rate, temperature, key=1))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(params, state)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros(size)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
    np.testing.assert_allclose(np.var(params), temperature / (1 - rate / 2), rtol=5 * np.sqrt(2 / size))


def test_langevin_noise_follows_the_schedules_of_rate_and_temperature() -> None:
    tx = og.langevin_noise(
        lambda step: 0.5 * (step.astype(float) + 1.0), lambda step: (step.astype(float) + 1.0) ** -3.0
    )
    for t, draw in enumerate(noise_of(tx, 50_000, 3)):
        np.testing.assert_allclose(draw.var(), 2 * 0.5 * (t + 1) / (t + 1) ** 3, rtol=0.05)


# Weight noise


def test_perturbed_weights_give_the_gradient_at_the_noisy_point_and_clean_weights_step() -> None:
    """loss = sum w^4: the gradient at w + n is 4 (w + n)^3, with n of the stated size."""

    def loss(params: Any) -> Any:
        return jnp.sum(params["w"] ** 4)

    noisy = og.perturb_weights(loss, 0.1)
    params = {"w": jnp.ones(50_000)}
    value, grads = jax.value_and_grad(noisy)(params, noise_key=jax.random.key(1))
    noise = (np.asarray(grads["w"], np.float64) / 4) ** (1 / 3) - 1
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 0.1], atol=2e-3)
    np.testing.assert_allclose(value, np.sum((1 + noise) ** 4), rtol=1e-5)
    again = jax.grad(noisy)(params, noise_key=jax.random.key(1))
    np.testing.assert_array_equal(again["w"], grads["w"])
    assert not np.array_equal(jax.grad(noisy)(params, noise_key=jax.random.key(2))["w"], grads["w"])


def test_perturbed_weights_relative_masked_and_in_16_bits() -> None:
    def weights(params: Any) -> tuple[Any, Any]:
        return jnp.sum(params["w"].astype(jnp.float32)), params

    params = {"i": jnp.arange(3), "v": jnp.ones(4), "w": jnp.full(100_000, 2.0, jnp.bfloat16), "z": jnp.zeros(3)}
    noisy = og.perturb_weights(
        weights, 0.001, relative_to="weights", mask={"i": True, "v": False, "w": True, "z": True}
    )
    seen = noisy(params, noise_key=5)[1]
    for name in ("i", "v", "z"):  # integer; masked out; without size there is nothing to be relative to
        np.testing.assert_array_equal(seen[name], params[name])
    assert seen["w"].dtype == jnp.bfloat16
    # sigma = 0.002, far below the spacing 0.0156 of bfloat16 around 2: it must still act on average.
    drift = np.asarray(seen["w"], np.float64) - 2
    assert 0.02 < np.mean(drift != 0) < 0.3
    assert abs(drift.mean()) < 5 * np.sqrt(0.002 * 0.0156 / drift.size)
    untouched = og.perturb_weights(weights, 0.0)(params, noise_key=5)[1]
    np.testing.assert_array_equal(untouched["w"], params["w"])


# Wrong input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: og.noise_injection(-1.0), r"noise_injection: `eta` must be a number in \[0, inf\); got -1.0"),
        (lambda: og.noise_injection(float("nan")), r"`eta` must be a number in \[0, inf\); got nan"),
        (lambda: og.noise_injection(1.0, float("inf")), r"`gamma` must be a number"),
        (
            lambda: og.noise_injection(distribution="ball"),
            r"`distribution` must be one of 'gaussian', 'uniform_ball'; got 'ball'",
        ),
        (lambda: og.noise_injection(relative_to="weights"), r"`relative_to` must be one of 'none', 'gradient'"),
        (lambda: og.noise_injection(max_norm=-1), r"`max_norm` must be a number in \[0, inf\)"),
        (
            lambda: og.noise_injection(key="seed"),
            r"`key` must be an int, a PRNG key or raw uint32 key data .*; got 'seed'",
        ),
        (lambda: og.noise_injection(key=jax.random.split(jax.random.key(0))), r"`key` must be an int, a PRNG key"),
        (lambda: og.anticorrelated_noise(-0.1), r"anticorrelated_noise: `sigma` must be a number in \[0, 1e\+36\]"),
        (lambda: og.langevin_noise(-0.1), r"langevin_noise: `learning_rate` must be a number in \[0, inf\)"),
        (lambda: og.langevin_noise(0.1, -1.0), r"langevin_noise: `temperature` must be a number in \[0, inf\)"),
        (lambda: og.perturb_weights(jnp.sum, -1.0), r"perturb_weights: `sigma` must be a number in \[0, 1e\+36\]"),
        (lambda: og.perturb_weights(3, 1.0), r"perturb_weights: `loss_fn` must be a function of the parameters; got 3"),
        (lambda: og.perturb_weights(jnp.sum, 1.0)(jnp.ones(2), noise_key=None), r"`key` must be an int, a PRNG key"),
        (lambda: once(og.noise_injection(), {"a": "text"}), r"leaf `a` is not an array"),
    ],
)
def test_wrong_noise_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_below_zero_counts_as_zero() -> None:
    def schedule(step: Any) -> jax.Array:
        return jnp.asarray(-1.0)

    for tx in (
        og.noise_injection(schedule),
        og.noise_injection(1.0, max_norm=schedule),
        og.anticorrelated_noise(schedule),
        og.langevin_noise(schedule),
    ):
        np.testing.assert_array_equal(once(tx, jnp.ones(3)), 1)

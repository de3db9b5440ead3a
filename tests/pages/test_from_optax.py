"""What docs/from_optax.md says that Optax does today, beside what the library does instead."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import once

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")


def steps(tx: Any, sizes: list[float]) -> list[float]:
    state, seen = tx.init(jnp.zeros(1)), []
    for size in sizes:
        updates, state = tx.update(jnp.full(1, size), state, jnp.zeros(1))
        seen.append(float(updates[0]))
    return seen


def test_a_norm_that_overflows() -> None:
    half = jnp.array([300.0, 1.0], jnp.float16)
    np.testing.assert_array_equal(once(optax.clip_by_global_norm(1.0), half), [0, 0])
    np.testing.assert_allclose(once(og.clip_by_global_norm(1.0), half), [1, 1 / 300], rtol=2e-3)


def test_a_nan_in_one_leaf() -> None:
    grads = {"a": jnp.array([jnp.nan]), "b": jnp.ones(2)}
    assert np.all(np.isnan(once(optax.clip_by_global_norm(1.0), grads)["b"]))
    assert np.all(np.isfinite(once(og.clip_by_global_norm(1.0), grads)["b"]))


def test_a_negative_bound() -> None:
    np.testing.assert_allclose(once(optax.clip_by_global_norm(-1.0), jnp.array([3.0, 4.0])), [-0.6, -0.8])
    with pytest.raises(ValueError, match="max_norm"):
        og.clip_by_global_norm(-1.0)


def test_a_nan_in_an_accumulation() -> None:
    sizes = [np.nan, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert np.all(np.isnan(steps(optax.MultiSteps(optax.sgd(1.0), 2), sizes)))
    np.testing.assert_array_equal(steps(og.accumulate(optax.sgd(1.0), 2), sizes), [0, -1, 0, -1, 0, -1])


def test_many_nans_in_a_row() -> None:
    sizes = [np.nan, np.nan, np.nan, 1.0, 1.0]
    momentum = optax.sgd(1.0, momentum=0.9)
    seen = steps(optax.apply_if_finite(momentum, 2), sizes)
    np.testing.assert_array_equal(seen[:2], 0)
    assert np.all(np.isnan(seen[2:]))
    np.testing.assert_allclose(steps(og.guard(momentum), sizes), [0, 0, 0, -1, -1.9])


def test_zero_nans_lets_inf_pass() -> None:
    np.testing.assert_array_equal(once(optax.zero_nans(), jnp.array([np.nan, np.inf])), [0, np.inf])


def test_one_key_twice() -> None:
    one = once(optax.add_noise(1.0, 0.0, key=1), jnp.zeros(4))
    noise = optax.add_noise(1.0, 0.0, key=1)
    np.testing.assert_allclose(once(optax.chain(noise, noise), jnp.zeros(4)), 2 * one)


def test_silent_death_of_adam() -> None:
    tx = optax.adam(1e-3)
    _, state = tx.update(jnp.full(1, 1e30), tx.init(jnp.zeros(1)))
    assert np.all(np.isinf(state[0].nu))
    np.testing.assert_array_equal(tx.update(jnp.ones(1), state)[0], 0)
    guarded = steps(og.guard(tx), [1e30, 1.0])
    assert guarded[1] < 0


def test_mixed_precision_under_apply_if_finite() -> None:
    params = jnp.ones(2)
    tx = optax.apply_if_finite(optax.adamw(1e-3), 5)
    with pytest.raises(TypeError, match="cond branches must have equal output types"):
        tx.update(params.astype(jnp.bfloat16), tx.init(params), params)
    ours = og.guard(optax.adamw(1e-3))
    moved, _ = og.apply_gradients(ours, params.astype(jnp.bfloat16), ours.init(params), params)
    assert np.all(moved != params)

"""The z-loss and its gradient against float64, in four dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_guard as og

LOGITS = np.random.default_rng(0).normal(0, 3, (5, 7)) + np.array([0, 10, -10, 100, 1e4])[:, None]


def oracle(logits: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """weight * log^2 Z and its gradient, 2 weight log(Z) softmax."""
    top = logits.max(-1, keepdims=True)
    log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return weight * log_z[:, 0] ** 2, 2 * weight * log_z * np.exp(logits - log_z)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_value_and_gradient_are_those_in_float64(dtype: Any) -> None:
    logits = jnp.asarray(LOGITS, dtype)
    expected, slope = oracle(np.asarray(logits, np.float64), 1e-4)
    losses = og.z_loss(logits)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=1e-12)
    grads = jax.grad(lambda x: jnp.sum(og.z_loss(x)))(logits)
    assert grads.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(grads, np.float64), slope, rtol=max(eps, 2e-6), atol=1e-7)


def test_masked_tokens_do_not_count_and_bad_rows_stay_alone() -> None:
    logits = jnp.asarray(LOGITS[:3], jnp.float32).at[0, 2].set(-jnp.inf).at[1, 0].set(jnp.nan)
    losses, grads = jax.jit(jax.vmap(jax.value_and_grad(og.z_loss)))(logits)
    expected, slope = oracle(np.delete(LOGITS[:1], 2, axis=1), 1e-4)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.delete(grads[0], 2), slope[0], rtol=1e-5)
    assert grads[0, 2] == 0
    assert np.isnan(losses[1])
    assert np.isfinite(losses[2])


def test_it_is_zero_with_its_gradient_where_the_softmax_is_normalised() -> None:
    logits = jax.nn.log_softmax(jnp.asarray(LOGITS[:2], jnp.float32))
    assert np.all(og.z_loss(logits) < 1e-15)
    assert np.all(og.z_loss(logits + 1, jnp.float32(2)) == pytest.approx(2, rel=1e-5))
    assert np.all(og.z_loss(logits, 0) == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(()),), "`logits` must be"),
        ((jnp.ones((2, 0)),), "at least one token"),
        ((jnp.ones(3, jnp.int32),), "`logits` must be"),
        ((jnp.ones(3), -1.0), "`weight` must be"),
        ((jnp.ones(3), float("nan")), "`weight` must be"),
    ],
)
def test_bad_input_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        og.z_loss(*arguments)

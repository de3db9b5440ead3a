"""Step counters, and the value of a number, array or schedule at a step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._common.typing import ScalarOrSchedule

__all__ = ["count_if", "next_step", "value_at"]


def next_step(step: jax.Array) -> jax.Array:
    """Step + 1, but never beyond the largest integer."""
    return jnp.asarray(optax.safe_increment(step))


def count_if(event: jax.Array, total: jax.Array) -> jax.Array:
    """Total + 1 if `event`, else the total unchanged."""
    return jnp.where(event, next_step(total), total)


def value_at(value: ScalarOrSchedule, step: Any) -> jax.Array:
    """A number, 0-d array or schedule at a step, in float32 or wider, since 0.999 would be 1 in bfloat16."""
    array = jnp.asarray(value(step) if callable(value) else value)
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)

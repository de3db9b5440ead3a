"""Bounds that are numbers, arrays or schedules, and the state that a schedule needs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._common.counters import next_step, value_at
from optax_guard._common.typing import ScalarOrSchedule

__all__ = ["ClipState", "bound_and_state", "bound_over_norm", "init_for"]


class ClipState(NamedTuple):
    """The state of a clip whose bound is a schedule; with a fixed bound it is `optax.EmptyState`."""

    clip_step: jax.Array  # i32[]: the number of calls, which is the argument of the schedule


def init_for(bound: ScalarOrSchedule) -> optax.TransformInitFn:
    """An `init` for the state that `bound_and_state` reads: a step count for a schedule, nothing for a number."""

    def init(params: optax.Params) -> optax.OptState:
        del params
        return ClipState(clip_step=jnp.zeros((), jnp.int32)) if callable(bound) else optax.EmptyState()

    return init


def bound_and_state(bound: ScalarOrSchedule, state: Any) -> tuple[jax.Array, Any]:
    """The bound of this step (never negative; NaN stays NaN) and the state after it."""
    if not callable(bound):
        return jnp.maximum(value_at(bound, None), 0), state
    return jnp.maximum(value_at(bound, state.clip_step), 0), ClipState(clip_step=next_step(state.clip_step))


def bound_over_norm(bound: jax.Array, size: jax.Array, root: jax.Array) -> jax.Array:
    """The bound divided by size * root, if that product, which is the norm itself, may overflow.

    Two divisions in turn are not enough, since XLA merges them into one.
    """
    smaller = jnp.where(size > 2.0**64, 2.0**-32, 1.0).astype(size.dtype)
    return bound * smaller / (size * smaller * root)

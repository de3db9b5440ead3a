"""What a rung knows of a step, before and after it."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from optax_guard._common.typing import PyTree

__all__ = ["After", "Seen", "Trouble"]


class Seen(NamedTuple):
    """What the guard knows of a step beforehand."""

    step: jax.Array  # i32[]
    finite: jax.Array  # bool[]
    refused: jax.Array  # bool[]
    alive: jax.Array  # bool[]: not halted
    has_gradient: jax.Array  # bool[n_leaves]: a finite norm above 0
    value: jax.Array | None


class Trouble(NamedTuple):
    """Whether the step is one of trouble, and how many there have been in a row, including it."""

    now: jax.Array  # bool[]: False in a halted guard
    in_row: jax.Array  # i32[]


class After(NamedTuple):
    """What is known after the step."""

    applied: jax.Array  # bool[]: whether the optimizer's update was applied
    bad_update: jax.Array  # bool[]: whether there was an update that was held as not finite
    norm: jax.Array  # f32[]: of the gradient before the rules
    clipped_norm: jax.Array  # f32[]: and as it reached the optimizer
    params: Callable[[], PyTree]  # returns the parameters
    inner_state: PyTree
    next_updates: Callable[[PyTree, PyTree], PyTree]  # the updates for this step's gradient at (state, parameters)

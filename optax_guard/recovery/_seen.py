"""What a rung is told of a step before it is taken."""

from typing import NamedTuple

import jax

__all__ = ["Seen", "Trouble"]


class Seen(NamedTuple):
    """What the guard knows of the step."""

    step: jax.Array  # i32[]
    finite: jax.Array  # bool[]
    refused: jax.Array  # bool[]
    alive: jax.Array  # bool[]: not halted
    has_gradient: jax.Array  # bool[n_leaves]: a finite norm above 0
    value: jax.Array | None


class Trouble(NamedTuple):
    """Whether the step is one of trouble, and how many there have been in a row with it."""

    now: jax.Array  # bool[]: False in a halted guard
    in_row: jax.Array  # i32[]

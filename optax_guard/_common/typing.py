"""The few type names the signatures share."""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
import optax

__all__ = ["AxisName", "Mask", "PRNGKeyLike", "PyTree", "ScalarOrSchedule"]

PyTree: TypeAlias = Any
ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule
AxisName: TypeAlias = Hashable  # one mesh axis, or a tuple of them
# Booleans in the structure of (a prefix of) the parameters, a function to them, or a pattern of paths ("*/kernel").
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]
PRNGKeyLike: TypeAlias = int | jax.Array  # a seed, a typed key, or raw uint32 key data

"""The type names that signatures share."""

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias, TypeVar

import jax
from jax.typing import ArrayLike

__all__ = ["AxisName", "Mask", "PRNGKeyLike", "Params", "PyTree", "ScalarOrSchedule", "Scope", "State", "Tree"]

PyTree: TypeAlias = Any
Params = TypeVar("Params")  # a step returns the type that it receives
State = TypeVar("State")
Tree = TypeVar("Tree")
# A schedule may require an array, whereas `optax.Schedule` must accept every kind of number.
ScalarOrSchedule: TypeAlias = float | jax.Array | Callable[[jax.Array], ArrayLike]
AxisName: TypeAlias = Hashable  # one mesh axis, or a tuple of them
# Booleans in the structure of (a prefix of) the parameters, a function to such a tree, or a path pattern ("*/kernel").
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]
Scope: TypeAlias = Literal["tree", "leaf"]  # one number for the whole tree, or one for each leaf
PRNGKeyLike: TypeAlias = int | jax.Array  # a seed, a typed key, or raw uint32 key data

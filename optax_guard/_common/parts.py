"""The parts of a transformation that the pair `(init, update)` has no field for.

Other code takes transformations apart and rebuilds them: `jax.tree.map`, `copy`, `pickle`, `eqx.filter_jit`,
`_replace`, a dataclass. All of these keep the two functions, so the other parts of a transformation are attached to
`update` and found there however the pair was rebuilt.
"""

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Part", "part_of", "with_part"]

_NAME = "__optax_guard__"
Part = TypeVar("Part")


def with_part(update: Callable[..., Any], part: Any) -> Callable[..., Any]:
    """Attaches to `update` a part that `part_of` finds."""
    setattr(update, _NAME, (update, part))
    return update


def part_of(tx: Any, kind: type[Part]) -> Part | None:
    """The part of this kind that belongs to `tx.update`, if there is one.

    A function that wraps `update` and copies its attributes (`functools.wraps`) does something else, so a part whose
    owner is another function does not count.
    """
    update = getattr(tx, "update", None)
    owner, part = getattr(update, _NAME, (None, None))
    return part if owner is update and isinstance(part, kind) else None

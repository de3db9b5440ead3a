"""What a transformation of this library is more than a pair `(init, update)`.

Other people's code takes transformations apart and puts them together again: `jax.tree.map`, `copy`, `pickle`,
`eqx.filter_jit`, `_replace`, a dataclass. All of them keep the two functions, so whatever else belongs to a
transformation is kept on `update`, and found there however the pair was rebuilt.
"""

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Part", "part_of", "with_part"]

_NAME = "__optax_guard__"
Part = TypeVar("Part")


def with_part(update: Callable[..., Any], part: Any) -> Callable[..., Any]:
    """`update` with a part that `part_of` finds."""
    setattr(update, _NAME, (update, part))
    return update


def part_of(tx: Any, kind: type[Part]) -> Part | None:
    """The part of this kind that belongs to `tx.update`, if there is one.

    A function that wraps `update` and copied its attributes (`functools.wraps`) does something else, so a part that
    names another function as its owner does not count.
    """
    update = getattr(tx, "update", None)
    owner, part = getattr(update, _NAME, (None, None))
    return part if owner is update and isinstance(part, kind) else None

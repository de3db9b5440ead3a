"""Outside of `jit`: a step is compiled once, not at every call.

JAX compiles a `lax.cond` that is called outside of `jit` as a program of its own, under the identity of its branches.
Those of a step close over the gradient, so they are new at every call: 0.2 to 2 seconds of compiling each time, and
2 MiB that are never freed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

__all__ = ["compiled_once"]


class _Static(NamedTuple):
    """What a compiled program is made for: the structure of the arguments, and those leaves that are not numbers."""

    structure: Any
    leaves: tuple[Any, ...]  # (type, leaf), since True equals Decimal(1); `None` where there is a number


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`; where its arguments are no tracers, as one compiled program for each of their structures.

    Arrays and Python numbers are arguments of that program. All other leaves (functions, flags, text) are constants in
    it, compared by their hash; if one cannot be hashed, the function runs as it is.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return function(*args, **kwargs)
        moving = tuple(map(_is_number, leaves))
        still = tuple(None if moves else (type(leaf), leaf) for leaf, moves in zip(leaves, moving, strict=True))
        static = _Static(structure, still)
        try:
            hash(static)
        except TypeError:
            return function(*args, **kwargs)
        return _run(function, static, [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves])

    return call


def _run(*arguments: Any) -> Any:
    """A plain function between `call` and the compiled one: a pickle of `call` names it, and holds no program."""
    return _program(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _program(function: Callable[..., Any], static: _Static, numbers: list[Any]) -> Any:
    given = iter(numbers)
    leaves = [next(given) if leaf is None else leaf[1] for leaf in static.leaves]
    args, kwargs = jax.tree.unflatten(static.structure, leaves)
    return function(*args, **kwargs)


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return leaf.dtype != object and not isinstance(leaf, np.ma.MaskedArray)
    if isinstance(leaf, int):
        return not isinstance(leaf, bool) and abs(leaf) < 2**31  # JAX has no integer for a larger one
    return isinstance(leaf, (float, complex))

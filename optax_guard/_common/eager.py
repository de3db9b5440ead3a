"""Compiles a step outside `jit` once instead of at every call.

Outside `jit`, JAX compiles each `lax.cond` as a program of its own and caches it by the identity of its branches. The
branches of a step close over the gradient, so they are new at every call, which would cost 0.2 to 2 seconds of
compilation and 2 MiB that are never freed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from optax_guard._common.tree import large_as_inf

__all__ = ["compiled_once"]


class _Static(NamedTuple):
    """The key of a compiled program: the structure of the arguments, and the leaves that are not numbers."""

    structure: Any
    leaves: tuple[Any, ...]  # (type, leaf), since True equals Decimal(1); `None` in place of a number


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function` so that, without tracers among its arguments, it runs as one compiled program per structure.

    Arrays and Python numbers are arguments of that program. All other leaves (functions, flags, text) are constants in
    it and must be hashable; if one is not, the function runs uncompiled.
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
    """A plain function between `call` and the compiled one, so that a pickle of `call` holds a name and no program."""
    with large_as_inf():
        return _program(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _program(function: Callable[..., Any], static: _Static, numbers: list[Any]) -> Any:
    given = iter(numbers)
    leaves = [next(given) if leaf is None else leaf[1] for leaf in static.leaves]
    args, kwargs = jax.tree.unflatten(static.structure, leaves)
    return function(*args, **kwargs)


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, np.integer) and leaf.dtype != jax.dtypes.canonicalize_dtype(leaf.dtype):
        leaf = int(leaf)
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return leaf.dtype != object and not isinstance(leaf, np.ma.MaskedArray)
    if isinstance(leaf, int):
        return not isinstance(leaf, bool) and abs(leaf) < 2**31  # JAX has no larger integer by default
    return isinstance(leaf, (float, complex))

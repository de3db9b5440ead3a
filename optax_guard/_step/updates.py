"""The results of a step: parameters with an update added, or updates that change nothing."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._common.tree import is_gradient, wider_dtype
from optax_guard._common.typing import PyTree

__all__ = ["add_updates", "bad_updates", "no_updates"]


def add_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, which also accepts leaves without an update: `None`, and the `float0` of an integer.

    A finite parameter that would become Inf becomes the largest number of its dtype instead. This is part of the fused
    write and costs no further bytes, temporaries or time.
    """

    def add(update: Any, param: Any) -> Any:
        if update is None or update.dtype == jax.dtypes.float0:
            return param
        total = _sum(param, update)
        if not is_gradient(param):
            return total.astype(param.dtype)
        # The update itself is not tested: a second use would take it out of its fused multiply-add and change bits.
        saturated = _saturated(total, float(jnp.finfo(param.dtype).max))
        return jnp.where(jnp.isfinite(param), saturated, total).astype(param.dtype)

    return jax.tree.map(add, updates, params, is_leaf=lambda leaf: leaf is None)


def bad_updates(params: PyTree | None, updates: PyTree) -> list[jax.Array]:
    """bool[] for each position: whether the update is not finite, or would make a finite parameter so."""

    def bad(update: Any, param: Any = None) -> jax.Array:
        if not is_gradient(update):
            return jnp.zeros((), bool)
        good = jnp.isfinite(update)
        if is_gradient(param):
            good = good & (jnp.isfinite(_sum(param, update).astype(param.dtype)) | ~jnp.isfinite(param))
        return ~jnp.all(good)

    trees = (updates,) if params is None else (updates, params)
    return jax.tree.leaves(jax.tree.map(bad, *trees, is_leaf=lambda leaf: leaf is None))


def no_updates(shapes: PyTree, updates: PyTree) -> PyTree:
    """-0.0 everywhere, the only number whose addition changes no other, not even the sign of a zero."""
    alike = jax.tree.structure(shapes) == jax.tree.structure(updates)

    def zero(shape: jax.ShapeDtypeStruct, leaf: Any) -> Any:
        if not is_gradient(shape):
            return leaf if alike else jnp.zeros(shape.shape, shape.dtype)
        number = complex(-0.0, -0.0) if jnp.issubdtype(shape.dtype, jnp.complexfloating) else -0.0
        if alike and leaf.shape == shape.shape:
            return jnp.full_like(leaf, number, dtype=shape.dtype)  # keeps the gradient's sharding
        return jnp.full(shape.shape, number, shape.dtype)

    return jax.tree.map(zero, shapes, updates if alike else shapes)


def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    wide = wider_dtype(param.dtype, update.dtype)
    if wide.itemsize == 1 and is_gradient(param):
        wide = jnp.dtype(jnp.float32)  # most 8-bit types have no Inf: beyond their largest number is NaN
    return param.astype(wide) + update.astype(wide)


def _saturated(x: jax.Array, largest: float) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return lax.complex(_saturated(jnp.real(x), largest), _saturated(jnp.imag(x), largest))
    return jnp.clip(x, -largest, largest)

"""Arithmetic that does not overflow or lose a sign: wide dtypes, squares, square roots, directions, products."""

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._common.tree import is_gradient, leaves_with_none, wider_dtype
from optax_guard._common.typing import PyTree

__all__ = ["absolute_square", "accumulator_dtype", "direction", "multiplied", "safe_sqrt", "widest_accumulator"]


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The real dtype to reduce in: float64 for float64 and complex128, float32 for all others."""
    return jnp.dtype(jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32)


def widest_accumulator(tree: PyTree) -> jnp.dtype:
    """The accumulator dtype of a whole tree: float64 if a leaf needs it."""
    wide = any(is_gradient(x) and accumulator_dtype(x.dtype) == jnp.float64 for x in leaves_with_none(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 instead of Inf at 0."""
    positive = x > 0
    root = jnp.sqrt(jnp.where(positive, x, 1))
    return jnp.where(positive, root, x)  # `x` and not 0, so that NaN stays NaN


def absolute_square(x: jax.Array) -> jax.Array:
    """|x|^2 in the dtype to reduce in."""
    dtype = accumulator_dtype(x.dtype)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.square(jnp.real(x).astype(dtype)) + jnp.square(jnp.imag(x).astype(dtype))
    return jnp.square(x.astype(dtype))


def direction(x: jax.Array) -> jax.Array:
    """The direction x / |x|, 0 at 0. A complex number with an infinite part has the direction of that part."""
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.sign(x)
    parts = jnp.real(x), jnp.imag(x)
    endless = jnp.isinf(parts[0]) | jnp.isinf(parts[1])
    parts = [jnp.where(endless & ~jnp.isnan(p), jnp.where(jnp.isinf(p), jnp.sign(p), 0), p) for p in parts]
    top = jnp.maximum(jnp.abs(parts[0]), jnp.abs(parts[1]))
    # At most 2^126, since XLA may multiply by the inverse, which is 0 beyond this.
    parts = [p / jnp.where(top > 0, jnp.minimum(top, 2.0 ** (jnp.finfo(x.dtype).maxexp - 2)), 1) for p in parts]
    squares = jnp.square(parts[0]) + jnp.square(parts[1])
    # The inverse of a root, since XLA merges two divisions into one by a product that may overflow.
    inverse = lax.rsqrt(jnp.where(squares > 0, squares, 1))
    return lax.complex(*(p * inverse for p in parts))


def multiplied(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product with a real factor, in float32 or wider and rounded once; a complex 0 times Inf is avoided."""
    wide = wider_dtype(x.dtype, factor.dtype)
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
    real = jnp.finfo(wide).dtype
    parts = (part.astype(real) * factor.astype(real) for part in (jnp.real(x), jnp.imag(x)))
    return lax.complex(*parts).astype(x.dtype)

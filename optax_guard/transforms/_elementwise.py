"""Fixed bounds on single elements and on the units of a layer: transformations, not rules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.bounds import bound_and_state, bound_over_norm, init_for
from optax_guard._common.numerics import absolute_square, accumulator_dtype, direction, multiplied, safe_sqrt
from optax_guard._common.transformation import transformation
from optax_guard._common.tree import (
    is_function,
    is_gradient,
    map_gradients,
    path_name,
    wider_dtype,
)
from optax_guard._common.typing import PyTree, ScalarOrSchedule

__all__ = ["adaptive_grad_clip", "clip_by_value"]


def clip_by_value(max_value: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Limit every element to [-max_value, max_value].

    g_j <- clip(g_j, -max_value, max_value);   complex:  g_j * min(1, max_value / |g_j|)

    Guarantees:
      - No element of the result exceeds `max_value` (rounded to the gradient's dtype) in absolute value.
      - An element within the bound is returned bit for bit; NaN stays NaN.

    ============================  ==============================================
    Case                          Result
    ============================  ==============================================
    Inf, -Inf                     `max_value`, -`max_value` (a finite number)
    NaN                           NaN
    `max_value` = 0               zero
    schedule or array below 0     as 0
    schedule or array NaN         NaN
    complex element               keeps its direction, even with an infinite part
    `max_value` above the dtype   the dtype's largest number: 65504 in float16
    `max_value` = inf             unchanged
    ============================  ==============================================

    Args:
      max_value: the bound in the gradient's units, >= 0: a number, a 0-d array (traced or not), or a schedule of this
        transformation's own step count.

    Returns:
      A transformation. It changes the direction of the gradient, unlike `clip_by_global_norm`.

    Raises:
      ValueError: `max_value` is negative, NaN or not a scalar.

    Example:
      >>> clip = clip_by_value(1.0)
      >>> clip.update(jnp.array([-3.0, 0.5, jnp.inf]), clip.init(jnp.zeros(3)))[0]
      Array([-1. ,  0.5,  1. ], dtype=float32)

    References:
      Mikolov, "Statistical language models based on neural networks", PhD thesis, 2012.

    See Also:
      `optax.clip`, which is the same but refuses complex gradients.
    """
    name = "clip_by_value"
    max_value = validate.scalar_or_schedule(name, "max_value", max_value, low=0, infinite=True)

    def change(updates: PyTree, state: Any, params: PyTree | None) -> tuple[PyTree, Any]:
        del params
        bound, state = bound_and_state(max_value, state)

        def clip(leaf: jax.Array) -> jax.Array:
            limit = bound.astype(accumulator_dtype(leaf.dtype))
            # A finite bound beyond the dtype's range becomes its largest number, or else Inf would be within it.
            limit = jnp.where(jnp.isfinite(limit), jnp.minimum(limit, float(jnp.finfo(leaf.dtype).max)), limit)
            if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                limit = limit.astype(leaf.dtype)
            # Selected, since `jnp.clip` flushes subnormals on CPU; written so that NaN stays.
            over = (jnp.abs(leaf) > limit) & ~jnp.isnan(leaf) | jnp.isnan(limit)
            return jnp.where(over, multiplied(direction(leaf), limit), leaf)

        return map_gradients(clip, updates), state

    return transformation(name, init_for(max_value), change)


def adaptive_grad_clip(
    clipping: ScalarOrSchedule = 0.01, *, eps: float = 1e-3, axis: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Bound every unit's gradient relative to the unit's weights (adaptive gradient clipping).

    G_u <- G_u * min(1, clipping * max(||W_u||, eps) / ||G_u||)          for every unit u

    A unit is the vector of weights that feeds one output. In Flax's layout (..., in, out) it spans all axes but the
    last, which is right for dense, convolutional (1-d to 3-d) and attention-output kernels. An array of rank 0 or 1 is
    one unit. If a kernel has another layout, set `axis`: the units of a stack of layers (layers, in, out) span
    `axis=-2`, and those of an attention query kernel (in, heads, head_dim) span `axis=0`.

    It is not a rule of `guard`, since rules scale whole leaves. It goes inside, before the optimizer:
    `guard(optax.chain(adaptive_grad_clip(0.01), optimizer))`.

    Guarantees:
      - ||G_u|| <= clipping * max(||W_u||, eps) (1 + 4 eps of the dtype) for every unit.
      - A unit within its bound is returned bit for bit.
      - Norms are taken in float32 or wider and scaled by the largest element, so they do not overflow.

    ===============================  ===========================================================
    Case                             Result
    ===============================  ===========================================================
    weights zero                     the bound is clipping * eps: a zero kernel can move
    `clipping` = 0                   zero
    gradient zero                    zero
    norm above 8e37 times the bound  zero: the factor is below the smallest normal float32
    NaN or Inf in a unit             that unit is NaN; the other units are unaffected
    NaN in the weights of a unit     that unit is NaN
    Inf in the weights of a unit     that unit is not bounded
    schedule or array below 0        as 0
    ===============================  ===========================================================

    Args:
      clipping: the bound on ||G_u|| / ||W_u||, >= 0: a number, a 0-d array or a schedule. The paper uses 0.01 for
        batches of 4096 and leaves out the final linear layer (`optax.masked`).
      eps: the smallest weight norm that is assumed, > 0.
      axis: the axes to reduce over in all leaves (an int or a tuple of ints), or a tree with the structure of the
        parameters that holds an int, a tuple or None (the default) for each leaf, or a function from the parameters to
        such a tree. Under `optax.inject_hyperparams`, list it in `static_args`.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: `clipping` is negative, `eps` is not positive, a leaf does not have one of its axes (the message names
        the leaf), or `update` is called without `params`.

    Example:
      >>> agc = adaptive_grad_clip(0.1)
      >>> params = {"kernel": jnp.ones((4, 2))}                      # each of the 2 units has weight norm 2
      >>> grads = {"kernel": jnp.array([[1.0, 0.01]] * 4)}
      >>> agc.update(grads, agc.init(params), params)[0]["kernel"][0]
      Array([0.1 , 0.01], dtype=float32)

    References:
      Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization", 2021, arXiv
      2102.06171, equation 3. Deviation: ||G_u|| has no lower bound of 1e-6, since a zero gradient needs no clip. The
      units are those of the paper's text and of timm. Those of the authors' code, and of Optax, differ in two cases: an
      array of rank 3 is reduced over its first axis alone (`axis=0`), and an array with a single axis longer than 1,
      such as (1, n), is one unit (`axis=(0, 1)`) and not n units.

    See Also:
      `optax.adaptive_grad_clip`, which has one `axis` for all leaves and the units of the authors' code.
    """
    name = "adaptive_grad_clip"
    clipping = validate.scalar_or_schedule(name, "clipping", clipping, low=0)
    eps = validate.scalar(name, "eps", eps, low=0, open_low=True)

    def change(updates: PyTree, state: Any, params: PyTree | None) -> tuple[PyTree, Any]:
        ratio, state = bound_and_state(clipping, state)

        asked = _axes_by_path(name, axis, params)

        def clip(path: Any, leaf: Any, weight: Any) -> Any:
            if not is_gradient(leaf) or leaf.size == 0:
                return leaf
            axes = _unit_axes(name, path, leaf.ndim, asked)
            smallest, (width, height) = jnp.asarray(eps, ratio.dtype), _unit_norm(weight, axes)
            bound = ratio * jnp.maximum((width * height).astype(ratio.dtype), smallest)
            size, root = _unit_norm(leaf, axes)
            bound = bound.astype(root.dtype)
            inside = size * root <= bound
            scale = bound_over_norm(bound, jnp.where(inside, 1, size), jnp.where(inside, 1, root))
            scale = jnp.where(jnp.isfinite(root), scale, jnp.nan)
            return jnp.where(inside & jnp.isfinite(root), leaf, multiplied(leaf, scale))

        return jax.tree_util.tree_map_with_path(clip, updates, params, is_leaf=lambda leaf: leaf is None), state

    return transformation(name, init_for(clipping), change, needs_params=True)


def _unit_norm(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns (size, root), whose product is the L2 norm over `axes`, kept as axes of size 1, in float32 or wider."""
    parts = (jnp.real(x), jnp.imag(x)) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,)
    sizes = [jnp.max(jnp.abs(part), axis=axes, keepdims=True) for part in parts]
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, sizes))
    wide = largest.astype(accumulator_dtype(x.dtype))
    most = 2.0 ** (jnp.finfo(wide.dtype).maxexp - 2)  # XLA may multiply by the inverse, which is 0 beyond this
    size = jnp.where((wide > 0) & jnp.isfinite(wide), jnp.minimum(wide, most), 1)
    complex_or_wide = wider_dtype(x.dtype, size.dtype)
    squares = absolute_square(x.astype(complex_or_wide) / size.astype(complex_or_wide))
    return size, safe_sqrt(jnp.sum(squares, axis=axes, keepdims=True))


def _is_axes(node: Any) -> bool:
    return node is None or isinstance(node, int) or (isinstance(node, tuple) and all(isinstance(a, int) for a in node))


def _axes_by_path(name: str, axis: Any, params: PyTree) -> dict[Any, Any]:
    """The requested axes by the path of a leaf or a subtree; {(): axis} if all leaves have the same."""
    axes = axis(params) if is_function(axis) else axis
    asked = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes))
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path, entry in asked.items():
        if not _is_axes(entry):
            raise ValueError(
                f"{name}: `axis` must hold ints, tuples of ints or None; at `{path_name(path)}`: {entry!r}."
            )
        if path and not any(leaf[: len(path)] == path for leaf in leaves):
            raise ValueError(f"{name}: `axis` names `{path_name(path)}`, which the parameters do not have.")
    return asked


def _unit_axes(name: str, path: Any, ndim: int, asked: dict[Any, Any]) -> tuple[int, ...]:
    """The axes that a unit of a leaf spans."""
    axes = next((asked[path[:n]] for n in range(len(path), -1, -1) if path[:n] in asked), None)
    if axes is None:
        return tuple(range(ndim)) if ndim <= 1 else tuple(range(ndim - 1))
    axes = (axes,) if isinstance(axes, int) else axes
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name}: `axis` {axes} is out of range for leaf `{path_name(path)}` of rank {ndim}.")
    return tuple(a % ndim for a in axes)

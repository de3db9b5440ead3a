"""Observe: one reduction per leaf, from which every rule judges.

A finite float32 sum of squares proves that every element is finite and that no square overflows. One read of the
gradient therefore gives the norm of every leaf *and* shows that all elements are finite; a sum that is not finite names
its leaf. A second look, scaled by the largest element, tells whether that leaf holds NaN or Inf, or is finite but too
large (or too small) to be squared. It is in a separate branch and costs nothing while all is well.

===========================  ==============================================================
Function                     Use it for
===========================  ==============================================================
`global_norm(tree)`          logging; a drop-in for `optax.tree.norm` that cannot overflow
`gradient_statistics(tree)`  writing a rule, or the norms of all leaves at once
===========================  ==============================================================
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._common import validate
from optax_guard._common.axes import Sharding, max_over, sharding_of, sum_over
from optax_guard._common.numerics import absolute_square, accumulator_dtype, safe_sqrt, widest_accumulator
from optax_guard._common.tree import as_arrays, is_gradient, leaves_with_none, small_leaves_together
from optax_guard._common.typing import AxisName, PyTree

__all__ = [
    "GradientStatistics",
    "global_norm",
    "gradient_statistics",
    "one_pass_statistics",
    "overflows",
    "scale_statistics",
    "squarable",
]

# Squares of elements below 2^-63 are lost in float32; below this total that could matter.
_SMALL = 2.0**-80


class GradientStatistics(NamedTuple):
    """The statistics of a gradient. Leaf i has the squared norm `sum_squares[i] * magnitude[i]**2`.

    There are two numbers per leaf, since the square of a representable norm need not be representable. Entries are in
    the order of `leaf_names(tree)`; leaves without a gradient (integers, `float0`, `None`) have a sum of 0.
    """

    sum_squares: jax.Array  # f32[n_leaves] (f64 if a leaf is f64): NaN or Inf exactly where a leaf is not finite
    magnitude: jax.Array  # the same shape and dtype: 1 unless a second look was needed or a rule scaled the leaf

    @property
    def finite(self) -> jax.Array:
        """bool[n_leaves]: whether each leaf is finite."""
        return jnp.isfinite(self.sum_squares)

    @property
    def leaf_norms(self) -> jax.Array:
        """f32[n_leaves]: the L2 norm of each leaf."""
        size, root = self.leaf_norm_parts
        return size * root

    @property
    def norm(self) -> jax.Array:
        """f32[]: the L2 norm of the whole tree; NaN or Inf if that of a leaf is."""
        size, root = self._parts(jnp.ones_like(self.finite))
        return size * root

    @property
    def finite_norm_parts(self) -> tuple[jax.Array, jax.Array]:
        """(size, root), each f32[]: the norm over the finite leaves is size * root, a product that may overflow."""
        return self._parts(self.finite)

    @property
    def leaf_norm_parts(self) -> tuple[jax.Array, jax.Array]:
        """(size, root), each f32[n_leaves]: the same for every leaf."""
        return self.magnitude, safe_sqrt(self.sum_squares)

    def _parts(self, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.sum_squares.shape == (0,):
            return jnp.ones((), self.sum_squares.dtype), jnp.zeros((), self.sum_squares.dtype)
        seen = self.finite & (self.sum_squares > 0)
        size = jnp.max(jnp.where(seen, self.magnitude, 0))
        size = jnp.where(size > 0, size, 1)
        ratio = jnp.where(seen, self.magnitude / size, 1)
        return size, safe_sqrt(jnp.sum(jnp.where(counted, self.sum_squares * jnp.square(ratio), 0)))


def scale_statistics(statistics: GradientStatistics, scale: jax.Array) -> GradientStatistics:
    """The statistics of the gradient multiplied by `scale` (one number, or one per leaf), without reading it again."""
    return GradientStatistics(
        sum_squares=statistics.sum_squares,
        magnitude=statistics.magnitude * scale.astype(statistics.magnitude.dtype),
    )


def overflows(statistics: GradientStatistics, scale: jax.Array, tree: PyTree) -> jax.Array:
    """bool[n_leaves]: whether a scale above 1 may have moved a finite leaf beyond the range of its dtype.

    `statistics` are those after the multiplication; no element exceeds its leaf's norm.
    """
    norms = statistics.leaf_norms
    largest = [float(jnp.finfo(leaf.dtype).max) if is_gradient(leaf) else np.inf for leaf in leaves_with_none(tree)]
    return statistics.finite & (scale > 1) & ~(norms <= _bounds(largest, norms.dtype))


def squarable(statistics: GradientStatistics, tree: PyTree) -> jax.Array:
    """bool[n_leaves]: whether a leaf is finite, and its squares do not overflow, after a multiplication.

    This is what `one_pass_statistics` says of a leaf that was not multiplied.
    """
    norms = statistics.leaf_norms
    dtypes = [accumulator_dtype(leaf.dtype) if is_gradient(leaf) else None for leaf in leaves_with_none(tree)]
    largest = [np.inf if each is None else np.sqrt(float(jnp.finfo(each).max)) for each in dtypes]
    return statistics.finite & (norms <= _bounds(largest, norms.dtype))


def _bounds(numbers: list[Any], dtype: Any) -> jax.Array:
    return jnp.asarray(np.minimum(np.array(numbers, np.float64), float(jnp.finfo(dtype).max)), dtype)


def one_pass_statistics(tree: PyTree, axis_name: AxisName | None = None) -> GradientStatistics:
    """The statistics from one read. A leaf whose squares overflow counts as not finite, and as 0 if they vanish."""
    sums = sum_over(_sum_squares(leaves_with_none(tree)), sharding_of(tree, axis_name))
    return GradientStatistics(sum_squares=sums, magnitude=jnp.ones_like(sums))


def gradient_statistics(tree: PyTree, *, axis_name: AxisName | None = None) -> GradientStatistics:
    """Computes the squared norm of every leaf, for every dtype and magnitude.

    sum_squares[i] * magnitude[i]^2 = sum_j |g_ij|^2

    Guarantees:
      - 16-bit leaves are reduced in float32 and float64 leaves in float64; for complex leaves, |g|^2 is summed.
      - The result is exact up to rounding from a dtype's smallest normal number to its largest: 1e30 has norm 1e30 and
        not Inf, and 1.2e-38 has norm 1.2e-38 and not 0. For float16 this includes subnormals, which are normal numbers
        in float32.
      - `statistics.finite[i]` is False exactly if leaf i holds a NaN or an Inf.
      - The gradient is read once while all is well, and a second time, in a separate branch, if a sum of squares
        overflowed or the whole gradient is below 1e-12.

    ==========================================  ===================================================================
    Case                                        Result
    ==========================================  ===================================================================
    empty tree                                  arrays of length 0, norm 0
    integer, `float0`, `None`, zero-size leaf   sum 0
    NaN or Inf in a leaf                        its sum is not finite
    subnormal float32, bfloat16 or float64      0 where XLA flushes it (CPU, TPU), else its value
    a leaf below 1e-19 beside larger leaves     its own norm may read as 0; the norm of the tree is correct
    ==========================================  ===================================================================

    Args:
      tree: gradients, updates or parameters: any tree of arrays of any shapes.
      axis_name: inside `jax.shard_map` or `jax.pmap`, the axis (or tuple of axes) over which leaves are sharded. Their
        sums are reduced by `psum`, so that all devices see the same statistics. JAX's types tell which leaf is sharded
        over which axis, so that replicated leaves count once. Without types (`check_vma=False`, `pmap`) all leaves
        count as sharded over all axes, unless `leaf_axes` says otherwise. Use None under `jit`, where arrays are
        global, and for gradients that are already averaged over the axis.

    Returns:
      `GradientStatistics`, with `.norm`, `.leaf_norms` and `.finite`.

    Raises:
      ValueError: a leaf is not an array (the message names the leaf).

    Example:
      >>> statistics = gradient_statistics({"a": jnp.array([3.0, 4.0]), "b": jnp.full(4, 1e30)})
      >>> print(statistics.leaf_norms, statistics.norm)
      [5.e+00 2.e+30] 2e+30

    See Also:
      `optax.tree.norm`, which reduces in the gradient's own dtype, so float16 [300, 1] and float32 [1e20] have norm
      Inf.
    """
    validate.axis_name("gradient_statistics", axis_name)
    tree = as_arrays("gradient_statistics", tree)
    look = one_pass_statistics(tree, axis_name)
    if look.sum_squares.shape == (0,):
        return look
    total = jnp.sum(look.sum_squares)
    trouble = ~jnp.isfinite(total) | (total < _SMALL)
    # Operands, and functions that are the same at each call, since outside jit new lambdas would be compiled again.
    leaves = [x if is_gradient(x) else None for x in leaves_with_none(tree)]
    return lax.cond(trouble, _second_look_at(sharding_of(tree, axis_name)), _keep_first_look, leaves, look)


def global_norm(tree: PyTree, *, axis_name: AxisName | None = None) -> jax.Array:
    """Computes the L2 norm of a whole tree, correctly for every dtype and magnitude.

    ||g|| = sqrt(sum_i sum_j |g_ij|^2)

    Guarantees: those of `gradient_statistics`; in addition, the derivative at a zero tree is 0 and not NaN.

    =============================  ==============================
    Case                           Result
    =============================  ==============================
    empty tree, all zeros          0
    NaN anywhere                   NaN
    Inf (and no NaN)               Inf
    finite, norm above 3.4e38      Inf (the norm itself overflows)
    norm below 1.2e-38             0 where XLA flushes subnormals
    =============================  ==============================

    Args:
      tree: any tree of arrays.
      axis_name: as in `gradient_statistics`.

    Returns:
      `f32[]` (`f64[]` if a leaf is float64 or complex128).

    Raises:
      ValueError: a leaf is not an array (the message names the leaf).

    Example:
      >>> float(global_norm({"w": jnp.array([300.0, 400.0], jnp.float16)}))
      500.0

    See Also:
      `optax.tree.norm`, which gives the same number for ordinary float32 trees.
    """
    validate.axis_name("global_norm", axis_name)
    tree = as_arrays("global_norm", tree)
    return gradient_statistics(tree, axis_name=axis_name).norm


def _sum_squares(leaves: list[Any]) -> jax.Array:
    """f32[n_leaves], with the reductions of small leaves of one kind stacked into one."""
    dtype = widest_accumulator(leaves)
    order: list[int] = []
    sums: list[jax.Array] = []
    for part in small_leaves_together(leaves):
        if len(part) == 1:
            sums.append(jnp.sum(absolute_square(leaves[part[0]])).astype(dtype).reshape(1))
        else:
            squares = jnp.stack([absolute_square(leaves[i]) for i in part])
            sums.append(jnp.sum(squares, axis=tuple(range(1, squares.ndim))).astype(dtype))
        order += part
    rest = sorted(set(range(len(leaves))) - set(order))
    ordered = jnp.concatenate([*sums, jnp.zeros(len(rest), dtype)])
    return ordered if order + rest == list(range(len(leaves))) else ordered[np.argsort(order + rest)]


def _keep_first_look(leaves: list[Any], look: GradientStatistics) -> GradientStatistics:
    del leaves
    return look


@functools.cache
def _second_look_at(where: Sharding) -> Callable[[list[Any], GradientStatistics], GradientStatistics]:
    return functools.partial(_second_look, where=where)


def _second_look(leaves: list[Any], look: GradientStatistics, where: Sharding) -> GradientStatistics:
    """Sums of squares of the leaves, divided by the power of two below their largest element."""
    del look
    dtype = widest_accumulator(leaves)
    split = [_real_parts(x) for x in leaves]
    largest = max_over([_largest(parts) for parts in split], where.names)
    magnitudes = [lax.stop_gradient(_power_of_two(x)) for x in largest]
    sums = [
        sum((jnp.sum(jnp.square(part / size)) for part in parts), start=jnp.zeros((), size.dtype)).astype(dtype)
        for parts, size in zip(split, magnitudes, strict=True)
    ]
    return GradientStatistics(
        sum_squares=sum_over(jnp.stack(sums), where), magnitude=jnp.stack([x.astype(dtype) for x in magnitudes])
    )


def _real_parts(x: Any) -> list[jax.Array]:
    """The real parts of a leaf, in the dtype to reduce in; none if it has no numbers."""
    if not is_gradient(x) or x.size == 0:
        return []
    real = functools.partial(jnp.asarray, dtype=accumulator_dtype(x.dtype))
    return [real(jnp.real(x)), real(jnp.imag(x))] if jnp.issubdtype(x.dtype, jnp.complexfloating) else [real(x)]


def _largest(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(part)) for part in parts]) if parts else jnp.zeros(())


def _power_of_two(x: jax.Array) -> jax.Array:
    """The power of two at or below x (at most a quarter of the largest), by which division is exact; 1 for 0, NaN, Inf.

    It is read from the bits, since XLA's `exp2` is inexact for most whole numbers on a CPU and 0 at -126. A subnormal,
    if the hardware keeps it, gives the smallest normal number.
    """
    info = jnp.finfo(x.dtype)
    word = {4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    exponent = word((2**info.nexp - 1) << info.nmant)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, word) & exponent, x.dtype)
    usable = jnp.isfinite(x) & (x > 0)
    return jnp.where(usable, jnp.clip(power, info.tiny, 2.0 ** (info.maxexp - 2)), 1)

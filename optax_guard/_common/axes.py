"""Reductions on which all devices of a `shard_map` agree, over trees in which only some leaves are sharded.

A sharded leaf must be summed over the axes that split it, and a leaf that is the same on all devices must count once.
JAX's types tell them apart (`shard_map` with `check_vma=True`, its default). Without types (`check_vma=False`, `pmap`)
every leaf counts as sharded over all of `axis_name`, unless `leaf_axes` says otherwise.
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard._common.tree import is_gradient, leaves_with_none, path_name, varying_axes, wider_dtype
from optax_guard._common.typing import AxisName, PyTree

__all__ = [
    "LeafAxes",
    "Sharding",
    "axes_of",
    "axis_names",
    "everywhere",
    "leaf_axes",
    "max_arrays_over",
    "max_over",
    "mean_over",
    "min_over",
    "on_any_device",
    "placed_like",
    "sharding_of",
    "sum_over",
]


class LeafAxes(NamedTuple):
    """An `axis_name` that knows which axes split which leaf, from `leaf_axes`."""

    names: tuple[Hashable, ...]  # all axes that split some leaf
    leaves: tuple[tuple[tuple[Any, ...], tuple[Hashable, ...]], ...]  # (key path, the axes that split the leaves below)


class Sharding(NamedTuple):
    """How the leaves of one tree are distributed over the devices."""

    names: tuple[Hashable, ...]  # the axes along which some leaf may differ
    copies: tuple[int, ...]  # for every position: the number of devices along `names` that hold the same part of it

    @property
    def parts(self) -> tuple[int, ...]:
        """For every position, the number of devices along `names` over which it is split."""
        devices = math.prod(lax.axis_size(name) for name in self.names)
        return tuple(devices // copies for copies in self.copies)


def leaf_axes(specs: PyTree) -> LeafAxes:
    """Makes an `axis_name` for trees in which only some leaves are sharded, if JAX has no types to tell which.

    ||g||^2 = sum_i sum over the axes in specs_i of ||g_i||^2            instead of over all axes for every leaf

    `axis_name="x"` says that *every* leaf is sharded over x. Inside `jax.shard_map` with `check_vma=True`, JAX's
    default, the types of the arrays correct this automatically for each leaf. With `check_vma=False` and in `jax.pmap`
    there are no types, and a replicated bias would be counted once for each device.

    Guarantees:
      - A leaf counts once, however many devices hold a copy of it (up to rounding, if the number of copies is not a
        power of two).
      - There is still only one all-reduce, and all devices reach the same verdict, even if a copy differs on one of
        them.
      - The result can be hashed and compared: pass equal ones to the guard and its rules.

    ==========================================  ===================================================================
    Case                                        Result
    ==========================================  ===================================================================
    `P()`                                       the leaf is replicated; it counts once
    `P("x", "y")`, `P(("x", "y"))`              summed over both axes
    a spec above several leaves                 applies to all of them, as in `in_specs`
    an axis that no spec names                  nothing is summed over it, and losses are not averaged over it
    types and spec disagree                     an axis counts if both say that the leaf differs along it
    a leaf of the gradient without a spec       an error that names the leaf
    ==========================================  ===================================================================

    Args:
      specs: the gradient's (and parameters') `in_specs`: `PartitionSpec`s, or `NamedSharding`s, in the structure of (a
        prefix of) the parameters.

    Returns:
      A `LeafAxes`, to be passed as `axis_name=` to any function except `accumulate_gradients`.

    Raises:
      ValueError: a leaf of `specs` is neither a `PartitionSpec` nor a `NamedSharding`.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> import optax, optax_guard as og
      >>> axes = og.leaf_axes({"kernel": P("x"), "bias": P()})
      >>> tx = og.guard(optax.adam(1e-3), og.clip_by_global_norm(1.0, axis_name=axes), axis_name=axes)
      >>> axes.names
      ('x',)
    """
    found = []
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
        spec = spec.spec if isinstance(spec, NamedSharding) else spec
        if not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"leaf_axes: `specs` must hold PartitionSpecs or NamedShardings; at `{path_name(path)}` it holds "
                f"{spec!r}."
            )
        found.append((path, tuple(name for entry in spec for name in _names_in(entry))))
    names = dict.fromkeys(name for _, axes in found for name in axes)
    return LeafAxes(names=tuple(names), leaves=tuple(found))


def axis_names(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """The axes of an `axis_name=` argument."""
    if axis_name is None:
        return ()
    if isinstance(axis_name, LeafAxes):
        return axis_name.names
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def axes_of(x: Any, axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """The axes along which an array may differ, over which alone it must be reduced."""
    known = varying_axes(x)
    return tuple(name for name in axis_names(axis_name) if name in known or not _typed(name, axis_name))


def sharding_of(tree: PyTree, axis_name: AxisName | None) -> Sharding:
    """How the leaves are distributed along `axis_name`, according to their types and `leaf_axes`."""
    if axis_name is None:
        return Sharding((), (1,) * len(leaves_with_none(tree)))
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    typed = [axes_of(leaf, axis_name) if is_gradient(leaf) else () for _, leaf in leaves]
    names = tuple(name for name in axis_names(axis_name) if any(name in axes for axes in typed))
    split = typed
    if isinstance(axis_name, LeafAxes):
        split = [
            tuple(name for name in axes if name in _declared(axis_name, path))
            for (path, _), axes in zip(leaves, typed, strict=True)
        ]
    return Sharding(names, tuple(math.prod(lax.axis_size(n) for n in names if n not in axes) for axes in split))


def sum_over(numbers: jax.Array, where: Sharding) -> jax.Array:
    """Sums one number (or row of numbers) per position over all devices, in one all-reduce.

    Copies are divided out instead of left out, so that all devices see a copy that is not finite on one device alone,
    and agree.
    """
    if not where.names or numbers.size == 0:
        return numbers
    if any(copies > 1 for copies in where.copies):
        copies = np.asarray(where.copies, numbers.dtype)
        numbers = numbers / copies.reshape(-1, *(1,) * (numbers.ndim - 1))
    return lax.psum(numbers, where.names)


def on_any_device(condition: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Whether a condition holds on at least one device."""
    names = axes_of(condition, axis_name)
    return lax.psum(condition.astype(jnp.int32), names) > 0 if names else condition


def mean_over(loss: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The mean over the devices along `axis_name`."""
    names = axes_of(loss, axis_name)
    return lax.pmean(loss, names) if names else loss


def max_over(numbers: list[jax.Array], names: tuple[Hashable, ...]) -> list[jax.Array]:
    """The maximum of each number over all devices, in one all-reduce."""
    return numbers if not names or not numbers else _together(lambda x: lax.pmax(x, names), numbers)


def min_over(numbers: list[jax.Array], names: tuple[Hashable, ...]) -> list[jax.Array]:
    """The minimum of each number over all devices, in one all-reduce."""
    return numbers if not names or not numbers else _together(lambda x: lax.pmin(x, names), numbers)


def max_arrays_over(arrays: list[jax.Array], axis_name: AxisName | None) -> list[jax.Array]:
    """The elementwise maxima of arrays over all devices along which one of them differs, in one all-reduce."""
    names = tuple(dict.fromkeys(name for array in arrays for name in axes_of(array, axis_name)))
    if not names:
        return arrays
    packed = lax.pmax(jnp.concatenate([array.ravel() for array in arrays]), names)
    parts = jnp.split(packed, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def placed_like(leaf: jax.Array, factor: jax.Array) -> jax.Array:
    """A factor that broadcasts against a leaf; where types say how the leaf is sharded, sharded like it."""
    where = jax.typeof(leaf).sharding
    if not _is_explicit(where):
        return factor
    return jax.sharding.reshard(jnp.broadcast_to(factor, leaf.shape), where)


def everywhere(x: jax.Array) -> jax.Array:
    """The array itself, or a copy of all of it for every device where types say that it is sharded."""
    where = jax.typeof(x).sharding
    return jax.sharding.reshard(x, NamedSharding(where.mesh, PartitionSpec())) if _is_explicit(where) else x


def _is_explicit(where: Any) -> bool:
    """Whether a sharding, as JAX's types have it, splits an array over axes of explicit sharding."""
    return any(entry is not None for entry in where.spec) and bool(where.mesh.explicit_axes)


def _together(reduce: Callable[[jax.Array], jax.Array], numbers: list[jax.Array]) -> list[jax.Array]:
    """Reduces numbers of any dtypes as one vector."""
    wide = functools.reduce(wider_dtype, [x.dtype for x in numbers])
    reduced = reduce(jnp.stack([x.astype(wide) for x in numbers]))
    return [x.astype(alone.dtype) for x, alone in zip(reduced, numbers, strict=True)]


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, (PartitionSpec, NamedSharding))


def _names_in(entry: Any) -> tuple[Hashable, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _declared(axes: LeafAxes, path: tuple[Any, ...]) -> tuple[Hashable, ...]:
    for above, names in axes.leaves:
        if path[: len(above)] == above:
            return names
    raise ValueError(f"leaf_axes: the gradient has leaf `{path_name(path)}`, for which `specs` holds no PartitionSpec.")


def _typed(name: Hashable, axis_name: AxisName | None) -> bool:
    """Whether types tell which arrays differ along this axis: `shard_map` with `check_vma=True`."""
    try:
        return name in varying_axes(lax.axis_index(name))
    except NameError as error:
        error.add_note(
            f"optax_guard: `axis_name={axis_name!r}` must name an axis of an enclosing jax.shard_map; leave it None "
            "under jit, where arrays are global."
        )
        raise

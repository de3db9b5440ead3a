"""Norms of an update and of the parameters that it changed, and their ratio."""

import jax
import jax.numpy as jnp

from optax_guard._common import validate
from optax_guard._common.eager import compiled_once
from optax_guard._common.numerics import accumulator_dtype
from optax_guard._common.tree import (
    as_arrays,
    check_same_shapes,
    is_gradient,
    leaves_with_none,
    map_gradients,
    variable_free_names,
    wider_dtype,
)
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.observe import gradient_statistics
from optax_guard._step.reading import is_traced

__all__ = ["update_metrics"]


def update_metrics(
    before: PyTree, after: PyTree, *, leaves: bool = False, axis_name: AxisName | None = None
) -> dict[str, jax.Array]:
    """Returns the norms of an update and of the parameters, and their ratio, under flat names for a logger.

    update = after - before,    ratio = ||update|| / ||before||

    ==========================  ======================================================================================
    Name                        Meaning
    ==========================  ======================================================================================
    update/norm                 f32: how far the parameters moved
    update/param_norm           f32: their norm before the step
    update/ratio                f32: the relative change; around 1e-3 is usual for Adam
    update/LEAF/norm, ...       the same three for each leaf with `leaves=True`, as in `update/dense/kernel/ratio`
    ==========================  ======================================================================================

    The update is what the parameters really made of it: with momentum, decay, bounds, and rounded to their dtype.

    ====================================  ========================================================
    Case                                  Result
    ====================================  ========================================================
    a held step                           norm and ratio 0
    a 16-bit leaf that stands still       0, although the optimizer's update is not
    parameters of 0 that moved            ratio Inf; 0 if they did not move
    NaN or Inf in a leaf                  NaN or Inf in its numbers and in those of the tree
    integers, `None`                      have no numbers, and add nothing
    ====================================  ========================================================

    Nothing is measured in steps for which this is not called. A call reads both trees once. If the step donates its
    parameters, keep a copy of them where you want to look (below). Inside the jitted step, XLA makes that copy at every
    step, which then moves twice as many bytes (22 times those of the parameters instead of 11; AdamW, CPU, JAX 0.10).

    Args:
      before: the parameters before a step (or several).
      after: those after it, with the same structure and shapes.
      leaves: whether to return the numbers of each leaf, too: three for each.
      axis_name: as in `gradient_statistics`, for parameters sharded over an axis of `jax.shard_map`.

    Returns:
      A dict of 0-d arrays, which can be joined with those of `metrics(state)`: `metrics(state) | update_metrics(...)`.

    Raises:
      ValueError: the trees differ in structure or shape, a leaf is not an array (the message names the leaf), or
        `before` was donated and is deleted.

    Example:
      >>> import optax
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
      >>> before = jax.tree.map(jnp.copy, params)  # every 100th step, say; needed only if the step donates `params`
      >>> params, state = og.apply_gradients(tx, {"w": jnp.array([1.0, 0.0]), "b": None}, tx.init(params), params)
      >>> numbers = og.update_metrics(before, params, leaves=True)
      >>> {name: round(float(number), 3) for name, number in numbers.items() if "ratio" in name}
      {'update/b/ratio': 0.0, 'update/ratio': 0.02, 'update/w/ratio': 0.02}

    See Also:
      `metrics`, for what the guard saw of the gradient; `limit_step`, which bounds this ratio.
    """
    name = "update_metrics"
    validate.boolean(name, "leaves", leaves)
    validate.axis_name(name, axis_name)
    arrays = [leaf for leaf in jax.tree.leaves(before) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    if any(array.is_deleted() for array in arrays):
        raise ValueError(
            f"{name}: `before` was donated to the step and is deleted; keep a copy, jax.tree.map(jnp.copy, params), "
            "before you call it."
        )
    before, after = as_arrays(name, before), as_arrays(name, after)
    check_same_shapes(name, "after", after, "before", before)
    check_same_shapes(name, "before", before, "after", after)  # a None stands for anything on one side only
    with jax.debug_nans(False), jax.debug_infs(False):
        return _measured(before, after, leaves, axis_name)


@compiled_once
def _measured(before: PyTree, after: PyTree, leaves: bool, axis_name: AxisName | None) -> dict[str, jax.Array]:
    moved = gradient_statistics(map_gradients(_difference, after, before), axis_name=axis_name)
    size = gradient_statistics(before, axis_name=axis_name)
    numbers = _three("update", moved.norm, size.norm)
    for position, (name, leaf) in enumerate(zip(variable_free_names(after), leaves_with_none(after), strict=True)):
        if leaves and is_gradient(leaf):
            numbers |= _three(f"update/{name}", moved.leaf_norms[position], size.leaf_norms[position])
    return numbers


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    wide = wider_dtype(new.dtype, accumulator_dtype(new.dtype))
    return new.astype(wide) - old.astype(wide)


def _three(prefix: str, norm: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
    ratio = jnp.where(norm == 0, 0, norm / size)
    return {f"{prefix}/norm": norm, f"{prefix}/param_norm": size, f"{prefix}/ratio": ratio}

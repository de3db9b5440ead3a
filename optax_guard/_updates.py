"""Bounds on the finished update, last in the chain."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard import _validate
from optax_guard._rule import scale_leaves
from optax_guard._statistics import gradient_statistics
from optax_guard._step import next_step, value_at
from optax_guard._tree import NO_PARAMS_MSG, check_same_structure, is_gradient
from optax_guard._typing import AxisName, ScalarOrSchedule

__all__ = ["limit_step"]

_FLOOR = 1e-3  # of the root mean square of the parameters, so that zeros can move


def limit_step(
    max_change: ScalarOrSchedule, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scale the finished update so that its norm is at most `max_change` times the norm of the parameters.

    u <- u * min(1, max_change * max(||w||_2, 1e-3 sqrt(n)) / ||u||_2)          over the whole tree of n numbers

    Args:
      max_change: bound on the relative change of a step, >= 0: a number, a 0-d array, or a schedule.
      axis_name: as in `gradient_statistics`.

    Returns:
      An Optax transformation, last in the chain.

    Raises:
      ValueError: `max_change` is negative or no scalar; no `params` were passed.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), limit_step(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> tx.update(jnp.array([6.0, 8.0]), tx.init(params), params)[0]
      Array([-0.3, -0.4], dtype=float32)
    """
    name = "limit_step"
    _validate.scalar_or_schedule(name, "max_change", max_change, low=0, infinite=True)

    def init(params: optax.Params) -> dict[str, jax.Array]:
        del params
        return {"limit_step": jnp.zeros((), jnp.int32)}

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        del extra
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        check_same_structure(name, "updates", updates, "params", params)
        size, root = gradient_statistics(updates, axis_name=axis_name).finite_norm_parts
        numbers = sum(x.size for x in jax.tree.leaves(params) if is_gradient(x))
        weight = jnp.maximum(gradient_statistics(params, axis_name=axis_name).norm, _FLOOR * math.sqrt(numbers))
        bound = value_at(max_change, state["limit_step"]).astype(root.dtype) * weight.astype(root.dtype)
        ratio = bound / jnp.where(root > 0, size, 1) / jnp.where(root > 0, root, 1)
        scale = jnp.where(root > 0, jnp.clip(ratio, 0, 1), 1)
        return scale_leaves(updates, scale), {"limit_step": next_step(state["limit_step"])}

    return optax.GradientTransformationExtraArgs(init, update)

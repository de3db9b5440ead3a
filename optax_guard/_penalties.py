"""Penalties: terms of the loss that depend on the parameters alone, added as their gradient.

==========================  ==========================================================================
Function                    Adds the gradient of
==========================  ==========================================================================
`l1_penalty(strength)`      strength * sum |w|: pulls weights towards zero, all with the same force
==========================  ==========================================================================

They go after the clip and before the optimizer: ||strength * sign(w)|| is strength * sqrt(number of weights), which in
front of a global clip would spend the clip's budget. In `guard` that order comes by itself: rules judge the gradient,
penalties are inside. Under Adam a penalty in the gradient is divided by the second moment like everything else, and no
penalty in the gradient makes weights exactly zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard import _validate
from optax_guard._statistics import accumulator_dtype
from optax_guard._step import next_step, value_at
from optax_guard._tree import (
    NO_PARAMS_MSG,
    check_arrays,
    check_same_structure,
    is_gradient,
    map_gradients,
    resolve_mask,
    wider_dtype,
)
from optax_guard._typing import Mask, PyTree, ScalarOrSchedule

__all__ = ["PenaltyState", "l1_penalty"]


class PenaltyState(NamedTuple):
    """Carried by a penalty whose strength is a schedule; with a fixed one the state is `optax.EmptyState`."""

    penalty_step: jax.Array  # i32[]: calls, the argument of the schedule


def l1_penalty(strength: ScalarOrSchedule, *, mask: Mask | None = None) -> optax.GradientTransformationExtraArgs:
    """Add the (sub)gradient of an L1 penalty.

    g <- g + strength * sign(w),   sign(0) = 0;   complex: w / |w|

    Guarantees:
      - A weight that is exactly zero is not moved: written as a loss term, `jnp.abs` has slope 1 there and moves it.
      - Only masked-in leaves change; all others are returned bit for bit.
      - Added in float32 or wider and rounded once to the gradient's dtype.

    =========================  =================================================
    Case                       Result
    =========================  =================================================
    `strength` = 0             unchanged
    weight 0                   unchanged
    weight NaN                 NaN
    gradient NaN or Inf        stays
    schedule or array below 0  used as it is: pushes weights away from zero
    =========================  =================================================

    Args:
      strength: weight of the penalty, >= 0, in units of loss per unit of weight: a number, a 0-d array (traced or not),
        or a schedule of this transformation's own step count.
      mask: which leaves to penalise: booleans in the structure of (a prefix of) the parameters, or a function from
        parameters to such a tree. Default: arrays of rank 2 and more, so biases and norm scales are left alone. Under
        `optax.inject_hyperparams` list it in `static_args`.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: `strength` is negative, NaN or not a scalar; a mask that does not match; `params` missing in `update`.

    Example:
      >>> penalty = l1_penalty(0.1)
      >>> params = {"kernel": jnp.array([[2.0, 0.0, -3.0]]), "bias": jnp.array([5.0])}
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = penalty.update(grads, penalty.init(params), params)
      >>> updates["kernel"], updates["bias"]
      (Array([[ 0.1,  0. , -0.1]], dtype=float32), Array([0.], dtype=float32))

    References:
      Tibshirani, "Regression shrinkage and selection via the lasso", 1996.

    See Also:
      `optax.add_decayed_weights`, the same for squared weights. Optax has no L1.
    """
    name = "l1_penalty"
    _validate.scalar_or_schedule(name, "strength", strength, low=0)

    def init(params: optax.Params) -> optax.OptState:
        check_arrays(name, params)
        _chosen(name, mask, params)
        return PenaltyState(penalty_step=jnp.zeros((), jnp.int32)) if callable(strength) else optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        check_arrays(name, updates)
        check_same_structure(name, "updates", updates, "params", params)
        force = value_at(strength, state.penalty_step if callable(strength) else None)
        if callable(strength):
            state = PenaltyState(penalty_step=next_step(state.penalty_step))

        def add(gradient: jax.Array, weight: jax.Array, chosen: bool) -> jax.Array:
            if not chosen:
                return gradient
            wide = wider_dtype(gradient.dtype, accumulator_dtype(gradient.dtype))
            push = force.astype(wide) * jnp.sign(weight).astype(wide)
            return (gradient.astype(wide) + push).astype(gradient.dtype)

        return map_gradients(add, updates, params, _chosen(name, mask, params)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(name: str, mask: Mask | None, params: PyTree) -> PyTree:
    """Which leaves to penalise, as Python bools in the structure of the parameters."""
    if mask is None:
        return jax.tree.map(lambda weight: is_gradient(weight) and weight.ndim >= 2, params)
    return resolve_mask(name, mask, params)

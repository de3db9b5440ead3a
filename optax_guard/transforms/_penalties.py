"""Penalties: terms of the loss that depend on the parameters alone, added as their gradient.

=================================  ===================================================================================
Function                           Adds the gradient of
=================================  ===================================================================================
`l1_penalty(strength)`             strength * sum |w|: pulls all weights towards zero with the same force
`dense_penalty(strength)`          strength / 2 * sum w^2, or the pseudo-Huber function: smooth everywhere
`elastic_net_penalty(l1, l2)`      an L1 and an L2 penalty together
`shrink_gradients(threshold)`      nothing: it shrinks the elements of the gradient itself
=================================  ===================================================================================

They go after the clip and before the optimizer: ||strength * sign(w)|| is strength * sqrt(number of weights), which
would use up the budget of a later global clip. `guard` always has that order: its rules judge the gradient, and the
penalties are inside. Adam divides a penalty in the gradient by the second moment, like the rest of the gradient. No
penalty in the gradient makes weights exactly zero; `proximal_l1` does.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.counters import next_step, value_at
from optax_guard._common.numerics import accumulator_dtype, direction, multiplied
from optax_guard._common.transformation import transformation
from optax_guard._common.tree import (
    as_arrays,
    is_gradient,
    map_gradients,
    resolve_mask,
    wider_dtype,
)
from optax_guard._common.typing import Mask, PyTree, ScalarOrSchedule

__all__ = [
    "Dense",
    "PenaltyState",
    "Shrinkage",
    "dense_penalty",
    "elastic_net_penalty",
    "l1_penalty",
    "penalised",
    "shrink_gradients",
]

Dense: TypeAlias = Literal["l2", "pseudo_huber"]
Shrinkage: TypeAlias = Literal["soft", "dense"]


class PenaltyState(NamedTuple):
    """The state of a penalty whose strength is a schedule; with a fixed strength it is `optax.EmptyState`."""

    penalty_step: jax.Array  # i32[]: the number of calls, which is the argument of the schedule


def l1_penalty(strength: ScalarOrSchedule, *, mask: Mask | None = None) -> optax.GradientTransformationExtraArgs:
    """Add the (sub)gradient of an L1 penalty.

    g <- g + strength * sign(w),   sign(0) = 0;   complex: w / |w|

    Guarantees:
      - A weight that is exactly zero does not move. Written as a loss term, `jnp.abs` has slope 1 there and moves it.
      - Only the leaves in the mask change; all others are returned bit for bit.
      - The penalty is added in float32 or wider and rounded once to the gradient's dtype.

    =========================  =================================================
    Case                       Result
    =========================  =================================================
    `strength` = 0             unchanged, bit for bit (-0.0 and subnormals too)
    weight 0                   unchanged, bit for bit
    weight subnormal           as 0 where XLA flushes it (CPU, TPU)
    weight NaN                 NaN, unless `strength` is 0
    weight Inf                 pulled like any other
    gradient NaN or Inf        stays
    schedule or array below 0  used as is: pushes weights away from zero
    =========================  =================================================

    Args:
      strength: the weight of the penalty, >= 0, in units of loss per unit of weight: a number, a 0-d array (traced or
        not), or a schedule of this transformation's own step count.
      mask: which leaves to penalise: booleans in the structure of (a prefix of) the parameters, a function from the
        parameters to such a tree, or a pattern of paths such as "encoder/*/kernel" (`fnmatch` over `leaf_names`). The
        default is arrays of rank 2 or more, which leaves out biases and norm scales. Under `optax.inject_hyperparams`,
        list it in `static_args`.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: `strength` is negative, NaN or not a scalar, the mask does not match, or `update` is called without
        `params`.

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
      `optax.add_decayed_weights`, the equivalent for an L2 penalty. Optax has no L1 penalty.
    """
    name = "l1_penalty"
    strength = validate.scalar_or_schedule(name, "strength", strength, low=0)

    def force(weight: jax.Array, factor: jax.Array) -> jax.Array:
        return _product(factor, direction(weight))

    return _penalty(name, (strength,), mask, force)


def dense_penalty(
    strength: ScalarOrSchedule, penalty: Dense = "l2", *, delta: float = 1.0, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Add the gradient of a penalty that is smooth everywhere: all weights shrink, but none becomes zero.

    "l2":            g <- g + strength * w,                                of strength / 2 * sum w^2
    "pseudo_huber":  g <- g + strength * w / sqrt(1 + (|w| / delta)^2),    of the sum of
                     strength * delta^2 * (sqrt(1 + (w / delta)^2) - 1)

    The pseudo-Huber penalty is L2 for |w| << delta, and L1 with strength * delta for |w| >> delta, without the corner
    of L1.

    Guarantees:
      - The pull is continuous in the weight, zero at zero, and less than strength * delta for "pseudo_huber".
      - Only the leaves in the mask change; all others are returned bit for bit.
      - The penalty is added in float32 or wider and rounded once to the gradient's dtype.

    =========================  =================================================
    Case                       Result
    =========================  =================================================
    `strength` = 0             unchanged, bit for bit (-0.0 and subnormals too)
    weight 0                   unchanged, bit for bit
    weight NaN                 NaN, unless `strength` is 0
    weight 1e38                no overflow: (w / delta)^2 is never formed
    weight Inf                 "l2": Inf; "pseudo_huber": strength * delta
    gradient NaN or Inf        stays
    =========================  =================================================

    Args:
      strength: the weight of the penalty, >= 0, as in `l1_penalty`.
      penalty: "l2" or "pseudo_huber".
      delta: the weight at which "pseudo_huber" changes from quadratic to linear, > 0; not used by "l2".
      mask: as in `l1_penalty`. Under `optax.inject_hyperparams`, list it in `static_args` together with `penalty`.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: a static argument is invalid, the mask does not match, or `update` is called without `params`.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, 0.0, -0.001]])}
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> penalty = dense_penalty(0.1, "pseudo_huber", delta=0.01)
      >>> updates, _ = penalty.update(grads, penalty.init(params), params)
      >>> [round(float(u), 6) for u in updates["kernel"][0]]
      [0.001, 0.0, -0.0001]

    References:
      Hoerl and Kennard, "Ridge regression", 1970. Charbonnier et al., "Deterministic edge-preserving regularization in
      computed imaging", 1997, for the pseudo-Huber function.

    See Also:
      `optax.add_decayed_weights`, which is "l2" for all leaves and, after Adam, the decoupled decay of AdamW.
    """
    name = "dense_penalty"
    strength = validate.scalar_or_schedule(name, "strength", strength, low=0)
    validate.one_of(name, "penalty", penalty, Dense)
    delta = validate.scalar(name, "delta", delta, low=0, open_low=True)

    def force(weight: jax.Array, factor: jax.Array) -> jax.Array:
        if penalty == "l2":
            return _product(factor, weight)
        size = jnp.abs(weight)
        width = value_at(delta, None).astype(size.dtype)
        slope = jnp.where(jnp.isinf(size), direction(weight), weight / jnp.hypot(width, size).astype(weight.dtype))
        return _product(factor * width.astype(weight.dtype), slope)

    return _penalty(name, (strength,), mask, force)


def elastic_net_penalty(
    l1: ScalarOrSchedule, l2: ScalarOrSchedule, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Add the (sub)gradients of an L1 and an L2 penalty together.

    g <- g + l1 * sign(w) + l2 * w,   sign(0) = 0;   of l1 * sum |w| + l2 / 2 * sum w^2

    Guarantees:
      - The result equals that of `optax.chain(l1_penalty(l1), dense_penalty(l2))`, with one rounding instead of two.
      - The guarantees of `l1_penalty` hold.

    ==================  =============================
    Case                Result
    ==================  =============================
    `l1` = `l2` = 0     unchanged, bit for bit
    weight 0            unchanged, bit for bit
    weight NaN          NaN, unless `l1` = `l2` = 0
    weight Inf          Inf, unless `l2` = 0
    gradient NaN, Inf   stays
    ==================  =============================

    Args:
      l1: the weight of sum |w|, >= 0, as `strength` in `l1_penalty`.
      l2: the weight of sum w^2 / 2, >= 0, likewise.
      mask: as in `l1_penalty`.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: a static argument is invalid, the mask does not match, or `update` is called without `params`.

    Example:
      >>> params = {"kernel": jnp.array([[2.0, 0.0]])}
      >>> penalty = elastic_net_penalty(0.1, 0.01)
      >>> penalty.update(jax.tree.map(jnp.zeros_like, params), penalty.init(params), params)[0]["kernel"]
      Array([[0.12, 0.  ]], dtype=float32)

    References:
      Zou and Hastie, "Regularization and variable selection via the elastic net", 2005.

    See Also:
      `proximal_elastic_net`, which gives exact zeros.
    """
    name = "elastic_net_penalty"
    l1 = validate.scalar_or_schedule(name, "l1", l1, low=0)
    l2 = validate.scalar_or_schedule(name, "l2", l2, low=0)

    def force(weight: jax.Array, sparse: jax.Array, dense: jax.Array) -> jax.Array:
        return _product(sparse, direction(weight)) + _product(dense, weight)

    return _penalty(name, (l1, l2), mask, force)


def shrink_gradients(
    threshold: ScalarOrSchedule, shrinkage: Shrinkage = "soft"
) -> optax.GradientTransformationExtraArgs:
    """Shrink every element of the gradient, the small ones most.

    "soft":   g <- sign(g) * max(|g| - threshold, 0)           exact zeros below the threshold
    "dense":  g <- g * |g| / (|g| + threshold)                 smooth, never zero, smaller by at most `threshold`

    This is a gradient filter and not a penalty, since it does not depend on the weights. "soft" also stops all learning
    from gradients below the threshold.

    Guarantees:
      - No element changes its sign or grows. None changes by more than the threshold and half a unit in the last place
        ("dense": two units), to which the result is rounded.
      - The result is computed in float32 or wider.

    ===================  ============================
    Case                 Result
    ===================  ============================
    `threshold` = 0      unchanged
    zero                 zero
    NaN                  NaN
    Inf                  Inf
    complex              the modulus shrinks
    ===================  ============================

    Args:
      threshold: the threshold in units of the gradient, >= 0: a number, a 0-d array or a schedule.
      shrinkage: "soft" or "dense". Under `optax.inject_hyperparams`, list it in `static_args`.

    Returns:
      A transformation. It needs no parameters and goes where a clip goes.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> tx = shrink_gradients(0.5)
      >>> tx.update(jnp.array([-2.0, 0.3, 1.0]), tx.init(jnp.zeros(3)))[0]
      Array([-1.5,  0. ,  0.5], dtype=float32)

    References:
      Donoho, "De-noising by soft-thresholding", 1995, for "soft".

    See Also:
      `proximal_l1`, which soft-thresholds the weights.
    """
    name = "shrink_gradients"
    threshold = validate.scalar_or_schedule(name, "threshold", threshold, low=0)
    validate.one_of(name, "shrinkage", shrinkage, Shrinkage)

    def init(params: optax.Params) -> optax.OptState:
        params = as_arrays(name, params)
        return _schedule_state((threshold,))

    def change(updates: PyTree, state: Any, params: PyTree | None) -> tuple[PyTree, Any]:
        del params
        (bound,), state = _values_and_next((threshold,), state)

        def shrink(gradient: jax.Array) -> jax.Array:
            wide = gradient.astype(wider_dtype(gradient.dtype, accumulator_dtype(gradient.dtype)))
            size = jnp.abs(wide)
            limit = jnp.maximum(bound, 0).astype(size.dtype)
            # Divided by |g| first, since Inf / Inf is not 1. The change never exceeds the limit.
            share = 1 / (1 + limit / jnp.where(size > 0, size, 1))
            less = limit if shrinkage == "soft" else limit * share
            small = jnp.zeros_like(size) if shrinkage == "soft" else size * share
            shrunk = multiplied(direction(wide), jnp.where(size <= limit, small, size - less))
            return jnp.where((limit == 0) | jnp.isinf(size), gradient, shrunk.astype(gradient.dtype))

        return map_gradients(shrink, updates), state

    return transformation(name, init, change)


def _product(factor: jax.Array, weight: jax.Array) -> jax.Array:
    """Factor * weight, and 0 for a factor of 0, even if the weight is infinite."""
    return jnp.where(factor == 0, jnp.zeros_like(weight), multiplied(weight, jnp.real(factor)))


def _penalty(
    name: str, strengths: tuple[ScalarOrSchedule, ...], mask: Mask | None, force: Callable[..., jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that adds `force(weight, *strengths)` to the gradient."""

    def init(params: optax.Params) -> optax.OptState:
        params = as_arrays(name, params)
        penalised(name, mask, params)
        return _schedule_state(strengths)

    def change(updates: PyTree, state: Any, params: PyTree | None) -> tuple[PyTree, Any]:
        values, state = _values_and_next(strengths, state)

        def add(gradient: jax.Array, weight: jax.Array, chosen: bool) -> jax.Array:
            if not chosen:
                return gradient
            wide = wider_dtype(gradient.dtype, accumulator_dtype(gradient.dtype))
            push = force(weight.astype(wide), *(value.astype(wide) for value in values))
            # Selected, since adding 0 turns -0.0 into 0.0 and flushes subnormals.
            return jnp.where(push == 0, gradient, (gradient.astype(wide) + push).astype(gradient.dtype))

        return map_gradients(add, updates, params, penalised(name, mask, params)), state

    return transformation(name, init, change, needs_params=True)


def _schedule_state(values: tuple[ScalarOrSchedule, ...]) -> optax.OptState:
    scheduled = any(callable(value) for value in values)
    return PenaltyState(penalty_step=jnp.zeros((), jnp.int32)) if scheduled else optax.EmptyState()


def _values_and_next(values: tuple[ScalarOrSchedule, ...], state: Any) -> tuple[list[jax.Array], Any]:
    if not any(callable(value) for value in values):
        return [value_at(value, None) for value in values], state
    now = [value_at(value, state.penalty_step) for value in values]
    return now, PenaltyState(penalty_step=next_step(state.penalty_step))


def penalised(name: str, mask: Mask | None, params: PyTree) -> PyTree:
    """The leaves to penalise, as Python bools in the structure of the parameters."""
    if mask is None:
        return jax.tree.map(lambda weight: is_gradient(weight) and weight.ndim >= 2, params)
    return resolve_mask(name, mask, params)

"""Float16: gradients that would underflow are computed from a scaled loss, and unscaled before anything else sees them.

float16 has no positive number below 6e-8, and most gradients of a trained model are smaller. Multiplying the loss by a
large number shifts all gradients into range; if one overflows, the step is held and the number is halved. bfloat16 has
float32's range and does not need this.

==================================  =========================================================================
Function                            Use it for
==================================  =========================================================================
`scale_loss(state, loss)`           the number to differentiate
`loss_scaling(optimizer)`           the optimizer that takes those gradients: outermost, around `accumulate`
==================================  =========================================================================
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.extra import is_number, loss_in, with_value
from optax_guard._common.tree import as_params, field_array, find_states, is_gradient, map_gradients, wider_dtype
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.act import (
    Start,
    as_transformation,
    checked_state,
    fast_transformation,
    inner_holds,
    step_if,
    take_step,
)
from optax_guard._step.gradient import Gradient
from optax_guard._step.observe import squarable

__all__ = ["LossScalingState", "loss_scaling", "scale_loss"]

_LARGEST_SCALE = 2.0**126  # beyond it the inverse, which multiplies the gradients, is 0 in float32


class LossScalingState(NamedTuple):
    """The state of `loss_scaling`."""

    unscaled_state: Any  # the inner optimizer's state, for float32 parameters
    loss_scale: jax.Array  # f32[]: the factor of `scale_loss`, by which the next gradients are divided
    clean_in_row: jax.Array  # i32[]: finite steps since the scale last changed
    overflows_left: jax.Array  # i32[]: overflows until the scale falls; 0 or 1 means at the next
    overflowed: jax.Array  # bool[]: whether the last step's scaled gradient was not finite
    overflow_total: jax.Array  # i32[]: steps whose scaled gradient was not finite


def loss_scaling(
    inner: optax.GradientTransformation,
    init: float = 2.0**15,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
    *,
    hysteresis: int = 1,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer for gradients of `scale_loss(state, loss)` (dynamic loss scaling).

    g = float32(scaled gradient) / scale
    finite:      one step of `inner` with g;  scale <- min(scale * growth_factor, max_scale) after `growth_interval`
                                              in a row
    not finite:  held;                        scale <- max(scale * backoff_factor, min_scale)

    With `hysteresis` h > 1, the first h - 1 overflows since the scale last grew do not change it.

    Guarantees:
      - Gradients are divided by the scale with which they were computed; a new scale is used from the next step on.
      - `inner` works in float32 throughout: it is initialised with float32 parameters and sees float32 gradients.
      - A step that overflowed leaves no trace in the parameters and the inner state, and its NaN enters no state.
      - The scale grows exactly at the interval: with `growth_interval=3`, the third finite step in a row raises it.
      - The scale stays in [min_scale, max_scale], so it is never 0 or Inf.
      - One read of the gradient shows that it is finite, and also serves a `guard` or `accumulate` inside.

    ============================================  ====================================================================
    Case                                          Result
    ============================================  ====================================================================
    overflow, `inner` is `guard`                  the guard holds, counts and records it, and halts at `halt_after`
    overflow, `inner` is `accumulate`             that micro-batch is dropped and keeps its place in the cycle
    overflow, any other `inner`                   held here
    the loss (`value=`) is NaN or Inf             like an overflow; the scale falls to `min_scale` at worst
    float32 or bfloat16 gradients                 the same; the scale then changes only rounding
    float16 parameters                            updated in float32 and rounded once; better kept in float32
    ============================================  ====================================================================

    Args:
      inner: any Optax transformation; `accumulate` and `guard` go inside.
      init: the initial scale, in [min_scale, max_scale].
      growth_interval: the number of finite steps in a row after which the scale grows (>= 1).
      growth_factor: the factor by which the scale grows, in (1, inf). Powers of two cause no rounding.
      backoff_factor: the factor by which the scale falls, in (0, 1).
      min_scale: the smallest scale, in [2^-126, 2^126].
      max_scale: the largest scale, in [min_scale, 2^126], whose inverse is a normal float32.
      hysteresis: the number of overflows since the scale last grew (or since the start) at which it falls, >= 1. With
        2, as in Megatron-LM, a single bad batch does not halve the scale.
      axis_name: as in `gradient_statistics`, for gradients sharded over an axis of `jax.shard_map`.

    Returns:
      A transformation for `apply_gradients` (fast) and for anything that takes an Optax transformation. Its updates
      have the wider dtype of gradients and parameters.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> import optax_guard as og
      >>> tx = og.loss_scaling(og.guard(optax.sgd(1.0)), init=1024.0)
      >>> params = jnp.ones(2, jnp.float16)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: og.scale_loss(state, jnp.sum(p * jnp.float16(1e-7))))(params)
      >>> params, state = og.apply_gradients(tx, grads, state, params)
      >>> float(state.loss_scale), int(state.overflow_total)
      (1024.0, 0)

    References:
      Micikevicius et al., Mixed Precision Training, 2018, arXiv 1710.03740, section 3.2. The schedule (double after
      2000 clean steps, halve on overflow) is that of PyTorch's `GradScaler`, and the hysteresis that of Megatron-LM's
      `DynamicGradScaler`. Deviation: the bounds on the scale.

    See Also:
      `flax.training.dynamic_scale.DynamicScale` and `jmp.DynamicLossScale`, which scale outside the optimizer.
    """
    name = "loss_scaling"
    inner = as_transformation(name, inner)
    growth_interval = validate.integer(name, "growth_interval", growth_interval, low=1)
    min_scale = validate.scalar(
        name, "min_scale", min_scale, low=1 / _LARGEST_SCALE, high=_LARGEST_SCALE, static=True, reason="2^-126 to 2^126"
    )
    max_scale = validate.scalar(
        name, "max_scale", max_scale, low=min_scale, high=_LARGEST_SCALE, static=True, reason="`min_scale` to 2^126"
    )
    growth_factor = validate.scalar(name, "growth_factor", growth_factor, low=1, open_low=True)
    backoff_factor = validate.scalar(
        name, "backoff_factor", backoff_factor, low=0, high=1, open_low=True, open_high=True
    )
    hysteresis = validate.integer(name, "hysteresis", hysteresis, low=1)
    first_scale = validate.scalar(
        name, "init", init, low=min_scale, high=max_scale, static=True, reason="`min_scale` to `max_scale`"
    )
    validate.axis_name(name, axis_name)
    inside_holds, mask = inner_holds(name, inner, axis_name)

    def init_state(params: optax.Params) -> LossScalingState:
        params = as_params(name, params)
        unscaled_state = inner.init(jax.tree.map(_widened, params))
        if find_states(unscaled_state, LossScalingState):
            raise ValueError(f"{name}: `inner` holds another `{name}`; gradients must be scaled once.")
        return LossScalingState(
            unscaled_state=unscaled_state,
            loss_scale=jnp.full((), first_scale, jnp.float32),
            clean_in_row=jnp.zeros((), jnp.int32),
            overflows_left=jnp.full((), hysteresis, jnp.int32),
            overflowed=jnp.zeros((), bool),
            overflow_total=jnp.zeros((), jnp.int32),
        )

    def step(
        gradient: Gradient, state: LossScalingState, start: Start, extra: dict[str, Any]
    ) -> tuple[PyTree, LossScalingState]:
        looked = gradient.look(name, mask, axis_name)
        finite = jnp.all(looked.seen().finite)
        loss = loss_in(name, extra, axis_name)
        if loss is not None:
            finite = finite & jnp.isfinite(loss)
        total, like = jax.tree.map(_widened, (looked.total, looked.like))
        unscaled = looked._replace(total=total, like=like).times(1 / state.loss_scale)
        if min_scale < 1 or gradient.factor is not None:  # dividing by a scale below 1 can overflow
            finite = finite & jnp.all(squarable(unscaled.seen(), like))

        def take() -> tuple[PyTree, Any]:
            result, new = take_step(inner, unscaled, state.unscaled_state, start, with_value(extra))
            result = result if start.in_place else _narrowed(result, gradient.like, start.params)
            return result, checked_state(name, new, state.unscaled_state)

        if inside_holds:  # it holds and counts non-finite steps itself
            result, inner_state = take()
        else:
            result, inner_state = step_if(finite, take, state.unscaled_state, start, gradient.like, usually=True)
        clean = jnp.where(finite, state.clean_in_row + 1, 0)
        grows = clean >= growth_interval
        grown = jnp.minimum(state.loss_scale * growth_factor, max_scale)
        left = jnp.where(finite, state.overflows_left, jnp.maximum(state.overflows_left - 1, 0))
        shrunk = jnp.where(left > 0, state.loss_scale, jnp.maximum(state.loss_scale * backoff_factor, min_scale))
        return result, LossScalingState(
            unscaled_state=inner_state,
            loss_scale=jnp.where(finite, jnp.where(grows, grown, state.loss_scale), shrunk),
            clean_in_row=jnp.where(grows, 0, clean),
            overflows_left=jnp.where(grows, hysteresis, left),
            overflowed=~finite,
            overflow_total=count_if(~finite, state.overflow_total),
        )

    return fast_transformation(name, init_state, step, holds_nonfinite=True, axis_name=axis_name, mask=mask)


def scale_loss(state: optax.OptState, loss: jax.Array) -> jax.Array:
    """Multiplies the loss by the scale in `state`, in float32 or wider, for differentiation.

    The last operations of the model should be in float32 (cast the logits before the cross-entropy), since the
    derivative of a float16 loss is the scale itself, which float16 holds only up to 65504.

    Args:
      state: an optimizer state that holds one `loss_scaling`, in any nesting.
      loss: a real scalar (or an array of them).

    Returns:
      `loss * scale`, in float32 for a 16-bit loss. Log the loss itself instead.

    Raises:
      ValueError: `state` holds no `loss_scaling` or more than one, or the loss is not real.

    Example:
      >>> import optax_guard as og
      >>> state = og.loss_scaling(optax.sgd(0.1), init=8.0).init(jnp.ones(2))
      >>> og.scale_loss(state, jnp.float16(0.5))
      Array(4., dtype=float32)
    """
    states = find_states(state, LossScalingState)
    if len(states) != 1:
        raise ValueError(f"scale_loss: expected one `loss_scaling` in this state, found {len(states)}.")
    if not is_number(loss) or isinstance(loss, int):
        raise ValueError(f"scale_loss: `loss` must be real; got {validate.shown(loss)}.")
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"scale_loss: `loss` must be real; got {loss.dtype}.")
    wide = wider_dtype(loss.dtype, jnp.float32)
    return loss.astype(wide) * lax.stop_gradient(field_array(states[0].loss_scale)).astype(wide)


def _widened(leaf: Any) -> Any:
    """The leaf in float32 if it has 16 bits; it may also be a shape, which `init` accepts."""
    if not (hasattr(leaf, "dtype") and is_gradient(leaf)) or wider_dtype(leaf.dtype, jnp.float32) == leaf.dtype:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    return leaf.astype(jnp.float32)


def _narrowed(updates: PyTree, like: PyTree, params: PyTree | None) -> PyTree:
    """Updates in the wider dtype of gradients and parameters."""

    def narrow(update: Any, leaf: Any, param: Any) -> Any:
        return update.astype(wider_dtype(leaf.dtype, param.dtype))

    return map_gradients(narrow, updates, like, like if params is None else params)

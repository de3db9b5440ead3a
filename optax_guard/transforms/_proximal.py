"""Proximal steps: penalties that make weights exactly zero.

===================================  ======================================================================
Function                             Effect after the optimizer's step
===================================  ======================================================================
`proximal_l1(optimizer, s)`          shrinks every weight towards zero and keeps small ones there (lasso)
`proximal_elastic_net(opt, l1, l2)`  the same, and also shrinks all weights by a factor
`proximal_group_lasso(opt, s)`       shrinks whole groups: rows, columns, channels
`sparsity(params)`                   none: counts the exact zeros
===================================  ======================================================================

They wrap the optimizer, inside `guard` and `accumulate`: `guard(proximal_l1(optax.adamw(1e-3), ...))`. They cannot be
links of a chain, since the shrinkage needs the finished update and, with Adam, also the second moment, by which Adam
divides the penalty like the gradient. Soft-thresholding an Adam step by learning_rate * strength would solve a
different problem, with hardly any zeros.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import next_step, value_at
from optax_guard._common.new_params import finished
from optax_guard._common.numerics import accumulator_dtype, multiplied
from optax_guard._common.optimizer_state import Metric, Reader, Response, injected_learning_rate, reader, responses
from optax_guard._common.tree import (
    as_arrays,
    as_params,
    check_has_params,
    count_true,
    is_gradient,
    leaf_names,
    leaves_with_none,
    wider_dtype,
)
from optax_guard._common.typing import Mask, PyTree, ScalarOrSchedule
from optax_guard._guard import HOLDING
from optax_guard._step.act import Start, as_transformation, fast_transformation, refuse_inside
from optax_guard._step.gradient import Gradient
from optax_guard.transforms._penalties import penalised

__all__ = [
    "MAX_TURNS",
    "ProximalState",
    "Sparsity",
    "proximal_elastic_net",
    "proximal_group_lasso",
    "proximal_l1",
    "sparsity",
]

_MOST_AXES = 32  # the most axes of an array in NumPy
MAX_TURNS = 50  # the most iterations of Newton's method, which needs about ten


class ProximalState(NamedTuple):
    """The state of a proximal wrapper."""

    proximal_state: Any  # the inner optimizer's state
    proximal_step: jax.Array  # i32[]: the number of steps, which is the argument of the schedules


class Sparsity(NamedTuple):
    """The exact zeros of each leaf, by its path, and of all leaves."""

    zeros: dict[str, jax.Array]  # i32[]: elements that are exactly zero (f32[] in a leaf of 2^31 elements or more)
    share: dict[str, jax.Array]  # f32[]: their fraction of the leaf
    total_share: jax.Array  # f32[]: their fraction of all leaves


def proximal_l1(
    inner: optax.GradientTransformation,
    strength: ScalarOrSchedule,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    metric: Metric = "auto",
    momentum: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it minimises loss + strength * sum |w|, with exact zeros.

    x = w + u                                                (u: the update of `inner`)
    w <- sign(x) * max(|x| - min(t, learning_rate + |u|), 0),   t = learning_rate * gain * strength / C
    C = 1, gain = 1 (SGD);   C = sqrt(v_hat) + eps (Adam);   gain = 1 / (1 - momentum) (SGD with momentum)

    Guarantees:
      - A weight that is shrunk to zero is exactly 0.0, for every pair of dtypes, through `apply_gradients` and through
        `optax.apply_updates`.
      - The fixed points of the steps are those of loss + strength * sum |w|, for SGD, momentum, Adam and similar
        optimizers alike.
      - With a second moment, no weight is shrunk by more than the learning rate beyond its own update, and a weight
        whose gradient has always been zero (an unused embedding row) is not shrunk. The fixed points do not change.
      - Only the leaves in the mask are shrunk. A NaN or Inf in the update is not shrunk to zero, so that it is noticed.

    =====================================  ========================================================================
    Case                                   Result
    =====================================  ========================================================================
    `strength` = 0                         as `inner` alone (up to rounding)
    schedule or array below 0              as 0
    schedule or array NaN                  NaN
    zero gradient, zero weight             zero
    second moment 0                        the weight is not shrunk
    inside `accumulate` or `guard`         one shrink per applied step
    `guard` or `accumulate` as `inner`     refused, since held steps would be shrunk too
    integer, `float0`, `None` leaf         as from `inner`
    complex leaf                           the modulus is shrunk
    =====================================  ========================================================================

    Args:
      inner: the whole optimizer, including its learning rate.
      strength: the weight of the penalty, >= 0, in units of loss per unit of weight: a number, a 0-d array or a
        schedule of this wrapper's steps.
      learning_rate: the learning rate of `inner`, >= 0: a number, a 0-d array or the same schedule. None reads it from
        the state of `optax.inject_hyperparams(...)` in `inner`. Factors that leave no trace in the state are not
        noticed: the trust ratios of LARS and LAMB, the sign of `optax.sign_sgd`, a custom schedule. A clip inside
        `inner` is not noticed either; put it in `guard`.
      metric: "auto" uses the second moment that it finds in the state of `inner` (Adam, AMSGrad, RMSProp, Adagrad,
        AdaBelief; in chains, masks, partitions), or 1 if there is none, and refuses a state with unknown arrays.
        "second_moment" requires one and ignores the rest. "identity" is always 1, which solves a different problem if
        there is a second moment. It can also be a function from the state of `inner` to C, a tree like the parameters.
      momentum: the momentum of `optax.sgd(..., momentum)`, in [0, 1), which is required if `inner` has one. Adam's `b1`
        does not count, since it averages. `momentum`, `b2` and `eps` are read from the state if
        `optax.inject_hyperparams` keeps them there.
      b2: the constant of the bias correction in `inner`, in [0, 1); default: Optax's. Optax does not keep it in the
        state, so a wrong value cannot be noticed; it matters for the first 1 / (1 - b2) steps.
      eps: the epsilon of `inner`, >= 0; default: Optax's (1e-8 for Adam). A wrong value cannot be noticed either; it
        matters if gradients are not much larger. Yogi keeps its moment in Adam's state and needs `eps=1e-3`; Adamax
        does too, but takes no root, and needs a function as `metric`.
      mask: which leaves to shrink, as in `l1_penalty`. Default: arrays of rank 2 or more.

    Returns:
      A transformation; its `update` needs `params`. Updates have the wider dtype of update and parameter, as exact
      zeros require. Under `optax.inject_hyperparams`, list `inner`, `metric` and `mask` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, the learning rate or the momentum is missing, `inner` lacks the metric,
        or the mask does not match.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(og.proximal_l1(optax.sgd(0.5), 0.1, learning_rate=0.5))
      >>> params = {"kernel": jnp.array([[1.0, 0.02, -2.0]])}
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> params, state = og.apply_gradients(tx, grads, tx.init(params), params)
      >>> params["kernel"]
      Array([[ 0.95,  0.  , -1.95]], dtype=float32)

    References:
      Yun, Lozano and Yang, "Adaptive proximal gradient methods for structured neural networks" (ProxGen), 2021, arXiv
      2006.07065, update (2) with the diagonal metric. Deviations: the shrinkage is at most learning_rate + |u|, and 0
      if v is 0 (in the paper, the first step erases a coordinate with v = 0); there is a gain, since `optax.trace` sums
      gradients instead of averaging them.

    See Also:
      `l1_penalty`, which adds the penalty to the gradient and gives no exact zeros. Optax has no proximal step.
    """
    name = "proximal_l1"
    read = reader(name, metric, momentum, b2, eps)
    strength = validate.scalar_or_schedule(name, "strength", strength, low=0)

    def shrink(x: jax.Array, force: jax.Array, metric: jax.Array | None) -> jax.Array:
        return _soft_threshold(x, _divide(force, metric))

    return _proximal(name, inner, (strength,), learning_rate, read, mask, shrink)


def proximal_elastic_net(
    inner: optax.GradientTransformation,
    l1: ScalarOrSchedule,
    l2: ScalarOrSchedule,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    metric: Metric = "auto",
    momentum: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it minimises loss + l1 * sum |w| + l2 / 2 * sum w^2, with exact zeros.

    x = w + u
    w <- sign(x) * max(|x| - r * l1 / C, 0) / (1 + r * l2 / C),   r = learning_rate * gain

    Guarantees:
      - The guarantees of `proximal_l1` hold; with `l2` = 0 the result is that of `proximal_l1`.

    =====================  ====================================
    Case                   Result
    =====================  ====================================
    `l1` = 0               every weight shrinks by a factor
    `l2` = 0               as `proximal_l1`
    all others             as in `proximal_l1`
    =====================  ====================================

    Args:
      inner: as in `proximal_l1`.
      l1: the weight of sum |w|, >= 0: a number, a 0-d array or a schedule.
      l2: the weight of sum w^2 / 2, >= 0, likewise.
      learning_rate: as in `proximal_l1`.
      metric: as in `proximal_l1`.
      momentum: as in `proximal_l1`.
      b2: as in `proximal_l1`.
      eps: as in `proximal_l1`.
      mask: as in `proximal_l1`.

    Returns:
      A transformation, as `proximal_l1`.

    Raises:
      ValueError: as for `proximal_l1`.

    Example:
      >>> import optax_guard as og
      >>> tx = og.proximal_elastic_net(optax.sgd(1.0), 0.5, 1.0, learning_rate=1.0)
      >>> params = jnp.array([[2.5, 0.1]])
      >>> og.apply_gradients(tx, jnp.zeros((1, 2)), tx.init(params), params)[0]
      Array([[1., 0.]], dtype=float32)

    References:
      Zou and Hastie, "Regularization and variable selection via the elastic net", 2005; the metric as in `proximal_l1`.
    """
    name = "proximal_elastic_net"
    read = reader(name, metric, momentum, b2, eps)
    l1 = validate.scalar_or_schedule(name, "l1", l1, low=0)
    l2 = validate.scalar_or_schedule(name, "l2", l2, low=0)

    def shrink(x: jax.Array, sparse: jax.Array, dense: jax.Array, metric: jax.Array | None) -> jax.Array:
        shrunk = _soft_threshold(x, _divide(sparse, metric))
        return shrunk / (1 + _divide(dense, metric)).astype(x.dtype)

    return _proximal(name, inner, (l1, l2), learning_rate, read, mask, shrink)


def proximal_group_lasso(
    inner: optax.GradientTransformation,
    strength: ScalarOrSchedule,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    axis: int = -1,
    metric: Metric = "auto",
    momentum: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that whole groups of weights (units, channels, inputs) become exactly zero.

    minimises loss + strength * sum over groups of sqrt(size) * ||w_group||_2
    x = w + u
    w_group <- argmin_y  1/2 sum_i C_i |y_i - x_i|^2 + t ||y||_2,   t = learning_rate * gain * strength * sqrt(size)

    For C = 1, the solution is x * max(0, 1 - t / ||x||). With a second moment there is no closed form: the norm of y is
    the root of a scalar equation, which Newton's method finds from below, where it cannot overshoot.

    Guarantees:
      - A group becomes zero as a whole if ||C x|| <= t (with a second moment, at the pace that `proximal_l1` states).
      - A group whose second moments are all 0 is not shrunk. In other groups, an element whose second moment is 0 is
        shrunk with the mean C of its group, so that a unit vanishes together with the weights of unseen inputs.
      - The guarantees of `proximal_l1` on dtypes, masks and non-finite numbers hold.

    =======================  ========================================================
    Case                     Result
    =======================  ========================================================
    zero group               zero
    groups of one element    as `proximal_l1`
    `strength` = 0           as `inner` alone (up to rounding)
    all others               as in `proximal_l1`
    =======================  ========================================================

    Args:
      inner: as in `proximal_l1`.
      strength: the weight of the penalty, >= 0: a number, a 0-d array or a schedule.
      learning_rate: as in `proximal_l1`.
      axis: the axis along which groups are numbered; a group is all elements with the same index. In a Flax kernel, -1
        gives output units or channels and -2 gives inputs.
      metric: as in `proximal_l1`.
      momentum: as in `proximal_l1`.
      b2: as in `proximal_l1`.
      eps: as in `proximal_l1`.
      mask: as in `proximal_l1`; every leaf in it must have the axis.

    Returns:
      A transformation, as `proximal_l1`.

    Raises:
      ValueError: as for `proximal_l1`, or a leaf does not have the axis.

    Example:
      >>> import optax_guard as og
      >>> tx = og.proximal_group_lasso(optax.sgd(1.0), 0.1, learning_rate=1.0)
      >>> params = jnp.array([[3.0, 0.1], [4.0, 0.0]])
      >>> kernel, _ = og.apply_gradients(tx, jnp.zeros((2, 2)), tx.init(params), params)
      >>> [round(float(x), 3) for x in kernel[:, 0]], kernel[:, 1]
      ([2.915, 3.887], Array([0., 0.], dtype=float32))

    References:
      Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006. Deleu and Bengio,
      "Structured sparsity inducing adaptive optimizers for deep learning", 2021, arXiv 2102.03869, for the metric. Here
      Newton's method is applied to 1 / ||s||, which is concave, so it converges from any start below the root. It is a
      `while_loop`, which JAX cannot differentiate in reverse mode. Deviations: those of `proximal_l1`; and C is the
      actual divisor of the step. In the paper, AdamW uses sqrt(v) + eps without bias correction as the metric of a
      bias-corrected step: with b2 = 0.999 the first C is 32 times too small and the shrinkage 32 times too large, and
      the error lasts for about 1 / (1 - b2) steps.
    """
    name = "proximal_group_lasso"
    read = reader(name, metric, momentum, b2, eps)
    strength = validate.scalar_or_schedule(name, "strength", strength, low=0)
    axis = validate.integer(name, "axis", axis, low=-_MOST_AXES, high=_MOST_AXES)

    def shrink(x: jax.Array, force: jax.Array, metric: jax.Array | None) -> jax.Array:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"{name}: `axis` {axis} is out of range for a leaf of shape {x.shape}; mask it out.")
        others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        size = max(x.size // max(x.shape[axis], 1), 1)
        share = _group_share(jnp.abs(x), force * jnp.sqrt(jnp.asarray(size, force.dtype)), metric, others)
        share = jnp.where(jnp.isnan(force), force, share)  # NaN for a strength that is NaN
        return jnp.where(share == 0, 0, x * share.astype(x.dtype))  # and not -0.0

    return _proximal(name, inner, (strength,), learning_rate, read, mask, shrink)


def sparsity(params: PyTree) -> Sparsity:
    """Counts the exact zeros of every leaf. It works under `jit`.

    Args:
      params: arrays of any dtype; `None`, `float0` and keys are left out.

    Returns:
      A `Sparsity`: counts and fractions by leaf path, and the fraction of all leaves.

    Example:
      >>> sparsity({"kernel": jnp.array([[0.0, 2.0], [-0.0, 1e-30]])}).zeros
      {'kernel': Array(2, dtype=int32)}
    """
    params = as_arrays("sparsity", params)
    named = [
        (name, leaf)
        for name, leaf in zip(leaf_names(params), leaves_with_none(params), strict=True)
        if leaf is not None and leaf.dtype != jax.dtypes.float0 and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ]
    zeros = {name: count_true(leaf == 0) for name, leaf in named}
    share = {name: zeros[name].astype(jnp.float32) / float(max(leaf.size, 1)) for name, leaf in named}
    weights = [(share[name], float(leaf.size)) for name, leaf in named]
    size = sum(size for _, size in weights)
    total = jnp.asarray(sum(part * (size_ / size) for part, size_ in weights) if size else 0.0, jnp.float32)
    return Sparsity(zeros=zeros, share=share, total_share=total)


def _proximal(
    name: str,
    inner: optax.GradientTransformation,
    strengths: tuple[ScalarOrSchedule, ...],
    learning_rate: ScalarOrSchedule | None,
    read: Reader,
    mask: Mask | None,
    shrink: Callable[..., jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Makes a wrapper from `shrink(x, *(learning rate * gain * strength), C or None)`, all in float32 or wider."""
    inner = as_transformation(name, inner)
    if learning_rate is not None:
        learning_rate = validate.scalar_or_schedule(name, "learning_rate", learning_rate, low=0)
    update_inner = inner.update

    def rate_of(state: Any, params: PyTree, step: jax.Array) -> jax.Array:
        return injected_learning_rate(name, state, params) if learning_rate is None else value_at(learning_rate, step)

    def init(params: optax.Params) -> ProximalState:
        params = as_params(name, params)
        state = inner.init(params)
        refuse_inside(name, "inner", state, HOLDING)  # a held step must not be shrunk
        step, chosen = jnp.zeros((), jnp.int32), penalised(name, mask, params)
        # Only raises if something is missing; nothing is computed.
        jax.eval_shape(
            lambda state: (responses(read, state, params, chosen, step), rate_of(state, params, step)), state
        )
        return ProximalState(proximal_state=state, proximal_step=step)

    def take(
        gradient: Gradient, state: ProximalState, start: Start, extra: dict[str, Any]
    ) -> tuple[PyTree, ProximalState]:
        def step(extra: dict[str, Any], base: PyTree | None) -> tuple[PyTree, ProximalState]:
            return take_and_shrink(gradient, state, start, base, extra)

        return finished(step, state, start.params, extra, in_place=start.in_place)

    def take_and_shrink(
        gradient: Gradient, state: ProximalState, start: Start, base: PyTree | None, extra: dict[str, Any]
    ) -> tuple[PyTree, ProximalState]:
        params, in_place = start
        check_has_params(name, params)
        updates, new_state = update_inner(gradient.written(), state.proximal_state, params, **extra)
        step = state.proximal_step
        rate = rate_of(new_state, params, step)
        forces = [jnp.maximum(value_at(strength, step), 0) for strength in strengths]
        chosen = penalised(name, mask, params)

        def move(update: Any, param: Any, target: Any, use: bool | None, response: Response) -> Any:
            if update is None or not is_gradient(param) or update.dtype == jax.dtypes.float0:
                return target if in_place else update
            both = wider_dtype(target.dtype, update.dtype)
            if not use:
                return (param.astype(both) + update.astype(both)).astype(target.dtype) if in_place else update
            wide, real = wider_dtype(both, accumulator_dtype(both)), accumulator_dtype(both)
            metric, gain = (None if part is None else part.astype(real) for part in response)
            old, change = param.astype(wide), update.astype(wide)
            pace = rate.astype(real) if gain is None else rate.astype(real) * gain
            new = shrink(old + change, *(pace * force.astype(real) for force in forces), metric)
            if metric is not None:
                new = _at_most(old + change, new, rate.astype(real) + jnp.abs(change))
            if in_place:
                return new.astype(target.dtype)
            # `apply_updates` adds this in `both`: -p if the sum must be exactly zero, since q - p rounds.
            return jnp.where(new == 0, -old, new - old).astype(both)

        read_out = responses(read, new_state, params, chosen, step)
        flat = [leaves_with_none(tree) for tree in (updates, params, base, chosen)]
        moved = [move(*parts) for parts in zip(*flat, read_out, strict=True)]
        result = jax.tree.unflatten(jax.tree.structure(params, is_leaf=lambda leaf: leaf is None), moved)
        return result, ProximalState(proximal_state=new_state, proximal_step=next_step(step))

    return fast_transformation(name, init, take)


def _at_most(x: jax.Array, shrunk: jax.Array, limit: jax.Array) -> jax.Array:
    """`shrunk`, or `x` moved towards it by `limit`.

    With limit = learning_rate + |u|, fixed points do not change, since there the shrinkage is u itself. Without it, a
    weight whose second moment is almost 0 would be erased in one step.
    """
    size = jnp.abs(x - shrunk)
    step = (x - shrunk) * (limit / jnp.where(size > limit, size, 1)).astype(x.dtype)
    return jnp.where(size > limit, x - step, shrunk)


def _divide(force: jax.Array, metric: jax.Array | None) -> jax.Array:
    """The shrinkage in the metric C: 0 if C is infinite, and complete if it is 0."""
    return force if metric is None else force / jnp.maximum(metric, jnp.finfo(metric.dtype).tiny)


def _soft_threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        size = jnp.abs(x)
        share = jnp.where(size <= threshold, 0, 1 - threshold / jnp.where(size > 0, size, 1))
        return multiplied(x, share)
    return x - jnp.clip(x, -threshold, threshold)  # x - x is exactly zero, and NaN stays NaN


def _group_share(size: jax.Array, bound: jax.Array, metric: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """The factor of each element of a group: 0 for the whole group if ||C x|| <= bound."""

    def norm(values: jax.Array) -> jax.Array:
        largest = jnp.max(values, axis=axes, keepdims=True, initial=0)
        scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
        return scale * jnp.sqrt(jnp.sum(jnp.square(values / scale), axis=axes, keepdims=True))

    if metric is None:
        length = norm(size)
        share = jnp.where(length > bound, 1 - bound / jnp.where(length > bound, length, 1), 0)
        return jnp.where(jnp.isfinite(length), share, 1)  # non-finite elements are unchanged
    live = metric < jnp.inf
    count = jnp.sum(live, axis=axes, keepdims=True, dtype=size.dtype)
    mean = jnp.sum(jnp.where(live, metric, 0), axis=axes, keepdims=True) / jnp.maximum(count, 1)
    curvature = jnp.maximum(jnp.where(live, metric, mean), jnp.finfo(metric.dtype).tiny)
    pull = curvature * size
    zero = norm(pull) <= bound
    safe_bound = jnp.where(bound > 0, bound, 1)

    def newton(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        length, _, turn = carry
        denominator = curvature * length + safe_bound
        s = pull / denominator
        n = norm(s)
        slope = jnp.sum(jnp.square(s / jnp.where(n > 0, n, 1)) * (curvature / denominator), axis=axes, keepdims=True)
        change = jnp.where(zero | (slope <= 0), 0, (n - 1) / jnp.where(slope > 0, slope, 1))
        return length + change, change, turn + 1

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        length, change, turn = carry
        return (turn < MAX_TURNS) & jnp.any(change > 4 * jnp.finfo(length.dtype).eps * length)

    start = jnp.zeros_like(jnp.sum(size, axis=axes, keepdims=True))
    length, _, _ = lax.while_loop(unfinished, newton, (start, start + 1, jnp.zeros((), jnp.int32)))
    share = jnp.where(zero, 0, curvature * length / (curvature * length + safe_bound))
    kept = (bound <= 0) | (count == 0) | ~jnp.isfinite(jnp.sum(pull, axis=axes, keepdims=True))
    return jnp.where(kept, 1, share)

"""Bounds on the finished update, which the optimizer is about to add to the parameters.

==========================  ===========================================================  ==============================
Function                    Bounds the update by                                         Use it against
==========================  ===========================================================  ==============================
`limit_step(max_change)`    the norm of the parameters, of the tree or of each leaf      a learning rate too large
`limit_step_growth()`       the same, growing with the steps themselves                  the same, without a warm-up
`clip_by_update_norm()`     its own history                                              spikes made by the optimizer
`clippy()`                  every single weight, leaf by leaf                            one coordinate that blows up
==========================  ===========================================================  ==============================

They go last, inside `guard`: `guard(optax.chain(optax.adamw(3e-4), limit_step(0.01)), ...)`. They are not rules, since
a rule of `guard` judges the gradient. `metrics` shows how often each of them acts, as in `limit_step/bound_total`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.axes import min_over, sharding_of
from optax_guard._common.counters import count_if, next_step, value_at
from optax_guard._common.eager import compiled_once
from optax_guard._common.numerics import accumulator_dtype, multiplied, safe_sqrt
from optax_guard._common.series import Series, empty_series, push, threshold
from optax_guard._common.transformation import transformation
from optax_guard._common.tree import is_gradient, leaves_with_none
from optax_guard._common.typing import AxisName, PyTree, ScalarOrSchedule, Scope
from optax_guard._step.judge import scale_leaves
from optax_guard._step.observe import one_pass_statistics

__all__ = [
    "ClippyState",
    "LimitStepState",
    "Squares",
    "UpdateNormState",
    "clip_by_update_norm",
    "clippy",
    "factor_within",
    "least_factor",
    "limit_step",
    "norm_of",
    "squares",
    "without_nan",
    "written_once",
]

_LEAST_LOG_NORM = 0.6931472  # an update within x2 of its level is never scaled


class LimitStepState(NamedTuple):
    """The counters of `limit_step`."""

    limit_step_step: jax.Array  # i32[]: updates seen, which is the argument of a schedule
    limit_step_bound_total: jax.Array  # i32[]: updates that were scaled down
    limit_step_scale: jax.Array  # f32[]: the smallest factor in the last update; 0 if it was NaN


class ClippyState(NamedTuple):
    """The counters of `clippy`."""

    clippy_step: jax.Array  # i32[]: updates seen, which is the argument of a schedule
    clippy_bound_total: jax.Array  # i32[]: updates of which a leaf was scaled down
    clippy_scale: jax.Array  # f32[]: the smallest factor of a leaf in the last update; 0 if it was NaN


class UpdateNormState(NamedTuple):
    """The history of `clip_by_update_norm`: logarithms of the norms of updates."""

    update_norms_kept: jax.Array  # f32[window]: norms after the clip, as a ring buffer
    update_norms_recent: jax.Array  # f32[2 * accept_after - 1]: norms before the clip, as a ring buffer
    update_norms_kept_total: jax.Array  # i32[]: the number of kept norms, or the place in the ring once it is full
    update_norms_recent_total: jax.Array  # i32[]
    update_norm_bound_total: jax.Array  # i32[]: updates that were scaled down
    update_norm_scale: jax.Array  # f32[]: the factor of the last update


def limit_step(
    max_change: ScalarOrSchedule, *, scope: Scope = "tree", floor: float = 0.01, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Bound the finished update relative to the parameters.

    u <- u * min(1, max_change * max(||w||_2, floor * sqrt(size)) / ||u||_2)         over the tree, or for every leaf

    A clip bounds the gradient, which bounds the step only if the learning rate is right. This bounds the step itself:
    while it acts, the learning rate does not matter, and a schedule of `max_change` takes its place.

    Guarantees:
      - ||u|| <= max_change * max(||w||, floor * sqrt(size)) (1 + 4 eps of the dtype), for the tree or for every leaf.
      - An update within the bound is returned bit for bit; its direction (of the tree, or of every leaf) never changes.
      - Weights that are all zero can move, since `floor` replaces their root mean square.

    =================================  ================================================================================
    Case                               Result
    =================================  ================================================================================
    zero update, empty tree            unchanged
    `max_change` = 0                   zero
    schedule or array below 0          as 0
    schedule or array NaN              NaN; `guard(..., check_updates=True)` holds such a step
    NaN in a leaf of the update        that leaf is unchanged; the others are bounded by the norm of the rest
    Inf in the update, or > 1.8e19     zero, since its squares overflow; elements that are Inf become NaN
    NaN or Inf in the parameters       those leaves count as zero (with "leaf" they are bounded by the floor)
    finite parameters above 1.8e19     likewise, since their squares overflow
    norm above 8e37 times the bound    zero: the factor is below the smallest normal float32
    =================================  ================================================================================

    Args:
      max_change: the bound on the relative change in one step, >= 0: a number, a 0-d array or a schedule of this
        transformation's own step count. There is no default, since no value suits all models: 0.001 to 0.003 was best
        for a recurrent network, for which 0.01 was too loose, and 0.01 for a transformer, which 0.001 slowed down.
      scope: "tree" uses one bound for all leaves, so that layers keep their share of the step. "leaf" bounds each leaf
        separately, so that a step that is small for the tree cannot overwhelm a leaf of small weights.
      floor: the smallest root mean square of weights that is assumed, > 0. The default corresponds to 1 / sqrt(fan_in)
        of a layer of width 10 000: it is small compared with ordinary weights, yet a bias can grow from zero to 0.01 in
        1 / max_change steps.
      axis_name: as in `gradient_statistics`; parameters and updates must have the same sharding.

    Returns:
      A transformation; its `update` needs `params`. Under `optax.inject_hyperparams`, list `scope` and `axis_name` in
      `static_args`.

    Raises:
      ValueError: a static argument is invalid, or `params` are missing in `update` or have another structure.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), limit_step(0.1))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update({"w": jnp.array([60.0, 80.0])}, tx.init(params), params)
      >>> updates["w"]
      Array([-0.29999998, -0.39999998], dtype=float32)

    References:
      You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", 2019, arXiv 1904.00962
      (LAMB) and Bernstein et al., "On the distance between two neural networks and the stability of learning", 2020,
      arXiv 2002.03432 (Fromage) set the relative length of every layer's step. Deviation: this function only bounds it,
      so that a healthy run is not changed.

    See Also:
      `optax.scale_by_trust_ratio`, which sets the ratio and so always replaces the learning rate.
    """
    name = "limit_step"
    max_change = validate.scalar_or_schedule(name, "max_change", max_change, low=0, infinite=True)
    validate.one_of(name, "scope", scope, Scope)
    floor = validate.scalar(name, "floor", floor, low=0, open_low=True)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> LimitStepState:
        del params
        return LimitStepState(
            limit_step_step=jnp.zeros((), jnp.int32),
            limit_step_bound_total=jnp.zeros((), jnp.int32),
            limit_step_scale=jnp.ones((), jnp.float32),
        )

    def change(updates: PyTree, state: LimitStepState, params: PyTree | None) -> tuple[PyTree, LimitStepState]:
        ratio = jnp.maximum(value_at(max_change, state.limit_step_step), 0)
        updates = written_once(updates, state.limit_step_step)
        moved, weights, sizes = squares(updates, params, axis_name)
        if scope == "tree":
            moved, weights, sizes = without_nan(moved), jnp.sum(weights), jnp.sum(sizes)
        smallest = jnp.asarray(floor, moved.dtype) * jnp.sqrt(sizes)
        bound = ratio.astype(moved.dtype) * jnp.maximum(safe_sqrt(weights), smallest)
        scale = factor_within(bound, safe_sqrt(moved))
        least = least_factor(scale)
        return scale_leaves(updates, scale, jnp.zeros((), bool)), LimitStepState(
            limit_step_step=next_step(state.limit_step_step),
            limit_step_bound_total=count_if(least < 1, state.limit_step_bound_total),
            limit_step_scale=least,
        )

    return transformation(name, init, change, needs_params=True)


def clip_by_update_norm(
    window: int = 128,
    deviations: float = 3.0,
    *,
    accept_after: int = 8,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale an update down to a limit that follows its own history.

    u <- u * min(1, limit / ||u||_2);  with x = log ||u||_2, over the last `window` values of min(x, log limit)

        log limit = q50 + max(deviations * (q90 - q50) / 1.28 * (1 + 8 / n), log 2)

    If more than half of the last 2 * accept_after - 1 norms before the clip lie above the limit, they are a new level,
    and the limit is measured from their median; `skip_spikes` has the equations.

    An optimizer can turn an ordinary gradient into a large update (as Adam does when its second moment has fallen
    behind), which a clip of the gradient does not see.

    Guarantees:
      - Nothing that is not finite enters the history, and a non-finite update does not change it.
      - ||u|| <= limit (1 + 4 eps of the dtype); an update within the limit is returned bit for bit.
      - Up to `accept_after` - 1 spikes within 2 * accept_after - 1 steps, of any size, enter the history *at* the
        limit. Seven of them raise the limit of a full window by at most x1.02 (norms of log-sd 0.1) or x2.3 (0.3). In a
        young window each raises the next: by x3 to x15 in total after 60 norms, x4 to x1000 after 30, and without bound
        after 15.
      - A lasting rise is followed after `accept_after` clipped steps if the noise is small relative to it.
      - An update within x2 of the median is never scaled, nor are the first 2 * accept_after - 1 updates.

    ==============================  ==================================================================================
    Case                            Result
    ==============================  ==================================================================================
    first 2 * accept_after - 1      unchanged
    NaN in a leaf                   that leaf is unchanged; the others are clipped by the norm of the rest
    Inf in the update, or > 1.8e19  zero, since its squares overflow; elements that are Inf become NaN; not recorded
    zero update                     unchanged, and not recorded
    all norms equal                 an update above x2 of them is clipped to x2
    norm > 8e37 times the limit     zero: the factor is below the smallest normal float32
    ==============================  ==================================================================================

    Args:
      window: the number of norms to remember (>= 2).
      deviations: the distance of the limit from the history, in deviations, > 0; a number or a 0-d array.
      accept_after: after how many steps in a row a rise is taken for a new level (>= 1).
      axis_name: as in `gradient_statistics`.

    Returns:
      A transformation that goes last in the chain. Under `optax.inject_hyperparams`, list all arguments except
      `deviations` in `static_args`.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> tx = clip_by_update_norm()
      >>> state = tx.init(jnp.ones(1))
      >>> for _ in range(20):
      ...     update, state = tx.update(jnp.ones(1), state)
      >>> tx.update(jnp.full(1, 1e6), state)[0]
      Array([2.], dtype=float32)

    References:
      Levanter, `clip_update_norm`, 2025; used in Marin's 32B run with 2 deviations. Deviations: those of `skip_spikes`,
      and clipped norms enter the history.

    See Also:
      `published.clip_by_update_norm`, the transformation as published; `skip_spikes`, which judges the gradient and
      holds the step.
    """
    name = "clip_by_update_norm"
    window = validate.integer(name, "window", window, low=2, high=validate.MILLION)
    accept_after = validate.integer(name, "accept_after", accept_after, low=1, high=validate.MILLION)
    deviations = validate.scalar(name, "deviations", deviations, low=0, open_low=True)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> UpdateNormState:
        del params
        return _update_norm_state(
            empty_series(window, accept_after), bound_total=jnp.zeros((), jnp.int32), scale=jnp.ones((), jnp.float32)
        )

    @compiled_once
    def change(updates: PyTree, state: UpdateNormState, params: PyTree | None) -> tuple[PyTree, UpdateNormState]:
        del params
        updates = written_once(updates, state.update_norms_kept_total)
        norm, finite = norm_of(updates, axis_name)
        series = Series(
            accepted=state.update_norms_kept,
            recent=state.update_norms_recent,
            accepted_total=state.update_norms_kept_total,
            recent_total=state.update_norms_recent_total,
        )
        x = lax.stop_gradient(jnp.log(norm).astype(jnp.float32))
        limit = threshold(series, deviations, _LEAST_LOG_NORM, relative=False)
        scale = factor_within(jnp.exp(limit).astype(norm.dtype), norm)
        after = push(series, x, jnp.minimum(x, limit), jnp.ones((), bool), finite & (norm > 0))
        least = least_factor(scale)
        new = _update_norm_state(after, bound_total=count_if(least < 1, state.update_norm_bound_total), scale=least)
        return scale_leaves(updates, scale, jnp.zeros((), bool)), new

    return transformation(name, init, change)


def clippy(
    relative: ScalarOrSchedule = 0.1, *, absolute: float = 1e-7, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scale every leaf of the update so that no element exceeds a fraction of its weight (Clippy).

    u_i <- u_i * min(1, min_j (relative * |w_ij| + absolute) / |u_ij|)                               for every leaf i

    Guarantees:
      - |u_ij| <= relative * |w_ij| + absolute for every element (1 + 4 eps of the dtype).
      - A leaf within the bound is returned bit for bit; the direction of a leaf never changes.
      - Every leaf is judged alone.

    ================================  ================================================================================
    Case                              Result
    ================================  ================================================================================
    zero update                       unchanged
    a weight that is exactly zero     moves by at most `absolute`, which limits its whole leaf: with the published 1e-7
                                      a leaf with one zero hardly moves; raise `absolute` if leaves start at zero
    NaN or Inf in the update          those elements are unchanged and do not count
    NaN or Inf in a weight            its element is not bounded
    schedule or array below 0         as 0
    ================================  ================================================================================

    Args:
      relative: the bound on |u| / |w|, >= 0: a number, a 0-d array or a schedule of this transformation's own step
        count.
      absolute: the largest change of a weight that is zero, > 0.
      axis_name: as in `gradient_statistics`.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: a static argument is invalid, or `params` are missing in `update` or have another structure.

    Example:
      >>> tx = clippy(0.1)
      >>> params = jnp.array([1.0, 10.0])
      >>> tx.update(jnp.array([0.2, 0.2]), tx.init(params), params)[0]
      Array([0.1000001, 0.1000001], dtype=float32)

    References:
      Tang et al., "Improving training stability for multitask ranking models in recommender systems", 2023, arXiv
      2302.09178, algorithm 1. Deviations: there is no term in the square root of Adagrad's accumulator (its published
      coefficient is 0), and elements that are not finite do not count (in the paper they make the leaf NaN).

    See Also:
      `limit_step(scope="leaf")`, which compares norms and so lets single zero weights move.
    """
    name = "clippy"
    relative = validate.scalar_or_schedule(name, "relative", relative, low=0)
    absolute = validate.scalar(name, "absolute", absolute, low=0, open_low=True)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> ClippyState:
        del params
        return ClippyState(
            clippy_step=jnp.zeros((), jnp.int32),
            clippy_bound_total=jnp.zeros((), jnp.int32),
            clippy_scale=jnp.ones((), jnp.float32),
        )

    def change(updates: PyTree, state: ClippyState, params: PyTree | None) -> tuple[PyTree, ClippyState]:
        ratio = jnp.maximum(value_at(relative, state.clippy_step), 0)

        def share_of(leaf: Any, weight: Any) -> jax.Array:
            if not is_gradient(leaf):
                return jnp.ones(())
            real = accumulator_dtype(leaf.dtype)
            moved = lax.stop_gradient(jnp.abs(leaf).astype(real))
            allowed = ratio.astype(real) * lax.stop_gradient(jnp.abs(weight).astype(real)) + jnp.asarray(absolute, real)
            counts = jnp.isfinite(moved) & (moved > allowed)
            return jnp.min(jnp.where(counts, allowed / jnp.where(counts, moved, 1), 1), initial=1)

        def clip(leaf: Any, share: jax.Array) -> Any:
            if not is_gradient(leaf):
                return leaf
            moved = jnp.abs(leaf).astype(share.dtype)
            return jnp.where((share == 1) | ~jnp.isfinite(moved), leaf, multiplied(leaf, share))

        leaves, structure = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
        weights = structure.flatten_up_to(params)
        shares = [share_of(*pair) for pair in zip(leaves, weights, strict=True)]
        shares = min_over(shares, sharding_of(updates, axis_name).names)
        clipped = structure.unflatten(clip(*pair) for pair in zip(leaves, shares, strict=True))
        least = least_factor(jnp.array([share.astype(jnp.float32) for share in shares], jnp.float32))
        return clipped, ClippyState(
            clippy_step=next_step(state.clippy_step),
            clippy_bound_total=count_if(least < 1, state.clippy_bound_total),
            clippy_scale=least,
        )

    return transformation(name, init, change, needs_params=True)


def _update_norm_state(series: Series, *, bound_total: jax.Array, scale: jax.Array) -> UpdateNormState:
    return UpdateNormState(
        update_norms_kept=series.accepted,
        update_norms_recent=series.recent,
        update_norms_kept_total=series.accepted_total,
        update_norms_recent_total=series.recent_total,
        update_norm_bound_total=bound_total,
        update_norm_scale=scale,
    )


class Squares(NamedTuple):
    """Of every leaf: sums of squares, and the number of its elements over all devices: f32 or f64[leaves] each."""

    update: jax.Array  # NaN if an element is
    params: jax.Array  # 0 if an element is not finite
    size: jax.Array  # 0 where the update has no number


def squares(updates: PyTree, params: PyTree, axis_name: AxisName | None) -> Squares:
    """In one pass over the update and one over the parameters."""
    moved = _squares_of(updates, axis_name)
    weights = one_pass_statistics(_where_updated(params, updates), axis_name).sum_squares.astype(moved.dtype)
    sizes = _sizes(updates, params, axis_name).astype(moved.dtype)
    return Squares(moved, jnp.where(jnp.isfinite(weights), weights, 0), sizes)


def without_nan(x: jax.Array) -> jax.Array:
    """The sum of what is not NaN."""
    return jnp.sum(jnp.where(jnp.isnan(x), 0, x))


def least_factor(scale: jax.Array) -> jax.Array:
    """The smallest of the factors of an update, one for all leaves or one per leaf, as the state keeps it."""
    least = lax.stop_gradient(jnp.min(scale.astype(jnp.float32), initial=1))
    return jnp.where(jnp.isnan(least), 0, least)


def _squares_of(updates: PyTree, axis_name: AxisName | None) -> jax.Array:
    """The sum of squares of each leaf in one pass, so that a finite update whose squares overflow is scaled to 0."""
    return one_pass_statistics(updates, axis_name).sum_squares


def written_once(updates: PyTree, count: jax.Array) -> PyTree:
    """The updates divided by 1, which changes no bit and keeps XLA from computing them once for each of their readers.

    XLA repeats cheap operations in every reader, but no division: so the norm and the scaled step read one array, where
    the end of an optimizer's chain (the product with the learning rate) was written out for each: 2 times the bytes of
    the parameters less are read and written, temporaries of one copy instead of two, and half the time on a CPU.
    `clippy`, whose reduction has its input written out anyway, gains nothing.
    """
    one = jnp.where(count < 0, 2.0, 1.0)  # XLA does not know that a counter is never below 0

    def divided(update: Any) -> Any:
        real = is_gradient(update) and jnp.issubdtype(update.dtype, jnp.floating)
        return update / one.astype(update.dtype) if real else update

    return jax.tree.map(divided, updates, is_leaf=lambda leaf: leaf is None)


def norm_of(updates: PyTree, axis_name: AxisName | None) -> tuple[jax.Array, jax.Array]:
    """The norm of the leaves without a NaN, and whether the whole update is finite."""
    moved = _squares_of(updates, axis_name)
    return safe_sqrt(without_nan(moved)), jnp.all(jnp.isfinite(moved))


def factor_within(bound: jax.Array, norm: jax.Array) -> jax.Array:
    """min(1, bound / norm), or 1 if the norm is NaN, which leaves the leaf unchanged."""
    over = norm > bound
    return jnp.where(over | jnp.isnan(bound), bound / jnp.where(over, norm, 1), 1)


def _where_updated(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters, with `None` where the update has no number, so that frozen leaves do not count."""

    def keep(update: Any, param: Any) -> Any:
        return param if is_gradient(update) else None

    return jax.tree.map(keep, updates, params, is_leaf=lambda leaf: leaf is None)


def _sizes(updates: PyTree, params: PyTree, axis_name: AxisName | None) -> jax.Array:
    """The number of elements of each leaf over all devices."""
    parts = sharding_of(_where_updated(params, updates), axis_name).parts
    leaves = zip(leaves_with_none(updates), parts, strict=True)
    return jnp.array([x.size * n if is_gradient(x) else 0 for x, n in leaves], jnp.float32)

"""Transformations as their authors wrote them, to compare with the papers and with those that fix their faults.

======================  ===================================================  ==========================================
Function                Bounds                                               Faults
======================  ===================================================  ==========================================
`spam_clip`             every element by its second moment                   a burst multiplies the bound; NaN stays
`stable_spam`           elements and the norm of every leaf by averages      one spike raises the bound by x1000
`clip_by_update_norm`   the update by mean + 3 standard deviations of 128    one NaN switches it off for 128 steps
======================  ===================================================  ==========================================

They follow the authors' code down to the place of every epsilon, with the authors' settings as defaults. For training,
use the functions of the same names in `optax_guard`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.eager import compiled_once
from optax_guard._common.numerics import accumulator_dtype
from optax_guard._common.optimizer_state import reader
from optax_guard._common.series import RawSeries, empty_raw_series, push_raw, raw_threshold
from optax_guard._common.transformation import transformation
from optax_guard._common.typing import AxisName, PyTree, ScalarOrSchedule
from optax_guard._step.judge import scale_leaves
from optax_guard.transforms._spam import (
    StableSpamState,
    at_size,
    clip_by_second_moment,
    normalise_leaves,
    restarted,
)
from optax_guard.transforms._update_bounds import least_factor, norm_of, written_once

__all__ = ["PublishedUpdateNormState", "clip_by_update_norm", "spam_clip", "stable_spam"]


class PublishedUpdateNormState(NamedTuple):
    """The history of `published.clip_by_update_norm`: the norms of updates before the clip."""

    published_update_norm_window: jax.Array  # f32[window]: the last norms, as a ring buffer
    published_update_norm_total: jax.Array  # i32[]: the number of norms, or the place in the ring once it is full
    published_update_norm_bound_total: jax.Array  # i32[]: updates that were scaled down
    published_update_norm_scale: jax.Array  # f32[]: the factor of the last update


# SPAM


def spam_clip(
    inner: optax.GradientTransformation,
    threshold: float = 5000.0,
    *,
    restart_every: int | None = 500,
    warmup: int = 150,
) -> optax.GradientTransformationExtraArgs:
    """Bound every element of the gradient by its second moment, and reset the moments periodically (SPAM).

    g_j <- sign(g_j) * sqrt(threshold * v_j)    where g_j^2 > threshold * v_j

    where v is the second moment in the optimizer's state, without bias correction. Nothing is clipped in the first 20
    steps after a restart. At call s (from 1), if restart_every divides s, the moments are first set to zero, and the
    k-th update from there (k from 0) is multiplied by 1 - 0.99 * (1 + cos(pi * k / (warmup + 1))) / 2 for k < warmup.

    Faults:
      - The optimizer's count continues over a restart, so its bias correction ignores the restart.
      - An element that has never been seen, such as the row of an embedding, stays at 0 until the next restart.
      - Five spikes in a row, of any size, raise the bound by x88: each multiplies v by b2 + (1 - b2) * threshold = 6.
      - A NaN reaches the optimizer and stays there.

    ==============================  ==============================
    Case                            Result
    ==============================  ==============================
    first 20 steps, after restarts  unchanged
    zero gradient                   zero
    v_j = 0                         its element becomes 0
    NaN                             passes
    Inf                             clipped like a large number
    ==============================  ==============================

    Args:
      inner: an optimizer that keeps a second moment (such as Adam, RMSProp or Adagrad) in Optax's own states.
      threshold: the bound on g^2 / v, > 0, a number or a 0-d array.
      restart_every: the number of steps between restarts (>= 2), or None for no restarts.
      warmup: the number of warm-up steps after a restart (>= 0).

    Returns:
      A transformation; its `update` needs `params` and forwards extra arguments. Under `optax.inject_hyperparams`, list
      all arguments except `threshold` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, or the state of `inner` has no second moment.

    Example:
      >>> tx = spam_clip(optax.adam(0.1))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for step in range(25):
      ...     gradient = jnp.array([1.0, 1e6 if step == 24 else 1.0])
      ...     _, state = tx.update(gradient, state, params)
      >>> print(optax.tree.get(state, "nu"))            # the spike counts as 5000 times what v was
      [0.024... 0.142...]

    References:
      Huang et al., "SPAM: spike-aware Adam with momentum reset for stable LLM training", 2025, arXiv 2501.06842,
      algorithm 1, and the authors' code. Deviations: there is no sparse momentum; the eps of `inner` is added after the
      bias correction, as in Optax (the authors add 1e-6 before it, which is larger in the first 1 / (1 - b2) steps);
      weight decay in `inner` is multiplied by the warm-up factor. In the authors' code it is not:
      `optax.chain(spam_clip(optax.adam(r)), optax.add_decayed_weights(-r * d))`.

    See Also:
      `optax_guard.spam_clip`, which fixes the faults.
    """
    name = "published.spam_clip"
    threshold = validate.scalar(name, "threshold", threshold, low=0, open_low=True)
    read = reader(name, "second_moment", 0.0, 0.0, 0.0)  # with a decay of 0 there is no bias correction

    def clip(leaf: jax.Array, root: jax.Array, step: jax.Array) -> jax.Array:
        real = accumulator_dtype(leaf.dtype)
        bound = jnp.sqrt(jnp.asarray(threshold, real)) * jnp.where(jnp.isfinite(root), root, 0).astype(real)
        settled = (step >= 20) & (step % (restart_every or 2**30) >= 20)
        clipped = settled & (jnp.abs(leaf).astype(real) > bound) & ~jnp.isnan(root)
        return jnp.where(clipped, at_size(leaf, bound), leaf)

    def begin(state: Any, params: PyTree, restart: jax.Array) -> Any:
        return restarted(state, params, restart, counts=False)

    return clip_by_second_moment(name, inner, read, clip, begin, restart_every, warmup)


# Stable-SPAM


def stable_spam(
    inner: optax.GradientTransformation,
    *,
    gamma1: ScalarOrSchedule = 0.7,
    gamma2: float = 0.9,
    gamma3: float = 0.999,
    restart_every: int | None = 1000,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Bound elements by their leaf's usual largest, normalise the leaf's norm, reset periodically (Stable-SPAM).

    For every leaf, with t its number of observations and T, m, n averages that start at zero:

        T <- gamma3 T + (1 - gamma3) max_j |g_j|
        g_j <- g_j / max_j |g_j| * That    where |g_j| > That,             That = T / (1 - gamma3^t)
        m <- gamma1 m + (1 - gamma1) ||g||,     n <- gamma2 n + (1 - gamma2) ||g||^2
        g <- g / ||g|| * mhat / (sqrt(nhat) + eps)                         corrected in the same way

    At every restart_every-th call, the step is still taken with the old moments and a count of 1. Then the moments are
    set to zero, and the count continues with 2. The averages share that count (t) and do not restart.

    Faults:
      - One spike of 1e6 raises That by 1e3.
      - At a restart around Adam, the step is a tenth to two fifths as long as if the moments were set to zero first,
        and its gradient is lost.
      - With the defaults, That is 316 times too large after the first restart, and 500 times after late ones.

    ==============================  =================================================
    Case                            Result
    ==============================  =================================================
    first observation               not bounded: That is its own largest element
    zero leaf                       zero, which is an observation
    NaN or Inf in a leaf            that leaf is zero for this step, which is not an
                                    observation
    ==============================  =================================================

    Args:
      inner: an optimizer. Its moments are reset if they are in Optax's own states.
      gamma1: the decay of the average norm, in [0, 1): a number, a 0-d array or a schedule of the calls.
      gamma2: the decay of the average squared norm, in [0, 1).
      gamma3: the decay of the average largest element, in [0, 1).
      restart_every: the number of steps between restarts (>= 2), or None for no restarts.
      eps: the number added to the root, >= 0.

    Returns:
      A transformation; its `update` forwards extra arguments. Under `optax.inject_hyperparams`, list `inner` and
      `restart_every` in `static_args`.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> tx = stable_spam(optax.sgd(1.0))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> tx.update(jnp.array([30.0, 40.0]), state, params)[0]
      Array([-0.59999996, -0.79999995], dtype=float32)

    References:
      Huang et al., "Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam", 2025, arXiv 2502.17055,
      algorithm 1, and the authors' code. Deviation: a leaf that is not finite is left out, whereas in the authors' code
      it stays NaN from then on. The decay of gamma1 and b1 in their usage example is described at
      `optax_guard.stable_spam`.

    See Also:
      `optax_guard.stable_spam`, which fixes the faults.
    """
    name = "published.stable_spam"

    def observe(most: jax.Array, usual: jax.Array, steps: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
        del usual, steps
        return most, jnp.isfinite(most) & jnp.all(finite)

    def begin(state: Any, params: PyTree, restart: jax.Array) -> Any:
        return restarted(state, params, restart, moments=False)

    def end(state: StableSpamState, params: PyTree, restart: jax.Array) -> StableSpamState:
        return state._replace(
            stable_spam_inner_state=restarted(state.stable_spam_inner_state, params, restart, counts=False),
            leaf_steps=jnp.where(restart, 1, state.leaf_steps),
        )

    return normalise_leaves(name, inner, (gamma1, gamma2, gamma3), eps, observe, begin, end, restart_every)


# Levanter's update clipping


def clip_by_update_norm(
    window: int = 128, deviations: float = 3.0, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scale an update down to `deviations` standard deviations above the mean of its past norms.

    u <- u * min(1, limit / ||u||_2),     limit = mean + deviations * max(std, 1e-6)       of the last `window` norms

    with the population's standard deviation of the norms before the clip, starting at half a window of norms.

    Faults:
      - One NaN disables it for `window` steps.
      - A spike raises the limit: after a spike of x1000, one of x800 passes with a norm of more than 100.
      - If all norms are equal, there is no margin.

    ==============================  ==================================================================================
    Case                            Result
    ==============================  ==================================================================================
    first `window` / 2 updates      unchanged
    NaN or Inf in the update        unchanged, and nothing is clipped while it is in the window
    zero update                     unchanged, and recorded like any other norm
    ==============================  ==================================================================================

    Args:
      window: the number of norms to remember (>= 2).
      deviations: the distance of the limit from the mean, in standard deviations, > 0; a number or a 0-d array.
      axis_name: as in `gradient_statistics`.

    Returns:
      A transformation that goes last in the chain. Under `optax.inject_hyperparams`, list all arguments except
      `deviations` in `static_args`.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> tx = clip_by_update_norm(window=8)
      >>> state = tx.init(jnp.ones(1))
      >>> for size in (1.0, 1.1, 0.9, 1.0, 1000.0, 800.0):
      ...     update, state = tx.update(jnp.full(1, size), state)
      ...     print(f"{update[0]:.1f}", end=" ")
      1.0 1.1 0.9 1.0 1.2 800.0

    References:
      Levanter, `clip_update_norm`, 2025. Deviation: a norm that is not finite is stored as a code, so that the state
      stays finite; nothing is clipped while it is in the window, as published.

    See Also:
      `optax_guard.clip_by_update_norm`, which fixes the faults.
    """
    name = "published.clip_by_update_norm"
    window = validate.integer(name, "window", window, low=2, high=validate.MILLION)
    deviations = validate.scalar(name, "deviations", deviations, low=0, open_low=True)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> PublishedUpdateNormState:
        del params
        empty = empty_raw_series(window)
        return PublishedUpdateNormState(
            published_update_norm_window=empty.values,
            published_update_norm_total=empty.values_total,
            published_update_norm_bound_total=jnp.zeros((), jnp.int32),
            published_update_norm_scale=jnp.ones((), jnp.float32),
        )

    @compiled_once
    def change(
        updates: PyTree, state: PublishedUpdateNormState, params: PyTree | None
    ) -> tuple[PyTree, PublishedUpdateNormState]:
        del params
        updates = written_once(updates, state.published_update_norm_total)
        norm, finite = norm_of(updates, axis_name)
        seen = jnp.where(finite, norm, jnp.nan).astype(jnp.float32)
        series = RawSeries(values=state.published_update_norm_window, values_total=state.published_update_norm_total)
        limit, judged = raw_threshold(series, deviations, unbiased=False, least=1e-6, counts_itself=False)
        scale = jnp.where(judged & (seen > limit), limit / jnp.maximum(seen, 1e-6), 1).astype(norm.dtype)
        after = push_raw(series, lax.stop_gradient(seen))
        least = least_factor(scale)
        new = PublishedUpdateNormState(
            published_update_norm_window=after.values,
            published_update_norm_total=after.values_total,
            published_update_norm_bound_total=count_if(least < 1, state.published_update_norm_bound_total),
            published_update_norm_scale=least,
        )
        return scale_leaves(updates, scale, jnp.zeros((), bool)), new

    return transformation(name, init, change)

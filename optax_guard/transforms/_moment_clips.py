"""Clips that use the second moment, leaf by leaf or element by element, and wrap the optimizer that keeps it.

================================  =====================================================================================
Function                          Effect
================================  =====================================================================================
`spam_clip(optimizer)`            bounds every element by its own second moment; resets the moments periodically
`stable_spam(optimizer)`          bounds elements by the leaf's usual largest, normalises the leaf's norm; resets too
`clip_by_update_rms(optimizer)`   StableAdamW: shrinks the update of a leaf whose second moment has fallen behind
================================  =====================================================================================

Try `clip_by_update_rms` first: its signal precedes a loss spike by a few steps, and it has no state. These clips treat
single elements differently, so they are not rules. They go inside `guard`, around the whole optimizer, as in
`guard(spam_clip(optax.adam(1e-3)), ...)`. They wrap the optimizer because the second moment is already in its state: in
a chain they would need a copy, as large as the parameters, and could not reset the moments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.numerics import accumulator_dtype, multiplied
from optax_guard._common.optimizer_state import reader
from optax_guard._common.transformation import transformation_with_extra
from optax_guard._common.tree import as_params, leaves_with_none
from optax_guard._common.typing import PyTree, ScalarOrSchedule
from optax_guard._guard import HOLDING
from optax_guard._step.act import as_transformation, refuse_inside
from optax_guard.transforms._spam import (
    LARGEST,
    at_size,
    clip_by_second_moment,
    map_with_lists,
    normalise_leaves,
    restarted,
    roots_of,
)

__all__ = ["clip_by_update_rms", "spam_clip", "stable_spam"]

_BURST = 10.0  # the most that a step may count for in the usual largest element, relative to its last value


def spam_clip(
    inner: optax.GradientTransformation,
    threshold: float = 5000.0,
    *,
    restart_every: int | None = 500,
    warmup: int = 150,
    b2: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bound every element of the gradient by its second moment, and reset the moments periodically (SPAM).

    g_j <- sign(g_j) * sqrt(threshold * v_j)    where g_j^2 > threshold * v_j

    where v is the optimizer's second moment from the previous steps, bias-corrected. At call s (from 1), if
    restart_every divides s, all moments and their counts are first set to zero, and the k-th update from there (k from
    0) is multiplied by 1 - 0.99 * (1 + cos(pi * k / (warmup + 1))) / 2 for k < warmup.

    Guarantees:
      - NaN and Inf in the gradient do not reach the optimizer: NaN counts as 0, Inf as the bound.
      - An element without a moment (v_j = 0) has the leaf's largest known bound; a leaf without any passes unchanged.
      - A finite gradient within its bounds reaches the optimizer bit for bit.
      - The optimizer's schedules continue over a restart.

    ==============================  ===================================================================================
    Case                            Result
    ==============================  ===================================================================================
    first step; after a restart     no moment is known, so the leaf passes unbounded for that step
    zero gradient                   zero
    Inf if no moment is known       0
    row of an embedding never seen  bounded like the largest element of its leaf
    five spikes in a row, any size  each is clipped to sqrt(threshold) = 71 roots and multiplies v by b2 + (1 - b2) *
                                    threshold = 6, so the bound grows by x88 in total; by more while v averages few
                                    steps: x236 at 1000 steps after a restart, x690 at 500, x8000 at 150
    ==============================  ===================================================================================

    Args:
      inner: an optimizer that keeps a second moment (such as Adam, RMSProp or Adagrad) in Optax's own states.
      threshold: the bound on g^2 / v, > 0, a number or a 0-d array.
      restart_every: the number of steps between restarts (>= 2), or None for no restarts.
      warmup: the number of warm-up steps after a restart (>= 0).
      b2: the optimizer's decay of the second moment, in [0, 1), for the bias correction. The default is the value that
        `optax.inject_hyperparams` keeps in the state, or Optax's own default.

    Returns:
      A transformation; its `update` needs `params` and forwards extra arguments. Under `optax.inject_hyperparams`, list
      all arguments except `threshold` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, or the state of `inner` has no second moment.

    Example:
      >>> tx = spam_clip(optax.adam(0.1))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for gradient in (jnp.ones(2), jnp.array([1.0, 1e6])):
      ...     _, state = tx.update(gradient, state, params)
      >>> print(optax.tree.get(state, "mu"))            # 0.9 * 0.1 + 0.1 * sqrt(5000)
      [0.19      7.1611137]

    References:
      Huang et al., "SPAM: spike-aware Adam with momentum reset for stable LLM training", 2025, arXiv 2501.06842,
      algorithm 1. Deviations: v is bias-corrected; clipping starts one step after a restart; the optimizer's counts
      restart with the moments; v_j = 0 is not a bound of 0; NaN counts as 0; there is no sparse momentum; the eps of
      `inner` is added after the bias correction, as in Optax; weight decay in `inner` is multiplied by the warm-up
      factor. In the paper it is not: `optax.chain(spam_clip(optax.adam(r)), optax.add_decayed_weights(-r * d))`.

    See Also:
      `published.spam_clip`, the authors' version; `optax.clip`, which has one bound for all elements.
    """
    name = "spam_clip"
    threshold = validate.scalar(name, "threshold", threshold, low=0, open_low=True)
    read = reader(name, "second_moment", 0.0, b2, 0.0)

    def clip(leaf: jax.Array, root: jax.Array, step: jax.Array) -> jax.Array:
        del step
        real = accumulator_dtype(leaf.dtype)
        known = jnp.isfinite(root)
        bound = jnp.sqrt(jnp.asarray(threshold, real)) * jnp.where(known, root, 0).astype(real)
        largest = jnp.max(bound, initial=0)
        bound = jnp.where(bound > 0, bound, jnp.where(largest > 0, largest, jnp.inf))
        leaf = jnp.where(jnp.isnan(leaf), jnp.zeros_like(leaf), leaf)
        bounded = jnp.where(jnp.abs(leaf).astype(real) > bound, at_size(leaf, bound), leaf)
        return jnp.where(jnp.isfinite(bounded), bounded, jnp.zeros_like(bounded))

    return clip_by_second_moment(name, inner, read, clip, restarted, restart_every, warmup)


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

        T <- gamma3 T + (1 - gamma3) min(M, 10 T')    M = max_j |g_j|, T' the previous T, corrected
        g_j <- g_j / M * That    where |g_j| > That,                       That = T / (1 - gamma3^t)
        m <- gamma1 m + (1 - gamma1) ||g||,     n <- gamma2 n + (1 - gamma2) ||g||^2
        g <- g / ||g|| * mhat / (sqrt(nhat) + eps)                         corrected in the same way

    At every restart_every-th call, all moments of the optimizer and their counts are first set to zero.

    Guarantees:
      - NaN and Inf reach neither the averages nor the optimizer: NaN counts as 0, Inf as +-That.
      - Five spikes in a row, of any size, raise That by at most (1 + 9 (1 - gamma3))^5 = 1.046 (once t > 1000).
      - If gamma1^2 < gamma2, each leaf reaches the optimizer with a norm of at most (1 - gamma1) / sqrt((1 - gamma2)
        (1 - gamma1^2 / gamma2)) = 1.41, whatever the gradient's scale: 1 if norms are constant, 1.3 in a burst.
      - The optimizer's schedules and the averages continue over a restart.

    ==============================  ===================================================================================
    Case                            Result
    ==============================  ===================================================================================
    first observation               not bounded, since That is its own largest element; its norm becomes 1
    zero leaf, or nothing finite    zero, and not an observation
    lasting rise x100               That follows in about 520 steps (ln 100 / 0.009); meanwhile the norm of the leaf is
                                    still normalised
    first norm above 1e18           counts as 1e18 in m and n
    ==============================  ===================================================================================

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
      algorithm 1. Deviations: M counts as at most 10 T' in T; a zero leaf is not an observation; at a restart the
      moments are set to zero before the step and not after it; the averages have a count of their own, which does not
      restart; NaN and Inf are replaced.

      Their usage example also decays gamma1 and Adam's b1 over the whole run of `steps`, by a cosine from 1 to
      eta_min = 0.5, which changes much. Here, and with `published.stable_spam`, that is

          scale = lambda step: 0.75 + 0.25 * jnp.cos(jnp.pi * (step + 1) / (steps + 1))
          adam = optax.inject_hyperparams(optax.adam)(1e-3, b1=lambda step: 0.9 * scale(step))
          stable_spam(adam, gamma1=lambda step: 0.7 * scale(step))

    See Also:
      `published.stable_spam`, the authors' version; `spam_clip`; `optax.normalize_by_update_norm`, without a history.
    """
    name = "stable_spam"

    def observe(most: jax.Array, usual: jax.Array, seen: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
        del finite
        taken = jnp.where(seen > 0, jnp.minimum(most, _BURST * usual), jnp.minimum(most, LARGEST))
        return taken, jnp.isfinite(most) & (most > 0)

    gammas = (gamma1, gamma2, gamma3)
    return normalise_leaves(name, inner, gammas, eps, observe, restarted, lambda state, *_: state, restart_every)


def clip_by_update_rms(
    inner: optax.GradientTransformation, max_rms: float = 1.0, *, b2: float | None = None, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Shrink the update of a leaf whose gradient has outgrown its second moment (StableAdamW's update clipping).

    u_i <- u_i / max(1, RMS_i / max_rms),    RMS_i = sqrt(mean_j g_ij^2 / max(v_ij, eps^2))         for every leaf i

    where g is the gradient, u the optimizer's finished update, and v its bias-corrected second moment *after* this
    step. RMS is about 1 while v describes the gradient; it rises one to eight steps before a loss spike.

    Guarantees:
      - With RMS_i <= max_rms, the update of a leaf is the optimizer's (except that a compiler may fuse a multiply-add).
      - The optimizer's state is unaffected: the step is clipped, including learning rate and weight decay.
      - There is no state.

    ==========================  =======================================================================================
    Case                        Result
    ==========================  =======================================================================================
    first step                  RMS is 1 (v is g^2): unchanged
    zero gradient               unchanged
    NaN or Inf in a leaf        that leaf is as from the optimizer; the others are unaffected
    spike of any size           RMS is at most 1 / sqrt(1 - b2) = 32
    ==========================  =======================================================================================

    Args:
      inner: an optimizer that keeps a second moment (such as Adam, RMSProp or Adagrad) in Optax's own states.
      max_rms: the largest RMS that is not clipped, > 0, a number or a 0-d array; d in the paper.
      b2: as in `spam_clip`. Pass it if the optimizer's is not Optax's default; the paper's optimizer has 0.99.
      eps: the smallest divisor for a root of v, >= 0.

    Returns:
      A transformation; its `update` needs `params` and forwards extra arguments. Under `optax.inject_hyperparams`, list
      `inner` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, or the state of `inner` has no second moment.

    Example:
      >>> tx = clip_by_update_rms(optax.adam(0.1))
      >>> params = jnp.ones(1)
      >>> state = tx.init(params)
      >>> for gradient in [1.0] * 10 + [100.0]:
      ...     updates, state = tx.update(jnp.full(1, gradient), state, params)
      >>> print(updates)                                    # optax.adam alone: -0.051
      [-0.0154...]

    References:
      Wortsman et al., "Stable and low-precision training for large-scale vision-language models", 2023, arXiv
      2304.13013, algorithm 2 (AdamW with Adafactor's update clipping), whose debiased averages are equivalent to bias
      correction. There is no deviation; decoupled weight decay is scaled as in the paper.

    See Also:
      `optax.clip_by_block_rms`, which after `scale_by_adam` clips RMS(m / sqrt(v)), a different number, since m lags.
    """
    name = "clip_by_update_rms"
    inner = as_transformation(name, inner)
    max_rms = validate.scalar(name, "max_rms", max_rms, low=0, open_low=True)
    eps = validate.scalar(name, "eps", eps, low=0)
    read = reader(name, "second_moment", 0.0, b2, 0.0)
    update_inner = inner.update

    def init(params: optax.Params) -> Any:
        inner_state = inner.init(as_params(name, params))
        refuse_inside(name, "inner", inner_state, HOLDING)
        return inner_state

    def change(updates: PyTree, state: Any, params: PyTree | None, extra: dict[str, Any]) -> tuple[PyTree, Any]:
        gradients = updates
        updates, after = update_inner(updates, state, params, **extra)
        roots = roots_of(read, after, params)

        def clip(moved: jax.Array, gradient: jax.Array, root: jax.Array) -> jax.Array:
            real = accumulator_dtype(gradient.dtype)
            ratio = jnp.abs(gradient).astype(real) / jnp.maximum(root.astype(real), jnp.asarray(eps, real))
            square = jnp.mean(jnp.square(lax.stop_gradient(ratio))) if gradient.size else jnp.zeros((), real)
            over = square > jnp.square(jnp.asarray(max_rms, real))
            over = over & jnp.isfinite(square)
            scale = jnp.where(over, jnp.asarray(max_rms, real) * lax.rsqrt(jnp.where(over, square, 1)), 1)
            return jnp.where(over, multiplied(moved, scale), moved)

        clipped = map_with_lists(clip, updates, leaves_with_none(gradients), roots)
        return clipped, after

    return transformation_with_extra(name, init, change, needs_params=True)

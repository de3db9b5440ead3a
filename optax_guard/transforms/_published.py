"""Transformations as their authors wrote them, to compare with the papers and to measure what a repair changes.

======================  ===================================================  ==========================================
Function                Bounds                                               What goes wrong
======================  ===================================================  ==========================================
`spam_clip`             every element by its second moment                   a burst multiplies the bound; NaN stays
`stable_spam`           elements and the norm of every leaf by averages      one spike raises the bound by x1000
`clip_by_update_norm`   the update by mean + 3 standard deviations of 128    one NaN switches it off for 128 steps
======================  ===================================================  ==========================================

They follow the authors' programs down to the place of every epsilon, with the authors' settings as defaults. For
training take the functions of the same names in `optax_guard`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.eager import compiled_once
from optax_guard._common.numerics import accumulator_dtype, safe_sqrt
from optax_guard._common.optimizer_state import reader
from optax_guard._common.series import RawSeries, empty_raw_series, push_raw, raw_threshold
from optax_guard._common.state_check import state_check
from optax_guard._common.tree import checked
from optax_guard._common.typing import AxisName, PyTree, ScalarOrSchedule
from optax_guard._step.judge import scale_leaves
from optax_guard.transforms._spam import (
    StableSpamState,
    at_size,
    clip_by_second_moment,
    normalise_leaves,
    restarted,
)
from optax_guard.transforms._update_bounds import counted, squares_of, uncounted

__all__ = ["PublishedUpdateNormState", "clip_by_update_norm", "spam_clip", "stable_spam"]


class PublishedUpdateNormState(NamedTuple):
    """What `published.clip_by_update_norm` remembers: the norms of updates before the clip."""

    published_update_norm_window: jax.Array  # f32[window]: the last norms, a ring
    published_update_norm_total: jax.Array  # i32[]: how many there were; a place in the ring once it is full
    published_update_norm_bound_total: jax.Array  # i32[]: updates that were scaled down
    published_update_norm_scale: jax.Array  # f32[]: the factor of the last one


# SPAM


def spam_clip(
    inner: optax.GradientTransformation,
    threshold: float = 5000.0,
    *,
    restart_every: int | None = 500,
    warmup: int = 150,
) -> optax.GradientTransformationExtraArgs:
    """SPAM: bound every element of the gradient by its second moment; restart the moments now and then.

    g_j <- sign(g_j) * sqrt(threshold * v_j)    where g_j^2 > threshold * v_j

    with v the second moment as it is in the optimizer's state, not corrected for its start at zero. Nothing is clipped
    in the first 20 steps after a restart. At call s (from 1), if restart_every divides s, the moments are set to zero
    first, and the k-th update from there (k from 0) is multiplied by 1 - 0.99 * (1 + cos(pi * k / (warmup + 1))) / 2
    for k < warmup.

    What goes wrong:
      - The optimizer's count goes on over a restart, so that its bias correction misses the restart.
      - An element never seen before, as the row of an embedding, is held at 0 until the next restart.
      - Five spikes in a row, of any size, raise the bound by x88: each multiplies v by b2 + (1 - b2) * threshold = 6.
      - A NaN reaches the optimizer and stays.

    ==============================  ==============================
    Case                            Result
    ==============================  ==============================
    first 20 steps, after restarts  passes
    zero gradient                   zero
    v_j = 0                         its element is held at 0
    NaN                             passes
    Inf                             clipped like a large number
    ==============================  ==============================

    Args:
      inner: an optimizer that keeps a second moment (Adam, RMSProp, Adagrad and their kin) in Optax's own states.
      threshold: bound on g^2 / v, > 0, a number or a 0-d array.
      restart_every: steps between restarts (>= 2), or None for none.
      warmup: steps of the warm-up after a restart (>= 0).

    Returns:
      A transformation; its `update` needs `params`, and forwards extra arguments. Under `optax.inject_hyperparams`
      list all arguments but `threshold` in `static_args`.

    Raises:
      ValueError: wrong static arguments; no second moment found in `inner`'s state.

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
      algorithm 1, and the authors' code. Deviations: no sparse momentum; the eps of `inner` is added after the bias
      correction, as Optax does (theirs, 1e-6, before it: a larger one in the first 1 / (1 - b2) steps); weight decay in
      `inner` shares the warm-up's factor. Theirs does not:
      `optax.chain(spam_clip(optax.adam(r)), optax.add_decayed_weights(-r * d))`.

    See Also:
      `optax_guard.spam_clip`, repaired.
    """
    name = "published.spam_clip"
    threshold = validate.scalar(name, "threshold", threshold, low=0, open_low=True)
    read = reader(name, "second_moment", 0.0, 0.0, 0.0)  # with a decay of 0 nothing is corrected

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
    """Stable-SPAM: bound elements by the usual largest of their leaf, normalise the leaf's norm, restart now and then.

    For every leaf, t its observations, T, m, n averages that start at zero:

        T <- gamma3 T + (1 - gamma3) max_j |g_j|
        g_j <- g_j / max_j |g_j| * That    where |g_j| > That,             That = T / (1 - gamma3^t)
        m <- gamma1 m + (1 - gamma1) ||g||,     n <- gamma2 n + (1 - gamma2) ||g||^2
        g <- g / ||g|| * mhat / (sqrt(nhat) + eps)                         corrected in the same way

    At every restart_every-th call the step is still taken, with the old moments under a count of 1; then the moments
    are set to zero and the count goes on with 2. The averages share that count (t) and do not restart.

    What goes wrong:
      - One spike of 1e6 raises That by 1e3.
      - At a restart around Adam the step is a tenth to two fifths as long as after zeroing the moments first, and this
        gradient is forgotten.
      - With the defaults That is 316 times too large after the first restart, 500 times after late ones.

    ==============================  =================================================
    Case                            Result
    ==============================  =================================================
    first observation               no bound: That is its own largest element
    zero leaf                       zero, which is an observation
    NaN or Inf in a leaf            the leaf is zero for this step, and no observation
    ==============================  =================================================

    Args:
      inner: an optimizer. Its moments are restarted if they are in Optax's own states.
      gamma1: decay of the norm's average, in [0, 1): a number, a 0-d array or a schedule of the calls.
      gamma2: decay of its square's, in [0, 1).
      gamma3: decay of the largest element's, in [0, 1).
      restart_every: steps between restarts (>= 2), or None for none.
      eps: added to the root, >= 0.

    Returns:
      A transformation; its `update` forwards extra arguments. Under `optax.inject_hyperparams` list `inner` and
      `restart_every` in `static_args`.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> tx = stable_spam(optax.sgd(1.0))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> tx.update(jnp.array([30.0, 40.0]), state, params)[0]
      Array([-0.59999996, -0.79999995], dtype=float32)

    References:
      Huang et al., "Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam", 2025, arXiv 2502.17055,
      algorithm 1, and the authors' code. Deviation: a leaf that is not finite is left out, where theirs is NaN from
      then on; no state of this library holds one. The decay of gamma1 and b1 in their usage example is described at
      `optax_guard.stable_spam`.

    See Also:
      `optax_guard.stable_spam`, repaired.
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


# Levanter's clip of the update


def clip_by_update_norm(
    window: int = 128, deviations: float = 3.0, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scale an update down to `deviations` standard deviations above the mean of its own norms.

    u <- u * min(1, limit / ||u||_2),     limit = mean + deviations * max(std, 1e-6)       of the last `window` norms

    with the population's standard deviation of the norms before the clip, from half a window of norms on.

    What goes wrong:
      - One NaN switches it off for `window` steps.
      - A spike raises the limit: of x1000 and x800 in a row the second passes as more than 100.
      - Norms that are all alike leave no margin.

    ==============================  ==================================================================================
    Case                            Result
    ==============================  ==================================================================================
    first `window` / 2 updates      unchanged
    NaN or Inf in the update        unchanged, and nothing is clipped while it is in the window
    zero update                     unchanged; a norm like any other
    ==============================  ==================================================================================

    Args:
      window: how many norms are remembered (>= 2).
      deviations: width of the limit above the mean, > 0, a number or a 0-d array.
      axis_name: as in `gradient_statistics`.

    Returns:
      A transformation, for the end of the chain. Under `optax.inject_hyperparams` all arguments but `deviations` go
      into `static_args`.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> tx = clip_by_update_norm(window=8)
      >>> state = tx.init(jnp.ones(1))
      >>> for size in (1.0, 1.1, 0.9, 1.0, 1000.0, 800.0):
      ...     update, state = tx.update(jnp.full(1, size), state)
      ...     print(f"{update[0]:.1f}", end=" ")
      1.0 1.1 0.9 1.0 1.2 800.0

    References:
      Levanter, `clip_update_norm`, 2025. Deviation: a norm that is not finite is kept as a code, so that the state
      stays finite; nothing is clipped while it is in the window, as published.

    See Also:
      `optax_guard.clip_by_update_norm`, repaired.
    """
    name = "published.clip_by_update_norm"
    window = validate.integer(name, "window", window, low=2, high=validate.MILLION)
    deviations = validate.scalar(name, "deviations", deviations, low=0, open_low=True)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> PublishedUpdateNormState:
        del params
        return PublishedUpdateNormState(*empty_raw_series(window), *uncounted()[1:])

    check_state = state_check(name, init)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        updates, params = checked(name, updates, params)
        check_state(state, params, updates)
        squares = squares_of(updates, axis_name)
        norm = safe_sqrt(jnp.sum(jnp.where(jnp.isnan(squares), 0, squares)))
        seen = jnp.where(jnp.all(jnp.isfinite(squares)), norm, jnp.nan).astype(jnp.float32)
        series = RawSeries(*state[:2])
        limit, judged = raw_threshold(series, deviations, unbiased=False, least=1e-6, counts_itself=False)
        scale = jnp.where(judged & (seen > limit), limit / jnp.maximum(seen, 1e-6), 1).astype(norm.dtype)
        after = push_raw(series, lax.stop_gradient(seen))
        new = PublishedUpdateNormState(*after, *counted((0, *state[2:]), scale)[1:])
        return scale_leaves(updates, scale, jnp.zeros((), bool)), new

    return optax.GradientTransformationExtraArgs(init, compiled_once(update))

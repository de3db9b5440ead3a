"""Clips that look at the second moment, leaf by leaf or element by element; they wrap the optimizer that keeps it.

================================  =====================================================================================
Function                          Does
================================  =====================================================================================
`spam_clip(optimizer)`            bounds every element by its own second moment; restarts the moments periodically
`stable_spam(optimizer)`          bounds elements by the leaf's usual largest, then normalises the leaf's norm; restarts
`clip_by_update_rms(optimizer)`   StableAdamW: shrinks the update of a leaf whose second moment has fallen behind
================================  =====================================================================================

`clip_by_update_rms` is the one to try first: its signal precedes a loss spike by a few steps, and it has no state. They
treat elements and leaves differently, so they are no rules; they go inside `guard`, around the whole optimizer:
`guard(spam_clip(optax.adam(1e-3)), ...)`. A wrapper and not a link of a chain, because the second moment is already in
the optimizer's state: a copy would cost as much memory as the parameters, and a link could not restart it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax._src.transform import (  # states that Optax makes but does not export
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
)

from optax_guard._common import validate
from optax_guard._common.counters import next_step, value_at
from optax_guard._common.eager import compiled_once
from optax_guard._common.numerics import accumulator_dtype, direction, multiplied
from optax_guard._common.optimizer_state import Reader, reader, responses
from optax_guard._common.state_check import state_check
from optax_guard._common.tree import (
    as_params,
    cast_like,
    check_leaf_count,
    checked,
    checked_with_params,
    is_gradient,
    is_like,
    leaves_with_none,
)
from optax_guard._common.typing import PyTree, ScalarOrSchedule
from optax_guard._guard import HOLDING
from optax_guard._step.act import as_transformation, refuse_inside, step_without_params

__all__ = ["SpamState", "StableSpamState", "clip_by_update_rms", "spam_clip", "stable_spam"]

# A count restarts with its moments; the counts of schedules are in states of their own and go on.
_MOMENTS = (
    optax.ScaleByAdamState,
    optax.ScaleByAmsgradState,
    optax.ScaleByBeliefState,
    optax.ScaleByRmsState,
    optax.ScaleByRssState,
    optax.ScaleByLionState,
    optax.TraceState,
    optax.EmaState,
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
)
_UNSEEN = 1e18  # the largest norm remembered: its square fits into float32
_BURST = 10.0  # what one step may count for in the usual largest element, in units of what it was


class SpamState(NamedTuple):
    """What `spam_clip` carries beside the optimizer's own state."""

    spam_inner_state: Any  # the inner optimizer's state
    spam_step: jax.Array  # i32[]: calls; places the restarts


class StableSpamState(NamedTuple):
    """What `stable_spam` carries: three numbers a leaf beside the optimizer's own state."""

    stable_spam_inner_state: Any  # the inner optimizer's state
    stable_spam_step: jax.Array  # i32[]: calls; places the restarts
    largest_average: jax.Array  # f32[n_leaves]: of the largest element, not yet corrected for its start at zero
    norm_average: jax.Array  # f32[n_leaves]: of the norm after the clip
    squared_norm_average: jax.Array  # f32[n_leaves]
    leaf_steps: jax.Array  # i32[n_leaves]: observations in them


def spam_clip(
    inner: optax.GradientTransformation,
    threshold: float = 5000.0,
    *,
    restart_every: int | None = 500,
    warmup: int = 150,
    b2: float | None = None,
    faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SPAM: bound every element of the gradient by its second moment; restart the moments now and then.

    g_j <- sign(g_j) * sqrt(threshold * v_j)    where g_j^2 > threshold * v_j

    with v the second moment that the optimizer kept from the steps before, corrected for its start at zero. At call s
    (from 1), if restart_every divides s, all moments and their counts are set to zero first, and the k-th update from
    there (k from 0) is multiplied by 1 - 0.99 * (1 + cos(pi * k / (warmup + 1))) / 2 for k < warmup.

    Guarantees:
      - A NaN or Inf in the gradient does not reach the optimizer: NaN counts as 0, Inf as the bound.
      - Where no moment is yet known (v_j = 0), the leaf's largest known bound holds; a leaf with none passes as it is.
      - A finite gradient within its bounds reaches the optimizer bit for bit.
      - Schedules of the optimizer go on over a restart.

    ==============================  ===================================================================================
    Case                            Result
    ==============================  ===================================================================================
    first step; after a restart     nothing is known, nothing is bounded: for that step the leaf passes
    zero gradient                   zero
    Inf where nothing is known      0
    row of an embedding never seen  bounded like the largest element of its leaf (published: held at 0)
    five spikes in a row, any size  each is clipped to sqrt(threshold) = 71 roots and multiplies v by b2 + (1 - b2) *
                                    threshold = 6, so that the bound grows by 88 in five; while v is an average of few
                                    by more: 236 from 1000 steps after a restart, 690 from 500, 8000 from 150
    ==============================  ===================================================================================

    Args:
      inner: an optimizer that keeps a second moment (Adam, RMSProp, Adagrad and their kin) in Optax's own states.
      threshold: bound on g^2 / v, > 0, a number or a 0-d array.
      restart_every: steps between restarts (>= 2), or None for none.
      warmup: steps of the warm-up after a restart (>= 0).
      b2: the optimizer's decay of the second moment, in [0, 1), to correct its start. By default what
        `optax.inject_hyperparams` keeps in the state, or Optax's own default.
      faithful: the published method, for comparison.

    Returns:
      A transformation; its `update` needs `params`, and forwards extra arguments. Under `optax.inject_hyperparams`
      list all arguments but `threshold` in `static_args`.

    Raises:
      ValueError: wrong static arguments; no second moment found in `inner`'s state.

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
      algorithm 1, and the authors' code. `faithful=True`: v is not corrected, nothing is clipped in the first 20 steps
      after a restart, counts go on (so that the bias correction misses the restart), v_j = 0 holds its element at 0,
      and NaN passes. Deviations of both: no sparse momentum; the eps of `inner` is added after the bias correction, as
      Optax does (theirs, 1e-6, before it: a larger one in the first 1 / (1 - b2) steps); weight decay in `inner` shares
      the warm-up's factor. Theirs does not: `optax.chain(spam_clip(optax.adam(r)), optax.add_decayed_weights(-r * d))`.

    See Also:
      `optax.clip`, one bound for all.
    """
    name = "spam_clip"
    inner = as_transformation(name, inner)
    threshold = validate.scalar(name, "threshold", threshold, low=0, open_low=True)
    warmup = validate.integer(name, "warmup", warmup, low=0)
    faithful = validate.boolean(name, "faithful", faithful)
    read = reader(name, "second_moment", 0.0, b2, 0.0)
    read = Reader(
        name, read.metric, read.momentum, 0.0 if faithful else read.b2, read.eps
    )  # with 0 it corrects nothing
    if restart_every is not None:
        restart_every = validate.integer(name, "restart_every", restart_every, low=2)
    update_inner = inner.update

    def init(params: optax.Params) -> SpamState:
        params = as_params(name, params)
        inner_state = inner.init(params)
        refuse_inside(name, "inner", inner_state, HOLDING)
        return SpamState(spam_inner_state=inner_state, spam_step=jnp.zeros((), jnp.int32))

    check_state = state_check(name, init)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, SpamState]:
        updates, params = checked_with_params(name, updates, params)
        check_state(state, params, updates)
        step = next_step(state.spam_step)
        restart, factor = _restart(step, restart_every, warmup)
        before = _restarted(state.spam_inner_state, params, restart, counts=not faithful)
        roots = _roots(read, before, params)
        settled = (step >= 20) & (step % (restart_every or 2**30) >= 20)

        def clip(leaf: jax.Array, root: jax.Array) -> jax.Array:
            real = accumulator_dtype(leaf.dtype)
            known = jnp.isfinite(root)
            bound = jnp.sqrt(jnp.asarray(threshold, real)) * jnp.where(known, root, 0).astype(real)
            if faithful:
                clipped = settled & (jnp.abs(leaf).astype(real) > bound) & ~jnp.isnan(root)
                return jnp.where(clipped, _at_size(leaf, bound), leaf)
            largest = jnp.max(bound, initial=0)
            bound = jnp.where(bound > 0, bound, jnp.where(largest > 0, largest, jnp.inf))
            leaf = jnp.where(jnp.isnan(leaf), jnp.zeros_like(leaf), leaf)
            bounded = jnp.where(jnp.abs(leaf).astype(real) > bound, _at_size(leaf, bound), leaf)
            return jnp.where(jnp.isfinite(bounded), bounded, jnp.zeros_like(bounded))

        clipped = _map_positions(clip, updates, roots)
        updates, after = update_inner(clipped, before, params, **extra)
        return _scaled(updates, factor), SpamState(spam_inner_state=cast_like(after, before), spam_step=step)

    return optax.GradientTransformationExtraArgs(init, compiled_once(update))


def stable_spam(
    inner: optax.GradientTransformation,
    *,
    gamma1: ScalarOrSchedule = 0.7,
    gamma2: float = 0.9,
    gamma3: float = 0.999,
    restart_every: int | None = 1000,
    eps: float = 1e-8,
    faithful: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM: bound elements by the usual largest of their leaf, normalise the leaf's norm, restart now and then.

    For every leaf, t its observations, T, m, n averages that start at zero:

        T <- gamma3 T + (1 - gamma3) min(M, 10 T')    M = max_j |g_j|, T' the T before, corrected
        g_j <- g_j / M * That    where |g_j| > That,                       That = T / (1 - gamma3^t)
        m <- gamma1 m + (1 - gamma1) ||g||,     n <- gamma2 n + (1 - gamma2) ||g||^2
        g <- g / ||g|| * mhat / (sqrt(nhat) + eps)                         corrected in the same way

    At every restart_every-th call all moments of the optimizer and their counts are set to zero first.

    Guarantees:
      - NaN and Inf reach neither the averages nor the optimizer: NaN counts as 0, Inf as +-That.
      - Five spikes in a row, of any size, raise That by at most (1 + 9 (1 - gamma3))^5 = 1.046 (once t > 1000).
      - What reaches the optimizer has for every leaf a norm of at most (1 - gamma1) / sqrt((1 - gamma2) (1 - gamma1^2 /
        gamma2)) = 1.41, if gamma1^2 < gamma2, whatever the gradient's scale: 1 where norms are level, 1.3 in a burst.
      - Schedules of the optimizer, and the averages, go on over a restart.

    ==============================  ===================================================================================
    Case                            Result
    ==============================  ===================================================================================
    first observation               no bound: That is its own largest element; its norm becomes 1
    zero leaf, or nothing finite    zero, and no observation (faithful: zeros are one)
    lasting rise x100               That follows in about 520 steps (ln 100 / 0.009); the norm of the leaf is normalised
                                    meanwhile all the same
    first norm above 1e18           counts as 1e18 in m and n
    ==============================  ===================================================================================

    Args:
      inner: an optimizer. Its moments are restarted if they are in Optax's own states.
      gamma1: decay of the norm's average, in [0, 1): a number, a 0-d array or a schedule of the calls.
      gamma2: decay of its square's, in [0, 1).
      gamma3: decay of the largest element's, in [0, 1).
      restart_every: steps between restarts (>= 2), or None for none.
      eps: added to the root, >= 0.
      faithful: the published method, for comparison.

    Returns:
      A transformation; its `update` forwards extra arguments. Under `optax.inject_hyperparams` list `inner`,
      `restart_every` and `faithful` in `static_args`.

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
      algorithm 1, and the authors' code, which `faithful=True` follows. T takes M as it comes (one spike of 1e6 raises
      That by 1e3), and a zero leaf is an observation. At a restart the step is still taken, with the old moments under
      a count of 1 (around Adam a tenth to two fifths as long as after zeroing them first, as the default does); then
      the moments are zeroed, so that this gradient is forgotten, and the count goes on with 2. The averages share that
      count and do not restart: with the defaults That is 316 times too large after the first restart, 500 times after
      late ones. Deviation: a leaf that is not finite is left out, where theirs is NaN from then on; no state of this
      library holds one.

      Their usage example also decays gamma1 and Adam's b1 over the whole run of `steps`, by a cosine from 1 to
      eta_min = 0.5, which changes much. In both forms that is

          scale = lambda step: 0.75 + 0.25 * jnp.cos(jnp.pi * (step + 1) / (steps + 1))
          adam = optax.inject_hyperparams(optax.adam)(1e-3, b1=lambda step: 0.9 * scale(step))
          stable_spam(adam, gamma1=lambda step: 0.7 * scale(step))

    See Also:
      `spam_clip`; `optax.normalize_by_update_norm`, without a history.
    """
    name = "stable_spam"
    inner = as_transformation(name, inner)
    below_one = {"low": 0, "high": 1, "open_high": True}
    gamma1 = validate.scalar_or_schedule(name, "gamma1", gamma1, **below_one)
    gamma2 = validate.scalar(name, "gamma2", gamma2, **below_one)
    gamma3 = validate.scalar(name, "gamma3", gamma3, **below_one)
    eps = validate.scalar(name, "eps", eps, low=0)
    faithful = validate.boolean(name, "faithful", faithful)
    if restart_every is not None:
        restart_every = validate.integer(name, "restart_every", restart_every, low=2)
    update_inner = inner.update

    def init(params: optax.Params) -> StableSpamState:
        params = as_params(name, params)
        leaves, inner_state = len(leaves_with_none(params)), inner.init(params)
        refuse_inside(name, "inner", inner_state, HOLDING)
        return StableSpamState(
            stable_spam_inner_state=inner_state,
            stable_spam_step=jnp.zeros((), jnp.int32),
            largest_average=jnp.zeros(leaves, jnp.float32),
            norm_average=jnp.zeros(leaves, jnp.float32),
            squared_norm_average=jnp.zeros(leaves, jnp.float32),
            leaf_steps=jnp.zeros(leaves, jnp.int32),
        )

    check_state = state_check(name, init)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, StableSpamState]:
        updates, params = checked(name, updates, params)

        def step() -> tuple[optax.Updates, StableSpamState]:
            return run(updates, state, params, extra)

        return step() if params is not None else step_without_params(name, step, updates, state)

    def run(
        updates: optax.Updates, state: StableSpamState, params: optax.Params | None, extra: dict[str, Any]
    ) -> tuple[optax.Updates, StableSpamState]:
        check_state(state, params, updates)
        check_leaf_count(name, state.leaf_steps.shape[0], len(leaves_with_none(updates)))
        step = next_step(state.stable_spam_step)
        restart = _restart(step, restart_every, 0)[0]
        like = updates if params is None else params
        before = _restarted(state.stable_spam_inner_state, like, restart, moments=not faithful)
        settings = (value_at(gamma1, state.stable_spam_step), gamma2, gamma3, eps)
        old = (state.largest_average, state.norm_average, state.squared_norm_average, state.leaf_steps)
        results = [
            _normalised(leaf, tuple(x[i] for x in old), settings, faithful)
            for i, leaf in enumerate(leaves_with_none(updates))
        ]
        normal = jax.tree.unflatten(
            jax.tree.structure(updates, is_leaf=lambda leaf: leaf is None), [leaf for leaf, _ in results]
        )
        averages = [jnp.stack(x) for x in zip(*(new for _, new in results), strict=True)] if results else list(old)
        updates, after = update_inner(normal, before, params, **extra)
        new = StableSpamState(cast_like(after, before), step, *averages)
        if faithful:  # the step of a restart still had the old moments, under a count of 1, which stays
            new = new._replace(
                stable_spam_inner_state=_restarted(new.stable_spam_inner_state, like, restart, counts=False),
                leaf_steps=jnp.where(restart, 1, new.leaf_steps),
            )
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_update_rms(
    inner: optax.GradientTransformation, max_rms: float = 1.0, *, b2: float | None = None, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """StableAdamW's update clipping: a smaller step for a leaf whose gradient has outgrown its second moment.

    u_i <- u_i / max(1, RMS_i / max_rms),    RMS_i = sqrt(mean_j g_ij^2 / max(v_ij, eps^2))         for every leaf i

    with g the gradient, u the optimizer's finished update, and v its second moment *after* this step, corrected for its
    start at zero. RMS is about 1 while v describes the gradient; it rises one to eight steps before a loss spike.

    Guarantees:
      - With RMS_i <= max_rms the update of a leaf is the optimizer's, selected (a compiler may fuse a multiply-add).
      - The optimizer's state is the optimizer's own: what is clipped is the step, learning rate and decay included.
      - No state.

    ==========================  =======================================================================================
    Case                        Result
    ==========================  =======================================================================================
    first step                  RMS is 1 (v is g^2): unchanged
    zero gradient               unchanged
    NaN or Inf in a leaf        that leaf is what the optimizer makes of it; the others are unaffected
    spike of any size           RMS at most 1 / sqrt(1 - b2) = 32
    ==========================  =======================================================================================

    Args:
      inner: an optimizer that keeps a second moment (Adam, RMSProp, Adagrad and their kin) in Optax's own states.
      max_rms: the largest RMS that is left alone, > 0, a number or a 0-d array; d of the paper.
      b2: as in `spam_clip`: give it where the optimizer's is not Optax's default. The paper's optimizer has 0.99.
      eps: the smallest root of v that is divided by, >= 0.

    Returns:
      A transformation; its `update` needs `params`, and forwards extra arguments. Under `optax.inject_hyperparams`
      list `inner` in `static_args`.

    Raises:
      ValueError: wrong static arguments; no second moment found in `inner`'s state.

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
      2304.13013, algorithm 2 (AdamW with Adafactor's update clipping). Its debiased averages equal bias correction.
      No deviation; decoupled weight decay is scaled as there.

    See Also:
      `optax.clip_by_block_rms` after `scale_by_adam` clips RMS(m / sqrt(v)), another number: m lags.
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

    check_state = state_check(name, init)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        updates, params = checked_with_params(name, updates, params)
        check_state(state, params, updates)
        gradients = updates
        updates, after = update_inner(updates, state, params, **extra)
        roots = _roots(read, after, params)

        def clip(moved: jax.Array, gradient: jax.Array, root: jax.Array) -> jax.Array:
            real = accumulator_dtype(gradient.dtype)
            ratio = jnp.abs(gradient).astype(real) / jnp.maximum(root.astype(real), jnp.asarray(eps, real))
            square = jnp.mean(jnp.square(lax.stop_gradient(ratio))) if gradient.size else jnp.zeros((), real)
            over = square > jnp.square(jnp.asarray(max_rms, real))
            over = over & jnp.isfinite(square)
            scale = jnp.where(over, jnp.asarray(max_rms, real) * lax.rsqrt(jnp.where(over, square, 1)), 1)
            return jnp.where(over, multiplied(moved, scale), moved)

        clipped = _map_positions(clip, updates, leaves_with_none(gradients), roots)
        return clipped, after

    return optax.GradientTransformationExtraArgs(init, update)


def _roots(read: Reader, state: Any, params: PyTree) -> list[jax.Array | None]:
    """Per position the root of the corrected second moment: Inf where it has only seen zeros, NaN before a step."""
    chosen = jax.tree.map(is_gradient, params)
    return [each.metric for each in responses(read, state, params, chosen, jnp.zeros((), jnp.int32))]


def _map_positions(function: Any, tree: PyTree, *rest: list[Any]) -> PyTree:
    """Maps over the floating-point leaves of `tree` with the entries of lists that follow `leaves_with_none`."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    mapped = [
        function(leaf, *others) if is_gradient(leaf) else leaf for leaf, *others in zip(leaves, *rest, strict=True)
    ]
    return jax.tree.unflatten(structure, mapped)


def _at_size(leaf: jax.Array, size: jax.Array) -> jax.Array:
    """The direction of every element at another size; Inf has the direction of its sign."""
    return multiplied(direction(leaf), size)


def _scaled(updates: PyTree, factor: jax.Array) -> PyTree:
    return _map_positions(lambda leaf: jnp.where(factor == 1, leaf, multiplied(leaf, factor)), updates)


def _restart(step: jax.Array, every: int | None, warmup: int) -> tuple[jax.Array, jax.Array]:
    """Whether the moments restart at this call, and the factor of the warm-up after the last restart."""
    if every is None:
        return jnp.zeros((), bool), jnp.ones((), jnp.float32)
    since = (step % every).astype(jnp.float32)
    rate = 0.495 * (1 + jnp.cos(jnp.pi * since / (warmup + 1)))
    return step % every == 0, jnp.where((step >= every) & (since < warmup), 1 - rate, 1)


def _restarted(
    state: PyTree, params: PyTree, restart: jax.Array, *, counts: bool = True, moments: bool = True
) -> PyTree:
    """The state with moments and their counts zero where `restart`. A select: fused into the read of the moments."""

    def zero(leaf: jax.Array) -> jax.Array:
        return jnp.where(restart, jnp.zeros_like(leaf), leaf)

    def look(node: Any) -> Any:
        if not isinstance(node, _MOMENTS) or is_like(node, params):
            return node
        fields = {
            name: jax.tree.map(zero, field) if (counts if name == "count" else moments) else field
            for name, field in node._asdict().items()
        }
        return type(node)(**fields)

    return jax.tree.map(look, state, is_leaf=lambda node: isinstance(node, _MOMENTS) or is_like(node, params))


def _normalised(
    leaf: Any, old: tuple[jax.Array, ...], settings: tuple[Any, ...], faithful: bool
) -> tuple[Any, tuple[jax.Array, ...]]:
    """One leaf of `stable_spam` and its new averages."""
    if not is_gradient(leaf) or leaf.size == 0:
        return leaf, old
    largest, norms, squares, steps = old
    gamma1, gamma2, gamma3, eps = (jnp.asarray(x, jnp.float32) for x in settings)
    real = accumulator_dtype(leaf.dtype)
    sizes = lax.stop_gradient(jnp.abs(leaf).astype(real))
    finite = jnp.isfinite(sizes)
    most = jnp.max(jnp.where(finite, sizes, 0)).astype(jnp.float32)
    t = steps + 1

    def corrected(average: jax.Array, decay: jax.Array, count: jax.Array) -> jax.Array:
        share = 1 - decay ** count.astype(jnp.float32)
        return average / jnp.where(share > 0, share, 1)

    usual = corrected(largest, gamma3, steps)
    taken = most if faithful else jnp.where(steps > 0, jnp.minimum(most, _BURST * usual), jnp.minimum(most, _UNSEEN))
    new_largest = gamma3 * largest + (1 - gamma3) * taken
    bound = corrected(new_largest, gamma3, t)
    seen = jnp.isfinite(most) & (jnp.all(finite) if faithful else most > 0)
    one = jnp.where(most > 0, most, 1)
    # Divided first: elements of 1e30 times a bound would overflow.
    over = finite & (sizes > bound.astype(real))
    shape = jnp.where(finite, sizes, 0) / one.astype(real)
    shrunk = jnp.where(over, shape * bound.astype(real), jnp.where(finite, sizes, 0))
    shrunk = jnp.where(jnp.isinf(sizes), bound.astype(real), shrunk)
    top = jnp.max(shrunk)
    top = jnp.where(top > 0, top, 1)
    norm = (top * jnp.sqrt(jnp.sum(jnp.square(shrunk / top)))).astype(jnp.float32)
    counted = jnp.minimum(norm, _UNSEEN)
    new_norms = gamma1 * norms + (1 - gamma1) * counted
    new_squares = gamma2 * squares + (1 - gamma2) * jnp.square(counted)
    length = corrected(new_norms, gamma1, t) / (jnp.sqrt(corrected(new_squares, gamma2, t)) + eps)
    factor = jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1), 0).astype(real)
    direction = jnp.where(jnp.isnan(leaf), jnp.zeros_like(leaf), leaf)
    result = _at_size(direction, shrunk * factor)
    result = jnp.where(seen, jnp.where(jnp.isfinite(result), result, jnp.zeros_like(result)), jnp.zeros_like(result))
    new = (new_largest, new_norms, new_squares, jnp.minimum(t, 2**30))
    return result, tuple(jnp.where(seen, n, o).astype(o.dtype) for n, o in zip(new, old, strict=True))

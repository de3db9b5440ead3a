"""Adaptive clips from the literature, repaired.

==========  ==========================================  ============================================================
Function    Threshold                                   What the published method suffers from
==========  ==========================================  ============================================================
`zclip`     mean + z standard deviations of the norm    never follows a lasting rise; touches 8 % of healthy steps
`autoclip`  a percentile of all norms so far            touches 90 % of all steps, and reacts ever more slowly
`adagc`     every leaf's own moving average             touches three steps in four; grows by 0.04 % a step at most
==========  ==========================================  ============================================================

Each is changed so that it obeys the four laws of `_norm_history.py`. The methods as their authors wrote them are in
`optax_guard.published`. For training prefer `clip_by_norm_history`, which is better than all three in most columns of
`benchmarks/norm_histories.py`.

A step that is not finite, and a norm of 0, change no state.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.counters import next_step
from optax_guard._common.typing import AxisName, PyTree, Scope
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard.rules._window import (
    DISTRUSTED,
    at_rank,
    bounded_scale,
    keep_unless,
    number,
    observe,
    push,
    scope_shape,
    sorted_window,
    validate_scope_and_cap,
)

__all__ = [
    "AdaGCState",
    "AutoClipState",
    "Mode",
    "ZClipState",
    "adagc",
    "autoclip",
    "empty_autoclip_state",
    "spike_and_target",
    "zclip",
]

Mode: TypeAlias = Literal["reciprocal", "mean", "percentile"]

_NARROWEST = 0.1  # the smallest standard deviation of the log norm that `zclip` believes


class ZClipState(NamedTuple):
    """The history of `zclip`: of the log norm, or of the norm in `published.zclip`."""

    zclip_mean: jax.Array  # f32[]
    zclip_variance: jax.Array  # f32[]
    zclip_seen: jax.Array  # i32[]: finite norms above 0 so far


class AutoClipState(NamedTuple):
    """The history of `autoclip`: log norms, or norms in `published.autoclip`."""

    autoclip_window: jax.Array  # f32[window]: the last norms, a ring
    autoclip_seen: jax.Array  # i32[]: finite norms above 0 so far


class AdaGCState(NamedTuple):
    """The history of `adagc`."""

    adagc_level: jax.Array  # f32[n_leaves] or f32[]: logarithm of the moving average of the norm
    adagc_seen: jax.Array  # i32[n_leaves] or i32[]: finite norms above 0 so far


def zclip(
    z_threshold: float = 2.5,
    *,
    mode: Mode = "reciprocal",
    clip_factor: float = 1.0,
    decay: float = 0.97,
    max_norm: float | None = None,
    axis_name: AxisName | None = None,
) -> Rule:
    """ZClip, repaired: scale down a gradient whose log norm is far above its moving mean.

    x = log ||g||,   z = (x - mean) / deviation
    where z > z_threshold, x passes as   mean + deviation * z_threshold^2 / z     "reciprocal": the larger it is, the
                                                                                  less passes (as a norm, times
                                                                                  clip_factor)
                                         mean                                     "mean"
                                         mean + deviation * z_threshold           "percentile"

    Guarantees:
      - Law 1: a non-finite step changes no field. Alone in a chain it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, raise the threshold by x1.6, where the noise is wide by at most
        x6.5 (within the first 20 steps: x150).
      - Law 3: a lasting change by x100, up or down, is followed to x2 within 200 steps.
      - Law 4: of steady noise up to a log deviation of 0.7, at most 2.5 % of the steps are touched.
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =====================  =========================================
    Case                   Result
    =====================  =========================================
    first step             passes; `max_norm` bounds it
    zero, empty tree       unchanged, changes no field
    constant norms         never touched
    NaN or Inf anywhere    zeros alone in a chain, held under `guard`
    =====================  =========================================

    Args:
      z_threshold: in standard deviations, > 0; a number or a 0-d array.
      mode: what a step above the threshold is scaled to. The paper prefers "reciprocal".
      clip_factor: in (0, 1], a number or a 0-d array; only in mode "reciprocal". The authors suggest 0.3 to 0.7 where
        norms are volatile.
      decay: of the moving mean and variance, in [0, 1).
      max_norm: None, or a bound on the norm at every step, >= 0, inf for none.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, `mode` goes into `static_args`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> clip = zclip()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.10 0.90 1.80 1.00

    References:
      Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025, arXiv 2504.02507.
      Deviations: logarithms, so that the noise of wide runs is not a spike; what is learnt is x, clipped to within
      `z_threshold` deviations on both sides, in every mode, so that the mean follows a rise (the published method
      learns what it let through, and never follows); a smallest deviation of 0.1; no 1e-6; no warm-up: the first norms
      weigh 1/(n + 1) in the mean, while the variance begins at what lets x8 through and weighs 1 - decay from the first
      step on, around the mean before the step; no fixed clip at 1.

    See Also:
      `published.zclip`, the authors' own; `clip_by_norm_history`.
    """
    name = "zclip"
    z_threshold = validate.scalar(name, "z_threshold", z_threshold, low=0, open_low=True)
    validate.one_of(name, "mode", mode, Mode)
    clip_factor = validate.scalar(name, "clip_factor", clip_factor, low=0, high=1, open_low=True)
    settled = 1 - validate.scalar(name, "decay", decay, low=0, high=1, open_high=True)
    max_norm = validate_scope_and_cap(name, "tree", max_norm)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> ZClipState:
        del params
        return ZClipState(
            zclip_mean=jnp.zeros((), jnp.float32),
            zclip_variance=jnp.square(number(math.log(8) / number(z_threshold))),
            zclip_seen=jnp.zeros((), jnp.int32),
        )

    def judge(
        statistics: GradientStatistics, state: ZClipState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, ZClipState]:
        del params, extra
        seen = observe(name, statistics, "tree", state.zclip_seen)
        x, limit = seen.log_norm, number(z_threshold)
        mean = jnp.where(state.zclip_seen == 0, x, state.zclip_mean)
        deviation = jnp.maximum(jnp.sqrt(state.zclip_variance), _NARROWEST)
        spike, target = spike_and_target(x, mean, deviation, (x - mean) / deviation, limit, mode)
        if mode == "reciprocal":
            target = target + jnp.log(number(clip_factor))
        learnt = jnp.clip(x, mean - limit * deviation, mean + limit * deviation)
        new = _learnt(state, mean, learnt, number(settled))
        scale = bounded_scale(seen, jnp.where(spike, target - x, 0), max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def autoclip(
    percentile: float = 90.0,
    window: int = 128,
    *,
    max_norm: float | None = None,
    axis_name: AxisName | None = None,
) -> Rule:
    """AutoClip, repaired: scale down to a high percentile of the last norms.

    g <- g * min(1, P_percentile(||g_1||, ..., ||g_n||) / ||g||)           n <= window norms before this one

    Guarantees:
      - Law 1: a non-finite step changes no field. Alone in a chain it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, move the threshold by at most x2.3, and from the second step on never
        above the largest norm that is no spike.
      - Law 3: a lasting change, up or down, is followed within `window` steps.
      - Law 4: of steady noise about (100 - `percentile`) per cent of the steps are touched, by definition (12 to 16 %
        of the first 500 steps by default; of the first 20 half).
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =====================  =========================================
    Case                   Result
    =====================  =========================================
    first step             passes; `max_norm` bounds it
    zero, empty tree       unchanged, changes no field
    constant norms         never touched
    NaN or Inf anywhere    zeros alone in a chain, held under `guard`
    =====================  =========================================

    Args:
      percentile: in (0, 100); a number or a 0-d array.
      window: norms to remember, >= 12; static.
      max_norm: None, or a bound on the norm at every step, >= 0, inf for none.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, `window` goes into `static_args`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> clip = autoclip()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.00 0.90 0.90 0.90

    References:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation networks", 2020,
      arXiv 2007.14469. Deviations: the percentile is 90 and not 10; the history ends after `window` norms; the norm
      judged is not part of its own history; the percentile is taken of logarithms, and never among the five largest
      norms; no 1e-6 in the division; non-finite and zero norms are not learnt.

    See Also:
      `published.autoclip`, the authors' own; `clip_by_median_norm`: a multiple of the median instead of a high
      percentile.
    """
    name = "autoclip"
    percentile = validate.scalar(name, "percentile", percentile, low=0, high=100, open_low=True, open_high=True)
    window = validate.integer(name, "window", window, low=12, high=validate.MILLION)
    max_norm = validate_scope_and_cap(name, "tree", max_norm)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> AutoClipState:
        del params
        return empty_autoclip_state(window)

    def judge(
        statistics: GradientStatistics, state: AutoClipState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, AutoClipState]:
        del params, extra
        seen = observe(name, statistics, "tree", state.autoclip_seen)
        x, held = seen.log_norm, jnp.minimum(state.autoclip_seen, window)
        new = AutoClipState(
            autoclip_window=push(state.autoclip_window, state.autoclip_seen, x),
            autoclip_seen=next_step(state.autoclip_seen),
        )
        share = number(percentile) / 100
        believed = jnp.maximum(held - 1 - DISTRUSTED, 0).astype(jnp.float32)
        rank = jnp.minimum(share * jnp.maximum(held - 1, 0).astype(jnp.float32), believed)
        threshold = jnp.where(held == 0, x, at_rank(sorted_window(state.autoclip_window, held), rank))
        scale = bounded_scale(seen, threshold - x, max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def adagc(
    ratio: float = 4.0,
    *,
    decay: float = 0.98,
    scope: Scope = "leaf",
    max_norm: float | None = None,
    axis_name: AxisName | None = None,
) -> Rule:
    """AdaGC, repaired: scale every leaf down to `ratio` times the moving average of its norm.

    g_i  <- g_i * min(1, ratio * c_i / ||g_i||)
    log c_i <- log c_i + w * min(log ||g_i|| - log c_i, log ratio),        w = max(1 - decay, 1 / (n + 1))

    Guarantees:
      - Law 1: a non-finite step changes no field of any leaf. Alone it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, raise the threshold by at most ratio^(5 (1 - decay)), by default x1.15
        (x15 within the first 20 steps).
      - Law 3: a lasting change by x100, up or down, is followed to x2 within 190 steps.
      - Law 4: of steady noise up to a log deviation of 0.7, at most 2.8 % of the steps are touched, of the
        first 20 8 %.
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =======================  =========================================
    Case                     Result
    =======================  =========================================
    first step               passes; `max_norm` bounds it
    zero gradient or leaf    unchanged, changes no field of that leaf
    constant norms           never touched
    NaN or Inf in any leaf   zeros alone in a chain, held under `guard`
    =======================  =========================================

    Args:
      ratio: what passes, in averages, > 1; a number or a 0-d array.
      decay: of the moving average, in [0, 1).
      scope: "leaf" as in the paper, or "tree" (theirs is called AdaGC-Global).
      max_norm: None, or a bound on the norm (of each leaf, with `scope="leaf"`) at every step, >= 0, inf for none.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, `scope` goes into `static_args`.

    Raises:
      ValueError: an argument outside its range; with `scope="leaf"`, gradients with another number of leaves than the
        parameters given to `init`.

    Example:
      >>> clip = adagc()
      >>> state = clip.init([jnp.zeros(1), jnp.zeros(1)])
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update([jnp.array([size]), jnp.array([1.0])], state)
      ...     print(f"{updates[0][0]:.2f}", end=" ")
      1.00 1.10 0.90 3.99 1.00

    References:
      Wang, Li, et al., "AdaGC: improving training stability for large language model pretraining", 2025, arXiv
      2502.11034, algorithm 1. Deviations: ratio 4 instead of 1.04, which touches three steps in four and follows a
      doubling in 1700 steps; the average is one of logarithms; no 1e-6 in the division; no warm-up, the first norms
      weigh 1/(n + 1); non-finite steps and zero leaves are not learnt.

    See Also:
      `published.adagc`, the authors' own; `clip_by_norm_history(scope="leaf")`: its ratio is learnt from the noise of
      each leaf.
    """
    name = "adagc"
    settled = 1 - validate.scalar(name, "decay", decay, low=0, high=1, open_high=True)
    ratio = validate.scalar(name, "ratio", ratio, low=1, open_low=True)
    max_norm = validate_scope_and_cap(name, scope, max_norm)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> AdaGCState:
        shape = scope_shape(params, scope)
        return AdaGCState(adagc_level=jnp.zeros(shape, jnp.float32), adagc_seen=jnp.zeros(shape, jnp.int32))

    def judge(
        statistics: GradientStatistics, state: AdaGCState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, AdaGCState]:
        del params, extra
        seen = observe(name, statistics, scope, state.adagc_seen)
        level = jnp.where(state.adagc_seen == 0, seen.log_norm, state.adagc_level)
        residual, log_ratio = seen.log_norm - level, jnp.log(number(ratio))
        weight = jnp.maximum(number(settled), 1 / (state.adagc_seen.astype(jnp.float32) + 1))
        new = AdaGCState(
            adagc_level=level + weight * jnp.minimum(residual, log_ratio), adagc_seen=next_step(state.adagc_seen)
        )
        scale = bounded_scale(seen, log_ratio - residual, max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def spike_and_target(
    x: jax.Array, mean: jax.Array, deviation: jax.Array, z: jax.Array, limit: jax.Array, mode: Mode
) -> tuple[jax.Array, jax.Array]:
    """ZClip: whether x is a spike, and what passes of it if it is, before the clip factor."""
    if mode == "percentile":
        threshold = mean + deviation * limit
        return x > threshold, threshold
    spike = z > limit
    return spike, mean if mode == "mean" else mean + deviation * jnp.square(limit) / jnp.where(spike, z, 1)


def empty_autoclip_state(window: int) -> AutoClipState:
    """A history without a norm."""
    return AutoClipState(autoclip_window=jnp.zeros(window, jnp.float32), autoclip_seen=jnp.zeros((), jnp.int32))


def _learnt(state: ZClipState, mean: jax.Array, learnt: jax.Array, settled: jax.Array) -> ZClipState:
    """The state of `zclip` after one more value; `mean` is the one before it."""
    weight = jnp.maximum(settled, 1 / (state.zclip_seen.astype(jnp.float32) + 1))
    # Around the old mean, and at no more than the settled weight: a young variance fed with spikes explodes by itself.
    variance = state.zclip_variance + settled * (jnp.square(learnt - mean) - state.zclip_variance)
    return ZClipState(
        zclip_mean=mean + weight * (learnt - mean),
        zclip_variance=jnp.where(state.zclip_seen == 0, state.zclip_variance, variance),
        zclip_seen=next_step(state.zclip_seen),
    )

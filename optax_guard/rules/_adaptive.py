"""Adaptive clips from the literature, with their faults fixed.

==========  ==========================================  ============================================================
Function    Threshold                                   Faults of the published method
==========  ==========================================  ============================================================
`zclip`     mean + z standard deviations of the norm    never follows a lasting rise; scales 8 % of healthy steps
`autoclip`  a percentile of all norms so far            scales 90 % of all steps, and reacts ever more slowly
`adagc`     every leaf's own moving average             scales three steps in four; grows by at most 0.04 % a step
==========  ==========================================  ============================================================

Each is changed to obey the four laws that `clip_by_norm_history` states. The methods as their authors wrote them are in
`optax_guard.published`. For training, prefer `clip_by_norm_history`, which is better than all three in most columns of
`benchmarks/norm_histories.py`.

A step that is not finite and a norm of 0 do not change the state.
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

_NARROWEST = 0.1  # the smallest standard deviation of the log norm that `zclip` assumes


class ZClipState(NamedTuple):
    """The history of `zclip`, of the log norm or, in `published.zclip`, of the norm."""

    zclip_mean: jax.Array  # f32[]
    zclip_variance: jax.Array  # f32[]
    zclip_seen: jax.Array  # i32[]: finite norms above 0 so far


class AutoClipState(NamedTuple):
    """The history of `autoclip`: log norms or, in `published.autoclip`, norms."""

    autoclip_window: jax.Array  # f32[window]: the last norms, as a ring buffer
    autoclip_seen: jax.Array  # i32[]: finite norms above 0 so far


class AdaGCState(NamedTuple):
    """The history of `adagc`."""

    adagc_level: jax.Array  # f32[n_leaves] or f32[]: the logarithm of the moving average of the norm
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
    """Scale down a gradient whose log norm is far above its moving mean (ZClip, with its faults fixed).

    x = log ||g||,   z = (x - mean) / deviation
    where z > z_threshold, x becomes     mean + deviation * z_threshold^2 / z     "reciprocal": the larger the norm, the
                                                                                  smaller the result (as a norm, times
                                                                                  clip_factor)
                                         mean                                     "mean"
                                         mean + deviation * z_threshold           "percentile"

    Guarantees:
      - Law 1: a non-finite step changes no field. Outside a guard it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, raise the threshold by x1.6, and by at most x6.5 if the noise is wide
        (x150 within the first 20 steps).
      - Law 3: a lasting change by x100, up or down, is followed to within x2 in 200 steps.
      - Law 4: with steady noise up to a log deviation of 0.7, at most 2.5 % of the steps are scaled.
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =====================  =========================================
    Case                   Result
    =====================  =========================================
    first step             passes; `max_norm` bounds it
    zero, empty tree       unchanged, changes no field
    constant norms         never scaled
    NaN or Inf anywhere    zeros outside a guard, held under `guard`
    =====================  =========================================

    Args:
      z_threshold: the threshold in standard deviations, > 0; a number or a 0-d array.
      mode: what a step above the threshold is scaled to. The paper prefers "reciprocal".
      clip_factor: a factor in (0, 1], a number or a 0-d array; used only in mode "reciprocal". The authors suggest 0.3
        to 0.7 if norms are volatile.
      decay: the decay of the moving mean and variance, in [0, 1).
      max_norm: an additional bound on the norm at every step, >= 0, or None.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list `mode` in `static_args`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> clip = zclip()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.10 0.90 1.80 1.00

    References:
      Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025, arXiv 2504.02507.
      Deviations: norms are judged by their logarithms, so that wide noise is not a spike. The history is updated with x
      clipped to within `z_threshold` deviations on both sides, in every mode, so that the mean follows a rise; the
      published method updates with the scaled norm, and never follows. The deviation is at least 0.1, and there is no
      1e-6. There is no warm-up: the first norms have a weight of 1/(n + 1) in the mean, while the variance starts at
      the value that lets x8 pass and has a weight of 1 - decay from the first step on, around the mean before the step.
      There is no fixed clip at 1.

    See Also:
      `published.zclip`, the authors' version; `clip_by_norm_history`.
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
    """Scale the gradient down to a high percentile of the last norms (AutoClip, with its faults fixed).

    g <- g * min(1, P_percentile(||g_1||, ..., ||g_n||) / ||g||)           n <= window norms before this one

    Guarantees:
      - Law 1: a non-finite step changes no field. Outside a guard it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, move the threshold by at most x2.3 and, from the second step on, never
        above the largest norm that is not a spike.
      - Law 3: a lasting change, up or down, is followed within `window` steps.
      - Law 4: with steady noise, about (100 - `percentile`) per cent of the steps are scaled, by definition (by default
        12 to 16 % of the first 500 steps, and half of the first 20).
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =====================  =========================================
    Case                   Result
    =====================  =========================================
    first step             passes; `max_norm` bounds it
    zero, empty tree       unchanged, and no field changes
    constant norms         never scaled
    NaN or Inf anywhere    zeros outside a guard, held under `guard`
    =====================  =========================================

    Args:
      percentile: the percentile of the window, in (0, 100); a number or a 0-d array.
      window: the number of norms to remember, >= 12; static.
      max_norm: an additional bound on the norm at every step, >= 0, or None.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list `window` in `static_args`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> clip = autoclip()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.00 0.90 0.90 0.90

    References:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation networks", 2020,
      arXiv 2007.14469. Deviations: the percentile is 90 and not 10; the history is limited to `window` norms; the
      judged norm is not part of its own history; the percentile is taken of logarithms and is never one of the five
      largest norms; there is no 1e-6 in the division; non-finite and zero norms do not enter the history.

    See Also:
      `published.autoclip`, the authors' version; `clip_by_median_norm`, which uses a multiple of the median instead of
      a high percentile.
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
    """Scale every leaf down to `ratio` times the moving average of its norm (AdaGC, with its faults fixed).

    g_i  <- g_i * min(1, ratio * c_i / ||g_i||)
    log c_i <- log c_i + w * min(log ||g_i|| - log c_i, log ratio),        w = max(1 - decay, 1 / (n + 1))

    Guarantees:
      - Law 1: a non-finite step changes no field of any leaf. Outside a guard it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, raise the threshold by at most ratio^(5 (1 - decay)), by default x1.15
        (x15 within the first 20 steps).
      - Law 3: a lasting change by x100, up or down, is followed to within x2 in 190 steps.
      - Law 4: with steady noise up to a log deviation of 0.7, at most 2.8 % of the steps are scaled (8 % of the first
        20).
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =======================  =========================================
    Case                     Result
    =======================  =========================================
    first step               passes; `max_norm` bounds it
    zero gradient or leaf    unchanged, and no field of it changes
    constant norms           never scaled
    NaN or Inf in any leaf   zeros outside a guard, held under `guard`
    =======================  =========================================

    Args:
      ratio: the limit relative to the average, > 1; a number or a 0-d array.
      decay: the decay of the moving average, in [0, 1).
      scope: "leaf" as in the paper, or "tree" (AdaGC-Global in the paper).
      max_norm: an additional bound on the norm (of each leaf, with `scope="leaf"`) at every step, >= 0, or None.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list `scope` in `static_args`.

    Raises:
      ValueError: an argument is outside its range or, with `scope="leaf"`, the gradient and the parameters given to
        `init` differ in their number of leaves.

    Example:
      >>> clip = adagc()
      >>> state = clip.init([jnp.zeros(1), jnp.zeros(1)])
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update([jnp.array([size]), jnp.array([1.0])], state)
      ...     print(f"{updates[0][0]:.2f}", end=" ")
      1.00 1.10 0.90 3.99 1.00

    References:
      Wang, Li, et al., "AdaGC: improving training stability for large language model pretraining", 2025, arXiv
      2502.11034, algorithm 1. Deviations: the ratio is 4 instead of 1.04, which scales three steps in four and follows
      a doubling in 1700 steps; the average is taken of logarithms; there is no 1e-6 in the division; there is no
      warm-up, and the first norms have a weight of 1/(n + 1); non-finite steps and zero leaves do not enter the
      history.

    See Also:
      `published.adagc`, the authors' version; `clip_by_norm_history(scope="leaf")`, whose ratio follows from the noise
      of each leaf.
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
    """Whether x is a spike in ZClip, and its target value if it is, before the clip factor."""
    if mode == "percentile":
        threshold = mean + deviation * limit
        return x > threshold, threshold
    spike = z > limit
    return spike, mean if mode == "mean" else mean + deviation * jnp.square(limit) / jnp.where(spike, z, 1)


def empty_autoclip_state(window: int) -> AutoClipState:
    """A history without norms."""
    return AutoClipState(autoclip_window=jnp.zeros(window, jnp.float32), autoclip_seen=jnp.zeros((), jnp.int32))


def _learnt(state: ZClipState, mean: jax.Array, learnt: jax.Array, settled: jax.Array) -> ZClipState:
    """The state of `zclip` after one more value; `mean` is the mean before it."""
    weight = jnp.maximum(settled, 1 / (state.zclip_seen.astype(jnp.float32) + 1))
    # Around the old mean, and with at most the settled weight, since spikes would make a young variance explode.
    variance = state.zclip_variance + settled * (jnp.square(learnt - mean) - state.zclip_variance)
    return ZClipState(
        zclip_mean=mean + weight * (learnt - mean),
        zclip_variance=jnp.where(state.zclip_seen == 0, state.zclip_variance, variance),
        zclip_seen=next_step(state.zclip_seen),
    )

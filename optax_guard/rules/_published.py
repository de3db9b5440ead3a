"""Adaptive clips from the literature, each as published and repaired.

==========  ==========================================  ============================================================
Function    Threshold                                   What the published form does not stand
==========  ==========================================  ============================================================
`zclip`     mean + z standard deviations of the norm    a lasting rise: never followed; 8 % of healthy steps touched
`autoclip`  a percentile of all norms so far            touches 90 % of all steps; the more history, the more inert
`adagc`     every leaf's own moving average             touches three steps in four; grows 0.04 % a step at most
==========  ==========================================  ============================================================

By default each is repaired so that it obeys the four laws of `_norm_history.py`; `faithful=True` is the authors' own
code, with their settings where none are given, to compare with the papers. For training take `clip_by_norm_history`,
which is better than all three in most columns of `benchmarks/norm_histories.py`.

One thing is the same in both forms: a step that is not finite, and a norm of 0, change no state.
"""

import functools
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
    Observation,
    bounded_scale,
    keep_unless,
    number,
    observe,
    push,
    scope_shape,
    sorted_window,
    validate_scope_and_cap,
)

__all__ = ["AdaGCState", "AutoClipState", "Mode", "ZClipState", "adagc", "autoclip", "zclip"]

Mode: TypeAlias = Literal["reciprocal", "mean", "percentile"]

_LARGEST = 1e18  # a norm that can be squared in float32
_LARGEST_LOG = 88.0  # of a float32
_SMALLEST_LOG = -200.0  # of a scale: 0 in float32, and still a finite number in the state
_EPS = 1e-6  # what the authors of all three add to the norm that they divide by
_NARROWEST = 0.1  # the smallest standard deviation of the log norm that the repaired `zclip` believes


class ZClipState(NamedTuple):
    """What `zclip` remembers: of the log norm, or with `faithful=True` of the norm."""

    zclip_mean: jax.Array  # f32[]
    zclip_variance: jax.Array  # f32[]
    zclip_seen: jax.Array  # i32[]: finite norms above 0 so far


class AutoClipState(NamedTuple):
    """What `autoclip` remembers."""

    autoclip_window: jax.Array  # f32[window]: the last norms (faithful) or log norms, a ring
    autoclip_seen: jax.Array  # i32[]: finite norms above 0 so far


class AdaGCState(NamedTuple):
    """What `adagc` remembers."""

    adagc_level: jax.Array  # f32[n_leaves] or f32[]: logarithm of the moving average of the norm
    adagc_seen: jax.Array  # i32[n_leaves] or i32[]: finite norms above 0 so far


def zclip(
    z_threshold: float = 2.5,
    *,
    mode: Mode = "reciprocal",
    clip_factor: float = 1.0,
    decay: float = 0.97,
    max_norm: float | None = None,
    faithful: bool = False,
    warmup: int = 25,
    skip_update_on_spike: bool = False,
    axis_name: AxisName | None = None,
) -> Rule:
    """ZClip: scale down a gradient whose norm is more than `z_threshold` standard deviations above its moving mean.

    x = log ||g||   (faithful: x = ||g||),   z = (x - mean) / deviation
    where z > z_threshold, x passes as   mean + deviation * z_threshold^2 / z     "reciprocal": a larger one as less
                                                                                  (times clip_factor, as a norm)
                                         mean                                     "mean"
                                         mean + deviation * z_threshold           "percentile"

    Guarantees (repaired form):
      - Law 1: a non-finite step changes no field. Alone in a chain it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, raise the threshold by x1.6, where the noise is wide by at most
        x6.5 (within the first 20 steps: x150).
      - Law 3: a lasting change by x100, up or down, is followed to x2 within 200 steps.
      - Law 4: of steady noise up to a log deviation of 0.7, at most 2.5 % of the steps are touched.
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =====================  ===============================================================================
    Case                   Result
    =====================  ===============================================================================
    first step             passes (faithful: so do the first `warmup`); `max_norm` bounds them
    zero, empty tree       unchanged, changes no field
    constant norms         never touched (faithful: the deviation shrinks to 0, and any bump is clipped)
    NaN or Inf anywhere    zeros alone in a chain, held under `guard`
    =====================  ===============================================================================

    Args:
      z_threshold: in standard deviations, > 0; a number or a 0-d array.
      mode: what a step above the threshold is scaled to. The paper prefers "reciprocal".
      clip_factor: in (0, 1], a number or a 0-d array; only in mode "reciprocal". The authors suggest 0.3 to 0.7 where
        norms are volatile.
      decay: of the moving mean and variance, in [0, 1).
      max_norm: a bound on the norm at every step, >= 0, inf for none. None: inf, with `faithful=True` the authors' 1.
      faithful: the authors' code.
      warmup: norms before the first judgement, >= 2; only with `faithful=True`.
      skip_update_on_spike: a step above the threshold changes neither mean nor variance; only with `faithful=True`. (A
        lasting rise is then never followed.)
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, `mode`, `faithful`, `warmup` and `skip_update_on_spike` go into
      `static_args`.

    Raises:
      ValueError: an argument outside its range; `skip_update_on_spike` without `faithful`.

    Example:
      >>> clip = zclip()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.10 0.90 1.80 1.00

    References:
      Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025, arXiv 2504.02507, and
      the authors' code: 1e-6 is added to the deviation in z, except in mode "percentile", and to the norm that is
      divided by. Deviations of `faithful=True`: non-finite and zero norms are not learnt, norms count as 1e18 at most.
      Deviations of the default: logarithms, so that the noise of wide runs is not a spike; what is learnt is x held
      within `z_threshold` deviations on both sides, in every mode, which lets the mean follow a rise (the published
      form learns what it let through, and never follows); a smallest deviation of 0.1; no 1e-6; no warm-up: the first
      norms weigh 1/(n + 1) in the mean, while the variance begins at what lets x8 through and weighs 1 - decay from
      the first step on, around the mean before the step.

    See Also:
      `clip_by_norm_history`.
    """
    name = "zclip"
    z_threshold = validate.scalar(name, "z_threshold", z_threshold, low=0, open_low=True)
    validate.one_of(name, "mode", mode, Mode)
    clip_factor = validate.scalar(name, "clip_factor", clip_factor, low=0, high=1, open_low=True)
    decay = validate.scalar(name, "decay", decay, low=0, high=1, open_high=True)
    faithful = validate.boolean(name, "faithful", faithful)
    skip_update_on_spike = validate.boolean(name, "skip_update_on_spike", skip_update_on_spike)
    if skip_update_on_spike and not faithful:
        raise ValueError(f"{name}: `skip_update_on_spike` must be False unless `faithful` is True; got True.")
    warmup = validate.integer(name, "warmup", warmup, low=2)
    max_norm = validate_scope_and_cap(name, "tree", _setting(max_norm, faithful, published=1.0, repaired=None))
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> ZClipState:
        del params
        first_deviation = 0.0 if faithful else math.log(8) / number(z_threshold)
        return ZClipState(
            zclip_mean=jnp.zeros((), jnp.float32),
            zclip_variance=jnp.square(number(first_deviation)),
            zclip_seen=jnp.zeros((), jnp.int32),
        )

    def judge(
        statistics: GradientStatistics, state: ZClipState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, ZClipState]:
        del params, extra
        seen = observe(name, statistics, "tree", state.zclip_seen)
        passes = functools.partial(_zclip_passes, limit=number(z_threshold), mode=mode)
        if faithful:
            log_scale, new = _zclip_faithful(
                seen.log_norm, state, passes, clip_factor, 1 - decay, max_norm, warmup, skip_update_on_spike
            )
        else:
            log_scale, new = _zclip_repaired(seen.log_norm, state, passes, clip_factor, 1 - decay, z_threshold)
        scale = bounded_scale(seen, log_scale, max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def autoclip(
    percentile: float | None = None,
    window: int | None = None,
    *,
    max_norm: float | None = None,
    faithful: bool = False,
    axis_name: AxisName | None = None,
) -> Rule:
    """AutoClip: scale down to a percentile of the last norms.

    g <- g * min(1, P_percentile(||g_1||, ..., ||g_n||) / ||g||)           n <= window norms before this one
                                                                           (faithful: this one included)

    Guarantees (repaired form):
      - Law 1: a non-finite step changes no field. Alone in a chain it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, move the threshold by at most x2.3, and from the second step on never
        above the largest norm that is no spike.
      - Law 3: a lasting change, up or down, is followed within `window` steps.
      - Law 4: of steady noise about (100 - `percentile`) per cent of the steps are touched, by definition (12 to 16 %
        of the first 500 steps by default; of the first 20 half).
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =====================  =====================================================================================
    Case                   Result
    =====================  =====================================================================================
    first step             passes; `max_norm` bounds it
    zero, empty tree       unchanged, changes no field
    constant norms         never touched
    NaN or Inf anywhere    zeros alone in a chain, held under `guard`
    faithful               what would pass untouched is multiplied by ||g|| / (||g|| + 1e-6), the first step included
    =====================  =====================================================================================

    Args:
      percentile: in (0, 100); a number or a 0-d array. None: 90, with `faithful=True` the authors' 10, which touches
        nine steps of ten.
      window: norms to remember, >= 12; static. None: 128, with `faithful=True` 1000.
      max_norm: None, or a bound on the norm at every step, >= 0. The authors have none.
      faithful: the authors' code.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, `window` and `faithful` go into `static_args`.

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
      arXiv 2007.14469, and the authors' code (1e-6 is added to the norm that is divided by). Deviations of
      `faithful=True`: the history ends after `window` norms, since it must fit into a step (the paper's grows without
      bound, and becomes inert; the authors' later package keeps 1000 by default); non-finite and zero norms are not
      learnt. Deviations of the default: the percentile is 90; the norm judged is not part of its own history; the
      percentile is taken of logarithms, and never among the five largest norms; no 1e-6 in the division.

    See Also:
      `clip_by_median_norm`: a multiple of the median instead of a high percentile.
    """
    name = "autoclip"
    faithful = validate.boolean(name, "faithful", faithful)
    percentile = _setting(percentile, faithful, published=10.0, repaired=90.0)
    percentile = validate.scalar(name, "percentile", percentile, low=0, high=100, open_low=True, open_high=True)
    window = _setting(window, faithful, published=1000, repaired=128)
    window = validate.integer(name, "window", window, low=12, high=validate.MILLION)
    max_norm = validate_scope_and_cap(name, "tree", max_norm)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> AutoClipState:
        del params
        return AutoClipState(autoclip_window=jnp.zeros(window, jnp.float32), autoclip_seen=jnp.zeros((), jnp.int32))

    def judge(
        statistics: GradientStatistics, state: AutoClipState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, AutoClipState]:
        del params, extra
        seen = observe(name, statistics, "tree", state.autoclip_seen)
        x = jnp.exp(jnp.minimum(seen.log_norm, _LARGEST_LOG)) if faithful else seen.log_norm
        new = AutoClipState(
            autoclip_window=push(state.autoclip_window, state.autoclip_seen, x),
            autoclip_seen=next_step(state.autoclip_seen),
        )
        share = number(percentile) / 100
        if faithful:
            held = jnp.minimum(new.autoclip_seen, window)
            threshold = _at(sorted_window(new.autoclip_window, held), share * (held - 1).astype(jnp.float32))
            log_scale = jnp.log(threshold / (x + _EPS))
        else:
            held = jnp.minimum(state.autoclip_seen, window)
            believed = jnp.maximum(held - 1 - DISTRUSTED, 0).astype(jnp.float32)
            rank = jnp.minimum(share * jnp.maximum(held - 1, 0).astype(jnp.float32), believed)
            threshold = jnp.where(held == 0, x, _at(sorted_window(state.autoclip_window, held), rank))
            log_scale = threshold - x
        scale = bounded_scale(seen, log_scale, max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def adagc(
    ratio: float | None = None,
    *,
    decay: float | None = None,
    scope: Scope = "leaf",
    max_norm: float | None = None,
    faithful: bool = False,
    warmup: int = 100,
    axis_name: AxisName | None = None,
) -> Rule:
    """AdaGC: scale every leaf down to `ratio` times the moving average of its norm.

    g_i  <- g_i * min(1, ratio * c_i / ||g_i||)
    log c_i <- log c_i + w * min(log ||g_i|| - log c_i, log ratio),        w = max(1 - decay, 1 / (n + 1))
    (faithful: c_i <- decay * c_i + (1 - decay) * min(||g_i||, ratio * c_i), after a warm-up in which the whole gradient
    is clipped to max_norm and c_i is the smallest norm so far)

    Guarantees (repaired form):
      - Law 1: a non-finite step changes no field of any leaf. Alone it gives zeros; under `guard` it is held.
      - Law 2: five spikes in a row, of any size, raise the threshold by at most ratio^(5 (1 - decay)), by default x1.15
        (x15 within the first 20 steps).
      - Law 3: a lasting change by x100, up or down, is followed to x2 within 190 steps.
      - Law 4: of steady noise up to a log deviation of 0.7, at most 2.8 % of the steps are touched, of the
        first 20 8 %.
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =======================  ====================================================================================
    Case                     Result
    =======================  ====================================================================================
    first step               passes; `max_norm` bounds it
    faithful, warm-up        the whole gradient is clipped to `max_norm`, c_i is the smallest norm so far
    zero gradient or leaf    unchanged, changes no field of that leaf
    constant norms           never touched; faithful, above `max_norm`: held to what the warm-up let through, times
                             1.04 at first and more as the average grows
    NaN or Inf in any leaf   zeros alone in a chain, held under `guard`
    =======================  ====================================================================================

    Args:
      ratio: what passes, in averages, > 1; a number or a 0-d array. None: 4, with `faithful=True` the authors' 1.04.
      decay: of the moving average, in [0, 1). None: 0.98, with `faithful=True` the authors' 0.99.
      scope: "leaf" as in the paper, or "tree" (theirs is called AdaGC-Global).
      max_norm: a bound on the norm (of each leaf, with `scope="leaf"`) at every step, >= 0, inf for none. None: inf.
        With `faithful=True` it is lambda_abs, the bound on the global norm during the warm-up only; None: 1, as theirs.
      faithful: the authors' code.
      warmup: steps before the first judgement, >= 1; only with `faithful=True`.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, `scope`, `faithful` and `warmup` go into `static_args`.

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
      2502.11034, algorithm 1, and the authors' code, whose settings these are (the first version of the paper and the
      ports to other libraries have 1.05 and 0.98); 1e-6 is added to the norm that is divided by. Deviations of
      `faithful=True`: non-finite steps and zero leaves are not learnt (a zero leaf in the warm-up would be clipped to
      zero for ever), nor counted in the leaf's warm-up. Deviations of the default: ratio 4 instead of 1.04, which
      touches three steps of four and follows a doubling in 1700 steps; the average is one of logarithms; no
      1e-6; no warm-up, the first norms weigh 1/(n + 1).

    See Also:
      `clip_by_norm_history(scope="leaf")`: its ratio is learnt from the noise of each leaf.
    """
    name = "adagc"
    faithful = validate.boolean(name, "faithful", faithful)
    decay = _setting(decay, faithful, published=0.99, repaired=0.98)
    settled = 1 - validate.scalar(name, "decay", decay, low=0, high=1, open_high=True)
    ratio = _setting(ratio, faithful, published=1.04, repaired=4.0)
    ratio = validate.scalar(name, "ratio", ratio, low=1, open_low=True)
    warmup = validate.integer(name, "warmup", warmup, low=1)
    max_norm = validate_scope_and_cap(name, scope, _setting(max_norm, faithful, published=1.0, repaired=None))
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> AdaGCState:
        shape = scope_shape(params, scope)
        return AdaGCState(adagc_level=jnp.zeros(shape, jnp.float32), adagc_seen=jnp.zeros(shape, jnp.int32))

    def judge(
        statistics: GradientStatistics, state: AdaGCState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, AdaGCState]:
        del params, extra
        seen = observe(name, statistics, scope, state.adagc_seen)
        if faithful:
            whole = observe(name, statistics, "tree", jnp.zeros(()))
            log_scale, level = _adagc_faithful(seen, state, ratio, settled, warmup, whole, max_norm, scope)
        else:
            log_scale, level = _adagc_repaired(seen, state, ratio, settled)
        scale = bounded_scale(seen, log_scale, None if faithful else max_norm)
        new = AdaGCState(adagc_level=level, adagc_seen=next_step(state.adagc_seen))
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def _zclip_repaired(
    x: jax.Array, state: ZClipState, passes: Any, clip_factor: Any, settled: Any, z_threshold: Any
) -> tuple[jax.Array, ZClipState]:
    limit, settled = number(z_threshold), number(settled)
    first = state.zclip_seen == 0
    mean = jnp.where(first, x, state.zclip_mean)
    deviation = jnp.maximum(jnp.sqrt(state.zclip_variance), _NARROWEST)
    spike, target = passes(x, mean, deviation, (x - mean) / deviation, lambda norm: norm + jnp.log(number(clip_factor)))
    learnt = jnp.clip(x, mean - limit * deviation, mean + limit * deviation)
    weight = jnp.maximum(settled, 1 / (state.zclip_seen.astype(jnp.float32) + 1))
    new_mean = mean + weight * (learnt - mean)
    # Around the old mean, and at no more than the settled weight: a young variance fed with spikes explodes by itself.
    variance = state.zclip_variance + settled * (jnp.square(learnt - mean) - state.zclip_variance)
    new = ZClipState(
        zclip_mean=new_mean,
        zclip_variance=jnp.where(first, state.zclip_variance, variance),
        zclip_seen=next_step(state.zclip_seen),
    )
    return jnp.where(spike, target - x, 0), new


def _zclip_faithful(
    log_norm: jax.Array,
    state: ZClipState,
    passes: Any,
    clip_factor: Any,
    settled: Any,
    max_norm: Any,
    warmup: int,
    skip_update_on_spike: bool,
) -> tuple[jax.Array, ZClipState]:
    x = jnp.minimum(jnp.exp(log_norm), _LARGEST)
    n, mean, deviation = state.zclip_seen, state.zclip_mean, jnp.sqrt(state.zclip_variance)
    young = n < warmup
    z = (x - mean) / (deviation + _EPS)
    spike, target = passes(x, mean, deviation, z, lambda norm: norm * number(clip_factor))
    spike = spike & ~young
    clipped = jnp.where(spike, target, x)
    # In the warm-up the mean and population variance of all norms so far, after it moving ones of what passed.
    weight = jnp.where(young, 1 / (n.astype(jnp.float32) + 1), number(settled))
    new_mean = mean + weight * (clipped - mean)
    square = jnp.where(young, (clipped - new_mean) * (clipped - mean), jnp.square(clipped - new_mean))
    variance = state.zclip_variance + weight * (square - state.zclip_variance)
    new = ZClipState(zclip_mean=new_mean, zclip_variance=variance, zclip_seen=next_step(n))
    if skip_update_on_spike:
        new = keep_unless(~spike, new, state)
    cap = jnp.clip(number(max_norm), 0, 3e38)
    bound = jnp.where(young, cap, jnp.minimum(clipped, cap))
    scale = jnp.where(young | (bound < x), jnp.minimum(bound, x + _EPS) / (x + _EPS), 1)
    return jnp.log(jnp.maximum(scale, 1e-37)), new


def _zclip_passes(
    x: jax.Array,
    mean: jax.Array,
    deviation: jax.Array,
    z: jax.Array,
    times: Any,
    *,
    limit: jax.Array,
    mode: Mode,
) -> tuple[jax.Array, jax.Array]:
    """Whether x is a spike, and what passes of it if it is; `times` multiplies a norm by the clip factor."""
    if mode == "percentile":
        threshold = mean + deviation * limit
        return x > threshold, threshold
    spike = z > limit
    return spike, mean if mode == "mean" else times(mean + deviation * jnp.square(limit) / jnp.where(spike, z, 1))


def _adagc_repaired(seen: Observation, state: AdaGCState, ratio: Any, settled: Any) -> tuple[jax.Array, jax.Array]:
    level = jnp.where(state.adagc_seen == 0, seen.log_norm, state.adagc_level)
    residual = seen.log_norm - level
    weight = jnp.maximum(number(settled), 1 / (state.adagc_seen.astype(jnp.float32) + 1))
    log_ratio = jnp.log(number(ratio))
    return log_ratio - residual, level + weight * jnp.minimum(residual, log_ratio)


def _adagc_faithful(
    seen: Observation,
    state: AdaGCState,
    ratio: Any,
    settled: Any,
    warmup: int,
    whole: Observation,
    max_norm: Any,
    scope: Scope,
) -> tuple[jax.Array, jax.Array]:
    """All in logarithms, which neither overflow nor vanish; the 1e-6 is added to the norms under a division alone."""
    young, log_ratio = state.adagc_seen < warmup, jnp.log(number(ratio))
    cap = jnp.log(jnp.clip(number(max_norm), 0, 3e38))
    absolute = jnp.clip(cap - _plus_eps(whole.log_norm), _SMALLEST_LOG, 0)
    # Their leaves are measured after the clip, the whole gradient is not.
    clipped = seen.log_norm + (absolute if scope == "leaf" else jnp.clip(cap - whole.log_norm, _SMALLEST_LOG, 0))
    smallest = jnp.where(state.adagc_seen == 0, clipped, jnp.minimum(state.adagc_level, clipped))
    residual = seen.log_norm - state.adagc_level
    relative = jnp.where(residual > log_ratio, log_ratio + state.adagc_level - _plus_eps(seen.log_norm), 0)
    # c <- decay c + (1 - decay) min(||g||, ratio c)
    growth = jnp.expm1(jnp.minimum(residual, log_ratio))
    average = state.adagc_level + jnp.log1p(number(settled) * growth)
    return jnp.where(young, absolute, relative), jnp.where(young, smallest, average)


def _plus_eps(log_norm: jax.Array) -> jax.Array:
    return jnp.logaddexp(log_norm, jnp.log(number(_EPS)))


def _at(ordered: jax.Array, rank: jax.Array) -> jax.Array:
    """The number at a fractional rank, interpolated linearly as `numpy.percentile` does."""
    low = jnp.floor(rank).astype(jnp.int32)
    high = jnp.ceil(rank).astype(jnp.int32)
    part = rank - jnp.floor(rank)
    return ordered[low] + part * (ordered[high] - ordered[low])


def _setting(given: Any, faithful: bool, *, published: Any, repaired: Any) -> Any:
    """What was given, else the default of the form."""
    return given if given is not None else published if faithful else repaired

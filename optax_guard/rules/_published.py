"""Rules as their authors wrote them, to compare with the papers and with the rules that fix their faults.

===============  ===========================================  ========================================================
Function         Threshold                                    Faults
===============  ===========================================  ========================================================
`zclip`          mean + z standard deviations of the norm     a lasting rise is never followed
`autoclip`       a percentile of all norms so far             scales 90 % of all steps, and reacts ever more slowly
`adagc`          1.04 times every leaf's own moving average   scales three steps in four; follows a doubling in 1700
`skip_spikes`    mean + 6 standard deviations of 128 values   one spike hides the next; one NaN refuses 128 steps
===============  ===========================================  ========================================================

They follow the authors' code down to the place of every epsilon, with the authors' settings as defaults, or the paper
if there is no code. They differ in two ways: no state ever holds a NaN, and every history has a fixed size. For
training, use the functions of the same names in `optax_guard`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import next_step
from optax_guard._common.series import RawSeries, empty_raw_series, push_raw, raw_threshold
from optax_guard._common.typing import AxisName, PyTree, Scope
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard.rules._adaptive import (
    AdaGCState,
    AutoClipState,
    Mode,
    ZClipState,
    empty_autoclip_state,
    spike_and_target,
)
from optax_guard.rules._skip import Signal, judged_loss, signals_of
from optax_guard.rules._window import (
    Observation,
    at_rank,
    bounded_scale,
    keep_unless,
    number,
    observe,
    push,
    scope_shape,
    sorted_window,
)

__all__ = ["PublishedSpikeState", "adagc", "autoclip", "skip_spikes", "zclip"]

_LARGEST = 1e18  # a norm that can be squared in float32
_LARGEST_LOG = 88.0  # the largest logarithm of a float32
_SMALLEST_LOG = -200.0  # the smallest logarithm of a scale: 0 in float32, but still a finite number in the state
_EPS = 1e-6  # the authors of all three clips add this to the norm by which they divide


class PublishedSpikeState(NamedTuple):
    """The history of `published.skip_spikes`, with a row for each judged signal, the loss before the norm."""

    published_spike_window: jax.Array  # f32[signals, window]: the last values, as a ring buffer
    published_spike_total: jax.Array  # i32[signals]: the number of values, or the place in the ring once it is full


# ZClip


def zclip(
    z_threshold: float = 2.5,
    *,
    mode: Mode = "reciprocal",
    clip_factor: float = 1.0,
    decay: float = 0.97,
    max_norm: float = 1.0,
    warmup: int = 25,
    skip_update_on_spike: bool = False,
    axis_name: AxisName | None = None,
) -> Rule:
    """Scale down a gradient whose norm is more than `z_threshold` deviations above its moving mean (ZClip).

    x = ||g||,   z = (x - mean) / (deviation + 1e-6)
    where z > z_threshold, p =   clip_factor * (mean + deviation * z_threshold^2 / z)        "reciprocal"
                                 mean                                                        "mean"
    where x exceeds it, p =      mean + deviation * z_threshold                              "percentile"
    elsewhere p = x
    g <- g * min(1, min(p, max_norm) / (x + 1e-6))                                           if min(p, max_norm) < x
    mean <- decay * mean + (1 - decay) * p,   variance <- decay * variance + (1 - decay) * (p - mean)^2

    The first `warmup` norms set the mean and the variance, and are clipped only to `max_norm`.

    Faults:
      - A lasting rise is never followed, since the history is updated with the scaled norm p.
      - After constant norms the deviation is 0, and the smallest increase is clipped.
      - With steady noise, up to 8 % of the steps are scaled, and with `max_norm` = 1 every step whose norm exceeds 1.

    =====================  =====================================================
    Case                   Result
    =====================  =====================================================
    first `warmup` steps   clipped to `max_norm`
    zero, empty tree       unchanged, and no field changes
    NaN or Inf anywhere    zeros outside a guard, held under `guard`; no field
                           changes
    =====================  =====================================================

    Args:
      z_threshold: the threshold in standard deviations, > 0; a number or a 0-d array.
      mode: what a step above the threshold is scaled to. The paper prefers "reciprocal".
      clip_factor: a factor in (0, 1], a number or a 0-d array; used only in mode "reciprocal".
      decay: the decay of the moving mean and variance, in [0, 1).
      max_norm: a bound on the norm at every step, >= 0, inf for none.
      warmup: the number of norms before the first judgement, >= 2.
      skip_update_on_spike: whether a step above the threshold leaves the mean and the variance unchanged.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list `mode`, `warmup` and `skip_update_on_spike` in `static_args`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> clip = zclip(warmup=3, max_norm=jnp.inf)
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.10 0.90 1.00 1.00

    References:
      Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025, arXiv 2504.02507, and
      the authors' code. Deviations: non-finite and zero norms do not enter the history; norms count as at most 1e18.

    See Also:
      `optax_guard.zclip`, which fixes the faults.
    """
    name = "published.zclip"
    z_threshold = validate.scalar(name, "z_threshold", z_threshold, low=0, open_low=True)
    validate.one_of(name, "mode", mode, Mode)
    clip_factor = validate.scalar(name, "clip_factor", clip_factor, low=0, high=1, open_low=True)
    settled = 1 - validate.scalar(name, "decay", decay, low=0, high=1, open_high=True)
    max_norm = validate.scalar(name, "max_norm", max_norm, low=0, infinite=True)
    warmup = validate.integer(name, "warmup", warmup, low=2)
    skip_update_on_spike = validate.boolean(name, "skip_update_on_spike", skip_update_on_spike)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> ZClipState:
        del params
        return ZClipState(
            zclip_mean=jnp.zeros((), jnp.float32),
            zclip_variance=jnp.zeros((), jnp.float32),
            zclip_seen=jnp.zeros((), jnp.int32),
        )

    def judge(
        statistics: GradientStatistics, state: ZClipState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, ZClipState]:
        del params, extra
        seen = observe(name, statistics, "tree", state.zclip_seen)
        x = jnp.minimum(jnp.exp(seen.log_norm), _LARGEST)
        mean, deviation = state.zclip_mean, jnp.sqrt(state.zclip_variance)
        young = state.zclip_seen < warmup
        z = (x - mean) / (deviation + _EPS)
        spike, target = spike_and_target(x, mean, deviation, z, number(z_threshold), mode)
        if mode == "reciprocal":
            target = target * number(clip_factor)
        spike = spike & ~young
        passed = jnp.where(spike, target, x)
        new = _zclip_learnt(state, passed, young, number(settled))
        if skip_update_on_spike:
            new = keep_unless(~spike, new, state)
        cap = jnp.clip(number(max_norm), 0, 3e38)
        bound = jnp.where(young, cap, jnp.minimum(passed, cap))
        scale = jnp.where(young | (bound < x), jnp.minimum(bound, x + _EPS) / (x + _EPS), 1)
        scale = bounded_scale(seen, jnp.log(jnp.maximum(scale, 1e-37)), max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    judge.__qualname__ = name
    return rule(init, judge, axis_name=axis_name)


def _zclip_learnt(state: ZClipState, passed: jax.Array, young: jax.Array, settled: jax.Array) -> ZClipState:
    """The mean and population variance of all norms during warm-up; afterwards moving ones of the scaled norms."""
    weight = jnp.where(young, 1 / (state.zclip_seen.astype(jnp.float32) + 1), settled)
    mean = state.zclip_mean + weight * (passed - state.zclip_mean)
    square = jnp.where(young, (passed - mean) * (passed - state.zclip_mean), jnp.square(passed - mean))
    variance = state.zclip_variance + weight * (square - state.zclip_variance)
    return ZClipState(zclip_mean=mean, zclip_variance=variance, zclip_seen=next_step(state.zclip_seen))


# AutoClip


def autoclip(percentile: float = 10.0, window: int = 1000, *, axis_name: AxisName | None = None) -> Rule:
    """Scale the gradient down to a low percentile of the norms so far (AutoClip).

    g <- g * min(1, P_percentile(||g_1||, ..., ||g_n||) / (||g_n|| + 1e-6))          including the current norm, g_n

    Faults:
      - With the authors' percentile, nine steps in ten are scaled down: it normalises more than it clips.
      - The longer the history, the less it reacts to a lasting change.

    =====================  =====================================================
    Case                   Result
    =====================  =====================================================
    first step             times ||g|| / (||g|| + 1e-6), like every other step
    zero, empty tree       unchanged, and no field changes
    NaN or Inf anywhere    zeros outside a guard, held under `guard`; no field
                           changes
    =====================  =====================================================

    Args:
      percentile: the percentile of the history, in (0, 100); a number or a 0-d array.
      window: the number of norms to remember, >= 1; static.
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
      1.00 1.01 0.90 0.93 0.94

    References:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation networks", 2020,
      arXiv 2007.14469, and the authors' code. Deviations: the history is limited to `window` norms, since its size must
      be fixed (in the paper it grows without bound; the authors' later package keeps 1000 by default); non-finite and
      zero norms do not enter the history.

    See Also:
      `optax_guard.autoclip`, which fixes the faults.
    """
    name = "published.autoclip"
    percentile = validate.scalar(name, "percentile", percentile, low=0, high=100, open_low=True, open_high=True)
    window = validate.integer(name, "window", window, low=1, high=validate.MILLION)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> AutoClipState:
        del params
        return empty_autoclip_state(window)

    def judge(
        statistics: GradientStatistics, state: AutoClipState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, AutoClipState]:
        del params, extra
        seen = observe(name, statistics, "tree", state.autoclip_seen)
        x = jnp.exp(jnp.minimum(seen.log_norm, _LARGEST_LOG))
        new = AutoClipState(
            autoclip_window=push(state.autoclip_window, state.autoclip_seen, x),
            autoclip_seen=next_step(state.autoclip_seen),
        )
        held = jnp.minimum(new.autoclip_seen, window)
        rank = number(percentile) / 100 * (held - 1).astype(jnp.float32)
        threshold = at_rank(sorted_window(new.autoclip_window, held), rank)
        scale = bounded_scale(seen, jnp.log(threshold / (x + _EPS)), None)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    judge.__qualname__ = name
    return rule(init, judge, axis_name=axis_name)


# AdaGC


def adagc(
    ratio: float = 1.04,
    *,
    decay: float = 0.99,
    scope: Scope = "leaf",
    max_norm: float = 1.0,
    warmup: int = 100,
    axis_name: AxisName | None = None,
) -> Rule:
    """Scale every leaf down to `ratio` times the moving average of its norm (AdaGC).

    g_i <- g_i * min(1, max_norm / (||g|| + 1e-6)),    c_i <- min(c_i, ||g_i||)               for `warmup` steps; then
    g_i <- g_i * ratio * c_i / (||g_i|| + 1e-6)        where ||g_i|| > ratio * c_i
    c_i <- decay * c_i + (1 - decay) * min(||g_i||, ratio * c_i)

    Faults:
      - Three steps in four are scaled.
      - The average grows by at most 0.04 % a step: a doubling is followed in 1700 steps.
      - Constant norms above `max_norm` are at first limited to 1.04 times the clipped norms of the warm-up.

    =======================  =====================================================
    Case                     Result
    =======================  =====================================================
    first `warmup` steps     the whole gradient is clipped to `max_norm`
    zero gradient or leaf    unchanged, and no field of it changes
    NaN or Inf in any leaf   zeros outside a guard, held under `guard`; no field
                             changes
    =======================  =====================================================

    Args:
      ratio: the limit relative to the average, > 1; a number or a 0-d array.
      decay: the decay of the moving average, in [0, 1).
      scope: "leaf" as in the paper, or "tree" (AdaGC-Global in the paper).
      max_norm: lambda_abs, the bound on the global norm during warm-up, >= 0, inf for none.
      warmup: the number of steps before the first judgement, >= 1.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list `scope` and `warmup` in `static_args`.

    Raises:
      ValueError: an argument is outside its range or, with `scope="leaf"`, the gradient and the parameters given to
        `init` differ in their number of leaves.

    Example:
      >>> clip = adagc(warmup=3, max_norm=jnp.inf)
      >>> state = clip.init([jnp.zeros(1), jnp.zeros(1)])
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update([jnp.array([size]), jnp.array([1.0])], state)
      ...     print(f"{updates[0][0]:.2f}", end=" ")
      1.00 1.10 0.90 0.94 0.94

    References:
      Wang, Li, et al., "AdaGC: improving training stability for large language model pretraining", 2025, arXiv
      2502.11034, algorithm 1, and the authors' code, whose settings are the defaults (the first version of the paper
      and ports to other libraries have 1.05 and 0.98). Deviations: non-finite steps and zero leaves neither enter the
      history nor count in the leaf's warm-up (a leaf that is zero during warm-up would be clipped to zero for ever).

    See Also:
      `optax_guard.adagc`, which fixes the faults.
    """
    name = "published.adagc"
    settled = 1 - validate.scalar(name, "decay", decay, low=0, high=1, open_high=True)
    ratio = validate.scalar(name, "ratio", ratio, low=1, open_low=True)
    validate.one_of(name, "scope", scope, Scope)
    max_norm = validate.scalar(name, "max_norm", max_norm, low=0, infinite=True)
    warmup = validate.integer(name, "warmup", warmup, low=1)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> AdaGCState:
        shape = scope_shape(params, scope)
        return AdaGCState(adagc_level=jnp.zeros(shape, jnp.float32), adagc_seen=jnp.zeros(shape, jnp.int32))

    def judge(
        statistics: GradientStatistics, state: AdaGCState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, AdaGCState]:
        del params, extra
        seen = observe(name, statistics, scope, state.adagc_seen)
        whole = observe(name, statistics, "tree", jnp.zeros(()))
        cap = jnp.log(jnp.clip(number(max_norm), 0, 3e38))
        absolute, smallest = _adagc_warm_up(seen, whole, state, cap, scope)
        relative, average = _adagc_settled(seen, state, number(settled), jnp.log(number(ratio)))
        young = state.adagc_seen < warmup
        new = AdaGCState(adagc_level=jnp.where(young, smallest, average), adagc_seen=next_step(state.adagc_seen))
        scale = bounded_scale(seen, jnp.where(young, absolute, relative), None)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    judge.__qualname__ = name
    return rule(init, judge, axis_name=axis_name)


def _adagc_warm_up(
    seen: Observation, whole: Observation, state: AdaGCState, cap: jax.Array, scope: Scope
) -> tuple[jax.Array, jax.Array]:
    """The scale and the smallest norm so far, as logarithms here and below, which do not overflow or vanish."""
    absolute = jnp.clip(cap - _plus_eps(whole.log_norm), _SMALLEST_LOG, 0)
    # The authors measure leaves after the clip, but the whole gradient before it.
    clipped = seen.log_norm + (absolute if scope == "leaf" else jnp.clip(cap - whole.log_norm, _SMALLEST_LOG, 0))
    return absolute, jnp.where(state.adagc_seen == 0, clipped, jnp.minimum(state.adagc_level, clipped))


def _adagc_settled(
    seen: Observation, state: AdaGCState, settled: jax.Array, log_ratio: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The scale and the average, c <- decay c + (1 - decay) min(||g||, ratio c)."""
    residual = seen.log_norm - state.adagc_level
    scale = jnp.where(residual > log_ratio, log_ratio + state.adagc_level - _plus_eps(seen.log_norm), 0)
    growth = jnp.expm1(jnp.minimum(residual, log_ratio))
    return scale, state.adagc_level + jnp.log1p(settled * growth)


def _plus_eps(log_norm: jax.Array) -> jax.Array:
    return jnp.logaddexp(log_norm, jnp.log(number(_EPS)))


# Skipping in OLMo-core, MaxText and Levanter


def skip_spikes(
    window: int = 128, deviations: float = 6.0, *, on: Signal = "auto", axis_name: AxisName | None = None
) -> Rule:
    """Hold every step whose loss or gradient norm is more than `deviations` standard deviations above its mean.

    skip if x > mean + deviations * std         of the last `window` values, for x = the loss, or x = ||g||_2

    The standard deviation is unbiased. Judging starts at half a window of values, including the one to be judged.

    Faults:
      - Refused values stay in the window: after a single spike A, everything below 0.54 A passes for `window` steps.
      - One NaN causes the next `window` steps to be refused.
      - With the default window, the first 63 steps are never refused.

    ===================================  ===========================================================
    Case                                 Result
    ===================================  ===========================================================
    first `window` / 2 - 1 steps         pass
    loss or gradient NaN or Inf          skipped, as are all steps while it is in the window
    constant history                     any larger value is a spike
    zero gradient                        a norm like any other
    no `value=`, `on` "auto" or "norm"   the norm alone is judged
    no `value=`, `on` "loss" or "both"   ValueError when traced
    ===================================  ===========================================================

    Args:
      window: the number of values to remember (>= 2).
      deviations: the distance of a spike from the mean, in standard deviations, > 0; a number or a 0-d array.
      on: "loss", "norm", "both", or "auto": both if the loss is passed as `value=`, else the norm.
      axis_name: as in `gradient_statistics`; the loss is averaged over the axis.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list all arguments except `deviations` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, or `value=` is needed but missing, or is not a scalar.

    Example:
      >>> skip = skip_spikes(window=8, on="loss")
      >>> gradient = jnp.ones(2)
      >>> state = skip.init(gradient)
      >>> for loss in [2.0, 2.1, 1.9, 2.2, 1.8]:
      ...     updates, state = skip.update(gradient, state, value=loss)
      >>> for loss in [20.0, 15.0]:
      ...     updates, state = skip.update(gradient, state, value=loss)
      ...     print(updates)
      [0. 0.]
      [1. 1.]

    References:
      OLMo-core, `SkipStepOptimizer`, 2024; MaxText, `skip_step_on_spikes`. Deviations: a skip selects instead of
      multiplying by 0, which would write NaN; NaN is stored as a code, so that the state stays finite, and refuses as
      many steps as a NaN would. Levanter's `skip_bad_steps` judges from 64 values on, by the population's standard
      deviation of the last `window` + 1 values, but at least 1e-6.

    See Also:
      `optax_guard.skip_spikes`, which fixes the faults.
    """
    name = "published.skip_spikes"
    window = validate.integer(name, "window", window, low=2, high=validate.MILLION)
    deviations = validate.scalar(name, "deviations", deviations, low=0, open_low=True)
    validate.one_of(name, "on", on, Signal)
    validate.axis_name(name, axis_name)
    signals = signals_of(on)

    def init(params: optax.Params) -> PublishedSpikeState:
        del params
        return _packed([empty_raw_series(window)] * len(signals))

    def judge(
        statistics: GradientStatistics, state: PublishedSpikeState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, PublishedSpikeState]:
        del params
        size, root = statistics.finite_norm_parts
        norm = jnp.where(jnp.all(statistics.finite), size * root, jnp.nan).astype(jnp.float32)
        values = {"loss": judged_loss(name, extra, on, axis_name), "norm": lax.stop_gradient(norm)}
        refused, after = jnp.zeros((), bool), []
        for index, signal in enumerate(signals):
            series = RawSeries(
                values=state.published_spike_window[index], values_total=state.published_spike_total[index]
            )
            x = values[signal]
            if x is not None:
                limit, judged = raw_threshold(series, deviations, unbiased=True, least=0.0, counts_itself=True)
                refused = refused | judged & ~(x <= limit)
                series = push_raw(series, x)
            after.append(series)
        return Verdict(scale=jnp.ones((), root.dtype), skip=refused), _packed(after)

    judge.__qualname__ = name
    return rule(init, judge, axis_name=axis_name)


def _packed(series: list[RawSeries]) -> PublishedSpikeState:
    rows: RawSeries = jax.tree.map(lambda *fields: jnp.stack(fields), *series)
    return PublishedSpikeState(published_spike_window=rows.values, published_spike_total=rows.values_total)

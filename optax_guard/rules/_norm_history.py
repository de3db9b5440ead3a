"""Clipping by history: bounds on the gradient that are learned from the run itself.

==========================  =========================================================================================
Function                    Use it
==========================  =========================================================================================
`clip_by_norm_history`      by default: as tight as the noise allows, never jumps, five numbers of state
`clip_by_median_norm`       if faults come in bursts or the norm jumps to new levels, and x8 may pass: two arguments,
                            hardly moved by a burst, follows a jump in half a window
`zclip` `autoclip` `adagc`  to compare with their papers
==========================  =========================================================================================

All are rules of `guard`, to be placed first or after a skip. They bound a step by the steps before it, so they need no
number in the gradient's units, and multiplying every gradient by a constant changes nothing. For the same reason they
cannot correct a learning rate that is too large, since then the whole history is large.

The history is kept in logarithms. Each rule obeys four laws, which its docstring states with numbers: a non-finite step
does not change the history; a burst of spikes of any size moves the threshold by a bounded factor; a lasting change is
followed; steady noise is left alone.
"""

from typing import Any, NamedTuple

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
    bounded_scale,
    keep_unless,
    number,
    observe,
    push,
    scope_shape,
    sorted_window,
    validate_scope_and_cap,
)

__all__ = ["MedianNormState", "NormHistoryState", "clip_by_median_norm", "clip_by_norm_history"]


_FIRST_FACTOR = 8.0  # the limit of the second norm, relative to the first
_FAR_WEIGHT = 0.1  # the weight of a norm beyond the margin in the spread; 1 left it x2 too wide for 200 steps


class NormHistoryState(NamedTuple):
    """The history of `clip_by_norm_history`: five numbers, or five for each leaf with `scope="leaf"`."""

    log_level: jax.Array  # f32[] or f32[n_leaves]: the logarithm of the usual norm
    log_spread: jax.Array  # f32[] or f32[n_leaves]: the mean absolute deviation of the log norm from the level
    log_threshold: jax.Array  # f32[] or f32[n_leaves]: the logarithm of the largest norm that the next step may have
    norms_seen: jax.Array  # i32[] or i32[n_leaves]: finite norms above 0 so far; while 0, nothing is judged
    touched_in_row: jax.Array  # i32[] or i32[n_leaves]: steps scaled in a row; long runs mean a rise or an explosion


class MedianNormState(NamedTuple):
    """The history of `clip_by_median_norm`."""

    log_window: jax.Array  # f32[window] or f32[n_leaves, window]: the last log norms, as a ring buffer
    window_seen: jax.Array  # i32[] or i32[n_leaves]: finite norms above 0 so far


def clip_by_norm_history(
    horizon: float = 100.0,
    *,
    deviations: float = 5.0,
    floor: float = 2.0,
    scope: Scope = "tree",
    max_norm: float | None = None,
    axis_name: AxisName | None = None,
) -> Rule:
    """Scale the gradient down to a threshold that follows the usual norm and its noise.

    x      = log ||g||
    r      = x - level,   margin = max(deviations * spread, log floor)        (of the steps before)
    g     <- g * exp(min(0, margin - r))                                 passes min(||g||, exp(level + margin))
    level  <- level + 6/horizon * clip(r, -1, 1)
    spread <- spread + w * (min(|r|, 1) - spread),   w = 0.5/horizon, a tenth of it where |r| > margin

    Start-up, after n norms: while 3/(n + 3) exceeds 6/horizon, level <- level + 3/(n + 3) * clip(r, -3, 2/3); w is at
    least 1/(n + 10); the margin starts at log 8; the first norm is the first level.

    Guarantees:
      - Law 1: a non-finite step changes no field. Outside a guard it gives zeros; under `guard` it is held.
      - Law 2: once settled, k steps in a row of any size raise the threshold by at most exp(8.5 k / horizon) (five:
        x1.53).
      - Law 3: a lasting change by x100 is followed (threshold within x2 of its final value) in about `horizon` steps:
        upwards in 64 at the median and 94 in the worst of 600 histories, downwards in 78 and 130.
      - Law 4: with steady noise up to a log deviation of 0.7, at most 1.2 % of the first 500 steps are scaled, as the
        mean of the noisiest kind (0.2 % over all kinds; of the first 20 steps, 2 to 5 % and 0.3 to 0.6 %).
      - The result has at most the norm exp(level + margin), up to 1e-5; a gradient that is not scaled is returned bit
        for bit.
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    ==================================  ==============================================================================
    Case                                Result
    ==================================  ==============================================================================
    first step                          passes, since there is nothing to judge it by; `max_norm` bounds it
    steps 2 to 20                       looser: up to five spikes raise the threshold by x17 in 2 % of the histories
    first 1 to 5 norms are spikes       threshold within x2 after 30 steps (worst 141)
    first norm too low                  scaled down for 9 steps (worst 13) if x0.01, for 68 (worst 75) if x1e-4
    zero gradient, empty tree           unchanged, and no field changes; the same for a zero leaf with `scope="leaf"`
    constant norms                      never scaled
    NaN or Inf in any leaf              zeros outside a guard, held under `guard`; no leaf's history changes
    norm above 8e37 * threshold         zero: the factor is below the smallest normal float32
    explosion                           slower than x1.06 a step (horizon = 100): followed and barely scaled;
                                        faster: limited to that rate, and `touched_in_row` in `metrics` shows it
    1 batch in 10 is rightly x10        always scaled down, since a recurring fault looks the same
    ==================================  ==============================================================================

    Args:
      horizon: the number of steps in which the threshold may rise or fall by x100, >= 10. This is the one trade-off:
        half the horizon follows twice as fast and lets twice as much of an explosion through (five spikes raise the
        threshold by x1.9 with 50 and by x1.2 with 200).
      deviations: the margin in mean absolute deviations of the log norm, > 0; 5 are four Gaussian standard deviations.
        With 4, 1.7 % of the steps of the noisiest kind are scaled; with 6, 0.5 %, but larger norms pass.
      floor: no norm below `floor` times the usual norm is scaled, > 1.
      scope: "tree" judges the norm of the whole gradient, "leaf" every leaf against its own history. With "leaf", the
        norms should develop alike: a leaf that starts near zero and grows x1000 in 20 steps is scaled down for tens of
        steps.
      max_norm: an additional bound on the norm at every step, >= 0, or None. It is the only protection at the first
        step. The history is updated with the norm before it is bounded. `horizon`, `deviations`, `floor` and `max_norm`
        may be 0-d arrays.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: an argument is outside its range or, with `scope="leaf"`, the gradient and the parameters given to
        `init` differ in their number of leaves.

    Example:
      >>> clip = clip_by_norm_history()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.10 0.90 6.12 1.00

    References:
      The rule is this library's own. The clipped residual is Huber's estimator of location as a moving average (Huber,
      "Robust estimation of a location parameter", 1964).

    See Also:
      `clip_by_median_norm`, which has two parameters, is hardly moved by a burst and lets x8 through;
      `clip_by_global_norm`, for a bound that you choose.
    """
    name = "clip_by_norm_history"
    horizon = validate.scalar(name, "horizon", horizon, low=10)
    deviations = validate.scalar(name, "deviations", deviations, low=0, open_low=True)
    floor = validate.scalar(name, "floor", floor, low=1, open_low=True)
    max_norm = validate_scope_and_cap(name, scope, max_norm)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> NormHistoryState:
        shape = scope_shape(params, scope)
        first_margin = jnp.log(_FIRST_FACTOR) / number(deviations)
        return NormHistoryState(
            log_level=jnp.zeros(shape, jnp.float32),
            log_spread=jnp.broadcast_to(first_margin, shape),
            log_threshold=jnp.zeros(shape, jnp.float32),
            norms_seen=jnp.zeros(shape, jnp.int32),
            touched_in_row=jnp.zeros(shape, jnp.int32),
        )

    def judge(
        statistics: GradientStatistics, state: NormHistoryState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, NormHistoryState]:
        del params, extra
        seen = observe(name, statistics, scope, state.norms_seen)
        first = state.norms_seen == 0
        threshold = jnp.where(first, seen.log_norm, state.log_threshold)
        touched = seen.log_norm > threshold
        n = state.norms_seen.astype(jnp.float32)
        speed = 6 / number(horizon)
        young = 3 / (n + 3)
        residual = seen.log_norm - state.log_level
        far = jnp.abs(residual) > threshold - state.log_level
        # Falls count more than rises during start-up: with a plain mean, one very low norm among the first few
        # throttled a run for hundreds of steps, and an initial spike was not forgotten.
        move = jnp.where(
            young > speed,
            young * jnp.clip(residual, -3, 2 / 3),
            speed * jnp.clip(residual, -1, 1),
        )
        level = jnp.where(first, seen.log_norm, state.log_level + move)
        weight = jnp.maximum(0.5 / number(horizon), 1 / (n + 10)) * jnp.where(far, _FAR_WEIGHT, 1.0)
        spread = state.log_spread + weight * (jnp.minimum(jnp.abs(residual), 1) - state.log_spread)
        spread = jnp.where(first, state.log_spread, spread)
        new = NormHistoryState(
            log_level=level,
            log_spread=spread,
            log_threshold=level + jnp.maximum(number(deviations) * spread, jnp.log(number(floor))),
            norms_seen=next_step(state.norms_seen),
            touched_in_row=jnp.where(touched, next_step(state.touched_in_row), 0),
        )
        scale = bounded_scale(seen, threshold - seen.log_norm, max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)


def clip_by_median_norm(
    factor: float = 8.0,
    window: int = 64,
    *,
    scope: Scope = "tree",
    max_norm: float | None = None,
    axis_name: AxisName | None = None,
) -> Rule:
    """Scale the gradient down to `factor` times the median of the last `window` norms.

    g <- g * min(1, factor * median(||g_1||, ..., ||g_n||) / ||g||)      of the last n <= window steps before

    Norms enter the window before they are bounded. The median is the lower median and never one of the five largest
    norms, so that a burst cannot become the median of a young window. From the eleventh norm on, it is simply the
    median.

    Guarantees:
      - Law 1: a non-finite step changes no field. Outside a guard it gives zeros; under `guard` it is held.
      - Law 2: up to window / 2 spikes of any size are outvoted, and up to five from the second step on. Five in a row
        raise the threshold by x1.05 at the median and x1.8 in the worst of 200 histories.
      - Law 3: a lasting change of any size is followed exactly after window / 2 + 1 steps.
      - Law 4: with steady noise up to a log deviation of 0.7, 1 % of the first 500 steps and 4 % of the first 20 are
        scaled (factor 8).
      - Multiplying all gradients by a constant changes no scale by more than 1e-4.

    =================================  =================================================================
    Case                               Result
    =================================  =================================================================
    first step                         passes, since there is nothing to judge it by; `max_norm` bounds it
    first 1 to 5 norms are spikes      forgotten after one usual norm
    first 6 or more norms are spikes   forgotten after as many usual norms
    first norm too low, by any factor  scaled down for 6 steps (worst 9)
    zero gradient, empty tree          unchanged, and no field changes; the same for a zero leaf with
                                       `scope="leaf"`
    constant norms                     never scaled
    NaN or Inf in any leaf             zeros outside a guard, held under `guard`; no history changes
    explosion                          held back for half a window, then released at once
    =================================  =================================================================

    Args:
      factor: the limit in medians, > 1: a number or a 0-d array. With 4, 3 % of the steps of noisy runs are scaled, and
        a fifth of the steps of networks that memorise their data.
      window: the number of norms to remember, >= 12; static.
      scope: "tree" judges the norm of the whole gradient, "leaf" every leaf against its own window (one batched sort).
      max_norm: an additional bound on the norm at every step, >= 0, or None.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: as for `clip_by_norm_history`.

    Example:
      >>> clip = clip_by_median_norm()
      >>> state = clip.init(jnp.zeros(2))
      >>> for size in (1.0, 1.1, 0.9, 1000.0, 1.0):
      ...     updates, state = clip.update(jnp.array([size, 0.0]), state)
      ...     print(f"{updates[0]:.2f}", end=" ")
      1.00 1.10 0.90 7.20 1.00

    References:
      The rule is this library's own.

    See Also:
      `clip_by_norm_history`, which is as tight as the noise allows and never releases an explosion at once; `autoclip`,
      which uses a percentile of the history.
    """
    name = "clip_by_median_norm"
    factor = validate.scalar(name, "factor", factor, low=1, open_low=True)
    window = validate.integer(name, "window", window, low=12, high=validate.MILLION)
    max_norm = validate_scope_and_cap(name, scope, max_norm)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> MedianNormState:
        shape = scope_shape(params, scope)
        return MedianNormState(
            log_window=jnp.zeros((*shape, window), jnp.float32), window_seen=jnp.zeros(shape, jnp.int32)
        )

    def judge(
        statistics: GradientStatistics, state: MedianNormState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, MedianNormState]:
        del params, extra
        seen = observe(name, statistics, scope, state.window_seen)
        held = jnp.minimum(state.window_seen, window)
        ordered = sorted_window(state.log_window, held)
        rank = jnp.clip((held - 1) // 2, 0, jnp.maximum(held - 1 - DISTRUSTED, 0))
        median = jnp.take_along_axis(ordered, rank[..., None], axis=-1)[..., 0]
        median = jnp.where(held == 0, seen.log_norm, median)
        new = MedianNormState(
            log_window=push(state.log_window, state.window_seen, seen.log_norm),
            window_seen=next_step(state.window_seen),
        )
        scale = bounded_scale(seen, median + jnp.log(number(factor)) - seen.log_norm, max_norm)
        return Verdict(scale=scale, skip=~seen.finite), keep_unless(seen.usable, new, state)

    return rule(init, judge, axis_name=axis_name)

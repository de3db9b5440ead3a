"""Skipping: rules that hold a step instead of scaling it.

=====================  ============================================================================
Function               Holds a step
=====================  ============================================================================
`skip_nonfinite`       with a NaN or Inf; for use without `guard`, which always does so
`skip_large`           whose gradient norm exceeds a fixed bound
`skip_spikes`          whose loss or gradient norm is far above its recent history
=====================  ============================================================================

Under `guard` a skipped step leaves no trace. In `optax.chain` a rule can only return zero updates, and what follows in
the chain still advances (Adam's moments decay, schedules count, weight decay acts). A rule that skips goes before the
rules that scale, since after a clip it would see only clipped norms.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.bounds import bound_and_state, init_for
from optax_guard._common.extra import loss_in
from optax_guard._common.series import Series, empty_series, push, threshold
from optax_guard._common.typing import AxisName, PyTree, ScalarOrSchedule
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics

__all__ = [
    "Signal",
    "SpikeState",
    "judged_loss",
    "signals_of",
    "skip_large",
    "skip_nonfinite",
    "skip_spikes",
]

Signal: TypeAlias = Literal["auto", "loss", "norm", "both"]

# A loss within 5 % of its level and a norm within x2 of its level are never spikes, however steady the history.
_LEAST_LOSS = 0.05
_LEAST_LOG_NORM = 0.6931472


class SpikeState(NamedTuple):
    """The history of `skip_spikes`, with a row for each judged signal: the loss, then the logarithm of the norm."""

    spike_accepted: jax.Array  # f32[signals, window]: the last values of steps that were not refused
    spike_recent: jax.Array  # f32[signals, 2 * accept_after - 1]: the last finite values
    spike_accepted_total: jax.Array  # i32[signals]: accepted values, or the place in the ring once it is full
    spike_recent_total: jax.Array  # i32[signals]


def skip_nonfinite(*, axis_name: AxisName | None = None) -> Rule:
    """Hold every step whose gradient has a NaN or an Inf anywhere.

    g <- g if all g_j are finite, else 0          (outside a guard; under `guard` the step leaves no trace)

    Guarantees:
      - Nothing non-finite passes.
      - A finite gradient is returned bit for bit, even if it is so large that its norm overflows.

    =====================  =====================================
    Case                   Result
    =====================  =====================================
    NaN or Inf anywhere    all zeros
    zero, empty tree       unchanged
    finite 1e30            unchanged (held under `guard`)
    =====================  =====================================

    Args:
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Example:
      >>> skip = skip_nonfinite()
      >>> grads = {"a": jnp.array([1.0, jnp.inf]), "b": jnp.array([2.0])}
      >>> skip.update(grads, skip.init(grads))[0]
      {'a': Array([0., 0.], dtype=float32), 'b': Array([0.], dtype=float32)}

    See Also:
      `optax.zero_nans`, which zeroes single NaNs and lets Inf pass.
    """
    validate.axis_name("skip_nonfinite", axis_name)

    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        del params, extra
        one = jnp.ones((), statistics.sum_squares.dtype)
        return Verdict(scale=one, skip=~jnp.all(statistics.finite)), state

    return rule(optax.identity().init, judge, axis_name=axis_name)


def skip_large(max_norm: ScalarOrSchedule, *, axis_name: AxisName | None = None) -> Rule:
    """Hold every step whose gradient norm exceeds `max_norm`.

    g <- g if ||g||_2 <= max_norm, else 0         (outside a guard; under `guard` the step leaves no trace)

    Guarantees:
      - No gradient that is non-finite or whose norm exceeds `max_norm` passes. Under `guard`, a finite one in every
        `patience` + 1 is let through, so that a bound set too low cannot stop a run.
      - A gradient within the bound is returned bit for bit.

    ==========================  =======================================
    Case                        Result
    ==========================  =======================================
    NaN or Inf anywhere         all zeros
    zero, empty tree            unchanged
    norm equal to `max_norm`    unchanged
    schedule or array below 0   as 0
    schedule or array NaN       all zeros, since no norm is within NaN
    ==========================  =======================================

    Args:
      max_norm: the bound on the L2 norm of the whole gradient, >= 0: a number, a 0-d array (traced or not), or a
        schedule of this rule's own step count.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: `max_norm` is negative, NaN or not a scalar.

    Example:
      >>> skip = skip_large(10.0)
      >>> skip.update(jnp.array([30.0, 40.0]), skip.init(jnp.zeros(2)))[0]
      Array([0., 0.], dtype=float32)

    See Also:
      `optax.skip_large_updates`, which works only through `optax.MultiSteps`.
    """
    max_norm = validate.scalar_or_schedule("skip_large", "max_norm", max_norm, low=0, infinite=True)
    validate.axis_name("skip_large", axis_name)

    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        del params, extra
        bound, state = bound_and_state(max_norm, state)
        norm = statistics.norm
        within = (norm <= bound.astype(norm.dtype)) & jnp.all(statistics.finite)
        return Verdict(scale=jnp.ones((), norm.dtype), skip=~within), state

    return rule(init_for(max_norm), judge, axis_name=axis_name)


def skip_spikes(
    window: int = 128,
    deviations: float = 6.0,
    *,
    on: Signal = "auto",
    accept_after: int = 8,
    axis_name: AxisName | None = None,
) -> Rule:
    """Hold every step whose loss or gradient norm is a spike relative to its own history.

    skip if x > limit for x = the loss, or x = log ||g||_2;  over the last `window` values of accepted steps

        limit = q50 + max(deviations * (q90 - q50) / 1.28 * (1 + 8 / n), least)

    with `least` = 5 % of |q50| for the loss and log 2 for the norm. If more than half of the last 2 * accept_after - 1
    values, accepted or not, lie above the limit, they are a new level and not a spike. The limit then becomes their
    median + max(deviations * 1.48 * MAD, the margin above).

    Guarantees:
      - Nothing that is not finite enters the history, and a non-finite loss or gradient does not change it.
      - Up to `accept_after` - 1 refused spikes within 2 * accept_after - 1 steps, of any size, do not change later
        limits.
      - A lasting rise of any size is followed after `accept_after` refused steps if the noise is small relative to it,
        which is fewer than the default `patience` of `guard`. Wide noise takes longer: x10 and x100 are followed within
        19 (norm) or 29 (loss) refused steps in the worst of 800 histories. A lasting fall is followed within `window`
        steps, and none is refused.
      - With steady noise (log-sd up to 0.7), at most 0.3 % of healthy steps are refused by the norm and 0.7 % by the
        loss, from the first step on. With a loss whose tails are so long that published rules refuse 0.8 %, 1.5 % are
        refused. The first 2 * accept_after - 1 steps (15) are never refused.
      - Verdicts do not change if all norms, or all losses, are multiplied by a constant.

    ===================================  ==========================================================================
    Case                                 Result
    ===================================  ==========================================================================
    first 2 * accept_after - 1 steps     pass; spikes among them widen the limit until `window` values are clean
    loss NaN or Inf (if it is judged)    skipped; under `guard` held, counted as non-finite and never let through
    gradient NaN or Inf                  skipped; no history changes
    finite 1e30                          judged like any other
    constant history                     a loss more than 5 % above it and a norm more than x2 are spikes
    history of zeros                     losses of 0 have no scale, so nothing is refused; a norm of 0 is not recorded
    no `value=`, `on` "auto" or "norm"   the norm alone is judged
    no `value=`, `on` "loss" or "both"   ValueError when traced
    ===================================  ==========================================================================

    Args:
      window: the number of accepted values to remember (>= 2).
      deviations: the distance of a spike from the history, in deviations, > 0; a number or a 0-d array.
      on: "loss", "norm", "both", or "auto": both if the loss is passed as `value=`, else the norm.
      accept_after: the number of steps in a row after which a rise counts as a new level (>= 1).
      axis_name: as in `gradient_statistics`; the loss is averaged over the axis.

    Returns:
      A `Rule`. Under `optax.inject_hyperparams`, list all arguments except `deviations` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, or `value=` is needed but missing, or is not a scalar.

    Example:
      >>> skip = skip_spikes(on="loss")
      >>> gradient = jnp.ones(2)
      >>> state = skip.init(gradient)
      >>> for loss in [2.0, 2.1, 1.9, 2.2, 1.8] * 4:
      ...     updates, state = skip.update(gradient, state, value=loss)
      >>> skip.update(gradient, state, value=20.0)[0]
      Array([0., 0.], dtype=float32)

    References:
      OLMo-core, `SkipStepOptimizer`, 2024; Levanter, `skip_bad_steps`; MaxText, `skip_step_on_spikes`. Deviations:
      quantiles instead of the mean and standard deviation, the logarithm of the norm, refused values kept out of the
      history, `accept_after`, and judging from 15 values on instead of 63.

    See Also:
      `published.skip_spikes`, the rule as published; `skip_large`, for a bound that is known beforehand.
    """
    name = "skip_spikes"
    window = validate.integer(name, "window", window, low=2, high=validate.MILLION)
    accept_after = validate.integer(name, "accept_after", accept_after, low=1, high=validate.MILLION)
    deviations = validate.scalar(name, "deviations", deviations, low=0, open_low=True)
    validate.one_of(name, "on", on, Signal)
    validate.axis_name(name, axis_name)
    signals = signals_of(on)

    def init(params: optax.Params) -> SpikeState:
        del params
        return _packed([empty_series(window, accept_after)] * len(signals))

    def judge(
        statistics: GradientStatistics, state: SpikeState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, SpikeState]:
        del params
        loss = judged_loss(name, extra, on, axis_name)
        size, root = statistics.finite_norm_parts
        log_norm = lax.stop_gradient((jnp.log(size) + jnp.log(root)).astype(jnp.float32))
        finite = jnp.all(statistics.finite)
        seen = {"norm": finite & (root > 0)}
        values = {"norm": jnp.where(finite, log_norm, jnp.nan)}
        if loss is not None:
            values["loss"], seen["loss"] = loss, finite
        known = jnp.isfinite(loss) if loss is not None else jnp.ones((), bool)
        series = dict(zip(signals, _unpacked(state), strict=True))
        used = [signal for signal in signals if signal in values]
        refused = ~known | ~finite
        for signal in used:
            least = _LEAST_LOSS if signal == "loss" else _LEAST_LOG_NORM
            limit = threshold(series[signal], deviations, least, relative=signal == "loss")
            refused = refused | (values[signal] > limit)
        for signal in used:
            series[signal] = push(series[signal], values[signal], values[signal], ~refused, seen[signal] & known)
        # A loss that is not finite gives a scale of NaN, so that `guard` counts the step as non-finite.
        scale = jnp.where(known, 1, jnp.nan).astype(root.dtype)
        return Verdict(scale=scale, skip=refused), _packed(list(series.values()))

    return rule(init, judge, axis_name=axis_name)


def signals_of(on: Signal) -> tuple[str, ...]:
    """The signals that have a history, in the order of the state's rows."""
    return ("loss", "norm") if on in ("auto", "both") else (on,)


def judged_loss(name: str, extra: dict[str, Any], on: Signal, axis_name: AxisName | None) -> jax.Array | None:
    """The loss, if there is one and `on` judges it; raises if it is required but missing."""
    loss = loss_in(name, extra, axis_name)
    if loss is None and on in ("loss", "both"):
        raise ValueError(f"{name}: `on` {on!r} judges the loss; pass it to `update` or `apply_gradients` as `value=`.")
    return None if loss is None or on == "norm" else lax.stop_gradient(loss.astype(jnp.float32))


def _packed(series: list[Series]) -> SpikeState:
    rows: Series = jax.tree.map(lambda *fields: jnp.stack(fields), *series)
    return SpikeState(
        spike_accepted=rows.accepted,
        spike_recent=rows.recent,
        spike_accepted_total=rows.accepted_total,
        spike_recent_total=rows.recent_total,
    )


def _unpacked(state: SpikeState) -> list[Series]:
    return [
        Series(
            accepted=state.spike_accepted[i],
            recent=state.spike_recent[i],
            accepted_total=state.spike_accepted_total[i],
            recent_total=state.spike_recent_total[i],
        )
        for i in range(state.spike_accepted.shape[0])
    ]

"""The one line that most people need.

=============================================  =====================================================================
You want                                       Take
=============================================  =====================================================================
faults and spikes in the data held or clipped  `stabilize(optimizer)`
a hard bound on the gradient's norm, too       `stabilize(optimizer, max_norm=1.0)`
a learning rate that may be too large          `stabilize(optimizer, max_change=0.01)`
a run that nobody watches                      `stabilize(optimizer, recovery=(reset_moments(), back_off(), rewind()))`
=============================================  =====================================================================

It goes where `guard` goes: around the whole optimizer, inside `accumulate`.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.tree import check_has_params, resolve_mask
from optax_guard._common.typing import AxisName, Mask, PyTree, ScalarOrSchedule
from optax_guard._guard import guarded
from optax_guard._step.act import as_transformation
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard.recovery._ladder import Rung
from optax_guard.rules._norm_history import clip_by_norm_history
from optax_guard.rules._skip import skip_spikes
from optax_guard.rules._window import validate_scope_and_cap
from optax_guard.transforms._update_bounds import limit_step

__all__ = ["stabilize"]


def stabilize(
    inner: optax.GradientTransformation,
    *,
    max_norm: float | None = None,
    max_change: ScalarOrSchedule | None = None,
    horizon: float = 400.0,
    recovery: tuple[Rung, ...] = (),
    patience: int = 10,
    halt_after: int = 50,
    recorder_rows: int = 256,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Guards an optimizer against the three ways in which a run blows up: faults, spikes, steps that are too long.

    guard(chain(inner, limit_step(max_change)), skip_spikes(on="loss"), clip_by_norm_history(horizon, max_norm))

      - a gradient that is not finite, and a loss that is not, hold the step;
      - a loss far above its own history holds the step, where it is passed as `value=`; without it nothing is missed
        but this;
      - a norm far above its own history is clipped to the edge of it, and to `max_norm`, if that is given;
      - with `max_change`, no step changes the parameters by more than that share of their norm: the one medicine
        against a learning rate that is too large, which no clip relative to the history can be.

    Guarantees:
      - Those of `guard`: nothing non-finite is ever applied, a held step leaves no trace, a flight recorder runs along.
      - Until a rule acts, and while steps are within `max_change`, the result equals that of `inner` up to the
        rounding of single operations, as under `guard`.

    ===========================================  ===================================================================
    Case                                         Result
    ===========================================  ===================================================================
    no `value=`                                  no skip of spikes in the loss; everything else
    a lasting change of level, of loss or norm   followed: after 8 refused steps, and within about `horizon` steps
    first steps                                  the loss is judged from the 16th, the norm from the 2nd on;
                                                 `max_norm` bounds the first
    fixed learning rate, far too large           lives with `max_change`; without it, finite but useless
    ===========================================  ===================================================================

    In the flight log rule 0 is the skip of spikes and rule 1 the clip.

    Args:
      inner: any Optax transformation: SGD, Adam, Lion, Adafactor, Muon, chains with schedules and weight decay.
      max_norm: also a fixed bound (> 0) on the gradient's norm, as of `clip_by_global_norm`.
      max_change: bound on the norm of a step relative to that of the parameters (>= 0): a number, a 0-d array or a
        schedule. Begin with 0.01, which did well on every task of StabilityBench; 0.001 to 0.003 was better for some
        recurrent nets. Halve or double it like a learning rate. None leaves steps as they are, at no cost; with it the
        update is written out and read once more.
      horizon: steps in which the norm's history follows a change by x100 (see `clip_by_norm_history`), four times as
        many as that rule's own default: with 100 an explosion of 5 % a step is followed and hardly touched. In
        StabilityBench the slower one lost a sixth as much to it, and nothing elsewhere.
      recovery: rungs of the ladder, as for `guard`.
      patience: as for `guard`.
      halt_after: as for `guard`.
      recorder_rows: rows of the flight recorder.
      mask: which leaves are trained, as for `guard`; `max_change` is relative to these alone.
      axis_name: as in `gradient_statistics`.

    Returns:
      A transformation for `apply_gradients` and for anything that takes an Optax one.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> import optax_guard as og
      >>> tx = og.stabilize(optax.adam(1e-2))
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> for size in (1.0, 1.1, jnp.nan, 1e6):
      ...     params, state = og.apply_gradients(tx, {"w": jnp.full(2, size)}, state, params)
      >>> [str(event) for event in og.flight_log(state)["event"]]
      ['applied', 'applied', 'nonfinite', 'clipped']

    See Also:
      `guard`, to choose the rules oneself.
    """
    name = "stabilize"
    inner = as_transformation(name, inner, "inner")
    validate.scalar(name, "horizon", horizon, low=10)
    validate_scope_and_cap(name, "tree", max_norm)
    if max_change is not None:
        validate.scalar_or_schedule(name, "max_change", max_change, low=0, infinite=True)
        limit = _max_change(max_change, axis_name)
        if isinstance(mask, str):
            limit = optax.masked(limit, lambda tree: resolve_mask("stabilize", mask, tree))
        elif mask is not None:
            limit = optax.masked(limit, mask)
        inner = optax.chain(inner, limit)
    rules = _skip_loss_spikes(axis_name), clip_by_norm_history(horizon, max_norm=max_norm, axis_name=axis_name)
    return guarded(
        name,
        "inner",
        inner,
        rules,
        recovery=recovery,
        patience=patience,
        halt_after=halt_after,
        recorder_rows=recorder_rows,
        mask=mask,
        check_updates=None,
        axis_name=axis_name,
    )


def _max_change(max_change: Any, axis_name: AxisName | None) -> optax.GradientTransformationExtraArgs:
    """`limit_step`, which names `stabilize` where the parameters are missing."""
    limit = limit_step(max_change, axis_name=axis_name)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        check_has_params("stabilize", params, "`max_change`")
        return limit.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(limit.init, update)


def _skip_loss_spikes(axis_name: AxisName | None) -> Rule:
    """`skip_spikes(on="loss")` that has no opinion where there is no loss, instead of asking for it."""
    skip = skip_spikes(on="loss", axis_name=axis_name)

    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        if extra.get("value") is None:
            return Verdict(scale=jnp.ones((), statistics.sum_squares.dtype), skip=jnp.zeros((), bool)), state
        return skip.judge(statistics, state, params, **extra)

    return rule(skip.init, judge, axis_name=axis_name)

"""`stabilize`: the one line that most people need.

=============================================  =====================================================================
You want                                       Use
=============================================  =====================================================================
faults and spikes in the data held or clipped  `stabilize(optimizer)`
a hard bound on the gradient norm as well      `stabilize(optimizer, max_norm=1.0)`
protection from too large a learning rate      `stabilize(optimizer, max_change=0.01)`
an unattended run                              `stabilize(optimizer, recovery=(reset_moments(), back_off(), rewind()))`
=============================================  =====================================================================

Like `guard`, it goes around the whole optimizer and inside `accumulate`.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.tree import check_has_params, resolve_mask
from optax_guard._common.typing import AxisName, Mask, PyTree, ScalarOrSchedule
from optax_guard._guard import Settings, guarded
from optax_guard._step.act import as_transformation
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard.recovery._ladder import Rung
from optax_guard.recovery._start import Start
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
    """Guards an optimizer against three failure modes: faults, spikes, and steps that are too long.

    guard(chain(inner, limit_step(max_change)), skip_spikes(on="loss"), clip_by_norm_history(horizon, max_norm))

    The three failure modes and what fixes each:

      - Faults: a step whose gradient or loss is not finite is held.
      - Spikes: a step whose loss is far above its own history is held, if the loss is passed as `value=`. A gradient
        norm far above its own history is clipped to the limit of that history, and to `max_norm` if it is given.
      - Steps that are too long: with `max_change`, no step changes the parameters by more than that fraction of their
        norm. This is the only protection from a learning rate that is too large, since no clip relative to the history
        can provide it.

    Guarantees:
      - The guarantees of `guard` hold: nothing non-finite is ever applied, a held step leaves no trace, and a flight
        recorder keeps the last steps.
      - A first gradient that is far too large does not stop the run: if one of the first 16 norms that reached `inner`
        is followed by eight in a row below a thousandth of it, its moments and the rules' histories start anew with the
        next applied step, once per such row. Parameters stay as they are.
      - Until a rule acts, and while steps are within `max_change`, the result equals that of `inner` up to the
        rounding of single operations, as under `guard`.

    ===========================================  ===================================================================
    Case                                         Result
    ===========================================  ===================================================================
    no `value=`                                  loss spikes are not skipped; all else works
    a lasting change in the level of the loss    followed after 8 refused steps
    a lasting change in the level of the norm    followed within about `horizon` steps
    first steps                                  the loss is judged from the 16th and the norm from the 2nd step on;
                                                 `max_norm` bounds the first
    first gradient, or several, 1e6 times        the first one passes; its effect on moments and histories is undone
    too large                                    eight steps later (`reset_start` in the flight log); plain SGD has
                                                 moved the parameters by then: `max_change` bounds that
    healthy norms that fall x1000 within 24      the same, harmless: moments of much larger gradients are forgotten
    fixed learning rate, far too large           trains with `max_change`; without it, finite but useless
    ===========================================  ===================================================================

    In the flight log, rule 0 is the skip of loss spikes and rule 1 is the clip.

    Args:
      inner: any Optax transformation: SGD, Adam, Lion, Adafactor, Muon, chains with schedules and weight decay.
      max_norm: an additional fixed bound (> 0) on the gradient norm, as in `clip_by_global_norm`.
      max_change: a bound on the norm of a step relative to that of the parameters (>= 0): a number, a 0-d array or a
        schedule. Start with 0.01; for some recurrent networks 0.001 to 0.003 is better. Tune it like a learning rate,
        by factors of two. None leaves steps unchanged at no cost; a bound writes the update out and reads it once more.
      horizon: the number of steps in which the norm's history follows a change by x100 (see `clip_by_norm_history`).
        The default is four times that rule's own: with 100, an explosion of 5 % a step would be followed and hardly
        clipped.
      recovery: the rungs of the recovery ladder, as for `guard`.
      patience: as for `guard`.
      halt_after: as for `guard`.
      recorder_rows: the number of rows in the flight recorder.
      mask: which leaves are trained, as for `guard`; `max_change` is relative to these alone.
      axis_name: as in `gradient_statistics`.

    Returns:
      A transformation for `apply_gradients` and for anything that takes an Optax transformation.

    Raises:
      ValueError: a static argument is invalid.

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
      `guard`, to choose the rules yourself.
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
    if isinstance(recovery, (tuple, list)):  # else an error says so
        recovery = *recovery, Start()
    settings = Settings(recovery, patience, halt_after, recorder_rows, None, mask, axis_name)
    return guarded(name, inner, rules, settings)


def _max_change(max_change: Any, axis_name: AxisName | None) -> optax.GradientTransformationExtraArgs:
    """`limit_step`, whose error for missing parameters names `stabilize`."""
    limit = limit_step(max_change, axis_name=axis_name)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        check_has_params("stabilize", params, "`max_change`")
        return limit.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(limit.init, update)


def _skip_loss_spikes(axis_name: AxisName | None) -> Rule:
    """`skip_spikes(on="loss")` that never skips if no loss is passed, instead of raising an error."""
    skip = skip_spikes(on="loss", axis_name=axis_name)

    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        if extra.get("value") is None:
            return Verdict(scale=jnp.ones((), statistics.sum_squares.dtype), skip=jnp.zeros((), bool)), state
        return skip.judge(statistics, state, params, **extra)

    return rule(skip.init, judge, axis_name=axis_name)

"""`stabilize`: the one line that most people need.

=============================================  =====================================================================
You want                                       Use
=============================================  =====================================================================
faults and spikes in the data held or clipped  `stabilize(optimizer)`
a hard bound on the gradient norm as well      `stabilize(optimizer, max_norm=1.0)`
a hard bound on the step, too                  `stabilize(optimizer, max_change=0.01)`
an unattended run                              `stabilize(optimizer, recovery=(reset_moments(), back_off(), rewind()))`
=============================================  =====================================================================

Like `guard`, it goes around the whole optimizer and inside `accumulate`.
"""

from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.extra import with_names_of
from optax_guard._common.tree import check_has_params, find_states, resolve_mask
from optax_guard._common.typing import AxisName, Mask, PyTree, ScalarOrSchedule
from optax_guard._guard import BoundedState, Settings, guarded
from optax_guard._step.act import as_transformation
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics
from optax_guard.recovery._ladder import Rung
from optax_guard.recovery._start import Start
from optax_guard.rules._norm_history import clip_by_norm_history
from optax_guard.rules._skip import skip_spikes
from optax_guard.rules._window import validate_scope_and_cap
from optax_guard.transforms._proximal import ProximalState
from optax_guard.transforms._step_growth import limit_step_growth
from optax_guard.transforms._update_bounds import limit_step

__all__ = ["stabilize"]

MaxChange: TypeAlias = ScalarOrSchedule | Literal["gradual"] | None


def stabilize(
    inner: optax.GradientTransformation,
    *,
    max_norm: float | None = None,
    max_change: MaxChange = "gradual",
    horizon: float = 400.0,
    recovery: tuple[Rung, ...] = (),
    patience: int = 10,
    halt_after: int = 50,
    recorder_rows: int = 256,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Guards an optimizer against three failure modes: faults, spikes, and steps that are too long.

    guard(chain(inner, limit_step_growth()), skip_spikes(on="loss"), clip_by_norm_history(horizon, max_norm))

    The three failure modes and what fixes each:

      - Faults: a step whose gradient or loss is not finite is held.
      - Spikes: a step whose loss is far above its own history is held, if the loss is passed as `value=`. A gradient
        norm far above its own history is clipped to the limit of that history, and to `max_norm` if it is given.
      - Steps that are too long: no step changes the parameters by more than 1 % of their norm, unless the steps before
        have grown to where it is, as in a warm-up; a number as `max_change` bounds every step. This is the only
        protection from a learning rate that is too large, since no clip relative to the history can provide it.

    Guarantees:
      - The guarantees of `guard` hold: nothing non-finite is ever applied, a held step leaves no trace, and a flight
        recorder keeps the last steps.
      - A first gradient that is far too large does not stop the run: if one of the first 16 norms that reached `inner`
        is followed by eight in a row below a thousandth of it, its moments and the rules' histories start anew with the
        next applied step, once per such row. Parameters stay as they are.
      - Until a rule acts, and while steps are within the bound, the result equals that of `inner` up to the
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
    too large                                    eight steps later (`reset_start` in the flight log); the parameters
                                                 have moved by at most 1 % a step by then
    healthy norms that fall x1000 within 24      the same, harmless: moments of much larger gradients are forgotten
    fixed learning rate, far too large           bounded by 1 % a step, with which most nets train; some recurrent ones
                                                 need a number below 0.01 as `max_change`
    the same after a long warm-up                the bound has grown along; a number as `max_change` does not
    customary rate, no warm-up, first steps      bounded by 1 % until they ask for less: `limit_step_growth/bound_total`
    above 1 % (Muon, Adafactor)                  in `metrics` counts them; None if they were meant
    optimizer without parameters in `update`     an error, unless `max_change` is None
    `proximal_l1` and the like in `inner`        an error, unless `max_change` is None: a bound belongs inside them
    ===========================================  ===================================================================

    In the flight log, rule 0 is the skip of loss spikes and rule 1 is the clip.

    Args:
      inner: any Optax transformation: SGD, Adam, Lion, Adafactor, Muon, chains with schedules and weight decay.
      max_norm: an additional fixed bound (> 0) on the gradient norm, as in `clip_by_global_norm`.
      max_change: the bound on the norm of a step relative to that of the parameters. "gradual" is that of
        `limit_step_growth`: 0.01, or three times the average of the steps so far if that is more. A number >= 0, a 0-d
        array or a schedule is the hard bound of `limit_step`. With Adam's family 0.01 does no harm; for some recurrent
        networks 0.001 to 0.003 is better. Tune it like a learning rate, by factors of two. None leaves steps unchanged
        at no cost; either bound writes the update out and reads it once more.
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
      ValueError: a static argument is invalid, or `inner` takes a proximal step and the step is bounded.

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
        limit = _limit(max_change, axis_name)
        if isinstance(mask, str):
            limit = optax.masked(limit, lambda tree: resolve_mask("stabilize", mask, tree))
        elif mask is not None:
            limit = optax.masked(limit, mask)
        inner = _bounded(inner, limit)
    rules = _skip_loss_spikes(axis_name), clip_by_norm_history(horizon, max_norm=max_norm, axis_name=axis_name)
    if isinstance(recovery, (tuple, list)):  # else an error says so
        recovery = *recovery, Start()
    settings = Settings(recovery, patience, halt_after, recorder_rows, None, mask, axis_name)
    return guarded(name, inner, rules, settings)


def _bounded(inner: Any, limit: Any) -> optax.GradientTransformationExtraArgs:
    """`chain(inner, limit)`, whose state tells the optimizer's from the bound's, so that a guard can be taken away."""

    def init(params: optax.Params) -> BoundedState:
        state = inner.init(params)
        if find_states(state, ProximalState):
            raise ValueError(
                "stabilize: a bound on the step behind a proximal step keeps weights from being exactly zero. Put the "
                "bound inside and none outside, as in `stabilize(proximal_l1(chain(optimizer, limit_step_growth()), "
                "...), max_change=None)`."
            )
        return BoundedState(state, limit.init(params))

    def update(updates: PyTree, state: BoundedState, params: PyTree | None = None, **extra: Any) -> Any:
        updates, optimizer_state = inner.update(updates, state.optimizer_state, params, **extra)
        updates, bound_state = limit.update(updates, state.bound_state, params, **extra)
        return updates, BoundedState(optimizer_state, bound_state)

    return optax.GradientTransformationExtraArgs(init, with_names_of(inner, update))


def _limit(max_change: Any, axis_name: AxisName | None) -> optax.GradientTransformationExtraArgs:
    """The bound on the step, whose errors name `stabilize`."""
    if isinstance(max_change, str):
        if max_change != "gradual":
            expected = "'gradual', a number in [0, inf], a schedule or None"
            raise ValueError(f"stabilize: `max_change` must be {expected}; got {max_change!r}.")
        limit = limit_step_growth(axis_name=axis_name)
    else:
        validate.scalar_or_schedule("stabilize", "max_change", max_change, low=0, infinite=True)
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

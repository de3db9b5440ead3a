"""The rung `back_off`: scales updates down after trouble, and restores the scale over healthy steps."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.extra import loss_in, warn_of_misspellings
from optax_guard._common.parts import with_part
from optax_guard._common.transformation import transformation_with_extra
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.judge import scale_leaves
from optax_guard._step.observe import one_pass_statistics
from optax_guard.recovery._loss_watch import empty_watch, loss_above, watch_loss
from optax_guard.recovery._seen import Seen, Trouble

__all__ = ["BackOff", "BackOffState", "back_off", "empty_back_off", "reasons_to_back_off", "step_down", "step_up"]


class BackOffState(NamedTuple):
    """The state of `back_off`. The scale is factor ** (owed / recover_after)."""

    healthy_steps_owed: jax.Array  # i32[]: healthy steps until the scale is 1 again
    back_off_total: jax.Array  # i32[]: the number of reductions
    update_scale: jax.Array  # f32[]: the factor of the last update
    back_off_watch: Any  # LossWatch with `diverged` in a chain; else ()


class BackOff(NamedTuple):
    """The settings of `back_off`, attached to its `update`."""

    factor: float
    recover_after: int
    after: int
    most_owed: int
    diverged: float | None


def back_off(
    factor: float = 0.5,
    recover_after: int = 100,
    *,
    after: int = 1,
    lowest: float = 0.01,
    diverged: float | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale the finished updates down after trouble, and restore the scale over healthy steps.

    owed <- min(owed + recover_after, most)      at trouble
    u    <- u * factor ** (owed / recover_after)
    owed <- max(owed - 1, 0)                     after a healthy step

    In effect, the learning rate is reduced when necessary and restored afterwards.

    Guarantees:
      - Until there is trouble, the scale is exactly 1 and updates are unchanged bit for bit; so they are again after
        `recover_after` healthy steps for each reduction.
      - The scale never falls below `lowest`.

    Under `guard(..., recovery=(back_off(),))`, these count as trouble: the `after`-th step of trouble in a row (once
    per streak, so that a hundred bad batches cause one reduction), a reset because of dead moments, a rewind and, with
    `diverged`, the step at which the smoothed loss first exceeds `diverged` times its best. The *finished* update is
    scaled, including weight decay and penalties; moments are not.

    Without a guard, last in a chain, an update or a loss (`value=`) that is not finite counts as trouble, as does a
    diverged loss. `value=` is optional.

    ==========================  ==========================================================
    Case                        Result
    ==========================  ==========================================================
    NaN or Inf in the update    in a chain: all zeros and a reduction; under `guard`: held
    loss NaN or Inf             the same
    zero update, empty tree     unchanged
    no `value=`                 `diverged` has no effect
    around `proximal_*`         weights become exactly zero only while the scale is 1
    ==========================  ==========================================================

    Args:
      factor: the factor of the scale in each reduction, in (0, 1).
      recover_after: the number of healthy steps that make up for one reduction (>= 1).
      after: the number of steps of trouble in a row that cause a reduction (>= 1); in a chain, every one does.
      lowest: a lower bound on the scale, in (0, 1).
      diverged: the multiple (> 1) of the best smoothed loss at which to reduce as well; None ignores the loss.
      axis_name: as in `gradient_statistics`, for use in a chain; the loss is averaged over the axis.

    Returns:
      A rung for `guard(..., recovery=(...,))`, which is also an Optax transformation.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), back_off(0.5, recover_after=2))
      >>> state, seen = tx.init(jnp.zeros(1)), []
      >>> for size in (1.0, jnp.nan, 1.0, 1.0, 1.0):
      ...     updates, state = tx.update(jnp.full(1, size), state)
      ...     seen.append(round(float(updates[0]), 3))
      >>> seen
      [-1.0, 0.0, -0.5, -0.707, -1.0]

    See Also:
      `optax.contrib.reduce_on_plateau`, which reduces the scale of updates permanently if the loss stops falling.
    """
    name = "back_off"
    inside = {"low": 0, "high": 1, "open_low": True, "open_high": True, "static": True}
    factor = validate.scalar(name, "factor", factor, **inside)
    lowest = validate.scalar(name, "lowest", lowest, **inside)
    recover_after = validate.integer(name, "recover_after", recover_after, low=1)
    after = validate.integer(name, "after", after, low=1)
    if diverged is not None:
        diverged = validate.scalar(name, "diverged", diverged, low=1, open_low=True, static=True)
    validate.axis_name(name, axis_name)
    most_owed = max(math.floor(recover_after * math.log(lowest) / math.log(factor)), 0)
    if most_owed + recover_after > validate.INT32:
        raise ValueError(
            f"{name}: `recover_after` {recover_after}, `factor` {factor:g} and `lowest` {lowest:g} would owe up to "
            f"{most_owed} healthy steps, more than an int32 can count: use a smaller `recover_after` or `factor`."
        )

    def init(params: optax.Params) -> BackOffState:
        del params
        return empty_back_off(empty_watch() if diverged is not None else ())

    def change(
        updates: PyTree, state: BackOffState, params: PyTree | None, extra: dict[str, Any]
    ) -> tuple[PyTree, BackOffState]:
        del params
        warn_of_misspellings(extra)
        finite = jnp.all(one_pass_statistics(updates, axis_name).finite)
        loss, watch = loss_in(name, extra, axis_name), state.back_off_watch
        if loss is not None:
            finite = finite & jnp.isfinite(loss)
        trouble = ~finite
        if loss is not None and diverged is not None:
            watch = watch_loss(watch, loss, finite)
            trouble = trouble | loss_above(watch, diverged) & ~loss_above(state.back_off_watch, diverged)
        state = step_down(rung, state, trouble)
        scaled = scale_leaves(updates, state.update_scale, ~finite)
        return scaled, step_up(state, ~trouble, watch)

    rung = BackOff(factor, recover_after, after, most_owed, diverged)
    tx = transformation_with_extra(name, init, change)
    return tx._replace(update=with_part(tx.update, rung))


def empty_back_off(watch: Any) -> BackOffState:
    """The state before any trouble."""
    return BackOffState(
        healthy_steps_owed=jnp.zeros((), jnp.int32),
        back_off_total=jnp.zeros((), jnp.int32),
        update_scale=jnp.ones((), jnp.float32),
        back_off_watch=watch,
    )


def reasons_to_back_off(rung: BackOff, seen: Seen, trouble: Trouble, loss_rises: jax.Array) -> jax.Array:
    """Before the step: whether to reduce the scale for a reason other than a reset or a rewind."""
    return trouble.now & (trouble.in_row == rung.after) | seen.alive & loss_rises


def step_down(rung: BackOff, state: BackOffState, trouble: jax.Array) -> BackOffState:
    """The state with the scale of this step's update, reduced at trouble."""
    owed = jnp.minimum(state.healthy_steps_owed + jnp.where(trouble, rung.recover_after, 0), rung.most_owed)
    level = owed.astype(jnp.float32) / rung.recover_after
    return state._replace(
        healthy_steps_owed=owed,
        back_off_total=count_if(trouble, state.back_off_total),
        update_scale=jnp.exp(level * math.log(rung.factor)),
    )


def step_up(state: BackOffState, healthy: jax.Array, watch: Any) -> BackOffState:
    """The state after the step, with one step fewer owed if it was healthy."""
    owed = jnp.maximum(state.healthy_steps_owed - healthy.astype(jnp.int32), 0)
    return state._replace(healthy_steps_owed=owed, back_off_watch=watch)

"""Escalation: what a guard does when clipping and holding steps are not enough.

The ladder, in the order in which its rungs act when several are due in one step (whatever the order of the arguments):
clip and skip (the rules), reset the moments, back off, rewind, halt.

==================  ==============================================================  =================================
Function            Take it against                                                 State it needs
==================  ==============================================================  =================================
`reset_moments`     moments that took in something bad, or stop the parameters      9 bytes per leaf
`back_off`          trouble that smaller steps survive; alone in a chain, too       12 bytes
`rewind`            a loss that rose and stays up, in a run that nobody watches     `keep` copies of params and state
==================  ==============================================================  =================================

All of it is opt-in: `guard(optimizer, rules..., recovery=(reset_moments(), back_off(), rewind()))`. A rung that resets
or rewinds does so *in place of* the step: nothing of that step's gradient is applied.

Trouble is a step that was not finite or that a rule refused, also one that the guard's `patience` lets through. A
step that is applied without trouble ends the row.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard import _validate
from optax_guard._extra import loss_in, warn_of_misspellings
from optax_guard._parts import with_part
from optax_guard._rule import scale_leaves
from optax_guard._state_check import state_check
from optax_guard._statistics import first_look
from optax_guard._step import count_if
from optax_guard._tree import checked
from optax_guard._typing import AxisName
from optax_guard._watch import empty_watch, loss_above, watch_loss

__all__ = [
    "BackOff",
    "BackOffState",
    "Reset",
    "ResetState",
    "Rewind",
    "RewindState",
    "back_off",
    "reset_moments",
    "rewind",
]

_MOST_SNAPSHOTS = 100  # each is a copy of parameters and state, and has a branch of its own


class ResetState(NamedTuple):
    """What `reset_moments` carries."""

    parameter_sums: jax.Array  # f32[n_leaves, 2]: sum of squares and sum at the last check
    leaf_moved: jax.Array  # bool[n_leaves]: whether the leaf was alive at the last check
    moments_finite: jax.Array  # bool[]: what the last check saw; True after a reset
    frozen_leaves: jax.Array  # i32[]: leaves with a gradient that had moved before and stood still at the last check
    standing_still: jax.Array  # i32[]: leaves too coarse (bfloat16) for updates that would move them in float32
    parameters_frozen: jax.Array  # bool[]: whether the frozen were at least half; False after a reset
    reset_total: jax.Array  # i32[]: resets, for whatever reason
    silent_death_total: jax.Array  # i32[]: resets because the moments were dead


class BackOffState(NamedTuple):
    """What `back_off` carries. The scale is factor ** (owed / recover_after)."""

    healthy_steps_owed: jax.Array  # i32[]: healthy steps until updates are whole again
    back_off_total: jax.Array  # i32[]: how often it stepped down
    update_scale: jax.Array  # f32[]: what the last update was multiplied by
    back_off_watch: Any  # LossWatch, if `diverged` was given and it stands alone; else ()


class RewindState(NamedTuple):
    """What `rewind` carries."""

    snapshots: tuple[Any, ...]  # `keep` copies of parameters and inner state, without the names of its fields
    snapshot_steps: jax.Array  # i32[keep]: the guard's step count at each; -1 where there is none
    snapshot_losses: jax.Array  # f32[keep]: the smoothed loss at each
    newest_snapshot: jax.Array  # i32[]: its place
    snapshots_held: jax.Array  # i32[]: how many may be restored
    snapshot_due_in: jax.Array  # i32[]: healthy steps until the next is taken
    rewinds_in_row: jax.Array  # i32[]: since the last snapshot was taken
    rewind_total: jax.Array  # i32[]


class Reset(NamedTuple):
    """Made by `reset_moments`."""

    after: int
    check_every: int


class Rewind(NamedTuple):
    """Made by `rewind`."""

    every: int
    keep: int
    after: int
    diverged: float
    attempts: int
    dtype: Any
    memory: str


class BackOff(NamedTuple):
    """The settings of `back_off`, kept on its `update`."""

    factor: float
    recover_after: int
    after: int
    most_owed: int
    diverged: float | None


def reset_moments(after: int = 5, *, check_every: int = 100) -> Reset:
    """Re-initialise the inner optimizer's moments after trouble, or when they are found dead.

    moments, ages <- those of inner.init(params)     after `after` steps of trouble in a row (once a row), or
                                                     every `check_every` steps if the moments are dead

    Silent death: with the bare `optax.adam` one finite gradient of 1e30 makes the second moment infinite, and every
    later update is exactly zero. No loss, gradient or parameter is ever NaN. A guard holds such a gradient, but a
    checkpoint may carry the damage in, and a gradient of 1e18, which can be squared, leaves a finite second moment that
    needs 80 000 steps to decay. So every `check_every` steps the guard looks for

      - a moment that is not finite;
      - frozen parameters: at least half of the leaves that had moved and have a gradient stood still since the last
        look, though this step was applied: their sum and their sum of squares kept every bit, which means a change
        below 1e-7 of the leaf. A leaf that never moved (a frozen layer) does not count, and one that was frozen counts
        again only after it has moved again.

    A parameter of 16 bits stands still long before its moments are dead: at the end of a decaying schedule updates fall
    below half a unit in its last place. Such a leaf is frozen only if the update could not move it in float32 either,
    that is, below 2^-24 of every element; else it is counted as `guard/standing_still`, and nothing is reset. To see
    which, the update is made once more, at that look. A leaf for which that number stays above 0 has stopped training:
    keep a float32 copy of the parameters, or raise the learning rate.

    Guarantees:
      - Parameters, schedules' counters, keys, flags and injected hyperparameters keep their bits.
      - After a reset the moments are those of a new optimizer, and so is Adam's bias correction.
      - Dead moments are found within `check_every` (not finite) or twice that (frozen) steps, reset, and told by
        `metrics` (`guard/silent_death_total`, `guard/frozen_leaves`, `guard/moments_finite`) and the flight log. If
        the step of a look is held, the next one judges.
      - `apply_gradients` and `update` with `optax.apply_updates` come to the same verdict.

    What is a moment: a floating-point array with a dimension, or a 0-d one whose path ends in that of a 0-d parameter.
    A counter beside moments in the same state (Adam's and Adafactor's `count`) is their age and starts anew with them:
    zeroed moments under the old count would make the next updates up to 6.5 times too large. A counter in a state of
    its own (a schedule's) is kept, so the learning rate goes on where it was.

    ==========================================  ====================================================================
    Case                                        Result
    ==========================================  ====================================================================
    the row of trouble goes on                  no second reset until a healthy step has ended it
    an optimizer without moments (plain SGD)    nothing changes; counted
    exponential averages of *parameters* inside a moment like any other: keep them outside of the guard
    the learning rate falls to 0                one reset, since all leaves stop: harmless, as nothing moves
    zero gradients                              no verdict, and no trouble, whatever the optimizer makes of them
    16-bit leaves, `optax.apply_every(k)`       the look sees one update: take a multiple of k for `check_every`
    no `params`                                 ValueError: it looks whether they move
    ==========================================  ====================================================================

    Args:
      after: steps of trouble in a row (>= 1).
      check_every: calls between two looks (>= 1). A look reads the parameters twice and the moments once, about 0.6 of
        the traffic of an AdamW step: 0.6 % at 100.

    Returns:
      A rung for `guard(..., recovery=(...,))`.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.adam(0.1), og.skip_large(1.0), recovery=(og.reset_moments(after=2),))
      >>> params, state = jnp.ones(1), tx.init(jnp.ones(1))
      >>> for size in (0.5, 9.0, 9.0):
      ...     params, state = og.apply_gradients(tx, jnp.full(1, size), state, params)
      >>> str(og.flight_log(state)["recovery"][-1]), optax.tree.get(state, "mu")
      ('reset_refused', Array([0.], dtype=float32))

    References:
      Huang et al. 2025, "SPAM: Spike-Aware Adam with Momentum Reset" (arXiv 2501.06842) resets both moments every 500
      steps; here it happens on evidence, and Adam's step count goes with them.
    """
    name = "reset_moments"
    return Reset(
        after=_validate.integer(name, "after", after, low=1),
        check_every=_validate.integer(name, "check_every", check_every, low=1),
    )


def back_off(
    factor: float = 0.5,
    recover_after: int = 100,
    *,
    after: int = 1,
    lowest: float = 0.01,
    diverged: float | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale the finished updates down after trouble, and back to 1 over healthy steps.

    owed <- min(owed + recover_after, most)      at trouble
    u    <- u * factor ** (owed / recover_after)
    owed <- max(owed - 1, 0)                     after a healthy step

    That is a learning rate that is reduced when it must be, and given back.

    Guarantees:
      - The scale is exactly 1, and updates keep their bits, until there is trouble, and again `recover_after` healthy
        steps after each step down.
      - It never falls below `lowest`.

    What trouble is, under `guard(..., recovery=(back_off(),))`: the `after`-th step of trouble in a row (once a row: a
    shard of a hundred bad batches steps down once), a reset because of dead moments, a rewind, and with `diverged` the
    step at which the smoothed loss comes to exceed `diverged` times its best. The *finished* update is scaled, weight
    decay and penalties with it; moments are not.
    Alone, last in a chain: an update or a loss (`value=`) that is not finite, and the loss as above. `value=` is not
    demanded.

    ==========================  ==========================================================
    Case                        Result
    ==========================  ==========================================================
    NaN or Inf in the update    alone: all zeros, one step down; under `guard`: held
    loss NaN or Inf             the same
    zero update, empty tree     unchanged
    no `value=`                 `diverged` has nothing to judge
    around `proximal_*`         weights land on exact zeros only while the scale is 1
    ==========================  ==========================================================

    Args:
      factor: what each step down multiplies the scale by, in (0, 1).
      recover_after: healthy steps that make up for one step down (>= 1).
      after: steps of trouble in a row until it steps down (>= 1).
      lowest: bound on the scale, in (0, 1).
      diverged: also step down when the smoothed loss exceeds this multiple (> 1) of its best; None does not look.
      axis_name: as in `gradient_statistics`, for use alone; the loss is averaged over the axis.

    Returns:
      A rung for `guard(..., recovery=(...,))`, which is also an Optax transformation.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), back_off(0.5, recover_after=2))
      >>> state, seen = tx.init(jnp.zeros(1)), []
      >>> for size in (1.0, jnp.nan, 1.0, 1.0, 1.0):
      ...     updates, state = tx.update(jnp.full(1, size), state)
      ...     seen.append(round(float(updates[0]), 3))
      >>> seen
      [-1.0, 0.0, -0.5, -0.707, -1.0]

    See Also:
      `optax.contrib.reduce_on_plateau`, which lowers the scale of updates for a loss that stopped falling, for good.
    """
    name = "back_off"
    inside = {"low": 0, "high": 1, "open_low": True, "open_high": True, "static": True}
    factor = _validate.scalar(name, "factor", factor, **inside)
    lowest = _validate.scalar(name, "lowest", lowest, **inside)
    recover_after = _validate.integer(name, "recover_after", recover_after, low=1)
    after = _validate.integer(name, "after", after, low=1)
    if diverged is not None:
        diverged = _validate.scalar(name, "diverged", diverged, low=1, open_low=True, static=True)
    _validate.axis_name(name, axis_name)
    most_owed = max(math.floor(recover_after * math.log(lowest) / math.log(factor)), 0)

    def init(params: optax.Params) -> BackOffState:
        del params
        return empty_back_off(empty_watch() if diverged is not None else ())

    check_state = state_check(name, init)

    def update(
        updates: optax.Updates, state: BackOffState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, BackOffState]:
        updates, params = checked(name, updates, params)
        check_state(state, params, updates)
        warn_of_misspellings(extra)
        finite = jnp.all(first_look(updates, axis_name).finite)
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
    return optax.GradientTransformationExtraArgs(init, with_part(update, rung))


def rewind(
    every: int = 100,
    *,
    keep: int = 2,
    after: int = 20,
    diverged: float = 2.0,
    attempts: int = 3,
    dtype: Any = None,
    memory: str = "device",
) -> Rewind:
    """Go back to a snapshot when the loss has diverged or steps were refused in a row. The data go on.

    params, inner state <- the newest snapshot       and the next batch, so that those which hurt are passed by

    A snapshot is taken after the first healthy step, and then after every `every` of them, counted anew after a rewind.
    Healthy is a step without trouble whose smoothed loss is in the lower half of the way to `diverged`; parameters and
    moments must be finite.

    Guarantees:
      - Through `apply_gradients`, parameters and inner state after a rewind equal the snapshot bit for bit
        (`dtype=None`): moments, counters, schedules, keys. Rules, counters of the guard and the data are not rewound,
        nor are the hyperparameters in the state of `optax.inject_hyperparams`: a learning rate lowered by hand stays
        lowered, and one that follows a schedule is set anew from its counter.
      - Snapshots carry no name of a field: `optax.tree.get(state, "learning_rate")` finds the one that counts.
      - A second rewind before another snapshot was taken goes to the snapshot before, if there is one.
      - After `attempts` rewinds without a new snapshot there are no more; if the loss is still diverged, the guard
        halts: the batches were not the cause. `clear_halt` goes on and takes the loss as it then is for the new level.

    The loss (`value=`) is watched by s, an average over 50 steps in which one loss can count for at most four times s;
    diverged means s - best > (diverged - 1) * max(|best|, |first loss| / 100), judged from the 25th loss on. A loss of
    eight times the best is noticed after 12 steps, one of three times after 35; five spikes in a row do nothing.

    ==========================================  =====================================================================
    Case                                        Result
    ==========================================  =====================================================================
    no `value=`                                 only steps of trouble in a row lead back
    no snapshot yet                             nothing to go back to: the guard goes on
    the loss is NaN, the gradient finite        held, a step of trouble; not taken into the average
    a loss of exactly 0 (an empty batch)        not taken into the average
    no `params`                                 ValueError: there is nothing to keep
    16-bit parameters in `loss_scaling`         kept in float32, as it shows them to the guard: exact, twice the memory
    `memory="host"` under `vmap`                right, but every snapshot is moved to the device and back at every step
    through `update` instead of the fast way    the update leads back to the snapshot to rounding
    `dtype=jnp.bfloat16`                        restored to 3 digits: half the memory, not bit for bit
    ==========================================  =====================================================================

    Memory: `keep` times what parameters and inner state take. Per float32 parameter and snapshot that is 12 bytes with
    Adam (4 with SGD, 8 with momentum or Lion), 6 with Adam and `dtype=jnp.bfloat16`. A write costs one copy, so a step
    costs 1 / `every` of one on average.

    Args:
      every: healthy steps between snapshots (>= 1).
      keep: snapshots (1 to 100).
      after: steps of trouble in a row (>= 1) that lead back; counted anew after each rewind. Above `halt_after` it
        would never act on non-finite steps, so `guard` refuses that.
      diverged: multiple (> 1) of the best smoothed loss that counts as diverged.
      attempts: rewinds without a snapshot in between (>= 1).
      dtype: of the floating-point numbers in a copy: None keeps each as it is, `jnp.bfloat16` or `jnp.float32` narrow
        the wider ones. Others have too small a range for second moments.
      memory: "device", or "host" for the host's memory beside an accelerator (pinned; JAX moves the arrays inside the
        compiled step).

    Returns:
      A rung for `guard(..., recovery=(...,))`.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), og.skip_large(10.0), recovery=(og.rewind(every=100, after=2),))
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> for size in (1.0, 1.0, 99.0, 99.0):  # a snapshot after the first
      ...     params, state = og.apply_gradients(tx, jnp.full(1, size), state, params)
      >>> float(params[0]), str(og.flight_log(state)["recovery"][-1])
      (-1.0, 'rewind_refused')

    References:
      Chowdhery et al. 2022, "PaLM" (arXiv 2204.02311), section 5.1: restart about 100 steps before a spike and skip the
      batches; there by hand.
    """
    name = "rewind"
    diverged = _validate.scalar(name, "diverged", diverged, low=1, open_low=True, static=True)
    if dtype is not None:  # others are too narrow in range for second moments
        dtype = _validate.floating_dtype(name, "dtype", dtype, (jnp.bfloat16, jnp.float32))
    _validate.one_of(name, "memory", memory, ("device", "host"))
    return Rewind(
        every=_validate.integer(name, "every", every, low=1),
        keep=_validate.integer(
            name, "keep", keep, low=1, high=_MOST_SNAPSHOTS, reason="each is a copy of the whole state"
        ),
        after=_validate.integer(name, "after", after, low=1),
        diverged=diverged,
        attempts=_validate.integer(name, "attempts", attempts, low=1),
        dtype=dtype,
        memory=memory,
    )


def empty_back_off(watch: Any) -> BackOffState:
    """The state before any trouble."""
    return BackOffState(
        healthy_steps_owed=jnp.zeros((), jnp.int32),
        back_off_total=jnp.zeros((), jnp.int32),
        update_scale=jnp.ones((), jnp.float32),
        back_off_watch=watch,
    )


def step_down(rung: BackOff, state: BackOffState, trouble: jax.Array) -> BackOffState:
    """The scale of this step's update, lowered at trouble."""
    owed = jnp.minimum(state.healthy_steps_owed + jnp.where(trouble, rung.recover_after, 0), rung.most_owed)
    level = owed.astype(jnp.float32) / rung.recover_after
    return BackOffState(
        healthy_steps_owed=owed,
        back_off_total=count_if(trouble, state.back_off_total),
        update_scale=jnp.exp(level * math.log(rung.factor)),
        back_off_watch=state.back_off_watch,
    )


def step_up(state: BackOffState, healthy: jax.Array, watch: Any) -> BackOffState:
    """One step less owed after a healthy one."""
    return BackOffState(
        healthy_steps_owed=jnp.maximum(state.healthy_steps_owed - healthy.astype(jnp.int32), 0),
        back_off_total=state.back_off_total,
        update_scale=state.update_scale,
        back_off_watch=watch,
    )

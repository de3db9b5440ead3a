"""The order of the rungs: decide and recover before the step, check and take snapshots after it.

`plan` reads only scalars. `around` takes the step from parameters and state that are unchanged, reset, or from a
snapshot; then `finish` checks the moments and takes snapshots when they are due. Each rung is in a file of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common.counters import next_step
from optax_guard._common.forms import cond_or_select, lowered_for
from optax_guard._common.parts import part_of
from optax_guard._common.tree import check_has_params, is_gradient, varying_axes
from optax_guard._common.typing import AxisName, Mask, PyTree
from optax_guard._step.judge import scale_leaves
from optax_guard._step.record import RECOVERIES
from optax_guard.recovery._back_off import BackOff, empty_back_off, reasons_to_back_off, step_down, step_up
from optax_guard.recovery._loss_watch import anew, empty_watch, loss_above, watch_loss
from optax_guard.recovery._reset import (
    Reset,
    after_reset,
    empty_reset,
    look_at_moments,
    look_is_due,
    reasons_to_reset,
    start_anew,
)
from optax_guard.recovery._rewind import (
    Rewind,
    RewindState,
    after_rewind,
    empty_rewind,
    go_back,
    reasons_to_rewind,
    rewinds_cleared,
    snapshot_is_due,
    take_snapshot,
    updates_to,
    watch_after_rewind,
    without_snapshot,
)
from optax_guard.recovery._seen import After, Seen, Trouble
from optax_guard.recovery._start import Start, StartState, empty_start, fresh_where, watch_start

__all__ = [
    "Ladder",
    "Plan",
    "RecoveryState",
    "Rung",
    "around",
    "as_ladder",
    "cleared",
    "finish",
    "held_updates",
    "init_ladder",
    "plan",
    "scaled",
    "started",
]

Rung: TypeAlias = Reset | Rewind | Start | optax.GradientTransformation  # the last of `back_off`

_BIT = {name: 1 << position for position, name in enumerate(RECOVERIES)}


class RecoveryState(NamedTuple):
    """The state of a guard's ladder; `()` for a missing rung."""

    trouble_in_row: jax.Array  # i32[]: steps of trouble since the last healthy step
    bad_update_before: jax.Array  # bool[]: whether the last update was not finite (with `check_updates=True`)
    reset_state: Any  # ResetState
    back_off_state: Any  # BackOffState
    rewind_state: Any  # RewindState
    loss_watch: Any  # LossWatch, if a rung uses the loss
    start_state: Any  # StartState, under `stabilize`


class Ladder(NamedTuple):
    """The rungs of a guard, and the function to which they were passed."""

    function: str  # the function that the user called
    reset: Reset | None
    back_off: BackOff | None
    rewind: Rewind | None
    start: Start | None
    inner: optax.GradientTransformation
    axis_name: AxisName | None
    mask: Mask | None


class Plan(NamedTuple):
    """What the ladder does in this step."""

    state: RecoveryState  # updated with all that is known before the step
    resets: jax.Array  # bool[]
    rewinds: jax.Array  # bool[]
    gives_up: jax.Array  # bool[]: the guard halts
    place: jax.Array  # i32[]: the snapshot to which to return
    update_scale: jax.Array | None  # f32[]; None without `back_off`
    restarts: jax.Array | None  # bool[]: the step is the first of a new start; None without `Start`
    reason: jax.Array  # i32[]: bits of RECOVERIES

    @property
    def replaces(self) -> jax.Array:
        """Whether the ladder acts in place of the step, whose gradient is then not applied."""
        return self.resets | self.rewinds | self.gives_up


def as_ladder(
    function: str,
    recovery: Any,
    inner: optax.GradientTransformation,
    halt_after: int,
    axis_name: AxisName | None,
    mask: Mask | None = None,
) -> Ladder | None:
    """Sorts the rungs into a ladder; None if there are none."""
    names = {Reset: "reset_moments", BackOff: "back_off", Rewind: "rewind", Start: "start"}
    wanted = "a tuple of `reset_moments(...)`, `back_off(...)`, `rewind(...)`"
    if _rung(recovery) is not None or not isinstance(recovery, (tuple, list)):
        raise ValueError(f"{function}: `recovery` must be {wanted}; got {recovery!r}.")
    found: dict[str, Any] = {}
    for each in recovery:
        rung = _rung(each)
        if rung is None:
            raise ValueError(f"{function}: `recovery` must be {wanted}; it holds {each!r}.")
        name = names[type(rung)]
        if name in found:
            raise ValueError(f"{function}: `recovery` holds `{name}` twice; each rung may occur once.")
        if isinstance(rung, (Reset, Rewind)) and rung.after > halt_after:
            raise ValueError(
                f"{function}: `{name}(after={rung.after})` would never act on non-finite steps, since `halt_after` is "
                f"{halt_after}; `after` must be in [1, halt_after]."
            )
        found[name] = rung
    if not found:
        return None
    reset, back_off, rewind, start = (found.get(name) for name in names.values())
    return Ladder(function, reset, back_off, rewind, start, inner, axis_name, mask)


def _rung(each: Any) -> Reset | BackOff | Rewind | Start | None:
    return each if isinstance(each, (Reset, Rewind, Start)) else part_of(each, BackOff)


def init_ladder(ladder: Ladder | None, params: PyTree, inner_state: PyTree) -> RecoveryState | tuple[()]:
    """The ladder's state before the first step; empty without a ladder."""
    if ladder is None:
        return ()
    return RecoveryState(
        trouble_in_row=jnp.zeros((), jnp.int32),
        bad_update_before=jnp.zeros((), bool),
        reset_state=() if ladder.reset is None else empty_reset(params),
        back_off_state=() if ladder.back_off is None else empty_back_off(()),
        rewind_state=() if ladder.rewind is None else empty_rewind(ladder.rewind, params, inner_state),
        loss_watch=empty_watch() if _watches(ladder) else (),
        start_state=() if ladder.start is None else empty_start(),
    )


def plan(ladder: Ladder | None, state: RecoveryState, seen: Seen, params: PyTree | None) -> Plan | None:
    """What to do in this step, and the state with all that is known before it; None without a ladder."""
    if ladder is None:
        return None
    for rung, option in ((ladder.reset, "reset_moments"), (ladder.rewind, "rewind")):
        if rung is not None:
            check_has_params(ladder.function, params, f"`recovery=({option}(...),)`")
    reasons = dict.fromkeys(RECOVERIES, jnp.zeros((), bool))
    bad = ~seen.finite | seen.refused | state.bad_update_before
    in_row = jnp.where(seen.alive, jnp.where(bad, next_step(state.trouble_in_row), 0), state.trouble_in_row)
    trouble = Trouble(now=bad & seen.alive, in_row=in_row)
    watch = state.loss_watch
    if _watches(ladder) and seen.value is not None:
        watch = watch_loss(watch, seen.value, seen.alive & seen.finite)

    place = jnp.zeros((), jnp.int32)
    if ladder.reset is not None:
        reasons |= reasons_to_reset(ladder.reset, state.reset_state, seen, trouble)
    if ladder.rewind is not None:
        diverged = _diverged(watch, ladder.rewind.diverged, seen)
        found, place = reasons_to_rewind(ladder.rewind, state.rewind_state, seen, trouble, diverged)
        reasons |= found
    rewinds = reasons["rewind_refused"] | reasons["rewind_diverged"]
    for name in ("reset_refused", "reset_nonfinite", "reset_frozen"):  # a higher rung takes precedence
        reasons[name] = reasons[name] & ~rewinds & ~reasons["gave_up"]
    dead = reasons["reset_nonfinite"] | reasons["reset_frozen"]
    resets = dead | reasons["reset_refused"]

    restarts = None
    if isinstance(state.start_state, StartState):
        replaced = resets | rewinds | reasons["gave_up"]
        restarts = state.start_state.spoilt & seen.alive & ~bad & ~replaced
        reasons["reset_start"] = restarts

    reset, back_off, rewind = state.reset_state, state.back_off_state, state.rewind_state
    if ladder.back_off is not None:
        bar = ladder.back_off.diverged
        rises = _diverged(watch, bar, seen) & ~_diverged(state.loss_watch, bar, seen)
        reasons["back_off"] = dead | rewinds | reasons_to_back_off(ladder.back_off, seen, trouble, rises)
        back_off = step_down(ladder.back_off, back_off, reasons["back_off"])
    if ladder.reset is not None:
        reset = after_reset(reset, resets, dead)
    if ladder.rewind is not None:
        watch = watch_after_rewind(watch, rewind, rewinds, place)
        rewind = after_rewind(ladder.rewind, rewind, rewinds, place)
    return Plan(
        state=state._replace(
            trouble_in_row=in_row,
            reset_state=reset,
            back_off_state=back_off,
            rewind_state=rewind,
            loss_watch=watch,
        ),
        resets=resets,
        rewinds=rewinds,
        gives_up=reasons["gave_up"],
        place=place,
        update_scale=None if ladder.back_off is None else back_off.update_scale,
        restarts=restarts,
        reason=sum(jnp.where(on, _BIT[name], 0) for name, on in reasons.items()) + jnp.zeros((), jnp.int32),
    )


def around(
    ladder: Ladder | None,
    planned: Plan | None,
    seen: Seen,
    applied: jax.Array,
    begin: tuple[PyTree, PyTree],
    step: Callable[[PyTree, PyTree], tuple[Any, ...]],
    after: Callable[..., After],
) -> tuple[tuple[Any, ...], RecoveryState | tuple[()]]:
    """What `step` returns from `begin`, the parameters and inner state, with all that comes before and after it.

    A GPU and a TPU take a quiet step, one without such events, in a branch of its own, as every conditional that passes
    snapshots on would copy them there.
    """

    def quiet() -> tuple[tuple[Any, ...], Any]:
        taken = step(*begin)
        return taken, finish(ladder, planned, seen, after(*taken), quiet=True)

    if ladder is None or planned is None or (ladder.reset is None and ladder.rewind is None):
        return quiet()
    recovered = functools.partial(_recovered, ladder, planned, begin)

    def eventful() -> tuple[tuple[Any, ...], Any]:
        # What looks at the result reads it, and does not compute it again from what it replaces.
        taken = _written(step(*recovered()))
        return taken, finish(ladder, planned, seen, after(*taken), quiet=False)

    found = _has_events(ladder, planned, seen, applied)
    return lax.cond(found | ~lowered_for(("gpu", "tpu")), eventful, quiet)


def started(ladder: Ladder | None, planned: Plan | None, params: PyTree, inner_state: PyTree) -> PyTree:
    """The inner state with which the optimizer takes the step: with new moments if the run starts anew."""
    if ladder is None or planned is None or planned.restarts is None:
        return inner_state
    return fresh_where(planned.restarts, ladder.inner, inner_state, params)


def held_updates(
    ladder: Ladder | None, planned: Plan | None, before: PyTree, after: PyTree, untouched: PyTree
) -> PyTree:
    """Optax's updates for a step that was not applied, which lead to a snapshot or change nothing."""
    if ladder is None or ladder.rewind is None or planned is None or before is None:
        return untouched
    return cond_or_select(planned.rewinds, lambda: updates_to(after, before, untouched), lambda: untouched)


def scaled(planned: Plan | None, updates: PyTree) -> PyTree:
    """The finished updates, scaled by `back_off`."""
    if planned is None or planned.update_scale is None:
        return updates
    return scale_leaves(updates, planned.update_scale)


def finish(
    ladder: Ladder | None, planned: Plan | None, seen: Seen, after: After, quiet: bool
) -> RecoveryState | tuple[()]:
    """The state after the step: checks the moments and takes a snapshot if these are due, which excludes `quiet`."""
    if ladder is None or planned is None:
        return ()
    state = planned.state
    healthy = after.applied & ~seen.refused
    reset, back_off, rewind = state.reset_state, state.back_off_state, state.rewind_state
    if ladder.reset is not None and not quiet:
        reset = look_at_moments(ladder.reset, ladder.axis_name, reset, seen, after)
    if ladder.back_off is not None:
        back_off = step_up(back_off, healthy, ())
    if ladder.rewind is not None:
        calm = after.applied & _calm(ladder, planned, seen)
        if quiet:
            rewind = without_snapshot(rewind, calm)
        else:
            rewind = take_snapshot(
                ladder.rewind, ladder.mask, ladder.axis_name, rewind, state.loss_watch, calm, seen, after
            )
    start = state.start_state
    if isinstance(start, StartState) and planned.restarts is not None:
        start = watch_start(start, planned.restarts, after)
    return state._replace(
        # What Adam makes of zeros in float16 (0 / 0) is held; moments and parameters have nothing to do with it.
        bad_update_before=jnp.where(seen.alive, after.bad_update & jnp.any(seen.has_gradient), state.bad_update_before),
        reset_state=reset,
        back_off_state=back_off,
        rewind_state=rewind,
        start_state=start,
    )


def cleared(state: RecoveryState | tuple[()]) -> RecoveryState | tuple[()]:
    """The state after `clear_halt`: the count of rewinds restarts, and the present loss becomes the level."""
    if not isinstance(state, RecoveryState):
        return state
    return state._replace(
        trouble_in_row=jax.tree.map(jnp.zeros_like, state.trouble_in_row),
        loss_watch=anew(state.loss_watch),
        rewind_state=rewinds_cleared(state.rewind_state) if isinstance(state.rewind_state, RewindState) else (),
    )


def _calm(ladder: Ladder, planned: Plan, seen: Seen) -> jax.Array:
    """Whether a step, if it is applied, is one after which a snapshot may be taken."""
    bar = None if ladder.rewind is None else (1 + ladder.rewind.diverged) / 2
    return ~seen.refused & ~_diverged(planned.state.loss_watch, bar, seen)


def _watches(ladder: Ladder) -> bool:
    return ladder.rewind is not None or (ladder.back_off is not None and ladder.back_off.diverged is not None)


def _diverged(watch: Any, factor: float | None, seen: Seen) -> jax.Array:
    return jnp.zeros((), bool) if factor is None or seen.value is None else loss_above(watch, factor)


def _has_events(ladder: Ladder, planned: Plan, seen: Seen, applied: jax.Array) -> jax.Array:
    """Whether this step may reset, rewind, look at the moments or take a snapshot.

    Under `vmap` JAX selects between the branches, which it refuses for snapshots in the host's memory.
    """
    if ladder.rewind is not None and ladder.rewind.memory == "host":
        return jnp.ones((), bool)
    found = planned.resets | planned.rewinds
    if ladder.reset is not None:
        found = found | look_is_due(ladder.reset, seen)
    if ladder.rewind is not None:
        found = found | snapshot_is_due(planned.state.rewind_state, applied & _calm(ladder, planned, seen))
    return found


def _recovered(ladder: Ladder, planned: Plan, begin: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """The parameters and inner state from which the step starts: unchanged, reset, or from a snapshot.

    There is one `lax.cond` after another, each of the form (change, keep), before that of the step. As branches of the
    step's own cond, they would cost up to three copies of the parameters in JAX 0.10.
    """
    if ladder.reset is not None:
        begin = start_anew(planned.resets, ladder.inner, *begin)
    if ladder.rewind is not None:
        begin = go_back(ladder.rewind, planned.rewinds, planned.place, planned.state.rewind_state, *begin)
    return begin


def _written(tree: PyTree) -> PyTree:
    """The same tree, behind an optimization barrier.

    There is one for all leaves that vary along the same axes of a `shard_map`: JAX 0.10.2 types whatever leaves one
    barrier as varying along the axes of any of its operands.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[frozenset[Any], list[int]] = {}
    for position, leaf in enumerate(leaves):
        if is_gradient(leaf):
            groups.setdefault(varying_axes(leaf), []).append(position)
    for positions in groups.values():
        written = lax.optimization_barrier([leaves[position] for position in positions])
        for position, leaf in zip(positions, written, strict=True):
            leaves[position] = leaf
    return jax.tree.unflatten(structure, leaves)

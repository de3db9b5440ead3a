"""How a guard climbs its ladder: decide before the step, go back before it, look and remember after it.

`plan` looks only at scalars. `recover` is what the step starts from: parameters and state as they are, reset, or from a
snapshot. `finish` looks at the moments and takes snapshots, when they are due.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._masked import only_chosen
from optax_guard._parts import part_of
from optax_guard._record import RECOVERIES
from optax_guard._recovery import (
    BackOff,
    Reset,
    ResetState,
    Rewind,
    RewindState,
    empty_back_off,
    step_down,
    step_up,
)
from optax_guard._reset import all_finite, fingerprints, moments, moves_float32, reset_state
from optax_guard._rule import scale_leaves
from optax_guard._step import count_if, next_step
from optax_guard._tree import cast_like, check_has_params, is_gradient, positions, wider_dtype
from optax_guard._typing import AxisName, Mask, PyTree
from optax_guard._watch import LossWatch, empty_watch, loss_above, watch_loss

__all__ = [
    "Ladder",
    "Plan",
    "RecoveryState",
    "Seen",
    "as_ladder",
    "finish",
    "forgive",
    "held_updates",
    "init_ladder",
    "plan",
    "recover",
    "scaled",
]

_BIT = {name: 1 << position for position, name in enumerate(RECOVERIES)}


class RecoveryState(NamedTuple):
    """What the ladder of a guard carries; `()` for a rung that is not there."""

    trouble_in_row: jax.Array  # i32[]: steps of trouble since the last healthy one
    bad_update_before: jax.Array  # bool[]: whether the last update was not finite (with `check_updates=True`)
    reset_state: Any  # ResetState
    back_off_state: Any  # BackOffState
    rewind_state: Any  # RewindState
    loss_watch: Any  # LossWatch, if a rung looks at the loss


class Ladder(NamedTuple):
    """The rungs of a guard, and whose they are."""

    function: str  # what the caller called
    reset: Reset | None
    back_off: BackOff | None
    rewind: Rewind | None
    inner: optax.GradientTransformation
    axis_name: AxisName | None
    mask: Mask | None


class Seen(NamedTuple):
    """What the guard knows of a step before it is taken."""

    step: jax.Array  # i32[]
    finite: jax.Array  # bool[]
    refused: jax.Array  # bool[]
    alive: jax.Array  # bool[]: not halted
    has_gradient: jax.Array  # bool[n_leaves]: a finite norm above 0
    value: jax.Array | None


class Plan(NamedTuple):
    """What the ladder does in this step."""

    state: RecoveryState  # after all that is known before the step
    resets: jax.Array  # bool[]
    rewinds: jax.Array  # bool[]
    gives_up: jax.Array  # bool[]: the guard halts
    place: jax.Array  # i32[]: of the snapshot to go back to
    update_scale: jax.Array | None  # f32[]; None without `back_off`
    reason: jax.Array  # i32[]: bits of RECOVERIES

    @property
    def replaces(self) -> jax.Array:
        """Whether the gradient of this step is not applied."""
        return self.resets | self.rewinds | self.gives_up


def as_ladder(
    function: str,
    recovery: Any,
    inner: optax.GradientTransformation,
    halt_after: int,
    axis_name: AxisName | None,
    mask: Mask | None = None,
) -> Ladder | None:
    """Sorts the rungs; None if there are none."""
    names = {Reset: "reset_moments", BackOff: "back_off", Rewind: "rewind"}
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
            raise ValueError(f"{function}: `recovery` holds `{name}` twice; each rung may be there once.")
        if name != "back_off" and rung.after > halt_after:
            raise ValueError(
                f"{function}: `{name}(after={rung.after})` would never act on non-finite steps, since `halt_after` is "
                f"{halt_after}; `after` must be in [1, halt_after]."
            )
        found[name] = rung
    if not found:
        return None
    reset, back_off, rewind = (found.get(name) for name in names.values())
    return Ladder(function, reset, back_off, rewind, inner, axis_name, mask)


def _rung(each: Any) -> Reset | BackOff | Rewind | None:
    return each if isinstance(each, (Reset, Rewind)) else part_of(each, BackOff)


def init_ladder(ladder: Ladder | None, params: PyTree, inner_state: PyTree) -> RecoveryState | tuple[()]:
    """The ladder's state before the first step; nothing at all without a ladder."""
    if ladder is None:
        return ()
    leaves = len(positions(params))
    reset = ResetState(
        parameter_sums=jnp.zeros((leaves, 2), jnp.float32),
        leaf_moved=jnp.zeros(leaves, bool),
        moments_finite=jnp.ones((), bool),
        frozen_leaves=_zero(),
        standing_still=_zero(),
        parameters_frozen=jnp.zeros((), bool),
        reset_total=_zero(),
        silent_death_total=_zero(),
    )
    rewind: Any = ()
    rung = ladder.rewind
    if rung is not None:
        keep = rung.keep
        rewind = RewindState(
            snapshots=tuple(_empty_snapshot(rung, params, inner_state) for _ in range(keep)),
            snapshot_steps=jnp.full(keep, -1, jnp.int32),
            snapshot_losses=jnp.zeros(keep, jnp.float32),
            newest_snapshot=jnp.full((), keep - 1, jnp.int32),
            snapshots_held=_zero(),
            snapshot_due_in=_zero(),
            rewinds_in_row=_zero(),
            rewind_total=_zero(),
        )
    return RecoveryState(
        trouble_in_row=_zero(),
        bad_update_before=jnp.zeros((), bool),
        reset_state=() if ladder.reset is None else reset,
        back_off_state=() if ladder.back_off is None else empty_back_off(()),
        rewind_state=rewind,
        loss_watch=empty_watch() if _watches(ladder) else (),
    )


def plan(ladder: Ladder | None, state: RecoveryState, seen: Seen, params: PyTree | None) -> Plan | None:
    """What to do in this step, and the state that follows from what is known before it; None without a ladder."""
    if ladder is None:
        return None
    for rung, option in ((ladder.reset, "reset_moments"), (ladder.rewind, "rewind")):
        if rung is not None:
            check_has_params(ladder.function, params, f"`recovery=({option}(...),)`")
    never = jnp.zeros((), bool)
    reasons = dict.fromkeys(RECOVERIES, never)
    bad = ~seen.finite | seen.refused | state.bad_update_before
    in_row = jnp.where(seen.alive, jnp.where(bad, next_step(state.trouble_in_row), 0), state.trouble_in_row)
    bad = bad & seen.alive
    watch = state.loss_watch
    if _watches(ladder) and seen.value is not None:
        watch = watch_loss(watch, seen.value, seen.alive & seen.finite)

    if ladder.reset is not None:
        reasons["reset_refused"] = bad & (in_row == ladder.reset.after)
        reasons["reset_nonfinite"] = seen.alive & ~state.reset_state.moments_finite
        reasons["reset_frozen"] = seen.alive & state.reset_state.parameters_frozen
    place = _zero()
    if ladder.rewind is not None:
        old = state.rewind_state
        may = (old.rewinds_in_row < ladder.rewind.attempts) & (old.snapshots_held > 0)
        diverged = seen.alive & seen.finite & _diverged(watch, ladder.rewind.diverged, seen)
        reasons["rewind_refused"] = bad & (in_row % ladder.rewind.after == 0) & may
        reasons["rewind_diverged"] = diverged & may
        reasons["gave_up"] = diverged & (old.rewinds_in_row >= ladder.rewind.attempts)
        again = (old.rewinds_in_row > 0) & (old.snapshots_held > 1)
        place = (old.newest_snapshot - again.astype(jnp.int32)) % ladder.rewind.keep
    rewinds = reasons["rewind_refused"] | reasons["rewind_diverged"]
    for name in ("reset_refused", "reset_nonfinite", "reset_frozen"):
        reasons[name] = reasons[name] & ~rewinds & ~reasons["gave_up"]
    dead = reasons["reset_nonfinite"] | reasons["reset_frozen"]

    back_off = state.back_off_state
    if ladder.back_off is not None:
        bar = ladder.back_off.diverged
        rises = _diverged(watch, bar, seen) & ~_diverged(state.loss_watch, bar, seen)
        down = dead | rewinds | bad & (in_row == ladder.back_off.after) | seen.alive & rises
        reasons["back_off"] = down
        back_off = step_down(ladder.back_off, back_off, down)
    resets = dead | reasons["reset_refused"]
    return Plan(
        state=RecoveryState(
            trouble_in_row=in_row,
            bad_update_before=state.bad_update_before,
            reset_state=_after_reset(state.reset_state, resets, dead),
            back_off_state=back_off,
            rewind_state=_after_rewind(ladder.rewind, state.rewind_state, rewinds, place),
            loss_watch=_watch_after_rewind(watch, state.rewind_state, rewinds, place),
        ),
        resets=resets,
        rewinds=rewinds,
        gives_up=reasons["gave_up"],
        place=place,
        update_scale=None if ladder.back_off is None else back_off.update_scale,
        reason=sum(jnp.where(on, _BIT[name], 0) for name, on in reasons.items()) + _zero(),
    )


def recover(
    ladder: Ladder | None, planned: Plan | None, state: RecoveryState, params: PyTree, inner_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Parameters and inner state to go on from: the very same, or reset, or those of a snapshot.

    One `lax.cond` after the other, each of the form (change, keep), before that of the step. As branches of the step's
    own cond they cost JAX 0.10 up to three copies of the parameters.
    """
    if ladder is None or planned is None:
        return params, inner_state
    if ladder.reset is not None:
        params, inner_state = lax.cond(
            planned.resets,
            lambda: (params, reset_state(ladder.inner, inner_state, params)),
            lambda: (params, inner_state),
        )
    rung = ladder.rewind
    if rung is not None:
        load, kept = functools.partial(_loaded, rung), (params, inner_state)
        for position, snapshot in enumerate(state.rewind_state.snapshots):
            here = planned.rewinds & (planned.place == position)
            if rung.memory == "host":
                kept = _cond_on_host(here, load, _second, snapshot, kept)
            else:
                kept = lax.cond(here, load, _second, snapshot, kept)
        params, inner_state = kept
    return params, inner_state


def held_updates(planned: Plan | None, before: PyTree, after: PyTree, untouched: PyTree) -> PyTree:
    """Optax's updates for a step that was not applied: those that lead to a snapshot, or to where one is."""
    if planned is None or before is None:
        return untouched
    return lax.cond(planned.rewinds, lambda: _updates_to(after, before, untouched), lambda: untouched)


def scaled(planned: Plan | None, updates: PyTree) -> PyTree:
    """The finished updates as `back_off` scales them."""
    if planned is None or planned.update_scale is None:
        return updates
    return scale_leaves(updates, planned.update_scale)


def finish(
    ladder: Ladder | None,
    planned: Plan | None,
    seen: Seen,
    applied: jax.Array,
    bad_update: jax.Array,
    params: Callable[[], PyTree],
    inner_state: PyTree,
    next_updates: Callable[[PyTree, PyTree], PyTree],
) -> RecoveryState | tuple[()]:
    """The state after the step: looks at the moments and takes a snapshot where they are due.

    `applied` is whether the step's update was; `params` gives the parameters after it, and `next_updates` what the
    optimizer makes of this step's gradient in a state and at parameters.
    """
    if ladder is None or planned is None:
        return ()
    state = planned.state
    healthy = applied & ~seen.refused
    reset, back_off, rewind = state.reset_state, state.back_off_state, state.rewind_state
    if ladder.reset is not None:
        reset = _look_at_moments(
            ladder.reset, ladder.axis_name, reset, seen, applied, params, inner_state, next_updates
        )
    if ladder.back_off is not None:
        back_off = step_up(back_off, healthy, ())
    if ladder.rewind is not None:
        low = ~_diverged(state.loss_watch, (1 + ladder.rewind.diverged) / 2, seen)
        rewind = _take_snapshot(
            ladder.rewind, ladder, rewind, healthy & low, seen.step, state.loss_watch, params, inner_state
        )
    return RecoveryState(
        trouble_in_row=state.trouble_in_row,
        # What Adam makes of zeros in float16 (0 / 0) is held; moments and parameters have nothing to do with it.
        bad_update_before=jnp.where(seen.alive, bad_update & jnp.any(seen.has_gradient), state.bad_update_before),
        reset_state=reset,
        back_off_state=back_off,
        rewind_state=rewind,
        loss_watch=state.loss_watch,
    )


def forgive(state: RecoveryState | tuple[()]) -> RecoveryState | tuple[()]:
    """The state after `clear_halt`: rewinds are counted anew, and the loss as it now is becomes the level."""
    if not isinstance(state, RecoveryState):
        return state
    fields = state._asdict()
    fields["trouble_in_row"] = jax.tree.map(jnp.zeros_like, state.trouble_in_row)
    fields["loss_watch"] = jax.tree.map(jnp.zeros_like, state.loss_watch)
    if isinstance(state.rewind_state, RewindState):
        inside = state.rewind_state._asdict()
        inside["rewinds_in_row"] = jax.tree.map(jnp.zeros_like, state.rewind_state.rewinds_in_row)
        fields["rewind_state"] = RewindState(**inside)
    return RecoveryState(**fields)


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)  # a new array each: a donated buffer may be there once only


def _watches(ladder: Ladder) -> bool:
    return ladder.rewind is not None or (ladder.back_off is not None and ladder.back_off.diverged is not None)


def _diverged(watch: Any, factor: float | None, seen: Seen) -> jax.Array:
    return jnp.zeros((), bool) if factor is None or seen.value is None else loss_above(watch, factor)


def _after_reset(state: Any, resets: jax.Array, dead: jax.Array) -> Any:
    if not isinstance(state, ResetState):
        return state
    return ResetState(
        parameter_sums=state.parameter_sums,
        leaf_moved=state.leaf_moved,
        moments_finite=state.moments_finite | resets,
        frozen_leaves=state.frozen_leaves,
        standing_still=state.standing_still,
        parameters_frozen=state.parameters_frozen & ~resets,
        reset_total=count_if(resets, state.reset_total),
        silent_death_total=count_if(dead, state.silent_death_total),
    )


def _after_rewind(rung: Rewind | None, state: Any, rewinds: jax.Array, place: jax.Array) -> Any:
    if rung is None:
        return state
    dropped = (rewinds & (place != state.newest_snapshot)).astype(jnp.int32)
    return RewindState(
        snapshots=state.snapshots,
        snapshot_steps=state.snapshot_steps,
        snapshot_losses=state.snapshot_losses,
        newest_snapshot=jnp.where(rewinds, place, state.newest_snapshot),
        snapshots_held=state.snapshots_held - dropped,
        # counted anew, so that a snapshot after a rewind proves that it helped
        snapshot_due_in=jnp.where(rewinds, rung.every - 1, state.snapshot_due_in),
        rewinds_in_row=state.rewinds_in_row + rewinds.astype(jnp.int32),
        rewind_total=count_if(rewinds, state.rewind_total),
    )


def _watch_after_rewind(watch: Any, state: Any, rewinds: jax.Array, place: jax.Array) -> Any:
    """The loss at the snapshot is the level from which a rise counts."""
    if not isinstance(state, RewindState):
        return watch
    loss = state.snapshot_losses[place]
    return LossWatch(
        smoothed_loss=jnp.where(rewinds, loss, watch.smoothed_loss),
        best_loss=jnp.where(rewinds, loss, watch.best_loss),
        first_loss=watch.first_loss,
        losses_seen=watch.losses_seen,
    )


def _look_at_moments(
    rung: Reset,
    axis_name: AxisName | None,
    state: ResetState,
    seen: Seen,
    applied: jax.Array,
    params: Callable[[], PyTree],
    inner_state: PyTree,
    next_updates: Callable[[PyTree, PyTree], PyTree],
) -> ResetState:
    """Every `check_every` steps: are the moments finite, and did the parameters move since the last look?"""
    due = seen.alive & (seen.step % rung.check_every == 0)

    def look() -> tuple[jax.Array, jax.Array]:
        now = params()
        return all_finite(moments(inner_state, now), axis_name), fingerprints(now, axis_name)

    finite, sums = lax.cond(due, look, lambda: (state.moments_finite, state.parameter_sums))
    # the first look has nothing to compare with
    moved = jnp.any(sums != state.parameter_sums, axis=1) & (seen.step > 0)
    judged = due & applied  # a step that was held says nothing of the optimizer
    eligible = judged & state.leaf_moved & seen.has_gradient
    still = eligible & ~moved
    dead = still & ~_rounded(jax.eval_shape(params), still, params, inner_state, next_updates, axis_name)
    frozen = jnp.sum(dead, dtype=jnp.int32)
    half = (frozen > 0) & (2 * frozen >= jnp.sum(eligible, dtype=jnp.int32))
    alive = jnp.where(judged, moved | still & ~dead, state.leaf_moved | moved)
    return ResetState(
        parameter_sums=sums,
        leaf_moved=jnp.where(due, alive, state.leaf_moved),
        moments_finite=finite,
        frozen_leaves=jnp.where(judged, frozen, state.frozen_leaves),
        standing_still=jnp.where(judged, jnp.sum(still & ~dead, dtype=jnp.int32), state.standing_still),
        parameters_frozen=jnp.where(judged, half, state.parameters_frozen),
        reset_total=state.reset_total,
        silent_death_total=state.silent_death_total,
    )


def _rounded(
    types: PyTree,
    still: jax.Array,
    params: Callable[[], PyTree],
    inner_state: PyTree,
    next_updates: Callable[[PyTree, PyTree], PyTree],
    axis_name: AxisName | None,
) -> jax.Array:
    """bool[n_leaves]: those of 16 bits that stand still though the update would move them in float32.

    Only the update tells, and the fast way never writes it down: it is made once more, with the gradient of this step,
    in a branch that is taken when a leaf of 16 bits stood still.
    """
    narrow = np.array([is_gradient(leaf) and jnp.finfo(leaf.dtype).bits < 32 for leaf in positions(types)], bool)
    if not narrow.any():
        return jnp.zeros_like(still)

    def moves() -> jax.Array:
        now = params()
        return moves_float32(next_updates(inner_state, now), now, axis_name) & narrow

    return lax.cond(jnp.any(still & narrow), moves, lambda: jnp.zeros_like(still))


def _take_snapshot(
    rung: Rewind,
    ladder: Ladder,
    state: RewindState,
    healthy: jax.Array,
    step: jax.Array,
    watch: LossWatch,
    params: Callable[[], PyTree],
    inner_state: PyTree,
) -> RewindState:
    """Copies parameters and inner state if a snapshot is due and nothing speaks against it."""
    due = healthy & (state.snapshot_due_in <= 0)

    def clean() -> jax.Array:
        now = params()
        trained = only_chosen("guard", ladder.mask, now)
        return all_finite([*positions(trained), *moments(inner_state, now)], ladder.axis_name)

    takes = lax.cond(due, clean, lambda: jnp.zeros((), bool))
    target = (state.newest_snapshot + 1) % rung.keep

    def written(position: int, snapshot: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        writes = takes & (target == position)
        if rung.memory == "host":
            return _cond_on_host(writes, store, _second, _parts(params(), inner_state)[0], snapshot, host=True)
        return lax.cond(writes, lambda: store(_parts(params(), inner_state)[0], snapshot), lambda: snapshot)

    store = functools.partial(_stored, rung)
    snapshots = tuple(written(position, snapshot) for position, snapshot in enumerate(state.snapshots))
    here = takes & (jnp.arange(rung.keep, dtype=jnp.int32) == target)
    waits = jnp.maximum(state.snapshot_due_in - healthy.astype(jnp.int32), 0)
    return RewindState(
        snapshots=snapshots,
        snapshot_steps=jnp.where(here, step + 1, state.snapshot_steps),
        snapshot_losses=jnp.where(here, watch.smoothed_loss, state.snapshot_losses),
        newest_snapshot=jnp.where(takes, target, state.newest_snapshot),
        snapshots_held=jnp.minimum(state.snapshots_held + takes.astype(jnp.int32), rung.keep),
        snapshot_due_in=jnp.where(takes, rung.every - 1, waits),
        rewinds_in_row=jnp.where(takes, 0, state.rewinds_in_row),
        rewind_total=state.rewind_total,
    )


def _parts(params: PyTree, inner_state: PyTree) -> tuple[tuple[PyTree, ...], Any]:
    """What a snapshot holds, and the structure that makes (parameters, inner state) of it again.

    Trees shaped like the parameters, for whoever maps over those (`optax.tree.map_params`), and single arrays: no field
    of the inner state has its name there, so that `optax.tree.get` finds the one that counts.
    """
    shape = jax.tree.structure(params, is_leaf=_is_hole)
    parts, structure = jax.tree.flatten(
        (params, inner_state), is_leaf=lambda node: jax.tree.structure(node, is_leaf=_is_hole) == shape
    )
    return tuple(parts), structure


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _empty_snapshot(rung: Rewind, params: PyTree, inner_state: PyTree) -> tuple[PyTree, ...]:
    def empty(leaf: Any) -> Any:
        narrows = rung.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        if narrows and wider_dtype(leaf.dtype, rung.dtype) != rung.dtype:
            return _placed(rung, jnp.zeros_like(leaf, dtype=rung.dtype))
        return _placed(rung, jnp.zeros_like(leaf))

    return jax.tree.map(empty, _parts(params, inner_state)[0])


def _stored(rung: Rewind, now: tuple[PyTree, ...], snapshot: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """`now` in the dtypes that the snapshot has had since `init`, which `loss_scaling` shows wider parameters."""
    return jax.tree.map(functools.partial(_placed, rung), cast_like(now, snapshot))


def _loaded(rung: Rewind, snapshot: tuple[PyTree, ...], now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """What `_stored` stored, with the hyperparameters that `optax.inject_hyperparams` holds now."""
    if rung.memory == "host":
        snapshot = jax.device_put(snapshot, jax.memory.Space.Device)
    params, inner_state = cast_like(jax.tree.unflatten(_parts(*now)[1], snapshot), now)

    def choose(path: tuple[Any, ...], restored: Any, present: Any) -> Any:
        return present if any(getattr(key, "name", None) == "hyperparams" for key in path) else restored

    return params, jax.tree_util.tree_map_with_path(choose, inner_state, now[1])


def _placed(rung: Rewind, leaf: Any) -> Any:
    return jax.device_put(leaf, jax.memory.Space.Host) if rung.memory == "host" else leaf


def _second(first: Any, second: Any) -> Any:
    del first
    return second


def _cond_on_host(predicate: jax.Array, yes: Any, no: Any, *operands: Any, host: bool = False) -> Any:
    """`lax.cond` with operands in the host's memory; the result is there too if `host`.

    Under `vmap` JAX 0.10 makes of a cond a `select` on its operands, and refuses one between two memories. Here the
    results are brought to the device and chosen there.
    """

    @jax.custom_batching.custom_vmap
    def choose(predicate: jax.Array, operands: Any) -> Any:
        return lax.cond(predicate, yes, no, *operands)

    @choose.def_vmap
    def chosen(size: int, batched: Any, predicate: jax.Array, operands: Any) -> tuple[Any, Any]:
        def whole(x: Any, has_axis: bool) -> Any:
            return x if has_axis else jnp.broadcast_to(jax.device_put(x, jax.memory.Space.Device), (size, *x.shape))

        def one(predicate: jax.Array, first: Any, second: Any) -> Any:
            result = jnp.where(predicate, *(jax.device_put(x, jax.memory.Space.Device) for x in (first, second)))
            return jax.device_put(result, jax.memory.Space.Host) if host else result

        operands = jax.tree.map(whole, operands, batched[1])
        each = functools.partial(jax.vmap(one), whole(predicate, batched[0]))
        result = jax.tree.map(each, jax.vmap(yes)(*operands), jax.vmap(no)(*operands))
        return result, jax.tree.map(lambda _: True, result)

    return choose(predicate, operands)


def _updates_to(target: PyTree, params: PyTree, untouched: PyTree) -> PyTree:
    """Updates that lead from `params` to `target`, in the types of `untouched`."""

    def difference(update: Any, param: Any, wanted: Any) -> Any:
        if not is_gradient(update):
            return update
        wide = wider_dtype(param.dtype, update.dtype)
        return (wanted.astype(wide) - param.astype(wide)).astype(update.dtype)

    return jax.tree.map(difference, untouched, params, target, is_leaf=lambda leaf: leaf is None)

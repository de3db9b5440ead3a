"""The rung `rewind`: returns to a snapshot of parameters and inner state if the loss has diverged."""

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.forms import cond_or_select
from optax_guard._common.tree import cast_like, is_gradient, leaves_with_none, wider_dtype
from optax_guard._common.typing import AxisName, Mask, PyTree
from optax_guard._step.mask import only_chosen
from optax_guard._step.moments import all_finite, moments
from optax_guard.recovery._loss_watch import LossWatch
from optax_guard.recovery._seen import After, Seen, Trouble

__all__ = [
    "Memory",
    "Rewind",
    "RewindState",
    "after_rewind",
    "empty_rewind",
    "go_back",
    "reasons_to_rewind",
    "rewind",
    "rewinds_cleared",
    "snapshot_is_due",
    "take_snapshot",
    "updates_to",
    "watch_after_rewind",
    "without_snapshot",
]

Memory: TypeAlias = Literal["device", "host"]

_MOST_SNAPSHOTS = 100  # each is a copy of parameters and state and has its own branch


class RewindState(NamedTuple):
    """The state of `rewind`."""

    snapshots: tuple[Any, ...]  # `keep` copies of parameters and inner state, without the names of its fields
    snapshot_steps: jax.Array  # i32[keep]: the guard's step count at each snapshot; -1 if there is none
    snapshot_losses: jax.Array  # f32[keep]: the smoothed loss at each snapshot
    newest_snapshot: jax.Array  # i32[]: the place of the newest snapshot
    snapshots_held: jax.Array  # i32[]: the number of snapshots that can be restored
    snapshot_due_in: jax.Array  # i32[]: healthy steps until the next snapshot
    rewinds_in_row: jax.Array  # i32[]: rewinds since the last snapshot was taken
    rewind_total: jax.Array  # i32[]


class Rewind(NamedTuple):
    """The settings of `rewind`."""

    every: int
    keep: int
    after: int
    diverged: float
    attempts: int
    dtype: Any
    memory: Memory


def rewind(
    every: int = 100,
    *,
    keep: int = 2,
    after: int = 20,
    diverged: float = 2.0,
    attempts: int = 3,
    dtype: DTypeLike | None = None,
    memory: Memory = "device",
) -> Rewind:
    """Return to a snapshot if the loss has diverged or steps were refused in a row, and continue with new data.

    params, inner state <- the newest snapshot       while the data continue, so that the harmful batches are skipped

    A snapshot is taken after the first healthy step, and then every `every` healthy steps, counted anew after a rewind.
    A step is healthy if it is without trouble and its smoothed loss is in the lower half of the range up to `diverged`;
    in addition, the parameters and moments must be finite.

    Guarantees:
      - Through `apply_gradients`, the parameters and the inner state after a rewind (moments, counters, schedules,
        keys) equal the snapshot bit for bit if `dtype=None`. The rules, the guard's counters and the data are not
        rewound. Neither are the hyperparameters in the state of `optax.inject_hyperparams`: a learning rate lowered by
        hand stays lowered, and one that follows a schedule is set from its counter.
      - Snapshots contain no field names, so `optax.tree.get(state, "learning_rate")` finds the one in use.
      - A second rewind before another snapshot is taken returns to the previous snapshot, if there is one.
      - After `attempts` rewinds without a new snapshot, there are no more. If the loss is still diverged, the guard
        halts, since the batches were not the cause. `clear_halt` continues and takes the present loss as the new level.

    The loss (`value=`) is tracked by s, an average over 50 steps in which one loss counts as at most four times s. It
    has diverged if s - best > (diverged - 1) * max(|best|, |first loss| / 100), judged from the 25th loss on. A loss of
    eight times the best is noticed after 12 steps, and one of three times after 35; five spikes in a row have no
    effect.

    ==========================================  =====================================================================
    Case                                        Result
    ==========================================  =====================================================================
    no `value=`                                 only steps of trouble in a row cause a rewind
    no snapshot yet                             no rewind: the guard continues
    the loss is NaN, the gradient finite        held as a step of trouble; not in the average
    a loss of exactly 0 (an empty batch)        not in the average
    no `params`                                 ValueError, since there is nothing to store
    16-bit parameters in `loss_scaling`         stored in float32, as the guard sees them: exact, twice the memory
    `memory="host"` under `vmap`                correct, but every snapshot moves to the device and back at every step
    through `update`                            the update leads back to the snapshot up to rounding
    `dtype=jnp.bfloat16`                        restored to 3 digits with half the memory, not bit for bit
    ==========================================  =====================================================================

    The snapshots need `keep` times the memory of the parameters and the inner state. Per float32 parameter and
    snapshot, that is 12 bytes with Adam (4 with SGD, 8 with momentum or Lion), or 6 with Adam and
    `dtype=jnp.bfloat16`. A snapshot costs one copy, so a step costs 1 / `every` of a copy on average.

    Args:
      every: the number of healthy steps between snapshots (>= 1).
      keep: the number of snapshots (1 to 100).
      after: the number of steps of trouble in a row (>= 1) that cause a rewind, counted anew after each rewind. Above
        `halt_after` it would never act on non-finite steps, so `guard` refuses that.
      diverged: the multiple (> 1) of the best smoothed loss that counts as diverged.
      attempts: the number of rewinds without a snapshot in between (>= 1).
      dtype: the dtype of floating-point numbers in a snapshot: None keeps them unchanged, `jnp.bfloat16` and
        `jnp.float32` narrow wider ones. Other dtypes have too small a range for second moments.
      memory: "device", or "host" for the memory of the accelerator's host (pinned; JAX moves the arrays inside the
        compiled step).

    Returns:
      A rung for `guard(..., recovery=(...,))`.

    Raises:
      ValueError: a static argument is invalid.

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
      batches. In the paper this is done by hand.
    """
    name = "rewind"
    diverged = validate.scalar(name, "diverged", diverged, low=1, open_low=True, static=True)
    if dtype is not None:  # the range of others is too small for second moments
        dtype = validate.floating_dtype(name, "dtype", dtype, (jnp.bfloat16, jnp.float32))
    validate.one_of(name, "memory", memory, Memory)
    return Rewind(
        every=validate.integer(name, "every", every, low=1),
        keep=validate.integer(
            name, "keep", keep, low=1, high=_MOST_SNAPSHOTS, reason="each is a copy of the whole state"
        ),
        after=validate.integer(name, "after", after, low=1),
        diverged=diverged,
        attempts=validate.integer(name, "attempts", attempts, low=1),
        dtype=dtype,
        memory=memory,
    )


def empty_rewind(rung: Rewind, params: PyTree, inner_state: PyTree) -> RewindState:
    """The state before the first step, with room for the snapshots."""
    return RewindState(
        snapshots=tuple(_empty_snapshot(rung, params, inner_state) for _ in range(rung.keep)),
        snapshot_steps=jnp.full(rung.keep, -1, jnp.int32),
        snapshot_losses=jnp.zeros(rung.keep, jnp.float32),
        newest_snapshot=jnp.full((), rung.keep - 1, jnp.int32),
        snapshots_held=jnp.zeros((), jnp.int32),
        snapshot_due_in=jnp.zeros((), jnp.int32),
        rewinds_in_row=jnp.zeros((), jnp.int32),
        rewind_total=jnp.zeros((), jnp.int32),
    )


def reasons_to_rewind(
    rung: Rewind, state: RewindState, seen: Seen, trouble: Trouble, diverged: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Before the step: the reasons to rewind, by their names in the flight log, and the place of the snapshot."""
    may = (state.rewinds_in_row < rung.attempts) & (state.snapshots_held > 0)
    diverged = seen.alive & seen.finite & diverged
    reasons = {
        "rewind_refused": trouble.now & (trouble.in_row % rung.after == 0) & may,
        "rewind_diverged": diverged & may,
        "gave_up": diverged & (state.rewinds_in_row >= rung.attempts),
    }
    again = (state.rewinds_in_row > 0) & (state.snapshots_held > 1)
    return reasons, (state.newest_snapshot - again.astype(jnp.int32)) % rung.keep


def go_back(
    rung: Rewind, rewinds: jax.Array, place: jax.Array, state: RewindState, params: PyTree, inner_state: PyTree
) -> tuple[PyTree, PyTree]:
    """In place of the step: the parameters and inner state of the snapshot."""
    load, kept = functools.partial(_loaded, rung), (params, inner_state)
    for position, snapshot in enumerate(state.snapshots):
        here = rewinds & (place == position)
        if rung.memory == "host":
            kept = _cond_on_host(here, load, _second_of, snapshot, kept)
        else:
            kept = cond_or_select(
                here, functools.partial(load, snapshot, kept), functools.partial(lambda now: now, kept)
            )
    return kept


def updates_to(target: PyTree, params: PyTree, untouched: PyTree) -> PyTree:
    """Updates that lead from `params` to `target`, in the dtypes of `untouched`."""

    def difference(update: Any, param: Any, wanted: Any) -> Any:
        if not is_gradient(update):
            return update
        wide = wider_dtype(param.dtype, update.dtype)
        return (wanted.astype(wide) - param.astype(wide)).astype(update.dtype)

    return jax.tree.map(difference, untouched, params, target, is_leaf=lambda leaf: leaf is None)


def after_rewind(rung: Rewind, state: RewindState, rewinds: jax.Array, place: jax.Array) -> RewindState:
    """The state after a rewind, with its counters."""
    dropped = (rewinds & (place != state.newest_snapshot)).astype(jnp.int32)
    return state._replace(
        newest_snapshot=jnp.where(rewinds, place, state.newest_snapshot),
        snapshots_held=state.snapshots_held - dropped,
        # counted anew, so that a snapshot after a rewind proves that it helped
        snapshot_due_in=jnp.where(rewinds, rung.every - 1, state.snapshot_due_in),
        rewinds_in_row=state.rewinds_in_row + rewinds.astype(jnp.int32),
        rewind_total=count_if(rewinds, state.rewind_total),
    )


def watch_after_rewind(watch: LossWatch, state: RewindState, rewinds: jax.Array, place: jax.Array) -> LossWatch:
    """The watch after a rewind, in which the loss at the snapshot is the level from which a rise counts."""
    loss = state.snapshot_losses[place]
    return watch._replace(
        smoothed_loss=jnp.where(rewinds, loss, watch.smoothed_loss),
        best_loss=jnp.where(rewinds, loss, watch.best_loss),
    )


def snapshot_is_due(state: RewindState, healthy: jax.Array) -> jax.Array:
    """Whether a step that is `healthy` ends with a snapshot."""
    return healthy & (state.snapshot_due_in <= 0)


def without_snapshot(state: RewindState, healthy: jax.Array) -> RewindState:
    """The state after a step at which no snapshot is due."""
    return state._replace(snapshot_due_in=jnp.maximum(state.snapshot_due_in - healthy.astype(jnp.int32), 0))


def take_snapshot(
    rung: Rewind,
    mask: Mask | None,
    axis_name: AxisName | None,
    state: RewindState,
    watch: LossWatch,
    healthy: jax.Array,
    seen: Seen,
    after: After,
) -> RewindState:
    """After the step: stores the parameters and inner state if a snapshot is due and they are finite."""
    due = snapshot_is_due(state, healthy)

    def clean() -> jax.Array:
        now = after.params()
        trained = only_chosen("guard", mask, now)
        return all_finite([*leaves_with_none(trained), *moments(after.inner_state, now)], axis_name)

    def now() -> tuple[PyTree, ...]:
        return _parts(after.params(), after.inner_state)[0]

    takes = cond_or_select(due, clean, lambda: jnp.zeros((), bool))
    target = (state.newest_snapshot + 1) % rung.keep

    def written(position: int, snapshot: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        writes = takes & (target == position)
        if rung.memory == "host":
            return _cond_on_host(writes, store, _second_of, now(), snapshot, host=True)
        return cond_or_select(writes, lambda: store(now(), snapshot), lambda: snapshot)

    store = functools.partial(_stored, rung)
    snapshots = tuple(written(position, snapshot) for position, snapshot in enumerate(state.snapshots))
    here = takes & (jnp.arange(rung.keep, dtype=jnp.int32) == target)
    state = without_snapshot(state, healthy)
    return state._replace(
        snapshots=snapshots,
        snapshot_steps=jnp.where(here, seen.step + 1, state.snapshot_steps),
        snapshot_losses=jnp.where(here, watch.smoothed_loss, state.snapshot_losses),
        newest_snapshot=jnp.where(takes, target, state.newest_snapshot),
        snapshots_held=jnp.minimum(state.snapshots_held + takes.astype(jnp.int32), rung.keep),
        snapshot_due_in=jnp.where(takes, rung.every - 1, state.snapshot_due_in),
        rewinds_in_row=jnp.where(takes, 0, state.rewinds_in_row),
    )


def rewinds_cleared(state: RewindState) -> RewindState:
    """The state after `clear_halt`, with the count of rewinds at 0."""
    return state._replace(rewinds_in_row=jax.tree.map(jnp.zeros_like, state.rewinds_in_row))


def _parts(params: PyTree, inner_state: PyTree) -> tuple[tuple[PyTree, ...], Any]:
    """The contents of a snapshot, and the structure that turns them back into (parameters, inner state).

    They are trees with the structure of the parameters, so that `optax.tree.map_params` works, and single arrays. No
    field of the inner state keeps its name, so that `optax.tree.get` finds the one in use.
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
    """`now` in the dtypes that the snapshot has had since `init`, to which `loss_scaling` passes wider parameters."""
    return jax.tree.map(functools.partial(_placed, rung), cast_like(now, snapshot))


def _loaded(rung: Rewind, snapshot: tuple[PyTree, ...], now: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """The stored values, with the present hyperparameters of `optax.inject_hyperparams`."""
    if rung.memory == "host":
        snapshot = jax.device_put(snapshot, jax.memory.Space.Device)
    params, inner_state = cast_like(jax.tree.unflatten(_parts(*now)[1], snapshot), now)

    def choose(path: tuple[Any, ...], restored: Any, present: Any) -> Any:
        return present if any(getattr(key, "name", None) == "hyperparams" for key in path) else restored

    return params, jax.tree_util.tree_map_with_path(choose, inner_state, now[1])


def _placed(rung: Rewind, leaf: Any) -> Any:
    return jax.device_put(leaf, jax.memory.Space.Host) if rung.memory == "host" else leaf


def _second_of(first: Any, second: Any) -> Any:
    del first
    return second


def _cond_on_host(predicate: jax.Array, yes: Any, no: Any, *operands: Any, host: bool = False) -> Any:
    """`lax.cond` with operands in the host's memory; the result is there too if `host`.

    Under `vmap`, JAX 0.10 turns a cond into a `select` on its operands and refuses one between two memories. Here the
    results are moved to the device and selected there.
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

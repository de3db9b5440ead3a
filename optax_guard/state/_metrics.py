"""Reads from a state what its guards and accumulators saw.

=====================  ============================================================
Function               Use it for
=====================  ============================================================
`metrics(state)`       numbers for a logger, inside or outside `jit`
`flight_log(state)`    the last steps one by one, on the host, after a failure
=====================  ============================================================
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.new_params import QKClipState
from optax_guard._common.tree import field_array, find_states
from optax_guard._guard import GuardState
from optax_guard._loss_scaling import LossScalingState
from optax_guard._step.reading import axes_in_front, check_on_host, member, members
from optax_guard._step.record import EVENTS, HELD, last_row, read_rows
from optax_guard.accumulation._calls import AccumulateState
from optax_guard.recovery._ladder import RecoveryState
from optax_guard.recovery._rewind import RewindState
from optax_guard.rules._norm_history import NormHistoryState
from optax_guard.state._counts import BOUNDS, numbered

__all__ = ["flight_log", "metrics"]


def metrics(state: optax.OptState) -> dict[str, jax.Array]:
    """Returns scalars under flat names, as loggers need them, from any nesting and also inside `jit`.

    ============================  ====================================================================================
    Name                          Meaning
    ============================  ====================================================================================
    guard/grad_norm               f32: the last gradient's norm before the rules; NaN or Inf if it was not finite
    guard/clipped_norm            f32: the norm that went into the optimizer; 0 if the step was held
    guard/scale                   f32: the smallest factor of a leaf; 0 if the step was held
    guard/skipped                 i32: 1 if the last step was held, for whatever reason
    guard/worst_leaf              i32: index into `leaf_names(params, state)`: first non-finite leaf, else largest norm
    guard/step                    i32: calls, including held steps
    guard/clipped_total           i32: applied steps that a rule scaled
    guard/skipped_total           i32: held steps
    guard/nonfinite_total         i32: steps held because the gradient (or checked update) was not finite
    guard/let_through_total       i32: refused steps that were applied because patience had run out
    guard/refused_in_row          i32: finite refusals in a row
    guard/nonfinite_in_row        i32: non-finite steps in a row
    guard/halted                  bool: every further step is held
    guard/trouble_in_row          i32: with `recovery` or `stabilize`: steps in a row that were refused or not finite
    guard/start_reset_total       i32: with `stabilize`: new starts, since one of the first gradients was far too large
    guard/reset_total             i32: with `reset_moments`: resets, for whatever reason
    guard/silent_death_total      i32: likewise: resets because moments were not finite or parameters did not move
    guard/moments_finite          bool: likewise: whether the moments were finite at the last check
    guard/frozen_leaves           i32: likewise: leaves that have a gradient but did not move at the last check
    guard/standing_still          i32: likewise: 16-bit leaves that did not move, but would in float32
    guard/update_scale            f32: with `back_off`: the factor of the last update
    guard/back_off_total          i32: likewise: reductions of that factor
    guard/rewind_total            i32: with `rewind`: rewinds
    guard/snapshot_step           i32: likewise: the step count of the snapshot for the next rewind; -1 if none
    guard/smoothed_loss           f32: likewise, or with `back_off(diverged=...)`
    guard/best_loss               f32: the lowest smoothed loss, or that of the snapshot after a rewind
    norm_history/threshold        f32: the norm that `clip_by_norm_history` lets pass at the next step; 0 at first
    norm_history/touched_in_row   i32: steps it scaled in a row; many mean a lasting rise or an explosion
    norm_history/leaf             i32: with `scope="leaf"`, the leaf with the longest run, to which the two apply, as an
                                  index into `leaf_names(params)`; -1 with `scope="tree"`
    limit_step/step               i32: updates that `limit_step` has seen
    limit_step/bound_total        i32: updates that it scaled down
    limit_step/scale              f32: the smallest factor of a leaf in the last update
    limit_step_growth/...         the same for `limit_step_growth`, of which the default of `stabilize` is one, and
                                  average (f32): of the relative changes that its bound follows
    clippy/..., update_norm/...   the same for `clippy` and for `clip_by_update_norm` (without `step`)
    published_update_norm/...     the same for `published.clip_by_update_norm`
    qk_clip/max_logit             f32: the largest attention logit of the last step, over all layers and heads
    qk_clip/threshold             f32: `max_logit` of the last step; 0 if it was not a finite number above 0
    qk_clip/clipped_heads         i32: heads that `qk_clip` scaled in the last step
    qk_clip/clipped_total         i32: steps in which it scaled a head
    qk_clip/invalid_total         i32: maxima that were NaN, Inf or not above 0
    qk_clip/LAYER/max_logit       f32: the same for each layer, as in `qk_clip/blocks_0/attention/max_logit`
    qk_clip/LAYER/worst_head      i32: its head; an index into the flattened [layers, heads] if layers are stacked
    accumulate/...                micro_step, weight, emitted_total, dropped_total, empty_total, updated
    loss_scaling/...              scale (f32), clean_in_row, overflow_total
    ============================  ====================================================================================

    A second guard in the same state appears as `guard_1/...` and a third as `guard_2/...`, outer before inner.

    Args:
      state: any optimizer state, including the `opt_state` of `flax.nnx.Optimizer`.

    Returns:
      A dict of 0-d arrays, empty if `state` holds nothing of this library. Before the first step, norms are 0 and
      indices are -1. On the host, `jax.device_get(metrics(state))` fetches all values at once. For a state of many runs
      at once (`jax.vmap` over seeds, `jax.pmap`), each array has the axes of the members.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), og.clip_by_global_norm(1.0))
      >>> params = jnp.ones(2)
      >>> _, state = og.apply_gradients(tx, jnp.array([3.0, 4.0]), tx.init(params), params)
      >>> {name: round(float(x), 3) for name, x in og.metrics(state).items() if "norm" in name}
      {'guard/grad_norm': 5.0, 'guard/clipped_norm': 1.0}
    """
    result: dict[str, jax.Array] = {}
    readers = (
        (GuardState, "guard", _guard_metrics),
        (NormHistoryState, "norm_history", _norm_history),
        *((kind, name, functools.partial(_bound, prefix)) for kind, name, prefix in BOUNDS),
        (QKClipState, "qk_clip", _qk_clip),
        (AccumulateState, "accumulate", _accumulate),
        (LossScalingState, "loss_scaling", _loss_scaling),
    )
    axes = _member_axes(state)
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):  # a NaN that was seen is reported as NaN, which is not a bug to stop at
        for kind, prefix, read in readers:
            for index, each in enumerate(find_states(state, kind)):
                numbers = _of_members(read, axes)(_own_numbers(each))
                result |= {f"{numbered(prefix, index)}/{name}": number for name, number in numbers.items()}
    return result


def flight_log(state: optax.OptState) -> np.ndarray:
    """Reads the flight recorder's rows on the host, oldest first.

    Args:
      state: an optimizer state that holds one guard (pass its part of the state if there are several).

    Returns:
      A NumPy structured array of at most `recorder_rows` rows, with the columns `step`, `value` (the loss; NaN if none
      was passed), `value_given`, `grad_norm` (NaN and Inf included), `clipped_norm`, `scale`, `max_logit`
      (the largest attention logit of `max_logits=`; NaN if none were passed), `logit_layer` and `logit_head` (whose it
      is: the CRC-32 of the layer's path, which `report` turns into a name, and the number of the head; -1 if none were
      passed), `event` (applied, clipped, skipped,
      let_through, nonfinite, nonfinite_update, halted, recovery), `rule` (the rule that refused, else the first that
      scaled, else -1), `worst_leaf` (an index into `leaf_names(params, state)`), `recovery` (what the
      ladder did: reset_refused, reset_nonfinite, reset_frozen, back_off, rewind_refused, rewind_diverged, gave_up,
      reset_start; several are joined by `+`) and `tag` (the integer passed as `tag=` to identify the batch; -1 if none
      was). For a state of many runs at once (`jax.vmap`, `jax.pmap`), the axes of the members come before that of the
      rows, and a member with fewer rows than another begins with rows of step -1 and no event.

    Raises:
      ValueError: `state` holds no guard or more than one.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), og.skip_large(10.0))
      >>> params, state = jnp.ones(2), tx.init(jnp.ones(2))
      >>> for size in (1.0, 100.0, jnp.nan):
      ...     params, state = og.apply_gradients(tx, jnp.full(2, size), state, params)
      >>> [str(event) for event in og.flight_log(state)["event"]]
      ['applied', 'skipped', 'nonfinite']
    """
    states = find_states(state, GuardState)
    if len(states) != 1:
        raise ValueError(
            f"flight_log: expected one guard in this state, found {len(states)}; pass the guard's own state."
        )
    check_on_host("flight_log", states[0].guard_step)
    logs = [read_rows(member(states[0].recorder, index)) for index in members(states[0].guard_step)]
    shape = np.shape(field_array(states[0].guard_step))
    if not shape:
        return logs[0]
    longest = max(len(log) for log in logs)
    rows = np.zeros((len(logs), longest), logs[0].dtype)
    rows["step"] = -1
    for row, log in zip(rows, logs, strict=True):
        row[longest - len(log) :] = log
    return rows.reshape(*shape, longest)


def _member_axes(state: optax.OptState) -> int:
    """The number of member axes in front of every leaf, taken from a field that is a scalar in a single run."""
    scalars = (
        (GuardState, "guard_step"),
        (AccumulateState, "micro_step"),
        (LossScalingState, "loss_scale"),
        *((kind, f"{prefix}_scale") for kind, _, prefix in BOUNDS),
        (QKClipState, "qk_clip_step"),
    )
    found = [axes_in_front(getattr(each, field)) for kind, field in scalars for each in find_states(state, kind)]
    return found[0] if found else 0


def _of_members(read: Callable[[Any], dict[str, jax.Array]], axes: int) -> Callable[[Any], dict[str, jax.Array]]:
    return read if axes == 0 else _of_members(jax.vmap(read), axes - 1)


def _own_numbers(state: Any) -> Any:
    """The state without the arrays of the optimizer, from which no metric comes."""
    if isinstance(state, GuardState):
        ladder = state.recovery_state
        if isinstance(ladder, RecoveryState) and isinstance(ladder.rewind_state, RewindState):
            ladder = ladder._replace(rewind_state=ladder.rewind_state._replace(snapshots=()))
        return state._replace(guarded_state=(), rule_states=(), seen_leaves=(), recovery_state=ladder)
    if isinstance(state, AccumulateState):
        return state._replace(accumulated_state=(), gradient_sum=())
    return state._replace(unscaled_state=()) if isinstance(state, LossScalingState) else state


def _guard_metrics(state: GuardState) -> dict[str, jax.Array]:
    step = field_array(state.guard_step)
    row = last_row(state.recorder, step)
    held = jnp.array([event in HELD for event in EVENTS], jnp.int32)
    return {
        "grad_norm": row.grad_norm,
        "clipped_norm": row.clipped_norm,
        "scale": row.scale,
        "skipped": jnp.where(row.event >= 0, held[row.event], 0),
        "worst_leaf": row.worst_leaf,
        "step": step,
        **{
            name: field_array(getattr(state, name))
            for name in (
                "clipped_total",
                "skipped_total",
                "nonfinite_total",
                "let_through_total",
                "refused_in_row",
                "nonfinite_in_row",
                "halted",
            )
        },
        **(_recovery_metrics(state.recovery_state) if isinstance(state.recovery_state, RecoveryState) else {}),
    }


def _recovery_metrics(state: RecoveryState) -> dict[str, jax.Array]:
    """The metrics of the rungs that are present."""
    numbers = {"trouble_in_row": field_array(state.trouble_in_row)}
    for part, names in (
        (state.reset_state, ("reset_total", "silent_death_total", "moments_finite", "frozen_leaves", "standing_still")),
        (state.back_off_state, ("update_scale", "back_off_total")),
        (state.rewind_state, ("rewind_total",)),
        (state.loss_watch, ("smoothed_loss", "best_loss")),
        (state.start_state, ("start_reset_total",)),
    ):
        numbers |= {name: field_array(getattr(part, name)) for name in names if part != ()}
    if state.rewind_state != ():
        steps, newest = field_array(state.rewind_state.snapshot_steps), field_array(state.rewind_state.newest_snapshot)
        numbers["snapshot_step"] = steps[newest]
    return numbers


def _accumulate(state: AccumulateState) -> dict[str, jax.Array]:
    return {
        "micro_step": field_array(state.micro_step),
        "weight": field_array(state.accumulated_weight),
        "emitted_total": field_array(state.emitted_total),
        "dropped_total": field_array(state.dropped_total),
        "empty_total": field_array(state.empty_total),
        "updated": field_array(state.emitted),
    }


def _qk_clip(state: QKClipState) -> dict[str, jax.Array]:
    layers = {layer: field_array(maxima) for layer, maxima in state.qk_clip_max_logits.items()}
    names = ("threshold", "clipped_heads", "clipped_total", "invalid_total")
    return {
        "max_logit": jnp.max(jnp.stack([jnp.max(maxima) for maxima in layers.values()])),
        **{name: field_array(getattr(state, f"qk_clip_{name}")) for name in names},
        **{f"{layer}/max_logit".lstrip("/"): jnp.max(maxima) for layer, maxima in layers.items() if layer},
        **{f"{layer}/worst_head".lstrip("/"): jnp.argmax(maxima).astype(jnp.int32) for layer, maxima in layers.items()},
    }


def _norm_history(state: NormHistoryState) -> dict[str, jax.Array]:
    threshold, seen = field_array(state.log_threshold), field_array(state.norms_seen)
    in_row = field_array(state.touched_in_row)
    leaf = jnp.full((), -1, jnp.int32)
    threshold = jnp.where(seen > 0, jnp.exp(threshold), 0)
    if in_row.size == 0:
        return {"threshold": jnp.zeros(()), "touched_in_row": jnp.zeros((), jnp.int32), "leaf": leaf}
    if in_row.ndim > 0:
        leaf = jnp.argmax(in_row).astype(jnp.int32)
        threshold, in_row = threshold[leaf], in_row[leaf]
    return {"threshold": threshold, "touched_in_row": in_row, "leaf": leaf}


def _bound(prefix: str, state: Any) -> dict[str, jax.Array]:
    """The counters of a bound, whose fields begin with `prefix`; not all of them have all."""
    names = [name for name in ("step", "average", "bound_total", "scale") if f"{prefix}_{name}" in state._fields]
    return {name: field_array(getattr(state, f"{prefix}_{name}")) for name in names}


def _loss_scaling(state: LossScalingState) -> dict[str, jax.Array]:
    return {
        "scale": field_array(state.loss_scale),
        "clean_in_row": field_array(state.clean_in_row),
        "overflow_total": field_array(state.overflow_total),
    }

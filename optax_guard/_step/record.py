"""The flight recorder: a ring buffer in the guard's state, so that any checkpoint tells what happened.

It has one row per step. No number in it is ever NaN or Inf, since a checkpoint must stay clean: these are stored as
codes, and reading restores them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common.tree import field_array

__all__ = [
    "EVENTS",
    "HELD",
    "RECOVERIES",
    "FlightRecorder",
    "Row",
    "add_row",
    "empty_recorder",
    "last_row",
    "read_rows",
]

EVENTS = (
    "applied",  # applied with the unchanged gradient
    "clipped",  # applied with a gradient that a rule scaled
    "skipped",  # held: a rule refused it
    "let_through",  # applied as the rules scaled it, although a rule refused it, since `patience` had run out
    "nonfinite",  # held: the gradient was NaN, Inf, or too large to square
    "nonfinite_update",  # held: the inner optimizer's update was not finite (with `check_updates=True`)
    "halted",  # held: the guard had halted before
    "recovery",  # held: the gradient was good, but the ladder acted in place of the step
)
HELD = ("skipped", "nonfinite", "nonfinite_update", "halted", "recovery")  # events that left no trace
RECOVERIES = (  # what the ladder did; several may occur together
    "reset_refused",  # moments reset, after refused or non-finite steps in a row
    "reset_nonfinite",  # moments reset, since one was not finite
    "reset_frozen",  # moments reset, since the parameters had stopped moving
    "back_off",  # updates scaled down from here on
    "rewind_refused",  # back to a snapshot, after refused or non-finite steps in a row
    "rewind_diverged",  # back to a snapshot, since the smoothed loss had diverged
    "gave_up",  # halted, since the loss diverged again after all rewinds
    "reset_start",  # moments reset and histories begun anew, since one of the first gradients had been far too large
)
_NUMBERS = ("value", "grad_norm", "clipped_norm", "scale", "max_logit")
_CODES = 9  # columns of integers
_FINITE, _NAN, _PLUS_INF, _MINUS_INF, _ABSENT = range(5)  # the kind of a number
_BITS = 3  # the number of bits of a kind in the column of kinds


class Row(NamedTuple):
    """One step as the guard saw it."""

    step: jax.Array  # i32[]: the number of calls before this one
    value: jax.Array | None  # f32[]: the loss, if it was passed
    grad_norm: jax.Array  # f32[]: the norm before the rules; NaN or Inf if the gradient held them
    clipped_norm: jax.Array  # f32[]: the norm that went into the optimizer; 0 for a held step
    scale: jax.Array  # f32[]: the smallest factor of a leaf; 0 for a held step
    event: jax.Array  # i32[]: index into EVENTS
    rule: jax.Array  # i32[]: the position of the rule that refused, else of the first that scaled; -1 if none
    worst_leaf: jax.Array  # i32[]: the first leaf that is not finite, else that of largest norm; -1 without leaves
    recovery: jax.Array | int = 0  # i32[]: bits of RECOVERIES
    max_logit: jax.Array | None = None  # f32[]: the largest attention logit, if maxima were passed
    tag: jax.Array | int = -1  # i32[]: the number that identifies the batch; -1 if none was passed
    logit_layer: jax.Array | int = 0  # u32[]: the CRC-32 of the name of the layer whose logit is the largest
    logit_head: jax.Array | int = -1  # i32[]: its head; -1 if no maxima were passed


class FlightRecorder(NamedTuple):
    """The last `history` rows. The row of step t is at t % history; `codes[:, 0]` is -1 in unwritten rows."""

    numbers: jax.Array  # f32[history, 5]: value, grad_norm, clipped_norm, scale, max_logit; 0 where not finite
    codes: jax.Array  # i32[history, 9]: step, event, rule, worst_leaf, kinds of the numbers, recovery, tag, layer, head


def empty_recorder(history: int) -> FlightRecorder:
    """A recorder without rows."""
    return FlightRecorder(
        numbers=jnp.zeros((history, len(_NUMBERS)), jnp.float32), codes=jnp.full((history, _CODES), -1, jnp.int32)
    )


def add_row(recorder: FlightRecorder, row: Row) -> FlightRecorder:
    """Writes one row, in place if the state is donated."""
    given = [getattr(row, name) for name in _NUMBERS]
    numbers = jnp.stack([jnp.zeros((), jnp.float32) if n is None else jnp.asarray(n, jnp.float32) for n in given])
    kinds = jnp.select(
        [np.array([n is None for n in given]), jnp.isnan(numbers), jnp.isposinf(numbers), jnp.isneginf(numbers)],
        [jnp.full(len(given), kind, jnp.int32) for kind in (_ABSENT, _NAN, _PLUS_INF, _MINUS_INF)],
        jnp.full(len(given), _FINITE, jnp.int32),
    )
    packed = jnp.sum(kinds << _BITS * np.arange(len(_NUMBERS), dtype=np.int32), dtype=jnp.int32)
    layer = jax.lax.bitcast_convert_type(jnp.asarray(row.logit_layer, jnp.uint32), jnp.int32)
    recovery, tag, head = (jnp.asarray(code, jnp.int32) for code in (row.recovery, row.tag, row.logit_head))
    codes = jnp.stack([row.step, row.event, row.rule, row.worst_leaf, packed, recovery, tag, layer, head])
    place = row.step % recorder.codes.shape[0]
    return FlightRecorder(
        numbers=recorder.numbers.at[place].set(jnp.where(kinds == _FINITE, numbers, 0)),
        codes=recorder.codes.at[place].set(codes),
    )


def last_row(recorder: FlightRecorder, step: jax.Array) -> Row:
    """The row of step `step - 1`; works inside `jit`. Before the first step, its event is -1 and its numbers are 0."""
    all_numbers, all_codes = _columns(recorder)
    place = (step - 1) % all_codes.shape[0]
    step, event, rule, worst_leaf, kinds, recovery, tag, layer, head = all_codes[place]
    numbers = dict(zip(_NUMBERS, _unpack(all_numbers[place], jnp.maximum(kinds, 0), jnp), strict=True))
    recovery = jnp.maximum(recovery, 0)
    layer = jax.lax.bitcast_convert_type(layer, jnp.uint32)
    codes = {"event": event, "rule": rule, "worst_leaf": worst_leaf, "recovery": recovery, "tag": tag}
    return Row(step=step, **numbers, **codes, logit_layer=layer, logit_head=head)


def read_rows(recorder: FlightRecorder) -> np.ndarray:
    """All rows on the host, oldest first, as a structured array."""
    numbers, codes = (np.asarray(x) for x in jax.device_get(_columns(recorder)))
    written = codes[:, 0] >= 0
    numbers, codes = numbers[written], codes[written]
    order = np.argsort(codes[:, 0], kind="stable")
    rows = np.zeros(
        len(order),
        dtype=[
            ("step", "i4"),
            *((n, "f4") for n in _NUMBERS),
            ("event", "U16"),
            ("rule", "i4"),
            ("worst_leaf", "i4"),
            ("recovery", "U64"),
            ("tag", "i4"),
            ("value_given", "?"),
            ("logit_layer", "u4"),
            ("logit_head", "i4"),
        ],
    )
    for name, column in zip(_NUMBERS, _unpack(numbers[order].T, codes[order, 4], np), strict=True):
        rows[name] = column
    for name, column in (("step", 0), ("rule", 2), ("worst_leaf", 3), ("tag", 6), ("logit_head", 8)):
        rows[name] = codes[order, column]
    rows["logit_layer"] = codes[order, 7].view(np.uint32)
    rows["value_given"] = _kind(codes[order, 4], 0) != _ABSENT
    rows["event"] = np.array(EVENTS)[codes[order, 1]]
    rows["recovery"] = [_recovery_words(bits) for bits in codes[order, 5]]
    return rows


def _columns(recorder: FlightRecorder) -> tuple[jax.Array, jax.Array]:
    """The two arrays of a recorder; raises if their columns mean something else."""
    numbers, codes = map(field_array, recorder)
    if (numbers.shape[-1], codes.shape[-1]) != (len(_NUMBERS), _CODES):
        raise ValueError(
            f"the flight recorder in this state has {numbers.shape[-1]} and {codes.shape[-1]} columns, here "
            f"{len(_NUMBERS)} and {_CODES}, so another version of optax_guard saved it. Read it with that version; "
            "`add_guard_state(tx, params, state)` moves the optimizer's state into a fresh guard."
        )
    return numbers, codes


def _recovery_words(bits: int) -> str:
    return "+".join(name for position, name in enumerate(RECOVERIES) if bits >> position & 1)


def _kind(packed: Any, position: int) -> Any:
    return packed >> _BITS * position & (1 << _BITS) - 1


def _unpack(numbers: Any, packed: Any, xp: Any) -> list[Any]:
    """Restores NaN and Inf; a number that was never passed reads as NaN."""
    columns = []
    for i in range(len(_NUMBERS)):
        kind = _kind(packed, i)
        bad = [xp.float32(x) for x in (xp.nan, xp.inf, -xp.inf, xp.nan)]
        columns.append(
            xp.select([kind == k for k in range(1, 5)], [xp.full_like(numbers[i], x) for x in bad], numbers[i])
        )
    return columns

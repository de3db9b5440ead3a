"""Tells on the host, once and in words, what a guard has done since the last look."""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.tree import field_array, find_states
from optax_guard._common.typing import PyTree
from optax_guard._guard import GuardState
from optax_guard._halt import raise_if_halted
from optax_guard._step.reading import (
    axes_in_front,
    batches,
    check_on_host,
    member,
    members,
    seen_names,
    what_was_seen,
    where,
)
from optax_guard._step.record import EVENTS, FlightRecorder, read_rows
from optax_guard.state._counts import COUNTED, Count, counts, in_words

__all__ = ["event_logger"]

_IN_FLIGHT = 2  # looks whose result is still being computed; the next one waits for the oldest
_UNUSUAL = 0.5  # a clip is reported if its scale is less than this share of the usual scale


def event_logger(write: Callable[[str], Any] = print, *, every: int = 1) -> Callable[..., None]:
    """Returns a function for the training loop that reports each new event of the guard once, and raises on a halt.

    ==================  ================================================================================================
    Event               Reported
    ==================  ================================================================================================
    a held step         what was not finite, or the rule that refused the step; the leaf, the loss, the batch's `tag`
    let through         the same, for a step that was refused and applied because `patience` had run out
    recovery            what was reset, backed off or rewound
    clipped             only if unusual: the scale is less than half the median scale of the recorded steps
    applied             never
    outside the guard   the 1st, 10th, 100th, ... update that a bound such as that of `stabilize` scaled down, batch
                        that `accumulate` dropped, or step in which `qk_clip` scaled a head
    halted              by the error, `TrainingHalted`
    ==================  ================================================================================================

    A look fetches four integers, and two numbers for each counter outside the guard, without waiting for the step that
    was just dispatched: a step's events are reported at most two looks later. It waits and fetches the recorder's rows
    (56 bytes each) only if there is something to report. What is done outside the guard is told as of the look, "after
    step 9", since its steps are not recorded.

    Args:
      write: receives one line of text per event, such as `print`, `logging.getLogger("train").warning` or
        `tqdm.tqdm.write`.
      every: look at every n-th call only (>= 1). Events in between are reported too, as long as they are among the last
        `recorder_rows` steps.

    Returns:
      `log_events(state, params=None, wait=False)`, to be called after each step, and with `wait=True` after the last,
      which reports all that is left. The parameters give leaves their names; without them, leaves are numbered.
      For a state of many runs at once (`jax.vmap`, `jax.pmap`), each line begins with the member.

    Raises:
      TrainingHalted: by `log_events`, if a guard in `state` has halted.
      ValueError: an argument is invalid; by `log_events`, if there is no guard in `state`, or fewer rows than `every`.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), og.skip_large(10.0))
      >>> params = {"w": jnp.ones(2)}
      >>> lines = []
      >>> state, log_events = tx.init(params), og.event_logger(lines.append)
      >>> for batch, size in enumerate((1.0, 100.0, jnp.nan, 1.0)):
      ...     params, state = og.apply_gradients(tx, {"w": jnp.full(2, size)}, state, params, tag=batch)
      ...     log_events(state, params)
      >>> log_events(state, params, wait=True)
      >>> for line in lines:
      ...     print(line)
      step 1: held, rule 0 refused it: the gradient norm was 141, most of it in `w` (batch 1)
      step 2: held: the gradient of `w` held NaN (batch 2)
    """
    validate.function("event_logger", "write", write, "of one line of text")
    every = validate.integer("event_logger", "every", every, low=1)
    calls = 0
    unreported: dict[int, np.ndarray] = {}  # guard -> the first step of each member that has not been reported
    told: dict[str, _Told] = {}  # counter outside the guard -> what was told of it
    looks: deque[_Looks] = deque()

    def log_events(state: optax.OptState, params: PyTree | None = None, *, wait: bool = False) -> None:
        nonlocal calls, unreported, told
        calls += 1
        found = find_states(state, (GuardState, *COUNTED))
        guards = [each for each in found if isinstance(each, GuardState)]
        if not guards:
            raise ValueError("event_logger: there is no guard in this state; wrap the optimizer in `guard` first.")
        for each in guards:
            check_on_host("event_logger", each.halted)
        recorders = [FlightRecorder(*map(field_array, each.recorder)) for each in guards]
        rows = min(recorder.codes.shape[-2] for recorder in recorders)
        if rows < every:
            raise ValueError(
                "event_logger: `every` must be at most the guard's `recorder_rows`, or events would be lost; got "
                f"every={every} and {rows} rows."
            )
        if calls % every and not wait:
            return
        halts = [field_array(each.halted) for each in guards]
        firsts = [_first_steps(unreported.get(number), halted) for number, halted in enumerate(halts)]
        look = [_look(*part, every) for part in zip(recorders, halts, firsts, strict=True)]
        counted = [_Counted(count, _copied(count.total, count.scale), _owner(count, guards)) for count in counts(found)]
        if looks and [np.shape(news) for news in look] != [np.shape(news) for news in looks[-1].guards]:
            looks.clear()  # of other guards, or of another number of members
        looks.append(_Looks(look, counted, calls))
        for news in (*look, *(each.numbers for each in counted)):
            news.copy_to_host_async()
        ahead = min(_IN_FLIGHT, rows // every - 1)  # as long as the rows are still there
        while looks and (wait or len(looks) > ahead or _is_there(looks[0])):
            due = [looks.popleft()]
            seen = _seen(due[0])
            events = any(news.event.any() or news.halted.any() for news in seen)
            if events:
                due += looks
                looks.clear()
                for number, (each, news) in enumerate(zip(guards, seen, strict=True)):
                    label = f"guard {number}, " if len(guards) > 1 else ""
                    unreported[number] = _tell(write, label, each, params, news.first)
            else:
                unreported |= {number: news.newest + 1 for number, news in enumerate(seen)}
            for each in due:
                told = _tell_counts(write, each, told)
            if events:
                raise_if_halted(state, params)

    return log_events


def _is_there(look: "_Looks") -> bool:
    """Whether all that a look fetches has been computed."""
    return all(map(_is_ready, (*look.guards, *(each.numbers for each in look.counted))))


def _seen(look: "_Looks") -> list["_Look"]:
    """What a look has fetched of each guard; waits for it."""
    return [_Look(*np.moveaxis(np.asarray(news), -1, 0)) for news in look.guards]


def _is_ready(array: Any) -> bool:
    """Whether an array has been computed (a method that JAX's types do not declare)."""
    return array.is_ready()


class _Counted(NamedTuple):
    """A counter outside the guard, on its way to the host."""

    shown: Count  # its name and shape; the next step may overwrite its numbers
    numbers: jax.Array  # i32[1 or 2, ...]: a copy of them, the factor by its bits
    owner: int  # the guard by whose steps it is dated


class _Looks(NamedTuple):
    """What is fetched at one call, on its way to the host."""

    guards: list[jax.Array]  # a `_Look` of each
    counted: list[_Counted]
    call: int  # of the logger


class _Told(NamedTuple):
    """A counter as of the last look."""

    total: np.ndarray  # the most that it has shown since the run began
    steps: np.ndarray  # the newest step of its guard
    call: int  # of the logger


class _Look(NamedTuple):
    """What a look fetches, each number with the axes of the members."""

    event: Any  # whether there is something to tell
    halted: Any  # whether the guard has halted
    first: Any  # the first step that the look covers
    newest: Any  # the last


def _first_steps(known: np.ndarray | None, halted: jax.Array) -> np.ndarray:
    """The first step of each member that has not been reported; -1 before the first look."""
    if known is not None and known.shape == halted.shape:
        return known
    return np.full(halted.shape, -1, np.int32)


def _look(recorder: FlightRecorder, halted: jax.Array, first: np.ndarray, every: int) -> jax.Array:
    """A `_Look` in one array, i32[..., 4]."""
    return _look_at_many(axes_in_front(halted))(recorder, halted, first, np.int32(every))


@functools.cache
def _look_at_many(axes: int) -> Callable[..., jax.Array]:
    look = _look_at_one
    for _ in range(axes):
        look = jax.vmap(look, in_axes=(0, 0, 0, None))
    return jax.jit(look)


def _look_at_one(recorder: FlightRecorder, halted: jax.Array, first: jax.Array, every: jax.Array) -> jax.Array:
    steps, reported = recorder.codes[:, 0], _is_reported(recorder.codes[:, 1], recorder.numbers[:, 3], jnp)
    newest = jnp.max(steps)
    # On the first look, or if an older state was restored, only the steps since the last look are new.
    since = jnp.where((first < 0) | (newest < first - 1), newest - every + 1, first)
    numbers = _Look(jnp.any(reported & (steps >= since)), halted, since, newest)
    return jnp.stack([number.astype(jnp.int32) for number in numbers])


def _is_reported(events: Any, scales: Any, xp: Any) -> Any:
    """Which rows are worth telling. A step before the first counts as unclipped."""
    usual = xp.nanmedian(xp.append(xp.where(scales > 0, scales, xp.nan), 1.0))
    unusual_clip = (events == EVENTS.index("clipped")) & (scales < _UNUSUAL * usual)
    return (events > EVENTS.index("clipped")) | unusual_clip


def _tell(
    write: Callable[[str], Any], label: str, guard_state: GuardState, params: PyTree | None, first: np.ndarray
) -> np.ndarray:
    """Writes the lines of one guard and returns the first step of each member that is still to be reported."""
    following = np.array(first, np.int32)
    names = seen_names(guard_state.seen_leaves, params)
    recorder = FlightRecorder(*map(field_array, guard_state.recorder))
    for index in members(field_array(guard_state.halted)):
        rows = read_rows(member(recorder, index))
        if len(rows) == 0:
            continue
        codes = np.array([EVENTS.index(event) for event in rows["event"]])
        reported = _is_reported(codes, rows["scale"], np) & (rows["step"] >= first[index])
        following[index] = max(int(first[index]), int(rows["step"][-1]) + 1)
        for i in np.flatnonzero(reported & (rows["event"] != "halted")):
            write(f"{label}{_member(index)}step {int(rows['step'][i])}: {_words(rows[i], names)}")
    return following


@jax.jit
def _copied(total: jax.Array, scale: jax.Array | None) -> jax.Array:
    """A counter's numbers as one array of integers, so that the host waits for one transfer."""
    rows = [jnp.asarray(total).astype(jnp.int32)]
    if scale is not None:
        rows.append(lax.bitcast_convert_type(jnp.asarray(scale).astype(jnp.float32), jnp.int32))
    return jnp.stack(rows)


def _owner(count: Count, guards: list[GuardState]) -> int:
    """The number of the innermost guard around a counter, or else of the first inside its state; 0 without one."""
    if len(guards) == 1:
        return 0
    around = [i for i, each in enumerate(guards) if any(x is count.state for x in find_states(each, COUNTED))]
    inside = [i for i, each in enumerate(guards) if any(x is each for x in find_states(count.state, GuardState))]
    return around[-1] if around else inside[0] if inside else 0


def _tell_counts(write: Callable[[str], Any], look: _Looks, told: dict[str, _Told]) -> dict[str, _Told]:
    """Writes a line for each counter that has reached another power of ten, and returns what each has shown."""
    newest = [news.newest for news in _seen(look)]
    shown = {}
    for count, numbers, owner in look.counted:
        total, *bits = np.asarray(numbers)
        scale = bits[0].view(np.float32) if bits else None
        steps = newest[owner] if newest[owner].shape == total.shape else np.full(total.shape, newest[owner].max())
        key = f"{count.name} {count.counter.total}"
        last = told.get(key)
        if last is None or last.total.shape != total.shape:
            last = _Told(total, steps + 1, 0)
        # A run that began since the last look, one that is resumed, which has told its own already, or the same one.
        began = steps < look.call - last.call
        before = np.where(steps < last.steps, np.where(began, 0, total), last.total)
        for index in np.ndindex(*total.shape):
            if _digits(total[index]) > _digits(before[index]):
                label = f"guard {owner}, " if len(newest) > 1 else ""
                when = f"after step {steps[index]}" if steps[index] >= 0 else "before the first step"
                each = count._replace(total=int(total[index]), scale=None if scale is None else float(scale[index]))
                write(f"{label}{_member(index)}{when}: {in_words(each, ' so far')}")
        shown[key] = _Told(np.maximum(before, total), steps, look.call)  # a rewind sets a counter back
    return shown


def _digits(count: Any) -> int:
    """0 for 0, 1 from 1 to 9, 2 from 10 on."""
    return len(str(int(count))) if count > 0 else 0


def _member(index: tuple[int, ...]) -> str:
    """Whose line it is; empty in a single run."""
    return f"member {index[0] if len(index) == 1 else index}, " if index else ""


def _words(row: Any, names: list[str]) -> str:
    """One event as a sentence."""
    event = str(row["event"])
    leaf = where(names, int(row["worst_leaf"]))
    norm = f"the gradient norm was {row['grad_norm']:.3g}" + (f", most of it in {leaf}" if leaf else "")
    if event in ("nonfinite", "nonfinite_update"):
        text = f"held: {what_was_seen(row, names)}"
    elif event == "skipped":
        text = f"held, rule {int(row['rule'])} refused it: {norm}"
    elif event == "let_through":
        text = f"applied after `patience` refusals, though rule {int(row['rule'])} refused it: {norm}"
    elif event == "clipped":
        text = f"clipped to {row['scale']:.2g} of the gradient: {norm}"
    else:
        text = "held in favour of recovery"
    if row["recovery"]:
        text += "; recovery: " + str(row["recovery"]).replace("_", " ").replace("+", ", ")
    loss = f", loss {row['value']:.4g}" if row["value_given"] and np.isfinite(row["value"]) else ""
    return text + loss + batches([row["tag"]])

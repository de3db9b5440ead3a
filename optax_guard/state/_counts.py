"""What was done to a step outside the guard, whose flight recorder does not know of it: all there is are counters.

A bound scales the finished update, accumulation drops a micro-batch before the guard sees it, and `qk_clip` changes
weights after it. `event_logger` and the report tell of each.
"""

from typing import Any, NamedTuple

from optax_guard._common.new_params import QKClipState
from optax_guard._common.tree import field_array
from optax_guard.accumulation._calls import AccumulateState
from optax_guard.transforms._published import PublishedUpdateNormState
from optax_guard.transforms._step_growth import StepGrowthState
from optax_guard.transforms._update_bounds import ClippyState, LimitStepState, UpdateNormState

__all__ = ["BOUNDS", "COUNTED", "COUNTERS", "Count", "Counter", "counts", "in_words", "numbered"]

BOUNDS = (  # the type of the state, the name in `metrics`, and how the names of its fields begin
    (LimitStepState, "limit_step", "limit_step"),
    (StepGrowthState, "limit_step_growth", "step_growth"),
    (ClippyState, "clippy", "clippy"),
    (UpdateNormState, "update_norm", "update_norm"),
    (PublishedUpdateNormState, "published_update_norm", "published_update_norm"),
)


class Counter(NamedTuple):
    """A field that counts, and what it counts."""

    kind: type  # the state that has it
    total: str  # the field
    scale: str  # the field with the smallest factor of a leaf in the last update; empty without one
    name: str  # of the function, as in a program
    words: str  # what it did, with {} for
    one: str  # one of them
    many: str  # or several


def _bound(kind: type, prefix: str, name: str) -> Counter:
    return Counter(kind, f"{prefix}_bound_total", f"{prefix}_scale", name, "scaled {} down", "an update", "updates")


COUNTERS = (
    _bound(LimitStepState, "limit_step", "limit_step"),
    _bound(StepGrowthState, "step_growth", "limit_step_growth"),
    _bound(ClippyState, "clippy", "clippy"),
    _bound(UpdateNormState, "update_norm", "clip_by_update_norm"),
    _bound(PublishedUpdateNormState, "published_update_norm", "published.clip_by_update_norm"),
    Counter(
        AccumulateState,
        *("dropped_total", "", "accumulate", "dropped {} (not finite, or of invalid weight)"),
        *("a micro-batch", "micro-batches"),
    ),
    Counter(AccumulateState, "empty_total", "", "accumulate", "had nothing left at the end of {}", "a cycle", "cycles"),
    Counter(QKClipState, "qk_clip_clipped_total", "", "qk_clip", "scaled heads down in {}", "a step", "steps"),
    Counter(
        QKClipState,
        *("qk_clip_invalid_total", "", "qk_clip", "was given {} (NaN, Inf or not above 0)"),
        *("an invalid maximum", "invalid maxima"),
    ),
)


COUNTED = tuple({counter.kind: None for counter in COUNTERS})  # the states that have one


class Count(NamedTuple):
    """What a counter shows, of one run or of many."""

    counter: Counter
    name: str  # the second of a kind is `limit_step_1`
    total: Any  # i32[...]
    scale: Any  # f32[...]; None without one
    state: Any  # that has it; None if it was read from a file


def numbered(name: str, index: int) -> str:
    """The name of the first, second, ... state of a kind: `limit_step`, `limit_step_1`, ..."""
    return name if index == 0 else f"{name}_{index}"


def counts(states: list[Any]) -> list[Count]:
    """What every counter shows in some states, of which some may have none."""
    return [
        Count(
            counter,
            numbered(counter.name, index),
            field_array(getattr(each, counter.total)),
            field_array(getattr(each, counter.scale)) if counter.scale else None,
            each,
        )
        for counter in COUNTERS
        for index, each in enumerate(each for each in states if isinstance(each, counter.kind))
    ]


def in_words(count: Count, so_far: str = "") -> str:
    """A count of one run as a clause: "`limit_step` scaled 3 updates down (smallest factor of the last one: 0.2)"."""
    several = count.total > 1
    what = f"{count.total} {count.counter.many}" if several else count.counter.one
    text = f"`{count.name}` {count.counter.words.format(what)}{so_far if several else ''}"
    if count.scale is None or not count.scale < 1:
        return text
    return f"{text} (smallest factor{' of the last one:' if several else ''} {count.scale:.3g})"

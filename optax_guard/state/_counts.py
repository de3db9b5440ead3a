"""What was done to a step outside the guard, whose flight recorder does not know of it: all there is are counters.

A bound scales the finished update, accumulation drops a micro-batch before the guard sees it, and `qk_clip` changes
weights after it. `event_logger` and the report tell of each.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax

from optax_guard._common.new_params import QKClipState
from optax_guard._common.tree import field_array, find_states
from optax_guard.accumulation._calls import AccumulateState
from optax_guard.transforms._published import PublishedUpdateNormState
from optax_guard.transforms._step_growth import StepGrowthState
from optax_guard.transforms._update_bounds import ClippyState, LimitStepState, UpdateNormState

__all__ = ["BOUNDS", "COUNTERS", "OF_THE_STEP", "Count", "Counter", "counts", "counts_in", "numbered"]

BOUNDS = (  # the type of the state, the name in `metrics`, and how the names of its fields begin
    (LimitStepState, "limit_step", "limit_step"),
    (StepGrowthState, "limit_step_growth", "step_growth"),
    (ClippyState, "clippy", "clippy"),
    (UpdateNormState, "update_norm", "update_norm"),
    (PublishedUpdateNormState, "published_update_norm", "published_update_norm"),
)
OF_THE_STEP = ("limit_step", "limit_step_growth")  # relative to the parameters: they act if the rate is too large


class Counter(NamedTuple):
    """A field that counts."""

    kind: type
    name: str  # of whose field it is, as in `metrics`
    total: str  # the field
    scale: str  # the field with the last factor; empty without one
    words: str  # what happened each time


COUNTERS = (
    *(
        Counter(kind, name, f"{prefix}_bound_total", f"{prefix}_scale", "scaled the update down")
        for kind, name, prefix in BOUNDS
    ),
    Counter(
        AccumulateState, "accumulate", "dropped_total", "", "dropped a micro-batch (not finite, or of invalid weight)"
    ),
    Counter(AccumulateState, "accumulate", "empty_total", "", "had nothing left at the end of a cycle"),
    Counter(QKClipState, "qk_clip", "qk_clip_clipped_total", "", "scaled the weights of a head down"),
    Counter(QKClipState, "qk_clip", "qk_clip_invalid_total", "", "was given a maximum that is no number above 0"),
)


class Count(NamedTuple):
    """What a counter shows, of one run or of many."""

    name: str  # as in `metrics`: the second of a kind is `limit_step_1`
    words: str
    total: Any  # i32[...]
    scale: Any  # f32[...]: NaN without one


def numbered(name: str, index: int) -> str:
    """The name of the first, second, ... state of a kind: `limit_step`, `limit_step_1`, ..."""
    return name if index == 0 else f"{name}_{index}"


def counts(find: Callable[[Counter], list[Any]], read: Callable[[Any, str], Any]) -> Iterator[Count]:
    """What every counter shows, given how to find the states that have it and how to read a field of them."""
    for counter in COUNTERS:
        for index, each in enumerate(find(counter)):
            scale = read(each, counter.scale) if counter.scale else np.float32(np.nan)
            yield Count(numbered(counter.name, index), counter.words, read(each, counter.total), scale)


def counts_in(state: optax.OptState) -> list[Count]:
    """What every counter in a state shows."""
    return list(
        counts(
            lambda counter: find_states(state, counter.kind),
            lambda each, field: field_array(getattr(each, field)),
        )
    )

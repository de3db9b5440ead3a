"""What a log says about attention: the largest logit of every step, whose it was, and when it began to grow."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_guard._common.tree import leaves_with_none, path_hash, variable_free_names
from optax_guard._common.typing import PyTree
from optax_guard._step.max_logits import TROUBLE, TROUBLE_IN_WORDS, head_name, heads_of

__all__ = ["LogitGrowth", "LogitLog", "growth_of", "logit_log", "logit_sentences", "usable"]

_FIRST = 8  # steps at the start of the record whose median is the level from which logits grow
_BEGUN, _GROWN = 2.0, 3.0  # growth by the second factor is told, and it began when the first was passed for good
_FITTED = 8  # steps, at least, for a forecast
_LONGEST_STACK = 256  # a longer first axis is not one of layers


class LogitLog(NamedTuple):
    """Whose the logits in the column `max_logit` are, and what `qk_clip` allowed."""

    layers: tuple[str, ...]  # by row: the layer of the largest logit; empty if not known
    thresholds: dict[str, float]  # by layer: the threshold of `qk_clip` in the last step


class LogitGrowth(NamedTuple):
    """From where to where the largest logit grew; rows are positions in the log."""

    level: float  # at the start of the record
    begin: int  # row: the first after which it stayed above twice the level until its peak
    peak: int  # row


def logit_log(
    rows: np.ndarray, clips: Iterable[tuple[Any, Mapping[str, Any]]], params: PyTree | None
) -> LogitLog | None:
    """The names of the layers in the rows; None if no maxima were passed.

    Args:
      rows: of the flight recorder.
      clips: the threshold and the maxima by layer in each state of `qk_clip`.
      params: the parameters, whose paths may be those of layers.
    """
    if not (rows["logit_head"] >= 0).any():
        return None
    thresholds: dict[str, float] = {}
    layers: list[str] = []
    for threshold, maxima in clips:
        found = [layer for layer, _ in heads_of(dict(maxima))]
        layers += found
        if threshold > 0:
            thresholds |= dict.fromkeys(found, float(threshold))
    names = {path_hash(layer): layer for layer in [*_paths(params), *layers]}
    given = rows["logit_head"] >= 0
    labels = (names.get(int(code), "") if has else "" for code, has in zip(rows["logit_layer"], given, strict=True))
    return LogitLog(tuple(labels), thresholds)


def usable(rows: np.ndarray) -> np.ndarray:
    """The rows whose largest logit is a number above 0."""
    return np.isfinite(rows["max_logit"]) & (rows["max_logit"] > 0)


def growth_of(rows: np.ndarray) -> LogitGrowth | None:
    """When the largest logit began to grow; None if it has not grown threefold since the record began."""
    places = np.flatnonzero(usable(rows))
    if len(places) == 0:
        return None
    logits = rows["max_logit"][places].astype(np.float64)
    level, peak = float(np.median(logits[:_FIRST])), int(np.argmax(logits))
    if logits[peak] < _GROWN * level:
        return None
    quiet = np.flatnonzero(logits[:peak] <= _BEGUN * level)
    return LogitGrowth(level, int(places[quiet[-1] + 1 if len(quiet) else 0]), int(places[peak]))


def logit_sentences(rows: np.ndarray, log: LogitLog | None) -> list[str]:
    """What happened to the attention logits, in words."""
    if log is None:
        return []
    said = []
    good = np.flatnonzero(usable(rows))
    if len(good):
        growth = growth_of(rows)
        peak = int(good[np.argmax(rows["max_logit"][good])])
        said.append(_level(rows, log, good, peak) if growth is None else _growth(rows, log, growth))
        said[-1] += _alarm(rows, log, good) or _forecast(rows, log, good, growth)
    bad = np.flatnonzero((rows["logit_head"] >= 0) & ~np.isfinite(rows["max_logit"]))
    if len(bad):
        steps = f"{len(bad)} step{'s' if len(bad) > 1 else ''}"
        said.append(f"An attention logit was NaN or Inf in {steps}, first in {_step(rows, log, bad[0])}.")
    return said


def _growth(rows: np.ndarray, log: LogitLog, growth: LogitGrowth) -> str:
    return (
        f"The largest attention logit, {_number(growth.level)} at first, began to grow in "
        f"{_step(rows, log, growth.begin)}, and reached {_number(rows['max_logit'][growth.peak])} in "
        f"{_step(rows, log, growth.peak)}."
    )


def _level(rows: np.ndarray, log: LogitLog, good: np.ndarray, peak: int) -> str:
    low, high = (_number(f(rows["max_logit"][good])) for f in (np.min, np.max))
    return f"The largest attention logit was between {low} and {high}, the latter in {_step(rows, log, peak)}."


def _alarm(rows: np.ndarray, log: LogitLog, good: np.ndarray) -> str:
    """Where logits passed what `qk_clip` allows or, without it, the size at which trouble has begun elsewhere."""
    limits = np.array([log.thresholds.get(layer, TROUBLE[0]) for layer in log.layers])
    above = good[rows["max_logit"][good] > limits[good]]
    if len(above) == 0:
        return ""
    first, count = _step(rows, log, above[0]), f"{len(above)} of {len(good)} steps"
    if log.layers[above[0]] in log.thresholds:
        limit = _number(limits[above[0]])
        return f" It was above the threshold of `qk_clip`, {limit}, in {count}, first in {first}."
    return f" It was above {_number(TROUBLE[0])} in {count}, first in {first}; {TROUBLE_IN_WORDS}: see `qk_clip`."


def _forecast(rows: np.ndarray, log: LogitLog, good: np.ndarray, growth: LogitGrowth | None) -> str:
    """Where growth leads that still goes on, at the pace of its second half."""
    if growth is None:
        return ""
    part = good[good >= growth.begin]
    part = part[len(part) // 2 :]
    if len(part) < _FITTED or rows["max_logit"][part[-1]] < rows["max_logit"][growth.peak] / 1.5:
        return ""
    steps = rows["step"][part].astype(np.float64)
    slope, height = np.polyfit(steps - steps[-1], np.log(rows["max_logit"][part].astype(np.float64)), 1)
    recorded = float(rows["step"][-1] - rows["step"][0])
    limit, what = TROUBLE[0], "where trouble has begun"
    if (layer := log.layers[part[-1]]) in log.thresholds:
        limit, what = log.thresholds[layer], "the threshold of `qk_clip`"
    left = np.log(limit) - height
    if not 0 < left <= 4 * recorded * slope:
        return ""
    return (
        f" At its present pace, doubling every {_number(np.log(2) / slope)} steps, it passes {_number(limit)}, "
        f"{what}, near step {steps[-1] + left / slope:.0f}."
    )


def _step(rows: np.ndarray, log: LogitLog, row: int) -> str:
    return f"step {rows['step'][row]} ({head_name(log.layers[row], int(rows['logit_head'][row]))})"


def _number(number: Any) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _paths(params: PyTree | None) -> list[str]:
    """Every path in the parameters that can be a layer's, with and without its first part."""
    found: dict[str, None] = {"(root)": None}
    for name, leaf in zip(variable_free_names(params), leaves_with_none(params), strict=True):
        parts = name.split("/")
        shape = np.shape(leaf)
        for start in (0, 1):
            for stop in range(start + 1, len(parts)):
                path = "/".join(parts[start:stop])
                found[path] = None
                if len(shape) > 2 and shape[0] <= _LONGEST_STACK:
                    found |= {f"{path}[{i}]": None for i in range(shape[0])}
    return list(found)

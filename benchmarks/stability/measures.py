"""The measures of StabilityBench, computed from the arrays of the runs, on the host in NumPy."""

from typing import Any

import numpy as np
import scipy.stats

WINDOW, SIGMAS, FIRST = 1000, 7.0, 20


def spike_share(values: np.ndarray) -> float:
    """OLMo 2's spike score: the share of values at least 7 standard deviations above the mean of the 1000 before.

    Shorter histories count from the 20th value on; values that are not finite are left out (2501.00656, section 3.2).
    """
    values = values[np.isfinite(values)].astype(np.float64)
    if len(values) <= FIRST:
        return 0.0
    scale = np.max(np.abs(values)) or 1.0  # squares must not overflow
    padded = np.concatenate([[0.0], values / scale])
    sums, squares = np.cumsum(padded), np.cumsum(padded**2)
    end = np.arange(FIRST, len(values))
    start = np.maximum(end - WINDOW, 0)
    count = end - start
    mean = (sums[end] - sums[start]) / count
    variance = np.maximum((squares[end] - squares[start]) / count - mean**2, 0)
    return float(np.mean(values[FIRST:] / scale - mean >= SIGMAS * np.sqrt(variance) + 1e-12))


def steps_to_recover(loss: np.ndarray, clean: np.ndarray, end: int) -> int | None:
    """Steps after a fault until the smoothed loss is within 10 % (and 0.01) of the same run's without it; None: never.

    At once counts as 0.
    """
    good = loss[end:] <= 1.1 * clean[end:] + 0.01
    return int(np.argmax(good)) if good.any() else None


def interval(values: Any) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student's t) over seeds; NaN where a value is missing."""
    values = np.array([np.nan if x is None else x for x in values], np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(np.mean(values)), 0.0
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def capped(runs: dict[str, Any]) -> np.ndarray:
    """Losses [rates, seeds], no worse than at the start: min(final, initial), NaN as the start."""
    final = np.array([[np.inf if x is None else x for x in row] for row in runs["final"]], np.float64)
    return np.minimum(final, np.array(runs["initial"], np.float64))


def sensitivity(runs: dict[str, Any]) -> np.ndarray:
    """LR sensitivity of every seed: mean over rates of the capped loss, minus its minimum (2309.14322, section 2.2)."""
    losses = capped(runs)
    return np.mean(losses, axis=0) - np.min(losses, axis=0)


def best_loss(runs: dict[str, Any]) -> np.ndarray:
    """Of every seed, at the learning rate that is best on average."""
    losses = capped(runs)
    return losses[int(np.argmin(losses.mean(1)))]


def alive(runs: dict[str, Any]) -> np.ndarray:
    """Share of the learning rates at which a seed ends with finite parameters and below its first loss."""
    below = capped(runs) < np.array(runs["initial"], np.float64)
    return np.mean(below & (np.array(runs["finite"], np.float64) > 0), axis=0)


def regret(runs: dict[str, Any], best: float) -> np.ndarray:
    """Of every seed: 0 if every rate gives the best loss of any method, 1 if nothing is learnt at any rate."""
    losses, initial = capped(runs), np.array(runs["initial"], np.float64)[0]
    return (np.mean(losses, axis=0) - best) / np.maximum(initial - best, 1e-12)


def fault_gaps(row: dict[str, Any]) -> np.ndarray:
    """What a fault added to the final loss of every seed; infinite where the parameters are not finite."""
    pairs = zip(row["gap"], row["finite"], strict=True)
    return np.array([np.inf if gap is None or not fine else gap for gap, fine in pairs])


def equal_best(scores: dict[str, np.ndarray]) -> set[str]:
    """The method with the lowest mean, and all whose paired difference to it has an interval with 0 in it."""
    means = {name: float(np.mean(x)) for name, x in scores.items() if np.isfinite(x).all()}
    if not means:
        return set()
    first = min(means, key=lambda name: means[name])
    same = set()
    for name in means:
        middle, half = interval(scores[name] - scores[first])
        if middle - half <= 1e-9 * abs(means[first]):
            same.add(name)
    return same

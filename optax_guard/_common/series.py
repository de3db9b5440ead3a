"""Judges a number against its own history: when is it a spike, and when has the level changed?

There are two thresholds, each from past values alone. `threshold` of a `Series` reads two windows. The accepted values
give the threshold, and the last 2 * accept_after - 1 values, accepted or not, can show that the level has changed:

    margin = max(deviations * (q90 - q50) / 1.28 * (1 + 8 / n), least)     over the n <= window accepted values
    limit  = q50 + margin
    if the median of the recent values exceeds limit (so at least `accept_after` of them do):
        limit = that median + max(deviations * 1.48 * MAD of the recent values, margin)

The spread is measured by the upper decile and not by the MAD, since losses and norms have long upper tails. Of
lognormal values with a log-sd of 1.5, one in ten exceeds median + 6 MAD, but only one in eighty exceeds this limit.

`raw_threshold` of a `RawSeries` is the limit of the published rules: mean + deviations * standard deviation of the last
`window` values, whatever they were.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "RawSeries",
    "Series",
    "empty_raw_series",
    "empty_series",
    "push",
    "push_raw",
    "raw_threshold",
    "start_of",
    "threshold",
]

_DECILE = 1.2815516  # q90 - q50 of a standard normal distribution
_MAD = 1.4826022  # 1 / median |x| of a standard normal distribution
_YOUNG = 8.0  # widens the margin of n values by 1 + 8 / n, since a decile of few values is a poor estimate
_UNSEEN = 3.0e38  # fills unused places, since it sorts last


class Series(NamedTuple):
    """The history of one number. No field ever holds a NaN or an Inf."""

    accepted: jax.Array  # f32[window]: the last accepted values, as a ring buffer
    recent: jax.Array  # f32[2 * accept_after - 1]: the last finite values, as a ring buffer
    accepted_total: jax.Array  # i32[]: values ever written to `accepted`, up to 2^30
    recent_total: jax.Array  # i32[]: the same for `recent`


def empty_series(window: int, accept_after: int) -> Series:
    """A history without values."""
    return Series(
        accepted=jnp.full(window, _UNSEEN, jnp.float32),
        recent=jnp.full(2 * accept_after - 1, _UNSEEN, jnp.float32),
        accepted_total=jnp.zeros((), jnp.int32),
        recent_total=jnp.zeros((), jnp.int32),
    )


def start_of(window: int, accept_after: int) -> int:
    """The number of accepted values from which `threshold` is finite."""
    return min(window, 2 * accept_after - 1)


def threshold(series: Series, deviations: float | jax.Array, least: float, relative: bool) -> jax.Array:
    """The largest value that is not a spike; Inf while there are too few values.

    `least` is the smallest margin, multiplied by |median| if `relative`.
    """
    window, width = series.accepted.shape[0], series.recent.shape[0]
    n = jnp.minimum(series.accepted_total, window)
    ordered = jnp.sort(series.accepted)
    below, above, upper = (ordered[jnp.clip(i, 0, window - 1)] for i in ((n - 1) // 2, n // 2, 9 * n // 10))
    middle = below + (above - below) / 2  # their sum may overflow
    young = 1 + _YOUNG / jnp.maximum(n, 1).astype(jnp.float32)

    def margin(center: jax.Array, spread: jax.Array) -> jax.Array:
        return jnp.maximum(spread, least * jnp.abs(center) if relative else least)

    known = margin(middle, deviations * young * (upper - middle) / _DECILE)
    limit = middle + known
    recent = jnp.sort(series.recent)[width // 2]
    mad = jnp.sort(jnp.abs(series.recent - recent))[width // 2]
    changed = (series.recent_total >= width) & (recent > limit)
    limit = jnp.where(changed, recent + jnp.maximum(margin(recent, deviations * _MAD * mad), known), limit)
    # A history of zeros alone has no scale to judge by.
    return jnp.where((n >= min(window, width)) & (known > 0), limit, jnp.inf)


def push(series: Series, x: jax.Array, kept: jax.Array, accept: jax.Array, seen: jax.Array) -> Series:
    """The history after the value `x`: `kept` is stored if `accept`, and nothing changes unless `seen`."""
    accept = accept & seen
    place, spot = series.accepted_total % series.accepted.shape[0], series.recent_total % series.recent.shape[0]
    return Series(
        accepted=jnp.asarray(series.accepted).at[place].set(jnp.where(accept, kept, series.accepted[place])),
        recent=jnp.asarray(series.recent).at[spot].set(jnp.where(seen, x, series.recent[spot])),
        accepted_total=_counted(series.accepted_total, accept, series.accepted.shape[0]),
        recent_total=_counted(series.recent_total, seen, series.recent.shape[0]),
    )


class RawSeries(NamedTuple):
    """The history of one number with nothing left out. A value that is not finite is kept as a code."""

    values: jax.Array  # f32[window]: the last values, a ring
    values_total: jax.Array  # i32[]: values ever written, up to 2^30


def empty_raw_series(window: int) -> RawSeries:
    """A history without values."""
    return RawSeries(values=jnp.full(window, _UNSEEN, jnp.float32), values_total=jnp.zeros((), jnp.int32))


def raw_threshold(
    series: RawSeries, deviations: float | jax.Array, *, unbiased: bool, least: float, counts_itself: bool
) -> tuple[jax.Array, jax.Array]:
    """The mean + deviations * std of the window, NaN if it holds a non-finite value, and whether to judge.

    Judging starts at half a window of values, which may or may not count the value to be judged.
    """
    window = series.values.shape[0]
    n = jnp.minimum(series.values_total, window)
    used = jnp.arange(window, dtype=jnp.int32) < n
    values = jnp.where(series.values == -_UNSEEN, jnp.nan, series.values)
    count = jnp.maximum(n, 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(used, values, 0)) / count
    squares = jnp.sum(jnp.where(used, jnp.square(values - mean), 0))
    spread = jnp.sqrt(squares / jnp.maximum(count - (1 if unbiased else 0), 1))
    return mean + deviations * jnp.maximum(spread, least), n + int(counts_itself) >= max(2, window // 2)


def push_raw(series: RawSeries, x: jax.Array) -> RawSeries:
    """Every value enters the window unchanged, except that one that is not finite is stored as a code for NaN."""
    window = series.values.shape[0]
    code = jnp.where(jnp.isfinite(x), x, -_UNSEEN)
    return RawSeries(
        values=jnp.asarray(series.values).at[series.values_total % window].set(code),
        values_total=_counted(series.values_total, jnp.ones((), bool), window),
    )


def _counted(total: jax.Array, event: jax.Array, period: int) -> jax.Array:
    """Total + 1, reduced by whole periods before it can overflow, since only its place in the ring then matters."""
    return jnp.where(event, jnp.where(total < 2**30, total + 1, total - period * (2**30 // period - 1) + 1), total)

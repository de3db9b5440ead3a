"""Watches the loss: has it risen well above its best and stayed there?

s <- s + r * (min(loss, s + 3 c) - s)        r = max(1 / (n + 1), 1 / 50),  c = max(|s|, |first loss| / 100)
b <- min(b, s)                               from the tenth loss on; before, b = s
diverged:  s - b > (factor - 1) * max(|b|, |first loss| / 100)

One loss moves s by at most 3 c / 50, so five spikes in a row, of any size, move it by a third. With factor 2, a lasting
level of eight times the best is noticed after 12 steps, and one of three times after 35. The floor ignores the noise of
a loss near zero, and the absolute values make the rule work for negative losses. A loss of exactly 0 is ignored: it is
that of an empty batch, and as a level it would make any other loss a rise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._common.counters import count_if

__all__ = ["LossWatch", "anew", "empty_watch", "loss_above", "watch_loss"]

_SPAN = 50  # the number of steps in the average
_SETTLED = 10  # losses before the best is kept
_JUDGED = 25  # losses before a verdict is given
_CAP = 3.0
_FLOOR = 0.01


class LossWatch(NamedTuple):
    """The smoothed loss and its best value. Losses that are not finite never enter it."""

    smoothed_loss: jax.Array  # f32[]
    best_loss: jax.Array  # f32[]: the lowest smoothed loss
    first_loss: jax.Array  # f32[]
    losses_seen: jax.Array  # i32[]


def empty_watch() -> LossWatch:
    """A watch that has seen nothing."""
    return LossWatch(
        smoothed_loss=jnp.zeros((), jnp.float32),
        best_loss=jnp.zeros((), jnp.float32),
        first_loss=jnp.zeros((), jnp.float32),
        losses_seen=jnp.zeros((), jnp.int32),
    )


def watch_loss(watch: LossWatch, value: jax.Array, learns: jax.Array) -> LossWatch:
    """Adds a loss if it is finite, not 0, and `learns`."""
    value = jnp.asarray(value).astype(jnp.float32)
    # Sums and multiples of larger losses could overflow, and no state may hold Inf.
    learns = learns & (jnp.abs(value) < 1e37) & (value != 0)
    value = jnp.where(learns, value, 0)
    seen = watch.losses_seen
    fresh = seen == 0
    first = jnp.where(fresh, value, watch.first_loss)
    size = jnp.maximum(jnp.abs(watch.smoothed_loss), _FLOOR * jnp.abs(first))
    capped = jnp.where(fresh, value, jnp.minimum(value, watch.smoothed_loss + _CAP * size))
    rate = jnp.maximum(1 / (seen + 1).astype(jnp.float32), 1 / _SPAN)
    smoothed = watch.smoothed_loss + rate * (capped - watch.smoothed_loss)
    best = jnp.where(seen < _SETTLED, smoothed, jnp.minimum(watch.best_loss, smoothed))
    return LossWatch(
        smoothed_loss=jnp.where(learns, smoothed, watch.smoothed_loss),
        best_loss=jnp.where(learns, best, watch.best_loss),
        first_loss=jnp.where(learns, first, watch.first_loss),
        losses_seen=count_if(learns, seen),
    )


def anew(watch: LossWatch) -> LossWatch:
    """A watch that has seen nothing, with the shapes of `watch` (a vmapped one has more axes)."""
    return jax.tree.map(jnp.zeros_like, watch)


def loss_above(watch: LossWatch, factor: float) -> jax.Array:
    """Whether the smoothed loss exceeds `factor` times its best."""
    size = jnp.maximum(jnp.abs(watch.best_loss), _FLOOR * jnp.abs(watch.first_loss))
    return (watch.losses_seen >= _JUDGED) & (watch.smoothed_loss - watch.best_loss > (factor - 1) * size)

"""The start of a run: the first gradients, which no history can judge, and what shows later that one was too large.

A gradient scaled by 1e6 in the first step leaves a second moment that stops Adam for thousands of steps, and a history
whose limit is as large. Neither can be seen at that step; a few steps later both can, from norms alone. `stabilize`
watches for it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.counters import count_if, next_step
from optax_guard._common.typing import PyTree
from optax_guard._step.moments import reset_state
from optax_guard.recovery._seen import After

__all__ = ["Start", "StartState", "empty_start", "fresh_where", "watch_start"]

_SUSPECT = 16  # norms; the loss has a history from then on, and the norm a settled one
_AGREE = 8  # norms in a row that must be far lower; there are five in the longest burst that a history outvotes
# Adam's step is down by x30 if the second moment is that of one norm x1000 too large and half forgotten (b2 = 0.999).
_FAR = float(np.log(1000.0))


class Start(NamedTuple):
    """The rung: watches the first norms, without settings."""


class StartState(NamedTuple):
    """What the first norms were like."""

    start_norms: jax.Array  # i32[]: norms above 0 that reached the optimizer, up to 24; then nothing is watched
    log_largest: jax.Array  # f32[]: the logarithm of the largest of the first 16, as the rules left it
    low_in_row: jax.Array  # i32[]: norms in a row that came below a thousandth of it
    spoilt: jax.Array  # bool[]: whether there were 8: the next step that is applied starts anew
    start_reset_total: jax.Array  # i32[]: how often that happened


def empty_start() -> StartState:
    """The state before the first step."""
    return StartState(
        start_norms=jnp.zeros((), jnp.int32),
        log_largest=jnp.zeros((), jnp.float32),
        low_in_row=jnp.zeros((), jnp.int32),
        spoilt=jnp.zeros((), bool),
        start_reset_total=jnp.zeros((), jnp.int32),
    )


def watch_start(state: StartState, restarted: jax.Array, after: After) -> StartState:
    """After the step. A norm spoils as far as the rules let it through, and shows what is usual as it came."""
    restarted = restarted & after.applied
    counts = after.applied & (after.clipped_norm > 0)
    came, passed = (jnp.log(jnp.where(counts, x, 1)).astype(jnp.float32) for x in (after.norm, after.clipped_norm))
    # A step that starts anew is the first of the new start.
    norms = jnp.where(restarted, 0, state.start_norms)
    first, suspect = norms == 0, norms < _SUSPECT
    low = ~first & (came < state.log_largest - _FAR)
    in_row = jnp.where(low, next_step(state.low_in_row), 0)
    watched = counts & (norms < _SUSPECT + _AGREE)
    largest = jnp.where(first, passed, jnp.maximum(state.log_largest, passed))
    return StartState(
        start_norms=jnp.where(watched, next_step(norms), norms),
        log_largest=jnp.where(watched & suspect, largest, state.log_largest),
        low_in_row=jnp.where(watched, in_row, state.low_in_row),
        spoilt=state.spoilt & ~restarted | watched & (in_row >= _AGREE),
        start_reset_total=count_if(restarted, state.start_reset_total),
    )


def fresh_where(restarts: jax.Array, inner: optax.GradientTransformation, state: Any, params: PyTree) -> Any:
    """The optimizer's state, with moments and their ages as in `init` where it starts anew.

    A selection and not a branch: it is computed as the moments are read, and needs no pass of its own.
    """
    fresh = reset_state(inner, state, params)
    return jax.tree.map(lambda new, old: old if new is old else jnp.where(restarts, new, old), fresh, state)

"""The rung `reset_moments`: starts the optimizer's moments anew when they are bad, or stop the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.tree import is_gradient, leaves_with_none
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.moments import all_finite, fingerprints, moments, moves_float32, reset_state
from optax_guard.recovery._seen import After, Seen, Trouble

__all__ = [
    "Reset",
    "ResetState",
    "after_reset",
    "empty_reset",
    "look_at_moments",
    "reasons_to_reset",
    "reset_moments",
    "start_anew",
]


class ResetState(NamedTuple):
    """What `reset_moments` carries."""

    parameter_sums: jax.Array  # f32[n_leaves, 2]: sum of squares and sum at the last check
    leaf_moved: jax.Array  # bool[n_leaves]: whether the leaf was alive at the last check
    moments_finite: jax.Array  # bool[]: what the last check saw; True after a reset
    frozen_leaves: jax.Array  # i32[]: leaves with a gradient that had moved before and stood still at the last check
    standing_still: jax.Array  # i32[]: leaves too coarse (bfloat16) for updates that would move them in float32
    parameters_frozen: jax.Array  # bool[]: whether the frozen were at least half; False after a reset
    reset_total: jax.Array  # i32[]: resets, for whatever reason
    silent_death_total: jax.Array  # i32[]: resets because the moments were dead


class Reset(NamedTuple):
    """Made by `reset_moments`."""

    after: int
    check_every: int


def reset_moments(after: int = 5, *, check_every: int = 100) -> Reset:
    """Re-initialise the inner optimizer's moments after trouble, or when they are found dead.

    moments, ages <- those of inner.init(params)     after `after` steps of trouble in a row (once a row), or
                                                     every `check_every` steps if the moments are dead

    Silent death: with the bare `optax.adam` one finite gradient of 1e30 makes the second moment infinite, and every
    later update is exactly zero. No loss, gradient or parameter is ever NaN. A guard holds such a gradient, but a
    checkpoint may carry the damage in, and a gradient of 1e18, which can be squared, leaves a finite second moment that
    needs 80 000 steps to decay. So every `check_every` steps the guard looks for

      - a moment that is not finite;
      - frozen parameters: at least half of the leaves that had moved and have a gradient stood still since the last
        look, though this step was applied: their sum and their sum of squares kept every bit, which means a change
        below 1e-7 of the leaf. A leaf that never moved (a frozen layer) does not count, and one that was frozen counts
        again only after it has moved again.

    A parameter of 16 bits stands still long before its moments are dead: at the end of a decaying schedule updates fall
    below half a unit in its last place. Such a leaf is frozen only if the update could not move it in float32 either,
    that is, below 2^-24 of every element; else it is counted as `guard/standing_still`, and nothing is reset. To see
    which, the update is made once more, at that look. A leaf for which that number stays above 0 has stopped training:
    keep a float32 copy of the parameters, or raise the learning rate.

    Guarantees:
      - Parameters, schedules' counters, keys, flags and injected hyperparameters keep their bits.
      - After a reset the moments are those of a new optimizer, and so is Adam's bias correction.
      - Dead moments are found within `check_every` (not finite) or twice that (frozen) steps, reset, and told by
        `metrics` (`guard/silent_death_total`, `guard/frozen_leaves`, `guard/moments_finite`) and the flight log. If
        the step of a look is held, the next one judges.
      - `apply_gradients` and `update` with `optax.apply_updates` come to the same verdict.

    What is a moment: a floating-point array with a dimension, or a 0-d one whose path ends in that of a 0-d parameter.
    A counter beside moments in the same state (Adam's and Adafactor's `count`) is their age and starts anew with them:
    zeroed moments under the old count would make the next updates up to 6.5 times too large. A counter in a state of
    its own (a schedule's) is kept, so the learning rate goes on where it was.

    ==========================================  ====================================================================
    Case                                        Result
    ==========================================  ====================================================================
    the row of trouble goes on                  no second reset until a healthy step has ended it
    an optimizer without moments (plain SGD)    nothing changes; counted
    exponential averages of *parameters* inside a moment like any other: keep them outside of the guard
    the learning rate falls to 0                one reset, since all leaves stop: harmless, as nothing moves
    zero gradients                              no verdict, and no trouble, whatever the optimizer makes of them
    16-bit leaves, `optax.apply_every(k)`       the look sees one update: take a multiple of k for `check_every`
    no `params`                                 ValueError: it looks whether they move
    ==========================================  ====================================================================

    Args:
      after: steps of trouble in a row (>= 1).
      check_every: calls between two looks (>= 1). A look reads the parameters twice and the moments once, about 0.6 of
        the traffic of an AdamW step: 0.6 % at 100.

    Returns:
      A rung for `guard(..., recovery=(...,))`.

    Raises:
      ValueError: wrong static arguments.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.adam(0.1), og.skip_large(1.0), recovery=(og.reset_moments(after=2),))
      >>> params, state = jnp.ones(1), tx.init(jnp.ones(1))
      >>> for size in (0.5, 9.0, 9.0):
      ...     params, state = og.apply_gradients(tx, jnp.full(1, size), state, params)
      >>> str(og.flight_log(state)["recovery"][-1]), optax.tree.get(state, "mu")
      ('reset_refused', Array([0.], dtype=float32))

    References:
      Huang et al. 2025, "SPAM: Spike-Aware Adam with Momentum Reset" (arXiv 2501.06842) resets both moments every 500
      steps; here it happens on evidence, and Adam's step count goes with them.
    """
    name = "reset_moments"
    return Reset(
        after=validate.integer(name, "after", after, low=1),
        check_every=validate.integer(name, "check_every", check_every, low=1),
    )


def empty_reset(params: PyTree) -> ResetState:
    """The state before the first step."""
    leaves = len(leaves_with_none(params))
    return ResetState(
        parameter_sums=jnp.zeros((leaves, 2), jnp.float32),
        leaf_moved=jnp.zeros(leaves, bool),
        moments_finite=jnp.ones((), bool),
        frozen_leaves=jnp.zeros((), jnp.int32),
        standing_still=jnp.zeros((), jnp.int32),
        parameters_frozen=jnp.zeros((), bool),
        reset_total=jnp.zeros((), jnp.int32),
        silent_death_total=jnp.zeros((), jnp.int32),
    )


def reasons_to_reset(rung: Reset, state: ResetState, seen: Seen, trouble: Trouble) -> dict[str, jax.Array]:
    """Before the step: which reasons there are, by their names in the flight log."""
    return {
        "reset_refused": trouble.now & (trouble.in_row == rung.after),
        "reset_nonfinite": seen.alive & ~state.moments_finite,
        "reset_frozen": seen.alive & state.parameters_frozen,
    }


def start_anew(
    resets: jax.Array, inner: optax.GradientTransformation, params: PyTree, inner_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Instead of the step: the inner state with its moments as `init` makes them."""
    return lax.cond(resets, lambda: (params, reset_state(inner, inner_state, params)), lambda: (params, inner_state))


def after_reset(state: ResetState, resets: jax.Array, dead: jax.Array) -> ResetState:
    """The state that a reset leaves, with the counters of resets."""
    return state._replace(
        moments_finite=state.moments_finite | resets,
        parameters_frozen=state.parameters_frozen & ~resets,
        reset_total=count_if(resets, state.reset_total),
        silent_death_total=count_if(dead, state.silent_death_total),
    )


def look_at_moments(rung: Reset, axis_name: AxisName | None, state: ResetState, seen: Seen, after: After) -> ResetState:
    """After the step, every `check_every`: are the moments finite, and did the parameters move since the last look?"""
    due = seen.alive & (seen.step % rung.check_every == 0)

    def look() -> tuple[jax.Array, jax.Array]:
        now = after.params()
        return all_finite(moments(after.inner_state, now), axis_name), fingerprints(now, axis_name)

    finite, sums = lax.cond(due, look, lambda: (state.moments_finite, state.parameter_sums))
    # the first look has nothing to compare with
    moved = jnp.any(sums != state.parameter_sums, axis=1) & (seen.step > 0)
    judged = due & after.applied  # a step that was held says nothing of the optimizer
    eligible = judged & state.leaf_moved & seen.has_gradient
    still = eligible & ~moved
    dead = still & ~_rounded(still, after, axis_name)
    frozen = jnp.sum(dead, dtype=jnp.int32)
    half = (frozen > 0) & (2 * frozen >= jnp.sum(eligible, dtype=jnp.int32))
    alive = jnp.where(judged, moved | still & ~dead, state.leaf_moved | moved)
    return state._replace(
        parameter_sums=sums,
        leaf_moved=jnp.where(due, alive, state.leaf_moved),
        moments_finite=finite,
        frozen_leaves=jnp.where(judged, frozen, state.frozen_leaves),
        standing_still=jnp.where(judged, jnp.sum(still & ~dead, dtype=jnp.int32), state.standing_still),
        parameters_frozen=jnp.where(judged, half, state.parameters_frozen),
    )


def _rounded(still: jax.Array, after: After, axis_name: AxisName | None) -> jax.Array:
    """bool[n_leaves]: those of 16 bits that stand still though the update would move them in float32.

    Only the update tells, and the fast way never writes it down: it is made once more, with the gradient of this step,
    in a branch that is taken when a leaf of 16 bits stood still.
    """
    leaves = leaves_with_none(jax.eval_shape(after.params))
    narrow = np.array([is_gradient(leaf) and jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves], bool)
    if not narrow.any():
        return jnp.zeros_like(still)

    def moves() -> jax.Array:
        now = after.params()
        return moves_float32(after.next_updates(after.inner_state, now), now, axis_name) & narrow

    return lax.cond(jnp.any(still & narrow), moves, lambda: jnp.zeros_like(still))

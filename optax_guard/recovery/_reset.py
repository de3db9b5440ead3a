"""The rung `reset_moments`: resets the optimizer's moments if they are bad or stop the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.forms import cond_or_select
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
    "look_is_due",
    "reasons_to_reset",
    "reset_moments",
    "start_anew",
]


class ResetState(NamedTuple):
    """The state of `reset_moments`."""

    parameter_sums: jax.Array  # f32[n_leaves, 2]: sum of squares and sum at the last check
    leaf_moved: jax.Array  # bool[n_leaves]: whether the leaf was alive at the last check
    moments_finite: jax.Array  # bool[]: whether moments were finite at the last check; True after a reset
    frozen_leaves: jax.Array  # i32[]: leaves with a gradient that had moved before but not by the last check
    standing_still: jax.Array  # i32[]: leaves too coarse (bfloat16) for updates that would move them in float32
    parameters_frozen: jax.Array  # bool[]: whether at least half of the leaves were frozen; False after a reset
    reset_total: jax.Array  # i32[]: resets, for whatever reason
    silent_death_total: jax.Array  # i32[]: resets because the moments were dead


class Reset(NamedTuple):
    """The settings of `reset_moments`."""

    after: int
    check_every: int


def reset_moments(after: int = 5, *, check_every: int = 100) -> Reset:
    """Reset the inner optimizer's moments after trouble, or if they are dead.

    moments, ages <- those of inner.init(params)     after `after` steps of trouble in a row (once per streak),
                                                     or every `check_every` steps if they are dead

    Moments can die silently: with the bare `optax.adam`, one finite gradient of 1e30 makes the second moment infinite,
    and every later update is exactly zero, although no loss, gradient or parameter is ever NaN. A guard holds such a
    gradient, but a checkpoint may contain the damage, and a gradient of 1e18, whose square is finite, leaves a second
    moment that takes 80 000 steps to decay. Every `check_every` steps the guard therefore looks for

      - a moment that is not finite;
      - frozen parameters: at least half of the leaves that had moved before and have a gradient did not move since the
        last check, although this step was applied. Their sum and their sum of squares are unchanged to the last bit,
        which means a change below 1e-7 of the leaf. A leaf that never moved (a frozen layer) does not count, and a
        leaf that was frozen counts again only after it has moved.

    A 16-bit parameter stops moving long before its moments are dead: at the end of a decaying schedule, updates fall
    below half a unit in its last place. Such a leaf is frozen only if the update could not move it in float32 either,
    being below 2^-24 of every element. Otherwise it counts in `guard/standing_still`, and nothing is reset. To find
    out, that check computes the update once more. If the number stays above 0, those leaves have stopped training:
    round them stochastically (`stochastic_rounding`), keep a float32 copy, or raise the learning rate.

    Guarantees:
      - Parameters, the counters of schedules, keys, flags and injected hyperparameters are unchanged bit for bit.
      - After a reset, the moments and Adam's bias correction are those of a new optimizer.
      - Dead moments are found within `check_every` steps (not finite) or twice that (frozen), reset, and reported in
        `metrics` (`guard/silent_death_total`, `guard/frozen_leaves`, `guard/moments_finite`) and the flight log. If the
        step of a check is held, the next step is checked.
      - `apply_gradients` gives the same verdict as `update` with `optax.apply_updates`.

    A moment is a floating-point array with at least one dimension, or a 0-d one whose path ends in that of a 0-d
    parameter. A counter beside moments in the same state (the `count` of Adam and Adafactor) is their age and is reset
    with them, since zeroed moments with the old count would make the next updates up to 6.5 times too large. A counter
    in a state of its own (of a schedule) is kept, so the learning rate continues from its value.

    ==========================================  ====================================================================
    Case                                        Result
    ==========================================  ====================================================================
    the streak of trouble continues             no second reset until a healthy step has ended it
    an optimizer without moments (plain SGD)    nothing changes, but the reset is counted
    moving averages of *parameters* inside      reset like any moment: keep them outside the guard
    the learning rate falls to 0                one reset, since all leaves stop; harmless, as nothing moves
    zero gradients                              no verdict and no trouble, whatever the optimizer makes of them
    16-bit leaves, `optax.apply_every(k)`       a check sees one update: use a multiple of k for `check_every`
    no `params`                                 ValueError, since they are checked for movement
    ==========================================  ====================================================================

    Args:
      after: the number of steps of trouble in a row that cause a reset (>= 1).
      check_every: the number of calls between two checks (>= 1). A check reads the parameters twice and the moments
        once, which is about 0.6 of the memory traffic of an AdamW step: 0.6 % with 100.

    Returns:
      A rung for `guard(..., recovery=(...,))`.

    Raises:
      ValueError: a static argument is invalid.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.adam(0.1), og.skip_large(1.0), recovery=(og.reset_moments(after=2),))
      >>> params, state = jnp.ones(1), tx.init(jnp.ones(1))
      >>> for size in (0.5, 9.0, 9.0):
      ...     params, state = og.apply_gradients(tx, jnp.full(1, size), state, params)
      >>> str(og.flight_log(state)["recovery"][-1]), optax.tree.get(state, "mu")
      ('reset_refused', Array([0.], dtype=float32))

    References:
      Huang et al. 2025, "SPAM: Spike-Aware Adam with Momentum Reset" (arXiv 2501.06842). Deviations: the paper resets
      both moments every 500 steps; here they are reset only on evidence, together with Adam's step count.
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
    """Before the step: the reasons to reset, by their names in the flight log."""
    return {
        "reset_refused": trouble.now & (trouble.in_row == rung.after),
        "reset_nonfinite": seen.alive & ~state.moments_finite,
        "reset_frozen": seen.alive & state.parameters_frozen,
    }


def start_anew(
    resets: jax.Array, inner: optax.GradientTransformation, params: PyTree, inner_state: PyTree
) -> tuple[PyTree, PyTree]:
    """In place of the step: the inner state with its moments as in `init`."""
    return cond_or_select(
        resets, lambda: (params, reset_state(inner, inner_state, params)), lambda: (params, inner_state)
    )


def after_reset(state: ResetState, resets: jax.Array, dead: jax.Array) -> ResetState:
    """The state after a reset, with its counters."""
    return state._replace(
        moments_finite=state.moments_finite | resets,
        parameters_frozen=state.parameters_frozen & ~resets,
        reset_total=count_if(resets, state.reset_total),
        silent_death_total=count_if(dead, state.silent_death_total),
    )


def look_is_due(rung: Reset, seen: Seen) -> jax.Array:
    """Whether this step ends with a look at the moments, known before it."""
    return seen.alive & (seen.step % rung.check_every == 0)


def look_at_moments(rung: Reset, axis_name: AxisName | None, state: ResetState, seen: Seen, after: After) -> ResetState:
    """After the step, every `check_every`: are the moments finite, and did the parameters move since the last check?"""
    due = look_is_due(rung, seen)

    def look() -> tuple[jax.Array, jax.Array]:
        now = after.params()
        return all_finite(moments(after.inner_state, now), axis_name), fingerprints(now, axis_name)

    finite, sums = cond_or_select(due, look, lambda: (state.moments_finite, state.parameter_sums))
    # the first check has nothing to compare with
    moved = jnp.any(sums != state.parameter_sums, axis=1) & (seen.step > 0)
    judged = due & after.applied  # a held step says nothing about the optimizer
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
    """bool[n_leaves]: the 16-bit leaves that stand still although the update would move them in float32.

    Only the update shows this, and the fast step never writes it out. It is computed once more, with the gradient of
    this step, in a branch that is taken only if a 16-bit leaf stands still.
    """
    leaves = leaves_with_none(jax.eval_shape(after.params))
    narrow = np.array([is_gradient(leaf) and jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves], bool)
    if not narrow.any():
        return jnp.zeros_like(still)

    def moves() -> jax.Array:
        now = after.params()
        return moves_float32(after.next_updates(after.inner_state, now), now, axis_name) & narrow

    return cond_or_select(jnp.any(still & narrow), moves, lambda: jnp.zeros_like(still))

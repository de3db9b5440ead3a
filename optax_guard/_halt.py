"""Halts on the host: what happened, and how to continue."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.tree import field_array, find_states
from optax_guard._common.typing import PyTree, State
from optax_guard._guard import GuardState
from optax_guard._step.reading import (
    batches,
    check_on_host,
    member,
    members,
    nonfinite_leaf,
    nonfinite_moment,
    seen_names,
    what_was_seen,
)
from optax_guard._step.record import read_rows
from optax_guard.recovery import _ladder

__all__ = ["TrainingHalted", "clear_halt", "raise_if_halted"]


class TrainingHalted(RuntimeError):  # noqa: N818 (named after what happened, as StopIteration is)
    """Raised on the host when a guard has halted: too many non-finite steps in a row, or rewinds that did not help.

    docs/triage.md says what to do next.
    """


def raise_if_halted(state: optax.OptState, params: PyTree | None = None) -> None:
    """Raises `TrainingHalted` on the host if a guard in `state` has halted.

    It waits for the step that produced `state`, so call it as often as you log. It reads only the `halted` flags, and
    everything else only after a halt.

    ============================================  =====================================================================
    Case                                          The message says
    ============================================  =====================================================================
    gradients that were not finite                the step, the leaf and what it held; the parameters are intact
    NaN or Inf in `params` themselves             which leaf, and to restore an earlier checkpoint
    NaN or Inf in a moment of the optimizer       which moment, and to restore or use `reset_moments`
    `optax.MultiSteps` around the guard           that it keeps a NaN for ever, and to use `accumulate` instead
    a state of many runs (`vmap`, `pmap`)         which members halted, and what happened to the first
    the state of an `nnx.Optimizer`               to continue with `optax_guard.flax.clear_halt(optimizer)`
    ============================================  =====================================================================

    Args:
      state: any optimizer state that holds a guard.
      params: the parameters, which are checked for NaN and give the leaf its name; without them the message has its
        index.

    Raises:
      TrainingHalted: a guard has halted. The message names the step, the leaf and what was seen there.
      ValueError: `state` holds no guard.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), halt_after=1)
      >>> params = {"dense": {"kernel": jnp.ones(2)}}
      >>> grads = {"dense": {"kernel": jnp.full(2, jnp.nan)}}
      >>> params, state = og.apply_gradients(tx, grads, tx.init(params), params)
      >>> og.raise_if_halted(state, params)  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
      TrainingHalted: halted at step 0 after 1 non-finite step in a row: the gradient of `dense/kernel` held NaN. ...
    """
    states = find_states(state, GuardState)
    if not states:
        raise ValueError("raise_if_halted: there is no guard in this state; wrap the optimizer in `guard` first.")
    for each in states:
        check_on_host("raise_if_halted", each.halted)
        halted = np.asarray(jax.device_get(field_array(each.halted)))
        if halted.any():
            who = [index for index in members(each.halted) if halted[index]]
            story = _story(each, who[0], state, params)
            if halted.ndim > 0:
                names = ", ".join(str(index[0] if len(index) == 1 else index) for index in who)
                story = f"{len(who)} of {halted.size} members of this state halted: {names}. The first of them {story}"
            raise TrainingHalted(f"{story} (What now: docs/triage.md.)")


def clear_halt(state: State) -> State:
    """Clears the `halted` flag of every guard in a state and resets its counts of non-finite steps and rewinds.

    For an `nnx.Optimizer`, use `optax_guard.flax.clear_halt(optimizer)`, which writes into its Variables: a step under
    `nnx.cached_partial` would not see new Variables.

    Args:
      state: any optimizer state; in a state of many runs at once (`jax.vmap`, `jax.pmap`) all are cleared.

    Returns:
      A state of the same structure, with everything else unchanged.

    Raises:
      ValueError: there is no guard in `state`, for instance since it was restored without a target.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), halt_after=1)
      >>> params = jnp.ones(2)
      >>> _, state = og.apply_gradients(tx, jnp.full(2, jnp.inf), tx.init(params), params)
      >>> bool(state.halted), bool(og.clear_halt(state).halted)
      (True, False)
    """
    if not find_states(state, GuardState):
        raise ValueError(
            "clear_halt: there is no guard in this state. Pass the optimizer's state, restored into `tx.init(params)`."
        )

    def clear(node: Any) -> Any:
        if not isinstance(node, GuardState):
            return node
        return node._replace(
            guarded_state=jax.tree.map(clear, node.guarded_state, is_leaf=lambda part: isinstance(part, GuardState)),
            halted=jax.tree.map(jnp.zeros_like, node.halted),
            nonfinite_in_row=jax.tree.map(jnp.zeros_like, node.nonfinite_in_row),
            recovery_state=_ladder.cleared(node.recovery_state),
        )

    return jax.tree.map(clear, state, is_leaf=lambda node: isinstance(node, GuardState))


def _story(guard_state: GuardState, index: tuple[int, ...], state: PyTree, params: PyTree | None) -> str:
    """Describes a member's halt from the last rows of its recorder, and how to continue."""
    recorder, in_row = member((guard_state.recorder, guard_state.nonfinite_in_row), index)
    rows = read_rows(recorder)
    in_place = type(guard_state.halted).__module__.startswith("flax.nnx")
    clear = "`optax_guard.flax.clear_halt(optimizer)`" if in_place else "`clear_halt(state)`"
    given_up = [row for row in rows[rows["event"] != "halted"][-1:] if "gave_up" in str(row["recovery"])]
    if given_up:
        return (
            f"halted at step {int(given_up[0]['step'])}: the loss diverged again after every rewind, so the batches "
            f"were not the cause. Lower the learning rate or look at the data, and continue with {clear}, which "
            "takes the present loss as the new level."
        )
    bad = np.flatnonzero((rows["event"] == "nonfinite") | (rows["event"] == "nonfinite_update"))
    if len(bad) == 0:
        return "halted; the cause is no longer in the flight recorder."
    last = rows[bad[-1]]
    count = int(field_array(in_row))
    steps = "step" if count == 1 else "steps"
    step = f"{int(last['step'])}{batches([last['tag']])}"
    seen = what_was_seen(last, seen_names(guard_state.seen_leaves, params))
    return (
        f"halted at step {step} after {count} non-finite {steps} in a row: {seen}. "
        f"{_what_to_do(guard_state, index, state, params, clear)}"
    )


def _what_to_do(
    guard_state: GuardState, index: tuple[int, ...], state: PyTree, params: PyTree | None, clear: str
) -> str:
    """The cause, if it can be found in the state itself, or else where to look."""
    for around in find_states(state, optax.MultiStepsState):
        if find_states(around, GuardState) and nonfinite_leaf(around.acc_grads) is not None:
            return (
                "The cause is `optax.MultiSteps` around the guard: its sum received a number that is not finite and "
                "keeps it for ever (0 * NaN is NaN), so that every later cycle is lost. The parameters are those "
                "before the first lost cycle. Use `accumulate(guard(...), every)` instead, which drops such a "
                "micro-batch; `add_guard_state` moves the optimizer's state into it."
            )
    shape = np.shape(field_array(guard_state.halted))
    many = all(np.shape(leaf)[: len(shape)] == shape for leaf in jax.tree.leaves(params))
    bad = None if params is None else nonfinite_leaf(member(params, index if many else ()))
    if bad is not None:
        return (
            f"The parameters themselves hold {bad[1]}, the first in `{bad[0]}`: restore an earlier checkpoint. "
            "If they were finite before, the optimizer's update was not: `check_updates=True` holds such a step."
        )
    inside = member(guard_state.guarded_state, index)
    bad = nonfinite_moment(inside, {} if params is None else params)
    if bad is not None:
        return (
            f"The optimizer's own state holds {bad[1]}, the first in `{bad[0]}`: restore an earlier checkpoint, or "
            "reset its moments: `add_guard_state` into a guard with `recovery=(reset_moments(),)`."
        )
    return (
        "The parameters are those before the first of them. Look at `flight_log(state)`, fix the cause, and continue "
        f"with {clear}."
    )

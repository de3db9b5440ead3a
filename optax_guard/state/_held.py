"""Keeps values beside the optimizer unchanged on a held step: running statistics, averages, target networks.

A guard holds the parameters and the optimizer state, but cannot see what the forward pass of a bad batch wrote
elsewhere:

==============================================  ====================================================================
Computed in the step                            After a NaN batch whose step is held
==============================================  ====================================================================
running statistics of batch norm                permanently NaN, and so is every evaluation (in some layers every step)
an average of the loss or of activations        permanently NaN
a moving average of parameters, target network  moves towards parameters that did not move
==============================================  ====================================================================

`keep_if_held(state, new, old)` returns the old values if the step was held.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._common.tree import check_same_structure, field_array, path_name
from optax_guard._common.typing import PyTree, Tree
from optax_guard._guard import GuardState
from optax_guard._loss_scaling import LossScalingState
from optax_guard._step.record import EVENTS, HELD, FlightRecorder, last_row
from optax_guard.accumulation._calls import AccumulateState

__all__ = ["keep_if_held", "last_step_held", "select_old"]

# Optax's two wrappers that do not call the inner transformation at every step.
_WRAPPERS = (GuardState, AccumulateState, LossScalingState, optax.MultiStepsState, optax.ApplyIfFiniteState)


def keep_if_held(state: optax.OptState, new: Tree, old: Tree) -> Tree:
    """Selects a value computed beside the optimizer: `new`, or `old` if the step that produced `state` was held.

    kept = old   if the last call to the transformation was held,   else new           (every leaf selected as a whole)

    Guarantees:
      - On a held step the result is `old` bit for bit, whatever `new` holds; otherwise it is `new` bit for bit.
      - It works inside and outside `jit`, `vmap` and `scan`, on any tree, in one pass and without multiplication.
      - `state` may be that of many runs at once (`jax.vmap`, `jax.pmap`); each run keeps its own values.

    ==========================================  ======================================================================
    The last call                               Held
    ==========================================  ======================================================================
    `guard` held it, for whatever reason        yes: `guard/skipped` in `metrics` is 1
    `reset_moments` or `rewind` acted           yes: its gradient was not applied
    `accumulate` dropped the micro-batch        yes, although the cycle goes on without it
    `accumulate` took the micro-batch           no, even while the parameters wait for the end of the cycle
    `accumulate` ended a cycle                  as the guard inside says; yes if the cycle was empty
    `loss_scaling` saw an overflow              yes
    several guards, side by side or nested      yes if one of those called in this step held its part
    no call yet                                 no
    ==========================================  ======================================================================

    A rewind returns to a snapshot of the parameters and the optimizer state. It cannot restore other values: `old` is
    then the value before the step, not the value at the snapshot. A value that must go back with the parameters belongs
    in the optimizer's state (docs/state/held.md).

    Args:
      state: the optimizer state after the step, with a `guard`, `accumulate` or `loss_scaling` in it.
      new: the value computed in the step: a tree of arrays, PRNG keys and Python numbers; any other leaf must be equal
        in both trees.
      old: the same value from before the step.

    Returns:
      A tree with the structure of `new`.

    Raises:
      ValueError: `state` holds none of the three, or `new` and `old` differ in structure, shapes or dtypes (the message
        names the leaf).

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> params, statistics = jnp.ones(2), {"mean": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for batch in (jnp.ones(2), jnp.full(2, jnp.nan)):
      ...     params, state = og.apply_gradients(tx, batch, state, params)
      ...     seen = {"mean": 0.9 * statistics["mean"] + 0.1 * batch}
      ...     statistics = og.keep_if_held(state, seen, statistics)
      >>> statistics["mean"]
      Array([0.1, 0.1], dtype=float32)

    See Also:
      `optax_guard.flax.TrainState`, whose `apply_gradients` does this for every field that it replaces.
    """
    held = last_step_held(state)
    if held is None:
        raise ValueError(
            "keep_if_held: there is no `guard`, `accumulate` or `loss_scaling` in `state`, so no step is ever held; "
            "wrap the optimizer in `guard` first."
        )
    return select_old("keep_if_held", held, new, old)


def select_old(function: str, held: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`old` if `held`, else `new`, on behalf of a public function."""
    check_same_structure(function, "new", new, "old", old)
    structures = jax.tree.structure(new), jax.tree.structure(old)
    if structures[0] != structures[1]:
        raise ValueError(f"{function}: `new` and `old` differ in structure: {structures[0]} and {structures[1]}.")
    return jax.tree_util.tree_map_with_path(lambda path, n, o: _select(function, held, path_name(path), n, o), new, old)


def last_step_held(state: optax.OptState) -> jax.Array | None:
    """Whether the call that produced `state` was held, `bool[]`; None if nothing in it can hold a step."""
    answers = [_held(node) for node in jax.tree.leaves(state, is_leaf=_is_wrapper) if _is_wrapper(node)]
    answers = [answer for answer in answers if answer is not None]
    return None if not answers else jnp.any(jnp.stack(answers), axis=0)


def _is_wrapper(node: Any) -> bool:
    return isinstance(node, _WRAPPERS)


def _held(node: Any) -> jax.Array | None:
    """The answer of one wrapper, which knows whether its inner transformation was called in the last step."""
    if isinstance(node, GuardState):
        here = _row_held(FlightRecorder(*map(field_array, node.recorder)), field_array(node.guard_step))
        return _or(here, last_step_held(node.guarded_state))
    if isinstance(node, AccumulateState):
        inside = last_step_held(node.accumulated_state)
        return _or(field_array(node.micro_batch_lost), None if inside is None else field_array(node.emitted) & inside)
    if isinstance(node, LossScalingState):
        return _or(field_array(node.overflowed), last_step_held(node.unscaled_state))
    inside = last_step_held(node.inner_opt_state if isinstance(node, optax.MultiStepsState) else node.inner_state)
    if inside is None:
        return None
    if isinstance(node, optax.MultiStepsState):
        return (field_array(node.mini_step) == 0) & inside
    return ~field_array(node.last_finite) | inside


def _row_held(recorder: FlightRecorder, step: jax.Array) -> jax.Array:
    """Whether the newest row is that of a held step; for each run in a state of many runs."""
    if jnp.ndim(step) > 0:
        return jax.vmap(_row_held)(recorder, step)
    event = last_row(recorder, step).event
    return (event >= 0) & jnp.array([name in HELD for name in EVENTS])[event]


def _or(here: jax.Array, inside: jax.Array | None) -> jax.Array:
    return here if inside is None else here | inside


def _select(function: str, held: jax.Array, name: str, new: Any, old: Any) -> Any:
    arrays = [isinstance(leaf, (bool, int, float, complex)) or hasattr(leaf, "dtype") for leaf in (new, old)]
    if not all(arrays):
        if new is old or (not any(arrays) and new == old):
            return new
        raise ValueError(f"{function}: leaf `{name}` is not an array and differs: {old!r} became {new!r}.")
    new, old = _as_array(new, old), _as_array(old, new)
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"{function}: leaf `{name}` is {old.dtype}{list(old.shape)} in `old` and {new.dtype}{list(new.shape)} "
            "in `new`: they must agree."
        )
    if held.ndim == 0:
        return jnp.where(held, old, new)
    if held.shape != new.shape[: held.ndim]:
        raise ValueError(
            f"{function}: `state` is that of many runs, {list(held.shape)}, and leaf `{name}` has the shape "
            f"{list(new.shape)}: its first axes must be those of the runs."
        )
    return jnp.where(jnp.reshape(held, held.shape + (1,) * (new.ndim - held.ndim)), old, new)


def _as_array(leaf: Any, other: Any) -> jax.Array:
    """`leaf` as an array: a Python number in the dtype of `other`."""
    return (
        leaf
        if isinstance(leaf, jax.Array)
        else jnp.asarray(leaf, getattr(leaf, "dtype", getattr(other, "dtype", None)))
    )

"""Adding a guard to a run in flight, and taking it out again: its state around, or without, the optimizer's.

================================================  ================================================
You have                                          Take
================================================  ================================================
a checkpoint of `optimizer`, want `guard(...)`    `with_guard_state(tx, params, inner_state)`
a state of `guard(...)`, want it of `optimizer`   `inner_state(state)`
================================================  ================================================
"""

from typing import Any

import jax
import optax

from optax_guard._guard import GuardState
from optax_guard._tree import check_arrays, find_states, path_name
from optax_guard._typing import PyTree

__all__ = ["inner_state", "with_guard_state"]


def with_guard_state(tx: optax.GradientTransformation, params: PyTree, inner_state: optax.OptState) -> optax.OptState:
    """The state of a guarded transformation around an optimizer state that already exists.

    Guarantees:
      - Every array of `inner_state` is in the result as it is: the run goes on bit for bit where it was.
      - What is the guard's own (rules, counters, recorder, ladder) starts anew.

    `inner_state` may be the state of

      - the same transformation without its guards: for `accumulate(guard(adam), 4)` that of `accumulate(adam, 4)`, for
        `chain(a, guard(b))` that of `chain(a, b)`;
      - what the outermost guard wraps, if there is one guard outermost: that of `adam` in both examples (`b`), and what
        is around the guard starts anew.

    Args:
      tx: a transformation with a `guard` in it.
      params: the parameters, as for `tx.init`.
      inner_state: the state to put inside.

    Returns:
      A state for `tx`.

    Raises:
      ValueError: there is no guard in `tx`; `inner_state` already holds one; or it does not fit, with the first path.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> params, adam = jnp.ones(2), optax.adam(0.1)
      >>> updates, old = adam.update(params, adam.init(params))  # a run in flight
      >>> state = with_guard_state(og.guard(adam), params, old)
      >>> int(optax.tree.get(state, "count")), int(og.metrics(state)["guard/step"])
      (1, 0)
    """
    name = "with_guard_state"
    check_arrays(name, params)
    fresh = tx.init(params)
    guards = find_states(fresh, GuardState)
    if not guards:
        raise ValueError(f"{name}: there is no guard in `tx`; wrap the optimizer in `guard` first.")
    if find_states(inner_state, GuardState):
        raise ValueError(
            f"{name}: `inner_state` already holds a guard; take it out with `inner_state(state)`, or go on with it."
        )
    whole, inside = _without_guards(fresh), _without_guards(guards[0].guarded_state)
    given = jax.tree.structure(inner_state)
    if given == jax.tree.structure(whole):
        _check_leaves(name, inner_state, whole)
        return jax.tree.unflatten(jax.tree.structure(fresh), _filled(fresh, iter(jax.tree.leaves(inner_state))))
    outermost = [node for node in jax.tree.leaves(fresh, is_leaf=_is_guard) if _is_guard(node)]
    if len(outermost) == 1 and given == jax.tree.structure(inside):
        _check_leaves(name, inner_state, inside)
        leaves = iter(jax.tree.leaves(inner_state))
        return jax.tree.map(lambda node: _fill(node, leaves) if _is_guard(node) else node, fresh, is_leaf=_is_guard)
    wanted = inside if len(outermost) == 1 else whole
    raise ValueError(
        f"{name}: `inner_state` is not the state of the optimizer in `tx`: {_first_difference(inner_state, wanted)}."
    )


def inner_state(state: optax.OptState) -> optax.OptState:
    """The same state with every guard taken out, for the transformation without them.

    Guarantees:
      - Every array of what the guards wrap is in the result as it is.
      - `inner_state(with_guard_state(tx, params, old))` is `old`, for an `old` that fits the whole of `tx`.

    ===========================  =======================================================================
    State of                     Result
    ===========================  =======================================================================
    `guard(adam)`                that of `adam`
    `accumulate(guard(adam))`    that of `accumulate(adam)`: a half-filled cycle is kept
    `chain(a, guard(b))`         that of `chain(a, b)`
    `guard(guard(adam))`         that of `adam`
    ===========================  =======================================================================

    Args:
      state: an optimizer state with a guard in it.

    Returns:
      The state without.

    Raises:
      ValueError: there is no guard in `state`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> adam = optax.adam(0.1)
      >>> state = inner_state(og.guard(adam).init(jnp.ones(2)))
      >>> jax.tree.structure(state) == jax.tree.structure(adam.init(jnp.ones(2)))
      True
    """
    if not find_states(state, GuardState):
        raise ValueError("inner_state: there is no guard in this state.")
    return _without_guards(state)


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


def _without_guards(state: PyTree) -> PyTree:
    return jax.tree.map(
        lambda node: _without_guards(node.guarded_state) if _is_guard(node) else node, state, is_leaf=_is_guard
    )


def _fill(node: GuardState, leaves: Any) -> GuardState:
    """A fresh guard state with what is inside taken from `leaves`, in order."""
    fields = node._asdict()
    inside = node.guarded_state
    fields["guarded_state"] = jax.tree.unflatten(jax.tree.structure(inside), _filled(inside, leaves))
    return GuardState(**fields)


def _filled(fresh: PyTree, leaves: Any) -> list[Any]:
    """The leaves of `fresh`, those outside of the guards' own from `leaves`."""
    result: list[Any] = []
    for node in jax.tree.leaves(fresh, is_leaf=_is_guard):
        result += jax.tree.leaves(_fill(node, leaves)) if _is_guard(node) else [next(leaves)]
    return result


def _check_leaves(name: str, got: PyTree, expected: PyTree) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in pairs:
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            raise ValueError(
                f"{name}: leaf `{path_name(path)}` of `inner_state` is {leaf.dtype}{list(leaf.shape)}; the optimizer in "
                f"`tx` has {wanted.dtype}{list(wanted.shape)} there."
            )


def _first_difference(got: PyTree, expected: PyTree) -> str:
    got_paths, expected_paths = (
        [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (got, expected)
    )
    for path in expected_paths:
        if path not in got_paths:
            return f"it lacks leaf `{path_name(path)}`"
    for path in got_paths:
        if path not in expected_paths:
            return f"it has a leaf `{path_name(path)}` that the optimizer's has not"
    return f"it is made of other states ({jax.tree.structure(got)} for {jax.tree.structure(expected)})"

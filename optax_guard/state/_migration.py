"""Adds a guard to a run in progress and removes it again, by putting its state around the optimizer's or dropping it.

====================================================  ================================================
You have                                              Use
====================================================  ================================================
the state of an optimizer, and want `guard(...)`      `add_guard_state(tx, params, inner_state)`
the state of another guard (rules, `recovery`)        the same
to know which part of a state would be taken          `find_inner_state(tx, params, inner_state)`
the state of `guard(...)`, and want the optimizer's   `remove_guard_state(state)`
====================================================  ================================================

The optimizer's state is found by its structure: the names and kinds of nodes, and the shapes and dtypes of leaves. A
state restored without a target (dicts for named tuples, lists for tuples, NumPy for JAX arrays) counts as equal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.state_check import are_alike, is_single_leaf
from optax_guard._common.tree import as_arrays, field_array, find_states, path_name
from optax_guard._common.typing import PyTree
from optax_guard._guard import BoundedState, GuardState
from optax_guard._step.act import as_transformation
from optax_guard._step.reading import is_traced, nonfinite_leaf, nonfinite_moment
from optax_guard.recovery._ladder import RecoveryState
from optax_guard.recovery._reset import ResetState

__all__ = ["add_guard_state", "find_inner_state", "put_into_guard", "remove_guard_state", "without_guards"]

_GUARD_FIELDS = {"guarded_state", "guard_step", "recorder"}


class _Piece(NamedTuple):
    """A part of the wanted state, and where it was found."""

    path: str | None  # None if it was not found and starts afresh
    leaves: list[Any]  # in the order of the wanted leaves


def add_guard_state(tx: optax.GradientTransformation, params: PyTree, inner_state: optax.OptState) -> optax.OptState:
    """Makes the state of a guarded transformation from an existing optimizer state.

    Guarantees:
      - Every array taken from `inner_state` is unchanged in the result, so the run continues bit for bit.
      - The guard's own state (rules, counters, recorder, ladder) starts afresh.
      - Nothing is guessed: if two places fit, an error lists them; if none fits, an error states the first difference.

    ============================================================  =====================================================
    `inner_state` is the state of                                 Taken over
    ============================================================  =====================================================
    the same composition without guards: `accumulate(adam)` for   all of it
    `accumulate(guard(adam))`, `chain(a, b)` for
    `chain(a, guard(b))`
    the optimizer in the outermost guard                          all of it; what is around the guard starts afresh
    `chain(clip, adam)`, `apply_if_finite(adam, 5)`,              the state of `adam`
    `MultiSteps(adam, 4)`, `inject_hyperparams(adam)(...)`
    a flat `chain(clip, scale_by_adam(), ...)`                    each part where it is found
    a guard with other rules or `recovery`; `stabilize` with      the optimizer's; the guard's own state starts afresh
    another `max_change`
    an `nnx.Optimizer` (its `opt_state`), a whole `TrainState`    the optimizer's, without nnx's Variables
    a restore without a target (dicts, lists, NumPy)              as for the saved state
    ============================================================  =====================================================

    The bound of `stabilize` has seen no warm-up of this run: if its steps are longer than 1 % of the weights
    (`update_metrics`), pass `max_change=None`, or they stay bounded.

    On the host it also checks that `params` hold no NaN and that the optimizer's moments are finite. Moments that are
    not finite are accepted if the guard has `reset_moments`, which resets them at the first step.

    Args:
      tx: a transformation with a `guard` in it.
      params: the parameters, as for `tx.init`.
      inner_state: the state to take over, or a tree that contains it.

    Returns:
      A state for `tx`. `find_inner_state` tells which part of `inner_state` it takes.

    Raises:
      ValueError: `tx` has no guard; `inner_state` is already a state of `tx`, or fits nowhere or in several places; or
        `params` or the moments hold NaN.

    Example:
      >>> import optax_guard as og
      >>> params, adam = jnp.ones(2), optax.adam(0.1)
      >>> updates, old = adam.update(params, adam.init(params))  # a run in progress
      >>> state = add_guard_state(og.guard(adam), params, old)
      >>> int(optax.tree.get(state, "count")), int(og.metrics(state)["guard/step"])
      (1, 0)
    """
    return put_into_guard("add_guard_state", tx, params, inner_state)


def put_into_guard(
    name: str, tx: optax.GradientTransformation, params: PyTree, inner_state: optax.OptState
) -> optax.OptState:
    """`add_guard_state` for the function called `name`."""
    params = as_arrays(name, params)
    fresh = as_transformation(name, tx, "tx").init(params)
    whole, pieces = _pieces(name, fresh, inner_state)
    leaves = iter([_array(leaf) for piece in pieces for leaf in piece.leaves])
    if whole:
        state = jax.tree.unflatten(jax.tree.structure(fresh), _filled(fresh, leaves))
    else:
        state = jax.tree.map(lambda node: _fill(node, leaves) if _is_guard(node) else node, fresh, is_leaf=_is_guard)
    if is_traced((params, state)):
        return state
    bad = nonfinite_leaf(params, kinds=("NaN",))
    if bad is not None:
        raise ValueError(
            f"{name}: `params`: the parameters themselves hold NaN, the first in `{bad[0]}`: restore an earlier "
            "checkpoint."
        )
    return jax.tree.map(
        lambda node: _looked_at(name, node, params) if _is_guard(node) else node, state, is_leaf=_is_guard
    )


def find_inner_state(tx: optax.GradientTransformation, params: PyTree, inner_state: optax.OptState) -> tuple[str, ...]:
    """Finds the paths in `inner_state` from which `add_guard_state` takes the optimizer's state.

    There is one path if the state is in one place ("(root)" if that is `inner_state` itself), and otherwise one for
    each part of a chain. An optimizer without a state of its own (`optax.sgd(0.1)`) has none.

    Args:
      tx: a transformation with a `guard` in it.
      params: the parameters, as for `tx.init`.
      inner_state: as for `add_guard_state`.

    Returns:
      The paths, joined by "/" as in `leaf_names`, without the guards.

    Raises:
      ValueError: as for `add_guard_state`, except that NaN is not checked.

    Example:
      >>> import optax_guard as og
      >>> params, adam = jnp.ones(2), optax.adam(0.1)
      >>> old = optax.chain(optax.clip_by_global_norm(1.0), adam)
      >>> find_inner_state(og.guard(adam), params, old.init(params))
      ('1',)
    """
    name = "find_inner_state"
    params = as_arrays(name, params)
    _, pieces = _pieces(name, jax.eval_shape(as_transformation(name, tx, "tx").init, params), inner_state)
    return tuple(piece.path for piece in pieces if piece.path is not None)


def remove_guard_state(state: optax.OptState) -> optax.OptState:
    """Removes every guard from a state, for the same transformation without guards.

    Guarantees:
      - Every array inside the guards is unchanged in the result. For an `nnx.Optimizer`, the Variables are copies: to
        write into the optimizer's own, use `optax_guard.flax.inner_state(optimizer)`.
      - `remove_guard_state(add_guard_state(tx, params, old))` is `old`, for an `old` that fits the whole of `tx`.

    ===========================  =======================================================================
    State of                     Result
    ===========================  =======================================================================
    `guard(adam)`                the state of `adam`
    `accumulate(guard(adam))`    the state of `accumulate(adam)`; an unfinished cycle is kept
    `chain(a, guard(b))`         the state of `chain(a, b)`
    `guard(guard(adam))`         the state of `adam`
    ===========================  =======================================================================

    Args:
      state: an optimizer state that holds a guard.

    Returns:
      The state without guards.

    Raises:
      ValueError: `state` holds no guard.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> adam = optax.adam(0.1)
      >>> state = remove_guard_state(og.guard(adam).init(jnp.ones(2)))
      >>> jax.tree.structure(state) == jax.tree.structure(adam.init(jnp.ones(2)))
      True
    """
    if not find_states(state, GuardState):
        raise ValueError("remove_guard_state: there is no guard in this state.")
    return without_guards(state)


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


def _is_any_guard(node: Any) -> bool:
    """Whether it is the state of a guard or of a bound of `stabilize`, possibly restored without a target."""
    return _is_guard(node) or _is_bounded(node) or (isinstance(node, dict) and node.keys() >= _GUARD_FIELDS)


def _is_bounded(node: Any) -> bool:
    return isinstance(node, BoundedState) or (isinstance(node, dict) and node.keys() == set(BoundedState._fields))


def without_guards(state: PyTree, keep: type | tuple[()] = ()) -> PyTree:
    """The state with each guard, and each bound of `stabilize`, replaced by what it wraps.

    Nodes of the type `keep` stay the same objects.
    """

    def open_up(node: Any) -> Any:
        if not _is_any_guard(node):
            return node
        inside = "optimizer_state" if _is_bounded(node) else "guarded_state"
        return without_guards(node[inside] if isinstance(node, dict) else getattr(node, inside), keep)

    return jax.tree.map(open_up, state, is_leaf=lambda node: isinstance(node, keep) or _is_any_guard(node))


def _pieces(name: str, fresh: PyTree, given: PyTree) -> tuple[bool, list[_Piece]]:
    """The parts of `given` that go into `fresh`: into the whole of it, or into its outermost guard alone."""
    if not find_states(fresh, GuardState):
        raise ValueError(f"{name}: there is no guard in `tx`; wrap the optimizer in `guard` first.")
    given = jax.tree.map(lambda x: field_array(x) if _is_variable(x) else x, given, is_leaf=_is_variable)
    if are_alike(given, fresh):
        raise ValueError(
            f"{name}: `inner_state` already holds the guard of this `tx`: continue with it, or remove the guard with "
            "`remove_guard_state(state)`."
        )
    given = without_guards(given)
    outermost = [node for node in jax.tree.leaves(fresh, is_leaf=_is_guard) if _is_guard(node)]
    whole = without_guards(fresh)
    places = _places(whole, given) if jax.tree.leaves(whole) else []
    if places:
        return True, [_the_only(name, places)]
    inside = without_guards(outermost[0].guarded_state)
    if len(outermost) > 1:
        raise ValueError(_fits_nowhere(name, whole, given))
    if not jax.tree.leaves(inside):
        if jax.tree.leaves(given):
            raise ValueError(
                f"{name}: the optimizer in `tx` keeps no state, so there is nothing to take over from `inner_state`: "
                "start with `tx.init(params)`."
            )
        return False, []
    pieces = _parts(name, inside, given)
    if pieces is None or all(piece.path is None for piece in pieces):
        raise ValueError(_fits_nowhere(name, inside, given))
    return False, pieces


def _parts(name: str, wanted: PyTree, given: PyTree) -> list[_Piece] | None:
    """The wanted state as a whole or, for a chain, part by part; None if something is missing."""
    places = _places(wanted, given)
    if places:
        return [_the_only(name, places)]
    if type(wanted).__module__.startswith("optax_guard."):  # a rule or a bound in the optimizer, which starts afresh
        return [_Piece(None, jax.tree.leaves(wanted))]
    if type(wanted) is not tuple:
        return None
    found = [_parts(name, child, given) for _, child in _children(wanted)]
    return None if None in found else [piece for part in found if part is not None for piece in part]


def _places(wanted: PyTree, node: PyTree, path: tuple[str, ...] = ()) -> list[_Piece]:
    """Every place in `node` that has the wanted structure, shapes and dtypes."""
    leaves = _fitting(wanted, node)
    if leaves is not None:
        return [_Piece("/".join(path) or "(root)", leaves)]
    return [place for key, child in _children(node) for place in _places(wanted, child, (*path, key))]


def _the_only(name: str, places: list[_Piece]) -> _Piece:
    if len(places) > 1:
        paths = ", ".join(f"`{place.path}`" for place in places)
        raise ValueError(
            f"{name}: `inner_state` holds the optimizer's state {len(places)} times, at {paths}: pass the one you mean."
        )
    return places[0]


def _fitting(wanted: PyTree, got: PyTree, shapes: bool = True) -> list[Any] | None:
    """The leaves of `got` in the order of those of `wanted`; None if the states differ."""
    if is_single_leaf(wanted) or is_single_leaf(got):
        fits = is_single_leaf(wanted) and is_single_leaf(got) and (not shapes or _same_array(wanted, got))
        return [got] if fits else None
    kinds = {type(node) for node in (wanted, got) if hasattr(node, "_fields")}
    children, theirs = _children(wanted), dict(_children(got))
    if len(kinds) > 1 or theirs.keys() != {key for key, _ in children}:
        return None
    parts = [_fitting(child, theirs[key], shapes) for key, child in children]
    return None if None in parts else [leaf for part in parts if part is not None for leaf in part]


def _children(node: PyTree) -> list[tuple[str, PyTree]]:
    """One level of a tree, without children that hold no leaf, since a restore may turn them into anything."""
    if is_single_leaf(node):
        return []
    below = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda part: part is not node)
    return [(path_name(path), child) for path, child in below if jax.tree.leaves(child)]


def _is_variable(node: Any) -> bool:
    """Whether it is an nnx Variable, which is a tree around its array."""
    return hasattr(type(node), "get_value") and hasattr(type(node), "set_value") and not is_single_leaf(node)


def _same_array(wanted: Any, got: Any) -> bool:
    if isinstance(got, (bool, int, float)):  # a number that was set by hand or restored as such
        return wanted.shape == ()
    return wanted.shape == np.shape(got) and wanted.dtype == getattr(got, "dtype", None)


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _looked_at(name: str, node: GuardState, params: PyTree) -> GuardState:
    """The guard's state, which tells `reset_moments` if the moments taken over are not finite."""
    bad = nonfinite_moment(without_guards(node.guarded_state), params)
    if bad is None:
        return node
    ladder = node.recovery_state
    if not isinstance(ladder, RecoveryState) or not isinstance(ladder.reset_state, ResetState):
        raise ValueError(
            f"{name}: the optimizer's own state holds {bad[1]}, the first in `{bad[0]}`: restore an earlier "
            "checkpoint, or reset its moments with `guard(..., recovery=(reset_moments(),))`."
        )
    reset = ladder.reset_state._replace(moments_finite=jnp.zeros((), bool))
    return node._replace(recovery_state=ladder._replace(reset_state=reset))


def _fits_nowhere(name: str, wanted: PyTree, given: PyTree) -> str:
    """Describes the difference: a shape if all else fits, otherwise the first path."""
    nodes = [given]
    while nodes:
        node = nodes.pop(0)
        if _fitting(wanted, node, shapes=False) is not None:
            return f"{name}: {_other_shape(wanted, node)}"
        nodes += [child for _, child in _children(node)]
    return f"{name}: `inner_state` is not the state of the optimizer: {_first_difference(given, wanted)}."


def _other_shape(wanted: PyTree, got: PyTree) -> str:
    leaves = _fitting(wanted, got, shapes=False) or []
    pairs = zip(jax.tree_util.tree_leaves_with_path(wanted), leaves, strict=True)
    path, one, leaf = next((path, one, leaf) for (path, one), leaf in pairs if not _same_array(one, leaf))
    return (
        f"leaf `{path_name(path)}` of `inner_state` is {np.asarray(leaf).dtype}{list(np.shape(leaf))}; the optimizer "
        f"in `tx` has {one.dtype}{list(one.shape)} there."
    )


def _fill(node: GuardState, leaves: Any) -> GuardState:
    """A fresh guard state whose inner state is taken from `leaves`, in order."""
    inside = node.guarded_state
    return node._replace(guarded_state=jax.tree.unflatten(jax.tree.structure(inside), _filled(inside, leaves)))


def _filled(fresh: PyTree, leaves: Any) -> list[Any]:
    """The leaves of `fresh`, except that those which are not the guards' own come from `leaves`."""
    result: list[Any] = []
    for node in jax.tree.leaves(fresh, is_leaf=_is_any_guard):
        if _is_guard(node):
            result += jax.tree.leaves(_fill(node, leaves))
        elif _is_bounded(node):
            result += [*_filled(node.optimizer_state, leaves), *jax.tree.leaves(node.bound_state)]
        else:
            result.append(next(leaves))
    return result


def _first_difference(got: PyTree, expected: PyTree) -> str:
    got_paths, expected_paths = (
        [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (got, expected)
    )
    for path in expected_paths:
        if path not in got_paths:
            return f"it lacks leaf `{path}`"
    for path in got_paths:
        if path not in expected_paths:
            return f"it has a leaf `{path}` that the optimizer's does not have"
    return f"it consists of other states ({jax.tree.structure(got)} instead of {jax.tree.structure(expected)})"

"""Adding a guard to a run in flight, and taking it out again: its state around, or without, the optimizer's.

====================================================  ================================================
You have                                              Take
====================================================  ================================================
a checkpoint of an optimizer, want `guard(...)`       `add_guard_state(tx, params, inner_state)`
one of another guard (rules, `recovery`, a preset)    the same
the question which part of it that takes              `find_inner_state(tx, params, inner_state)`
a state of `guard(...)`, want it of the optimizer     `remove_guard_state(state)`
====================================================  ================================================

The optimizer's state is found by its structure: names and kinds of nodes, shapes and dtypes of leaves. What a restore
without a target makes of a state (dicts for named tuples, lists for tuples, NumPy for JAX arrays) counts as the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.state_check import is_single_leaf
from optax_guard._common.tree import as_arrays, field_array, find_states, path_name
from optax_guard._common.typing import PyTree
from optax_guard._guard import GuardState
from optax_guard._step.act import as_transformation
from optax_guard._step.reading import is_traced, nonfinite_leaf, nonfinite_moment
from optax_guard.recovery._ladder import RecoveryState
from optax_guard.recovery._reset import ResetState

__all__ = ["add_guard_state", "find_inner_state", "put_into_guard", "remove_guard_state", "without_guards"]

_GUARD_FIELDS = {"guarded_state", "guard_step", "recorder"}


class _Piece(NamedTuple):
    """A part of what is wanted, and where it was found."""

    path: str | None  # None: not found, and starts anew
    leaves: list[Any]  # in the order of those wanted


def add_guard_state(tx: optax.GradientTransformation, params: PyTree, inner_state: optax.OptState) -> optax.OptState:
    """The state of a guarded transformation around an optimizer state that already exists.

    Guarantees:
      - Every array taken from `inner_state` is in the result as it is: the run goes on bit for bit where it was.
      - What is the guard's own (rules, counters, recorder, ladder) starts anew.
      - Nothing is guessed: two places that fit are an error that lists them, none an error with the first difference.

    ============================================================  =====================================================
    `inner_state` is the state of                                 Taken over
    ============================================================  =====================================================
    the same whole without guards: for `accumulate(guard(adam))`  all of it
    `accumulate(adam)`, for `chain(a, guard(b))` `chain(a, b)`
    the optimizer in the outermost guard                          all of it; what is around the guard starts anew
    `chain(clip, adam)`, `apply_if_finite(adam, 5)`,              that of `adam`
    `MultiSteps(adam, 4)`, `inject_hyperparams(adam)(...)`
    a flat `chain(clip, scale_by_adam(), ...)`                    part by part, each where it is found
    a guard with other rules or `recovery`; a preset with         the optimizer's; the guard's own starts anew
    `max_change` or without
    an `nnx.Optimizer` (its `opt_state`), a whole `TrainState`    the optimizer's, without nnx's Variables
    a restore without a target (dicts, lists, NumPy)              the same as of what was saved
    ============================================================  =====================================================

    On the host it also looks whether `params` hold NaN and the optimizer's moments are finite. Moments that are not are
    accepted if the guard has `reset_moments`, which then starts them anew at the first step.

    Args:
      tx: a transformation with a `guard` in it.
      params: the parameters, as for `tx.init`.
      inner_state: the state to take over, or anything around it.

    Returns:
      A state for `tx`. `find_inner_state` tells which part of `inner_state` it took.

    Raises:
      ValueError: there is no guard in `tx`; `inner_state` is a state of `tx` already, fits nowhere or more than once;
        `params` or moments hold NaN.

    Example:
      >>> import optax_guard as og
      >>> params, adam = jnp.ones(2), optax.adam(0.1)
      >>> updates, old = adam.update(params, adam.init(params))  # a run in flight
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
    bad = nonfinite_leaf(params)
    if bad is not None and bad[1] == "NaN":
        raise ValueError(
            f"{name}: the parameters themselves hold NaN, the first in `{bad[0]}`: restore an earlier checkpoint."
        )
    return jax.tree.map(
        lambda node: _looked_at(name, node, params) if _is_guard(node) else node, state, is_leaf=_is_guard
    )


def find_inner_state(tx: optax.GradientTransformation, params: PyTree, inner_state: optax.OptState) -> tuple[str, ...]:
    """The paths in `inner_state` from which `add_guard_state` takes the optimizer's state.

    One path if it is all in one place, "(root)" if `inner_state` is that place; else one for each part of a chain. An
    optimizer without a state of its own (`optax.sgd(0.1)`) has none.

    Args:
      tx: a transformation with a `guard` in it.
      params: the parameters, as for `tx.init`.
      inner_state: as for `add_guard_state`.

    Returns:
      The paths, joined by "/" as in `leaf_names`, guards left out.

    Raises:
      ValueError: as `add_guard_state`, but for its look at NaN.

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
    """The same state with every guard taken out, for the transformation without them.

    Guarantees:
      - Every array of what the guards wrap is in the result as it is. Of an `nnx.Optimizer` its Variables are copies:
        to write into the optimizer's own take `optax_guard.flax.inner_state(optimizer)`.
      - `remove_guard_state(add_guard_state(tx, params, old))` is `old`, for an `old` that fits the whole of `tx`.

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
      >>> state = remove_guard_state(og.guard(adam).init(jnp.ones(2)))
      >>> jax.tree.structure(state) == jax.tree.structure(adam.init(jnp.ones(2)))
      True
    """
    if not find_states(state, GuardState):
        raise ValueError("inner_state: there is no guard in this state.")
    return without_guards(state)


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


def _is_any_guard(node: Any) -> bool:
    """A guard's state, also as a restore without a target gives it."""
    return _is_guard(node) or (isinstance(node, dict) and node.keys() >= _GUARD_FIELDS)


def without_guards(state: PyTree, keep: type | tuple[()] = ()) -> PyTree:
    """The state with what guards wrap in their place; nodes of the type `keep` stay the same objects."""

    def open_up(node: Any) -> Any:
        if not _is_any_guard(node):
            return node
        return without_guards(node.guarded_state if _is_guard(node) else node["guarded_state"], keep)

    return jax.tree.map(open_up, state, is_leaf=lambda node: isinstance(node, keep) or _is_any_guard(node))


def _pieces(name: str, fresh: PyTree, given: PyTree) -> tuple[bool, list[_Piece]]:
    """What of `given` goes into `fresh`: into the whole of it, or into its outermost guard alone."""
    if not find_states(fresh, GuardState):
        raise ValueError(f"{name}: there is no guard in `tx`; wrap the optimizer in `guard` first.")
    given = jax.tree.map(lambda x: field_array(x) if _is_variable(x) else x, given, is_leaf=_is_variable)
    if jax.tree.structure(given) == jax.tree.structure(fresh):
        raise ValueError(
            f"{name}: `inner_state` already holds a guard, this `tx`'s: go on with it, or take the guard out with "
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
                "begin with `tx.init(params)`."
            )
        return False, []
    pieces = _parts(name, inside, given)
    if pieces is None or all(piece.path is None for piece in pieces):
        raise ValueError(_fits_nowhere(name, inside, given))
    return False, pieces


def _parts(name: str, wanted: PyTree, given: PyTree) -> list[_Piece] | None:
    """What is wanted as a whole, else (of a chain) part by part; None if something is missing."""
    places = _places(wanted, given)
    if places:
        return [_the_only(name, places)]
    if type(wanted).__module__.startswith("optax_guard."):  # a rule or a bound in the optimizer: starts anew
        return [_Piece(None, jax.tree.leaves(wanted))]
    if type(wanted) is not tuple:
        return None
    found = [_parts(name, child, given) for _, child in _children(wanted)]
    return None if None in found else [piece for part in found if part is not None for piece in part]


def _places(wanted: PyTree, node: PyTree, path: tuple[str, ...] = ()) -> list[_Piece]:
    """Every place in `node` that has the structure, shapes and dtypes of what is wanted."""
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
    """The leaves of `got` in the order of those of `wanted`; None if it is another state."""
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
    """One level of a tree; what holds no leaf does not count, since a restore may turn it into anything."""
    if is_single_leaf(node):
        return []
    below = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda part: part is not node)
    return [(path_name(path), child) for path, child in below if jax.tree.leaves(child)]


def _is_variable(node: Any) -> bool:
    """One of nnx's, which is a tree around its array."""
    return hasattr(type(node), "get_value") and hasattr(type(node), "set_value") and not is_single_leaf(node)


def _same_array(wanted: Any, got: Any) -> bool:
    if isinstance(got, (bool, int, float)):  # a number set by hand, or restored as one
        return wanted.shape == ()
    return wanted.shape == np.shape(got) and wanted.dtype == getattr(got, "dtype", None)


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _looked_at(name: str, node: GuardState, params: PyTree) -> GuardState:
    """The guard's state, with word to `reset_moments` if the moments that came along are not finite."""
    bad = nonfinite_moment(without_guards(node.guarded_state), params)
    if bad is None:
        return node
    ladder = node.recovery_state
    if not isinstance(ladder, RecoveryState) or not isinstance(ladder.reset_state, ResetState):
        raise ValueError(
            f"{name}: the optimizer's own state holds {bad[1]}, the first in `{bad[0]}`: restore an earlier "
            "checkpoint, or start its moments anew with `guard(..., recovery=(reset_moments(),))`."
        )
    reset = ladder.reset_state._replace(moments_finite=jnp.zeros((), bool))
    return node._replace(recovery_state=ladder._replace(reset_state=reset))


def _fits_nowhere(name: str, wanted: PyTree, given: PyTree) -> str:
    """Says what differs: a shape where all else fits, else the first path."""
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
    """A fresh guard state with what is inside taken from `leaves`, in order."""
    inside = node.guarded_state
    return node._replace(guarded_state=jax.tree.unflatten(jax.tree.structure(inside), _filled(inside, leaves)))


def _filled(fresh: PyTree, leaves: Any) -> list[Any]:
    """The leaves of `fresh`, those outside of the guards' own from `leaves`."""
    result: list[Any] = []
    for node in jax.tree.leaves(fresh, is_leaf=_is_guard):
        result += jax.tree.leaves(_fill(node, leaves)) if _is_guard(node) else [next(leaves)]
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
            return f"it has a leaf `{path}` that the optimizer's has not"
    return f"it is made of other states ({jax.tree.structure(got)} for {jax.tree.structure(expected)})"

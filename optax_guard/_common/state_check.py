"""Checks that a state belongs to a transformation, once for each structure and before it is used.

A state may come from a checkpoint of the bare optimizer, of a guard with other rules or of other parameters, or may
have been restored without a target (lists and dicts for tuples and named tuples). The error says what differs and how
to fix it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common.tree import is_gradient, path_name
from optax_guard._common.typing import PyTree

__all__ = ["are_alike", "is_single_leaf", "state_check"]

_Shapes = tuple[tuple[int, ...], ...]
_NO_ARRAYS = (jax.ShapeDtypeStruct, np.ma.MaskedArray, str, bytes)  # which JAX would refuse in words of its own


def state_check(function: str, init: Callable[[PyTree], Any], *, whole: bool = True) -> Callable[..., None]:
    """Makes a check (state, params or None, gradients) that raises a ValueError unless `init` makes such states.

    It compares structure and shapes with those of `init`, which is traced once for each structure and cached, so a step
    outside `jit` pays only microseconds. With `whole=False`, an inner optimizer may change the structure of its state,
    as `optax.monitor` does, and only the shapes of the arrays in both are compared.
    """

    def check(state: Any, params: PyTree | None, gradients: PyTree) -> None:
        like = gradients if params is None else params
        leaves, structure = jax.tree.flatten(like, is_leaf=(lambda leaf: leaf is None) if params is None else None)
        if params is None and not all(is_gradient(leaf) for leaf in leaves):
            return  # gradients with holes do not show the structure of the parameters
        state_leaves, state_tree = jax.tree.flatten(state)
        if any(isinstance(leaf, _NO_ARRAYS) for leaf in state_leaves):
            raise ValueError(f"{function}: `state` is not a state of this transformation: {_what_is_no_array(state)}")
        state_shapes = tuple(np.shape(leaf) for leaf in state_leaves)
        types = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        # A gradient of another shape is not a fault of the state, and is reported where gradients are checked.
        found = _difference(init, whole, params is not None, state_tree, state_shapes, structure, types)
        if found is not None:
            raise ValueError(f"{function}: `state` is not a state of this transformation: {found}")

    return check


def _what_is_no_array(state: PyTree) -> str:
    path, leaf = next(
        (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if isinstance(leaf, _NO_ARRAYS)
    )
    return (
        f"`{path_name(path)}` is not an array but a {type(leaf).__name__}. Restore a checkpoint into the structure of "
        "`tx.init(params)`."
    )


@functools.lru_cache(maxsize=64)
def _difference(
    init: Callable[[PyTree], Any],
    whole: bool,
    shapes: bool,
    state_tree: Any,
    state_shapes: _Shapes,
    params_tree: Any,
    params_types: tuple[Any, ...],
) -> str | None:
    params = jax.tree.unflatten(params_tree, [jax.ShapeDtypeStruct(*each) for each in params_types])
    state = jax.tree.unflatten(state_tree, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in state_shapes])
    try:
        wanted = jax.eval_shape(init, params)
    except jax.errors.JAXTypeError:  # an optimizer whose `init` reads values: nothing to compare with
        return None
    if not jax.tree.leaves(state) and not jax.tree.leaves(wanted):
        return None  # a state without arrays may be left out: `optax.clip(1.0).update(grads, None)`
    wanted_shapes = tuple(leaf.shape for leaf in jax.tree.leaves(wanted))
    if state_tree == jax.tree.structure(wanted) and state_shapes == wanted_shapes:
        return None  # nearly always; the walk below looks for the name of what differs
    if not whole:
        found = _other_shape(state, wanted, shapes) if type(state) is type(wanted) else _kinds("it", state, wanted)
    else:
        found = _first_difference(state, wanted, (), shapes)
    return None if found is None else found + _cure(state, wanted)


def _first_difference(got: PyTree, wanted: PyTree, path: tuple[Any, ...], shapes: bool) -> str | None:
    """The first difference from the top down; None if there is none."""
    name = f"`{path_name(path)}`" if path else "it"
    leaves = is_single_leaf(got), is_single_leaf(wanted)
    if all(leaves) and any(getattr(key, "name", None) == "recorder" for key in path[:-1]):
        return _other_columns(name, got.shape, wanted.shape)
    if all(leaves):
        return None if not shapes or got.shape == wanted.shape else _shapes_of(name, got, wanted)
    if any(leaves) or type(got) is not type(wanted):
        return _kinds(name, got, wanted)
    if not shapes and not isinstance(wanted, tuple):
        return None  # follows the parameters, which are unknown from gradients alone
    children, others = _children(got), _children(wanted)
    if len(path) > 0 and getattr(path[-1], "name", None) == "rule_states" and len(children) != len(others):
        return f"it has the states of {len(children)} rules, here there are {len(others)}"
    for key in [*others, *children]:
        below = path_name((*path, key))
        if key not in children:
            return f"it lacks `{below}`"
        if key not in others:
            return f"it has `{below}`, which does not exist here"
        found = _first_difference(children[key], others[key], (*path, key), shapes)
        if found is not None:
            return found
    if shapes and jax.tree.structure(got) != jax.tree.structure(wanted):
        return f"{name} has the structure {jax.tree.structure(got)}, here {jax.tree.structure(wanted)}"
    return None


def _other_shape(got: PyTree, wanted: PyTree, shapes: bool) -> str | None:
    """The first array whose shape differs between the two."""
    arrays = dict(jax.tree_util.tree_leaves_with_path(got)) if shapes else {}
    for path, array in jax.tree_util.tree_leaves_with_path(wanted):
        if path in arrays and arrays[path].shape != array.shape:
            return _shapes_of(f"`{path_name(path)}`", arrays[path], array)
    return None


def _other_columns(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """A flight recorder of another length can still be read and written, but not one of other columns."""
    if len(got) == 2 and got[1:] == wanted[1:]:
        return None
    return f"{name} has the shape {got}, here (rows, {wanted[1]}), so another version of optax_guard saved it"


def _shapes_of(name: str, got: Any, wanted: Any) -> str:
    return f"{name} has the shape {got.shape}, here {wanted.shape}, so it belongs to other parameters"


def _kinds(name: str, got: Any, wanted: Any) -> str:
    if name == "`recovery_state`":
        return f"it comes from a guard {'without' if got == () else 'with'} `recovery`, and this one is " + (
            "without" if wanted == () else "with"
        )
    return f"{name} is {_kind(got)}, here {_kind(wanted)}"


def _kind(node: Any) -> str:
    if is_single_leaf(node):
        return "an array"
    name = type(node).__name__
    return "None" if node is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _cure(got: PyTree, wanted: PyTree) -> str:
    guarded, wants = _holds_guard(got), _holds_guard(wanted)
    if wants and guarded:
        return (
            ". `add_guard_state(tx, params, state)` moves the optimizer's state into a fresh guard; "
            "`remove_guard_state(state)` returns it without a guard."
        )
    if wants:
        return ". There is no guard in it: `add_guard_state(tx, params, state)` puts the optimizer's state into one."
    if guarded:
        return ". There is a guard in it: `remove_guard_state(state)` returns the optimizer's state without it."
    return ". Restore a checkpoint into the structure of `tx.init(params)`."


def _holds_guard(tree: PyTree) -> bool:
    found: list[Any] = []
    jax.tree.leaves(tree, is_leaf=lambda node: bool(hasattr(node, "guarded_state") and found.append(node)))
    return bool(found)


def _children(node: PyTree) -> dict[Any, PyTree]:
    """The children of a node by their keys."""
    below = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)[0]
    return {path[0]: child for path, child in below}


def are_alike(state: PyTree, other: PyTree) -> bool:
    """Whether two states are states of one transformation, for the same parameters."""
    state, other = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32), tree) for tree in (state, other)
    )
    return _first_difference(state, other, (), shapes=True) is None


def is_single_leaf(node: Any) -> bool:
    """Whether a tree is a single array (or another leaf of JAX)."""
    structure = jax.tree.structure(node)
    return structure.num_leaves == 1 and jax.tree_util.treedef_is_leaf(structure)

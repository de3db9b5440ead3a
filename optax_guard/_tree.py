"""Walking a parameter tree: which leaves carry a gradient, what they are called, and whether two trees agree.

A *position* is an array leaf or a `None`. `None` counts, so that a tree whose gradient is `None` somewhere (a frozen
leaf, the static part of an Equinox module) has the same positions as its parameters. `optax.MaskedNode` has no leaves
and so no position, on both sides.
"""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._typing import Mask, PyTree

__all__ = [
    "cast_like",
    "check_arrays",
    "check_has_params",
    "check_same_structure",
    "check_with_params",
    "find_states",
    "is_gradient",
    "leaf_names",
    "map_gradients",
    "path_name",
    "positions",
    "resolve_mask",
    "small_leaves_together",
    "unwrapped",
    "varying_axes",
    "wider_dtype",
]


# Leaves of one kind up to this size are worked on 32 at a time: a leaf of its own costs compilation, about 1.5 ms for a
# sum of squares and 50 for a normal.
_SMALL_LEAF = 8192
_STACK = 32


def _is_none(leaf: Any) -> bool:
    return leaf is None


def positions(tree: PyTree) -> list[Any]:
    """The leaves of `tree` in JAX's order, `None` included."""
    return jax.tree.leaves(tree, is_leaf=_is_none)


def small_leaves_together(leaves: list[Any]) -> list[list[int]]:
    """The positions that carry a gradient, in groups that can be stacked: small leaves alike, or a single leaf."""
    kinds: dict[object, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if is_gradient(leaf) and leaf.size > 0:
            # The type holds shape, dtype, sharding and varying axes: only leaves alike in all can be stacked for free.
            kinds.setdefault(jax.typeof(leaf) if leaf.size <= _SMALL_LEAF else i, []).append(i)
    return [kind[start : start + _STACK] for kind in kinds.values() for start in range(0, len(kind), _STACK)]


def path_name(path: tuple[Any, ...]) -> str:
    """'decoder/layer_3/kernel' for a key path; '(root)' for a tree that is a single array."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def leaf_names(params: PyTree) -> list[str]:
    """The path of every leaf, in the order that `worst_leaf` and per-leaf statistics count in.

    >>> leaf_names({"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}})
    ['dense/bias', 'dense/kernel']

    Args:
      params: the parameters, or anything with their structure (gradients, `jax.ShapeDtypeStruct`s).

    Returns:
      One string per position; a `None` in the tree has one too.
    """
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_none)]


def is_gradient(leaf: Any) -> bool:
    """Whether a leaf is a real or complex floating-point array: integers, `float0`, keys and `None` are not."""
    return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.inexact)


def wider_dtype(one: Any, other: Any) -> jnp.dtype:
    """The dtype that holds both, also where users run with strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def map_gradients(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the floating-point leaves of `tree`; every other leaf is returned as it is."""
    return jax.tree.map(
        lambda leaf, *others: function(leaf, *others) if is_gradient(leaf) else leaf, tree, *rest, is_leaf=_is_none
    )


def check_arrays(function: str, tree: PyTree) -> None:
    """Raises a ValueError with the path of the first leaf that is not an array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                f"{function}: leaf `{path_name(path)}` is not an array but {type(leaf).__name__} ({leaf!r}). "
                "Filter the tree first (for instance `eqx.filter(model, eqx.is_inexact_array)`)."
            )


def check_same_structure(function: str, got_name: str, got: PyTree, expected_name: str, expected: PyTree) -> None:
    """Raises a ValueError with the first path in which two trees differ; `None` in `got` stands for any subtree."""
    if jax.tree.structure(got) == jax.tree.structure(expected):
        return
    got_leaves = dict(jax.tree_util.tree_leaves_with_path(got, is_leaf=_is_none))
    holes = [path for path, leaf in got_leaves.items() if leaf is None]
    known = {path for path, _ in jax.tree_util.tree_leaves_with_path(expected, is_leaf=_is_none)}
    for path, _ in jax.tree_util.tree_leaves_with_path(expected):
        if path not in got_leaves and not any(path[: len(hole)] == hole for hole in holes):
            raise ValueError(f"{function}: `{got_name}` lacks leaf `{path_name(path)}` that `{expected_name}` has.")
    for path, leaf in got_leaves.items():
        if path not in known and leaf is not None:
            raise ValueError(
                f"{function}: `{got_name}` has leaf `{path_name(path)}` that is not a leaf of `{expected_name}`."
            )


def check_has_params(function: str, params: PyTree | None, option: str = "") -> None:
    """Raises a ValueError that names who needs the parameters, and the option for which."""
    if params is None:
        raise ValueError(
            f"{function}: {option and option + ' '}needs the parameters: call `update(updates, state, params)`. A "
            "library that calls it without them can only take what needs none (docs/sharp_edges.md)."
        )


def check_with_params(function: str, updates: PyTree, params: PyTree | None) -> None:
    """What every `update` that needs the parameters asks first."""
    check_has_params(function, params)
    check_arrays(function, updates)
    check_same_structure(function, "updates", updates, "params", params)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts each array to the dtype of its counterpart: a state must leave a step with the dtypes it entered with."""
    return jax.tree.map(
        lambda new, old: new.astype(old.dtype) if hasattr(old, "dtype") and new.dtype != old.dtype else new, tree, like
    )


def resolve_mask(function: str, mask: Mask, params: PyTree) -> PyTree:
    """A tree of Python bools in the structure of `params`, from a path pattern, a prefix tree or a function."""
    if isinstance(mask, str):
        return _matching(function, mask, params)
    booleans = mask(params) if callable(mask) else mask
    for path, leaf in jax.tree_util.tree_leaves_with_path(booleans):
        if not isinstance(leaf, (bool, np.bool_)):
            raise ValueError(f"{function}: `mask` must hold True or False; at `{path_name(path)}` it holds {leaf!r}.")
    try:
        return jax.tree.map(lambda chosen, part: jax.tree.map(lambda _: bool(chosen), part), booleans, params)
    except (ValueError, TypeError) as error:
        check_same_structure(function, "mask", booleans, "params", params)
        raise ValueError(f"{function}: `mask` does not match the structure of the parameters: {error}") from error


def _matching(function: str, pattern: str, params: PyTree) -> PyTree:
    chosen = jax.tree_util.tree_map_with_path(lambda path, _: fnmatch.fnmatchcase(path_name(path), pattern), params)
    if jax.tree.leaves(params) and not any(jax.tree.leaves(chosen)):
        raise ValueError(f"{function}: `mask` {pattern!r} matches no leaf; the leaves are {leaf_names(params)}.")
    return chosen


def find_states(state: PyTree, kind: type) -> list[Any]:
    """Every state of a kind, outer before inner, in any nesting (chains, dicts, `nnx.Optimizer`'s wrapped leaves)."""
    found: list[Any] = []

    def look(node: Any) -> bool:
        if isinstance(node, kind):
            found.append(node)
        return False

    jax.tree.leaves(state, is_leaf=look)
    return found


def unwrapped(field: Any) -> jax.Array:
    """The array in a state's field; flax.nnx wraps each in a Variable, which is a tree of one leaf."""
    return jax.tree.leaves(field)[0]


def varying_axes(x: Any) -> frozenset[Any]:
    """The axes of a `shard_map` between whose devices an array is typed as differing."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.10; `vma` before
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying

"""Walks a parameter tree: which leaves carry a gradient, what they are called, and whether two trees agree.

A *position* is an array leaf or a `None`. `None` counts, so that a gradient that is `None` somewhere (a frozen leaf or
the static part of an Equinox module) has the same positions as the parameters. `optax.MaskedNode` has no leaves and
hence no position in either tree.
"""

import collections
import contextlib
import fnmatch
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._common.typing import Mask, PyTree

__all__ = [
    "as_arrays",
    "as_params",
    "cast_like",
    "check_has_params",
    "check_leaf_count",
    "check_same_shapes",
    "check_same_structure",
    "checked",
    "checked_with_params",
    "count_true",
    "difference",
    "difference_of_shapes",
    "field_array",
    "find_states",
    "is_function",
    "is_gradient",
    "is_like",
    "is_per_example",
    "large_as_inf",
    "leaf_names",
    "leaves_with_none",
    "map_gradients",
    "path_hash",
    "path_name",
    "resolve_mask",
    "small_leaves_together",
    "variable_free",
    "variable_free_names",
    "varying_axes",
    "wider_dtype",
]


# Leaves of one kind up to this size are processed 32 at a time, since each separate leaf costs compilation: about
# 1.5 ms for a sum of squares and 50 ms for a normal.
_SMALL_LEAF = 8192
_STACK = 32

_COUNTABLE = 2**31  # elements that an int32 can count
_NUMBERS = (bool, int, float, complex)
_ONE_PER_EXAMPLE = (
    " It looks like one gradient per example: take their mean, or aggregate them before the guard: "
    "optax.chain(optax.contrib.differentially_private_aggregate(...), guard(optimizer))."
)
_INSIDE_LOOKAHEAD = (
    "{function}: the parameters are a pair of `optax.lookahead`, but the gradients are not. Put `{function}` inside: "
    "optax.lookahead({function}(optimizer), ...); `apply_gradients` accepts that."
)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def leaves_with_none(tree: PyTree) -> list[Any]:
    """The leaves of `tree` in JAX's order, including `None`."""
    return jax.tree.leaves(tree, is_leaf=_is_none)


def small_leaves_together(leaves: list[Any]) -> list[list[int]]:
    """The positions that carry a gradient, in groups that can be stacked: small equal leaves, or a single leaf."""
    kinds: dict[object, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if is_gradient(leaf) and leaf.size > 0:
            # The type holds shape, dtype, sharding and varying axes: only leaves equal in all can be stacked for free.
            kinds.setdefault(jax.typeof(leaf) if leaf.size <= _SMALL_LEAF else i, []).append(i)
    return [kind[start : start + _STACK] for kind in kinds.values() for start in range(0, len(kind), _STACK)]


def path_name(path: tuple[Any, ...]) -> str:
    """'decoder/layer_3/kernel' for a key path; '(root)' for a tree that is a single array."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def leaf_names(params: PyTree) -> list[str]:
    """Returns the path of every leaf, in the order used by `worst_leaf` and the statistics of leaves.

    >>> leaf_names({"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}})
    ['dense/bias', 'dense/kernel']

    Args:
      params: the parameters, or any tree with their structure (gradients, `jax.ShapeDtypeStruct`s).

    Returns:
      One string per position, all of them different; a `None` in the tree has one too. If two paths would read the
      same, as in {"a/b": x, "a": {"b": y}}, both are written with brackets: "['a/b']" and "['a']['b']".
    """
    return _different([path for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_none)])


def _different(paths: list[tuple[Any, ...]]) -> list[str]:
    """A name for each path, no two alike."""
    names = [path_name(path) for path in paths]
    often = collections.Counter(names)
    return [name if often[name] == 1 else jax.tree_util.keystr(path) for name, path in zip(names, paths, strict=True)]


def variable_free(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the key that an nnx Variable adds: a state may be initialised with Variables or without."""
    wraps = len(path) > 1 and getattr(path[-1], "name", None) == "value"
    return path[:-1] if wraps else path


def path_hash(name: str) -> int:
    """The CRC-32 of a path, which a state can hold: a checkpoint keeps no names."""
    return zlib.crc32(name.encode())


def variable_free_names(params: PyTree) -> list[str]:
    """`leaf_names`, which are the same for nnx Variables and for the arrays in them."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_none)]
    return _different([variable_free(path) for path in paths])


def is_gradient(leaf: Any) -> bool:
    """Whether a leaf is a real or complex floating-point array, which integers, `float0`, keys and `None` are not."""
    return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.inexact)


def wider_dtype(one: Any, other: Any) -> jnp.dtype:
    """The dtype that holds both, even under strict promotion, and for float8, which is never promoted."""
    one, other = (jnp.dtype(dtype) for dtype in (one, other))
    if one == other:
        return one
    # bfloat16 holds every number of every 8-bit and 4-bit format.
    one, other = (jnp.dtype(jnp.bfloat16) if _is_tiny(dtype) else dtype for dtype in (one, other))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def _is_tiny(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1


def count_true(flags: jax.Array) -> jax.Array:
    """The number of True elements: i32[], or a rounded f32[] from 2^31 elements on, where i32 could overflow."""
    if flags.size < _COUNTABLE:
        return jnp.sum(flags, dtype=jnp.int32)
    axis = int(np.argmax(flags.shape))
    middle, end = flags.shape[axis] // 2, flags.shape[axis]
    halves = (lax.slice_in_dim(flags, *ends, axis=axis) for ends in ((0, middle), (middle, end)))
    return sum((count_true(half).astype(jnp.float32) for half in halves), jnp.zeros((), jnp.float32))


def is_function(given: Any) -> bool:
    """Whether it is a function and not a tree, by Optax's rule: all leaves are callable (Equinox modules are trees)."""
    leaves = jax.tree.leaves(given)
    return bool(leaves) and all(callable(leaf) and not isinstance(leaf, type) for leaf in leaves)


def map_gradients(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the floating-point leaves of `tree`; all other leaves are returned unchanged."""
    return jax.tree.map(
        lambda leaf, *others: function(leaf, *others) if is_gradient(leaf) else leaf, tree, *rest, is_leaf=_is_none
    )


def as_arrays(function: str, tree: PyTree) -> PyTree:
    """The tree with Python numbers as 0-d arrays; a ValueError names the first leaf that is not an array."""
    leaves = jax.tree.leaves(tree)
    if all(_is_array(leaf) and _is_canonical(leaf) for leaf in leaves):
        return tree
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, _NUMBERS) and not _is_array(leaf):
            raise ValueError(
                f"{function}: leaf `{path_name(path)}` is not an array but {type(leaf).__name__} ({leaf!r}). "
                "Filter the tree first (for instance `eqx.filter(model, eqx.is_inexact_array)`)."
            )
        if isinstance(leaf, int) and abs(leaf) >= 2**63:
            raise ValueError(f"{function}: leaf `{path_name(path)}` is {leaf}, which is too large for an array.")
    # Through NumPy, since `jnp.asarray(1.0)` would be weakly typed, and a state must keep its types.
    with large_as_inf():
        return jax.tree.map(lambda leaf: leaf if _is_canonical(leaf) else jnp.asarray(np.asarray(leaf)), tree)


def large_as_inf() -> contextlib.AbstractContextManager:
    """Lets a Python number such as 1e300 become Inf in float32 without a warning from NumPy."""
    return np.errstate(over="ignore")


def _is_array(leaf: Any) -> bool:
    """Whether it is an array of a type that JAX knows, unlike NumPy's objects, strings, dates and masked arrays."""
    if isinstance(leaf, np.ma.MaskedArray):
        return False
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and getattr(leaf.dtype, "kind", "V") not in "OUSmM"


def _is_canonical(leaf: Any) -> bool:
    """Whether JAX need not convert it, unlike a Python number, or a NumPy float64 without x64."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype == jax.dtypes.float0 or leaf.dtype == jax.dtypes.canonicalize_dtype(leaf.dtype)
    return not isinstance(leaf, _NUMBERS)


def check_has_params(function: str, params: PyTree | None, option: str = "") -> None:
    """Raises a ValueError that names the function, and the option, that need the parameters."""
    if params is None:
        raise ValueError(
            f"{function}: {option and option + ' '}needs the parameters: call `update(updates, state, params)`. A "
            "library that calls it without them can only use transformations that need none (docs/sharp_edges.md)."
        )


def as_params(function: str, params: PyTree) -> PyTree:
    """The parameters for the `init` of a wrapper: arrays in the structure that the gradients will have."""
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(_INSIDE_LOOKAHEAD.format(function=function))
    return as_arrays(function, params)


def checked(function: str, updates: PyTree, params: PyTree | None, called: str = "updates") -> tuple[PyTree, PyTree]:
    """Returns (updates, params) as arrays, or raises a ValueError that names the first leaf in which they differ.

    Structure and shapes are compared, since a gradient of shape (1, 3) would silently be broadcast to (4, 3). Without
    parameters nothing is compared.
    """
    updates = as_arrays(function, updates)
    if params is None:
        return updates, None
    arrays = as_arrays(function, params)
    pair = isinstance(arrays, optax.LookaheadParams) and not isinstance(updates, optax.LookaheadParams)
    check_same_shapes(function, called, updates, "params", arrays.fast if pair else arrays)
    return updates, arrays


def checked_with_params(function: str, updates: PyTree, params: PyTree | None) -> tuple[PyTree, PyTree]:
    """Like `checked`, for an `update` that needs the parameters."""
    check_has_params(function, params)
    if isinstance(params, optax.LookaheadParams) and not isinstance(updates, optax.LookaheadParams):
        raise ValueError(_INSIDE_LOOKAHEAD.format(function=function))
    return checked(function, updates, params)


def is_per_example(updates: PyTree, params: PyTree) -> bool:
    """Whether every leaf of `updates` has the shape of its parameter after one further axis, the same for all."""
    leaves, structure = jax.tree.flatten(updates)
    other_leaves, other_structure = jax.tree.flatten(params)
    shapes, others = [np.shape(leaf) for leaf in leaves], [np.shape(leaf) for leaf in other_leaves]
    return (
        structure == other_structure
        and [shape[1:] for shape in shapes] == others
        and len({shape[:1] for shape in shapes}) == 1
        and all(shapes)
    )


def check_same_shapes(function: str, got_name: str, got: PyTree, expected_name: str, expected: PyTree) -> None:
    """Raises a ValueError with the first path at which two trees of arrays differ, in structure or in shape."""
    found = difference_of_shapes(got_name, got, expected_name, expected)
    if found is not None:
        raise ValueError(f"{function}: {found}")


def difference_of_shapes(got_name: str, got: PyTree, expected_name: str, expected: PyTree) -> str | None:
    """Describes where two trees of arrays first differ, in structure or in shape; None if they agree.

    A `None` in `got` stands for any subtree, but not for the whole: a function that forgot to return gives that.
    """
    leaves, structure = jax.tree.flatten(got)
    other_leaves, other_structure = jax.tree.flatten(expected)
    if got is None and other_leaves:
        return f"`{got_name}` is None, but `{expected_name}` is {_described(expected)}."
    if structure == other_structure and all(map(_same_shape, leaves, other_leaves)):
        return None
    return difference(got_name, got, expected_name, expected, shapes=True)


def check_same_structure(
    function: str, got_name: str, got: PyTree, expected_name: str, expected: PyTree, *, prefix: bool = False
) -> None:
    """Raises a ValueError with the first path at which two trees differ; with `prefix`, `got` may end in leaves."""
    found = difference(got_name, got, expected_name, expected, prefix=prefix)
    if found is not None:
        raise ValueError(f"{function}: {found}")


def difference(
    got_name: str,
    got: PyTree,
    expected_name: str,
    expected: PyTree,
    *,
    shapes: bool = False,
    prefix: bool = False,
    holes: tuple[type, ...] = (type(None),),
    path: tuple[Any, ...] = (),
) -> str | None:
    """Describes where two trees first differ; None if they agree.

    A node of a type in `holes` stands for any subtree; with `prefix`, so does a leaf of `got`.
    """
    if isinstance(got, holes):
        return None
    here = path_name(path)
    parts, kind = _one_level(got)
    other_parts, other_kind = _one_level(expected)
    got_is_leaf, expected_is_leaf = () in parts, () in other_parts
    if got_is_leaf and expected_is_leaf:
        if not shapes or _same_shape(got, expected):
            return None
        per_example = np.shape(got)[1:] == np.shape(expected)
        advice = _ONE_PER_EXAMPLE if per_example else ""
        return (
            f"leaf `{here}` of `{got_name}` has shape {np.shape(got)}, but in `{expected_name}` it has "
            f"{np.shape(expected)}.{advice}"
        )
    if prefix and got_is_leaf:
        return None
    same_kind = type(got) is type(expected) and not got_is_leaf
    if same_kind or (isinstance(got, dict) and isinstance(expected, dict)):
        for key in other_parts:
            if key not in parts:
                return f"`{got_name}` lacks leaf `{_first_leaf(path + key, expected)}` that `{expected_name}` has."
        for key in parts:
            if key not in other_parts:
                return (
                    f"`{got_name}` has leaf `{_first_leaf(path + key, got)}` that is not a leaf of `{expected_name}`."
                )
    if kind != other_kind:
        if same_kind:
            return (
                f"at `{here}` the two {type(got).__name__} of `{got_name}` and `{expected_name}` differ in static data."
            )
        return f"at `{here}`, `{got_name}` is {_described(got)}, but `{expected_name}` is {_described(expected)}."
    for key, part in parts.items():
        found = difference(
            got_name,
            part,
            expected_name,
            other_parts[key],
            shapes=shapes,
            prefix=prefix,
            holes=holes,
            path=path + key,
        )
        if found is not None:
            return found
    return None


def _one_level(tree: PyTree) -> tuple[dict[tuple[Any, ...], Any], Any]:
    """The children of a node by their key, and the kind of the node; a leaf is its own child, under ()."""
    children, kind = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return dict(children), kind


def _same_shape(one: Any, other: Any) -> bool:
    """Whether two shapes agree; that of `float0`, the gradient of an integer, does not matter."""
    return np.shape(one) == np.shape(other) or getattr(one, "dtype", None) == jax.dtypes.float0


def _first_leaf(path: tuple[Any, ...], tree: PyTree) -> str:
    """The path of the first leaf at or below a child of `tree`."""
    below = [
        path[:-1] + sub
        for sub, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)
        if sub[:1] == path[-1:]
    ]
    return path_name(below[0] if below else path)


def _described(node: Any) -> str:
    if node is None:
        return "None"
    parts, _ = _one_level(node)
    if () in parts:
        return f"an array of shape {np.shape(node)}" if hasattr(node, "shape") else f"a {type(node).__name__}"
    return f"a {type(node).__name__} of {len(parts)}"


def is_like(node: Any, params: PyTree) -> bool:
    """Whether a part of a state is a tree with the structure of the parameters, with or without masked parts.

    This distinguishes moments from states even if the parameters are NamedTuples of a state's own type, since a state
    that holds such a tree is larger.
    """
    return difference("", node, "", params, holes=(type(None), optax.MaskedNode)) is None


def check_leaf_count(function: str, at_init: int, now: int) -> None:
    """For a state with one number per leaf, raises unless the gradient has as many leaves as the parameters had."""
    if at_init != now:
        raise ValueError(f"{function}: it was initialised for {at_init} leaves; the gradient has {now}.")


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts each array to the dtype of its counterpart, since a state must keep its dtypes in a step."""
    return jax.tree.map(
        lambda new, old: new.astype(old.dtype) if hasattr(old, "dtype") and new.dtype != old.dtype else new, tree, like
    )


def resolve_mask(function: str, mask: Mask, params: PyTree) -> PyTree:
    """A tree of Python bools in the structure of `params`, from a path pattern, a prefix tree or a function."""
    if isinstance(mask, str):
        return _matching(function, mask, params)
    booleans = mask(params) if is_function(mask) else mask
    for path, leaf in jax.tree_util.tree_leaves_with_path(booleans):
        if not isinstance(leaf, (bool, np.bool_)):
            raise ValueError(f"{function}: `mask` must hold True or False; at `{path_name(path)}` it holds {leaf!r}.")
    try:
        return jax.tree.map(lambda chosen, part: jax.tree.map(lambda _: bool(chosen), part), booleans, params)
    except (ValueError, TypeError) as error:
        check_same_structure(function, "mask", booleans, "params", params, prefix=True)
        raise ValueError(f"{function}: `mask` does not match the structure of the parameters: {error}") from error


def _matching(function: str, pattern: str, params: PyTree) -> PyTree:
    chosen = jax.tree_util.tree_map_with_path(lambda path, _: fnmatch.fnmatchcase(path_name(path), pattern), params)
    if jax.tree.leaves(params) and not any(jax.tree.leaves(chosen)):
        raise ValueError(f"{function}: `mask` {pattern!r} matches no leaf; the leaves are {leaf_names(params)}.")
    return chosen


def find_states(state: PyTree, kind: type | tuple[type, ...], params: PyTree = None) -> list[Any]:
    """Every state of a type, outer before inner, in any nesting (chains, dicts, `nnx.Optimizer`'s wrapped leaves).

    With `params`, trees with their structure are not searched, since they may consist of NamedTuples of any type.
    """
    found: list[Any] = []

    def look(node: Any) -> bool:
        if params is not None and is_like(node, params):
            return True
        if isinstance(node, kind):
            found.append(node)
        return False

    jax.tree.leaves(state, is_leaf=look)
    return found


def field_array(field: Any) -> jax.Array:
    """The array in a state's field; flax.nnx wraps each array in a Variable, which is a tree of one leaf.

    A number, as of a state that was read from text, becomes an array.
    """
    leaf = jax.tree.leaves(field)[0]
    return jnp.asarray(leaf) if isinstance(leaf, _NUMBERS) else leaf


def varying_axes(x: Any) -> frozenset[Any]:
    """The axes of a `shard_map` along which an array's type says that it differs."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.10; `vma` before
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying

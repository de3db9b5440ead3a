"""Shared by the readers of a state: which leaves a guard saw, how many runs it covers, and whether numbers are bad.

A state may cover one run or many at once (`jax.vmap` over seeds, `jax.pmap`). With many, every leaf has leading axes,
including the scalar field by which a reader recognises this.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_guard._common import tree as _tree
from optax_guard._common.tree import field_array, find_states, is_gradient, path_hash, path_name, variable_free
from optax_guard._common.typing import PyTree
from optax_guard._step.moments import moments

__all__ = [
    "SeenLeaves",
    "axes_in_front",
    "batches",
    "check_on_host",
    "is_traced",
    "leaf_names",
    "member",
    "members",
    "nonfinite_leaf",
    "nonfinite_moment",
    "saw_leaves",
    "seen_names",
    "what_was_seen",
    "where",
]


_TAGS = 4  # the most batches that one message lists


class SeenLeaves(NamedTuple):
    """The leaves with which a guard was initialised, which under `masked`, `partition` or nnx's `wrt` are not all."""

    path_hashes: jax.Array  # u32[n_leaves]: the CRC-32 of each leaf's path


def saw_leaves(params: PyTree) -> SeenLeaves:
    """The leaves that a guard notes at `init`, without reading values."""
    return SeenLeaves(jnp.asarray(_path_hashes(params)))


def leaf_names(params: PyTree, state: PyTree | None = None) -> list[str]:
    """Returns the path of every leaf, in the order used by `worst_leaf` and the statistics of leaves.

    >>> leaf_names({"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}})
    ['dense/bias', 'dense/kernel']

    A guard inside `optax.masked`, `optax.partition` or an `nnx.Optimizer` with `wrt=` sees and counts only some of the
    leaves. With its state, the names are those of the leaves that it saw:

    >>> import optax
    >>> import optax_guard as og
    >>> params = {"a": jnp.ones(1), "b": jnp.ones(2)}
    >>> state = optax.masked(og.guard(optax.sgd(0.1)), {"a": False, "b": True}).init(params)
    >>> leaf_names(params, state)
    ['b']

    Args:
      params: the parameters, or any tree with their structure (gradients, `jax.ShapeDtypeStruct`s).
      state: an optimizer state that holds one guard (if there are several, pass one guard's part of the state).

    Returns:
      One string per position; a `None` in the tree has one too. A leaf that the guard saw but `params` do not have is
      called "leaf 3 of 7".

    Raises:
      ValueError: `state` holds no guard or more than one.
    """
    if state is None:
        return _tree.leaf_names(params)
    seen = find_states(state, SeenLeaves)
    if len(seen) != 1:
        raise ValueError(
            f"leaf_names: expected one guard in this state, found {len(seen)}; pass the guard's own state."
        )
    check_on_host("leaf_names", seen[0])
    return seen_names(seen[0], params)


def seen_names(seen: SeenLeaves, params: PyTree | None) -> list[str]:
    """The names of the leaves that a guard saw, in its order; an index if `params` are missing or lack the leaf."""
    hashes = np.asarray(jax.device_get(field_array(seen)))
    hashes = hashes.reshape(-1, hashes.shape[-1])[0]  # all members saw the same leaves
    unknown = [f"leaf {i} of {len(hashes)}" for i in range(len(hashes))]
    if params is None:
        return unknown
    names = _tree.leaf_names(params)
    known = dict(zip(_path_hashes(params).tolist(), names, strict=True))
    found = [known.get(code) for code in hashes.tolist()]
    if not any(found) and len(names) == len(found):  # the same leaves under another root, such as `params["params"]`
        return names
    return [name or index for name, index in zip(found, unknown, strict=True)]


def where(names: list[str], leaf: int) -> str:
    """`names[leaf]` as a message shows it, a number if it has no name; empty for -1."""
    if leaf < 0:
        return ""
    name = names[leaf] if leaf < len(names) else f"leaf {leaf}"
    return name if name.startswith("leaf ") else f"`{name}`"


def what_was_seen(row: Any, names: list[str], *, every_leaf: bool = False) -> str:
    """What was not finite in a step, from its row of the flight recorder; `every_leaf` if no gradient of it was."""
    leaf = where(names, int(row["worst_leaf"]))
    gradient = "the gradient of every leaf" if every_leaf else f"the gradient of {leaf}" if leaf else "the gradient"
    if row["event"] == "nonfinite_update":
        return f"the gradient was finite, but the update of {leaf} was not (or its sum with the parameter)"
    if np.isnan(row["grad_norm"]):
        return f"{gradient} held NaN"
    if np.isinf(row["grad_norm"]):
        return f"{gradient} held Inf, or numbers too large to square in float32 (above 1.8e19)"
    if row["value_given"] and not np.isfinite(row["value"]):
        return f"the loss was {'NaN' if np.isnan(row['value']) else 'Inf'}; the gradient was finite"
    return "the gradient was finite, but a rule returned a scale that was not, or that made it overflow"


def batches(tags: Iterable[Any]) -> str:
    """The batches of some steps, as a message adds them: " (batch 7)", " (batches 7, 9)"; empty without tags."""
    known = list(dict.fromkeys(int(tag) for tag in tags if tag >= 0))
    if not known:
        return ""
    more = f" and {len(known) - _TAGS} more" if len(known) > _TAGS else ""
    return f" (batch{'es' if len(known) > 1 else ''} {', '.join(map(str, known[:_TAGS]))}{more})"


def axes_in_front(scalar: Any) -> int:
    """The number of axes that `vmap` or `pmap` put in front of a field that is a scalar in a single run."""
    return np.ndim(field_array(scalar))


def members(scalar: Any) -> Iterator[tuple[int, ...]]:
    """The index of each member of a state of many runs; one empty index for a single run."""
    return np.ndindex(*np.shape(field_array(scalar)))


def member(tree: PyTree, index: tuple[int, ...]) -> PyTree:
    """One member of a state of many runs, as in a single run."""
    return jax.tree.map(lambda leaf: leaf[index], tree) if index else tree


def check_on_host(function: str, field: Any) -> None:
    """Raises for a field of a state that is traced, or only a shape, before the host reads it."""
    array = field_array(field)
    if isinstance(array, Tracer):
        raise ValueError(
            f"{function}: `state` is traced: call it outside `jit`, with the state that the step returned."
        )
    if isinstance(array, jax.ShapeDtypeStruct):
        raise ValueError(f"{function}: `state` has shapes and no numbers: restore a checkpoint into it first.")


def is_traced(tree: PyTree) -> bool:
    """Whether a tree holds traced values."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def nonfinite_leaf(
    tree: PyTree, only: set[int] | None = None, kinds: tuple[str, ...] = ("NaN", "Inf")
) -> tuple[str, str] | None:
    """The path of the first leaf that holds one of `kinds`, and which; computed on the host."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        held = _what_is_bad(leaf) if only is None or id(leaf) in only else None
        if held in kinds:
            return path_name(variable_free(path)), held
    return None


def nonfinite_moment(state: PyTree, params: PyTree) -> tuple[str, str] | None:
    """The same for the moments in an optimizer's state, whose other numbers may be infinite by design."""
    return nonfinite_leaf(state, only={id(leaf) for leaf in moments(state, params)})


def _what_is_bad(leaf: Any) -> str | None:
    if not hasattr(leaf, "dtype") or not is_gradient(leaf):
        return None
    with jax.debug_nans(False), jax.debug_infs(False):
        if bool(jnp.all(jnp.isfinite(leaf))):
            return None
        return "NaN" if bool(jnp.any(jnp.isnan(leaf))) else "Inf"


def _path_hashes(params: PyTree) -> np.ndarray:
    paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: leaf is None)
    return np.array([path_hash(path_name(variable_free(path))) for path, _ in paths], np.uint32)

"""The mask of trained leaves: all others are neither judged nor read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common.tree import is_gradient, leaves_with_none, resolve_mask
from optax_guard._common.typing import Mask, PyTree
from optax_guard._step.observe import GradientStatistics

__all__ = ["chosen", "only_chosen", "select_statistics", "zeros_elsewhere"]


def chosen(function: str, mask: Mask, tree: PyTree) -> np.ndarray:
    """bool[n_leaves]: the mask at every position; False for a `None`."""
    leaves = leaves_with_none(tree)
    if not leaves:  # Optax also calls `init` with a placeholder without leaves
        return np.zeros(0, bool)
    return np.array([bool(x) for x in leaves_with_none(resolve_mask(function, mask, tree))], bool)


def only_chosen(function: str, mask: Mask | None, tree: PyTree) -> PyTree:
    """The tree with `None` for every gradient outside the mask, which is then neither counted nor read."""
    return tree if mask is None else _outside(chosen(function, mask, tree), tree, lambda _: None)


def zeros_elsewhere(function: str, mask: Mask | None, tree: PyTree) -> PyTree:
    """The tree with zeros for every gradient outside the mask."""
    return tree if mask is None else _outside(chosen(function, mask, tree), tree, jnp.zeros_like)


def select_statistics(statistics: GradientStatistics, leaves: jax.Array | np.ndarray) -> GradientStatistics:
    """The statistics of the gradient if all other leaves were zero."""
    return GradientStatistics(
        sum_squares=jnp.where(leaves, statistics.sum_squares, 0), magnitude=jnp.where(leaves, statistics.magnitude, 1)
    )


def _outside(inside: np.ndarray, tree: PyTree, replace: Any) -> PyTree:
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    replaced = [
        leaf if keep or not is_gradient(leaf) else replace(leaf) for keep, leaf in zip(inside, leaves, strict=True)
    ]
    return structure.unflatten(replaced)

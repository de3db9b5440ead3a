"""The leading axis of a batch, along which it is split."""

import jax

from optax_guard._common.tree import as_arrays, path_name
from optax_guard._common.typing import PyTree

__all__ = ["batch_size"]


def batch_size(function: str, batch: PyTree) -> int:
    """The number of examples, or a ValueError with the path of the leaf that disagrees."""
    batch = as_arrays(function, batch)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{function}: `batch` has no arrays.")
    first, size = path_name(leaves[0][0]), None
    for path, leaf in leaves:
        if leaf.ndim == 0:
            raise ValueError(
                f"{function}: leaf `{path_name(path)}` of `batch` is a single number; each leaf needs a leading axis "
                "of examples. Close over the rest: loss_fn = lambda params, batch: loss(params, batch, rate)."
            )
        if size is None:
            size = leaf.shape[0]
        elif leaf.shape[0] != size:
            raise ValueError(
                f"{function}: the leading axes of `batch` differ: `{first}` has {size} examples, `{path_name(path)}` "
                f"has {leaf.shape[0]}."
            )
    if not size:
        raise ValueError(f"{function}: `batch` has no examples: its leading axis has length 0.")
    return size

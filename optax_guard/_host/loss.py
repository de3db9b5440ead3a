"""A user's loss, parameters and batch: checks, and the part of the parameters that has a gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._common import validate
from optax_guard._common.tree import as_arrays, is_gradient, leaf_names, leaves_with_none
from optax_guard._common.typing import PyTree
from optax_guard._host.logits import maxima_in

__all__ = ["Problem", "part_of_batch", "problem"]


class Problem(NamedTuple):
    """A loss as a function of the floating-point leaves alone, given as a list."""

    names: list[str]
    leaves: list[jax.Array]
    loss: Callable[[list[Any], PyTree], jax.Array]  # (leaves, batch) -> scalar, in its own dtype
    tree: Callable[[list[Any]], PyTree]  # back to the structure of the parameters
    with_logits: Callable[[list[Any], PyTree], tuple[jax.Array, PyTree]]  # the loss, and the maxima of attention
    has_logits: bool  # whether there are any; without, the maxima are None


def problem(function: str, loss_fn: Callable[..., Any], params: PyTree, batch: PyTree, has_aux: bool) -> Problem:
    """Checks the loss, the parameters and the batch; a ValueError says what is wrong and what to do."""
    validate.function(function, "loss_fn", loss_fn, "of (params, batch)")
    params = as_arrays(function, params)
    leaves, structure = jax.tree.flatten(params)
    where = [i for i, leaf in enumerate(leaves) if is_gradient(leaf) and leaf.size > 0]
    if not where:
        raise ValueError(
            f"{function}: `params` has no floating-point leaf with an element, so there is nothing to differentiate."
        )
    names = [name for name, leaf in zip(leaf_names(params), leaves_with_none(params), strict=True) if leaf is not None]

    def tree(chosen: list[Any]) -> PyTree:
        filled = list(leaves)
        for i, leaf in zip(where, chosen, strict=True):
            filled[i] = leaf
        return jax.tree.unflatten(structure, filled)

    def loss(chosen: list[Any], batch: PyTree) -> jax.Array:
        result = loss_fn(tree(chosen), batch)
        return jnp.asarray(result[0] if has_aux else result)

    def with_logits(chosen: list[Any], batch: PyTree) -> tuple[jax.Array, PyTree]:
        result = loss_fn(tree(chosen), batch)
        return jnp.asarray(result[0]), maxima_in(function, result[1], params)

    def without(chosen: list[Any], batch: PyTree) -> tuple[jax.Array, None]:
        return loss(chosen, batch), None

    _check_loss(function, loss_fn, params, batch, has_aux)
    chosen = [jnp.asarray(leaves[i]) for i in where]
    has_logits = has_aux and jax.eval_shape(with_logits, chosen, batch)[1] is not None
    return Problem([names[i] for i in where], chosen, loss, tree, with_logits if has_logits else without, has_logits)


def _check_loss(function: str, loss_fn: Callable[..., Any], params: PyTree, batch: PyTree, has_aux: bool) -> None:
    result = jax.eval_shape(loss_fn, params, batch)
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"{function}: with has_aux=True `loss_fn` must return (loss, aux); got {_kind(result)}.")
        result = result[0]
    if not (hasattr(result, "shape") and result.shape == () and jnp.issubdtype(result.dtype, jnp.floating)):
        raise ValueError(
            f"{function}: `loss_fn` must return one floating-point number; got {_kind(result)}. Take the mean over the "
            "batch; if it returns (loss, aux), pass has_aux=True."
        )


def _kind(result: Any) -> str:
    if hasattr(result, "shape"):
        return f"{result.dtype}{list(result.shape)}"
    return f"a {type(result).__name__} of {len(jax.tree.leaves(result))} arrays"


def part_of_batch(batch: PyTree, start: int, stop: int) -> PyTree:
    """The examples [start, stop)."""
    return jax.tree.map(lambda leaf: leaf[start:stop], batch)

"""What many test files need: bytes of a tree, a tree of one number, one update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["bits", "filled", "once"]


def bits(tree: Any) -> list[bytes]:
    """The bytes of every leaf, for comparisons bit for bit."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def filled(tree: Any, number: float) -> Any:
    """A tree of the same shapes and dtypes that holds one number."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, number), tree)


def once(tx: optax.GradientTransformation, grads: Any, params: Any = None) -> Any:
    """The update that a fresh state gives."""
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]

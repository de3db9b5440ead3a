"""What many test files need: bytes of a tree, a tree of one number, one update, a terminal, a checkpoint."""

import io
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

__all__ = ["bits", "filled", "once", "terminal", "through_orbax"]


def bits(tree: Any) -> list[bytes]:
    """The bytes of every leaf, for comparisons bit for bit."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def filled(tree: Any, number: float) -> Any:
    """A tree of the same shapes and dtypes that holds one number."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, number), tree)


def once(tx: optax.GradientTransformation, grads: Any, params: Any = None) -> Any:
    """The update that a fresh state gives."""
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to the terminal from here on."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def through_orbax(state: Any, like: Any, folder: Any) -> Any:
    """The state after a checkpoint, restored into the structure of `like`."""
    import orbax.checkpoint as ocp  # here, since it takes seconds and few files need it

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", like)

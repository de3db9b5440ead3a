"""Finding an optimizer's second moment and learning rate in its state, in any nesting of Optax's wrappers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax._src.transform import (  # states that Optax makes but does not export
    ScaleByRmsWithCountState,
    ScaleByRStdDevWithCountState,
)

from optax_guard._tree import is_gradient, leaf_names, positions
from optax_guard._typing import PyTree

__all__ = ["curvatures", "injected_learning_rate"]

_CORRECTED = (optax.ScaleByAdamState, optax.ScaleByBeliefState, ScaleByRmsWithCountState)
# States with arrays in the shape of the parameters that do not rescale coordinates: momentum and averages.
_PLAIN = (optax.TraceState, optax.EmaState)


def curvatures(
    function: str, state: Any, params: PyTree, chosen: PyTree, metric: str, b2: Any, eps: Any
) -> list[jax.Array | None]:
    """Per position: what the optimizer divides its step by, Inf where it has only seen zeros, None for 1."""
    names = leaf_names(params)
    if metric == "identity":
        return [None] * len(names)
    found: dict[str, jax.Array] = {}
    unknown: set[str] = set()
    _collect(function, state, b2, eps, found, unknown)
    leaves, used = positions(params), positions(chosen)
    needed = [name for name, leaf, use in zip(names, leaves, used, strict=True) if use and is_gradient(leaf)]
    missing = [name for name in needed if name not in found]
    if metric == "second_moment" and missing:
        raise ValueError(
            f"{function}: metric='second_moment', but the inner optimizer's state has none for leaf `{missing[0]}`; "
            "take metric='identity', or wrap the optimizer that keeps one (Adam, RMSProp, Adagrad and their kin)."
        )
    if missing and unknown:
        raise ValueError(
            f"{function}: metric='auto' cannot tell by what {', '.join(sorted(unknown))} divides the step of leaf "
            f"`{missing[0]}`; choose metric='identity' knowingly, or another inner optimizer."
        )
    return [found.get(name) for name in names]


def injected_learning_rate(function: str, state: Any) -> jax.Array:
    """The `learning_rate` that `optax.inject_hyperparams` keeps in a state."""
    rates: list[jax.Array] = []

    def look(node: Any) -> bool:
        hyperparams = getattr(node, "hyperparams", None)
        if isinstance(hyperparams, dict) and "learning_rate" in hyperparams:
            rates.append(jnp.asarray(hyperparams["learning_rate"]))
        return False

    jax.tree.leaves(state, is_leaf=look)
    if len(rates) != 1:
        raise ValueError(
            f"{function}: `learning_rate` must be given, as a number or the inner optimizer's schedule: it is read "
            f"from `optax.inject_hyperparams` only where the state holds exactly one; found {len(rates)}."
        )
    return rates[0]


def _collect(function: str, node: Any, b2: Any, eps: Any, found: dict[str, jax.Array], unknown: set[str]) -> None:
    """Walks a state; `found` maps leaf paths to curvatures, `unknown` names states that might hide others."""
    moment = _moment(node, b2)
    if moment is not None:
        tree, inside = moment
        for path, leaf in zip(leaf_names(tree), positions(tree), strict=True):
            if not is_gradient(leaf):
                continue
            if path in found:
                raise ValueError(f"{function}: the inner optimizer keeps two second moments for leaf `{path}`.")
            real = leaf.real if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else leaf
            small = jnp.asarray(eps, real.dtype)
            root = jnp.sqrt(real + small) if inside else jnp.sqrt(real) + small
            found[path] = jnp.where(real > 0, root, jnp.where(jnp.isnan(real), jnp.nan, jnp.inf))
    elif isinstance(node, _PLAIN):
        return
    elif isinstance(node, dict):
        for child in node.values():
            _collect(function, child, b2, eps, found, unknown)
    elif isinstance(node, (tuple, list)):
        for child in node:
            if hasattr(child, "ndim") and child.ndim > 0 and is_gradient(child):
                unknown.add(type(node).__name__)
            elif hasattr(node, "_fields") and not isinstance(child, tuple) and not hasattr(child, "ndim"):
                if any(is_gradient(leaf) and leaf.ndim > 0 for leaf in _array_leaves(child)):
                    _collect_field(function, node, child, b2, eps, found, unknown)
            else:
                _collect(function, child, b2, eps, found, unknown)


def _collect_field(
    function: str, node: Any, child: Any, b2: Any, eps: Any, found: dict[str, jax.Array], unknown: set[str]
) -> None:
    """A field that is a tree: of states (as `optax.partition` has), or of arrays in the shape of the parameters."""
    before = len(found)
    states = [
        leaf for leaf in jax.tree.leaves(child, is_leaf=lambda x: hasattr(x, "_fields")) if hasattr(leaf, "_fields")
    ]
    for each in states:
        _collect(function, each, b2, eps, found, unknown)
    if not states and len(found) == before:
        unknown.add(type(node).__name__)


def _array_leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "ndim") and hasattr(leaf, "dtype")]


def _moment(node: Any, b2: Any) -> tuple[PyTree, bool] | None:
    """(the second moment, corrected for its start at zero; whether eps goes under the root)."""
    if isinstance(node, optax.ScaleByAmsgradState):
        return node.nu_max, False
    if isinstance(node, _CORRECTED):
        share = 1 - jnp.asarray(b2, jnp.float32) ** node.count.astype(jnp.float32)
        correction = jnp.where(share > 0, share, 1)
        return jax.tree.map(lambda v: v / correction.astype(v.dtype) if is_gradient(v) else v, node.nu), False
    if isinstance(node, optax.ScaleByRmsState):
        return node.nu, False
    if isinstance(node, (optax.ScaleByRStdDevState, ScaleByRStdDevWithCountState)):
        return jax.tree.map(lambda v, m: v - jnp.square(jnp.abs(m)), node.nu, node.mu), False
    if isinstance(node, optax.ScaleByRssState):
        return node.sum_of_squares, True
    return None

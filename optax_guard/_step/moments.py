"""Finds the moments in an optimizer's state, resets them, and detects moments that are dead.

A moment is a floating-point array with at least one dimension, or a 0-d one in the place of a 0-d parameter in a tree
with the structure of the parameters.

A counter beside a moment in the same state (Adam's `count`) is the moment's age. It is reset together with the moment,
since Adam's bias correction would otherwise be wrong (zeroed moments with an old count give updates up to 6.5 times too
large). All other counters (of schedules), keys, flags and 0-d numbers (an injected learning rate) are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common.axes import on_any_device, sharding_of, sum_over
from optax_guard._common.tree import is_gradient, is_like, leaves_with_none, map_gradients, wider_dtype
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.observe import one_pass_statistics

__all__ = ["all_finite", "fingerprints", "moments", "moves_float32", "reset_state"]

# Fields whose floats are not moments: those of an inner guard and of `optax.inject_hyperparams`.
_NO_MOMENTS = ("rule_states", "recovery_state", "recorder", "hyperparams", "hyperparams_states")


def reset_state(inner: optax.GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """The state with its moments and their ages as in `inner.init(params)`."""
    chosen = _moments_and_ages(state, params)[1]
    leaves, structure = jax.tree.flatten(state)
    fresh = jax.tree.leaves(inner.init(params))
    mixed = [
        new.astype(old.dtype) if i in chosen else old for i, (new, old) in enumerate(zip(fresh, leaves, strict=True))
    ]
    return jax.tree.unflatten(structure, mixed)


def moments(state: PyTree, params: PyTree) -> list[Any]:
    """The arrays of the state that are moments."""
    chosen = _moments_and_ages(state, params)[0]
    return [leaf for i, leaf in enumerate(jax.tree.leaves(state)) if i in chosen]


def all_finite(leaves: list[Any], axis_name: AxisName | None) -> jax.Array:
    """Whether every number is finite, on all devices."""
    # The largest magnitude shows it, since NaN wins every maximum. XLA's CPU backend fuses it into the reduction, while
    # `jnp.isfinite` on the elements first writes an array per leaf.
    largest = [jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves if is_gradient(leaf)]
    bad = sum((~jnp.isfinite(x)).astype(jnp.int32) for x in largest) + jnp.zeros((), jnp.int32)
    return ~on_any_device(bad > 0, axis_name)


def fingerprints(params: PyTree, axis_name: AxisName | None) -> jax.Array:
    """f32[n_leaves, 2]: the sum of squares and the sum of each leaf; NaN and Inf count as 0.

    A leaf for which both are unchanged to the last bit has moved by less than 1e-7 of itself. The sum is needed because
    weights before a normalisation can rotate without growing.
    """
    params = map_gradients(_rounded, params)

    def total(leaf: Any) -> jax.Array:
        if not is_gradient(leaf):
            return jnp.zeros((), jnp.float32)
        return jnp.sum(jnp.real(leaf), dtype=wider_dtype(jnp.real(leaf).dtype, jnp.float32)).astype(jnp.float32)

    leaves = leaves_with_none(params)
    if not leaves:
        return jnp.zeros((0, 2), jnp.float32)
    squares = one_pass_statistics(params, axis_name).sum_squares.astype(jnp.float32)
    sums = sum_over(jnp.stack([total(leaf) for leaf in leaves]), sharding_of(params, axis_name))
    result = jnp.stack([squares, sums], axis=1)
    return jnp.where(jnp.isfinite(result), result, 0)


def moves_float32(updates: PyTree, params: PyTree, axis_name: AxisName | None) -> jax.Array:
    """bool[n_leaves]: whether an update is at least 2^-24 of some element of its leaf, and so moves it in float32."""

    def moves(update: Any, param: Any) -> jax.Array:
        if not (is_gradient(update) and is_gradient(param)):
            return jnp.zeros((), bool)
        size, least = (jnp.abs(x.astype(wider_dtype(x.dtype, jnp.float32))) for x in (update, param))
        return jnp.any((size >= 2.0**-24 * least.astype(size.dtype)) & (size > 0))

    result = jnp.stack([moves(*pair) for pair in zip(leaves_with_none(updates), leaves_with_none(params), strict=True)])
    return on_any_device(result, axis_name)


def _rounded(leaf: Any) -> Any:
    """A 16-bit leaf in float32, rounded as it is in memory.

    XLA may skip the rounding of a float32 sum that it reads again, but it keeps this one.
    """
    limits = jnp.finfo(leaf.dtype)
    if limits.bits >= 32:
        return leaf
    return lax.reduce_precision(leaf.astype(jnp.float32), limits.nexp, limits.nmant)


def _moments_and_ages(state: PyTree, params: PyTree) -> tuple[set[int], set[int]]:
    """Indices into the state's leaves: the moments, and the moments together with their ages."""
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found, homes = set(), set()
    counters: list[tuple[int, tuple[Any, ...]]] = []
    place = 0
    # Trees with the parameters' structure are visited whole, so that a parameter's name is not taken for a field's.
    for path, part in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: is_like(node, params)):
        kept = any(getattr(key, "name", None) in _NO_MOMENTS for key in path)
        for below, leaf in jax.tree_util.tree_leaves_with_path(part):
            if is_gradient(leaf) and not kept and (leaf.ndim > 0 or shapes.get(below) == ()):
                found.add(place)
                homes.add(path[:-1])
            elif leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer):
                counters.append((place, (*path, *below)[:-1]))
            place += 1
    ages = {i for i, home in counters if home in homes}
    return found, found | ages

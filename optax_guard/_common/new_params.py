"""Factors of the new parameters, which are applied after everything that may still change the update.

A bound on the update or a back-off behind `qk_clip` would undo most of its work: a bound of 1 % on the step leaves a
weight that was to go from 10 to 1 at 9.9. So inside this library's wrappers `qk_clip` only leaves its factors in its
state, where they are found after the step, and the write of the new parameters takes them along.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._common.axes import placed_like
from optax_guard._common.numerics import accumulator_dtype, multiplied
from optax_guard._common.tree import find_states, is_gradient, leaves_with_none, variable_free_names, wider_dtype
from optax_guard._common.typing import PyTree

__all__ = ["SCALED_LATER", "QKClipState", "scaled_new_params", "scaled_updates", "scales_new_params"]

SCALED_LATER = "new_params_scaled_later"  # the extra argument that tells `qk_clip` that its caller applies the factors


class QKClipState(NamedTuple):
    """The state of `qk_clip`: the factors of the last step, the maxima behind them, and counters."""

    qk_clip_step: jax.Array  # i32[]: steps, which is the argument of a schedule
    qk_clip_factors: dict[str, jax.Array]  # by the path of a leaf, f32 that broadcasts against it; 1 if not scaled
    qk_clip_threshold: jax.Array  # f32[]: the threshold of the last step; 0 if there was none
    qk_clip_max_logits: dict[str, jax.Array]  # by layer, f32[heads]: the maxima of the last step; 0 if not finite
    qk_clip_clipped_heads: jax.Array  # i32[]: heads above the threshold in the last step
    qk_clip_clipped_total: jax.Array  # i32[]: steps in which a head was scaled
    qk_clip_invalid_total: jax.Array  # i32[]: maxima that were NaN, Inf or not above 0


def scales_new_params(state: PyTree) -> bool:
    """Whether a transformation with this state scales the new parameters."""
    return bool(find_states(state, QKClipState))


def scaled_new_params(
    step: Callable[[dict[str, Any]], tuple[PyTree, Any]],
    state: Any,
    params: PyTree | None,
    extra: dict[str, Any],
    *,
    in_place: bool,
) -> tuple[PyTree, Any]:
    """The result of `step(extra)`, new parameters or updates, with the factors that it left in its state.

    If a wrapper further out applies them, it has said so in `extra`, and nothing is done here.
    """
    if SCALED_LATER in extra or not scales_new_params(state):
        return step(extra)
    result, new_state = step({**extra, SCALED_LATER: True})
    for old, new in zip(find_states(state, QKClipState), find_states(new_state, QKClipState), strict=True):
        ran = new.qk_clip_step != old.qk_clip_step  # False inside an `optax.MultiSteps` that has not emitted
        factors = {name: jnp.where(ran, factor, 1) for name, factor in new.qk_clip_factors.items()}
        result = _scaled(result, factors) if in_place else scaled_updates(result, params, factors)
    return result, new_state


def scaled_updates(updates: PyTree, params: PyTree, factors: dict[str, jax.Array]) -> PyTree:
    """Updates that lead to `factor * (params + updates)`; where the factor is 1, the very same updates."""

    def scale(update: jax.Array, factor: jax.Array, param: jax.Array) -> jax.Array:
        factor = placed_like(update, factor)
        both = wider_dtype(param.dtype, update.dtype)
        wide = wider_dtype(both, accumulator_dtype(both))
        old, change = param.astype(wide), update.astype(wide)
        return jnp.where(factor == 1, update.astype(both), (multiplied(old + change, factor) - old).astype(both))

    return _map_named(scale, updates, factors, params)


def _scaled(params: PyTree, factors: dict[str, jax.Array]) -> PyTree:
    def scale(param: jax.Array, factor: jax.Array) -> jax.Array:
        factor = placed_like(param, factor)
        return jnp.where(factor == 1, param, multiplied(param, factor))

    return _map_named(scale, params, factors)


def _map_named(function: Callable[..., Any], tree: PyTree, factors: dict[str, jax.Array], *rest: PyTree) -> PyTree:
    """Maps over the leaves for which there is a factor, which must all be in the tree."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    others = [leaves_with_none(other) for other in rest]
    names = variable_free_names(tree)
    missing = factors.keys() - {name for name, leaf in zip(names, leaves, strict=True) if is_gradient(leaf)}
    if missing:
        raise ValueError(
            f"qk_clip: `{min(missing)}` is a leaf of the parameters for which the state was made, but here it has no "
            f"update; the leaves are {names}."
        )
    mapped = [
        function(leaf, factors[name], *each) if name in factors else leaf
        for name, leaf, *each in zip(names, leaves, *others, strict=True)
    ]
    return structure.unflatten(mapped)

"""The last word on the new parameters: factors and rounding, after everything that may still change the update.

A bound on the update or a back-off behind `qk_clip` would undo most of its work: a bound of 1 % on the step leaves a
weight that was to go from 10 to 1 at 9.9. And what is rounded before it is scaled is rounded once more, to nearest. So
inside this library's wrappers `qk_clip` and `stochastic_rounding` only leave in their states what is to be done, where
it is found after the step, and the write of the new parameters takes it along.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._common.axes import placed_like
from optax_guard._common.numerics import accumulator_dtype, multiplied
from optax_guard._common.prng import Words, leaf_words, rounded_stochastically, rounding_bits, salt, step_words
from optax_guard._common.tree import (
    find_states,
    is_gradient,
    leaves_with_none,
    variable_free_names,
    wider_dtype,
)
from optax_guard._common.typing import PyTree

__all__ = [
    "FINISHED_LATER",
    "QKClipState",
    "StochasticRoundingState",
    "finished",
    "finishes_params",
    "rounded_updates",
    "scaled_updates",
]

FINISHED_LATER = "new_params_finished_later"  # the extra argument that says that the caller finishes the parameters

_SALT = salt("stochastic_rounding")


class QKClipState(NamedTuple):
    """The state of `qk_clip`: the factors of the last step, the maxima behind them, and counters."""

    qk_clip_step: jax.Array  # i32[]: steps, which is the argument of a schedule
    qk_clip_factors: dict[str, jax.Array]  # by the path of a leaf, f32 that broadcasts against it; 1 if not scaled
    qk_clip_threshold: jax.Array  # f32[]: the threshold of the last step; 0 if there was none
    qk_clip_max_logits: dict[str, jax.Array]  # by layer, f32[heads]: the maxima of the last step; 0 if not finite
    qk_clip_clipped_heads: jax.Array  # i32[]: heads above the threshold in the last step
    qk_clip_clipped_total: jax.Array  # i32[]: steps in which a head was scaled
    qk_clip_invalid_total: jax.Array  # i32[]: maxima that were NaN, Inf or not above 0


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`."""

    rounding_key: jax.Array  # u32[2]: raw key data (its length depends on the generator); never changes
    rounding_step: jax.Array  # i32[]: steps, of which each has its own random bits
    rounded_leaves: dict[str, tuple[()]]  # the paths of the leaves that are rounded if they have 16 bits; no arrays


def finishes_params(state: PyTree) -> bool:
    """Whether a transformation with this state changes the new parameters behind the update."""
    return bool(find_states(state, QKClipState) or find_states(state, StochasticRoundingState))


def finished(
    step: Callable[[dict[str, Any], PyTree | None], tuple[PyTree, Any]],
    state: Any,
    params: PyTree | None,
    extra: dict[str, Any],
    *,
    in_place: bool,
) -> tuple[PyTree, Any]:
    """The result of a step, new parameters or updates, with the factors and the rounding that its state asks for.

    `step(extra, start)` returns updates, or new parameters in the dtypes of `start`: wide where they will be rounded.
    If a wrapper further out finishes them, it has said so in `extra`, and nothing is done here.
    """
    if FINISHED_LATER in extra or not finishes_params(state):
        return step(extra, params)
    names = [] if params is None else variable_free_names(params)
    roundings = find_states(state, StochasticRoundingState)
    if any(each.rounded_leaves.keys() - set(names) for each in roundings if isinstance(each.rounded_leaves, dict)):
        return step(extra, params)  # other trees here than there, as around `optax.lookahead`: it is done inside
    bits_of = {name: word for each in roundings for name, word in _bits_of_leaves(each, params).items()}
    start = params
    if in_place and bits_of:
        leaves, structure = jax.tree.flatten(params, is_leaf=lambda leaf: leaf is None)
        wide = [leaf.astype(jnp.float32) if name in bits_of else leaf for name, leaf in zip(names, leaves, strict=True)]
        start = structure.unflatten(wide)
    result, new_state = step({**extra, FINISHED_LATER: True}, start)
    factors = _factors(state, new_state)

    def finish(leaf: jax.Array, name: str, param: jax.Array) -> jax.Array:
        factor, word = factors.get(name), bits_of.get(name)
        factor = None if factor is None else placed_like(leaf, factor)
        if not in_place:
            return _updated(leaf, param, factor, word)
        if factor is not None:
            leaf = jnp.where(factor == 1, leaf, multiplied(leaf, factor))
        return leaf if word is None else rounded_stochastically(leaf, param.dtype, word)

    return _map_named(finish, result, params, factors.keys(), bits_of.keys()), new_state


def scaled_updates(updates: PyTree, params: PyTree, factors: dict[str, jax.Array]) -> PyTree:
    """Updates that lead to `factor * (params + updates)`; where the factor is 1, the very same updates."""

    def scale(update: jax.Array, name: str, param: jax.Array) -> jax.Array:
        return _updated(update, param, placed_like(update, factors[name]), None)

    return _map_named(scale, updates, params, factors.keys(), set())


def rounded_updates(updates: PyTree, params: PyTree, state: StochasticRoundingState) -> PyTree:
    """Updates that lead to the rounded sums; of a leaf that is not rounded, the very same update."""
    bits_of = _bits_of_leaves(state, params)

    def rounded(update: jax.Array, name: str, param: jax.Array) -> jax.Array:
        return _updated(update, param, None, bits_of[name])

    return _map_named(rounded, updates, params, set(), bits_of.keys())


def _updated(update: jax.Array, param: jax.Array, factor: jax.Array | None, word: jax.Array | None) -> jax.Array:
    """The update, in the wider dtype of both, that leads to the factor times the sum, rounded."""
    both = wider_dtype(param.dtype, update.dtype)
    wide = wider_dtype(both, accumulator_dtype(both))
    old, change = param.astype(wide), update.astype(wide)
    new = old + change if factor is None else multiplied(old + change, factor)
    if word is None:
        return jnp.where(factor == 1, update.astype(both), (new - old).astype(both))
    rounded = rounded_stochastically(new, param.dtype, word).astype(wide)
    moved = jnp.where(rounded == old, -0.0, rounded - old)  # -0.0 changes no number, not even the sign of a zero
    fits = jnp.abs(new) <= float(jnp.finfo(param.dtype).max)  # beyond the range, and for NaN, the update tells most
    return jnp.where(fits, moved.astype(both), update.astype(both))


def _factors(state: Any, new_state: Any) -> dict[str, jax.Array]:
    """By the path of a leaf, what `qk_clip` has just left in its state."""
    found: dict[str, jax.Array] = {}
    for old, new in zip(find_states(state, QKClipState), find_states(new_state, QKClipState), strict=True):
        ran = new.qk_clip_step != old.qk_clip_step  # False inside an `optax.MultiSteps` that has not emitted
        for name, factor in new.qk_clip_factors.items():
            factor = jnp.where(ran, factor, 1)
            found[name] = found[name] * factor if name in found else factor
    return found


def _bits_of_leaves(state: StochasticRoundingState, params: PyTree) -> dict[str, jax.Array]:
    """By the path of a leaf that is rounded, u32 random bits in its shape: a function of key, step and path."""
    names, leaves = variable_free_names(params), leaves_with_none(params)
    chosen = [
        i
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
        if name in state.rounded_leaves and leaf is not None and leaf.dtype in (jnp.bfloat16, jnp.float16)
    ]
    if not chosen:
        return {}
    keys = leaf_words(step_words(state.rounding_key, state.rounding_step, _SALT), names)
    return {names[i]: rounding_bits(Words(keys.first[i], keys.second[i]), leaves[i]) for i in chosen}


def _map_named(
    function: Callable[[jax.Array, str, jax.Array], jax.Array], tree: PyTree, params: PyTree, needed: Any, chosen: Any
) -> PyTree:
    """Maps over the leaves that are `needed` or `chosen`; the former must all be in the tree."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    names = variable_free_names(tree)
    missing = needed - {name for name, leaf in zip(names, leaves, strict=True) if is_gradient(leaf)}
    if missing:
        raise ValueError(
            f"qk_clip: `{min(missing)}` is a leaf of the parameters for which the state was made, but here it has no "
            f"update; the leaves are {names}."
        )
    mapped = [
        function(leaf, name, param) if (name in needed or name in chosen) and is_gradient(leaf) else leaf
        for name, leaf, param in zip(names, leaves, leaves_with_none(params), strict=True)
    ]
    return structure.unflatten(mapped)

"""Shared by the rules that remember norms: what they observe, when they learn, and the window of past norms."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._common import validate
from optax_guard._common.tree import leaves_with_none
from optax_guard._common.typing import PyTree, Scope
from optax_guard._step.observe import GradientStatistics

__all__ = [
    "DISTRUSTED",
    "Observation",
    "at_rank",
    "bounded_scale",
    "keep_unless",
    "number",
    "observe",
    "push",
    "scope_shape",
    "sorted_window",
    "validate_scope_and_cap",
]

DISTRUSTED = 5  # a percentile of a window is never one of this many largest norms, which may be one burst


class Observation(NamedTuple):
    """The norm of a step, of the tree or of each leaf, kept as size * root because the product may overflow."""

    size: jax.Array  # f32[] or f32[n_leaves]; 1 where not `usable`
    root: jax.Array  # the same
    log_norm: jax.Array  # f32, the same shape; 0 where not `usable`
    usable: jax.Array  # bool, the same shape: above 0, in a step that is finite everywhere
    finite: jax.Array  # bool[]: the whole step is finite


def observe(name: str, statistics: GradientStatistics, scope: Scope, counted: jax.Array) -> Observation:
    """The norm in the rule's scope; `counted` is any array of its state and gives the shape."""
    size, root = statistics.leaf_norm_parts if scope == "leaf" else statistics.finite_norm_parts
    if size.shape != counted.shape:
        raise ValueError(
            f"{name}: `scope='leaf'` was initialised for {counted.shape[0]} leaves; the gradient has {size.shape[0]}."
        )
    finite = jnp.all(statistics.finite)
    usable = finite & (size > 0) & (root > 0)
    size, root = jnp.where(usable, size, 1), jnp.where(usable, root, 1)
    return Observation(
        size=size,
        root=root,
        log_norm=(jnp.log(size) + jnp.log(root)).astype(jnp.float32),
        usable=usable,
        finite=finite,
    )


def bounded_scale(seen: Observation, log_scale: jax.Array, max_norm: Any) -> jax.Array:
    """exp(min(0, log_scale)), and at most what `max_norm` allows; 1 if the norm is not usable."""
    scale = jnp.exp(jnp.minimum(log_scale, 0))
    if max_norm is not None:
        bound = jnp.maximum(number(max_norm), 0).astype(seen.size.dtype)
        # Two divisions in turn, since the product, which is the norm itself, may overflow.
        scale = jnp.minimum(scale, (bound / seen.size / seen.root).astype(jnp.float32))
    return jnp.where(seen.usable, scale, 1)


def keep_unless(usable: jax.Array, new: Any, old: Any) -> Any:
    """The new state where the norm is usable, else the old one; rows of a window belong to their leaf."""

    def choose(after: jax.Array, before: jax.Array) -> jax.Array:
        use = usable if after.ndim == usable.ndim else jnp.broadcast_to(usable[..., None], after.shape)
        return jnp.where(use, after, before)

    return jax.tree.map(choose, new, old)


def sorted_window(ring: jax.Array, held: jax.Array) -> jax.Array:
    """The window sorted along its last axis, with empty places last."""
    places = jnp.arange(ring.shape[-1], dtype=jnp.int32)
    filled = jnp.broadcast_to(places, ring.shape) < held[..., None]
    return jnp.sort(jnp.where(filled, ring, jnp.inf), axis=-1)


def at_rank(ordered: jax.Array, rank: jax.Array) -> jax.Array:
    """The number at a fractional rank, interpolated linearly as `numpy.percentile` does."""
    low = jnp.floor(rank).astype(jnp.int32)
    high = jnp.ceil(rank).astype(jnp.int32)
    part = rank - jnp.floor(rank)
    return ordered[low] + part * (ordered[high] - ordered[low])


def push(ring: jax.Array, index: jax.Array, number: jax.Array) -> jax.Array:
    """The window with `number` in place of its oldest norm."""
    places = jnp.arange(ring.shape[-1], dtype=jnp.int32)
    here = jnp.broadcast_to(places, ring.shape) == (index % ring.shape[-1])[..., None]
    return jnp.where(here, number[..., None], ring)


def scope_shape(params: PyTree, scope: Scope) -> tuple[int, ...]:
    """The shape of one number for each scope."""
    return (len(leaves_with_none(params)),) if scope == "leaf" else ()


def validate_scope_and_cap(name: str, scope: Any, max_norm: Any) -> Any:
    """Checks both and returns `max_norm` as a float, an array or None."""
    validate.one_of(name, "scope", scope, Scope)
    return None if max_norm is None else validate.scalar(name, "max_norm", max_norm, low=0, infinite=True)


def number(value: Any) -> jax.Array:
    """A number or 0-d array in float32, whether x64 is on or off."""
    return jnp.asarray(value, jnp.float32)

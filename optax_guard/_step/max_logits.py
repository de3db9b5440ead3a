"""The extra argument `max_logits=`: the largest attention logit of every head in this step's forward pass.

It is a tree of float arrays, one for each attention layer. A maximum that is NaN, Inf or not above 0 says nothing about
its head. For maxima over micro-batches and devices, NaN and Inf become the largest finite number, so that they stay,
and a state that keeps maxima stays finite.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common.axes import axes_of, everywhere, max_arrays_over
from optax_guard._common.extra import is_number
from optax_guard._common.tree import path_hash, path_name
from optax_guard._common.typing import AxisName, PyTree

__all__ = [
    "HOW_TO_OBTAIN",
    "TROUBLE",
    "TROUBLE_IN_WORDS",
    "Largest",
    "as_finite",
    "from_finite",
    "head_name",
    "heads_of",
    "largest",
    "layers_of",
    "max_logits_in",
    "nothing_seen",
    "over_devices",
]

HOW_TO_OBTAIN = (
    "They are the largest logits of the forward pass that gave this gradient: return `attention_with_max_logits` or "
    "`max_attention_logits` from the loss function, or what `collect_max_logits` finds in Flax's layers."
)
TROUBLE = (1e3, 1e4)  # Kimi K2 (arXiv 2507.20534) reports 1e3; small models failed near 1e4 (arXiv 2309.14322)
TROUBLE_IN_WORDS = "trouble has begun at {:,.0f} to {:,.0f}, in bfloat16 earlier".format(*TROUBLE)
_LARGEST = float(jnp.finfo(jnp.float32).max)


def max_logits_in(function: str, extra: dict[str, Any], axis_name: AxisName | None = None) -> PyTree | None:
    """The maxima as float32 arrays on which all devices agree; None if none were given."""
    given = extra.get("max_logits")
    leaves, structure = jax.tree_util.tree_flatten_with_path(given, is_leaf=lambda leaf: leaf is None)
    if given is None or not leaves:
        return None
    for path, leaf in leaves:
        floats = is_number(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if not floats or not np.ndim(leaf) or not np.size(leaf):
            got = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
            raise ValueError(
                f"{function}: `max_logits` must hold a float array [heads] for each attention layer; for "
                f"`{path_name(path)}` it holds {got}. Leave out layers without attention. {HOW_TO_OBTAIN}"
            )
    arrays = [everywhere(jax.lax.stop_gradient(jnp.asarray(leaf)).astype(jnp.float32)) for _, leaf in leaves]
    return over_devices(structure.unflatten(arrays), axis_name)


def layers_of(function: str, max_logits: Any, wanted: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The maxima of the layers in `wanted`; raises if one is missing or of another shape."""
    needs = (
        "`max_logits` must hold the largest logit of every head for each layer in `layers` of `qk_clip`, "
        f"{{{_shapes(wanted)}}}"
    )
    if not isinstance(max_logits, dict):
        kind = "an array" if hasattr(max_logits, "shape") else f"a {type(max_logits).__name__}"
        got = "none were passed" if max_logits is None else f"got {kind}"
        raise ValueError(f"{function}: {needs}; {got}. {HOW_TO_OBTAIN}")
    if not max_logits.keys() >= wanted.keys():
        raise ValueError(f"{function}: {needs}; got {{{_shapes(max_logits)}}}. {HOW_TO_OBTAIN}")
    for layer, array in wanted.items():
        got = max_logits[layer]
        if getattr(got, "shape", None) != array.shape:
            kind = f"has shape {got.shape}" if hasattr(got, "shape") else f"is a {type(got).__name__}"
            cure = "Correct the heads in `layers`, or pass the maxima of this layer."
            if getattr(got, "shape", ())[-array.ndim :] == array.shape:
                cure = "Take the largest over the axes in front, as in `maxima.max(axis=0)` for a batch."
            raise ValueError(
                f"{function}: `max_logits` of layer {layer!r} {kind}, but `layers` of `qk_clip` finds weights for "
                f"{array.shape} heads there. {cure} {HOW_TO_OBTAIN}"
            )
    return {layer: max_logits[layer] for layer in wanted}


def _shapes(layers: dict[str, Any]) -> str:
    return ", ".join(
        f"{layer!r}: {x.shape if hasattr(x, 'shape') else f'a {type(x).__name__}'}" for layer, x in layers.items()
    )


def over_devices(max_logits: PyTree, axis_name: AxisName | None) -> PyTree:
    """The largest on any device, in one all-reduce."""
    arrays, structure = jax.tree.flatten(max_logits)
    if not any(axes_of(array, axis_name) for array in arrays):
        return max_logits
    return structure.unflatten(map(from_finite, max_arrays_over([*map(as_finite, arrays)], axis_name)))


class Largest(NamedTuple):
    """The largest logit of a step, and whose it is."""

    logit: jax.Array | None = None  # f32[]: NaN if a maximum is NaN; None if no maxima were passed
    layer: jax.Array | int = 0  # u32[]: the CRC-32 of the layer's name
    head: jax.Array | int = -1  # i32[]


def largest(max_logits: PyTree | None) -> Largest:
    """The largest logit of all layers and heads. A NaN counts as the largest."""
    if max_logits is None:
        return Largest()
    heads = heads_of(max_logits)
    hashes = np.array([path_hash(layer) for layer, _ in heads], np.uint32)
    numbers = np.array([head for _, head in heads], np.int32)
    maxima = jnp.concatenate([jnp.ravel(array) for array in jax.tree.leaves(max_logits)])
    place = jnp.argmax(maxima)
    return Largest(maxima[place], jnp.asarray(hashes)[place], jnp.asarray(numbers)[place])


def heads_of(max_logits: PyTree) -> list[tuple[str, int]]:
    """The layer and the number of every head, in the order of the maxima; a layer of a stack is called `layers[2]`."""
    heads = []
    for path, array in jax.tree_util.tree_leaves_with_path(max_logits):
        *stack, count = np.shape(array)
        for place in itertools.product(*map(range, stack)):
            name = path_name(path) + (f"[{', '.join(map(str, place))}]" if place else "")
            heads += [(name, head) for head in range(count)]
    return heads


def head_name(layer: str, head: int) -> str:
    """The head in words; the layer is empty if its name is not known."""
    if layer == "(root)":
        return f"head {head}"
    return f"head {head} of `{layer}`" if layer else f"head {head} of a layer whose name is not known"


def nothing_seen(shape: tuple[int, ...]) -> jax.Array:
    """The maximum over no micro-batch, as a finite number."""
    return jnp.full(shape, -_LARGEST, jnp.float32)


def as_finite(maxima: jax.Array) -> jax.Array:
    """NaN and Inf as the largest finite number, which no other maximum removes."""
    return jnp.where(jnp.isnan(maxima), _LARGEST, jnp.clip(maxima, -_LARGEST, _LARGEST))


def from_finite(maxima: jax.Array) -> jax.Array:
    """The inverse of `as_finite` up to the kind: Inf where there was NaN or Inf, NaN where nothing was seen."""
    return jnp.where(maxima >= _LARGEST, jnp.inf, jnp.where(maxima <= -_LARGEST, jnp.nan, maxima))

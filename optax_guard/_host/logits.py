"""The attention logits that a loss returns beside itself, per layer and head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common.tree import variable_free_names
from optax_guard._common.typing import PyTree
from optax_guard._host.terminal import number, shown, text_table
from optax_guard._step.max_logits import TROUBLE, TROUBLE_IN_WORDS, head_name, heads_of, max_logits_in

__all__ = ["LayerLogits", "largest_of", "layer_logits", "logit_finding", "logit_table", "maxima_in"]

_HEADS = 8  # the most heads of a layer that a table shows one by one


class LayerLogits(NamedTuple):
    """The largest attention logit of each head of a layer."""

    layer: str  # its path; one layer of a stack is called `layers[2]`
    maxima: tuple[float, ...]  # by head


def maxima_in(function: str, aux: Any, params: PyTree) -> PyTree | None:
    """The maxima in what a loss returns beside itself; None if there are none.

    They are `aux["max_logits"]`, or `aux` itself if it is a dict of float arrays whose keys are paths of `params`.
    """
    if not isinstance(aux, dict) or not aux:
        return None
    if "max_logits" in aux:
        return max_logits_in(function, aux)
    names = variable_free_names(params)

    def is_layer(key: Any, maxima: Any) -> bool:
        floats = hasattr(maxima, "dtype") and jnp.issubdtype(maxima.dtype, jnp.floating) and np.ndim(maxima) > 0
        return floats and isinstance(key, str) and (not key or any(name.startswith(f"{key}/") for name in names))

    return aux if all(is_layer(key, maxima) for key, maxima in aux.items()) else None


def layer_logits(max_logits: PyTree) -> tuple[LayerLogits, ...]:
    """The maxima on the host, layer by layer."""
    layers: dict[str, list[float]] = {}
    maxima = [np.ravel(array) for array in jax.tree.leaves(jax.device_get(max_logits))]
    for (layer, _), logit in zip(heads_of(max_logits), np.concatenate(maxima), strict=True):
        layers.setdefault(layer, []).append(float(logit))
    return tuple(LayerLogits(layer, tuple(logits)) for layer, logits in layers.items())


def largest_of(logits: tuple[LayerLogits, ...]) -> tuple[float, str]:
    """The largest logit, and the words for whose it is; the first that is NaN, if there is one."""
    layer = logits[int(np.argmax([np.max(each.maxima) for each in logits]))]
    head = int(np.argmax(layer.maxima))
    return layer.maxima[head], head_name(layer.layer, head)


def logit_finding(logits: tuple[LayerLogits, ...]) -> str | None:
    """What deserves a look; None if every logit is finite and below the range of trouble."""
    if not logits:
        return None
    logit, whose = largest_of(logits)
    if not np.isfinite(logit):
        return f"An attention logit is not finite: that of {whose}."
    if logit <= TROUBLE[0]:
        return None
    heads = [head > TROUBLE[0] for layer in logits for head in layer.maxima]
    return (
        f"The largest attention logit is {number(logit, 4)}, that of {whose}; {sum(heads)} of {len(heads)} heads have "
        f"passed {TROUBLE[0]:,.0f}; {TROUBLE_IN_WORDS}. See `qk_clip`."
    )


def logit_table(logits: tuple[LayerLogits, ...]) -> str:
    """A row for each layer, and the range in which trouble begins."""
    if not logits:
        return ""
    rows = []
    for layer, maxima in logits:
        head = int(np.argmax(maxima))
        every = " ".join(map(number, maxima[:_HEADS])) + (" ..." if len(maxima) > _HEADS else "")
        rows.append((shown(layer, 40), number(maxima[head], 4), str(head), every))
    table = text_table(("attention layer", "largest logit", "head", "all heads"), rows)
    return f"{table}\n({TROUBLE_IN_WORDS})"

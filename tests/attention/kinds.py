"""Every kind of attention that `qk_clip` knows, with its logits in float64 NumPy, from the equations of the models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import optax_guard as og
from optax_guard.attention import AttentionLayout, Projection

FEATURES, HEADS, SIZE, LAYERS = 6, 4, 4, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, FEATURES))


@dataclass(frozen=True)
class Kind:
    """Parameters, their description, and the logits [..., heads, T, S] of each layer."""

    params: Any
    layers: Any
    logits: Callable[[Any], dict[str, np.ndarray]]

    def maxima(self, params: Any) -> dict[str, np.ndarray]:
        return {layer: logits.max((-2, -1)) for layer, logits in self.logits(params).items()}


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def dots(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """[T, heads, size] and [S, key heads, size] -> [heads, T, S]; consecutive queries share a key."""
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    return np.einsum("the,she->hts", query, key) / np.sqrt(query.shape[-1])


def project(layer: Any, side: str, heads: int) -> np.ndarray:
    """x W + b of a kernel whose outputs may have been flattened."""
    kernel = wide(layer[side]["kernel"])
    out = X @ kernel.reshape(FEATURES, -1)
    if "bias" in layer[side]:
        out = out + wide(layer[side]["bias"]).reshape(-1)
    return out.reshape(len(X), heads, -1)


def separate(key_heads: int, shape: Callable[[int], tuple[int, ...]], bias: bool, layers: Any) -> Kind:
    """Queries and keys in leaves of their own."""
    sides = {"query": HEADS, "key": key_heads, "value": key_heads}
    layer = {side: {"kernel": draw(FEATURES, *shape(heads))} for side, heads in sides.items()}
    if bias:
        layer = {side: {**leaves, "bias": draw(*shape(sides[side]))} for side, leaves in layer.items()}

    def logits(params: Any) -> dict[str, np.ndarray]:
        layer = params["block"]["attention"]
        return {"block/attention": dots(project(layer, "query", HEADS), project(layer, "key", key_heads))}

    params = {"block": {"attention": layer, "mlp": {"kernel": draw(FEATURES, 3)}}, "scale": draw(2)}
    return Kind(params, layers, logits)


def own(heads: int) -> tuple[int, ...]:
    return (heads, SIZE)


def flat(heads: int) -> tuple[int, ...]:
    return (heads * SIZE,)


def flat_layout(key_heads: int) -> AttentionLayout:
    def side(name: str, heads: int) -> tuple[Projection, ...]:
        return (
            Projection(f"{name}/kernel", axis=1, split={1: (heads, -1)}),
            Projection(f"{name}/bias", axis=0, split={0: (heads, -1)}, optional=True),
        )

    return AttentionLayout(query=side("query", HEADS), key=side("key", key_heads))


def fused(shape: tuple[int, ...], layout: AttentionLayout, take: Callable[[np.ndarray], Any]) -> Kind:
    """One leaf for queries, keys and values; `take` has the queries and the keys of what it projects to."""

    def logits(params: Any) -> dict[str, np.ndarray]:
        layer = params["attention"]["qkv"]
        out = np.tensordot(X, wide(layer["kernel"]), 1) + wide(layer["bias"])
        return {"attention": dots(*take(out))}

    params = {"attention": {"qkv": {"kernel": draw(FEATURES, *shape), "bias": draw(*shape)}}, "out": draw(3)}
    return Kind(params, layout, logits)


def fused_layout(axis: int, split: Any, query: Any, key: Any) -> AttentionLayout:
    """The kernel has one more axis in front than the bias."""

    def side(part: Any) -> tuple[Projection, ...]:
        in_kernel = None if split is None else {1: split}
        in_bias = None if split is None else {0: split}
        return (
            Projection("qkv/kernel", axis=axis + 1, split=in_kernel, part=(slice(None), *part)),
            Projection("qkv/bias", axis=axis, split=in_bias, part=part),
        )

    return AttentionLayout(query=side(query), key=side(key))


def latent() -> Kind:
    """Multi-head latent attention: queries and keys without rotation, and rotated queries with one shared key."""
    nope, rope, rank = 3, 2, 5
    layer = {
        "q_a": {"kernel": draw(FEATURES, rank)},
        "q_norm": {"scale": draw(rank)},
        "q_b": {"kernel": draw(rank, HEADS * (nope + rope))},
        "kv_a": {"kernel": draw(FEATURES, rank)},
        "k_rope": {"kernel": draw(FEATURES, rope)},
        "kv_b": {"kernel": draw(rank, HEADS, nope + 4)},
    }

    def logits(params: Any) -> dict[str, np.ndarray]:
        layer = {name: wide(next(iter(leaf.values()))) for name, leaf in params["mla"].items()}
        query = ((X @ layer["q_a"] * layer["q_norm"]) @ layer["q_b"]).reshape(len(X), HEADS, nope + rope)
        key = np.tensordot(X @ layer["kv_a"], layer["kv_b"], 1)[..., :nope]
        rotated = np.broadcast_to((X @ layer["k_rope"])[:, None], (len(X), HEADS, rope))
        return {"mla": dots(query, np.concatenate([key, rotated], -1))}

    split = {1: (HEADS, nope + rope)}
    layout = AttentionLayout(
        query=(Projection("q_b/kernel", axis=1, split=split, part=np.s_[:, :, :nope]),),
        rotated_query=(Projection("q_b/kernel", axis=1, split=split, part=np.s_[:, :, nope:]),),
        key=(Projection("kv_b/kernel", axis=1, part=np.s_[:, :, :nope]),),
    )
    return Kind({"mla": layer, "out": {"kernel": draw(3, 2)}}, layout, logits)


def stacked() -> Kind:
    """Layers stacked for `scan`, beside one that is not, and one without attention."""
    layer = {side: {"kernel": draw(LAYERS, FEATURES, HEADS, SIZE)} for side in ("query", "key", "value")}
    last = {side: {"kernel": draw(FEATURES, HEADS, SIZE)} for side in ("query", "key", "value")}

    def logits(params: Any) -> dict[str, np.ndarray]:
        def of(layer: Any) -> np.ndarray:
            return dots(project(layer, "query", HEADS), project(layer, "key", HEADS))

        stack = params["layers"]
        each = [{side: {"kernel": leaf["kernel"][i]} for side, leaf in stack.items()} for i in range(LAYERS)]
        return {"layers": np.stack([of(layer) for layer in each]), "last/attention": of(params["last"]["attention"])}

    params = {"layers": layer, "last": {"attention": last}, "mlp": {"kernel": draw(2, 2)}}
    return Kind(params, (og.linen_attention("layers", stacked=1), og.linen_attention("last/*")), logits)


def equinox() -> Kind:
    """Weights as `equinox.nn.MultiheadAttention` keeps them: [outputs, inputs]."""

    def side(bias: bool) -> dict[str, np.ndarray]:
        return {"weight": draw(HEADS * SIZE, FEATURES), **({"bias": draw(HEADS * SIZE)} if bias else {})}

    def logits(params: Any) -> dict[str, np.ndarray]:
        layer = params["attention"]
        out = [
            (X @ wide(layer[name]["weight"]).T + wide(layer[name].get("bias", 0.0))).reshape(len(X), HEADS, SIZE)
            for name in ("query_proj", "key_proj")
        ]
        return {"attention": dots(*out)}

    layer = {"query_proj": side(True), "key_proj": side(False), "value_proj": side(False)}
    return Kind({"attention": layer}, og.equinox_attention(HEADS), logits)


def transformer() -> Kind:
    blocks = {str(i): {side: {"kernel": draw(FEATURES, HEADS * SIZE)} for side in ("query", "key")} for i in (0, 1)}

    def logits(params: Any) -> dict[str, np.ndarray]:
        found = params["blocks"].items()
        return {f"blocks/{i}": dots(project(x, "query", HEADS), project(x, "key", HEADS)) for i, x in found}

    return Kind({"blocks": blocks, "head": {"kernel": draw(2, 2)}}, og.transformer_attention(HEADS), logits)


def one_key() -> AttentionLayout:
    key = Projection("key/kernel", axis=1, split={1: (1, -1)})
    return AttentionLayout(query=(Projection("query/kernel", axis=1),), key=(key,))


KINDS = {
    "linen": separate(HEADS, own, True, og.linen_attention()),
    "nnx": separate(HEADS, own, True, og.nnx_attention()),
    "flat": separate(HEADS, flat, True, flat_layout(HEADS)),
    "grouped": separate(2, own, True, og.linen_attention()),
    "grouped, flat": separate(2, flat, True, flat_layout(2)),
    "multi-query": separate(1, lambda heads: (SIZE,) if heads == 1 else own(heads), False, one_key()),
    "fused, own axes": fused(
        (3, HEADS, SIZE),
        fused_layout(1, None, np.s_[0,], np.s_[1,]),
        lambda out: (out[:, 0], out[:, 1]),
    ),
    "fused, flat": fused(
        (3 * HEADS * SIZE,),
        fused_layout(1, (3, HEADS, -1), np.s_[0,], np.s_[1,]),
        lambda out: out.reshape(len(X), 3, HEADS, SIZE).transpose(1, 0, 2, 3)[:2],
    ),
    "fused, grouped": fused(
        ((HEADS + 2 * 2) * SIZE,),
        fused_layout(0, (HEADS + 2 * 2, -1), np.s_[:HEADS,], np.s_[HEADS : HEADS + 2,]),
        lambda out: np.split(out.reshape(len(X), -1, SIZE), [HEADS, HEADS + 2], axis=1)[:2],
    ),
    "fused, head by head": fused(
        (HEADS, 3 * SIZE),
        fused_layout(0, None, np.s_[:, :SIZE], np.s_[:, SIZE : 2 * SIZE]),
        lambda out: (out[..., :SIZE], out[..., SIZE : 2 * SIZE]),
    ),
    "latent": latent(),
    "stacked": stacked(),
    "equinox": equinox(),
    "transformer": transformer(),
}

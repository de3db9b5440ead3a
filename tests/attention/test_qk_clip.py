"""QK-Clip against float64 NumPy, for every kind of attention: logits are recomputed from the weights after the step."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from flax import linen, nnx
from kinds import HEADS, KINDS, Kind

import optax_guard as og
from optax_guard.attention import AttentionLayout, Projection

LIKE_OTHERS = ("nnx", "transformer", "fused, own axes", "grouped, flat", "multi-query")
each_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in KINDS]
)
RNG = np.random.default_rng(1)


def threshold_of(kind: Kind) -> float:
    """Half of the heads are above it."""
    return float(np.median(np.concatenate([x.ravel() for x in kind.maxima(kind.params).values()])))


def as_max_logits(maxima: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {layer: jnp.asarray(x, jnp.float32) for layer, x in maxima.items()}


def clipped(name: str, updates: Any, balance: float = 0.5) -> tuple[Any, Any]:
    """The parameters after a step with these updates, taken as Optax takes it and as `apply_gradients` does."""
    kind = KINDS[name]
    return step_of(name, balance)(kind.params, updates, as_max_logits(kind.maxima(kind.params)))


@functools.cache
def step_of(name: str, balance: float) -> Any:
    kind = KINDS[name]
    clip = og.qk_clip(threshold_of(kind), layers=kind.layers, balance=balance)
    chain, guarded = optax.chain(optax.scale(1.0), clip), og.guard(optax.chain(optax.scale(1.0), clip), recorder_rows=2)

    @quick_jit
    def step(params: Any, updates: Any, max_logits: Any) -> tuple[Any, Any]:
        by_optax, _ = chain.update(updates, chain.init(params), params, max_logits=max_logits)
        fast, _ = og.apply_gradients(guarded, updates, guarded.init(params), params, max_logits=max_logits)
        return optax.apply_updates(params, by_optax), fast

    return step


def updated(clip: Any, updates: Any, params: Any, max_logits: Any) -> Any:
    return quick_jit(lambda u, p, m: clip.update(u, clip.init(p), p, max_logits=m))(updates, params, max_logits)


def gammas(kind: Kind) -> dict[str, np.ndarray]:
    return {layer: np.minimum(1, threshold_of(kind) / x) for layer, x in kind.maxima(kind.params).items()}


@each_kind
def test_with_a_zero_update_heads_above_the_threshold_are_at_it_afterwards(name: str) -> None:
    kind = KINDS[name]
    before = kind.maxima(kind.params)
    for params in clipped(name, jax.tree.map(np.zeros_like, kind.params)):
        for layer, maxima in kind.maxima(params).items():
            np.testing.assert_allclose(maxima, np.minimum(before[layer], threshold_of(kind)), rtol=1e-3)
            assert np.sum(before[layer] > threshold_of(kind)) > 0 or len(before) > 1


@each_kind
@pytest.mark.parametrize("balance", [0.5, pytest.param(0.2, marks=pytest.mark.slow)])
def test_logits_are_gamma_times_those_that_the_step_alone_would_have_given(name: str, balance: float) -> None:
    kind = KINDS[name]
    updates = jax.tree.map(lambda x: (RNG.normal(size=x.shape) / 8).astype(np.float32), kind.params)
    alone = kind.logits(jax.tree.map(np.add, kind.params, updates))
    for params in clipped(name, updates, balance):
        for layer, logits in kind.logits(params).items():
            expected = gammas(kind)[layer][..., None, None] * alone[layer]
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@each_kind
def test_leaves_that_hold_no_queries_and_keys_keep_their_bits(name: str) -> None:
    kind = KINDS[name]
    updates = jax.tree.map(lambda x: (RNG.normal(size=x.shape) / 8).astype(np.float32), kind.params)
    expected = optax.apply_updates(kind.params, updates)
    described = re.compile(r"quer|key|qkv|q_b|kv_b")
    for params in clipped(name, updates):
        for path, new in jax.tree_util.tree_leaves_with_path(params):
            if not described.search(jax.tree_util.keystr(path)):
                chex.assert_trees_all_equal(new, dict(jax.tree_util.tree_leaves_with_path(expected))[path])


def test_a_head_below_the_threshold_keeps_the_bits_of_its_update() -> None:
    kind = KINDS["linen"]
    updates = jax.tree.map(lambda x: (RNG.normal(size=x.shape) / 8).astype(np.float32), kind.params)
    clip = og.qk_clip(threshold_of(kind), layers=kind.layers)
    maxima = kind.maxima(kind.params)
    out, _ = updated(clip, updates, kind.params, as_max_logits(maxima))
    below = maxima["block/attention"] <= threshold_of(kind)
    assert 0 < below.sum() < HEADS
    for side in ("query", "key"):
        old, new = (tree["block"]["attention"][side]["kernel"] for tree in (updates, out))
        np.testing.assert_array_equal(new[:, below], old[:, below])
        assert np.all(np.any(new[:, ~below] != old[:, ~below], axis=(0, 2)))


def test_balance_decides_whether_queries_or_keys_shrink() -> None:
    kind = KINDS["linen"]
    zero = jax.tree.map(np.zeros_like, kind.params)
    old = kind.params["block"]["attention"]
    for balance, (kept, shrunk) in ((0.0, ("query", "key")), (1.0, ("key", "query"))):
        new = clipped("linen", zero, balance)[0]["block"]["attention"]
        chex.assert_trees_all_equal(new[kept], old[kept])
        share = np.asarray(new[shrunk]["kernel"] / old[shrunk]["kernel"]).min(axis=(0, 2))
        np.testing.assert_allclose(share, gammas(kind)["block/attention"], rtol=1e-5)


# Maxima that say nothing


@pytest.mark.parametrize("maximum", [np.nan, np.inf, -np.inf, 0.0, -3.0], ids=str)
def test_a_maximum_that_says_nothing_scales_nothing_and_is_counted(maximum: float) -> None:
    kind = KINDS["linen"]
    clip = og.qk_clip(1.0, layers=kind.layers)
    maxima = {"block/attention": jnp.asarray([maximum, 0.5, maximum, 4.0], jnp.float32)}
    zero = jax.tree.map(np.zeros_like, kind.params)
    out, state = updated(clip, zero, kind.params, maxima)
    moved = np.any(np.asarray(out["block"]["attention"]["query"]["kernel"]) != 0, axis=(0, 2))
    np.testing.assert_array_equal(moved, [False, False, False, True])
    chex.assert_tree_all_finite(state)
    numbers = og.metrics(state)
    assert int(numbers["qk_clip/invalid_total"]) == 2
    assert int(numbers["qk_clip/clipped_heads"]) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, "100"])
def test_a_threshold_that_is_not_positive_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="qk_clip: `max_logit` must be a number in"):
        og.qk_clip(value, layers=og.linen_attention())


def test_an_infinite_threshold_watches_and_scales_nothing() -> None:
    kind = KINDS["linen"]
    clip = og.qk_clip(np.inf, layers=kind.layers)
    maxima = {"block/attention": jnp.asarray([1e30, 2.0, 3.0, 4.0], jnp.float32)}
    zero = jax.tree.map(np.zeros_like, kind.params)
    out, state = updated(clip, zero, kind.params, maxima)
    chex.assert_trees_all_equal(out, zero)
    np.testing.assert_allclose(og.metrics(state)["qk_clip/max_logit"], 1e30)


# What is wrong with `max_logits`


@pytest.mark.parametrize(
    ("max_logits", "words"),
    [
        (None, ["none were passed", "'block/attention': (4,)", "max_attention_logits"]),
        ({"block": np.ones(4, np.float32)}, ["'block/attention': (4,)", "'block': (4,)", "max_attention_logits"]),
        (
            {"block/attention": np.ones(5, np.float32)},
            ["has shape (5,)", "(4,) heads", "Correct the heads in `layers`"],
        ),
        ({"block/attention": np.ones((1, 4), np.float32)}, ["has shape (1, 4)", "(4,) heads", "maxima.max(axis=0)"]),
        ({"block": {"attention": np.ones(4, np.float32)}}, ["'block/attention': (4,)", "'block': a dict"]),
        ({"block/attention": np.ones(4, np.int32)}, ["`block/attention`", "int32[4]", "float array [heads]"]),
        ({"block/attention": None}, ["`block/attention`", "None", "Leave out layers without attention"]),
        ({"block/attention": {"nested": np.ones(4, np.float32)}}, ["'block/attention' is a dict", "(4,) heads"]),
        (np.ones(4, np.float32), ["array", "'block/attention': (4,)"]),
    ],
)
@pytest.mark.parametrize("wrap", [lambda tx: tx, og.guard, lambda tx: og.accumulate(tx, 2)], ids=["", "guard", "sum"])
def test_maxima_that_do_not_fit_are_refused_at_trace_time(wrap: Any, max_logits: Any, words: list[str]) -> None:
    kind = KINDS["linen"]
    tx = wrap(optax.chain(optax.scale(1.0), og.qk_clip(layers=kind.layers)))
    with pytest.raises(ValueError, match="max_logits") as caught:
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, max_logits=max_logits), kind.params)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


# What is wrong with `layers`


def refused(params: Any, layers: Any, *words: str) -> None:
    with pytest.raises(ValueError, match="qk_clip") as caught:
        og.qk_clip(layers=layers).init(params)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_description_that_fits_nothing_or_half_lists_the_leaves_it_saw() -> None:
    params = KINDS["linen"].params
    refused(params, og.equinox_attention(4), "query_proj/weight", "block/attention/query/kernel", "scale")
    refused(params, og.linen_attention("decoder/*"), "'decoder/*'", "block/attention/query/kernel", "`AttentionLayout`")
    half = {"attention": {side: params["block"]["attention"][side] for side in ("query", "value")}}
    refused(half, og.linen_attention(), "half", "attention/key/kernel", "attention/value/kernel")
    beside = {
        "attention": {**params["block"]["attention"], "query": {"kernel": np.ones((6, 4, 4)), "lora": np.ones(3)}}
    }
    refused(beside, og.linen_attention(), "attention/query/lora", "beside")
    refused(params, (og.linen_attention(), og.nnx_attention()), "two descriptions", "'block/attention'")


def test_heads_that_do_not_fit_are_refused() -> None:
    refused(KINDS["flat"].params, flat(3), "block/attention/query/kernel", "(6, 16)", "cannot be split into (3, -1)")
    refused(KINDS["linen"].params, AttentionLayout((Projection("query/kernel", axis=3),), KEY), "has no axis 3")
    wrong = Projection("query/kernel", axis=1, part=np.s_[:, 4:])
    refused(KINDS["linen"].params, AttentionLayout((wrong,), KEY), "chooses no head")
    three = {"a": {"query": {"kernel": np.ones((2, 3, 2))}, "key": {"kernel": np.ones((2, 2, 2))}}}
    refused(three, og.linen_attention(), "3 query heads and 2 key heads")
    refused(KINDS["linen"].params, og.linen_attention(stacked=1), "differ in their first 1 axes")


KEY = (Projection("key/kernel", axis=1), Projection("key/bias", axis=0))


def flat(heads: int) -> AttentionLayout:
    sides = [(Projection(f"{side}/kernel", axis=1, split={1: (heads, -1)}),) for side in ("query", "key")]
    return AttentionLayout(*sides)


def described(**fields: Any) -> AttentionLayout:
    return AttentionLayout((Projection("query/kernel", 1)._replace(**fields),), KEY)


MALFORMED = [
    described(path=5),
    described(axis="x"),
    described(axis=None),
    described(axis=1.0),
    described(axis=True),
    described(split=3),
    described(split={"a": (1, -1)}),
    described(split={0: 2}),
    described(split={0: (2, "x")}),
    og.linen_attention()._replace(layers=None),
    og.linen_attention()._replace(layers=3),
    og.linen_attention()._replace(stacked="x"),
    og.linen_attention()._replace(rotated_query="query"),
]


@pytest.mark.parametrize(
    "layers", [None, "linen", og.linen_attention, (), AttentionLayout((), KEY), [1], *MALFORMED], ids=range(6 + 13)
)
def test_what_is_no_description_is_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match="qk_clip: `layers"):
        og.qk_clip(layers=layers)


def test_query_key_normalisation_is_refused_with_the_reason() -> None:
    def of_linen() -> Any:
        module = linen.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)
        return jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 3, 8)))["params"]

    def of_nnx() -> Any:
        return nnx.eval_shape(
            lambda: nnx.state(nnx.MultiHeadAttention(2, 8, normalize_qk=True, decode=False, rngs=nnx.Rngs(0)))
        )

    for params, layers in ((of_linen(), og.linen_attention()), (of_nnx(), og.nnx_attention())):
        with pytest.raises(ValueError, match="With query-key normalisation the weights no longer set the logits"):
            jax.eval_shape(og.qk_clip(layers=layers).init, params)


# The models themselves


def test_the_ready_descriptions_find_the_layers_of_the_libraries_themselves() -> None:
    import equinox as eqx

    from optax_guard.models import Transformer

    def found(params: Any, layers: Any) -> dict[str, Any]:
        return jax.eval_shape(og.qk_clip(layers=layers).init, params).qk_clip_max_logits

    init = linen.MultiHeadDotProductAttention(num_heads=2).init
    linen_params = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 3, 8)))
    assert found({"block_0": linen_params["params"]}, og.linen_attention())["block_0"].shape == (2,)
    attention = nnx.eval_shape(lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)))
    assert found(nnx.state(attention, nnx.Param), og.nnx_attention())[""].shape == (2,)
    model = nnx.eval_shape(lambda: Transformer(11, 8, width=8, layers=2, heads=2, rngs=nnx.Rngs(0)))
    layers = found(nnx.state(model, nnx.Param), og.transformer_attention(2))
    assert {name: x.shape for name, x in layers.items()} == {"blocks/0": (2,), "blocks/1": (2,)}
    module = eqx.filter_eval_shape(eqx.nn.MultiheadAttention, 2, 8, use_query_bias=True, key=jax.random.key(0))
    arrays = jax.tree.map(lambda x: x if hasattr(x, "shape") else None, module)
    assert found(arrays, og.equinox_attention(2))[""].shape == (2,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_16_bit_weights_are_scaled_to_the_precision_of_their_dtype(dtype: Any) -> None:
    kind = KINDS["linen"]
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), kind.params)
    tx = og.guard(optax.chain(optax.scale(1.0), og.qk_clip(1.0, layers=kind.layers)), recorder_rows=2)
    maxima = {"block/attention": jnp.full((HEADS,), 1e4, jnp.float32)}
    zero = jax.tree.map(jnp.zeros_like, params)
    step = quick_jit(lambda p: og.apply_gradients(tx, zero, tx.init(p), p, max_logits=maxima)[0])
    new = step(params)
    old, new = (np.asarray(tree["block"]["attention"]["query"]["kernel"], np.float64) for tree in (params, new))
    np.testing.assert_allclose(new, old / 100, rtol=float(jnp.finfo(dtype).eps))

"""Flax's attention layers and the reference transformer record what `max_attention_logits` finds."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from flax import nnx

import optax_guard as og
from optax_guard.flax import Optimizer, dot_product_attention, record_max_logits
from optax_guard.models import Transformer

BATCH, TIME, HEADS, WIDTH = 2, 6, 2, 8
INPUTS = np.random.default_rng(0).normal(0, 3, (BATCH, TIME, WIDTH)).astype(np.float32)
LOG_KEYS = np.log(TIME)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def oracle(params: dict[str, Any], inputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The largest logit of every head in float64."""

    def project(name: str) -> np.ndarray:
        kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        return np.einsum("btf,fhd->bthd", np.asarray(inputs, np.float64), kernel) + bias

    query, key = project("query"), project("key")
    logits = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    return np.where(mask, logits, -np.inf).max((0, 2, 3))


class Linen(nn.Module):
    attention_fn: Any

    @nn.compact
    def __call__(self, x: jax.Array, sow: bool = True) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention_fn, name="attention")
        mask = nn.make_causal_mask(x[..., 0])  # floats: Flax's own masks are
        return attention(attention(x, mask=mask, sow_weights=sow), mask=mask, sow_weights=sow)


WAYS = {"bound": dot_product_attention, "exact": record_max_logits(nn.dot_product_attention)}


@pytest.mark.parametrize("way", [pytest.param("bound", marks=pytest.mark.slow), "exact"])
def test_linen_layers_record_maxima_and_keep_their_output(way: str) -> None:
    model, stock = Linen(WAYS[way]), Linen(nn.dot_product_attention)
    params = jax.jit(model.init)(jax.random.key(0), INPUTS)["params"]

    @quick_jit
    def run(params: Any) -> Any:
        output, sown = model.apply({"params": params}, INPUTS, mutable=["intermediates"])
        silent, nothing = model.apply({"params": params}, INPUTS, False, mutable=["intermediates"])
        return output, silent, og.collect_max_logits(sown), stock.apply({"params": params}, INPUTS, False), nothing

    output, silent, maxima, expected, nothing = run(params)
    assert not jax.tree.leaves(nothing)
    np.testing.assert_array_equal(output, silent)
    if way == "exact":
        np.testing.assert_array_equal(output, expected)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    mask = np.tri(TIME, dtype=bool)
    # The second call of the shared layer reads the output of the first.
    once = nn.MultiHeadDotProductAttention(HEADS).apply(
        {"params": params["attention"]}, INPUTS, mask=jnp.asarray(mask[None, None])
    )
    exact = np.maximum(*(oracle(params["attention"], np.asarray(x), mask) for x in (INPUTS, once)))
    above = np.asarray(maxima["attention"], np.float64) - exact
    assert maxima.keys() == {"attention"}
    assert np.all(above >= -1e-5 * np.abs(exact))
    assert np.all(above <= (LOG_KEYS if way == "bound" else 0) + 1e-5 * np.abs(exact))


@pytest.mark.parametrize("way", ["bound", pytest.param("exact", marks=pytest.mark.slow)])
def test_nnx_layers_record_grouped_heads_with_dropout_and_inside_a_gradient(way: str) -> None:
    attention_fn = dot_product_attention if way == "bound" else record_max_logits(nnx.dot_product_attention)
    rate = 0.0 if way == "bound" else 0.5
    options = {"decode": False, "dropout_rate": rate, "rngs": nnx.Rngs(0), "attention_fn": attention_fn}
    layer = nnx.MultiHeadAttention(2 * HEADS, WIDTH, 2 * WIDTH, **options)

    @nnx.jit
    def step(layer: Any) -> Any:
        def loss_fn(layer: Any) -> Any:
            def forward(layer: Any) -> jax.Array:
                return layer(jnp.asarray(INPUTS), is_causal=True, sow_weights=True, deterministic=rate == 0)

            output, sown = nnx.capture(forward, nnx.Intermediate)(layer)
            return jnp.mean(output**2), og.collect_max_logits({"encoder": sown})

        return nnx.value_and_grad(loss_fn, has_aux=True)(layer)

    (_, maxima), grads = step(layer)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(layer, nnx.Param))
    params = {name: {k: getattr(getattr(layer, name), k)[...] for k in ("kernel", "bias")} for name in ("query", "key")}
    exact = oracle(params, INPUTS, np.tri(TIME, dtype=bool))
    above = np.asarray(maxima["encoder"], np.float64) - exact
    assert np.all(above >= -1e-5 * np.abs(exact))
    assert np.all(above <= (LOG_KEYS if way == "bound" else 0) + 1e-5 * np.abs(exact))


def test_the_drop_in_takes_any_leading_axes() -> None:
    query = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, TIME, HEADS, 4)), jnp.float32)
    mask = jnp.asarray(np.tri(TIME))[None, None]
    every = quick_jit(lambda *arrays: [dot_product_attention(x, x, x, mask=mask) for x in arrays])
    deep, flat, alone = every(query, query[1], query[1, 1])
    np.testing.assert_allclose(deep[1], flat, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat[1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout_rate": 0.1}, "`dropout_rate`. is not possible"),
        ({"precision": "highest"}, "`precision` is not possible"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "`qk_attn_weights_einsum`. is not possible"),
    ],
)
def test_what_the_fused_function_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    query = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match=rf"{message}.*record_max_logits"):
        dot_product_attention(query, query, query, **arguments)
    with pytest.raises(ValueError, match="`attention_fn` must be a function"):
        record_max_logits("attention")


def test_the_reference_transformer_sows_only_when_asked() -> None:
    model = Transformer(7, TIME, width=WIDTH, layers=2, heads=HEADS, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(7, size=(BATCH, TIME)))
    before = jax.tree.structure(nnx.state(model))

    @nnx.jit
    def run(model: Any) -> Any:
        hidden, seen = model.tokens(tokens) + model.positions(jnp.arange(TIME)[None]), []
        for block in model.blocks:
            seen.append(block.queries_and_keys(block.attention_norm(hidden)))
            hidden = block(hidden)
        _, sown = nnx.capture(lambda model: model(tokens, sow_max_logits=True), nnx.Intermediate)(model)
        return seen, og.collect_max_logits(sown)

    seen, maxima = run(model)
    assert maxima.keys() == {"blocks/0", "blocks/1"}
    for layer, (query, key) in zip(maxima.values(), seen, strict=True):
        logits = np.einsum("bthd,bshd->bhts", *(np.asarray(x, np.float64) for x in (query, key))) / 2
        expected = np.where(np.tri(TIME, dtype=bool), logits, -np.inf).max((0, 2, 3))
        np.testing.assert_allclose(layer, expected, rtol=1e-5)
    assert jax.tree.structure(nnx.state(model)) == before


def test_qk_clip_steps_in_an_nnx_optimizer_with_what_the_transformer_sows() -> None:
    model = Transformer(7, TIME, width=WIDTH, layers=1, heads=HEADS, rngs=nnx.Rngs(0))
    query = model.blocks[0].query.kernel
    query[...] = 300 * query[...]
    tx = og.guard(optax.chain(optax.sgd(0.0), og.qk_clip(1.0, layers=og.attention.transformer_attention(HEADS))))
    optimizer, tokens = Optimizer(model, tx, wrt=nnx.Param), jnp.zeros((1, TIME), jnp.int32)

    def forward(model: Any) -> jax.Array:
        return jnp.mean(model(tokens, sow_max_logits=True) ** 2)

    def loss_fn(model: Any) -> Any:
        loss, sown = nnx.capture(forward, nnx.Intermediate)(model)
        return loss, og.collect_max_logits(sown)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        (loss, max_logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads, value=loss, max_logits=max_logits)
        return max_logits["blocks/0"]

    before, after = step(model, optimizer), step(model, optimizer)
    assert np.all(before > 1)
    np.testing.assert_allclose(after, 1, rtol=1e-3)

"""Attention outside Flax: Equinox as docs/attention/index.md shows it, and arrays that are split over devices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_guard as og

BATCH, TIME, HEADS, WIDTH = 8, 6, 2, 8
INPUTS = np.random.default_rng(0).normal(0, 9, (BATCH, TIME, WIDTH)).astype(np.float32)


class Model(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For one sequence, [time, features]."""
        layer = self.attention
        projections = layer.query_proj, layer.key_proj, layer.value_proj
        query, key, value = (jax.vmap(project)(x).reshape(len(x), layer.num_heads, -1) for project in projections)
        mixed, maxima = og.attention_with_max_logits(query, key, value, is_causal=True, exact=True)
        return jax.vmap(layer.output_proj)(mixed.reshape(len(x), -1)), maxima


@pytest.mark.usefixtures("standard_promotion")
def test_equinox_returns_maxima_that_qk_clip_takes() -> None:
    model = Model(eqx.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0)))
    layers = og.attention.equinox_attention(HEADS)
    tx = og.guard(optax.chain(optax.sgd(0.0), og.qk_clip(1.0, layers=layers)))
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    @quick_jit
    def step(params: Any, state: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            outputs, maxima = jax.vmap(eqx.combine(params, rest))(jnp.asarray(INPUTS))
            return jnp.mean(outputs**2), {"attention": maxima.max(axis=0)}

        (loss, max_logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return *og.apply_gradients(tx, grads, state, params, value=loss, max_logits=max_logits), max_logits["attention"]

    params, state, before = step(params, tx.init(params))
    *_, after = step(params, state)
    query, key = (
        np.einsum("btf,of->bto", INPUTS, np.asarray(getattr(model.attention, f"{side}_proj").weight, np.float64))
        for side in ("query", "key")
    )
    query, key = (x.reshape(BATCH, TIME, HEADS, -1) for x in (query, key))
    logits = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(WIDTH // HEADS)
    expected = np.where(np.tri(TIME, dtype=bool), logits, -np.inf).max((0, 2, 3))
    np.testing.assert_allclose(before, expected, rtol=1e-5)
    assert np.all(before > 1)
    np.testing.assert_allclose(after, 1, rtol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [pytest.param(PartitionSpec("x"), marks=pytest.mark.slow), PartitionSpec(None, None, "x")]
)
def test_batches_and_heads_may_be_split_over_devices(kind: AxisType, spec: PartitionSpec) -> None:
    query = np.random.default_rng(1).normal(size=(BATCH, TIME, 8, 4)).astype(np.float32)
    expected = og.max_attention_logits(query, query, is_causal=True, block_size=4)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        split = jax.device_put(query, NamedSharding(mesh, spec))
        found = quick_jit(lambda q: og.max_attention_logits(q, q, is_causal=True, block_size=4))(split)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

"""Gradients of micro-batches inside one call equal that of the batch, with one all-reduce, none of it in the loop."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og

RNG = np.random.default_rng(0)
PARAMS = {"table": RNG.normal(size=(5, 4)).astype(np.float32), "kernel": RNG.normal(size=(4, 3)).astype(np.float32)}
TOKENS = RNG.integers(0, 5, (48, 6))
MASK = (np.arange(6) < RNG.integers(0, 7, (48, 1))).astype(np.float32)  # rows of 0 to 6 tokens
BATCH = {"tokens": TOKENS, "mask": MASK}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean over the tokens that the mask leaves: NaN (0 / 0) if it leaves none."""
    logits = jnp.tanh(params["table"][batch["tokens"]]) @ params["kernel"]
    losses = jnp.sum(logits**2, axis=-1) * batch["mask"]
    return jnp.sum(losses) / jnp.sum(batch["mask"])


def tokens(batch: Any) -> jax.Array:
    return jnp.sum(batch["mask"])


def oracle(batch: Any = BATCH) -> tuple[Any, Any]:
    """NumPy float64, by hand."""
    table, kernel = (PARAMS[n].astype(np.float64) for n in ("table", "kernel"))
    hidden = np.tanh(table[batch["tokens"]])
    mask = batch["mask"].astype(np.float64)[..., None]
    logits = hidden @ kernel
    total = mask.sum()
    d_logits = 2 * logits * mask / total
    d_hidden = (d_logits @ kernel.T) * (1 - hidden**2)
    d_table = np.zeros_like(table)
    np.add.at(d_table, batch["tokens"], d_hidden)
    d_kernel = np.einsum("bti,btj->ij", hidden, d_logits)
    return (logits**2 * mask).sum() / total, {"table": d_table, "kernel": d_kernel}


def assert_equal(got: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), jax.device_get(got), expected)


@pytest.mark.parametrize("n", [1, 4, 48])
def test_token_weighted_micro_batches_equal_the_batch(n: int) -> None:
    """With 48 micro-batches of one row, some hold no token: their 0 / 0 is selected away."""
    assert_equal(quick_jit(og.accumulate_gradients(loss_fn, n, weight_fn=tokens))(PARAMS, BATCH), oracle())


def test_equal_weights_are_the_mean_of_the_means() -> None:
    def mean(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.tanh(params["table"][batch]) @ params["kernel"])

    assert_equal(og.accumulate_gradients(mean, 4)(PARAMS, TOKENS), jax.value_and_grad(mean)(PARAMS, TOKENS))


def test_padding_counts_for_nothing_and_a_remainder_is_an_error_by_default() -> None:
    part = jax.tree.map(lambda x: x[:45], BATCH)
    padded = og.accumulate_gradients(loss_fn, 4, weight_fn=tokens, remainder="pad")
    assert_equal(quick_jit(padded)(PARAMS, part), oracle(part))
    with pytest.raises(ValueError, match='45 rows are not divisible into 4 micro-batches; remainder="pad"'):
        og.accumulate_gradients(loss_fn, 4, weight_fn=tokens)(PARAMS, part)
    with pytest.raises(ValueError, match="remainder='pad' needs a `weight_fn`"):
        og.accumulate_gradients(loss_fn, 4, remainder="pad")


def test_aux_is_stacked_and_keys_are_those_of_the_loop_index() -> None:
    def noisy(params: Any, batch: Any, scale: Any, key: Any) -> Any:
        noise = jax.random.normal(key, ())
        return scale * noise * jnp.sum(params["kernel"]), {"noise": noise, "first": batch[0, 0]}

    key = jax.random.key(3)
    (value, aux), grads = og.accumulate_gradients(noisy, 4, has_aux=True)(PARAMS, TOKENS, 2.0, key=key)
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), ()) for i in range(4)])
    np.testing.assert_allclose(aux["noise"], drawn, rtol=1e-6)
    np.testing.assert_array_equal(aux["first"], TOKENS[:4, 0])  # micro-batch i starts at row i
    np.testing.assert_allclose(grads["kernel"], np.full((4, 3), 2 * drawn.mean()), rtol=1e-6)
    np.testing.assert_allclose(value, 2 * drawn.mean() * PARAMS["kernel"].sum(), rtol=1e-5)


def test_256_bfloat16_gradients_do_not_stall() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(w * jnp.mean(x, axis=0))

    x = jnp.full((256, 4), 1.0078125, jnp.bfloat16)
    _, grads = og.accumulate_gradients(loss, 256)(jnp.ones(4, jnp.bfloat16), x)
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads.astype(jnp.float32), 1.0078125)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_a_bad_weight_gives_a_gradient_that_guard_holds(weight: float) -> None:
    value, grads = og.accumulate_gradients(loss_fn, 4, weight_fn=lambda _: jnp.float32(weight))(PARAMS, BATCH)
    assert np.isnan(value)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(grads))


def test_a_batch_of_padding_gives_zero() -> None:
    empty = {**BATCH, "mask": np.zeros_like(MASK)}
    value, grads = og.accumulate_gradients(loss_fn, 4, weight_fn=tokens)(PARAMS, empty)
    assert float(value) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(grads))


def sharded(kind: AxisType) -> tuple[Any, Any, Any]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    return mesh, jax.device_put(PARAMS, NamedSharding(mesh, P())), jax.device_put(BATCH, NamedSharding(mesh, P("data")))


def all_reduces(program: str) -> list[str]:
    return re.findall(r"^.* all-reduce(?:-start)?\(.*$", program, re.MULTILINE)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "automatic"])
@pytest.mark.parametrize("n", [2, 6])
def test_under_jit_one_all_reduce_a_step_whatever_the_number_of_micro_batches(kind: AxisType, n: int) -> None:
    mesh, params, batch = sharded(kind)
    with jax.set_mesh(mesh):
        step = jax.jit(og.accumulate_gradients(loss_fn, n, weight_fn=tokens, axis_name="data"))
        compiled = step.lower(params, batch).compile()
        assert_equal(compiled(params, batch), oracle())
    program = compiled.as_text()
    (line,) = all_reduces(program)
    assert "while/body" not in line
    assert line.count("f32[5,4]") == line.count("f32[4,3]") == 1  # one for the whole tree, loss and weights included
    assert "all-gather" not in program


def test_in_shard_map_one_all_reduce_and_with_mesh_given() -> None:
    mesh, params, batch = sharded(AxisType.Auto)
    function = og.accumulate_gradients(loss_fn, 3, weight_fn=tokens, axis_name="data")
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    compiled = mapped.lower(params, batch).compile()
    assert_equal(compiled(params, batch), oracle())
    assert len(all_reduces(compiled.as_text())) == 1
    given = og.accumulate_gradients(loss_fn, 3, weight_fn=tokens, axis_name="data", mesh=mesh)
    assert_equal(quick_jit(given)(params, batch), oracle())


def test_without_axis_name_jit_places_the_communication_and_the_result_is_the_same() -> None:
    _, params, batch = sharded(AxisType.Auto)
    assert_equal(quick_jit(og.accumulate_gradients(loss_fn, 3, weight_fn=tokens))(params, batch), oracle())


@pytest.mark.parametrize(
    ("batch", "n", "message"),
    [
        (
            {"tokens": TOKENS, "mask": MASK[:9]},
            3,
            "the leading axes of `batch` differ: `mask` has 9 examples, `tokens` has 48",
        ),
        (BATCH, 49, "`num_micro_batches` must be at most the rows per device; got 49 for 48 rows"),
        ({**BATCH, "scale": np.float32(1)}, 3, "leaf `scale` of `batch` is a single number"),
        ({}, 3, "`batch` has no arrays"),
        ({**BATCH, "name": "x"}, 3, "leaf `name` is not an array"),
    ],
)
def test_wrong_batches_are_named(batch: Any, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"accumulate_gradients: .*{message}"):
        og.accumulate_gradients(loss_fn, n)(PARAMS, batch)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`num_micro_batches` must be a whole number >= 1; got 0"):
        og.accumulate_gradients(loss_fn, 0)
    with pytest.raises(ValueError, match="`remainder` must be one of 'error', 'pad'; got 'drop'"):
        og.accumulate_gradients(loss_fn, 2, remainder="drop")
    with pytest.raises(ValueError, match=r"`weight_fn` must return a real scalar; got float32\[16, 6\]"):
        og.accumulate_gradients(loss_fn, 3, weight_fn=lambda b: b["mask"])(PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"`params` must be floating-point.*leaf `n/0` is int32\[2\]"):
        og.accumulate_gradients(loss_fn, 3)({**PARAMS, "n": [jnp.arange(2)]}, BATCH)


def test_an_axis_of_no_mesh_is_jax_error_with_a_sentence() -> None:
    with pytest.raises(NameError, match=r"unbound axis name: nowhere\. `axis_name` of accumulate_gradients must be"):
        og.accumulate_gradients(loss_fn, 3, axis_name="nowhere")(PARAMS, BATCH)
    with pytest.raises(NameError, match="unbound axis name") as caught:
        og.global_norm(PARAMS, axis_name="nowhere")
    notes = "\n".join(caught.value.__notes__)  # one is JAX's own, on its traceback
    assert "`axis_name='nowhere'` must name an axis of an enclosing jax.shard_map" in notes

"""The reference models: shapes and dtypes, NumPy oracles, and that each switch does what its docstring says."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_guard.models import GRU, MLP, RNN, ConvNet, Transformer

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Flax itself does not work under the strict one

wrong: Any = partial  # Any, because the arguments given to it are of the wrong type on purpose
SMALL = partial(Transformer, 7, 5, width=8, layers=2, heads=2)

# name -> (constructor, inputs, output shape, a few parameter shapes by path)
MODELS: dict[str, tuple[Callable[..., nnx.Module], np.ndarray, tuple[int, ...], dict[tuple, tuple[int, ...]]]] = {
    "MLP": (
        partial(MLP, (3, 4, 2)),
        np.ones((5, 3), np.float32),
        (5, 2),
        {("layers", 0, "kernel"): (3, 4), ("layers", 1, "kernel"): (4, 2), ("layers", 1, "bias"): (2,)},
    ),
    "ConvNet": (
        partial(ConvNet, 5, in_channels=2, channels=(3, 4)),
        np.ones((2, 5, 6, 2), np.float32),
        (2, 5),
        {("stages", 0, "kernel"): (3, 3, 2, 3), ("stages", 1, "kernel"): (3, 3, 3, 4), ("head", "kernel"): (4, 5)},
    ),
    "RNN": (
        partial(RNN, 2, 4, 3),
        np.ones((5, 6, 2), np.float32),
        (5, 3),
        {("drive", "kernel"): (2, 4), ("recurrent",): (4, 4), ("head", "kernel"): (4, 3)},
    ),
    "GRU": (
        partial(GRU, 2, 4, 3),
        np.ones((5, 6, 2), np.float32),
        (5, 3),
        {("drive", "kernel"): (2, 12), ("recurrent",): (4, 12), ("head", "kernel"): (4, 3)},
    ),
    "Transformer": (
        partial(SMALL, query_key_norm=True),
        np.arange(10, dtype=np.int32).reshape(2, 5) % 7,
        (2, 5, 7),
        {
            ("tokens", "embedding"): (7, 8),
            ("positions", "embedding"): (5, 8),
            ("blocks", 0, "query", "kernel"): (8, 8),
            ("blocks", 1, "expand", "kernel"): (8, 32),
            ("blocks", 1, "query_norm", "scale"): (4,),
            ("head", "kernel"): (8, 7),
        },
    ),
}
PRECISIONS = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "mixed": (jnp.bfloat16, jnp.float32),
}


def split(model: nnx.Module) -> tuple[Any, dict]:
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def loss_and_logits(graph: Any, params: dict, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = nnx.merge(graph, nnx.State(params))(inputs)
    return jnp.mean(optax.log_cosh(logits.astype(jnp.float32))), logits


def arrays(model: nnx.Module) -> dict:
    """The parameters in float64 NumPy, for the oracles."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_dtypes(name: str, precision: str) -> None:
    build, inputs, shape, expected = MODELS[name]
    dtype, param_dtype = PRECISIONS[precision]
    graph, params = split(build(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    flat = nnx.traversals.flatten_mapping(params)
    assert {path: flat[path].shape for path in expected} == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}

    step = jax.value_and_grad(partial(loss_and_logits, graph), has_aux=True)
    if precision == "mixed":  # its arithmetic is that of bfloat16: the types are enough, without a compilation
        (_, logits), gradients = jax.eval_shape(step, params, inputs)
    else:
        (loss, logits), gradients = jax.jit(step)(params, inputs)
        assert jnp.isfinite(loss)
        chex.assert_tree_all_finite(gradients)
        assert all(
            jnp.any(leaf != 0) for path, leaf in nnx.traversals.flatten_mapping(gradients).items() if "kernel" in path
        )
    chex.assert_shape(logits, shape)
    assert logits.dtype == dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)


@pytest.mark.parametrize(("depth", "scale"), [(6, 0.5), (6, 2.0)])
def test_mlp_multiplies_the_signal_by_init_scale_per_layer(depth: int, scale: float) -> None:
    # relu is positively homogeneous and the biases are zero, so the factor is exact up to rounding.
    sizes = (4,) + (16,) * (depth - 1) + (2,)
    inputs = noise(3, 4)
    plain, scaled = (MLP(sizes, init_scale=s, rngs=nnx.Rngs(0))(inputs) for s in (1.0, scale))
    np.testing.assert_allclose(scaled, plain * scale**depth, rtol=1e-5)


def test_mlp_is_the_numpy_net() -> None:
    model = MLP((3, 8, 8, 2), activation=jnp.tanh, rngs=nnx.Rngs(0))
    inputs = noise(4, 3)
    layers = arrays(model)["layers"]
    hidden = inputs.astype(np.float64)
    for i in range(3):
        hidden = hidden @ layers[i]["kernel"] + layers[i]["bias"]
        hidden = np.tanh(hidden) if i < 2 else hidden
    np.testing.assert_allclose(model(inputs), hidden, rtol=1e-5, atol=1e-6)


def test_rnn_is_the_numpy_loop() -> None:
    model = RNN(2, 4, 3, gain=1.3, rngs=nnx.Rngs(0))
    model.drive.bias = nnx.Param(jnp.arange(4.0) / 4)
    inputs, p = noise(5, 6, 2), arrays(model)
    state = np.zeros((5, 4))
    for t in range(6):
        state = np.tanh(inputs[:, t] @ p["drive"]["kernel"] + p["drive"]["bias"] + state @ p["recurrent"])
    np.testing.assert_allclose(model(inputs), state @ p["head"]["kernel"] + p["head"]["bias"], rtol=1e-5, atol=1e-6)


def test_gru_is_the_numpy_loop() -> None:
    model = GRU(2, 4, 3, gain=1.3, rngs=nnx.Rngs(0))
    model.drive.bias = nnx.Param(jnp.arange(12.0) / 12)
    inputs, p = noise(5, 6, 2), arrays(model)
    w, u, b = (np.split(x, 3, axis=-1) for x in (p["drive"]["kernel"], p["recurrent"], p["drive"]["bias"]))
    state = np.zeros((5, 4))
    for t in range(6):
        x = inputs[:, t]
        r = 1 / (1 + np.exp(-(x @ w[0] + b[0] + state @ u[0])))
        z = 1 / (1 + np.exp(-(x @ w[1] + b[1] + state @ u[1])))
        n = np.tanh(x @ w[2] + b[2] + r * (state @ u[2]))
        state = (1 - z) * n + z * state
    np.testing.assert_allclose(model(inputs), state @ p["head"]["kernel"] + p["head"]["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "kernels"), [(RNN, 1), (GRU, 3)])
def test_recurrent_kernels_are_orthogonal_times_gain(model: type[RNN], kernels: int) -> None:
    blocks = np.split(arrays(model(2, 6, 3, gain=1.5, rngs=nnx.Rngs(0)))["recurrent"], kernels, axis=1)
    for block in blocks:
        np.testing.assert_allclose(np.linalg.svd(block, compute_uv=False), 1.5, rtol=1e-5)


def test_rnn_gradient_grows_with_time_above_gain_one_and_shrinks_below() -> None:
    def norms(gain: float) -> list[float]:
        graph, params = split(RNN(2, 8, 1, gain=gain, input_scale=1e-3, rngs=nnx.Rngs(0)))
        per_input = jax.jit(jax.grad(lambda x: jnp.sum(nnx.merge(graph, nnx.State(params))(x))))
        at_each_time = np.linalg.norm(per_input(noise(1, 16, 2))[0], axis=-1)
        return list(at_each_time[[15, 8, 0]])  # the input 1, 8 and 16 steps before the end

    last, middle, first = norms(1.3)
    assert 4 * last < 2 * middle < first
    last, middle, first = norms(0.7)
    assert last > 4 * middle > 16 * first


def test_convnet_has_the_shape_of_any_image() -> None:
    model = ConvNet(5, in_channels=2, channels=(3, 4), rngs=nnx.Rngs(0))
    for height, width in [(1, 1), (5, 8)]:
        logits = jax.eval_shape(lambda images: model(images), jax.ShapeDtypeStruct((2, height, width, 2), jnp.float32))
        chex.assert_shape(logits, (2, 5))


def test_transformer_is_causal() -> None:
    model = SMALL(rngs=nnx.Rngs(0))
    tokens = jnp.array([[0, 1, 2, 3, 4]])
    before, after = model(tokens), model(tokens.at[0, 3].set(6))
    chex.assert_trees_all_equal(before[:, :3], after[:, :3])
    assert jnp.all(jnp.any(before[:, 3:] != after[:, 3:], axis=-1))


def attention_logits(model: Transformer, hidden: jax.Array) -> jax.Array:
    query, key = model.blocks[0].queries_and_keys(hidden)
    return jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])


def test_query_key_norm_bounds_the_attention_logits() -> None:
    free, normed = (SMALL(init="explosive", query_key_norm=on, rngs=nnx.Rngs(0)) for on in (False, True))
    hidden = 100 * noise(2, 5, 8)
    bound = np.sqrt(8 / 2)
    assert np.max(np.abs(attention_logits(normed, hidden))) <= bound * (1 + 1e-5)
    assert np.max(np.abs(attention_logits(free, hidden))) > 100 * bound

    extra = set(nnx.traversals.flatten_mapping(split(normed)[1])) - set(nnx.traversals.flatten_mapping(split(free)[1]))
    assert extra == {("blocks", i, f"{part}_norm", "scale") for i in range(2) for part in ("query", "key")}


def test_residual_scaling_divides_the_output_projections() -> None:
    scaled, plain = (arrays(SMALL(residual_scaling=on, rngs=nnx.Rngs(0))) for on in (True, False))
    for layer in range(2):
        for part in ("output", "contract"):
            got, kernel = scaled["blocks"][layer][part]["kernel"], plain["blocks"][layer][part]["kernel"]
            np.testing.assert_allclose(got * np.sqrt(2 * 2), kernel, rtol=1e-5)
        chex.assert_trees_all_equal(scaled["blocks"][layer]["query"], plain["blocks"][layer]["query"])


def test_initial_standard_deviations() -> None:
    wide = partial(Transformer, 200, 5, width=64, layers=1, heads=2, residual_scaling=False)
    small = np.sqrt(2 / (5 * 64))
    for init, inside, embedding in [("calm", small, 1.0), ("explosive", 4 * small, small)]:
        p = arrays(wide(init=init, rngs=nnx.Rngs(0)))
        for part in ("query", "output", "expand", "contract"):
            np.testing.assert_allclose(np.std(p["blocks"][0][part]["kernel"]), inside, rtol=0.05)
        np.testing.assert_allclose(np.std(p["head"]["kernel"]), small, rtol=0.05)
        np.testing.assert_allclose(
            np.std(p["tokens"]["embedding"][:, None] + p["positions"]["embedding"]), embedding, rtol=0.1
        )


def test_explosive_gradient_is_larger_than_calm() -> None:
    deep = partial(Transformer, 20, 16, width=32, layers=4)
    tokens = np.random.default_rng(0).integers(0, 20, (4, 16))
    graph, calm = split(deep(rngs=nnx.Rngs(0)))
    _, explosive = split(deep(init="explosive", rngs=nnx.Rngs(0)))

    @jax.jit
    def norm(params: dict) -> jax.Array:
        def loss(params: dict) -> jax.Array:
            logits = nnx.merge(graph, nnx.State(params))(tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        return optax.tree.norm(jax.grad(loss)(params))

    assert norm(explosive) > 2 * norm(calm)


def test_a_token_beyond_the_vocabulary_makes_its_sequence_nan() -> None:
    # Also the logits before it: attention gives the masked value a weight of zero, and 0 * NaN is NaN.
    logits = SMALL(rngs=nnx.Rngs(0))(jnp.array([[1, 7], [1, 6]]))
    assert np.all(np.isnan(logits[0]))
    assert np.all(np.isfinite(logits[1]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (wrong(MLP, (3,)), r"MLP: `sizes` must be a sequence of 2 or more whole numbers >= 1; got \(3,\)"),
        (wrong(MLP, (3, 0)), r"MLP: `sizes\[1\]` must be a whole number >= 1; got 0"),
        (wrong(MLP, (3, 2), activation="relu"), "MLP: `activation` must be a function of an array; got 'relu'"),
        (wrong(MLP, (3, 2), init_scale=0.0), r"MLP: `init_scale` must be a number in \(0, 1e\+18\]; got 0.0"),
        (wrong(MLP, (3, 2), init_scale=float("nan")), r"MLP: `init_scale` must be a number in \(0, 1e\+18\]; got nan"),
        (wrong(MLP, (3, 2), dtype=jnp.int32), "MLP: `dtype` must be a floating-point dtype"),
        (wrong(MLP, (3, 2), dtype=None), "MLP: `dtype` must be a floating-point dtype; got None"),
        (wrong(MLP, (3, 2), dtype="big"), "MLP: `dtype` must be a floating-point dtype; got 'big'"),
        (wrong(ConvNet, True), "ConvNet: `num_classes` must be a whole number >= 1; got True"),
        (wrong(ConvNet, 2, channels=()), "ConvNet: `channels` must be a sequence of 1 or more"),
        (
            wrong(ConvNet, 2, channels=4),
            "ConvNet: `channels` must be a sequence of 1 or more whole numbers >= 1; got 4",
        ),
        (wrong(ConvNet, 2, channels="34"), r"ConvNet: `channels\[0\]` must be a whole number >= 1; got '3'"),
        (wrong(RNN, 2, 0, 3), "RNN: `hidden_features` must be a whole number >= 1; got 0"),
        (wrong(RNN, 2, 4, 3, gain=-1.0), r"RNN: `gain` must be a number in \(0, 1e\+18\]; got -1.0"),
        (wrong(RNN, 2, 4, 3, activation=None), "RNN: `activation` must be a function of an array; got None"),
        (wrong(GRU, 2, 4, 3, input_scale=np.inf), r"GRU: `input_scale` must be a number in \(0, 1e\+18\]; got inf"),
        (wrong(GRU, 2, 4, 3, param_dtype=int), "GRU: `param_dtype` must be a floating-point dtype"),
        (wrong(Transformer, 1, 5), "Transformer: `vocab_size` must be a whole number >= 2; got 1"),
        (wrong(Transformer, 7, 5.0), "Transformer: `max_length` must be a whole number >= 1; got 5.0"),
        (wrong(SMALL, heads=3), "Transformer: `width` must be a multiple of `heads` = 3; got 8"),
        (wrong(SMALL, query_key_norm=1), "Transformer: `query_key_norm` must be True or False; got 1"),
        (wrong(SMALL, residual_scaling=None), "Transformer: `residual_scaling` must be True or False; got None"),
        (wrong(SMALL, init="cold"), "Transformer: `init` must be one of 'calm', 'explosive'; got 'cold'"),
    ],
)
def test_wrong_arguments_raise(build: Callable[..., nnx.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("MLP", jnp.ones((5, 4)), r"MLP: `inputs` must be an array \[..., 3\]; got float32\[5, 4\]"),
        ("ConvNet", jnp.ones((5, 6, 2)), r"ConvNet: `images` must be an array \[_, _, _, 2\]"),
        ("RNN", jnp.ones((5, 2)), r"RNN: `inputs` must be an array \[_, _, 2\]"),
        ("GRU", jnp.ones((5, 6, 3)), r"GRU: `inputs` must be an array \[_, _, 2\]"),
        ("Transformer", jnp.zeros((2, 6), int), r"Transformer: `tokens` must be integers \[batch, time <= 5\]"),
        ("Transformer", jnp.zeros((2, 5)), r"Transformer: `tokens` must be integers"),
    ],
)
def test_wrong_inputs_raise(name: str, inputs: jax.Array, message: str) -> None:
    model = MODELS[name][0](rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        model(inputs)


def test_without_flax_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "optax_guard.models")
    with pytest.raises(ImportError, match=r"pip install flax"):
        importlib.import_module("optax_guard.models")

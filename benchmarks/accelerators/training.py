"""A whole training step on one chip: loss and gradient of the reference transformer, and the optimizer's step."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks.accelerators.chips import compiled
from benchmarks.accelerators.measure import Measured, counted
from benchmarks.accelerators.ordinary import taken
from benchmarks.accelerators.steps import Step, fast_with_value, plain

__all__ = ["TRAINED", "TRAINING", "training_row"]

PyTree = Any
TRAINED = "a training step, bare `optax.adamw`"
VOCABULARY, CONTEXT, WIDTH, LAYERS, BATCH = 1024, 256, 1024, 2, 16  # 27 M parameters, 4096 tokens


def _clip() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


TRAINING = (
    Step(TRAINED, lambda: optax.adamw(1e-3), plain),
    Step("a training step, `optax.chain(clip, adamw)`", _clip, plain),
    Step(
        "a training step, `optax.apply_if_finite(chain(clip, adamw))`", lambda: optax.apply_if_finite(_clip(), 5), plain
    ),
    Step(
        "a training step, `guard(adamw, clip)`",
        lambda: og.guard(optax.adamw(1e-3), og.clip_by_global_norm(1.0)),
        fast_with_value,
    ),
    Step("a training step, `stabilize(adamw)`", lambda: og.stabilize(optax.adamw(1e-3)), fast_with_value),
)


def training_row(step: Step, chip: Any) -> Measured:
    """Compiles loss, gradient and step in one program. Bytes are over those of the parameters, as everywhere."""
    params, loss_fn = _transformer()
    tx = step.tx()
    take = step.take(tx)

    def train(params: PyTree, state: PyTree, tokens: jax.Array) -> tuple[PyTree, PyTree]:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        return take(params, state, grads, loss)

    tokens = jax.ShapeDtypeStruct((BATCH, CONTEXT + 1), jnp.int32)
    start = time.perf_counter()
    program = compiled(train, (params, jax.eval_shape(tx.init, params), tokens), chip)
    seconds = time.perf_counter() - start
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return counted(step.name, program, taken(step, chip.platform), size, seconds)


def _transformer() -> tuple[PyTree, Callable[[PyTree, jax.Array], jax.Array]]:
    """The shapes of its parameters, and its loss."""
    from flax import nnx

    from optax_guard.models import Transformer

    def made() -> Transformer:
        return Transformer(VOCABULARY, CONTEXT, width=WIDTH, layers=LAYERS, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    graph, variables = nnx.split(nnx.eval_shape(made))
    shapes = nnx.to_pure_dict(variables)

    def loss_fn(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(tokens[:, :-1])
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return shapes, loss_fn

"""The guard's share of a real training step: loss, gradient and step of the reference transformer, in one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks.performance.measure import Row, compare, say, take_turns

__all__ = ["training_rows"]

PyTree = Any
_VOCABULARY, _CONTEXT = 96, 128


def training_rows(width: int, layers: int, batches: tuple[int, ...], rounds: int) -> list[Row]:
    """One row per batch size: the more tokens a step has, the less the optimizer matters."""
    try:
        from flax import nnx

        from optax_guard.models import Transformer
    except ImportError as error:
        say(f"left out: {error}")
        return []
    model = Transformer(_VOCABULARY, _CONTEXT, width=width, layers=layers, rngs=nnx.Rngs(0))
    graph, variables = nnx.split(model)
    start = nnx.to_pure_dict(variables)

    def loss_fn(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    txs = {
        "bare": adamw,
        "guarded": og.guard(adamw, og.clip_by_global_norm(1.0), og.skip_nonfinite()),
        "stabilize": og.stabilize(adamw),
        "unbounded": og.stabilize(adamw, max_change=None),
        "apply_if_finite": optax.apply_if_finite(clipped, 5),
    }
    size = sum(x.size for x in jax.tree.leaves(start)) / 1e6
    rows = []
    for batch in batches:
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(_VOCABULARY, size=(batch, _CONTEXT + 1)), jnp.int32)
        turns = {name: _training(tx, loss_fn, start, tokens) for name, tx in txs.items()}
        turns["gradient"] = _gradient(loss_fn, start, tokens)
        say(f"compiled a training step with {batch * _CONTEXT} tokens")
        t = take_turns(turns, rounds)
        what = f"a training step, {size:.1f} M parameters, {batch * _CONTEXT} tokens:"
        rows += [
            compare("training", f"{what} guarded over bare `optax.adamw`", t["guarded"], t["bare"]),
            compare("training", f"{what} `stabilize(adamw)` over bare", t["stabilize"], t["bare"]),
            compare("training", f"{what} `stabilize(adamw, max_change=None)` over bare", t["unbounded"], t["bare"]),
            compare(
                "training",
                f"{what} `optax.apply_if_finite(chain(clip, adamw))` over bare",
                t["apply_if_finite"],
                t["bare"],
            ),
            compare("training", f"{what} bare over loss and gradient alone", t["bare"], t["gradient"]),
        ]
    return rows


def _training(tx: Any, loss_fn: Callable[..., jax.Array], start: PyTree, tokens: jax.Array) -> Callable[[], Any]:
    """A turn is one whole step."""

    def step(params: PyTree, state: PyTree, tokens: jax.Array) -> tuple[PyTree, PyTree]:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        return og.apply_gradients(tx, grads, state, params, value=loss)

    live = [jax.tree.map(jnp.copy, start)]
    live.append(jax.tree.map(jnp.copy, tx.init(live[0])))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*live, tokens).compile()

    def turn() -> None:
        live[:] = compiled(*live, tokens)
        jax.block_until_ready(live)

    return turn


def _gradient(loss_fn: Callable[..., jax.Array], params: PyTree, tokens: jax.Array) -> Callable[[], Any]:
    compiled = jax.jit(jax.value_and_grad(loss_fn)).lower(params, tokens).compile()

    return lambda: jax.block_until_ready(compiled(params, tokens))

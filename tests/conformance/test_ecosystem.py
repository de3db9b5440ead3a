"""Training in Flax nnx, Flax linen and Equinox."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit, quick_options
from conforming import WRAPPERS, each
from flax import nnx
from flax.training.train_state import TrainState
from parts import in_part
from registry import Entry

import optax_guard as og


def loss_of(model: Callable, inputs: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(inputs)))


INPUTS = np.ones((4, 3), np.float32)


@pytest.mark.usefixtures("standard_promotion")
@each(in_part(WRAPPERS, first=0))
def test_nnx_optimizer_trains_passes_the_loss_and_metrics_reads_its_state(entry: Entry) -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, entry.make(learning_rate=0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, grads = nnx.value_and_grad(loss_of)(model, INPUTS)
        optimizer.update(model, grads, value=loss)
        return loss, og.metrics(optimizer.opt_state)

    (first, _), _, (last, metrics) = [step(model, optimizer) for _ in range(3)]
    assert last < first
    if "guard/step" in metrics:
        taken = 3 if entry.name in ("guard", "stabilize") else 1
        assert metrics["guard/step"] == taken
    if entry.name in ("guard", "stabilize"):
        assert og.flight_log(optimizer.opt_state)["value"][0] == first
        og.raise_if_halted(optimizer.opt_state)
    elif entry.name == "accumulate":
        assert not og.has_updated(optimizer.opt_state)


@pytest.mark.usefixtures("standard_promotion")
@each(in_part(WRAPPERS, first=1))
def test_linen_train_state_trains(entry: Entry) -> None:
    model = nn.Dense(2)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), INPUTS), tx=entry.make(learning_rate=0.01)
    )

    @quick_jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: loss_of(functools.partial(state.apply_fn, p), INPUTS))(state.params)
        return state.apply_gradients(grads=grads), loss

    state, first = step(state)
    state, _ = step(state)
    assert step(state)[1] < first


@pytest.mark.usefixtures("standard_promotion")
@each(in_part(WRAPPERS, first=2))
def test_equinox_models_train_with_the_gradient_of_filter_grad_and_with_filtered_params(entry: Entry) -> None:
    tx = entry.make(learning_rate=0.01)
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))  # its activation is a leaf that is no array
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all", compiler_options=quick_options())  # pyright: ignore[reportCallIssue] (jit's own options)
    def step(model: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m), INPUTS))(model)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        params, state = og.apply_gradients(tx, grads, state, params, value=loss)
        return eqx.combine(params, static), state, loss

    losses = []
    for _ in range(3):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[2] < losses[0]

"""The large tasks, and every task of StabilityBench, as trials of an optimizer that depends on the lane."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks.stability.large.trials import Lanes, Trial
from benchmarks.stability.tasks import Task, characters
from benchmarks.stability.train import evaluated

PyTree = Any
Make = Callable[[Lanes], optax.GradientTransformation]


def character_model() -> Task:
    """1.3 M parameters, four layers, 512 characters a step, bfloat16 and no query-key normalisation."""
    return characters(width=160, layers=4, context=64, batch=8, tests=192, dtype=jnp.bfloat16, steps=1500)


def schedule(rate: Any, steps: int, warm_up: int) -> Callable[[Any], Any]:
    """Linear warm-up, then half a cosine down to 0."""

    def at(count: Any) -> Any:
        rise = jnp.minimum((count + 1) / max(warm_up, 1), 1.0)
        through = jnp.clip((count - warm_up) / max(steps - warm_up, 1), 0.0, 1.0)
        return rate * rise * 0.5 * (1 + jnp.cos(np.pi * through))

    return at


def training(task: Task, make: Make) -> Trial:
    """A task of StabilityBench as a trial."""

    def start(lane: Lanes) -> PyTree:
        params = task.init(lane.seed)
        return params, make(lane).init(params)

    def step(lane: Lanes, carry: PyTree, index: Any) -> tuple[PyTree, Any]:
        params, state = carry
        batch = task.batch(jax.random.fold_in(jax.random.key(1000 + lane.seed), index))
        grads, loss = jax.grad(task.loss_fn, has_aux=True)(params, batch)
        grads = jax.tree.map(lambda g: g / task.loss_scale, grads)
        norm = og.global_norm(grads)
        return og.apply_gradients(make(lane), grads, state, params, value=loss), (loss, norm)

    def evaluate(lane: Lanes, carry: PyTree) -> tuple[Any, Any]:
        del lane
        params = evaluated(*carry)
        return task.evaluate(params), jnp.all(og.gradient_statistics(params).finite)

    return Trial(task.steps, start, step, evaluate)

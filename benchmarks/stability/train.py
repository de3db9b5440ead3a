"""Trains many runs of one task with one method at once: a jitted `scan` over steps of a `vmap` over runs.

Two probes, before and after the optimizer, show what any method did to a step: the first sees the gradient that reached
the optimizer, the second the update that left it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

import optax_guard as og
from benchmarks.stability.faults import Fault, corrupt, spoil
from benchmarks.stability.tasks import Task

PyTree = Any
Base = Callable[[Any], optax.GradientTransformation]  # an optimizer, of a rate or a schedule
Build = Callable[[Base, Any, Any], optax.GradientTransformation]  # a method, of an optimizer, a rate and a setting


class Lanes(NamedTuple):
    """The runs that are trained at once: [runs] each."""

    seed: np.ndarray  # i32: which of the stacked seeds
    rate: np.ndarray  # f32
    setting: np.ndarray  # f32
    fault: np.ndarray  # i32: which of the stacked faults; 0 where there are none


class Runs(NamedTuple):
    """What was measured. The first three: [runs]; the others: [steps, runs]."""

    initial: np.ndarray  # held-out loss before
    final: np.ndarray  # and after
    finite: np.ndarray  # whether the last parameters are
    loss: np.ndarray  # of the batch, before the step
    norm: np.ndarray  # of the gradient that the method was given
    share: np.ndarray  # of the step that the method let through: 0 where it held the step, 1 where it did nothing


class ProbeState(NamedTuple):
    """The norm of what passed last."""

    passed_norm: jax.Array  # f32[]


def probe() -> optax.GradientTransformation:
    """Changes nothing."""

    def init(params: PyTree) -> ProbeState:
        del params
        return ProbeState(jnp.zeros(()))

    def update(updates: PyTree, state: ProbeState, params: PyTree = None) -> tuple[PyTree, ProbeState]:
        del state, params
        return updates, ProbeState(og.global_norm(updates).astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def probed(optimizer: Base) -> Base:
    """An optimizer between two probes."""
    return lambda rate: optax.chain(probe(), optimizer(rate), probe())


def evaluated(params: PyTree, state: PyTree) -> PyTree:
    """The parameters to evaluate: with a schedule-free optimizer, its average."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_schedule_free) if _is_schedule_free(x)]
    return schedule_free_eval_params(found[0], params) if found else params


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, ScheduleFreeState)


def make_runner(task: Task, build: Build, seeds: list[int]) -> Callable[[Lanes, Fault | None], Runs]:
    """A function that trains lanes; those of one shape share one compiled program."""
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(task.init(seed) for seed in seeds))
    keys = jnp.stack([jax.random.key(1000 + seed) for seed in seeds])

    def transformation(lane: Lanes) -> optax.GradientTransformation:
        return build(probed(task.optimizer), lane.rate, lane.setting)

    def step(lane: Lanes, params: PyTree, state: PyTree, batches: Any, faults: Fault | None) -> Any:
        batch = jax.tree.map(lambda x: x[lane.seed], batches)
        row = None if faults is None else jax.tree.map(lambda x: x[lane.fault], faults)
        if row is not None:
            batch = spoil(batch, row)
        grads, loss = jax.grad(task.loss_fn, has_aux=True)(params, batch)
        grads = jax.tree.map(lambda g: g / task.loss_scale, grads)
        if row is not None:
            grads = corrupt(grads, row)
        new, state = og.apply_gradients(transformation(lane), grads, state, params, value=loss)
        norm = og.global_norm(grads)
        return new, state, (loss, norm, _share(params, new, state, norm))

    @jax.jit
    def run(start: PyTree, keys: jax.Array, lanes: Lanes, faults: Fault | None) -> Any:
        params = jax.tree.map(lambda x: x[lanes.seed], start)
        state = jax.vmap(lambda lane, params: transformation(lane).init(params))(lanes, params)

        def body(carry: Any, index: jax.Array) -> Any:
            batches = jax.vmap(lambda key: task.batch(jax.random.fold_in(key, index)))(keys)
            rows = None if faults is None else jax.tree.map(lambda x: x[:, index], faults)
            params, state = carry
            params, state, seen = jax.vmap(step, in_axes=(0, 0, 0, None, None))(lanes, params, state, batches, rows)
            return (params, state), seen

        (last, state), seen = jax.lax.scan(body, (params, state), jnp.arange(task.steps))
        last = jax.vmap(evaluated)(last, state)
        finite = jax.vmap(lambda tree: jnp.all(og.gradient_statistics(tree).finite))(last)
        return jax.vmap(task.evaluate)(start)[lanes.seed], jax.vmap(task.evaluate)(last), finite, *seen

    # As arguments and not as constants, which XLA would spend seconds on folding.
    return lambda lanes, faults=None: Runs(*jax.device_get(run(start, keys, lanes, faults)))


def _share(old: PyTree, new: PyTree, state: PyTree, norm: jax.Array) -> jax.Array:
    """What the method left of the gradient, times what it left of the update."""
    found = optax.tree.get_all_with_path(state, "passed_norm")
    before, behind = (norm for _, norm in found)
    moved = og.global_norm(jax.tree.map(jnp.subtract, new, old))
    held = jnp.all(
        jnp.stack([jnp.all(a == b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)])
    )
    share = before / jnp.where(norm > 0, norm, 1)
    rest = moved / jnp.where(behind > 0, behind, 1)
    rest = jnp.where(jnp.abs(rest - 1) < 1e-2, 1, rest)  # the parameters' rounding
    return jnp.where((norm > 0) & held, 0, jnp.where(norm > 0, share * rest, 1))

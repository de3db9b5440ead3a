"""What one step from four micro-batches costs: across calls (`accumulate`) and inside one (`accumulate_gradients`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_guard as og
from benchmarks.performance.measure import Row, compare, made_arms, number, on_cpu, race, size_of, take_turns

__all__ = ["accumulation_rows"]

PyTree = Any
PART, EVERY = "accumulation", 4


def accumulation_rows(params: PyTree, grads: PyTree, rounds: int, width: int) -> list[Row]:
    """Both functions; `width` is that of the net inside one call."""
    return [*across_calls(params, grads, max(rounds // 2, 3)), *inside_one_call(width, 2 * rounds)]


def across_calls(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """A cycle of four calls."""
    adamw = optax.adamw(1e-3)
    guarded = og.guard(adamw, og.clip_by_global_norm(1.0))
    multi = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), adamw), EVERY)
    txs = {
        "bare": (adamw,),
        "accumulate": og.accumulate(guarded, EVERY),
        'accumulate, "propagate"': og.accumulate(guarded, EVERY, on_nonfinite="propagate"),
        "optax.MultiSteps": (multi.gradient_transformation(),),
    }
    arms = made_arms(txs, params, grads)
    size = size_of(params)
    temporaries = {name: arm.step.memory_analysis().temp_size_in_bytes / size for name, arm in arms.items()}
    buffer = (size_of(arms["accumulate"].state) - size_of(arms["bare"].state)) / size
    t = race(arms, grads, rounds, calls=EVERY)
    ours, multi_steps = t["accumulate"], t["optax.MultiSteps"]
    cycle = "a cycle, over 4 bare AdamW steps"
    return [
        compare(
            PART,
            "`optax.MultiSteps(chain(clip, adamw), 4)` over `accumulate(guard(adamw, clip), 4)`",
            multi_steps,
            ours,
            on_cpu(7.0),
            at_least=True,
        ),
        compare(PART, f"`accumulate(guard(adamw, clip), 4)`, {cycle}", ours, t["bare"], on_cpu(0.68)),
        compare(
            PART,
            'the same with `on_nonfinite="propagate"`, which does not check for NaN before adding',
            t['accumulate, "propagate"'],
            t["bare"],
            on_cpu(0.68),
        ),
        compare(PART, f"`optax.MultiSteps(chain(clip, adamw), 4)`, {cycle}", multi_steps, t["bare"]),
        number("memory", "state of `accumulate` beyond bare AdamW, over the parameters", buffer, 1.01),
        number("memory", "temporaries of `accumulate`, over the parameters", temporaries["accumulate"], 0.01),
        number("memory", "temporaries of `optax.MultiSteps`, over the parameters", temporaries["optax.MultiSteps"]),
    ]


def inside_one_call(width: int, rounds: int) -> list[Row]:
    """`accumulate_gradients` against a scan by hand."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(0, width**-0.5, (width, width)), jnp.float32) for _ in range(4)]
    batch = jnp.asarray(rng.normal(size=(128, width)), jnp.float32)

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        for kernel in params:
            batch = jnp.tanh(batch @ kernel)
        return jnp.mean(batch**2)

    def by_hand(params: PyTree, batch: PyTree) -> PyTree:
        def body(sums: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(params, part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        sums, _ = lax.scan(body, zeros, batch.reshape(EVERY, -1, width))
        return jax.tree.map(lambda x: x / EVERY, sums)

    ours, theirs = jax.jit(og.accumulate_gradients(loss_fn, EVERY)), jax.jit(by_hand)
    turns = {
        "accumulate_gradients": lambda: jax.block_until_ready(ours(params, batch)),
        "a scan by hand": lambda: jax.block_until_ready(theirs(params, batch)),
    }
    t = take_turns(turns, rounds)
    what = "`accumulate_gradients(loss_fn, 4)` over a hand-written scan"
    return [compare(PART, what, t["accumulate_gradients"], t["a scan by hand"], 1.05)]

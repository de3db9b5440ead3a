"""PPO (Schulman et al. 2017) on CartPole, both in JAX: the loss is minus the return, of 500 at most.

The pole and cart are those of Gymnasium's CartPole-v1, whose threshold for a solved task is 475; the algorithm is the
plain one, with the settings that are customary for it (16 copies of the task, 64 steps of each per iteration, 4 passes
of 4 batches, discount 0.99, lambda 0.95, clip range 0.2, entropy 0.01), and two separate nets of 64 and 64 tanh units.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optax_guard as og
from benchmarks.stability.large.training import Make
from benchmarks.stability.large.trials import Lanes, Trial
from benchmarks.stability.train import evaluated

PyTree = Any
COPIES, LENGTH, PASSES, BATCHES = 16, 64, 4, 4
ITERATIONS = 250
STEPS = ITERATIONS * PASSES * BATCHES  # of the optimizer
DISCOUNT, LAMBDA, RANGE, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
EPISODE = 500


def move(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(position, speed, angle, angular speed) a fiftieth of a second later, and whether the pole fell: [4], []."""
    x, speed, angle, turn = state
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    force = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * turn**2 * sin) / 1.1
    bend = (9.8 * sin - cos * force) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    push = force - 0.05 * bend * cos / 1.1
    new = jnp.stack([x + 0.02 * speed, speed + 0.02 * push, angle + 0.02 * turn, turn + 0.02 * bend])
    return new, (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 12 * np.pi / 180)


def fresh(key: jax.Array, copies: int) -> jax.Array:
    """The start of an episode: [copies, 4]."""
    return jax.random.uniform(key, (copies, 4), minval=-0.05, maxval=0.05)


def nets(key: jax.Array) -> PyTree:
    """Orthogonal matrices; the policy's last one is small."""

    def net(key: jax.Array, outputs: int, last: float) -> PyTree:
        sizes, gains = (4, 64, 64, outputs), (2**0.5, 2**0.5, last)
        return [
            {"kernel": jax.nn.initializers.orthogonal(gain)(k, (a, b)), "bias": jnp.zeros(b)}
            for k, a, b, gain in zip(jax.random.split(key, 3), sizes, sizes[1:], gains, strict=False)
        ]

    policy, value = jax.random.split(key)
    return {"policy": net(policy, 2, 0.01), "value": net(value, 1, 1.0)}


def forward(layers: PyTree, x: jax.Array) -> jax.Array:
    """A net's output: [..., outputs]."""
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
    """PPO's loss."""
    seen, action, old, advantage, target = batch
    logs = jax.nn.log_softmax(forward(params["policy"], seen))
    ratio = jnp.exp(jnp.take_along_axis(logs, action[:, None], 1)[:, 0] - old)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - RANGE, 1 + RANGE) * advantage).mean()
    error = 0.5 * jnp.square(forward(params["value"], seen)[:, 0] - target).mean()
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=1).mean()
    return -gain + VALUE * error - ENTROPY * entropy


def rollout(params: PyTree, world: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
    """`LENGTH` steps of all copies: the world afterwards, and [LENGTH, COPIES] of what PPO needs."""

    def one(world: PyTree, key: jax.Array) -> tuple[PyTree, Any]:
        state, age = world
        choose, restart = jax.random.split(key)
        logits = forward(params["policy"], state)
        action = jax.random.categorical(choose, logits)
        log = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        new, fell = jax.vmap(move)(state, action)
        over = fell | (age + 1 >= EPISODE)
        row = state, action, log, forward(params["value"], state)[:, 0], over, jnp.where(over, age + 1, 0)
        return (jnp.where(over[:, None], fresh(restart, COPIES), new), jnp.where(over, 0, age + 1)), row

    return jax.lax.scan(one, world, jax.random.split(key, LENGTH))


def advantages(values: jax.Array, over: jax.Array, last: jax.Array) -> jax.Array:
    """Generalised advantage estimation; every step has the reward 1: [LENGTH, COPIES]."""

    def back(carry: PyTree, row: PyTree) -> tuple[PyTree, jax.Array]:
        later, following = carry
        value, over = row
        later = 1 + DISCOUNT * following * (1 - over) - value + DISCOUNT * LAMBDA * (1 - over) * later
        return (later, value), later

    return jax.lax.scan(back, (jnp.zeros_like(last), last), (values, over.astype(jnp.float32)), reverse=True)[1]


def cartpole(make: Make, iterations: int = ITERATIONS) -> Trial:
    """PPO as a trial whose steps are iterations; its `loss` is minus the mean return of the episodes that ended."""

    def start(lane: Lanes) -> PyTree:
        a, b = jax.random.split(jax.random.key(lane.seed))
        params = nets(a)
        world = fresh(b, COPIES), jnp.zeros(COPIES, jnp.int32)
        return params, make(lane).init(params), world, jnp.zeros(())

    def step(lane: Lanes, carry: PyTree, index: Any) -> tuple[PyTree, Any]:
        params, state, world, before = carry
        play, shuffle = jax.random.split(jax.random.fold_in(jax.random.key(1000 + lane.seed), index))
        world, (seen, action, log, value, over, length) = rollout(params, world, play)
        advantage = advantages(value, over, forward(params["value"], world[0])[:, 0])
        rows = seen, action, log, advantage, advantage + value
        data = jax.tree.map(lambda x: x.reshape(COPIES * LENGTH, *x.shape[2:]), rows)
        orders = jax.vmap(lambda k: jax.random.permutation(k, COPIES * LENGTH))(jax.random.split(shuffle, PASSES))

        def learn(carry: PyTree, rows: jax.Array) -> tuple[PyTree, jax.Array]:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, jax.tree.map(lambda x: x[rows], data))
            norm = og.global_norm(grads)
            return og.apply_gradients(make(lane), grads, state, params, value=loss), norm

        (params, state), norms = jax.lax.scan(learn, (params, state), orders.reshape(PASSES * BATCHES, -1))
        ended = jnp.sum(over)
        loss = jnp.where(ended > 0, -jnp.sum(length) / jnp.maximum(ended, 1), before)
        return (params, state, world, loss), (loss, jnp.max(norms))

    def evaluate(lane: Lanes, carry: PyTree) -> tuple[Any, Any]:
        del lane
        params = evaluated(carry[0], carry[1])
        return -greedy(params), jnp.all(og.gradient_statistics(params).finite)

    return Trial(iterations, start, step, evaluate)


def greedy(params: PyTree, episodes: int = 64) -> jax.Array:
    """The mean return if the likelier action is always taken."""

    def one(carry: PyTree, _: None) -> tuple[PyTree, None]:
        state, alive, total = carry
        action = jnp.argmax(forward(params["policy"], state), axis=1)
        new, fell = jax.vmap(move)(state, action)
        # A pole that has fallen stays where it is: its numbers would overflow later.
        return (jnp.where(alive[:, None], new, state), alive & ~fell, total + alive), None

    start = fresh(jax.random.key(99), episodes), jnp.ones(episodes, bool), jnp.zeros(episodes)
    return jnp.mean(jax.lax.scan(one, start, None, EPISODE)[0][2])

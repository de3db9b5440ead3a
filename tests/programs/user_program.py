# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false
# Those two are about others: JAX and Flax leave types of their functions open, Optax does not say that it is typed.
"""What a user's program says to a strict type checker: nothing. `make lint` and tests/common/test_types.py check it."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard.flax import TrainState


class Net(NamedTuple):
    """Parameters of a type of one's own."""

    kernel: jax.Array
    bias: jax.Array


class Seen(NamedTuple):
    """The state of a rule of one's own."""

    largest: jax.Array


def loss_fn(params: Net, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x @ params.kernel + params.bias))


def halve_records(factor: float) -> og.Rule:
    """Halves every gradient that is larger than all before it."""

    def judge(statistics: og.rules.GradientStatistics, state: Seen, params: Net | None = None, **extra: object):
        del params, extra
        record = statistics.norm > factor * state.largest
        verdict = og.Verdict(scale=jnp.where(record, 0.5, 1.0), skip=jnp.zeros((), bool))
        return verdict, Seen(jnp.where(jnp.isfinite(statistics.norm), statistics.norm, state.largest))

    return og.rule(lambda _: Seen(jnp.zeros(())), judge)


def schedule(step: jax.Array) -> jax.Array:
    return 1.0 / (1 + step)


def is_matrix(leaf: jax.Array) -> bool:
    return leaf.ndim == 2


def summed(tree: Net) -> Net:
    def label(leaf: object) -> str:
        del leaf
        return "sum"

    return jax.tree.map(label, tree)


def train(params: Net, x: jax.Array) -> Net:
    inner = optax.chain(og.l1_penalty(schedule), og.noise_injection(distribution="gaussian"), optax.adamw(3e-4))
    inner = optax.chain(inner, og.limit_step_growth(0.01))
    tx = og.accumulate(
        og.guard(
            inner,
            og.skip_spikes(on="loss"),
            og.clip_by_norm_history(scope="leaf"),
            og.clip_by_global_norm(optax.constant_schedule(1.0)),
            halve_records(1.5),
            recovery=(og.reset_moments(), og.back_off(), og.rewind(memory="host", dtype=jnp.bfloat16)),
            mask=lambda tree: jax.tree.map(is_matrix, tree),
        ),
        every=2,
        on_nonfinite="drop_cycle",
        reduction=summed,
    )
    state = tx.init(params)
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    params, state = og.apply_gradients(tx, grads, state, params, value=loss)
    params, state = og.flush(tx, state, params, value=loss)
    average = og.keep_if_held(state, params, params)
    state = og.clear_halt(state)
    og.raise_if_halted(state, params)
    numbers = {name: float(number) for name, number in og.metrics(state).items()}
    assert numbers["guard/step"] == len(og.flight_log(state))
    return average


def train_by_line(params: Net, x: jax.Array) -> Net:
    tx = og.stabilize(optax.sgd(0.1), max_norm=1.0, max_change="gradual")
    state = tx.init(params)
    step = og.accumulate_gradients(loss_fn, 4, on_nonfinite="propagate", remainder="error")
    loss, grads = step(params, x)
    params, _ = og.apply_gradients(tx, grads, state, params, value=loss)
    updates, state = tx.update(grads, state, params, value=loss)
    del updates
    return params


def train_linen(x: jax.Array) -> TrainState:
    model = nn.Dense(1)
    tx = og.guard(optax.adam(1e-3), og.zclip(mode="mean"))
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx)

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean(jnp.asarray(model.apply(params, x)))

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads, value=loss)


if __name__ == "__main__":
    tree, inputs = Net(jnp.ones((3, 2)), jnp.zeros(2)), jnp.ones((4, 3))
    train(tree, inputs)
    train_by_line(tree, inputs)
    train_linen(inputs)

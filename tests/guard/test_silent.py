"""A guard with nothing to do: the same bits as the optimizer alone, and what code finds that reads its state."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit, users_jit

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = jax.random.normal(jax.random.key(0), (1000,))
GRADS = jax.random.normal(jax.random.key(1), (3, 1000))


def trained(tx: Any, step: Callable[..., Any]) -> list[np.ndarray]:
    params, state, seen = PARAMS, tx.init(PARAMS), []
    jitted = users_jit(lambda grads, state, params: step(tx, grads, state, params, value=jnp.float32(1.0)))
    for grads in GRADS:
        params, state = jitted(grads, state, params)
        seen.append(np.asarray(params))
    return seen


def optax_step(tx: Any, grads: Any, state: Any, params: Any, value: Any) -> Any:
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


def test_a_silent_guard_changes_no_bit_through_apply_gradients_and_roundings_otherwise() -> None:
    optimizer = optax.sgd(0.1, momentum=0.9)
    alone = trained(optimizer, optax_step)
    np.testing.assert_array_equal(trained(og.guard(optimizer), og.apply_gradients), alone)
    with_rule = og.guard(optimizer, og.clip_by_global_norm(1e9))
    for tx, step in ((og.guard(optimizer), optax_step), (with_rule, og.apply_gradients), (with_rule, optax_step)):
        np.testing.assert_allclose(trained(tx, step), alone, rtol=1e-6, atol=3e-7)


def test_what_code_that_reads_hyperparams_needs() -> None:
    guarded = optax.inject_hyperparams(lambda learning_rate: og.guard(optax.sgd(learning_rate)))(learning_rate=0.5)
    params = jnp.ones(2)

    @quick_jit
    def step(grads: Any, state: Any, params: Any) -> Any:
        return og.apply_gradients(guarded, grads, state, params)

    state = guarded.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    params, state = step(jnp.ones(2), state, params)
    np.testing.assert_array_equal(params, [0.75, 0.75])
    params, state = step(jnp.full(2, jnp.nan), state, params)
    np.testing.assert_array_equal(params, [0.75, 0.75])
    assert state.hyperparams["learning_rate"] == 0.25
    assert int(og.metrics(state)["guard/skipped_total"]) == 1


def test_hyperparams_inside_a_guard_are_found_by_name_and_without_it() -> None:
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    state = og.guard(inner).init(jnp.ones(2))
    assert not hasattr(state, "hyperparams")
    state = optax.tree.set(state, learning_rate=jnp.float32(0.25))
    assert optax.tree.get(state, "learning_rate") == 0.25
    chex.assert_trees_all_equal(og.remove_guard_state(state).hyperparams, {"learning_rate": jnp.float32(0.25)})


def test_the_last_place_of_a_chain_stays_reachable_with_the_guard_before_it() -> None:
    last = optax.inject_hyperparams(optax.scale)(step_size=0.5)
    tx = optax.chain(og.guard(optax.scale_by_adam()), last)
    params = jnp.ones(2)
    updates, state = quick_jit(tx.update)(jnp.full(2, jnp.nan), tx.init(params), params)
    assert state[-1].hyperparams["step_size"] == 0.5
    np.testing.assert_array_equal(updates, [0.0, 0.0])

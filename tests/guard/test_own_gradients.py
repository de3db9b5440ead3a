"""Optimizers that make a NaN of a finite gradient by themselves: held where it can be known, else told."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

PARAMS, GRADS = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 0.25])}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def sam() -> optax.GradientTransformation:
    return optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.1)), opaque_mode=True)


def bad_gradient(params: Any, step: int) -> Any:
    return {"w": jnp.full(2, jnp.nan)}


@pytest.mark.parametrize("wrap", [og.guard, og.stabilize, lambda tx: og.accumulate(og.guard(tx), 1)])
def test_a_nan_that_opaque_sam_asks_for_is_held_and_counted(wrap: Any) -> None:
    tx = wrap(sam())
    state = tx.init(PARAMS)
    after, state = quick_jit(lambda p, s: og.apply_gradients(tx, GRADS, s, p, grad_fn=bad_gradient))(PARAMS, state)
    chex.assert_trees_all_equal(after, PARAMS)
    assert og.metrics(state)["guard/nonfinite_total"] == 1
    assert og.flight_log(state)["event"][0] == "nonfinite_update"


def test_the_check_can_be_turned_off_and_on() -> None:
    for check, tx in (
        (False, og.guard(sam(), check_updates=False)),
        (True, og.guard(optax.chain(sam()), check_updates=True)),
    ):
        state = tx.init(PARAMS)
        step = quick_jit(lambda p, s, tx=tx: og.apply_gradients(tx, GRADS, s, p, grad_fn=bad_gradient))
        after, _ = step(PARAMS, state)
        assert bool(np.all(np.isfinite(after["w"]))) == check


def test_without_the_check_the_halt_says_where_the_nan_is_and_what_would_have_held_it() -> None:
    params = {"w": jnp.ones(2, jnp.float16)}
    tx = og.guard(optax.adam(1e-3), halt_after=1)
    step = quick_jit(lambda g, p, s: og.apply_gradients(tx, g, s, p))
    params, state = step({"w": jnp.zeros(2, jnp.float16)}, params, tx.init(params))
    params, state = step({"w": jnp.full(2, jnp.nan, jnp.float16)}, params, state)
    with pytest.raises(og.TrainingHalted, match=r"parameters themselves hold NaN.*`w`.*`check_updates=True`"):
        og.raise_if_halted(state, params)

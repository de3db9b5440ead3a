"""States as people have them: of many runs at once, of a part of the parameters, from elsewhere, with a NaN in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")  # stock Adam does not work under the strict one

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
GRADS = jax.tree.map(lambda x: 0.1 * x, PARAMS)
BAD = {"a": GRADS["a"], "b": jnp.full(3, jnp.nan)}


def step_of(tx: Any) -> Any:
    return quick_jit(lambda g, s, p: og.apply_gradients(tx, g, s, p, value=jnp.float32(1.0)))


def halted(state: Any, params: Any = None) -> str:
    with pytest.raises(og.TrainingHalted) as raised:
        og.raise_if_halted(state, params)
    return str(raised.value)


# Which leaf


def partitioned(guarded: Any) -> Any:
    return optax.partition({"in": guarded, "out": optax.sgd(0.1)}, {"a": "out", "b": "in"})


AROUND = {
    "masked": lambda guarded: optax.masked(guarded, {"a": False, "b": True}),
    "partition": partitioned,
}


@pytest.mark.parametrize("around", AROUND)
def test_a_guard_that_sees_some_of_the_leaves_names_the_right_one(around: str) -> None:
    tx = AROUND[around](og.guard(optax.sgd(0.1), og.record_leaves(4), halt_after=1, history=4))
    params, state = step_of(tx)(BAD, tx.init(PARAMS), PARAMS)
    assert "the gradient of `b` held NaN" in halted(state, params)
    assert "the gradient of leaf 0 of 1 held NaN" in halted(state)
    assert og.leaf_names(params, state) == og.leaf_log(state, params).names == ["b"]
    assert og.leaf_names(params, state)[int(og.metrics(state)["guard/worst_leaf"])] == "b"


def test_parameters_other_than_those_of_the_guard_are_never_given_a_wrong_name() -> None:
    tx = og.guard(optax.sgd(0.1), halt_after=1, history=4)
    _, state = step_of(tx)(BAD, tx.init(PARAMS), PARAMS)
    assert "the gradient of leaf 1 of 2 held NaN" in halted(state, {"a": PARAMS["a"]})
    assert "the gradient of `b` held NaN" in halted(state, {"0": PARAMS["a"], **PARAMS})
    assert og.leaf_names({"params": PARAMS}, state) == ["params/a", "params/b"]  # the same leaves under another root
    assert og.leaf_names({"x": 1, "y": 2, "b": 3}, state) == ["leaf 0 of 2", "b"]
    with pytest.raises(ValueError, match="leaf_names: expected one guard in this state, found 0"):
        og.leaf_names(PARAMS, optax.sgd(0.1).init(PARAMS))


# Many runs at once

MANY = og.accumulate(
    og.guard(
        optax.inject_hyperparams(optax.adam)(0.1),
        og.clip_by_norm_history(scope="leaf"),
        og.record_leaves(4),
        halt_after=1,
        history=4,
        recovery=(og.reset_moments(after=1), og.back_off(after=1), og.rewind(after=1)),
    ),
    1,
)
MEMBERS = 3


def stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x] * MEMBERS), tree)


def test_a_state_of_many_runs_reads_as_those_of_its_members() -> None:
    grads = stacked(GRADS)
    grads["a"] = grads["a"].at[1].set(jnp.nan)
    params = stacked(PARAMS)
    state = quick_jit(jax.vmap(MANY.init))(params)
    step = quick_jit(jax.vmap(lambda g, s, p: og.apply_gradients(MANY, g, s, p, value=jnp.float32(1.0))))
    for _ in range(2):
        params, state = step(grads, state, params)
    alone = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(MEMBERS)]

    numbers = [jax.jit(og.metrics)(one) for one in alone]
    for name, number in og.metrics(state).items():
        np.testing.assert_array_equal(number, [each[name] for each in numbers], err_msg=name)
    rows = [og.flight_log(one) for one in alone]
    for column in rows[0].dtype.names:
        np.testing.assert_array_equal(og.flight_log(state)[column], [each[column] for each in rows], err_msg=column)
    assert og.flight_log(state).shape == (MEMBERS, 2)
    logs = [og.leaf_log(one, PARAMS) for one in alone]
    np.testing.assert_array_equal(og.leaf_log(state, PARAMS).norms, [log.norms for log in logs])
    np.testing.assert_array_equal(og.leaf_log(state).steps, [log.steps for log in logs])

    story = halted(state, params)
    assert story.startswith("1 of 3 members of this state halted: 1. The first of them halted at step 0 after 1 non-")
    assert "the gradient of `a` held NaN" in story
    cleared = og.clear_halt(state)
    og.raise_if_halted(cleared)
    assert jax.tree.structure(cleared) == jax.tree.structure(state)
    assert og.has_updated(state).shape == (MEMBERS,)


def test_members_of_different_age_are_read_too() -> None:
    tx = og.guard(optax.sgd(0.1), og.record_leaves(4), history=4)
    step = step_of(tx)
    states = [tx.init(PARAMS), step(GRADS, tx.init(PARAMS), PARAMS)[1]]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    log = og.flight_log(state)
    assert log["step"].tolist() == [[-1], [0]]
    assert log["event"].tolist() == [[""], ["applied"]]
    with pytest.raises(ValueError, match=r"leaf_log: the members of this state made \[0, 1\] calls: read one"):
        og.leaf_log(state)


# Reading under JAX's own searches for NaN


@pytest.mark.parametrize("gradient", [GRADS, BAD], ids=["healthy", "bad"])
def test_metrics_can_be_read_where_jax_stops_at_nan_and_inf(gradient: Any) -> None:
    tx = og.loss_scaling(og.accumulate(og.guard(optax.sgd(0.1), og.clip_by_norm_history(), history=4), 1))
    _, state = step_of(tx)(gradient, tx.init(PARAMS), PARAMS)
    with jax.debug_nans(True), jax.debug_infs(True):
        numbers = og.metrics(state)
        og.flight_log(state)
    finite = gradient is GRADS
    assert bool(jnp.isfinite(numbers["guard/grad_norm"])) == finite


# What a halt says of its cause


def test_a_nan_that_multi_steps_never_loses_is_called_so() -> None:
    multi = optax.MultiSteps(og.stabilize(optax.sgd(0.1), halt_after=2, history=4), 2)
    step = quick_jit(lambda g, s: multi.update(g, s, PARAMS))
    state = multi.init(PARAMS)
    for i in range(6):
        _, state = step(BAD if i == 0 else GRADS, state)
    story = halted(state, PARAMS)
    assert "The cause is `optax.MultiSteps` around the guard" in story
    assert "Take `accumulate(guard(...), every)` in its place" in story


def test_a_halt_looks_at_parameters_and_moments() -> None:
    tx = og.guard(optax.adam(0.1), halt_after=1, history=4)
    bad_params = {"a": PARAMS["a"].at[0, 0].set(jnp.inf), "b": PARAMS["b"]}
    _, state = step_of(tx)(BAD, tx.init(PARAMS), bad_params)
    assert "The parameters are those before the first of them." in halted(state, PARAMS)
    assert "The parameters themselves hold Inf, the first in `a`: restore an earlier" in halted(state, bad_params)
    moments = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim else x, state.guarded_state)
    story = halted(state._replace(guarded_state=moments), PARAMS)
    assert "The optimizer's own state holds NaN, the first in `0/mu/a`" in story
    assert "`reset_moments" in story.replace("recovery=(", "`")

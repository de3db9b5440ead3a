"""`stabilize`, and guards added to and taken out of a run in flight."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compiling import quick_jit
from helpers import bits

import optax_guard as og

KEY = np.random.default_rng(0)
PARAMS = {"bias": jnp.ones(4), "kernel": jnp.asarray(KEY.normal(size=(8, 4)).astype(np.float32))}
INPUTS = jnp.asarray(KEY.normal(size=(16, 8)).astype(np.float32))
TARGETS = jnp.asarray(KEY.normal(size=(16, 4)).astype(np.float32))
pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM = optax.adam(0.1)
OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "adam": optax.adam(0.02),
    "lion": optax.lion(0.01),
    "adafactor": optax.adafactor(0.02, min_dim_size_to_factor=4),
    "muon": optax.contrib.muon(0.02),
    "schedules": optax.chain(
        og.noise_injection(1e-6, key=1),
        optax.scale_by_adam(),
        optax.add_decayed_weights(1e-4, mask={"bias": False, "kernel": True}),
        optax.scale_by_learning_rate(optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 80)),
    ),
}


def loss_fn(params: Any, scale: Any) -> jax.Array:
    return jnp.mean(jnp.square(INPUTS @ params["kernel"] + params["bias"][None] - TARGETS)) * scale


@functools.cache
def stepper(tx: Any, with_loss: bool = True) -> Any:
    @quick_jit
    def step(params: Any, state: Any, scale: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, scale)
        return og.apply_gradients(tx, grads, state, params, **({"value": loss} if with_loss else {}))

    return step


def train(tx: Any, scales: list[float], params: Any = PARAMS, state: Any = None, with_loss: bool = True) -> Any:
    step = stepper(tx, with_loss)
    state = tx.init(params) if state is None else state
    for scale in scales:
        params, state = step(params, state, jnp.float32(scale))
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stabilize_carries_any_optimizer_through_faults_and_spikes(name: str) -> None:
    tx = og.stabilize(OPTIMIZERS[name], max_change=0.05)
    scales = [1.0] * 60
    scales[20], scales[30:33], scales[40] = np.nan, [np.inf] * 3, 1e4
    params, state = train(tx, scales)
    chex.assert_tree_all_finite((params, state))
    log = og.flight_log(state)
    assert list(log["event"][[20, 30, 31, 32, 40]]) == ["nonfinite"] * 4 + ["skipped"]
    assert set(np.delete(log["event"], [20, 30, 31, 32, 40])) <= {"applied", "clipped"}
    assert log["rule"][40] == 0
    assert loss_fn(params, 1.0) < 0.95 * loss_fn(PARAMS, 1.0)


def test_without_a_loss_the_spike_is_clipped_by_the_norms_history() -> None:
    tx = og.stabilize(optax.sgd(0.05))
    _, state = train(tx, [1.0] * 40 + [1e4], with_loss=False)
    row = og.flight_log(state)[-1]
    assert (row["event"], row["rule"]) == ("clipped", 1)
    assert row["clipped_norm"] < 8 * og.flight_log(state)["grad_norm"][-2]
    jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=None))


def test_while_nothing_is_wrong_stabilize_is_the_optimizer() -> None:
    """With a warm-up to ten times the rate at which steps would be bounded from the beginning, and without a bound."""
    warmed = optax.adam(optax.linear_schedule(0.002, 0.1, 20))
    for ours, adam in ((og.stabilize(warmed), warmed), (og.stabilize(ADAM, max_change=None), ADAM)):
        (params, state), (expected, _) = train(ours, [1.0] * 25), train(adam, [1.0] * 25)
        assert set(og.flight_log(state)["event"]) == {"applied"}
        assert og.metrics(state).get("limit_step_growth/bound_total", 0) == 0
        chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-7)


def test_by_default_a_rate_that_is_far_too_large_from_the_beginning_is_bounded() -> None:
    """By 1 % of the kernel a step, which is all that is measured; a bias alone is not."""
    tx = og.stabilize(ADAM)
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(3):
        before = params["kernel"]
        params, state = train(tx, [1.0], params, state)
        np.testing.assert_allclose(norm(params["kernel"] - before), 0.01 * norm(before), rtol=1e-4)
        assert og.metrics(state)["limit_step_growth/bound_total"] == step + 1
    alone = {"bias": PARAMS["bias"]}
    (ours, _), (theirs, _) = (
        og.apply_gradients(tx, alone, tx.init(alone), alone) for tx in (og.stabilize(ADAM), og.guard(ADAM))
    )
    np.testing.assert_allclose(ours["bias"], theirs["bias"], rtol=1e-6)


def test_max_change_bounds_every_step_and_cures_a_learning_rate_that_is_too_large() -> None:
    """0.1 of the norm a step at most, by a schedule that shrinks; SGD at 300 times its rate."""

    def schedule(step: Any) -> Any:
        return 0.1 / (1 + 0.2 * step)

    for change in (0.01, schedule):
        tx = og.stabilize(optax.sgd(15.0), max_change=change)
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(40):
            before = params
            params, state = train(tx, [1.0], params, state)
            moved = norm(jax.tree.map(np.subtract, jax.device_get(params), jax.device_get(before)))
            bound = change if isinstance(change, float) else schedule(i)
            assert moved <= bound * norm(before) * (1 + 1e-4)
        assert loss_fn(params, 1.0) < loss_fn(PARAMS, 1.0)
    assert loss_fn(train(og.stabilize(optax.sgd(15.0)), [1.0] * 40)[0], 1.0) < loss_fn(PARAMS, 1.0)
    unbounded = og.stabilize(optax.sgd(15.0), max_change=None)
    assert not loss_fn(train(unbounded, [1.0] * 40)[0], 1.0) < loss_fn(PARAMS, 1.0)


def norm(tree: Any) -> float:
    return float(np.linalg.norm([np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]))


def test_a_step_beyond_all_numbers_is_bounded_to_none() -> None:
    huge = jax.tree.map(lambda x: jnp.full_like(x, 1e10), PARAMS)
    tx = og.stabilize(optax.sgd(1e38))
    params, state = og.apply_gradients(tx, huge, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert og.metrics(state)["limit_step_growth/scale"] == 0


def test_a_bound_goes_inside_a_proximal_step() -> None:
    for change in ("gradual", 0.01):
        with pytest.raises(ValueError, match=r"stabilize: a bound .* behind a proximal step"):
            og.stabilize(og.proximal_l1(ADAM, 0.1, learning_rate=0.1), max_change=change).init(PARAMS)
    inside = og.proximal_l1(optax.chain(ADAM, og.limit_step_growth()), 100.0, learning_rate=0.1)
    params, _ = train(og.stabilize(inside, max_change=None), [1.0] * 60)
    assert not np.any(params["kernel"])


def test_max_norm_bounds_the_first_step() -> None:
    _, state = train(og.stabilize(optax.sgd(0.1), max_norm=0.5), [1e6])
    np.testing.assert_allclose(og.flight_log(state)["clipped_norm"], 0.5, rtol=1e-5)


def test_recovery_and_accumulation_around_stabilize() -> None:
    tx = og.accumulate(og.stabilize(optax.adam(0.02), recovery=(og.back_off(), og.rewind(every=5))), 2)
    params, state = train(tx, [1.0] * 8 + [np.nan] * 2 + [1.0] * 8)
    chex.assert_tree_all_finite((params, state))
    assert og.metrics(state)["guard/snapshot_step"] > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: og.stabilize(optax.adam), "stabilize: `inner`"),
        (lambda: og.stabilize(optax.sgd(1.0), max_norm=-1.0), "`max_norm` -1.0"),
        (lambda: og.stabilize(optax.sgd(1.0), max_change=-1.0), "`max_change` -1.0"),
        (lambda: og.stabilize(optax.sgd(1.0), max_change="0.01"), "stabilize: `max_change` 'gradual' '0.01'"),
        (lambda: og.stabilize(optax.sgd(1.0), horizon=0), "`horizon` 0"),
        (lambda: og.stabilize(optax.sgd(1.0), recovery=(1,)), "`recovery` 1"),
    ],
)
def test_wrong_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert all(word in str(caught.value) for word in words.split()), str(caught.value)


# Guards for runs in flight


def test_a_guard_comes_to_a_run_in_flight_and_leaves_it(tmp_path: Any) -> None:
    adam = OPTIMIZERS["schedules"]
    expected_params, expected_state = train(adam, [1.0] * 9)
    params, old = train(adam, [1.0] * 3)
    with ocp.StandardCheckpointer() as checkpointer:  # the checkpoint of the unguarded run
        checkpointer.save(tmp_path / "old", old)
    with ocp.StandardCheckpointer() as checkpointer:
        old = checkpointer.restore(tmp_path / "old", jax.eval_shape(adam.init, PARAMS))
    tx = og.guard(adam, og.clip_by_global_norm(1e6), og.skip_large(1e6), recovery=(og.rewind(), og.reset_moments()))
    state = og.add_guard_state(tx, params, old)
    assert bits(og.remove_guard_state(state)) == bits(old)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    params, state = train(tx, [1.0] * 3, params, state)
    with ocp.StandardCheckpointer() as checkpointer:  # that of the guarded one
        checkpointer.save(tmp_path / "new", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "new", jax.eval_shape(tx.init, PARAMS))
    assert bits(restored) == bits(state)
    params, state = train(adam, [1.0] * 3, params, og.remove_guard_state(restored))
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    # To rounding: another compiled step may fuse a multiply-add. The states themselves were moved bit for bit.
    chex.assert_trees_all_close((params, state), (expected_params, expected_state), rtol=1e-5, atol=1e-7)


LION = optax.lion(0.1)
NESTED = {
    "guard": (og.guard(ADAM), ADAM),
    "accumulate": (og.accumulate(og.guard(ADAM), 3), og.accumulate(ADAM, 3)),
    "chain": (optax.chain(LION, og.guard(ADAM, og.clip_by_global_norm(1.0))), optax.chain(LION, ADAM)),
    "two": (optax.chain(og.guard(LION), og.guard(ADAM)), optax.chain(LION, ADAM)),
    "guard in guard": (og.guard(optax.chain(og.guard(ADAM)), recovery=(og.rewind(),)), optax.chain(ADAM)),
    "stabilize": (og.stabilize(ADAM), ADAM),
    "no bound": (og.stabilize(ADAM, max_change=None), ADAM),
    "a hard bound": (og.accumulate(og.stabilize(ADAM, max_change=0.1, mask="kernel"), 2), og.accumulate(ADAM, 2)),
}


@pytest.mark.parametrize("case", NESTED)
def test_states_go_in_and_come_out_in_any_nesting(case: str) -> None:
    tx, bare = NESTED[case]
    old = jax.tree.map(lambda x: jnp.full_like(x, 3), bare.init(PARAMS))
    state = og.add_guard_state(tx, PARAMS, old)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
    assert jax.tree.structure(og.remove_guard_state(state)) == jax.tree.structure(old)
    assert bits(og.remove_guard_state(state)) == bits(old)


def test_the_optimizers_state_alone_fits_into_the_one_guard_of_a_larger_whole() -> None:
    old = jax.tree.map(jnp.ones_like, ADAM.init(PARAMS))
    for tx in (og.accumulate(og.guard(ADAM), 3), optax.chain(LION, og.guard(ADAM))):
        state = og.add_guard_state(tx, PARAMS, old)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
        (guarded,) = [node for node in jax.tree.leaves(state, is_leaf=_is_guard) if _is_guard(node)]
        assert bits(guarded.guarded_state) == bits(old)


def _is_guard(node: Any) -> bool:
    return isinstance(node, og.state.GuardState)


def test_what_does_not_fit_is_named() -> None:
    guard, adam = og.guard(ADAM), ADAM.init(PARAMS)
    other = {"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))}
    for call, words in (
        (lambda: og.add_guard_state(ADAM, PARAMS, adam), "add_guard_state: no guard in `tx`"),
        (lambda: og.add_guard_state(guard, PARAMS, guard.init(PARAMS)), "add_guard_state: `inner_state` already"),
        (lambda: og.add_guard_state(guard, PARAMS, LION.init(PARAMS)), "add_guard_state: lacks `0/nu/bias`"),
        (lambda: og.add_guard_state(guard, PARAMS, ADAM.init(other)), "add_guard_state: `0/mu/kernel` [3, 4] [8, 4]"),
        (lambda: og.add_guard_state(og.guard(LION), PARAMS, adam), "add_guard_state: `0/nu/bias`"),
        (lambda: og.add_guard_state(NESTED["two"][0], PARAMS, adam), "add_guard_state: lacks `0/0/count`"),
        (lambda: og.remove_guard_state(adam), "remove_guard_state: no guard"),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            call()
        assert all(word in str(caught.value) for word in words.split()), str(caught.value)

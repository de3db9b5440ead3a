"""Conditions that a step's course hangs on, each tested by a run in which it alone decides (see mutants.py)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from test_rungs import LARGE, NAN, Run, guarded, poisoned

import optax_guard as og
from optax_guard import _guard
from optax_guard.recovery._start import Start

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_the_axis_of_a_rule_is_that_of_the_guard_or_none() -> None:
    sharded = og.clip_by_global_norm(1.0, axis_name="x")
    og.guard(optax.sgd(1.0), sharded, og.skip_large(1.0), axis_name="x")
    with pytest.raises(ValueError, match="rule 0 has axis_name='x', the guard 'y'"):
        og.guard(optax.sgd(1.0), sharded, axis_name="y")


def test_back_off_may_wait_for_longer_than_the_guard_and_needs_no_parameters() -> None:
    tx = og.guard(optax.sgd(1.0), recovery=(og.back_off(after=60),), halt_after=50)
    updates, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    np.testing.assert_array_equal(updates, -1)
    assert not state.halted


def test_the_optimizer_gets_the_loss_in_the_type_in_which_it_was_given() -> None:
    seen: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = og.guard(inner)
    tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=jnp.bfloat16(0.5))
    assert {value.dtype for value in seen} == {jnp.dtype("bfloat16")}


def test_the_halt_of_a_member_looks_at_its_own_parameters() -> None:
    tx = og.guard(optax.sgd(1.0), halt_after=1)
    params = jnp.ones((2, 1))
    state = jax.vmap(tx.init)(params)
    _, state = quick_jit(jax.vmap(lambda g, s: tx.update(g, s)))(jnp.array([[1.0], [jnp.nan]]), state)
    with pytest.raises(og.TrainingHalted, match="The parameters are those before"):
        og.raise_if_halted(state, params.at[0].set(jnp.nan))


def test_a_second_rewind_with_one_snapshot_goes_to_that_one_again() -> None:
    run = Run(guarded(og.rewind(every=100, keep=2, after=2), inner=optax.sgd(1.0))).go(0.5)
    snapshot = run.params
    run.go(LARGE, LARGE, LARGE, LARGE)
    assert run.metrics["guard/rewind_total"] == 2
    jax.tree.map(np.testing.assert_array_equal, run.params, snapshot)


def test_no_snapshot_is_taken_of_moments_that_are_not_finite() -> None:
    run = Run(guarded(og.rewind(every=2), inner=optax.adam(0.1))).go(0.5)
    assert run.metrics["guard/snapshot_step"] == 1
    run.state = poisoned(run.state, np.inf)
    assert run.go(0.5, 0.5, 0.5, 0.5).metrics["guard/snapshot_step"] == 1


def test_no_snapshot_is_taken_while_the_loss_is_halfway_to_diverged() -> None:
    run = Run(guarded(og.rewind(every=5, diverged=2.0), inner=optax.sgd(0.0)))
    run.go(*[0.5] * 40, loss=1.0).go(*[0.5] * 80, loss=1.8)
    step = run.metrics["guard/snapshot_step"]
    assert 1.5 < run.metrics["guard/smoothed_loss"] < 2.0
    assert run.go(*[0.5] * 20, loss=1.8).metrics["guard/snapshot_step"] == step
    assert run.metrics["guard/rewind_total"] == 0


def test_exactly_half_of_the_moving_leaves_standing_still_is_silent_death() -> None:
    def update(updates: Any, step: Any, params: Any = None) -> Any:
        return {"kernel": -0.1 * updates["kernel"], "scale": jnp.where(step < 5, -0.1, 0.0)}, step + 1

    inner = optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)
    run = Run(guarded(og.reset_moments(after=50, check_every=2), inner=inner)).go(*[0.5] * 14)
    assert run.metrics["guard/silent_death_total"] >= 1
    assert "recovery" in run.log["event"]  # whose gradient was good, and is not applied


def test_while_halted_no_rule_learns() -> None:
    run = Run(og.guard(optax.sgd(0.1), og.clip_by_norm_history(), halt_after=1)).go(0.5, NAN)
    before = run.state.rule_states
    jax.tree.map(np.testing.assert_array_equal, run.go(0.5, LARGE, 0.5).state.rule_states, before)


def test_an_update_that_was_held_does_not_reset_the_count_of_refusals() -> None:
    spoil = optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.where(x == 7, jnp.nan, -x), u))
    run = Run(og.guard(spoil, og.skip_large(100.0), check_updates=True)).go(LARGE, 7.0)
    assert list(run.log["event"]) == ["skipped", "nonfinite_update"]
    assert run.state.refused_in_row == 1


def test_a_refused_step_names_the_rule_that_refused_it() -> None:
    run = Run(og.guard(optax.sgd(1.0), og.clip_by_leaf_norm(1.0), og.skip_large(0.5))).go(9.0)
    assert (run.log["event"][-1], run.log["rule"][-1]) == ("skipped", 1)


def test_a_float32_update_is_rounded_once_into_bfloat16_parameters() -> None:
    params, updates = jnp.full(1, 256.0, jnp.bfloat16), jnp.full(1, 1.003, jnp.float32)
    ours = og.apply_gradients(optax.identity(), updates, optax.EmptyState(), params)[0]
    assert ours == optax.apply_updates(params, updates) == 258  # rounded twice: 256


def test_a_cycle_that_kept_no_loss_records_the_last_one() -> None:
    tx = og.accumulate(og.guard(optax.sgd(1.0)), 2)
    step = quick_jit(lambda p, s, v: og.apply_gradients(tx, jnp.full(1, jnp.nan), s, p, value=v))
    params, state = jnp.ones(1), tx.init(jnp.ones(1))
    for loss in (2.0, 3.0):
        params, state = step(params, state, jnp.float32(loss))
    assert og.flight_log(state)["value"].tolist() == [3.0]


def test_alone_in_a_chain_a_loss_that_is_nan_gives_zeros() -> None:
    skip = og.skip_spikes(on="loss")
    updates, _ = skip.update(jnp.ones(2), skip.init(jnp.ones(2)), value=jnp.float32(jnp.nan))
    np.testing.assert_array_equal(updates, 0)


def test_a_guard_scales_the_step_after_trouble_both_ways() -> None:
    tx = og.guard(optax.sgd(1.0), recovery=(og.back_off(0.5, recover_after=2),))
    steps = quick_jit(lambda g, s, p: (og.apply_gradients(tx, g, s, p), tx.update(g, s, p)))
    state = steps(jnp.full(2, jnp.nan), tx.init(jnp.zeros(2)), jnp.zeros(2))[0][1]
    (params, _), (updates, _) = steps(jnp.ones(2), state, jnp.zeros(2))
    np.testing.assert_allclose(params, -0.5, rtol=1e-6)
    np.testing.assert_allclose(updates, -0.5, rtol=1e-6)


def test_a_healthy_step_after_a_held_one_is_no_trouble() -> None:
    run = Run(guarded(og.reset_moments(after=5))).go(NAN, LARGE)
    assert run.metrics["guard/trouble_in_row"] == 2
    assert run.go(0.5).metrics["guard/trouble_in_row"] == 0


def test_a_new_start_begins_at_the_parameters_of_its_step_and_waits_for_one_that_is_taken() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u: jnp.where(u == 7, jnp.nan, -0.01 * u), updates), state

    inner = optax.GradientTransformation(lambda params: {"origin": jax.tree.map(jnp.asarray, params)}, update)
    settings = _guard.Settings((Start(),), 10, 50, 64, check_updates=True, mask=None, axis_name=None)
    run = Run(_guard.guarded("guard", inner, (og.clip_by_norm_history(),), settings)).go(1e6, *[0.5] * 8)
    assert run.state.recovery_state.start_state.spoilt
    run.go(7.0)  # the step of the new start, whose update is held
    assert run.log["event"][-1] == "nonfinite_update"
    assert run.state.rule_states[0].norms_seen == 10
    run.go(0.5)  # and the one after it counts as trouble
    before = run.params
    run.go(0.5)
    assert run.metrics["guard/start_reset_total"] == 1
    assert run.state.rule_states[0].norms_seen == 0
    jax.tree.map(np.testing.assert_array_equal, run.state.guarded_state["origin"], before)
    assert run.go(0.5).state.rule_states[0].norms_seen == 1

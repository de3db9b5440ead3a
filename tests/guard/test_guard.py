"""The guard: held steps leave no trace, rules fuse, refusals end, halts are told."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import in_place
from helpers import bits, filled
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_guard as og

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3) - 2.5}, "b": jnp.array([1.0, -0.0, 3.0])}
LOSS = jnp.asarray(0.25)
BAD = [jnp.nan, jnp.inf, -jnp.inf, 1e30]
pytestmark = pytest.mark.usefixtures("standard_promotion")


def spoiled(number: float, leaf: int, element: int) -> dict[str, Any]:
    """Healthy gradients but for one element."""
    leaves, structure = jax.tree.flatten(filled(PARAMS, 0.5))
    leaves[leaf] = leaves[leaf].reshape(-1).at[element].set(number).reshape(leaves[leaf].shape)
    return jax.tree.unflatten(structure, leaves)


def optimizer() -> optax.GradientTransformation:
    """Something with moments, a schedule, weight decay, a key and a counter to leave alone."""
    return optax.chain(og.noise_injection(0.01, key=3), optax.adamw(optax.cosine_decay_schedule(0.1, 100)))


TX = og.guard(optimizer(), og.skip_large(100.0), og.clip_by_global_norm(1.0), patience=2, halt_after=3, recorder_rows=4)


@jax.jit
def fast(params: Any, state: Any, grads: Any) -> Any:
    return og.apply_gradients(TX, grads, state, params, value=LOSS)


@jax.jit
def through_optax(params: Any, state: Any, grads: Any) -> Any:
    updates, state = TX.update(grads, state, params, value=LOSS)
    return optax.apply_updates(params, updates), state


def run(step: Any, sequence: list[Any], params: Any = PARAMS, state: Any = None) -> Any:
    state = TX.init(params) if state is None else state
    for grads in sequence:
        params, state = step(params, state, grads)
    return params, state


@pytest.mark.parametrize("step", [fast, through_optax], ids=["apply_gradients", "update"])
@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize(("leaf", "element"), [(0, 0), (0, 5), (1, 1)])
def test_a_held_step_leaves_every_array_bit_identical(step: Any, number: float, leaf: int, element: int) -> None:
    params, state = run(step, [filled(PARAMS, 0.1)])
    held_params, held_state = step(params, state, spoiled(number, leaf, element))
    assert bits(held_params) == bits(params)
    assert bits(held_state.guarded_state) == bits(state.guarded_state)
    assert bits(held_state.rule_states) == bits(state.rule_states)
    chex.assert_tree_all_finite((held_params, held_state))
    row = og.flight_log(held_state)[-1]
    assert (row["event"], row["worst_leaf"], row["scale"], row["clipped_norm"]) == ("nonfinite", leaf, 0, 0)
    # what it held is told: NaN as NaN, Inf and overflow as Inf
    assert np.isnan(row["grad_norm"]) if np.isnan(number) else row["grad_norm"] == np.inf


def test_a_held_update_is_minus_zero_so_that_a_negative_zero_parameter_keeps_its_sign() -> None:
    updates, _ = TX.update(spoiled(jnp.nan, 0, 0), TX.init(PARAMS), PARAMS)
    assert all(np.all((np.asarray(x) == 0) & np.signbit(x)) for x in jax.tree.leaves(updates))
    after: Any = optax.apply_updates(PARAMS, updates)
    assert np.signbit(after["b"][1])


def test_both_ways_take_the_same_steps() -> None:
    sequence = [
        filled(PARAMS, 0.1),
        spoiled(jnp.nan, 1, 0),
        filled(PARAMS, 5.0),
        filled(PARAMS, 1e3),
        filled(PARAMS, 0.3),
        filled(PARAMS, 1e3),
    ]
    one, two = run(fast, sequence), run(through_optax, sequence)
    chex.assert_trees_all_close(one, two, rtol=2e-6)


def test_under_scan_and_donation_as_step_by_step() -> None:
    sequence = [
        filled(PARAMS, 0.1),
        spoiled(jnp.inf, 0, 2),
        filled(PARAMS, 5.0),
        filled(PARAMS, 1e3),
        filled(PARAMS, 0.3),
    ]
    expected = run(fast, sequence)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)

    def body(carry: Any, grads: Any) -> Any:
        return og.apply_gradients(TX, grads, carry[1], carry[0], value=LOSS), None

    scanned = jax.jit(lambda p, s: jax.lax.scan(body, (p, s), stacked)[0], donate_argnums=(0, 1))
    result = scanned(jax.tree.map(jnp.copy, PARAMS), jax.tree.map(jnp.copy, TX.init(PARAMS)))
    chex.assert_trees_all_close(result, expected, rtol=2e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([jnp.nan, jnp.inf, 1e30, 0.0, 1e-3, 1.0, 50.0, 1e4]), st.sampled_from([0, 1])),
        min_size=1,
        max_size=12,
    )
)
def test_nothing_non_finite_ever_reaches_parameters_or_state(history: list[tuple[float, int]]) -> None:
    with jax.numpy_dtype_promotion("standard"):
        params, state = run(fast, [spoiled(number, leaf, 1) for number, leaf in history])
    chex.assert_tree_all_finite((params, state))
    assert int(state.guard_step) == len(history)
    bad = [not abs(number) < 1e19 for number, _ in history]
    assert int(state.nonfinite_total) == sum(bad)
    assert bool(state.halted) == any(all(bad[i : i + 3]) for i in range(len(bad) - 2))


def test_n_rules_fused_equal_n_rules_chained() -> None:
    rules = (og.clip_by_leaf_norm(2.0), og.clip_by_global_norm(lambda step: 1.0 / (1 + step)), og.skip_large(0.9))
    fused, chained = og.guard(optax.sgd(1.0), *rules), optax.chain(*rules, optax.sgd(1.0))
    params, fused_state, chained_state = PARAMS, fused.init(PARAMS), chained.init(PARAMS)
    for size in (0.01, 3.0, 40.0, 0.2):
        grads = jax.tree.map(lambda x, size=size: size * jnp.cos(x), PARAMS)
        one, fused_state = fused.update(grads, fused_state, params)
        two, chained_state = chained.update(grads, chained_state, params)
        chex.assert_trees_all_close(one, two, rtol=1e-6)


def test_silent_rules_and_no_rules_equal_the_inner_optimizer_bit_for_bit() -> None:
    inner = optax.adam(0.1)
    for tx in (og.guard(inner), og.guard(inner, og.clip_by_global_norm(1e9), og.skip_large(1e9))):
        grads = filled(PARAMS, 0.7)
        ours, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
        theirs, _ = jax.jit(inner.update)(grads, inner.init(PARAMS), PARAMS)
        assert bits(ours) == bits(theirs)


def test_patience_lets_one_refused_step_through_and_starts_again() -> None:
    _, state = run(fast, [filled(PARAMS, 1e3)] * 7)
    events = ["skipped", "skipped", "let_through"] * 2 + ["skipped"]
    assert list(og.flight_log(state)["event"]) == events[-4:]  # recorder_rows=4
    metrics = jax.device_get(og.metrics(state))
    assert (metrics["guard/skipped_total"], metrics["guard/let_through_total"]) == (5, 2)
    assert og.flight_log(state)["clipped_norm"][-2] == pytest.approx(1.0)  # let through as the rules scale it


def test_patience_counts_no_non_finite_step_and_is_not_reset_by_one() -> None:
    nan = spoiled(jnp.nan, 0, 0)
    _, state = run(fast, [filled(PARAMS, 1e3), nan, filled(PARAMS, 1e3), nan, filled(PARAMS, 1e3)])
    assert list(og.flight_log(state)["event"]) == ["nonfinite", "skipped", "nonfinite", "let_through"]


def test_patience_zero_only_scales() -> None:
    tx = og.guard(optax.sgd(1.0), og.skip_large(1.0), patience=0)
    _, state = og.apply_gradients(tx, filled(PARAMS, 5.0), tx.init(PARAMS), PARAMS)
    assert og.flight_log(state)["event"][0] == "let_through"


def test_halted_holds_every_later_step_until_the_host_clears_it() -> None:
    nan = spoiled(jnp.nan, 1, 2)
    before, _ = run(fast, [filled(PARAMS, 0.1)])
    params, state = run(fast, [filled(PARAMS, 0.1), nan, nan, filled(PARAMS, 0.1)])
    og.raise_if_halted(state, params)  # two in a row, then a healthy one: not halted
    params, state = run(fast, [nan, nan, nan, filled(PARAMS, 0.1)], *run(fast, [filled(PARAMS, 0.1)]))
    assert bits(params) == bits(before)
    assert list(og.flight_log(state)["event"]) == ["nonfinite"] * 3 + ["halted"]
    with pytest.raises(og.TrainingHalted, match=r"^halted at step 3 after 3 non-finite steps in a row.*`b` held NaN"):
        og.raise_if_halted(state, params)
    with pytest.raises(og.TrainingHalted, match="of leaf 1"):
        og.raise_if_halted({"nested": [state]})
    params, state = fast(params, og.clear_halt(state), filled(PARAMS, 0.1))
    assert bits(params) != bits(before)
    assert not state.halted


def test_clear_halt_reaches_a_guard_inside_a_guard() -> None:
    inner = og.guard(optax.sgd(1.0), halt_after=1)
    tx = og.guard(optax.chain(inner), halt_after=1)
    state = tx.init(PARAMS)
    state = state._replace(halted=jnp.ones((), bool))
    cleared = og.clear_halt(state)
    assert not cleared.halted
    chex.assert_trees_all_equal_structs(cleared, state)


def test_check_updates_holds_a_step_whose_update_is_not_finite() -> None:
    params = {"w": jnp.ones(3, jnp.float16)}
    zero = {"w": jnp.zeros(3, jnp.float16)}
    for check, event in ((False, "applied"), (True, "nonfinite_update")):
        tx = og.guard(optax.adam(1e-3), check_updates=check, halt_after=1)
        for take in (og.apply_gradients, _protocol):
            after, state = take(tx, zero, tx.init(params), params)
            assert bool(jnp.all(jnp.isfinite(after["w"]))) == check  # float16 Adam turns a zero gradient into NaN
            assert og.flight_log(state)["event"][0] == event
            assert bits(state.guarded_state) == bits(tx.init(params).guarded_state) or not check
    with pytest.raises(og.TrainingHalted, match="update of `w` was not"):
        og.raise_if_halted(state, params)


def _protocol(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def test_mixed_dtypes_do_not_trip_the_branches() -> None:
    """bfloat16 gradients on float32 parameters: `optax.apply_if_finite` raises a TypeError here."""
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(PARAMS, 0.5))
    tx = og.guard(optax.adamw(0.1), og.clip_by_global_norm(1.0))
    for take in (og.apply_gradients, _protocol):
        params, state = take(tx, grads, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (PARAMS, tx.init(PARAMS)))


def test_a_rule_that_answers_nan_is_held_and_counted() -> None:
    tx = og.guard(optax.sgd(1.0), og.clip_by_global_norm(lambda step: jnp.nan * step))
    params, state = og.apply_gradients(tx, filled(PARAMS, 1.0), tx.init(PARAMS), PARAMS)
    assert bits(params) == bits(PARAMS)
    assert og.metrics(state)["guard/nonfinite_total"] == 1
    tx = og.guard(optax.sgd(1.0), og.clip_by_global_norm(lambda step: jnp.nan * step), halt_after=1)
    _, state = og.apply_gradients(tx, filled(PARAMS, 1.0), tx.init(PARAMS), PARAMS)
    with pytest.raises(og.TrainingHalted, match="gradient was finite, but a rule returned a scale that was not"):
        og.raise_if_halted(state, PARAMS)


def test_the_recorder_keeps_the_last_rows_and_the_loss_as_it_was() -> None:
    params, state = PARAMS, TX.init(PARAMS)
    for loss in (1.0, 2.0, jnp.nan, jnp.inf, -jnp.inf):
        params, state = og.apply_gradients(TX, filled(PARAMS, 0.1), state, params, value=loss)
    params, state = og.apply_gradients(TX, filled(PARAMS, 0.1), state, params)
    log = og.flight_log(state)
    np.testing.assert_array_equal(log["step"], [2, 3, 4, 5])
    np.testing.assert_array_equal(log["value"], [np.nan, np.inf, -np.inf, np.nan])
    chex.assert_tree_all_finite(state)
    norm = np.sqrt(9 * 0.1**2)
    np.testing.assert_allclose(log["grad_norm"], norm, rtol=1e-6)
    assert log.dtype.names == (
        *("step", "value", "grad_norm", "clipped_norm", "scale", "max_logit"),
        *("event", "rule", "worst_leaf", "recovery", "tag", "value_given", "logit_layer", "logit_head"),
    )


def test_metrics_before_the_first_step_and_of_foreign_states() -> None:
    metrics = jax.device_get(jax.jit(og.metrics)(TX.init(PARAMS)))
    assert (metrics["guard/grad_norm"], metrics["guard/worst_leaf"], metrics["guard/skipped"]) == (0, -1, 0)
    assert og.metrics(optax.adam(0.1).init(PARAMS)) == {}
    with pytest.raises(ValueError, match="no guard"):
        og.raise_if_halted(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="expected one guard"):
        og.flight_log(optax.adam(0.1).init(PARAMS))


def test_metrics_name_the_worst_leaf_and_number_several_guards() -> None:
    tx = optax.partition(
        {"x": og.guard(optax.sgd(0.1)), "y": og.guard(optax.sgd(0.1))}, {"a": {"kernel": "x"}, "b": "y"}
    )
    _, state = og.apply_gradients(tx, spoiled(100.0, 1, 0), tx.init(PARAMS), PARAMS)
    metrics = og.metrics(state)
    assert {name.split("/")[0] for name in metrics} == {"guard", "guard_1"}
    _, state = fast(PARAMS, TX.init(PARAMS), spoiled(9.0, 1, 0))
    assert og.leaf_names(PARAMS)[int(og.metrics(state)["guard/worst_leaf"])] == "b"


def test_an_inner_state_that_changes_its_structure_is_refused_with_the_reason() -> None:
    tx = og.guard(optax.monitor({"norm": optax.tree.norm}))
    with pytest.raises(ValueError, match=r"structure of its state.*monitor"):
        og.apply_gradients(tx, filled(PARAMS, 1.0), tx.init(PARAMS), PARAMS)


def test_a_loss_that_is_not_scalar_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`value` must be the scalar loss.*\(2,\)"):
        og.apply_gradients(TX, filled(PARAMS, 1.0), TX.init(PARAMS), PARAMS, value=jnp.ones(2))


@in_place
def test_the_guarded_step_copies_nothing() -> None:
    """The form of the cond decides it: see the comment in `guard`."""
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(4)}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    for tx in (
        og.guard(optax.adamw(1e-3), og.clip_by_global_norm(1.0)),
        og.accumulate(og.guard(optax.adamw(1e-3), og.clip_by_global_norm(1.0)), 4),
    ):
        step = jax.jit(lambda p, s, g, tx=tx: og.apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
        analysis = step.lower(params, tx.init(params), params).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < 0.05 * size


def test_the_object_optax_multisteps_can_be_guarded_as_it_is() -> None:
    tx = og.guard(optax.MultiSteps(optax.sgd(1.0), 2), og.clip_by_global_norm(1e6))
    params, state = PARAMS, tx.init(PARAMS)
    for number in (1.0, 3.0):
        params, state = og.apply_gradients(tx, filled(PARAMS, number), state, params)
    np.testing.assert_allclose(PARAMS["b"] - params["b"], 2.0)


def test_a_row_of_the_recorder_takes_the_bytes_that_are_stated() -> None:
    shorter, longer = (og.guard(optax.sgd(0.1), recorder_rows=rows).init(PARAMS).recorder for rows in (1, 2))
    row = sum(b.nbytes - a.nbytes for a, b in zip(jax.tree.leaves(shorter), jax.tree.leaves(longer), strict=True))
    assert f"each takes {row} bytes" in str(og.guard.__doc__)

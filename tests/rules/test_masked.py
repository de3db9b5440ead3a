"""What is not trained is not judged: it has no weight in any norm, can hold no step, and is never read."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from jax.interpreters import partial_eval
from registry import ENTRIES, momentum

import optax_guard as og

PARAMS = {"base": np.array([1.0, np.inf, -2.0], np.float32), "lora": {"a": np.ones(2, np.float32), "b": np.ones(1)}}
PARAMS["lora"]["b"] = np.full((1, 2), 0.5, np.float32)
TRAINED = {"base": False, "lora": True}
GARBAGE = (np.nan, 1e30, -np.inf, 3.0, 0.0, np.nan)


def gradients(step: int) -> Any:
    """Ordinary, large, ordinary, NaN in a trained leaf, ordinary, ordinary; in the frozen leaf, garbage throughout."""
    rng = np.random.default_rng(step)
    size = 50.0 if step == 1 else 1.0
    tree = jax.tree.map(lambda x: rng.normal(0, size, x.shape).astype(np.float32), PARAMS)
    tree["base"] = np.full(3, GARBAGE[step], np.float32)
    if step == 3:
        tree["lora"]["a"][1] = np.nan
    return tree


def guarded(mask: Any, **settings: Any) -> Any:
    return og.guard(momentum(0.1), og.clip_by_global_norm(1.0), og.clip_by_leaf_norm(0.8), mask=mask, **settings)


def recovering(mask: Any) -> Any:
    rungs = og.reset_moments(after=2, check_every=2), og.back_off(), og.rewind(every=2, after=3)
    return guarded(mask, recovery=rungs, check_updates=True)


STACKS: dict[str, Callable[[Any], Any]] = {
    "guard": guarded,
    "recovery": recovering,
    "stabilize": lambda mask: og.stabilize(momentum(0.1), max_change=0.01, mask=mask),
    "accumulate": lambda mask: og.accumulate(guarded(mask), 2),
    "accumulate_one": lambda mask: og.accumulate(guarded(mask), 1),
    "drop_cycle": lambda mask: og.accumulate(guarded(mask), 3, on_nonfinite="drop_cycle"),
    "loss_scaling": lambda mask: og.loss_scaling(guarded(mask), init=4.0),
    "both": lambda mask: og.loss_scaling(og.accumulate(guarded(mask), 2), init=4.0),
}


def trained(txs: dict[str, Any], params: Any, part: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Parameters and metrics of several transformations after six steps, all in one compiled program."""

    @quick_jit
    def step_all(grads: Any, pairs: Any) -> Any:
        loss = jnp.float32(1.0)
        return {name: og.apply_gradients(tx, grads, *reversed(pairs[name]), value=loss) for name, tx in txs.items()}

    pairs = {name: (params, tx.init(params)) for name, tx in txs.items()}
    for step in range(6):
        pairs = step_all(part(gradients(step)), pairs)
    numbers = {name: {k: np.asarray(v) for k, v in og.metrics(state).items()} for name, (_, state) in pairs.items()}
    numbers["recovery"]["snapshots_held"] = np.asarray(pairs["recovery"][1].recovery_state.rewind_state.snapshots_held)
    return {name: new for name, (new, _) in pairs.items()}, numbers


@pytest.mark.parametrize(
    "names", [("guard", "recovery", "both"), pytest.param(tuple(STACKS), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_masked_guard_equals_one_that_never_met_the_frozen_leaves(names: tuple[str, ...]) -> None:
    """NaN, Inf and 1e30 there neither hold, drop nor scale anything; the leaf itself, Inf included, keeps its bits."""
    params, numbers = trained({name: STACKS[name](TRAINED) for name in names}, PARAMS, lambda tree: tree)
    without = {name: STACKS[name](None) for name in names}
    expected, expected_numbers = trained(without, PARAMS["lora"], lambda tree: tree["lora"])
    for name in names:
        chex.assert_trees_all_close(params[name]["lora"], expected[name], rtol=1e-6)
        np.testing.assert_array_equal(params[name]["base"], PARAMS["base"])
        for key, number in expected_numbers[name].items():
            if not key.endswith("worst_leaf"):
                np.testing.assert_allclose(numbers[name][key], number, rtol=1e-6, err_msg=f"{name} {key}")
    assert numbers["guard"]["guard/nonfinite_total"] == 1
    assert numbers["recovery"]["snapshots_held"] > 0


@pytest.mark.parametrize("name", STACKS)
def test_the_gradient_of_a_frozen_leaf_is_never_read(name: str) -> None:
    tx = STACKS[name](lambda tree: jax.tree.map(lambda leaf: leaf.shape != (3,), tree))

    def step(frozen: Any, rest: Any, params: Any, state: Any) -> Any:
        return og.apply_gradients(tx, {"base": frozen, "lora": rest}, state, params, value=jnp.float32(1.0))

    grads = gradients(0)
    jaxpr = jax.make_jaxpr(step)(grads["base"], grads["lora"], PARAMS, jax.eval_shape(tx.init, PARAMS)).jaxpr
    used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]
    assert used[:3] == [False, True, True]


def test_a_pattern_a_tree_and_a_function_are_the_same_and_update_needs_no_params() -> None:
    masks = "lora/*", TRAINED, lambda tree: {"base": False, "lora": jax.tree.map(lambda _: True, tree["lora"])}
    grads = gradients(0)

    @quick_jit
    def updates() -> Any:
        txs = [og.guard(optax.sgd(1.0), og.clip_by_global_norm(0.1), mask=mask) for mask in masks]
        return [tx.update(grads, tx.init(PARAMS))[0] for tx in txs]

    for each in updates():
        np.testing.assert_allclose(og.global_norm(each), 0.1, rtol=1e-6)
        np.testing.assert_array_equal(each["base"], np.zeros(3))
    for wrong, words in (
        ("nothing", "matches no leaf"),
        ({"base": True}, "lacks leaf"),
        ({"base": 1, "lora": 0}, "hold"),
    ):
        with pytest.raises(ValueError, match=f"guard: `mask`.*{words}"):
            og.guard(optax.sgd(1.0), mask=wrong).init(PARAMS)


def test_leaves_without_a_gradient_have_no_weight_without_any_mask() -> None:
    """`None`, and what `optax.masked` leaves of a tree."""
    grads = gradients(0)
    expected = float(og.global_norm(grads["lora"]))
    tx = og.guard(optax.sgd(1.0))
    _, state = tx.update({**grads, "base": None}, tx.init(PARAMS))
    assert float(og.metrics(state)["guard/grad_norm"]) == pytest.approx(expected)
    masked = optax.masked(tx, TRAINED)
    updates, state = masked.update(grads, masked.init(PARAMS))
    assert float(og.metrics(state)["guard/grad_norm"]) == pytest.approx(expected)
    np.testing.assert_array_equal(updates["base"], grads["base"])


def test_frozen_by_partition_with_decay_the_run_goes_on_and_the_leaf_keeps_its_bits() -> None:
    labels = {"base": "frozen", "lora": "trained"}
    with jax.numpy_dtype_promotion("standard"):
        inner = optax.partition({"trained": optax.adamw(0.1), "frozen": optax.set_to_zero()}, labels)
        tx = og.guard(inner, og.clip_by_global_norm(1.0), mask=TRAINED, halt_after=2)
        params, state = PARAMS, tx.init(PARAMS)
        step = quick_jit(lambda grads, params, state: og.apply_gradients(tx, grads, state, params))
        for _ in range(3):
            params, state = step({**gradients(0), "base": np.full(3, np.nan, np.float32)}, params, state)
    assert not bool(state.halted)
    np.testing.assert_array_equal(params["base"], PARAMS["base"])
    assert float(og.metrics(state)["guard/grad_norm"]) == pytest.approx(float(og.global_norm(gradients(0)["lora"])))


# A rule for one group

RULES = [entry for entry in ENTRIES if entry.is_rule]
FEW = [e for e in RULES if e.name in ("clip_by_global_norm", "clip_by_leaf_norm", "skip_large", "rule")]


@pytest.mark.parametrize("rules", [FEW, pytest.param(RULES, marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_masked_rule_is_the_rule_on_a_smaller_tree(rules: list[Any]) -> None:
    """In a chain, where `optax.masked` does the same; the other leaves keep their bits, unless it skips."""

    @quick_jit
    def both(grads: Any, states: Any) -> Any:
        pairs = []
        for entry, (ours, theirs) in zip(rules, states, strict=True):
            kept, other = og.masked_rule(entry.make(), TRAINED), optax.masked(entry.make(), TRAINED)
            extra = {"value": jnp.float32(1.0)}
            pairs.append((kept.update(grads, ours, **extra), other.update(grads, theirs, **extra)))
        return pairs

    states = [
        (og.masked_rule(e.make(), TRAINED).init(PARAMS), optax.masked(e.make(), TRAINED).init(PARAMS)) for e in rules
    ]
    for step in range(4):
        pairs = both(gradients(step), states)
        states = [(ours[1], theirs[1]) for ours, theirs in pairs]
        for entry, ((ours, kept), (theirs, other)) in zip(rules, pairs, strict=True):
            chex.assert_trees_all_close(ours["lora"], theirs["lora"], rtol=1e-6)
            skipped = all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(ours))
            assert skipped or np.array_equal(ours["base"], theirs["base"], equal_nan=True), str(entry)
            smaller = jax.tree.leaves(other.inner_state)
            if [x.shape for x in smaller] == [x.shape for x in jax.tree.leaves(kept.masked_rule_state)]:
                chex.assert_trees_all_close(jax.tree.leaves(kept.masked_rule_state), smaller, rtol=1e-5)


def test_two_groups_are_bounded_apart_from_one_read_of_the_gradient() -> None:
    grads = {"embed": jnp.array([30.0, 40.0]), "head": jnp.array([[6.0, 8.0]])}
    rules = og.masked_rule(og.clip_by_global_norm(1.0), "embed"), og.masked_rule(og.clip_by_global_norm(5.0), "head")
    tx = og.guard(optax.sgd(1.0), *rules)
    state = tx.init(grads)
    updates, after = jax.jit(tx.update)(grads, state)
    np.testing.assert_allclose(updates["embed"], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["head"], [[-3.0, -4.0]], rtol=1e-6)
    assert float(og.metrics(after)["guard/grad_norm"]) == pytest.approx(np.hypot(50.0, 10.0))

    def reads(tx: Any) -> int:
        jaxpr = jax.make_jaxpr(tx.update)(grads, tx.init(grads)).jaxpr
        return sum(each in jaxpr.invars[:2] for equation in jaxpr.eqns for each in _variables(equation))

    assert reads(og.guard(optax.sgd(1.0), *rules)) == reads(og.guard(optax.sgd(1.0), og.clip_by_global_norm(1.0)))
    with pytest.raises(ValueError, match="masked_rule: `mask` 'head' matches no leaf"):
        tx.update({"embed": grads["embed"]}, state)


def _variables(equation: Any) -> list[Any]:
    return [each for each in equation.invars if not hasattr(each, "val")]


def test_what_is_no_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"masked_rule: `inner` must be made by `rule`.*use `optax.masked`"):
        og.masked_rule(optax.clip(1.0), True)

"""Wrong input: named with function, argument or path; a bad number inside a step is none."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conforming import GRADS, PARAMS, each, run, types
from registry import ENTRIES, Entry, schedule

import optax_guard as og

SGD = optax.sgd(0.1)


TREE = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}}


LACKING = {"dense": {"bias": jnp.zeros(2)}}


TOO_MUCH = {"dense": {**TREE["dense"], "scale": jnp.zeros(2)}}


NOT_ARRAY = {"dense": {"bias": "1.5", "kernel": jnp.zeros((2, 2))}}


WRONG_ARGUMENTS = {  # the call, and what the message must say: function, argument, value, range
    "negative max_norm": (lambda: og.clip_by_global_norm(-1.0), "clip_by_global_norm: `max_norm` -1.0 [0, inf]"),
    "negative leaf norm": (lambda: og.clip_by_leaf_norm(-1), "clip_by_leaf_norm: `max_norm` -1 [0, inf]"),
    "NaN max_norm": (lambda: og.clip_by_global_norm(np.nan), "clip_by_global_norm: `max_norm` nan [0, inf]"),
    "NumPy max_norm": (lambda: og.skip_large(np.float32(-2.0)), "skip_large: `max_norm` -2.0 [0, inf]"),
    "text max_norm": (lambda: og.clip_by_global_norm("1"), "clip_by_global_norm: `max_norm` '1' [0, inf]"),
    "True max_norm": (lambda: og.clip_by_global_norm(True), "clip_by_global_norm: `max_norm` True [0, inf]"),
    "None max_norm": (lambda: og.clip_by_leaf_norm(None), "clip_by_leaf_norm: `max_norm` None [0, inf]"),
    "vector max_norm": (lambda: og.clip_by_global_norm(jnp.ones(2)), "clip_by_global_norm: `max_norm` (2,) [0, inf]"),
    "NumPy vector": (lambda: og.clip_by_leaf_norm(np.ones(2)), "clip_by_leaf_norm: `max_norm` [1., 1.] [0, inf]"),
    "complex max_norm": (lambda: og.skip_large(jnp.ones((), complex)), "skip_large: `max_norm` complex64 [0, inf]"),
    "negative max_value": (lambda: og.clip_by_value(-0.5), "clip_by_value: `max_value` -0.5 [0, inf]"),
    "negative clipping": (lambda: og.adaptive_grad_clip(-0.1), "adaptive_grad_clip: `clipping` -0.1 [0, inf)"),
    "eps of zero": (lambda: og.adaptive_grad_clip(0.1, eps=0.0), "adaptive_grad_clip: `eps` 0.0 (0, inf)"),
    "NaN strength": (lambda: og.l1_penalty(np.nan), "l1_penalty: `strength` nan [0, inf)"),
    "infinite strength": (lambda: og.l1_penalty(np.inf), "l1_penalty: `strength` inf [0, inf)"),
    "negative eta": (lambda: og.noise_injection(-0.1), "noise_injection: `eta` -0.1 [0, inf)"),
    "negative gamma": (lambda: og.noise_injection(gamma=-0.1), "noise_injection: `gamma` -0.1 [0, inf)"),
    "negative bound": (lambda: og.noise_injection(max_norm=-1), "noise_injection: `max_norm` -1 [0, inf)"),
    "relative to what": (
        lambda: og.noise_injection(relative_to="loss"),
        "noise_injection: `relative_to` 'loss' 'none' 'gradient'",
    ),
    "key of text": (lambda: og.noise_injection(key="7"), "noise_injection: `key` '7' int uint32"),
    "key of floats": (lambda: og.noise_injection(key=jnp.ones(2)), "noise_injection: `key` 1. uint32"),
    "two keys": (lambda: og.noise_injection(key=jax.random.split(jax.random.key(0))), "noise_injection: `key` uint32"),
    "patience": (lambda: og.guard(SGD, patience=-1), "guard: `patience` -1 >= 0"),
    "halt_after": (lambda: og.guard(SGD, halt_after=0), "guard: `halt_after` 0 >= 1"),
    "recorder_rows": (lambda: og.guard(SGD, recorder_rows=0), "guard: `recorder_rows` 0 >= 1"),
    "check_updates": (lambda: og.guard(SGD, check_updates=1), "guard: `check_updates` 1 True False"),
    "no rule": (
        lambda: og.guard(SGD, optax.clip(1.0)),
        "guard: `rules[0]` must be made by `rule` GradientTransformation",
    ),
    "a number as rule": (lambda: og.guard(SGD, og.skip_large(9.0), 1.0), "guard: rule 1 1.0"),
    "inner of guard": (lambda: og.guard(optax.sgd), "guard: `inner` optax.GradientTransformation sgd"),
    "axis_name": (
        lambda: og.guard(SGD, og.clip_by_global_norm(1.0, axis_name="x"), axis_name="y"),
        "guard: rule 0 axis_name 'x' 'y'",
    ),
    "inner of accumulate": (lambda: og.accumulate(1.0, 2), "accumulate: `inner` optax.GradientTransformation 1.0"),
    "every zero": (lambda: og.accumulate(SGD, 0), "accumulate: `every` 0 >= 1"),
    "every fraction": (lambda: og.accumulate(SGD, 2.5), "accumulate: `every` 2.5 >= 1"),
    "every True": (lambda: og.accumulate(SGD, True), "accumulate: `every` True >= 1"),
    "reduction": (
        lambda: og.accumulate(SGD, 2, reduction="median"),
        "accumulate: `reduction` median mean sum max last",
    ),
    "accumulator_dtype": (
        lambda: og.accumulate(SGD, 2, accumulator_dtype=jnp.int32),
        "accumulate: `accumulator_dtype` int32 floating",
    ),
    "a schedule as inner": (lambda: og.guard(schedule), "guard: `inner` schedule"),
    "a schedule as inner of accumulate": (lambda: og.accumulate(schedule, 2), "accumulate: `inner` schedule"),
}


def assert_raises(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    missing = [word for word in words.split(" ") if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_static_arguments_are_named_with_function_value_and_range(case: str) -> None:
    assert_raises(*WRONG_ARGUMENTS[case])


def update_with(tx: optax.GradientTransformation, grads: Any, params: Any = TREE) -> Callable[[], Any]:
    return lambda: jax.eval_shape(lambda: tx.update(grads, tx.init(TREE), params))


def step_with(tx: optax.GradientTransformation, grads: Any) -> Callable[[], Any]:
    return lambda: jax.eval_shape(lambda: og.apply_gradients(tx, grads, tx.init(TREE), TREE))


WRONG_SHAPE = {"dense": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 2))}}


WRONG_TREES = {
    "mask with another leaf": (
        lambda: og.l1_penalty(0.1, mask={"dense": {"scale": True}}).init(TREE),
        "l1_penalty: mask dense/",
    ),
    "mask of numbers": (lambda: og.l1_penalty(0.1, mask={"dense": 1}).init(TREE), "l1_penalty: `mask` `dense` 1"),
    "mask of noise": (lambda: og.noise_injection(mask={"other": True}).init(TREE), "noise_injection: mask dense/"),
    "axis out of range": (
        update_with(og.adaptive_grad_clip(0.1, axis={"dense": {"bias": 1, "kernel": 0}}), TREE),
        "adaptive_grad_clip: `axis` 1 `dense/bias` rank 1",
    ),
    "axis of another leaf": (
        update_with(og.adaptive_grad_clip(0.1, axis={"head": 0}), TREE),
        "adaptive_grad_clip: `head`",
    ),
    "axis that is none": (
        update_with(og.adaptive_grad_clip(0.1, axis={"dense": 0.5}), TREE),
        "adaptive_grad_clip: `dense` 0.5",
    ),
    "shape in accumulate": (
        update_with(og.accumulate(SGD, 2), WRONG_SHAPE, None),
        "accumulate: `dense/bias` (3,) (2,)",
    ),
    "shape in the fast accumulate": (
        step_with(og.accumulate(SGD, 2), WRONG_SHAPE),
        "apply_gradients: `dense/bias` (3,) (2,)",
    ),
    "weight of accumulate": (
        lambda: og.apply_gradients(
            og.accumulate(SGD, 2), TREE, og.accumulate(SGD, 2).init(TREE), TREE, weight=jnp.ones(2)
        ),
        "accumulate: `weight` scalar float32[2]",
    ),
    "loss of guard": (
        lambda: og.apply_gradients(og.guard(SGD), TREE, og.guard(SGD).init(TREE), TREE, value=jnp.ones(2)),
        "guard: `value` scalar (2,)",
    ),
    "leaf missing in apply_gradients": (step_with(SGD, LACKING), "apply_gradients: `grads` `dense/kernel`"),
    "leaf too many in apply_gradients": (step_with(SGD, TOO_MUCH), "apply_gradients: `grads` `dense/scale`"),
    "not an array in apply_gradients": (step_with(SGD, NOT_ARRAY), "apply_gradients: `dense/bias` str '1.5'"),
    "not an array in gradient_statistics": (
        lambda: og.gradient_statistics(NOT_ARRAY),
        "gradient_statistics: `dense/bias`",
    ),
    "an optimizer whose state changes shape": (
        update_with(og.guard(optax.monitor({"norm": optax.tree.norm})), TREE),
        "guard: structure state",
    ),
    "has_updated without accumulate": (lambda: og.has_updated(SGD.init(TREE)), "has_updated: `accumulate` 0"),
    "flight_log without guard": (lambda: og.flight_log(SGD.init(TREE)), "flight_log: guard 0"),
    "raise_if_halted without guard": (lambda: og.raise_if_halted(SGD.init(TREE)), "raise_if_halted: guard"),
}


@pytest.mark.parametrize("case", WRONG_TREES)
def test_wrong_trees_and_states_are_named_with_function_and_path(case: str) -> None:
    assert_raises(*WRONG_TREES[case])


@each([entry for entry in ENTRIES if entry.wraps or entry.needs_params])
@pytest.mark.parametrize(("tree", "path"), [(LACKING, "`dense/kernel`"), (TOO_MUCH, "`dense/scale`")])
def test_gradients_that_do_not_match_the_parameters_are_named_by_path(entry: Entry, tree: Any, path: str) -> None:
    assert_raises(update_with(entry.make_strict(), tree), f"`updates` {path}")


@each(ENTRIES)
def test_a_leaf_that_is_not_an_array_is_named_by_its_path(entry: Entry) -> None:
    assert_raises(update_with(entry.make_strict(), NOT_ARRAY), "`dense/bias` str")


NUMERIC = {
    "max_norm": lambda x: og.clip_by_global_norm(x),
    "leaf norm": lambda x: og.clip_by_leaf_norm(x),
    "max_value": lambda x: og.clip_by_value(x),
    "clipping": lambda x: og.adaptive_grad_clip(x),
    "eps": lambda x: og.adaptive_grad_clip(0.1, eps=x),
    "skip": lambda x: og.skip_large(x),
    "strength": lambda x: og.l1_penalty(x),
    "dense strength": lambda x: og.dense_penalty(x, "pseudo_huber"),
    "l1 of elastic net": lambda x: og.elastic_net_penalty(x, 0.1),
    "l2 of elastic net": lambda x: og.elastic_net_penalty(0.1, x),
    "threshold": lambda x: og.shrink_gradients(x),
    "proximal strength": lambda x: og.proximal_l1(SGD, x, learning_rate=0.1),
    "proximal rate": lambda x: og.proximal_group_lasso(SGD, 0.1, learning_rate=x),
    "eta": lambda x: og.noise_injection(x),
    "gamma": lambda x: og.noise_injection(gamma=x),
    "noise norm": lambda x: og.noise_injection(max_norm=x),
}


@pytest.mark.parametrize("argument", NUMERIC)
def test_traced_and_scheduled_values_are_never_validated(argument: str) -> None:
    def update(number: Any) -> Any:
        tx = NUMERIC[argument](number)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]

    assert types(jax.eval_shape(update, jnp.asarray(-1.0))) == types(PARAMS)  # traced
    assert types(jax.eval_shape(lambda: update(jnp.asarray(-1.0)))) == types(PARAMS)  # a concrete array
    if argument != "eps":
        assert types(jax.eval_shape(lambda: update(lambda _: -1.0))) == types(PARAMS)


@each(ENTRIES)
@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38, 1e-45])
def test_no_value_of_a_gradient_raises_and_wrappers_keep_their_states_finite(entry: Entry, number: float) -> None:
    grads = jax.tree.map(lambda x: np.full_like(x, number), PARAMS)
    with entry.promotion():
        params, state = run(entry, [grads, GRADS[0], grads, grads])
    if entry.holds or entry.is_rule:
        chex.assert_tree_all_finite([x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)])
    if entry.holds and not np.isfinite(number):
        chex.assert_tree_all_finite(params)
    if entry.name == "guard" and not np.isfinite(number):
        assert state.nonfinite_total == 3

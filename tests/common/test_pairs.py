"""A transformation is a pair of functions: whoever takes it apart and rebuilds it gets one that does the same."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import chex
import cloudpickle
import dill
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from flax.training.train_state import TrainState
from parts import in_part
from registry import ENTRIES, Entry, guarded, momentum

import optax_guard as og

PARAMS = {"bias": np.ones(2, np.float32), "kernel": np.ones((2, 2), np.float32)}
LOSS = np.float32(0.5)
each = functools.partial(pytest.mark.parametrize, "entry", ids=str)


class Held(eqx.Module):
    tx: Any


@flax.struct.dataclass
class HeldByFlax:
    tx: Any


@dataclasses.dataclass
class HeldByPython:
    tx: Any


def through_filter_jit(tx: Any) -> Any:
    seen: list[Any] = []
    eqx.filter_jit(lambda tx: seen.append(tx))(tx)
    return seen[0]


def through_a_train_state(tx: Any) -> Any:
    return copy.deepcopy(TrainState.create(apply_fn=None, params={}, tx=optax.sgd(0.1)).replace(tx=tx)).tx


REBUILT: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "tree.map": lambda tx: jax.tree.map(lambda function: function, tx),
    "_replace": lambda tx: tx._replace(init=tx.init),
    "a pair": lambda tx: optax.GradientTransformationExtraArgs(tx.init, tx.update),
    "a pair without extra arguments": lambda tx: optax.GradientTransformation(tx.init, tx.update),
    "eqx.filter_jit": through_filter_jit,
    "an Equinox module": lambda tx: jax.tree.map(lambda leaf: leaf, Held(tx)).tx,
    "a Flax node": lambda tx: jax.tree.map(lambda leaf: leaf, HeldByFlax(tx)).tx,  # pyright: ignore[reportCallIssue] (Flax makes its __init__)
    "a dataclass": lambda tx: copy.deepcopy(HeldByPython(tx)).tx,
    "a TrainState": through_a_train_state,
}


PICKLED: dict[str, Callable[[Any], Any]] = {
    "cloudpickle": lambda tx: pickle.loads(cloudpickle.dumps(tx)),
    "dill": lambda tx: dill.loads(dill.dumps(tx)),
}


def fast_program(tx: Any) -> str:
    """What `apply_gradients` traces to: without the fast way it is another program."""
    state = jax.eval_shape(tx.init, PARAMS)
    step = functools.partial(og.apply_gradients, tx, value=LOSS)
    with jax.numpy_dtype_promotion("standard"):
        return str(jax.make_jaxpr(lambda g, s, p: step(g, s, p))(PARAMS, state, PARAMS))


@each(ENTRIES)
def test_a_rebuilt_transformation_is_the_same_pair_of_functions(entry: Entry) -> None:
    """Which is enough: nothing else belongs to it (see the tests of what is found on `update`)."""
    tx = entry.make()
    for way, rebuild in REBUILT.items():
        rebuilt = rebuild(tx)
        assert rebuilt.init is tx.init, way
        assert rebuilt.update is tx.update, way


@each(in_part(ENTRIES))
def test_a_pickled_transformation_takes_the_same_step(entry: Entry) -> None:
    tx = entry.make()
    expected = fast_program(tx)
    for way, rebuild in PICKLED.items():
        assert fast_program(rebuild(tx)) == expected, way


@each([entry for entry in ENTRIES if entry.is_rule])
def test_a_rebuilt_rule_is_one_for_a_guard(entry: Entry) -> None:
    rule = entry.make()
    expected = fast_program(og.guard(momentum(0.1), rule))
    for rebuild in (REBUILT["a pair without extra arguments"], PICKLED["cloudpickle"]):
        assert fast_program(og.guard(momentum(0.1), rebuild(rule))) == expected


@each([entry for entry in ENTRIES if entry.wraps])
def test_a_pair_without_extra_arguments_is_stepped_the_fast_way(entry: Entry) -> None:
    tx = entry.make()
    assert fast_program(optax.GradientTransformation(tx.init, tx.update)) == fast_program(tx)


@pytest.mark.parametrize("rebuild", [copy.copy, *PICKLED.values()])
def test_a_rebuilt_back_off_is_a_rung(rebuild: Any) -> None:
    expected = fast_program(og.guard(momentum(0.1), recovery=(og.back_off(),)))
    assert fast_program(og.guard(momentum(0.1), recovery=(rebuild(og.back_off()),))) == expected


@pytest.mark.parametrize("rebuild", [copy.copy, *PICKLED.values()])
def test_a_rebuilt_accumulation_can_be_flushed(rebuild: Any) -> None:
    tx = rebuild(og.accumulate(guarded(), 4))
    state = jax.eval_shape(tx.init, PARAMS)
    params, _ = jax.eval_shape(lambda s, p: og.flush(tx, s, p), state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)


def test_a_function_that_wraps_update_is_not_passed_by() -> None:
    tx, calls = guarded(), []

    @functools.wraps(tx.update)
    def update(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return tx.update(*args, **kwargs)

    wrapped = optax.GradientTransformationExtraArgs(tx.init, update)
    jax.eval_shape(lambda p: og.apply_gradients(wrapped, PARAMS, tx.init(p), p), PARAMS)
    assert calls


class TakesTwo:
    """As the optimizers of some libraries: no parameters, no extra arguments."""

    def init(self, params: Any) -> Any:
        del params
        return ()

    def update(self, gradients: Any, state: Any) -> Any:
        return jax.tree.map(jnp.negative, gradients), state


class TakesParams(TakesTwo):
    def update(self, gradients: Any, state: Any, params: Any = None) -> Any:
        assert params is not None
        return jax.tree.map(jnp.negative, gradients), state


class TakesParamsByName(TakesTwo):
    def update(self, gradients: Any, state: Any, *, params: Any = None, value: Any = None) -> Any:
        assert params is not None
        assert value is not None
        return jax.tree.map(jnp.negative, gradients), state


class TakesAll(TakesTwo):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        gradients, state, params = args
        assert kwargs["hint"] == 1
        assert params is not None
        return jax.tree.map(jnp.negative, gradients), state


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "apply_gradients": lambda inner: inner,
    "guard": og.guard,
    "guard, recovery": lambda inner: og.guard(inner, recovery=(og.reset_moments(), og.back_off(), og.rewind())),
    "guard, check_updates": lambda inner: og.guard(inner, check_updates=True),
    "stabilize": og.stabilize,
    "accumulate": lambda inner: og.accumulate(inner, 2),
    "loss_scaling": og.loss_scaling,
    "stable_spam": og.stable_spam,
}


@pytest.mark.parametrize("kind", [TakesTwo, TakesParams, TakesParamsByName, TakesAll])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_object_with_init_and_update_is_given_what_its_signature_takes(kind: type, wrapper: str) -> None:
    tx = WRAPPERS[wrapper](kind())
    step = functools.partial(og.apply_gradients, tx, value=LOSS, hint=1)
    params, _ = jax.eval_shape(lambda p: step(PARAMS, tx.init(p), p), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)


@pytest.mark.usefixtures("standard_promotion")
def test_multi_steps_is_such_an_object() -> None:
    tx = og.guard(optax.MultiSteps(optax.sgd(1.0), 2))
    step = quick_jit(lambda p, s: og.apply_gradients(tx, jnp.ones(2), s, p))
    params, state = step(jnp.zeros(2), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(step(params, state)[0], -1)

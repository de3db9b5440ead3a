"""Inside and around Optax's own wrappers, and on trees with holes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from conforming import GRADS, PARAMS, STRICT, each, types
from parts import in_part
from registry import ENTRIES, Entry, accumulated, accumulated_guard, guarded

import optax_guard as og


def mixed_trees() -> tuple[Any, Any]:
    """Parameters and gradients with a leaf of every kind."""
    gradients = {
        "complex": np.ones(2, np.complex64),
        "half": np.ones((2, 3), jnp.bfloat16),
        "kernel": np.ones((3, 2), np.float32),
        "zero_d": np.float32(2.0).reshape(()),
        "zero_size": np.ones((0, 3), np.float32),
    }
    passengers = {"flag": np.array([True]), "integer": np.arange(2, dtype=np.int32), "none": None}
    passengers["masked"] = optax.MaskedNode()
    frozen = {"float0": np.arange(3, dtype=np.int32)}
    return {**gradients, **passengers, **frozen}, {
        **gradients,
        **passengers,
        "float0": np.zeros(3, jax.dtypes.float0),
    }


@each(in_part(STRICT))
def test_leaves_without_a_gradient_pass_untouched_and_odd_shapes_are_handled(entry: Entry) -> None:
    tx = entry.make_strict()
    params, grads = mixed_trees()
    state = tx.init(params)
    update = quick_jit(tx.update)
    for _ in range(2):  # `accumulate` emits in the second
        updates, state = update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        for name in ("flag", "integer", "float0", "zero_size"):
            np.testing.assert_array_equal(updates[name], grads[name])
        assert all(leaf.dtype == updates[name].dtype for name, leaf in grads.items() if hasattr(leaf, "dtype"))
        chex.assert_tree_all_finite({name: updates[name] for name in ("complex", "half", "kernel", "zero_d")})


@each(STRICT)
def test_apply_gradients_takes_the_gradients_of_integer_parameters(entry: Entry) -> None:
    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.square(params["weight"])) + jnp.asarray(params["table"], jnp.float32)[0]

    params = {"table": np.arange(3, dtype=np.int32), "weight": np.ones((2, 2), np.float32)}

    def step(params: Any) -> Any:
        tx, grads = entry.make_strict(), jax.grad(loss, allow_int=True)(params)
        assert grads["table"].dtype == jax.dtypes.float0
        return og.apply_gradients(tx, grads, tx.init(params), params)[0]

    assert types(jax.eval_shape(step, params)) == types(params)


def hosts(tx: Any) -> dict[str, optax.GradientTransformation]:
    """`tx` inside everything of Optax's that takes a transformation, none of which changes what it does."""
    return {
        "chain": optax.chain(optax.identity(), tx),
        "named_chain": optax.named_chain(("first", optax.identity()), ("second", tx)),
        "masked": optax.masked(tx, {"bias": True, "kernel": True}),
        "partition": optax.partition({"all": tx}, {"bias": "all", "kernel": "all"}),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "MultiSteps": optax.MultiSteps(tx, 1).gradient_transformation(),
    }


def first_updates(txs: dict[str, Any], grads: Any) -> dict[str, Any]:
    """The first updates of several transformations, compiled together; none may change the types of its state."""

    def all_updates(grads: Any) -> dict[str, Any]:
        result = {}
        for name, tx in txs.items():
            state = tx.init(PARAMS)
            result[name], after = tx.update(grads, state, PARAMS)
            assert types(after) == types(state), name
        return result

    return quick_jit(all_updates)(grads)


@pytest.mark.usefixtures("standard_promotion")
@each(in_part(ENTRIES, every=6))
def test_inside_any_optax_wrapper_the_updates_are_the_same(entry: Entry) -> None:
    once = {"every": 1} if "every" in entry.static_args else {}
    tx = entry.make(**once)
    injected = optax.inject_hyperparams(entry.factory, static_args=entry.static_args)
    txs = {"alone": tx, **hosts(tx), "inject_hyperparams": injected(**{**entry.arguments, **once})}
    updates = first_updates(txs, GRADS[1])
    for name, got in updates.items():
        chex.assert_trees_all_close(got, updates["alone"], rtol=1e-5, atol=1e-6, custom_message=name)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("host", [*hosts(optax.identity()), "inject_hyperparams"])
def test_around_any_optax_wrapper_the_updates_are_the_same(host: str) -> None:
    def inner(learning_rate: Any) -> optax.GradientTransformation:
        if host == "inject_hyperparams":
            return optax.inject_hyperparams(optax.sgd)(learning_rate, momentum=0.9)
        return hosts(optax.sgd(learning_rate, momentum=0.9))[host]

    txs = {
        "alone": inner(0.1),
        "guard": guarded(inner=inner),
        "check_updates": guarded(inner=inner, check_updates=True),
        "accumulate": accumulated(inner=inner, every=1),
        "both": accumulated_guard(inner=inner, every=1),
    }
    updates = first_updates(txs, GRADS[0])
    for name, got in updates.items():
        chex.assert_trees_all_close(got, updates["alone"], rtol=1e-6, custom_message=name)


@each(ENTRIES)
def test_masked_out_leaves_come_back_as_they_are(entry: Entry) -> None:
    tx = optax.masked(entry.make_strict(), {"bias": False, "kernel": True})

    def check(grads: Any) -> None:
        assert tx.update(grads, tx.init(PARAMS), PARAMS)[0]["bias"] is grads["bias"]

    jax.eval_shape(check, GRADS[0])


@each(ENTRIES)
def test_map_params_finds_exactly_the_trees_shaped_like_the_parameters(entry: Entry) -> None:
    tx = entry.make()
    marked = optax.tree.map_params(
        tx, lambda _: True, jax.eval_shape(tx.init, PARAMS), transform_non_params=lambda _: False
    )
    assert sum(jax.tree.leaves(marked)) == entry.parameter_copies * len(PARAMS)

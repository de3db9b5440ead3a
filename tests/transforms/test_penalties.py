"""Penalties in the gradient, against the derivative of the stated penalty; and the shrunk gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import once

import optax_guard as og

PARAMS = {
    "kernel": jnp.array([[2.0, 0.0], [-3.0, -0.0]]),
    "bias": jnp.array([1.0, -1.0]),
    "deep": {"k": jnp.ones((1, 2, 2))},
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
RNG = np.random.default_rng(0)
WEIGHTS = np.concatenate([RNG.normal(0, size, 20) for size in (1e-4, 0.1, 1, 50)])[None]


def slope(penalty: Callable[[np.ndarray], np.ndarray], at: np.ndarray) -> np.ndarray:
    """The derivative of an elementwise function by central differences in float64."""
    step = 1e-6 * np.maximum(np.abs(at), 1e-4)
    return (penalty(at + step) - penalty(at - step)) / (2 * step)


def pseudo_huber(w: np.ndarray, delta: float) -> np.ndarray:
    """Charbonnier's function without its cancellation for |w| << delta: sqrt(1 + q) - 1 = q / (sqrt(1 + q) + 1)."""
    q = np.square(w / delta)
    return delta**2 * q / (np.sqrt(1 + q) + 1)


DERIVATIVES = {
    "l1": (og.l1_penalty(0.3), lambda w: 0.3 * np.abs(w)),
    "dense l2": (og.dense_penalty(0.3), lambda w: 0.15 * np.square(w)),
    "dense pseudo-Huber": (og.dense_penalty(0.3, "pseudo_huber", delta=0.1), lambda w: 0.3 * pseudo_huber(w, 0.1)),
    "elastic net": (og.elastic_net_penalty(0.3, 0.2), lambda w: 0.3 * np.abs(w) + 0.1 * np.square(w)),
}


@pytest.mark.parametrize("case", DERIVATIVES)
def test_what_is_added_is_the_derivative_of_the_stated_penalty(case: str) -> None:
    tx, penalty = DERIVATIVES[case]
    weights, grads = (
        jnp.asarray(WEIGHTS, jnp.float32),
        jnp.asarray(np.random.default_rng(1).normal(size=WEIGHTS.shape), jnp.float32),
    )
    exact = np.asarray(weights, np.float64)
    expected = np.asarray(grads, np.float64) + slope(penalty, exact)
    np.testing.assert_allclose(once(tx, grads, weights), expected, rtol=2e-6, atol=1e-6)
    assert once(tx, jnp.zeros((1, 2)), jnp.array([[0.0, -0.0]])).tolist() == [[0, 0]]  # no pull at zero


def test_the_pseudo_huber_pull_is_bounded_continuous_and_does_not_overflow() -> None:
    weights = jnp.array([[-3e38, -1e20, -1e-30, 0.0, 1e-30, 1e-3, 1e30]])
    pull = np.asarray(once(og.dense_penalty(0.5, "pseudo_huber", delta=0.01), jnp.zeros_like(weights), weights))
    assert np.all(np.diff(pull) >= 0)
    np.testing.assert_allclose(pull[0, [0, 1, 2, 3, 6]], [-0.005, -0.005, -5e-31, 0, 0.005], rtol=1e-6)


@pytest.mark.parametrize(
    "tx", [og.l1_penalty(0.5), og.dense_penalty(0.5, "pseudo_huber"), og.elastic_net_penalty(0.5, 0.5)]
)
def test_a_complex_weight_is_pulled_along_its_own_direction(tx: Any) -> None:
    weight = jnp.array([[3.0 + 4.0j]])
    pull, real = once(tx, jnp.zeros_like(weight), weight), once(tx, jnp.zeros((1, 1)), jnp.array([[5.0]]))
    np.testing.assert_allclose(pull, np.asarray(real) * (0.6 + 0.8j), rtol=1e-6)


def test_the_elastic_net_is_the_chain_of_both_and_each_strength_has_its_schedule() -> None:
    def growing(step: jax.Array) -> jax.Array:
        return 0.25 * step.astype(float)

    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for l1, l2 in ((0.1, 0.2), (growing, 0.2), (0.1, growing)):
        both, chain = og.elastic_net_penalty(l1, l2), optax.chain(og.l1_penalty(l1), og.dense_penalty(l2))
        state, chained = both.init(PARAMS), chain.init(PARAMS)
        for _ in range(3):
            got, state = both.update(grads, state, PARAMS)
            expected, chained = chain.update(grads, chained, PARAMS)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_a_penalty_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-9 rounds to 1 + 2^-7 in bfloat16; a pull rounded before it is added would vanish in the tie."""
    grads, weights = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    assert float(once(og.elastic_net_penalty(2**-8, 2**-9), grads, weights)[0, 0]) == 1 + 2**-7
    chain = optax.chain(og.l1_penalty(2**-8), og.dense_penalty(2**-9))
    assert float(once(chain, grads, weights)[0, 0]) == 1


# Masks and schedules


def test_l1_adds_the_sign_and_leaves_exact_zeros_and_vectors_alone() -> None:
    updates = once(og.l1_penalty(0.1), ZEROS, PARAMS)
    np.testing.assert_allclose(updates["kernel"], [[0.1, 0], [-0.1, 0]])
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_allclose(updates["deep"]["k"], 0.1)
    assert jax.grad(lambda w: jnp.abs(w))(0.0) == 1  # why it is not written as a loss term


@pytest.mark.parametrize(
    "mask",
    [
        {"kernel": False, "bias": True, "deep": False},  # a prefix of the tree
        {"kernel": False, "bias": True, "deep": {"k": False}},
        lambda params: jax.tree.map(lambda x: x.ndim == 1, params),
        "bia*",
    ],
)
def test_l1_mask_by_tree_prefix_function_or_path(mask: Any) -> None:
    updates = once(og.l1_penalty(0.5, mask=mask), ZEROS, PARAMS)
    np.testing.assert_array_equal(updates["kernel"], 0)
    np.testing.assert_allclose(updates["bias"], [0.5, -0.5])
    np.testing.assert_array_equal(updates["deep"]["k"], 0)


def test_l1_bad_masks_are_named() -> None:
    with pytest.raises(ValueError, match=r"l1_penalty: `mask` lacks leaf `deep/k`"):
        og.l1_penalty(0.1, mask={"kernel": True, "bias": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"`mask` must hold True or False; at `bias` it holds 2"):
        og.l1_penalty(0.1, mask={"kernel": True, "bias": 2, "deep": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"l1_penalty: `mask` 'head/\*' matches no leaf; the leaves are .*'deep/k'"):
        og.l1_penalty(0.1, mask="head/*").init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        once(og.l1_penalty(0.1), ZEROS)


def test_l1_strength_as_a_schedule_and_in_float16() -> None:
    tx: Any = og.l1_penalty(lambda step: 0.25 * step.astype(float))
    state = tx.init(PARAMS)
    for expected in (0.0, 0.25, 0.5):
        updates, state = tx.update(ZEROS, state, PARAMS)
        np.testing.assert_allclose(updates["kernel"][0, 0], expected)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS)
    assert once(og.l1_penalty(0.1), half, half)["kernel"].dtype == jnp.float16


def test_l1_shrinks_weights_that_the_data_do_not_hold() -> None:
    """Lasso by subgradient: towards the optimum, without exact zeros."""
    tx: Any = optax.chain(og.l1_penalty(0.1), optax.sgd(0.05))
    params: Any
    params, target = {"w": jnp.full((1, 2), 3.0)}, jnp.array([[0.02, 2.0]])
    state = tx.init(params)
    for _ in range(400):
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[0.0, 1.9]], atol=6e-3)


@pytest.mark.parametrize("tx", [og.dense_penalty(0.5, mask="bias"), og.elastic_net_penalty(0.25, 0.25, mask="bias")])
def test_every_penalty_takes_a_mask(tx: Any) -> None:
    updates = once(tx, ZEROS, PARAMS)
    np.testing.assert_array_equal(updates["kernel"], 0)
    np.testing.assert_allclose(updates["bias"], [0.5, -0.5])


# The gradient itself

GRADIENTS = np.array([-3e38, -2.0, -0.5, -1e-3, 0.0, 1e-30, 0.4, 0.5, 7.0])


@pytest.mark.parametrize("kind", ["soft", "dense"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 3.0])
def test_shrunk_gradients_are_the_stated_function(kind: str, threshold: float) -> None:
    g = np.asarray(GRADIENTS, np.float32).astype(np.float64)
    size = np.abs(g)
    if kind == "soft":
        expected = g - np.clip(g, -threshold, threshold)
    else:
        expected = g * size / np.where(size + threshold > 0, size + threshold, 1)
    got = np.asarray(once(og.shrink_gradients(threshold, kind), jnp.asarray(g, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7 * threshold)
    assert np.all(np.abs(got) <= size)
    assert np.all(got * g >= 0)
    assert np.all(np.abs(g - got) <= threshold * (1 + 1e-6) + 1e-7 * size)
    if kind == "soft":
        assert np.all(got[size <= threshold] == 0)


@pytest.mark.parametrize("kind", ["soft", "dense"])
def test_shrunk_gradients_keep_nan_inf_and_the_direction_of_complex_numbers(kind: str) -> None:
    tx = og.shrink_gradients(0.5, kind)
    np.testing.assert_array_equal(once(tx, jnp.array([jnp.nan, jnp.inf, -jnp.inf])), [np.nan, np.inf, -np.inf])
    real = np.asarray(once(tx, jnp.array([5.0])))
    np.testing.assert_allclose(once(tx, jnp.array([3.0 + 4.0j])), real * (0.6 + 0.8j), rtol=1e-6)


def test_the_threshold_of_shrunk_gradients_can_be_a_schedule() -> None:
    tx = og.shrink_gradients(lambda step: step.astype(float))
    state = tx.init(jnp.zeros(1))
    for expected in (5.0, 4.0, 3.0):
        got, state = tx.update(jnp.array([5.0]), state)
        assert float(got[0]) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: og.dense_penalty(-1.0), r"dense_penalty: `strength` must be a number in \[0, inf\); got -1.0"),
        (lambda: og.dense_penalty(1.0, "l1"), "dense_penalty: `penalty` must be one of 'l2', 'pseudo_huber'; got 'l1'"),
        (lambda: og.dense_penalty(1.0, delta=0.0), r"dense_penalty: `delta` must be a number in \(0, inf\); got 0.0"),
        (lambda: og.elastic_net_penalty(-1.0, 0.0), "elastic_net_penalty: `l1` must be .*; got -1.0"),
        (lambda: og.elastic_net_penalty(0.0, np.nan), "elastic_net_penalty: `l2` must be .*; got nan"),
        (lambda: og.shrink_gradients(np.inf), r"shrink_gradients: `threshold` must be a number in \[0, inf\); got inf"),
        (lambda: og.shrink_gradients(0.1, "hard"), "shrink_gradients: `shrinkage` must be one of 'soft', 'dense'"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

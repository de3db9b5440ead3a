"""Observe: norms are right for every dtype and magnitude, and what is not finite is named."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_guard as og
from optax_guard._step.observe import one_pass_statistics, scale_statistics

statistics = jax.jit(og.gradient_statistics)
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, 1e-30, 1e30, -3e38, 1e-37])


def oracle(leaf: Any) -> float:
    """The L2 norm in NumPy's longest float."""
    return float(np.sqrt(np.sum(np.abs(np.asarray(leaf).astype(np.clongdouble)) ** 2)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(NUMBERS, min_size=5, max_size=5))
def test_norms_are_right_from_the_smallest_to_the_largest_gradient(numbers: list[float]) -> None:
    tree = {"a": jnp.array(numbers[:2]), "b": jnp.array(numbers[2:])}
    flushed = jax.tree.map(lambda x: np.where(np.abs(x) < 1.2e-38, 0, x), tree)  # XLA has no subnormals on CPU
    whole = oracle(np.concatenate([flushed["a"], flushed["b"]]))
    result = statistics(tree)
    if whole < 3e38:
        np.testing.assert_allclose(result.norm, whole, rtol=1e-5)
        largest = max(oracle(flushed["a"]), oracle(flushed["b"]))
        for got, leaf in zip(result.leaf_norms, (flushed["a"], flushed["b"]), strict=True):
            np.testing.assert_allclose(got, oracle(leaf), rtol=1e-5, atol=1e-12 * largest)
    assert bool(jnp.all(result.finite))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_16_bit_and_complex_leaves_are_reduced_in_float32(dtype: Any) -> None:
    leaf = (jnp.arange(500) % 7 * 100).astype(dtype)
    leaf = leaf * jnp.asarray(1 + 1j, dtype) if dtype == jnp.complex64 else leaf
    assert statistics({"x": leaf}).sum_squares.dtype == jnp.float32
    np.testing.assert_allclose(og.global_norm({"x": leaf}), oracle(leaf), rtol=1e-6)


def test_float64_is_reduced_in_float64() -> None:
    with jax.enable_x64(True):
        tree = {"wide": jnp.array([1.0, 1e-9], jnp.float64), "narrow": jnp.ones(2, jnp.float32)}
        norm = og.global_norm(tree)
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, np.sqrt(3 + 1e-18), rtol=1e-15)
        np.testing.assert_allclose(og.global_norm({"x": jnp.array([3e200, 4e200])}), 5e200, rtol=1e-14)


def test_large_leaves_do_not_lose_their_small_terms() -> None:
    np.testing.assert_allclose(jax.jit(og.global_norm)(jnp.full(20_000_000, 0.5)), np.sqrt(5_000_000), rtol=1e-5)


@pytest.mark.parametrize(("bad", "norm"), [(jnp.nan, np.nan), (jnp.inf, np.inf), (-jnp.inf, np.inf)])
def test_the_leaf_that_is_not_finite_is_named(bad: float, norm: float) -> None:
    result = statistics({"a": jnp.ones(3), "b": jnp.array([1.0, bad]), "c": jnp.full(2, 1e30)})
    np.testing.assert_array_equal(result.finite, [True, False, True])
    np.testing.assert_equal(float(result.norm), norm)
    size, root = result.finite_norm_parts
    np.testing.assert_allclose(size * root, np.sqrt(2) * 1e30, rtol=1e-6)


def test_a_norm_above_the_largest_float_is_inf_and_its_parts_are_not() -> None:
    result = statistics({"x": jnp.full(4, 3e38)})
    assert result.norm == jnp.inf
    assert bool(result.finite[0])
    chex.assert_tree_all_finite(result.finite_norm_parts)


def test_leaves_without_a_gradient_have_sum_zero_and_keep_their_place() -> None:
    tree = {
        "a": None,
        "b": np.zeros(3, jax.dtypes.float0),
        "c": jnp.array([3, 4]),
        "d": jnp.zeros((0, 5)),
        "e": jnp.full((), 2.0),
    }
    np.testing.assert_array_equal(og.gradient_statistics(tree).sum_squares, [0, 0, 0, 0, 4])
    assert og.leaf_names(tree) == ["a", "b", "c", "d", "e"]
    assert og.global_norm({}) == 0
    assert og.gradient_statistics({}).sum_squares.shape == (0,)


def test_many_small_leaves_share_reductions_and_come_back_in_order() -> None:
    shapes = [(3,), (2, 2), (), (3,), (2, 2)] * 20
    leaves = [jnp.full(shape, float(i)) for i, shape in enumerate(shapes)]
    expected = [oracle(leaf) ** 2 for leaf in leaves]
    np.testing.assert_allclose(statistics(leaves).sum_squares, expected, rtol=1e-6)
    text = str(jax.make_jaxpr(one_pass_statistics)(leaves))
    assert text.count("reduce_sum") <= 6  # 100 leaves of three kinds


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2))
def test_statistics_are_closed_under_scaling_leaves(scales: list[float]) -> None:
    tree = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([0.5, 2.0, 1.0])}
    scaled = {"a": tree["a"] * scales[0], "b": tree["b"] * scales[1]}
    without_reading = scale_statistics(statistics(tree), jnp.array(scales))
    np.testing.assert_allclose(without_reading.leaf_norms, statistics(scaled).leaf_norms, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(without_reading.norm, statistics(scaled).norm, rtol=1e-5, atol=1e-30)


def test_the_derivative_of_the_norm_is_its_direction_and_zero_at_zero() -> None:
    np.testing.assert_allclose(jax.grad(og.global_norm)(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(og.global_norm)(jnp.zeros(3)), np.zeros(3))
    np.testing.assert_allclose(jax.grad(og.global_norm)(jnp.full(4, 1e30)), 0.5, rtol=1e-6)


def test_a_leaf_that_is_not_an_array_is_named() -> None:
    with pytest.raises(ValueError, match=r"leaf `net/name` is not an array but str"):
        og.global_norm({"net": {"name": "dense"}})
    for array in (np.array([None]), np.array(["dense"]), np.array(["2020-01-01"], "datetime64[D]")):
        with pytest.raises(ValueError, match=r"leaf `w` is not an array but ndarray"):
            og.global_norm({"w": array})

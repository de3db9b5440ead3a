"""Clips: the bound holds, what is within it is untouched, and bad numbers stay where they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import once
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_guard as og

NUMBERS = st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, -0.0, 1e-38, 1e30, 3e37])
MAX_NORM = 1.5
GLOBAL, LEAF = og.clip_by_global_norm(MAX_NORM), og.clip_by_leaf_norm(MAX_NORM)


clip_global = jax.jit(lambda grads: once(GLOBAL, grads))
clip_leaf = jax.jit(lambda grads: once(LEAF, grads))


def norm(*leaves: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.abs(np.asarray(x).astype(np.clongdouble)) ** 2) for x in leaves)))


def same_bits(one: Any, other: Any) -> bool:
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(NUMBERS, min_size=5, max_size=5), st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]))
def test_global_norm_bound_direction_and_untouched_inside(numbers: list[float], dtype: Any) -> None:
    limit = float(jnp.finfo(dtype).max)
    grads = [jnp.array(np.clip(x, -limit, limit), dtype) for x in (numbers[:2], numbers[2:])]
    before, clipped = norm(*grads), clip_global(grads)
    assert norm(*clipped) <= MAX_NORM * (1 + 4 * float(jnp.finfo(dtype).eps)) + 1e-7
    if before <= MAX_NORM * 0.999:
        assert all(map(same_bits, clipped, grads))
    elif before < 8e37 * MAX_NORM:
        for got, leaf in zip(clipped, grads, strict=True):
            expected = np.asarray(leaf, np.float64) * MAX_NORM / before
            np.testing.assert_allclose(
                np.asarray(got, np.float64), expected, rtol=1e-2 if dtype != jnp.float32 else 1e-5, atol=1e-6
            )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(NUMBERS, min_size=5, max_size=5))
def test_leaf_norm_bound_each_leaf_for_itself(numbers: list[float]) -> None:
    grads = [jnp.array(numbers[:2], jnp.float32), jnp.array(numbers[2:], jnp.float32)]
    for got, leaf in zip(clip_leaf(grads), grads, strict=True):
        assert norm(got) <= MAX_NORM * (1 + 4e-7)
        if norm(leaf) <= MAX_NORM * 0.999:
            assert same_bits(got, leaf)
        elif 1e-5 < norm(leaf) < 8e37:
            np.testing.assert_allclose(got, np.asarray(leaf, np.float64) * MAX_NORM / norm(leaf), rtol=1e-5, atol=1e-12)


def test_scaling_and_permuting_leaves_commute_with_the_clip() -> None:
    grads = [jnp.array([3.0, 4.0]), jnp.array([12.0, 0.0, 1.0])]
    np.testing.assert_allclose(clip_global([4 * g for g in grads])[1], clip_global(grads)[1], rtol=1e-6)
    for got, expected in zip(clip_global(grads[::-1]), clip_global(grads)[::-1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_alone_in_a_chain_a_bad_number_stays_in_its_leaf(bad: float) -> None:
    grads = [jnp.array([3.0, 4.0]), jnp.array([bad, 2.0, 1.0])]
    np.testing.assert_allclose(clip_global(grads)[0], [0.9, 1.2], rtol=1e-6)  # by the norm of the finite leaves
    np.testing.assert_allclose(clip_leaf(grads)[0], [0.9, 1.2], rtol=1e-6)
    assert same_bits(clip_leaf(grads)[1], grads[1])
    assert not np.all(np.isfinite(clip_global(grads)[1]))


@pytest.mark.parametrize("make", [og.clip_by_global_norm, og.clip_by_leaf_norm])
@pytest.mark.parametrize(("bound", "factor"), [(0.0, 0.0), (np.inf, 1.0), (-1.0, 0.0)])
def test_bounds_of_zero_infinity_and_below_zero(make: Any, bound: float, factor: float) -> None:
    """A negative number is refused where it is written down; out of an array or a schedule it counts as 0."""
    grads = [jnp.array([3.0, 4.0]), jnp.zeros(3)]
    for form in (jnp.asarray(bound), lambda step: jnp.where(step >= 0, bound, 1.0)):
        clipped = once(make(form), grads)
        np.testing.assert_array_equal(clipped[0], factor * grads[0])
        np.testing.assert_array_equal(clipped[1], grads[1])


def test_a_schedule_counts_the_rules_own_steps() -> None:
    clip = og.clip_by_global_norm(lambda step: 10.0 / (1 + step.astype(float)))
    state = clip.init(jnp.zeros(2))
    for expected in (5.0, 5.0, 10 / 3, 2.5):
        clipped, state = clip.update(jnp.array([3.0, 4.0]), state)
        np.testing.assert_allclose(norm(clipped), expected, rtol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(NUMBERS | st.sampled_from([np.inf, -np.inf, np.nan]), min_size=5, max_size=5))
def test_clip_by_value_equals_numpy(numbers: list[float]) -> None:
    grads = jnp.array(numbers, jnp.float32)
    np.testing.assert_array_equal(once(og.clip_by_value(2.0), grads), np.clip(np.asarray(grads), -2, 2))


def test_clip_by_value_keeps_the_direction_of_a_complex_element() -> None:
    grads = jnp.array([3 + 4j, 0.3 - 0.4j, 0], jnp.complex64)
    np.testing.assert_allclose(once(og.clip_by_value(1.0), grads), [0.6 + 0.8j, 0.3 - 0.4j, 0], rtol=1e-6)


def agc_oracle(grad: Any, weight: Any, clipping: float, axes: tuple[int, ...], eps: float = 1e-3) -> np.ndarray:
    """Brock et al. 2021, equation 3, in float64."""
    grad, weight = np.asarray(grad, np.float64), np.asarray(weight, np.float64)
    norms = [np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (grad, weight)]
    bound = clipping * np.maximum(norms[1], eps)
    return np.where(norms[0] > bound, grad * bound / np.where(norms[0] > 0, norms[0], 1), grad)


@pytest.mark.parametrize(
    ("shape", "axis", "unit"),
    [
        ((7, 5), None, (0,)),  # dense (in, out)
        ((3, 3, 4, 5), None, (0, 1, 2)),  # convolution
        ((3, 4, 5), None, (0, 1)),  # 1-d convolution; attention output (heads, head_dim, out)
        ((4, 3, 5), 0, (0,)),  # attention query (in, heads, head_dim)
        ((6, 4, 5), -2, (1,)),  # a stack of six layers
        ((5,), None, (0,)),
        ((), None, ()),
    ],
)
def test_agc_bounds_every_unit_as_the_paper_says(shape: tuple[int, ...], axis: Any, unit: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    grad = jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 2, shape), jnp.float32)
    weight = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    got = once(og.adaptive_grad_clip(0.05, axis=axis), {"x": grad}, {"x": weight})["x"]
    np.testing.assert_allclose(got, agc_oracle(grad, weight, 0.05, unit), rtol=1e-5)


def test_agc_axis_may_differ_by_leaf_as_a_tree_or_a_function() -> None:
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float32) for name in ("query", "out", "stack")}
    grads = jax.tree.map(lambda x: 3 * jnp.sin(9 * x), params)
    tree = {"query": 0, "out": None, "stack": (1,)}
    for axis in (tree, lambda _: tree):
        got = once(og.adaptive_grad_clip(0.1, axis=axis), grads, params)
        for name, unit in (("query", (0,)), ("out", (0, 1)), ("stack", (1,))):
            np.testing.assert_allclose(got[name], agc_oracle(grads[name], params[name], 0.1, unit), rtol=1e-5)


def test_agc_edge_cases() -> None:
    zero_kernel = once(og.adaptive_grad_clip(0.1), {"x": jnp.ones((4, 1))}, {"x": jnp.zeros((4, 1))})["x"]
    np.testing.assert_allclose(zero_kernel, 0.1 * 1e-3 / 2, rtol=1e-5)  # a zero kernel can move
    grads = jnp.array([[jnp.nan, 1e30], [1.0, 1e30]])
    clipped = once(og.adaptive_grad_clip(0.1), {"x": grads}, {"x": jnp.ones((2, 2))})["x"]
    assert np.isnan(clipped[0, 0])
    np.testing.assert_allclose(clipped[:, 1], 0.1, rtol=1e-5)  # the other unit is unaffected, and does not overflow
    with pytest.raises(ValueError, match=r"axis.*out of range for leaf `x` of rank 2"):
        once(og.adaptive_grad_clip(0.1, axis=2), {"x": grads}, {"x": grads})
    with pytest.raises(ValueError, match="names `y`"):
        once(og.adaptive_grad_clip(0.1, axis={"y": 0}), {"x": grads}, {"x": grads})


@pytest.mark.parametrize("make", [og.skip_nonfinite, lambda: og.skip_large(10.0)])
def test_skips_select_zeros_and_pass_the_rest_bit_for_bit(make: Any) -> None:
    skip = jax.jit(lambda grads: once(make(), grads))
    for bad in (jnp.nan, jnp.inf):
        assert all(np.all(np.asarray(x) == 0) for x in skip([jnp.array([1.0, bad]), jnp.ones(3)]))
    healthy = [jnp.array([1.0, -0.0]), jnp.full(3, 1e-39)]
    assert all(map(same_bits, skip(healthy), healthy))


def test_skip_large_at_its_bound_and_beyond() -> None:
    skip = og.skip_large(5.0)
    np.testing.assert_array_equal(once(skip, jnp.array([3.0, 4.0])), [3, 4])
    np.testing.assert_array_equal(once(skip, jnp.array([3.0, 4.001])), [0, 0])
    np.testing.assert_array_equal(once(og.skip_large(jnp.asarray(jnp.nan)), jnp.ones(2)), [0, 0])
    np.testing.assert_array_equal(once(og.skip_nonfinite(), jnp.full(2, 1e30)), np.full(2, np.float32(1e30)))

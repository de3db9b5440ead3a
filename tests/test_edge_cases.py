"""What the docstrings promise of edge cases, tried: special numbers, every dtype, every elementwise function."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit

import optax_guard as og

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8


# The norm of a tree

NORM = quick_jit(og.global_norm)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_the_norm_is_exact_from_the_smallest_normal_number_to_the_largest(dtype: str) -> None:
    info = jnp.finfo(dtype)
    smallest, largest = float(info.smallest_normal), float(info.max)
    sizes = [smallest, 1.1 * smallest, 2 * smallest, 1e-37, 1e-30, 1e-19, 1e-6, 1.0, 1e4, 1.9e19, 1e30, largest / 4]
    sizes = sorted({size for size in sizes if smallest <= size <= largest / 4})
    if dtype == "float16":
        sizes = [6e-8, 1e-6, *sizes]  # its subnormals are normal numbers in float32
    with enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        for size in sizes:
            for other in (0.0, smallest, size, largest / 4):
                leaves = np.array([size, -size, 0]).astype(dtype), np.array([other, other]).astype(dtype)
                expected = np.abs(np.concatenate(leaves).astype(np.complex128))
                top = expected.max()
                expected = top * np.sqrt(np.sum((expected / top) ** 2))
                got = float(NORM([jnp.asarray(leaf) for leaf in leaves]))
                np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_norm_of_subnormal_numbers_is_theirs_or_zero_and_never_nan(dtype: str) -> None:
    size = float(jnp.finfo(dtype).smallest_normal) / 4
    with enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        for leaf in (np.array([size, 0]), np.array([size, size]), np.array([-size])):
            got = float(NORM([jnp.asarray(leaf.astype(dtype)), jnp.zeros(2, dtype)]))
            assert got == 0 or got == pytest.approx(np.linalg.norm(leaf), rel=1e-6)
        beside = float(NORM([jnp.asarray(np.array([size]).astype(dtype)), jnp.asarray(np.array([3.0, 4.0], dtype))]))
        assert beside == pytest.approx(5.0)

"""Dtypes: a state's are fixed at `init`, an update has its gradient's, sums are wide."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from conforming import DTYPES, PARAMS, STRICT, as_dtype, each, enable_x64, types, x64_for
from parts import in_turn
from registry import Entry

import optax_guard as og


@pytest.mark.parametrize(("entry", "dtype"), in_turn(STRICT, dict(zip(DTYPES, DTYPES, strict=True)), every=2))
def test_state_types_are_fixed_and_updates_have_the_gradients_dtype(entry: Entry, dtype: str) -> None:
    tx = entry.make_strict()
    with x64_for(dtype):
        params = as_dtype(PARAMS, dtype)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        new_params, after_fast = jax.eval_shape(lambda p, s: og.apply_gradients(tx, p, s, p), params, state)
    assert types(state) == types(after) == types(after_fast)
    assert types(updates) == types(params) == types(new_params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@each(STRICT)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_everything_but_the_inner_state_is_at_least_float32(entry: Entry, dtype: str) -> None:
    tx = entry.make(inner=lambda _: optax.identity()) if entry.wraps else entry.make()
    state = jax.eval_shape(tx.init, as_dtype(PARAMS, dtype))
    narrow = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.dtype in (jnp.float16, jnp.bfloat16) and "snapshots" not in jax.tree_util.keystr(path)
    ]
    assert narrow == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_real_and_at_least_float32(dtype: str) -> None:
    with x64_for(dtype):
        statistics = jax.eval_shape(og.gradient_statistics, as_dtype(PARAMS, dtype))
        wide = jnp.float64 if dtype in ("float64", "complex128") else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype(wide)}


@each(STRICT)
def test_x64_changes_no_type_of_a_float32_step(entry: Entry) -> None:
    def step_types() -> Any:
        tx = entry.make_strict()
        state = jax.eval_shape(tx.init, PARAMS)
        return types(state), types(jax.eval_shape(tx.update, PARAMS, state, PARAMS))

    with enable_x64(False):
        off = step_types()
    with enable_x64(True):
        assert step_types() == off

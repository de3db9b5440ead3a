"""Under JAX's transformations: jit, scan, cond, vmap, grad, donation and the NaN checks."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from conforming import (
    BAD_GRADS,
    GRADS,
    PARAMS,
    STRICT,
    as_dtype,
    assert_close,
    assert_same_bits,
    each,
    quick_step,
    run,
    stepper,
    types,
)
from jax import lax
from parts import in_part
from registry import ENTRIES, Entry

import optax_guard as og


@each(ENTRIES)
def test_init_on_shapes_equals_init_on_arrays(entry: Entry) -> None:
    tx = entry.make()
    state = tx.init(PARAMS)
    assert types(tx.init(as_dtype(PARAMS, "float32"))) == types(state) == types(jax.eval_shape(tx.init, PARAMS))


@each(ENTRIES)
@pytest.mark.parametrize("tree", [{}, (), {"frozen": None}, optax.MaskedNode()], ids=repr)
def test_a_tree_without_leaves_passes(entry: Entry, tree: Any) -> None:
    tx = entry.make()
    with entry.promotion():
        updates, state = jax.eval_shape(lambda: tx.update(tree, tx.init(tree), tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert types(state) == types(jax.eval_shape(tx.init, tree))


@each(ENTRIES)
def test_a_donated_step_is_traced_once_and_works_in_scan_under_debug_nans(entry: Entry) -> None:
    tx, nested, traces = stepper(entry)
    step = quick_step(entry)
    with entry.promotion(), jax.debug_nans(True):
        state = tx.init(PARAMS)
        params, state = step(GRADS[0], PARAMS, state)
        traced = len(traces)
        for grads in GRADS[1:]:
            params, state = step(grads, params, state)
        assert len(traces) == traced
        body = quick_jit(lambda stack, p, s: lax.scan(lambda carry, g: (nested(g, *carry), None), (p, s), stack)[0])
        scanned = body(jax.tree.map(lambda *g: np.stack(g), *GRADS), PARAMS, tx.init(PARAMS))
    assert_close(scanned, (params, state))


@each(ENTRIES)
def test_a_step_is_a_branch_of_cond(entry: Entry) -> None:
    tx, step, _ = stepper(entry)
    with entry.promotion():
        jax.eval_shape(
            lambda take, p, s: lax.cond(take, lambda: step(GRADS[0], p, s), lambda: (p, s)),
            np.bool_(True),
            PARAMS,
            jax.eval_shape(tx.init, PARAMS),
        )


@each(in_part(ENTRIES))
def test_replicas_under_vmap_equal_replicas_alone(entry: Entry) -> None:
    tx, step, _ = stepper(entry)
    gradients = [GRADS[1], BAD_GRADS]
    stack = functools.partial(jax.tree.map, lambda *x: np.stack([np.asarray(leaf) for leaf in x]))
    with entry.promotion():
        state = tx.init(PARAMS)
        together = quick_jit(jax.vmap(step))(stack(*gradients), stack(PARAMS, PARAMS), stack(state, state))
        alone = [run(entry, [grads]) for grads in gradients]
    assert_close(together, stack(*alone))


@each(ENTRIES)
def test_after_a_donated_step_init_works_again_and_gives_the_same(entry: Entry) -> None:
    with entry.promotion():
        assert_same_bits(run(entry, GRADS[:2]), run(entry, GRADS[:2]))


@pytest.mark.parametrize(
    "key", [lambda: jax.random.key(3), lambda: jax.random.PRNGKey(3), lambda: jax.random.key_data(jax.random.key(3))]
)
def test_donating_the_state_leaves_the_callers_key_alive(key: Callable[[], jax.Array]) -> None:
    mine = key()
    tx = og.noise_injection(key=mine)
    state = tx.init(PARAMS)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0)(state))
    assert state.noise_key.is_deleted()
    assert not mine.is_deleted()
    assert not tx.init(PARAMS).noise_key.is_deleted()


@pytest.mark.parametrize("zero", [True, False])
@each(
    [e for e in ENTRIES if str(e) in ("clip_by_leaf_norm", "adaptive_grad_clip", "noise_injection-relative", "guard")]
)
def test_not_one_operation_gives_nan_on_clean_gradients(entry: Entry, zero: bool) -> None:
    grads = jax.tree.map(jnp.zeros_like if zero else jnp.asarray, PARAMS)
    tx = entry.make()
    with jax.debug_nans(True):  # not jitted, so that each operation is looked at
        tx.update(grads, tx.init(PARAMS), jax.tree.map(jnp.asarray, PARAMS))


@each(in_part(STRICT))
def test_the_derivative_through_an_update_at_a_zero_gradient_is_finite(entry: Entry) -> None:
    tx = entry.make_strict()

    def total(grads: Any) -> Any:
        return sum(jnp.sum(x) for x in jax.tree.leaves(tx.update(grads, tx.init(PARAMS), PARAMS)[0]))

    chex.assert_tree_all_finite(quick_jit(jax.grad(total))(jax.tree.map(np.zeros_like, PARAMS)))

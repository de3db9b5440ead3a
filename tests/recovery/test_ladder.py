"""The ladder under every wrapper, in every dtype, under `vmap`; what its state hides, and when moments are dead."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from registry import ENTRIES, Entry, momentum
from test_rungs import LARGE, Run

import optax_guard as og

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPES = {"bias": (3,), "kernel": (3, 2)}
RUNGS = {
    "reset_moments": lambda: og.reset_moments(after=2, check_every=2),
    "back_off": lambda: og.back_off(diverged=2.0),
    "rewind": lambda: og.rewind(every=2, after=3),
    "rewind_bfloat16": lambda: og.rewind(dtype=jnp.bfloat16),
    "rewind_host": lambda: og.rewind(memory="host"),
}
THREE = tuple(RUNGS[name]() for name in ("reset_moments", "back_off", "rewind"))
WRAPPERS = [entry for entry in ENTRIES if entry.wraps]
ONE_EACH = list({entry.name: entry for entry in reversed(WRAPPERS)}.values())


def recovering(entry: Entry, recovery: tuple[Any, ...], inner: Callable = momentum) -> optax.GradientTransformation:
    """The ladder where it belongs: in the guard inside of what hands a gradient on, around what is an optimizer."""
    if entry.name in ("accumulate", "loss_scaling"):
        return entry.make(inner=lambda rate: og.guard(inner(rate), recovery=recovery))
    return og.guard(entry.make(inner=inner), recovery=recovery)


def parameters(dtype: str, stacked: tuple[int, ...] = ()) -> Any:
    return {name: jax.ShapeDtypeStruct((*stacked, *shape), jnp.dtype(dtype)) for name, shape in SHAPES.items()}


def both_ways(tx: Any, params: Any) -> Any:
    state, loss = tx.init(params), jnp.float32(1.0)
    fast = og.apply_gradients(tx, params, state, params, value=loss)
    return (params, state), fast, tx.update(params, state, params, value=loss)


def assert_types_are_kept(entry: Entry, recovery: tuple[Any, ...], dtype: str) -> None:
    before, fast, slow = jax.eval_shape(
        lambda params: both_ways(recovering(entry, recovery), params), parameters(dtype)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(before, fast)
    chex.assert_trees_all_equal_shapes_and_dtypes(before[1], slow[1])


@pytest.mark.parametrize("entry", ONE_EACH, ids=str)
def test_all_rungs_trace_in_every_wrapper_and_keep_every_type(entry: Entry) -> None:
    assert_types_are_kept(entry, THREE, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("entry", WRAPPERS, ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_each_rung_traces_in_every_wrapper_and_dtype(entry: Entry, rung: str) -> None:
    for dtype in ("float16", "bfloat16", "float32", "complex64"):
        assert_types_are_kept(entry, (RUNGS[rung](),), dtype)
    with jax.enable_x64(True):
        for dtype in ("float64", "complex128"):
            assert_types_are_kept(entry, (RUNGS[rung](),), dtype)


@pytest.mark.parametrize("rung", RUNGS)
def test_each_rung_traces_under_vmap_with_sixteen_bits(rung: str) -> None:
    tx = og.loss_scaling(og.guard(momentum(0.1), recovery=(RUNGS[rung](),)))
    before, fast, _ = jax.eval_shape(jax.vmap(lambda p: both_ways(tx, p)), parameters("bfloat16", (2,)))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, fast)


def test_a_snapshot_in_the_hosts_memory_comes_back_to_the_replica_that_needs_it() -> None:
    tx = og.guard(optax.sgd(1.0), og.skip_large(100.0), recovery=(og.rewind(after=1, memory="host"),))
    step = quick_jit(jax.vmap(lambda g, s, p: og.apply_gradients(tx, g, s, p)))
    params = jnp.zeros((2, 1))
    state = jax.vmap(tx.init)(params)
    for sizes in ((1.0, 1.0), (1.0, 1.0), (LARGE, 1.0)):  # a snapshot after the first step
        params, state = step(jnp.array(sizes)[:, None], state, params)
    np.testing.assert_array_equal(params, [[-1.0], [-3.0]])


def test_replicas_that_share_gradient_and_state_trace_with_a_snapshot_in_the_hosts_memory() -> None:
    tx = og.guard(optax.sgd(1.0), recovery=(og.rewind(memory="host"),))
    state = tx.init(jnp.zeros(1))
    params, _ = jax.eval_shape(
        jax.vmap(lambda p: og.apply_gradients(tx, jnp.ones(1), state, p), axis_size=2), jnp.zeros((2, 1))
    )
    assert params.shape == (2, 1)


@pytest.mark.parametrize("memory", ["device", "host"])
def test_snapshots_lie_in_the_memory_that_was_asked_for(memory: str) -> None:
    tx = og.guard(momentum(0.1), recovery=(og.rewind(memory=memory),))
    found: set[Any] = set()

    def spaces(params: Any) -> Any:
        _, (_, after), _ = both_ways(tx, params)
        found.update(jax.typeof(x).memory_space for x in jax.tree.leaves(after.recovery_state.rewind_state.snapshots))
        return params

    jax.eval_shape(spaces, parameters("float32"))
    jax.eval_shape(jax.vmap(spaces), parameters("float32", (2,)))
    assert found == {jax.memory.Space.Host if memory == "host" else jax.memory.Space.Device}


# Names


def names(tree: Any) -> set[str]:
    """The fields and keys on the paths to the leaves of a state."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    found = {getattr(key, "name", getattr(key, "key", None)) for path, _ in paths for key in path}
    return {name for name in found if isinstance(name, str)}


@pytest.mark.parametrize("entry", WRAPPERS, ids=str)
def test_a_ladder_hides_no_name_of_the_optimizers_state(entry: Entry) -> None:
    """`optax.tree.get` finds with a ladder what it finds without."""

    def inner(_: Any) -> optax.GradientTransformation:
        return optax.inject_hyperparams(optax.adam)(learning_rate=0.1)

    params = parameters("float32")
    with_ladder, without = (jax.eval_shape(recovering(entry, rungs, inner).init, params) for rungs in (THREE, ()))
    for name in names(jax.eval_shape(inner(0).init, params)) - set(SHAPES):
        found, expected = (len(optax.tree.get_all_with_path(x, name)) for x in (with_ladder, without))
        assert found == expected, name


def test_a_guard_repeats_no_name_of_the_optimizers_state() -> None:
    params = parameters("float32")
    for inner in (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), optax.lbfgs(), optax.adafactor(0.1)):
        alone, whole = (jax.eval_shape(tx.init, params) for tx in (inner, og.stabilize(inner, recovery=THREE)))
        for name in names(alone) - set(SHAPES):
            found, expected = (len(optax.tree.get_all_with_path(x, name)) for x in (whole, alone))
            assert found == expected, name


def test_a_learning_rate_is_found_and_one_set_by_hand_outlives_a_rewind() -> None:
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    run = Run(og.guard(inner, og.skip_large(100.0), recovery=(og.rewind(after=1),))).go(0.5)
    snapshot = run.params
    assert optax.tree.get(run.state, "learning_rate") == 1.0
    run.state = optax.tree.set(run.state, learning_rate=jnp.float32(0.25))
    run.go(0.5, LARGE)
    chex.assert_trees_all_equal(run.params, snapshot)
    assert optax.tree.get(run.state, "learning_rate") == 0.25
    assert optax.tree.get(run.state, "count") == 1  # all else is that of the snapshot


def test_the_loss_that_lbfgs_keeps_is_read_from_a_state_with_snapshots() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(x**4)

    tx = og.guard(optax.lbfgs(), recovery=(og.rewind(),))

    def value(x: jax.Array) -> Any:
        return optax.value_and_grad_from_state(loss)(x, state=tx.init(x))

    assert jax.eval_shape(value, jnp.ones(2))[0].shape == ()


def test_keys_in_the_optimizers_state_are_kept_in_snapshots() -> None:
    inner = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    before, fast, _ = jax.eval_shape(lambda p: both_ways(og.guard(inner, recovery=THREE), p), parameters("float32"))
    assert jax.tree.structure(before) == jax.tree.structure(fast)


# Dead, or only too small for 16 bits


@pytest.mark.parametrize("fast", [True, False], ids=["apply_gradients", "update"])
def test_parameters_too_coarse_for_their_updates_are_counted_and_not_reset(fast: bool) -> None:
    """Steps of 0.1, then of 1e-3 at parameters near 2, where half a unit in the last place of bfloat16 is 8e-3."""
    rate = optax.piecewise_constant_schedule(0.1, {4: 0.01, 20: 1e-6})
    tx = og.guard(optax.sgd(rate), recovery=(og.reset_moments(check_every=4),))
    params = {"kernel": jnp.full(4, 3.0, jnp.bfloat16), "scale": jnp.full((), 2.0, jnp.bfloat16)}
    run = Run(tx, params, fast).go(*[1.0] * 19)
    assert bits(run.params) == bits(run.go(1.0).params)
    assert (run.metrics["guard/standing_still"], run.metrics["guard/frozen_leaves"]) == (2, 0)
    assert run.metrics["guard/silent_death_total"] == 0
    run.go(*[1.0] * 10)  # updates of 1e-9, below 2^-24 of the parameters
    assert (run.metrics["guard/standing_still"], run.metrics["guard/silent_death_total"]) == (0, 1)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]

"""What every public transformation guarantees, whatever it does: one test per guarantee, over the registry.

Most hold already while a function is traced, which costs milliseconds; `jax.eval_shape` is used wherever that is so.
What must be run goes through one jitted step per entry, compiled quickly (see compiling.py).
"""

import contextlib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compiling import quick_jit, quick_options
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from registry import ENTRIES, NOT_TRANSFORMATIONS, Entry, accumulated, accumulated_guard, guarded, schedule

import optax_guard as og

RNG = np.random.default_rng(0)


def draw(size: float) -> dict[str, np.ndarray]:
    return {name: RNG.normal(0, size, shape).astype(np.float32) for name, shape in SHAPES.items()}


SHAPES = {"bias": (8,), "kernel": (8, 2)}
PARAMS = draw(1)
GRADS = [draw(size) for size in (0.01, 1, 5)]  # the first below every bound in the registry, the last above
BAD_GRADS = {"bias": GRADS[1]["bias"], "kernel": np.full((8, 2), np.nan, np.float32)}
LOSS = np.float32(0.5)

DTYPES = ("float16", "bfloat16", "float32", "complex64", "float64", "complex128")
STRICT = [entry for entry in ENTRIES if entry.strict]
WRAPPERS = [entry for entry in ENTRIES if entry.wraps]
STATEFUL = [entry for entry in ENTRIES if jax.tree.leaves(jax.eval_shape(entry.make().init, PARAMS))]
ROOMS = (og.rules, og.recovery, og.accumulation, og.transforms, og.state)
STATES = [x for room in ROOMS for name in room.__all__ if "State" in name and (x := getattr(room, name))]
STATES.append(og.state.FlightRecorder)

each = functools.partial(pytest.mark.parametrize, "entry", ids=str)


def in_part(entries: list[Entry] | tuple[Entry, ...]) -> list[Any]:
    """One in three for `make test`, all for `make test-all`: of what has to be compiled once for each entry."""
    return [pytest.param(e, id=str(e), marks=[] if i % 3 == 0 else pytest.mark.slow) for i, e in enumerate(entries)]


enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8


@functools.cache
def stepper(entry: Entry) -> tuple[optax.GradientTransformationExtraArgs, Wrapped, list[None]]:
    """The transformation, its jitted and donated step, and a list that grows whenever the step is traced.

    The step is for use inside another jitted function; `quick_step` is for calls of it alone.
    """
    tx, traces = entry.make(), []

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        traces.append(None)
        return og.apply_gradients(tx, grads, state, params, value=jnp.asarray(LOSS))

    return tx, step, traces


@functools.cache
def quick_step(entry: Entry) -> Callable:
    return quick_jit(stepper(entry)[1], donate_argnums=(1, 2))


def run(entry: Entry, gradients: list[Any], params: Any = PARAMS) -> tuple[Any, Any]:
    tx, step = stepper(entry)[0], quick_step(entry)
    state = tx.init(params)
    for grads in gradients:
        params, state = step(grads, params, state)
    return params, state


def types(tree: Any) -> tuple[list[Any], Any]:
    """Structure, shapes, dtypes and weak types, of arrays or of what `jax.eval_shape` gives."""
    return jax.tree.flatten(jax.eval_shape(lambda: tree) if _has_arrays(tree) else tree)


def _has_arrays(tree: Any) -> bool:
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def as_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def x64_for(dtype: str) -> contextlib.AbstractContextManager:
    return enable_x64(True) if dtype in ("float64", "complex128") else contextlib.nullcontext()


def assert_same_bits(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (np.asarray(a).dtype, np.asarray(a).tobytes()) == (np.asarray(b).dtype, np.asarray(b).tobytes())


def assert_close(got: Any, expected: Any) -> None:
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-5, atol=1e-6)


def test_every_public_name_is_registered_or_has_a_reason_not_to_be() -> None:
    names = [entry.name for entry in ENTRIES]
    assert sorted({*names, *NOT_TRANSFORMATIONS}) == sorted(og.__all__)
    assert not set(names) & set(NOT_TRANSFORMATIONS)


# 1. Extra arguments


@each(ENTRIES)
def test_unknown_extra_arguments_are_accepted_and_change_nothing(entry: Entry) -> None:
    tx = entry.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    arguments = GRADS[0], jax.eval_shape(tx.init, PARAMS), PARAMS
    with entry.promotion():
        plain = jax.make_jaxpr(tx.update)(*arguments)
        extra = jax.make_jaxpr(functools.partial(tx.update, unknown=object(), loss="text"))(*arguments)
    assert str(plain) == str(extra)


@each(WRAPPERS)
@pytest.mark.parametrize("fast", [True, False])
def test_wrappers_forward_every_extra_argument_to_the_inner_transformation(entry: Entry, fast: bool) -> None:
    seen: dict[str, Any] = {}

    def spying(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            seen.update(extra)
            return updates, state

        return optax.GradientTransformationExtraArgs(optax.identity().init, update)

    tx, token = entry.make(inner=spying), object()
    extra = {"value": LOSS, "hint": token}
    if fast:
        jax.eval_shape(lambda: og.apply_gradients(tx, GRADS[0], tx.init(PARAMS), PARAMS, **extra))
    else:
        jax.eval_shape(lambda: tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **extra))
    assert seen["hint"] is token
    assert seen["value"] is not None


def test_guard_gives_rules_the_params_the_loss_and_every_other_extra_argument() -> None:
    seen: dict[str, Any] = {}

    def judge(statistics: Any, state: Any, params: Any = None, **extra: Any) -> tuple[og.Verdict, Any]:
        seen.update(extra, params=params)
        return og.Verdict(scale=jnp.ones(()), skip=jnp.zeros((), bool)), state

    tx = og.guard(optax.sgd(0.1), og.rule(optax.identity().init, judge))
    jax.eval_shape(lambda: tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=LOSS, hint=1))
    assert seen.keys() == {"params", "value", "hint"}
    assert seen["params"] is PARAMS


def test_the_loss_in_the_flight_recorder_is_the_one_called_value() -> None:
    entry = next(e for e in ENTRIES if str(e) == "guard")
    _, state = run(entry, GRADS)
    assert og.flight_log(state)["value"].tolist() == [LOSS] * 3


# 2. Initialisation


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


# 3. and 4. Types, traces, JAX's transformations


@each(STRICT)
@pytest.mark.parametrize("dtype", DTYPES)
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


@each(ENTRIES)
def test_replicas_under_vmap_equal_replicas_alone(entry: Entry) -> None:
    tx, step, _ = stepper(entry)
    gradients = [GRADS[1], BAD_GRADS]
    stack = functools.partial(jax.tree.map, lambda *x: np.stack([np.asarray(leaf) for leaf in x]))
    with entry.promotion():
        state = tx.init(PARAMS)
        together = quick_jit(jax.vmap(step))(stack(*gradients), stack(PARAMS, PARAMS), stack(state, state))
        alone = [run(entry, [grads]) for grads in gradients]
    assert_close(together, stack(*alone))


# 5. Leaves without a gradient


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


@each(STRICT)
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


# 6. Composition with Optax


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
@each(in_part(ENTRIES))
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


# 7. Donation


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


# 8. Under strict settings (see conftest.py), debug_nans (above, jitted) and x64


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


@pytest.mark.parametrize("zero", [True, False])
@each(
    [e for e in ENTRIES if str(e) in ("clip_by_leaf_norm", "adaptive_grad_clip", "noise_injection-relative", "guard")]
)
def test_not_one_operation_gives_nan_on_clean_gradients(entry: Entry, zero: bool) -> None:
    grads = jax.tree.map(jnp.zeros_like if zero else jnp.asarray, PARAMS)
    tx = entry.make()
    with jax.debug_nans(True):  # not jitted, so that each operation is looked at
        tx.update(grads, tx.init(PARAMS), jax.tree.map(jnp.asarray, PARAMS))


# 9. Names


def test_state_fields_have_names_of_their_own_that_optax_does_not_use() -> None:
    fields = [name for state in STATES for name in state._fields]
    theirs = {
        name
        for module in (optax, optax.contrib)
        for state in vars(module).values()
        if isinstance(state, type) and issubclass(state, tuple) and hasattr(state, "_fields")
        if not issubclass(state, optax.GradientTransformation)
        for name in state._fields
    }
    assert len(STATES) >= 20
    assert len(fields) == len(set(fields))
    assert "count" in theirs
    assert not theirs & set(fields)


def test_optax_tree_get_finds_every_field_in_one_state_of_everything() -> None:
    inner = optax.chain(og.noise_injection(), og.l1_penalty(schedule), optax.adamw(0.1))
    inner = og.proximal_l1(inner, 0.1, learning_rate=0.1)
    rules = og.record_leaves(), og.skip_spikes(), og.clip_by_global_norm(schedule)
    rules += og.clip_by_norm_history(), og.clip_by_median_norm(), og.zclip(), og.autoclip(), og.adagc()
    recovery = og.reset_moments(), og.back_off(diverged=2.0), og.rewind()
    everything = og.loss_scaling(og.accumulate(og.guard(inner, *rules, recovery=recovery), every=2))
    own = ("spam_clip", "stable_spam", "clip_by_update_norm", "clippy", "limit_step", "masked_rule")
    alone = [entry.make() for entry in ENTRIES if entry.name in own and not entry.variant]
    states = [jax.eval_shape(tx.init, PARAMS) for tx in (everything, *alone)]
    for name in (name for kind in (*STATES, og.recovery.LossWatch) for name in kind._fields):
        assert [state for state in states if optax.tree.get(state, name) is not None], name


# 10. Devices


def on_mesh(kind: AxisType, *trees: Any) -> Any:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    return jax.device_put(trees, NamedSharding(mesh, PartitionSpec("x")))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@each(in_part(ENTRIES))
def test_sharded_over_eight_devices_equals_unsharded(entry: Entry, kind: AxisType) -> None:
    gradients = GRADS[1:]
    with entry.promotion():
        expected = run(entry, gradients)
        params, *sharded = on_mesh(kind, PARAMS, *gradients)
        got = run(entry, sharded, params)
    assert_close(got, expected)
    assert got[0]["kernel"].sharding.is_equivalent_to(sharded[0]["kernel"].sharding, 2)


def test_a_guarded_adamw_step_on_sharded_parameters_has_one_all_reduce_and_no_all_gather() -> None:
    entry = next(e for e in ENTRIES if str(e) == "guard-adamw")
    tx, step, _ = stepper(entry)
    with entry.promotion():
        params, grads = on_mesh(AxisType.Auto, PARAMS, GRADS[1])
        program = str(step.lower(grads, params, tx.init(params)).compile().as_text())
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 1
    assert "all-gather" not in program


def mapped_step(tx: Any, state: Any) -> Callable:
    """A step in `jax.shard_map`, each device with its own rows of everything and its own loss."""
    split, whole = PartitionSpec("x"), PartitionSpec()
    specs = optax.tree.map_params(tx, lambda _: split, state, transform_non_params=lambda _: whole)
    return quick_jit(
        jax.shard_map(
            lambda grads, params, state, losses: og.apply_gradients(tx, grads, state, params, value=losses[0]),
            mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
            in_specs=(split, split, specs, split),
            out_specs=(split, specs),  # that the state is `whole` proves that all devices agree on it
        )
    )


@each([entry for entry in ENTRIES if entry.takes_axis_name])
def test_shard_map_with_axis_name_equals_jit_and_one_bad_shard_gives_one_verdict(entry: Entry) -> None:
    one_bad_shard = jax.tree.map(lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x), GRADS[1])
    losses = np.linspace(0.25, 0.75, 8, dtype=np.float32)  # their mean is LOSS
    tx = entry.make(axis_name="x")
    with entry.promotion():
        params, state = PARAMS, tx.init(PARAMS)
        step = mapped_step(tx, state)
        for grads in (*GRADS[1:], one_bad_shard):
            params, state = step(grads, params, state, losses)
        expected = run(entry, [*GRADS[1:], one_bad_shard])
    assert_close((params, state), expected)


# 11. Checkpoints


def through_orbax(state: Any, like: Any, folder: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", like)


def through_msgpack(state: Any, like: Any, folder: Any) -> Any:
    (folder / "state").write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(like, (folder / "state").read_bytes())


def through_equinox(state: Any, like: Any, folder: Any) -> Any:
    eqx.tree_serialise_leaves(folder / "state", state)
    return eqx.tree_deserialise_leaves(folder / "state", like)


@pytest.mark.parametrize("save_and_restore", [through_orbax, through_msgpack, through_equinox])
@each(in_part(STATEFUL))
def test_a_restored_state_gives_the_next_step_bit_for_bit(entry: Entry, save_and_restore: Any, tmp_path: Any) -> None:
    tx, step = stepper(entry)[0], quick_step(entry)
    with entry.promotion():
        params, state = run(entry, GRADS)
        like = jax.tree.map(jnp.zeros_like, tx.init(PARAMS))
        restored = save_and_restore(state, like, tmp_path)
        assert_same_bits(restored, state)
        copy = jax.tree.map(jnp.copy, params)
        assert_same_bits(step(GRADS[1], copy, restored), step(GRADS[1], params, state))


def test_keys_are_stored_as_raw_data() -> None:
    for key in (3, jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        assert og.noise_injection(key=key).init(PARAMS).noise_key.dtype == jnp.uint32


# 12. Misuse

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
    "no rule": (lambda: og.guard(SGD, optax.clip(1.0)), "guard: rule 0 must be made by `rule` GradientTransformation"),
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


# The meta-gradient, and the rest of the ecosystem


@each(STRICT)
def test_the_derivative_through_an_update_at_a_zero_gradient_is_finite(entry: Entry) -> None:
    tx = entry.make_strict()

    def total(grads: Any) -> Any:
        return sum(jnp.sum(x) for x in jax.tree.leaves(tx.update(grads, tx.init(PARAMS), PARAMS)[0]))

    chex.assert_tree_all_finite(quick_jit(jax.grad(total))(jax.tree.map(np.zeros_like, PARAMS)))


def loss_of(model: Callable, inputs: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(inputs)))


INPUTS = np.ones((4, 3), np.float32)


@pytest.mark.usefixtures("standard_promotion")
@each(WRAPPERS)
def test_nnx_optimizer_trains_passes_the_loss_and_metrics_reads_its_state(entry: Entry) -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, entry.make(learning_rate=0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, grads = nnx.value_and_grad(loss_of)(model, INPUTS)
        optimizer.update(model, grads, value=loss)
        return loss, og.metrics(optimizer.opt_state)

    (first, _), _, (last, metrics) = [step(model, optimizer) for _ in range(3)]
    assert last < first
    if "guard/step" in metrics:
        taken = 3 if entry.name in ("guard", "stabilize") else 1
        assert metrics["guard/step"] == taken
    if entry.name in ("guard", "stabilize"):
        assert og.flight_log(optimizer.opt_state)["value"][0] == first
        og.raise_if_halted(optimizer.opt_state)
    elif entry.name == "accumulate":
        assert not og.has_updated(optimizer.opt_state)


@pytest.mark.usefixtures("standard_promotion")
@each(WRAPPERS)
def test_linen_train_state_trains(entry: Entry) -> None:
    model = nn.Dense(2)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), INPUTS), tx=entry.make(learning_rate=0.01)
    )

    @quick_jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: loss_of(functools.partial(state.apply_fn, p), INPUTS))(state.params)
        return state.apply_gradients(grads=grads), loss

    state, first = step(state)
    state, _ = step(state)
    assert step(state)[1] < first


@pytest.mark.usefixtures("standard_promotion")
@each(WRAPPERS)
def test_equinox_models_train_with_the_gradient_of_filter_grad_and_with_filtered_params(entry: Entry) -> None:
    tx = entry.make(learning_rate=0.01)
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))  # its activation is a leaf that is no array
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all", compiler_options=quick_options())  # pyright: ignore[reportCallIssue] (jit's own options)
    def step(model: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m), INPUTS))(model)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        params, state = og.apply_gradients(tx, grads, state, params, value=loss)
        return eqx.combine(params, static), state, loss

    losses = []
    for _ in range(3):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[2] < losses[0]


def test_import_brings_in_nothing_that_jax_and_optax_do_not() -> None:
    code = "import sys, json, jax, optax; a = set(sys.modules); import optax_guard; "
    code += "print(json.dumps([*set(sys.modules) - a]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    new = {name.split(".")[0] for name in json.loads(out.stdout)}
    assert "optax_guard" in new
    assert not new & {"flax", "matplotlib", "scipy", "rich", "chex", "orbax", "equinox", "sklearn", "tensorflow"}

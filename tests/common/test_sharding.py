"""One device, eight devices in every layout, and two processes give the same; nothing gathers a parameter.

Every single transformation is held to this by the conformance suite, with all trees split over one axis. Here a stack
of them runs in the layouts that people use.
"""

import json
import os
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import momentum
from running import ROOT, SECONDS

import optax_guard as og

RNG = np.random.default_rng(0)
SHAPES = {"bias": (8,), "kernel": (16, 8)}


def draw(size: float) -> dict[str, np.ndarray]:
    return {name: RNG.normal(0, size, shape).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS = draw(1.0)
ONE_BAD = draw(1.0)
ONE_BAD["kernel"][11, 3] = np.nan  # on one device of eight
GRADS = [draw(0.3), ONE_BAD, draw(5.0), draw(1.0)]
LAYOUTS = {  # the specs of bias and kernel on a mesh of 4 x 2
    "data_parallel": (P(), P()),
    "fsdp": (P("data"), P("data")),
    "tensor_parallel": (P("model"), P(None, "model")),
    "fsdp_and_tensor_parallel": (P("model"), P("data", "model")),
}
STACK = og.accumulate(
    og.guard(
        optax.chain(og.l1_penalty(0.01), og.noise_injection(0.01, key=3), momentum(0.1)),
        og.skip_large(100.0),
        og.clip_by_global_norm(1.0),
        recorder_rows=4,
    ),
    2,
)


def make_step(tx: Any) -> Any:
    def step(params: Any, state: Any, grads: Any) -> Any:
        return og.apply_gradients(tx, grads, state, params, value=jnp.float32(1.0))

    return jax.jit(step)


STEP = make_step(STACK)


def trained(params: Any, state: Any, gradients: Any) -> Any:
    for grads in gradients:
        params, state = STEP(params, state, grads)
    return jax.device_get((params, state))


@pytest.fixture(scope="module")
def expected() -> Any:
    return trained(PARAMS, STACK.init(PARAMS), GRADS)


def shardings(layout: str, kind: AxisType) -> Any:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return {name: NamedSharding(mesh, spec) for name, spec in zip(SHAPES, LAYOUTS[layout], strict=True)}


def state_shardings(tx: Any, params: Any, where: Any) -> Any:
    """The one-liner of docs/guard/many_devices.md."""
    whole = NamedSharding(next(iter(where.values())).mesh, P())
    return optax.tree.map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, params), where, transform_non_params=lambda _: whole
    )


KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
CASES = [  # each layout and each kind in `make test`, all pairs in `make test-all`
    pytest.param(layout, kind, id=f"{layout}-{name}", marks=[] if (i + j) % 2 == 0 else pytest.mark.slow)
    for i, layout in enumerate(LAYOUTS)
    for j, (name, kind) in enumerate(KINDS.items())
]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_stack_in_every_layout_equals_one_device_and_gathers_nothing(
    layout: str, kind: AxisType, expected: Any
) -> None:
    """Noise included, so it is the same for any sharding; and one NaN on one device drops that micro-batch on all."""
    where = shardings(layout, kind)
    params = jax.device_put(PARAMS, where)
    state = jax.jit(STACK.init, out_shardings=state_shardings(STACK, PARAMS, where))(params)
    for copies in (state.gradient_sum, optax.tree.get(state, "trace")):
        assert all(copies[name].sharding.is_equivalent_to(where[name], len(SHAPES[name])) for name in SHAPES)
    gradients = [jax.device_put(grads, where) for grads in GRADS]
    got = trained(params, state, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    assert (int(got[1].dropped_total), int(got[1].emitted_total)) == (1, 2)
    program = STEP.lower(params, state, gradients[0]).compile().as_text()
    assert "all-gather" not in program
    # One vector of sums per look, at the micro-batch and at the finished sum, and per mesh axis that splits a leaf.
    expected_reduces = {"data_parallel": 0, "fsdp_and_tensor_parallel": 4}.get(layout, 2)
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == expected_reduces


def test_jit_sees_global_norms_and_shard_map_local_ones_unless_axis_name() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    grads = jnp.ones(8)

    def norm_after(axis_name: str | None) -> float:
        clip = og.clip_by_global_norm(1.0, axis_name=axis_name)
        mapped = jax.shard_map(
            lambda g: clip.update(g, optax.EmptyState())[0], mesh=mesh, in_specs=P("x"), out_specs=P("x")
        )
        return float(og.global_norm(jax.jit(mapped)(grads)))

    np.testing.assert_allclose(norm_after(None), np.sqrt(8), rtol=1e-6)  # eight local norms of 1
    np.testing.assert_allclose(norm_after("x"), 1.0, rtol=1e-6)
    on_mesh = jax.device_put(grads, NamedSharding(mesh, P("x")))
    clipped = og.clip_by_global_norm(1.0).update(on_mesh, optax.EmptyState())[0]
    np.testing.assert_allclose(og.global_norm(clipped), 1.0, rtol=1e-6)


@pytest.mark.parametrize("axis_name", ["x", None])
def test_in_shard_map_guard_adds_one_all_reduce_and_replicas_agree_on_a_nan_of_one(axis_name: str | None) -> None:
    """Gradients averaged over the axis need no axis_name; gradients sharded over it do: one float a leaf."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = og.guard(momentum(0.1), og.clip_by_global_norm(1.0, axis_name=axis_name), axis_name=axis_name, recorder_rows=2)
    params = {"w": jnp.ones((16, 4))}
    grads = {"w": jnp.ones((16, 4)).at[9, 1].set(jnp.nan)}
    spec = P() if axis_name is None else P("x")

    def step(params: Any, state: Any, grads: Any) -> Any:
        if axis_name is None:
            grads = jax.lax.pmean(grads, "x")
        return og.apply_gradients(tx, grads, state, params)

    specs = optax.tree.map_params(tx, lambda _: spec, tx.init(params), transform_non_params=lambda _: P())
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(spec, specs, P("x")), out_specs=(spec, specs))
        if axis_name
        else jax.shard_map(
            lambda p, s, g: step(p, s, {"w": g["w"][0]}), mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P()
        )
    )
    given = grads if axis_name else {"w": jnp.broadcast_to(jnp.ones((16, 4)), (8, 16, 4)).at[5, 0, 0].set(jnp.nan)}
    compiled: Any = mapped.lower(params, tx.init(params), given).compile()
    new, state = compiled(params, tx.init(params), given)
    np.testing.assert_array_equal(new["w"], params["w"])
    assert all(np.array_equal(shard.data, 1) for shard in state.nonfinite_total.addressable_shards)
    reduces = re.findall(r"^.* all-reduce(?:-start)?\(.*$", compiled.as_text(), re.MULTILINE)
    assert len(reduces) == 1
    assert "f32[1]" in reduces[0] or axis_name is None


START = """
import sys, json
import jax
rank, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
"""
RUN = """
import jax, numpy as np, optax, optax_guard as og
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, P("x"))
rng = np.random.default_rng(0)
def put(x):
    return jax.make_array_from_callback(x.shape, split, lambda i: x[i])
inner = optax.chain(og.noise_injection(0.01, key=3), optax.sgd(0.1, momentum=0.9))
tx = og.accumulate(og.guard(inner, og.clip_by_global_norm(1.0), recorder_rows=4), 2)
params = {"w": put(rng.normal(size=(16, 3)).astype(np.float32))}
state = jax.jit(tx.init)(params)
step = jax.jit(lambda p, s, g: og.apply_gradients(tx, g, s, p))
for i in range(6):
    grads = rng.normal(size=(16, 3)).astype(np.float32)
    if i == 2:
        grads[15] = np.nan  # rows of the last device, which the first process does not have
    params, state = step(params, state, {"w": put(grads)})
norm = jax.jit(og.global_norm)(params)
result = {"norm": float(norm), **{k: float(v) for k, v in og.metrics(state).items()}}
"""
END = """
print("RESULT " + json.dumps(result))
"""


def results_of_two_processes(timeout: float = SECONDS) -> list[dict[str, float]]:
    """What each prints; neither outlives the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick_flags()])
    command = [sys.executable, "-c", START + RUN + END]
    running = [
        subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()  # else it is still there when a later test looks for what was left open
    return [json.loads(re.search(r"^RESULT (.*)$", text, re.MULTILINE)[1]) for text in outputs]


def test_two_processes_equal_one_and_agree_on_a_nan_that_only_one_of_them_has(standard_promotion: None) -> None:
    names: dict[str, Any] = {}
    exec(RUN, names)
    alone = names["result"]
    assert alone["accumulate/dropped_total"] == 1
    for each in results_of_two_processes():
        assert each == pytest.approx(alone, rel=1e-6)

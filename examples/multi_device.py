"""A transformer trained on real text over many devices, which survives a NaN on one of them.

    python examples/multi_device.py                  # 8 simulated devices in one process, about a minute
    python examples/multi_device.py --processes 2    # 2 processes of 4 devices each, over loopback
    python examples/multi_device.py --quick          # a few steps: to see that it runs

Training is data-parallel: the batch is split over the devices, and each sums the gradients of 2 micro-batches, which
are then reduced once. At two steps the rows of one device contain NaN. All devices hold these steps together, and the
loss keeps falling.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import zlib
from typing import Any

import numpy as np

ROWS, TIME = 32, 32


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A transformer over 8 simulated devices; one of them sees NaN.")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2, 4, 8), help="share 8 devices (default: 1)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--quick", action="store_true", help="12 steps: to see that it runs")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # set by the parent process
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 12:
        parser.error("--steps must be at least 12")
    options.steps = 12 if options.quick else options.steps
    return options


def start_processes(options: argparse.Namespace) -> int:
    """Runs this file once per process; ends all of them if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [sys.executable, __file__, "--processes", str(options.processes), "--steps", str(options.steps)]
    ranks = [
        subprocess.Popen([*common, "--port", str(port), "--rank", str(rank)], env=os.environ)
        for rank in range(options.processes)
    ]
    try:
        return max(abs(process.wait(timeout=1800)) for process in ranks)
    finally:
        for process in ranks:
            process.kill()


def text_batches(steps: int) -> tuple[np.ndarray, list[int]]:
    """Bytes of Python's own help pages, [steps, rows, time + 1], and the steps at which a device sees NaN."""
    from pydoc_data.topics import topics

    text = np.frombuffer("".join(topics[name] for name in sorted(topics)).encode("ascii", "replace"), np.uint8)
    starts = np.random.default_rng(0).integers(0, len(text) - TIME - 1, (steps, ROWS, 1))
    return text[starts + np.arange(TIME + 1)].astype(np.int32), [steps // 3, steps // 2]


def train(options: argparse.Namespace) -> None:
    """Trains on this process's share of the devices."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8 // options.processes)
    if options.rank is not None:
        jax.distributed.initialize(f"127.0.0.1:{options.port}", options.processes, options.rank)
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    import optax_guard as og
    from optax_guard.models import Transformer

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    graph, variables = nnx.split(Transformer(128, TIME, rngs=nnx.Rngs(0)))

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda i: np.asarray(x)[i]), tree)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(batch["bytes"][:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["bytes"][:, 1:])
        return jnp.mean(losses * batch["fault"][:, None])

    tx = og.guard(optax.adamw(3e-3), og.clip_by_global_norm(1.0), recorder_rows=options.steps)
    # The NaN should reach the guard here; by default, the rows of device 5 would be dropped.
    gradients = og.accumulate_gradients(loss_fn, 2, on_nonfinite="propagate", axis_name="data", mesh=mesh)

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = gradients(params, batch)
        return *og.apply_gradients(tx, grads, state, params, value=loss), loss

    params = everywhere(nnx.to_pure_dict(variables))
    state = everywhere(jax.tree.map(np.asarray, tx.init(nnx.to_pure_dict(variables))))
    batches, faults = text_batches(options.steps)
    first = jax.process_index() == 0
    losses, compiled = [], None
    for index, rows in enumerate(batches):
        fault = np.ones(ROWS, np.float32)
        fault[20:24] = np.nan if index in faults else 1  # the rows of device 5
        host = {"bytes": rows, "fault": fault}
        batch = {k: jax.make_array_from_callback(v.shape, split, lambda i, v=v: v[i]) for k, v in host.items()}
        if compiled is None:
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
        params, state, loss = compiled(params, state, batch)
        losses.append(float(loss))
        if first and index % 50 == 0:
            print(f"step {index:4d}  loss {losses[-1]:.3f}", flush=True)
    program, log = compiled.as_text(), og.flight_log(state)
    reduces = len(re.findall(r" all-reduce(?:-start)?\(", program))
    held = log["step"][log["event"] == "nonfinite"].tolist()
    digest = zlib.crc32(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params)))
    if first:
        print(f"{jax.device_count()} devices in {jax.process_count()} process(es); all-reduces in the step: {reduces}")
        print(f"device 5 saw NaN at steps {faults}; held everywhere at steps {held}")
        finite = [x for x in losses if np.isfinite(x)]
        print(f"loss {finite[0]:.3f} -> {np.mean(finite[-5:]):.3f}; chance is {np.log(128):.3f}")
    print(f"process {jax.process_index()}: parameters {digest:08x}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Starts the processes, or trains as one of them."""
    options = parse(arguments)
    if options.processes > 1 and options.rank is None:
        sys.exit(start_processes(options))
    train(options)


if __name__ == "__main__":
    main()

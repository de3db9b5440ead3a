"""A language model trained by many processes: a TPU pod, or GPUs under a scheduler. The script to start from.

    srun python examples/multi_host.py --folder /shared/run        # Slurm: one process per node, or per GPU
    python examples/multi_host.py --folder gs://bucket/run         # on every host of a TPU pod (ssh --worker=all)
    python examples/multi_host.py --folder /shared/run --coordinator 10.0.0.1:1234 --processes 4 --rank 0  # without one
    python examples/multi_host.py --local 2 --quick                # here: 2 processes of 4 simulated devices

Every process runs this same file. Parameters, moments and gradients are split over all devices (FSDP along `data`,
tensor parallelism along `model`), each process reads its own rows of every batch, and a run that was cut off continues
from its last checkpoint. At two steps the rows of one process are NaN, and all processes hold these steps together.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TIME, FAULTS = 32, (5, 11)  # length of a row; the steps at which the last process reads NaN


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A language model trained by many processes.")
    parser.add_argument("--folder", help="for checkpoints, seen by all processes (default: a new one)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--every", type=int, default=100, help="steps from checkpoint to checkpoint (default: 100)")
    parser.add_argument("--rows", type=int, default=8, help="of a batch, per device (default: 8)")
    parser.add_argument("--model", type=int, default=2, help="devices along the axis `model` (default: 2)")
    parser.add_argument("--coordinator", help="address:port of the first process, where no scheduler tells")
    parser.add_argument("--processes", type=int, help="their number, likewise")
    parser.add_argument("--rank", type=int, help="the number of this one, likewise")
    parser.add_argument("--local", type=int, help="starts so many processes here, on simulated devices")
    parser.add_argument("--quick", action="store_true", help="16 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.every, options.rows = min(options.steps, 16), 8, 1
    if options.every < 1 or options.steps % options.every:
        parser.error("--steps must be a multiple of --every, which is at least 1")
    return options


def start_locally(options: argparse.Namespace, arguments: list[str]) -> int:
    """Runs this file once per process, over loopback; ends all of them if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if not options.folder:
        arguments = [*arguments, "--folder", tempfile.mkdtemp()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // options.local)}
    who = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(options.local), "--rank"]
    command = [sys.executable, __file__, *arguments, *who]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(options.local)]
    try:
        return max(abs(process.wait(timeout=1800)) for process in processes)
    finally:
        for process in processes:
            process.kill()


def text() -> np.ndarray:
    """Bytes of Python's own help pages: put your tokens here, as a file that every process can map."""
    from pydoc_data.topics import topics

    return np.frombuffer("".join(topics[name] for name in sorted(topics)).encode("ascii", "replace"), np.uint8)


def rows_of_step(tokens: np.ndarray, step: int, rows: int, process: int, processes: int) -> dict[str, np.ndarray]:
    """This process's rows of the batch of a step: of the same sequence in every run, so that a resumed one goes on."""
    starts = np.random.default_rng((step, process)).integers(0, len(tokens) - TIME - 1, (rows, 1))
    bad = step in FAULTS and process == processes - 1
    weight = np.full(rows, np.nan if bad else 1, np.float32)
    return {"tokens": tokens[starts + np.arange(TIME + 1)].astype(np.int32), "weight": weight}


def train(options: argparse.Namespace) -> None:
    """Trains on this process's devices."""
    import jax

    # Before anything else asks for devices. Under Slurm, Open MPI, Kubernetes and on a TPU pod JAX finds the rest.
    jax.distributed.initialize(options.coordinator, options.processes, options.rank)
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    import optax_guard as og
    from optax_guard.models import Transformer

    if jax.local_device_count() % options.model:
        sys.exit("--model must divide the devices of a process, or its rows would have to be read by several")
    shape = (jax.device_count() // options.model, options.model)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def sharding(x: Any) -> NamedSharding:
        """Kernels over both axes, where their sizes allow; vectors whole, everywhere."""
        fits = x.ndim == 2 and all(size % n == 0 for size, n in zip(x.shape, shape, strict=True))
        return NamedSharding(mesh, PartitionSpec("data", "model")) if fits else whole

    graph, variables = nnx.split(nnx.eval_shape(lambda: Transformer(128, TIME, rngs=nnx.Rngs(0))))
    param_shardings = jax.tree.map(sharding, nnx.to_pure_dict(variables))

    def initial_params() -> Any:
        return nnx.to_pure_dict(nnx.split(Transformer(128, TIME, rngs=nnx.Rngs(0)))[1])

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(batch["tokens"][:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return jnp.mean(losses * batch["weight"][:, None])

    tx = og.stabilize(optax.adamw(3e-3))

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return *og.apply_gradients(tx, grads, state, params, value=loss), loss

    # Parameters and state are made where they belong: no process ever holds all of them.
    params = jax.jit(initial_params, out_shardings=param_shardings)()
    state_shardings = optax.tree.map_params(
        tx,
        lambda _, where: where,
        jax.eval_shape(tx.init, params),
        param_shardings,
        transform_non_params=lambda _: whole,
    )
    state = jax.jit(tx.init, out_shardings=state_shardings)(params)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(param_shardings, state_shardings, whole))

    start = 0
    with ocp.CheckpointManager(options.folder) as manager:
        if (saved := manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(saved, args=ocp.args.StandardRestore(like))
            start = saved
        tokens, rows = text(), options.rows * jax.local_device_count()
        loss = jnp.nan
        for index in range(start, options.steps):
            mine = rows_of_step(tokens, index, rows, jax.process_index(), jax.process_count())
            batch = {name: jax.make_array_from_process_local_data(split, part) for name, part in mine.items()}
            params, state, loss = step(params, state, batch)
            if (index + 1) % options.every == 0:  # everything in here is done by all processes, at the same steps
                og.raise_if_halted(state, params)
                manager.save(index + 1, args=ocp.args.StandardSave((params, state)))
                seen = jax.device_get(og.metrics(state))
                if jax.process_index() == 0:
                    held = int(seen["guard/skipped_total"])
                    print(f"step {index + 1}: loss {float(loss):.3f}, {held} steps held so far", flush=True)
        total = float(jax.jit(og.global_norm)(params))
    print(
        f"process {jax.process_index()} of {jax.process_count()}: began at step {start}, norm {total:.9g}", flush=True
    )


def main(arguments: list[str] | None = None) -> None:
    """Starts the processes, or trains as one of them."""
    options = parse(arguments)
    if options.local and options.rank is None:
        sys.exit(start_locally(options, sys.argv[1:] if arguments is None else arguments))
    if not options.folder:
        sys.exit("--folder: all processes need the same one")
    if "://" not in options.folder:
        options.folder = str(Path(options.folder).resolve())  # Orbax wants it absolute
    train(options)


if __name__ == "__main__":
    main()

"""Kills a training run, resumes it from its checkpoint, and checks that it is bit for bit as if uninterrupted.

    python examples/resume.py            # half a minute; prints the comparison
    python examples/resume.py --quick    # a short mode, to see that it runs

A child process trains and saves a checkpoint with Orbax every few batches. At some point it is killed with SIGKILL,
which leaves it no time to clean up. This process then restores the latest checkpoint, finishes the run, and trains once
more from the start without interruption. The run includes everything that could go wrong: Adam's moments, a learning
rate schedule, gradient noise, a clip that adapts to its history, batches with NaN, and an accumulation over 4 batches
whose cycle a checkpoint cuts in half.
"""

import argparse
import functools
import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import orbax.checkpoint as ocp
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og

EVERY = 4  # batches per optimizer step
SAVE = 10  # batches per checkpoint: two of three cut a cycle of the accumulation
BATCH = 32
NAN = 13  # every so many batches one holds a NaN
PAUSE = 0.02  # seconds per batch in the child, or it is done before it can be killed


def make_optimizer(batches: int) -> optax.GradientTransformation:
    """One optimizer with every kind of state."""
    schedule = optax.cosine_decay_schedule(1e-2, batches // EVERY)
    inner = optax.chain(og.noise_injection(1e-4, key=7), optax.adamw(schedule))
    return og.accumulate(og.guard(inner, og.skip_spikes(on="norm"), og.clip_by_norm_history()), every=EVERY)


def make_batch(index: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch with an index. It depends on nothing else, so the data resume where the training does."""
    digits = _digits()
    chosen = np.random.default_rng([5, index]).choice(len(digits.target), BATCH, replace=False)
    inputs = (digits.data[chosen] / 16).astype(np.float32)
    if index % NAN == NAN - 1:
        inputs[0, 3] = np.nan
    return inputs, digits.target[chosen]


@functools.cache
def _digits() -> Any:
    return load_digits()


@functools.cache
def make_training(batches: int) -> tuple[Any, Any]:
    """The start of a run, (params, state), and its jitted step."""
    tx, rng = make_optimizer(batches), np.random.default_rng(0)
    shapes = {"hidden": (64, 32), "out": (32, 10)}
    params = {name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.tanh(inputs @ params["hidden"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels)
        return og.apply_gradients(tx, grads, state, params, value=loss)

    return (params, tx.init(params)), step


def train(folder: Path | None, batches: int) -> Iterator[tuple[int, Any]]:
    """Trains from the latest checkpoint in `folder`, or from the start; returns (batches done, (params, state))."""
    carry, step = make_training(batches)
    start, manager = 0, None
    if folder is not None:
        manager = ocp.CheckpointManager(folder)
        if (saved := manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
            start, carry = saved, tuple(manager.restore(saved, args=ocp.args.StandardRestore(like)))
    for index in range(start, batches):
        carry = step(*carry, *make_batch(index))
        if manager is not None and (index + 1) % SAVE == 0:
            manager.save(index + 1, args=ocp.args.StandardSave(carry))
        yield index + 1, carry
    if manager is not None:
        manager.close()


def killed_run(folder: Path, batches: int, at: int) -> int:
    """Starts this file as a child, kills it after `at` batches, and returns how far it got."""
    command = [sys.executable, __file__, "--child", str(folder), "--batches", str(batches)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        done = 0
        for line in child.stdout:
            done = int(line)
            if done == at:
                child.kill()  # SIGKILL, to this child alone
    if done == batches or not done:
        sys.exit(
            f"The child should have been killed after {at} batches, but took {done} and exited with {child.returncode}."
        )
    return done


def digest(tree: Any) -> str:
    """Twelve letters that change if any bit of any leaf changes."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:12]


def compare(resumed: Any, uninterrupted: Any) -> tuple[Table, bool]:
    """The contents of both runs side by side, and whether all of it is the same."""
    table = Table(title="The run that was killed and resumed, and one that was not")
    for column in ("what", "resumed", "uninterrupted", "the same"):
        table.add_column(column)
    rows = {"parameters, every bit": [digest(params) for params, _ in (resumed, uninterrupted)]}
    rows["optimizer state, every bit"] = [digest(state) for _, state in (resumed, uninterrupted)]
    counters = ("guard_step", "clipped_total", "emitted_total", "dropped_total", "noise_step")
    for name in counters:
        rows[name] = [str(optax.tree.get(state, name)) for _, state in (resumed, uninterrupted)]
    for name, pair in rows.items():
        table.add_row(name, *pair, "yes" if pair[0] == pair[1] else "NO")
    return table, all(first == second for first, second in rows.values())


def main(arguments: list[str] | None = None) -> None:
    """Trains, kills, resumes and compares."""
    parser = argparse.ArgumentParser(description="A run killed with SIGKILL resumes bit for bit.")
    parser.add_argument("--batches", type=int, default=600, help="batches of the whole run (default: 600)")
    parser.add_argument("--quick", action="store_true", help="60 batches: to see that it runs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    batches = 60 if options.quick else options.batches
    if batches < 60:
        parser.error("--batches must be at least 60")
    if options.child:
        for done, _ in train(options.child, batches):
            print(done, flush=True)
            time.sleep(PAUSE)
        return
    console, at = Console(), batches * 5 // 8
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        with console.status(f"A child process trains, to be killed after batch {at} ..."):
            done = killed_run(checkpoints, batches, at)
        first, *_ = resumed = list(track(train(checkpoints, batches), "resumed", console=console, transient=True))
    console.print(f"Killed after batch {done} of {batches}; resumed after batch {first[0] - 1}.", highlight=False)
    *_, uninterrupted = track(train(None, batches), "uninterrupted", total=batches, console=console, transient=True)
    table, same = compare(resumed[-1][1], uninterrupted[1])
    console.print(table)
    if not same:
        sys.exit("The two runs differ.")


if __name__ == "__main__":
    main()

"""Add a guard to a run in progress, from its checkpoint, and remove it again.

    python examples/guard_a_running_job.py            # seconds; prints the comparison
    python examples/guard_a_running_job.py --quick    # a short mode, to see that it runs

A run in plain Optax (AdamW, a schedule, weight decay) has saved its parameters and optimizer state with Orbax. Its next
batches contain NaNs. The same optimizer continues from that checkpoint in three ways: unchanged; under a guard, with
`og.add_guard_state`; and under a guard for a while, then unguarded again with `og.remove_guard_state`. The moments,
the schedule's count and the rest of the optimizer's state are carried over bit for bit; only the guard's history starts
anew.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
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

BATCH = 32
HIDDEN = 32


def make_params() -> dict[str, np.ndarray]:
    """A small net as a plain dict."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (64, HIDDEN), "out": (HIDDEN, 10)}
    return {name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def logits(params: Any, inputs: jax.Array) -> jax.Array:
    """What the net answers."""
    return jnp.tanh(inputs @ params["hidden"]) @ params["out"]


def make_step(tx: optax.GradientTransformation) -> Any:
    """The step of a run. `og.apply_gradients` takes it for any Optax optimizer, guarded or not."""

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels).mean()

    @jax.jit
    def step(params: Any, state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels)
        return og.apply_gradients(tx, grads, state, params, value=loss)

    return step


def train(step: Any, params: Any, state: Any, batches: Iterable[Any]) -> tuple[Any, Any]:
    """Takes one step per batch."""
    for inputs, labels in batches:
        params, state = step(params, state, inputs, labels)
    return params, state


def same_bits(first: Any, second: Any) -> bool:
    """Whether two trees agree in structure and in every bit."""
    pairs = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (first, second)]
    return jax.tree.structure(first) == jax.tree.structure(second) and pairs[0] == pairs[1]


def save(folder: Path, params: Any, state: Any) -> None:
    """What the old program did: nothing in it knows of a guard."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "old", {"params": params, "state": state})


def load(folder: Path, params: Any, state: Any) -> tuple[Any, Any]:
    """The checkpoint, in the structure of what is passed."""
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": state})
        restored = checkpointer.restore(folder / "old", like)
    return restored["params"], restored["state"]


def main(arguments: list[str] | None = None) -> None:
    """Trains, saves, goes on three ways and compares."""
    parser = argparse.ArgumentParser(description="An existing Optax run put under guard from its checkpoint.")
    parser.add_argument("--steps", type=int, default=900, help="steps of the whole run (default: 900)")
    parser.add_argument("--quick", action="store_true", help="90 steps: to see that it runs")
    options = parser.parse_args(arguments)
    steps = 90 if options.quick else options.steps
    if steps < 30:
        parser.error("--steps must be at least 30")
    third, console = steps // 3, Console()
    digits, rng = load_digits(), np.random.default_rng(1)
    pixels, order = (digits.data / 16).astype(np.float32), rng.permutation(len(digits.target))
    test = order[:360]
    index = rng.choice(order[360:], (3 * third, BATCH))
    inputs, labels = pixels[index], digits.target[index]
    bad = slice(third + 5, 2 * third, 10)
    inputs[bad, 0, 20] = np.nan
    batches = list(zip(inputs, labels, strict=True))
    parts = [batches[i * third : (i + 1) * third] for i in range(3)]

    schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, third // 3, 3 * third)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)
    plain = make_step(optimizer)
    params = make_params()
    first = track(parts[0], "the old run", console=console, transient=True)
    params, state = train(plain, params, optimizer.init(params), first)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), params, state)
        params, state = load(Path(folder), params, state)

    # From here on it is another program, which has the checkpoint and knows how the optimizer was made.
    tx = og.guard(optimizer, og.clip_by_norm_history())
    guarded = make_step(tx)
    guarded_state = og.add_guard_state(tx, params, state)
    if not same_bits(og.remove_guard_state(guarded_state), state):
        sys.exit("The optimizer's state has changed on its way under guard.")
    ends = {"as it was": train(plain, *train(plain, params, state, parts[1]), parts[2])}
    rest = track(parts[1], "under guard", console=console, transient=True)
    middle = train(guarded, params, guarded_state, rest)
    ends["under guard to the end"] = train(guarded, *middle, parts[2])
    ends["under guard, then plain"] = train(plain, middle[0], og.remove_guard_state(middle[1]), parts[2])

    table = Table(title=f"From the checkpoint at step {third}; batches with NaN up to step {2 * third}")
    for column in ("way to go on", "accuracy", "count of AdamW", "held"):
        table.add_column(column, justify="left" if column == "way to go on" else "right")
    for name, (params, state) in ends.items():
        accuracy = np.mean(np.argmax(logits(params, pixels[test]), axis=-1) == digits.target[test])
        (_, count), *_ = optax.tree.get_all_with_path(state, "count")
        seen = og.metrics(state)
        held = str(int(seen["guard/skipped_total"])) if seen else "no guard"
        table.add_row(name, f"{accuracy:.3f}", str(int(count)), held)
    console.print(table)
    console.print("Chance is 0.1. Adding and removing the guard left the optimizer's state bit-for-bit unchanged.")
    console.print("A held step advances neither AdamW's count nor the schedule that depends on it.")


if __name__ == "__main__":
    main()

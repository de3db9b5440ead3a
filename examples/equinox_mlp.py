"""Plain Equinox: a guarded optimizer under `eqx.filter_jit`, saved and loaded with Equinox's own functions.

    python examples/equinox_mlp.py            # seconds; prints a table
    python examples/equinox_mlp.py --quick    # a short mode, to see that it runs

An MLP classifies scikit-learn's handwritten digits; every tenth batch contains a NaN. There are two ways to take the
step, and both give the same model: the Optax way, as in Equinox's documentation, in which only the optimizer changes,
and `og.apply_gradients`, which makes no copy of the parameters but needs the model partitioned into arrays and the
rest. Halfway through, the run is saved to a file and read back.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import equinox as eqx
    import numpy as np
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

BATCH = 64
TX = og.stabilize(optax.adam(3e-3))
Step = Callable[[Any, Any, np.ndarray, np.ndarray], tuple[Any, Any]]


@eqx.filter_value_and_grad
def loss_and_gradient(model: eqx.nn.MLP, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of a batch; the decorator adds its gradient."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(inputs), labels).mean()


@eqx.filter_jit
def optax_step(model: eqx.nn.MLP, state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """The step as for any Optax optimizer. Passing `value=` lets the guard judge and record the loss."""
    loss, grads = loss_and_gradient(model, inputs, labels)
    updates, state = TX.update(grads, state, eqx.filter(model, eqx.is_inexact_array), value=loss)
    return eqx.apply_updates(model, updates), state


@eqx.filter_jit(donate="all")
def fast_step(model: eqx.nn.MLP, state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """The step in place: it takes the model's arrays, updates them, and combines them with the rest again."""
    loss, grads = loss_and_gradient(model, inputs, labels)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    params, state = og.apply_gradients(TX, grads, state, params, value=loss)
    return eqx.combine(params, rest), state


def start(seed: int = 0) -> tuple[Any, Any]:
    """A new model and its optimizer state."""
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(seed))
    return model, TX.init(eqx.filter(model, eqx.is_inexact_array))


def train(run: tuple[Any, Any], step: Step, batches: Any) -> tuple[Any, Any]:
    """Takes one step per batch from (model, state)."""
    for inputs, labels in batches:
        run = step(*run, jnp.asarray(inputs), jnp.asarray(labels))
    return run


def largest_difference(first: Any, second: Any) -> float:
    """The largest difference between two models, over all their numbers."""
    pairs = zip(*(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)) for model in (first, second)), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def main(arguments: list[str] | None = None) -> None:
    """Trains twice, saving and loading in between, and prints the outcome."""
    parser = argparse.ArgumentParser(description="A guarded optimizer in Equinox.")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")
    parser.add_argument("--quick", action="store_true", help="100 steps: to see that it runs")
    options = parser.parse_args(arguments)
    steps = 100 if options.quick else options.steps
    if steps < 20:
        parser.error("--steps must be at least 20")
    digits, rng, console = load_digits(), np.random.default_rng(0), Console()
    pixels, order = (digits.data / 16).astype(np.float32), rng.permutation(len(digits.target))
    test, train_set = order[:360], order[360:]
    index = np.stack([rng.choice(train_set, BATCH, replace=False) for _ in range(steps)])
    inputs, labels = pixels[index], digits.target[index]
    inputs[9::10, 0, 0] = np.nan
    batches = list(zip(inputs, labels, strict=True))
    half = steps // 2

    table = Table(title=f"{steps} steps, with a NaN in one batch in ten")
    for column in ("step", "accuracy", "held", "clipped"):
        table.add_column(column, justify="left" if column == "step" else "right")
    models = {}
    for name, step in {"TX.update": optax_step, "og.apply_gradients": fast_step}.items():
        run = train(start(), step, track(batches[:half], f"{name}, first half", console=console, transient=True))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.eqx"
            eqx.tree_serialise_leaves(file, run)
            loaded = eqx.tree_deserialise_leaves(file, start(seed=1))  # of which only the shapes matter
        if not eqx.tree_equal(run, loaded, typematch=True):
            sys.exit("The loaded run differs from the saved one.")
        model, state = train(loaded, step, track(batches[half:], f"{name}, second", console=console, transient=True))
        accuracy = np.mean(np.argmax(jax.vmap(model)(pixels[test]), axis=-1) == digits.target[test])
        seen = jax.device_get(og.metrics(state))
        table.add_row(name, f"{accuracy:.3f}", *(str(seen[f"guard/{kind}_total"]) for kind in ("skipped", "clipped")))
        models[name] = model
    console.print(table)
    console.print(f"Saved and loaded after {half} steps, bit for bit the same.")
    console.print(f"Largest difference between the two models: {largest_difference(*models.values()):.2g}")


if __name__ == "__main__":
    main()

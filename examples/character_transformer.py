"""A small language model with bad data in four places, three ways to train it, and a report on the best one.

    python examples/character_transformer.py            # a few minutes on two cores; writes report.html and report.png
    python examples/character_transformer.py --quick    # a short mode, to see that it runs
    python examples/character_transformer.py --learning-rate 0.01 --out night.html

The text is Python's own documentation, from the standard library (`pydoc_data.topics`), read character by character by
`optax_guard.models.Transformer` with Adam. The faults are typical of data pipelines: an identifier that is not in the
vocabulary (for which Flax's lookup returns NaN), three batches in a row of noise instead of text, and a batch whose
loss is summed over its characters instead of averaged. All arms see the same batches from the same initial parameters.

"""

import argparse
import functools
import pydoc_data.topics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    from flax import nnx
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from optax_guard.report import read_log, report, story
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard.models import Transformer

NOISE = 0.45  # where the faults lie, as shares of the run
IN_A_ROW = 3
UNKNOWN = (0.6, 0.8)
SUMMED = 0.7


class Size(NamedTuple):
    """The sizes of the model and of the run."""

    steps: int
    batch: int
    context: int
    width: int
    layers: int


class Batch(NamedTuple):
    """The data of one step, or of all steps with a leading axis."""

    tokens: Any  # i32[batch, context + 1]
    weight: Any  # f32[]: of the loss


def read_text() -> tuple[np.ndarray, np.ndarray, int]:
    """The text as integers, its last tenth held out; the number of different characters."""
    text = "\n".join(pydoc_data.topics.topics.values())
    characters = sorted(set(text))
    tokens = np.searchsorted(characters, list(text)).astype(np.int32)
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], len(characters)


def windows(tokens: np.ndarray, shape: tuple[int, ...], context: int, rng: np.random.Generator) -> np.ndarray:
    """Random pieces of the text: [*shape, context + 1]."""
    start = rng.integers(len(tokens) - context - 1, size=shape)
    return tokens[start[..., None] + np.arange(context + 1)]


def make_batches(tokens: np.ndarray, vocabulary: int, size: Size, seed: int) -> tuple[Batch, dict[str, list[int]]]:
    """The batches of all steps, and which of them are bad."""
    rng = np.random.default_rng(seed)
    drawn = windows(tokens, (size.steps, size.batch), size.context, rng)
    weight = np.ones(size.steps, np.float32)
    first = int(NOISE * size.steps)
    faults = {
        "noise": list(range(first, first + IN_A_ROW)),
        "unknown character": [int(share * size.steps) for share in UNKNOWN],
        "loss summed": [int(SUMMED * size.steps)],
    }
    drawn[faults["noise"]] = rng.integers(vocabulary, size=(IN_A_ROW, *drawn.shape[1:]))
    drawn[faults["unknown character"], 0, 5] = vocabulary
    weight[faults["loss summed"]] = size.batch * size.context
    return Batch(drawn, weight), faults


def make_arms(learning_rate: float, rows: int) -> dict[str, optax.GradientTransformation]:
    """Three ways to take the step. The second and third add one line to the first."""
    adam = optax.adam(learning_rate)
    rules = og.record_leaves(rows), og.skip_spikes(), og.clip_by_norm_history()
    return {
        "optax.adam": adam,
        "guard(adam)": og.guard(adam),
        "guard(adam, skip, clip)": og.guard(adam, *rules, recorder_rows=rows),
    }


def make_model(vocabulary: int, size: Size, seed: int) -> tuple[Any, Callable[[Any, Batch], jax.Array]]:
    """Initial parameters as a plain tree, and the loss of a batch."""
    model = Transformer(vocabulary, size.context, width=size.width, layers=size.layers, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)

    def loss_fn(params: Any, batch: Batch) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(batch.tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
        return jnp.mean(losses) * batch.weight

    return nnx.to_pure_dict(params), loss_fn


def train(tx: optax.GradientTransformation, params: Any, grad_fn: Any, batches: Batch, tick: Any) -> tuple[Any, Any]:
    """Trains one arm; returns its last parameters and optimizer state."""
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)  # copied, since the step donates its parameters

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any, loss: jax.Array) -> tuple[Any, Any]:
        return og.apply_gradients(tx, grads, state, params, value=loss)

    for tokens, weight in zip(*batches, strict=True):
        loss, grads = grad_fn(params, Batch(tokens, weight))
        params, state = step(params, state, grads, loss)
        tick()
    return params, state


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A character transformer on real text with bad batches in it.")
    parser.add_argument("--steps", type=int, default=600, help="training steps per arm (default: 600)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of Adam (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--quick", action="store_true", help="a small model and 100 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.steps < 100:
        parser.error("--steps must be at least 100")
    if not options.learning_rate > 0:
        parser.error("--learning-rate must be positive")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Trains the three arms, prints a table and the story of the last one, and writes its report."""
    options = parse(arguments)
    size = Size(100, 8, 32, 16, 1) if options.quick else Size(options.steps, 32, 64, 64, 2)
    train_text, held_out, vocabulary = read_text()
    batches, faults = make_batches(train_text, vocabulary, size, options.seed)
    params, loss_fn = make_model(vocabulary, size, options.seed)
    test = Batch(windows(held_out, (256,), size.context, np.random.default_rng(0)), np.float32(1))
    evaluate, grad_fn = jax.jit(loss_fn), jax.jit(jax.value_and_grad(loss_fn))  # compiled once for all arms
    table = Table(title=f"After {size.steps} steps; chance is log({vocabulary}) = {np.log(vocabulary):.2f}")
    for column in ("arm", "held-out loss", "held", "clipped"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    console = Console()
    columns = TextColumn("{task.description:24s}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, tx in make_arms(options.learning_rate, rows=size.steps).items():
            task = progress.add_task(name, total=size.steps)
            last, state = train(tx, params, grad_fn, batches, lambda task=task: progress.advance(task))
            seen = jax.device_get(og.metrics(state))
            counts = [str(seen[f"guard/{kind}_total"]) if seen else "-" for kind in ("skipped", "clipped")]
            table.add_row(name, f"{float(evaluate(last, test)):.3f}", *counts)
    console.print(table)
    for kind, steps in faults.items():
        console.print(f"Bad batches, {kind}: steps {steps}", highlight=False)
    console.print("\nWhat the state of the last arm shows:", highlight=False)
    for sentence in story(read_log(state, last)):
        console.print(f"  {sentence}", highlight=False)
    console.print(f"Page: {report(state, last, options.out)}, picture: {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()

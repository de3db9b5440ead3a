"""Attention logits that explode at a learning rate that is too large, and two ways to hold them.

    python examples/attention.py            # two minutes on two cores; a table, and attention.png
    python examples/attention.py --quick    # a short mode, to see that it runs
    python examples/attention.py --learning-rate 0.1

A transformer of four layers reads Python's own documentation (`pydoc_data.topics`) character by character, with Adam at
a rate at which its attention logits grow into the thousands: the softmax is one-hot, and the loss stays high although
every gradient looks healthy. `qk_clip` scales the query and key weights of every head back whose largest logit passed
100. `limit_step` bounds every step to 1 % of the weights and knows nothing about attention. All three see the same
batches, from the same initial parameters.
"""

import argparse
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
    import numpy as np
    from flax import nnx
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard.flax import Optimizer
from optax_guard.models import Transformer
from optax_guard.report import read_log, story

mpl.use("Agg")
import matplotlib.pyplot as plt

THRESHOLD, HEADS, CONTEXT, BATCH = 100.0, 4, 64, 16


def make_arms(rate: float, steps: int) -> dict[str, optax.GradientTransformation]:
    """Three ways to take the step, of which every one is recorded."""
    clip = og.qk_clip(THRESHOLD, layers=og.attention.transformer_attention(HEADS))
    return {
        "adam": og.guard(optax.adam(rate), recorder_rows=steps),
        "adam, qk_clip": og.guard(optax.chain(optax.adam(rate), clip), recorder_rows=steps),
        "adam, limit_step": og.guard(optax.chain(optax.adam(rate), og.limit_step(0.01)), recorder_rows=steps),
    }


def loss_fn(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and the largest attention logit of every head: what the blocks have sown on the way."""
    forward = nnx.capture(lambda model: model(tokens[:, :-1], sow_max_logits=True), nnx.Intermediate)
    logits, sown = forward(model)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), og.collect_max_logits(sown)


@nnx.jit
def train_step(model: Transformer, optimizer: Optimizer, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One step in place; the maxima go on to the optimizer."""
    (loss, max_logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, tokens)
    optimizer.update(model, grads, value=loss, max_logits=max_logits)
    return loss, max_logits


def train(tx: Any, batches: np.ndarray, characters: int, width: int, name: str) -> tuple[Any, ...]:
    """The losses [steps], the largest logits [steps, layers * heads], and what the guard's log says in words."""
    model = Transformer(characters, CONTEXT, width=width, layers=4, heads=HEADS, rngs=nnx.Rngs(0))
    optimizer, seen = Optimizer(model, tx, wrt=nnx.Param), []
    for tokens in track(batches, f"{name:18s}"):
        seen.append(train_step(model, optimizer, jnp.asarray(tokens)))
    losses, maxima = zip(*jax.device_get(seen), strict=True)
    words = story(read_log(optimizer.opt_state, nnx.state(model, nnx.Param)))
    return np.array(losses), np.array([np.concatenate(list(layers.values())) for layers in maxima]), words


def main(arguments: list[str] | None = None) -> None:
    """Trains three times, prints a table and draws the largest logits."""
    parser = argparse.ArgumentParser(description="Attention logits with and without a clip.")
    parser.add_argument("--steps", type=int, default=200, help="training steps per arm (default: 200)")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="of Adam (default: 0.03)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (default: attention.png)")
    parser.add_argument("--quick", action="store_true", help="40 steps of a small model: to see that it runs")
    options = parser.parse_args(arguments)
    if options.steps < 20:
        parser.error("--steps must be at least 20")
    if not options.learning_rate > 0:
        parser.error("--learning-rate must be positive")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    steps, width = (40, 16) if options.quick else (options.steps, 64)
    characters, ids = np.unique(list("\n".join(pydoc_data.topics.topics.values())), return_inverse=True)
    starts = np.random.default_rng(0).integers(len(ids) - CONTEXT - 1, size=(steps, BATCH, 1))
    batches = ids[starts + np.arange(CONTEXT + 1)].astype(np.int32)

    table = Table(title=f"{steps} steps of Adam at {options.learning_rate:g}")
    for column in ("arm", "loss at the end", "largest logit", f"heads above {2 * THRESHOLD:.0f}"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    said: list[str] = []
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, tx in make_arms(options.learning_rate, steps).items():
        losses, maxima, words = train(tx, batches, len(characters), width, name)
        above = int(np.sum(maxima[-1] > 2 * THRESHOLD))
        table.add_row(name, f"{losses[-20:].mean():.3f}", f"{maxima[-1].max():.0f}", f"{above} of {maxima.shape[1]}")
        said.append(f"[bold]{name}:[/bold] {' '.join(words[1:])}".replace("`", ""))
        axis.plot(maxima.max(axis=1), label=name)
    axis.axhline(THRESHOLD, color="grey", lw=0.8, ls=":")
    axis.set(yscale="log", xlabel="step", ylabel="largest attention logit")
    axis.legend(frameon=False)
    figure.savefig(options.out, dpi=110)
    Console().print(table, *said, sep="\n", highlight=False)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()

"""The same training, five ways to take the step, at three learning rates.

    make demo                                     # installs what it needs, then runs this file
    python examples/quickstart.py                 # one to three minutes on two cores; writes quickstart.png
    python examples/quickstart.py --quick         # a short mode, to see that it runs
    python examples/quickstart.py --learning-rate 0.002 --seed 1 --out other.png

A vanilla recurrent net, trained by SGD with momentum, reads scikit-learn's handwritten digits pixel by pixel, as
sequences of 64 steps. Two things go wrong. A few batches are corrupted, as by a bad shard or a broken decoder. And the
learning rate is right, ten times too large, or thirty times too large. All runs see the same batches and start from the
same initial parameters. Nothing is scripted: the table and the picture show what was measured.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

try:
    import matplotlib
    import numpy as np
    from flax import nnx
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard.models import RNN

matplotlib.use("Agg")
import matplotlib.lines
import matplotlib.pyplot as plt

HIDDEN = 96  # enough for 95 % accuracy, small enough for two cores
BATCH = 64
MAX_NORM = 1.0  # the usual clip; the norm of a healthy gradient here is 0.5 to 3
MOMENTUM = 0.9
MAX_CHANGE = 1e-3  # no step changes the parameters by more than a thousandth of their norm
FACTORS = (1, 10, 30)  # of the learning rate
CHUNK = 50  # steps per jitted call: the progress display moves between calls
NONFINITE_LIMIT = 5  # after so many in a row, optax.apply_if_finite applies a non-finite gradient, as documented
SINGLE_NANS = (0.45, 0.8)  # batches with NaN pixels, as shares of the run
NAN_SHARD = 0.6  # a shard of eight of them in a row
SHARD_LENGTH = 8
SCALED = (0.38, 0.7)  # batches whose pixels were not divided by 16 but multiplied by 1e4


class Arm(NamedTuple):
    """One way to train."""

    label: str
    make: Callable[[Any], optax.GradientTransformation]  # of the learning rate
    color: str  # Okabe and Ito's palette, which colour-blind people can tell apart


class Record(NamedTuple):
    """What was measured at every step of an arm, for each learning rate: [steps, rates]."""

    loss: np.ndarray
    finite: np.ndarray  # whether all parameters are finite after the step
    moved: np.ndarray  # whether any parameter changed


def sgd(rate: Any) -> optax.GradientTransformation:
    """The optimizer of all arms."""
    return optax.sgd(rate, momentum=MOMENTUM)


def clipped(rate: Any) -> optax.GradientTransformation:
    """The usual clip."""
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), sgd(rate))


ARMS = {
    "bare": Arm("bare optimizer", sgd, "#999999"),
    "clip": Arm("optax.clip_by_global_norm", clipped, "#E69F00"),
    "finite": Arm(
        "optax.apply_if_finite", lambda rate: optax.apply_if_finite(clipped(rate), NONFINITE_LIMIT), "#CC79A7"
    ),
    "stabilize": Arm("og.stabilize", lambda rate: og.stabilize(sgd(rate), recorder_rows=2048), "#56B4E9"),
    "limited": Arm(
        f"og.stabilize, max_change={MAX_CHANGE:g}",
        lambda rate: og.stabilize(sgd(rate), max_change=MAX_CHANGE, recorder_rows=2048),
        "#0072B2",
    ),
}


def make_batches(steps: int, seed: int) -> tuple[Any, Any, dict[str, list[int]]]:
    """Training batches [steps, BATCH, 64, 1], some of them corrupted; the test set; which steps are corrupted."""
    digits = load_digits()
    pixels = (digits.data / 16).astype(np.float32)[..., None]  # [1797, 64, 1], in 0 to 1
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pixels))
    test, train = order[:360], order[360:]
    index = np.stack([rng.choice(train, BATCH, replace=False) for _ in range(steps)])
    inputs, labels = pixels[index], digits.target[index]
    shard = int(NAN_SHARD * steps)
    nans = [int(share * steps) for share in SINGLE_NANS] + list(range(shard, min(shard + SHARD_LENGTH, steps)))
    scaled = [int(share * steps) for share in SCALED]
    inputs[nans, 0, 10] = np.nan  # one pixel of one image
    inputs[scaled] *= 1e4
    return (inputs, labels), (pixels[test], digits.target[test]), {"NaN pixels": nans, "scaled by 1e4": scaled}


def make_model(seed: int) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Initial parameters as a plain tree, and logits(params, inputs)."""
    model = RNN(1, HIDDEN, 10, activation=jax.nn.relu, gain=1.0, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)
    return nnx.to_pure_dict(params), lambda params, inputs: nnx.merge(graph, params_state(params))(inputs)


def params_state(params: Any) -> Any:
    """Converts plain arrays back to Flax's state."""
    return nnx.State(jax.tree.map(nnx.Param, params))


def train(
    arm: Arm, params: Any, rates: np.ndarray, logits: Callable[..., jax.Array], batches: Any, tick: Callable[[], None]
) -> tuple[Any, Any, Record]:
    """Trains one arm at all learning rates at once; returns last parameters, optimizer states and the record."""

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels).mean()

    def step(rate: jax.Array, params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        new_params, state = og.apply_gradients(arm.make(rate), grads, state, params, value=loss)
        finite = jnp.all(og.gradient_statistics(new_params).finite)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), params, new_params)
        return new_params, state, (loss, finite, ~jnp.all(jnp.stack(jax.tree.leaves(same))))

    def body(carry: Any, batch: Any) -> Any:
        *carry, seen = jax.vmap(step, in_axes=(0, 0, 0, None))(rates, *carry, batch)
        return tuple(carry), seen

    run = jax.jit(lambda carry, part: jax.lax.scan(body, carry, part))
    repeated = jax.tree.map(lambda x: jnp.stack([x] * len(rates)), params)
    carry = repeated, jax.vmap(lambda rate, params: arm.make(rate).init(params))(rates, repeated)
    parts: list[Any] = []
    for start in range(0, len(batches[0]), CHUNK):
        if parts and not parts[-1][1][-1].any():  # all are dead: NaN stays NaN
            loss, finite, moved = parts[-1]
            parts.append((np.full_like(loss, np.nan), np.zeros_like(finite), np.zeros_like(moved)))
        else:
            carry, part = run(carry, tuple(x[start : start + CHUNK] for x in batches))
            parts.append(jax.device_get(part))
        tick()
    return *carry, Record(*(np.concatenate(column)[: len(batches[0])] for column in zip(*parts, strict=True)))


def death(record: Record, index: int) -> int | None:
    """The first step after which a parameter is not finite."""
    dead = np.flatnonzero(~record.finite[:, index])
    return int(dead[0]) if len(dead) else None


def summary(records: dict[str, Record], accuracy: dict[str, np.ndarray], rates: np.ndarray) -> Table:
    """The table of outcomes."""
    table = Table(title="Accuracy on held-out digits (chance is 0.1), and steps at which no parameter changed")
    for column in ("arm", "learning rate", "accuracy", "skipped", "first non-finite"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in ARMS.items():
        record = records[name]
        for i, rate in enumerate(rates):
            dead = death(record, i)
            table.add_row(
                arm.label,
                f"{rate:g}",
                f"{accuracy[name][i]:.3f}",
                str(int((~record.moved[:, i] & record.finite[:, i]).sum())),
                "never" if dead is None else f"step {dead}",
                end_section=i == len(rates) - 1,
            )
    return table


def picture(
    records: dict[str, Record], accuracy: dict[str, np.ndarray], rates: np.ndarray, faults: Any, path: Path
) -> None:
    """The loss of the five arms at each learning rate, and their final accuracy."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(2, 2, figsize=(10.5, 7.4), layout="constrained")
    steps = len(records["bare"].loss)
    window = max(steps // 50, 1)
    for i, (axis, rate) in enumerate(zip(grid.flat, rates, strict=False)):
        for step in faults["NaN pixels"]:
            axis.axvline(step, color="#CC3311", lw=0.8, alpha=0.35, zorder=1)
        for step in faults["scaled by 1e4"]:
            axis.axvline(step, color="#882255", lw=1.2, ls=":", alpha=0.8, zorder=1)
        for name, arm in ARMS.items():
            dead = death(records[name], i)
            shown = records[name].loss[:dead, i].astype(np.float64)
            shown = np.where(np.isfinite(shown), shown, np.nan)
            parts = (shown[max(j - window, 0) : j + 1] for j in range(len(shown)))
            smooth = np.array([np.nanmedian(part) if np.isfinite(part).any() else np.nan for part in parts])
            ours = name in ("stabilize", "limited")
            axis.plot(smooth, color=arm.color, lw=2.2 if ours else 1.5, zorder=4 if ours else 3)
            if dead:
                axis.plot(dead - 1, min(smooth[-1], 1e2), "X", color=arm.color, ms=11, mec="white", zorder=6)
        factor = "" if FACTORS[i] == 1 else f", {FACTORS[i]} times as large"
        axis.set(xlim=(0, steps), ylim=(0.08, 20), yscale="log", xlabel="step")
        axis.set_title(f"Training loss, learning rate {rate:g}{factor}", loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.2)
    last = grid.flat[len(rates)]
    for k, (name, arm) in enumerate(ARMS.items()):
        places = np.arange(len(rates)) + 0.16 * (k - 2)
        last.bar(places, accuracy[name], 0.15, color=arm.color, label=arm.label)
        for place, height in zip(places, accuracy[name], strict=True):
            last.text(place, height + 0.01, f"{height:.2f}", ha="center", fontsize=7.5)
    last.axhline(0.1, color="black", lw=0.8, ls="--")
    last.set(
        xticks=range(len(rates)), xticklabels=[f"{rate:g}" for rate in rates], ylim=(0, 1.05), xlabel="learning rate"
    )
    last.set_title("Accuracy on held-out digits (dashed: chance)", loc="left", fontsize=10)
    handles, labels = last.get_legend_handles_labels()
    for style, label in (
        ({"color": "#CC3311", "lw": 1}, "a batch with NaN pixels"),
        ({"color": "#882255", "lw": 1.2, "ls": ":"}, "a batch scaled by 1e4"),
        ({"color": "#555555", "marker": "X", "ls": "", "ms": 9}, "the parameters become NaN"),
    ):
        handles.append(matplotlib.lines.Line2D([], [], **style))
        labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        "One training, five ways to take the step, three learning rates",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Trains the five arms, prints the table and writes the picture."""
    parser = argparse.ArgumentParser(description="The same training with and without a guard, on real digits.")
    parser.add_argument("--steps", type=int, default=1000, help="training steps per arm (default: 1000)")
    parser.add_argument(
        "--learning-rate", type=float, default=0.001, help="the reasonable one, of SGD with momentum (default: 0.001)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart.png"), help="the picture (default: quickstart.png)"
    )
    parser.add_argument("--quick", action="store_true", help="150 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.steps < CHUNK or options.steps % CHUNK:
        parser.error(f"--steps must be at least {CHUNK}, and a multiple of it")
    if not options.learning_rate > 0:
        parser.error("--learning-rate must be positive")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    steps = 150 if options.quick else options.steps
    batches, (test_inputs, test_labels), faults = make_batches(steps, options.seed)
    params, logits = make_model(options.seed)
    rates = np.float32(options.learning_rate) * np.array(FACTORS, np.float32)
    console, records, accuracy, states = Console(), {}, {}, {}
    classify = jax.jit(jax.vmap(lambda params: jnp.argmax(logits(params, test_inputs), axis=-1)))
    columns = (
        TextColumn("{task.description:36s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, arm in ARMS.items():
            task = progress.add_task(arm.label, total=-(-steps // CHUNK))
            last, states[name], records[name] = train(
                arm, params, rates, logits, batches, lambda task=task: progress.advance(task)
            )
            accuracy[name] = np.mean(np.asarray(classify(last)) == test_labels, axis=1)
    console.print(summary(records, accuracy, rates))
    console.print(
        f"Corrupted batches: steps {faults['NaN pixels']} contain a NaN pixel, "
        f"steps {faults['scaled by 1e4']} are scaled by 1e4.\n"
        f"`apply_if_finite(..., {NONFINITE_LIMIT})` applies the sixth non-finite gradient in a row, as documented; "
        "with a larger limit it would have survived this shard.\n"
        f"The flight recorder of `{ARMS['limited'].label}` at learning rate {rates[0]:g} shows:"
    )
    state = jax.tree.map(lambda x: x[0], states["limited"])
    log, names = og.flight_log(state), og.leaf_names(params)
    acted = log[log["event"] != "applied"]
    for row in np.concatenate([acted[acted["event"] == e][:2] for e in ("skipped", "nonfinite", "clipped")]):
        console.print(
            f"  step {row['step']:4d}: {row['event']:9s} loss {row['value']:9.3g}, gradient norm "
            f"{row['grad_norm']:9.3g}, worst leaf {names[row['worst_leaf']]}",
            highlight=False,
        )
    picture(records, accuracy, rates, faults, options.out)
    console.print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()

"""One run, four arms: what happens to the same training with and without a guard.

    make demo                                     # installs what it needs, then runs this file
    python examples/quickstart.py                 # about a minute on two cores; writes quickstart.png
    python examples/quickstart.py --quick         # a short mode, to see that it runs
    python examples/quickstart.py --learning-rate 0.01 --seed 1 --out other.png

scikit-learn's handwritten digits are read pixel by pixel, as sequences of 64 steps, by a vanilla recurrent net. With a
learning rate of 0.02 the gradients of plain SGD explode by themselves; on top of that a few batches are corrupted, as a
bad shard or a broken decoder does it. All arms see the same batches from the same initial parameters. Nothing is
scripted: the table and the picture show what was measured.
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
    sys.exit(f"{error}. The examples need more than the library: pip install 'optax-guard[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard.models import RNN

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIDDEN = 96  # enough for 95 % accuracy, small enough for two cores
BATCH = 64
MAX_NORM = 1.0  # the usual clip; the norm of a healthy gradient here is 0.5 to 3
MOMENTUM = 0.9
CHUNK = 50  # steps per jitted call: the progress display moves between calls
NONFINITE_LIMIT = 5  # optax.apply_if_finite lets a non-finite gradient in after so many in a row: that is documented
SINGLE_NANS = (0.45, 0.8)  # batches with NaN pixels, as shares of the run
NAN_SHARD = 0.6  # a shard of eight of them in a row
SHARD_LENGTH = 8
SCALED = (0.38, 0.7)  # batches whose pixels were not divided by 16 but multiplied by 1e4
# Okabe and Ito's palette, which colour-blind people can tell apart.
COLORS = {"bare": "#888888", "clip": "#E69F00", "finite": "#56B4E9", "guard": "#0072B2"}


class Arm(NamedTuple):
    """One way to train."""

    label: str
    tx: optax.GradientTransformation
    clips: bool


class Record(NamedTuple):
    """What was measured at every step of an arm."""

    loss: np.ndarray
    norm: np.ndarray  # of the gradient as it came
    finite: np.ndarray  # whether all parameters are finite after the step
    moved: np.ndarray  # whether any parameter changed


def make_arms(learning_rate: float) -> dict[str, Arm]:
    """The four arms. The last differs from the second by one line."""
    sgd = optax.sgd(learning_rate, momentum=MOMENTUM)
    clipped = optax.chain(optax.clip_by_global_norm(MAX_NORM), sgd)
    return {
        "bare": Arm("bare optimizer", sgd, False),
        "clip": Arm("optax.clip_by_global_norm", clipped, True),
        "finite": Arm("optax.apply_if_finite", optax.apply_if_finite(clipped, NONFINITE_LIMIT), True),
        "guard": Arm("optax_guard", og.guard(sgd, og.clip_by_global_norm(MAX_NORM), history=2048), True),
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
    """Back from plain arrays to Flax's state."""
    return nnx.State(jax.tree.map(nnx.Param, params))


def train(
    arm: Arm, params: Any, logits: Callable[..., jax.Array], batches: Any, tick: Callable[[], None]
) -> tuple[Any, Any, Record]:
    """Trains one arm; returns its last parameters, its optimizer state and its record."""

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels).mean()

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        new_params, state = og.apply_gradients(arm.tx, grads, state, params, value=loss)
        finite = jnp.all(og.gradient_statistics(new_params).finite)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), params, new_params)
        return (new_params, state), (loss, og.global_norm(grads), finite, ~jnp.all(jnp.stack(jax.tree.leaves(same))))

    run = jax.jit(lambda carry, part: jax.lax.scan(step, carry, part))
    carry, parts = (params, arm.tx.init(params)), []
    for start in range(0, len(batches[0]), CHUNK):
        carry, part = run(carry, tuple(x[start : start + CHUNK] for x in batches))
        parts.append(jax.device_get(part))
        tick()
    return *carry, Record(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def summary(arms: dict[str, Arm], records: dict[str, Record], accuracy: dict[str, float]) -> Table:
    """The table of outcomes."""
    table = Table(title="Accuracy on held-out digits, and steps")
    for column in ("arm", "accuracy", "skipped", "clipped", "first non-finite"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in arms.items():
        record = records[name]
        dead = np.flatnonzero(~record.finite)
        skipped = ~record.moved & record.finite
        clipped = record.moved & np.isfinite(record.norm) & (record.norm > MAX_NORM) & record.finite
        table.add_row(
            arm.label,
            f"{accuracy[name]:.3f}",
            str(int(skipped.sum())),
            str(int(clipped.sum())) if arm.clips else "-",
            f"step {dead[0]}" if len(dead) else "never",
        )
    return table


def picture(
    arms: dict[str, Arm], records: dict[str, Record], accuracy: dict[str, float], faults: Any, path: Path
) -> None:
    """Loss and gradient norm of the four arms, with what was done to them."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 1, figsize=(10, 6.4), sharex=True, layout="constrained")
    steps = len(next(iter(records.values())).loss)
    window = max(steps // 75, 1)
    for axis, quantity, title in (
        (axes[0], "loss", f"Training loss (median of {window} steps)"),
        (axes[1], "norm", "Norm of the gradient as it came, before any clip"),
    ):
        for name in arms:
            values = getattr(records[name], quantity).astype(np.float64)
            dead = np.flatnonzero(~records[name].finite)
            end = dead[0] if len(dead) else steps
            shown = np.where(np.isfinite(values), values, np.nan)[:end]
            if quantity == "loss":
                shown = np.array([np.nanmedian(shown[max(i - window, 0) : i + 1]) for i in range(len(shown))])
            style = {
                "color": COLORS[name],
                "lw": 2.2 if name == "guard" else 1.6,
                "zorder": 4 if name == "guard" else 3,
            }
            axis.plot(
                np.arange(len(shown)), shown, **style if quantity == "loss" else style | {"lw": 0.9, "alpha": 0.9}
            )
            if len(dead) and len(shown) and quantity == "loss":
                axis.plot(end - 1, shown[-1], "X", color=COLORS[name], ms=11, mec="white", zorder=6)
        for step in faults["NaN pixels"]:
            axis.axvline(step, color="#CC3311", lw=0.8, alpha=0.45, zorder=1)
        for step in faults["scaled by 1e4"]:
            axis.axvline(step, color="#AA4499", lw=1.2, ls=":", alpha=0.8, zorder=1)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yscale("log")
        axis.grid(axis="y", alpha=0.2)
    for name, arm in arms.items():
        dead = np.flatnonzero(~records[name].finite)
        fate = f"NaN from step {dead[0]}" if len(dead) else "alive"
        axes[0].plot([], [], color=COLORS[name], lw=3, label=f"{arm.label}: {fate}, accuracy {accuracy[name]:.2f}")
    axes[0].plot([], [], "X", color="#555555", ms=9, ls="", label="the parameters become NaN")
    axes[0].plot([], [], color="#CC3311", lw=1, label="a batch with NaN pixels")
    axes[0].plot([], [], color="#AA4499", lw=1.2, ls=":", label="a batch scaled by 1e4")
    axes[1].axhline(MAX_NORM, color="black", lw=0.8, ls="--", zorder=2)
    axes[1].text(steps, MAX_NORM * 0.85, "the clip", va="top", ha="right", fontsize=9)
    axes[1].set_ylim(bottom=0.02)
    axes[1].set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("One training, four ways to take the step", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Trains the four arms, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description="The same training with and without a guard, on real digits.")
    parser.add_argument("--steps", type=int, default=1500, help="training steps per arm (default: 1500)")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of SGD with momentum 0.9 (default: 0.02)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart.png"), help="the picture (default: quickstart.png)"
    )
    parser.add_argument("--quick", action="store_true", help="200 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.steps < CHUNK:
        parser.error(f"--steps must be at least {CHUNK}")
    if not options.learning_rate > 0:
        parser.error("--learning-rate must be positive")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    steps = 200 if options.quick else options.steps
    batches, (test_inputs, test_labels), faults = make_batches(steps, options.seed)
    params, logits = make_model(options.seed)
    arms = make_arms(options.learning_rate)
    console, records, accuracy, states = Console(), {}, {}, {}
    classify = jax.jit(lambda params: jnp.argmax(logits(params, test_inputs), axis=-1))
    columns = (
        TextColumn("{task.description:36s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, arm in arms.items():
            task = progress.add_task(arm.label, total=-(-steps // CHUNK))
            last, states[name], records[name] = train(
                arm, params, logits, batches, lambda task=task: progress.advance(task)
            )
            accuracy[name] = float(np.mean(np.asarray(classify(last)) == test_labels))
    console.print(summary(arms, records, accuracy))
    console.print(
        f"Corrupted: steps {faults['NaN pixels']} hold a NaN pixel, "
        f"steps {faults['scaled by 1e4']} are scaled by 1e4.\n"
        f"`apply_if_finite(..., {NONFINITE_LIMIT})` lets in the sixth non-finite gradient in a row, by its documented "
        "behaviour: a larger limit would have outlived this shard.\n"
        "Chance is 0.1. Skipped: no parameter changed. What the guard's flight recorder shows of the worst steps:"
    )
    log, names = og.flight_log(states["guard"]), og.leaf_names(params)
    held = log[log["event"] == "nonfinite"]
    worst = log[np.argsort(np.where(np.isfinite(log["grad_norm"]), log["grad_norm"], 0))[-2:]]
    for row in np.sort(np.concatenate([held[:2], worst]), order="step"):
        console.print(
            f"  step {row['step']:4d}: gradient norm {row['grad_norm']:9.3g}, worst leaf {names[row['worst_leaf']]}, "
            f"{row['event']}",
            highlight=False,
        )
    picture(arms, records, accuracy, faults, options.out)
    console.print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()

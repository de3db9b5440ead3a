"""The same training, five ways to take the step, from five seeds.

    make demo                                     # installs what it needs, then runs this file
    python examples/quickstart.py                 # two minutes on two cores; writes quickstart.png
    python examples/quickstart.py --quick         # a short mode, to see that it runs
    python examples/quickstart.py --learning-rate 0.001 --seed 7 --out other.png

A vanilla recurrent net, trained by SGD with momentum, reads scikit-learn's handwritten digits pixel by pixel, as
sequences of 64 steps. Two things go wrong. A few batches are corrupted, as by a bad shard or a broken decoder. And the
learning rate is right, or ten times too large. A seed sets the initial parameters and the order of the batches, and is
the same for all ways. Nothing is scripted: the table and the picture show what was measured.
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
    from rich import box
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
import matplotlib.pyplot as plt

HIDDEN = 48  # enough to learn the digits, small enough for two cores
BATCH = 64
MAX_NORM = 1.0  # the usual clip; the norm of a healthy gradient here is 0.5 to 3
MOMENTUM = 0.9
MAX_CHANGE = 2e-3  # no step changes the parameters by more than two thousandths of their norm
FACTORS = (1, 10)  # of the learning rate
CHUNK = 50  # steps per jitted call: the progress display moves between calls
NONFINITE_LIMIT = 5  # after so many in a row, optax.apply_if_finite applies a non-finite gradient, as documented
SINGLE_NANS = (0.45, 0.8)  # batches with NaN pixels, as shares of the run
NAN_SHARD = 0.6  # a shard of eight of them in a row
SHARD_LENGTH = 8
SCALED = (0.38, 0.7)  # batches whose pixels were not divided by 16 but multiplied by 1e4
STEPS = 600
LIMITS = 0.2, 60  # of the picture's losses


class Arm(NamedTuple):
    """One way to train."""

    label: str
    make: Callable[[Any], optax.GradientTransformation]  # of the learning rate
    color: str  # Okabe and Ito's palette, which colour-blind people can tell apart


class Batches(NamedTuple):
    """What is read at every step: the digits, and how the batch is corrupted."""

    rows: Any  # i64[steps, seeds, BATCH]
    scale: Any  # f32[steps]: 1 or 1e4
    nan: Any  # bool[steps]: whether a pixel is NaN


class Record(NamedTuple):
    """What was measured at every step of an arm: [steps, rates, seeds]."""

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
    "bare": Arm("optax.sgd alone", sgd, "#777777"),
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
OURS = ("stabilize", "limited")


def make_batches(steps: int, seeds: range, train: np.ndarray) -> tuple[Batches, dict[str, list[int]]]:
    """The batches of all seeds, and which steps are corrupted."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    index = np.array([[rng.choice(train, BATCH, replace=False) for rng in rngs] for _ in range(steps)])
    shard = int(NAN_SHARD * steps)
    nans = [int(share * steps) for share in SINGLE_NANS] + list(range(shard, min(shard + SHARD_LENGTH, steps)))
    scaled = [int(share * steps) for share in SCALED]
    scale, nan = np.ones(steps, np.float32), np.zeros(steps, bool)
    scale[scaled], nan[nans] = 1e4, True
    return Batches(index, scale, nan), {"NaN pixels": nans, "scaled by 1e4": scaled}


def make_models(seeds: range) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Initial parameters as a plain tree, stacked over seeds, and logits(params, inputs)."""
    pairs = [nnx.split(RNN(1, HIDDEN, 10, activation=jax.nn.relu, gain=1.0, rngs=nnx.Rngs(seed))) for seed in seeds]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.to_pure_dict(params) for _, params in pairs))
    return params, lambda params, inputs: nnx.merge(pairs[0][0], nnx.State(jax.tree.map(nnx.Param, params)))(inputs)


def train(
    arm: Arm,
    params: Any,
    rates: np.ndarray,
    loss_fn: Callable[..., jax.Array],
    pixels: jax.Array,
    labels: jax.Array,
    batches: Batches,
    tick: Callable[[], None],
) -> tuple[Any, Any, Record]:
    """Trains one arm at all learning rates from all seeds at once: parameters, optimizer states and the record."""

    def step(rate: jax.Array, params: Any, state: Any, batch: Batches) -> Any:
        inputs = pixels[batch.rows] * batch.scale
        inputs = inputs.at[0, 10].set(jnp.where(batch.nan, jnp.nan, inputs[0, 10]))  # one pixel of one image
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels[batch.rows])
        new_params, state = og.apply_gradients(arm.make(rate), grads, state, params, value=loss)
        finite = jnp.all(og.gradient_statistics(new_params).finite)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), params, new_params)
        return new_params, state, (loss, finite, ~jnp.all(jnp.stack(jax.tree.leaves(same))))

    over_seeds = jax.vmap(step, in_axes=(None, 0, 0, Batches(0, None, None)))
    over_both = jax.vmap(over_seeds, in_axes=(0, 0, 0, None))

    def body(carry: Any, batch: Batches) -> Any:
        params, state, seen = over_both(jnp.asarray(rates), carry[0], carry[1], batch)
        return (params, state), seen

    run = jax.jit(lambda carry, part: jax.lax.scan(body, carry, part))
    repeated = jax.tree.map(lambda x: jnp.stack([x] * len(rates)), params)
    init = jax.vmap(lambda rate, params: jax.vmap(arm.make(rate).init)(params))
    carry: Any = repeated, init(jnp.asarray(rates), repeated)
    parts: list[Any] = []
    for start in range(0, len(batches.rows), CHUNK):
        chunk = jax.tree.map(lambda x, start=start: x[start : start + CHUNK], batches)
        if parts and not parts[-1][1][-1].any():  # all are dead: NaN stays NaN
            loss, finite, moved = parts[-1]
            parts.append((np.full_like(loss, np.nan), np.zeros_like(finite), np.zeros_like(moved)))
        else:
            carry, part = run(carry, chunk)
            parts.append(jax.device_get(part))
        tick()
    params, state = carry
    return params, state, Record(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def deaths(record: Record) -> list[list[int | None]]:
    """For each rate and seed the first step after which a parameter is not finite; None if there is none."""
    _, rates, seeds = record.finite.shape
    dead = [[np.flatnonzero(~record.finite[:, i, j]) for j in range(seeds)] for i in range(rates)]
    return [[int(steps[0]) if len(steps) else None for steps in row] for row in dead]


def outcome(record: Record, accuracy: np.ndarray) -> dict[str, Any]:
    """What the table shows of an arm, and what README claims: [rates][seeds] of each."""
    still = ~record.moved & record.finite
    return {"accuracy": np.round(accuracy, 4).tolist(), "dead": deaths(record), "still": still.sum(axis=0).tolist()}


def between(numbers: Any, form: str = "{}") -> str:
    """'3', or '3-5': the smallest and the largest number."""
    low, high = form.format(min(numbers)), form.format(max(numbers))
    return low if low == high else f"{low}-{high}"


def summary(outcomes: dict[str, Any], rates: np.ndarray) -> Table:
    """The table of outcomes, in 80 columns."""
    seeds = len(outcomes["bare"]["dead"][0])
    table = Table(
        title=f"Accuracy on held-out digits (chance is 0.1), median and range of {seeds} seeds;\n"
        "held: steps at which no parameter changed",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("way to take the step", "rate", "accuracy", "held", "NaN from"):
        table.add_column(column, justify="left" if column == "way to take the step" else "right", no_wrap=True)
    for name, arm in ARMS.items():
        for i, rate in enumerate(rates):
            accuracy, dead, still = (outcomes[name][key][i] for key in ("accuracy", "dead", "still"))
            died = [step for step in dead if step is not None]
            some = f" ({len(died)} of {seeds})" if len(died) < seeds else ""
            table.add_row(
                arm.label,
                f"{rate:g}",
                f"{np.median(accuracy):.2f} ({between(accuracy, '{:.2f}')})",
                between(still),
                f"{between(died)}{some}" if died else "never",
                end_section=i == len(rates) - 1,
            )
    return table


def smooth(loss: np.ndarray, window: int) -> np.ndarray:
    """The running median of the finite losses of one run."""
    shown = np.where(np.isfinite(loss), loss, np.nan).astype(np.float64)
    parts = (shown[max(j - window, 0) : j + 1] for j in range(len(shown)))
    return np.array([np.nanmedian(part) if np.isfinite(part).any() else np.nan for part in parts])


def apart(places: list[float], distance: float) -> list[float]:
    """The places, in ascending order, moved up until no two are closer than the distance."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + distance) if moved else place)
    return moved


def panel(axis: Any, records: dict[str, Record], outcomes: dict[str, Any], faults: Any, i: int) -> None:
    """The loss of all arms at one learning rate: a thin line for each seed, and their median."""
    steps = len(records["bare"].loss)
    for step in faults["NaN pixels"] + faults["scaled by 1e4"]:
        axis.axvline(step, color="#CC3311", lw=0.8, alpha=0.3, zorder=1)
    dying, living = [], []
    for order, (name, arm) in enumerate(ARMS.items()):
        dead = outcomes[name]["dead"][i]
        lines = np.full(records[name].loss[:, i].shape, np.nan)
        for j, died in enumerate(dead):
            end = steps if died is None else max(died, 1)
            lines[:end, j] = smooth(records[name].loss[:end, i, j], max(steps // 40, 1))
            axis.plot(lines[:, j], color=arm.color, lw=0.7, alpha=0.6, zorder=2 + order)
        last = int(np.median([steps if died is None else max(died, 1) for died in dead]))
        middle = np.nanmedian(lines[:last], axis=1)
        axis.plot(middle, color=arm.color, lw=2.6, zorder=10 + order)
        if last < steps:
            axis.plot(last - 1, middle[-1], "X", color=arm.color, ms=12, mec="white", zorder=30)
            dying.append((last, middle[-1], arm))
        else:
            accuracy = outcomes[name]["accuracy"][i]
            text = f"{arm.label}\n{np.median(accuracy):.0%} correct ({between(100 * np.array(accuracy), '{:.0f}')})"
            living.append((float(np.log10(np.clip(middle[-1], *LIMITS))), text.replace(", ", "\n", 1), arm.color))
    low, high = np.log10(LIMITS)
    for rank, (last, loss, arm) in enumerate(sorted(dying, key=lambda each: each[0])):
        height = 10 ** (high - (0.06 + 0.075 * rank) * (high - low))
        axis.plot([last - 1, last - 1], [loss * 1.15, height], color=arm.color, lw=1, zorder=20)
        axis.annotate(
            f"{arm.label}: NaN at step {last}",
            (last - 1, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=arm.color,
            fontweight="bold",
            zorder=31,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )
    living.sort()
    for place, (_, text, color) in zip(apart([each[0] for each in living], 0.2 * (high - low)), living, strict=True):
        axis.annotate(
            text,
            (steps, 10 ** min(place, high - 0.33 * (high - low))),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )
    axis.set(
        xlim=(0, steps),
        ylim=LIMITS,
        yscale="log",
        xlabel="step (red: corrupted batches; thin: one seed, thick: the median)",
    )
    axis.grid(axis="y", alpha=0.2)


def picture(records: dict[str, Record], outcomes: dict[str, Any], rates: np.ndarray, faults: Any, path: Path) -> None:
    """A panel for each learning rate."""
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(rates), figsize=(12, 5), layout="constrained", sharey=True)
        for i, (axis, rate) in enumerate(zip(axes, rates, strict=True)):
            panel(axis, records, outcomes, faults, i)
            size = "A good learning rate" if FACTORS[i] == 1 else f"{FACTORS[i]} times too large"
            axis.set_title(f"{size} ({rate:g})", loc="left", fontsize=11)
        axes[0].set_ylabel("training loss")
        seeds = len(outcomes["bare"]["dead"][0])
        figure.suptitle(
            f"A few corrupted batches: which way to take the step survives? (the same net and data, {seeds} seeds)",
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        figure.savefig(path, dpi=100)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains the five arms, prints the table, writes the picture and returns what README claims of it."""
    parser = argparse.ArgumentParser(description="The same training with and without a guard, on real digits.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps per arm (default: {STEPS})")
    parser.add_argument(
        "--learning-rate", type=float, default=0.003, help="the good one, of SGD with momentum (default: 0.003)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, trained at once (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart.png"), help="the picture (default: quickstart.png)"
    )
    parser.add_argument("--quick", action="store_true", help="150 steps from two seeds: to see that it runs")
    options = parser.parse_args(arguments)
    if options.steps < CHUNK or options.steps % CHUNK:
        parser.error(f"--steps must be at least {CHUNK}, and a multiple of it")
    if not 0 < options.learning_rate < np.inf:
        parser.error("--learning-rate must be positive and finite")
    if options.seed < 0 or options.seeds < 1:
        parser.error("--seed must be at least 0, and --seeds at least 1")
    if not options.out.parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    steps, count = (150, 2) if options.quick else (options.steps, options.seeds)
    seeds = range(options.seed, options.seed + count)
    digits: Any = load_digits()
    pixels = (digits.data / 16).astype(np.float32)[..., None]  # [1797, 64, 1], in 0 to 1
    labels = jnp.asarray(digits.target)
    order = np.random.default_rng(0).permutation(len(pixels))
    test, train_set = order[:360], order[360:]
    batches, faults = make_batches(steps, seeds, train_set)
    params, logits = make_models(seeds)
    rates = np.float32(options.learning_rate) * np.array(FACTORS, np.float32)

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels).mean()

    classify = jax.jit(jax.vmap(jax.vmap(lambda params: jnp.argmax(logits(params, pixels[test]), axis=-1))))
    console, records, outcomes, states = Console(), {}, {}, {}
    columns = (
        TextColumn("{task.description:32s}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, arm in ARMS.items():
            task = progress.add_task(arm.label, total=steps // CHUNK)
            last, states[name], records[name] = train(
                arm,
                params,
                rates,
                loss_fn,
                jnp.asarray(pixels),
                labels,
                batches,
                lambda task=task: progress.advance(task),
            )
            right = np.mean(np.asarray(classify(last)) == digits.target[test], axis=-1)
            outcomes[name] = outcome(records[name], right)
    console.print(summary(outcomes, rates))
    console.print(
        f"Corrupted batches: steps {faults['NaN pixels']} contain a NaN pixel, "
        f"steps {faults['scaled by 1e4']} are scaled by 1e4.\n"
        f"`apply_if_finite(..., {NONFINITE_LIMIT})` applies the sixth non-finite gradient in a row, as documented; "
        "with a larger limit it would have survived this shard.\n"
        f"The flight recorder of `{ARMS['limited'].label}`, rate {rates[0]:g}, seed {seeds[0]}:"
    )
    state = jax.tree.map(lambda x: x[0, 0], states["limited"])
    log, names = og.flight_log(state), og.leaf_names(jax.tree.map(lambda x: x[0], params))
    acted = log[log["event"] != "applied"]
    for row in np.concatenate([acted[acted["event"] == e][:2] for e in ("skipped", "nonfinite", "clipped")]):
        console.print(
            f"  step {row['step']:4d}: {row['event']:9s} loss {row['value']:8.3g}, gradient norm "
            f"{row['grad_norm']:8.3g}, {names[row['worst_leaf']]}",
            highlight=False,
        )
    picture(records, outcomes, rates, faults, options.out)
    console.print(f"Picture: {options.out}")
    return {"steps": steps, "seeds": count, "rates": rates.tolist(), "faults": faults, "outcomes": outcomes}


if __name__ == "__main__":
    main()

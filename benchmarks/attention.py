"""What keeps attention logits small, and what it costs: seven ways to train a transformer, two optimizers, four rates.

    python benchmarks/attention.py                  # minutes on a GPU, 3 core hours on a CPU; writes results and page
    python benchmarks/attention.py --seconds 300    # waits for no further cell after so long
    python benchmarks/attention.py --write-pages    # measures nothing: page and pictures from the results file
    python benchmarks/attention.py --quick          # tiny sizes: checks that it runs, and writes nothing
    python benchmarks/attention.py --moments        # does it matter that `qk_clip` scales no moments?

A character transformer of four layers without query-key normalisation reads Python's manual (`pydoc_data.topics`). All
seeds and learning rates of a cell, one optimizer with one way to train, run in one vectorised program. A finished cell
is written at once, and the next run with the same settings and versions continues from there, unless it is `--fresh`.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import optax_guard as og  # noqa: E402 (after the path is set)
from benchmarks.marked import put  # noqa: E402 (after the path is set)

RESULTS = HERE / "results" / "attention.json"
MOMENTS_RESULTS = HERE / "results" / "attention_moments.json"
PAGE = HERE.parent / "docs" / "attention" / "index.md"
THRESHOLD, MAX_CHANGE, LAST, POINT = 100.0, 0.01, 50, 10  # a point of a curve for so many steps
HEADS = 4


class Size(NamedTuple):
    """The sizes of the model and of the run."""

    steps: int = 1000
    warmup: int = 100
    seeds: int = 5
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    layers: int = 4
    width: int = 64
    context: int = 64
    batch: int = 16


MOMENTS = Size(steps=300, warmup=50, rates=(1e-1, 3e-1), layers=2, width=16, context=32, batch=8)  # minutes on a CPU
QUICK = Size(steps=20, warmup=5, seeds=2, rates=(1e-2, 1e-1), layers=2, width=16, context=16, batch=4)


class Arm(NamedTuple):
    """A way to train."""

    title: str
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    query_key_norm: bool = False


def qk_clip() -> optax.GradientTransformation:
    """For the stacked layers of `init_params`."""
    query, key = (og.attention.Projection(name, axis=1, split={1: (HEADS, -1)}) for name in ("query", "key"))
    layout = og.attention.AttentionLayout(query=(query,), key=(key,), stacked=1)
    return og.qk_clip(THRESHOLD, layers=layout)


ARMS = {
    "none": Arm("nothing", lambda tx: tx),
    "qk_clip": Arm("`qk_clip(100)`", lambda tx: og.guard(optax.chain(tx, qk_clip()), recorder_rows=1)),
    "limit_step": Arm("`limit_step(0.01)`", lambda tx: optax.chain(tx, og.limit_step(MAX_CHANGE))),
    "norm": Arm("query-key normalisation", lambda tx: tx, query_key_norm=True),
    "both": Arm(
        "`limit_step(0.01)` and `qk_clip(100)`",
        lambda tx: og.guard(optax.chain(tx, og.limit_step(MAX_CHANGE), qk_clip()), recorder_rows=1),
    ),
    "clip": Arm("`clip_by_global_norm(1)`", lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)),
    "stabilize": Arm("`stabilize(max_change=None)`", lambda tx: og.stabilize(tx, max_change=None, recorder_rows=1)),
}


def scaling_moments(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Scales the moments along with the query and key weights: first moments by the factor, second by its square."""

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        updates, state = optax.with_extra_args_support(tx).update(updates, state, params, **extra)
        factors = optax.tree.get(state, "qk_clip_factors")

        def along(path: Any, leaf: Any) -> Any:
            keys = jax.tree_util.keystr(path, simple=True, separator="/")
            name = "/".join(keys.split("/")[-2:])
            if name not in factors or not ({"mu", "nu"} & set(keys.split("/"))):
                return leaf
            return leaf * (factors[name] ** 2 if "nu" in keys.split("/") else factors[name])

        return updates, jax.tree_util.tree_map_with_path(along, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


MOMENTS_ARMS = {
    "qk_clip": ARMS["qk_clip"],
    "moments": Arm(
        "`qk_clip(100)`, moments scaled along",
        lambda tx: og.guard(scaling_moments(optax.chain(tx, qk_clip())), recorder_rows=1),
    ),
}


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon for the matrices of the layers and Adam for the rest, with updates as large as Adam's, as in Kimi K2."""

    def axes(params: Any) -> Any:
        matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return {name: jax.tree.map(lambda _: matrices, x) if name == "layers" else None for name, x in params.items()}

    return optax.contrib.muon(rate, consistent_rms=0.2, muon_weight_dimension_numbers=axes)


OPTIMIZERS = {"adamw": ("AdamW", lambda rate: optax.adamw(rate, weight_decay=0.0)), "muon": ("Muon", muon)}


class Text(NamedTuple):
    """Python's manual as integers."""

    train: np.ndarray
    held_out: np.ndarray
    characters: int


class Runs(NamedTuple):
    """What was measured: [rates, seeds, ...]."""

    held_out: Any  # the loss on text that was not trained on
    loss: Any  # [..., steps]
    largest: Any  # [..., steps]: the largest attention logit of all layers and heads


def read_text() -> Text:
    """The last tenth is held out."""
    characters, ids = np.unique(
        np.frombuffer("\n".join(topics.topics.values()).encode(), np.uint8), return_inverse=True
    )
    cut = len(ids) * 9 // 10
    return Text(ids[:cut].astype(np.int32), ids[cut:].astype(np.int32), len(characters))


class Seed(NamedTuple):
    """What a seed determines; for all seeds together, with a leading axis."""

    params: Any
    starts: Any  # i32[steps, batch, 1]: where the windows of each batch begin


def draw(seed: int, size: Size, text: Text) -> Seed:
    """Initial parameters, with stacked layers [layers, inputs, outputs], and batches."""
    rng, layers, width = np.random.default_rng(seed), size.layers, size.width

    def normal(std: float, *shape: int) -> np.ndarray:
        return rng.normal(0, std, shape).astype(np.float32)

    params = {
        "tokens": normal(0.02, text.characters, width),
        "positions": normal(0.02, size.context, width),
        "head": normal(width**-0.5, width, text.characters),
        "layers": {
            **{name: normal(width**-0.5, layers, width, width) for name in ("query", "key", "value")},
            "output": normal(width**-0.5 / 3, layers, width, width),
            "expand": normal(width**-0.5, layers, width, 4 * width),
            "contract": normal((4 * width) ** -0.5 / 3, layers, 4 * width, width),
        },
    }
    starts = rng.integers(len(text.train) - size.context - 1, size=(size.steps, size.batch, 1))
    return Seed(params, starts.astype(np.int32))


def rms_norm(x: jax.Array) -> jax.Array:
    """Without a scale."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def loss_fn(params: Any, tokens: jax.Array, query_key_norm: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean loss, and the largest attention logits [layers, heads]."""
    hidden = params["tokens"][tokens[:, :-1]] + params["positions"]
    length = hidden.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))

    def layer(hidden: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
        normed = rms_norm(hidden)
        query, key, value = (
            (normed @ weights[name]).reshape(*normed.shape[:2], HEADS, -1) for name in ("query", "key", "value")
        )
        if query_key_norm:
            query, key = rms_norm(query), rms_norm(key)
        logits = jnp.einsum("bthe,bshe->bhts", query, key) / query.shape[-1] ** 0.5
        logits = jnp.where(mask, logits, -jnp.inf)  # so short that they are written out anyway
        mixed = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(logits), value)
        hidden = hidden + mixed.reshape(hidden.shape) @ weights["output"]
        hidden = hidden + jax.nn.gelu(rms_norm(hidden) @ weights["expand"]) @ weights["contract"]
        return hidden, jnp.max(jax.lax.stop_gradient(logits), axis=(0, 2, 3))

    hidden, largest = jax.lax.scan(layer, hidden, params["layers"])
    losses = optax.softmax_cross_entropy_with_integer_labels(rms_norm(hidden) @ params["head"], tokens[:, 1:])
    return jnp.mean(losses), {"layers": largest}


def program(optimizer: str, arm: Arm, size: Size, text: Text) -> Callable[[], Runs]:
    """Compiles the training of all rates and seeds of a cell at once."""
    windows = np.arange(size.context + 1)
    starts = np.random.default_rng(0).integers(len(text.held_out) - size.context - 1, size=128)
    test = text.held_out[starts[:, None] + windows]

    def one(rate: jax.Array, seed: Seed, tokens: jax.Array, test: jax.Array) -> Runs:
        def schedule(step: jax.Array) -> jax.Array:
            return rate * jnp.minimum(1.0, (step + 1) / size.warmup)

        tx = arm.wrap(OPTIMIZERS[optimizer][1](schedule))

        def step(carry: Any, start: jax.Array) -> Any:
            params, state = carry
            grad_fn = jax.value_and_grad(functools.partial(loss_fn, query_key_norm=arm.query_key_norm), has_aux=True)
            (loss, max_logits), grads = grad_fn(params, tokens[start + windows])
            carry = og.apply_gradients(tx, grads, state, params, value=loss, max_logits=max_logits)
            return carry, (loss, jnp.max(max_logits["layers"]))

        (params, _), (loss, largest) = jax.lax.scan(step, (seed.params, tx.init(seed.params)), seed.starts)
        return Runs(loss_fn(params, test, arm.query_key_norm)[0], loss, largest)

    every_seed = jax.vmap(one, in_axes=(None, 0, None, None))
    seeds = jax.tree.map(lambda *x: np.stack(x), *(draw(seed, size, text) for seed in range(size.seeds)))
    arguments = np.asarray(size.rates, np.float32), seeds, text.train, test
    with jax.default_matmul_precision("float32"):  # a GPU would round its factors to 10 bits
        run = jax.jit(jax.vmap(every_seed, in_axes=(0, None, None, None))).lower(*arguments).compile()
    return lambda: jax.device_get(run(*arguments))


def summary(runs: Runs) -> dict[str, Any]:
    """What is stored of a cell: [rates][seeds], and the curve of the largest logit over seeds [rates][points]."""
    points = runs.largest.shape[-1] // POINT
    curve = runs.largest[..., : points * POINT].reshape(*runs.largest.shape[:2], points, POINT).max(-1)
    return {
        "held_out": _plain(runs.held_out),
        "train": _plain(runs.loss[..., -LAST:].mean(-1)),
        "largest_ever": _plain(runs.largest.max(-1)),
        "largest_at_end": _plain(runs.largest[..., -LAST:].max(-1)),
        "curve": {
            name: _plain(f(curve, axis=1)) for name, f in (("low", np.min), ("middle", np.median), ("high", np.max))
        },
    }


def _plain(numbers: np.ndarray) -> Any:
    """Lists of numbers with four digits; None for non-finite numbers, which JSON cannot represent."""
    if np.ndim(numbers):
        return [_plain(x) for x in numbers]
    return float(f"{float(numbers):.4g}") if np.isfinite(numbers) else None


def measure(size: Size, path: Path | None, seconds: float, fresh: bool, arms: dict[str, Arm]) -> dict[str, Any]:
    """Runs the cells that are not in the results file yet, in the order of `arms`; compiles the next ones meanwhile."""
    began, text = time.perf_counter(), read_text()
    setting = {
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "python": platform.python_version()},
        "size": {name: list(x) if isinstance(x, tuple) else x for name, x in size._asdict().items()},
        "characters": text.characters,
    }
    results: dict[str, Any] = {"setting": setting, "cells": {}}
    if not fresh and path is not None and path.exists() and (old := json.loads(path.read_text()))["setting"] == setting:
        results = old
    cells = [(f"{optimizer} {name}", optimizer, arm) for name, arm in arms.items() for optimizer in OPTIMIZERS]
    pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    todo = {
        cell: pool.submit(program, optimizer, arm, size, text)
        for cell, optimizer, arm in cells
        if cell not in results["cells"]
    }
    before = time.perf_counter()
    for cell, compiled in todo.items():
        try:
            found = summary(
                compiled.result(
                    timeout=None if seconds == np.inf else max(0.0, seconds + began - time.perf_counter())
                )()
            )
        except TimeoutError:
            print(f"{seconds:g} seconds are over before {cell}", flush=True)
            break
        found["seconds"], before = round(time.perf_counter() - before, 1), time.perf_counter()
        results["cells"][cell] = found
        print(f"{cell:18s} {found['seconds']:7.1f} s  " + "  ".join(row(found, size.rates)), flush=True)
        if path is not None:
            path.write_text(json.dumps(results) + "\n")
    pool.shutdown(wait=False, cancel_futures=True)
    return results


def numbers(values: Any) -> np.ndarray:
    """With NaN in the place of None."""
    return np.asarray(values, np.float64)


def row(cell: dict[str, Any], rates: Any) -> list[str]:
    """Held-out loss over seeds and the largest logit at the end, for each rate."""
    cells = []
    for losses, largest in zip(numbers(cell["held_out"]), numbers(cell["largest_at_end"]), strict=True):
        dead = int(np.sum(~np.isfinite(losses)))
        text = f"{losses.mean():.2f} ± {losses.std(ddof=1):.2f}" if not dead else f"NaN in {dead} of {len(losses)}"
        middle = np.median(largest)
        cells.append(f"{text}, {'-' if np.isnan(middle) else format(middle, ',.0f').replace(',', ' ')}")
    assert len(cells) == len(rates)
    return cells


def generated(results: dict[str, Any]) -> str:
    """The tables of the page."""
    said = (
        f"A cell has the held-out loss, mean ± standard deviation over seeds, and the largest logit of the last {LAST} "
        f"steps, median over seeds. Guessing is {np.log(results['setting']['characters']):.2f}; "
        "`benchmarks/results/attention.json`."
    )
    return "\n\n".join((f"{_measured(results, 'make bench-attention')} {said}", *_tables(results, ARMS)))


def generated_moments(results: dict[str, Any]) -> str:
    """The table of the moments."""
    said = "Cells as in the tables above; `benchmarks/results/attention_moments.json`."
    return "\n\n".join(
        (f"{_measured(results, 'python benchmarks/attention.py --moments')} {said}", *_tables(results, MOMENTS_ARMS))
    )


def _measured(results: dict[str, Any], command: str) -> str:
    setting, size = results["setting"], results["setting"]["size"]
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    minutes = sum(cell["seconds"] for cell in results["cells"].values()) / 60
    device = "a CPU" if setting["device"] == "cpu" else setting["device"]
    return (
        f"Measured with `{command}` on {device} ({versions}) in {minutes:.0f} minutes: {size['layers']} layers of "
        f"width {size['width']}, {HEADS} heads, {size['context']} characters of context, batch {size['batch']}, "
        f"{size['steps']} steps, of which {size['warmup']} of warm-up, {size['seeds']} seeds."
    )


def _tables(results: dict[str, Any], arms: dict[str, Arm]) -> list[str]:
    """One for each optimizer."""
    cells, rates, tables = results["cells"], results["setting"]["size"]["rates"], []
    for optimizer, (title, _) in OPTIMIZERS.items():
        head = [title, *(f"rate {rate:g}" for rate in rates)]
        rows = [
            [arm.title, *row(cells[f"{optimizer} {name}"], rates)]
            for name, arm in arms.items()
            if f"{optimizer} {name}" in cells
        ]
        tables.append("\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)))
    return tables


COLORS = {  # Okabe and Ito's palette
    "none": "#000000",
    "clip": "#E69F00",
    "stabilize": "#CC79A7",
    "norm": "#009E73",
    "qk_clip": "#0072B2",
    "limit_step": "#D55E00",
    "both": "#56B4E9",
}


def write_pictures(results: dict[str, Any], folder: Path) -> None:
    """logits.png: the largest logit against the step; rates.png: the loss against the rate."""
    import matplotlib as mpl  # not on a machine that only measures

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    size, cells = results["setting"]["size"], results["cells"]
    shown = len(size["rates"]) // 2  # of the rates, the third of four
    rate = size["rates"][shown]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for picture in ("logits", "rates"):
            figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained", sharey=True)
            for axis, (optimizer, (title, _)) in zip(axes, OPTIMIZERS.items(), strict=True):
                for name, color in COLORS.items():
                    if (cell := cells.get(f"{optimizer} {name}")) is None:
                        continue
                    style = {"color": color, "label": ARMS[name].title.replace("`", ""), "lw": 1.6}
                    if picture == "logits":
                        low, middle, high = (numbers(cell["curve"][key])[shown] for key in ("low", "middle", "high"))
                        steps = POINT * (1 + np.arange(len(middle)))
                        axis.plot(steps, middle, **style)
                        axis.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
                    else:
                        losses = numbers(cell["held_out"])
                        axis.plot(size["rates"], losses.mean(1), marker="o", ms=3, **style)
                        axis.fill_between(size["rates"], losses.min(1), losses.max(1), color=color, alpha=0.12, lw=0)
                axis.set_title(f"{title}, rate {rate:g}" if picture == "logits" else title, loc="left", fontsize=10)
                axis.set(xlabel="step" if picture == "logits" else "learning rate")
                if picture == "logits":
                    axis.set(yscale="log")
                    axis.axhline(THRESHOLD, color="#999999", lw=0.8, ls=":")
                else:
                    axis.set(xscale="log")
            axes[0].set(ylabel="largest attention logit" if picture == "logits" else "held-out loss")
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
            figure.savefig(folder / f"{picture}.png", dpi=110)
            plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description="What keeps attention logits small.")
    parser.add_argument("--seconds", type=float, default=np.inf, help="the time budget (default: none)")
    parser.add_argument("--out", type=Path, help="the results file (default: beside the others)")
    parser.add_argument("--moments", action="store_true", help="the study of moments, minutes on a CPU")
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    parser.add_argument("--write-pages", action="store_true", help="measure nothing, only write page and pictures")
    parser.add_argument("--measure-only", action="store_true", help="write only the results file")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes; writes only the results file, if --out is given"
    )
    options = parser.parse_args(arguments)
    usual, size, arms = (MOMENTS_RESULTS, MOMENTS, MOMENTS_ARMS) if options.moments else (RESULTS, Size(), ARMS)
    path, text = options.out or usual, generated_moments if options.moments else generated
    if options.quick:
        size = QUICK._replace(rates=size.rates) if options.moments else QUICK
        print(text(measure(size, options.out, options.seconds, options.fresh, arms)))
        return
    results = (
        json.loads(path.read_text())
        if options.write_pages
        else measure(size, path, options.seconds, options.fresh, arms)
    )
    if options.measure_only:
        return
    put(PAGE, "moments" if options.moments else "tables", text(results))
    if not options.moments:
        write_pictures(results, PAGE.parent)


if __name__ == "__main__":
    main()

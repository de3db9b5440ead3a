"""The pictures of StabilityBench."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.stability.cells import EVERY_CURVE
from benchmarks.stability.faults import START
from benchmarks.stability.measures import capped, fault_gaps
from benchmarks.stability.methods import METHODS
from benchmarks.stability.tasks import HELD_OUT, RATES, TASKS

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette: methods that a curve is drawn of.
SHOWN = {
    "none": ("#999999", "-"),
    "clip": ("#E69F00", "-"),
    "zclip": ("#CC79A7", "-"),
    "skipping": ("#009E73", "-"),
    "stabilize": ("#56B4E9", "-"),
    "stabilize_change": ("#0072B2", "-"),
    "stabilize_recovery": ("#000000", "--"),
}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def heat_of_tasks(columns: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Regret of the methods that have run (rows) on tasks (columns)."""
    names, tasks = [m for m in METHODS if any(m in column for column in columns.values())], list(columns)
    grid = np.array([[np.mean(columns[t][m]) if m in columns[t] else np.nan for t in tasks] for m in names])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(2.6 + 0.9 * len(tasks), 1.6 + 0.27 * len(names)), layout="constrained")
        image = axis.imshow(grid, cmap="viridis_r", vmin=0, vmax=1, aspect="auto")
        axis.set(xticks=range(len(tasks)), yticks=range(len(names)))
        axis.set_xticklabels([f"{t}{'*' if t in HELD_OUT else ''}" for t in tasks], rotation=35, ha="right")
        axis.set_yticklabels([METHODS[m].title for m in names])
        for (i, j), value in np.ndenumerate(grid):
            text = "n/a" if np.isnan(value) else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if value > 0.5 else "black")
        axis.set_title("Loss over all learning rates: 0 best, 1 nothing learnt", loc="left", fontsize=10)
        figure.colorbar(image, shrink=0.5)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def loss_by_rate(tables: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss against learning rate, a panel for each task."""
    count = max(len(tables), 1)
    rows = -(-count // 3)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 3, figsize=(11, 2.7 * rows + 0.6), layout="constrained", squeeze=False)
        for axis, (task, table) in zip(axes.flat, tables.items(), strict=False):
            for name, (color, line) in SHOWN.items():
                if name not in table:
                    continue
                losses = capped(table[name])
                axis.plot(RATES, losses.mean(1), line, color=color, lw=1.6, label=METHODS[name].title)
                axis.fill_between(RATES, losses.min(1), losses.max(1), color=color, alpha=0.12, lw=0)
            axis.set(xscale="log")
            if task in ("temporal_order", "digits_float16", "digits_bfloat16", "deep_mlp", "adding"):
                axis.set(yscale="log")
            axis.set_title(TASKS[task]().title, loc="left", fontsize=8.5)
        axes[-1][0].set(xlabel="learning rate", ylabel="held-out loss, at most as at the start")
        _save_panels(figure, axes, count, path)


def heat_of_faults(found: dict[str, dict[str, Any]], title: Callable[[str], str], path: Path) -> None:
    """Gap in the final loss: methods (rows), faults (columns), a panel for each optimizer."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, max(len(found), 1), figsize=(15, 9), layout="constrained", squeeze=False)
        for axis, (base, table) in zip(axes[0], found.items(), strict=False):
            faults = [name for name in next(iter(table.values())) if name != "clean"]
            labels = [METHODS[method].title for method in table]
            gaps = np.array([[np.mean(fault_gaps(rows[fault])) for fault in faults] for rows in table.values()])
            shown = np.log10(np.clip(gaps, 1e-3, 1e2))
            axis.imshow(shown, cmap="magma_r", vmin=-3, vmax=2.5, aspect="auto")
            for (i, j), gap in np.ndenumerate(gaps):
                text = "NaN" if np.isinf(gap) else f"{gap:.2f}" if abs(gap) < 10 else f"{gap:.0e}"
                dark = gap > 1
                axis.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
            axis.set(xticks=range(len(faults)), yticks=range(len(labels)))
            axis.set_xticklabels([title(f) for f in faults], rotation=40, ha="right", fontsize=8)
            axis.set_yticklabels(labels, fontsize=8)
            axis.set_title(
                f"What a fault costs in the final loss ({base.upper() if base == 'sgd' else 'Adam'})", loc="left"
            )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def curves_of_faults(found: dict[str, dict[str, Any]], title: Callable[[str], str], path: Path) -> None:
    """The loss around each fault, the median over seeds, for SGD; a cross where it becomes NaN for good."""
    table = found.get("sgd") or next(iter(found.values()), {})
    faults = [name for name in next(iter(table.values()), {}) if name not in ("clean", "micro_nan")]
    rows = max(-(-len(faults) // 4), 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 4, figsize=(12, 2.3 * rows + 0.5), layout="constrained", squeeze=False)
        for axis, fault in zip(axes.flat, faults, strict=False):
            for name, (color, line) in SHOWN.items():
                if name in table:
                    curve = np.array([np.nan if x is None else x for x in table[name][fault]["curve"]], np.float64)
                    steps = np.arange(len(curve)) * EVERY_CURVE
                    axis.plot(steps, curve, line, color=color, lw=1.4, label=METHODS[name].title)
                    if not np.isfinite(curve[-1]):  # the run has ended in NaN
                        last = np.flatnonzero(np.isfinite(curve))[-1]
                        axis.plot(steps[last], min(curve[last], 80), "X", color=color, ms=7, mec="white", zorder=5)
            axis.axvline(START, color="#CC3311", lw=0.8, alpha=0.5)
            axis.set(yscale="log", ylim=(0.01, 100))
            axis.set_title(title(fault), loc="left", fontsize=8.5)
        axes[-1][0].set(xlabel="step", ylabel="training loss")
        _save_panels(figure, axes, len(faults), path)


def _save_panels(figure: Any, axes: np.ndarray, used: int, path: Path) -> None:
    """Clears the panels that are left over, and puts one legend below all."""
    for axis in axes.flat[used:]:
        axis.set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)

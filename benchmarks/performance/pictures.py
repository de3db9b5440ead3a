"""The record in two pictures: ratios with their targets, and costs against the number of leaves and parameters."""

from pathlib import Path
from typing import Any

from benchmarks.performance.page import Record

__all__ = ["draw"]

_PARTS = ("guard", "recovery", "updates", "proximal", "noise", "accumulation", "traps", "training", "pytorch")
_COLOURS = {"met": "#2a9d6f", "missed": "#d1495b", "no target": "#8d99ae"}
_PANELS = {
    "compiling: ": ("leaves", "seconds to trace and compile"),
    "a step: ": ("leaves", "milliseconds per step"),
    "ns per parameter: ": ("parameters", "nanoseconds per parameter and step"),
}


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes both pictures."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    files = []
    figures = {"ratios": _ratios(record)}
    if any(row.series for row in record.rows):
        figures["growth"] = _growth(record)
    for kind, figure in figures.items():
        files.append(folder / f"{record.name}-{kind}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def _ratios(record: Record) -> Any:
    """A bar for each ratio, its quartiles as a line, its target as a tick."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in record.rows if row.part in _PARTS and row.unit == "x" and not row.series][::-1]
    figure = Figure(figsize=(11, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        kind = {None: "no target", True: "met", False: "missed"}[row.met]
        axes.barh(i, row.value - 1, left=1, color=_COLOURS[kind], height=0.7)
        axes.plot([row.low, row.high], [i, i], color="black", linewidth=1)
        if row.target is not None:
            axes.plot([row.target] * 2, [i - 0.42, i + 0.42], color="black", linewidth=2.2)
    axes.set_xscale("log")
    ticks = [x for x in (0.25, 0.5, 1, 2, 4, 8, 16) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row.what.replace("`", "") for row in rows], fontsize=7.5)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("ratio: the median of single rounds")
    legend: list[Any] = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    legend.append(
        Line2D([], [], marker="|", color="black", markersize=11, markeredgewidth=2.2, linestyle="", label="target")
    )
    legend.append(Line2D([], [], color="black", linewidth=1, label="quartiles of single rounds"))
    figure.legend(handles=legend, loc="outside upper right", ncols=5, frameon=False)
    figure.suptitle(record.title, x=0.01, ha="left", fontsize=10)
    return figure


def _growth(record: Record) -> Any:
    """A panel for compiling and for stepping against leaves, and one for the time per parameter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (start, (x_label, y_label)) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        points = [row for row in record.rows if row.series.startswith(start)]
        for name in dict.fromkeys(row.series for row in points):
            curve = sorted((row for row in points if row.series == name), key=lambda row: row.at)
            at = [row.at for row in curve]
            line = axes.plot(
                at, [row.value for row in curve], "o-", markersize=4, label=name.removeprefix(start).replace("`", "")
            )
            axes.fill_between(at, [r.low for r in curve], [r.high for r in curve], alpha=0.2, color=line[0].get_color())
        axes.set_xscale("log")
        if x_label == "leaves":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        if points:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(record.title, x=0.01, ha="left", fontsize=10)
    return figure

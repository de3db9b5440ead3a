"""The record as a picture: bytes of each step, one panel a chip."""

from pathlib import Path

from benchmarks.accelerators.bounds import BOUNDS, broken
from benchmarks.accelerators.measure import Record
from benchmarks.accelerators.page import IN_TRAINING
from benchmarks.accelerators.steps import BARE

__all__ = ["PICTURE", "draw"]

PICTURE = Path(__file__).parents[2] / "docs" / "benchmarks" / "accelerators.png"
_COLOURS = {"holds": "#2a9d6f", "misses": "#d1495b", "no bound": "#8d99ae"}


def draw(records: list[Record], file: Path = PICTURE) -> None:
    """A bar for each row, coloured by whether its bound holds, and a line for bare AdamW."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    if not records:
        return
    names = list(dict.fromkeys(name for record in records for name in record.rows if name not in IN_TRAINING))[::-1]
    figure = Figure(figsize=(4.5 + 3.5 * len(records), 1.2 + 0.23 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, record in zip(panels, records, strict=True):
        for i, name in enumerate(names):
            if name not in record.rows:
                continue
            row, bound = record.rows[name], BOUNDS[record.chip].get(name)
            kind = "no bound" if bound is None else "misses" if broken(row, bound, record.rows) else "holds"
            axes.barh(i, row.main, color=_COLOURS[kind], height=0.7)
            if row.temporaries >= 0.01:
                axes.text(row.main, i, f" +{row.temporaries:.2f}", va="center", fontsize=6.5)
        if BARE in record.rows:
            axes.axvline(record.rows[BARE].main, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), [name.replace("`", "") for name in names], fontsize=7)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_xscale("log", base=2)
        ticks = [3, 4, 5, 7, 8, 11, 16, 32, 64]
        low, high = axes.get_xlim()
        axes.set_xticks([x for x in ticks if low <= x <= high], [str(x) for x in ticks if low <= x <= high])
        axes.minorticks_off()
        axes.set_xlabel("bytes read and written in the main memory, over the parameters")
        axes.set_title(f"{record.title}, by its compiler", loc="left", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    legend = [
        Patch(color=colour, label=f"bound {kind}" if kind != "no bound" else kind) for kind, colour in _COLOURS.items()
    ]
    figure.legend(
        handles=legend,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        title="dotted: bare AdamW; +x: temporaries, over the parameters",
    )
    figure.savefig(file, dpi=110)

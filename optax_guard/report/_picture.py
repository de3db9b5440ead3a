"""The picture of a log: loss, norms, attention logits, a strip of verdicts, and leaves over time."""

import io
from typing import Any, NamedTuple

import numpy as np

from optax_guard._step.max_logits import TROUBLE
from optax_guard.report._log import TrainingLog
from optax_guard.report._logits import growth_of, usable

__all__ = ["Theme", "render"]


class Theme(NamedTuple):
    """Colours for one background. Events also differ in lightness, for readers who cannot tell the hues apart."""

    background: str
    ink: str
    faint: str
    line: str
    after: str
    events: dict[str, str]
    heat: tuple[str, str]  # below and above usual; usual is the background
    bad: str


_LIGHT = Theme(
    background="#ffffff",
    ink="#1a1d21",
    faint="#d7dbe0",
    line="#1f5fa8",
    after="#c65d00",
    events={
        "applied": "#e6ebf0",
        "clipped": "#f2a33a",
        "let_through": "#9c6bd6",
        "skipped": "#2f6fc4",
        "nonfinite": "#b3122a",
        "nonfinite_update": "#7a0f3c",
        "recovery": "#0b7a5c",
        "halted": "#30343a",
    },
    heat=("#0b4f9c", "#a3101f"),
    bad="#000000",
)
_DARK = Theme(
    background="#15181c",
    ink="#e8eaed",
    faint="#3a4047",
    line="#7db3f0",
    after="#f5a04c",
    events={
        "applied": "#262b31",
        "clipped": "#d98a1f",
        "let_through": "#b79af0",
        "skipped": "#6aa5f5",
        "nonfinite": "#ff5a6e",
        "nonfinite_update": "#ff9ad0",
        "recovery": "#4fd1a5",
        "halted": "#c9ced4",
    },
    heat=("#86bcff", "#ff8a70"),
    bad="#ffffff",
)
_WORDS = {"let_through": "let through", "nonfinite": "not finite", "nonfinite_update": "update not finite"}
_LEAF = 0.135  # inches that the name of a leaf needs beside the heat map
_TALLEST = 9.0  # inches of the heat map: room for 66 names
_LABELLED = 12  # leaves named if there is no room for all


def render(log: TrainingLog, *, dark: bool = False, narrow: bool = False) -> bytes:
    """Draws the log as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from error
    theme = _DARK if dark else _LIGHT
    leaves = log.leaves is not None and log.leaves.norms.size > 0
    logits = log.logits is not None
    heights = [2.2, 2.6, *[2.2] * logits, 0.55]
    if log.leaves is not None and leaves:
        needed = _LEAF * log.leaves.norms.shape[1]
        heights.append(3.6 if needed > _TALLEST else max(3.6, needed))
    width = 4.6 if narrow else 10.5
    # Panels are placed by hand, in inches, since a layout engine would draw everything twice.
    lines = -(-len(np.unique(log.rows["event"])) // (2 if narrow else 4))  # of the verdicts' legend
    gaps = [0.5, 0.5, *[0.5] * logits] + ([0.55 + 0.2 * lines] if leaves else [])
    bottom = 0.6 if leaves else 0.6 + 0.2 * lines
    left, right = ((1.35 if narrow else 2.5), 0.65) if leaves else (0.7, 0.2)
    height = sum(heights) + sum(gaps) + bottom + 0.35
    figure = Figure(figsize=(width, height), dpi=100, facecolor=theme.background)
    axes: list[Any] = []
    place = height - 0.35
    for size, gap in zip(heights, [*gaps, 0.0], strict=True):
        box = (left / width, (place - size) / height, (width - left - right) / width, size / height)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
        place -= size + gap
    _loss(axes[0], log, theme)
    _norms(axes[1], log, theme)
    if logits:
        _logits(axes[2], log, theme)
    _verdicts(axes[2 + logits], log, theme, narrow, below=0.08 if leaves else 0.5)
    if leaves:
        _heat_map(figure, axes[-1], log, theme, narrow)
    axes[-1].set_xlabel("step", color=theme.ink)
    axes[0].set_xlim(log.rows["step"][0] - 0.5, log.rows["step"][-1] + 0.5)
    for axis in axes:
        axis.set_facecolor(theme.background)
        axis.tick_params(colors=theme.ink, labelsize=9, labelbottom=axis is axes[-1])
        for spine in axis.spines.values():
            spine.set_color(theme.faint)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background)
    return buffer.getvalue()


def _loss(axis: Any, log: TrainingLog, theme: Theme) -> None:
    rows = log.rows
    axis.set_title("loss", loc="left", color=theme.ink, fontsize=10)
    if not rows["value_given"].any():
        axis.text(0.5, 0.5, "no loss was passed: apply_gradients(..., value=loss)", color=theme.ink, ha="center",
                  transform=axis.transAxes, fontsize=9)  # fmt: skip
        axis.set_yticks([])
        return
    finite = np.isfinite(rows["value"])
    axis.plot(rows["step"], np.where(finite, rows["value"], np.nan), color=theme.line, linewidth=1)
    values = rows["value"][finite]
    if len(values) and values.min() > 0 and values.max() / values.min() > 30:
        axis.set_yscale("log")
    bad = rows["value_given"] & ~finite
    _not_finite(axis, rows["step"][bad], theme)
    if len(values) and (log.totals["halted"] or not finite[-1]):
        axis.plot(rows["step"][finite][-1], values[-1], "X", color=theme.line, markersize=9, label="the end of the run",
                  markeredgecolor=theme.background)  # fmt: skip
    axis.grid(color=theme.faint, linewidth=0.5)
    _legend(axis, theme, "best")


def _norms(axis: Any, log: TrainingLog, theme: Theme) -> None:
    rows = log.rows
    axis.set_title("gradient norm", loc="left", color=theme.ink, fontsize=10)
    before = np.where(np.isfinite(rows["grad_norm"]) & (rows["grad_norm"] > 0), rows["grad_norm"], np.nan)
    axis.plot(rows["step"], before, color=theme.line, linewidth=1, label="before the rules")
    clipped = rows["event"] == "clipped"
    if clipped.any():
        axis.scatter(rows["step"][clipped], rows["clipped_norm"][clipped], s=9, color=theme.after, zorder=3,
                     label="let in, where a rule scaled it")  # fmt: skip
    if np.isfinite(before).any():
        axis.set_yscale("log")
    _not_finite(axis, rows["step"][~np.isfinite(rows["grad_norm"])], theme)
    axis.grid(color=theme.faint, linewidth=0.5)
    _legend(axis, theme)


def _logits(axis: Any, log: TrainingLog, theme: Theme) -> None:
    rows = log.rows
    assert log.logits is not None
    axis.set_title("largest attention logit", loc="left", color=theme.ink, fontsize=10)
    good = usable(rows)
    axis.plot(rows["step"], np.where(good, rows["max_logit"], np.nan), color=theme.line, linewidth=1)
    for number, threshold in enumerate(sorted(set(log.logits.thresholds.values()))):
        axis.axhline(threshold, color=theme.after, linewidth=1, linestyle="--",
                     label=None if number else "threshold of qk_clip")  # fmt: skip
    if good.any():
        axis.set_yscale("log")
    top = np.max(rows["max_logit"], initial=0.0, where=good)
    if top > TROUBLE[0] / 2:
        axis.axhspan(*TROUBLE, color=theme.events["nonfinite"], alpha=0.15, linewidth=0,
                     label="where trouble has begun")  # fmt: skip
    growth = growth_of(rows)
    if growth is not None:
        axis.scatter(rows["step"][growth.begin], rows["max_logit"][growth.begin], s=24, color=theme.after, zorder=3,
                     label="began to grow")  # fmt: skip
    _not_finite(axis, rows["step"][(rows["logit_head"] >= 0) & ~np.isfinite(rows["max_logit"])], theme)
    axis.grid(color=theme.faint, linewidth=0.5)
    _legend(axis, theme)


def _verdicts(axis: Any, log: TrainingLog, theme: Theme, narrow: bool, below: float) -> None:
    """The strip, with its legend `below` inches under it, where the steps and their label may stand."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(theme.events)
    rows = log.rows
    codes = np.array([names.index(str(event)) for event in rows["event"]])
    steps = np.arange(rows["step"][0], rows["step"][-1] + 1)
    strip = np.full(len(steps), np.nan)
    strip[rows["step"] - rows["step"][0]] = codes
    # Each event is at least two thousandths of the width wide, so that a rare one does not vanish between pixels.
    wide = max(len(steps) // 500, 1)
    spread = strip.copy()
    for code in (c for c in range(1, len(names)) if (codes == c).any()):
        for place in np.flatnonzero(strip == code):
            spread[max(place - wide // 2, 0) : place + (wide + 1) // 2] = code
    axis.set_title("verdicts", loc="left", color=theme.ink, fontsize=10)
    axis.imshow(spread[None, :], aspect="auto", interpolation="nearest", vmin=0, vmax=len(names) - 1,
                cmap=ListedColormap(list(theme.events.values())),
                extent=(steps[0] - 0.5, steps[-1] + 0.5, 0, 1))  # fmt: skip
    axis.set_yticks([])
    seen = [name for i, name in enumerate(names) if (codes == i).any()]
    counts = {name: int((rows["event"] == name).sum()) for name in seen}
    handles = [
        Patch(facecolor=theme.events[name], edgecolor=theme.faint, label=f"{_WORDS.get(name, name)} ({counts[name]})")
        for name in seen
    ]
    place = axis.get_position()
    down = below / (place.height * axis.figure.get_figheight())
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -down), ncols=2 if narrow else 4, fontsize=8,
                frameon=False, borderaxespad=0, labelcolor=theme.ink)  # fmt: skip


def _heat_map(figure: Any, axis: Any, log: TrainingLog, theme: Theme, narrow: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    assert log.leaves is not None
    norms = log.leaves.norms.T.astype(np.float64)
    positive = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)
    live = np.isfinite(positive).sum(axis=1) > 0
    middle = np.full((len(norms), 1), np.nan)
    middle[live] = np.nanmedian(positive[live], axis=1, keepdims=True)
    ratio = np.log10(positive / middle)
    bad = ~np.isfinite(norms)
    steps = log.leaves.steps
    axis.set_title("each leaf's norm, relative to its own median", loc="left", color=theme.ink, fontsize=10)
    # Few colours, so that noise around the usual norm stays white and the file stays small.
    low, high = theme.heat
    colours = LinearSegmentedColormap.from_list("usual", [low, theme.background, high], N=17)
    colours = colours.with_extremes(bad=theme.background)
    binned, width = _binned(ratio, 260 if narrow else 730)
    end = steps[0] + width * binned.shape[1] - 0.5
    image = axis.imshow(binned, aspect="auto", interpolation="nearest", cmap=colours, vmin=-2, vmax=2,
                        extent=(steps[0] - 0.5, end, len(norms) - 0.5, -0.5))  # fmt: skip
    places = np.argwhere(bad)
    if len(places):
        axis.scatter(steps[places[:, 1]], places[:, 0], s=6, marker="s", color=theme.bad, linewidths=0)
    worst = np.where(bad.any(axis=1), np.inf, np.nanmax(np.where(live[:, None], np.abs(ratio), 0), axis=1))
    ticks = np.arange(len(norms))
    if _LEAF * len(norms) > _TALLEST:
        order = np.argsort(-worst, kind="stable")
        ticks = _spaced(order[worst[order] > 1] if (worst > 1).any() else order, len(norms))
    limit = 18 if narrow else 34
    labels = [name if len(name) <= limit else "…" + name[-limit + 1 :] for name in log.leaves.names]
    axis.set_yticks(ticks, [labels[i] for i in ticks], fontsize=7)
    place = axis.get_position()
    bar = figure.colorbar(
        image, cax=figure.add_axes((place.x1 + 0.01, place.y0, 0.012, place.height)), ticks=[-2, -1, 0, 1, 2]
    )
    bar.ax.set_yticklabels(["/100", "/10", "1", "x10", "x100"], color=theme.ink, fontsize=8)
    bar.outline.set_edgecolor(theme.faint)


def _binned(ratio: np.ndarray, columns: int) -> tuple[np.ndarray, int]:
    """Reduces `ratio` to at most `columns` columns, each the most unusual of its `width` steps."""
    width = max(-(-ratio.shape[1] // columns), 1)
    padded = np.pad(ratio, ((0, 0), (0, -ratio.shape[1] % width)), constant_values=np.nan)
    bins = padded.reshape(len(ratio), -1, width)
    most = np.argmax(np.nan_to_num(np.abs(bins), nan=-1.0), axis=2, keepdims=True)
    return np.take_along_axis(bins, most, axis=2)[:, :, 0], width


def _spaced(order: np.ndarray, total: int) -> np.ndarray:
    """The first entries of `order` that are far enough apart for a line of text each."""
    chosen: list[int] = []
    for place in order:
        if all(abs(place - other) >= total / 26 for other in chosen):
            chosen.append(int(place))
        if len(chosen) == _LABELLED:
            break
    return np.array(sorted(chosen))


def _not_finite(axis: Any, steps: np.ndarray, theme: Theme) -> None:
    """Triangles at the upper edge, where there is no number to draw."""
    if len(steps):
        axis.scatter(steps, np.ones(len(steps)), s=24, marker="v", color=theme.events["nonfinite"], clip_on=False,
                     zorder=4, transform=axis.get_xaxis_transform(), label="NaN or Inf")  # fmt: skip


def _legend(axis: Any, theme: Theme, place: str = "upper left") -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=place, fontsize=8, labelcolor=theme.ink, facecolor=theme.background, edgecolor=theme.faint)

"""Figures of the reports, in Okabe and Ito's colours, which colour-blind readers can tell apart."""

from typing import Any

import numpy as np

from optax_guard._host.terminal import needed, shown
from optax_guard._step.max_logits import TROUBLE

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "RED", "plot_preflight", "plot_sweep"]

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#888888"


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise needed("plot", "matplotlib") from error
    # Without pyplot there is no window and no global backend.
    return Figure(figsize=(width, height), layout="constrained")


def plot_preflight(report: Any, path: Any) -> Any:
    """Norms per leaf, growth, stable learning rates, the gradient's elements by size, and attention logits if known."""
    most = 24
    leaves = sorted(report.leaves, key=lambda leaf: -np.nan_to_num(leaf.gradient_norm, nan=np.inf))[:most]
    logits = bool(report.logits)
    figure = _figure(12, max(7, 0.2 * len(leaves) + 4) + 3.5 * logits)
    grid = figure.add_gridspec(2 + logits, 2)
    _leaf_panel(figure.add_subplot(grid[0, 0]), leaves, len(report.leaves))
    _growth_panel(figure.add_subplot(grid[0, 1]), report)
    _rate_panel(figure.add_subplot(grid[1, 0]), report)
    _exponent_panel(figure.add_subplot(grid[1, 1]), report)
    if logits:
        _logit_panel(figure.add_subplot(grid[2, :]), report.logits)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _leaf_panel(axis: Any, leaves: Any, total: int) -> None:
    rows = np.arange(len(leaves))
    for field, color, label in (("parameter_norm", GREY, "|w|"), ("gradient_norm", BLUE, "|g|")):
        values = np.array([getattr(leaf, field) for leaf in leaves])
        seen = np.isfinite(values) & (values > 0)
        axis.plot(values[seen], rows[seen], "o", color=color, label=label)
    bad = [i for i, leaf in enumerate(leaves) if not np.isfinite(leaf.gradient_norm)]
    if bad:
        axis.plot(np.ones(len(bad)), bad, "x", color=RED, label="not finite")
    axis.set_yticks(rows, [shown(leaf.name, 32) for leaf in leaves], fontsize=8)
    axis.set(xscale="log", title=f"Norms per leaf ({len(leaves)} of {total}, largest gradients first)")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.legend()


def _growth_panel(axis: Any, report: Any) -> None:
    colors = [BLUE, ORANGE, GREEN, RED, GREY]
    for each, color in zip(report.growth, colors, strict=False):
        place = np.linspace(0, 1, len(each.norms))
        label = f"{shown(each.name, 28)}: x{np.exp(each.exponent):.3g} per step"
        axis.plot(
            place, np.where(np.array(each.norms) > 0, each.norms, np.nan), "o-", color=color, label=label, markersize=4
        )
    axis.set(yscale="log", title="Growth: norm of gradients (activations: rms)", xlabel="first to last layer or step")
    axis.set_xticks([0, 1], ["first", "last"])
    if report.growth:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "no numbered layers", transform=axis.transAxes, ha="center", color=GREY)
    axis.grid(alpha=0.3)


def _rate_panel(axis: Any, report: Any) -> None:
    axis.set(xscale="log", title="Learning rates: stable up to here", yticks=[])
    rates = report.stable_learning_rates
    pairs = [] if rates is None else [("SGD", rates.sgd), ("SGD, momentum", rates.momentum)]
    if rates is not None and rates.optimizer is not None:
        pairs.append(("this optimizer", rates.optimizer))
    pairs = [(label, rate) for label, rate in pairs if np.isfinite(rate)]
    for row, (label, rate) in enumerate(pairs):
        axis.plot([rate / 1000, rate], [row, row], color=GREEN, linewidth=8, solid_capstyle="butt")
        axis.plot([rate, rate * 10], [row, row], color=RED, linewidth=8, solid_capstyle="butt", alpha=0.6)
        axis.text(rate, row + 0.2, f"{label}: {rate:.3g}", ha="center")
    axis.set_ylim(-0.6, max(len(pairs), 1) - 0.2)
    if not pairs:
        axis.text(0.5, 0.5, "no positive curvature known", transform=axis.transAxes, ha="center", color=GREY)
    axis.grid(axis="x", alpha=0.3)


def _exponent_panel(axis: Any, report: Any) -> None:
    exponents, counts = (
        (np.array(column) for column in zip(*report.gradient_exponents, strict=True))
        if (report.gradient_exponents)
        else (np.zeros(0), np.zeros(0))
    )
    axis.bar(exponents, counts, width=1, align="edge", color=BLUE)
    axis.axvspan(-14, 16, color=GREEN, alpha=0.12, label="float16, normal")
    axis.axvspan(-24, -14, color=ORANGE, alpha=0.2, label="float16, subnormal")
    axis.set(yscale="log", title="Elements of the gradient by size", xlabel="log2 |g|", ylabel="elements")
    axis.set_xlim(min(-40, *exponents, 0) if len(exponents) else -40, max(20, *exponents, 0) if len(exponents) else 20)
    axis.legend(fontsize=8)


def _logit_panel(axis: Any, layers: Any) -> None:
    """The heads of every layer, against the range in which trouble begins."""
    maxima = [np.array(layer.maxima) for layer in layers]
    for place, heads in enumerate(maxima):
        seen = np.isfinite(heads) & (heads > 0)
        axis.plot(np.full(seen.sum(), place), heads[seen], "o", color=BLUE, alpha=0.7)
        if not np.isfinite(heads).all():
            axis.plot(place, TROUBLE[1], "x", color=RED)
    _trouble(axis)
    axis.set(yscale="log", title="Largest attention logit of every head", ylabel="logit")
    axis.set_xticks(range(len(layers)), [shown(layer.layer, 24) for layer in layers], fontsize=8,
                    rotation=0 if len(layers) <= 6 else 45)  # fmt: skip
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper left")


def _trouble(axis: Any) -> None:
    axis.axhspan(*TROUBLE, color=RED, alpha=0.15, lw=0, label="trouble has begun here")


def plot_sweep(sweep: Any, path: Any) -> Any:
    """Final loss against learning rate, and the loss of every run against the step."""
    logits = sweep.max_logits is not None
    figure = _figure(12 + 5 * logits, 4.5)
    left, right, *more = figure.subplots(1, 2 + logits)
    ceiling = 2 * max(sweep.initial_loss, float(np.max(sweep.final_losses[sweep.survived], initial=0)), 1e-12)
    shown_loss = np.where(np.isfinite(sweep.final_losses), np.minimum(sweep.final_losses, ceiling), ceiling)
    left.plot(sweep.learning_rates, shown_loss, color=GREY, zorder=1)
    for mask, color, marker, label in ((sweep.survived, BLUE, "o", "survived"), (~sweep.survived, RED, "x", "did not")):
        if mask.any():
            left.scatter(
                sweep.learning_rates[mask], shown_loss[mask], color=color, marker=marker, label=label, zorder=2
            )
    left.axhline(sweep.initial_loss, color=GREY, linestyle="--", label="initial loss")
    positive = np.min(shown_loss) > 0
    scale = "log" if positive else "linear"
    left.set(xscale="log", yscale=scale, xlabel="learning rate", ylabel="final loss (cut at twice the initial)")
    left.set_title(f"LR sensitivity {sweep.sensitivity:.3g}")
    left.legend()
    places = np.linspace(0, 1, len(sweep.learning_rates))
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise needed("plot", "matplotlib") from error
    for run, (rate, losses, place) in enumerate(zip(sweep.learning_rates, sweep.losses, places, strict=True)):
        cut = np.where(np.isfinite(losses), np.minimum(losses, ceiling), np.nan)
        color = colormaps["viridis"](0.9 * place)
        right.plot(cut, color=color, label=f"{rate:.2g}")
        alive = np.flatnonzero(np.isfinite(losses))
        if len(alive) and alive[-1] < len(losses) - 1:
            right.plot(alive[-1], cut[alive[-1]], "X", color=color, markersize=8, markeredgecolor="white", zorder=3)
        for axis in more:
            axis.plot(np.where(sweep.max_logits[run] > 0, sweep.max_logits[run], np.nan), color=color)
    right.set(yscale=scale, xlabel="step", ylabel="loss", title="Runs, by learning rate")
    for axis in more:
        axis.set(yscale="log", xlabel="step", ylabel="logit", title="Largest attention logit, by learning rate")
        if np.nanmax(sweep.max_logits, initial=0) > TROUBLE[0] / 2:
            _trouble(axis)
    if len(sweep.learning_rates) <= 16:
        right.legend(fontsize=7, ncols=2)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure

"""The reports of `preflight`: named tuples that print, plot and convert."""

from typing import Any, NamedTuple

import numpy as np

from optax_guard._host.logits import LayerLogits, logit_table
from optax_guard._host.terminal import number, plain, shown, text_table

__all__ = ["ActivationReport", "Growth", "Headroom", "LeafReport", "PreflightReport", "StableLearningRates", "slope"]


class LeafReport(NamedTuple):
    """One floating-point leaf of the parameters."""

    name: str  # its path, as in `leaf_names`
    shape: tuple[int, ...]
    parameter_norm: float
    gradient_norm: float
    largest_gradient: float  # largest absolute element
    zero_share: float  # share of the gradient's elements that are exactly 0


class Growth(NamedTuple):
    """How a norm changes along a stack of layers, or along time.

    `exponent` is the least-squares slope of log(norm) per layer or step, in the direction in which the signal
    travels: gradients from the last layer (or time step) to the first, activations from the first to the last.
    """

    name: str  # the path with '*' for the layer's number; 'time'; 'activations'; 'gradients of activations'
    positions: tuple[str, ...]  # numbers of layers or steps, or names of activations, in the order of the model
    norms: tuple[float, ...]
    exponent: float  # exp(exponent) is the factor per layer; NaN if fewer than two norms are finite and positive


class ActivationReport(NamedTuple):
    """One activation; its units are its last axis."""

    name: str
    root_mean_square: float
    largest: float
    gradient_norm: float  # of the loss with respect to this activation
    dead_share: float  # share of units with the same value for every example and position
    saturated_share: float | None  # share of elements within 1 % of a bound (1, -1 or 0); None if it does not saturate


class StableLearningRates(NamedTuple):
    """The largest learning rates at which the quadratic model of the loss does not blow up."""

    sgd: float  # 2 / sharpness
    momentum: float  # 2 (1 + momentum) / sharpness
    optimizer: float | None  # for the given optimizer; None if none was given or its limit is not known


class Headroom(NamedTuple):
    """How much of a 16-bit dtype's range is left. A bit is a factor of two; negative bits mean overflow."""

    dtype: str
    loss: float | None  # the loss with parameters and batch cast to the dtype; None if the model cannot be run in it
    loss_bits: float
    gradient_bits: float  # from the largest element of the gradient to the largest number of the dtype
    underflow_share: float  # share of the gradient's nonzero elements that round to 0
    subnormal_share: float  # share of the gradient's nonzero elements below the smallest normal number
    loss_scale: float  # power of two that puts the largest element 2^4 below the dtype's limit


class PreflightReport(NamedTuple):
    """The result of `preflight`, for `print(report)`, `report.plot()` and `report.to_dict()`."""

    loss: float
    examples: int
    parameters: int
    gradient_norm: float
    gradient_noise_scale: float | None  # tr(covariance of one example's gradient) / |mean gradient|^2, in examples
    clip_threshold: float
    eigenvalues: tuple[float, ...] | None  # of the Hessian, descending
    preconditioned_eigenvalues: tuple[float, ...] | None  # of P^-1/2 H P^-1/2, where P is the optimizer's divisor
    stable_learning_rates: StableLearningRates | None
    growth: tuple[Growth, ...]
    activations: tuple[ActivationReport, ...]
    headroom: tuple[Headroom, ...]
    leaves: tuple[LeafReport, ...]
    gradient_exponents: tuple[tuple[int, int], ...]  # (e, number of gradient elements with 2^e <= |g| < 2^(e + 1))
    logits: tuple[LayerLogits, ...]  # of attention; empty unless the loss returns its largest logits
    findings: tuple[str, ...]  # what deserves a look, in words

    def __str__(self) -> str:
        """The report as tables and sentences in plain text."""
        return "\n\n".join(part for part in _parts(self) if part)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values that `json.dumps` accepts (NaN and Inf stay floats)."""
        return plain(self)

    def plot(self, path: Any = None) -> Any:
        """A matplotlib figure with four panels, or five, written to `path` if one is given. See `plot`."""
        from optax_guard.preflight._plots import plot_preflight

        return plot_preflight(self, path)


def slope(norms: Any) -> float:
    """The least-squares slope of log(norm) against position, over the positions with a finite positive norm."""
    values = np.asarray(norms, np.float64)
    where = np.flatnonzero(np.isfinite(values) & (values > 0))
    if where.size < 2:
        return float("nan")
    return float(np.polyfit(where, np.log(values[where]), 1)[0])


def _parts(report: PreflightReport) -> list[str]:
    rows = [
        ("loss", number(report.loss, 5)),
        ("gradient norm", number(report.gradient_norm)),
        ("suggested clip threshold", number(report.clip_threshold)),
        ("gradient noise scale (examples)", number(report.gradient_noise_scale)),
        ("sharpness", number(report.eigenvalues[0] if report.eigenvalues else None)),
    ]
    if report.preconditioned_eigenvalues:
        rows.append(("preconditioned sharpness", number(report.preconditioned_eigenvalues[0])))
    if report.stable_learning_rates:
        rates = report.stable_learning_rates
        rows += [
            ("largest stable learning rate, SGD", number(rates.sgd)),
            ("largest stable learning rate, SGD with momentum", number(rates.momentum)),
        ]
        if rates.optimizer is not None:
            rows.append(("largest stable learning rate, this optimizer", number(rates.optimizer)))
    head = f"preflight: {report.parameters:,} parameters, {report.examples} examples"
    return [
        head,
        text_table(("quantity", "value"), rows),
        _growth_table(report.growth),
        _activation_table(report.activations),
        _headroom_table(report.headroom),
        _leaf_table(report.leaves),
        logit_table(report.logits),
        "\n".join(f"- {finding}" for finding in report.findings),
    ]


def _growth_table(growth: tuple[Growth, ...]) -> str:
    if not growth:
        return ""
    columns = ("growth along", "from", "to", "first norm", "last norm", "exponent", "factor")
    rows = []
    for each in growth:
        ends = (each.positions[0], each.positions[-1], each.norms[0], each.norms[-1])
        if each.name != "activations":  # gradients travel from the last to the first
            ends = (ends[1], ends[0], ends[3], ends[2])
        start, stop, first, last = ends
        rows.append(
            (
                shown(each.name, 32),
                start,
                stop,
                number(first),
                number(last),
                f"{each.exponent:+.3f}",
                f"x{np.exp(each.exponent):.3g}",
            )
        )
    return text_table(columns, rows)


def _activation_table(activations: tuple[ActivationReport, ...]) -> str:
    if not activations:
        return ""
    rows = [
        (
            shown(a.name, 32),
            number(a.root_mean_square),
            number(a.largest),
            number(a.gradient_norm),
            f"{a.dead_share:.1%}",
            "-" if a.saturated_share is None else f"{a.saturated_share:.1%}",
        )
        for a in activations
    ]
    return text_table(("activation", "rms", "largest", "|gradient|", "dead units", "saturated"), rows)


def _headroom_table(headroom: tuple[Headroom, ...]) -> str:
    rows = [
        (
            h.dtype,
            number(h.loss, 4),
            f"{h.loss_bits:.0f}",
            f"{h.gradient_bits:.0f}",
            f"{h.underflow_share:.2%}",
            f"{h.subnormal_share:.2%}",
            f"2^{np.log2(h.loss_scale):.0f}",
        )
        for h in headroom
    ]
    columns = ("dtype", "loss in it", "loss bits left", "gradient bits left", "underflow", "subnormal", "loss scale")
    return text_table(columns, rows) if rows else ""


def _leaf_table(leaves: tuple[LeafReport, ...], most: int = 16) -> str:
    ordered = sorted(leaves, key=lambda leaf: -np.nan_to_num(leaf.gradient_norm, nan=np.inf))[:most]
    rows = [
        (
            shown(leaf.name),
            "x".join(map(str, leaf.shape)) or "()",
            number(leaf.parameter_norm),
            number(leaf.gradient_norm),
            number(leaf.largest_gradient),
            f"{leaf.zero_share:.0%}",
        )
        for leaf in ordered
    ]
    table = text_table(("leaf", "shape", "|w|", "|g|", "max |g|", "zeros"), rows)
    rest = len(leaves) - len(ordered)
    return table + (f"\n({rest} more leaves with smaller gradients: see `report.leaves`)" if rest else "")

"""The tables of docs/benchmarks/large.md, from the results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.marked import put
from benchmarks.stability.large.first_steps import FILE as FIRST_STEPS
from benchmarks.stability.large.studies import COMPARED, CUSTOMARY, LARGE, NETS
from benchmarks.stability.measures import best_loss, equal_best, interval, regret, sensitivity
from benchmarks.stability.page import cell_text, markdown

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "large.md"
ALLOWED = 0.02  # of the bare loss
BOUNDS = {"neutral": "the bound of `stabilize`", "hard": "`max_change=0.01`"}
Cells = dict[str, Any]


def numbers(rows: Any) -> np.ndarray:
    """Lists of numbers as an array; what was not finite is Inf."""
    return np.array([[np.inf if x is None else x for x in row] for row in rows], np.float64)


def runs_of(cell: Any, bound: int = 0) -> dict[str, Any]:
    """A cell's runs under one bound, as the measures of StabilityBench take them: [rates][seeds]."""
    return {key: cell[key][bound] for key in ("initial", "final", "finite", "spikes_loss", "spikes_norm")}


def compared_tables(apart: list[Cells], net: str) -> list[str]:
    """A table for each platform, since text and random numbers depend on its versions; one that is complete, alone."""
    tables = []
    for cells in apart:
        found = {m: cells[f"{net} {m}"] for m in COMPARED if f"{net} {m}" in cells}
        if found:
            versions = sorted({f"{c['device']}, Python {c['versions']['python']}" for c in found.values()})
            tables.append((len(found), f"On {' and '.join(versions)}:\n\n{compared_table(found, net)}"))
    whole = [text for count, text in tables if count == len(COMPARED)]
    return whole or [text for _, text in sorted(tables, reverse=True)] or ["Not run yet."]


def compared_table(cells: Cells, net: str) -> str:
    """Methods by learning rates: held-out loss, and, where all rates have run, what it comes to."""
    rates, finals = LARGE[net].rates, {}
    for m, cell in cells.items():
        final = np.minimum(numbers(cell["final"][0]), numbers(cell["initial"][0]))
        finals[m] = dict(zip(cell["rates"], final, strict=True))
    found = {m: runs_of(cell) for m, cell in cells.items() if len(cell["rates"]) == len(rates)}
    best = min(float(np.mean(best_loss(runs))) for runs in found.values())
    regrets = {m: regret(runs, best) for m, runs in found.items()}
    columns = [{m: final[rate] for m, final in finals.items() if rate in final} for rate in rates]
    bold = [equal_best(column) for column in [*columns, regrets]]
    rows = []
    for m in finals:
        losses = [cell_text(c[m], m in own, 3) if m in c else "" for c, own in zip(columns, bold, strict=False)]
        measures = [""] * 4
        if m in found:
            spikes = [f"{100 * np.mean(numbers(found[m][key])):.2f}" for key in ("spikes_loss", "spikes_norm")]
            measures = [cell_text(regrets[m], m in bold[-1]), f"{np.mean(sensitivity(found[m])):.3f}", *spikes]
        rows.append([f"`{COMPARED[m][0]}`", *losses, *measures])
    header = ["method", *(f"{r:g}" for r in rates)]
    return markdown([*header, "regret", "LR sensitivity", "spikes, loss %", "norm %"], rows)


def neutrality(cell: Any) -> tuple[float, np.ndarray, float, float]:
    """(rate, relative differences of the seeds, their mean, the upper end of its 95 % interval), by the rule."""
    without, bounded = numbers(cell["final"][0]), numbers(cell["final"][1])
    at = int(np.argmin(without.mean(1)))
    bare = abs(without[at].mean())
    differences = (bounded[at] - without[at]) / bare
    middle, half = interval(differences)
    return cell["rates"][at], differences, middle, middle + half


def neutral_text(cell: Any) -> str:
    """One cell of the table."""
    rate, _, middle, upper = neutrality(cell)
    if not np.isfinite(middle):
        return f"NaN at {rate:g}"
    text = f"{100 * middle:+.1f} ({100 * upper:+.1f}) at {rate:g}"
    return text if upper <= ALLOWED else f"**{text}**"


def of_study(cells: Cells, study: str) -> Cells:
    """The cells of one study by "net optimizer", in the order of the table."""
    order = [f"{net} {o}" for net in NETS for o in CUSTOMARY]
    return {name: cells[f"{study}:{name}"] for name in order if f"{study}:{name}" in cells}


def neutral_table(cells: Cells) -> str:
    """Nets by optimizers."""
    rows = []
    for net in NETS:
        known = [cells.get(f"{net} {o}") for o in CUSTOMARY]
        if any(known):
            rows.append([net, *(neutral_text(cell) if cell else "" for cell in known)])
    if not rows:
        return "Not run yet."
    return markdown(["net", *(customary.title for customary in CUSTOMARY.values())], rows)


def verdict(cells: Cells) -> str:
    """What the rule says."""
    found = {name: neutrality(cell) for name, cell in cells.items()}
    if not found:
        return ""
    same = [name for name, (_, d, _, _) in found.items() if not np.any(d)]
    broken = [name for name, (_, _, _, upper) in found.items() if not upper <= ALLOWED]
    clear = [name for name, (_, d, _, _) in found.items() if np.mean(d) > 0 and significant(d)]
    return (
        f"Of {len(found)} pairs of a net and an optimizer (of {len(NETS) * len(CUSTOMARY)}), {len(found) - len(broken)}"
        f" are within {ALLOWED:.0%} by the rule ({len(same)} without any difference), and {len(broken)} are not"
        f"{': ' + ', '.join(broken) if broken else ''}. In {len(clear)} the bound is worse with the whole 95 % interval"
        f" above zero{': ' + ', '.join(clear) if clear else ''}."
    )


def significant(differences: np.ndarray) -> bool:
    """Whether the 95 % interval of the mean leaves out zero."""
    if not np.isfinite(differences).all() or not np.any(differences):
        return False
    return bool(scipy.stats.ttest_1samp(differences, 0.0).pvalue < 0.05)


def other_rates(cells: Cells) -> str:
    """The bound's difference at all three rates, for reading."""
    rows = []
    for name, cell in cells.items():
        without, bounded = numbers(cell["final"][0]), numbers(cell["final"][1])
        text = [f"{np.mean(a):.4g}, {np.mean(b):.4g}" for a, b in zip(without, bounded, strict=True)]
        rates = ", ".join(f"{rate:g}" for rate in cell["rates"])
        rows.append([name, rates, *text])
    if not rows:
        return "Not run yet."
    return markdown(["net, optimizer", "rates", "lowest rate: without, with", "middle", "highest"], rows)


def first_steps_table() -> str:
    """Of the jobs of which only the first steps have run: in how many the bound acted."""
    counted = json.loads(FIRST_STEPS.read_text()) if FIRST_STEPS.exists() else {}
    if not counted:
        return "Not run."
    rows = []
    for name, cell in counted.items():
        acts = [", ".join(map(str, seeds)) for seeds in cell["acted"]]
        rows.append([name, f"{cell['steps']} of {cell['of']}", ", ".join(f"{r:g}" for r in cell["rates"]), *acts])
    return markdown(["net, optimizer", "steps", "rates", "lowest rate: each seed", "middle", "highest"], rows)


def generated(apart: list[Cells]) -> str:
    """All tables of the page, from the cells of each platform; where two have the same job, from the last."""
    cells = {name: cell for own in apart for name, cell in own.items()}
    devices = sorted({cell["device"] for cell in cells.values()})
    hours = sum(cell["seconds"] for cell in cells.values()) / 3600
    measured = f"Measured on {', '.join(devices)}, {hours:.2f} hours of jobs in all." if cells else "Not run yet."
    parts = [measured]
    for net, large in LARGE.items():
        parts += [f"### {large.title}", *compared_tables(apart, net)]
    for study, title in BOUNDS.items():
        own = of_study(cells, study)
        parts += [f"### Neutrality of {title}: difference in percent of the loss without it", verdict(own)]
        parts += [neutral_table(own)]
        if study == "neutral":
            parts += ["### Jobs of which only the first steps have run: steps in which the bound acted"]
            parts += [first_steps_table()]
        parts += [f"### Mean losses at all three rates, without and with {title}", other_rates(own)]
    return "\n\n".join(part for part in parts if part)


def write_page(apart: list[Cells]) -> None:
    """Puts the tables between the marks of the page; the text around them is written by hand."""
    put(PAGE, "tables", generated(apart))

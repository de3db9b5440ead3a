"""The tables, pictures and docs page of StabilityBench, from its results file."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.marked import put
from benchmarks.stability import pictures
from benchmarks.stability.costs import FILE as COSTS
from benchmarks.stability.faults import BASES, FAULTS, MICRO_FAULTS
from benchmarks.stability.measures import (
    alive,
    best_loss,
    capped,
    equal_best,
    fault_gaps,
    interval,
    regret,
    sensitivity,
)
from benchmarks.stability.methods import METHODS
from benchmarks.stability.tasks import HELD_OUT, TASKS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "benchmarks"
PAGE = DOCS / "stability_bench.md"
RULES_PAGE = ROOT / "docs" / "rules" / "which_rule.md"
SURVIVED = 0.05  # the largest gap in the final loss that a fault may leave behind
UNTRAINED = 3.0  # the loss of the digits net before training, and a little more
Results = dict[str, Any]


def results_file() -> Path:
    """The results file for this platform."""
    return ROOT / "benchmarks" / "results" / f"stability-{jax.devices()[0].platform}-jax{jax.__version__}.json"


def read() -> Results:
    """The newest results there are."""
    return json.loads(max(results_file().parent.glob("stability-*.json")).read_text())


def runs_of(results: Results, task: str, setting: str) -> dict[str, Any]:
    """Method -> its runs on a task."""
    found = {name: results["cells"].get(f"{task} {name}") for name in METHODS}
    return {name: cell[setting] for name, cell in found.items() if cell}


def faults_of(results: Results, base: str) -> dict[str, Any]:
    """Method -> fault -> its results."""
    found = {name: results["cells"].get(f"faults:{base} {name}") for name in METHODS}
    return {name: cell["faults"] for name, cell in found.items() if cell}


def regrets(results: Results, task: str, setting: str) -> dict[str, np.ndarray]:
    """Method -> regret of every seed, against the best loss of any method on the task."""
    best = lowest_loss(results, task)
    return {name: regret(runs, best) for name, runs in runs_of(results, task, setting).items()}


def lowest_loss(results: Results, task: str) -> float:
    """The best loss of any method on a task, which has a regret of 0."""
    both = [runs_of(results, task, which) for which in ("default", "tuned")]
    return min(float(np.mean(best_loss(runs))) for table in both for runs in table.values())


def present(results: Results) -> list[str]:
    """The tasks that were run."""
    return [task for task in TASKS if runs_of(results, task, "default")]


def cell_text(values: Any, best: bool, digits: int = 2) -> str:
    """Mean and interval; bold where it is the best or equal best."""
    middle, half = interval(values)
    text = "-" if not np.isfinite(middle) else f"{middle:.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if best else text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def regret_table(results: Results, setting: str) -> str:
    """Methods by tasks."""
    tasks = present(results)
    columns = {task: regrets(results, task, setting) for task in tasks}
    best = {task: equal_best(column) for task, column in columns.items()}
    rows = []
    for name, method in METHODS.items():
        cells = [cell_text(columns[t][name], name in best[t]) if name in columns[t] else "" for t in tasks]
        shared = [float(np.mean(columns[t][name])) for t in tasks if name in columns[t]]
        if not shared:  # not run yet
            continue
        rows.append([f"`{method.title}`", *cells, f"{np.mean(shared):.2f}"])
    return markdown(["method", *(f"{t}*" if t in HELD_OUT else t for t in tasks), "mean"], rows)


def hindsight(results: Results) -> float:
    """The mean regret of whoever takes, at each rate of each task, what turns out to be the best method there.

    Of all methods that leave the task's optimizer and its rate as they are: no choice among them can be better.
    """
    tasks = []
    for task in present(results):
        best = lowest_loss(results, task)
        kept = [runs for name, runs in runs_of(results, task, "default").items() if not METHODS[name].takes_rate]
        lowest = np.min([capped(runs).mean(1) for runs in kept], axis=0)
        initial = np.mean([runs["initial"] for runs in kept])
        tasks.append((np.mean(lowest) - best) / (initial - best))
    return float(np.mean(tasks))


def task_table(results: Results, task: str) -> str:
    """Everything measured on one task."""
    default, tuned = runs_of(results, task, "default"), runs_of(results, task, "tuned")
    measures = {"best loss": best_loss, "LR sensitivity": sensitivity, "alive": alive}
    values = {what: {name: measure(runs) for name, runs in default.items()} for what, measure in measures.items()}
    values["LR sensitivity, tuned"] = {name: sensitivity(runs) for name, runs in tuned.items()}
    sign = {"alive": -1.0}
    best = {w: equal_best({n: sign.get(w, 1.0) * x for n, x in column.items()}) for w, column in values.items()}
    rows = []
    for name, runs in default.items():
        cells = [cell_text(column[name], name in best[what], 3) for what, column in values.items()]
        rest = [
            100 * np.mean(np.array(runs[key], np.float64)) for key in ("touched", "held", "spikes_loss", "spikes_norm")
        ]
        tried = results["cells"][f"{task} {name}"]["settings"]
        knob = f"{METHODS[name].setting} {tried[1]:g}" if METHODS[name].setting else ""
        rows.append([f"`{METHODS[name].title}`", *cells, knob, *(f"{x:.1f}" for x in rest)])
    header = ["method", *values, "tuned to", "touched %", "held %", "spike score, loss", "norm"]
    return f"**{TASKS[task]().title}** (`{task}`)\n\n" + markdown(header, rows)


def fault_title(name: str) -> str:
    """The title of a fault."""
    return (FAULTS | MICRO_FAULTS)[name][0]


def fault_table(results: Results, base: str) -> str:
    """Gap in the final loss of every fault and method; `NaN` where parameters of any seed are not finite."""
    found = faults_of(results, base)
    faults = [name for name in next(iter(found.values())) if name != "clean"]
    gaps = {fault: {m: fault_gaps(rows[fault]) for m, rows in found.items()} for fault in faults}
    best = {fault: equal_best({m: compared(x) for m, x in column.items()}) for fault, column in gaps.items()}
    rows = []
    for name, row in found.items():
        cells = [gap_text(gaps[fault][name], name in best[fault]) for fault in faults]
        alarms = 100 * np.mean(row["clean"]["touched"])
        rows.append([f"`{METHODS[name].title}`", f"{np.mean(row['clean']['final']):.3f}", f"{alarms:.1f}", *cells])
    return markdown(["method", "clean loss", "touched when clean, %", *map(fault_title, faults)], rows)


def compared(gaps: np.ndarray) -> np.ndarray:
    """The gaps by which methods are compared, capped at an untrained net, or one huge loss would hide all others."""
    return np.where(np.isfinite(gaps), np.minimum(gaps, UNTRAINED), np.inf)


def gap_text(gaps: np.ndarray, best: bool) -> str:
    """The gap, or the number of runs that ended in NaN."""
    dead = int(np.sum(~np.isfinite(gaps)))
    if dead:
        return "NaN" if dead == len(gaps) else f"NaN {dead}/{len(gaps)}"
    text = f"{np.mean(gaps):+.3f}" if abs(np.mean(gaps)) < 10 else f"{np.mean(gaps):+.0e}"
    return f"**{text}**" if best else text


def recovery_table(results: Results, base: str) -> str:
    """Healthy steps lost and steps to recover, of every fault and method: means over seeds."""
    found = faults_of(results, base)
    faults = [name for name in next(iter(found.values())) if name not in ("clean", "micro_nan")]

    def text(row: dict[str, Any]) -> str:
        never = any(x is None for x in row["recover"])
        steps = "never" if never else f"{np.mean(row['recover']):.0f}"
        return f"{np.mean(row['lost']):.0f} / {steps}"

    rows = [[f"`{METHODS[m].title}`", *(text(row[fault]) for fault in faults)] for m, row in found.items()]
    return markdown(["method", *map(fault_title, faults)], rows)


def where_stabilize_loses(results: Results) -> str:
    """Every column in which the preset is neither the best nor equal to the best within its interval."""
    lines = []
    for task in present(results):
        for setting in ("default", "tuned"):
            column = regrets(results, task, setting)
            best = min(column, key=lambda name: float(np.mean(column[name])))
            if "stabilize" in column and "stabilize" not in equal_best(column):
                lines.append(
                    f"- {task}, {setting}: {np.mean(column['stabilize']):.2f}, against {np.mean(column[best]):.2f} of "
                    f"`{METHODS[best].title}`"
                )
    for base in BASES:
        found = faults_of(results, base)
        for fault in next(iter(found.values()), {}):
            column = {m: compared(fault_gaps(rows[fault])) for m, rows in found.items()}
            best = min(column, key=lambda name: float(np.mean(column[name])))
            if "stabilize" in column and fault != "clean" and "stabilize" not in equal_best(column):
                lines.append(
                    f"- {fault_title(fault)}, {base}: {np.mean(column['stabilize']):+.3f}, against "
                    f"{np.mean(column[best]):+.3f} of `{METHODS[best].title}`"
                )
    return "\n".join(lines) or "- nowhere"


def write_pictures(results: Results) -> None:
    """The four pictures."""
    tasks = present(results)
    pictures.heat_of_tasks({t: regrets(results, t, "default") for t in tasks}, DOCS / "stability-tasks.png")
    pictures.loss_by_rate({t: runs_of(results, t, "default") for t in tasks}, DOCS / "stability-rates.png")
    faults = {base: faults_of(results, base) for base in BASES if faults_of(results, base)}
    pictures.heat_of_faults(faults, fault_title, DOCS / "stability-faults.png")
    pictures.curves_of_faults(faults, fault_title, DOCS / "stability-curves.png")


def generated(results: Results) -> str:
    """All tables of the page."""
    versions = ", ".join(f"{name} {number}" for name, number in results["setting"]["versions"].items())
    seconds = sum(cell["seconds"] for cell in results["cells"].values())
    parts = [
        f"Measured with `make bench-stability` on {results['setting']['device']} ({versions}), "
        f"{len(results['setting']['seeds'])} seeds, {seconds / 3600:.1f} core hours; "
        f"`benchmarks/results/{results['setting']['file']}`.",
        "### Regret over all learning rates, default settings",
        regret_table(results, "default"),
        "Taking at each rate of each task the best of all methods that leave the optimizer and its rate as they are, "
        f"in hindsight, comes to {hindsight(results):.2f}.",
        "### The same, each method at the best setting of its grid",
        regret_table(results, "tuned"),
        *(f"### Faults, {base}: gap in the final loss\n\n{fault_table(results, base)}" for base in BASES),
        *(
            f"### Faults, {base}: healthy steps lost / steps to recover\n\n{recovery_table(results, base)}"
            for base in BASES
        ),
        "### Where `stabilize` is neither the best nor equal to the best",
        where_stabilize_loses(results),
        "### Task by task",
        *(task_table(results, task) for task in present(results)),
    ]
    return "\n\n".join(parts)


def result_table(results: Results) -> str:
    """The methods that ran on every task, the best first: mean regret, faults survived, steps touched, cost."""
    costs = json.loads(COSTS.read_text())["costs"]
    columns = [regrets(results, task, "default") for task in present(results)]
    found = {base: faults_of(results, base) for base in BASES}
    everywhere = [name for name in METHODS if all(name in column for column in columns)]
    rows = []
    for name in everywhere:
        faults = {base: rows[name] for base, rows in found.items() if name in rows}
        gaps = [np.max(fault_gaps(row)) for each in faults.values() for fault, row in each.items() if fault != "clean"]
        survived = sum(bool(gap <= SURVIVED) for gap in gaps)
        touched = np.mean([np.mean(each["clean"]["touched"]) for each in faults.values()])
        mean = float(np.mean([np.mean(column[name]) for column in columns]))
        rows.append(
            (
                mean,
                [
                    f"`{METHODS[name].title}`",
                    f"{mean:.2f}",
                    f"{survived} of {len(gaps)}",
                    f"{100 * touched:.1f}",
                    f"{costs[name]:.2f}",
                ],
            )
        )
    header = ["method", "mean regret", "faults survived", "healthy steps touched, %", "bytes, of bare AdamW"]
    return markdown(header, [row for _, row in sorted(rows, key=lambda row: row[0])])


def write_page(results: Results) -> None:
    """Puts the tables between the marks of the docs pages; the text around them is written by hand."""
    put(PAGE, "tables", generated(results))
    put(RULES_PAGE, "result", result_table(results))


def table(results: Results) -> str:
    """The tables for the terminal."""
    parts = [regret_table(results, "default")] if present(results) else []
    parts += [
        f"{base}, gap in the final loss\n{fault_table(results, base)}" for base in BASES if faults_of(results, base)
    ]
    return "\n\n".join(parts)

"""All adaptive rules side by side on the same histories of gradient norms, worst cases included.

    python benchmarks/norm_histories.py           # about two minutes on two free cores; writes to benchmarks/results/
    python benchmarks/norm_histories.py --write-docs   # also docs/rules/norm_history.md; the same: make bench-histories
    python benchmarks/norm_histories.py --quick   # few histories: checks that it runs, not a measurement

A history has one scalar per step, the norm; the usual norm is 1. There are ten kinds of noise (lognormal with a log
deviation of 0.05 to 0.7, AR(1), Student-t with 3 degrees of freedom), and the norms of six real training runs
(`benchmarks/record_norms.py`). A cell "a / b" is the median and the worst history unless its heading says otherwise.
Each rule runs through its `judge`.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]  # the histories are shared with the tests

from histories import Run, noise, runner, with_bad_steps, with_burst, with_shift  # noqa: E402 (after the path is set)

import optax_guard as og  # noqa: E402 (after the path is set)
from benchmarks.marked import put  # noqa: E402 (after the path is set)

STEPS, EVENT = 700, 250
GRID = tuple(np.linspace(-9, 15, 97))  # log norms tried for the threshold of rules that skip, or clip below it
ONE = (60.0,)
COLUMNS = {  # the head of the column, and what it is
    "touched": ("touched (%)", "healthy steps touched: mean / worst kind (%)"),
    "touched_20": ("first 20 steps (%)", "the same, first 20 steps (%)"),
    "burst_passed": ("burst: passed", "5 spikes x1e6: passed"),
    "quiet_passed": ("burst, quiet run", "the same with little noise (log deviation 0.05)"),
    "burst_threshold": ("threshold after", "threshold after them"),
    "early_passed": ("early burst", "1 to 5 spikes in steps 2 to 20: passed, median / 98 %"),
    "first_spikes": ("first spikes", "the first 1 to 5 norms are spikes: steps until within x2"),
    "up": ("x100 up", "x100 up: steps until within x2"),
    "down": ("/100", "/100: steps until within x2"),
    "explosion": ("explosion", "lasting x1e6: passed 20 / 50 steps later (median)"),
    "first_low": ("first low", "the first norm is too low by x10 to x1e4: steps until recovered"),
    "nan": ("1 % NaN (%)", "1 % NaN or Inf: healthy steps touched (%)"),
    "real_touched": ("real, touched (%)", "real norms, steps touched: mean / worst (%)"),
    "real_passed": ("real, passed", "real norms, 3 spikes x1e6: passed relative to the usual norm, median / worst"),
}


class Method(NamedTuple):
    """A row of the table."""

    label: str
    rule: og.Rule
    probes: tuple[float, ...] = ONE


def methods() -> list[Method]:
    """The rows: our rules, the published rules repaired and as published, and two references."""
    return [
        Method("clip_by_norm_history()", og.clip_by_norm_history()),
        Method("clip_by_norm_history(50)", og.clip_by_norm_history(50)),
        Method("clip_by_norm_history(200)", og.clip_by_norm_history(200)),
        Method("clip_by_median_norm()", og.clip_by_median_norm()),
        Method("clip_by_median_norm(4)", og.clip_by_median_norm(4.0)),
        Method("zclip()", og.zclip(), GRID),
        Method('zclip(mode="percentile")', og.zclip(mode="percentile")),
        Method("autoclip()", og.autoclip()),
        Method("adagc()", og.adagc(scope="tree")),
        Method('skip_spikes(on="norm")', og.skip_spikes(on="norm"), GRID),
        Method("zclip, published", og.published.zclip(max_norm=math.inf), GRID),
        Method("zclip percentile, published", og.published.zclip(mode="percentile", max_norm=math.inf)),
        Method("autoclip p=10 of 128, published", og.published.autoclip(window=128)),
        Method("adagc, published", og.published.adagc(scope="tree", max_norm=math.inf)),
        Method("skip at 6 sigma of 128, published", og.published.skip_spikes(on="norm"), GRID),
        Method("fixed clip at the usual norm", og.clip_by_global_norm(1.0)),
    ]


def measure(method: Method, base: np.ndarray, real: np.ndarray) -> dict[str, tuple[float, float]]:
    """One row: (median, worst) of every column."""
    rng = np.random.default_rng(1)
    n, run = len(base), runner(method.rule, method.probes)
    rows = np.arange(n)
    lengths = rng.integers(1, 6, n)
    calm = run(base)

    def kinds(touched: np.ndarray) -> tuple[float, float]:
        share = 100 * touched.reshape(10, -1).mean(1)
        return float(share.mean()), float(share.max())

    burst = run(with_burst(base, EVENT, 5, np.log(1e6)))
    starts = rng.integers(1, 16, n)
    early = run(with_burst(base, starts, lengths, rng.uniform(np.log(3), np.log(1e6), n)))
    early_passed = [early.passed[i, starts[i] : starts[i] + lengths[i]].max() for i in range(n)]
    spiked = run(with_burst(base, 0, lengths, rng.uniform(np.log(10), np.log(1e6), n)))
    low = base.copy()
    low[:, 0] -= rng.uniform(np.log(10), np.log(1e4), n)
    held_back = run(low).touched & ~calm.touched
    up, down = (run(with_shift(base, EVENT, sign * np.log(100))) for sign in (1, -1))
    exploded = run(with_shift(base, EVENT, np.log(1e6))).passed
    bad = with_bad_steps(base, 0.01)
    clean_real = run(real)
    faulty = run(with_burst(real, STEPS // 2, 3, np.log(1e6)))
    usual = np.median(real[:, STEPS // 2 - 50 : STEPS // 2 + 50], axis=1)
    ratio = np.exp(burst.threshold[rows, EVENT + 5] - calm.threshold[rows, EVENT + 5])

    def away(got: Run, shift: float) -> np.ndarray:
        return (np.abs(got.threshold - calm.threshold - shift) > np.log(2))[:, EVENT:]

    return {
        "touched": kinds(calm.touched),
        "touched_20": kinds(calm.touched[:, :20]),
        "burst_passed": spread(np.exp(burst.passed[:, EVENT : EVENT + 5].max(1))),
        "quiet_passed": spread(np.exp(burst.passed[: n // 10, EVENT : EVENT + 5].max(1))),
        "burst_threshold": spread(ratio),
        "early_passed": (float(np.exp(np.median(early_passed))), float(np.exp(np.quantile(early_passed, 0.98)))),
        "first_spikes": spread(last(spiked.threshold - calm.threshold > np.log(2))),
        "up": spread(last(away(up, np.log(100)))),
        "down": spread(last(away(down, -np.log(100)))),
        "explosion": tuple(float(np.exp(np.median(exploded[:, EVENT + t]))) for t in (20, 50)),
        "first_low": spread(last(held_back)),
        "nan": kinds(np.where(np.isfinite(bad), run(bad).touched, False)),
        "real_touched": (100 * float(clean_real.touched.mean()), 100 * float(clean_real.touched.mean(1).max())),
        "real_passed": spread(np.exp(faulty.passed[:, STEPS // 2 : STEPS // 2 + 3].max(1) - usual)),
    }


def spread(x: np.ndarray) -> tuple[float, float]:
    """Median and worst."""
    return float(np.median(x)), float(np.max(x))


def last(event: np.ndarray) -> np.ndarray:
    """The number of steps after which it no longer happens; NaN if it still does at the end."""
    steps = event.shape[1]
    count = np.where(event.any(1), steps - np.argmax(event[:, ::-1], axis=1), 0)
    return np.where(count == steps, np.inf, count)


def real_norms() -> np.ndarray:
    """f64[histories, STEPS]: two stretches of every recorded run, as logarithms, each scaled to a usual norm of 1."""
    with np.load(HERE.parent / "tests" / "data" / "norms.npz") as file:
        traces = [np.log(x.astype(np.float64)) for x in file.values() if x.ndim == 1]
    parts = [x[start : start + STEPS] for x in traces for start in (0, len(x) - STEPS)]
    return np.stack([x - np.median(x) for x in parts])


def shown(number: float) -> str:
    """Three digits, or `never` for infinity."""
    if np.isinf(number):
        return "never"
    return f"{number:.1e}".replace("e+0", "e") if number >= 1e5 else f"{float(f'{number:.2g}'):g}"


def table(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown."""
    heads = [head for head, _ in COLUMNS.values()]
    lines = ["| rule | " + " | ".join(heads) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, row in results.items():
        cells = [f"{shown(row[c][0])} / {shown(row[c][1])}" for c in COLUMNS]
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    lines += ["", "| column | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| {head} | {what} |" for head, what in COLUMNS.values())])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few histories: checks that it runs")
    parser.add_argument("--histories", type=int, default=20, help="of each of the ten kinds of noise (default 20)")
    parser.add_argument("--write-docs", action="store_true", help="also writes the table of docs/rules/norm_history.md")
    arguments = parser.parse_args()
    if arguments.quick and arguments.write_docs:
        parser.error("--write-docs needs the full run")
    if arguments.histories < 1:
        parser.error("--histories must be at least 1")
    base, real = noise(2 if arguments.quick else arguments.histories, STEPS), real_norms()
    results: dict[str, dict[str, tuple[float, float]]] = {}
    chosen = methods()
    began = time.monotonic()
    for i, method in enumerate(chosen, 1):
        results[method.label] = measure(method, base, real)
        print(f"[{i:2d}/{len(chosen)}] {time.monotonic() - began:4.0f} s  {method.label}", file=sys.stderr, flush=True)
    text = table(results)
    print(text)
    if arguments.write_docs:
        put(HERE.parent / "docs" / "rules" / "norm_history.md", "histories", text)
    if not arguments.quick:
        named = {label: {c: [shown(x) for x in pair] for c, pair in row.items()} for label, row in results.items()}
        versions = {"jax": jax.__version__, "python": platform.python_version()}
        out = {
            "columns": {key: what for key, (_, what) in COLUMNS.items()},
            "histories": len(base),
            "steps": STEPS,
            "versions": versions,
            "rows": named,
        }
        (HERE / "results" / "norm-histories.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()

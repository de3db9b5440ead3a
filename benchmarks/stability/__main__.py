"""Runs StabilityBench: every method on every task and under every fault, then the tables, pictures and page.

    make bench-stability                            # everything: 2.3 core hours on a busy machine
    python -m benchmarks.stability --quick          # a few cells, cut short: checks that it runs, writes nothing
    python -m benchmarks.stability --methods stabilize --fresh     # measure one method again
    python -m benchmarks.stability --page           # the tables and pictures again, from the results file

Finished cells are kept in benchmarks/results/stability-cells/, so an interrupted run continues where it stopped.
"""

import argparse
import json
import os
import platform
import sys
from typing import Any

import jax
import optax
from rich.console import Console

from benchmarks.stability.cells import QUICK, Size, jobs
from benchmarks.stability.faults import BASES
from benchmarks.stability.methods import METHODS
from benchmarks.stability.page import read, results_file, table, write_page, write_pictures
from benchmarks.stability.tasks import TASKS
from benchmarks.stability.workers import run_all

QUICK_METHODS = ["none", "clip", "stabilize", "stabilize_change"]


def setting(size: Size) -> dict[str, Any]:
    """The setting of the run."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "python": platform.python_version()},
        "seeds": list(range(size.seeds)),
        "tuning_seed": size.seeds,
        "rates": list(size.rates),
        "file": results_file().name,
    }


def names(text: str | None, known: Any) -> list[str]:
    """The names in a comma-separated list; all by default."""
    chosen = list(known) if text is None else text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}. There are: {', '.join(known)}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description="StabilityBench.")
    parser.add_argument("--quick", action="store_true", help="a few cells, cut short; writes nothing")
    parser.add_argument("--methods", help="comma-separated; the others keep their results")
    parser.add_argument(
        "--tasks", help="comma-separated; the others keep their results; faults:adam and faults:sgd too"
    )
    parser.add_argument("--fresh", action="store_true", help="run cells again that were done before")
    parser.add_argument("--page", action="store_true", help="run nothing: the page and pictures from the results file")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, one on each core (default: all cores)"
    )
    options = parser.parse_args(arguments)
    console = Console()
    if options.page:
        write_pictures(read())
        write_page(read())
        return
    size = QUICK if options.quick else Size()
    everywhere = [f"faults:{base}" for base in BASES] + list(TASKS)
    default = "faults:sgd,doctor_visits" if options.quick else None
    where = names(options.tasks or default, everywhere)
    methods = names(options.methods or (",".join(QUICK_METHODS) if options.quick else None), METHODS)
    bases = [x.removeprefix("faults:") for x in where if x.startswith("faults:")]
    pairs = jobs([x for x in where if x in TASKS], bases, methods)
    cells = run_all(pairs, size, options.workers, options.fresh or options.quick, not options.quick, console)
    if options.quick:
        console.print(table({"setting": setting(size), "cells": cells}), highlight=False)
        return
    path = results_file()
    old = json.loads(path.read_text())["cells"] if path.exists() else {}
    known = {f"{w} {m}" for w, m in jobs(list(TASKS), list(BASES), list(METHODS))}
    results = {"setting": setting(size), "cells": {k: v for k, v in (old | cells).items() if k in known}}
    path.write_text(json.dumps(results) + "\n")
    write_pictures(results)
    write_page(results)
    console.print(table(results), highlight=False)


if __name__ == "__main__":
    main()

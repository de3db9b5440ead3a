"""Runs the cells of StabilityBench side by side, one process for each core, and keeps those that are done."""

import concurrent.futures
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.stability.cells import Size, fingerprint, run_cell
from benchmarks.stability.methods import METHODS

CELLS = Path(__file__).parent.parent / "results" / "stability-cells"


def work(where: str, method: str, size: Size) -> tuple[dict[str, Any], float]:
    """A cell and the seconds it took, in a worker."""
    start = time.perf_counter()
    return run_cell(where, method, size), time.perf_counter() - start


def pin(queue: Any) -> None:
    """One core for each worker: several small programs side by side are faster than one at a time on all cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {queue.get()})


def run_all(
    pairs: list[tuple[str, str]], size: Size, workers: int, fresh: bool, keep: bool, console: Console
) -> dict[str, Any]:
    """All cells, from the disk (unless `fresh`) or run now (and written to it, if `keep`)."""
    CELLS.mkdir(parents=True, exist_ok=True)
    paths = {(w, m): CELLS / f"{w.replace(':', '-')}.{m}.{fingerprint(w, m, size)}.json" for w, m in pairs}
    cells = {} if fresh else {pair: json.loads(p.read_text()) for pair, p in paths.items() if p.exists()}
    missing = [pair for pair in pairs if pair not in cells]
    if cells:
        console.print(f"{len(cells)} cells were done before (--fresh runs them again).")
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Manager().Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(workers))
    for i in range(workers):
        queue.put(cores[i % len(cores)])
    columns = TextColumn("{task.description:52s}"), BarColumn(), MofNCompleteColumn()
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        concurrent.futures.ProcessPoolExecutor(workers, context, pin, (queue,)) as pool,
    ):
        bar = progress.add_task("StabilityBench", total=len(missing))
        waiting = {pool.submit(work, *pair, size): pair for pair in missing}
        for done in concurrent.futures.as_completed(waiting):
            where, method = pair = waiting[done]
            cell, seconds = done.result()
            cells[pair] = cell | {"seconds": round(seconds, 1)}
            if keep:
                paths[pair].write_text(json.dumps(cells[pair]))
            progress.update(bar, advance=1, description=f"{where}, {METHODS[method].title}: {seconds:.0f} s")
    return {f"{where} {method}": cells[where, method] for where, method in pairs}

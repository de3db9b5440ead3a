"""Runs the jobs side by side in processes of their own, says how they go, and keeps each result at once.

A process that dies costs its job and no other.
"""

import json
import multiprocessing
import os
import platform
import queue
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.stability.large.studies import Size, all_jobs
from benchmarks.stability.large.trials import Runs, run
from benchmarks.stability.measures import spike_share

RESULTS = Path(__file__).parents[2] / "results"
UNFINISHED = RESULTS / "large-unfinished"


def run_jobs(names: list[str], size: Size, workers: int, seconds: float, keep: bool) -> dict[str, Any]:
    """The cells of the jobs that were finished in time."""
    begin, context = time.time(), multiprocessing.get_context("spawn")
    waiting, told = context.Queue(), context.Queue()
    for name in [*names, *[None] * workers]:
        waiting.put(name)
    settings = size, begin + seconds
    processes = [context.Process(target=serve, args=(core, waiting, told, *settings)) for core in cores(workers)]
    for process in processes:
        process.start()
    cells: dict[str, Any] = {}
    while any(process.is_alive() for process in processes) or not told.empty():
        try:
            name, text, cell = told.get(timeout=1)
        except queue.Empty:
            continue
        print(f"{time.time() - begin:5.0f} s  {name}: {text}", flush=True)
        if cell is not None:
            cells[name] = cell
            if keep:
                write(name, cell)
    print(f"{time.time() - begin:5.0f} s  {len(cells)} of {len(names)} jobs were finished.", flush=True)
    return cells


def cores(workers: int) -> list[int | None]:
    """A core for each worker if all computes on CPUs: small programs side by side are faster than one at a time."""
    if os.environ.get("JAX_PLATFORMS") != "cpu" or workers == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    there = sorted(os.sched_getaffinity(0))
    return [there[-1 - i % len(there)] for i in range(workers)]


def serve(core: int | None, waiting: Any, told: Any, size: Size, deadline: float) -> None:
    """A worker: one job after the other until the time is up."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    while (name := waiting.get()) is not None:
        if time.time() > deadline:
            continue
        try:
            cell = work(name, size, deadline, lambda text, name=name: told.put((name, text, None)))
            text = "stopped, to go on later" if cell is None else f"done in {cell['seconds']} s: {finals(cell)}"
            told.put((name, text, cell))
        except Exception:  # a job that fails must not cost those behind it
            told.put((name, f"FAILED\n{traceback.format_exc()}", None))
        jax.clear_caches()


def work(name: str, size: Size, deadline: float, tell: Any) -> dict[str, Any] | None:
    """The cell of a job; None if the time was up first."""
    begin = time.perf_counter()
    job = all_jobs(size)[name]
    trial = job.trial()
    shape = "x".join(map(str, (*job.shape, trial.steps)))
    file = UNFINISHED / f"{name.replace(':', '-').replace(' ', '.')}.{shape}.npz"
    runs = run(trial, job.lanes, file, lambda: time.time() > deadline, tell)
    if runs is None:
        return None
    device = jax.devices()[0]
    return {
        "shape": list(job.shape),
        "rates": sorted({float(f"{rate:.4g}") for rate in job.lanes.rate}),
        "seconds": round(time.perf_counter() - begin, 1),
        "device": f"{device.device_kind} ({device.platform})",
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "python": platform.python_version()},
        **summary(runs, job.shape),
    }


def summary(runs: Runs, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What is kept of the runs: [bounds][rates][seeds], and the median curve over seeds, [bounds][rates][50 points]."""

    def nested(x: Any) -> Any:
        return plain(np.asarray(x, np.float64).reshape(shape).swapaxes(1, 2))

    every = max(len(runs.loss) // 50, 1)
    points = len(runs.loss) // every
    means = runs.loss[: points * every].reshape(points, every, *shape).mean(1)
    return {
        "initial": nested(runs.initial),
        "final": nested(runs.final),
        "finite": nested(runs.finite),
        "spikes_loss": nested([spike_share(x) for x in runs.loss.T]),
        "spikes_norm": nested([spike_share(x) for x in runs.norm.T]),
        "curve": plain(np.moveaxis(np.median(means, axis=2), 0, -1)),
    }


def plain(numbers: Any) -> Any:
    """Lists of numbers with six digits; None for those that are not finite."""
    numbers = np.asarray(numbers)
    if numbers.ndim:
        return [plain(x) for x in numbers]
    return float(f"{float(numbers):.6g}") if np.isfinite(numbers) else None


def finals(cell: dict[str, Any]) -> str:
    """The medians of the final losses, by rate, of each bound."""

    def middle(row: list[Any]) -> str:
        known = [x for x in row if x is not None]
        return f"{statistics.median(known):.3f}" if known else "NaN"

    return " | ".join(" ".join(middle(row) for row in rows) for rows in cell["final"])


def read_apart() -> list[dict[str, Any]]:
    """The cells of each platform, those of a CPU first."""
    files = sorted(RESULTS.glob("large-*.json"), key=lambda path: "cpu" not in path.name)
    return [json.loads(path.read_text()) for path in files]


def read() -> dict[str, Any]:
    """All cells of all platforms; where two have the same, an accelerator's."""
    cells: dict[str, Any] = {}
    for own in read_apart():
        cells = cells | own
    return cells


def write(name: str, cell: dict[str, Any]) -> None:
    """Adds a cell to the results of its platform, in one move, so that a stop in between leaves the old file."""
    path = RESULTS / f"large-{cell['device'].rpartition('(')[2].rstrip(')')}.json"
    cells = json.loads(path.read_text()) if path.exists() else {}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(cells | {name: cell}) + "\n")
    part.replace(path)

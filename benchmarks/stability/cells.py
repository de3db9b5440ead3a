"""A cell of StabilityBench: one method on one task, or one method under all faults, stored as JSON."""

import zlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.stability.faults import BASES, BATCH, FAULTS, MICRO_FAULTS, START, Fault, base_task, stacked
from benchmarks.stability.measures import spike_share, steps_to_recover
from benchmarks.stability.methods import EVERY, METHODS, Method
from benchmarks.stability.tasks import RATES, TASKS, Task, digits, rows_of
from benchmarks.stability.train import Lanes, Runs, make_runner

EVERY_CURVE = 10  # a point of a curve for so many steps
SMOOTH = 10  # steps over which a loss is averaged before it counts as recovered


class Size(NamedTuple):
    """The size of a run."""

    seeds: int = 5
    rates: tuple[float, ...] = RATES
    shorten: int = 1  # steps of the tasks are divided by it
    tune: bool = True  # whether the grid of settings is tried


QUICK = Size(seeds=2, rates=(3e-3, 3e-2, 3e-1), shorten=10, tune=False)


def jobs(tasks: list[str], bases: list[str], methods: list[str]) -> list[tuple[str, str]]:
    """(task or base, method) of all applicable cells: some methods need an optimizer with a second moment."""
    pairs = [(f"faults:{base}", method) for base in bases for method in methods]
    pairs += [(task, method) for task in tasks for method in methods]

    def fits(where: str, method: str) -> bool:
        moment = where == "faults:adam" if where.startswith("faults:") else TASKS[where]().second_moment
        return moment or not METHODS[method].second_moment

    return [pair for pair in pairs if fits(*pair)]


def run_cell(where: str, method: str, size: Size) -> dict[str, Any]:
    """Runs all training of a cell."""
    if where.startswith("faults:"):
        return _faults(where.removeprefix("faults:"), METHODS[method], size)
    task = TASKS[where]()
    return _natural(task._replace(steps=task.steps // size.shorten), METHODS[method], size)


def _natural(task: Task, method: Method, size: Size) -> dict[str, Any]:
    """All learning rates and seeds at the default setting, then at the best setting of the grid on a separate seed."""
    rates, seeds = np.asarray(size.rates, np.float32), size.seeds
    run = make_runner(task, method.build, list(range(seeds + 1)))

    def evaluate(setting: float) -> dict[str, Any]:
        lanes = _lanes(np.arange(seeds), rates, np.full(1, setting))
        return _summary(run(lanes, None), (len(rates), seeds))

    default = evaluate(method.settings[0])
    best = method.settings[0]
    if size.tune and len(method.settings) > 1:
        # One seed that no result is taken from; as many lanes as above, so that nothing is compiled again.
        out = run(_lanes(np.array([seeds]), rates, np.array(method.settings)), None)
        capped = np.fmin(np.where(np.isfinite(out.final), out.final, np.inf), out.initial)
        best = method.settings[int(np.argmin(capped.reshape(len(method.settings), len(rates)).mean(1)))]
    tuned = default if best == method.settings[0] else evaluate(best)
    return {"rates": list(size.rates), "default": default, "tuned": tuned, "settings": [method.settings[0], best]}


def _lanes(seeds: np.ndarray, rates: np.ndarray, settings: np.ndarray) -> Lanes:
    """Every seed (or setting) at every learning rate; rates vary fastest."""
    runs = max(len(seeds), len(settings))
    return Lanes(
        seed=np.repeat(np.broadcast_to(seeds, runs), len(rates)).astype(np.int32),
        rate=np.tile(rates, runs),
        setting=np.repeat(np.broadcast_to(settings, runs), len(rates)).astype(np.float32),
        fault=np.zeros(runs * len(rates), np.int32),
    )


def _summary(out: Runs, shape: tuple[int, int]) -> dict[str, Any]:
    """The stored results of each run: [rates][seeds]."""
    rates, seeds = shape
    touched = np.abs(out.share - 1) > 1e-3
    kept = {
        "initial": out.initial,
        "final": out.final,
        "finite": out.finite,
        "touched": touched.mean(0),
        "held": (out.share == 0).mean(0),
        "spikes_loss": [spike_share(x) for x in out.loss.T],
        "spikes_norm": [spike_share(x) for x in out.norm.T],
    }
    return {name: _plain(np.asarray(x, np.float64).reshape(seeds, rates).T) for name, x in kept.items()}


def _faults(base: str, method: Method, size: Size) -> dict[str, Any]:
    """Every fault and seed, on whole batches and on micro-batches."""
    task = base_task(base)
    whole = _fault_rows(task, method, method.build, base, FAULTS, size)
    small = task._replace(batch=rows_of(digits(centred=True)[0], BATCH // EVERY))
    parts = _fault_rows(small, method, method.accumulated, base, MICRO_FAULTS, size)
    return {"faults": whole | {"micro_nan": parts["micro_nan"]}}


def _fault_rows(task: Task, method: Method, build: Any, base: str, faults: Any, size: Size) -> dict[str, Any]:
    """The effect of each fault, as lists over seeds."""
    seeds, names = size.seeds, list(faults)
    table: Fault = stacked(faults)
    lanes = Lanes(
        seed=np.tile(np.arange(seeds), len(names)).astype(np.int32),
        rate=np.full(seeds * len(names), BASES[base], np.float32),
        setting=np.full(seeds * len(names), method.settings[0], np.float32),
        fault=np.repeat(np.arange(len(names)), seeds).astype(np.int32),
    )
    out = make_runner(task, build, list(range(seeds)))(lanes, table)
    final, finite = out.final.reshape(len(names), seeds), out.finite.reshape(len(names), seeds)
    loss, share = (x.reshape(-1, len(names), seeds) for x in (out.loss, out.share))
    rows = {}
    for i, name in enumerate(names):
        healthy = (table.active[i] == 0) & (np.arange(len(loss)) >= START)
        end = int(np.flatnonzero(table.active[i])[-1]) + 1 if table.active[i].any() else START
        lost = (share[:, i] < 0.5 * share[:, 0])[healthy].sum(0)
        smooth = np.stack([_smoothed(loss[:, i, s]) for s in range(seeds)], axis=1)
        twin = np.stack([_smoothed(loss[:, 0, s]) for s in range(seeds)], axis=1)
        rows[name] = {
            "finite": _plain(finite[i]),
            "gap": _plain(final[i] - final[0]),
            "lost": _plain(lost),
            "recover": [steps_to_recover(smooth[:, s], twin[:, s], end) for s in range(seeds)],
            "curve": _plain(np.median(smooth, axis=1)[::EVERY_CURVE]),
        }
    rows["clean"]["touched"] = _plain((np.abs(share[:, 0] - 1) > 1e-3).mean(0))
    rows["clean"]["final"] = _plain(final[0])
    return rows


def _smoothed(loss: np.ndarray) -> np.ndarray:
    """The mean of the last few losses."""
    padded = np.concatenate([np.full(SMOOTH - 1, loss[0]), loss])
    return np.lib.stride_tricks.sliding_window_view(padded, SMOOTH).mean(1)


def _plain(numbers: np.ndarray) -> Any:
    """Lists of numbers with four digits; None for non-finite numbers, which JSON cannot represent."""
    numbers = np.asarray(numbers)
    if numbers.ndim:
        return [_plain(x) for x in numbers]
    return float(f"{float(numbers):.4g}") if np.isfinite(numbers) else None


def fingerprint(where: str, method: str, size: Size) -> str:
    """Changes when a named setting of the cell changes; it does not see changes to the code: use --fresh for those."""
    steps = 0 if where.startswith("faults:") else TASKS[where]().steps
    faults = sorted(FAULTS) if where.startswith("faults:") else []
    return f"{zlib.crc32(repr((where, method, size, steps, METHODS[method].settings, faults)).encode()):08x}"

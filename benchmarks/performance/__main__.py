"""The performance record, from measurement to page.

    python -m benchmarks.performance                     # everything, some 25 minutes on two cores; make bench
    python -m benchmarks.performance --quick             # small trees, few rounds: only checks that it runs
    python -m benchmarks.performance --only updates      # one part; its rows replace those in the results
    python -m benchmarks.performance --gpu --minutes 7   # on a machine with a GPU: what is of interest there
    python -m benchmarks.performance --write-pages       # measures nothing: results -> pages and pictures

Run it from the root of the repository. It writes `benchmarks/results/performance-*.json`,
`docs/benchmarks/performance.md` with its pictures, and the tables of the README and of other pages that quote it.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.performance.accumulation import accumulation_rows
from benchmarks.performance.measure import Row, memory, say, size_of, transformer_tree, versions
from benchmarks.performance.page import (
    GPU_TARGETS,
    ROOT,
    Record,
    read_records,
    terminal_table,
    write_pages,
    write_record,
)
from benchmarks.performance.programs import gpu_rows, program_rows
from benchmarks.performance.pytorch import pytorch_rows
from benchmarks.performance.scaling import import_rows, leaf_rows, parameter_rows
from benchmarks.performance.steps import (
    guard_rows,
    noise_rows,
    proximal_rows,
    recovery_rows,
    rule_rows,
    update_rows,
)
from benchmarks.performance.training import training_rows
from benchmarks.performance.traps import trap_rows

LEAVES = {10: 5, 100: 5, 1000: 2, 3000: 1}  # how many leaves: how often compiled
MILLIONS = (1, 3, 10, 30, 100, 300)
PARTS = (
    "parameters",  # first: the largest tree needs half of 24 GiB, which later parts may still hold some of
    "guard",
    "rules",
    "recovery",
    "updates",
    "proximal",
    "noise",
    "accumulation",
    "programs",
    "traps",
    "training",
    "pytorch",
    "leaves",
    "import",
    "gpu",
)
# In the order of their interest, in case that time runs out; PyTorch, which brings its own CUDA, comes last.
GPU_PARTS = (
    "gpu",
    "guard",
    "accumulation",
    "updates",
    "noise",
    "recovery",
    "traps",
    "rules",
    "training",
    "programs",
    "pytorch",
)
# Width and layers of the tree: 6, 21 and 74 M parameters in 194 leaves. A small tree on a large GPU would measure how
# fast kernels are launched, and with many leaves its compiler takes minutes a step: 35, 140 and 275 M in 66 leaves.
TREES = {"cpu": ((160, 12), (320, 12), (640, 12)), "gpu": ((640, 4), (1280, 4), (1792, 4))}
TRAINED = {"cpu": (256, 4, (4, 16)), "gpu": (1024, 8, (16, 64))}  # width, layers, batches of the real training step
COPIES = 32  # of the parameters that a part has at a time, at most: six arms of four, and what is being made


def tree_size(backend: str, available: float) -> tuple[int, int]:
    """Width and layers of the largest tree for which memory suffices."""
    trees = TREES.get(backend, TREES["cpu"])
    fitting = [each for each in trees if 4 * COPIES * parameters_of(*each) <= available]
    return fitting[-1] if fitting else trees[0]


def parameters_of(width: int, layers: int) -> float:
    """The number of parameters of `transformer_tree(width, layers, 37.5 * width)`, but for norms and biases."""
    return (12 * layers + 37.5) * width**2


def measurements(quick: bool, rounds: int) -> tuple[str, dict[str, Callable[[], list[Row]]]]:
    """What the tree is, and part -> how to measure it. The tree is made when a part begins and freed when it ends."""
    backend = jax.default_backend()
    width, layers = (32, 0) if quick else tree_size(backend, memory())
    vocabulary = 512 if quick else int(37.5 * width)

    def tree() -> tuple[Any, Any]:
        params = transformer_tree(width, layers, vocabulary)
        return params, jax.tree.map(lambda x: 0.01 * jnp.cos(100 * x), params)

    def leaves() -> list[Row]:
        numbers = {4: 1, 8: 1} if quick else LEAVES
        return [row for n, times in numbers.items() for row in leaf_rows(n, times, min(rounds, 9))]

    def parameters() -> list[Row]:
        fitting = [m for m in MILLIONS if 10 * 4e6 * m <= memory()]  # two arms of four, and the gradients twice
        sizes = (
            ((0.1, rounds), (0.3, rounds))
            if quick
            else ((m, rounds if m < 100 else max(rounds // 3, 3)) for m in fitting)
        )
        return [row for millions, times in sizes for row in parameter_rows(millions, layers, times)]

    parts = {
        "guard": lambda: guard_rows(*tree(), rounds),
        "rules": lambda: rule_rows(*tree(), rounds),
        "recovery": lambda: recovery_rows(*tree(), rounds),
        "updates": lambda: update_rows(*tree(), rounds),
        "proximal": lambda: proximal_rows(*tree(), rounds),
        "noise": lambda: noise_rows(*tree(), rounds),
        "accumulation": lambda: accumulation_rows(*tree(), rounds, width=64 if quick else 1024),
        "traps": lambda: trap_rows(*tree(), rounds),
        "programs": lambda: program_rows(*tree()),
        "training": lambda: training_rows(*((16, 1, (1,)) if quick else TRAINED.get(backend, TRAINED["cpu"])), rounds),
        "pytorch": lambda: pytorch_rows(*tree(), rounds),
        "leaves": leaves,
        "parameters": parameters,
        "import": lambda: import_rows(1 if quick else 7),
        "gpu": lambda: gpu_rows(*tree(), rounds) if quick or backend == "gpu" else [],
    }
    params = tree()[0]
    size = f"{size_of(params) / 4e6:.1f} M float32 parameters in {len(jax.tree.leaves(params))} leaves"
    return size, parts


def write_all(record: Record) -> None:
    """Pictures and pages."""
    try:
        from benchmarks.performance.pictures import draw
    except ImportError as error:
        say(f"no pictures: {error}")
    else:
        for file in draw(record, ROOT / "docs" / "benchmarks"):
            say(f"wrote docs/benchmarks/{file.name}")
    write_pages(read_records())
    say("wrote docs/benchmarks/performance.md and the tables of the pages that quote it")


def summary(rows: list[Row]) -> str:
    """Every target against what was measured."""
    lines = ["Targets (the median of the ratios of single rounds, and their quartiles):", ""]
    lines.append(terminal_table([row for row in rows if row.target is not None]))
    if not any(row.part == "gpu" for row in rows):
        lines.append(f"{GPU_TARGETS[0]:88s} not measured: no GPU here")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description="What a guarded step costs, as the median of the ratios of single rounds."
    )
    parser.add_argument("--quick", action="store_true", help="small trees and few rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per row (default: 15)")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="some parts; their rows replace those in the results")
    parser.add_argument("--write-pages", action="store_true", help="only writes pages and pictures from the results")
    parser.add_argument("--gpu", action="store_true", help="the parts that are of interest on a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no part begins after so many minutes")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.write_pages:
        for record in read_records():
            write_all(record)
        return
    start, rounds = time.monotonic(), options.rounds
    if options.quick:
        rounds = 3
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of what a short run does
    tree, parts = measurements(options.quick, rounds)
    setting = {"tree": tree, **versions(), "rounds": rounds}
    name = f"performance-{jax.devices()[0].platform}-jax{jax.__version__}"
    print("; ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    chosen = options.only or (GPU_PARTS if options.gpu else PARTS)
    rows, failed = [], []
    old = {row.what: row for record in read_records() if record.name == name for row in record.rows}
    keeps_old = bool(options.only or options.gpu)
    for number, part in enumerate(chosen, 1):
        if time.monotonic() - start > 60 * options.minutes:
            failed.append(f"{part}: not begun, the {options.minutes:g} minutes are over")
            continue
        say(f"[{number}/{len(chosen)}] {part}")
        try:
            new = parts[part]()
        except Exception as error:  # memory that is too small for one part says nothing about the others
            traceback.print_exc()
            failed.append(f"{part}: {type(error).__name__}: {error}")
            continue
        rows += new
        print(terminal_table([row for row in new if not row.series]), flush=True)
        old |= {row.what: row for row in new}
        if not options.quick:  # after each part, so that a run that is cut off is not lost
            last = number == len(PARTS) and not failed
            write_record(Record(name, setting, rows if last and not keeps_old else list(old.values())))
    print("\n" + summary(rows))
    if not options.quick:
        for record in read_records():
            if record.name == name:
                write_all(record)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""How the costs grow with the number of leaves and of parameters, and how long the import takes."""

import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks.performance.measure import (
    Arm,
    Row,
    compare,
    made_arms,
    make_arm,
    race,
    say,
    series_row,
    size_of,
    transformer_tree,
)

__all__ = ["import_rows", "leaf_rows", "parameter_rows"]

PyTree = Any
_MOST_OPTAX = 1000  # leaves with which Optax's own are compiled: beyond, they take many minutes
_SHAPES = ((64, 64), (64,), (64, 128))


def leaf_rows(leaves: int, compilations: int, rounds: int) -> list[Row]:
    """Tracing, compiling and stepping with many small leaves. Optax's guards, which take longest, are compiled once."""
    params = {f"leaf_{i:04d}": jnp.zeros(_SHAPES[i % 3]) for i in range(leaves)}
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    txs = {
        "bare `optax.adamw`": adamw,
        "guarded": og.guard(adamw, og.clip_by_global_norm(1.0)),
        "`optax.chain(clip, adamw)`": clipped,
        "`optax.apply_if_finite` around it": optax.apply_if_finite(clipped, 5),
    }
    bare, guarded = list(txs)[:2]
    if leaves > _MOST_OPTAX:
        txs = {bare: txs[bare], guarded: txs[guarded]}
    arms: dict[str, Arm] = {}
    seconds: dict[str, list[float]] = {name: [] for name in txs}
    one = {"leaf": jnp.zeros(2)}
    make_arm(adamw, one, one)  # what is first in a process loads more
    for turn in range(compilations):
        for name, tx in txs.items():
            if turn and name not in (bare, guarded):
                continue
            jax.clear_caches()
            start = time.perf_counter()
            arms[name] = make_arm(tx, params, params, fast=name == guarded)
            seconds[name].append(time.perf_counter() - start)
            say(f"compiled {leaves} leaves, {name}")
    compiling = {name: np.array(times) for name, times in seconds.items()}
    stepping = race(arms, params, rounds)
    rows = []
    for what, t in (("compiling", compiling), ("a step", stepping)):
        target = 1.5 if what == "compiling" and leaves == 1000 else None
        rows.append(compare("leaves", f"{what}, {leaves} leaves, guarded over {bare}", t[guarded], t[bare], target))
        rows += [
            compare("leaves", f"{what}, {leaves} leaves, {name} over {bare}", t[name], t[bare][: len(t[name])])
            for name in list(txs)[2:]
        ]
        for name, times in t.items():
            unit, scale = ("s", 1) if what == "compiling" else ("ms", 1e3)
            rows.append(series_row("leaves", f"{what}: {name}", leaves, scale * times, unit))
    return rows


def parameter_rows(millions: float, layers: int, rounds: int) -> list[Row]:
    """The guarded and the bare step at one size. The number of leaves is the same at all sizes."""
    width = 2 * round((1e6 * millions / (12 * layers + 37.5)) ** 0.5 / 2)
    params = transformer_tree(width, layers, int(37.5 * width))
    size = size_of(params) / 4
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    adamw = optax.adamw(1e-3)
    txs = {"bare `optax.adamw`": (adamw,), "guarded": og.guard(adamw, og.clip_by_global_norm(1.0))}
    bare, guarded = txs
    arms = made_arms(txs, params, grads)
    del params  # the arms have copies; at 300 M each copy is 1.2 GB
    t = race(arms, grads, rounds)
    rows = [compare("parameters", f"a step, {millions:g} M parameters, guarded over bare", t[guarded], t[bare])]
    rows += [
        series_row("parameters", f"ns per parameter: {name}", size, 1e9 * times / size, "ns")
        for name, times in t.items()
    ]
    return rows


def import_rows(rounds: int) -> list[Row]:
    """Milliseconds that `import optax_guard` adds to `import optax`."""
    # Collected first: else it is chance whether the pass over all that JAX has allocated (60 ms) falls into our import.
    code = "import gc, time, optax; gc.collect(); t = time.perf_counter(); import optax_guard"
    code += "; print(1000 * (time.perf_counter() - t))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment, text=True)
        return float(done.stdout)

    run()  # writes the bytecode, as an installation does
    low, middle, high = (float(x) for x in np.percentile([run() for _ in range(rounds)], [25, 50, 75]))
    return [Row("import", "`import optax_guard` after `import optax`", middle, low, high, "ms", 50.0)]

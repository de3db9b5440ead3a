"""Whether the bound of `stabilize` acts at all in the first steps of a job of the study of neutrality.

    python -m benchmarks.stability.large.first_steps characters --steps 300 --seeds 2

Where it never acts, both arms of the study are one program on the same numbers, and one of them is enough. On a CPU the
characters take hours; their first fifth, with the warm-up and as many steps at nearly the full rate, takes minutes.
The counts go to benchmarks/results/first_steps.json and to docs/benchmarks/large.md.
"""

import argparse
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optax_guard as og
from benchmarks.stability.large.studies import BOUND, CUSTOMARY, NETS, neutral
from benchmarks.stability.large.trials import grid
from benchmarks.stability.large.workers import RESULTS

FILE = RESULTS / "first_steps.json"


def acted(net: str, optimizer: str, steps: int, seeds: int) -> dict[str, Any]:
    """In how many of the first `steps` the bound acted, as [rates][seeds]."""
    begin = time.perf_counter()
    trial, rates = neutral(net, optimizer), CUSTOMARY[optimizer].rates
    lanes = grid(seeds, rates, (BOUND,))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry: Any) -> Any:
        step = jax.vmap(trial.step, (0, 0, None))
        return jax.lax.scan(lambda carry, index: (step(lanes, carry, index)[0], None), carry, jnp.arange(steps))[0]

    carry = jax.tree.map(lambda x: x.copy(), jax.jit(jax.vmap(trial.start))(lanes))
    totals = og.metrics(train(carry)[1])["limit_step_growth/bound_total"]
    counts = np.asarray(totals).reshape(seeds, len(rates)).T.tolist()
    device = jax.devices()[0]
    return {
        "steps": steps,
        "of": trial.steps,
        "rates": list(rates),
        "acted": counts,
        "device": f"{device.device_kind} ({device.platform})",
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """Runs every optimizer that has not run, and writes after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability.large.first_steps", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("net", choices=NETS)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seeds", type=int, required=True)
    options = parser.parse_args()
    for optimizer in CUSTOMARY:
        cells = json.loads(FILE.read_text()) if FILE.exists() else {}
        name = f"{options.net} {optimizer}"
        if cells.get(name, {}).get("steps") == options.steps:
            continue
        cells[name] = acted(options.net, optimizer, options.steps, options.seeds)
        print(f"{name}: {cells[name]}", flush=True)
        FILE.write_text(json.dumps(cells) + "\n")


if __name__ == "__main__":
    main()

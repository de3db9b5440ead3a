"""What accumulation costs: ratios of medians over interleaved runs in one process.

    python benchmarks/accumulation.py            # about 5 minutes on two cores; writes to benchmarks/results/
    python benchmarks/accumulation.py --quick    # small trees and few rounds: checks that it runs, not a measurement

Two clocks: wall time, and CPU time of the process, which a busy machine disturbs less.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from overhead import Row, compare, make_arm, save, setting, table, transformer_tree

import optax_guard as og

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


def race(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Seconds by clock, arm and round; arms take turns."""
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in turns} for clock in CLOCKS}
    for number in range(rounds + 2):
        for name, turn in turns.items():
            start = {clock: read() for clock, read in CLOCKS.items()}
            turn()
            for clock, read in CLOCKS.items():
                if number >= 2:  # two rounds to warm up
                    seconds[clock][name].append(read() - start[clock])
    return {clock: {name: np.array(x) for name, x in each.items()} for clock, each in seconds.items()}


def across_calls(params: Any, grads: Any, rounds: int) -> list[Row]:
    """A cycle of four calls of `accumulate`."""
    adamw, every = optax.adamw(1e-3), 4
    guarded = og.guard(adamw, og.clip_by_global_norm(1.0))
    multi = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), adamw), every)
    arms = {
        "bare": make_arm(adamw, params, grads, fast=False),
        "drop": make_arm(og.accumulate(guarded, every), params, grads),
        "propagate": make_arm(og.accumulate(guarded, every, on_nonfinite="propagate"), params, grads),
        "multi": make_arm(multi.gradient_transformation(), params, grads, fast=False),
    }
    live = {name: (arm.params, arm.state) for name, arm in arms.items()}

    def turn(name: str) -> None:
        for _ in range(every):
            live[name] = arms[name].step(*live[name], grads)
        jax.block_until_ready(live[name])

    rows = []
    for clock, t in race({name: lambda name=name: turn(name) for name in arms}, rounds).items():
        rows += [
            compare(f"MultiSteps(chain(clip, adamw), 4) / accumulate ({clock})", t["multi"], t["drop"], 7.0, True),
            compare(f"accumulate(guard), a cycle / 4 bare AdamW steps ({clock})", t["drop"], t["bare"], 0.68),
            compare(f'the same with on_nonfinite="propagate" ({clock})', t["propagate"], t["bare"], 0.68),
        ]
    extra = arms["drop"].temporaries / sum(x.nbytes for x in jax.tree.leaves(params))
    return [*rows, Row("temporaries of accumulate / parameters", extra, extra, extra, "<= 0.01x", extra <= 0.01)]


def inside_one_call(width: int, rounds: int) -> list[Row]:
    """`accumulate_gradients` against a scan by hand."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(0, width**-0.5, (width, width)), jnp.float32) for _ in range(4)]
    batch = jnp.asarray(rng.normal(size=(128, width)), jnp.float32)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        for kernel in params:
            batch = jnp.tanh(batch @ kernel)
        return jnp.mean(batch**2)

    def by_hand(params: Any, batch: Any) -> Any:
        def body(sums: Any, part: Any) -> Any:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(params, part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        sums, _ = lax.scan(body, zeros, batch.reshape(4, -1, width))
        return jax.tree.map(lambda x: x / 4, sums)

    ours, theirs = jax.jit(og.accumulate_gradients(loss_fn, 4)), jax.jit(by_hand)
    turns = {
        "ours": lambda: jax.block_until_ready(ours(params, batch)),
        "by_hand": lambda: jax.block_until_ready(theirs(params, batch)),
    }
    return [
        compare(f"accumulate_gradients(loss, 4) / a scan by hand ({clock})", t["ours"], t["by_hand"], 1.05)
        for clock, t in race(turns, rounds).items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description="What accumulation costs, as ratios of medians.")
    parser.add_argument("--quick", action="store_true", help="small trees and few rounds; writes no results")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per row (default: 9)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds = 3 if options.quick else options.rounds
    params = transformer_tree(64, 2, 512) if options.quick else transformer_tree(640, 12, 24_000)
    grads = jax.tree.map(lambda x: 0.01 * jnp.cos(100 * x), params)
    heading = setting(params, rounds)
    print(heading, flush=True)
    rows = []
    for new in (lambda: across_calls(params, grads, rounds), lambda: inside_one_call(1024, 3 * rounds)):
        part = new()
        rows += part
        print(table(part), flush=True)
    if not options.quick:
        save("accumulation", heading, rows)


if __name__ == "__main__":
    main()

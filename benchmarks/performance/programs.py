"""The needs of the compiled programs: memory, bytes read and written, kernels. On a GPU also dispatch and bfloat16.

The floor of an AdamW step is seven times the bytes of the parameters: it must read the gradient, the parameters and
both moments, and write the last three. A guard must read the gradient once more before it may write: eight. XLA counts
what each fusion reads and writes, without caches, so a tensor that three fusions read counts three times.
"""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks.performance.measure import Arm, Row, compare, made_arms, number, race, size_of
from benchmarks.performance.waits import wait_rows

__all__ = ["bytes_moved", "gpu_rows", "kernels", "program_rows"]

PyTree = Any
_ADAMW, _GUARDED = 7, 8  # times the parameters: the floors
_AHEAD = 100
_FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}  # what no kernel is launched for
_OPERATION = re.compile(r"^\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"(?:true_computation|false_computation|to_apply|body)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def program_rows(params: PyTree, grads: PyTree) -> list[Row]:
    """Memory and bytes of a step, over the bytes of the parameters."""
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    guarded = og.guard(adamw, og.clip_by_global_norm(1.0), og.skip_nonfinite())
    txs = {
        "bare `optax.adamw`": (adamw,),
        "a guarded step": guarded,
        "`optax.chain(clip, adamw)`": (clipped,),
        "`optax.apply_if_finite` around it": (optax.apply_if_finite(clipped, 5),),
        "a guarded step through `update`": (guarded,),
    }
    bare, ours, *_ = txs
    arms, size = made_arms(txs, params, grads), size_of(params)
    peak = {name: _peak(arm) / size for name, arm in arms.items()}
    moved = {name: bytes_moved(arm.step) / size for name, arm in arms.items()}
    extra, over = "over the parameters", "bytes read and written,"
    rows = [
        number("memory", f"peak memory of a guarded step beyond bare, {extra}", peak[ours] - peak[bare], 0.01),
        *(number("memory", f"peak memory of {name}, {extra}", peak[name]) for name in txs),
        number("bytes", f"{over} guarded over bare (the floors: {_GUARDED / _ADAMW:.3f})", moved[ours] / moved[bare]),
        number("bytes", f"{over} bare over its floor of {_ADAMW} times the parameters", moved[bare] / _ADAMW),
        number("bytes", f"{over} guarded over its floor of {_GUARDED} times the parameters", moved[ours] / _GUARDED),
    ]
    rows += [number("bytes", f"{over} {name} over bare", moved[name] / moved[bare]) for name in list(txs)[2:]]
    return rows + [
        number("bytes", f"kernels launched (fusions, copies, calls) by {name}", kernels(arm.step.as_text()), unit="")
        for name, arm in arms.items()
    ]


def gpu_rows(params: PyTree, grads: PyTree, rounds: int, ahead: int = _AHEAD) -> list[Row]:
    """Does the host wait for the guard? And the same step with bfloat16 parameters."""
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    txs = {"bare `optax.adamw`": (adamw,), "guarded": og.guard(adamw, clip, og.skip_nonfinite())}
    rows, arms = [], made_arms(txs, params, grads)
    t = race(arms, grads, rounds)
    rows.append(
        compare("gpu", "on a GPU: guarded AdamW over bare `optax.adamw`", t["guarded"], t["bare `optax.adamw`"], 1.1)
    )
    for name, arm in arms.items():
        share = np.array([_dispatch_share(arm, grads, ahead) for _ in range(3)])
        low, middle, high = np.percentile(share, [0, 50, 100])
        target = 0.5 if name == "guarded" else None
        what = f"dispatching {ahead} steps, over completing them, {name}"
        rows.append(Row("gpu", what, float(middle), float(low), float(high), target=target))
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half_grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
    t = race(made_arms(txs, halved, half_grads), half_grads, rounds)
    what = "guarded AdamW over bare `optax.adamw`, bfloat16 parameters"
    return [*rows, compare("gpu", what, t["guarded"], t["bare `optax.adamw`"], 1.1), *wait_rows()]


def _dispatch_share(arm: Arm, grads: PyTree, ahead: int) -> float:
    """The host's time until it is free again, over the time until the device is done: 1 if it waits at every step."""
    params, state = (jax.tree.map(jnp.copy, tree) for tree in (arm.params, arm.state))
    params, state = arm.step(params, state, grads)
    jax.block_until_ready((params, state))
    start = time.perf_counter()
    for _ in range(ahead):
        params, state = arm.step(params, state, grads)
    dispatched = time.perf_counter() - start
    jax.block_until_ready((params, state))
    return dispatched / (time.perf_counter() - start)


def _peak(arm: Arm) -> int:
    """Bytes, without those that outputs share with donated arguments."""
    m = arm.step.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def bytes_moved(program: Any) -> float:
    """Bytes that a compiled program reads and writes, by XLA's count."""
    analysis = program.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["bytes accessed"]


def kernels(program: str) -> int:
    """Kernels launched by a compiled program; for a conditional, those of its most expensive branch."""
    bodies: dict[str, list[str]] = {}
    entry = lines = None
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            lines = bodies.setdefault(name, [])
        elif lines is not None:
            lines.append(line)

    def count(name: str) -> int:
        total = 0
        for found in filter(None, map(_OPERATION.match, bodies[name])):
            operation, rest = found[1], found[2]
            called = _CALLED.findall(rest) + [
                x.strip(" %") for each in _BRANCHES.findall(rest) for x in each.split(",")
            ]
            if operation in ("conditional", "call", "while"):
                total += max(map(count, called), default=0)
            elif operation not in _FREE:
                total += 1
        return total

    return count(entry) if entry else 0

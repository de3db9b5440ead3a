"""Many chips: the optimizer step of an 8 B decoder, its tree sharded over all of them (FSDP x tensor parallelism)."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_guard as og
from benchmarks.accelerators.chips import lowered, topology
from benchmarks.accelerators.hlo import Sent, parsed, sent
from benchmarks.accelerators.measure import RESULTS
from benchmarks.accelerators.steps import BARE, EVERY, Step, fast, fast_with_value, plain

__all__ = [
    "PODS",
    "POD_STEPS",
    "Pod",
    "PodRecord",
    "PodRow",
    "missed",
    "pod_parameters",
    "pod_row",
    "read_pods",
    "write_pod",
]

PyTree = Any


class Pod(NamedTuple):
    """Chips in a mesh."""

    title: str
    chip: str
    topology: str
    mesh: tuple[int, int]  # data, model


PODS = {
    "tpu": Pod("256 TPU v5e", "tpu", "v5e:16x16", (32, 8)),
    "gpu": Pod("8 H100", "gpu", "1x1x8", (4, 2)),
}


class PodRow(NamedTuple):
    """A compiled step; bytes and temporaries are those of one chip."""

    name: str
    all_reduces: int
    all_gathers: int
    others: int  # reduce-scatters, all-to-alls, permutations
    sent: int  # bytes that a chip puts into collectives
    temporaries: float  # over the chip's share of the parameters
    conditionals: int
    seconds: float  # of one core, to compile


class PodRecord(NamedTuple):
    """All rows of a pod."""

    pod: str
    rows: dict[str, PodRow]


def pod_parameters(layers: int = 32, width: int = 4096) -> PyTree:
    """Shapes and axes of Llama 3 8B: 8.03 B parameters in 291 leaves. leaf -> (shape, axes)."""
    inner, keys, vocabulary = 7 * width // 2, width // 4, 128_256
    kernel, back, norm = ("data", "model"), ("model", "data"), (("data", "model"),)
    layer = {
        "query": ((width, width), kernel),
        "key": ((width, keys), kernel),
        "value": ((width, keys), kernel),
        "out": ((width, width), back),
        "gate": ((width, inner), kernel),
        "up": ((width, inner), kernel),
        "down": ((inner, width), back),
        "attention_norm": ((width,), norm),
        "mlp_norm": ((width,), norm),
    }
    ends = {
        "embedding": ((vocabulary, width), back),
        "final_norm": ((width,), norm),
        "head": ((width, vocabulary), kernel),
    }
    return ends | {f"layer_{i}": layer for i in range(layers)}


def _clip() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def _guard() -> optax.GradientTransformation:
    return og.guard(optax.adamw(1e-3), og.clip_by_global_norm(1.0))


CLIP, GUARD = "`optax.chain(clip, adamw)`", "`guard(adamw, clip)`"
STABILIZE = "`stabilize(adamw, max_change=None)` with `value=`"
POD_STEPS = (
    Step(BARE, lambda: optax.adamw(1e-3), plain),
    Step(CLIP, _clip, plain),
    Step(GUARD, _guard, fast),
    Step(STABILIZE, lambda: og.stabilize(optax.adamw(1e-3), max_change=None), fast_with_value),
    Step("`accumulate(guard(adamw, clip), 4)`", lambda: og.accumulate(_guard(), EVERY), fast),
    Step("`stabilize(adamw)` with `value=`", lambda: og.stabilize(optax.adamw(1e-3)), fast_with_value),
)


def pod_row(step: Step, pod: Pod, tree: PyTree) -> PodRow:
    """Compiles the step for all chips and counts."""
    mesh = Mesh(topology(pod.chip, pod.topology).reshape(pod.mesh), ("data", "model"))
    whole = NamedSharding(mesh, PartitionSpec())

    def at(leaf: tuple[tuple[int, ...], tuple[Any, ...]]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf[0], jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*leaf[1])))

    params = jax.tree.map(at, tree, is_leaf=lambda x: isinstance(x, tuple))
    tx = step.tx()
    state = optax.tree.map_params(
        tx,
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )
    program = lowered(step.take(tx), (params, state, params, jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)))
    start = time.process_time()
    program = program.compile()
    seconds = time.process_time() - start
    hlo = parsed(program.as_text())
    share = sum(4 * x.size for x in jax.tree.leaves(params)) / mesh.size
    found: Sent = sent(hlo)
    return PodRow(
        step.name,
        *found,
        temporaries=round(program.memory_analysis().temp_size_in_bytes / share, 4),
        conditionals=sum(
            each.operation == "conditional" for body in hlo.computations.values() for each in body.values()
        ),
        seconds=round(seconds, 1),
    )


def missed(row: PodRow, rows: dict[str, PodRow]) -> list[str]:
    """What is above the bounds of `guard` and `stabilize`: Optax's clip, and 1.25 times bare to compile."""
    if row.name not in (GUARD, STABILIZE) or not {CLIP, BARE} <= set(rows):
        return []
    clip, bare = rows[CLIP], rows[BARE]
    limits = {
        "all_reduces": clip.all_reduces,
        "all_gathers": 0,
        "temporaries": clip.temporaries + 0.005,
        "seconds": 1.25 * bare.seconds,
    }
    return [name for name, limit in limits.items() if getattr(row, name) > limit]


def write_pod(record: PodRecord, folder: Path = RESULTS) -> None:
    """As JSON, one row a line."""
    rows = ",\n".join("  " + json.dumps(row._asdict()) for row in record.rows.values())
    setting = {"jax": jax.__version__, "optax": optax.__version__}
    path = folder / f"accelerators-pod-{record.pod}.json"
    path.write_text(f'{{\n "setting": {json.dumps(setting)},\n "rows": [\n{rows}\n ]\n}}\n')


def read_pods(folder: Path = RESULTS) -> list[PodRecord]:
    """Those that have been compiled for."""
    records = []
    for key in PODS:
        path = folder / f"accelerators-pod-{key}.json"
        if path.exists():
            rows = [PodRow(**row) for row in json.loads(path.read_text())["rows"]]
            records.append(PodRecord(key, {row.name: row for row in rows}))
    return records

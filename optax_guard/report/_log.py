"""Reads a guard's record from a live state, a saved log or an Orbax checkpoint."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.new_params import QKClipState
from optax_guard._common.tree import field_array, find_states
from optax_guard._common.typing import PyTree
from optax_guard._guard import GuardState
from optax_guard._step.reading import SeenLeaves, axes_in_front, leaf_names, seen_names
from optax_guard._step.record import FlightRecorder, read_rows
from optax_guard.report._logits import LogitLog, logit_log
from optax_guard.rules._record_leaves import LeafLog, LeafRecordState, decoded_leaf_log, leaf_log
from optax_guard.state._counts import COUNTED, COUNTERS, Count, counts
from optax_guard.state._metrics import flight_log

__all__ = ["TrainingLog", "leaf_label", "load", "load_checkpoint", "load_log", "read_log", "save_log"]

_TOTALS = ("guard_step", "clipped_total", "skipped_total", "nonfinite_total", "let_through_total", "halted")
_FORMAT = "optax_guard log 1"
_ONE_MEMBER = (
    "report: this is the state of many runs at once (`vmap`, `pmap`), and a report covers one: pass one member, "
    "`jax.tree.map(lambda x: x[0], state)`."
)


class TrainingLog(NamedTuple):
    """A guard's record, on the host."""

    rows: np.ndarray  # as `flight_log` returns them, oldest first
    names: list[str]  # names of the leaves; empty if neither known nor recorded
    leaves: LeafLog | None  # None without `record_leaves`
    totals: dict[str, int]  # the guard's counters over the whole run
    logits: LogitLog | None = None  # of attention; None if no step was given `max_logits=`
    counts: tuple[Count, ...] = ()  # of what was done outside the guard, over the whole run


def read_log(state: optax.OptState, params: PyTree | None = None) -> TrainingLog:
    """Reads the log from a live state.

    Args:
      state: an optimizer state that holds one guard.
      params: the parameters, for the names of the leaves.

    Returns:
      A `TrainingLog`.

    Raises:
      ValueError: `state` holds no guard or more than one, or `params` belong to another model.
    """
    guards = find_states(state, GuardState)
    if not guards:
        raise ValueError(
            "report: there is no guard in this state. Wrap the optimizer in og.guard(optimizer, ...) and pass the "
            "state that its steps return."
        )
    if axes_in_front(guards[0].guard_step) > 0:
        raise ValueError(_ONE_MEMBER)
    rows = flight_log(state)
    leaves = leaf_log(state, params) if find_states(state, LeafRecordState) else None
    names = leaves.names if leaves is not None else [] if params is None else leaf_names(params, state)
    totals = {name: int(jax.device_get(field_array(getattr(guards[0], name)))) for name in _TOTALS}
    clips = [
        (float(field_array(each.qk_clip_threshold)), {k: field_array(x) for k, x in each.qk_clip_max_logits.items()})
        for each in find_states(state, QKClipState)
    ]
    counted = _as_numbers(counts(find_states(state, COUNTED)))
    return _checked(TrainingLog(rows, names, leaves, totals, logit_log(rows, clips, params), counted))


def save_log(path: str | Path, state: optax.OptState, params: PyTree | None = None) -> Path:
    """Saves the log of a state as a small file.

    Args:
      path: the file to write; `.npz` is added if it has no suffix.
      state: as in `read_log`.
      params: as in `read_log`.

    Returns:
      The path of the file.
    """
    log = read_log(state, params)
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".npz")
    columns: dict[str, Any] = {f"row_{name}": log.rows[name] for name in log.rows.dtype.names or ()}
    leaves: dict[str, Any] = (
        {} if log.leaves is None else {"leaf_steps": log.leaves.steps, "leaf_norms": log.leaves.norms}
    )
    totals: dict[str, Any] = {f"total_{name}": np.array(number) for name, number in log.totals.items()}
    logits: dict[str, Any] = {}
    if log.logits is not None:
        logits = {
            "logit_layers": np.array(log.logits.layers, "U"),
            "threshold_layers": np.array(list(log.logits.thresholds), "U"),
            "thresholds": np.array(list(log.logits.thresholds.values()), np.float64),
        }
    counted: dict[str, Any] = {
        "counters": np.array([count.counter.total for count in log.counts], "U"),
        "counts": np.array([count.total for count in log.counts], np.int64),
        "scales": np.array([np.nan if count.scale is None else count.scale for count in log.counts], np.float64),
    }
    parts = columns | leaves | totals | logits | counted
    with path.open("wb") as file:
        np.savez_compressed(file, format=np.array(_FORMAT), names=np.array(log.names, "U"), **parts)
    return path


def load_log(path: str | Path) -> TrainingLog:
    """Reads a file that `save_log` wrote.

    Args:
      path: the file.

    Returns:
      A `TrainingLog`.

    Raises:
      ValueError: the file is missing, damaged, or was written by another program.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            parts = {name: file[name] for name in file.files}
        if str(parts["format"]) != _FORMAT:
            raise KeyError("format")
        columns = {name.removeprefix("row_"): parts[name] for name in parts if name.startswith("row_")}
        rows = np.zeros(len(columns["step"]), dtype=[(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            rows[name] = column
        names = [str(name) for name in parts["names"]]
        leaves = LeafLog(parts["leaf_steps"], parts["leaf_norms"], names) if "leaf_steps" in parts else None
        totals = {name: int(parts[f"total_{name}"]) for name in _TOTALS}
        logits = None
        if "logit_layers" in parts:
            thresholds = dict(zip(parts["threshold_layers"].tolist(), parts["thresholds"].tolist(), strict=True))
            logits = LogitLog(tuple(parts["logit_layers"].tolist()), thresholds)
        counters = {counter.total: counter for counter in COUNTERS}
        shown = (parts[name].tolist() for name in ("counters", "counts", "scales"))
        counted = tuple(
            Count(counters[field], counters[field].name, total, scale if counters[field].scale else None, None)
            for field, total, scale in zip(*shown, strict=True)
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no log of optax_guard, or it is damaged: save it with "
            "optax_guard.report.save_log(path, state, params)"
        ) from error
    return _checked(TrainingLog(rows, names, leaves, totals, logits, counted))


def load_checkpoint(path: str | Path) -> TrainingLog:
    """Reads the log from an Orbax checkpoint, without the program that wrote it.

    Leaves are named after the parameters if the checkpoint holds them under "params" as nested dicts, as in Flax and
    plain JAX; otherwise they are numbered.

    Args:
      path: a checkpoint, or the folder of a `CheckpointManager`, whose latest step is read. Its items may have any
        names; one of them holds the optimizer's state, and the parameters are those in an item called "params".

    Returns:
      A `TrainingLog`.

    Raises:
      ValueError: there is no checkpoint, or it is damaged or holds no guard.
      ImportError: orbax-checkpoint is missing.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint folder {path}")
    tree = _tree_in(path)
    guards = _guards(tree)
    if len(guards) != 1:
        found = "no guard" if not guards else f"{len(guards)} guards"
        raise ValueError(
            f"the checkpoint {path} holds {found} of optax_guard; the optimizer must be wrapped in og.guard(...) when "
            "it is saved, and its state must be part of the checkpoint"
        )
    guard = guards[0]
    if np.ndim(_array(guard["guard_step"])) > 0:
        raise ValueError(_ONE_MEMBER)
    recorder = guard["recorder"]
    rows = read_rows(FlightRecorder(jnp.asarray(_array(recorder["numbers"])), jnp.asarray(_array(recorder["codes"]))))
    records = [node for node in _nodes(guard["rule_states"]) if {"recorded_norms", "recorded_steps"} <= node.keys()]
    seen = SeenLeaves(jnp.asarray(_array(guard["seen_leaves"]["path_hashes"])))
    params = next((node["params"] for node in _nodes(tree) if "params" in node), None)
    names = [] if params is None else seen_names(seen, params)
    leaves = None
    if len(records) == 1:
        coded = _array(records[0]["recorded_norms"])
        names = names if len(names) == coded.shape[1] else []
        leaves = decoded_leaf_log(coded, int(_array(records[0]["recorded_steps"])), names or None)
        names = leaves.names
    totals = {name: int(_array(guard[name])) for name in _TOTALS}
    clips = [
        (float(_array(node["qk_clip_threshold"])), {k: _array(x) for k, x in node["qk_clip_max_logits"].items()})
        for node in _nodes(tree)
        if {"qk_clip_threshold", "qk_clip_max_logits"} <= node.keys()
    ]
    found = [
        Count(counter, "", _array(node[counter.total]), _array(node[counter.scale]) if counter.scale else None, None)
        for counter in COUNTERS
        for node in _nodes(tree)
        if counter.total in node and _is_number(node[counter.total])
    ]
    return _checked(TrainingLog(rows, names, leaves, totals, logit_log(rows, clips, params), _as_numbers(found)))


def load(path: str | Path) -> TrainingLog:
    """`load_checkpoint` for a folder, `load_log` for a file.

    Args:
      path: the folder or file.

    Returns:
      A `TrainingLog`.
    """
    return load_checkpoint(path) if Path(path).is_dir() else load_log(path)


def leaf_label(names: list[str], leaf: int) -> str:
    """The name of leaf number `leaf`; empty for -1."""
    return names[leaf] if 0 <= leaf < len(names) else "" if leaf < 0 else f"leaf {leaf}"


def _as_numbers(found: list[Count]) -> tuple[Count, ...]:
    """The counts as numbers, those of one counter by size: a checkpoint does not keep the order of its states."""
    numbers = [
        Count(
            x.counter, x.counter.name, int(np.max(x.total)), None if x.scale is None else float(np.min(x.scale)), None
        )
        for x in found
    ]
    return tuple(sorted(numbers, key=lambda count: (COUNTERS.index(count.counter), -count.total, count.scale or 0.0)))


def _checked(log: TrainingLog) -> TrainingLog:
    if len(log.rows) == 0:
        raise ValueError("report: the guard has recorded nothing yet; take a step first.")
    return log


def _tree_in(path: Path) -> Any:
    """The checkpoint: `path` itself, or the latest step in a manager's folder, with all its named items.

    Of several items, those that hold a guard are read; of the others, the shapes are enough for the leaves' names.
    """
    steps = sorted(
        (each for each in path.iterdir() if each.is_dir() and each.name.isdigit()), key=lambda p: int(p.name)
    )
    if steps:
        path = steps[-1]
    if (path / "_METADATA").exists():
        return _read(path)
    items = [each for each in sorted(path.iterdir()) if (each / "_METADATA").exists()]
    if not items:
        raise ValueError(f"{path} is no Orbax checkpoint: there is no _METADATA in it")
    if len(items) == 1:
        return _read(items[0])
    shapes = {item.name: _read(item, shapes_only=True) for item in items}
    return {name: _read(path / name) if _guards(tree) else tree for name, tree in shapes.items()}


def _read(path: Path, *, shapes_only: bool = False) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "reading a checkpoint needs orbax-checkpoint: pip install orbax-checkpoint, or save the log with "
            "optax_guard.report.save_log and read that"
        ) from error
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            shapes = checkpointer.metadata(path)
            shapes = getattr(shapes, "item_metadata", shapes)
            shapes = getattr(shapes, "tree", shapes)
            if shapes_only:
                return shapes
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # a damaged or foreign folder can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the checkpoint {path} cannot be read: {reason}") from error


def _guards(tree: Any) -> list[dict[str, Any]]:
    return [node for node in _nodes(tree) if {"recorder", "guard_step", "guarded_state"} <= node.keys()]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every dict in a restored tree, outermost first."""
    if isinstance(tree, dict):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    for child in children:
        yield from _nodes(child)


def _is_number(node: Any) -> bool:
    """Whether an item of a checkpoint was read, and not only its shapes."""
    return np.issubdtype(_array(node).dtype, np.number)


def _array(node: Any) -> np.ndarray:
    """The array in `node`; flax.nnx saves each array in a dict of its own."""
    while isinstance(node, dict) and len(node) == 1:
        node = next(iter(node.values()))
    return np.asarray(node)

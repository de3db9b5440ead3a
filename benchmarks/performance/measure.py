"""How costs are measured: arms take turns, and a row is the median of their ratios, round by round.

Machines are shared and noisy, so the arms of a row take turns, and a row is the median of the ratios of single rounds
with their quartiles. Each arm owns its donated parameters and state; all arms share the gradients.
Times in seconds are meaningful only on one machine; ratios carry over.
"""

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og

__all__ = [
    "Arm",
    "Row",
    "compare",
    "made_arms",
    "make_arm",
    "memory",
    "number",
    "on_cpu",
    "race",
    "say",
    "series_row",
    "size_of",
    "take_turns",
    "transformer_tree",
    "versions",
]

PyTree = Any
_START = time.monotonic()
_LEAST_SECONDS = 0.03  # a turn lasts at least this long, so that a clock's grain and a call's overhead do not show
_WARM_UP = 2  # rounds that do not count


class Row(NamedTuple):
    """One line of the record."""

    part: str
    what: str
    value: float
    low: float  # quartiles of the ratios of single rounds
    high: float
    unit: str = "x"  # x: a ratio
    target: float | None = None
    at_least: bool = False  # the target is a floor, not a ceiling
    series: str = ""  # the curve that it is a point of
    at: float = 0.0  # where on that curve

    @property
    def met(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


class Arm(NamedTuple):
    """A compiled step with the buffers it owns."""

    step: Any  # jax.stages.Compiled: (params, state, grads) -> (params, state)
    params: PyTree
    state: PyTree


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {time.monotonic() - _START:5.0f} s  {text}", file=sys.stderr, flush=True)


def transformer_tree(width: int, layers: int, vocabulary: int, dtype: Any = np.float32) -> PyTree:
    """Parameters in the shapes of a decoder-only transformer, 16 leaves a layer."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(
        2**16, np.float32
    )  # over and over: drawing 300 M takes long

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(np.resize(noise, shape), dtype)

    def layer() -> PyTree:
        attention = {name: {"kernel": normal(width, width), "bias": normal(width)} for name in "qkvo"}
        norms = {name: {"scale": normal(width), "bias": normal(width)} for name in ("norm_1", "norm_2")}
        mlp = {"up": normal(width, 4 * width), "down": normal(4 * width, width)}
        return attention | norms | {"mlp": mlp | {"up_bias": normal(4 * width), "down_bias": normal(width)}}

    blocks = {f"layer_{i}": layer() for i in range(layers)}
    return {"embedding": normal(vocabulary, width), "final_norm": normal(width), **blocks}


def make_arm(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, fast: bool = True) -> Arm:
    """Compiles one step, with parameters and state donated."""
    return _live(_lowered(tx, params, grads, fast).compile(), tx, params)


def made_arms(txs: dict[str, Any], params: PyTree, grads: PyTree) -> dict[str, Arm]:
    """Arms by name; those of plain Optax are given as (transformation,) and go through `update`."""
    given = {name: (tx[0], False) if type(tx) is tuple else (tx, True) for name, tx in txs.items()}
    lowered = {name: _lowered(tx, params, grads, fast) for name, (tx, fast) in given.items()}

    def compiled(name: str) -> Any:
        program = lowered[name].compile()
        say(f"compiled {name}")
        return program

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:  # XLA uses more than one core for each
        programs = dict(zip(given, pool.map(compiled, given), strict=True))
    return {name: _live(programs[name], tx, params) for name, (tx, _) in given.items()}


def _lowered(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, fast: bool) -> Any:
    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        if fast:
            return og.apply_gradients(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), grads)


def _live(program: Any, tx: optax.GradientTransformation, params: PyTree) -> Arm:
    """With buffers of its own."""
    params = jax.tree.map(jnp.copy, params)
    return Arm(program, params, jax.tree.map(jnp.copy, tx.init(params)))  # a state may hold the parameters themselves


def race(
    arms: dict[str, Arm], grads: PyTree, rounds: int, calls: int = 0, only: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Seconds per step, arm and round. A turn is `calls` steps; 0: as many as make a turn long enough.

    The arms in `arms` are replaced by where they came to, so that they can race again.
    """
    names = only or tuple(arms)

    def turn(name: str, steps: int) -> None:
        step, params, state = arms[name]
        for _ in range(steps):
            params, state = step(params, state, grads)
        arms[name] = Arm(step, jax.block_until_ready(params), jax.block_until_ready(state))

    if not calls:
        turn(names[0], 1)
        start = time.perf_counter()
        turn(names[0], 1)
        calls = max(1, int(np.ceil(_LEAST_SECONDS / (time.perf_counter() - start))))
    seconds = take_turns({name: lambda name=name: turn(name, calls) for name in names}, rounds)
    return {name: times / calls for name, times in seconds.items()}


def take_turns(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per turn and round; each round begins with another turn, as what comes first may be at an advantage."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds + _WARM_UP):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            turns[name]()
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    say(f"{rounds} rounds of {', '.join(names)}")
    return {name: np.array(times) for name, times in seconds.items()}


def compare(
    part: str, what: str, times: np.ndarray, base: np.ndarray, target: float | None = None, at_least: bool = False
) -> Row:
    """The median of the ratios of single rounds, with their quartiles."""
    low, middle, high = (float(x) for x in np.percentile(times / base, [25, 50, 75]))
    return Row(part, what, middle, low, high, target=target, at_least=at_least)


def number(part: str, what: str, value: float, target: float | None = None, unit: str = "x") -> Row:
    """What has no spread: bytes and counts."""
    return Row(part, what, float(value), float(value), float(value), unit, target)


def series_row(part: str, series: str, at: float, values: np.ndarray, unit: str) -> Row:
    """A point of a curve: median and quartiles."""
    low, middle, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    return Row(part, f"{series}, {at:g}", middle, low, high, unit, series=series, at=float(at))


def on_cpu(target: float) -> float | None:
    """A target that says something about XLA on CPUs, and nothing about it elsewhere."""
    return target if jax.default_backend() == "cpu" else None


def memory() -> int:
    """Bytes of the device's memory that arrays may take."""
    statistics = jax.devices()[0].memory_stats() or {}  # a CPU has none
    return statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def size_of(tree: PyTree) -> int:
    """Bytes."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def versions() -> dict[str, str]:
    """What was measured, on what."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind}, {_processor()}" if device.platform == "cpu" else device.device_kind,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, where Linux tells it, and its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"

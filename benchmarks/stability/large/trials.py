"""Trains many lanes of one trial at once, in chunks, and goes on where it was stopped.

A trial is one compiled program: its lanes (a seed, a learning rate and a bound each) are one `vmap`, the steps of a
chunk one `lax.scan`. After every chunk the clock is read; when time is up, everything needed to go on is written to
disk, whatever the device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Lanes(NamedTuple):
    """The runs that are trained at once: [lanes] each; one of them under `vmap`."""

    seed: Any  # i32
    rate: Any  # f32, the peak learning rate
    bound: Any  # f32, relative to the parameters; Inf without


class Trial(NamedTuple):
    """One training, as functions of a lane."""

    steps: int
    start: Callable[[Lanes], PyTree]  # everything that the training carries along
    step: Callable[[Lanes, PyTree, Any], tuple[PyTree, Any]]  # of the index of the step too; (carry, (loss, norm))
    evaluate: Callable[[Lanes, PyTree], tuple[Any, Any]]  # (held-out loss, whether the parameters are finite)


class Runs(NamedTuple):
    """What was measured. The first three: [lanes]; the others: [steps, lanes]."""

    initial: np.ndarray
    final: np.ndarray
    finite: np.ndarray
    loss: np.ndarray
    norm: np.ndarray


def grid(seeds: int, rates: tuple[float, ...], bounds: tuple[float, ...]) -> Lanes:
    """Every seed at every rate and bound; rates vary fastest, bounds slowest."""
    bound, seed, rate = np.meshgrid(np.float32(bounds), np.arange(seeds), np.float32(rates), indexing="ij")
    return Lanes(seed.ravel().astype(np.int32), rate.ravel(), bound.ravel())


def chunk_of(steps: int) -> int:
    """Steps between two looks at the clock: a divisor of their number, so that one program is compiled."""
    return next(steps // parts for parts in (10, 5, 4, 3, 2, 1) if steps % parts == 0)


def run(trial: Trial, lanes: Lanes, file: Path, over: Callable[[], bool], tell: Callable[[str], None]) -> Runs | None:
    """Trains all lanes; None if time was `over` first: then `file` has what the next call goes on from."""
    start, evaluate = jax.jit(jax.vmap(trial.start)), jax.jit(jax.vmap(trial.evaluate))

    def several(carry: PyTree, indices: jax.Array) -> Any:
        return jax.lax.scan(lambda c, i: jax.vmap(trial.step, (0, 0, None))(lanes, c, i), carry, indices)

    advance = jax.jit(several, donate_argnums=0)
    # Without sharing of buffers between leaves, which donation does not allow (schedule-free keeps a copy).
    carry = jax.tree.map(lambda x: x.copy(), start(lanes))
    initial, _ = jax.device_get(evaluate(lanes, carry))
    loss, norm = (np.zeros((0, len(lanes.seed)), np.float32) for _ in range(2))
    if file.exists():
        with np.load(file) as saved:
            loss, norm = saved["loss"], saved["norm"]
            leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(jax.tree.leaves(carry)))]
        carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
    while len(loss) < trial.steps:
        if over():
            file.parent.mkdir(parents=True, exist_ok=True)
            leaves = jax.device_get(jax.tree.leaves(carry))
            np.savez(file, loss=loss, norm=norm, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)})
            return None
        carry, seen = advance(carry, jnp.arange(len(loss), len(loss) + chunk_of(trial.steps)))
        loss, norm = (np.concatenate([old, new]) for old, new in zip((loss, norm), jax.device_get(seen), strict=True))
        tell(f"{len(loss)} of {trial.steps} steps, median loss {np.nanmedian(loss[-1]):.3f}")
    final, finite = jax.device_get(evaluate(lanes, carry))
    file.unlink(missing_ok=True)
    return Runs(initial, final, finite, loss, norm)

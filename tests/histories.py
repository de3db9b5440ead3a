"""Random histories of gradient norms, and rules run over hundreds of them in one jitted scan.

A history is a row of log norms; the usual norm is 1 (log 0) before anything happens to it. NaN stands for a gradient
that is not finite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compiling import quick_jit
from jax import lax

import optax_guard as og

__all__ = ["KINDS", "LARGEST", "Run", "judge_norm", "noise", "runner", "with_bad_steps", "with_burst", "with_shift"]

LARGEST = 60.0  # a probe, in logs: a norm no threshold can reach


def lognormal(rng: np.random.Generator, size: tuple[int, int], deviation: float) -> np.ndarray:
    return deviation * rng.standard_normal(size)


def autoregressive(rng: np.random.Generator, size: tuple[int, int], deviation: float, phi: float = 0.9) -> np.ndarray:
    steps = rng.standard_normal(size)
    x = np.empty(size)
    x[:, 0] = steps[:, 0]
    for t in range(1, size[1]):
        x[:, t] = phi * x[:, t - 1] + np.sqrt(1 - phi**2) * steps[:, t]
    return deviation * x


def student(rng: np.random.Generator, size: tuple[int, int], scale: float) -> np.ndarray:
    return scale * rng.standard_t(3, size)


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    **{f"lognormal {s}": lambda rng, size, s=s: lognormal(rng, size, s) for s in (0.05, 0.2, 0.4, 0.7)},
    **{f"AR(1) {s}": lambda rng, size, s=s: autoregressive(rng, size, s) for s in (0.2, 0.4, 0.7)},
    **{f"Student {s}": lambda rng, size, s=s: student(rng, size, s) for s in (0.1, 0.2, 0.4)},
}


def noise(histories: int, steps: int, seed: int = 0) -> np.ndarray:
    """f64[10 * histories, steps]: so many histories of each kind, kind after kind."""
    rng = np.random.default_rng(seed)
    return np.concatenate([draw(rng, (histories, steps)) for draw in KINDS.values()])


def with_burst(logs: np.ndarray, starts: Any, lengths: Any, sizes: Any) -> np.ndarray:
    """Spikes of log size `sizes` (one per history, or one for all) over `lengths` steps from `starts` on."""
    starts, lengths, sizes = (np.broadcast_to(x, len(logs))[:, None] for x in (starts, lengths, sizes))
    t = np.arange(logs.shape[1])
    return np.where((t >= starts) & (t < starts + lengths), logs + sizes, logs)


def with_shift(logs: np.ndarray, at: int, size: Any) -> np.ndarray:
    """A lasting change of level by log `size` from step `at` on."""
    moved = logs.copy()
    moved[:, at:] += np.reshape(size, (-1, 1))
    return moved


def with_bad_steps(logs: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """NaN or Inf in so many of the steps, the first included."""
    rng = np.random.default_rng(seed)
    bad = rng.random(logs.shape) < share
    return np.where(bad, np.where(rng.random(logs.shape) < 0.5, np.nan, np.inf), logs)


class Run(NamedTuple):
    """What a rule did: all of shape [histories, steps]."""

    passed: np.ndarray  # log of the norm that passed; -inf for a step that was skipped
    touched: np.ndarray  # bool: scaled or skipped
    threshold: np.ndarray  # log of the largest norm that would have passed at this step
    state: Any  # after the last step, one row per history


def judge_norm(rule: og.Rule, log_norm: jax.Array, state: Any, **extra: Any) -> tuple[jax.Array, jax.Array, Any]:
    """(log of what passes, touched, new state) for a gradient of one leaf with this log norm."""
    norm = jnp.exp(log_norm.astype(jnp.float32))
    finite = jnp.isfinite(norm)
    statistics = og.rules.GradientStatistics(
        sum_squares=jnp.where(finite, 1, norm).reshape(1), magnitude=jnp.where(finite, norm, 1).reshape(1)
    )
    verdict, new = rule.judge(statistics, state, None, **extra)
    scale = jnp.min(verdict.scale).astype(jnp.float32)
    passed = jnp.where(verdict.skip, -jnp.inf, log_norm.astype(jnp.float32) + jnp.log(scale))
    return passed, verdict.skip | (scale < 1), new


def runner(rule: og.Rule, probes: Any = (LARGEST,), like: Any = None) -> Callable[[np.ndarray], Run]:
    """A function that runs the rule over all rows of `log norms[histories, steps]`; compiled once per shape.

    `probes` are the log norms tried for the threshold: one large one is enough for a clip, whatever it lets through of
    that is what it lets through at most; a rule that skips needs a grid.
    """
    like = {"w": np.zeros(1, np.float32)} if like is None else like
    tried = np.asarray(probes, np.float32)

    def one(state: Any, log_norm: jax.Array) -> tuple[Any, Any]:
        passed, touched, new = judge_norm(rule, log_norm, state)
        threshold = jnp.max(jax.vmap(lambda probe: judge_norm(rule, probe, state)[0])(tried))
        return new, (passed, touched, threshold)

    @quick_jit
    def run(logs: jax.Array) -> Any:
        state = rule.init(like)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (logs.shape[0], *x.shape)), state)
        return lax.scan(jax.vmap(one), states, logs.T)

    def call(logs: np.ndarray) -> Run:
        state, (passed, touched, threshold) = jax.device_get(run(np.asarray(logs, np.float32)))
        return Run(passed=passed.T, touched=touched.T, threshold=threshold.T, state=state)

    return call

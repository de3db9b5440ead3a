"""What `skip_spikes` and its published form refuse: simulated histories, the library's own code in the loop.

    python benchmarks/spike_skipping.py             # five minutes on two busy cores
    python benchmarks/spike_skipping.py --quick     # few histories: checks that it runs

Every history is judged twice: as the norm of a gradient and as a loss. The level is 1 (for the loss also 2.5 +- 0.05)
before the event, at step 500 of 1 000.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optax_guard as og

EVENT = 500
FORMS = {"published": og.published.skip_spikes, "repaired": og.skip_spikes}


def judged(on: str, form: str) -> Callable[[np.ndarray], np.ndarray]:
    """Histories -> which steps the rule refuses."""
    rule = FORMS[form](on=on)

    def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        bad = (on == "norm") & ~jnp.isfinite(x)
        statistics = og.rules.GradientStatistics(
            sum_squares=jnp.where(bad, jnp.nan, 1.0)[None],
            magnitude=jnp.where(bad | (on == "loss"), 1.0, x)[None],
        )
        verdict, state = rule.judge(statistics, state, None, value=x)
        return state, verdict.skip

    run = jax.jit(jax.vmap(lambda xs: jax.lax.scan(step, rule.init(None), xs)[1]))
    return lambda histories: np.asarray(run(jnp.asarray(histories, jnp.float32)))


def noises(rng: np.random.Generator, histories: int, steps: int) -> dict[str, np.ndarray]:
    """Logarithms of healthy histories."""
    normal = rng.standard_normal((histories, steps))
    correlated = np.empty_like(normal)
    correlated[:, 0] = normal[:, 0]
    for t in range(1, steps):
        correlated[:, t] = 0.9 * correlated[:, t - 1] + np.sqrt(1 - 0.9**2) * normal[:, t]
    student = rng.standard_t(3, (histories, steps))
    time = np.arange(steps)
    return {
        **{f"lognormal, log-sd {s}": s * normal for s in (0.05, 0.2, 0.4, 0.7, 1.5)},
        "autoregressive, 0.4": 0.4 * correlated,
        "autoregressive, 0.7": 0.7 * correlated,
        "Student t (3), 0.2": np.clip(0.2 * student, -20, 20),
        "Student t (3), 0.4": np.clip(0.4 * student, -20, 20),
        "falls x100 in 300 steps": 0.2 * normal - np.log(100) * np.minimum(time / 300, 1),
        "rises x1000 in all": 0.2 * normal + np.log(1000) * time / steps,
    }


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What skip_spikes refuses, published and repaired.")
    parser.add_argument("--quick", action="store_true", help="few histories")
    options = parser.parse_args(arguments)
    logs = noises(np.random.default_rng(0), 10 if options.quick else 200, 2 * EVENT)
    rules = {f"{on}, {form}": judged(on, form) for on in ("norm", "loss") for form in FORMS}

    def line(what: str, histories: np.ndarray, show: Callable[[np.ndarray], str]) -> None:
        print(f"{what:46s}" + "".join(f"{show(rule(histories)):>18s}" for rule in rules.values()), flush=True)

    def head(text: str) -> None:
        print(f"\n{text:46s}" + "".join(f"{name:>18s}" for name in rules))

    def shifted(log: np.ndarray, factor: float, first: int = EVENT, last: int | None = None) -> np.ndarray:
        log = log.copy()
        log[:, first:last] += np.log(factor)
        return np.exp(log)

    head("healthy steps refused, %: all / first 128 / worst")
    for name, log in logs.items():
        line(
            name,
            np.exp(log),
            lambda r: f"{100 * r.mean():.2f} /{100 * r[:, :128].mean():.2f} /{100 * r.mean(1).max():.1f}",
        )
    line("loss 2.5, sd 0.05", 2.5 + logs["lognormal, log-sd 0.05"], lambda r: f"{100 * r.mean():.2f}")

    head("lasting rise: steps refused, median / worst")
    for name in ("lognormal, log-sd 0.2", "lognormal, log-sd 0.7", "autoregressive, 0.7", "Student t (3), 0.4"):
        for factor in (2, 10, 100):
            count = lambda r: f"{np.median(r[:, EVENT:].sum(1)):.0f} / {r[:, EVENT:].sum(1).max()}"  # noqa: E731
            line(f"{name}: x{factor}", shifted(logs[name], factor), count)

    head("of 5 spikes x1e3, then of 1 spike x800, refused")
    for name in ("lognormal, log-sd 0.2", "lognormal, log-sd 0.7", "autoregressive, 0.7"):
        spikes = np.log(shifted(logs[name], 1000, EVENT, EVENT + 5))
        both = shifted(spikes, 800, EVENT + 15, EVENT + 16)
        line(name, both, lambda r: f"{r[:, EVENT : EVENT + 5].sum(1).mean():.2f}, {r[:, EVENT + 15].mean():.2f}")
    quiet = logs["lognormal, log-sd 0.2"]
    line(
        "8 spikes x1e3 in steps 2 to 9, then x100 at 100",
        shifted(np.log(shifted(quiet, 1000, 2, 10)), 100, 100, 101),
        lambda r: f"{r[:, 100].mean():.2f}",
    )

    head("healthy steps refused after the event")
    broken = np.exp(quiet)
    broken[:, EVENT] = np.nan
    line("one NaN", broken, lambda r: f"{r[:, EVENT + 1 :].sum(1).mean():.1f}")
    huge = np.exp(quiet)
    huge[:, EVENT] = 1e30
    line("one 1e30", huge, lambda r: f"{r[:, EVENT + 1 :].sum(1).mean():.1f}")
    wider = np.concatenate([0.05 * quiet[:, :EVENT] / 0.2, 0.7 * quiet[:, EVENT:] / 0.2], axis=1)
    line("noise widens from log-sd 0.05 to 0.7", np.exp(wider), lambda r: f"{r[:, EVENT:].sum(1).mean():.1f}")


if __name__ == "__main__":
    main()

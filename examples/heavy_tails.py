"""Regression on heavy-tailed data: which clip helps, which one distorts, and how to tell them apart.

    python examples/heavy_tails.py            # a minute or two on two cores; prints two tables
    python examples/heavy_tails.py --quick    # a short mode, to see that it runs

The data are from the RAND Health Insurance Experiment, in statsmodels: 20 190 person-years. An MLP predicts the number
of visits to a doctor (mean 2.9, median 1, at most 77) by squared error. Like the visits, the gradient of a small batch
is heavy-tailed. These tails are real data; a clip that cuts them moves the prediction from the mean towards the median.
In the second table, one batch in a hundred also contains a typing error, a number of visits times 1000. Only this
should be cut.

How to read the tables: `unexplained` is the mean squared error on held-out persons as a fraction of their variance: 1
is as good as predicting the mean, and lower is better. `bias` is the mean prediction minus the true mean, in visits.
Both are means over seeds (data split, initial weights, batches), with the standard deviation over the seeds.

Results: at the good learning rate, training without a clip is as good as with any. `clip_by_norm_history` leaves the
tails alone (it clips 0.1 % of the steps) but not the typing errors, and its bias is the same with them as without; the
fixed clip at 1 touches every step and predicts 0.35 visits too few. At ten times that rate only the fixed clip at 1
helps: it bounds every step and so compensates for the learning rate, which no clip relative to the history can do (but
a bound on the step can, as `stabilize` has it).
"""

import argparse
import itertools
import sys
from typing import Any, NamedTuple

try:
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from statsmodels.datasets import randhie
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og

BATCH = 16
HELD_OUT = 4000
LEARNING_RATES = (1e-3, 1e-2)  # of SGD with momentum: one that is good, one that is too large for plain SGD
TYPING_ERROR = 1000.0
ERROR_EVERY = 100
SIZES = (9, 32, 32, 1)


class Seeds(NamedTuple):
    """What a seed determines; for all seeds together, with a leading axis."""

    params: Any
    batches: Any  # i32[steps, BATCH]: rows of the data
    held_out: Any  # i32[HELD_OUT]


class Outcome(NamedTuple):
    """What was measured: [learning rates, seeds]."""

    unexplained: Any
    bias: Any
    clipped: Any  # steps
    norms: Any  # of the gradients, one more axis behind


def make_arms() -> dict[str, tuple[og.Rule, ...]]:
    """The guard's rules in each arm."""
    return {
        "no clip": (),
        "clip_by_global_norm(1)": (og.clip_by_global_norm(1.0),),
        "clip_by_global_norm(10)": (og.clip_by_global_norm(10.0),),
        "clip_by_norm_history()": (og.clip_by_norm_history(),),
    }


def draw(seed: int, steps: int, rows: int) -> Seeds:
    """One seed's split, batches and initial parameters."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows)
    shapes = list(itertools.pairwise(SIZES))
    params = [{"w": rng.normal(0, a**-0.5, (a, b)).astype(np.float32), "b": np.zeros(b, np.float32)} for a, b in shapes]
    return Seeds(params, order[HELD_OUT:][rng.integers(rows - HELD_OUT, size=(steps, BATCH))], order[:HELD_OUT])


def predict(params: Any, inputs: jax.Array) -> jax.Array:
    """The expected visits of each row."""
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["w"] + layer["b"])
    return (inputs @ params[-1]["w"] + params[-1]["b"])[:, 0]


def train(rules: tuple[og.Rule, ...], inputs: jax.Array, visits: jax.Array, seeds: Seeds, errors: jax.Array) -> Outcome:
    """Trains all learning rates and seeds at once; `errors` [steps] multiplies the first target of each batch."""

    def loss_fn(params: Any, rows: jax.Array, error: jax.Array) -> jax.Array:
        target = visits[rows] * jnp.ones(BATCH).at[0].set(error)
        return jnp.mean((predict(params, inputs[rows]) - target) ** 2)

    def one(learning_rate: jax.Array, seed: Seeds) -> Outcome:
        tx = og.guard(optax.sgd(learning_rate, momentum=0.9), *rules, recorder_rows=1)

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
            carry = og.apply_gradients(tx, grads, state, params, value=loss)
            return carry, og.metrics(carry[1])["guard/grad_norm"]

        start = (seed.params, tx.init(seed.params))
        (params, state), norms = jax.lax.scan(step, start, (seed.batches, errors))
        truth = visits[seed.held_out]
        residual = predict(params, inputs[seed.held_out]) - truth
        clipped = og.metrics(state)["guard/clipped_total"]
        return Outcome(jnp.mean(residual**2) / jnp.var(truth), jnp.mean(residual), clipped, norms)

    every_seed = jax.vmap(one, in_axes=(None, 0))
    return jax.jit(jax.vmap(every_seed, in_axes=(0, None)))(jnp.array(LEARNING_RATES), seeds)


def add_row(table: Table, name: str, outcome: Outcome, steps: int) -> None:
    """One arm: at each learning rate the error, the bias and how often the clip acted."""
    cells = []
    for unexplained, bias, clipped in zip(outcome.unexplained, outcome.bias, outcome.clipped, strict=True):
        lost = int((~(unexplained < 10)).sum())
        if lost:
            cells += [f"{lost} of {len(unexplained)} diverged", "-"]
        else:
            cells += [f"{unexplained.mean():.3f} ± {unexplained.std():.3f}", f"{bias.mean():+.2f} ± {bias.std():.2f}"]
        cells.append(f"{clipped.mean() / steps:.1%}")
    table.add_row(name, *cells)


def main(arguments: list[str] | None = None) -> None:
    """Trains all arms on the original data and on data with typing errors, and prints a table for each."""
    parser = argparse.ArgumentParser(description="Clips on a regression with heavy tails.")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: 3000)")
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--quick", action="store_true", help="300 steps, 2 seeds: to see that it runs")
    options = parser.parse_args(arguments)
    steps, seeds = (300, 2) if options.quick else (options.steps, options.seeds)
    if steps < ERROR_EVERY or seeds < 1:
        parser.error(f"--steps must be at least {ERROR_EVERY}, and --seeds at least 1")
    table = randhie.load_pandas()
    raw = table.exog.to_numpy(np.float32)
    inputs, visits = jnp.asarray((raw - raw.mean(0)) / raw.std(0)), jnp.asarray(table.endog.to_numpy(np.float32))
    drawn = jax.tree.map(lambda *leaves: np.stack(leaves), *(draw(seed, steps, len(raw)) for seed in range(seeds)))
    faulty = np.arange(steps) % ERROR_EVERY == ERROR_EVERY // 2
    data = {
        "The data as they are": np.ones(steps, np.float32),
        f"One batch in {ERROR_EVERY} with a typing error": np.where(faulty, TYPING_ERROR, 1).astype(np.float32),
    }
    console = Console()
    columns = TextColumn("{task.description:34s}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")
    tables: list[Table] = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for title, errors in data.items():
            task = progress.add_task(title, total=len(make_arms()))
            tables.append(Table("arm", title=f"{title}: {steps} steps, {seeds} seeds"))
            for rate in LEARNING_RATES:
                for column in (f"unexplained, rate {rate:g}", "bias", "clipped"):
                    tables[-1].add_column(column, justify="right")
            for name, rules in make_arms().items():
                outcome = jax.device_get(train(rules, inputs, visits, drawn, errors))
                add_row(tables[-1], name, outcome, steps)
                if not rules and errors.max() == 1:
                    norms = np.quantile(outcome.norms[0], [0.5, 0.99, 1])
                progress.advance(task)
    for each in tables:
        console.print(each)
    console.print(
        f"Norm of the gradient at rate {LEARNING_RATES[0]:g} without clip: median {norms[0]:.2g}, "
        f"99th percentile {norms[1]:.2g}, largest {norms[2]:.2g}.", highlight=False
    )  # fmt: skip


if __name__ == "__main__":
    main()

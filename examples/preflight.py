"""Audits a recurrent net before its first step, and checks the prediction with a sweep of learning rates.

    python examples/preflight.py                  # about two minutes on two cores; writes preflight.png and sweep.png
    python examples/preflight.py --out docs/preflight  # where to write them

A vanilla recurrent net with relu reads scikit-learn's digits pixel by pixel, as sequences of 64 steps, as in
`quickstart.py`. `preflight` reports how the gradient changes over time and where SGD with momentum becomes unstable, at
the start and again after a short training run, because sharpness grows; `learning_rate_sweep` trains at twelve learning
rates at once.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    from flax import nnx
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard.models import RNN
from optax_guard.preflight import learning_rate_sweep, plot, preflight

STEPS, BATCH, HIDDEN, MOMENTUM = 100, 128, 48, 0.9
WARM_UP_RATE = 0.02


def step(tx: optax.GradientTransformation, loss_fn: Any) -> Any:
    """One training step for `jax.lax.scan`."""

    def take(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        params, state = og.apply_gradients(tx, grads, state, params, value=loss)
        return (params, state), loss

    return take


def main() -> None:
    """Prints both tables and writes both pictures."""
    parser = argparse.ArgumentParser(description="Audit a recurrent net before training, then sweep learning rates.")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the two pictures")
    out = parser.parse_args().out
    if not out.is_dir():
        parser.error(f"there is no folder {out}")

    digits = load_digits()
    order = np.random.default_rng(0).integers(0, len(digits.data), (STEPS, BATCH))
    batches = {"x": (digits.data[order] / 16).astype(np.float32)[..., None], "y": digits.target[order]}
    audit = {"x": (digits.data[:512] / 16).astype(np.float32)[..., None], "y": digits.target[:512]}
    graph, state = nnx.split(RNN(1, HIDDEN, 10, activation=jax.nn.relu, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def make_tx(rate: Any) -> optax.GradientTransformation:
        return optax.sgd(rate, momentum=MOMENTUM)

    report = preflight(loss_fn, params, audit, optimizer=make_tx(0.01), time_axis=1)
    print(report)
    plot(report, out / "preflight.png")
    tx = make_tx(WARM_UP_RATE)
    carry, _ = jax.jit(lambda carry: jax.lax.scan(step(tx, loss_fn), carry, batches))((params, tx.init(params)))
    later = preflight(loss_fn, carry[0], audit, optimizer=tx, state=carry[1])
    edges = [r.stable_learning_rates.optimizer for r in (report, later) if r.stable_learning_rates]
    print(f"\nlargest stable learning rate at the start and after {STEPS} steps at {WARM_UP_RATE}:", *edges)

    sweep = learning_rate_sweep(
        make_tx, loss_fn, params, jax.tree.map(jnp.asarray, batches), np.logspace(-2.5, 0.8, 12), validation=audit
    )
    print(f"\n{sweep}")
    plot(sweep, out / "sweep.png")


if __name__ == "__main__":
    main()

"""Real float16 training on digits, with and without loss scaling: what underflows, and what that costs.

    python examples/float16.py            # about half a minute on two cores
    python examples/float16.py --quick    # a few steps: to see that it runs

The model computes in float16, and its loss is a mean over many outputs, so its gradients are far below 6e-8, the
smallest positive float16 number. Parameters are float32.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_guard as og

SIZES = (64, 128, 128, 10)
LOSS_FACTOR = 1e-6  # a loss of small units, as that of a regression in metres or of one term among many


def make_params(seed: int) -> list[dict[str, jax.Array]]:
    """Weights of He et al., in float32."""
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(SIZES)
    return [
        {"kernel": jnp.asarray(rng.normal(0, np.sqrt(2 / i), (i, o)), jnp.float32), "bias": jnp.zeros(o)}
        for i, o in pairs
    ]


def loss_fn(params: list[dict[str, jax.Array]], pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss in small units and the share of right answers; all matrix products in float16."""
    hidden = pixels.astype(jnp.float16)
    for i, layer in enumerate(params):
        hidden = hidden @ layer["kernel"].astype(jnp.float16) + layer["bias"].astype(jnp.float16)
        hidden = jax.nn.relu(hidden) if i < len(params) - 1 else hidden
    logits = hidden.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return LOSS_FACTOR * jnp.mean(losses), jnp.mean(jnp.argmax(logits, -1) == labels)


def train(scaled: bool, steps: int, seed: int) -> dict[str, float]:
    """Trains one arm and tells what happened."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = jnp.asarray(pixels / 16, jnp.float32)
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, rest = order[:300], order[300:]
    inner = og.guard(optax.sgd(0.1 / LOSS_FACTOR, momentum=0.9), recorder_rows=8)
    tx = og.loss_scaling(inner, growth_interval=50) if scaled else inner

    def scaled_loss(params: list, state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, _ = loss_fn(params, x, y)
        return (og.scale_loss(state, loss) if scaled else loss), loss

    @jax.jit
    def step(params: list, state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple:
        grads, loss = jax.grad(scaled_loss, has_aux=True)(params, state, x, y)
        kernels = [layer["kernel"] for layer in grads]
        zeros = sum(jnp.sum(k == 0) for k in kernels) / sum(k.size for k in kernels)
        return *og.apply_gradients(tx, grads, state, params, value=loss), zeros

    params = make_params(seed)
    state, zeros = tx.init(params), []
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.choice(rest, 128)
        params, state, share = step(params, state, pixels[rows], labels[rows])
        zeros.append(float(share))
    metrics = jax.device_get(og.metrics(state))
    return {
        "accuracy": float(loss_fn(params, pixels[held_out], labels[held_out])[1]),
        "gradients that are 0": float(np.mean(zeros)),
        "scale at the end": float(metrics.get("loss_scaling/scale", 1.0)),
        "overflows, held": int(metrics.get("loss_scaling/overflow_total", 0)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Trains both arms and prints the table."""
    parser = argparse.ArgumentParser(description="Float16 training with and without loss scaling, on real digits.")
    parser.add_argument("--steps", type=int, default=600, help="training steps per arm (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")
    parser.add_argument("--quick", action="store_true", help="150 steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    steps = 150 if options.quick else options.steps
    for name, scaled in (("plain float16", False), ("loss_scaling", True)):
        row = train(scaled, steps, options.seed)
        print(f"{name:14s}" + "".join(f"  {what}: {number:.4g}" for what, number in row.items()), flush=True)
    print("Chance is 0.1. Gradients of dead relu units and of blank pixels are 0 at any scale.")


if __name__ == "__main__":
    main()

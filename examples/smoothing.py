"""Randomized smoothing: what a digit classifier can certify when trained with and without noise.

    python examples/smoothing.py                  # under a minute on two cores; writes smoothing.png
    python examples/smoothing.py --quick          # a short mode, to see that it runs
    python examples/smoothing.py --seed 1 --out other.png

A small MLP learns scikit-learn's handwritten digits (8 x 8 pixels from 0 to 1), once without noise and once for each of
two noise levels with `augment_with_noise`. Each net is smoothed and certified on held-out digits: within its radius, no
change of the pixels, however chosen, alters the answer. The net trained without noise is smoothed with the smaller
noise, which it has never seen. The second table shows the same nets under noise, without smoothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import matplotlib
    import numpy as np
    from flax import nnx
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard import smoothing
from optax_guard.models import MLP

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIGMAS = (0.25, 0.5)  # the ink of a digit has a norm of about 3.9
RADII = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
ALPHA = 0.001
BATCH = 128
COLORS = ("#888888", "#0072B2", "#E69F00")  # Okabe and Ito's, which colour-blind people can tell apart


def read_digits(seed: int) -> tuple[Any, Any]:
    """Training and test set: pixels [.., 64] from 0 to 1, labels."""
    digits = load_digits()
    pixels, order = (digits.data / 16).astype(np.float32), np.random.default_rng(seed).permutation(len(digits.data))
    test, train = order[:360], order[360:]
    return (jnp.asarray(pixels[train]), jnp.asarray(digits.target[train])), (pixels[test], digits.target[test])


def make_model(seed: int) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """logits(params, inputs), and initial parameters."""
    graph, params = nnx.split(MLP((64, 128, 128, 10), rngs=nnx.Rngs(seed)))
    return lambda params, inputs: nnx.merge(graph, params)(inputs), params


def train(apply_fn: Callable[..., jax.Array], params: Any, data: Any, sigma: float, steps: int, seed: int) -> Any:
    """Parameters after training with noise of this size, new at every step."""
    inputs, labels = data
    tx = og.guard(optax.adam(optax.cosine_decay_schedule(2e-3, steps)), og.clip_by_global_norm(1.0))

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, inputs), labels).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        for_batch, for_noise = jax.random.split(key)
        batch = jax.random.randint(for_batch, (BATCH,), 0, len(inputs))
        noisy = smoothing.augment_with_noise(inputs[batch], sigma, key=for_noise)
        loss, grads = jax.value_and_grad(loss_fn)(params, noisy, labels[batch])
        return og.apply_gradients(tx, grads, state, params, value=loss), loss

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, tx.init(params)))
    return params


def tables(certificates: dict[str, smoothing.Certificate], robustness: dict[str, Any], labels: Any) -> list[Table]:
    """Certified accuracy by radius, and accuracy under noise."""
    certified = Table(title=f"Certified accuracy of {len(labels)} held-out digits, by L2 radius")
    for column in ("trained, smoothed with", "abstains", *(f"r = {radius:g}" for radius in RADII)):
        certified.add_column(column, justify="left" if column.startswith("trained") else "right")
    for name, certificate in certificates.items():
        shares = smoothing.certified_accuracy(certificate, labels, RADII)
        abstains = np.mean(certificate.prediction == smoothing.ABSTAIN)
        certified.add_row(name, f"{abstains:.3f}", *(f"{share:.3f}" for share in shares))
    noisy = Table(title="Accuracy without smoothing, under noise")
    for column in ("training", "clean", "input noise", "weight noise", "clamped noise"):
        noisy.add_column(column, justify="left" if column == "training" else "right")
    for name, found in robustness.items():
        noisy.add_row(name, *(f"{share:.3f}" for share in found[:4]))
    found = next(iter(robustness.values()))
    noisy.caption = (
        f"inputs: sigma {found.input_sigma:g}; weights: {found.weight_sigma:g} of their root mean square; "
        f"clamped: norm at most {found.max_norm:g}"
    )
    return [certified, noisy]


def picture(certificates: dict[str, smoothing.Certificate], labels: Any, n: int, path: Path) -> None:
    """The curves of certified accuracy."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    smoothing.plot_certified_accuracy(certificates, labels, axes=axes)
    for line, color in zip(axes.get_lines(), COLORS, strict=True):
        line.set(color=color, linewidth=2.2)
    axes.legend(frameon=False, loc="upper right")
    axes.set_xlabel(f"L2 radius within which no change of the pixels alters the answer ({n} samples, alpha {ALPHA:g})")
    axes.set_title("Certified accuracy on digits, with and without noise in training", loc="left", fontweight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Trains three nets, certifies them, prints the tables and writes the picture."""
    parser = argparse.ArgumentParser(
        description="Certified accuracy of nets trained with noise and without, on digits."
    )
    parser.add_argument("--samples", type=int, default=10_000, help="noisy copies of each digit (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of data split, parameters and noise (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("smoothing.png"), help="the picture (default: smoothing.png)")
    parser.add_argument("--quick", action="store_true", help="short training, 40 digits, 1000 samples")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error("--samples must be at least 1")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"there is no folder {options.out.absolute().parent}")
    steps, digits, samples = (200, 40, 1000) if options.quick else (3000, 360, options.samples)

    start = time.monotonic()
    data, (inputs, labels) = read_digits(options.seed)
    inputs, labels = inputs[:digits], labels[:digits]
    apply_fn, params = make_model(options.seed)
    certificates, robustness = {}, {}
    for sigma in (0.0, *SIGMAS):
        trained = train(apply_fn, params, data, sigma, steps, options.seed)
        training = f"with noise {sigma:g}" if sigma else "without noise"
        smoothed = smoothing.smooth(apply_fn, sigma or SIGMAS[0])
        certificates[f"{training}, smoothed {smoothed.sigma:g}"] = smoothing.certify(
            smoothed, trained, inputs, n=samples, alpha=ALPHA, key=options.seed
        )
        robustness[training] = smoothing.perturbed_accuracy(
            apply_fn, trained, inputs, labels, input_sigma=SIGMAS[0], weight_sigma=0.2, key=options.seed
        )
    console = Console()
    for table in tables(certificates, robustness, labels):
        console.print(table)
    picture(certificates, labels, samples, options.out)
    console.print(f"Picture: {options.out}. {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()

"""Records the gradient norms of six small training runs: the real histories on which the adaptive rules are judged.

    python benchmarks/record_norms.py        # about a minute; writes tests/data/norms.npz (needs scikit-learn)

Digits (8 x 8 pixels, 1 797 images, from scikit-learn), batches of 32, 1 500 steps, no clipping. For each run it records
the norm of the whole gradient and of every leaf, in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_guard as og

PyTree = Any
FILE = Path(__file__).parent.parent / "tests" / "data" / "norms.npz"
STEPS, BATCH = 1500, 32


def _dense(key: jax.Array, inputs: int, outputs: int, gain: float = 1.0) -> PyTree:
    return {"kernel": gain * jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "bias": jnp.zeros(outputs)}


def _apply(layer: PyTree, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _mlp(key: jax.Array) -> PyTree:
    keys = jax.random.split(key, 3)
    return {
        f"layer_{i}": _dense(k, a, b) for i, (k, a, b) in enumerate(zip(keys, (64, 64, 64), (64, 64, 10), strict=True))
    }


def _apply_mlp(params: PyTree, images: jax.Array) -> jax.Array:
    x = images.reshape(len(images), 64)
    x = jnp.tanh(_apply(params["layer_0"], x))
    x = jnp.tanh(_apply(params["layer_1"], x))
    return _apply(params["layer_2"], x)


def _rnn(key: jax.Array) -> PyTree:
    a, b, c = jax.random.split(key, 3)
    return {"input": _dense(a, 1, 32), "recurrent": _dense(b, 32, 32, 1.1), "output": _dense(c, 32, 10)}


def apply_rnn(activation: Callable[[jax.Array], jax.Array]) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Reads the image pixel by pixel: 64 steps through time."""

    def run(params: PyTree, images: jax.Array) -> jax.Array:
        pixels = images.reshape(len(images), 64, 1).swapaxes(0, 1)

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return activation(_apply(params["input"], x) + _apply(params["recurrent"], h)), None

        return _apply(params["output"], lax.scan(step, jnp.zeros((len(images), 32)), pixels)[0])

    return run


def _attention(key: jax.Array) -> PyTree:
    keys = jax.random.split(key, 7)
    names = ("embed", "query", "key", "value", "up", "down", "output")
    sizes = ((8, 32), (32, 32), (32, 32), (32, 32), (32, 64), (64, 32), (32, 10))
    layers = {name: _dense(k, *size) for name, k, size in zip(names, keys, sizes, strict=True)}
    return {**layers, "position": 0.1 * jax.random.normal(key, (8, 32))}


def apply_attention(params: PyTree, images: jax.Array) -> jax.Array:
    """One pre-norm block over the 8 rows."""

    def normalise(x: jax.Array) -> jax.Array:
        return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)

    x = _apply(params["embed"], images) + params["position"]
    y = normalise(x)
    weights = jax.nn.softmax(_apply(params["query"], y) @ _apply(params["key"], y).swapaxes(1, 2) / 32**0.5)
    x = x + weights @ _apply(params["value"], y)
    x = x + _apply(params["down"], jax.nn.relu(_apply(params["up"], normalise(x))))
    return _apply(params["output"], x.mean(1))


def record(
    params: PyTree, predict: Callable[[PyTree, jax.Array], jax.Array], optimizer: Any, images: Any, labels: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(f32[steps] the norm of the gradient, f32[leaves, steps] the norm of every leaf)."""
    rng = np.random.default_rng(0)
    batches = np.concatenate([rng.permutation(len(images)) for _ in range(STEPS * BATCH // len(images) + 1)])
    batches = batches[: STEPS * BATCH].reshape(STEPS, BATCH)

    def loss(params: PyTree, batch: jax.Array) -> jax.Array:
        logits = predict(params, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        statistics = og.gradient_statistics(grads)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (statistics.norm, statistics.leaf_norms)

    run = jax.jit(lambda p: lax.scan(step, (p, optimizer.init(p)), batches)[1])
    norms, leaves = jax.device_get(run(params))
    return norms, leaves.T


def main() -> None:
    """Runs the six trainings and writes the file."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = jnp.asarray(digits.images / 16, jnp.float32), jnp.asarray(digits.target)
    shuffled = jnp.asarray(np.random.default_rng(1).integers(0, 10, len(labels)))
    few = slice(0, 256)
    trainings = {
        "mlp, adam": (_mlp, _apply_mlp, optax.adam(1e-3), images, labels),
        "mlp, sgd": (_mlp, _apply_mlp, optax.sgd(0.1, momentum=0.9), images, labels),
        "mlp memorises 256 random labels, adam": (_mlp, _apply_mlp, optax.adam(3e-3), images[few], shuffled[few]),
        "tanh rnn, sgd": (_rnn, apply_rnn(jnp.tanh), optax.sgd(0.05, momentum=0.9), images, labels),
        "relu rnn, adam": (_rnn, apply_rnn(jax.nn.relu), optax.adam(1e-3), images, labels),
        "attention, adam": (_attention, apply_attention, optax.adam(3e-3), images, labels),
    }
    arrays: dict[str, np.ndarray] = {}
    for name, (init, *rest) in trainings.items():
        norms, leaves = record(init(jax.random.key(0)), *rest)
        arrays[name] = norms
        if name in ("mlp, sgd", "attention, adam"):
            arrays[name + ", leaves"] = leaves
        deviation = np.std(np.log(norms[100:]))
        print(f"{name:40s} finite {np.isfinite(norms).all()}  deviation {deviation:.2f}  median {np.median(norms):.2g}")
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **{name: x.astype(np.float32) for name, x in arrays.items()})
    print(f"{FILE.name}: {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

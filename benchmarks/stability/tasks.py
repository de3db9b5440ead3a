"""The tasks of StabilityBench. To add one, write a function decorated with `@task`.

The function builds a `Task` from real data or a standard problem of the field, small enough that 35 runs in one `vmap`
take about ten seconds on one core. The two tasks marked `held_out` were not run while `stabilize` was tuned.
"""

import functools
import pydoc_data.topics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from optax_guard.models import MLP, RNN, ConvNet, Transformer

PyTree = Any
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # Wortsman et al. 2023, section 2.2


class Task(NamedTuple):
    """One training."""

    title: str
    optimizer: Callable[[Any], optax.GradientTransformation]  # of the learning rate
    second_moment: bool  # whether it keeps one
    init: Callable[[int], PyTree]  # parameters of a seed
    batch: Callable[[jax.Array], Any]  # of a key
    loss_fn: Callable[[PyTree, Any], tuple[jax.Array, jax.Array]]  # what is differentiated, and the loss
    evaluate: Callable[[PyTree], jax.Array]  # loss on held-out data
    steps: int
    loss_scale: float = 1.0  # what is differentiated is the loss times this


TASKS: dict[str, Callable[[], Task]] = {}
HELD_OUT: set[str] = set()


def task(held_out: bool = False) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Registers a task under the name of its function; it is built once, when it is needed."""

    def register(build: Callable[[], Task]) -> Callable[[], Task]:
        TASKS[build.__name__] = functools.cache(build)
        if held_out:
            HELD_OUT.add(build.__name__)
        return build

    return register


def flax_task(title: str, model: Callable[[nnx.Rngs], nnx.Module], loss: Callable[..., Any], **rest: Any) -> Task:
    """A task of a Flax model; `loss(logits, batch)` and a batch whose first field is the model's input.

    What is differentiated is the loss, or `objective(logits, batch)` if that is given.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: model(nnx.Rngs(0))))
    test, scale, objective = rest.pop("test"), rest.get("loss_scale", 1.0), rest.pop("objective", loss)

    def logits(params: PyTree, batch: Any) -> jax.Array:
        net: Any = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))
        return net(batch[0]).astype(jnp.float32)

    def loss_fn(params: PyTree, batch: Any) -> tuple[jax.Array, jax.Array]:
        outputs = logits(params, batch)
        return objective(outputs, batch) * scale, loss(outputs, batch)

    def init(seed: int) -> PyTree:
        return nnx.to_pure_dict(nnx.state(model(nnx.Rngs(jax.random.key(seed)))))  # a traced seed, too

    return Task(title, init=init, loss_fn=loss_fn, evaluate=lambda params: loss(logits(params, test), test), **rest)


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    """The mean over examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


@functools.cache
def digits(centred: bool = False) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(pixels, labels) to train on and to test on; pixels in [0, 1], or centred with mean square 1."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = (pixels / 16).astype(np.float32), labels.astype(np.int32)
    if centred:
        pixels = (pixels - pixels.mean()) / pixels.std()
    order = np.random.default_rng(0).permutation(len(labels))
    return tuple((pixels[rows], labels[rows]) for rows in (order[360:], order[:360]))


def rows_of(data: tuple[np.ndarray, ...], size: int) -> Callable[[jax.Array], Any]:
    """Random batches of some rows."""
    return lambda key: tuple(
        jnp.asarray(x)[rows] for rows in [jax.random.randint(key, (size,), 0, len(data[0]))] for x in data
    )


def momentum(rate: Any) -> optax.GradientTransformation:
    """SGD as it is mostly used."""
    return optax.sgd(rate, momentum=0.9)


@task()
def digits_rnn() -> Task:
    """scikit-learn's digits, read pixel by pixel."""
    train, test = ((x[..., None], y) for x, y in digits())
    return flax_task(
        "digits, pixel by pixel, relu RNN, SGD",
        lambda rngs: RNN(1, 32, 10, activation=jax.nn.relu, rngs=rngs),
        cross_entropy,
        optimizer=momentum,
        second_moment=False,
        batch=rows_of(train, 32),
        test=tuple(x[:200] for x in test),
        steps=300,
    )


@task()
def temporal_order() -> Task:
    """Pascanu et al. 2013: which of two symbols came first, among distractors; 50 hidden tanh units and plain SGD."""
    length = 20

    def batch(key: jax.Array, size: int = 20) -> Any:
        a, b, c, d = jax.random.split(key, 4)
        symbols = jax.random.randint(a, (size, length), 2, 6)
        first = jax.random.randint(b, (size,), length // 10, length // 5)
        second = jax.random.randint(c, (size,), length // 2, 6 * length // 10)
        which = jax.random.randint(d, (2, size), 0, 2)
        rows = jnp.arange(size)
        symbols = symbols.at[rows, first].set(which[0]).at[rows, second].set(which[1])
        return jax.nn.one_hot(symbols, 6), 2 * which[0] + which[1]

    return flax_task(
        f"temporal order (length {length}), tanh RNN, SGD",
        lambda rngs: RNN(6, 50, 4, activation=jnp.tanh, rngs=rngs),
        cross_entropy,
        optimizer=optax.sgd,
        second_moment=False,
        batch=batch,
        test=batch(jax.random.key(99), 200),
        steps=600,
    )


@task()
def adding() -> Task:
    """Pascanu et al. 2013: the mean of two marked numbers of a sequence; 50 hidden tanh units and plain SGD."""
    length = 20

    def batch(key: jax.Array, size: int = 20) -> Any:
        a, b, c = jax.random.split(key, 3)
        numbers = jax.random.uniform(a, (size, length))
        first = jax.random.randint(b, (size,), 0, length // 10)
        second = jax.random.randint(c, (size,), length // 10, length // 2)
        marks = jax.nn.one_hot(first, length) + jax.nn.one_hot(second, length)
        return jnp.stack([numbers, marks], axis=-1), jnp.sum(numbers * marks, axis=1) / 2

    return flax_task(
        f"adding (length {length}), tanh RNN, SGD",
        lambda rngs: RNN(2, 50, 1, activation=jnp.tanh, rngs=rngs),
        lambda out, batch: jnp.mean(jnp.square(out[:, 0] - batch[1])),
        optimizer=optax.sgd,
        second_moment=False,
        batch=batch,
        test=batch(jax.random.key(99), 200),
        steps=600,
    )


def characters(
    query_key_norm: bool = False,
    *,
    width: int = 32,
    layers: int = 1,
    context: int = 32,
    batch: int = 8,
    tests: int = 48,
    dtype: Any = jnp.float32,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    steps: int = 200,
) -> Task:
    """The texts of Python's own manual, character by character."""
    text = "\n".join(pydoc_data.topics.topics.values())
    known = sorted(set(text))
    tokens = np.searchsorted(known, list(text)).astype(np.int32)
    train, rest = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]

    def pieces(source: np.ndarray, start: Any) -> Any:
        window = jnp.asarray(source)[start[:, None] + np.arange(context + 1)]
        return window[:, :-1], window[:, 1:]

    return flax_task(
        f"characters, transformer {'with' if query_key_norm else 'without'} query-key norm, Adam",
        lambda rngs: Transformer(
            len(known),
            context,
            width=width,
            layers=layers,
            heads=4,
            query_key_norm=query_key_norm,
            dtype=dtype,
            rngs=rngs,
        ),
        cross_entropy,
        optimizer=optimizer,
        second_moment=True,
        batch=lambda key: pieces(train, jax.random.randint(key, (batch,), 0, len(train) - context - 1)),
        test=pieces(rest, np.random.default_rng(0).integers(len(rest) - context - 1, size=tests)),
        steps=steps,
    )


@task()
def characters_plain() -> Task:
    """Attention logits without a bound."""
    return characters(query_key_norm=False)


@task(held_out=True)
def characters_qk_norm() -> Task:
    """The cure on the model's side."""
    return characters(query_key_norm=True)


@task()
def deep_mlp() -> Task:
    """Twelve layers, each of which multiplies the signal by 1.5."""
    train, test = digits(centred=True)
    return flax_task(
        "digits, MLP of 12 layers with an explosive start, SGD",
        lambda rngs: MLP((64, *[32] * 11, 10), init_scale=1.5, rngs=rngs),
        cross_entropy,
        optimizer=momentum,
        second_moment=False,
        batch=rows_of(train, 32),
        test=test,
        steps=400,
    )


@task()
def doctor_visits() -> Task:
    """The RAND Health Insurance Experiment: visits to a doctor, a heavy-tailed target, by squared error."""
    from statsmodels.datasets import randhie

    table = randhie.load_pandas().data.to_numpy(np.float32)
    visits, inputs = table[:, 0], table[:, 1:]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    order = np.random.default_rng(0).permutation(len(visits))
    return flax_task(
        "visits to a doctor (heavy-tailed), MLP, SGD",
        lambda rngs: MLP((inputs.shape[1], 32, 32, 1), activation=jnp.tanh, rngs=rngs),
        lambda out, batch: jnp.mean(jnp.square(out[:, 0] - batch[1])),
        optimizer=momentum,
        second_moment=False,
        batch=rows_of((inputs[order[2000:]], visits[order[2000:]]), 16),
        test=(inputs[order[:2000]], visits[order[:2000]]),
        steps=600,
    )


@task(held_out=True)
def digits_convnet() -> Task:
    """Images as images, without batch norm."""
    train, test = ((x.reshape(-1, 8, 8, 1), y) for x, y in digits(centred=True))
    return flax_task(
        "digits, convolutional net, SGD",
        lambda rngs: ConvNet(10, in_channels=1, channels=(8, 16), rngs=rngs),
        cross_entropy,
        optimizer=momentum,
        second_moment=False,
        batch=rows_of(train, 32),
        test=test,
        steps=300,
    )


def narrow(dtype: Any, name: str, scale: float) -> Task:
    """The digits in 16 bits: parameters in float32, all else in `dtype`."""
    train, test = digits(centred=True)
    return flax_task(
        f"digits in {name}, MLP, Adam",
        lambda rngs: MLP((64, 64, 64, 10), dtype=dtype, rngs=rngs),
        cross_entropy,
        optimizer=optax.adam,
        second_moment=True,
        batch=rows_of(train, 32),
        test=test,
        steps=400,
        loss_scale=scale,
    )


@task()
def digits_float16() -> Task:
    """With a fixed loss scale, as high as the first gradients allow."""
    return narrow(jnp.float16, "float16 (loss times 1024)", 1024.0)


@task()
def digits_bfloat16() -> Task:
    """The usual 16 bits."""
    return narrow(jnp.bfloat16, "bfloat16", 1.0)

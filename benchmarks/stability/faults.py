"""The faults that StabilityBench injects, as data. To add one, write a function decorated with `@fault`.

A fault describes what happens to the batch and to the gradient at every step; `START` is the first step it may affect.
The loss that a method sees is that of the batch: it shows a corrupted example, but not what goes wrong after the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.stability.tasks import Task, cross_entropy, digits, flax_task, momentum, rows_of
from optax_guard.models import MLP

PyTree = Any
START, STEPS, BATCH = 200, 400, 32


class Fault(NamedTuple):
    """What happens at each step: f32[steps] each."""

    factor: Any  # on the gradient
    element: Any  # put in the place of one element of the last leaf, where it is not 0
    leaf_factor: Any  # on the first leaf
    half_scale: Any  # the loss scale of a gradient in float16, where it is not 0
    example_factor: Any  # on the inputs of the first example
    device_factor: Any  # on the gradient of the first eighth of the examples
    active: Any  # whether the step is a faulty one; after a lasting change no step is


FAULTS: dict[str, tuple[str, Callable[[], Fault]]] = {}


def fault(title: str) -> Callable[[Callable[[], Fault]], Callable[[], Fault]]:
    """Registers a fault under the name of its function."""

    def register(make: Callable[[], Fault]) -> Callable[[], Fault]:
        FAULTS[make.__name__] = (title, make)
        return make

    return register


def at(steps: Any, lasting: bool = False, **values: Any) -> Fault:
    """A fault at some steps."""
    neutral = {"factor": 1.0, "element": 0.0, "leaf_factor": 1.0, "half_scale": 0.0}
    neutral |= {"example_factor": 1.0, "device_factor": 1.0, "active": 0.0}
    rows = {name: np.full(STEPS, value, np.float32) for name, value in neutral.items()}
    for name, value in values.items():
        rows[name][steps] = value
    rows["active"][steps] = not lasting
    return Fault(**rows)


@fault("no fault")
def clean() -> Fault:
    """The reference for all others."""
    return at(slice(0, 0))


@fault("one NaN")
def one_nan() -> Fault:
    """In one element of the gradient."""
    return at(START, element=np.nan)


@fault("one Inf")
def one_inf() -> Fault:
    """In one element of the gradient."""
    return at(START, element=np.inf)


@fault("1e30, finite")
def huge() -> Fault:
    """Its square overflows."""
    return at(START, element=1e30)


@fault("x1000")
def spike() -> Fault:
    """The whole gradient, once."""
    return at(START, factor=1000.0)


@fault("x1000, then x800")
def two_spikes() -> Fault:
    """The first must not hide the second."""
    return at([START, START + 5], factor=[1000.0, 800.0])


@fault("x2 for ever")
def level() -> Fault:
    """Not a fault: a method must follow it."""
    return at(slice(START, None), lasting=True, factor=2.0)


@fault("ramp to x100")
def ramp() -> Fault:
    """Over 100 steps; x100 for 20 more, then as before."""
    sizes = 100.0 ** (np.arange(1, 101) / 100)
    return at(slice(START, START + 120), factor=np.concatenate([sizes, np.full(20, 100.0)]))


@fault("all zero, 20 steps")
def zeros() -> Fault:
    """A part of the graph cut off; the gradients after it are healthy."""
    return at(slice(START, START + 20), factor=0.0)


@fault("float16 overflow, 5 steps")
def overflow() -> Fault:
    """A loss scale that is too large for float16."""
    return at(slice(START, START + 5), half_scale=2.0**24)


@fault("one leaf x1000")
def leaf() -> Fault:
    """The rest of the gradient is correct."""
    return at(START, leaf_factor=1000.0)


@fault("one example x10000")
def example() -> Fault:
    """Its pixels were not divided; the loss shows it."""
    return at(START, example_factor=1e4)


@fault("12 NaN in a row")
def many_nans() -> Fault:
    """A corrupted shard of the data."""
    return at(slice(START, START + 12), element=np.nan)


@fault("12 x1000 in a row")
def many_spikes() -> Fault:
    """As many finite ones."""
    return at(slice(START, START + 12), factor=1000.0)


@fault("one device of eight x-1000")
def device() -> Fault:
    """Its part of the sum has the wrong sign and magnitude; the loss does not show it."""
    return at(START, device_factor=-1000.0)


# Two that hit one micro-batch of a step of four: the steps of their table are micro-batches.


def micro_clean() -> Fault:
    """No fault."""
    return at(slice(0, 0))


def micro_nan() -> Fault:
    """The second of the four micro-batches of a step contains a NaN."""
    return at(START + 1, element=np.nan)


MICRO_FAULTS = {"clean": ("no fault", micro_clean), "micro_nan": ("NaN in one micro-batch of 4", micro_nan)}


def stacked(faults: dict[str, tuple[str, Callable[[], Fault]]]) -> Fault:
    """All of them: [faults, steps]."""
    return jax.tree.map(lambda *rows: np.stack(rows), *(make() for _, make in faults.values()))


def spoil(batch: Any, row: Fault) -> Any:
    """The batch of a step, with its fault."""
    inputs, labels = batch
    weights = jnp.where(jnp.arange(len(labels)) < max(len(labels) // 8, 1), row.device_factor, 1)
    return inputs.at[0].multiply(row.example_factor), labels, weights


def corrupt(grads: PyTree, row: Fault) -> PyTree:
    """The gradient of a step, with its fault."""

    def change(leaf: jax.Array) -> jax.Array:
        half = (leaf * row.half_scale).astype(jnp.float16).astype(jnp.float32) / row.half_scale
        return jnp.where(row.half_scale > 0, half, leaf) * row.factor

    leaves, structure = jax.tree.flatten(jax.tree.map(change, grads))
    leaves[0] = leaves[0] * row.leaf_factor
    first = (0,) * leaves[-1].ndim
    leaves[-1] = leaves[-1].at[first].set(jnp.where(row.element != 0, row.element, leaves[-1][first]))
    return jax.tree.unflatten(structure, leaves)


def weighted_cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    """The mean over the examples of a batch that `spoil` has corrupted."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]) * batch[2])


def base_task(optimizer: str) -> Task:
    """The training run into which faults are injected: digits, an MLP, a good learning rate."""
    train, test = digits(centred=True)
    adam = optimizer == "adam"
    return flax_task(
        f"digits, MLP, {'Adam' if adam else 'SGD'}",
        lambda rngs: MLP((64, 32, 32, 10), rngs=rngs),
        cross_entropy,
        objective=weighted_cross_entropy,
        optimizer=optax.adam if adam else momentum,
        second_moment=adam,
        batch=rows_of(train, BATCH),
        test=test,
        steps=STEPS,
    )


BASES = {"adam": 1e-3, "sgd": 0.03}  # optimizer -> learning rate

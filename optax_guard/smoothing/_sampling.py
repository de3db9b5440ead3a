"""Noisy copies of the inputs and their votes, compiled once for each network, layout and number of classes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._common.numerics import accumulator_dtype
from optax_guard._common.prng import Words, derive, normal, salt, step_words
from optax_guard._common.typing import PyTree
from optax_guard.smoothing._arguments import ABSTAIN, ApplyFn, SmoothedClassifier, logit_count

__all__ = ["AUGMENT", "CERTIFY", "COUNT", "PERTURB", "PREDICT", "SALT", "SELECT", "answers", "counts", "noise", "shift"]

SALT = salt("smoothing")
# One stream of noise for each purpose: the samples that choose a class must be independent of those that certify it.
SELECT, CERTIFY, PREDICT, COUNT, AUGMENT, PERTURB = range(6)
_CHUNKS_PER_CALL = 16  # forward passes between two progress reports: dispatch is then 1 % of the work of a small net


def counts(
    name: str,
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: Any,
    data: jax.Array,
    purpose: int,
    n: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """The counts [batch, classes]. A forward pass takes `samples` copies of `rows` inputs, `batch_size` at most."""
    chunks = -(-n // batch_size)
    samples = -(-n // chunks)
    rows = max(min(batch_size // samples, len(inputs)), 1)
    classes = logit_count(name, smoothed.apply_fn, params, inputs, rows * samples)
    results = [np.zeros((0, classes), np.int32)]
    for start in range(0, len(inputs), rows):
        place = np.minimum(np.arange(start, start + rows), len(inputs) - 1)  # the last group is padded
        part, counts = jnp.asarray(inputs[place]), jnp.zeros((rows, classes), jnp.int32)
        for chunk in range(0, chunks, _CHUNKS_PER_CALL):
            span = np.array([chunk, min(chunk + _CHUNKS_PER_CALL, chunks)], np.uint32)
            counts = _count(
                smoothed.apply_fn,
                params,
                part,
                counts,
                np.uint32(start),
                data,
                np.uint32(purpose),
                span,
                np.uint32(n),
                smoothed.sigma,
                samples=samples,
            )
            counts.block_until_ready()
            kept = min(rows, len(inputs) - start)
            advance(kept * (min(int(span[1]) * samples, n) - chunk * samples))
        results.append(np.asarray(counts)[: len(inputs) - start])
    return np.concatenate(results)


@functools.partial(jax.jit, static_argnames=("apply_fn", "samples"))
def _count(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: jax.Array,
    counts: jax.Array,
    first_input: jax.Array,
    data: jax.Array,
    purpose: jax.Array,
    span: jax.Array,
    n: jax.Array,
    sigma: jax.Array,
    *,
    samples: int,
) -> jax.Array:
    """Adds the votes of chunks span[0] to span[1] to the counts."""
    stream = step_words(data, purpose, SALT)
    rows, classes = counts.shape
    places = first_input + jnp.arange(rows, dtype=jnp.uint32)

    def add_chunk(chunk: jax.Array, counted: jax.Array) -> jax.Array:
        copies = chunk * np.uint32(samples) + jnp.arange(samples, dtype=jnp.uint32)
        place, copy = jnp.meshgrid(places, copies, indexing="ij")
        drawn = noise(stream, jnp.broadcast_to(inputs[:, None], (*place.shape, *inputs.shape[1:])), place, copy)
        noisy = shift(inputs[:, None], drawn * sigma.astype(drawn.dtype))
        logits = apply_fn(params, noisy.reshape(rows * samples, *inputs.shape[1:]))
        votes = jnp.where((copies < n)[None], answers(logits).reshape(rows, samples), ABSTAIN)
        return counted + jnp.sum(jax.nn.one_hot(votes, classes, dtype=jnp.int32), axis=1, dtype=jnp.int32)

    return lax.fori_loop(span[0], span[1], add_chunk, counts)


def noise(stream: Words, inputs: jax.Array, place: jax.Array, copy: jax.Array) -> jax.Array:
    """Standard normals for each input [*batch, ...], determined by its place and copy [*batch]."""

    def draw(key: Words, x: jax.Array) -> jax.Array:
        return normal(key, x, accumulator_dtype(x.dtype))[0]

    keys = derive(stream, Words(place, copy))
    for _ in range(place.ndim):
        draw = jax.vmap(draw)
    return draw(keys, inputs)


def shift(inputs: jax.Array, noise: jax.Array) -> jax.Array:
    wide = jnp.broadcast_to(inputs.astype(noise.dtype), noise.shape)
    return (wide + noise).astype(inputs.dtype)


def answers(logits: jax.Array) -> jax.Array:
    """The class of each row; none if a logit is NaN, which argmax would take for the largest."""
    lost = jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.where(lost, ABSTAIN, jnp.argmax(logits, axis=-1).astype(jnp.int32))

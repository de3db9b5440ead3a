"""Random numbers that are a function of (base key, step, leaf path, place in the leaf) alone.

Every element hashes its own index with Threefry-2x32 (20 rounds, the generator behind `jax.random`), written as
elementwise code. XLA fuses it, every sharding draws the same numbers, and on a CPU it is several times faster than
`jax.random.normal`. Base keys are stored as raw `uint32` data, since typed keys in an optimizer state break the
serialisation of Flax msgpack and Equinox.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._common import validate
from optax_guard._common.typing import PRNGKeyLike

__all__ = [
    "Words",
    "bits",
    "derive",
    "leaf_words",
    "normal",
    "raw_key",
    "rounded_stochastically",
    "rounding_bits",
    "salt",
    "step_words",
    "threefry",
    "uniform",
    "zeros_sharded_as",
]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Words(NamedTuple):
    """Two arrays of one shape: a key, or 64 random bits for each element."""

    first: jax.Array  # u32[...]
    second: jax.Array  # u32[...]


def raw_key(function: str, key: PRNGKeyLike) -> jax.Array:
    """Key data `u32[...]` from an int, a typed key or raw key data, in a new buffer.

    The copy is needed because the state that holds it may be donated, and the caller's key must survive that.
    """
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape == ():
                return jnp.copy(jax.random.key_data(key))
        elif key.dtype == jnp.uint32 and key.ndim == 1 and key.size >= 2:
            return jnp.array(key, copy=True)
        elif key.ndim == 0 and jnp.issubdtype(
            key.dtype, jnp.integer
        ):  # a seed that inject_hyperparams turned into an array
            return jax.random.key_data(jax.random.key(key))
    elif isinstance(key, (int, np.integer)) and not isinstance(key, bool) and -(2**31) <= key < 2**32:
        return jax.random.key_data(jax.random.key(int(key)))
    raise ValueError(
        f"{function}: `key` must be an int, a PRNG key or raw uint32 key data (an int in [-2^31, 2^32)); got "
        f"{validate.shown(key)}."
    )


def salt(*parts: str) -> int:
    """A number that separates kinds of noise with the same base key."""
    return zlib.crc32("/".join(parts).encode())


def step_words(data: jax.Array, step: jax.Array, salted: int) -> Words:
    """The key of a stream at a step, from raw key data of any generator."""
    key = Words(data[0], data[1])
    for index in range(2, data.shape[0]):  # rbg keys have four words
        key = threefry(key, Words(data[index], jnp.uint32(index)))
    return derive(key, Words(step.astype(jnp.uint32), jnp.uint32(salted)))


def leaf_words(key: Words, names: list[str]) -> Words:
    """A key for every leaf, as two u32[n_leaves], each a function of the leaf's path alone."""
    paths = jnp.asarray(np.array([zlib.crc32(name.encode()) for name in names], np.uint32))
    return derive(key, Words(paths, jnp.zeros_like(paths)))


def derive(key: Words, counter: Words) -> Words:
    """Derives new keys from one.

    Without the barrier, XLA hashes the new key inside the fusion that hashes the elements under it. JAX 0.12 on a CPU
    then compiles for minutes or hangs if a sum follows (with YNN fusions on).
    """
    return lax.optimization_barrier(threefry(key, counter))


def bits(key: Words, like: jax.Array) -> Words:
    """64 random bits for each element of an array with the shape and sharding of `like`, from its index."""
    return threefry(key, _indices(like))


def normal(key: Words, like: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Standard normals of a real or complex dtype (total variance 1), and 32 bits for each, for rounding.

    The bits are independent of the normals in float32, the only dtype that is ever rounded to 16 bits.
    """
    words = bits(key, like)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return _to_normal(words, dtype), words.second
    if dtype == jnp.complex64:
        real, imag = (_to_normal(Words(word, word), jnp.float32) for word in words)
    else:
        other = derive(key, Words(jnp.uint32(1), jnp.uint32(0)))
        real, imag = _to_normal(words, jnp.float64), _to_normal(bits(other, like), jnp.float64)
    return lax.complex(real, imag) * jnp.asarray(math.sqrt(0.5), dtype), words.second


def zeros_sharded_as(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Zeros with the leaf's shape and sharding.

    `jnp.zeros_like` loses an explicit sharding if no mesh is set (JAX 0.12); a comparison keeps it, and XLA folds the
    comparison away.
    """
    return ((leaf != leaf) & False).astype(dtype)


def uniform(word: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1), from the upper 23 of 32 bits."""
    mantissa = (word >> np.uint32(9)) | np.uint32(0x3F800000)
    return lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)


def rounding_bits(key: Words, like: jax.Array) -> jax.Array:
    """u32 random bits for each element, for rounding: a tenth of Threefry's work, which would double an AdamW step.

    MurmurHash3's finalizer twice, each time after a word of the key was added. Each step permutes the 32-bit numbers,
    so over keys the bits of every element are exactly uniform.
    """
    index = _indices(like)
    return _mixed(_mixed(index.second + key.first) + index.first * np.uint32(0x9E3779B1) + key.second)


def rounded_stochastically(wide: jax.Array, dtype: Any, word: jax.Array) -> jax.Array:
    """One of each float32's two neighbours in a 16-bit dtype, chosen by 32 bits so that the mean is the number itself.

    A number that the dtype holds, Inf and NaN are kept; finite numbers beyond its range become the largest one. The
    neighbours come from the bits and not from a conversion and back, which XLA may remove (it allows excess precision).
    """
    largest = float(jnp.finfo(dtype).max)
    finite = jnp.clip(wide, -largest, largest)
    rounded = _rounded_to_bfloat16(finite, word) if dtype == jnp.bfloat16 else _rounded_to_float16(finite, word)
    return jnp.where(jnp.isfinite(wide), rounded, wide).astype(dtype)


def threefry(key: Words, counter: Words) -> Words:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), elementwise: one key, any number of counters."""
    schedule = (key.first, key.second, key.first ^ key.second ^ np.uint32(0x1BD11BDA))
    first, second = counter.first + schedule[0], counter.second + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            first = first + second
            second = first ^ ((second << np.uint32(rotation)) | (second >> np.uint32(32 - rotation)))
        first = first + schedule[(block + 1) % 3]
        second = second + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return Words(first, second)


def _indices(like: jax.Array) -> Words:
    """(index along the first axis, index in the rest), unique if a row has fewer than 2^32 elements.

    Built on zeros with the leaf's sharding, so that under explicit sharding every device hashes only its own part.
    """
    first = rest = zeros_sharded_as(like, jnp.uint32)
    for axis in range(1, like.ndim):
        rest = rest * np.uint32(like.shape[axis]) + lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    if like.ndim:
        first = first + lax.broadcasted_iota(jnp.uint32, like.shape, 0)
    return Words(first, rest)


def _mixed(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def _rounded_to_bfloat16(x: jax.Array, word: jax.Array) -> jax.Array:
    """Random bits are added below the last place of bfloat16, the upper half of a float32, and cut off."""
    sum_ = lax.bitcast_convert_type(x, jnp.uint32) + (word & np.uint32(0xFFFF))
    return lax.bitcast_convert_type(sum_ & np.uint32(0xFFFF0000), jnp.float32)


def _rounded_to_float16(x: jax.Array, word: jax.Array) -> jax.Array:
    """In units of the last place, which is 2^-24 for subnormal numbers."""
    binade = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000), jnp.float32)
    unit = jnp.maximum(binade, np.float32(2.0**-14)) * np.float32(2.0**-10)
    places = jnp.abs(x) / unit
    whole = jnp.floor(places)
    up = (uniform(word) < places - whole).astype(jnp.float32)
    return jnp.copysign((whole + up) * unit, x)


def _to_normal(words: Words, dtype: Any) -> jax.Array:
    """The normal quantile of a uniform number in (-1, 1), as in `jax.random.normal`."""
    if dtype == jnp.float64:
        mantissa = (words.first.astype(jnp.uint64) << np.uint64(32)) | words.second.astype(jnp.uint64)
        mantissa = (mantissa >> np.uint64(12)) | np.uint64(0x3FF0000000000000)
        share = lax.bitcast_convert_type(mantissa, jnp.float64) - np.float64(1)
    else:
        share = uniform(words.first)
    scalar = np.dtype(share.dtype).type
    low = np.nextafter(scalar(-1), scalar(0))
    centred = jnp.maximum(share * scalar(2) + low, low)
    return (scalar(math.sqrt(2)) * lax.erf_inv(centred)).astype(dtype)

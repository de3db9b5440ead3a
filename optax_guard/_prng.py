"""Keys: stored as raw `uint32` data, derived from (base key, step, leaf path) and nothing else.

Raw data because typed keys in an optimizer state break flax msgpack and Equinox serialisation. Derived by `fold_in` and
not by splitting, so that a resumed, resharded or extended model draws the same noise.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._typing import PRNGKeyLike

__all__ = ["key_implementation", "leaf_key", "raw_key"]


def key_implementation(key: PRNGKeyLike) -> Any:
    """The generator a typed key was made for; None (JAX's default) for a seed or raw data."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(key) if typed else None


def raw_key(function: str, key: PRNGKeyLike) -> jax.Array:
    """Key data `u32[...]` from an int, a typed key or raw key data, in a buffer of its own.

    The copy matters: the state that holds it may be donated, and the caller's key must survive that.
    """
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape == ():
                return jnp.copy(jax.random.key_data(key))
        elif key.dtype == jnp.uint32 and key.ndim == 1:
            return jnp.array(key, copy=True)
        elif key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):  # a seed that inject_hyperparams made an array
            return jax.random.key_data(jax.random.key(key))
    elif isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return jax.random.key_data(jax.random.key(int(key)))
    raise ValueError(f"{function}: `key` must be an int, a PRNG key or raw uint32 key data; got {key!r}.")


def leaf_key(data: jax.Array, implementation: Any, step: jax.Array, name: str) -> jax.Array:
    """The typed key of one leaf at one step, a function of base key, step and path alone."""
    key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=implementation), step)
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))

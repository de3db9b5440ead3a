"""Checkpoints: a restored state gives the next step bit for bit."""

from typing import Any

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import pytest
from conforming import GRADS, PARAMS, STATEFUL, assert_same_bits, each, quick_step, run, stepper
from helpers import through_orbax
from parts import in_part
from registry import Entry

import optax_guard as og


def through_msgpack(state: Any, like: Any, folder: Any) -> Any:
    (folder / "state").write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(like, (folder / "state").read_bytes())


def through_equinox(state: Any, like: Any, folder: Any) -> Any:
    eqx.tree_serialise_leaves(folder / "state", state)
    return eqx.tree_deserialise_leaves(folder / "state", like)


@pytest.mark.parametrize("save_and_restore", [through_orbax, through_msgpack, through_equinox])
@each(in_part(STATEFUL))
def test_a_restored_state_gives_the_next_step_bit_for_bit(entry: Entry, save_and_restore: Any, tmp_path: Any) -> None:
    tx, step = stepper(entry)[0], quick_step(entry)
    with entry.promotion():
        params, state = run(entry, GRADS)
        like = jax.tree.map(jnp.zeros_like, tx.init(PARAMS))
        restored = save_and_restore(state, like, tmp_path)
        assert_same_bits(restored, state)
        copy = jax.tree.map(jnp.copy, params)
        assert_same_bits(step(GRADS[1], copy, restored), step(GRADS[1], params, state))


def test_keys_are_stored_as_raw_data() -> None:
    for key in (3, jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        assert og.noise_injection(key=key).init(PARAMS).noise_key.dtype == jnp.uint32

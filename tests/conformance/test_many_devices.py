"""On many devices: sharded by the compiler, and by hand in `shard_map`."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from compiling import quick_jit
from conforming import GRADS, PARAMS, assert_close, each, run, stepper
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from parts import in_part, in_turn
from registry import ENTRIES, Entry

import optax_guard as og


def on_mesh(kind: AxisType, *trees: Any) -> Any:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    return jax.device_put(trees, NamedSharding(mesh, PartitionSpec("x")))


KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.parametrize(("entry", "kind"), in_turn(ENTRIES, KINDS, every=5))
def test_sharded_over_eight_devices_equals_unsharded(entry: Entry, kind: AxisType) -> None:
    gradients = GRADS[1:]
    with entry.promotion():
        expected = run(entry, gradients)
        params, *sharded = on_mesh(kind, PARAMS, *gradients)
        got = run(entry, sharded, params)
    assert_close(got, expected)
    assert got[0]["kernel"].sharding.is_equivalent_to(sharded[0]["kernel"].sharding, 2)


def test_a_guarded_adamw_step_on_sharded_parameters_has_one_all_reduce_and_no_all_gather() -> None:
    entry = next(e for e in ENTRIES if str(e) == "guard-adamw")
    tx, step, _ = stepper(entry)
    with entry.promotion():
        params, grads = on_mesh(AxisType.Auto, PARAMS, GRADS[1])
        program = str(step.lower(grads, params, tx.init(params)).compile().as_text())
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 1
    assert "all-gather" not in program


def mapped_step(tx: Any, state: Any) -> Callable:
    """A step in `jax.shard_map`, each device with its own rows of everything and its own loss."""
    split, whole = PartitionSpec("x"), PartitionSpec()
    specs = optax.tree.map_params(tx, lambda _: split, state, transform_non_params=lambda _: whole)
    return quick_jit(
        jax.shard_map(
            lambda grads, params, state, losses: og.apply_gradients(tx, grads, state, params, value=losses[0]),
            mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
            in_specs=(split, split, specs, split),
            out_specs=(split, specs),  # that the state is `whole` proves that all devices agree on it
        )
    )


@each(in_part([entry for entry in ENTRIES if entry.takes_axis_name]))
def test_shard_map_with_axis_name_equals_jit_and_one_bad_shard_gives_one_verdict(entry: Entry) -> None:
    one_bad_shard = jax.tree.map(lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x), GRADS[1])
    losses = np.linspace(0.25, 0.75, 8, dtype=np.float32)  # their mean is LOSS
    tx = entry.make(axis_name="x")
    with entry.promotion():
        params, state = PARAMS, tx.init(PARAMS)
        step = mapped_step(tx, state)
        for grads in (*GRADS[1:], one_bad_shard):
            params, state = step(grads, params, state, losses)
        expected = run(entry, [*GRADS[1:], one_bad_shard])
    assert_close((params, state), expected)

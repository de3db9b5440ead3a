"""What a method costs where memory is the bound: the bytes that its compiled step reads and writes.

    python -m benchmarks.stability.costs

Each method around AdamW on a transformer, over the bare optimizer, by XLA's count for a CPU; of a conditional, the
dearer branch. The probes of the benchmark are left out, and the check that lets a published form pass a NaN.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks.performance.measure import transformer_tree
from benchmarks.performance.programs import bytes_moved
from benchmarks.stability import methods

FILE = Path(__file__).parents[1] / "results" / "stability-costs.json"


def bytes_of(name: str, params: Any) -> float:
    """Bytes that a compiled step of a method reads and writes, given the loss, with parameters and state donated."""
    method = methods.METHODS[name]
    with mock.patch.multiple(methods, probed=lambda optimizer: optimizer, as_published=lambda rule: rule):
        tx = method.build(optax.adamw, 1e-3, method.settings[0])

    def step(params: Any, state: Any, grads: Any, loss: Any) -> Any:
        return og.apply_gradients(tx, grads, state, params, value=loss)

    loss = jax.ShapeDtypeStruct((), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    return bytes_moved(jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, loss).compile())


def main() -> None:
    """Counts, writes and prints."""
    params = jax.eval_shape(lambda: transformer_tree(256, 5, 512))
    bare = bytes_of("none", params)
    costs = {}
    for name in methods.METHODS:
        costs[name] = round(bytes_of(name, params) / bare, 2)
        print(f"{name}: {costs[name]}", flush=True)
    FILE.write_text(json.dumps({"jax": jax.__version__, "device": jax.devices()[0].platform, "costs": costs}) + "\n")


if __name__ == "__main__":
    main()

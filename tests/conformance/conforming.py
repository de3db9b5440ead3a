"""What the conformance suite shares: one small tree, a jitted step for each entry of the registry, comparisons."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from jax.stages import Wrapped
from registry import ENTRIES, Entry

import optax_guard as og

RNG = np.random.default_rng(0)


def draw(size: float) -> dict[str, np.ndarray]:
    return {name: RNG.normal(0, size, shape).astype(np.float32) for name, shape in SHAPES.items()}


SHAPES = {"bias": (8,), "kernel": (8, 2)}

PARAMS = draw(1)


GRADS = [draw(size) for size in (0.01, 1, 5)]  # the first below every bound in the registry, the last above


BAD_GRADS = {"bias": GRADS[1]["bias"], "kernel": np.full((8, 2), np.nan, np.float32)}


LOSS = np.float32(0.5)


DTYPES = ("float16", "bfloat16", "float32", "complex64", "float64", "complex128")


STRICT = [entry for entry in ENTRIES if entry.strict]


WRAPPERS = [entry for entry in ENTRIES if entry.wraps]


STATEFUL = [entry for entry in ENTRIES if jax.tree.leaves(jax.eval_shape(entry.make().init, PARAMS))]


ROOMS = (og.rules, og.recovery, og.accumulation, og.transforms, og.published, og.state)


STATES = [x for room in ROOMS for name in room.__all__ if "State" in name and (x := getattr(room, name))]


STATES.append(og.state.FlightRecorder)


each = functools.partial(pytest.mark.parametrize, "entry", ids=str)


enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8


@functools.cache
def stepper(entry: Entry) -> tuple[optax.GradientTransformationExtraArgs, Wrapped, list[None]]:
    """The transformation, its jitted and donated step, and a list that grows whenever the step is traced.

    The step is for use inside another jitted function; `quick_step` is for calls of it alone.
    """
    tx, traces = entry.make(), []

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        traces.append(None)
        return og.apply_gradients(tx, grads, state, params, value=jnp.asarray(LOSS))

    return tx, step, traces


@functools.cache
def quick_step(entry: Entry) -> Callable:
    return quick_jit(stepper(entry)[1], donate_argnums=(1, 2))


def run(entry: Entry, gradients: list[Any], params: Any = PARAMS) -> tuple[Any, Any]:
    tx, step = stepper(entry)[0], quick_step(entry)
    state = tx.init(params)
    for grads in gradients:
        params, state = step(grads, params, state)
    return params, state


def types(tree: Any) -> tuple[list[Any], Any]:
    """Structure, shapes, dtypes and weak types, of arrays or of what `jax.eval_shape` gives."""
    return jax.tree.flatten(jax.eval_shape(lambda: tree) if _has_arrays(tree) else tree)


def _has_arrays(tree: Any) -> bool:
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def as_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def x64_for(dtype: str) -> contextlib.AbstractContextManager:
    return enable_x64(True) if dtype in ("float64", "complex128") else contextlib.nullcontext()


def assert_same_bits(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (np.asarray(a).dtype, np.asarray(a).tobytes()) == (np.asarray(b).dtype, np.asarray(b).tobytes())


def assert_close(got: Any, expected: Any) -> None:
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-5, atol=1e-6)

"""Outside of `jit`: nothing is compiled after the first steps, however many follow."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ENTRIES, Entry

import optax_guard as og
from optax_guard._common.eager import compiled_once

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"bias": np.ones(2, np.float32), "kernel": np.ones((2, 2), np.float32)}
FAST = ("guard-recovery", "loss_scaling-accumulate", "noise_injection", "stabilize-max_change", "proximal_group_lasso")


@pytest.fixture
def lowered() -> Iterator[list[str]]:
    """Grows by one whenever JAX lowers a program for the compiler."""
    events: list[str] = []

    def listen(name: str, seconds: float, **more: Any) -> None:
        del seconds, more
        if "jaxpr_to_mlir_module" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda: 0)()
    assert events, "JAX no longer reports a program that it lowers"
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def assert_compiles_no_more(step: Callable[[int], Any], lowered: list[str]) -> None:
    for i in range(4):
        step(i)
    lowered.clear()  # it may be empty: the operations of a plain penalty may have run before
    for i in range(4, 8):
        step(i)
    assert not lowered


def stepped(tx: Any, by_update: bool) -> Callable[[int], Any]:
    now = [jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)]

    def step(i: int) -> None:
        grads = jax.tree.map(lambda x: 0.1 * (i % 3) * x, now[0])
        if by_update:
            updates, state = tx.update(grads, now[1], now[0], value=0.5 + i)
            now[:] = [optax.apply_updates(now[0], updates), state]
        else:
            now[:] = og.apply_gradients(tx, grads, now[1], now[0], value=0.5 + i)
        og.metrics(now[1])

    return step


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=str(e), marks=[] if str(e) in FAST else pytest.mark.slow) for e in ENTRIES]
)
def test_a_step_outside_of_jit_is_compiled_once(entry: Entry, lowered: list[str]) -> None:
    assert_compiles_no_more(stepped(entry.make(), by_update=False), lowered)
    if str(entry) in FAST:
        lowered.clear()
        assert_compiles_no_more(stepped(entry.make(), by_update=True), lowered)


def test_gradients_accumulated_outside_of_jit_are_compiled_once(lowered: list[str]) -> None:
    batch = jnp.arange(8.0).reshape(4, 2)
    gradients = og.accumulate_gradients(lambda w, x: jnp.mean(jnp.square(x @ w)), 2)
    assert_compiles_no_more(lambda i: gradients(jnp.full(2, i, jnp.float32), batch), lowered)


def test_noisy_weights_outside_of_jit_are_compiled_once(lowered: list[str]) -> None:
    gradients = jax.value_and_grad(og.perturb_weights(lambda w, x: jnp.mean(jnp.square(x @ w)), 0.1))
    assert_compiles_no_more(lambda i: gradients(jnp.full(2, i, jnp.float32), jnp.ones((3, 2)), noise_key=i), lowered)


def test_a_flush_outside_of_jit_is_compiled_once(lowered: list[str]) -> None:
    tx = og.accumulate(og.guard(optax.sgd(0.1)), 4)
    params = jnp.ones(2)
    now = [params, tx.init(params)]

    def step(i: int) -> None:
        del i
        params, state = og.apply_gradients(tx, jnp.ones(2), now[1], now[0])
        now[:] = og.flush(tx, state, params)

    assert_compiles_no_more(step, lowered)


def test_what_is_no_number_reaches_the_function_as_it_is() -> None:
    seen: list[Any] = []

    def function(x: Any, *, hint: Any, flag: bool, name: str) -> Any:
        seen.append((hint, flag, name))
        return x

    once, hint = compiled_once(function), object()
    for i in range(3):
        assert once(i, hint=hint, flag=True, name="a") == i
    assert seen == [(hint, True, "a")]  # traced once
    assert once(2.0, hint=[hint], flag=False, name="a") == 2.0
    assert seen[-1] == ([hint], False, "a")
    assert once(2.0, hint=np.zeros(2, jax.dtypes.float0), flag=False, name="a") == 2.0


def test_a_whole_number_that_jax_would_wrap_around_reaches_the_function_as_it_is() -> None:
    seen: list[Any] = []
    for number in (2**40, np.int64(2**40), np.uint64(2**63)):
        compiled_once(lambda x: seen.append(x))(number)
    assert seen == [2**40, 2**40, 2**63]


def test_a_value_that_cannot_be_hashed_is_no_obstacle() -> None:
    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType] (how Python says it)

    seen: list[Any] = []
    hint = Unhashable()
    compiled_once(lambda hint: seen.append(hint))(hint)
    assert seen == [hint]


def test_steps_outside_and_inside_of_jit_agree() -> None:
    tx = og.guard(optax.adam(0.1), og.clip_by_norm_history(), recovery=(og.back_off(),))
    inside = jax.jit(lambda g, s, p, v: og.apply_gradients(tx, g, s, p, value=v))
    ours = theirs = (PARAMS, tx.init(PARAMS))
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: (np.nan if i == 1 else 0.1) * x, PARAMS)
        ours = og.apply_gradients(tx, grads, ours[1], ours[0], value=0.5)
        theirs = inside(grads, theirs[1], theirs[0], 0.5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=str(e), marks=[] if str(e) in FAST else pytest.mark.slow) for e in ENTRIES]
)
def test_a_healthy_step_outside_of_jit_passes_where_jax_looks_for_bad_numbers(entry: Entry) -> None:
    with jax.debug_nans(True), jax.debug_infs(True):
        for by_update in (False, True):
            step = stepped(entry.make(), by_update)
            for i in (1, 2):  # a gradient of zeros is no number to be careful with
                step(i)


def test_what_is_published_passes_there_too_and_so_does_a_gradient_of_zeros() -> None:
    published = (og.published.clip_by_update_norm(window=8), og.published.spam_clip(optax.adam(0.1)))
    with jax.debug_nans(True), jax.debug_infs(True):
        for tx in published:
            step = stepped(tx, by_update=True)
            for i in range(3):
                step(i)

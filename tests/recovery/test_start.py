"""`stabilize` at the start: a first gradient that is far too large costs a few steps, and a healthy start nothing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og
from optax_guard._guard import Settings, guarded
from optax_guard.recovery._start import StartState

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 400
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype(np.float32)
Y = X @ np.float32([1.0, -2.0, 0.5, 3.0])


def loss_fn(params: Any) -> jax.Array:
    return jnp.mean(jnp.square(jnp.asarray(X) @ params["w"] + params["b"] - jnp.asarray(Y)))


def train(tx: optax.GradientTransformation) -> Callable[[jax.Array], Any]:
    """Trains a linear regression on gradients multiplied by `factors` [steps]; returns losses, state and events."""

    def run(factors: jax.Array) -> Any:
        def step(carry: Any, factor: jax.Array) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            grads = jax.tree.map(lambda g: g * factor, grads)
            params, state = og.apply_gradients(tx, grads, state, params, value=loss)
            return (params, state), loss

        params = {"w": jnp.zeros(4), "b": jnp.zeros(())}
        (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), factors)
        return params, state, losses

    return quick_jit(run)


ADAM = train(og.stabilize(optax.adam(0.05), recorder_rows=STEPS))
BARE = train(optax.adam(0.05))


def factors(**at: float) -> np.ndarray:
    """Ones, and `s3=1e6` for a factor of 1e6 at step 3."""
    result = np.ones(STEPS, np.float32)
    for name, value in at.items():
        result[int(name[1:])] = value
    return result


@functools.cache
def clean() -> float:
    """The last loss of the bare optimizer without a fault."""
    return float(BARE(factors())[2][-1])


@pytest.mark.parametrize("size", [1e4, 1e6, 1e12, 1.5e14])
def test_a_first_gradient_that_is_far_too_large_costs_a_few_steps(size: float) -> None:
    params, state, losses = ADAM(factors(s0=size))
    assert BARE(factors(s0=size))[2][-1] > 0.3  # which stops the bare optimizer
    assert losses[-1] < clean() + 1e-3
    assert int(og.metrics(state)["guard/start_reset_total"]) == 1
    rows = og.flight_log(state)
    assert [(int(r["step"]), str(r["event"]), str(r["recovery"])) for r in rows if r["recovery"]] == [
        (9, "applied", "reset_start")
    ]
    assert np.isfinite(params["w"]).all()


@pytest.mark.parametrize(
    "at",
    [
        {"s0": 1e6, "s1": 1e6, "s2": 1e6, "s3": 1e6, "s4": 1e6},
        {"s0": 1e6, "s7": 1e9},
        {"s0": 1e3, "s1": 1e6, "s2": 1e9, "s3": 1e12},
        {"s0": 1e14, "s15": 1e14},
        {"s0": 1e6, "s10": 1e6},  # right after a new start, whose first norms cannot be judged either
        {"s4": 1e6, "s8": 1e8, "s12": 1e10},
        {f"s{i}": 1e6 for i in range(0, 16, 3)},
        {f"s{i}": 1e10 for i in range(16)},
    ],
    ids=str,
)
def test_bursts_in_the_first_sixteen_steps_do_not_stop_the_run(at: dict[str, float]) -> None:
    losses = ADAM(factors(**at))[2]
    assert losses[-1] < clean() + 0.01


def test_a_burst_after_one_healthy_gradient_is_clipped_and_slows_the_run_down_but_does_not_stop_it() -> None:
    burst = factors(s1=1e6, s2=1e6, s3=1e6, s4=1e6, s5=1e6)
    _, state, losses = ADAM(burst)
    assert losses[-1] < losses[0] / 40
    assert BARE(burst)[2][-1] > losses[0] / 4
    assert int(og.metrics(state)["guard/start_reset_total"]) == 0


def histories() -> dict[str, Any]:
    """Healthy starts: steady, falling by 500 at once, by 1e6 slowly, noisy, rising, and one that is low at first."""
    noise = np.exp(np.random.default_rng(1).normal(0, 1, STEPS)).astype(np.float32)
    return {
        "steady": factors(),
        "noisy": noise,
        "warms down": np.float32(np.maximum(0.7 ** np.arange(STEPS), 1e-2)),
        "falls slowly": np.float32(np.exp(-0.15 * np.arange(STEPS))),
        "falls at once": np.where(np.arange(STEPS) < 1, 30, 1).astype(np.float32),
        "rises": np.float32(np.minimum(1.2 ** np.arange(STEPS) * 1e-3, 1)),
        "sparse": np.where(np.arange(STEPS) % 5 == 0, 1, 1e-5).astype(np.float32),
        "zeros": np.where(np.arange(STEPS) % 20 == 0, 1, 0).astype(np.float32),
    }


@pytest.mark.parametrize("name", histories())
def test_a_healthy_start_is_the_same_bit_for_bit(name: str) -> None:
    gradients = histories()[name]
    params, state, losses = ADAM(gradients)
    assert int(og.metrics(state)["guard/start_reset_total"]) == 0
    unwatched = UNWATCHED(gradients)
    np.testing.assert_array_equal(losses, unwatched[2])
    jax.tree.map(np.testing.assert_array_equal, params, unwatched[0])
    jax.tree.map(np.testing.assert_array_equal, state.guarded_state, unwatched[1].guarded_state)
    jax.tree.map(np.testing.assert_array_equal, state.rule_states, unwatched[1].rule_states)


def unwatched() -> optax.GradientTransformation:
    """`stabilize` as it is without the watch."""
    from optax_guard._stabilize import _bounded, _limit, _skip_loss_spikes

    rules = _skip_loss_spikes(None), og.clip_by_norm_history(400.0)
    return guarded(
        "stabilize",
        _bounded(optax.adam(0.05), _limit("gradual", None)),
        rules,
        Settings((), 10, 50, STEPS, None, None, None),
    )


UNWATCHED = train(unwatched())


def watched(came: list[float], passed: list[float]) -> tuple[list[int], int]:
    """The oracle: the steps that start anew, from the norms before and behind the rules alone."""
    steps, largest, low, count, spoilt = [], 0.0, 0, 0, False
    for t, (before, norm) in enumerate(zip(came, passed, strict=True)):
        if spoilt:
            steps.append(t)
            largest, low, count, spoilt = 0.0, 0, 0, False
        if norm == 0 or count == 24:
            continue
        low = low + 1 if count and before < largest / 1000 else 0
        if count < 16:
            largest = max(largest, norm)
        count += 1
        spoilt = low >= 8
    return steps, count


def test_the_watch_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(2)
    some = 0
    for _ in range(40):
        log = rng.normal(0, 2, STEPS) - np.where(np.arange(STEPS) >= rng.integers(0, 20), 12.0 * rng.random(), 0)
        log[rng.random(STEPS) < 0.1] = -np.inf
        _, state, _ = ADAM(np.float32(np.exp(log)))
        rows = og.flight_log(state)
        steps, count = watched(*([float(x) for x in rows[column]] for column in ("grad_norm", "clipped_norm")))
        assert [int(r["step"]) for r in rows if "reset_start" in str(r["recovery"])] == steps
        (start,) = [x for x in jax.tree.leaves(state, is_leaf=_is_start) if _is_start(x)]
        assert (int(start.start_norms), int(start.start_reset_total)) == (count, len(steps))
        some += len(steps)
    assert 5 < some < 200


def _is_start(node: Any) -> bool:
    return isinstance(node, StartState)


def test_a_new_start_has_new_moments_and_histories() -> None:
    tx = og.stabilize(optax.adam(0.1))
    params = {"w": jnp.ones(3)}
    step = quick_jit(lambda size, state, params: og.apply_gradients(tx, {"w": size * jnp.ones(3)}, state, params))
    state = tx.init(params)
    for size in (1e8, *[1.0] * 8):
        params, state = step(jnp.float32(size), state, params)
    assert float(optax.tree.get(state, "nu")["w"][0]) > 1e10
    anew_params, anew = step(jnp.float32(1.0), state, params)
    alone = quick_jit(lambda params: og.apply_gradients(tx, {"w": jnp.ones(3)}, tx.init(params), params))(params)
    np.testing.assert_array_equal(anew_params["w"], alone[0]["w"])
    jax.tree.map(np.testing.assert_array_equal, *(each.guarded_state.optimizer_state for each in (anew, alone[1])))
    jax.tree.map(np.testing.assert_array_equal, anew.rule_states, tx.init(params).rule_states)


def test_a_step_that_is_held_does_not_start_anew() -> None:
    tx = og.stabilize(optax.adam(0.1))
    params = {"w": jnp.ones(3)}
    step = quick_jit(lambda size, state, params: og.apply_gradients(tx, {"w": size * jnp.ones(3)}, state, params))
    state = tx.init(params)
    for size in (1e8, *[1.0] * 8, np.nan, np.nan):
        params, state = step(jnp.float32(size), state, params)
    assert int(og.metrics(state)["guard/start_reset_total"]) == 0
    _, state = step(jnp.float32(1.0), state, params)
    assert int(og.metrics(state)["guard/start_reset_total"]) == 1
    assert [str(r["recovery"]) for r in og.flight_log(state)][-3:] == ["", "", "reset_start"]

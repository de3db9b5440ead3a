"""Accumulation across calls: the mean is right, the inner optimizer runs once a cycle, and no NaN stays."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from helpers import bits, filled
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_guard as og

PARAMS = {"w": jnp.zeros((2, 2)), "b": jnp.ones(3)}
pytestmark = pytest.mark.usefixtures("standard_promotion")


TX = og.accumulate(og.guard(optax.sgd(1.0, momentum=0.5), og.clip_by_global_norm(1e6)), 3)


@jax.jit
def fast(params: Any, state: Any, grads: Any, weight: Any) -> Any:
    return og.apply_gradients(TX, grads, state, params, weight=weight)


@jax.jit
def through_optax(params: Any, state: Any, grads: Any, weight: Any) -> Any:
    updates, state = TX.update(grads, state, params, weight=weight)
    return optax.apply_updates(params, updates), state


def oracle(calls: list[tuple[float, float]], every: int) -> tuple[float, int, int, int]:
    """NumPy float64: SGD with momentum 0.5 on the weighted mean of each cycle, from 0."""
    x = trace = 0.0
    emitted = dropped = empty = 0
    for start in range(0, len(calls) - len(calls) % every, every):
        cycle = calls[start : start + every]
        kept = [(g, w) for g, w in cycle if np.isfinite(g) and abs(g) < 1e19 and np.isfinite(w) and w >= 0]
        dropped += every - len(kept)
        total = sum(w for _, w in kept)
        if total == 0:
            empty += 1
            continue
        trace = 0.5 * trace + sum(np.float64(g) * w for g, w in kept) / total
        x -= trace
        emitted += 1
    return x, emitted, dropped, empty


CALLS = st.tuples(
    st.sampled_from([0.0, 1.0, -3.5, 0.125, 1e-3, jnp.nan, jnp.inf, 1e30]),
    st.sampled_from([0.0, 1.0, 2.0, 37.0, -1.0, jnp.nan]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(CALLS, min_size=3, max_size=12).map(lambda calls: calls[: len(calls) - len(calls) % 3]))
def test_weighted_cycles_with_bad_micro_batches_equal_the_oracle(calls: list[tuple[float, float]]) -> None:
    """A NaN at any micro-step never appears later; its weight is missing from the mean; a cycle stays `every` calls."""
    with jax.numpy_dtype_promotion("standard"):
        for step in (fast, through_optax):
            params, state = PARAMS, TX.init(PARAMS)
            for gradient, weight in calls:
                params, state = step(params, state, filled(PARAMS, gradient), weight)
            x, emitted, dropped, empty = oracle(calls, 3)
            chex.assert_tree_all_finite((params, state))
            np.testing.assert_allclose(params["w"], x, rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(params["b"], 1 + x, rtol=2e-6, atol=1e-6)
            assert (int(state.emitted_total), int(state.dropped_total), int(state.empty_total)) == (
                emitted,
                dropped,
                empty,
            )


def test_unequal_micro_batches_with_token_weights_equal_the_full_batch() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 4)).astype(np.float32), rng.standard_normal(12).astype(np.float32)

    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ w - y) ** 2)

    full = jax.grad(loss)(jnp.ones(4), x, y)
    tx = og.accumulate(optax.sgd(1.0), 3)
    params, state = jnp.ones(4), tx.init(jnp.ones(4))
    for part in (slice(0, 2), slice(2, 9), slice(9, 12)):
        grads = jax.grad(loss)(jnp.ones(4), x[part], y[part])
        params, state = og.apply_gradients(tx, grads, state, params, weight=len(x[part]))
    np.testing.assert_allclose(1 - params, full, rtol=1e-6, atol=1e-6)


def test_the_inner_optimizer_runs_only_when_a_cycle_is_full_and_gets_its_mean_loss() -> None:
    ran: list[float] = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        jax.debug.callback(lambda v: ran.append(float(v)), value, ordered=True)
        return updates, state

    tx = og.accumulate(optax.GradientTransformationExtraArgs(optax.identity().init, update), 4)
    step = quick_jit(lambda p, s, v: og.apply_gradients(tx, filled(PARAMS, 1.0), s, p, value=v))
    params, state = PARAMS, tx.init(PARAMS)
    flags = []
    for i in range(8):
        params, state = step(params, state, jnp.float32(i))
        flags.append(bool(og.has_updated(state)))
    jax.effects_barrier()
    assert ran == [1.5, 5.5]
    assert flags == [False, False, False, True] * 2


def test_between_emissions_parameters_and_inner_state_keep_their_bits() -> None:
    params, state = PARAMS, TX.init(PARAMS)
    for _ in range(3):
        params, state = fast(params, state, filled(PARAMS, 0.3), 1.0)
    after, later = fast(params, state, filled(PARAMS, 9.0), 1.0)
    assert bits(after) == bits(params)
    assert bits(later.accumulated_state) == bits(state.accumulated_state)
    updates, _ = TX.update(filled(PARAMS, 9.0), state, params)
    assert all(np.all(np.signbit(x)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_every_1_gives_the_inner_updates_bit_for_bit(dtype: Any) -> None:
    grads = jax.tree.map(lambda x: jnp.cos(1 + 3 * x).astype(dtype) / 3, PARAMS)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    inner = optax.sgd(0.1, momentum=0.9)
    tx = og.accumulate(inner, 1)
    ours, theirs = tx.init(params), inner.init(params)
    for _ in range(2):
        mine, ours = tx.update(grads, ours, params)
        yours, theirs = inner.update(grads, theirs, params)
        chex.assert_trees_all_equal_dtypes(mine, yours)
        assert bits(mine) == bits(yours)


def test_16_bit_gradients_are_summed_in_float32() -> None:
    """256 bfloat16 gradients of 1 + 1/128: summed in bfloat16 they stall at 256."""
    grads = {"w": jnp.full(4, 1.0078125, jnp.bfloat16)}
    tx = og.accumulate(optax.sgd(1.0), 256, reduction="sum")

    def body(carry: Any, _: None) -> Any:
        return og.apply_gradients(tx, grads, carry[1], carry[0]), None

    params = {"w": jnp.zeros(4)}
    (params, state), _ = jax.lax.scan(body, (params, tx.init(grads)), None, length=256)
    assert state.gradient_sum["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], -258.0, rtol=1e-6)


def test_complex_gradients_keep_their_imaginary_part() -> None:
    grads = jnp.array([1 + 2j], jnp.complex64)
    tx = og.accumulate(optax.sgd(1.0), 2)
    state = tx.init(grads)
    _, state = tx.update(grads, state)
    updates, _ = tx.update(grads, state)
    np.testing.assert_array_equal(updates, [-1 - 2j])


def test_every_as_a_schedule_of_the_emitted_step() -> None:
    tx = og.accumulate(optax.sgd(1.0), lambda emitted: 1 + emitted)
    params, state, flags = PARAMS, tx.init(PARAMS), []
    step = quick_jit(lambda p, s: og.apply_gradients(tx, filled(PARAMS, 1.0), s, p))
    for _ in range(6):
        params, state = step(params, state)
        flags.append(bool(og.has_updated(state)))
    assert flags == [True, False, True, False, False, True]
    np.testing.assert_allclose(params["w"], -3.0)


def test_the_sum_instead_of_the_mean() -> None:
    tx = og.accumulate(optax.sgd(1.0), 2, reduction="sum")
    params, state = PARAMS, tx.init(PARAMS)
    for weight in (2.0, 3.0):
        params, state = og.apply_gradients(tx, filled(PARAMS, 1.0), state, params, weight=weight)
    np.testing.assert_allclose(params["w"], -5.0)


def test_a_clip_inside_acts_on_the_mean_and_without_one_nothing_does() -> None:
    inside = og.accumulate(og.guard(optax.sgd(1.0), og.clip_by_global_norm(1.0)), 2)
    for tx, expected in ((inside, 1.0), (og.accumulate(optax.sgd(1.0), 2), np.sqrt(7 * 25))):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            params, state = og.apply_gradients(tx, filled(PARAMS, 5.0), state, params)
        moved = jax.tree.map(jnp.subtract, params, PARAMS)
        np.testing.assert_allclose(og.global_norm(moved), expected, rtol=1e-6)
        assert og.has_updated(state)


def test_under_scan_and_donation_as_step_by_step() -> None:
    sequence = [filled(PARAMS, x) for x in (0.1, jnp.nan, 0.4, 3.0, 0.2, 0.3, 7.0)]
    params, state = PARAMS, TX.init(PARAMS)
    for grads in sequence:
        params, state = fast(params, state, grads, 1.0)

    def body(carry: Any, grads: Any) -> Any:
        return og.apply_gradients(TX, grads, carry[1], carry[0], weight=1.0), None

    scan = jax.jit(lambda p, s, g: jax.lax.scan(body, (p, s), g)[0], donate_argnums=(0, 1))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)
    result = scan(jax.tree.map(jnp.copy, PARAMS), jax.tree.map(jnp.copy, TX.init(PARAMS)), stacked)
    chex.assert_trees_all_close(result, (params, state), rtol=1e-6)


def test_metrics_show_the_cycle() -> None:
    params, state = fast(PARAMS, TX.init(PARAMS), filled(PARAMS, 1.0), 5.0)
    params, state = fast(params, state, filled(PARAMS, jnp.nan), 7.0)
    metrics = {k: float(v) for k, v in jax.jit(og.metrics)(state).items() if k.startswith("accumulate/")}
    expected = {"micro_step": 2, "weight": 5, "emitted_total": 0, "dropped_total": 1, "empty_total": 0, "updated": 0}
    assert metrics == {f"accumulate/{k}": v for k, v in expected.items()}


def test_bad_input_is_refused_by_name() -> None:
    tx = og.accumulate(optax.sgd(1.0), 2)
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"leaf `b` of `updates` has shape \(1,\), but in `params at init` it has \(3,\)"
    ):
        tx.update({"w": jnp.zeros((2, 2)), "b": jnp.zeros(1)}, state)
    with pytest.raises(ValueError, match="lacks leaf `b`"):
        tx.update({"w": jnp.zeros((2, 2))}, state, PARAMS)
    for weight in (jnp.ones(2), True, 1j):
        with pytest.raises(ValueError, match="`weight` must be a real scalar"):
            tx.update(filled(PARAMS, 1.0), state, weight=weight)
    changing = og.accumulate(optax.monitor({"norm": optax.tree.norm}), 2)
    with pytest.raises(ValueError, match="accumulate: the inner optimizer changes the structure of its state"):
        changing.update(filled(PARAMS, 1.0), changing.init(PARAMS))
    with pytest.raises(ValueError, match="expected one `accumulate`"):
        og.has_updated(optax.sgd(1.0).init(PARAMS))


def test_all_four_named_transformations_chain_in_one_jitted_step_of_a_flax_model() -> None:
    """accumulate[ guard( clip ; inner: penalty -> noise -> adam ) ], around `flax.nnx.Optimizer`."""
    nnx = pytest.importorskip("flax.nnx")
    inner = optax.chain(og.l1_penalty(1e-4), og.noise_injection(1e-4, key=1), optax.adam(1e-2))
    tx = og.accumulate(og.guard(inner, og.clip_by_global_norm(1.0)), every=2)
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (16, 4))
    y = x @ jnp.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0]])

    @nnx.jit
    def train(model: Any, opt: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        opt.update(model, grads, value=loss)
        return loss

    losses = [float(train(model, opt, x if i % 10 != 5 else x * jnp.nan)) for i in range(400)]
    finite = [loss for loss in losses if np.isfinite(loss)]
    assert len(finite) == 360
    assert finite[-1] < 0.05 * finite[0]
    metrics = og.metrics(opt.opt_state)
    assert (int(metrics["accumulate/dropped_total"]), int(metrics["accumulate/emitted_total"])) == (40, 200)
    assert int(metrics["guard/step"]) == 200


def cycle(tx: Any, gradients: list[float], weights: list[float] | None = None) -> tuple[Any, Any]:
    params, state = PARAMS, tx.init(PARAMS)
    step = quick_jit(lambda p, s, g, w: og.apply_gradients(tx, g, s, p, weight=w))
    for i, gradient in enumerate(gradients):
        params, state = step(params, state, filled(PARAMS, gradient), 1.0 if weights is None else weights[i])
    return params, state


BARE = optax.sgd(1.0)


@pytest.mark.parametrize(
    ("on_nonfinite", "moved", "counts"),
    [
        ("drop_micro", [2.0 + 3.0], (2, 1, 0)),  # the mean of 1 and 3, and 3
        ("drop_cycle", [3.0], (1, 1, 1)),
        ("propagate", [3.0], (2, 0, 0)),  # the guard held the first cycle
    ],
)
def test_what_a_nonfinite_micro_batch_does_to_its_cycle(on_nonfinite: str, moved: list[float], counts: Any) -> None:
    tx = og.accumulate(og.guard(BARE), 3, on_nonfinite=on_nonfinite)
    params, state = cycle(tx, [1.0, jnp.nan, 3.0, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(params["w"], -moved[0])
    assert (int(state.emitted_total), int(state.dropped_total), int(state.empty_total)) == counts
    # A cycle spoilt is a step that was not finite, for the guard; a cycle with something left is none.
    assert int(og.metrics(state)["guard/nonfinite_total"]) == (on_nonfinite != "drop_micro")


def test_propagate_poisons_a_bare_optimizer_and_the_next_cycle_starts_clean() -> None:
    tx = og.accumulate(optax.chain(optax.zero_nans(), BARE), 2, on_nonfinite="propagate")
    params, _ = cycle(tx, [1.0, jnp.nan, 3.0, 3.0])
    np.testing.assert_allclose(params["w"], -3.0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("on_nonfinite", ["drop_micro", "drop_cycle", "propagate"])
def test_a_permanently_bad_stream_ends_in_halted(on_nonfinite: str, fast: bool) -> None:
    tx = og.accumulate(og.guard(BARE, halt_after=2), 2, on_nonfinite=on_nonfinite)
    bad = {"w": jnp.full((2, 2), jnp.nan), "b": jnp.ones(3)}

    @quick_jit
    def step(params: Any, state: Any) -> Any:
        if fast:
            return og.apply_gradients(tx, bad, state, params)
        updates, state = tx.update(bad, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        og.raise_if_halted(state, params)
        params, state = step(params, state)
    with pytest.raises(og.TrainingHalted, match="2 non-finite steps in a row: the gradient of `w` held NaN"):
        og.raise_if_halted(state, params)
    assert bits(params) == bits(PARAMS)
    assert bool(og.has_updated(state)) == (on_nonfinite == "propagate")  # which ran the guard, that held the cycle


def test_a_cycle_of_padding_is_held_but_no_alarm_for_the_guard_and_bad_weights_are() -> None:
    tx = og.accumulate(og.guard(BARE), 2)
    params, state = cycle(tx, [1.0] * 4, [0.0, 0.0, jnp.nan, -1.0])
    assert bits(params) == bits(PARAMS)
    assert (int(state.empty_total), int(state.dropped_total)) == (2, 2)
    assert int(og.metrics(state)["guard/nonfinite_total"]) == 1


def test_weights_too_large_to_multiply_are_dropped() -> None:
    """1e10 * 1e30 is Inf in float32: selected away, and no Inf enters the sum."""
    params, state = cycle(og.accumulate(BARE, 3), [1e10, 1.0, 3.0], [1e30, 1.0, 1.0])
    np.testing.assert_allclose(params["w"], -2.0)
    assert int(state.dropped_total) == 1
    chex.assert_tree_all_finite(state)


def test_each_leaf_has_its_reduction() -> None:
    params = {name: jnp.zeros(1) for name in ("mean", "sum", "max", "last")}
    tx = og.accumulate(og.guard(BARE), 4, reduction={name: name for name in params})
    state = tx.init(params)
    for gradient, weight in ((1.0, 1.0), (7.0, 2.0), (jnp.inf, 1.0), (2.0, 5.0)):
        grads = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params)
        params, state = og.apply_gradients(tx, grads, state, params, weight=weight)
    expected = {"mean": (1 + 14 + 10) / 8, "sum": 25.0, "max": 7.0, "last": 2.0}
    chex.assert_trees_all_close(params, jax.tree.map(lambda x: jnp.array([-x]), expected), rtol=1e-6)


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_flush_equals_a_cycle_of_that_many_calls(calls: int) -> None:
    """With momentum, so that a step too many would show; four calls are one full cycle and one call."""
    values = [0.5, 3.0, 1.0, 2.0][:calls]
    params, state = cycle(TX, values)
    params, state = quick_jit(lambda p, s: og.flush(TX, s, p))(params, state)
    x, *_ = oracle([(v, 1.0) for v in values[:3]], 3 if calls >= 3 else max(calls, 1))
    if calls == 4:
        x, *_ = oracle([(v, 1.0) for v in [*values[:3], 2.0, 2.0, 2.0]], 3)
    np.testing.assert_allclose(params["w"], x, rtol=1e-6)
    assert bool(og.has_updated(state)) == (calls > 0)
    before = bits(params)
    again, later = og.flush(TX, state, params)
    assert bits(again) == before
    assert not og.has_updated(later)
    assert int(later.micro_step) == 0


def test_flush_in_linen_train_state_and_with_frozen_leaves() -> None:
    TrainState = pytest.importorskip("flax.training.train_state").TrainState  # noqa: N806 (a class)
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2), "table": jnp.arange(2)}
    grads = {"w": jnp.ones(2), "frozen": None, "table": np.zeros(2, jax.dtypes.float0)}
    tx = og.accumulate(og.guard(optax.identity()), 4)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    _, inner = tx.update(grads, state.opt_state, params)
    new, inner = og.flush(tx, inner, params, like=grads)
    state = state.replace(params=new, opt_state=inner)
    chex.assert_trees_all_equal(state.params, {**params, "w": jnp.full(2, 2.0)})


def test_flush_and_reduction_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ValueError, match="flush: `tx` and `state` must be those of `accumulate`"):
        og.flush(BARE, BARE.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="flush: `like` lacks leaf `b`"):
        og.flush(TX, TX.init(PARAMS), PARAMS, like={"w": PARAMS["w"]})
    with pytest.raises(ValueError, match="`reduction` must be one of 'mean', 'sum', 'max', 'last'; got 'median'"):
        og.accumulate(BARE, 2, reduction="median")
    with pytest.raises(ValueError, match="at `b` it holds 'first'"):
        og.accumulate(BARE, 2, reduction={"w": "mean", "b": "first"}).init(PARAMS)
    with pytest.raises(ValueError, match="`reduction` lacks leaf `b`"):
        og.accumulate(BARE, 2, reduction={"w": "mean"}).init(PARAMS)
    with pytest.raises(ValueError, match="'max' needs real numbers; `z` is complex64"):
        og.accumulate(BARE, 2, reduction="max").init({"z": jnp.ones(1, jnp.complex64)})
    with pytest.raises(ValueError, match="`on_nonfinite` must be one of"):
        og.accumulate(BARE, 2, on_nonfinite="skip")
    with pytest.raises(ValueError, match=r"axis_name='x', but `inner` has None: they must agree"):
        og.accumulate(og.guard(BARE), 2, axis_name="x")


def test_the_loss_of_a_cycle_is_the_mean_over_what_was_kept() -> None:
    """Weights 1 and 3 with losses 2 and 4 give 3.5; a NaN batch, or a NaN loss, at any place takes its loss along."""
    tx = og.accumulate(og.guard(optax.sgd(0.1)), 3)
    step = quick_jit(lambda p, s, g, w, v: og.apply_gradients(tx, g, s, p, weight=w, value=v))
    for bad_at in (0, 1, 2):
        for bad_gradient in (True, False):
            params = jnp.ones(2)
            state = tx.init(params)
            rest = iter([(1.0, 2.0), (3.0, 4.0)])
            for call in range(3):
                weight, loss = (1.0, np.nan) if call == bad_at else next(rest)
                gradient = jnp.full(2, np.nan if call == bad_at and bad_gradient else 1.0)
                params, state = step(params, state, gradient, jnp.asarray(weight), jnp.asarray(loss))
                assert np.isfinite(state.value_mean)
            row = og.flight_log(state)[-1]
            assert (row["event"], row["value"]) == ("applied", 3.5)
            np.testing.assert_allclose(params, 0.9)
            assert state.dropped_total == 1
    with pytest.raises(ValueError, match=r"accumulate: `value` must be the scalar loss; got an array of shape \(2,\)"):
        og.apply_gradients(tx, jnp.ones(2), state, params, value=jnp.ones(2))


def test_the_least_weight_whose_inverse_is_finite_steps() -> None:
    tx = og.accumulate(optax.sgd(1.0), 1)
    params, _ = og.apply_gradients(tx, jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2), weight=np.finfo("f4").tiny)
    np.testing.assert_array_equal(params, [-1, -1])

"""The two Flax classes: the same numbers as Flax's own, the loss passed on, jit, donation, checkpoints."""

import importlib
import sys
from functools import partial
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from helpers import through_orbax

import optax_guard as og
from optax_guard.flax import Optimizer, TrainState, add_guard, clear_halt, inner_state, remove_guard

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Flax itself does not work under the strict one

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
BATCHES = [X, np.full_like(X, np.nan), X[::-1].copy()]


def make_tx() -> Any:
    return og.guard(optax.adam(0.05), og.clip_by_global_norm(0.5), recorder_rows=4)


def loss_of(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(x) - 1))


MODEL = nn.Dense(2)


def linen(kind: type = TrainState, tx: Any = None, **fields: Any) -> Any:
    params = MODEL.init(jax.random.key(0), X)
    return kind.create(apply_fn=MODEL.apply, params=params, tx=make_tx() if tx is None else tx, **fields)


@partial(jax.jit, donate_argnums=0)
def linen_step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(lambda p: loss_of(partial(state.apply_fn, p), x))(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_linen_passes_the_loss_on_holds_a_bad_step_and_equals_flax() -> None:
    state = linen()
    losses = []
    for x in BATCHES:
        before = jax.tree.map(np.array, (state.params, state.opt_state.guarded_state))
        state, loss = linen_step(state, x)
        losses.append(float(loss))
        if np.isnan(x).any():
            same((state.params, state.opt_state.guarded_state), before)
    np.testing.assert_array_equal(og.flight_log(state.opt_state)["value"], np.float32(losses))
    assert int(state.step) == 3
    assert int(og.metrics(state.opt_state)["guard/skipped_total"]) == 1

    plain = linen(train_state.TrainState, optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05)))
    for x in (BATCHES[0], BATCHES[2]):
        grads = jax.grad(lambda p, x=x: loss_of(partial(MODEL.apply, p), x))(plain.params)
        plain = plain.apply_gradients(grads=grads)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_linen_replaces_fields_and_forwards_extra_arguments() -> None:
    class WithStatistics(TrainState):
        batch_stats: Any

    tx = og.accumulate(optax.sgd(0.1), 2)
    state = linen(WithStatistics, tx, batch_stats=jnp.zeros(()))
    grads = jax.tree.map(jnp.ones_like, state.params)
    state = state.apply_gradients(grads=grads, extra_args={"weight": jnp.float32(3.0)}, batch_stats=jnp.ones(()))
    assert state.batch_stats == 1
    assert og.metrics(state.opt_state)["accumulate/weight"] == 3
    with pytest.raises(ValueError, match="pass the loss as `value=`"):
        state.apply_gradients(grads=grads, extra_args={"value": 1.0})
    with pytest.raises(ValueError, match="`grads` lacks leaf `params/bias`"):
        state.apply_gradients(grads={"params": {"kernel": grads["params"]["kernel"]}})


def test_linen_overwrites_what_flax_overwrites() -> None:
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.zeros(())}}
    grads = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.full((), 7.0)}}
    states = [
        kind.create(apply_fn=None, params=params, tx=optax.sgd(0.5)).apply_gradients(grads=grads)
        for kind in (TrainState, train_state.TrainState)
    ]
    same(states[0].params, states[1].params)


def test_a_donated_linen_step_needs_no_copy() -> None:
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), linen())
    memory = linen_step.lower(state, X).compile().memory_analysis()
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    assert memory.alias_size_in_bytes >= 3 * parameters  # parameters and both moments


def through_msgpack(state: Any, like: Any, folder: Any) -> Any:
    del folder
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


@pytest.mark.parametrize("kinds", [(TrainState, TrainState), (train_state.TrainState, TrainState)])
@pytest.mark.parametrize("save_and_restore", [through_orbax, through_msgpack])
def test_a_linen_checkpoint_goes_on_bit_for_bit_also_from_flax(
    save_and_restore: Any, kinds: Any, tmp_path: Any
) -> None:
    tx = make_tx()
    trained, _ = linen_step(linen(TrainState, tx), BATCHES[0])
    saved = linen(kinds[0], tx).replace(
        **{name: getattr(trained, name) for name in ("params", "opt_state")}, step=jnp.asarray(trained.step)
    )
    restored = save_and_restore(saved, linen(kinds[1], tx).replace(step=jnp.zeros((), jnp.int32)), tmp_path)
    assert isinstance(restored, TrainState)
    same(restored.opt_state, trained.opt_state)
    copy = trained.replace(step=jnp.asarray(trained.step))
    same(linen_step(restored, BATCHES[2])[0].params, linen_step(copy, BATCHES[2])[0].params)


@nnx.jit
def nnx_step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads, value=loss)
    return loss


@nnx.jit(donate_argnums=(0, 1))
def nnx_donated_step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads, value=loss)
    return loss


def arrays(*nodes: Any) -> Any:
    return jax.tree.map(np.array, [nnx.as_pure(nnx.state(node)) for node in nodes])


@pytest.mark.parametrize("step", [nnx_step, nnx_donated_step])
def test_nnx_passes_the_loss_on_holds_a_bad_step_and_equals_flax(step: Any) -> None:
    pairs = []
    for kind in (Optimizer, nnx.Optimizer):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        pairs.append((model, kind(model, make_tx(), wrt=nnx.Param)))
    losses = []
    for x in BATCHES:
        before = arrays(pairs[0][0])
        losses.append(float(step(*pairs[0], x)))
        step(*pairs[1], x)
        if np.isnan(x).any():
            same(arrays(pairs[0][0]), before)
    (model, optimizer), other = pairs
    np.testing.assert_array_equal(og.flight_log(optimizer.opt_state)["value"], np.float32(losses))
    assert int(optimizer.step[...]) == 3
    assert int(og.metrics(optimizer.opt_state)["guard/skipped_total"]) == 1
    for a, b in zip(jax.tree.leaves(arrays(model, optimizer)), jax.tree.leaves(arrays(*other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_nnx_trains_only_what_wrt_selects() -> None:
    class Frozen(nnx.Variable): ...

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.scale = Frozen(jnp.ones(2))
    optimizer = Optimizer(model, make_tx(), wrt=nnx.Param)
    before = np.array(model.kernel[...])
    nnx_step(model, optimizer, X)
    assert not np.array_equal(before, model.kernel[...])
    np.testing.assert_array_equal(model.scale[...], np.ones(2))


@pytest.mark.parametrize("kind", [Optimizer, nnx.Optimizer])  # a run can change over from Flax's own class
def test_an_nnx_checkpoint_goes_on_bit_for_bit(kind: Any, tmp_path: Any) -> None:
    def build(seed: int, kind: Any = Optimizer) -> Any:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return model, kind(model, make_tx(), wrt=nnx.Param)

    saved = build(0, kind)
    nnx_step(saved[0], saved[1], BATCHES[0])
    state = {"model": nnx.state(saved[0]), "optimizer": nnx.state(saved[1])}
    resumed = build(1)
    like = {"model": nnx.state(resumed[0]), "optimizer": nnx.state(resumed[1])}
    restored = through_orbax(state, like, tmp_path)
    nnx.update(resumed[0], restored["model"])
    nnx.update(resumed[1], restored["optimizer"])
    same(jax.tree.leaves(arrays(*resumed)), jax.tree.leaves(arrays(*saved)))
    straight = build(0)
    nnx_step(straight[0], straight[1], BATCHES[0])
    for model, optimizer in (resumed, straight):
        nnx_step(model, optimizer, BATCHES[2])
    if kind is Optimizer:
        same(jax.tree.leaves(arrays(*resumed)), jax.tree.leaves(arrays(*straight)))


def test_without_flax_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "optax_guard.flax")
    with pytest.raises(ImportError, match=r"pip install flax"):
        importlib.import_module("optax_guard.flax")


# A guard's state in nnx, in place


def nnx_run(tx: Any, kind: Any = nnx.Optimizer) -> tuple[Any, Any, Any]:
    """Model, optimizer, and a step as Tunix takes it: cached, with the optimizer donated."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = kind(model, tx, wrt=nnx.Param)
    return model, optimizer, cached(model, optimizer)


def cached(model: Any, optimizer: Any) -> Any:
    return nnx.cached_partial(nnx.jit(unjitted_step, donate_argnames=("optimizer",)), model, optimizer)


def unjitted_step(model: Any, optimizer: Any, x: jax.Array) -> None:
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads, value=loss)


@pytest.mark.parametrize("kind", [nnx.Optimizer, Optimizer])
def test_a_halt_is_cleared_in_place_also_for_a_cached_step(kind: Any) -> None:
    model, optimizer, step = nnx_run(og.guard(optax.sgd(0.1), halt_after=1, recorder_rows=4), kind)
    step(BATCHES[1])
    with pytest.raises(og.TrainingHalted, match=r"the gradient of `bias.*`optax_guard.flax.clear_halt\(optimizer\)`"):
        og.raise_if_halted(optimizer.opt_state, model)
    clear_halt(optimizer)
    og.raise_if_halted(optimizer.opt_state)
    before = np.array(model.kernel[...])
    step(BATCHES[0])
    assert (np.array(model.kernel[...]) != before).any()
    assert og.flight_log(optimizer.opt_state)["event"].tolist() == ["nonfinite", "applied"]


def test_a_guard_is_put_in_and_taken_out_in_place() -> None:
    plain = optax.inject_hyperparams(optax.adam)(0.05)
    tx = og.guard(plain, og.clip_by_global_norm(0.5), recorder_rows=4)
    model, optimizer, step = nnx_run(plain)
    step(BATCHES[0])
    moment = optimizer.opt_state.inner_state[0].mu["kernel"]
    old = jax.tree.map(np.array, nnx.as_pure(optimizer.opt_state))

    add_guard(optimizer, model, tx)
    assert inner_state(optimizer).inner_state[0].mu["kernel"] is moment
    same(jax.tree.map(np.array, nnx.as_pure(inner_state(optimizer))), old)
    inner_state(optimizer).hyperparams["learning_rate"][...] = jnp.float32(0.01)
    step = cached(model, optimizer)
    for x in BATCHES[:2]:
        step(x)
    assert int(og.metrics(optimizer.opt_state)["guard/nonfinite_total"]) == 1
    assert float(optimizer.opt_state.guarded_state.hyperparams["learning_rate"][...]) == np.float32(0.01)

    remove_guard(optimizer, model, plain)
    assert optimizer.opt_state.inner_state[0].mu["kernel"] is moment
    assert int(optimizer.opt_state.inner_state[0].count[...]) == 2  # the step that was held has left no trace
    cached(model, optimizer)(BATCHES[0])
    assert int(optimizer.opt_state.inner_state[0].count[...]) == 3
    with pytest.raises(ValueError, match="inner_state: there is no guard"):
        inner_state(optimizer)
    add_guard(optimizer, model, tx)
    with pytest.raises(ValueError, match="remove_guard: the state of `tx` differs"):
        remove_guard(optimizer, model, optax.sgd(0.1))


ADAM = optax.adam(0.05)
IN_FLIGHT = {
    "chain(clip, tx)": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "apply_if_finite": optax.apply_if_finite(ADAM, 5),
    "MultiSteps": optax.MultiSteps(ADAM, 4),
}
GUARDED = (og.stabilize(ADAM), og.stabilize(ADAM, max_change=0.01), og.guard(ADAM, og.skip_spikes()))


@pytest.mark.parametrize("before", IN_FLIGHT)
def test_a_guard_comes_into_both_of_flaxs_classes_from_what_people_have_around_their_optimizer(before: str) -> None:
    """And rules and bounds are added and removed later, which is the same call; the moments go along."""
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, IN_FLIGHT[before], wrt=nnx.Param)
    state = train_state.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=IN_FLIGHT[before])
    state = state.replace(opt_state=jax.tree.map(lambda x: jnp.full_like(x, 3), state.opt_state))
    (adam,) = (part for part in jax.tree.leaves(optimizer.opt_state, is_leaf=is_adam) if is_adam(part))
    for tx in (*GUARDED, GUARDED[0]):
        add_guard(optimizer, model, tx)
        (now,) = (part for part in jax.tree.leaves(optimizer.opt_state, is_leaf=is_adam) if is_adam(part))
        assert now.mu["kernel"] is adam.mu["kernel"]
        assert now.count is adam.count
        state = state.replace(tx=tx, opt_state=og.add_guard_state(tx, state.params, state.opt_state))
        (moments,) = (part for part in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(part))
        assert int(moments.count) == 3
        np.testing.assert_array_equal(moments.mu["w"], 3)


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_an_optimizer_that_trains_some_variables_has_them_named() -> None:
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.LoRA(2, 2, 2, rngs=nnx.Rngs(1)))
    optimizer = Optimizer(model, og.guard(optax.sgd(0.1), halt_after=1, recorder_rows=4), wrt=nnx.LoRAParam)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.LoRAParam))
    last = grads["layers"][1]["lora_b"]
    last[...] = last[...] * jnp.nan
    optimizer.update(model, grads)
    for params in (model, nnx.state(model), nnx.state(model, nnx.LoRAParam)):
        with pytest.raises(og.TrainingHalted, match="the gradient of `layers/1/lora_b"):
            og.raise_if_halted(optimizer.opt_state, params)

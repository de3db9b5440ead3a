"""What lives beside the optimizer keeps its bits on a held step, whoever held it."""

from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from flax import nnx
from flax.training import train_state
from registry import ENTRIES

import optax_guard as og
from optax_guard.flax import Optimizer, TrainState
from optax_guard.models import ConvNet

GOOD, BAD, LARGE = 1.0, float("nan"), 1e3
LEAF = jnp.full(2, 0.5)


def flags(tx: Any, sizes: tuple[float, ...], values: tuple[float, ...] | None = None) -> list[bool]:
    """Whether `keep_if_held` gave the old tree back, call by call."""

    @quick_jit
    def step(params: Any, state: Any, size: Any, value: Any) -> Any:
        params, state = og.apply_gradients(tx, jnp.full(2, size), state, params, value=value)
        return params, state, og.keep_if_held(state, jnp.array(False), jnp.array(True))

    params, state, seen = LEAF, tx.init(LEAF), []
    for size, value in zip(sizes, values or (0.5,) * len(sizes), strict=True):
        params, state, held = step(params, state, jnp.float32(size), jnp.float32(value))
        seen.append(bool(held))
    return seen


def guarded(**options: Any) -> Any:
    return og.guard(optax.sgd(0.1), og.skip_large(10.0), patience=9, **options)


def side_by_side() -> Any:
    group = jax.tree.map(lambda _: "large", LEAF)
    return optax.partition({"large": guarded(), "other": og.guard(optax.sgd(0.1))}, group)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("tx", "sizes", "expected"),
    [
        (guarded(), (GOOD, BAD, GOOD, LARGE, GOOD), "-h-h-"),
        (guarded(halt_after=2), (GOOD, BAD, BAD, GOOD), "-hhh"),
        (guarded(recovery=(og.reset_moments(after=1),)), (GOOD, LARGE, GOOD), "-h-"),
        (guarded(recovery=(og.rewind(every=1, after=1),)), (GOOD, GOOD, BAD, GOOD), "--h-"),
        (og.guard(optax.scale(jnp.inf), check_updates=True), (GOOD, GOOD), "hh"),
        (og.guard(guarded()), (GOOD, LARGE, BAD, GOOD), "-hh-"),
        (optax.chain(optax.clip(5e3), guarded()), (GOOD, LARGE, BAD, GOOD), "-hh-"),
        (side_by_side(), (GOOD, LARGE, BAD, GOOD), "-hh-"),
        (og.accumulate(optax.sgd(0.1), 2), (GOOD, GOOD, BAD, GOOD, GOOD, BAD, BAD, BAD), "--h--hhh"),
        (og.accumulate(guarded(), 2), (LARGE, LARGE, GOOD, GOOD, BAD, BAD, GOOD), "-h--hh-"),
        (og.accumulate(guarded(), 2, on_nonfinite="drop_cycle"), (BAD, GOOD, GOOD, GOOD), "hh--"),
        (og.loss_scaling(optax.sgd(0.1), init=1.0, growth_interval=1), (GOOD, BAD, GOOD), "-h-"),
        (og.loss_scaling(og.accumulate(guarded(), 2), init=1.0), (GOOD, BAD, LARGE, LARGE, GOOD), "-h-h-"),
        (optax.MultiSteps(guarded(), 2), (LARGE, LARGE, GOOD, GOOD, BAD, BAD, GOOD), "-h---h-"),
        (optax.apply_if_finite(guarded(), 9), (GOOD, LARGE, BAD, GOOD), "-hh-"),
        (optax.inject_hyperparams(lambda rate: og.guard(optax.sgd(rate)))(rate=0.1), (GOOD, BAD, GOOD), "-h-"),
    ],
)
def test_each_wrapper_tells_of_its_last_call(tx: Any, sizes: tuple[float, ...], expected: str) -> None:
    assert "".join("-h"[held] for held in flags(tx, sizes)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.holds], ids=str)
@pytest.mark.usefixtures("standard_promotion")
def test_every_public_wrapper_that_holds_a_step_says_so(entry: Any) -> None:
    tx = entry.make_strict()
    assert not og.keep_if_held(tx.init(LEAF), jnp.array(False), jnp.array(True)), "before the first call"
    assert flags(tx, (GOOD, BAD)) == [False, True]


def test_an_empty_flush_is_no_held_step_and_a_lost_one_is() -> None:
    tx = og.accumulate(optax.sgd(0.1), 3)
    flush = quick_jit(lambda state: og.flush(tx, state, LEAF)[1])
    state = tx.init(LEAF)
    assert not og.keep_if_held(flush(state), False, True)
    assert og.keep_if_held(flush(state._replace(micro_step=jnp.int32(1))), False, True)


def test_any_tree_keeps_its_bits_and_its_types() -> None:
    def tree(number: float, key: int) -> dict[str, Any]:
        return {
            "f": jnp.array([number, -0.0, 1e-40], jnp.float32),
            "h": jnp.array(number, jnp.bfloat16),
            "z": jnp.array(number, jnp.complex64),
            "count": jnp.int32(key),
            "key": jax.random.key(key),
            "python": number,
            "none": None,
            "apply": jnp.tanh,
        }

    tx = og.guard(optax.sgd(0.1))
    old, new = tree(0.5, 1), tree(BAD, 2)
    step = quick_jit(lambda size: og.apply_gradients(tx, jnp.full(2, size), tx.init(LEAF), LEAF)[1])
    for size, wanted in ((BAD, old), (GOOD, new)):
        kept = og.keep_if_held(step(size), new, old)
        assert kept["apply"] is jnp.tanh
        for name in ("f", "h", "z", "count", "python"):
            like = jnp.asarray(wanted[name])
            assert kept[name].dtype == like.dtype
            assert np.asarray(kept[name]).tobytes() == np.asarray(like).tobytes(), name
        assert jnp.all(jax.random.key_data(kept["key"]) == jax.random.key_data(wanted["key"]))


def test_under_vmap_and_scan_each_replica_keeps_its_own() -> None:
    tx = og.guard(optax.sgd(0.1))

    def step(carry: Any, size: Any) -> Any:
        params, state, mean = carry
        params, state = og.apply_gradients(tx, jnp.full(2, size), state, params)
        return (params, state, og.keep_if_held(state, mean + size, mean)), None

    def run(sizes: Any) -> Any:
        return jax.lax.scan(step, (LEAF, tx.init(LEAF), jnp.zeros(())), sizes)[0][2]

    sizes = jnp.array([[1.0, BAD, 2.0], [BAD, BAD, 4.0]])
    np.testing.assert_array_equal(quick_jit(jax.vmap(run))(sizes), [3.0, 4.0])


def test_a_state_of_many_runs_keeps_for_each_of_them() -> None:
    tx = og.loss_scaling(og.guard(optax.sgd(0.1)), init=1.0)
    many, grads = jnp.ones((3, 2)), jnp.ones((3, 2)).at[1, 0].set(BAD)
    states = jax.vmap(tx.init)(many)
    _, states = quick_jit(jax.vmap(lambda g, s, p: og.apply_gradients(tx, g, s, p)))(grads, states, many)
    kept = og.keep_if_held(
        states, {"mean": many, "count": jnp.full(3, 7)}, {"mean": 0 * many, "count": jnp.zeros(3, int)}
    )
    np.testing.assert_array_equal(kept["count"], [7, 0, 7])
    np.testing.assert_array_equal(kept["mean"], [[1, 1], [0, 0], [1, 1]])
    with pytest.raises(
        ValueError, match=r"`state` is that of many runs, \[3\], and leaf `\(root\)` has the shape \[2, 3\]"
    ):
        og.keep_if_held(states, jnp.ones((2, 3)), jnp.zeros((2, 3)))


def test_the_selection_reads_no_parameters_and_multiplies_nothing() -> None:
    state = og.guard(optax.adam(0.1)).init(LEAF)
    jaxpr = jax.make_jaxpr(lambda s, n, o: og.keep_if_held(s, n, o))(state, jnp.ones(11), jnp.zeros(11))
    large = [e.primitive.name for e in jaxpr.eqns if any(getattr(v.aval, "shape", ()) == (11,) for v in e.invars)]
    assert large in (["select_n"], ["jit"]), large


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"mean": jnp.zeros(2), "var": jnp.zeros(2)}, "`new` has leaf `var` that is not a leaf of `old`"),
        ({"mean": jnp.zeros(3)}, r"leaf `mean` is float32\[2\] in `old` and float32\[3\] in `new`"),
        ({"mean": jnp.zeros(2, jnp.bfloat16)}, r"float32\[2\] in `old` and bfloat16\[2\] in `new`"),
        ({"mean": jnp.tanh}, "leaf `mean` is not an array"),
        ([jnp.zeros(2)], "`new`"),
    ],
)
def test_wrong_trees_are_refused_by_name(new: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"keep_if_held: .*{message}"):
        og.keep_if_held(og.guard(optax.sgd(0.1)).init(LEAF), new, {"mean": jnp.zeros(2)})


def test_a_state_that_never_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_if_held: there is no `guard`, `accumulate` or `loss_scaling`"):
        og.keep_if_held(optax.adam(0.1).init(LEAF), LEAF, LEAF)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))


class WithStatistics(TrainState):
    batch_stats: Any
    key: Any


X = jax.random.normal(jax.random.key(1), (8, 3))
BATCHES = (X, X.at[0, 0].set(jnp.nan), 2 * X)


@quick_jit
def linen_step(state: Any, x: jax.Array) -> Any:
    def loss_of(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, changed = Normed().apply(variables, x, True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y - 1)), changed["batch_stats"]

    (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(
        grads=grads, value=loss, batch_stats=statistics, key=jax.random.fold_in(state.key, state.step)
    )


@pytest.mark.usefixtures("standard_promotion")
def test_linen_keeps_every_replaced_field_on_a_held_step() -> None:
    variables = Normed().init(jax.random.key(0), X, True)
    state = WithStatistics.create(
        apply_fn=None,
        params=variables["params"],
        tx=og.guard(optax.adam(0.05)),
        batch_stats=variables["batch_stats"],
        key=jax.random.key(2),
    )
    histories = [state]
    for x in BATCHES:
        histories.append(linen_step(histories[-1], x))
    beside = [(h.params, h.batch_stats, jax.random.key_data(h.key)) for h in histories]
    chex.assert_trees_all_equal(beside[1], beside[2])
    assert int(histories[2].step) == 2
    mean, wanted = histories[3].batch_stats["BatchNorm_0"]["mean"], np.zeros(3)
    for x in (X, 2 * X):
        wanted = 0.9 * wanted + 0.1 * np.mean(np.asarray(x, np.float64), axis=0)
    np.testing.assert_allclose(mean, wanted, rtol=1e-5)


def test_linen_without_a_guard_replaces_as_flax_does_and_names_what_does_not_fit() -> None:
    def create(tx: Any) -> Any:
        return WithStatistics.create(apply_fn=None, params={"w": LEAF}, tx=tx, batch_stats=None, key=jnp.zeros(2))

    grads = {"w": jnp.full(2, BAD)}
    assert jnp.isnan(create(optax.sgd(0.1)).apply_gradients(grads=grads, batch_stats=grads["w"]).batch_stats).all()
    with pytest.raises(
        ValueError, match=r"TrainState\.apply_gradients: .*`batch_stats`.*an array of shape \(2,\).*None"
    ):
        create(og.guard(optax.sgd(0.1))).apply_gradients(grads=grads, batch_stats=jnp.zeros(2))


def test_linen_keeps_fp8_scales_on_a_held_step() -> None:
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.zeros(())}}
    state = TrainState.create(apply_fn=None, params=params, tx=og.guard(optax.sgd(0.5)))
    for number, wanted in ((7.0, 7.0), (BAD, 7.0)):
        grads = {"params": {"w": jnp.full(2, number)}, "_overwrite_with_gradient": {"scale": jnp.float32(number)}}
        state = state.apply_gradients(grads=grads)
        assert state.params["_overwrite_with_gradient"]["scale"] == wanted
    plain = train_state.TrainState.create(apply_fn=None, params=params, tx=og.guard(optax.sgd(0.5)))
    assert jnp.isnan(plain.apply_gradients(grads=grads).params["_overwrite_with_gradient"]["scale"]), "Flax's own"


@pytest.mark.usefixtures("standard_promotion")
def test_a_nan_batch_spoils_the_batch_norm_of_the_reference_model_unless_kept() -> None:
    model = ConvNet(2, in_channels=1, channels=(2,), batch_norm=True, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, og.guard(optax.sgd(0.1)), wrt=nnx.Param)
    graph, opened = nnx.split((model, optimizer))

    @quick_jit
    def step(opened: Any, images: Any) -> Any:
        model, optimizer = nnx.merge(graph, opened)
        before = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(images))))(model)
        optimizer.update(model, grads, value=loss)
        after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        kept = og.keep_if_held(optimizer.opt_state, after, before)
        nnx.update(model, kept)
        return nnx.state((model, optimizer)), before, after, kept

    images = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))
    opened, _, after, kept = step(opened, images)
    chex.assert_trees_all_equal(kept, after)
    opened, before, after, kept = step(opened, images.at[0].set(jnp.nan))
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(after)), "what the model alone would be left with"
    chex.assert_trees_all_equal(kept, before)
    model, optimizer = nnx.merge(graph, opened)
    assert int(og.metrics(optimizer.opt_state)["guard/skipped_total"]) == 1
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model, nnx.BatchStat)), before)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_equinox_keeps_its_state() -> None:
    class Net(eqx.Module):
        norm: eqx.nn.BatchNorm
        head: eqx.nn.Linear

        def __call__(self, x: Any, state: Any) -> Any:
            x, state = self.norm(x, state)
            return self.head(x), state

    def make() -> Any:
        return Net(eqx.nn.BatchNorm(3, "batch", mode="ema", momentum=0.9), eqx.nn.Linear(3, 1, key=jax.random.key(0)))

    model, statistics = eqx.nn.make_with_state(make)()
    tx = og.guard(optax.sgd(0.1))

    def loss_of(model: Any, statistics: Any, x: Any) -> Any:
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, statistics = batched(x, statistics)
        return jnp.mean(jnp.square(y - 1)), statistics

    @eqx.filter_jit
    def step(model: Any, statistics: Any, state: Any, x: Any) -> Any:
        before = statistics
        (loss, after), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(model, statistics, x)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        params, state = og.apply_gradients(tx, grads, state, params, value=loss)
        return eqx.combine(params, static), og.keep_if_held(state, after, before), state

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    model, statistics, state = step(model, statistics, state, X)
    kept = jax.tree.map(np.array, jax.tree.leaves(statistics))
    model, statistics, state = step(model, statistics, state, BATCHES[1])
    chex.assert_trees_all_equal(jax.tree.leaves(statistics), kept)
    assert int(og.metrics(state)["guard/skipped_total"]) == 1


def carry(tree: Any) -> optax.GradientTransformationExtraArgs:
    """As docs/state/held.md has it."""

    def update(updates: Any, state: Any, params: Any = None, *, carried: Any, **extra: Any) -> Any:
        return updates, carried

    return optax.GradientTransformationExtraArgs(lambda _: tree, update)


def test_what_is_carried_in_the_optimizers_state_comes_back_with_a_rewind() -> None:
    recovery = (og.rewind(every=100, after=2, keep=1),)
    tx = og.guard(optax.chain(optax.sgd(0.1), carry({"mean": jnp.zeros(2)})), recovery=recovery)

    @quick_jit
    def step(params: Any, state: Any, size: Any) -> Any:
        carried = {"mean": state.guarded_state[-1]["mean"] + size}
        return og.apply_gradients(tx, jnp.full(2, size), state, params, value=jnp.float32(1.0), carried=carried)

    params, state = LEAF, tx.init(LEAF)
    means = []
    for size in (1.0, 2.0, BAD, BAD, 4.0):
        params, state = step(params, state, jnp.float32(size))
        means.append(float(state.guarded_state[-1]["mean"][0]))
    assert means == [1.0, 3.0, 3.0, 1.0, 5.0]  # held; back to the snapshot after the first step; on from there
    assert og.flight_log(state)["recovery"][3] == "rewind_refused"

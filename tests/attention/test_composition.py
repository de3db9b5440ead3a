"""QK-Clip inside everything else: nothing undoes the shrinkage, held steps scale nothing, maxima are gathered rightly.

Every composition is the line that a person writes.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit, users_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from optax_guard._common.typing import PyTree

HEADS, LIMIT = 2, 100.0
LAYOUT = og.linen_attention()
PARAMS = {
    "attention": {side: {"kernel": np.full((3, HEADS, 2), 10.0, np.float32)} for side in ("query", "key", "value")}
}
GRADS = jax.tree.map(lambda leaf: np.full_like(leaf, -1.0), PARAMS)
HIGH = {"attention": jnp.asarray([1e4, 50.0], jnp.float32)}  # the first head's weights go from 10 to about 1
CALM = {"attention": jnp.asarray([80.0, 50.0], jnp.float32)}


def adamw_like(rate: float = 0.5) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.5)


def clip(**options: Any) -> optax.GradientTransformationExtraArgs:
    return og.qk_clip(LIMIT, layers=LAYOUT, **options)


def both_ways(tx: Any, steps: list[tuple[Any, Any, Any]], params: Any = PARAMS) -> list[tuple[Any, Any]]:
    """The last (params, state) by `apply_gradients` and by `update`, after steps of (gradient, maxima, loss)."""

    def fast(params: Any, state: Any, step: Any) -> Any:
        grads, max_logits, loss = step
        return og.apply_gradients(tx, grads, state, params, max_logits=max_logits, value=loss)

    def slow(params: Any, state: Any, step: Any) -> Any:
        grads, max_logits, loss = step
        updates, state = tx.update(grads, state, params, max_logits=max_logits, value=loss)
        return optax.apply_updates(params, updates), state

    @quick_jit
    def run(params: Any, steps: Any) -> Any:
        start = (params, tx.init(params))
        return [jax.lax.scan(lambda at, step, way=way: (way(*at, step), None), start, steps)[0] for way in (fast, slow)]

    return run(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps))


def first_head(params: Any, side: str = "query") -> np.ndarray:
    return np.asarray(params["attention"][side]["kernel"])[:, 0]


def one_step(tx: Any, grads: Any = GRADS, maxima: Any = HIGH) -> list[Any]:
    return [params for params, _ in both_ways(tx, [(grads, maxima, jnp.float32(1.0))])]


# Nothing undoes the shrinkage

ORDERS: dict[str, tuple[Callable[[], Any], float]] = {  # what a person writes, and the step of the first head before it
    "chain": (lambda: optax.chain(adamw_like(), clip()), 0.5),
    "guard": (lambda: og.guard(optax.chain(adamw_like(), clip())), 0.5),
    "guard, checked": (lambda: og.guard(optax.chain(adamw_like(), clip()), check_updates=True), 0.5),
    "stabilize": (lambda: og.stabilize(optax.chain(adamw_like(), clip()), max_change=0.01), 0.1),
    "limit_step behind": (lambda: og.guard(optax.chain(adamw_like(), clip(), og.limit_step(0.01))), 0.1),
    "limit_step before": (lambda: og.guard(optax.chain(adamw_like(), og.limit_step(0.01), clip())), 0.1),
    "clippy behind": (lambda: og.guard(optax.chain(adamw_like(), clip(), og.clippy(0.01))), 0.1),
    "scale behind": (lambda: og.guard(optax.chain(adamw_like(), clip(), optax.scale(0.25))), 0.125),
    "no guard": (lambda: og.accumulate(optax.chain(adamw_like(), clip(), og.limit_step(0.01)), 1), 0.1),
    "loss_scaling": (lambda: og.loss_scaling(optax.chain(adamw_like(), clip(), og.limit_step(0.01)), init=1.0), 0.1),
    "proximal": (
        lambda: og.guard(og.proximal_l1(optax.chain(adamw_like(), clip()), 1.0, learning_rate=0.5, momentum=0.0)),
        0.0,
    ),
    "MultiSteps": (lambda: og.guard(optax.MultiSteps(optax.chain(adamw_like(), clip()), 1)), 0.5),
    "apply_if_finite": (lambda: og.guard(optax.apply_if_finite(optax.chain(adamw_like(), clip()), 3)), 0.5),
    "inject_hyperparams": (
        lambda: og.guard(
            optax.chain(
                adamw_like(),
                optax.inject_hyperparams(og.qk_clip, static_args=("layers", "balance"))(LIMIT, layers=LAYOUT),
            )
        ),
        0.5,
    ),
}


QUICK = ("chain", "guard", "stabilize", "limit_step behind", "proximal")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "order", [order if order in QUICK else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS]
)
def test_nothing_undoes_the_shrinkage(order: str) -> None:
    """A weight of 10 that is to shrink to a tenth ends there, and not at 9.9, whatever bounds or scales the update."""
    make, step = ORDERS[order]
    for params in one_step(make()):
        np.testing.assert_allclose(first_head(params), 0.1 * (10.0 + step), rtol=2e-3)
        np.testing.assert_allclose(first_head(params, "key"), 0.1 * (10.0 + step), rtol=2e-3)
        np.testing.assert_allclose(first_head(params, "value"), 10.0 + step, rtol=2e-3)


@pytest.mark.usefixtures("standard_promotion")
def test_back_off_does_not_scale_the_shrinkage() -> None:
    """With a scale of 1/2, the step is halved, and the weight still ends at a tenth."""
    tx = og.guard(optax.chain(optax.sgd(0.5), clip()), recovery=(og.back_off(factor=0.5, after=1),))
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), GRADS)
    for params, state in both_ways(tx, [(bad, CALM, jnp.float32(1.0)), (GRADS, HIGH, jnp.float32(1.0))]):
        assert float(og.metrics(state)["guard/update_scale"]) == 0.5
        np.testing.assert_allclose(first_head(params), 0.1 * 10.25, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_proximal_zeros_stay_exactly_zero() -> None:
    tx = og.guard(og.proximal_l1(optax.chain(optax.sgd(0.5), clip()), 100.0, learning_rate=0.5))
    for params in one_step(tx, jax.tree.map(np.zeros_like, GRADS)):
        chex.assert_trees_all_equal(params, jax.tree.map(np.zeros_like, PARAMS))


@pytest.mark.slow
def test_a_partition_clips_only_its_own_layers() -> None:
    """`optax.partition` hides the other leaves; a description then finds what is left."""
    params = {"a": PARAMS["attention"], "b": PARAMS["attention"]}
    clipped = optax.chain(optax.sgd(0.5), og.qk_clip(LIMIT, layers=og.linen_attention("a")))
    tx = og.guard(optax.partition({"clipped": clipped, "plain": optax.sgd(0.5)}, {"a": "clipped", "b": "plain"}))
    maxima = {"a": HIGH["attention"], "b": HIGH["attention"]}
    grads = jax.tree.map(lambda leaf: np.full_like(leaf, -1.0), params)
    for new, _ in both_ways(tx, [(grads, maxima, jnp.float32(1.0))], params):
        np.testing.assert_allclose(new["a"]["query"]["kernel"][:, 0], 1.05, rtol=1e-5)
        np.testing.assert_allclose(new["b"]["query"]["kernel"][:, 0], 10.5, rtol=1e-5)


# Held steps


@pytest.mark.parametrize(
    "tx",
    [og.guard, pytest.param(lambda inner: og.accumulate(og.guard(inner), 1), marks=pytest.mark.slow)],
    ids=["guard", "accumulate"],
)
def test_a_held_step_scales_nothing_and_its_maximum_is_recorded(tx: Any) -> None:
    tx = tx(optax.chain(adamw_like(), clip()))
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), GRADS)
    for params, state in both_ways(tx, [(GRADS, CALM, jnp.float32(1.0)), (bad, HIGH, jnp.float32(1.0))]):
        np.testing.assert_allclose(first_head(params), 10.5, rtol=1e-6)
        log = og.flight_log(state)
        assert [str(event) for event in log["event"]] == ["applied", "nonfinite"]
        np.testing.assert_allclose(log["max_logit"][0], 80.0)
        assert og.metrics(state)["qk_clip/clipped_total"] == 0


def test_the_recorder_keeps_the_largest_logit_of_every_step_without_any_qk_clip() -> None:
    tx = og.guard(optax.sgd(0.1))
    odd = {"attention": jnp.asarray([jnp.nan, 1.0], jnp.float32)}
    steps = [(GRADS, maxima, jnp.float32(1.0)) for maxima in (CALM, HIGH, odd)]
    for _, state in both_ways(tx, steps):
        np.testing.assert_array_equal(og.flight_log(state)["max_logit"], [80.0, 1e4, np.nan])
        chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_a_multisteps_between_two_emissions_scales_nothing_again() -> None:
    tx = og.guard(optax.MultiSteps(optax.chain(optax.sgd(0.5), clip()), 2))
    steps = [(GRADS, HIGH, jnp.float32(1.0))] * 3
    with jax.numpy_dtype_promotion("standard"):
        for params, _ in both_ways(tx, steps):
            np.testing.assert_allclose(first_head(params), 0.1 * 10.5, rtol=1e-5)


# Accumulation


@pytest.mark.parametrize("guarded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_accumulate_keeps_the_largest_logits_of_the_micro_batches_that_it_keeps(guarded: bool) -> None:
    inner = optax.chain(optax.sgd(0.5), clip())
    tx = og.accumulate(og.guard(inner) if guarded else inner, 3)
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), GRADS)
    higher = {"attention": jnp.asarray([4e4, 4e4], jnp.float32)}  # of the micro-batch that is dropped
    nothing = {"attention": jnp.asarray([3.0, -2.0], jnp.float32)}
    cycle = [(GRADS, HIGH, jnp.float32(1.0)), (bad, higher, jnp.float32(1.0)), (GRADS, nothing, jnp.float32(1.0))]
    for params, state in both_ways(tx, cycle):
        np.testing.assert_allclose(first_head(params), 0.1 * 10.5, rtol=1e-5)
        np.testing.assert_allclose(params["attention"]["query"]["kernel"][:, 1], 10.5, rtol=1e-6)
        np.testing.assert_allclose(og.metrics(state)["qk_clip/max_logit"], 1e4)
        if guarded:
            np.testing.assert_allclose(og.flight_log(state)["max_logit"], [1e4])
    # The next cycle starts anew, and a maximum of a kept micro-batch that is not finite says nothing about its head.
    odd = {"attention": jnp.asarray([jnp.nan, 400.0], jnp.float32)}
    for _, state in both_ways(tx, [*cycle, *[(GRADS, odd, jnp.float32(1.0)), *[(GRADS, CALM, jnp.float32(1.0))] * 2]]):
        numbers = og.metrics(state)
        assert (int(numbers["qk_clip/invalid_total"]), int(numbers["qk_clip/clipped_heads"])) == (1, 1)
        chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_flush_clips_by_the_micro_batches_so_far() -> None:
    tx = og.accumulate(og.guard(optax.chain(optax.sgd(0.5), clip())), 4)
    params, state = og.apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, max_logits=HIGH)
    params, state = og.flush(tx, state, params)
    np.testing.assert_allclose(first_head(params), 0.1 * 10.5, rtol=1e-5)


def loss_fn(w: jax.Array, batch: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    loss = jnp.mean((batch @ w) ** 2)
    return loss, {"max_logits": {"attention": jnp.max(batch, axis=0), "last": jnp.max(batch)[None]}, "loss": loss}


def test_accumulate_gradients_returns_the_largest_logits_of_what_it_keeps() -> None:
    batch = jnp.arange(12.0).reshape(6, 2).at[2, 1].set(jnp.nan)  # rows 2 and 5 are one micro-batch
    (_, aux), _ = og.accumulate_gradients(loss_fn, 3, has_aux=True)(jnp.ones(2), batch)
    np.testing.assert_array_equal(aux["max_logits"]["attention"], [8.0, 9.0])
    np.testing.assert_array_equal(aux["max_logits"]["last"], [9.0])
    assert aux["loss"].shape == (3,)


def test_accumulate_gradients_agrees_over_devices_in_one_reduction_of_maxima() -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    batch = jnp.arange(16.0).reshape(8, 2)
    gradient = og.accumulate_gradients(loss_fn, 2, has_aux=True, axis_name="x", mesh=mesh)
    (_, aux), _ = quick_jit(gradient)(jnp.ones(2), batch)
    np.testing.assert_array_equal(aux["max_logits"]["attention"], [14.0, 15.0])
    assert str(jax.make_jaxpr(gradient)(jnp.ones(2), batch)).count("pmax") == 1


# Many devices


@pytest.mark.parametrize("where", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("clip", "both")), "guard"])
def test_devices_agree_on_the_largest_logits_in_one_packed_reduction(where: str) -> None:
    """Each device has its own part of the batch; layers and heads are reduced together."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = dict.fromkeys(("a", "b"), PARAMS["attention"])
    in_clip, in_guard = ("x" if where in (part, "both") else None for part in ("clip", "guard"))
    tx = optax.chain(optax.sgd(0.5), clip(axis_name=in_clip))
    tx = og.guard(tx, axis_name=in_guard, recorder_rows=2) if in_guard else tx

    def step(params: Any, state: Any, maxima: jax.Array) -> Any:
        max_logits = {"a": maxima[0], "b": maxima[0] / 4}
        grads = jax.tree.map(jnp.zeros_like, params)
        return og.apply_gradients(tx, grads, state, params, max_logits=max_logits)

    everywhere = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P(), P()))
    maxima = jnp.asarray([[50.0 + i, 400.0 * (i == 5)] for i in range(8)], jnp.float32)
    assert str(jax.make_jaxpr(everywhere)(params, tx.init(params), maxima)).count("pmax") == 1
    new, state = quick_jit(everywhere)(params, tx.init(params), maxima)
    np.testing.assert_allclose(new["a"]["query"]["kernel"][0, :, 0], [10.0, 5.0], rtol=1e-5)
    np.testing.assert_allclose(new["b"]["query"]["kernel"][0, :, 0], [10.0, 10.0], rtol=1e-5)
    np.testing.assert_allclose(og.metrics(state)["qk_clip/a/max_logit"], 400.0)


@pytest.mark.slow
def test_a_nan_on_one_device_says_nothing_about_its_head_on_all() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = og.guard(optax.chain(optax.sgd(0.5), clip()), axis_name="x")

    def step(params: Any, state: Any, maxima: jax.Array) -> Any:
        grads = jax.tree.map(jnp.zeros_like, params)
        return og.apply_gradients(tx, grads, state, params, max_logits={"attention": maxima[0]})

    maxima = jnp.full((8, 2), 400.0).at[3, 0].set(jnp.nan)
    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P(), P()))
    new, state = quick_jit(step)(PARAMS, tx.init(PARAMS), maxima)
    np.testing.assert_allclose(new["attention"]["query"]["kernel"][0, :, 0], [10.0, 5.0], rtol=1e-5)
    assert int(og.metrics(state)["qk_clip/invalid_total"]) == 1


@pytest.mark.parametrize("explicit", [pytest.param(False, marks=pytest.mark.slow), True], ids=["auto", "explicit"])
def test_heads_sharded_over_devices_give_the_result_of_one_device(explicit: bool) -> None:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(kind,))
    tx = og.guard(optax.chain(optax.sgd(0.5), clip()), recorder_rows=2)
    alone, _ = og.apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, max_logits=HIGH)
    with jax.sharding.set_mesh(mesh):
        split = NamedSharding(mesh, P(None, "x"))
        params, grads = jax.device_put((PARAMS, GRADS), split)
        maxima = jax.device_put(HIGH, NamedSharding(mesh, P("x")))
        step = quick_jit(lambda p, g, m: og.apply_gradients(tx, g, tx.init(p), p, max_logits=m)[0])
        new = step(params, grads, maxima)
    chex.assert_trees_all_close(jax.device_get(new), jax.device_get(alone), rtol=1e-6)
    assert new["attention"]["query"]["kernel"].sharding.is_equivalent_to(split, 3)


@pytest.mark.slow
def test_vmapped_runs_equal_single_ones() -> None:
    tx = og.guard(optax.chain(optax.sgd(0.5), clip()), recorder_rows=2)
    maxima = {"attention": jnp.asarray([[1e4, 50.0], [80.0, 400.0]], jnp.float32)}

    def run(max_logits: Any) -> Any:
        return og.apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, max_logits=max_logits)

    together, state = quick_jit(jax.vmap(run))(maxima)
    one = quick_jit(run)
    for i in range(2):
        alone, _ = one({"attention": maxima["attention"][i]})
        for side, leaves in alone["attention"].items():
            np.testing.assert_allclose(together["attention"][side]["kernel"][i], leaves["kernel"], rtol=1e-6)
    assert og.metrics(state)["qk_clip/max_logit"].tolist() == [1e4, 400.0]


# Recovery, and the optimizer's moments


@pytest.mark.slow
def test_a_rewind_brings_the_weights_back() -> None:
    tx = og.guard(optax.chain(optax.sgd(0.5), clip()), recovery=(og.rewind(every=1, keep=2, after=2),))
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), GRADS)
    steps = [(GRADS, CALM, jnp.float32(1.0)), (GRADS, HIGH, jnp.float32(1.0)), *[(bad, HIGH, jnp.float32(1.0))] * 2]
    for params, state in both_ways(tx, steps):
        assert int(og.metrics(state)["guard/rewind_total"]) == 1
        before = 10.5 if first_head(params)[0, 0] > 2 else 0.1 * 11.0
        np.testing.assert_allclose(first_head(params), before, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_moments_are_not_scaled() -> None:
    tx = optax.chain(optax.adam(0.5), clip())
    plain = optax.adam(0.5)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, max_logits=HIGH)
    _, expected = plain.update(GRADS, plain.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(state[0], expected)


# Nothing is added to the write


def compiled(tx: Any, params: PyTree, max_logits: PyTree) -> Any:
    def step(params: Any, state: Any, grads: Any, maxima: Any) -> Any:
        return og.apply_gradients(tx, grads, state, params, max_logits=maxima)

    step = users_jit(step, donate_argnums=(0, 1))
    return step.lower(params, tx.init(params), params, max_logits).compile()


@pytest.mark.slow
def test_the_factors_cost_no_further_pass_no_temporaries_and_no_conditional() -> None:
    params = {"attention": {side: {"kernel": jnp.ones((64, 8, 32))} for side in ("query", "key", "value")}}
    maxima = {"attention": jnp.full((8,), 50.0)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with jax.numpy_dtype_promotion("standard"):
        bare, clipped = (
            compiled(og.guard(tx), params, maxima) for tx in (optax.adamw(1e-3), optax.chain(optax.adamw(1e-3), clip()))
        )
    moved = [program.cost_analysis()["bytes accessed"] / size for program in (bare, clipped)]
    assert moved[1] < moved[0] + 0.05, moved
    assert clipped.memory_analysis().temp_size_in_bytes < bare.memory_analysis().temp_size_in_bytes + 0.05 * size
    assert clipped.as_text().count(" conditional(") == bare.as_text().count(" conditional(")

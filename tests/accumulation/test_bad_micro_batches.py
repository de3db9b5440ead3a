"""A micro-batch that is not finite, inside one call: dropped, spoiling the whole, or passed on, as across calls."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from jax.sharding import AxisType
from test_scan import BATCH, PARAMS, P, all_reduces, assert_equal, loss_fn, oracle, sharded, tokens

import optax_guard as og

CLEAN, NAN, NAN_LOSS, NAN_GRADIENT, INF_GRADIENT, HUGE_GRADIENT = range(6)
BAD = {"both": NAN, "the loss": NAN_LOSS, "the gradient": NAN_GRADIENT, "inf": INF_GRADIENT, "1e25": HUGE_GRADIENT}
ROWS = np.arange(48)


def faulty(params: Any, batch: Any) -> Any:
    """`loss_fn`, to which the rows' `fault` adds what its name says."""
    x = jnp.sum(params["kernel"])
    faults = [
        lambda x: 0 * x,
        lambda x: jnp.nan * x,
        lambda x: jax.lax.stop_gradient(jnp.nan * x),
        lambda x: jnp.sqrt(jnp.square(x - jax.lax.stop_gradient(x))),
        lambda x: (x - jax.lax.stop_gradient(x)) * jnp.inf,
        lambda x: 1e25 * (x - jax.lax.stop_gradient(x)),
    ]
    loss = loss_fn(params, {name: batch[name] for name in ("tokens", "mask")})
    loss = loss + jax.lax.switch(jnp.max(batch["fault"]), faults, x)
    return loss, {"finite": jnp.isfinite(loss), "first": batch["tokens"][0, 0]}


def with_fault(rows: np.ndarray, fault: int) -> dict[str, np.ndarray]:
    return {**BATCH, "fault": np.where(rows, fault, CLEAN).astype(np.int32)}


def without(rows: np.ndarray) -> Any:
    """NumPy float64, by hand, of the rows that are kept."""
    return oracle({name: leaf[~rows] for name, leaf in BATCH.items()})


@functools.cache
def gradients(on_nonfinite: str) -> Any:
    options = {"has_aux": True, "weight_fn": tokens, "on_nonfinite": on_nonfinite}
    return quick_jit(og.accumulate_gradients(faulty, 4, **options))


def all_nan(tree: Any) -> bool:
    return all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(tree))


def test_the_words_and_the_default_are_those_of_accumulate() -> None:
    one, two = (inspect.signature(f).parameters["on_nonfinite"] for f in (og.accumulate, og.accumulate_gradients))
    assert one.default == two.default == "drop_micro"
    for make in (functools.partial(og.accumulate, optax.sgd(1.0)), functools.partial(og.accumulate_gradients, loss_fn)):
        with pytest.raises(ValueError, match="`on_nonfinite` must be one of 'drop_micro', 'drop_cycle'"):
            make(2, on_nonfinite="skip")


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_micro_batch_is_dropped_with_its_weight_or_spoils_the_whole_or_passes(fault: str) -> None:
    rows = ROWS % 4 == 2  # the third micro-batch
    batch = with_fault(rows, BAD[fault])
    (value, aux), grads = gradients("drop_micro")(PARAMS, batch)
    assert_equal((value, grads), without(rows))
    np.testing.assert_array_equal(aux["first"], BATCH["tokens"][:4, 0])  # of every micro-batch, dropped or not
    np.testing.assert_array_equal(aux["finite"], [True, True, fault not in ("both", "the loss", "inf"), True])
    (value, _), grads = gradients("drop_cycle")(PARAMS, batch)
    assert all_nan((value, grads))
    (value, _), grads = gradients("propagate")(PARAMS, batch)
    whole = np.isfinite(value) and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert whole == (fault == "1e25")


def test_a_clean_batch_is_the_same_under_every_policy() -> None:
    for policy in ("drop_micro", "drop_cycle", "propagate"):
        (value, _), grads = gradients(policy)(PARAMS, with_fault(ROWS < 0, CLEAN))
        assert_equal((value, grads), oracle())


def test_with_nothing_left_all_is_nan_so_that_a_guard_holds_counts_and_halts() -> None:
    tx = og.guard(optax.sgd(0.1), halt_after=2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        (value, _), grads = gradients("drop_micro")(params, with_fault(ROWS >= 0, NAN_GRADIENT))
        assert all_nan((value, grads))
        params, state = og.apply_gradients(tx, grads, state, params, value=value)
    assert (int(state.nonfinite_total), bool(state.halted)) == (2, True)
    assert_equal(params, PARAMS)


def test_a_bad_weight_drops_its_micro_batch_and_weights_whose_sum_overflows_give_nan() -> None:
    rows = ROWS % 4 == 1
    for bad in (-1.0, np.nan, np.inf):
        weights = np.where(rows, bad, np.sum(BATCH["mask"], axis=1, where=~rows[:, None]))

        def weight_of(batch: Any) -> jax.Array:
            return jnp.sum(batch["weight"])

        step = quick_jit(og.accumulate_gradients(loss_fn, 4, weight_fn=weight_of))
        assert_equal(step(PARAMS, {**BATCH, "weight": weights.astype(np.float32)}), without(rows))
    huge = quick_jit(
        og.accumulate_gradients(lambda p, batch: 0 * jnp.sum(p["kernel"]) * batch[0], 2, weight_fn=jnp.sum)
    )
    assert all_nan(huge(PARAMS, np.full(2, 3e38, np.float32)))


@pytest.mark.parametrize("under", ["jit", "shard_map"])
def test_each_device_drops_its_own_with_one_all_reduce_and_none_in_the_loop(under: str) -> None:
    rows = (ROWS // 6 == 3) & (ROWS % 3 == 1)  # the second of the three micro-batches of the fourth of eight devices
    mesh, params, _ = sharded(AxisType.Auto)
    batch = jax.device_put(with_fault(rows, NAN_GRADIENT), jax.NamedSharding(mesh, P("data")))

    def plain(params: Any, batch: Any) -> jax.Array:
        return faulty(params, batch)[0]

    for policy in ("drop_micro", "drop_cycle"):
        options = {"weight_fn": tokens, "axis_name": "data", "on_nonfinite": policy}
        if under == "jit":
            step = quick_jit(og.accumulate_gradients(plain, 3, mesh=mesh, **options))
        else:
            inside = og.accumulate_gradients(plain, 3, **options)
            step = quick_jit(jax.shard_map(inside, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        compiled = step.lower(params, batch).compile()
        result = compiled(params, batch)
        assert all_nan(result) if policy == "drop_cycle" else assert_equal(result, without(rows)) is None
        (line,) = all_reduces(compiled.as_text())
        assert "while/body" not in line

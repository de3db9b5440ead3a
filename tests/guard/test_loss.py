"""The loss: one reading of it everywhere, and a step whose loss is not finite is held as if its gradient were not."""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from registry import ENTRIES, Entry, momentum

import optax_guard as og
from optax_guard._common import extra as _extra

PARAMS, GRADS = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 0.25])}
READS = [
    e for e in ENTRIES if e.name in ("guard", "stabilize", "accumulate", "loss_scaling", "skip_spikes", "back_off")
]
HOLDS = [e for e in READS if e.holds]
pytestmark = pytest.mark.usefixtures("standard_promotion")

# as a person passes it -> what is read
LOSSES = {
    "python float": (1.5, 1.5),
    "python int": (2, 2.0),
    "large python int": (10**20, 1e20),
    "python int beyond every float": (10**400, np.inf),
    "large int64": (np.int64(2**40), 2.0**40),
    "large uint64": (np.uint64(2**63), 2.0**63),
    "bool": (True, 1.0),
    "python complex": (1.5 + 2j, 1.5),
    "numpy": (np.float64(1.5), 1.5),
    "numpy array": (np.array(1.5), 1.5),
    "int32": (jnp.int32(2), 2.0),
    "bfloat16": (jnp.bfloat16(1.5), 1.5),
    "complex64": (jnp.complex64(1.5 + 2j), 1.5),
    "nan": (jnp.nan, np.nan),
    "complex nan": (complex(1.0, np.nan), np.nan),
}


def each(entries: list[Entry]) -> Any:
    return pytest.mark.parametrize("entry", entries, ids=str)


def take(tx: Any, fast: bool, params: Any, state: Any, **extra: Any) -> tuple[Any, Any]:
    if fast:
        return og.apply_gradients(tx, GRADS, state, params, **extra)
    updates, state = tx.update(GRADS, state, params, **extra)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("case", LOSSES)
def test_every_number_is_read_as_a_float32_scalar(case: str) -> None:
    given, expected = LOSSES[case]
    for extra in ({"value": given}, {"loss": given}, {"value": given, "loss": 7.0}, {"value": None, "loss": given}):
        loss = _extra.loss_in("guard", extra)
        assert (loss.dtype, loss.shape) == (jnp.float32, ())
        np.testing.assert_array_equal(loss, np.float32(expected))


def test_float64_stays_and_the_loss_of_a_shard_map_is_the_mean() -> None:
    with jax.enable_x64(True):
        assert _extra.loss_in("guard", {"value": jnp.float64(1e300)}) == 1e300
        assert _extra.loss_in("guard", {"value": 0.5}).dtype == jnp.float32
    mean = jax.vmap(lambda x: _extra.loss_in("guard", {"loss": x}, "i"), axis_name="i")(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(mean, [2.0, 2.0])


@each(READS)
def test_every_function_that_reads_the_loss_takes_a_number_of_any_type_and_nothing_else(entry: Entry) -> None:
    tx = entry.make()

    def trace(**extra: Any) -> None:
        jax.eval_shape(lambda: tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra))

    trace(value=1)
    trace(loss=jnp.complex64(1.0))
    for wrong in ("text", [1.0], jax.random.key(0), object()):
        with pytest.raises(ValueError, match=rf"^{entry.name}: `value` must be the scalar loss"):
            trace(value=wrong)
    trace(loss=object())
    with pytest.raises(ValueError, match=rf"^{entry.name}: `value` must be the scalar loss; got.*\(2,\)"):
        trace(loss=np.ones(2))


@each(HOLDS)
def test_a_loss_that_is_not_finite_holds_the_step_and_is_counted(entry: Entry) -> None:
    tx = entry.make(inner=momentum)
    params = {"fast": PARAMS, "optax": PARAMS}
    state = jax.tree.map(lambda _: tx.init(PARAMS), params, is_leaf=lambda x: x is PARAMS)

    @quick_jit
    def step(params: Any, state: Any, loss: Any) -> Any:
        one = take(tx, True, params["fast"], state["fast"], value=loss)
        two = take(tx, False, params["optax"], state["optax"], loss=loss)
        return tuple({"fast": a, "optax": b} for a, b in zip(one, two, strict=True))

    for _ in range(2):
        params, state = step(params, state, 1.0)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        held, after = step(*step(params, state, bad), bad)  # twice: a whole cycle of an accumulation
        chex.assert_trees_all_equal(held, params)
        chex.assert_tree_all_finite(after)
        for each_state in after.values():
            counts = og.metrics(each_state)
            names = {"loss_scaling/overflow_total", "accumulate/dropped_total"} & counts.keys()
            assert all(counts[name] == 2 for name in names)
            if "guard/grad_norm" in counts:
                row = og.flight_log(each_state)[-1]
                assert (row["event"], np.isfinite(row["grad_norm"])) == ("nonfinite", True)
                np.testing.assert_array_equal(row["value"], bad)
                assert counts["guard/nonfinite_total"] >= 1
            else:
                assert names


def test_a_rule_that_judges_the_loss_and_back_off_alone_give_zeros() -> None:
    for tx in (og.skip_spikes(), og.skip_spikes(on="loss"), og.back_off()):
        for name in ("value", "loss"):
            updates = quick_jit(
                lambda tx=tx, name=name: tx.update(GRADS, tx.init(PARAMS), PARAMS, **{name: jnp.nan})[0]
            )()
            np.testing.assert_array_equal(updates["w"], 0)


def test_the_halt_says_that_it_was_the_loss() -> None:
    for tx in (
        og.guard(optax.sgd(1.0), halt_after=1),
        og.stabilize(optax.sgd(1.0), halt_after=1),
        og.accumulate(og.guard(optax.sgd(1.0), halt_after=1), 1),
        og.loss_scaling(og.guard(optax.sgd(1.0), halt_after=1)),
    ):
        state = quick_jit(lambda tx=tx: og.apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, value=jnp.nan)[1])()
        with pytest.raises(og.TrainingHalted, match="the loss was NaN; the gradient was finite"):
            og.raise_if_halted(state, PARAMS)
    nan = {"w": jnp.full(2, jnp.nan)}
    state = quick_jit(lambda: og.apply_gradients(tx, nan, tx.init(PARAMS), PARAMS, value=jnp.nan)[1])()
    with pytest.raises(og.TrainingHalted, match="the gradient of `w` held NaN"):
        og.raise_if_halted(state, PARAMS)


def test_a_loss_called_loss_goes_in_as_it_came_and_as_value() -> None:
    seen: dict[str, Any] = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    around_guard = (og.accumulate(og.guard(spy), 1), og.loss_scaling(og.guard(spy)))
    for tx in (og.guard(spy), og.stabilize(spy), og.accumulate(spy, 1), og.loss_scaling(spy), *around_guard):
        seen.clear()
        jax.eval_shape(lambda tx=tx: og.apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, loss=2.0))
        assert seen["loss"] == 2.0
        assert seen["value"] is not None
    jax.eval_shape(lambda: og.apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, loss="text"))
    assert seen["loss"] == "text"


def warned(call: Any, **extra: Any) -> list[str]:
    _extra._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(functools.partial(call, **extra))
    return [str(each.message) for each in caught]


NEAR = (
    "vlaue",
    "val",
    "values",
    "losses",
    "los",
    "cost",
    "Loss",
    "VALUE",
    "wieght",
    "weights",
    "max_logit",
    "maxlogits",
)


def test_what_is_near_enough_to_be_a_misspelling() -> None:
    def twice(**extra: Any) -> None:
        _extra.warn_of_misspellings(extra)
        _extra.warn_of_misspellings(extra)

    for name in NEAR:
        assert len(warned(twice, **{name: 1})) == 1
    assert not warned(
        lambda **extra: _extra.warn_of_misspellings(extra), value=1, loss=1, weight=1, loss_fn=1, grad=1, mask=1
    )


@each([e for e in ENTRIES if e in READS or e.is_rule])
def test_a_keyword_that_looks_like_one_that_is_read_warns_once(entry: Entry) -> None:
    tx = entry.make()
    call = functools.partial(tx.update, GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    for name, word in {"vlaue": "value", "losses": "value", "weights": "weight", "max_logit": "max_logits"}.items():
        (words,) = warned(call, **{name: 1.0})
        assert f"`{name}`" in words
        assert f"`{word}`" in words
    assert not warned(call, weight=1.0, loss=1.0, batch=1, step=3, grad_fn=print, value_fn=print, key=0, text="text")


def test_a_keyword_that_the_optimizer_knows_does_not_warn() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, losses: Any = None, **extra: Any) -> Any:
        return updates, state

    knows = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    for tx in (knows, og.guard(knows), og.accumulate(og.guard(knows), 2), og.loss_scaling(og.stabilize(knows))):
        state = tx.init(PARAMS)
        assert not warned(lambda tx=tx, s=state, **extra: og.apply_gradients(tx, GRADS, s, PARAMS, **extra), losses=1)
        assert warned(lambda tx=tx, s=state, **extra: og.apply_gradients(tx, GRADS, s, PARAMS, **extra), valeu=1)

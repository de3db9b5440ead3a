"""What goes around what: the wrong order is refused in any nesting, and messages name what was called."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from registry import ENTRIES, Entry, momentum

import optax_guard as og

PARAMS = {"w": jnp.ones((2, 2))}
OUTER = {  # what may go around each
    "loss_scaling": {"accumulate"},
    "accumulate": {"accumulate", "loss_scaling"},
    "guard": {"accumulate", "loss_scaling", "guard", "stabilize"},
    "stabilize": {"accumulate", "loss_scaling", "guard", "stabilize"},
}
INSIDE = {
    "loss_scaling": lambda inner: og.loss_scaling(inner),
    "accumulate": lambda inner: og.accumulate(inner, 2),
    "guard": lambda inner: og.guard(inner),
    "stabilize": lambda inner: og.stabilize(inner),
}
NESTINGS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, "a"),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(0.1),
}
FIRST_OF_EACH = {entry.name: entry for entry in reversed(ENTRIES) if entry.wraps}.values()


@pytest.mark.parametrize("entry", FIRST_OF_EACH, ids=str)
@pytest.mark.parametrize("inside", INSIDE)
def test_every_wrapper_takes_what_may_be_inside_it_and_refuses_the_rest_in_any_nesting(
    entry: Entry, inside: str
) -> None:
    for nest in NESTINGS.values():
        tx = entry.make(inner=lambda rate, nest=nest: nest(INSIDE[inside](momentum(rate))))
        if entry.name in OUTER[inside]:
            jax.eval_shape(tx.init, PARAMS)
        else:
            around = "another `loss_scaling`" if entry.name == inside else f"`{inside}`, which goes around"
            around = around.replace("stabilize", "guard")
            with pytest.raises(ValueError, match=rf"^{entry.name}: `(inner|optimizer)` holds {around}"):
                jax.eval_shape(tx.init, PARAMS)


def test_the_refusal_shows_the_right_order() -> None:
    wrong = {
        "accumulate(guard(optimizer))": lambda: og.guard(og.accumulate(optax.sgd(0.1), 2)),
        "loss_scaling(guard(optimizer))": lambda: og.guard(og.loss_scaling(optax.sgd(0.1))),
        "loss_scaling(stabilize(optimizer))": lambda: og.stabilize(og.loss_scaling(optax.sgd(0.1))),
        "guard(spam_clip(optimizer))": lambda: og.spam_clip(og.guard(optax.adam(0.1))),
    }
    for right, make in wrong.items():
        with pytest.raises(ValueError, match=right.replace("(", r"\(").replace(")", r"\)")):
            make().init(PARAMS)


def test_multisteps_of_optax_may_be_guarded() -> None:
    og.guard(optax.MultiSteps(optax.sgd(0.1), 2)).init(PARAMS)


WRONG: dict[str, Any] = {
    "inner": optax.adam,
    "max_norm": -1.0,
    "max_change": -1.0,
    "horizon": 1.0,
    "recovery": (og.guard,),
    "patience": -1,
    "halt_after": 0,
    "recorder_rows": 0,
}


@pytest.mark.parametrize("argument", WRONG)
def test_the_errors_of_stabilize_name_it_and_its_argument(argument: str) -> None:
    assert {*WRONG, "axis_name", "mask"} == inspect.signature(og.stabilize).parameters.keys()
    with pytest.raises(ValueError, match=rf"^stabilize: `{argument}`"):
        og.stabilize(**{"inner": optax.sgd(0.1), argument: WRONG[argument]})


def test_the_errors_of_a_step_of_stabilize_name_it() -> None:
    tx = og.stabilize(optax.sgd(0.1))
    state = tx.init(PARAMS)
    for call in (
        lambda: tx.init({"w": "text"}),
        lambda: tx.update({"w": "text"}, state, PARAMS),
        lambda: tx.update({}, state, PARAMS),
        lambda: tx.update(PARAMS, state, PARAMS, value=jnp.ones(2)),
        lambda: og.stabilize(optax.sgd(0.1), recovery=(og.rewind(after=9),), halt_after=3),
    ):
        with pytest.raises(ValueError, match=r"^stabilize: "):
            call()


@pytest.mark.parametrize(
    ("rules", "gradient", "row"),
    [
        ((og.clip_by_leaf_norm(1.0), og.skip_large(0.5)), 9.0, ("skipped", 1)),  # the rule that refused
        ((og.skip_large(5.0), og.clip_by_leaf_norm(1.0)), 9.0, ("skipped", 0)),
        ((og.skip_large(50.0), og.clip_by_leaf_norm(9.0), og.clip_by_global_norm(1.0)), 5.0, ("clipped", 2)),
        ((og.clip_by_leaf_norm(2.0), og.clip_by_global_norm(1.0)), 9.0, ("clipped", 0)),  # the first that scaled
        ((og.skip_large(5.0), og.skip_large(2.0)), 9.0, ("skipped", 0)),  # the first that refused
        ((og.clip_by_leaf_norm(9.0),), 1.0, ("applied", -1)),
    ],
)
def test_the_rule_of_a_row_is_the_one_that_refused_else_the_first_that_scaled(
    rules: Any, gradient: float, row: tuple[str, int]
) -> None:
    tx, params = og.guard(optax.sgd(1.0), *rules), jnp.ones(1)
    _, state = og.apply_gradients(tx, jnp.full(1, gradient), tx.init(params), params)
    log = og.flight_log(state)[-1]
    assert (log["event"], log["rule"]) == row

"""Extra arguments: unknown ones are accepted, wrappers forward them, the loss is recorded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from conforming import GRADS, LOSS, PARAMS, WRAPPERS, each, run
from registry import ENTRIES, Entry

import optax_guard as og


@each(ENTRIES)
def test_unknown_extra_arguments_are_accepted_and_change_nothing(entry: Entry) -> None:
    tx = entry.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    arguments = GRADS[0], jax.eval_shape(tx.init, PARAMS), PARAMS
    with entry.promotion():
        plain = jax.make_jaxpr(tx.update)(*arguments)
        extra = jax.make_jaxpr(functools.partial(tx.update, unknown=object(), loss="text"))(*arguments)
    assert str(plain) == str(extra)


@each(WRAPPERS)
@pytest.mark.parametrize("fast", [True, False])
def test_wrappers_forward_every_extra_argument_to_the_inner_transformation(entry: Entry, fast: bool) -> None:
    seen: dict[str, Any] = {}

    def spying(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            seen.update(extra)
            return updates, state

        return optax.GradientTransformationExtraArgs(optax.identity().init, update)

    tx, token = entry.make(inner=spying), object()
    extra = {"value": LOSS, "hint": token}
    if fast:
        jax.eval_shape(lambda: og.apply_gradients(tx, GRADS[0], tx.init(PARAMS), PARAMS, **extra))
    else:
        jax.eval_shape(lambda: tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **extra))
    assert seen["hint"] is token
    assert seen["value"] is not None


def test_guard_gives_rules_the_params_the_loss_and_every_other_extra_argument() -> None:
    seen: dict[str, Any] = {}

    def judge(statistics: Any, state: Any, params: Any = None, **extra: Any) -> tuple[og.Verdict, Any]:
        seen.update(extra, params=params)
        return og.Verdict(scale=jnp.ones(()), skip=jnp.zeros((), bool)), state

    tx = og.guard(optax.sgd(0.1), og.rule(optax.identity().init, judge))
    jax.eval_shape(lambda: tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=LOSS, hint=1))
    assert seen.keys() == {"params", "value", "hint"}
    assert seen["params"] is PARAMS


def test_the_loss_in_the_flight_recorder_is_the_one_called_value() -> None:
    entry = next(e for e in ENTRIES if str(e) == "guard")
    _, state = run(entry, GRADS)
    assert og.flight_log(state)["value"].tolist() == [LOSS] * 3

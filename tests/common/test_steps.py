"""How a step is taken and held, with or without parameters, whoever wrote the transformation."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._step.act import Start, step_if

MOMENTUM = optax.sgd(0.1, momentum=0.9)
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "guard": og.guard,
    "accumulate": functools.partial(og.accumulate, every=1),
    "loss_scaling": og.loss_scaling,
    "stable_spam": og.stable_spam,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("shape", "other"), [((4, 3), (1, 3)), ((1, 3), (4, 3))])
def test_without_parameters_a_gradient_that_would_be_broadcast_is_named(
    wrapper: str, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    tx = WRAPPERS[wrapper](MOMENTUM)
    state = jax.eval_shape(tx.init, {"kernel": jnp.ones(shape)})
    with pytest.raises(ValueError, match=rf"{wrapper}: .*`kernel`"):
        jax.eval_shape(tx.update, {"kernel": jnp.ones(other)}, state)


def test_an_optimizer_without_moments_may_not_change_shapes_either() -> None:
    wider = optax.GradientTransformation(lambda _: (), lambda u, s, _=None: (jax.tree.map(lambda x: x[None], u), s))
    with pytest.raises(ValueError, match=r"stable_spam: .*`kernel`"):
        jax.eval_shape(
            lambda g: og.stable_spam(wider).update(g, og.stable_spam(wider).init(g)), {"kernel": jnp.ones(3)}
        )


def test_an_object_is_not_given_an_extra_argument_that_it_takes_by_place() -> None:
    class Plain:
        def init(self, params: Any) -> Any:
            del params
            return ()

        def update(self, gradients: Any, state: Any, model: Any) -> Any:
            assert not isinstance(model, str)
            return gradients, state

    tx, params = og.guard(Plain()), {"kernel": jnp.ones(3)}
    jax.eval_shape(lambda p: og.apply_gradients(tx, p, tx.init(p), p, model=jnp.ones(())), params)


def test_a_held_step_is_the_same_parameters_or_updates_that_change_none() -> None:
    params, grads = {"kernel": jnp.array([0.0, -0.0])}, {"kernel": jnp.ones(2, jnp.bfloat16)}

    def step() -> Any:
        return {"kernel": jnp.ones(2)}, ()  # as wide as the parameters, and not as the gradient

    assert Start(params, in_place=True).held(step, grads) is params
    held = Start(params, in_place=False).held(step, grads)["kernel"]
    assert held.dtype == jnp.float32
    assert np.signbit(held).all()
    start = Start(params, in_place=False)
    for applied, usually in itertools.product((True, False), (True, False)):
        result, state = step_if(
            jnp.array(applied), lambda: (step()[0], jnp.ones(())), jnp.zeros(()), start, grads, usually=usually
        )
        assert float(state) == applied
        np.testing.assert_array_equal(result["kernel"], 1.0 if applied else 0.0)

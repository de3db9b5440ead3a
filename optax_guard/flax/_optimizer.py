"""An nnx optimizer that steps in place, and edits of a guard's state in its own Variables."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from optax_guard import _halt
from optax_guard._common import validate
from optax_guard._common.state_check import is_single_leaf
from optax_guard._common.tree import checked, difference, find_states
from optax_guard._common.typing import PyTree
from optax_guard._guard import GuardState
from optax_guard._step.act import apply_gradients, as_transformation
from optax_guard.state import _migration

__all__ = ["Optimizer", "add_guard", "clear_halt", "inner_state", "remove_guard"]


class Optimizer(nnx.Optimizer):
    """Flax's `nnx.Optimizer`, whose `update` does not write the updates out.

    params, opt_state <- optax_guard.apply_gradients(tx, grads, opt_state, params, **extra)

    Guarantees:
      - Constructor, attributes and checkpoints are those of `flax.nnx.Optimizer`.
      - A step that a guard holds leaves the model's parameters and the inner state bit-for-bit unchanged; `step` still
        counts it.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> import optax_guard as og
      >>> from optax_guard.flax import Optimizer
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, og.guard(optax.adam(1e-3), og.clip_by_global_norm(1.0)), wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x))))(model)
      ...     optimizer.update(model, grads, value=loss)
      ...     return loss
      >>> loss = step(model, optimizer, jnp.ones((4, 2)))
      >>> bool(og.flight_log(optimizer.opt_state)["value"][0] == loss)
      True

    See Also:
      `flax.nnx.Optimizer`, which also passes the loss on, but makes and returns the updates.
    """

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]  # Flax returns the updates, which are not made here
        self, model: Any, grads: Any, /, **extra: Any
    ) -> None:
        """Updates the model's parameters and the optimizer's state in place.

        Args:
          model: the module whose variables selected by `wrt` are trained.
          grads: the gradients from `nnx.grad` or `nnx.value_and_grad`, with the same `wrt`.
          **extra: passed to `tx.update`; the loss is called `value`.

        Raises:
          ValueError: the structure of `grads` differs from that of the parameters (the message names the leaf).
        """
        name = "Optimizer.update"
        params = _variables(name, "model", model, self)
        pure_grads, params = checked(name, _variables(name, "grads", grads, self), params, called="grads")
        state, pure_extra = nnx.as_pure(self.opt_state), nnx.as_pure(extra)
        params, state = apply_gradients(self.tx, pure_grads, state, params, **pure_extra)
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state, graph=self.graph))
        self.step[...] += 1


def clear_halt(optimizer: nnx.Optimizer) -> None:
    """Clears a halt as `optax_guard.clear_halt` does, in the optimizer's own Variables.

    `optimizer.opt_state = og.clear_halt(optimizer.opt_state)` would replace the Variables. A step under
    `nnx.cached_partial` keeps the old ones, so it would go on holding every step while the optimizer looks healthy.

    Args:
      optimizer: an `nnx.Optimizer`, Flax's or this module's.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, og.guard(optax.sgd(0.1), halt_after=1), wrt=nnx.Param)
      >>> optimizer.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model)))
      >>> clear_halt(optimizer)
      >>> og.raise_if_halted(optimizer.opt_state)
    """
    _check_optimizer("clear_halt", optimizer)
    cleared = _halt.clear_halt(nnx.as_pure(optimizer.opt_state))
    nnx.update(optimizer.opt_state, nnx.state(cleared, graph=optimizer.graph))


def add_guard(optimizer: nnx.Optimizer, model: Any, tx: optax.GradientTransformation) -> None:
    """Puts a guard around the optimizer of a run in progress, as `optax_guard.add_guard_state` does.

    Guarantees:
      - The optimizer's Variables (moments, counters) stay the same objects with the same bits.
      - The guard's own state starts afresh.

    The graph of the optimizer changes: rebuild any step made by `nnx.cached_partial` afterwards, since the old one
    would go on without the guard.

    Args:
      optimizer: an `nnx.Optimizer`, Flax's or this module's.
      model: the module that it trains.
      tx: a transformation with a `guard` in it; it becomes `optimizer.tx`.

    Raises:
      ValueError: as `optax_guard.add_guard_state`.

    Example:
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
      >>> add_guard(optimizer, model, og.guard(optax.adam(0.1)))
      >>> int(og.metrics(optimizer.opt_state)["guard/step"])
      0
    """
    name = "add_guard"
    _check_optimizer(name, optimizer)
    params = _variables(name, "model", model, optimizer)
    state = _migration.put_into_guard(name, tx, params, nnx.as_pure(optimizer.opt_state))
    _put(name, optimizer, model, tx, state)


def remove_guard(optimizer: nnx.Optimizer, model: Any, tx: optax.GradientTransformation) -> None:
    """Removes every guard from the optimizer, as `optax_guard.remove_guard_state` does.

    Guarantees:
      - The optimizer's Variables (moments, counters) stay the same objects with the same bits.

    The graph of the optimizer changes: rebuild any step made by `nnx.cached_partial` afterwards, since the old one
    would go on with the guard.

    Args:
      optimizer: an `nnx.Optimizer` with a guard, Flax's or this module's.
      model: the module that it trains.
      tx: the same transformation without guards; it becomes `optimizer.tx`.

    Raises:
      ValueError: there is no guard in the optimizer, or `tx` is another transformation.

    Example:
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, og.guard(optax.adam(0.1)), wrt=nnx.Param)
      >>> remove_guard(optimizer, model, optax.adam(0.1))
      >>> og.metrics(optimizer.opt_state)
      {}
    """
    name = "remove_guard"
    _check_guarded(name, optimizer)
    _variables(name, "model", model, optimizer)
    as_transformation(name, tx, "tx")
    _put(name, optimizer, model, tx, _migration.remove_guard_state(nnx.as_pure(optimizer.opt_state)))


def inner_state(optimizer: nnx.Optimizer) -> Any:
    """The optimizer's state without guards, in its own Variables: writing into them changes the optimizer.

    `optax_guard.remove_guard_state(optimizer.opt_state)` returns a copy instead.

    Args:
      optimizer: an `nnx.Optimizer` with a guard, Flax's or this module's.

    Returns:
      The state of the transformation without guards.

    Raises:
      ValueError: there is no guard in the optimizer.

    Example:
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = og.guard(optax.inject_hyperparams(optax.sgd)(0.1))
      >>> optimizer = Optimizer(model, tx, wrt=nnx.Param)
      >>> inner_state(optimizer).hyperparams["learning_rate"][...] = 0.01
      >>> round(float(optimizer.opt_state.guarded_state.hyperparams["learning_rate"]), 3)
      0.01
    """
    _check_guarded("inner_state", optimizer)
    return _migration.without_guards(optimizer.opt_state, keep=nnx.Variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _check_optimizer(function: str, optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise ValueError(f"{function}: `optimizer` must be an nnx.Optimizer; got {validate.shown(optimizer)}.")


def _check_guarded(function: str, optimizer: Any) -> None:
    _check_optimizer(function, optimizer)
    if not find_states(optimizer.opt_state, GuardState):
        raise ValueError(f"{function}: there is no guard in this `optimizer`.")


def _variables(function: str, argument: str, model: Any, optimizer: nnx.Optimizer) -> PyTree:
    """The part of a model that the optimizer trains, or the gradients of that part."""
    state = None if is_single_leaf(model) else nnx.as_pure(nnx.state(model, optimizer.wrt, graph=optimizer.graph))
    if not jax.tree.leaves(state):
        raise ValueError(
            f"{function}: `{argument}` must hold Variables that the optimizer selects by `wrt`; got "
            f"{validate.shown(model)}."
        )
    return state


def _put(function: str, optimizer: nnx.Optimizer, model: Any, tx: optax.GradientTransformation, state: Any) -> None:
    """Gives the optimizer a new `tx` and `state`, whose arrays stay in their present Variables."""
    fresh = nnx.Optimizer(model, tx, wrt=optimizer.wrt, graph=optimizer.graph).opt_state
    wanted, got = (
        [(path, np.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (nnx.as_pure(fresh), state)
    )
    if wanted != got:
        found = difference("optimizer", state, "tx", nnx.as_pure(fresh), shapes=True)
        raise ValueError(f"{function}: the state of `tx` differs from that of the optimizer: {found}")
    owners = {id(each.get_raw_value()): each for each in jax.tree.leaves(optimizer.opt_state, is_leaf=_is_variable)}
    nnx.update(fresh, nnx.state(state, graph=optimizer.graph))
    optimizer.tx = tx
    optimizer.opt_state = nnx.data(
        jax.tree.map(lambda new, leaf: owners.get(id(leaf), new), fresh, state, is_leaf=_is_variable)
    )

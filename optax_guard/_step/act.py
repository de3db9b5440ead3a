"""Act: takes the step with direct access to the parameters.

The Optax protocol passes `updates` from one function to the next, so a step that may or may not happen costs a second
copy of the parameters and the moments. A transformation that receives the parameters can put one `lax.cond` around
"inner update + apply", which runs in place under buffer donation. `guard`, `accumulate` and similar wrappers carry such
a function, a `StepFn`, besides `update`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import optax
from jax import lax

from optax_guard._common.eager import compiled_once
from optax_guard._common.extra import warn_of_misspellings
from optax_guard._common.forms import cond_or_select
from optax_guard._common.new_params import finished
from optax_guard._common.parts import part_of, with_part
from optax_guard._common.state_check import state_check
from optax_guard._common.tree import (
    cast_like,
    check_same_shapes,
    checked,
    difference_of_shapes,
    find_states,
    is_per_example,
    path_name,
)
from optax_guard._common.typing import AxisName, Mask, Params, PyTree, State
from optax_guard._step.gradient import Gradient
from optax_guard._step.updates import add_updates, no_updates

__all__ = [
    "FastStep",
    "Start",
    "StepFn",
    "apply_gradients",
    "as_transformation",
    "checked_state",
    "fast_transformation",
    "inner_holds",
    "refuse_inside",
    "step_if",
    "step_without_params",
    "take_step",
]

_MOMENTS = ("mu", "nu", "trace", "ema", "sum_of_squares")  # fields of Optax's states that have the gradient's structure


class Start(NamedTuple):
    """Where a step starts, and what its caller needs: new parameters, made in place, or Optax's updates."""

    params: PyTree | None  # None only if not `in_place`
    in_place: bool

    def moved(self, updates: PyTree) -> PyTree:
        """The result for a step that was taken."""
        return add_updates(self.params, updates) if self.in_place else updates

    def held(self, step: Callable[[], Any], like: PyTree) -> PyTree:
        """The result if `step` was not taken: the unchanged parameters, or updates of -0.0."""
        return self.params if self.in_place else no_updates(jax.eval_shape(step)[0], like)


class StepFn(Protocol):
    """One step of a transformation, which returns what `start` asks for and the new state."""

    def __call__(self, gradient: Gradient, state: Any, start: Start, extra: dict[str, Any]) -> tuple[PyTree, Any]:
        """Takes the step."""
        ...


class FastStep(NamedTuple):
    """The fast step of a transformation, attached to its `update` so that it survives when the tuple is rebuilt.

    If `holds_nonfinite` is True, this transformation holds and counts any step whose gradient is not finite. A wrapper
    that has already computed the statistics of `total` passes them on, which saves a read. A wrapper without a gradient
    passes on statistics that are not finite, so that the step is counted and held. Leaves outside `mask` are judged
    neither here nor by a wrapper.
    """

    step: StepFn
    holds_nonfinite: bool
    axis_name: AxisName | None
    flush: Any
    mask: Mask | None


def fast_transformation(
    function: str,
    init: Any,
    step: StepFn,
    *,
    holds_nonfinite: bool = False,
    axis_name: AxisName | None = None,
    flush: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation with both ways to take a step, Optax's and the fast one, from one function."""
    check = state_check(function, init, whole=holds_nonfinite)

    def on_own_state(gradient: Gradient, state: Any, start: Start, extra: dict[str, Any]) -> tuple[PyTree, Any]:
        check(state, start.params, gradient.like)
        return step(gradient, state, start, extra)

    once: StepFn = compiled_once(on_own_state)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, params = checked(function, updates, params)

        def take() -> tuple[optax.Updates, optax.OptState]:
            return once(Gradient(updates, updates), state, Start(params, in_place=False), extra)

        return take() if params is not None else step_without_params(function, take, updates, state)

    flush = None if flush is None else compiled_once(flush)
    part = FastStep(once, holds_nonfinite, axis_name, flush, mask)
    return optax.GradientTransformationExtraArgs(init, with_part(update, part))


def inner_holds(function: str, inner: Any, axis_name: AxisName | None) -> tuple[bool, Mask | None]:
    """Whether `inner` itself holds steps that are not finite, and its mask; if so, both must have the same axis."""
    inside = part_of(inner, FastStep)
    if inside is None:
        return False, None
    if inside.holds_nonfinite and inside.axis_name != axis_name:
        raise ValueError(f"{function}: axis_name={axis_name!r}, but `inner` has {inside.axis_name!r}: they must agree.")
    return inside.holds_nonfinite, inside.mask


def as_transformation(function: str, inner: Any, argument: str = "inner") -> optax.GradientTransformationExtraArgs:
    """`inner`, any object with `init` and `update`, as a pair whose `update` takes params and extra arguments."""
    functions: tuple[Any, Any] = getattr(inner, "init", None), getattr(inner, "update", None)
    if isinstance(inner, type) or not all(map(callable, functions)):
        raise ValueError(f"{function}: `{argument}` must be an optax.GradientTransformation; got {inner!r}.")
    init, update = functions
    if part_of(inner, object) is not None:
        return optax.GradientTransformationExtraArgs(init, update)
    if isinstance(inner, optax.GradientTransformation):
        update = optax.with_extra_args_support(inner).update
    else:
        update = _with_what_it_takes(update)
    return optax.GradientTransformationExtraArgs(init, _telling_float0(function, argument, update))


def _telling_float0(function: str, argument: str, update: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` that names the gradient of an integer if it fails on one, since few optimizers pass them on."""

    def call(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        try:
            return update(updates, state, params, **extra)
        except TypeError as error:
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
                if getattr(leaf, "dtype", None) == jax.dtypes.float0:
                    raise ValueError(
                        f"{function}: `{argument}` cannot take the gradient of leaf `{path_name(path)}`, the `float0` "
                        f"of an integer. Keep such leaves from it: `optax.masked({argument}, mask)`."
                    ) from error
            raise

    return functools.update_wrapper(call, update)  # a caller that inspects `inner` sees its own signature


def _with_what_it_takes(update: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` that receives parameters and extra arguments only if its signature has them.

    As in Optax, `params` may be the third argument or a keyword, and extra arguments may be all or named ones.
    """
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError):  # a C function without a signature
        return update
    kinds = {parameter.kind for parameter in parameters}
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_place = len(places) >= 3 or inspect.Parameter.VAR_POSITIONAL in kinds
    every = inspect.Parameter.VAR_KEYWORD in kinds
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    named -= {p.name for p in places[:3]}

    def call(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        given = {name: x for name, x in extra.items() if every or name in named}
        if by_place:
            return update(updates, state, params, **given)
        if "params" in named or every:
            given["params"] = params
        return update(updates, state, **given)

    return functools.update_wrapper(call, update)  # a caller that inspects `inner` sees its own signature


def refuse_inside(function: str, argument: str, state: Any, outer: dict[type, str]) -> None:
    """Raises if the optimizer's state holds that of a wrapper that must go around this one."""
    for kind, wrapper in outer.items():
        if find_states(state, kind):
            raise ValueError(
                f"{function}: `{argument}` holds `{wrapper}`, which goes around `{function}`, not into it: "
                f"{wrapper}({function}(optimizer))."
            )


def apply_gradients(
    tx: optax.GradientTransformation, grads: PyTree, state: State, params: Params, **extra: Any
) -> tuple[Params, State]:
    """Takes one optimizer step with any Optax transformation, in place if it supports that.

    params, state <- apply_updates(params, u), state'     where  u, state' = tx.update(grads, state, params, **extra)

    Guarantees:
      - The result equals that of `tx.update` and `optax.apply_updates` (up to rounding, since a compiler may fuse a
        multiply-add), with one exception: if the sum of a finite parameter and a finite update is beyond the
        parameter's dtype, it becomes the largest number of that dtype, where `optax.apply_updates` gives Inf.
      - With `guard` or `accumulate` outermost, neither parameters nor moments are copied: under
        `jax.jit(..., donate_argnums=...)` the step runs in place.
      - A held step returns `params` and the inner state bit-for-bit unchanged.

    The jitted function around it should return (params, state) in the order in which it takes them. Donated buffers are
    matched to outputs of the same shape *in order*, so with (state, params) -> (params, state) XLA copies everything.

    Args:
      tx: any Optax transformation; those without a fast step use `update` and `optax.apply_updates`.
      grads: gradients with the structure and shapes of `params` (of `params.fast` under `optax.lookahead`); None stands
        for a part without a gradient. Python numbers count as 0-d arrays in both trees. Where `tx` reduces one gradient
        per example itself (`optax.contrib.dpsgd`), every leaf has one more axis, the first.
      state: the state from `tx.init(params)` or the previous step.
      params: the parameters.
      **extra: forwarded to `tx.update`. The loss is called `value`; a number called `loss` is used as `value` if there
        is none. A keyword within two letters of `value`, `weight`, `loss` or `max_logits` causes one warning.

    Returns:
      The new (params, state).

    Raises:
      ValueError: `grads` differs from `params` in structure or shape or has a leaf that is not an array (the message
        names the leaf), or `params` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.sgd(0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> params, state = apply_gradients(tx, {"w": jnp.ones(2)}, tx.init(params), params)
      >>> params["w"]
      Array([0.5, 0.5], dtype=float32)
    """
    if params is None:
        raise ValueError("apply_gradients: `params` must be the parameters from which the step starts; got None.")
    if not _takes_one_per_example(tx, grads, state, params, extra):
        grads, params = checked("apply_gradients", grads, params, called="grads")
    return take_step(tx, Gradient(grads, grads), state, Start(params, in_place=True), extra)


def _takes_one_per_example(tx: Any, grads: PyTree, state: Any, params: PyTree, extra: dict[str, Any]) -> bool:
    """Whether these are gradients per example for an optimizer that reduces them, as `optax.contrib.dpsgd` does."""
    if part_of(tx, FastStep) is not None or not is_per_example(grads, params):
        return False
    update = as_transformation("apply_gradients", tx, "tx").update
    try:
        updates, _ = jax.eval_shape(lambda: update(grads, state, params, **extra))
    except (TypeError, ValueError):  # most optimizers fail on them, in words of their own
        return False
    return difference_of_shapes("updates", updates, "params", params) is None


def take_step(
    tx: optax.GradientTransformation, gradient: Gradient, state: Any, start: Start, extra: dict[str, Any]
) -> tuple[PyTree, Any]:
    """The `StepFn` of any transformation."""
    fast = part_of(tx, FastStep)
    if fast is not None:
        return fast.step(gradient, state, start, extra)
    warn_of_misspellings(extra, tx)
    update = as_transformation("apply_gradients", tx, "tx").update

    def step(extra: dict[str, Any], base: PyTree | None) -> tuple[PyTree, Any]:
        updates, new_state = update(gradient.written(), state, start.params, **extra)
        return Start(base, start.in_place).moved(updates), new_state

    return finished(step, state, start.params, extra, in_place=start.in_place)


def step_if(
    applied: jax.Array, step: Callable[[], tuple[PyTree, Any]], state: Any, start: Start, like: PyTree, *, usually: bool
) -> tuple[PyTree, Any]:
    """The result of `step` if `applied`; otherwise nothing is done, and `state` does not change.

    If it is taken `usually`, a GPU computes it always.
    """
    held = start.held(step, like)
    return (cond_or_select if usually else lax.cond)(applied, step, lambda: (held, state))


def step_without_params(function: str, step: Callable[[], Any], updates: PyTree, state: Any) -> Any:
    """Takes a step without parameters to compare the gradients with; on an error the moments show where they differ."""

    def story() -> str | None:
        for node in find_states(state, tuple):
            for name in _MOMENTS:
                moment = getattr(node, name, None)
                found = moment is not None and difference_of_shapes("updates", updates, name, moment)
                if found:
                    return f"{function}: {found}"
        return None

    try:
        new_updates, new_state = step()
        # A gradient that was broadcast against a moment returns in the moment's shape, or the moment in the gradient's.
        check_same_shapes(function, "updates", updates, "what the optimizer makes of it", new_updates)
        if jax.tree.structure(new_state) == jax.tree.structure(state):
            check_same_shapes(function, "the new state", new_state, "the state", state)
    except (TypeError, ValueError) as error:
        told = story()
        if told is None:
            raise
        raise ValueError(told) from error
    return new_updates, new_state


def checked_state(function: str, new_state: Any, old_state: Any) -> Any:
    """The new inner state with the dtypes of the old one; an error says why a step cannot be held."""
    if jax.tree.structure(new_state) != jax.tree.structure(old_state):
        raise ValueError(
            f"{function}: the inner optimizer changes the structure of its state in `update`, so a step cannot be held "
            f"(`optax.monitor` does this): {jax.tree.structure(old_state)} became {jax.tree.structure(new_state)}."
        )
    check_same_shapes(function, "the new state", new_state, "the state", old_state)
    return cast_like(new_state, old_state)

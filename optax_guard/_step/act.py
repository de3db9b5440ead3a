"""Act: taking the step with the parameters in hand.

The Optax protocol hands `updates` from one function to the next, so a step that may or may not happen costs a second
copy of the parameters and the moments. A transformation that is given the parameters can put one `lax.cond` around
"inner update + apply", in place under buffer donation: `guard` and `accumulate` carry such a function, `run`, beside
`update`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._common.eager import compiled_once
from optax_guard._common.extra import warn_of_misspellings
from optax_guard._common.parts import part_of, with_part
from optax_guard._common.state_check import state_check
from optax_guard._common.tree import (
    cast_like,
    check_same_shapes,
    checked,
    difference,
    find_states,
    is_gradient,
    path_name,
    wider_dtype,
)
from optax_guard._common.typing import AxisName, Mask, Params, PyTree, State
from optax_guard._step.judge import scale_leaves
from optax_guard._step.observe import GradientStatistics

__all__ = [
    "FastStep",
    "RunFn",
    "add_updates",
    "apply_gradients",
    "as_transformation",
    "bad_updates",
    "checked_state",
    "fast_transformation",
    "mean_of",
    "no_updates",
    "refuse_inside",
    "step_without_params",
    "take_step",
]

_MOMENTS = ("mu", "nu", "trace", "ema", "sum_of_squares")  # fields of Optax's states in the structure of the gradient


class RunFn(Protocol):
    """One step with the gradient `total * factor`: (parameters if `fast`, else updates; state).

    `factor` (None for 1; else a number, or one per leaf) and `like` (whose dtypes the gradient has) arrive apart from
    `total`, so that the mean of an accumulation is never written to memory: the reader multiplies on its way in. With
    `fast=False`, `params` may be None. A transformation that `judges` also takes `statistics`, those of `total`.
    """

    def __call__(
        self,
        total: PyTree,
        state: Any,
        params: PyTree | None,
        factor: jax.Array | None,
        like: PyTree,
        extra: dict[str, Any],
        fast: bool,
    ) -> tuple[PyTree, Any]:
        """Takes one step in either way."""
        ...


class FastStep(NamedTuple):
    """What makes a transformation fast; kept on its `update`, so that it outlasts the tuple.

    One that `judges` holds a step whose gradient is not finite. Who wraps it may hand it the `statistics` of `total`
    that it has, which saves a read, and may tell it of a step without a gradient by statistics that are not finite,
    which it then counts and holds. Leaves outside its `mask` it does not judge, nor may who wraps it.
    """

    run: RunFn
    judges: bool
    axis_name: AxisName | None
    flush: Any
    mask: Mask | None


def fast_transformation(
    function: str,
    init: Any,
    run: RunFn,
    *,
    judges: bool = False,
    axis_name: AxisName | None = None,
    flush: Any = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Both ways to take a step, Optax's and the fast one, from one function."""
    once: RunFn = compiled_once(_on_own_state(function, init, run, whole=judges))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, params = checked(function, updates, params)

        def step() -> tuple[optax.Updates, optax.OptState]:
            return once(updates, state, params, None, updates, extra, fast=False)

        return step() if params is not None else step_without_params(function, step, updates, state)

    flush = None if flush is None else compiled_once(flush)
    part = FastStep(once, judges, axis_name, flush, mask)
    return optax.GradientTransformationExtraArgs(init, with_part(update, part))


def _on_own_state(function: str, init: Any, run: Any, whole: bool) -> RunFn:
    """`run` on a state that is checked first."""
    check = state_check(function, init, whole=whole)

    def on_own_state(
        total: PyTree, state: Any, params: PyTree | None, factor: Any, like: PyTree, *rest: Any, **known: Any
    ) -> tuple[PyTree, Any]:
        check(state, params, like)
        return run(total, state, params, factor, like, *rest, **known)

    return on_own_state


def as_transformation(function: str, inner: Any, argument: str = "inner") -> optax.GradientTransformationExtraArgs:
    """`inner` as a pair whose `update` takes params and extra arguments, from whatever has `init` and `update`."""
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
    """An `update` that names the gradient of an integer, on which it stumbles: few optimizers pass one on."""

    def call(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        try:
            return update(updates, state, params, **extra)
        except TypeError as error:
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
                if getattr(leaf, "dtype", None) == jax.dtypes.float0:
                    raise ValueError(
                        f"{function}: `{argument}` cannot take the gradient of leaf `{path_name(path)}`, an integer's "
                        f"`float0`. Keep such leaves from it: `optax.masked({argument}, mask)`."
                    ) from error
            raise

    return functools.update_wrapper(call, update)  # whoever asks what `inner` takes sees its own signature


def _with_what_it_takes(update: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` that is given parameters and extra arguments only if its signature has them.

    As Optax asks of a pair: `params` may be the third argument or a keyword; all extra arguments, or those it names.
    """
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError):  # a function of C code: nothing to ask
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

    return functools.update_wrapper(call, update)  # whoever asks what `inner` takes sees its own signature


def refuse_inside(function: str, argument: str, state: Any, outer: dict[type, str]) -> None:
    """Raises if the optimizer's state holds that of a wrapper that has to be around this one."""
    for kind, wrapper in outer.items():
        if find_states(state, kind):
            raise ValueError(
                f"{function}: `{argument}` holds `{wrapper}`, which goes around `{function}`, not into it: "
                f"{wrapper}({function}(optimizer))."
            )


def apply_gradients(
    tx: optax.GradientTransformation, grads: PyTree, state: State, params: Params, **extra: Any
) -> tuple[Params, State]:
    """Takes one optimizer step: the fast way, for any Optax transformation.

    params, state <- apply_updates(params, u), state'     where  u, state' = tx.update(grads, state, params, **extra)

    Guarantees:
      - The same numbers as `tx.update` and `optax.apply_updates` (to rounding: a compiler may fuse a multiply-add), but
        for a finite parameter and a finite update whose sum is beyond the parameter's dtype: it becomes the largest
        number of that dtype, where `optax.apply_updates` gives Inf.
      - With `guard` or `accumulate` outermost, no copy of parameters or moments is made: under
        `jax.jit(..., donate_argnums=...)` the step runs in place.
      - A held step returns the very bits of `params` and of the inner state.

    The jitted function around it should return (params, state) in the order in which it takes them: donated buffers
    are matched to outputs of the same shape *in order*, and with (state, params) -> (params, state) XLA copies
    everything (5.7 times the time of a bare AdamW step).

    Args:
      tx: any Optax transformation; those without a fast way go through `update` and `optax.apply_updates`.
      grads: gradients in the structure and shapes of `params` (of `params.fast` under `optax.lookahead`); None stands
        for a part without a gradient. Python numbers count as 0-d arrays, in both.
      state: the state from `tx.init(params)` or the step before.
      params: the parameters.
      **extra: forwarded to `tx.update`. The loss is called `value`; a number called `loss` is taken for it where there
        is none. A keyword within two letters of `value`, `weight` or `loss` warns once.

    Returns:
      The new (params, state).

    Raises:
      ValueError: `grads` has another structure or shape than `params`, or a leaf that is not an array (with the leaf's
        path); `params` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.sgd(0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> params, state = apply_gradients(tx, {"w": jnp.ones(2)}, tx.init(params), params)
      >>> params["w"]
      Array([0.5, 0.5], dtype=float32)
    """
    if params is None:
        raise ValueError("apply_gradients: `params` must be the parameters, which the step is taken from; got None.")
    grads, params = checked("apply_gradients", grads, params, called="grads")
    return take_step(tx, grads, state, params, None, grads, extra)


def take_step(
    tx: optax.GradientTransformation,
    total: PyTree,
    state: Any,
    params: PyTree | None,
    factor: jax.Array | None,
    like: PyTree,
    extra: dict[str, Any],
    *,
    fast: bool = True,
    statistics: GradientStatistics | None = None,
) -> tuple[PyTree, Any]:
    """`RunFn` for any transformation; `statistics` are those of `total`, for one that judges."""
    step = part_of(tx, FastStep)
    if step is not None:
        known = {"statistics": statistics} if step.judges else {}
        return step.run(total, state, params, factor, like, extra, fast=fast, **known)
    warn_of_misspellings(extra, tx)
    updates = mean_of(total, factor, like)
    updates, state = as_transformation("apply_gradients", tx, "tx").update(updates, state, params, **extra)
    return add_updates(params, updates) if fast else updates, state


def add_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, which also leaves alone what has no update: `None`, and the `float0` of an integer.

    A finite parameter that would become Inf becomes the largest number of its dtype instead. That is part of the fused
    write: the same bytes, temporaries and time (guarded AdamW, CPU, JAX 0.10.2).
    """

    def add(update: Any, param: Any) -> Any:
        if update is None or update.dtype == jax.dtypes.float0:
            return param
        total = _sum(param, update)
        if not is_gradient(param):
            return total.astype(param.dtype)
        # The update is not asked, which a second use would take out of its fused multiply-add: other bits than Optax's.
        saturated = _saturated(total, float(jnp.finfo(param.dtype).max))
        return jnp.where(jnp.isfinite(param), saturated, total).astype(param.dtype)

    return jax.tree.map(add, updates, params, is_leaf=lambda leaf: leaf is None)


def bad_updates(params: PyTree | None, updates: PyTree) -> list[jax.Array]:
    """For each position, bool[]: whether the update holds a NaN or an Inf, or would make one of a finite parameter."""

    def bad(update: Any, param: Any = None) -> jax.Array:
        if not is_gradient(update):
            return jnp.zeros((), bool)
        good = jnp.isfinite(update)
        if is_gradient(param):
            good = good & (jnp.isfinite(_sum(param, update).astype(param.dtype)) | ~jnp.isfinite(param))
        return ~jnp.all(good)

    trees = (updates,) if params is None else (updates, params)
    return jax.tree.leaves(jax.tree.map(bad, *trees, is_leaf=lambda leaf: leaf is None))


def _sum(param: jax.Array, update: jax.Array) -> jax.Array:
    wide = wider_dtype(param.dtype, update.dtype)
    return param.astype(wide) + update.astype(wide)


def _saturated(x: jax.Array, largest: float) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return lax.complex(_saturated(jnp.real(x), largest), _saturated(jnp.imag(x), largest))
    return jnp.clip(x, -largest, largest)


def mean_of(total: PyTree, factor: jax.Array | None, like: PyTree) -> PyTree:
    """The gradient `total * factor` in the dtypes of `like`, written out."""
    if factor is not None:
        total = scale_leaves(total, factor)
    return cast_like(total, like)


def step_without_params(function: str, step: Callable[[], Any], updates: PyTree, state: Any) -> Any:
    """One step for which there are no parameters to compare the gradients with; the moments tell where they differ."""

    def story() -> str | None:
        for node in find_states(state, tuple):
            for name in _MOMENTS:
                moment = getattr(node, name, None)
                found = moment is not None and difference("updates", updates, name, moment, shapes=True)
                if found:
                    return f"{function}: {found}"
        return None

    try:
        new_updates, new_state = step()
        # A gradient that was broadcast against a moment comes back in its shape, or the moment in the gradient's.
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
    """The new inner state with the dtypes of the old one, or an error that says why it cannot be held."""
    if jax.tree.structure(new_state) != jax.tree.structure(old_state):
        raise ValueError(
            f"{function}: the inner optimizer changes the structure of its state in `update`, so a step cannot be held "
            f"(`optax.monitor` does this): {jax.tree.structure(old_state)} became {jax.tree.structure(new_state)}."
        )
    check_same_shapes(function, "the new state", new_state, "the state", old_state)
    return cast_like(new_state, old_state)


def no_updates(shapes: PyTree, updates: PyTree) -> PyTree:
    """-0.0 everywhere: the one number that, added, changes no other, not even the sign of a zero."""
    alike = jax.tree.structure(shapes) == jax.tree.structure(updates)

    def zero(shape: jax.ShapeDtypeStruct, leaf: Any) -> Any:
        if not is_gradient(shape):
            return leaf if alike else jnp.zeros(shape.shape, shape.dtype)
        number = complex(-0.0, -0.0) if jnp.issubdtype(shape.dtype, jnp.complexfloating) else -0.0
        if alike and leaf.shape == shape.shape:
            return jnp.full_like(leaf, number, dtype=shape.dtype)  # keeps the gradient's sharding
        return jnp.full(shape.shape, number, shape.dtype)

    return jax.tree.map(zero, shapes, updates if alike else shapes)

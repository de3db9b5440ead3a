"""Act: taking the step with the parameters in hand.

The Optax protocol hands `updates` from one function to the next, so a step that may or may not happen costs a second
copy of the parameters and the moments. A transformation that is given the parameters can put one `lax.cond` around
"inner update + apply", in place under buffer donation: `guard` and `accumulate` carry such a function, `run`, beside
`update`.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_guard._rule import scale_leaves
from optax_guard._statistics import GradientStatistics
from optax_guard._tree import cast_like, check_arrays, check_same_structure, is_gradient, wider_dtype
from optax_guard._typing import AxisName, PyTree

__all__ = [
    "FastTransformation",
    "add_updates",
    "apply_gradients",
    "as_transformation",
    "fast_transformation",
    "mean_of",
    "no_updates",
    "settle",
    "take_step",
]


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


class FastTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation `(init, update)` that can also take the step itself."""

    run: RunFn
    judges: bool
    axis_name: AxisName | None
    flush: Any

    def __new__(
        cls,
        init: Any,
        update: Any,
        run: RunFn,
        judges: bool = False,
        axis_name: AxisName | None = None,
        flush: Any = None,
    ) -> "FastTransformation":
        """What is more than a pair stays outside the tuple, since Optax unpacks transformations in pairs.

        One that `judges` holds a step whose gradient is not finite. Who wraps it may hand it the `statistics` of
        `total` that it has, which saves a read, and may tell it of a step without a gradient by statistics that are not
        finite, which it then counts and holds.
        """
        self = super().__new__(cls, init, update)
        self.run = run
        self.judges = judges
        self.axis_name = axis_name
        self.flush = flush
        return self


def fast_transformation(
    function: str,
    init: Any,
    run: RunFn,
    *,
    judges: bool = False,
    axis_name: AxisName | None = None,
    flush: Any = None,
) -> FastTransformation:
    """Both ways to take a step, Optax's and the fast one, from one function."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        check_arrays(function, updates)
        if params is not None:
            check_same_structure(function, "updates", updates, "params", params)
        return run(updates, state, params, None, updates, extra, fast=False)

    return FastTransformation(init, update, run, judges, axis_name, flush)


def as_transformation(function: str, inner: Any) -> optax.GradientTransformation:
    """`inner` itself, or a pair made of an object that has `init` and `update`, as `optax.MultiSteps` does."""
    if isinstance(inner, optax.GradientTransformation):
        return inner
    if callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None)):
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    raise ValueError(f"{function}: `inner` must be an optax.GradientTransformation; got {inner!r}.")


def apply_gradients(
    tx: optax.GradientTransformation, grads: PyTree, state: optax.OptState, params: PyTree, **extra: Any
) -> tuple[PyTree, optax.OptState]:
    """Takes one optimizer step: the fast way, for any Optax transformation.

    params, state <- apply_updates(params, u), state'     where  u, state' = tx.update(grads, state, params, **extra)

    Guarantees:
      - The same numbers as `tx.update` and `optax.apply_updates` (to rounding: a compiler may fuse a multiply-add).
      - With `guard` or `accumulate` outermost, no copy of parameters or moments is made: under
        `jax.jit(..., donate_argnums=...)` the step runs in place.
      - A held step returns the very bits of `params` and of the inner state.

    The jitted function around it should return (params, state) in the order in which it takes them: donated buffers
    are matched to outputs of the same shape *in order*, and with (state, params) -> (params, state) XLA copies
    everything (5.7 times the time of a bare AdamW step).

    Args:
      tx: any Optax transformation; those without a fast way go through `update` and `optax.apply_updates`.
      grads: gradients in the structure of `params`.
      state: the state from `tx.init(params)` or the step before.
      params: the parameters.
      **extra: forwarded to `tx.update`; the loss is called `value`.

    Returns:
      The new (params, state).

    Raises:
      ValueError: `grads` has another structure than `params` or a leaf that is not an array (with the leaf's path).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.sgd(0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> params, state = apply_gradients(tx, {"w": jnp.ones(2)}, tx.init(params), params)
      >>> params["w"]
      Array([0.5, 0.5], dtype=float32)
    """
    check_arrays("apply_gradients", grads)
    check_same_structure("apply_gradients", "grads", grads, "params", params)
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
    if isinstance(tx, FastTransformation):
        known = {"statistics": statistics} if tx.judges else {}
        return tx.run(total, state, params, factor, like, extra, fast=fast, **known)
    updates = mean_of(total, factor, like)
    updates, state = optax.with_extra_args_support(tx).update(updates, state, params, **extra)
    return add_updates(params, updates) if fast else updates, state


def add_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, which also leaves alone what has no update: `None`, and the `float0` of an integer."""

    def add(update: Any, param: Any) -> Any:
        if update is None or update.dtype == jax.dtypes.float0:
            return param
        wide = wider_dtype(param.dtype, update.dtype)
        return (param.astype(wide) + update.astype(wide)).astype(param.dtype)

    return jax.tree.map(add, updates, params, is_leaf=lambda leaf: leaf is None)


def mean_of(total: PyTree, factor: jax.Array | None, like: PyTree) -> PyTree:
    """The gradient `total * factor` in the dtypes of `like`, written out."""
    if factor is not None:
        total = scale_leaves(total, factor)
    return cast_like(total, like)


def settle(function: str, new_state: Any, old_state: Any) -> Any:
    """The new inner state with the dtypes of the old one, or an error that says why it cannot be held."""
    if jax.tree.structure(new_state) != jax.tree.structure(old_state):
        raise ValueError(
            f"{function}: the inner optimizer changes the structure of its state in `update`, so a step cannot be held "
            f"(`optax.monitor` does this): {jax.tree.structure(old_state)} became {jax.tree.structure(new_state)}."
        )
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

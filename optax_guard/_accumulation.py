"""Accumulation across calls: one optimizer step from many small batches.

`accumulate` wraps everything else. The optimizer inside does not run on the calls in between: it sees one gradient a
cycle, so clips, penalties, noise and schedules act once per applied step.

=====================================  ============================================================
You have                               Take
=====================================  ============================================================
a loop that calls the step each batch  `accumulate(tx, every=4)`, and `apply_gradients`
batches of unequal token counts        the same, and `weight=` the number of tokens in the call
=====================================  ============================================================
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard import _validate
from optax_guard._apply import (
    FastTransformation,
    as_transformation,
    fast_transformation,
    mean_of,
    no_updates,
    settle,
    take_step,
)
from optax_guard._statistics import first_look, widest_accumulator
from optax_guard._step import next_step
from optax_guard._tree import (
    check_arrays,
    check_same_structure,
    find_states,
    is_gradient,
    leaf_names,
    positions,
    unwrapped,
    wider_dtype,
)
from optax_guard._typing import AxisName, PyTree

__all__ = ["AccumulateState", "accumulate", "has_updated"]


class AccumulateState(NamedTuple):
    """What `accumulate` carries: the inner state, one buffer in the shape of the parameters, and counters."""

    accumulated_state: Any  # the inner optimizer's state
    gradient_sum: PyTree  # f32 (or wider) in the parameters' shapes: weighted sum; stale while `added` is 0
    accumulated_weight: jax.Array  # f32[] (f64[] with f64 leaves): sum of the weights in `gradient_sum`
    added: jax.Array  # i32[]: micro-batches in `gradient_sum`
    micro_step: jax.Array  # i32[]: calls in this cycle, dropped ones included
    emitted: jax.Array  # bool[]: whether the last call ran the inner optimizer
    emitted_total: jax.Array  # i32[]: runs of the inner optimizer
    dropped_total: jax.Array  # i32[]: micro-batches dropped (not finite, or a negative or non-finite weight)
    empty_total: jax.Array  # i32[]: cycles that ended with nothing to step with


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], jax.Array],
    *,
    use_mean: bool = True,
    accumulator_dtype: Any = jnp.float32,
    axis_name: AxisName | None = None,
) -> FastTransformation:
    """One step of `inner` with the (weighted) mean of the gradients of `every` calls.

    g = sum_i w_i g_i / sum_i w_i        over the calls i of a cycle whose gradient is finite; w_i = 1 if none is given

    Guarantees:
      - `inner` runs only in the call that fills a cycle; in between, parameters and inner state keep their bits.
      - Unequal micro-batches whose `weight` is their number of tokens (or rows) equal the full batch.
      - A micro-batch that is not finite never touches any state: it is dropped with its weight, and counted. It keeps
        its place: a cycle is `every` calls.
      - Sums are held in float32 (float64 for float64, complex for complex leaves), and `inner` receives the mean in the
        gradient's dtype. With `every=1` its updates are those of `inner` alone, bit for bit.
      - `has_updated(state)` is True exactly after a call that ran `inner`.
      - Selected, never multiplied: nothing that was dropped can come back as 0 * NaN.

    =========================================  =======================================================================
    Case                                       Result
    =========================================  =======================================================================
    NaN or Inf in a micro-batch                dropped and counted in `dropped_total`; the mean is over the others
    nothing left at the end of a cycle         a held step: `inner` does not run; counted in `empty_total`
    all weights of a cycle are zero            the same
    weight negative or not finite              that micro-batch is dropped and counted
    a leaf is an integer, `float0` or `None`   passed to `inner` as the emitting call brought it
    the last, unfilled cycle of an epoch       stays in the buffer and goes on with the next call
    =========================================  =======================================================================

    Args:
      inner: any Optax transformation: usually `guard(optimizer, rules...)`.
      every: calls per cycle (>= 1), or a schedule that maps the number of emitted steps to it (values below 1 count
        as 1).
      use_mean: False hands `inner` the weighted sum instead of the mean.
      accumulator_dtype: the narrowest dtype to sum in; a leaf of a wider dtype is summed in its own.
      axis_name: as in `gradient_statistics`: needed inside `jax.shard_map` on sharded gradients, so that all devices
        drop the same micro-batches.

    Returns:
      A transformation for `apply_gradients` (fast) and for anything that takes an Optax one. Its `update` takes
      `weight=`, a non-negative scalar, and forwards every extra argument to `inner` in the emitting call. Between
      emissions it returns -0.0, which `optax.apply_updates` adds without changing a bit.

    Raises:
      ValueError: wrong static arguments; gradients whose structure or shapes differ from the parameters', with the
        path of the first leaf that does.

    Example:
      >>> import optax_guard as og
      >>> tx = og.accumulate(og.guard(optax.sgd(1.0)), every=2)
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for grad, tokens in ((1.0, 30), (5.0, 10)):
      ...     params, state = og.apply_gradients(tx, {"w": jnp.full(2, grad)}, state, params, weight=tokens)
      >>> params["w"], bool(og.has_updated(state))
      (Array([-2., -2.], dtype=float32), True)

    See Also:
      `optax.MultiSteps`: equal weights, runs the inner optimizer at every call and discards the result, and keeps a NaN
      for ever.
    """
    name = "accumulate"
    inner = as_transformation(name, inner)
    if not callable(every):
        every = _validate.integer(name, "every", every, low=1)
    _validate.boolean(name, "use_mean", use_mean)
    if not jnp.issubdtype(accumulator_dtype, jnp.floating):
        raise ValueError(f"{name}: `accumulator_dtype` must be a floating-point dtype; got {accumulator_dtype!r}.")
    update_inner = optax.with_extra_args_support(inner).update

    def buffer(leaf: Any) -> jax.Array:
        if not is_gradient(leaf):
            return jnp.zeros((), jnp.float32)  # a placeholder: the emitting call's leaf is passed on
        return jnp.zeros_like(leaf, dtype=wider_dtype(accumulator_dtype, leaf.dtype))

    def init(params: optax.Params) -> AccumulateState:
        check_arrays(name, params)
        return AccumulateState(
            accumulated_state=inner.init(params),
            gradient_sum=jax.tree.map(buffer, params),
            accumulated_weight=jnp.zeros((), widest_accumulator(params)),
            added=jnp.zeros((), jnp.int32),
            micro_step=jnp.zeros((), jnp.int32),
            emitted=jnp.zeros((), bool),
            emitted_total=jnp.zeros((), jnp.int32),
            dropped_total=jnp.zeros((), jnp.int32),
            empty_total=jnp.zeros((), jnp.int32),
        )

    def run(
        total: PyTree,
        state: AccumulateState,
        params: PyTree | None,
        factor: jax.Array | None,
        like: PyTree,
        extra: dict[str, Any],
        fast: bool,
    ) -> tuple[PyTree, AccumulateState]:
        _check_shapes(state.gradient_sum, total)
        updates = mean_of(total, factor, like)
        weight = _weight(extra, state.accumulated_weight.dtype)
        good = jnp.all(first_look(updates, axis_name).finite) & jnp.isfinite(weight) & (weight >= 0)
        # One branch per outcome: a `where` over the buffer would cost a second copy of it.
        new_sum = lax.cond(
            good,
            lambda: _added(state, updates, None if extra.get("weight") is None else weight),
            lambda: positions(state.gradient_sum),
        )
        first = state.added == 0
        weight_sum = jnp.where(first, 0, state.accumulated_weight) + jnp.where(good, weight, 0)
        added = state.added + good.astype(jnp.int32)
        length = jnp.maximum(every(state.emitted_total), 1) if callable(every) else every
        full = state.micro_step + 1 >= length
        emit = full & (weight_sum > 0)

        mean_factor = 1 / jnp.where(weight_sum > 0, weight_sum, 1) if use_mean else None
        sum_tree = _with_passengers(new_sum, updates)

        def propose() -> tuple[PyTree, Any]:
            mean = mean_of(sum_tree, mean_factor, updates)
            new_updates, new_state = update_inner(mean, state.accumulated_state, params, **extra)
            return new_updates, settle(name, new_state, state.accumulated_state)

        def step() -> tuple[PyTree, Any]:
            return take_step(inner, sum_tree, state.accumulated_state, params, mean_factor, updates, extra)

        untouched = params if fast else no_updates(jax.eval_shape(propose)[0], updates)
        result, inner_state = lax.cond(emit, step if fast else propose, lambda: (untouched, state.accumulated_state))
        return result, AccumulateState(
            accumulated_state=inner_state,
            gradient_sum=_with_passengers(new_sum, state.gradient_sum),
            accumulated_weight=jnp.where(full, 0, weight_sum),
            added=jnp.where(full, 0, added),
            micro_step=jnp.where(full, 0, state.micro_step + 1),
            emitted=emit,
            emitted_total=jnp.where(emit, next_step(state.emitted_total), state.emitted_total),
            dropped_total=jnp.where(good, state.dropped_total, next_step(state.dropped_total)),
            empty_total=jnp.where(full & ~emit, next_step(state.empty_total), state.empty_total),
        )

    return fast_transformation(name, init, run)


def has_updated(state: optax.OptState) -> jax.Array:
    """Whether the call that returned this state ran the inner optimizer.

    Args:
      state: an optimizer state that holds one `accumulate`, in any nesting.

    Returns:
      `bool[]`.

    Raises:
      ValueError: there is no `accumulate` in `state`, or more than one.

    Example:
      >>> import optax_guard as og
      >>> tx = og.accumulate(optax.sgd(1.0), every=2)
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> seen = []
      >>> for _ in range(4):
      ...     params, state = og.apply_gradients(tx, jnp.ones(1), state, params)
      ...     seen.append(bool(og.has_updated(state)))
      >>> seen
      [False, True, False, True]
    """
    states = find_states(state, AccumulateState)
    if len(states) != 1:
        raise ValueError(f"has_updated: expected one `accumulate` in this state, found {len(states)}.")
    return unwrapped(states[0].emitted)


def _weight(extra: dict[str, Any], dtype: Any) -> jax.Array:
    """The call's weight as a scalar; 1 if none was given."""
    weight = jnp.asarray(1 if extra.get("weight") is None else extra["weight"])
    if weight.shape != () or not (
        jnp.issubdtype(weight.dtype, jnp.integer) or jnp.issubdtype(weight.dtype, jnp.floating)
    ):
        raise ValueError(
            f"accumulate: `weight` must be a real scalar (for instance the number of tokens); got "
            f"{weight.dtype}{list(weight.shape)}."
        )
    return weight.astype(dtype)


def _added(state: AccumulateState, updates: PyTree, weight: jax.Array | None) -> list[jax.Array | None]:
    """The sums with one more micro-batch in them; the first of a cycle overwrites what was there."""
    first = state.added == 0

    def add(leaf: Any, total: Any) -> Any:
        if not is_gradient(leaf):
            return total
        leaf = leaf.astype(total.dtype)
        if weight is not None:
            leaf = leaf * weight.astype(total.dtype)
        return jnp.where(first, leaf, total + leaf)

    return [add(leaf, total) for leaf, total in zip(positions(updates), positions(state.gradient_sum), strict=True)]


def _with_passengers(sums: list[jax.Array | None], updates: PyTree) -> PyTree:
    """The sums in the structure of `updates`, whose own leaves stay where they carry no gradient."""
    leaves, structure = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
    chosen = [total if is_gradient(leaf) else leaf for leaf, total in zip(leaves, sums, strict=True)]
    return jax.tree.unflatten(structure, chosen)


def _check_shapes(gradient_sum: PyTree, updates: PyTree) -> None:
    """Adding would broadcast silently where shapes differ."""
    check_same_structure("accumulate", "updates", updates, "params at init", gradient_sum)
    for path, leaf, total in zip(leaf_names(updates), positions(updates), positions(gradient_sum), strict=True):
        if is_gradient(leaf) and leaf.shape != total.shape:
            raise ValueError(
                f"accumulate: leaf `{path}` has shape {leaf.shape}, but the parameters at init had {total.shape}."
            )

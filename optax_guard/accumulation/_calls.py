"""Accumulation across calls: one optimizer step from many small batches.

`accumulate` goes around everything else. The inner optimizer does not run in the calls in between: it sees one gradient
per cycle, so clips, penalties, noise and schedules act once per applied step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_guard._common import validate
from optax_guard._common.counters import count_if
from optax_guard._common.extra import loss_in
from optax_guard._common.new_params import QKClipState
from optax_guard._common.numerics import widest_accumulator
from optax_guard._common.parts import part_of
from optax_guard._common.tree import (
    as_arrays,
    as_params,
    check_same_shapes,
    check_same_structure,
    field_array,
    find_states,
    is_gradient,
    leaves_with_none,
    wider_dtype,
)
from optax_guard._common.typing import AxisName, Params, PyTree, State
from optax_guard._step.act import (
    FastStep,
    Start,
    as_transformation,
    checked_state,
    fast_transformation,
    inner_holds,
    step_if,
    take_step,
)
from optax_guard._step.gradient import Gradient
from optax_guard._step.mask import only_chosen, zeros_elsewhere
from optax_guard._step.max_logits import as_finite, from_finite, layers_of, max_logits_in, nothing_seen
from optax_guard._step.observe import GradientStatistics, one_pass_statistics
from optax_guard.accumulation._sums import (
    BadMicroBatch,
    Labels,
    MicroBatch,
    Reduction,
    check_reduction,
    check_shapes,
    labels,
    too_large,
    with_other_leaves,
)

__all__ = ["AccumulateState", "accumulate", "flush", "has_updated"]


class AccumulateState(NamedTuple):
    """The state of `accumulate`: the inner state, a buffer with the shapes of the parameters, and counters."""

    accumulated_state: Any  # the inner optimizer's state
    gradient_sum: PyTree  # f32 (or wider) in the parameters' shapes: the weighted sum; stale while `added` is 0
    accumulated_weight: jax.Array  # f32[] (f64[] with f64 leaves): the sum of the weights in `gradient_sum`
    value_mean: jax.Array  # f32[] (f64[]): the weighted mean loss of the micro-batches that came with `value=`
    value_weight: jax.Array  # f32[] (f64[]): the sum of their weights
    cycle_max_logits: Any  # by layer, f32[heads]: the largest of the micro-batches; () without `qk_clip` inside
    added: jax.Array  # i32[]: micro-batches in `gradient_sum`
    micro_step: jax.Array  # i32[]: calls in this cycle, including dropped micro-batches
    dropped_in_cycle: jax.Array  # i32[]: micro-batches of this cycle that were dropped
    emitted: jax.Array  # bool[]: whether the last call ran the inner optimizer
    micro_batch_lost: jax.Array  # bool[]: whether the last call dropped its micro-batch or ended a cycle without a step
    emitted_total: jax.Array  # i32[]: runs of the inner optimizer
    dropped_total: jax.Array  # i32[]: micro-batches dropped (not finite, or a negative or non-finite weight)
    empty_total: jax.Array  # i32[]: cycles that ended empty, without a step


class _Cycle(NamedTuple):
    """A cycle after a call."""

    total: PyTree  # the weighted sum, in the structure of the gradient
    weight: jax.Array  # f32[] (f64[]): and the fields below as in `AccumulateState`
    value_mean: jax.Array
    value_weight: jax.Array
    max_logits: Any
    added: jax.Array
    micro_step: jax.Array
    dropped: jax.Array
    statistics: GradientStatistics | None = None  # of `total`, if the inner optimizer holds non-finite steps
    seen: GradientStatistics | None = None  # of the last micro-batch, if it was read
    loss: jax.Array | None = None  # of the last micro-batch, if it had one


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], jax.Array],
    *,
    on_nonfinite: BadMicroBatch = "drop_micro",
    reduction: Reduction | Labels = "mean",
    accumulator_dtype: DTypeLike = jnp.float32,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes one step of `inner` with the (weighted) mean of the gradients of `every` calls.

    g = sum_i w_i g_i / sum_i w_i        over the calls i of a cycle whose gradient is finite; w_i = 1 if none is given

    Guarantees:
      - `inner` runs only in the call that completes a cycle; in between, the parameters and the inner state are
        bit-for-bit unchanged.
      - Unequal micro-batches whose `weight` is their number of tokens (or rows) give the gradient of the full batch.
      - A micro-batch that is not finite never enters any state: it is dropped with its weight, and counted. It keeps
        its place, so that a cycle is always `every` calls.
      - A persistently bad stream ends in a halt: a `guard` as `inner` counts every cycle that lost all its
        micro-batches as a non-finite step, and halts after `halt_after` of them.
      - Sums are kept in float32 (float64 for float64, complex for complex leaves), and `inner` receives the mean in the
        gradient's dtype. With `every=1` the updates are those of `inner` alone, bit for bit.
      - The loss that `inner` receives as `value=` is the weighted mean loss of the micro-batches that were kept.
      - `has_updated(state)` is True exactly after a call that ran `inner`.
      - Dropped micro-batches are deselected and not multiplied by 0, so they cannot return as 0 * NaN.

    =========================================  =======================================================================
    Case                                       Result
    =========================================  =======================================================================
    NaN or Inf in a micro-batch                see `on_nonfinite` below; its loss (`value=`) counts as part of it
    `weight` negative or not finite, or a sum  that micro-batch is dropped and counted, whatever `on_nonfinite` says
    of weights above 8.5e37
    `weight` times gradient above 1.8e19       like a gradient that is not finite, since its square overflows
    a "sum" of float16 gradients above 65504   the cycle is lost: a held step, which a guard inside counts
    nothing left at the end of a cycle         a held step: `inner` does not run; counted in `empty_total`
    all weights of a cycle are zero            the same, but a guard inside does not count it, as nothing was bad
    a leaf outside the `mask` of a guard       neither read nor summed, so it cannot drop a micro-batch
    a leaf is an integer, `float0` or `None`   passed to `inner` as in the call that completes the cycle
    the last, incomplete cycle of an epoch     `flush` steps with it; otherwise it continues with the next call
    `max_logits=` for a `qk_clip` inside       the largest of the micro-batches that were kept; any other `max_logits`
                                               are passed to `inner` as in the call that completes the cycle
    =========================================  =======================================================================

    ================  ================================================================================================
    `on_nonfinite`    A micro-batch with a NaN or an Inf
    ================  ================================================================================================
    "drop_micro"      is left out with its weight; the mean is over the others
    "drop_cycle"      invalidates its cycle, which ends in a held step (`empty_total`)
    "propagate"       enters the sum (and its loss the mean) without being read, until the cycle ends. This is the
                      cheapest. A guard inside holds the cycle; a bare optimizer is corrupted. The next cycle
                      starts clean
    ================  ================================================================================================

    Args:
      inner: any Optax transformation: usually `guard(optimizer, rules...)`.
      every: the number of calls per cycle (>= 1), or a schedule from the number of emitted steps to it (values below 1
        count as 1).
      on_nonfinite: "drop_micro", "drop_cycle" or "propagate".
      reduction: "mean"; "sum" (weighted, not divided); "max" (elementwise); "last"; or a tree of these with the
        structure of (a prefix of) the parameters, or a function from the parameters to such a tree. FP8 scales and
        other values that are passed as gradients must not be averaged: use "max" or "last" for their leaves.
        Micro-batches of weight 0 are left out of all reductions.
      accumulator_dtype: the narrowest dtype for the sum; a leaf of a wider dtype is summed in its own.
      axis_name: as in `gradient_statistics`. It is needed inside `jax.shard_map` with sharded gradients, so that all
        devices drop the same micro-batches. A guard inside must have the same.

    Returns:
      A transformation for `apply_gradients` (fast) and for anything that takes an Optax transformation. Its `update`
      takes `weight=`, a non-negative scalar, and forwards all other extra arguments to `inner` in the call that
      completes a cycle. In between it returns -0.0, which `optax.apply_updates` adds without changing a bit.

    Raises:
      ValueError: a static argument is invalid, or the gradients differ from the parameters in structure or shapes (the
        message names the first leaf that differs).

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
      `accumulate_gradients`, which computes the same mean inside one call, with one all-reduce; `optax.MultiSteps`,
      which has equal weights, runs the inner optimizer at every call and discards the result, and keeps a NaN for ever.
    """
    name = "accumulate"
    inner = as_transformation(name, inner)
    if not validate.is_callable(every):
        every = validate.integer(name, "every", every, low=1)
    validate.one_of(name, "on_nonfinite", on_nonfinite, BadMicroBatch)
    if isinstance(reduction, str):
        validate.one_of(name, "reduction", reduction, Reduction)
    accumulator_dtype = validate.floating_dtype(name, "accumulator_dtype", accumulator_dtype)
    validate.axis_name(name, axis_name)
    inside_holds, mask = inner_holds(name, inner, axis_name)

    def buffer(leaf: Any) -> jax.Array:
        if not is_gradient(leaf):
            return jnp.zeros((), jnp.float32)  # a placeholder, since the leaf of the emitting call is passed on
        return jnp.zeros_like(leaf, dtype=wider_dtype(accumulator_dtype, leaf.dtype))

    def init(params: optax.Params) -> AccumulateState:
        params = as_params(name, params)
        if leaves_with_none(params):  # Optax also calls `init` with a placeholder without leaves
            check_reduction(reduction, params)
        inner_state = inner.init(params)
        return AccumulateState(
            accumulated_state=inner_state,
            gradient_sum=jax.tree.map(buffer, params),
            accumulated_weight=jnp.zeros((), widest_accumulator(params)),
            value_mean=jnp.zeros((), widest_accumulator(params)),
            value_weight=jnp.zeros((), widest_accumulator(params)),
            cycle_max_logits=_no_max_logits(inner_state),
            added=jnp.zeros((), jnp.int32),
            micro_step=jnp.zeros((), jnp.int32),
            dropped_in_cycle=jnp.zeros((), jnp.int32),
            emitted=jnp.zeros((), bool),
            micro_batch_lost=jnp.zeros((), bool),
            emitted_total=jnp.zeros((), jnp.int32),
            dropped_total=jnp.zeros((), jnp.int32),
            empty_total=jnp.zeros((), jnp.int32),
        )

    def step(
        gradient: Gradient, state: AccumulateState, start: Start, extra: dict[str, Any]
    ) -> tuple[PyTree, AccumulateState]:
        if on_nonfinite == "propagate":  # nothing is read
            gradient = gradient._replace(total=zeros_elsewhere(name, mask, gradient.total))
        else:
            gradient = gradient.look(name, mask, axis_name)
        updates = gradient.written()
        check_shapes(state.gradient_sum, updates)
        call = MicroBatch(state, only_chosen(name, mask, updates), extra, reduction, alone=every == 1)
        length = jnp.maximum(every(state.emitted_total), 1) if callable(every) else every
        full = state.micro_step + 1 >= length
        loss = loss_in(name, extra, axis_name)
        good, seen = call.usable, None
        if on_nonfinite != "propagate":
            seen = call.in_dtype_of_sums(gradient.seen())
            good = good & call.fits(seen, scaled=gradient.factor is not None)
            if loss is not None:
                good = good & jnp.isfinite(loss)
        adds = good & (call.weight > 0)
        max_logits = _with_max_logits(state, max_logits_in(name, extra, axis_name), adds)
        sums = call.written(adds)
        statistics = None
        if inside_holds:
            known = call.alone and seen is not None and not call.weighted
            statistics = seen if known else call.look_if(full, sums, axis_name)
        value_mean, value_weight = _with_loss(state, loss, call.weight, adds)
        cycle = _Cycle(
            total=with_other_leaves(sums, updates),
            weight=_weight(state) + jnp.where(adds, call.weight, 0),
            value_mean=value_mean,
            value_weight=value_weight,
            max_logits=max_logits,
            added=state.added + adds.astype(jnp.int32),
            micro_step=state.micro_step + 1,
            dropped=state.dropped_in_cycle + (~good).astype(jnp.int32),
            statistics=statistics,
            seen=seen,
            loss=loss,
        )
        whole = (
            call.alone and not call.weighted
        )  # the mean is the gradient itself; a product with 1 would change what XLA fuses
        result, inner_state, emit = end(cycle, full, state, start, updates, extra, divides=not whole)
        state = state._replace(accumulated_state=inner_state, gradient_sum=call.stored(sums))
        return result, _after_call(state, cycle, full, emit, lost=~good)

    def end(
        cycle: _Cycle,
        ends: jax.Array,
        state: AccumulateState,
        start: Start,
        like: PyTree,
        extra: dict[str, Any],
        divides: bool = True,
    ) -> tuple[PyTree, Any, jax.Array]:
        """At the end of a cycle, takes a step of the inner optimizer unless the cycle is empty."""
        emit = ends & (cycle.weight >= jnp.finfo(cycle.weight.dtype).tiny)
        if on_nonfinite == "drop_cycle":
            emit = emit & (cycle.dropped == 0)
        kinds = labels(reduction, state.gradient_sum)
        lost = cycle.dropped > 0
        overflow = too_large(emit, cycle.total, like, kinds, axis_name)
        if overflow is not None:
            emit, lost = emit & ~overflow, lost | overflow
        active, statistics = emit, None
        if cycle.statistics is not None:
            # A cycle lost to bad numbers is reported to the guard as a step that was not finite.
            active = emit | (ends & lost)
            statistics = _where(emit, cycle.statistics, _never_finite(cycle.statistics, cycle.seen, cycle.loss))
        if cycle.loss is not None:
            mean = cycle.value_mean.astype(cycle.loss.dtype)
            extra = {**extra, "value": jnp.where(emit & (cycle.value_weight > 0), mean, cycle.loss)}
        if cycle.max_logits:
            extra = {**extra, "max_logits": jax.tree.map(from_finite, cycle.max_logits)}
        inverse = 1 / jnp.where(emit, cycle.weight, 1)
        factor = None
        if "mean" in kinds and divides:
            means = np.array([kind == "mean" for kind in kinds])
            factor = inverse if means.all() else jnp.where(means, inverse, 1)

        def take() -> tuple[PyTree, Any]:
            gradient = Gradient(cycle.total, like, factor, statistics)
            result, new_state = take_step(inner, gradient, state.accumulated_state, start, extra)
            return result, checked_state(name, new_state, state.accumulated_state)

        return *step_if(active, take, state.accumulated_state, start, like, usually=False), emit

    def flush_cycle(
        state: AccumulateState, params: PyTree, like: PyTree, extra: dict[str, Any]
    ) -> tuple[PyTree, AccumulateState]:
        check_shapes(state.gradient_sum, like)
        total = with_other_leaves(leaves_with_none(state.gradient_sum), like)
        cycle = _Cycle(
            total=total,
            weight=_weight(state),
            value_mean=state.value_mean,
            value_weight=state.value_weight,
            max_logits=_max_logits(state),
            added=state.added,
            micro_step=state.micro_step,
            dropped=state.dropped_in_cycle,
            statistics=one_pass_statistics(only_chosen(name, mask, total), axis_name) if inside_holds else None,
        )
        ends, start = state.micro_step > 0, Start(params, in_place=True)
        params, inner_state, emit = end(cycle, ends, state, start, like, extra)
        state = state._replace(accumulated_state=inner_state)
        return params, _after_call(state, cycle, ends, emit, lost=jnp.zeros((), bool))

    return fast_transformation(
        name, init, step, holds_nonfinite=True, axis_name=axis_name, flush=flush_cycle, mask=mask
    )


def flush(
    tx: optax.GradientTransformation,
    state: State,
    params: Params,
    *,
    like: PyTree | None = None,
    **extra: Any,
) -> tuple[Params, State]:
    """Ends the cycle with a step on the micro-batches so far, as at the end of an epoch.

    params, inner <- inner step with sum_i w_i g_i / sum_i w_i       over the calls since the last step

    Guarantees:
      - The result is that of a cycle with exactly that many calls.
      - If the cycle is empty (right after a step), nothing changes: the parameters and the inner state are bit-for-bit
        unchanged, and `has_updated` is False.
      - The next call starts a new cycle.

    Args:
      tx: the transformation from `accumulate`, which must be outermost.
      state: its state. For a linen `TrainState`, pass its `tx`, `opt_state` and `params`.
      params: the parameters.
      like: gradients (or their shapes) of any call, if their dtypes or `None`s differ from those of the parameters.
      **extra: forwarded unchanged to the inner optimizer. A rule that judges the loss needs `value=` here too, since it
        is not known at compile time whether the cycle's calls had losses.

    Returns:
      The new (params, state).

    Raises:
      ValueError: `tx` or `state` is not from `accumulate`, or `like` does not match the parameters.

    Example:
      >>> import optax_guard as og
      >>> tx = og.accumulate(optax.sgd(1.0), every=4)
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for _ in range(6):
      ...     params, state = og.apply_gradients(tx, jnp.ones(1), state, params)
      >>> params, state = og.flush(tx, state, params)
      >>> params, int(state.emitted_total)
      (Array([-2.], dtype=float32), 2)
    """
    step = part_of(tx, FastStep)
    if step is None or step.flush is None or not isinstance(state, AccumulateState):
        raise ValueError(
            "flush: `tx` and `state` must be those of `accumulate`, outermost; got "
            f"{type(tx).__name__} and {type(state).__name__}."
        )
    if params is None:
        raise ValueError("flush: `params` must be the parameters from which the step starts; got None.")
    params = as_params("flush", params)
    check_same_structure("flush", "params", params, "params at init", state.gradient_sum)
    if like is None:
        like = jax.tree.map(lambda x: x if is_gradient(x) else np.zeros(x.shape, jax.dtypes.float0), params)
    like = as_arrays("flush", like)
    check_same_shapes("flush", "like", like, "params", params)
    return step.flush(state, params, like, extra)


def has_updated(state: optax.OptState) -> jax.Array:
    """Tells whether the call that returned this state ran the inner optimizer.

    Args:
      state: an optimizer state that holds one `accumulate`, in any nesting.

    Returns:
      `bool[]`.

    Raises:
      ValueError: `state` holds no `accumulate` or more than one.

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
    return field_array(states[0].emitted)


def _weight(state: AccumulateState) -> jax.Array:
    return jnp.where(state.added == 0, 0, state.accumulated_weight)


def _after_call(
    state: AccumulateState, cycle: _Cycle, ends: jax.Array, emit: jax.Array, lost: jax.Array
) -> AccumulateState:
    """The state with the counters for the next call, which a cycle that ends resets."""

    def kept(number: jax.Array) -> jax.Array:
        return jnp.where(ends, 0, number)

    return state._replace(
        accumulated_weight=kept(cycle.weight),
        value_mean=kept(cycle.value_mean),
        value_weight=kept(cycle.value_weight),
        cycle_max_logits=cycle.max_logits,
        added=kept(cycle.added),
        micro_step=kept(cycle.micro_step),
        dropped_in_cycle=kept(cycle.dropped),
        emitted=emit,
        micro_batch_lost=lost | (ends & ~emit),
        emitted_total=count_if(emit, state.emitted_total),
        dropped_total=count_if(lost, state.dropped_total),
        empty_total=count_if(ends & ~emit, state.empty_total),
    )


def _no_max_logits(inner_state: Any) -> Any:
    """The maxima over no micro-batch of the layers that `qk_clip` inside needs; () if there is none."""
    found = [each.qk_clip_max_logits for each in find_states(inner_state, QKClipState)]
    if not all(isinstance(each, dict) for each in found):
        return jnp.zeros((), jnp.float32)  # Optax's placeholder in place of the parameters
    layers = {layer: nothing_seen(maxima.shape) for each in found for layer, maxima in each.items()}
    return layers or ()


def _max_logits(state: AccumulateState) -> Any:
    return jax.tree.map(
        lambda maxima: jnp.where(state.added == 0, nothing_seen(maxima.shape), maxima), state.cycle_max_logits
    )


def _with_max_logits(state: AccumulateState, given: Any, adds: jax.Array) -> Any:
    """The largest logits of the cycle, including this call."""
    if not state.cycle_max_logits:
        return state.cycle_max_logits
    given = layers_of("accumulate", given, state.cycle_max_logits)
    return jax.tree.map(
        lambda before, maxima: jnp.where(adds, jnp.maximum(before, as_finite(maxima)), before),
        _max_logits(state),
        given,
    )


def _where(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _never_finite(
    statistics: GradientStatistics, seen: GradientStatistics | None, loss: jax.Array | None
) -> GradientStatistics:
    """Statistics that are not finite: those of the last micro-batch if its gradient is bad, to name the leaf.

    They are also its own if only its loss is bad, which is passed on besides them.
    """
    nan, one = jnp.full_like(statistics.sum_squares, jnp.nan), jnp.ones_like(statistics.magnitude)
    if seen is None:
        return GradientStatistics(sum_squares=nan, magnitude=one)
    tells = ~jnp.all(seen.finite) if loss is None else ~(jnp.all(seen.finite) & jnp.isfinite(loss))
    seen = jax.tree.map(lambda x: x.astype(nan.dtype), seen)
    return _where(tells, seen, GradientStatistics(sum_squares=nan, magnitude=one))


def _with_loss(
    state: AccumulateState, loss: jax.Array | None, weight: jax.Array, adds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cycle's weighted mean loss and sum of weights, including this call.

    It is a running mean, since weight times loss may overflow when the mean does not.
    """
    first = state.added == 0
    mean, weights = jnp.where(first, 0, state.value_mean), jnp.where(first, 0, state.value_weight)
    if loss is None:
        return mean, weights
    after = jnp.where(adds, weights + weight.astype(weights.dtype), weights)
    share = weight.astype(weights.dtype) / jnp.where(after > 0, after, 1)
    return jnp.where(adds, mean * (1 - share) + loss.astype(mean.dtype) * share, mean), after

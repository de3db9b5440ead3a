"""Act: the guard around an optimizer. A step that it holds leaves no trace.

===========================================  ==================================================================
Function                                     Use it
===========================================  ==================================================================
`guard(optimizer, *rules)`                   around the whole optimizer, inside `accumulate`
`raise_if_halted(state, params)`             in the loop on the host, as often as you log
`clear_halt(state)`                          after fixing the cause, to continue from the same state
===========================================  ==================================================================
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.axes import on_any_device
from optax_guard._common.counters import count_if, next_step
from optax_guard._common.extra import loss_in, named_by, tag_in, warn_of_misspellings, with_value
from optax_guard._common.forms import cond_or_select
from optax_guard._common.new_params import finished
from optax_guard._common.parts import part_of
from optax_guard._common.tree import as_params, cast_like
from optax_guard._common.typing import AxisName, Mask, PyTree
from optax_guard._loss_scaling import LossScalingState
from optax_guard._step.act import (
    FastStep,
    Start,
    as_transformation,
    checked_state,
    fast_transformation,
    refuse_inside,
    take_step,
)
from optax_guard._step.gradient import Gradient
from optax_guard._step.judge import Judgement, Rule
from optax_guard._step.mask import only_chosen
from optax_guard._step.max_logits import Largest, largest, max_logits_in
from optax_guard._step.observe import GradientStatistics, overflows, scale_statistics, squarable
from optax_guard._step.reading import SeenLeaves, saw_leaves
from optax_guard._step.record import EVENTS, FlightRecorder, Row, add_row, empty_recorder
from optax_guard._step.updates import add_updates, bad_updates
from optax_guard.accumulation._calls import AccumulateState
from optax_guard.recovery import _ladder

__all__ = ["HOLDING", "BoundedState", "GuardState", "Settings", "guard", "guarded"]

_CODE = {name: code for code, name in enumerate(EVENTS)}
_EVENT_ORDER = ("halted", "nonfinite", "nonfinite_update", "skipped", "recovery", "let_through", "clipped")


class BoundedState(NamedTuple):
    """What `stabilize` guards if it bounds the step."""

    optimizer_state: optax.OptState
    bound_state: Any  # `StepGrowthState` or `LimitStepState`


class GuardState(NamedTuple):
    """The state of `guard`: the inner state, one state per rule, counters, the flight recorder, the leaves it sees."""

    guarded_state: Any  # the inner optimizer's state
    rule_states: tuple[Any, ...]  # one per rule, in order
    guard_step: jax.Array  # i32[]: calls, including held steps
    refused_in_row: jax.Array  # i32[]: finite steps refused by rules since the last applied step
    nonfinite_in_row: jax.Array  # i32[]: steps in a row that were not finite
    clipped_total: jax.Array  # i32[]: steps applied with a gradient that a rule scaled
    skipped_total: jax.Array  # i32[]: held steps, for whatever reason
    nonfinite_total: jax.Array  # i32[]: steps held because the gradient (or the checked update) was not finite
    let_through_total: jax.Array  # i32[]: refused steps that were applied because patience had run out
    halted: jax.Array  # bool[]: every further step is held
    recorder: FlightRecorder
    recovery_state: Any  # RecoveryState; () without `recovery`
    seen_leaves: SeenLeaves  # the leaves to which `worst_leaf` and the rules' states refer


HOLDING: dict[type, str] = {  # the states of wrappers that hold steps, and their names
    GuardState: "guard",
    AccumulateState: "accumulate",
    LossScalingState: "loss_scaling",
    optax.MultiStepsState: "optax.MultiSteps",
    optax.ApplyIfFiniteState: "optax.apply_if_finite",
}


class _Judgement(NamedTuple):
    rule_states: tuple[Any, ...]
    scale: jax.Array  # f32[] or f32[n_leaves]
    norm: jax.Array  # f32[]: the norm before the rules
    clipped_norm: jax.Array  # f32[]
    finite: jax.Array  # bool[]
    refused: jax.Array  # bool[]
    clipped: jax.Array  # bool[]
    rule: jax.Array  # i32[]
    worst_leaf: jax.Array  # i32[]
    has_gradient: jax.Array  # bool[n_leaves]
    loss: jax.Array | None  # f32[]


class _Outcome(NamedTuple):
    """The outcome of a step."""

    applied: jax.Array  # bool[]: whether the inner optimizer ran
    bad_leaf: jax.Array  # i32[]: the first leaf whose update was held as not finite; -1 if there is none
    inner_state: Any
    plan: _ladder.Plan | None
    recovery_state: Any
    logit: Largest  # the largest attention logit, if maxima were passed
    tag: jax.Array | int  # i32[]: identifies the batch; -1 if unknown


def guard(
    inner: optax.GradientTransformation,
    *rules: Rule,
    recovery: tuple[_ladder.Rung, ...] = (),
    patience: int = 10,
    halt_after: int = 50,
    recorder_rows: int = 256,
    check_updates: bool | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a bad gradient cannot harm it.

    g' = g * scale_1 * ... * scale_n                         (each rule judges the result of the previous one)
    params, inner <- inner step with g'   if g is finite and no rule skips,   else unchanged

    Guarantees:
      - Non-finite gradients are never applied, however many come in a row, with or without rules. Neither is a gradient
        whose loss (`value=` or `loss=`) is not finite.
      - A held step leaves no trace: parameters, moments, counters, schedules and keys are bit-for-bit unchanged, and
        weight decay is not applied.
      - All rules share one read of the gradient. Their result equals that of the rules chained before `inner` (for
        finite sums of squares; a stateful rule after one that skips sees the gradient here, but zeros in a chain).
      - No NaN or Inf enters any state, including the flight recorder.
      - While no rule acts, the result equals that of `inner` alone. Without rules and through `apply_gradients` it is
        equal bit for bit. With rules, or through `update` and `optax.apply_updates` in one `jit`, it is equal up to the
        rounding of single operations, since a product with 1 or the end of a branch can split a fused multiply-add
        (as in `optax.apply_if_finite`; see docs/sharp_edges.md).

    =======================================  ==========================================================================
    Case                                     Result
    =======================================  ==========================================================================
    NaN or Inf in any leaf                   held, counted, recorded with the leaf; the rules' histories do not change
    loss NaN or Inf, gradient finite         held and counted as non-finite; the log's `value` shows it
    finite, but its squares overflow f32     held and counted as non-finite (elements above 1.8e19)
    a rule skips a finite step               held; after `patience` in a row one is let through, as the rules scale it
    `halt_after` non-finite steps in a row   `halted`: all later steps are held until `clear_halt`
    a rule returns a NaN scale               held and counted as non-finite
    a rule scales up, beyond what the        the same: the norm of a leaf must stay below 1.8e19, and in float16 below
    leaf's dtype can hold or square          65504 if the scale exceeds 1
    steps of trouble in a row, a rising      nothing further without `recovery`, which can reset, back off or rewind
    loss
    NaN, Inf, anything outside `mask`        not seen: neither held nor counted, and `inner` gets zeros there
    zero gradient, empty tree                the inner optimizer steps as it would alone
    float16, update not finite               applied, or held and counted with `check_updates=True`
    finite parameter + update beyond the     the largest number of the dtype, or held and counted with
    dtype, or an update of Inf               `check_updates=True`; Inf through `optax.apply_updates`, unless checked
    =======================================  ==========================================================================

    Args:
      inner: any Optax transformation, usually the whole optimizer.
      *rules: the rules, applied in order. The guarantees above need none.
      recovery: what to do if holding steps is not enough: a tuple of `reset_moments(...)`, `back_off(...)` and
        `rewind(...)`, in any order (docs/recovery/index.md). By default it adds neither state nor work.
      patience: the number of finite steps in a row that the rules may refuse before one is let through (>= 0), so that
        a lasting change cannot stop a run. An applied step resets the count; a non-finite one neither counts nor
        resets.
      halt_after: the number of non-finite steps in a row at which the guard halts (>= 1). A finite step resets the
        count.
      recorder_rows: the number of rows of the flight recorder (>= 1); each takes 56 bytes.
      check_updates: whether to hold a step whose *outgoing* update is not finite, as when `optax.adam(1e-3)` turns a
        zero float16 gradient into NaN, or would take a finite parameter beyond its dtype. This needs a second copy of
        the parameters and the inner state while it runs. None checks only if `inner.update` has a parameter for
        gradients that it computes itself (`grad_fn`, as in `optax.contrib.sam`), which the guard cannot see.
      mask: which leaves are trained: booleans in the structure of (a prefix of) the parameters, a function from the
        parameters (or gradients) to such a tree, or a pattern of paths such as `"*lora*"`. The gradients of all other
        leaves are never read: rules, norms and the flight log do not see them, and `inner` gets zeros in their place.
        Freeze the leaves themselves in `inner` (docs/guard/frozen_leaves.md). Default: all.
      axis_name: as in `gradient_statistics`, for gradients sharded over an axis of `jax.shard_map`: all devices reach
        the same verdict, and the loss is averaged over the axis.

    Returns:
      A transformation for `apply_gradients` (fast) and for anything that takes an Optax transformation. `update`
      returns the updates of `inner`, or -0.0 for a held step, which `optax.apply_updates` adds without changing a bit.

    Raises:
      ValueError: a static argument is invalid, `inner` holds `loss_scaling` or `accumulate`, which go around the guard,
        or trees do not match (the message names the first leaf that differs).

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.adamw(1e-3), og.clip_by_global_norm(1.0))
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> bad = {"w": jnp.array([1.0, jnp.nan, 1.0])}
      >>> params, state = og.apply_gradients(tx, bad, state, params, value=jnp.array(0.5))
      >>> params["w"]
      Array([1., 1., 1.], dtype=float32)
      >>> int(og.metrics(state)["guard/nonfinite_total"])
      1

    See Also:
      `optax.apply_if_finite`, which has no rules, applies a non-finite gradient after a number of them, and copies
      parameters and moments at every step.
    """
    settings = Settings(recovery, patience, halt_after, recorder_rows, check_updates, mask, axis_name)
    return guarded("guard", inner, rules, settings)


class Settings(NamedTuple):
    """The arguments that `guard` and `stabilize` share, unchecked."""

    recovery: tuple[_ladder.Rung, ...]
    patience: int
    halt_after: int
    recorder_rows: int
    check_updates: bool | None
    mask: Mask | None
    axis_name: AxisName | None


def guarded(
    name: str, inner: Any, rules: tuple[Rule, ...], settings: Settings
) -> optax.GradientTransformationExtraArgs:
    """`guard`, with messages that name the function that was called."""
    recovery, patience, halt_after, recorder_rows, check_updates, mask, axis_name = settings
    patience = validate.integer(name, "patience", patience, low=0)
    halt_after = validate.integer(name, "halt_after", halt_after, low=1)
    recorder_rows = validate.integer(name, "recorder_rows", recorder_rows, low=1, high=validate.MILLION)
    validate.axis_name(name, axis_name)
    inner = as_transformation(name, inner)
    if check_updates is None:  # an optimizer that computes gradients itself, which are not seen here
        checks = any("grad_fn" in parameter for parameter in named_by(inner))
    else:
        checks = validate.boolean(name, "check_updates", check_updates)
    judges: list[Judgement] = []
    for position, each in enumerate(rules):
        judgement = part_of(each, Judgement)
        if judgement is None:
            raise ValueError(
                f"{name}: `rules[{position}]` must be made by `rule` (as `clip_by_global_norm` is); got "
                f"{validate.shown(each)}. Other transformations are not rules and go inside: "
                "guard(optax.chain(transformation, optimizer))."
            )
        if judgement.axis_name is not None and judgement.axis_name != axis_name:
            raise ValueError(
                f"{name}: rule {position} has axis_name={judgement.axis_name!r}, the guard {axis_name!r}: they must "
                "agree."
            )
        judges.append(judgement)
    ladder = _ladder.as_ladder(name, recovery, inner, halt_after, axis_name, mask)
    scales_updates = ladder is not None and ladder.back_off is not None
    update_inner = inner.update

    def init(params: optax.Params) -> GuardState:
        params = as_params(name, params)
        only_chosen(name, mask, params)  # raises if the mask does not match
        inner_state = inner.init(params)
        refuse_inside(name, "inner", inner_state, {LossScalingState: "loss_scaling", AccumulateState: "accumulate"})
        return GuardState(
            guarded_state=inner_state,
            rule_states=tuple(each.init(params) for each in rules),
            guard_step=jnp.zeros((), jnp.int32),
            refused_in_row=jnp.zeros((), jnp.int32),
            nonfinite_in_row=jnp.zeros((), jnp.int32),
            clipped_total=jnp.zeros((), jnp.int32),
            skipped_total=jnp.zeros((), jnp.int32),
            nonfinite_total=jnp.zeros((), jnp.int32),
            let_through_total=jnp.zeros((), jnp.int32),
            halted=jnp.zeros((), bool),
            recorder=empty_recorder(recorder_rows),
            recovery_state=_ladder.init_ladder(ladder, params, inner_state),
            seen_leaves=saw_leaves(params),
        )

    def step(gradient: Gradient, state: GuardState, start: Start, extra: dict[str, Any]) -> tuple[PyTree, GuardState]:
        if part_of(inner, FastStep) is None:  # a fast step checks the extra arguments itself
            warn_of_misspellings(extra, inner)
        extra, loss = with_value(extra), loss_in(name, extra, axis_name)
        if axis_name is not None and loss is not None:
            extra = {**extra, "value": loss}
        max_logits = max_logits_in(name, extra, axis_name)
        if max_logits is not None:
            extra = {**extra, "max_logits": max_logits}
        gradient = gradient.look(name, mask, axis_name)
        judged = _judge(gradient, judges, state, start.params, extra, loss)
        scaled = gradient.times(judged.scale)
        seen = _ladder.Seen(
            step=state.guard_step,
            finite=judged.finite,
            refused=judged.refused,
            alive=~state.halted,
            has_gradient=judged.has_gradient,
            value=judged.loss,
        )
        plan = _ladder.plan(ladder, state.recovery_state, seen, start.params)
        applied = judged.finite & ~state.halted & (~judged.refused | (state.refused_in_row >= patience))
        if plan is not None:
            applied = applied & ~plan.replaces

        def propose(inner_state: Any, params: PyTree, in_place: bool = False) -> tuple[PyTree, Any]:
            def inner_step(extra: dict[str, Any], base: PyTree | None) -> tuple[PyTree, Any]:
                updates, new_state = update_inner(scaled.written(), inner_state, params, **extra)
                moved = Start(base, in_place).moved(_ladder.scaled(plan, updates))
                return moved, checked_state(name, new_state, inner_state)

            return finished(inner_step, inner_state, params, extra, in_place=in_place)

        def act(params: PyTree, inner_state: Any) -> tuple[PyTree, Any, jax.Array]:
            here, nothing_bad = start._replace(params=params), jnp.full((), -1, jnp.int32)
            begun = _ladder.started(ladder, plan, gradient.like if params is None else params, inner_state)
            if start.in_place and not checks and not scales_updates:
                written = Gradient(scaled.written(), gradient.like)
                new_params, new_state = take_step(inner, written, begun, here, extra)
                return new_params, checked_state(name, new_state, inner_state), nothing_bad
            if not checks:
                return *propose(begun, params, in_place=start.in_place), nothing_bad
            updates, new_state = propose(begun, params)
            bad_leaf = _first(bad_updates(params, updates), axis_name)
            untouched = here.held(lambda: (updates, new_state), gradient.like)
            result, new_state = cond_or_select(
                bad_leaf < 0, lambda: (here.moved(updates), new_state), lambda: (untouched, inner_state)
            )
            return result, new_state, bad_leaf

        def step_from(params: PyTree, inner_state: Any) -> tuple[PyTree, Any, jax.Array]:
            untouched = start._replace(params=params).held(lambda: propose(inner_state, params), gradient.like)

            def hold() -> tuple[PyTree, Any, jax.Array]:
                result = (
                    untouched if start.in_place else _ladder.held_updates(ladder, plan, start.params, params, untouched)
                )
                return result, inner_state, jnp.full((), -1, jnp.int32)

            # The order of the branches matters: with `lax.cond(skip, hold, act)` JAX 0.10 copies all that the branches
            # alias (4.7 to 5.7 times a bare AdamW step, instead of 1.1 to 1.3; `make bench`).
            selects = ("gpu",) if start.in_place else ("gpu", "tpu")
            return cond_or_select(applied, lambda: act(params, inner_state), hold, selects=selects)

        def after(result: PyTree, new_state: Any, bad_leaf: jax.Array) -> _ladder.After:
            happened = applied & (bad_leaf < 0)

            def new_params() -> PyTree:
                return result if start.in_place else add_updates(start.params, result)

            def next_updates(inner_state: Any, params: PyTree) -> PyTree:
                return propose(inner_state, params)[0]

            bad_update = applied & ~happened
            return _ladder.After(
                happened, bad_update, judged.norm, judged.clipped_norm, new_params, new_state, next_updates
            )

        begin = start.params, state.guarded_state
        taken, recovery_state = _ladder.around(ladder, plan, seen, applied, begin, step_from, after)
        result, new_state, bad_leaf = taken
        if plan is not None and plan.restarts is not None:
            begun = tuple(each.init(gradient.like if start.params is None else start.params) for each in rules)
            restarted = plan.restarts & applied & (bad_leaf < 0)
            kept = jax.tree.map(lambda new, old: jnp.where(restarted, new, old), begun, judged.rule_states)
            judged = judged._replace(rule_states=kept)
        logit, tag = largest(max_logits), tag_in(name, extra, axis_name)
        outcome = _Outcome(applied, bad_leaf, new_state, plan, recovery_state, logit, tag)
        return result, _advance(state, judged, outcome, halt_after)

    return fast_transformation(name, init, step, holds_nonfinite=True, axis_name=axis_name, mask=mask)


def _judge(
    gradient: Gradient,
    rules: list[Judgement],
    state: GuardState,
    params: PyTree | None,
    extra: dict[str, Any],
    loss: jax.Array | None,
) -> _Judgement:
    """Applies every rule to one look at the gradient; the loss must be finite too."""
    before = statistics = gradient.seen()
    scale = jnp.ones((), statistics.sum_squares.dtype)
    finite = jnp.all(statistics.finite)
    if loss is not None:
        finite = finite & jnp.isfinite(loss)
        extra = {**extra, "value": loss}
    refused = jnp.zeros((), bool)
    acted = jnp.full((), -1, jnp.int32)
    new_states = []
    for position, (each, old) in enumerate(zip(rules, state.rule_states, strict=True)):
        verdict, new = each.judge(statistics, old, params, **extra)
        statistics = scale_statistics(statistics, verdict.scale)
        scale = scale * verdict.scale.astype(scale.dtype)
        # If a rule returns NaN, the step is held like a non-finite one.
        # A gradient that has overflowed cannot be judged further, even if a later rule would scale it down again.
        finite = finite & jnp.all(jnp.isfinite(verdict.scale)) & jnp.all(jnp.isfinite(statistics.leaf_norms))
        acts = verdict.skip | jnp.any(verdict.scale != 1)
        acted = jnp.where((acted < 0) & acts & ~refused | verdict.skip & ~refused, position, acted)
        refused = refused | verdict.skip
        new_states.append((new, old, each.sees_nonfinite))
    if rules or gradient.factor is not None:
        fits = squarable(statistics, gradient.like) & ~overflows(statistics, scale, gradient.like)
        finite = finite & jnp.all(fits)
    learns = finite & ~state.halted
    return _Judgement(
        rule_states=tuple(
            cast_like(new, old)
            if always
            else jax.tree.map(lambda n, o: jnp.where(learns, n, o), cast_like(new, old), old)
            for new, old, always in new_states
        ),
        scale=scale,
        norm=before.norm,
        clipped_norm=statistics.norm,
        finite=finite,
        refused=refused,
        clipped=jnp.any(scale != 1),
        rule=acted,
        worst_leaf=_worst_leaf(before),
        has_gradient=before.finite & (before.sum_squares > 0),
        loss=loss,
    )


def _worst_leaf(statistics: GradientStatistics) -> jax.Array:
    if statistics.sum_squares.shape == (0,):
        return jnp.full((), -1, jnp.int32)
    size = jnp.where(statistics.finite, statistics.leaf_norms, jnp.inf)
    return jnp.argmax(size).astype(jnp.int32)


def _advance(state: GuardState, judged: _Judgement, outcome: _Outcome, halt_after: int) -> GuardState:
    """The counters and the recorder after a step."""
    applied, bad_leaf, inner_state, plan, recovery_state, logit, tag = outcome
    bad_update = applied & (bad_leaf >= 0)
    happened = applied & ~bad_update
    nonfinite = ~judged.finite | bad_update
    counted = jnp.where(nonfinite, next_step(state.nonfinite_in_row), 0)
    in_row = jnp.where(state.halted, state.nonfinite_in_row, counted)  # keeps the count that led to the halt
    refused = judged.finite & judged.refused & ~applied & ~state.halted
    event = jnp.select(
        [state.halted, ~judged.finite, bad_update, refused, ~applied, judged.refused, judged.clipped],
        [_CODE[e] for e in _EVENT_ORDER],
        _CODE["applied"],
    ).astype(jnp.int32)
    row = Row(
        step=state.guard_step,
        value=judged.loss,
        grad_norm=judged.norm,
        clipped_norm=jnp.where(happened, judged.clipped_norm, 0),
        scale=jnp.where(happened, jnp.min(judged.scale, initial=1.0), 0),
        event=event,
        rule=judged.rule,
        worst_leaf=jnp.where(bad_update, bad_leaf, judged.worst_leaf),
        recovery=0 if plan is None else plan.reason,
        max_logit=logit.logit,
        tag=tag,
        logit_layer=logit.layer,
        logit_head=logit.head,
    )
    halted = state.halted | (in_row >= halt_after)
    return state._replace(
        guarded_state=inner_state,
        rule_states=judged.rule_states,
        guard_step=next_step(state.guard_step),
        refused_in_row=jnp.where(happened, 0, state.refused_in_row + refused.astype(jnp.int32)),
        nonfinite_in_row=in_row,
        clipped_total=count_if(happened & judged.clipped, state.clipped_total),
        skipped_total=count_if(~happened, state.skipped_total),
        nonfinite_total=count_if(nonfinite, state.nonfinite_total),
        let_through_total=count_if(happened & judged.refused, state.let_through_total),
        halted=halted if plan is None else halted | plan.gives_up,
        recorder=add_row(state.recorder, row),
        recovery_state=recovery_state,
    )


def _first(bad: list[jax.Array], axis_name: AxisName | None) -> jax.Array:
    """The position of the first bad leaf; -1 if there is none."""
    if not bad:
        return jnp.full((), -1, jnp.int32)
    here = on_any_device(jnp.stack(bad), axis_name)
    return jnp.where(jnp.any(here), jnp.argmax(here), -1).astype(jnp.int32)

"""Shared by both forms of SPAM and Stable-SPAM: their states, the wrapping of the optimizer, the restart.

`clip_by_second_moment` and `normalise_leaves` take the differences as functions: how an element is clipped, what is
remembered of a leaf, and what a restart sets to zero before or after the optimizer's step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax._src.transform import (  # states that Optax does not export
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
)

from optax_guard._common import validate
from optax_guard._common.counters import next_step, value_at
from optax_guard._common.eager import compiled_once
from optax_guard._common.numerics import accumulator_dtype, direction, multiplied
from optax_guard._common.optimizer_state import Reader, responses
from optax_guard._common.transformation import transformation_with_extra
from optax_guard._common.tree import (
    as_params,
    cast_like,
    check_leaf_count,
    is_gradient,
    is_like,
    leaves_with_none,
)
from optax_guard._common.typing import PyTree
from optax_guard._guard import HOLDING
from optax_guard._step.act import as_transformation, refuse_inside, step_without_params

__all__ = [
    "LARGEST",
    "SpamState",
    "StableSpamState",
    "at_size",
    "clip_by_second_moment",
    "map_with_lists",
    "normalise_leaves",
    "restarted",
    "roots_of",
]

LARGEST = 1e18  # the largest norm that is remembered, since its square fits into float32

# A count restarts with its moments; the counts of schedules are in states of their own and continue.
_MOMENTS = (
    optax.ScaleByAdamState,
    optax.ScaleByAmsgradState,
    optax.ScaleByBeliefState,
    optax.ScaleByRmsState,
    optax.ScaleByRssState,
    optax.ScaleByLionState,
    optax.TraceState,
    optax.EmaState,
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
)

ClipFn: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # leaf, root of its moment, call -> leaf
# Largest finite element, its usual size, observations so far, which are finite -> the observation, whether it counts
ObserveFn: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
RestartFn: TypeAlias = Callable[[Any, PyTree, jax.Array], Any]  # state, parameters, whether -> state


class SpamState(NamedTuple):
    """The state of `spam_clip`, around the optimizer's own."""

    spam_inner_state: Any  # the inner optimizer's state
    spam_step: jax.Array  # i32[]: the number of calls, which determines the restarts


class StableSpamState(NamedTuple):
    """The state of `stable_spam`, with three averages per leaf and the optimizer's own state."""

    stable_spam_inner_state: Any  # the inner optimizer's state
    stable_spam_step: jax.Array  # i32[]: the number of calls, which determines the restarts
    largest_average: jax.Array  # f32[n_leaves]: average of the largest element, not bias-corrected
    norm_average: jax.Array  # f32[n_leaves]: average of the norm after the clip
    squared_norm_average: jax.Array  # f32[n_leaves]
    leaf_steps: jax.Array  # i32[n_leaves]: the number of observations in the averages


class _Averages(NamedTuple):
    """The averages of `StableSpamState`, of all leaves or of one."""

    largest: jax.Array  # f32[n_leaves] or f32[], as all fields but the last
    norm: jax.Array
    squared_norm: jax.Array
    steps: jax.Array  # i32[n_leaves] or i32[]


def clip_by_second_moment(
    name: str,
    inner: optax.GradientTransformation,
    read: Reader,
    clip: ClipFn,
    begin: RestartFn,
    restart_every: int | None,
    warmup: int,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` in a clip by its second moment, with restarts and a warm-up after each."""
    inner = as_transformation(name, inner)
    warmup = validate.integer(name, "warmup", warmup, low=0)
    restart_every = _validated_interval(name, restart_every)
    update_inner = inner.update

    def init(params: optax.Params) -> SpamState:
        params = as_params(name, params)
        inner_state = inner.init(params)
        refuse_inside(name, "inner", inner_state, HOLDING)
        return SpamState(spam_inner_state=inner_state, spam_step=jnp.zeros((), jnp.int32))

    @compiled_once
    def change(
        updates: PyTree, state: SpamState, params: PyTree | None, extra: dict[str, Any]
    ) -> tuple[PyTree, SpamState]:
        step = next_step(state.spam_step)
        restart, factor = _restart(step, restart_every, warmup)
        before = begin(state.spam_inner_state, params, restart)
        roots = roots_of(read, before, params)
        clipped = map_with_lists(lambda leaf, root: clip(leaf, root, step), updates, roots)
        updates, after = update_inner(clipped, before, params, **extra)
        return _scaled(updates, factor), SpamState(spam_inner_state=cast_like(after, before), spam_step=step)

    return transformation_with_extra(name, init, change, needs_params=True)


def normalise_leaves(
    name: str,
    inner: optax.GradientTransformation,
    gammas: tuple[Any, Any, Any],
    eps: Any,
    observe: ObserveFn,
    begin: RestartFn,
    end: RestartFn,
    restart_every: int | None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` in a clip of elements and a normalisation of leaves by moving averages, with restarts.

    At a restart, `begin` edits the state of `inner` before its step, and `end` the whole state after it.
    """
    inner = as_transformation(name, inner)
    below_one = {"low": 0, "high": 1, "open_high": True}
    gamma1 = validate.scalar_or_schedule(name, "gamma1", gammas[0], **below_one)
    gamma2 = validate.scalar(name, "gamma2", gammas[1], **below_one)
    gamma3 = validate.scalar(name, "gamma3", gammas[2], **below_one)
    eps = validate.scalar(name, "eps", eps, low=0)
    restart_every = _validated_interval(name, restart_every)
    update_inner = inner.update

    def init(params: optax.Params) -> StableSpamState:
        params = as_params(name, params)
        leaves, inner_state = len(leaves_with_none(params)), inner.init(params)
        refuse_inside(name, "inner", inner_state, HOLDING)
        return StableSpamState(
            stable_spam_inner_state=inner_state,
            stable_spam_step=jnp.zeros((), jnp.int32),
            largest_average=jnp.zeros(leaves, jnp.float32),
            norm_average=jnp.zeros(leaves, jnp.float32),
            squared_norm_average=jnp.zeros(leaves, jnp.float32),
            leaf_steps=jnp.zeros(leaves, jnp.int32),
        )

    def change(
        updates: PyTree, state: StableSpamState, params: PyTree | None, extra: dict[str, Any]
    ) -> tuple[PyTree, StableSpamState]:
        def step() -> tuple[PyTree, StableSpamState]:
            return run(updates, state, params, extra)

        return step() if params is not None else step_without_params(name, step, updates, state)

    def run(
        updates: optax.Updates, state: StableSpamState, params: optax.Params | None, extra: dict[str, Any]
    ) -> tuple[optax.Updates, StableSpamState]:
        check_leaf_count(name, state.leaf_steps.shape[0], len(leaves_with_none(updates)))
        step = next_step(state.stable_spam_step)
        restart = _restart(step, restart_every, 0)[0]
        like = updates if params is None else params
        before = begin(state.stable_spam_inner_state, like, restart)
        settings = (value_at(gamma1, state.stable_spam_step), gamma2, gamma3, eps)
        old = _Averages(state.largest_average, state.norm_average, state.squared_norm_average, state.leaf_steps)
        results = [
            _normalised(leaf, jax.tree.map(lambda x, i=i: x[i], old), settings, observe)
            for i, leaf in enumerate(leaves_with_none(updates))
        ]
        normal = jax.tree.unflatten(
            jax.tree.structure(updates, is_leaf=lambda leaf: leaf is None), [leaf for leaf, _ in results]
        )
        new: _Averages = jax.tree.map(lambda *x: jnp.stack(x), *(each for _, each in results)) if results else old
        updates, after = update_inner(normal, before, params, **extra)
        new_state = StableSpamState(
            stable_spam_inner_state=cast_like(after, before),
            stable_spam_step=step,
            largest_average=new.largest,
            norm_average=new.norm,
            squared_norm_average=new.squared_norm,
            leaf_steps=new.steps,
        )
        return updates, end(new_state, like, restart)

    return transformation_with_extra(name, init, change)


def roots_of(read: Reader, state: Any, params: PyTree) -> list[jax.Array | None]:
    """The root of each corrected second moment: Inf if it has only seen zeros, NaN before the first step."""
    chosen = jax.tree.map(is_gradient, params)
    return [each.metric for each in responses(read, state, params, chosen, jnp.zeros((), jnp.int32))]


def map_with_lists(function: Any, tree: PyTree, *rest: list[Any]) -> PyTree:
    """Maps over the floating-point leaves of `tree` and the entries of lists in the order of `leaves_with_none`."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    mapped = [
        function(leaf, *others) if is_gradient(leaf) else leaf for leaf, *others in zip(leaves, *rest, strict=True)
    ]
    return jax.tree.unflatten(structure, mapped)


def at_size(leaf: jax.Array, size: jax.Array) -> jax.Array:
    """Every element with its direction and a new size; Inf has the direction of its sign."""
    return multiplied(direction(leaf), size)


def _scaled(updates: PyTree, factor: jax.Array) -> PyTree:
    return map_with_lists(lambda leaf: jnp.where(factor == 1, leaf, multiplied(leaf, factor)), updates)


def _validated_interval(name: str, restart_every: Any) -> int | None:
    return None if restart_every is None else validate.integer(name, "restart_every", restart_every, low=2)


def _restart(step: jax.Array, every: int | None, warmup: int) -> tuple[jax.Array, jax.Array]:
    """Whether the moments restart at this call, and the warm-up factor after the last restart."""
    if every is None:
        return jnp.zeros((), bool), jnp.ones((), jnp.float32)
    since = (step % every).astype(jnp.float32)
    rate = 0.495 * (1 + jnp.cos(jnp.pi * since / (warmup + 1)))
    return step % every == 0, jnp.where((step >= every) & (since < warmup), 1 - rate, 1)


def restarted(
    state: PyTree, params: PyTree, restart: jax.Array, *, counts: bool = True, moments: bool = True
) -> PyTree:
    """The state with moments and counts zero if `restart`, by a select that fuses into the read of the moments."""

    def zero(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        restarts = counts if path[0].name == "count" else moments
        return jnp.where(restart, jnp.zeros_like(leaf), leaf) if restarts else leaf

    def look(node: Any) -> Any:
        if not isinstance(node, _MOMENTS) or is_like(node, params):
            return node
        return jax.tree_util.tree_map_with_path(zero, node)

    return jax.tree.map(look, state, is_leaf=lambda node: isinstance(node, _MOMENTS) or is_like(node, params))


def _normalised(leaf: Any, old: _Averages, settings: tuple[Any, ...], observe: ObserveFn) -> tuple[Any, _Averages]:
    """One leaf of `stable_spam` and its new averages."""
    if not is_gradient(leaf) or leaf.size == 0:
        return leaf, old
    largest, norms, squares, steps = old
    gamma1, gamma2, gamma3, eps = (jnp.asarray(x, jnp.float32) for x in settings)
    real = accumulator_dtype(leaf.dtype)
    sizes = lax.stop_gradient(jnp.abs(leaf).astype(real))
    finite = jnp.isfinite(sizes)
    most = jnp.max(jnp.where(finite, sizes, 0)).astype(jnp.float32)
    t = steps + 1

    def corrected(average: jax.Array, decay: jax.Array, count: jax.Array) -> jax.Array:
        share = 1 - decay ** count.astype(jnp.float32)
        return average / jnp.where(share > 0, share, 1)

    usual = corrected(largest, gamma3, steps)
    taken, seen = observe(most, usual, steps, finite)
    new_largest = gamma3 * largest + (1 - gamma3) * taken
    bound = corrected(new_largest, gamma3, t)
    one = jnp.where(most > 0, most, 1)
    # Divided first, since elements of 1e30 times a bound would overflow.
    over = finite & (sizes > bound.astype(real))
    shape = jnp.where(finite, sizes, 0) / one.astype(real)
    shrunk = jnp.where(over, shape * bound.astype(real), jnp.where(finite, sizes, 0))
    shrunk = jnp.where(jnp.isinf(sizes), bound.astype(real), shrunk)
    top = jnp.max(shrunk)
    top = jnp.where(top > 0, top, 1)
    norm = (top * jnp.sqrt(jnp.sum(jnp.square(shrunk / top)))).astype(jnp.float32)
    counted = jnp.minimum(norm, LARGEST)
    new_norms = gamma1 * norms + (1 - gamma1) * counted
    new_squares = gamma2 * squares + (1 - gamma2) * jnp.square(counted)
    length = corrected(new_norms, gamma1, t) / (jnp.sqrt(corrected(new_squares, gamma2, t)) + eps)
    factor = jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1), 0).astype(real)
    direction = jnp.where(jnp.isnan(leaf), jnp.zeros_like(leaf), leaf)
    result = at_size(direction, shrunk * factor)
    result = jnp.where(seen, jnp.where(jnp.isfinite(result), result, jnp.zeros_like(result)), jnp.zeros_like(result))
    new = _Averages(new_largest, new_norms, new_squares, jnp.minimum(t, 2**30))
    return result, jax.tree.map(lambda n, o: jnp.where(seen, n, o).astype(o.dtype), new, old)

"""A bound on how fast steps grow: what a warm-up does on purpose passes, a jump does not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import count_if, next_step
from optax_guard._common.numerics import safe_sqrt
from optax_guard._common.transformation import transformation
from optax_guard._common.tree import is_gradient, leaves_with_none
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.judge import scale_leaves
from optax_guard.transforms._update_bounds import factor_within, least_factor, squares, without_nan, written_once

__all__ = ["StepGrowthState", "limit_step_growth"]


class StepGrowthState(NamedTuple):
    """The average of `limit_step_growth` and its counters."""

    step_growth_step: jax.Array  # i32[]: updates seen that moved a matrix
    step_growth_average: jax.Array  # f32[]: of the relative changes that were within the bound
    step_growth_bound_total: jax.Array  # i32[]: updates that were scaled down
    step_growth_scale: jax.Array  # f32[]: the factor of the last update


def limit_step_growth(
    start: float = 0.01, factor: float = 3.0, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Bound the finished update relative to the parameters, by a bound that follows the steps and never leads them.

    r = ||u||_2 / max(||w||_2, s),   s^2 = sum of sqrt(size)                  over the leaves of two or more axes

    u <- u * min(1, bound / r),   bound = max(start, factor * a);   after step t = 0, 1, ... with 0 < r <= bound:
    a <- a + 2 / (t + 2) * (r - a)

    So `a` is an average of the relative changes, weighted by the number of the step: of a linear warm-up's it is two
    thirds of the last. A rate that a warm-up raises to whatever height is never bounded, but a rate that is far too
    large from the first step on stays bounded by `start`, since a step beyond the bound does not raise it. The later in
    a run, the slower the bound can grow: a ramp of 5 % a step is bounded, too.

    Only leaves of two or more axes are measured (kernels, embeddings, convolutions); vectors and scalars are scaled
    along. A tree without them (a Gaussian process, weights in one vector) is never bounded: its customary steps are
    large, and there are no layers to blow each other up. The least norm `s` is about that of customary initialisers,
    so that a layer may start from zero.

    Guarantees:
      - ||u|| <= bound * max(||w||, s) (1 + 4 eps of the dtype), of the matrices.
      - An update within the bound is returned bit for bit; the direction never changes.
      - No step of a linear rise is bounded, nor one up to x1.4 above it: c (t + 1) <= r_t <= 1.4 c (t + 1) for any
        c <= `start` / 1.4, with the default `factor`. Neither is any step of at most `start`.
      - Nothing that is not finite enters the average, and the bound is never below `start`.

    =================================  ================================================================================
    Case                               Result
    =================================  ================================================================================
    linear warm-up to any rate,        unchanged, if its first step is below `start`, and noise below x1.4; a step that
    also from 0                        exceeds the bound keeps it where it is, and so those after it
    no warm-up, first r above `start`  bounded by `start` until the optimizer asks for less
    a rate that jumps late in a run    bounded by `factor` times the average, for as long as it lasts
    no leaf of two or more axes        unchanged
    zero update                        unchanged, and does not count
    NaN in a leaf of the update        that leaf is unchanged; the others are bounded by the norm of the rest
    Inf in a matrix, or > 1.8e19       the whole update is zero, since its squares overflow
    Inf or NaN in a vector             unchanged, as far as the matrices are within the bound
    parameters not finite, > 1.8e19    those leaves count as zero
    =================================  ================================================================================

    Args:
      start: the relative change that is always allowed, >= 0: a number or a 0-d array.
      factor: how far a step may exceed the average, >= 1: a number or a 0-d array. Below 2, noise is bounded as well.
      axis_name: as in `gradient_statistics`; parameters and updates must have the same sharding.

    Returns:
      A transformation that goes last in the chain; its `update` needs `params`. Under `optax.inject_hyperparams`, list
      `axis_name` in `static_args`.

    Raises:
      ValueError: a static argument is invalid, or `params` are missing in `update` or have another structure.

    Example:
      >>> params = jnp.ones((2, 2))
      >>> def largest_change(rates):
      ...     tx = limit_step_growth()
      ...     state, changes = tx.init(params), []
      ...     for rate in rates:
      ...         update, state = tx.update(-rate * params, state, params)
      ...         changes.append(round(float(jnp.abs(update).max()), 3))
      ...     return changes
      >>> largest_change([0.01, 0.02, 0.03, 0.04, 0.05])
      [0.01, 0.02, 0.03, 0.04, 0.05]
      >>> largest_change([0.5, 0.5, 0.5])
      [0.01, 0.01, 0.01]

    References:
      Gilmer et al., "A loss curvature perspective on training instability in deep learning", 2021, arXiv 2110.04369,
      and Kalra and Barkeshli, "Why warmup the learning rate?", 2024, arXiv 2406.09405: a net bears a large step once
      smaller ones have led it to where the curvature is small, which is what a warm-up does. The bound is of our own
      making.

    See Also:
      `limit_step`, whose bound does not grow: it holds a rate that is too large after a long warm-up, too.
    """
    name = "limit_step_growth"
    start = validate.scalar(name, "start", start, low=0)
    factor = validate.scalar(name, "factor", factor, low=1)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> StepGrowthState:
        del params
        return StepGrowthState(
            step_growth_step=jnp.zeros((), jnp.int32),
            step_growth_average=jnp.zeros((), jnp.float32),
            step_growth_bound_total=jnp.zeros((), jnp.int32),
            step_growth_scale=jnp.ones((), jnp.float32),
        )

    def change(updates: PyTree, state: StepGrowthState, params: PyTree | None) -> tuple[PyTree, StepGrowthState]:
        updates = written_once(updates, state.step_growth_step)
        moved, weights, sizes = squares(updates, params, axis_name)
        layers = np.array([is_gradient(leaf) and jnp.ndim(leaf) > 1 for leaf in leaves_with_none(updates)], bool)
        moved = safe_sqrt(without_nan(jnp.where(layers, moved, 0)))
        weights = safe_sqrt(jnp.maximum(*(jnp.sum(x, where=layers) for x in (weights, jnp.sqrt(sizes)))))
        weights = jnp.where(weights > 0, weights, 1)  # there are none
        lowest, times = (jnp.asarray(number, moved.dtype) for number in (start, factor))
        bound = jnp.maximum(lowest, times * state.step_growth_average.astype(moved.dtype))
        scale = factor_within(bound * weights, moved)
        least = least_factor(scale)
        relative = lax.stop_gradient(moved / weights).astype(jnp.float32)
        share = 2 / (state.step_growth_step.astype(jnp.float32) + 2)
        average = state.step_growth_average + share * (relative - state.step_growth_average)
        counts = relative > 0  # NaN, of Inf over Inf, does not
        enters = counts & (least >= 1)

        def without_inf(leaf: Any) -> Any:
            return jnp.where(scale == 0, jnp.zeros_like(leaf), leaf) if is_gradient(leaf) else leaf

        scaled = scale_leaves(updates, scale, jnp.zeros((), bool))
        return jax.tree.map(without_inf, scaled, is_leaf=lambda leaf: leaf is None), StepGrowthState(
            step_growth_step=jnp.where(counts, next_step(state.step_growth_step), state.step_growth_step),
            step_growth_average=jnp.where(enters, average, state.step_growth_average),
            step_growth_bound_total=count_if(least < 1, state.step_growth_bound_total),
            step_growth_scale=least,
        )

    return transformation(name, init, change, needs_params=True)

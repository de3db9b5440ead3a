"""Skipping: rules that hold a step instead of scaling it.

=====================  ============================================================================
Function               Holds a step
=====================  ============================================================================
`skip_nonfinite`       with a NaN or Inf; `guard` does so anyway, so this is for use alone in a chain
`skip_large`           whose gradient norm exceeds a fixed bound
=====================  ============================================================================

Under `guard` a skipped step leaves no trace. Alone in `optax.chain` a rule can only return zero updates: what follows
in the chain still advances (Adam's moments decay, schedules count, weight decay acts).
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_guard import _validate
from optax_guard._clipping import bound_and_state, init_for
from optax_guard._rule import Rule, Verdict, rule
from optax_guard._statistics import GradientStatistics
from optax_guard._typing import AxisName, PyTree, ScalarOrSchedule

__all__ = ["skip_large", "skip_nonfinite"]


def skip_nonfinite(*, axis_name: AxisName | None = None) -> Rule:
    """Hold every step whose gradient has a NaN or an Inf anywhere.

    g <- g if all g_j are finite, else 0          (alone; under `guard` the step leaves no trace)

    Guarantees:
      - Nothing non-finite passes.
      - A finite gradient is returned bit for bit, also one so large that its norm overflows.

    =====================  =====================================
    Case                   Result
    =====================  =====================================
    NaN or Inf anywhere    all zeros
    zero, empty tree       unchanged
    finite 1e30            unchanged (under `guard`: held)
    =====================  =====================================

    Args:
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Example:
      >>> skip = skip_nonfinite()
      >>> grads = {"a": jnp.array([1.0, jnp.inf]), "b": jnp.array([2.0])}
      >>> skip.update(grads, skip.init(grads))[0]
      {'a': Array([0., 0.], dtype=float32), 'b': Array([0.], dtype=float32)}

    See Also:
      `optax.zero_nans`, which zeroes single NaNs and lets Inf pass.
    """

    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        del params, extra
        one = jnp.ones((), statistics.sum_squares.dtype)
        return Verdict(scale=one, skip=~jnp.all(statistics.finite)), state

    return rule(optax.identity().init, judge, axis_name=axis_name)


def skip_large(max_norm: ScalarOrSchedule, *, axis_name: AxisName | None = None) -> Rule:
    """Hold every step whose gradient norm exceeds `max_norm`.

    g <- g if ||g||_2 <= max_norm, else 0         (alone; under `guard` the step leaves no trace)

    Guarantees:
      - Nothing of norm above `max_norm`, and nothing non-finite, passes (under `guard`: but for the one step in
        `patience` + 1 that is let through, so that a bound set too low cannot stop a run).
      - A gradient within the bound is returned bit for bit.

    ==========================  =======================================
    Case                        Result
    ==========================  =======================================
    NaN or Inf anywhere         all zeros
    zero, empty tree            unchanged
    norm equal to `max_norm`    unchanged
    schedule or array below 0   as 0
    schedule or array NaN       all zeros: nothing is known to be within
    ==========================  =======================================

    Args:
      max_norm: bound on the L2 norm of the whole gradient, >= 0: a number, a 0-d array (traced or not), or a schedule
        of this rule's own step count.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: `max_norm` is negative, NaN or not a scalar.

    Example:
      >>> skip = skip_large(10.0)
      >>> skip.update(jnp.array([30.0, 40.0]), skip.init(jnp.zeros(2)))[0]
      Array([0., 0.], dtype=float32)

    See Also:
      `optax.skip_large_updates`, which works only through `optax.MultiSteps`.
    """
    _validate.scalar_or_schedule("skip_large", "max_norm", max_norm, low=0, infinite=True)

    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        del params, extra
        bound, state = bound_and_state(max_norm, state)
        norm = statistics.norm
        within = (norm <= bound.astype(norm.dtype)) & jnp.all(statistics.finite)
        return Verdict(scale=jnp.ones((), norm.dtype), skip=~within), state

    return rule(init_for(max_norm), judge, axis_name=axis_name)

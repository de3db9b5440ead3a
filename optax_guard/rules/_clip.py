"""Clipping by a number you choose.

===========================  =====================================================  ==========================
Function                     Bounds                                                 Place
===========================  =====================================================  ==========================
`clip_by_global_norm`        the norm of the whole gradient; keeps its direction    a rule of `guard`, or first
`clip_by_leaf_norm`          the norm of each leaf, so a bad layer spares the rest  a rule of `guard`, or first
`clip_by_value`              every element                                          first inside `guard`
`adaptive_grad_clip`         every unit's gradient relative to its weights          first inside `guard`
===========================  =====================================================  ==========================

The first two are rules, which share one read of the gradient. The others treat single elements or units differently and
are ordinary transformations: `guard(optax.chain(adaptive_grad_clip(0.01), optax.sgd(0.1)))`.
"""

from typing import Any

import jax.numpy as jnp

from optax_guard._common import validate
from optax_guard._common.bounds import bound_and_state, bound_over_norm, init_for
from optax_guard._common.typing import AxisName, PyTree, ScalarOrSchedule
from optax_guard._step.judge import Rule, Verdict, rule
from optax_guard._step.observe import GradientStatistics

__all__ = ["clip_by_global_norm", "clip_by_leaf_norm"]


def clip_by_global_norm(max_norm: ScalarOrSchedule, *, axis_name: AxisName | None = None) -> Rule:
    """Scale the whole gradient down to norm `max_norm` if its norm is larger.

    g <- g * min(1, max_norm / ||g||_2)

    Guarantees:
      - The norm of the result is at most `max_norm` (1 + 4 eps of the gradient's dtype).
      - A gradient within the bound is returned bit for bit.
      - The norm is taken in float32 or wider and does not overflow: float16 [300, 1] and float32 [1e30] are clipped
        correctly and not to zero.
      - Outside a guard, NaN and Inf stay in their leaf, and the norm is taken over the finite leaves. Under `guard` the
        step is held.

    ==================================  =================================================================
    Case                                Result
    ==================================  =================================================================
    zero gradient, empty tree           unchanged
    `max_norm` = 0                      zero, even for a zero gradient
    `max_norm` = inf                    unchanged
    schedule or array below 0           as 0
    schedule or array NaN               NaN; `guard` holds and counts such a step
    NaN or Inf in a leaf                that leaf keeps it; the others are clipped by the norm of the finite ones
    norm above 8e37 * `max_norm`        zero: the factor is below the smallest normal float32
    ==================================  =================================================================

    Args:
      max_norm: the bound on the L2 norm, in the gradient's units, >= 0: a number, a 0-d array (traced or not), or a
        schedule of this rule's own step count.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: `max_norm` is negative, NaN or not a scalar.

    Example:
      >>> import optax
      >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(1.0))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"]
      Array([-0.6, -0.8], dtype=float32)

    References:
      Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, arXiv 1211.5063,
      algorithm 1.

    See Also:
      `optax.clip_by_global_norm`, which is the same for ordinary float32 gradients. It takes the norm in the gradient's
      dtype, spreads one NaN over all leaves, gives NaN for 0/0 and flips the sign if the bound is negative.
    """
    max_norm = validate.scalar_or_schedule("clip_by_global_norm", "max_norm", max_norm, low=0, infinite=True)
    validate.axis_name("clip_by_global_norm", axis_name)
    return _clip_rule(max_norm, axis_name, by_leaf=False)


def clip_by_leaf_norm(max_norm: ScalarOrSchedule, *, axis_name: AxisName | None = None) -> Rule:
    """Scale every leaf whose L2 norm exceeds `max_norm` down to that norm.

    g_i <- g_i * min(1, max_norm / ||g_i||_2)

    Guarantees:
      - The norm of each leaf is at most `max_norm` (1 + 4 eps of the leaf's dtype).
      - A leaf within the bound is returned bit for bit.

    ==============================  ========================================================
    Case                            Result
    ==============================  ========================================================
    zero leaf, empty tree           unchanged
    `max_norm` = 0                  zero
    `max_norm` = inf                unchanged
    schedule or array below 0       as 0
    NaN or Inf in a leaf            that leaf keeps it; the others are unaffected
    norm above 8e37 * `max_norm`    zero: the factor is below the smallest normal float32
    ==============================  ========================================================

    Args:
      max_norm: the bound on the L2 norm of a leaf, in the gradient's units, >= 0: a number, a 0-d array (traced or
        not), or a schedule of this rule's own step count.
      axis_name: as in `gradient_statistics`.

    Returns:
      A `Rule`.

    Raises:
      ValueError: `max_norm` is negative, NaN or not a scalar.

    Example:
      >>> clip = clip_by_leaf_norm(1.0)
      >>> grads = {"big": jnp.array([3.0, 4.0]), "small": jnp.array([0.5])}
      >>> clip.update(grads, clip.init(grads))[0]
      {'big': Array([0.6, 0.8], dtype=float32), 'small': Array([0.5], dtype=float32)}

    See Also:
      `optax.clip_by_block_rms`, which bounds the root mean square of a leaf.
    """
    max_norm = validate.scalar_or_schedule("clip_by_leaf_norm", "max_norm", max_norm, low=0, infinite=True)
    validate.axis_name("clip_by_leaf_norm", axis_name)
    return _clip_rule(max_norm, axis_name, by_leaf=True)


def _clip_rule(max_norm: ScalarOrSchedule, axis_name: AxisName | None, by_leaf: bool) -> Rule:
    def judge(
        statistics: GradientStatistics, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, Any]:
        del params, extra
        bound, state = bound_and_state(max_norm, state)
        size, root = statistics.leaf_norm_parts if by_leaf else statistics.finite_norm_parts
        inside = size * root <= bound.astype(root.dtype)
        factor = bound_over_norm(bound.astype(root.dtype), jnp.where(inside, 1, size), jnp.where(inside, 1, root))
        spared = inside | ~statistics.finite if by_leaf else inside
        scale = jnp.where(spared, 1, factor)
        return Verdict(scale=scale, skip=jnp.zeros((), bool)), state

    judge.__qualname__ = "clip_by_leaf_norm" if by_leaf else "clip_by_global_norm"
    return rule(init_for(max_norm), judge, axis_name=axis_name)

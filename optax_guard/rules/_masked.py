"""Rules for some of the leaves: which leaves a guard judges, and a rule for one group of leaves.

==========================================  ===================================================================
You want                                    Use
==========================================  ===================================================================
frozen leaves neither judged nor stepped    `guard(optimizer, ..., mask=trained)`
a separate bound for the embeddings         `guard(optimizer, masked_rule(clip_by_global_norm(0.1), "*embed*"))`
==========================================  ===================================================================

In a mask, True means "trained" for a guard and "this rule applies" for `masked_rule`, as in `optax.masked`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.parts import part_of
from optax_guard._common.tree import as_arrays
from optax_guard._common.typing import Mask, PyTree
from optax_guard._step.judge import Judgement, Rule, Verdict, rule
from optax_guard._step.mask import chosen, select_statistics
from optax_guard._step.observe import GradientStatistics

__all__ = ["MaskedRuleState", "masked_rule"]


class MaskedRuleState(NamedTuple):
    """The state of `masked_rule`."""

    masked_rule_state: Any  # the state of the inner rule
    masked_rule_leaves: jax.Array  # bool[n_leaves]: the leaves that it sees


def masked_rule(inner: Rule, mask: Mask) -> Rule:
    """Makes a rule that judges and scales only one group of leaves.

    g_i <- g_i * scale_i   where mask_i,   else g_i            with scale, skip judged from (g_i where mask_i, else 0)

    Rules bound the whole gradient. If one group of leaves differs in scale from the rest (embeddings, a new head,
    adapters), give it a rule of its own. The group's norm costs no second read, since all rules of a guard share one.

    Guarantees:
      - The rule sees zeros in place of the other leaves, whatever they hold, including NaN: its norm is that of the
        group.
      - The other leaves are scaled by 1. Outside a guard they are returned bit for bit.
      - With a mask that is True everywhere, the result is that of `inner`.

    ========================================  =======================================================================
    Case                                      Result
    ========================================  =======================================================================
    the rule skips                            the whole step is held, not only the group's part of it
    NaN or Inf in a leaf outside the mask     no effect on the rule; a `guard` around it holds the step
    two rules with overlapping masks          both act in order: the second judges the result of the first
    `update` without `params`                 works: the mask is resolved in `init` and stored in the state
    ========================================  =======================================================================

    Args:
      inner: a rule, from `rule` or a function such as `clip_by_norm_history()`.
      mask: the group, as booleans in the structure of (a prefix of) the parameters, a function from the parameters to
        such a tree, or a pattern of paths such as `"*embed*"` (`leaf_names` shows the paths).

    Returns:
      A rule for `guard`, which is also an ordinary transformation.

    Raises:
      ValueError: `inner` is not a rule or, in `init`, the mask does not match the parameters.

    Example:
      >>> import optax_guard as og
      >>> embeddings = og.masked_rule(og.clip_by_global_norm(1.0), "embed")
      >>> tx = og.guard(optax.sgd(1.0), embeddings)
      >>> params = {"embed": jnp.zeros(2), "head": jnp.zeros(1)}
      >>> grads = {"embed": jnp.array([30.0, 40.0]), "head": jnp.full(1, 7.0)}
      >>> params, state = og.apply_gradients(tx, grads, tx.init(params), params)
      >>> print(round(float(og.global_norm(params["embed"])), 4), params["head"])
      1.0 [-7.]

    See Also:
      `optax.masked`, which passes a smaller tree to a transformation. Around a rule in a chain it does the same, but
      `guard` could not share its read of the gradient.
    """
    name = "masked_rule"
    judgement = part_of(inner, Judgement)
    if judgement is None:
        raise ValueError(
            f"{name}: `inner` must be made by `rule` (as `clip_by_global_norm` is); got {validate.shown(inner)}. "
            "For other transformations, use `optax.masked`."
        )

    def init(params: optax.Params) -> MaskedRuleState:
        params = as_arrays(name, params)
        return MaskedRuleState(
            masked_rule_state=inner.init(params), masked_rule_leaves=jnp.asarray(chosen(name, mask, params))
        )

    def judge(
        statistics: GradientStatistics, state: MaskedRuleState, params: PyTree | None = None, **extra: Any
    ) -> tuple[Verdict, MaskedRuleState]:
        leaves = state.masked_rule_leaves
        if leaves.shape != statistics.sum_squares.shape:
            raise ValueError(
                f"{name}: the gradient has {statistics.sum_squares.size} leaves; the parameters at init had "
                f"{leaves.size}."
            )
        group = select_statistics(statistics, leaves)
        verdict, new = judgement.judge(group, state.masked_rule_state, params, **extra)
        scale = jnp.where(leaves, verdict.scale, jnp.ones((), verdict.scale.dtype))
        return Verdict(scale=scale, skip=verdict.skip), MaskedRuleState(new, leaves)

    return rule(init, judge, axis_name=judgement.axis_name, sees_nonfinite=judgement.sees_nonfinite)

"""Some leaves and not others: what a guard judges, and a rule for one group of leaves.

==========================================  ===================================================================
You want                                    Take
==========================================  ===================================================================
frozen leaves neither judged nor stepped    `guard(optimizer, ..., mask=trained)`
a bound of its own for the embeddings       `guard(optimizer, masked_rule(clip_by_global_norm(0.1), "*embed*"))`
==========================================  ===================================================================

True means "trained" for a guard, and "this rule applies" for `masked_rule`, as in `optax.masked`.
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
    """What `masked_rule` carries."""

    masked_rule_state: Any  # the rule's own
    masked_rule_leaves: jax.Array  # bool[n_leaves]: the leaves that it sees


def masked_rule(inner: Rule, mask: Mask) -> Rule:
    """A rule for one group of leaves: it judges these alone, and scales these alone.

    g_i <- g_i * scale_i   where mask_i,   else g_i            with scale, skip judged from (g_i where mask_i, else 0)

    Rules bound the whole gradient. Where one group has another size than the rest (embeddings, a new head, adapters),
    it takes a rule of its own, and the group's norm costs no second read: under `guard`, all rules judge from one.

    Guarantees:
      - The rule sees the other leaves as zeros, whatever they hold, NaN included: its norm is that of the group.
      - The other leaves are scaled by 1: alone in a chain they keep their bits.
      - A mask of True alone is the rule itself.

    ========================================  =======================================================================
    Case                                      Result
    ========================================  =======================================================================
    the rule skips                            the whole step is held, not the group's part of it
    NaN or Inf in a leaf outside the mask     nothing, alone in a chain; a `guard` around it holds the step
    two rules with masks that overlap         both act, in order: the second judges what the first left
    `update` without `params`                 works: the mask is resolved in `init` and held in the state
    ========================================  =======================================================================

    Args:
      inner: what `rule` or a function that makes one (as `clip_by_norm_history()`) returned.
      mask: the group: booleans in the structure of (a prefix of) the parameters, a function from the parameters to
        these, or a pattern of paths such as `"*embed*"` (`leaf_names` shows the paths).

    Returns:
      A rule for `guard`, and alone an ordinary transformation.

    Raises:
      ValueError: `inner` is no rule; in `init`, a mask that does not match the parameters.

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
      `optax.masked`, which hands a transformation a smaller tree: around a rule inside a chain it does the same, but
      `guard` could not share its read.
    """
    name = "masked_rule"
    judgement = part_of(inner, Judgement)
    if judgement is None:
        raise ValueError(
            f"{name}: `inner` must be made by `rule` (as `clip_by_global_norm` is); got {validate.shown(inner)}. "
            "For other transformations take `optax.masked`."
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

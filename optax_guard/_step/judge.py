"""Judge: a rule maps (statistics, its own state) to a factor per leaf and a decision whether to hold the step.

A rule is written once, as a `judge`. `rule` turns it into an ordinary Optax transformation, which also works in
`optax.chain`; `guard` calls the `judge`s of many rules with the statistics from one read of the gradient.

=================  ==========================================  ==============================================
A rule may         inside `guard`                              in a chain
=================  ==========================================  ==============================================
scale leaves       the gradient is scaled as it is read        the same
skip the step      params and inner state are unchanged        zero updates (what follows still advances)
remember           its state is kept over held NaN steps       it must ignore non-finite statistics itself
=================  ==========================================  ==============================================
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.eager import compiled_once
from optax_guard._common.extra import warn_of_misspellings, with_value
from optax_guard._common.numerics import multiplied
from optax_guard._common.parts import part_of, with_part
from optax_guard._common.transformation import transformation_with_extra
from optax_guard._common.tree import is_gradient
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.observe import GradientStatistics, gradient_statistics, overflows, scale_statistics

__all__ = ["Judge", "Judgement", "Rule", "Verdict", "rule", "scale_leaves"]


class Verdict(NamedTuple):
    """The decision of a rule on a step."""

    scale: jax.Array  # f32[] or f32[n_leaves], in [0, 1] for clips: the factor of the gradient
    skip: jax.Array  # bool[]: True if this step must leave no trace


class Judge(Protocol):
    """(statistics, state, params=None, *, value=None, **extra) -> (verdict, new state)."""

    def __call__(
        self, statistics: GradientStatistics, state: Any, params: PyTree | None = None, /, **extra: Any
    ) -> tuple[Verdict, Any]:
        """Judges one step; must accept and ignore unknown extra arguments."""
        ...


class Judgement(NamedTuple):
    """The judge of a rule, attached to its `update` so that it survives when the tuple is rebuilt."""

    judge: Judge
    axis_name: AxisName | None
    sees_nonfinite: bool


class Rule(optax.GradientTransformationExtraArgs):
    """An Optax transformation `(init, update)` that also carries the `judge` from which it was made."""

    @property
    def judge(self) -> Judge:
        """The judge alone, as `guard` calls it."""
        found = part_of(self, Judgement)
        assert found is not None, "made by `rule` alone"
        return found.judge


def rule(
    init: Callable[[PyTree], Any], judge: Judge, *, axis_name: AxisName | None = None, sees_nonfinite: bool = False
) -> Rule:
    """Makes a rule from a `judge`.

    g_i <- 0 if skip else g_i * scale_i          (in a chain; under `guard` a skipped step leaves no trace)

    Guarantees:
      - A leaf whose scale is 1 is returned bit for bit.
      - A scale above 1 produces no Inf: if the norm of a leaf would exceed the largest number of its dtype, the step is
        skipped. Under `guard` it is held and counted as non-finite if the squares of the leaf would overflow.
      - The zeros of a skipped step are selected and not multiplied, so no NaN or Inf survives a skip.
      - Updates keep their dtypes; integer, `float0` and `None` leaves are unchanged.

    Args:
      init: a function from the parameters to the rule's state (`optax.EmptyState()` for none). It must not read values.
      judge: see `Judge`. It must not change its state on non-finite statistics.
      axis_name: as in `gradient_statistics`; under `guard` it must equal the guard's.
      sees_nonfinite: True for a rule that records, so that `guard` keeps its new state on non-finite and halted steps
        too. It must be False for a rule that judges by its state.

    Returns:
      A `Rule` for `optax.chain` and `guard`.

    Example:
      A rule that halves every gradient whose norm exceeds 10:

      >>> def judge(statistics, state, params=None, **extra):
      ...     del params, extra
      ...     scale = jnp.where(statistics.norm > 10, 0.5, 1.0)
      ...     return Verdict(scale=scale, skip=jnp.zeros((), bool)), state
      >>> halve = rule(lambda params: optax.EmptyState(), judge)
      >>> tx = optax.chain(halve, optax.sgd(1.0))
      >>> grads = {"w": jnp.array([30.0, 40.0])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"]
      Array([-15., -20.], dtype=float32)
    """
    validate.function("rule", "init", init, "from parameters to a state")
    validate.function("rule", "judge", judge, "(statistics, state, params=None, **extra) -> (Verdict, state)")
    validate.axis_name("rule", axis_name)
    sees_nonfinite = validate.boolean("rule", "sees_nonfinite", sees_nonfinite)

    # The function in which the judge is defined, which the user called, for messages.
    name = getattr(judge, "__qualname__", "rule").partition(".<locals>")[0].removeprefix("_")

    @compiled_once
    def change(updates: PyTree, state: Any, params: PyTree | None, extra: dict[str, Any]) -> tuple[PyTree, Any]:
        warn_of_misspellings(extra)
        statistics = gradient_statistics(updates, axis_name=axis_name)
        verdict, state = judge(statistics, state, params, **with_value(extra))
        scaled = scale_statistics(statistics, verdict.scale)
        skip = verdict.skip | jnp.any(overflows(scaled, verdict.scale, updates))
        return scale_leaves(updates, verdict.scale, skip), state

    alone = transformation_with_extra(name, cast("optax.TransformInitFn", init), change)
    return Rule(alone.init, with_part(alone.update, Judgement(judge, axis_name, sees_nonfinite)))


def scale_leaves(updates: PyTree, scale: jax.Array, skip: jax.Array | None = None) -> PyTree:
    """Multiplies leaf i by `scale` or `scale[i]`, in float32 or wider.

    With `skip`, as for a rule in a chain, the result is zeros if it is True, and a leaf whose scale is 1 is returned
    bit for bit. Without `skip`, as in `guard`, where the arithmetic that follows flushes subnormals anyway, it is a
    plain product, which compiles faster.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
    scaled = []
    for i, leaf in enumerate(leaves):
        if is_gradient(leaf):
            factor = scale if scale.ndim == 0 else scale[i]
            product = multiplied(leaf, factor)
            if skip is not None:
                product = jnp.where(skip, jnp.zeros_like(leaf), jnp.where(factor == 1, leaf, product))
            leaf = product
        scaled.append(leaf)
    return jax.tree.unflatten(structure, scaled)

"""Short runs at many learning rates at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common import validate
from optax_guard._common.tree import as_arrays, large_as_inf, path_name
from optax_guard._common.typing import PyTree
from optax_guard._host.loss import problem
from optax_guard._host.terminal import number, plain, text_table
from optax_guard._step.act import Start, take_step
from optax_guard._step.gradient import Gradient
from optax_guard._step.max_logits import TROUBLE_IN_WORDS, largest
from optax_guard._step.observe import gradient_statistics

__all__ = ["LearningRateSweep", "learning_rate_sweep"]


class LearningRateSweep(NamedTuple):
    """The result of `learning_rate_sweep`, for `print(sweep)`, `sweep.plot()` and `sweep.to_dict()`."""

    learning_rates: np.ndarray  # f32[rates]
    losses: np.ndarray  # f32[rates, steps]: the loss of each batch, before its step
    initial_loss: float  # the loss of `validation` at the initial parameters
    final_losses: np.ndarray  # f32[rates]: the loss of `validation` after the last step, NaN and Inf included
    survived: np.ndarray  # bool[rates]
    sensitivity: float  # NaN if no learning rate survived
    max_logits: np.ndarray | None = None  # f64[rates, steps]: the largest attention logit, if the loss returns it

    @property
    def best(self) -> float | None:
        """The learning rate with the smallest final loss among those that survived."""
        return float(self.learning_rates[np.argmin(_usable(self))]) if self.survived.any() else None

    def __str__(self) -> str:
        """The sweep as a table in plain text."""
        rows = [
            [number(rate, 4), number(float(loss), 5), "yes" if ok else "no"]
            for rate, loss, ok in zip(self.learning_rates, self.final_losses, self.survived, strict=True)
        ]
        columns, note = ["learning rate", "final loss", "survived"], ""
        if self.max_logits is not None:
            columns += ["largest logit", "growth"]
            for row, logits in zip(rows, self.max_logits, strict=True):
                row += [number(float(logits[-1]), 4), f"x{logits[-1] / logits[0]:.3g}"]
            note = f"\n(attention logits of the last step; {TROUBLE_IN_WORDS})"
        return (
            f"learning rate sweep: {self.losses.shape[1]} steps, initial loss {self.initial_loss:.5g}, "
            f"best {number(self.best)}, sensitivity {self.sensitivity:.4g}\n\n" + text_table(columns, rows) + note
        )

    def to_dict(self) -> dict[str, Any]:
        """The sweep as plain Python values."""
        return plain(self)

    def plot(self, path: Any = None) -> Any:
        """A matplotlib figure of the final losses and the runs, written to `path` if one is given."""
        from optax_guard.preflight._plots import plot_sweep

        return plot_sweep(self, path)


def _usable(sweep: LearningRateSweep) -> np.ndarray:
    return np.where(sweep.survived, sweep.final_losses, np.inf)


def learning_rate_sweep(
    make_tx: Callable[[Any], optax.GradientTransformation],
    loss_fn: Callable[..., Any],
    params: PyTree,
    batches: PyTree,
    learning_rates: Sequence[float] | np.ndarray | jax.Array,
    *,
    validation: PyTree | None = None,
    has_aux: bool = False,
) -> LearningRateSweep:
    """Trains at every learning rate at once, in one jitted `vmap` of `scan`.

    sensitivity = mean over rates of (min(l(rate), l_0) - l*),  l* = min over rates of l(rate), l_0 the initial loss

    Guarantees:
      - Each run equals the same training done alone, up to rounding.
      - A run that ends in NaN or Inf counts as the initial loss and does not affect the others.

    ===============================  ============================================================
    Case                             Result
    ===============================  ============================================================
    a run's loss became NaN or Inf   not survived, even if the last loss is finite again
    final loss above the initial     not survived
    no rate survived                 `sensitivity` is NaN, `best` is None
    ===============================  ============================================================

    The sweep needs the memory of one training run times the number of learning rates.

    Args:
      make_tx: `make_tx(learning_rate)` makes the optimizer; the learning rate is a traced float32 scalar (multiply a
        schedule by it). Guards and accumulators work; under `vmap` both of their branches are computed.
      loss_fn: `loss_fn(params, batch)`, one floating-point number.
      params: the initial parameters of every run.
      batches: a tree of arrays [steps, ...]; `batches[i]` is the batch of step i, the same for every run.
      learning_rates: one or more positive numbers.
      validation: the batch on which the runs are compared; None takes the last of `batches`.
      has_aux: `loss_fn` returns (loss, anything). If that is the `max_logits=` of `qk_clip` (see `collect_max_logits`),
        or a dict with them under "max_logits", the optimizer is given them, and the sweep shows the largest.

    Returns:
      A `LearningRateSweep`.

    Raises:
      ValueError: the loss is not a scalar, the leading axes of `batches` differ, a learning rate is not positive and
        finite, or `make_tx` does not return an optimizer.

    Example:
      >>> sweep = learning_rate_sweep(
      ...     optax.sgd, lambda w, x: jnp.mean(jnp.square(w * x)), jnp.ones(()), jnp.ones((30, 4)), [0.1, 0.5, 1.1]
      ... )
      >>> sweep.survived.tolist(), sweep.best
      ([True, True, False], 0.5)

    References:
      Wortsman et al. Small-scale proxies for large-scale Transformer training instabilities. 2023. arXiv 2309.14322,
      section 2.2. Deviations: the mean is over the given learning rates; if all diverge, it is NaN instead of 0.

    See Also:
      `preflight`, which predicts where survival ends.
    """
    name = "learning_rate_sweep"
    try:
        with large_as_inf():  # which is refused
            rates = np.asarray(learning_rates, np.float32)
    except (TypeError, ValueError, OverflowError):  # text, complex numbers, a tracer
        rates = np.zeros(0)
    if rates.ndim != 1 or rates.size == 0 or not np.all(np.isfinite(rates) & (rates > 0)):
        raise ValueError(
            f"{name}: `learning_rates` must be one or more positive numbers; got {validate.shown(learning_rates)}."
        )
    validate.function(name, "make_tx", make_tx, "of the learning rate")
    has_aux = validate.boolean(name, "has_aux", has_aux)
    _steps(name, batches)
    batches = jax.tree.map(jnp.asarray, batches)
    last = jax.tree.map(lambda leaf: leaf[-1], batches) if validation is None else validation
    p = problem(name, loss_fn, params, last, has_aux)

    def make(rate: Any) -> optax.GradientTransformation:
        tx = make_tx(rate)
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(f"{name}: `make_tx` must return an optax.GradientTransformation; got {tx!r}.")
        return tx

    @jax.jit
    def run(rates: jax.Array, leaves: list[jax.Array], batches: PyTree, last: PyTree) -> tuple[Any, ...]:
        def train(rate: jax.Array) -> tuple[Any, ...]:
            tx = make(rate)

            def step(carry: Any, batch: PyTree) -> tuple[Any, Any]:
                weights, state = carry
                (loss, maxima), gradient = jax.value_and_grad(p.with_logits, has_aux=True)(weights, batch)
                extra = {"value": loss} if maxima is None else {"value": loss, "max_logits": maxima}
                tree, start = p.tree(gradient), Start(p.tree(weights), in_place=True)
                weights, state = take_step(tx, Gradient(tree, tree), state, start, extra)
                return (_floats(p, weights), state), (loss, largest(maxima).logit)

            (weights, _), (losses, logits) = jax.lax.scan(step, (leaves, tx.init(p.tree(leaves))), batches)
            return losses, logits, p.loss(weights, last), jnp.all(gradient_statistics(weights).finite)

        return *jax.vmap(train)(rates), p.loss(leaves, last)

    losses, logits, final, finite, initial = jax.device_get(run(jnp.asarray(rates), p.leaves, batches, last))
    losses, final = np.asarray(losses, np.float64), np.asarray(final, np.float64)
    survived = finite & np.isfinite(final) & np.all(np.isfinite(losses), axis=1) & (final <= float(initial))
    counted = np.where(np.isfinite(final), np.minimum(final, float(initial)), float(initial))
    sensitivity = float(np.mean(counted - np.min(counted))) if survived.any() else float("nan")
    logits = None if logits is None else np.asarray(logits, np.float64)
    return LearningRateSweep(rates, losses, float(initial), final, survived, sensitivity, logits)


def _floats(p: Any, params: PyTree) -> list[Any]:
    """The trained leaves of the whole tree."""
    marked = jax.tree.leaves(p.tree([_Mark()] * len(p.names)))
    return [leaf for leaf, mark in zip(jax.tree.leaves(params), marked, strict=True) if isinstance(mark, _Mark)]


class _Mark:
    """Marks the place of a trained leaf."""


def _steps(name: str, batches: PyTree) -> None:
    batches = as_arrays(name, batches)
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    if not leaves:
        raise ValueError(f"{name}: `batches` has no arrays.")
    first, steps = path_name(leaves[0][0]), leaves[0][1].shape[:1]
    for path, leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[:1] != steps or leaf.shape[0] == 0:
            raise ValueError(
                f"{name}: every leaf of `batches` needs the same leading axis of steps, 1 or more: `{first}` has "
                f"{list(steps)}, `{path_name(path)}` {list(leaf.shape[:1])}."
            )

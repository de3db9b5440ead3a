"""What a batch does to a loss and its gradient: the affected leaves, the operation and the examples at fault."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from optax_guard._common import validate
from optax_guard._common.batch import batch_size
from optax_guard._common.tree import is_gradient, path_name
from optax_guard._common.typing import PyTree
from optax_guard._host.logits import LayerLogits, largest_of, layer_logits, logit_finding, logit_table
from optax_guard._host.loss import Problem, part_of_batch, problem
from optax_guard._host.terminal import number, plain, progress_bar, shown, text_table
from optax_guard._step.observe import gradient_statistics
from optax_guard.diagnose._origin import Origin, find_origins

__all__ = ["Diagnosis", "LeafDiagnosis", "WorstExamples", "diagnose", "worst_examples"]

_CHUNK_ELEMENTS = 2**24  # the default number of per-example gradient elements held at once


class LeafDiagnosis(NamedTuple):
    """The contents of one array."""

    name: str
    nans: int
    infs: int
    norm: float  # of the finite elements
    largest: float  # largest finite absolute element


class WorstExamples(NamedTuple):
    """The examples of a batch, ordered by the norm of their own gradient: non-finite first, then the largest."""

    indices: tuple[int, ...]  # positions in the batch
    norms: tuple[float, ...]
    losses: tuple[float, ...]
    ratios: tuple[float, ...]  # norm over the median norm of the finite examples
    nonfinite: int  # how many examples of the whole batch have a loss or gradient that is not finite
    all_norms: np.ndarray  # f64[examples], in the order of the batch
    all_losses: np.ndarray

    def __str__(self) -> str:
        """The examples as a table in plain text."""
        rows = [
            (str(index), number(loss, 4), number(norm, 4), f"x{ratio:.3g}")
            for index, norm, loss, ratio in zip(self.indices, self.norms, self.losses, self.ratios, strict=True)
        ]
        return text_table(("example", "loss", "|gradient|", "over median"), rows)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return plain(self)


class Diagnosis(NamedTuple):
    """The result of `diagnose`, for `print(diagnosis)` and `diagnosis.to_dict()`."""

    loss: float
    finite: bool  # loss and gradient are finite
    origins: tuple[Origin, ...]  # in order of execution: the first is where it began
    inputs: tuple[LeafDiagnosis, ...]  # arrays of parameters and batch that already held NaN or Inf
    leaves: tuple[LeafDiagnosis, ...]  # of the gradient, non-finite ones first, then by norm
    examples: WorstExamples
    checkify: str | None  # checkify's message on the compiled function, if every single operation was finite
    logits: tuple[LayerLogits, ...]  # of attention, by layer and head; empty unless the loss returns its largest logits

    @property
    def story(self) -> str:
        """The diagnosis in sentences."""
        return "\n".join(_sentences(self))

    def __str__(self) -> str:
        """The diagnosis as sentences and tables in plain text."""
        rows = [
            (shown(leaf.name), str(leaf.nans), str(leaf.infs), number(leaf.norm), number(leaf.largest))
            for leaf in self.leaves[:8]
        ]
        table = text_table(("gradient of", "NaN", "Inf", "finite norm", "largest"), rows)
        parts = [self.story, table, logit_table(self.logits), str(self.examples)]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return plain(self)


def diagnose(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *,
    top: int = 8,
    chunk_size: int | None = None,
    has_aux: bool = False,
    progress: bool | None = None,
) -> Diagnosis:
    """Reruns one bad batch and names the operation, the leaves and the examples at fault.

    origin      an operation with finite inputs and a NaN or Inf in its output that reaches the loss or the gradient
    example i   norm of the gradient of `loss_fn(params, batch[i : i + 1])`

    Guarantees:
      - The loss and its gradient are evaluated one operation at a time. The bodies of `jit`, `scan`, `cond`, `while`,
        `checkpoint` and custom derivatives are entered where they turn non-finite.
      - A NaN or Inf that has no effect (a masked -Inf in a softmax, the untaken side of a `where`) is not an origin.
      - NaN and Inf that the parameters or the batch already held are reported as such.

    Limitations:
      - Nothing is fused when operations run one at a time, and on GPUs and TPUs matrix products may round differently,
        so a NaN of the compiled step can be absent here. JAX's `checkify` then examines the compiled function with
        `float_checks`; its message is in `checkify`. It finds NaN and division by zero, but not Inf, and misses
        constants.
      - The loss must be deterministic: close over the random key of that step.
      - A Pallas kernel, an FFI call and a `shard_map` count as one operation each.
      - With batch norm, or any loss that couples examples, the gradient of one example taken alone is a different
        number.

    ==================================  =====================================================================
    Case                                Result
    ==================================  =====================================================================
    all finite                          `finite`, no origins; `examples` shows what makes the gradient large
    NaN in the batch or the parameters  in `inputs`; no origin, since no operation made it
    Inf produced, then NaN from it      the operation that produced the Inf
    ==================================  =====================================================================

    Args:
      loss_fn: `loss_fn(params, batch)`, one floating-point number.
      params: the parameters of that step.
      batch: a tree of arrays with a common leading axis of examples.
      top: how many examples to name, >= 1.
      chunk_size: how many per-example gradients to compute at once, >= 1; None takes as many as fit in 16 million
        numbers.
      has_aux: whether `loss_fn` returns (loss, anything). The diagnosis names layer and head of the largest attention
        logit if that is the `max_logits=` of `qk_clip` (see `collect_max_logits`), or a dict with them under
        "max_logits".
      progress: True shows a progress bar (needs rich), False does not, None does on a terminal if rich is installed.

    Returns:
      A `Diagnosis`.

    Raises:
      ValueError: the loss is not a scalar, `params` has nothing to differentiate, the leading axes of `batch` differ,
        or an argument is outside its range.

    Example:
      >>> def loss_fn(w, x):
      ...     return jnp.mean(jnp.log(x @ w))
      >>> batch = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
      >>> found = diagnose(loss_fn, jnp.ones(2), batch, progress=False)
      >>> found.origins[0].operation, found.origins[0].produced, found.examples.indices[0]
      ('log', 'Inf', 1)

    See Also:
      `jax.debug_nans`, which stops at the first NaN of a jitted function but not at Inf, and cannot see past a guard;
      `optax_guard.flight_log`, which tells you which step to look at.
    """
    top, chunk_size, has_aux, progress = _static("diagnose", top, chunk_size, has_aux, progress)
    size = batch_size("diagnose", batch)
    batch = jax.tree.map(jnp.asarray, batch)
    p = problem("diagnose", loss_fn, params, batch, has_aux)
    chunk = _chunk(chunk_size, p, size)

    inputs = tuple(
        found
        for label, tree in (("params", params), ("batch", batch))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if is_gradient(leaf) and (found := _look(f"{label}: {path_name(path)}", leaf)).nans + found.infs
    )
    with progress_bar("diagnose", -(-size // chunk) + 2, progress) as advance:
        advance("operation by operation", 0)
        (loss, *gradient), origins = find_origins(lambda leaves: jax.value_and_grad(p.loss)(leaves, batch), p.leaves)
        leaves = tuple(_look(name, g) for name, g in zip(p.names, gradient, strict=True))
        finite = bool(jnp.isfinite(loss)) and not any(leaf.nans + leaf.infs for leaf in leaves)
        advance("compiled", 1)
        word = _compiled_word(p, batch) if finite else None
        logits = layer_logits(jax.jit(p.with_logits)(p.leaves, batch)[1]) if p.has_logits else ()
        advance("examples", 1)
        examples = _worst(p, batch, size, top, chunk, lambda: advance("examples", 1))
    order = sorted(leaves, key=lambda leaf: (not leaf.nans + leaf.infs, -leaf.norm))
    return Diagnosis(float(loss), finite, tuple(origins), inputs, tuple(order), examples, word, logits)


def worst_examples(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *,
    top: int = 8,
    chunk_size: int | None = None,
    has_aux: bool = False,
    progress: bool | None = None,
) -> WorstExamples:
    """Finds the examples of a batch whose own gradients are the largest.

    n_i = || d loss_fn(params, batch[i : i + 1]) / d params ||_2

    Guarantees:
      - Non-finite examples come first, in the order of the batch, then the others by decreasing norm.
      - At most `chunk_size` gradients are in memory. There is one compilation, or two if the last chunk is shorter.

    Args:
      loss_fn: as in `diagnose`, like all arguments below.
      params: the parameters.
      batch: the batch.
      top: how many examples to name.
      chunk_size: how many gradients to compute at once.
      has_aux: whether `loss_fn` returns (loss, anything).
      progress: whether to show a progress bar.

    Returns:
      `WorstExamples`, of at most `top` examples, with the norms and losses of all.

    Raises:
      ValueError: as in `diagnose`.

    Example:
      >>> batch = jnp.array([1.0, -2.0, 100.0, 1.0])
      >>> worst = worst_examples(lambda w, x: jnp.mean(jnp.square(w * x)), jnp.ones(()), batch, top=2)
      >>> worst.indices, worst.ratios
      ((2, 1), (4000.0, 1.6))
    """
    top, chunk_size, has_aux, progress = _static("worst_examples", top, chunk_size, has_aux, progress)
    size = batch_size("worst_examples", batch)
    batch = jax.tree.map(jnp.asarray, batch)
    p = problem("worst_examples", loss_fn, params, batch, has_aux)
    chunk = _chunk(chunk_size, p, size)
    with progress_bar("worst_examples", -(-size // chunk), progress) as advance:
        return _worst(p, batch, size, top, chunk, lambda: advance("examples", 1))


def _static(function: str, top: Any, chunk_size: Any, has_aux: Any, progress: Any) -> tuple[Any, ...]:
    """Checks the arguments that are not arrays."""
    return (
        validate.integer(function, "top", top, low=1),
        None if chunk_size is None else validate.integer(function, "chunk_size", chunk_size, low=1),
        validate.boolean(function, "has_aux", has_aux),
        None if progress is None else validate.boolean(function, "progress", progress),
    )


def _chunk(chunk_size: int | None, p: Problem, size: int) -> int:
    if chunk_size is not None:
        return min(size, chunk_size)
    return min(size, max(1, min(128, _CHUNK_ELEMENTS // sum(leaf.size for leaf in p.leaves))))


def _worst(p: Problem, batch: PyTree, size: int, top: int, chunk: int, advance: Callable[[], None]) -> WorstExamples:
    def one(leaves: list[jax.Array], example: PyTree) -> tuple[jax.Array, jax.Array]:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        loss, gradient = jax.value_and_grad(p.loss)(leaves, alone)
        return loss, gradient_statistics(gradient).norm

    several = jax.jit(jax.vmap(one, in_axes=(None, 0)))
    parts = []
    for start in range(0, size, chunk):
        parts.append(jax.device_get(several(p.leaves, part_of_batch(batch, start, min(start + chunk, size)))))
        advance()
    losses, norms = (np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True))
    finite = np.isfinite(norms) & np.isfinite(losses)
    key = np.where(finite, norms, np.inf)
    chosen = np.argsort(-key, kind="stable")[:top]
    middle = float(np.median(norms[finite])) if finite.any() else float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = norms[chosen] / np.float64(middle)
    return WorstExamples(
        indices=tuple(int(i) for i in chosen),
        norms=tuple(float(x) for x in norms[chosen]),
        losses=tuple(float(x) for x in losses[chosen]),
        ratios=tuple(float(x) for x in ratios),
        nonfinite=int(np.sum(~finite)),
        all_norms=norms,
        all_losses=losses,
    )


def _look(name: str, leaf: Any) -> LeafDiagnosis:
    array = np.asarray(leaf)
    array = np.abs(array).astype(np.float64)  # |NaN| is NaN; also right for complex leaves and bfloat16
    finite = array[np.isfinite(array)]
    return LeafDiagnosis(
        name=name,
        nans=int(np.isnan(array).sum()),
        infs=int(np.isinf(array).sum()),
        norm=float(np.sqrt(np.sum(np.square(finite)))),
        largest=float(finite.max(initial=0.0)),
    )


def _compiled_word(p: Problem, batch: PyTree) -> str | None:
    """What checkify finds in the compiled loss and gradient if they are not finite."""
    compiled = jax.jit(jax.value_and_grad(p.loss))(p.leaves, batch)
    if all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(compiled)):
        return None
    checked = checkify.checkify(jax.value_and_grad(p.loss), errors=checkify.float_checks)
    error, _ = jax.jit(checked)(p.leaves, batch)
    return (
        error.get()
        or "The compiled loss or gradient is not finite, but checkify saw no NaN: an Inf of a fused operation."
    )


def _sentences(found: Diagnosis) -> list[str]:
    bad = [leaf for leaf in found.leaves if leaf.nans + leaf.infs]
    lines = []
    if found.finite and found.checkify is None:
        lines.append(f"Loss ({found.loss:.5g}) and gradient are finite.")
    elif found.finite:
        lines.append(f"Finite operation by operation, not when compiled. checkify: {found.checkify}")
    else:
        lines.append(
            f"The loss is {found.loss:.5g}; {len(bad)} of {len(found.leaves)} leaves have a non-finite gradient."
        )
    for leaf in found.inputs:
        lines.append(f"Already in the input: `{leaf.name}` holds {leaf.nans} NaN and {leaf.infs} Inf.")
    if found.origins:
        first = found.origins[0]
        way = " (in the backward pass of this line)" if first.backward else ""
        via = f", called from {first.called_from}" if first.called_from else ""
        lines.append(
            f"First made by `{first.operation}` at {first.file}:{first.line} in {first.function}{via}{way}: "
            f"{first.produced} from {', '.join(first.operands)}."
        )
        if len(found.origins) > 1:
            lines.append(f"{len(found.origins) - 1} more operations made one of their own: see `origins`.")
    elif not found.finite and not found.inputs:
        lines.append("No operation made it: a constant of the loss is not finite.")
    if found.logits:
        logit, whose = largest_of(found.logits)
        usual = f"The largest attention logit is {number(logit, 4)}, that of {whose}."
        lines.append(logit_finding(found.logits) or usual)
    worst = found.examples
    if worst.nonfinite:
        named = [i for i, n, x in zip(worst.indices, worst.norms, worst.losses, strict=True) if not np.isfinite(n + x)]
        more = f" and {worst.nonfinite - len(named)} more" if worst.nonfinite > len(named) else ""
        lines.append(f"Examples that carry it: {', '.join(map(str, named))}{more}, of {len(worst.all_norms)}.")
    elif found.finite:
        lines.append(f"Largest gradient: example {worst.indices[0]}, {worst.ratios[0]:.3g} times the median.")
    else:
        lines.append("Each example alone is finite: it takes several of them, or their number.")
    return lines

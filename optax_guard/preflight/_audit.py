"""`preflight` and the parts of its report: norms per leaf, growth, sharpness, headroom in 16 bits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common import validate
from optax_guard._common.batch import batch_size
from optax_guard._common.tree import count_true
from optax_guard._common.typing import PyTree
from optax_guard._host.logits import layer_logits, logit_finding
from optax_guard._host.loss import Problem, part_of_batch, problem
from optax_guard._host.terminal import progress_bar, two_digits
from optax_guard._step.observe import gradient_statistics
from optax_guard.preflight._layers import along_time, layer_growth, look_at_activations
from optax_guard.preflight._reports import (
    ActivationReport,
    Headroom,
    LeafReport,
    PreflightReport,
    StableLearningRates,
)
from optax_guard.preflight._sharpness import dynamics, hessian_product, largest_eigenvalues, stable_rate
from optax_guard.preflight._sweep import LearningRateSweep

__all__ = ["plot", "preflight"]

_EXPONENTS = (-150, 129)  # range of the histogram: from below float32's smallest number to above its largest


def preflight(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    *,
    optimizer: optax.GradientTransformation | None = None,
    state: optax.OptState | None = None,
    tapped_loss_fn: Callable[..., Any] | None = None,
    time_axis: int | None = None,
    momentum: float = 0.9,
    eigenvalues: int = 1,
    tolerance: float = 0.01,
    chunks: int = 8,
    eps: float = 1e-8,
    seed: int = 0,
    has_aux: bool = False,
    progress: bool | None = None,
) -> PreflightReport:
    """Audits a loss, its parameters and a batch on the host, before training.

    sharpness            lambda = largest eigenvalue of H, the Hessian of the loss on `batch`
    stable learning rate SGD: 2 / lambda; heavy ball: 2 (1 + momentum) / lambda
    Adam                 2 (1 + b1) / ((1 - b1) lambda_P) = 38 / lambda_P at b1 = 0.9, with lambda_P the largest
                         eigenvalue of P^-1/2 H P^-1/2, P = sqrt(v) + eps and v the bias-corrected second moment
    growth exponent      slope of log |v_l| per layer, in the direction of travel, where v is the gradient with
                         respect to the weights of numbered layers (`blocks/0/...`, `Dense_1/...`), to inputs along
                         time, or to activations
    clip threshold       2 sqrt(|g|^2 + tr S), where S is the covariance of a batch's gradient
    gradient noise scale tr(S_1) / |g|^2, where S_1 is the covariance of one example's gradient

    Guarantees:
      - Nothing is changed and no step is taken; the same arguments give the same report.
      - Only Hessian-vector products are used, in float32 or wider. They need about `max(12, 3 eigenvalues + 1)` copies
        of the parameters on the host, and one gradient of a gradient on the device.
      - A loss or gradient that is not finite is reported and raises no error.

    Beyond the edge of stability the quadratic model blows up. A real network may still survive, since it can move to a
    flatter region (the catapult), and sharpness grows during training until it reaches 2 / learning rate. The figure
    therefore says where trouble begins at these parameters; repeat it during training, and see `learning_rate_sweep`.

    ================================  ===============================================================================
    Case                              Result
    ================================  ===============================================================================
    sharpness <= 0                    stable learning rates are Inf
    loss or Hessian not finite        `eigenvalues` is None, and a finding points to `diagnose`
    SGD, no momentum                  `stable_learning_rates.optimizer` is 2 / lambda
    optimizer without a known form    `stable_learning_rates.optimizer` is None (Lion, Muon, an accumulator)
    v = 0 for a weight                left out of the preconditioned sharpness: Adam has not seen it move yet
    one example                       no noise scale; the clip threshold is twice the gradient norm
    integer leaves, None              not reported, since they have no gradient
    ================================  ===============================================================================

    Args:
      loss_fn: `loss_fn(params, batch)`, the mean over the examples as one floating-point number. It must be
        deterministic: close over the key of any dropout.
      params: the parameters; their real floating-point leaves are differentiated.
      batch: a tree of arrays with a common leading axis of examples. A larger batch gives better estimates of sharpness
        and noise.
      optimizer: any Optax transformation; its constants (b1, b2, momentum) are read from two trial updates. Nesterov's
        momentum is taken for the heavy ball's; its true limit is lower by a factor of 1 / (1 + 2 momentum).
      state: the optimizer's state from a run in progress, whose second moment is used. Without it, v is taken as
        g^2 + tr S per element, which is what Adam would hold after some batches at these parameters.
      tapped_loss_fn: `tapped_loss_fn(params, batch, tap)`, the same loss, in which the model passes its activations
        [examples, ..., units] through `h = tap("layer 0", h)`, in order and outside `lax.scan`. The report then shows
        their size, dead and saturated units, and how activations and their gradients grow. In a plain network the
        gradient of a *weight* is the product of both, and stays level while the two explode in opposite directions.
      time_axis: for recurrent networks, the time axis of the batch's arrays, >= 1. The gradient with respect to the
        first floating-point leaf of `batch` that has this axis shows its growth along time; embed tokens beforehand.
      momentum: the momentum assumed for `stable_learning_rates.momentum`, in [0, 1).
      eigenvalues: how many of the largest eigenvalues to compute, >= 1. Each costs about 15 products.
      tolerance: relative accuracy of the eigenvalues, in (0, 1).
      chunks: the number of parts into which the batch is cut to measure noise, >= 1; an incomplete last part is left
        out.
      eps: Adam's epsilon, added to the root of the second moment, >= 0.
      seed: the seed of the eigensolver's first vector.
      has_aux: whether `loss_fn` returns (loss, anything). The report shows attention logits per layer and head if that
        is the `max_logits=` of `qk_clip` (see `collect_max_logits`), or a dict with them under "max_logits".
      progress: True shows a progress bar (needs rich), False does not, None does on a terminal if rich is installed.

    Returns:
      A `PreflightReport`: a NamedTuple with `print(report)`, `report.plot("picture.png")` and `report.to_dict()`.

    Raises:
      ValueError: the loss is not a scalar, `params` has nothing to differentiate, the leading axes of `batch` differ,
        a leaf is complex, or an argument is outside its range. The message says what to do.
      ImportError: `progress=True` without rich. The message has the command that installs it.

    Example:
      >>> def loss_fn(w, batch):
      ...     return jnp.mean(jnp.square(batch["x"] @ w - batch["y"])) / 2
      >>> batch = {"x": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "y": jnp.ones(2)}
      >>> report = preflight(loss_fn, jnp.zeros(2), batch, optimizer=optax.sgd(0.1), eigenvalues=2, progress=False)
      >>> report.eigenvalues, report.stable_learning_rates.sgd
      ((2.0, 0.5), 1.0)

    References:
      Cohen, Kaur, Li, Kolter, Talwalkar. Gradient Descent on Neural Networks Typically Occurs at the Edge of
        Stability. 2021. arXiv 2103.00065, section 2.1 and appendix B.
      Cohen et al. Adaptive Gradient Methods at the Edge of Stability. 2022. arXiv 2207.14484, equation 2. Deviation:
        the factor 1 - b1^t that corrects the first steps is left out.
      OLMo team. 2 OLMo 2 Furious. 2024. arXiv 2501.00656, section 3.2: (1 / n) log(|v'| / |v|). Deviation:
        the slope is taken over all layers instead of between the two ends.
      McCandlish, Kaplan, Amodei. An Empirical Model of Large-Batch Training. 2018. arXiv 1812.06162, equation 2.9.

    See Also:
      `learning_rate_sweep`; `diagnose`, for a batch that has gone wrong.
    """
    momentum = validate.scalar("preflight", "momentum", momentum, low=0, high=1, open_high=True, static=True)
    tolerance = validate.scalar(
        "preflight", "tolerance", tolerance, low=0, high=1, open_low=True, open_high=True, static=True
    )
    eps = validate.scalar("preflight", "eps", eps, low=0, static=True)
    eigenvalues = validate.integer("preflight", "eigenvalues", eigenvalues, low=1)
    chunks = validate.integer("preflight", "chunks", chunks, low=1)
    seed = validate.integer("preflight", "seed", seed, low=0, high=2**32 - 1)
    has_aux = validate.boolean("preflight", "has_aux", has_aux)
    progress = None if progress is None else validate.boolean("preflight", "progress", progress)
    if tapped_loss_fn is not None:
        validate.function("preflight", "tapped_loss_fn", tapped_loss_fn, "of (params, batch, tap)")
    if time_axis is not None:
        time_axis = validate.integer("preflight", "time_axis", time_axis, low=1)
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"preflight: `optimizer` must be an optax.GradientTransformation; got {optimizer!r}.")
    if state is not None and optimizer is None:
        raise ValueError("preflight: `state` needs the `optimizer` it belongs to.")
    size = batch_size("preflight", batch)
    batch = jax.tree.map(jnp.asarray, batch)
    p = problem("preflight", loss_fn, params, batch, has_aux)
    for name, leaf in zip(p.names, p.leaves, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"preflight: leaf `{name}` is complex; sharpness is defined for real parameters.")

    products = 30 * eigenvalues
    chunks = min(chunks, size)
    total = 2 + chunks + products * (1 if optimizer is None else 2) + 4
    with progress_bar("preflight", total, progress) as advance:
        advance("gradient", 0)
        gradients = jax.jit(jax.value_and_grad(p.loss))
        loss, gradient = gradients(p.leaves, batch)
        leaves, exponents = _leaves(p, gradient)
        norm = float(gradient_statistics(gradient).norm)
        finite = bool(jnp.isfinite(loss)) and np.isfinite(norm)
        advance("gradient noise", 2)
        variance = _variance(gradients, p, batch, size, chunks, advance) if finite else None
        tops, conditioned, rates = None, None, None
        if finite:
            tops, conditioned, rates = _curvature(
                p,
                batch,
                optimizer,
                state,
                loss,
                gradient,
                variance,
                momentum,
                eigenvalues,
                tolerance,
                eps,
                seed,
                lambda what: advance(what, 1),
            )
        advance("growth and precision", 0)
        growth = layer_growth([leaf.name for leaf in leaves], [leaf.gradient_norm for leaf in leaves])
        if time_axis is not None:
            growth += (along_time("preflight", p, batch, time_axis),)
        activations: tuple[ActivationReport, ...] = ()
        if tapped_loss_fn is not None:
            activations, both_ways = look_at_activations("preflight", tapped_loss_fn, p, batch, has_aux)
            growth += both_ways
        advance("growth and precision", 2)
        logits = layer_logits(jax.jit(p.with_logits)(p.leaves, batch)[1]) if p.has_logits else ()
        headroom = tuple(_headroom(p, batch, loss, gradient, dtype) for dtype in (jnp.bfloat16, jnp.float16))
        advance("done", total)

    spread = sum(float(jnp.sum(v)) for v in variance) if variance is not None else 0.0  # trace of a batch's covariance
    squared = norm**2 - spread
    report = PreflightReport(
        loss=float(loss),
        examples=size,
        parameters=sum(leaf.size for leaf in p.leaves),
        gradient_norm=norm,
        gradient_noise_scale=None
        if variance is None
        else (spread * size / squared if squared > 0 else float("inf") if spread > 0 else 0.0),
        clip_threshold=two_digits(2 * float(np.sqrt(norm**2 + spread))) if finite else float("nan"),
        eigenvalues=tops,
        preconditioned_eigenvalues=conditioned,
        stable_learning_rates=rates,
        growth=growth,
        activations=activations,
        headroom=headroom,
        leaves=leaves,
        gradient_exponents=exponents,
        logits=logits,
        findings=(),
    )
    return report._replace(findings=_findings(report, optimizer is not None))


def plot(result: PreflightReport | LearningRateSweep, path: Any = None) -> Any:
    """Draws a report or a sweep as a matplotlib figure.

    Args:
      result: what `preflight` or `learning_rate_sweep` returned.
      path: the file to write, whose suffix sets the format (`.png`, `.pdf`, `.svg`); None writes nothing.

    Returns:
      The `matplotlib.figure.Figure`, which is not attached to a window.

    Raises:
      ImportError: matplotlib is not installed; the message has the command that installs it.
    """
    return result.plot(path)


def _leaves(p: Problem, gradient: list[jax.Array]) -> tuple[tuple[LeafReport, ...], tuple[tuple[int, int], ...]]:
    """A row for each leaf, and the number of gradient elements with each binary exponent."""
    norms, weights = (np.asarray(gradient_statistics(tree).leaf_norms) for tree in (gradient, p.leaves))
    low, high = _EXPONENTS

    @jax.jit
    def look(leaves: list[jax.Array]) -> tuple[list[Any], jax.Array]:
        wide = [leaf if leaf.dtype == jnp.float64 else leaf.astype(jnp.float32) for leaf in leaves]
        rows = [(jnp.max(jnp.abs(g)), jnp.mean(g == 0, dtype=jnp.float32)) for g in wide]
        counts = jnp.zeros(high - low, jnp.int32)
        for g in wide:
            exponent = jnp.frexp(g.ravel())[1] - 1
            seen = (g.ravel() != 0) & jnp.isfinite(g.ravel())
            counts = counts.at[jnp.clip(exponent - low, 0, high - low - 1)].add(seen.astype(jnp.int32))
        return rows, counts

    rows, counts = jax.device_get(look(gradient))
    leaves = tuple(
        LeafReport(name, leaf.shape, float(weight), float(norm), float(largest), float(zeros))
        for name, leaf, weight, norm, (largest, zeros) in zip(p.names, p.leaves, weights, norms, rows, strict=True)
    )
    return leaves, tuple((int(e) + low, int(counts[e])) for e in np.flatnonzero(counts))


def _variance(
    gradients: Any, p: Problem, batch: PyTree, size: int, chunks: int, advance: Any
) -> list[jax.Array] | None:
    """The variance of each element of the gradient of a batch of this size, from the spread between its parts."""
    if chunks < 2:
        return None
    part = size // chunks
    dtypes = [jnp.promote_types(leaf.dtype, jnp.float32) for leaf in p.leaves]

    @jax.jit
    def add(mean: list[Any], squares: list[Any], gradient: list[Any], seen: jax.Array) -> tuple[list[Any], list[Any]]:
        wide = [g.astype(dtype) for g, dtype in zip(gradient, dtypes, strict=True)]
        moved = [m + (g - m) / seen.astype(m.dtype) for m, g in zip(mean, wide, strict=True)]
        spread = [s + (g - m) * (g - n) for s, m, n, g in zip(squares, mean, moved, wide, strict=True)]
        return moved, spread

    mean = [jnp.zeros(leaf.shape, dtype) for leaf, dtype in zip(p.leaves, dtypes, strict=True)]
    squares = mean
    for i in range(chunks):  # Welford's recurrence, which avoids the cancellation of a difference of squares
        _, gradient = gradients(p.leaves, part_of_batch(batch, i * part, (i + 1) * part))
        mean, squares = add(mean, squares, gradient, jnp.asarray(i + 1, jnp.float32))
        advance("gradient noise", 1)
    scale = part / size / (chunks - 1)
    return [s * jnp.asarray(scale, s.dtype) for s in squares]


def _curvature(
    p: Problem,
    batch: PyTree,
    optimizer: optax.GradientTransformation | None,
    state: Any,
    loss: jax.Array,
    gradient: list[jax.Array],
    variance: list[jax.Array] | None,
    momentum: float,
    wanted: int,
    tolerance: float,
    eps: float,
    seed: int,
    advance: Callable[[str], None],
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, StableLearningRates | None]:
    """Eigenvalues of the Hessian and the preconditioned Hessian, and the learning rates they allow."""
    product, size, dtype = hessian_product(p, batch)

    def eigenvalues(scales: list[jax.Array] | None, what: str) -> tuple[float, ...] | None:
        def counted(vector: np.ndarray) -> np.ndarray:
            advance(what)
            return product(vector, scales)

        found = largest_eigenvalues(counted, size, dtype, wanted, tolerance, seed)
        return None if found is None else tuple(float(value) for value in found)

    tops = eigenvalues(None, "sharpness")
    if tops is None:
        return None, None, None
    of_optimizer, conditioned = None, None
    if optimizer is not None:
        spread = [jnp.zeros_like(g) for g in gradient] if variance is None else variance
        usual = [
            jnp.copysign(jnp.sqrt(jnp.square(g.astype(v.dtype)) + v), g.astype(v.dtype)).astype(g.dtype)
            for g, v in zip(gradient, spread, strict=True)
        ]
        divisors, factor = dynamics(optimizer, state, p, usual, loss, eps)
        if divisors is not None:
            conditioned = eigenvalues([jax.lax.rsqrt(d) for d in divisors], "preconditioned sharpness")
        relevant = tops if divisors is None else conditioned
        if factor is not None and relevant is not None:
            of_optimizer = stable_rate(relevant[0], factor)
    rates = StableLearningRates(stable_rate(tops[0], 2), stable_rate(tops[0], 2 * (1 + momentum)), of_optimizer)
    return tops, conditioned, rates


def _headroom(p: Problem, batch: PyTree, loss: jax.Array, gradient: list[jax.Array], dtype: Any) -> Headroom:
    limit = jnp.finfo(dtype)
    largest = max(float(jnp.max(jnp.abs(g))) for g in gradient)
    nonzero = sum(int(count_true(g != 0)) for g in gradient)
    wide = [g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in gradient]
    lost = sum(int(count_true((g != 0) & (g.astype(dtype) == 0))) for g in wide)
    small = sum(int(count_true((g != 0) & (jnp.abs(g) < float(limit.smallest_normal)))) for g in wide)
    top = float(np.log2(float(limit.max)))
    bits = top - float(np.log2(largest)) if largest > 0 else float("inf")
    size = abs(float(loss))
    usable = np.isfinite(bits)
    return Headroom(
        dtype=jnp.dtype(dtype).name,
        loss=_loss_in(p, batch, dtype),
        loss_bits=top - float(np.log2(size)) if size > 0 else float("inf"),
        gradient_bits=bits,
        underflow_share=lost / max(nonzero, 1),
        subnormal_share=small / max(nonzero, 1),
        loss_scale=2.0 ** min(int(np.floor(bits)) - 4, 64) if usable else 1.0,
    )


def _loss_in(p: Problem, batch: PyTree, dtype: Any) -> float | None:
    """The loss with every float cast to `dtype`; None if the model cannot be run in it."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    try:
        return float(jax.jit(lambda leaves, batch: p.loss(leaves, batch))(*jax.tree.map(cast, (p.leaves, batch))))
    except (TypeError, ValueError):  # strict type promotion, or a scan whose carry changes its dtype
        return None


def _findings(report: PreflightReport, has_optimizer: bool) -> tuple[str, ...]:
    """What deserves a look first, in words."""
    found: list[str] = []
    if not np.isfinite(report.loss) or not np.isfinite(report.gradient_norm):
        bad = [leaf.name for leaf in report.leaves if not np.isfinite(leaf.gradient_norm)]
        where = f"; first leaf: `{bad[0]}` ({len(bad)} of {len(report.leaves)})" if bad else ""
        found.append(
            f"The loss or its gradient is not finite{where}. Run `optax_guard.diagnose.diagnose` on this batch."
        )
    elif report.eigenvalues is None:
        found.append("No eigenvalue was found: a product with the Hessian was not finite, or Lanczos did not converge.")
    for each in report.growth:
        if abs(each.exponent) > np.log(1.25):
            kind = "activations grow" if each.name == "activations" else "gradient grows"
            kind = kind if each.exponent > 0 else kind.replace("grows", "shrinks").replace("grow", "shrink")
            unit = "time step" if each.name == "time" else "layer"
            way = "" if each.name == "activations" else " on its way back"
            found.append(f"The {kind} by x{np.exp(each.exponent):.3g} per {unit}{way} (`{each.name}`).")
    finding = logit_finding(report.logits)
    if finding is not None:
        found.append(finding)
    zero = [leaf.name for leaf in report.leaves if leaf.zero_share == 1]
    if zero:
        found.append(f"{len(zero)} leaves have no gradient at all, among them `{zero[0]}`.")
    for a in report.activations:
        if a.dead_share > 0.1:
            found.append(f"{a.dead_share:.0%} of the units of `{a.name}` say the same for every example.")
        if a.saturated_share is not None and a.saturated_share > 0.5:
            found.append(f"{a.saturated_share:.0%} of `{a.name}` is saturated.")
    for h in report.headroom:
        if h.loss is not None and not np.isfinite(h.loss) and np.isfinite(report.loss):
            found.append(f"The loss is not finite in {h.dtype}.")
        if h.gradient_bits < 0:
            found.append(f"The gradient overflows in {h.dtype}.")
        if h.underflow_share > 0.01:
            found.append(
                f"{h.underflow_share:.1%} of the gradient rounds to 0 in {h.dtype}: scale the loss by {h.loss_scale:g}."
            )
    rates = report.stable_learning_rates
    if has_optimizer and rates is not None and rates.optimizer is None:
        found.append("Nothing is known about the largest stable learning rate of this optimizer: sweep it.")
    return tuple(found)

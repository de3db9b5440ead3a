"""Noise at test time: classifiers smoothed with Gaussian noise, what they certify, and how noise hurts an ordinary one.

=========================================  =====================================================================
Function                                   Answers
=========================================  =====================================================================
`augment_with_noise(inputs, sigma, key=)`  how to train a network that stands the noise (inside the training step)
`smooth(apply_fn, sigma)`                  the classifier that answers what `apply_fn` says most often under noise
`predict(smoothed, params, inputs, key=)`  which class that is, or that the samples do not tell
`certify(smoothed, params, inputs, key=)`  how far an input may be moved before that class can change
`certified_accuracy`, its plot             the share of a test set that is right and stays right within a radius
`perturbed_accuracy(apply_fn, ...)`        accuracy under noise on the inputs and on the weights, without a promise
=========================================  =====================================================================

Everywhere `apply_fn(params, inputs)` returns logits [batch, classes] from parameters and inputs [batch, ...]: parameters
are an argument, so that one compiled function serves every checkpoint. What it closes over is baked in. In dropout or
batch norm it must be the network as at test time.

    linen     apply_fn, params = model.apply, variables
    nnx       graph, params = nnx.split(model);  apply_fn = lambda params, x: nnx.merge(graph, params)(x)
    Equinox   params, rest = eqx.partition(model, eqx.is_array)
              apply_fn = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)
    closure   apply_fn, params = (lambda _, x: classify(x)), ()

Nothing here goes into an optimizer's chain. Only `augment_with_noise` runs inside `jit`; the others call compiled
functions themselves and return NumPy arrays. Noise on weights or gradients certifies nothing about inputs.
"""

import contextlib
import functools
import inspect
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from optax_guard import _validate
from optax_guard._noise import perturb_weights
from optax_guard._prng import Words, normal, raw_key, salt, step_words, threefry
from optax_guard._statistics import accumulator_dtype
from optax_guard._tree import check_arrays, resolve_mask
from optax_guard._typing import Mask, PRNGKeyLike, PyTree

__all__ = [
    "ABSTAIN",
    "Certificate",
    "PerturbedAccuracy",
    "SmoothedClassifier",
    "augment_with_noise",
    "certified_accuracy",
    "certify",
    "class_counts",
    "clopper_pearson_lower",
    "perturbed_accuracy",
    "plot_certified_accuracy",
    "predict",
    "smooth",
]

ApplyFn: TypeAlias = Callable[[PyTree, jax.Array], jax.Array]

ABSTAIN = -1  # the prediction where the samples do not tell the class
_SALT = salt("smoothing")
# One stream of noise for each purpose: the samples that choose a class must be independent of those that certify it.
_SELECT, _CERTIFY, _PREDICT, _COUNT, _AUGMENT, _PERTURB = range(6)
_CHUNKS_PER_CALL = 16  # forward passes between two looks at the clock: dispatch is then 1 % of the work of a small net
_PATIENCE = 2.0  # seconds of work before a bar appears


class SmoothedClassifier(NamedTuple):
    """A classifier and the noise it is smoothed with, from `smooth`."""

    apply_fn: ApplyFn  # (params, inputs[batch, ...]) -> logits[batch, classes]
    sigma: float


class Certificate(NamedTuple):
    """What `certify` found for each input."""

    prediction: np.ndarray  # i32[batch]: the class, or ABSTAIN
    radius: np.ndarray  # f64[batch]: L2, in units of the input; 0 where abstaining


class PerturbedAccuracy(NamedTuple):
    """Accuracy without and with noise, from `perturbed_accuracy`; printed, it is a table."""

    clean: float
    input_noise: float
    weight_noise: float
    clamped_noise: float
    input_sigma: float
    weight_sigma: float
    max_norm: float

    def __str__(self) -> str:
        rows = (
            ("clean", self.clean, ""),
            ("input noise", self.input_noise, f"sigma {self.input_sigma:g}"),
            ("weight noise", self.weight_noise, f"sigma {self.weight_sigma:g} of each leaf's root mean square"),
            ("clamped noise", self.clamped_noise, f"sigma {self.input_sigma:g}, norm at most {self.max_norm:g}"),
        )
        return "\n".join(f"{name:13s}  {value:.4f}  {note}".rstrip() for name, value, note in rows)


def augment_with_noise(inputs: jax.Array, sigma: ArrayLike, *, key: PRNGKeyLike) -> jax.Array:
    """Add Gaussian noise to a batch of inputs, for training a network that is to be smoothed with the same `sigma`.

    x <- x + sigma z,   z_j ~ N(0, 1)

    Guarantees:
      - A function of (inputs, `sigma`, `key`) alone, for any sharding. The same key draws the same noise: pass a new
        one at every step, or the network learns that one draw.
      - Sampled and added in float32 or wider; the sum is rounded to the dtype of `inputs`.

    ==================================  =================
    Case                                Result
    ==================================  =================
    `sigma` = 0, or negative in `jit`   `inputs`
    NaN or Inf in `inputs`              stays in its place
    ==================================  =================

    Args:
      inputs: a floating-point array.
      sigma: standard deviation in units of the input, >= 0: a number or a 0-d array, traced or not.
      key: an int, a PRNG key or raw uint32 key data, traced or not.

    Returns:
      An array of the shape and dtype of `inputs`.

    Raises:
      ValueError: a `sigma` that is negative, NaN or not a scalar; a `key` that is none; inputs that are not floats.

    Example:
      >>> def loss_fn(params, inputs, labels, step):
      ...     noisy = augment_with_noise(inputs, 0.5, key=jax.random.fold_in(jax.random.key(0), step))
      ...     return jnp.mean((noisy @ params - labels) ** 2)
      >>> losses = [loss_fn(jnp.ones(3), jnp.ones((4, 3)), jnp.ones(4), step) for step in (0, 1)]
      >>> bool(losses[0] != losses[1])
      True

    References:
      Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", 2019, arXiv 1902.02918,
      section 3.3.
    """
    name = "augment_with_noise"
    inputs = _check_floats(name, inputs)
    _validate.scalar(name, "sigma", sigma, low=0)
    stream = step_words(raw_key(name, key), jnp.uint32(_AUGMENT), _SALT)
    noise, _ = normal(stream, inputs, accumulator_dtype(inputs.dtype))
    scaled = jnp.maximum(jnp.asarray(sigma).astype(noise.dtype), 0) * noise
    return (inputs.astype(noise.dtype) + scaled).astype(inputs.dtype)


def smooth(apply_fn: ApplyFn, sigma: float) -> SmoothedClassifier:
    """The classifier that answers the class which `apply_fn` gives most often under Gaussian noise on its input.

    g(x) = argmax_c P(f(x + sigma z) = c),   z_j ~ N(0, 1),   f(x) = argmax of the logits

    Nothing is computed here. `predict`, `certify` and `class_counts` evaluate g by sampling; a larger `sigma` certifies
    larger radii, and less accurately.

    Args:
      apply_fn: (params, inputs [batch, ...]) -> logits [batch, classes], of any floating dtype, hashable (functions
        and bound methods are). See the module for Flax and Equinox. Logits that hold a NaN vote for no class.
      sigma: standard deviation of the noise in units of the input, in (0, inf).

    Returns:
      The pair, for `predict`, `certify` and `class_counts`.

    Raises:
      ValueError: `sigma` outside its range; an `apply_fn` that does not take (params, inputs).

    Example:
      >>> smooth(lambda params, inputs: inputs @ params, 0.5).sigma
      0.5

    References:
      Cohen et al. 2019, arXiv 1902.02918, equation 1.
    """
    _check_apply_fn("smooth", apply_fn)
    return SmoothedClassifier(apply_fn, _number("smooth", "sigma", sigma, 0, math.inf))


def class_counts(
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: ArrayLike,
    *,
    n: int,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> np.ndarray:
    """How often each class was the answer in `n` noisy copies of each input.

    counts_c = sum_i [f(x + sigma z_i) = c],   i = 1 ... n

    Guarantees:
      - Sample i of input j is a function of (`key`, i, j) alone, whatever `n`, `batch_size` and the number of inputs. So
        counts do not depend on `batch_size`, up to ties that the rounding of the network itself decides.
      - Counted in integers. A row of logits with a NaN counts for no class, so that counts sum to at most `n`.
      - One forward pass has at most `batch_size` noisy inputs: that bounds the memory.

    Args:
      smoothed: from `smooth`.
      params: the first argument of its `apply_fn`.
      inputs: a floating-point array [batch, ...]. The noise is added in float32 or wider and the sum rounded to this
        dtype; that rounding is then part of the classifier that is smoothed.
      n: noisy copies of each input, 1 to 2^31 - 1.
      key: an int, a PRNG key or raw uint32 key data. Two batches with one key see the same noise: give each its own.
      batch_size: noisy inputs in one forward pass, >= 1.
      progress: show a bar on work of more than two seconds, if `rich` is there and a person is looking.

    Returns:
      NumPy int32 [batch, classes].

    Raises:
      ValueError: an argument outside its range; inputs that are not floats; logits that are not [batch, classes].

    Example:
      >>> smoothed = smooth(lambda params, inputs: inputs, 1.0)
      >>> class_counts(smoothed, (), jnp.array([[9.0, 0.0], [0.0, 0.0]]), n=100, key=0).sum(axis=1).tolist()
      [100, 100]
    """
    name = "class_counts"
    n, batch_size = _whole(name, "n", n), _whole(name, "batch_size", batch_size)
    inputs, data = _check_call(name, smoothed, inputs, key, progress)
    with _bar(name, len(inputs) * n, progress) as advance:
        return _counts(name, smoothed, params, inputs, data, _COUNT, n, batch_size, advance)


def predict(
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: ArrayLike,
    *,
    n: int = 1000,
    alpha: float = 0.001,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> np.ndarray:
    """The class that the smoothed classifier answers, or `ABSTAIN` where `n` samples do not tell.

    c1 >= c2 the two largest counts of n:   argmax if P(X >= c1 or X <= c2) <= alpha, X ~ Binomial(c1 + c2, 1/2)

    Guarantees:
      - For each input: an answer other than the smoothed classifier's own is given with probability at most `alpha`.
      - Those of `class_counts`.

    ================================  ============
    Case                              Result
    ================================  ============
    the two counts are equal          `ABSTAIN`
    only NaN logits                   `ABSTAIN`
    `n` too small for `alpha`         `ABSTAIN` (all n agreeing gives 2^(1 - n))
    ================================  ============

    Args:
      smoothed, params, inputs, key, batch_size, progress: as in `class_counts`.
      n: noisy copies of each input, 1 to 2^31 - 1.
      alpha: the probability of a wrong answer, in (0, 1).

    Returns:
      NumPy int32 [batch]: classes, or -1 where abstaining.

    Raises:
      ValueError: as in `class_counts`, and an `alpha` outside its range.

    Example:
      >>> smoothed = smooth(lambda params, inputs: inputs, 1.0)
      >>> predict(smoothed, (), jnp.array([[0.0, 1.0], [0.5, 0.5]]), key=0).tolist()
      [1, -1]

    References:
      Cohen et al. 2019, arXiv 1902.02918, figure 2 (PREDICT) and proposition 1. Deviation: NaN logits are no vote.
    """
    name = "predict"
    n, batch_size = _whole(name, "n", n), _whole(name, "batch_size", batch_size)
    alpha = _number(name, "alpha", alpha, 0, 1)
    special = _scipy_special(name)
    inputs, data = _check_call(name, smoothed, inputs, key, progress)
    with _bar(name, len(inputs) * n, progress) as advance:
        counts = _counts(name, smoothed, params, inputs, data, _PREDICT, n, batch_size, advance)
    runner_up, top = np.sort(counts, axis=1)[:, -2:].astype(np.float64).T
    # P(X >= c1) for X ~ Binomial(c1 + c2, 1/2); the two tails are equal. With no vote at all there is nothing to test.
    p_value = 2 * special.betainc(np.maximum(top, 1), runner_up + 1, 0.5)
    sure = (top > runner_up) & (p_value <= alpha)
    return np.where(sure, np.argmax(counts, axis=1), ABSTAIN).astype(np.int32)


def certify(
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: ArrayLike,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> Certificate:
    """A class for each input, and a radius within which the smoothed classifier provably answers nothing else.

    A = argmax of the counts of n0 samples,   k = count of A in n further samples
    p = Clopper-Pearson lower bound of k / n at level alpha
    p > 1/2:  (A, sigma Phi^-1(p));   else  (ABSTAIN, 0)

    Guarantees:
      - For each input, with probability at least 1 - `alpha` over the sampling: g(x + d) = prediction for every
        ||d||_2 < radius. Of many inputs, a share of `alpha` may be wrong.
      - That holds of g, which is evaluated by `predict`, not of `apply_fn`.
      - The samples that choose the class are independent of those that bound it. And those of `class_counts`.

    =============================  =======================================================================
    Case                           Result
    =============================  =======================================================================
    p at most 1/2                  (`ABSTAIN`, 0)
    NaN logits                     count against the class; only NaN: (`ABSTAIN`, 0)
    all n samples agree            sigma Phi^-1(alpha^(1/n)), the cap: with `alpha` = 0.001, 3.81 sigma for
                                   n = 100 000, 3.20 for 10 000, 2.46 for 1000, 1.50 for 100
    `n` below log2(1 / `alpha`)    always (`ABSTAIN`, 0)
    =============================  =======================================================================

    Args:
      smoothed, params, inputs, key, batch_size, progress: as in `class_counts`.
      n0: samples that choose the class, 1 to 2^31 - 1.
      n: samples that bound its probability, 1 to 2^31 - 1.
      alpha: the probability that a certificate is wrong, in (0, 1).

    Returns:
      `Certificate(prediction, radius)`, NumPy arrays [batch].

    Raises:
      ValueError: as in `class_counts`, and an `n0` or `alpha` outside its range.

    Example:
      >>> smoothed = smooth(lambda params, inputs: inputs, 1.0)
      >>> prediction, radius = certify(smoothed, (), jnp.array([[0.0, 2.0], [0.5, 0.5]]), n=10_000, key=0)
      >>> prediction.tolist(), bool(1.3 < radius[0] < 2 / 2**0.5), float(radius[1])  # the true margin is 2 / sqrt(2)
      ([1, -1], True, 0.0)

    References:
      Cohen et al. 2019, arXiv 1902.02918, figure 2 (CERTIFY), theorem 1 and proposition 2. Deviations: NaN logits are
      no vote; a class that got no vote is not certified. Both arithmetic and noise are floating-point here as in every
      implementation, which Voracek and Hein, "Sound randomized smoothing in floating-point arithmetics", 2022, arXiv
      2207.07209, show to be exploitable by functions made for it.
    """
    name = "certify"
    n0, n, batch_size = _whole(name, "n0", n0), _whole(name, "n", n), _whole(name, "batch_size", batch_size)
    alpha = _number(name, "alpha", alpha, 0, 1)
    special = _scipy_special(name)
    inputs, data = _check_call(name, smoothed, inputs, key, progress)
    with _bar(name, len(inputs) * (n0 + n), progress) as advance:
        votes = _counts(name, smoothed, params, inputs, data, _SELECT, n0, batch_size, advance)
        counts = _counts(name, smoothed, params, inputs, data, _CERTIFY, n, batch_size, advance)
    chosen = np.argmax(votes, axis=1)
    successes = np.take_along_axis(counts, chosen[:, None], axis=1)[:, 0]
    bound = clopper_pearson_lower(successes, n, alpha)
    sure = (bound > 0.5) & (np.max(votes, axis=1) > 0)
    radius = np.where(sure, smoothed.sigma * special.ndtri(np.where(sure, bound, 0.5)), 0.0)
    return Certificate(prediction=np.where(sure, chosen, ABSTAIN).astype(np.int32), radius=radius)


def clopper_pearson_lower(successes: ArrayLike, trials: int, alpha: float) -> np.ndarray:
    """The exact one-sided lower bound of a probability, from `successes` in `trials`.

    p with P(X >= k) = alpha for X ~ Binomial(n, p);   0 for k = 0,   alpha^(1/n) for k = n

    Guarantees:
      - Whatever the true probability is, the bound exceeds it with probability at most `alpha`.

    Args:
      successes: k, whole numbers from 0 to `trials`, of any shape.
      trials: n, >= 1.
      alpha: in (0, 1).

    Returns:
      NumPy float64 of the shape of `successes`.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> clopper_pearson_lower([0, 90, 100], 100, 0.001).round(4).tolist()
      [0.0, 0.7753, 0.9333]

    References:
      Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.
    """
    name = "clopper_pearson_lower"
    trials, alpha = _whole(name, "trials", trials), _number(name, "alpha", alpha, 0, 1)
    k = np.asarray(successes)
    if not (np.issubdtype(k.dtype, np.integer) and np.all((k >= 0) & (k <= trials))):
        raise ValueError(f"{name}: `successes` must be whole numbers in [0, {trials}]; got {successes!r}.")
    # The beta quantile is 0/0 at k = 0, and SciPy's returned NaN there.
    quantile = _scipy_special(name).betaincinv(np.maximum(k, 1), trials - np.maximum(k, 1) + 1.0, alpha)
    return np.where(k == 0, 0.0, np.where(k == trials, alpha ** (1 / trials), quantile))


def certified_accuracy(certificate: Certificate, labels: ArrayLike, radii: ArrayLike) -> np.ndarray:
    """The share of a test set that is classified rightly and certified at each radius.

    accuracy(r) = mean_i [prediction_i = label_i and radius_i >= r]

    Guarantees:
      - Does not rise with the radius. An abstention counts as an error at every radius, 0 included.

    Args:
      certificate: from `certify`.
      labels: integers [batch].
      radii: numbers >= 0, of any shape.

    Returns:
      NumPy float64 of the shape of `radii`.

    Raises:
      ValueError: labels that are not integers [batch], an empty batch, a radius that is negative or NaN.

    Example:
      >>> certificate = Certificate(np.array([3, 5, -1]), np.array([0.5, 1.0, 0.0]))
      >>> certified_accuracy(certificate, [3, 5, 1], [0.0, 0.6]).round(2).tolist()
      [0.67, 0.33]

    References:
      Cohen et al. 2019, arXiv 1902.02918, section 4 (their "approximate certified test set accuracy").
    """
    name = "certified_accuracy"
    prediction, radius = _check_certificate(name, certificate)
    labels = _check_labels(name, labels, len(prediction))
    radii = np.asarray(radii, np.float64)
    if not np.all(radii >= 0):
        raise ValueError(f"{name}: `radii` must be numbers >= 0; got {radii!r}.")
    reached = np.sort(np.where((prediction == labels) & (prediction != ABSTAIN), radius, -1.0))
    return (len(reached) - np.searchsorted(reached, radii, side="left")) / len(reached)


def plot_certified_accuracy(
    certificates: Certificate | Mapping[str, Certificate], labels: ArrayLike, *, axes: Any = None
) -> Any:
    """Draw certified accuracy against the radius, as a step for each certificate.

    Args:
      certificates: one from `certify`, or several by their name in the legend.
      labels: integers [batch], the same for all.
      axes: Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: as in `certified_accuracy`; no certificate.
      ImportError: Matplotlib is not installed.

    Example:
      >>> import matplotlib
      >>> matplotlib.use("Agg")
      >>> axes = plot_certified_accuracy(Certificate(np.array([3, 5]), np.array([0.5, 1.0])), [3, 5])
      >>> axes.get_xlabel()
      'L2 radius'
    """
    name = "plot_certified_accuracy"
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{name} needs Matplotlib: pip install matplotlib") from error
    several = {"": certificates} if isinstance(certificates, Certificate) else certificates
    if not isinstance(several, Mapping) or not several:
        raise ValueError(f"{name}: `certificates` must be a Certificate or a mapping to some; got {certificates!r}.")
    curves = {}
    for label, certificate in several.items():
        radii = np.unique(np.append(_check_certificate(name, certificate)[1], 0.0))
        curves[label] = radii, certified_accuracy(certificate, labels, radii)
    if axes is None:
        _, axes = pyplot.subplots(layout="constrained")
    for label, (radii, accuracy) in curves.items():
        # accuracy(r) holds up to and with its radius, and falls to 0 behind the last.
        axes.step(np.append(radii, radii[-1]), np.append(accuracy, 0.0), where="pre", label=label or None)
    axes.set(xlabel="L2 radius", ylabel="certified accuracy", xlim=(0, None), ylim=(0, 1))
    axes.grid(alpha=0.2)
    if "" not in several:
        axes.legend(frameon=False)
    return axes


def perturbed_accuracy(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    input_sigma: float = 0.1,
    weight_sigma: float = 0.05,
    max_norm: float = 1e-4,
    draws: int = 10,
    weight_mask: Mask | None = None,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> PerturbedAccuracy:
    """Accuracy of a classifier as it is, under noise on its inputs, on its weights, and under noise of a bounded norm.

    input noise:    f(x + n; w),   n_j ~ N(0, input_sigma^2)
    weight noise:   f(x; w + n),   n_j ~ N(0, (weight_sigma r)^2),   r the root mean square of the leaf
    clamped noise:  f(x + n min(1, max_norm / ||n||_2); w),   n as for input noise, the norm over each input

    Each accuracy is the mean over `draws`; a draw is one noise per input, or one set of weights for all inputs.

    Guarantees:
      - With `input_sigma` and `weight_sigma` of 0, all four are equal.
      - A function of the arguments alone; `batch_size` changes it by no more than the network's rounding.
      - A row of logits with a NaN is an error.

    Nothing here is a promise: noise finds few of the inputs that an adversary finds. A norm as small as the default 1e-4
    changes almost no answer of any network, so equality of "clean" and "clamped noise" says little.

    Args:
      apply_fn: as in `smooth`.
      params: its first argument.
      inputs: a floating-point array [batch, ...].
      labels: integers [batch].
      input_sigma: standard deviation in units of the input, >= 0.
      weight_sigma: standard deviation as a share of each leaf's root mean square, >= 0.
      max_norm: bound on the L2 norm of the clamped noise of each input, >= 0.
      draws: noises to average over, >= 1.
      weight_mask: which leaves of `params` get weight noise, as in `l1_penalty`; `"params/*"` leaves out linen's batch
        statistics. Default: all.
      key, batch_size, progress: as in `class_counts`.

    Returns:
      `PerturbedAccuracy(clean, input_noise, weight_noise, clamped_noise, ...)`: floats, and the sizes of the noise.

    Raises:
      ValueError: an argument outside its range; labels or inputs of a wrong shape or dtype; a mask that does not match.

    Example:
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(perturbed_accuracy(lambda w, x: x @ w, jnp.eye(2), inputs, [0, 1], input_sigma=5.0, draws=500, key=0))
      clean          1.0000
      input noise    0.5...  sigma 5
      weight noise   1.0000  sigma 0.05 of each leaf's root mean square
      clamped noise  1.0000  sigma 5, norm at most 0.0001

    See Also:
      `perturb_weights`, the same weight noise in training; `certify`, which gives a guarantee.
    """
    name = "perturbed_accuracy"
    _check_apply_fn(name, apply_fn)
    for argument, value in {"input_sigma": input_sigma, "weight_sigma": weight_sigma, "max_norm": max_norm}.items():
        _number(name, argument, value, 0, math.inf, closed_low=True)
    draws, batch_size = _whole(name, "draws", draws), _whole(name, "batch_size", batch_size)
    _validate.boolean(name, "progress", progress)
    inputs, data = _check_inputs(name, inputs), raw_key(name, key)
    labels = _check_labels(name, labels, len(inputs))
    check_arrays(name, params)
    chosen = None if weight_mask is None else tuple(jax.tree.leaves(resolve_mask(name, weight_mask, params)))
    rows = min(batch_size, len(inputs))
    _logit_count(name, apply_fn, params, inputs, rows)

    def accuracy(weights: PyTree, draw: int, sigma: float, bound: float, advance: Callable[[int], None]) -> float:
        right = 0
        for start in range(0, len(inputs), rows):
            place = np.minimum(np.arange(start, start + rows), len(inputs) - 1)
            counted = np.arange(start, start + rows) < len(inputs)
            part = jnp.asarray(inputs[place]), labels[place].astype(np.int32), counted
            right += int(_right(apply_fn, weights, *part, np.uint32(start), data, np.uint32(draw), sigma, bound))
            advance(1)
        return right / len(inputs)

    with _bar(name, -(-len(inputs) // rows) * (3 * draws + 1), progress) as advance:
        clean = accuracy(params, 0, 0.0, math.inf, advance)
        noisy = np.zeros((draws, 3))
        for draw in range(draws):
            weights = _perturbed(params, data, np.uint32(draw), weight_sigma, chosen)
            noisy[draw] = (
                accuracy(params, draw, input_sigma, math.inf, advance),
                accuracy(weights, draw, 0.0, math.inf, advance),
                accuracy(params, draw, input_sigma, max_norm, advance),
            )
    by_input, by_weight, clamped = (math.fsum(column) / draws for column in noisy.T)
    sizes = float(input_sigma), float(weight_sigma), float(max_norm)
    return PerturbedAccuracy(clean, by_input, by_weight, clamped, *sizes)


# The sampling, compiled once for each network, layout and number of classes.


def _counts(
    name: str,
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: Any,
    data: jax.Array,
    purpose: int,
    n: int,
    batch_size: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Counts [batch, classes]; a forward pass takes `samples` copies of `rows` inputs, at most `batch_size` in all."""
    chunks = -(-n // batch_size)
    samples = -(-n // chunks)
    rows = max(min(batch_size // samples, len(inputs)), 1)
    classes = _logit_count(name, smoothed.apply_fn, params, inputs, rows * samples)
    results = [np.zeros((0, classes), np.int32)]
    for start in range(0, len(inputs), rows):
        place = np.minimum(np.arange(start, start + rows), len(inputs) - 1)  # the last group is filled up
        part, counts = jnp.asarray(inputs[place]), jnp.zeros((rows, classes), jnp.int32)
        for chunk in range(0, chunks, _CHUNKS_PER_CALL):
            span = np.array([chunk, min(chunk + _CHUNKS_PER_CALL, chunks)], np.uint32)
            counts = _count(
                smoothed.apply_fn,
                params,
                part,
                counts,
                np.uint32(start),
                data,
                np.uint32(purpose),
                span,
                np.uint32(n),
                smoothed.sigma,
                samples=samples,
            )
            counts.block_until_ready()
            kept = min(rows, len(inputs) - start)
            advance(kept * (min(int(span[1]) * samples, n) - chunk * samples))
        results.append(np.asarray(counts)[: len(inputs) - start])
    return np.concatenate(results)


@functools.partial(jax.jit, static_argnames=("apply_fn", "samples"))
def _count(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: jax.Array,
    counts: jax.Array,
    first_input: jax.Array,
    data: jax.Array,
    purpose: jax.Array,
    span: jax.Array,
    n: jax.Array,
    sigma: jax.Array,
    *,
    samples: int,
) -> jax.Array:
    """Adds the votes of chunks span[0] to span[1] to the counts."""
    stream = step_words(data, purpose, _SALT)
    rows, classes = counts.shape
    places = first_input + jnp.arange(rows, dtype=jnp.uint32)

    def add_chunk(chunk: jax.Array, counts: jax.Array) -> jax.Array:
        copies = chunk * np.uint32(samples) + jnp.arange(samples, dtype=jnp.uint32)
        each = jax.vmap(lambda x, place: jax.vmap(lambda copy: _noise(stream, x, place, copy))(copies))
        noisy = _shift(inputs[:, None], each(inputs, places) * sigma.astype(accumulator_dtype(inputs.dtype)))
        answers = _answers(apply_fn(params, noisy.reshape(rows * samples, *inputs.shape[1:])))
        answers = jnp.where((copies < n)[None], answers.reshape(rows, samples), ABSTAIN)
        return counts + jnp.sum(jax.nn.one_hot(answers, classes, dtype=jnp.int32), axis=1, dtype=jnp.int32)

    return lax.fori_loop(span[0], span[1], add_chunk, counts)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _right(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: jax.Array,
    labels: jax.Array,
    counted: jax.Array,
    first_input: jax.Array,
    data: jax.Array,
    draw: jax.Array,
    sigma: jax.Array,
    bound: jax.Array,
) -> jax.Array:
    """How many of the counted inputs are classified rightly under noise whose norm is at most `bound`."""
    stream = step_words(data, jnp.uint32(_PERTURB), _SALT)
    places = first_input + jnp.arange(len(inputs), dtype=jnp.uint32)

    def noise(x: jax.Array, place: jax.Array) -> jax.Array:
        drawn = _noise(stream, x, place, draw)
        drawn = drawn * sigma.astype(drawn.dtype)
        norm = jnp.sqrt(jnp.sum(drawn * drawn))
        limit = bound.astype(norm.dtype)
        return drawn * jnp.where(norm <= limit, 1, limit / jnp.where(norm <= limit, 1, norm))

    answers = _answers(apply_fn(params, _shift(inputs, jax.vmap(noise)(inputs, places))))
    return jnp.sum((answers == labels) & counted, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="chosen")
def _perturbed(
    params: PyTree, data: jax.Array, draw: jax.Array, sigma: jax.Array, chosen: tuple[bool, ...] | None
) -> PyTree:
    """The weights of a draw."""
    mask = None if chosen is None else jax.tree.unflatten(jax.tree.structure(params), chosen)
    key = jnp.stack(step_words(data, draw, salt("smoothing", "weights")))
    return perturb_weights(lambda weights: weights, sigma, relative_to="weights", mask=mask)(params, noise_key=key)


def _noise(stream: Words, x: jax.Array, place: jax.Array, copy: jax.Array) -> jax.Array:
    """Standard normals for one copy of one input."""
    return normal(threefry(stream, Words(place, copy)), x, accumulator_dtype(x.dtype))[0]


def _shift(inputs: jax.Array, noise: jax.Array) -> jax.Array:
    wide = jnp.broadcast_to(inputs.astype(noise.dtype), noise.shape)
    return (wide + noise).astype(inputs.dtype)


def _answers(logits: jax.Array) -> jax.Array:
    """The class of each row; none where a logit is NaN, which argmax would take for the largest."""
    lost = jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.where(lost, ABSTAIN, jnp.argmax(logits, axis=-1).astype(jnp.int32))


# What people pass in.


def _check_apply_fn(name: str, apply_fn: Any) -> None:
    expected = "a hashable function (params, inputs) -> logits"
    if not callable(apply_fn):
        raise ValueError(f"{name}: `apply_fn` must be {expected}; got {apply_fn!r}.")
    try:
        hash(apply_fn)
    except TypeError:
        hint = "Wrap it in a function that takes its arrays as `params`, as the module's docstring shows."
        raise ValueError(f"{name}: `apply_fn` must be {expected}; got {type(apply_fn).__name__}. {hint}") from None
    try:
        signature = inspect.signature(apply_fn)
    except (ValueError, TypeError):  # a builtin: nothing to look at
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        hint = "For a function of the inputs alone pass `lambda _, inputs: f(inputs)` and `params` = ()."
        raise ValueError(f"{name}: `apply_fn` must be {expected}; got {apply_fn!r}: {error}. {hint}") from None


def _check_call(name: str, smoothed: Any, inputs: ArrayLike, key: PRNGKeyLike, progress: Any) -> tuple[Any, jax.Array]:
    if not isinstance(smoothed, SmoothedClassifier):
        raise ValueError(f"{name}: `smoothed` must come from `smooth(apply_fn, sigma)`; got {smoothed!r}.")
    _validate.boolean(name, "progress", progress)
    return _check_inputs(name, inputs), raw_key(name, key)


def _check_inputs(name: str, inputs: ArrayLike) -> Any:
    """The inputs as an array with a batch axis, on the host or a device as they came."""
    if isinstance(inputs, jax.core.Tracer):
        raise ValueError(f"{name}: `inputs` is traced. Call {name} outside `jit`: it compiles what it runs by itself.")
    array = _check_floats(name, inputs if hasattr(inputs, "dtype") else np.asarray(inputs))
    if array.ndim == 0:
        raise ValueError(f"{name}: `inputs` must be an array [batch, ...]; got a scalar.")
    return array


def _check_floats(name: str, inputs: Any) -> Any:
    dtype = getattr(inputs, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = repr(inputs) if dtype is None else f"{dtype}{list(inputs.shape)}"
        raise ValueError(f"{name}: `inputs` must be a floating-point array, scaled as in training; got {shown}.")
    return inputs


def _check_labels(name: str, labels: ArrayLike, batch: int) -> np.ndarray:
    array = np.asarray(labels)
    if batch == 0:
        raise ValueError(f"{name}: of no inputs there is no accuracy.")
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer):
        shown = f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"{name}: `labels` must be integers [{batch}], one for each input; got {shown}.")
    return array


def _check_certificate(name: str, certificate: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(certificate, Certificate):
        raise ValueError(f"{name}: a certificate must come from `certify`; got {certificate!r}.")
    prediction, radius = np.asarray(certificate.prediction), np.asarray(certificate.radius)
    if prediction.ndim != 1 or prediction.shape != radius.shape:
        shapes = f"{list(prediction.shape)} and {list(radius.shape)}"
        raise ValueError(f"{name}: a certificate must hold two arrays [batch]; got {shapes}.")
    return prediction, radius


def _logit_count(name: str, apply_fn: ApplyFn, params: PyTree, inputs: Any, batch: int) -> int:
    dtype = jax.dtypes.canonicalize_dtype(inputs.dtype)
    logits = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), dtype))
    shape, kind = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape is None or kind is None or len(shape) != 2 or shape[0] != batch or shape[1] < 2:
        shown = f"{kind}{list(shape)}" if shape is not None else repr(logits)
        raise ValueError(f"{name}: `apply_fn` must return logits [{batch}, classes >= 2]; it returned {shown}.")
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"{name}: `apply_fn` must return logits of a floating dtype; it returned {kind}.")
    return shape[1]


def _number(name: str, argument: str, value: Any, low: float, high: float, *, closed_low: bool = False) -> float:
    """A Python float strictly between `low` (or from it on) and `high`; nothing here runs in `jit`, so values count."""
    scalar = isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0 and not isinstance(value, jax.core.Tracer)
    number = value.item() if scalar else value
    valid = isinstance(number, numbers.Real) and not isinstance(number, (bool, np.bool_))
    if not (valid and (low < number < high or (closed_low and number == low))):
        raise ValueError(
            f"{name}: `{argument}` must be a number in {'[' if closed_low else '('}{low:g}, {high:g}); got {value!r}."
        )
    return float(number)


def _whole(name: str, argument: str, value: Any) -> int:
    number = _validate.integer(name, argument, value, low=1)
    if number >= 2**31:
        raise ValueError(f"{name}: `{argument}` must be a whole number below 2^31; got {value!r}.")
    return number


def _scipy_special(name: str) -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise ImportError(f"{name} needs SciPy: pip install scipy") from error
    return special


@contextlib.contextmanager
def _bar(name: str, total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how much more is done; a bar appears on work that lasts."""
    bar = _rich_bar() if progress else None
    if bar is None:
        yield lambda more: None
        return
    task, begin = bar.add_task(name, total=total), time.monotonic()

    def advance(more: int) -> None:
        bar.update(task, advance=more)
        if not bar.live.is_started and time.monotonic() - begin > _PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _rich_bar() -> Any:
    """A bar on stderr, or None without `rich` or without a person who looks."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    console = Console(stderr=True)
    return Progress(console=console, transient=True) if console.is_interactive or console.is_jupyter else None

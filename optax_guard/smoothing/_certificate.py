"""Certificates (how far an input can move before a smoothed classifier may change its answer) and their accuracy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from optax_guard._common.typing import PRNGKeyLike, PyTree
from optax_guard.smoothing import _arguments, _sampling
from optax_guard.smoothing._arguments import ABSTAIN, SmoothedClassifier

__all__ = ["Certificate", "certified_accuracy", "certify", "clopper_pearson_lower", "plot_certified_accuracy"]


class Certificate(NamedTuple):
    """The result of `certify` for each input."""

    prediction: np.ndarray  # i32[batch]: the class, or ABSTAIN
    radius: np.ndarray  # f64[batch]: L2 radius in units of the input; 0 for an abstention


def certify(
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: jax.Array | np.ndarray,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> Certificate:
    """Returns a class for each input and a radius within which the smoothed classifier provably returns that class.

    A = argmax of the counts of n0 samples,   k = count of A in n further samples
    p = Clopper-Pearson lower bound of k / n at level alpha
    p > 1/2:  (A, sigma Phi^-1(p));   else  (ABSTAIN, 0)

    Guarantees:
      - For each input, with probability at least 1 - `alpha` over the sampling, g(x + d) = prediction for every
        ||d||_2 < radius. Among many inputs, a fraction `alpha` of the certificates may be wrong.
      - The certificate applies to g, which `predict` evaluates, and not to `apply_fn`.
      - The samples that choose the class are independent of those that bound its probability.
      - The guarantees of `class_counts` hold.

    =============================  =======================================================================
    Case                           Result
    =============================  =======================================================================
    p at most 1/2                  (`ABSTAIN`, 0)
    NaN logits                     count against the class; if all are NaN, (`ABSTAIN`, 0)
    all n samples agree            the maximum, sigma Phi^-1(alpha^(1/n)): with `alpha` = 0.001, 3.81 sigma for
                                   n = 100 000, 3.20 for 10 000, 2.46 for 1000, 1.50 for 100
    `n` below log2(1 / `alpha`)    always (`ABSTAIN`, 0)
    =============================  =======================================================================

    Args:
      smoothed: as in `class_counts`.
      params: as in `class_counts`.
      inputs: as in `class_counts`.
      n0: the number of samples that choose the class, 1 to 2^31 - 1.
      n: the number of samples that bound its probability, 1 to 2^31 - 1.
      alpha: the probability that a certificate is wrong, in (0, 1).
      key: as in `class_counts`.
      batch_size: as in `class_counts`.
      progress: as in `class_counts`.

    Returns:
      `Certificate(prediction, radius)`, NumPy arrays [batch].

    Raises:
      ValueError: as in `class_counts`, or `n0` or `alpha` is outside its range.

    Example:
      >>> from optax_guard.smoothing import smooth
      >>> smoothed = smooth(lambda params, inputs: inputs, 1.0)
      >>> prediction, radius = certify(smoothed, (), np.array([[0.0, 2.0], [0.5, 0.5]]), n=10_000, key=0)
      >>> prediction.tolist(), bool(1.3 < radius[0] < 2 / 2**0.5), float(radius[1])  # the true margin is 2 / sqrt(2)
      ([1, -1], True, 0.0)

    References:
      Cohen et al. 2019, arXiv 1902.02918, figure 2 (CERTIFY), theorem 1 and proposition 2. Deviations: NaN logits do
      not vote, and a class without a vote is not certified. As in every implementation, arithmetic and noise are
      floating-point, which functions built for the purpose can exploit: Voracek and Hein, "Sound randomized smoothing
      in floating-point arithmetics", 2022, arXiv 2207.07209.
    """
    name = "certify"
    n0, n, batch_size = (
        _arguments.whole(name, "n0", n0),
        _arguments.whole(name, "n", n),
        _arguments.whole(name, "batch_size", batch_size),
    )
    alpha = _arguments.number(name, "alpha", alpha, 0, 1)
    special = _arguments.scipy_special(name)
    inputs, data = _arguments.check_call(name, smoothed, inputs, key, progress)
    with _arguments.bar(name, len(inputs) * (n0 + n), progress) as advance:
        votes = _sampling.counts(name, smoothed, params, inputs, data, _sampling.SELECT, n0, batch_size, advance)
        counts = _sampling.counts(name, smoothed, params, inputs, data, _sampling.CERTIFY, n, batch_size, advance)
    chosen = np.argmax(votes, axis=1)
    successes = np.take_along_axis(counts, chosen[:, None], axis=1)[:, 0]
    bound = clopper_pearson_lower(successes, n, alpha)
    sure = (bound > 0.5) & (np.max(votes, axis=1) > 0)
    radius = np.where(sure, smoothed.sigma * special.ndtri(np.where(sure, bound, 0.5)), 0.0)
    return Certificate(prediction=np.where(sure, chosen, ABSTAIN).astype(np.int32), radius=radius)


def clopper_pearson_lower(successes: ArrayLike, trials: int, alpha: float) -> np.ndarray:
    """The exact one-sided lower confidence bound on a probability, given `successes` out of `trials`.

    p with P(X >= k) = alpha for X ~ Binomial(n, p);   0 for k = 0,   alpha^(1/n) for k = n

    Guarantees:
      - Whatever the true probability, the bound exceeds it with probability at most `alpha`.

    Args:
      successes: k, an array of whole numbers from 0 to `trials`, of any shape.
      trials: n, >= 1.
      alpha: in (0, 1).

    Returns:
      NumPy float64 of the shape of `successes`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> clopper_pearson_lower([0, 90, 100], 100, 0.001).round(4).tolist()
      [0.0, 0.7753, 0.9333]

    References:
      Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.
    """
    name = "clopper_pearson_lower"
    trials, alpha = _arguments.whole(name, "trials", trials), _arguments.number(name, "alpha", alpha, 0, 1)
    k = np.asarray(successes)
    if not (np.issubdtype(k.dtype, np.integer) and np.all((k >= 0) & (k <= trials))):
        raise ValueError(f"{name}: `successes` must be whole numbers in [0, {trials}]; got {successes!r}.")
    # The beta quantile is 0/0 at k = 0, where SciPy returns NaN.
    quantile = _arguments.scipy_special(name).betaincinv(np.maximum(k, 1), trials - np.maximum(k, 1) + 1.0, alpha)
    return np.where(k == 0, 0.0, np.where(k == trials, alpha ** (1 / trials), quantile))


def certified_accuracy(certificate: Certificate, labels: ArrayLike, radii: ArrayLike) -> np.ndarray:
    """The fraction of a test set that is classified correctly and certified at each radius.

    accuracy(r) = mean_i [prediction_i = label_i and radius_i >= r]

    Guarantees:
      - Accuracy does not increase with the radius. An abstention counts as an error at every radius, including 0.

    Args:
      certificate: from `certify`.
      labels: integers [batch].
      radii: numbers >= 0, of any shape.

    Returns:
      NumPy float64 of the shape of `radii`.

    Raises:
      ValueError: the labels are not integers [batch], the batch is empty, or a radius is negative or NaN.

    Example:
      >>> certificate = Certificate(np.array([3, 5, -1]), np.array([0.5, 1.0, 0.0]))
      >>> certified_accuracy(certificate, [3, 5, 1], [0.0, 0.6]).round(2).tolist()
      [0.67, 0.33]

    References:
      Cohen et al. 2019, arXiv 1902.02918, section 4 (their "approximate certified test set accuracy").
    """
    name = "certified_accuracy"
    prediction, radius = _check_certificate(name, certificate)
    labels = _arguments.check_labels(name, labels, len(prediction))
    radii = np.asarray(radii, np.float64)
    if not np.all(radii >= 0):
        raise ValueError(f"{name}: `radii` must be numbers >= 0; got {radii!r}.")
    reached = np.sort(np.where((prediction == labels) & (prediction != ABSTAIN), radius, -1.0))
    return (len(reached) - np.searchsorted(reached, radii, side="left")) / len(reached)


def plot_certified_accuracy(
    certificates: Certificate | Mapping[str, Certificate], labels: ArrayLike, *, axes: Any = None
) -> Any:
    """Draw certified accuracy against the radius, with a step curve for each certificate.

    Args:
      certificates: one from `certify`, or a mapping from names for the legend to several.
      labels: integers [batch], the same for all certificates.
      axes: the Matplotlib axes to draw on; new ones by default.

    Returns:
      The axes.

    Raises:
      ValueError: as in `certified_accuracy`, or there is no certificate.
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
        # accuracy(r) holds up to and including its radius, and falls to 0 beyond the last one.
        axes.step(np.append(radii, radii[-1]), np.append(accuracy, 0.0), where="pre", label=label or None)
    axes.set(xlabel="L2 radius", ylabel="certified accuracy", xlim=(0, None), ylim=(0, 1))
    axes.grid(alpha=0.2)
    if "" not in several:
        axes.legend(frameon=False)
    return axes


def _check_certificate(name: str, certificate: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(certificate, Certificate):
        raise ValueError(f"{name}: a certificate must come from `certify`; got {certificate!r}.")
    prediction, radius = np.asarray(certificate.prediction), np.asarray(certificate.radius)
    if prediction.ndim != 1 or prediction.shape != radius.shape:
        shapes = f"{list(prediction.shape)} and {list(radius.shape)}"
        raise ValueError(f"{name}: a certificate must hold two arrays [batch]; got {shapes}.")
    return prediction, radius

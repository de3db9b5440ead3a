"""The smoothed classifier: training for it, its prediction, and the votes behind its predictions and certificates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_guard._common import validate
from optax_guard._common.numerics import accumulator_dtype
from optax_guard._common.prng import normal, raw_key, step_words
from optax_guard._common.typing import PRNGKeyLike, PyTree
from optax_guard.smoothing import _arguments, _sampling
from optax_guard.smoothing._arguments import ABSTAIN, ApplyFn, SmoothedClassifier

__all__ = ["augment_with_noise", "class_counts", "predict", "smooth"]


def augment_with_noise(inputs: jax.Array, sigma: ArrayLike, *, key: PRNGKeyLike) -> jax.Array:
    """Add Gaussian noise to a batch of inputs, to train a network that will be smoothed with the same `sigma`.

    x <- x + sigma z,   z_j ~ N(0, 1)

    Guarantees:
      - The result is a function of (`inputs`, `sigma`, `key`) alone, under any sharding. The same key draws the same
        noise: pass a new key at every step, or the network learns that one draw.
      - Noise is sampled and added in float32 or wider; the sum is rounded to the dtype of `inputs`.

    ==================================  =================
    Case                                Result
    ==================================  =================
    `sigma` = 0, or negative in `jit`   `inputs`
    NaN or Inf in `inputs`              stays in its place
    ==================================  =================

    Args:
      inputs: a floating-point array.
      sigma: the standard deviation in units of the input, >= 0: a number or a 0-d array, traced or not.
      key: an int, a PRNG key or raw uint32 key data, traced or not.

    Returns:
      An array with the shape and dtype of `inputs`.

    Raises:
      ValueError: `sigma` is negative, NaN or not a scalar, `key` is not a key, or `inputs` are not floating-point.

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
    inputs = _arguments.check_floats(name, inputs)
    sigma = validate.scalar(name, "sigma", sigma, low=0)
    stream = step_words(raw_key(name, key), jnp.uint32(_sampling.AUGMENT), _sampling.SALT)
    noise, _ = normal(stream, inputs, accumulator_dtype(inputs.dtype))
    scaled = jnp.maximum(jnp.asarray(sigma).astype(noise.dtype), 0) * noise
    return (inputs.astype(noise.dtype) + scaled).astype(inputs.dtype)


def smooth(apply_fn: ApplyFn, sigma: float) -> SmoothedClassifier:
    """Makes the classifier that returns the class `apply_fn` gives most often under Gaussian noise on its input.

    g(x) = argmax_c P(f(x + sigma z) = c),   z_j ~ N(0, 1),   f(x) = argmax of the logits

    This call computes nothing: `predict`, `certify` and `class_counts` evaluate g by sampling. A larger `sigma`
    certifies larger radii, but makes the classifier less accurate.

    Args:
      apply_fn: a hashable function (params, inputs [batch, ...]) -> logits [batch, classes], of any floating dtype;
        functions and bound methods are hashable. The module's docstring shows it for Flax and Equinox. A row of logits
        that holds a NaN votes for no class.
      sigma: the standard deviation of the noise in units of the input, in (0, inf).

    Returns:
      The pair, for `predict`, `certify` and `class_counts`.

    Raises:
      ValueError: `sigma` is outside its range, or `apply_fn` does not take (params, inputs).

    Example:
      >>> smooth(lambda params, inputs: inputs @ params, 0.5).sigma
      0.5

    References:
      Cohen et al. 2019, arXiv 1902.02918, equation 1.
    """
    _arguments.check_apply_fn("smooth", apply_fn)
    return SmoothedClassifier(apply_fn, _arguments.number("smooth", "sigma", sigma, 0, math.inf))


def class_counts(
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: jax.Array | np.ndarray,
    *,
    n: int,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> np.ndarray:
    """Counts how often each class was the answer among `n` noisy copies of each input.

    counts_c = sum_i [f(x + sigma z_i) = c],   i = 1 ... n

    Guarantees:
      - Sample i of input j is a function of (`key`, i, j) alone, whatever `n`, `batch_size` and the number of inputs.
        Counts therefore do not depend on `batch_size`, except for ties that the network's own rounding decides.
      - Votes are counted in integers. A row of logits that holds a NaN counts for no class, so the counts sum to at
        most `n`.
      - A forward pass has at most `batch_size` noisy inputs, which bounds the memory.

    Args:
      smoothed: from `smooth`.
      params: the first argument of its `apply_fn`.
      inputs: a floating-point array [batch, ...]. The noise is added in float32 or wider and the sum is rounded to this
        dtype, so that rounding is part of the smoothed classifier.
      n: the number of noisy copies of each input, 1 to 2^31 - 1.
      key: an int, a PRNG key or raw uint32 key data. Two batches with the same key see the same noise: give each batch
        its own key.
      batch_size: the number of noisy inputs in one forward pass, >= 1.
      progress: whether to show a progress bar if the work takes more than two seconds, `rich` is installed and stderr
        is a terminal.

    Returns:
      NumPy int32 [batch, classes].

    Raises:
      ValueError: an argument is outside its range, the inputs are not floating-point, or the logits do not have the
        shape [batch, classes].

    Example:
      >>> smoothed = smooth(lambda params, inputs: inputs, 1.0)
      >>> class_counts(smoothed, (), jnp.array([[9.0, 0.0], [0.0, 0.0]]), n=100, key=0).sum(axis=1).tolist()
      [100, 100]
    """
    name = "class_counts"
    n, batch_size = _arguments.whole(name, "n", n), _arguments.whole(name, "batch_size", batch_size)
    inputs, data = _arguments.check_call(name, smoothed, inputs, key, progress)
    with _arguments.bar(name, len(inputs) * n, progress) as advance:
        return _sampling.counts(name, smoothed, params, inputs, data, _sampling.COUNT, n, batch_size, advance)


def predict(
    smoothed: SmoothedClassifier,
    params: PyTree,
    inputs: jax.Array | np.ndarray,
    *,
    n: int = 1000,
    alpha: float = 0.001,
    key: PRNGKeyLike,
    batch_size: int = 1000,
    progress: bool = True,
) -> np.ndarray:
    """Returns the class of the smoothed classifier, or `ABSTAIN` if `n` samples do not decide it.

    c1 >= c2, the two largest of n counts:  argmax if P(X >= c1 or X <= c2) <= alpha, X ~ Binomial(c1 + c2, 1/2)

    Guarantees:
      - For each input, the probability of returning a class other than the smoothed classifier's own is at most
        `alpha`.
      - The guarantees of `class_counts` hold.

    ================================  ============
    Case                              Result
    ================================  ============
    the two counts are equal          `ABSTAIN`
    only NaN logits                   `ABSTAIN`
    `n` too small for `alpha`         `ABSTAIN` (n equal answers reach 2^(1 - n))
    ================================  ============

    Args:
      smoothed: as in `class_counts`.
      params: as in `class_counts`.
      inputs: as in `class_counts`.
      n: the number of noisy copies of each input, 1 to 2^31 - 1.
      alpha: the probability of a wrong answer, in (0, 1).
      key: as in `class_counts`.
      batch_size: as in `class_counts`.
      progress: as in `class_counts`.

    Returns:
      NumPy int32 [batch]: classes, or -1 for an abstention.

    Raises:
      ValueError: as in `class_counts`, or `alpha` is outside its range.

    Example:
      >>> smoothed = smooth(lambda params, inputs: inputs, 1.0)
      >>> predict(smoothed, (), jnp.array([[0.0, 1.0], [0.5, 0.5]]), key=0).tolist()
      [1, -1]

    References:
      Cohen et al. 2019, arXiv 1902.02918, figure 2 (PREDICT) and proposition 1. Deviation: NaN logits do not vote.
    """
    name = "predict"
    n, batch_size = _arguments.whole(name, "n", n), _arguments.whole(name, "batch_size", batch_size)
    alpha = _arguments.number(name, "alpha", alpha, 0, 1)
    special = _arguments.scipy_special(name)
    inputs, data = _arguments.check_call(name, smoothed, inputs, key, progress)
    with _arguments.bar(name, len(inputs) * n, progress) as advance:
        counts = _sampling.counts(name, smoothed, params, inputs, data, _sampling.PREDICT, n, batch_size, advance)
    runner_up, top = np.sort(counts, axis=1)[:, -2:].astype(np.float64).T
    # P(X >= c1) for X ~ Binomial(c1 + c2, 1/2); the two tails are equal. Without any vote there is nothing to test.
    p_value = 2 * special.betainc(np.maximum(top, 1), runner_up + 1, 0.5)
    sure = (top > runner_up) & (p_value <= alpha)
    return np.where(sure, np.argmax(counts, axis=1), ABSTAIN).astype(np.int32)

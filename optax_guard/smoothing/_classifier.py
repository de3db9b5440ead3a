"""The smoothed classifier: training for it, its answer, and the votes that both it and its certificate come from."""

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
    inputs = _arguments.check_floats(name, inputs)
    sigma = validate.scalar(name, "sigma", sigma, low=0)
    stream = step_words(raw_key(name, key), jnp.uint32(_sampling.AUGMENT), _sampling.SALT)
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
    """How often each class was the answer in `n` noisy copies of each input.

    counts_c = sum_i [f(x + sigma z_i) = c],   i = 1 ... n

    Guarantees:
      - Sample i of input j is a function of (`key`, i, j) alone, whatever `n`, `batch_size` and the number of inputs.
        So counts do not depend on `batch_size`, up to ties that the rounding of the network itself decides.
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
      smoothed: as in `class_counts`.
      params: as in `class_counts`.
      inputs: as in `class_counts`.
      n: noisy copies of each input, 1 to 2^31 - 1.
      alpha: the probability of a wrong answer, in (0, 1).
      key: as in `class_counts`.
      batch_size: as in `class_counts`.
      progress: as in `class_counts`.

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
    n, batch_size = _arguments.whole(name, "n", n), _arguments.whole(name, "batch_size", batch_size)
    alpha = _arguments.number(name, "alpha", alpha, 0, 1)
    special = _arguments.scipy_special(name)
    inputs, data = _arguments.check_call(name, smoothed, inputs, key, progress)
    with _arguments.bar(name, len(inputs) * n, progress) as advance:
        counts = _sampling.counts(name, smoothed, params, inputs, data, _sampling.PREDICT, n, batch_size, advance)
    runner_up, top = np.sort(counts, axis=1)[:, -2:].astype(np.float64).T
    # P(X >= c1) for X ~ Binomial(c1 + c2, 1/2); the two tails are equal. With no vote at all there is nothing to test.
    p_value = 2 * special.betainc(np.maximum(top, 1), runner_up + 1, 0.5)
    sure = (top > runner_up) & (p_value <= alpha)
    return np.where(sure, np.argmax(counts, axis=1), ABSTAIN).astype(np.int32)

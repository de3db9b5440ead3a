"""The accuracy of a classifier under noise on its inputs and on its weights."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_guard._common import validate
from optax_guard._common.prng import raw_key, salt, step_words
from optax_guard._common.tree import as_arrays, resolve_mask
from optax_guard._common.typing import Mask, PRNGKeyLike, PyTree
from optax_guard.smoothing import _arguments, _sampling
from optax_guard.smoothing._arguments import ApplyFn
from optax_guard.transforms._noise import perturb_weights

__all__ = ["PerturbedAccuracy", "perturbed_accuracy"]


class PerturbedAccuracy(NamedTuple):
    """Accuracy without and with noise, from `perturbed_accuracy`; it prints as a table."""

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


def perturbed_accuracy(
    apply_fn: ApplyFn,
    params: PyTree,
    inputs: jax.Array | np.ndarray,
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
    """Measures accuracy without noise, with noise on the inputs, with noise on the weights and with norm-bounded noise.

    input noise:    f(x + n; w),   n_j ~ N(0, input_sigma^2)
    weight noise:   f(x; w + n),   n_j ~ N(0, (weight_sigma r)^2),   r the root mean square of the leaf
    clamped noise:  f(x + n min(1, max_norm / ||n||_2); w),   n as for input noise, the norm over each input

    Each accuracy is the mean over `draws`. A draw is one noise sample for each input, or one set of weights for all
    inputs.

    Guarantees:
      - With `input_sigma` = `weight_sigma` = 0, all four accuracies are equal.
      - The result is a function of the arguments alone; `batch_size` changes it by no more than the network's rounding.
      - A row of logits that holds a NaN counts as an error.

    None of these figures is a guarantee: noise finds few of the inputs that an adversary would find. A norm as small as
    the default of 1e-4 changes hardly any answer of any network, so equal values for "clean" and "clamped noise" say
    little.

    Args:
      apply_fn: as in `smooth`.
      params: the first argument of `apply_fn`.
      inputs: a floating-point array [batch, ...].
      labels: integers [batch].
      input_sigma: the standard deviation in units of the input, >= 0.
      weight_sigma: the standard deviation as a fraction of each leaf's root mean square, >= 0.
      max_norm: a bound on the L2 norm of the clamped noise of each input, >= 0.
      draws: the number of noise draws to average over, >= 1.
      weight_mask: which leaves of `params` get weight noise, as in `l1_penalty`; `"params/*"` leaves out the batch
        statistics of Flax linen. Default: all.
      key: as in `class_counts`.
      batch_size: as in `class_counts`.
      progress: as in `class_counts`.

    Returns:
      `PerturbedAccuracy(clean, input_noise, weight_noise, clamped_noise, ...)`: four floats, and the sizes of the
      noise.

    Raises:
      ValueError: an argument is outside its range, labels or inputs have the wrong shape or dtype, or the mask does not
        match.

    Example:
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(perturbed_accuracy(lambda w, x: x @ w, jnp.eye(2), inputs, [0, 1], input_sigma=5.0, draws=500, key=0))
      clean          1.0000
      input noise    0.5...  sigma 5
      weight noise   1.0000  sigma 0.05 of each leaf's root mean square
      clamped noise  1.0000  sigma 5, norm at most 0.0001

    See Also:
      `perturb_weights`, which applies the same weight noise in training; `certify`, which gives a guarantee.
    """
    name = "perturbed_accuracy"
    _arguments.check_apply_fn(name, apply_fn)
    given = {"input_sigma": input_sigma, "weight_sigma": weight_sigma, "max_norm": max_norm}
    sizes = [_arguments.number(name, size, value, 0, math.inf, closed_low=True) for size, value in given.items()]
    input_sigma, weight_sigma, max_norm = sizes
    draws, batch_size = _arguments.whole(name, "draws", draws), _arguments.whole(name, "batch_size", batch_size)
    progress = validate.boolean(name, "progress", progress)
    images, data = _arguments.check_inputs(name, inputs), raw_key(name, key)
    classes = _arguments.check_labels(name, labels, len(images))
    params = as_arrays(name, params)
    chosen = None if weight_mask is None else tuple(jax.tree.leaves(resolve_mask(name, weight_mask, params)))
    rows = min(batch_size, len(images))
    _arguments.logit_count(name, apply_fn, params, images, rows)

    def accuracy(weights: PyTree, draw: int, sigma: float, bound: float, advance: Callable[[int], None]) -> float:
        right = 0
        for start in range(0, len(images), rows):
            place = np.minimum(np.arange(start, start + rows), len(images) - 1)
            counted = np.arange(start, start + rows) < len(images)
            part = jnp.asarray(images[place]), classes[place].astype(np.int32), counted
            right += int(_right(apply_fn, weights, *part, np.uint32(start), data, np.uint32(draw), sigma, bound))
            advance(1)
        return right / len(images)

    with _arguments.bar(name, -(-len(images) // rows) * (3 * draws + 1), progress) as advance:
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
    return PerturbedAccuracy(
        clean=clean,
        input_noise=by_input,
        weight_noise=by_weight,
        clamped_noise=clamped,
        input_sigma=input_sigma,
        weight_sigma=weight_sigma,
        max_norm=max_norm,
    )


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
    """The number of counted inputs that are classified correctly under noise whose norm is at most `bound`."""
    stream = step_words(data, jnp.uint32(_sampling.PERTURB), _sampling.SALT)
    places = first_input + jnp.arange(len(inputs), dtype=jnp.uint32)

    drawn = _sampling.noise(stream, inputs, places, jnp.full_like(places, draw))
    drawn = drawn * sigma.astype(drawn.dtype)
    norm = jnp.sqrt(jnp.sum(drawn * drawn, axis=tuple(range(1, drawn.ndim)), keepdims=True))
    limit = bound.astype(norm.dtype)
    drawn = drawn * jnp.where(norm <= limit, 1, limit / jnp.where(norm <= limit, 1, norm))
    answers = _sampling.answers(apply_fn(params, _sampling.shift(inputs, drawn)))
    return jnp.sum((answers == labels) & counted, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="chosen")
def _perturbed(
    params: PyTree, data: jax.Array, draw: jax.Array, sigma: jax.Array, chosen: tuple[bool, ...] | None
) -> PyTree:
    """The perturbed weights of one draw."""
    mask = None if chosen is None else jax.tree.unflatten(jax.tree.structure(params), chosen)
    key = jnp.stack(step_words(data, draw, salt("smoothing", "weights")))
    noisy = perturb_weights(lambda weights: weights, sigma, relative_to="weights", mask=mask)  # pyright: ignore[reportArgumentType] a 0-d array
    return noisy(params, noise_key=key)

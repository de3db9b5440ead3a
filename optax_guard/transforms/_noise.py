"""Noise in training: on the gradient, on the update, or on the weights in the forward pass.

============================================  =====================================================  ===================
Function                                      Adds                                                   Place
============================================  =====================================================  ===================
`noise_injection(eta, gamma, key=seed)`       noise of decreasing variance to the gradient           before optimizer
`anticorrelated_noise(sigma, key=seed)`       the difference of two draws to the update              after optimizer
`langevin_noise(learning_rate, temperature)`  the noise of Langevin dynamics to the update           after optimizer
`perturb_weights(loss_fn, sigma)`             noise to the weights in the forward pass               around the loss
============================================  =====================================================  ===================

Noise on the gradient goes after the clip: its norm is sigma * sqrt(number of weights), so a later clip would discard
most of the gradient. `guard` always has that order, and samples nothing on a held step or between the emissions of
`accumulate`. None of this is differential privacy, which requires that the gradient of each example be clipped and the
noise calibrated to that bound, as in `jax-privacy`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._common import validate
from optax_guard._common.counters import next_step, value_at
from optax_guard._common.eager import compiled_once
from optax_guard._common.forms import cond_or_select
from optax_guard._common.numerics import accumulator_dtype
from optax_guard._common.prng import (
    Words,
    bits,
    leaf_words,
    normal,
    raw_key,
    rounded_stochastically,
    salt,
    step_words,
    uniform,
    zeros_sharded_as,
)
from optax_guard._common.transformation import transformation
from optax_guard._common.tree import (
    as_arrays,
    is_gradient,
    leaf_names,
    leaves_with_none,
    resolve_mask,
    small_leaves_together,
)
from optax_guard._common.typing import Mask, PRNGKeyLike, PyTree, ScalarOrSchedule
from optax_guard._step.judge import scale_leaves
from optax_guard._step.observe import gradient_statistics

__all__ = [
    "Kind",
    "NoiseScale",
    "NoiseState",
    "WeightScale",
    "anticorrelated_noise",
    "langevin_noise",
    "noise_injection",
    "perturb_weights",
]

Kind: TypeAlias = Literal["gaussian", "uniform_ball"]
NoiseScale: TypeAlias = Literal["none", "gradient"]
WeightScale: TypeAlias = Literal["none", "weights"]

_LARGEST = 1e36  # the largest standard deviation: six of them and the difference of two draws are finite in float32


class NoiseState(NamedTuple):
    """The state of the noise transformations."""

    noise_key: jax.Array  # u32[2]: raw key data (its length depends on the generator); never changes
    noise_step: jax.Array  # i32[]: the number of calls, t in the equations


class _Draw(NamedTuple):
    """For each position, standard normals and bits for rounding to 16 bits; None where nothing is drawn."""

    normals: list[Any]
    rounding: list[Any]


def noise_injection(
    eta: ScalarOrSchedule = 0.01,
    gamma: ScalarOrSchedule = 0.55,
    *,
    key: PRNGKeyLike = 0,
    distribution: Kind = "gaussian",
    max_norm: ScalarOrSchedule | None = None,
    relative_to: NoiseScale = "none",
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Add annealed noise to the gradient.

    g <- g + n,   sigma_t^2 = eta / (1 + t)^gamma,   t = 0, 1, ...
    "gaussian":      n_j ~ N(0, sigma_t^2), independent
    "uniform_ball":  n ~ uniform in the ball of radius sigma_t (the whole tree as one vector)
    with a bound:    n <- n * min(1, max_norm * r / ||n||_2),   r = 1, or ||g||_2 for relative_to="gradient"

    Guarantees:
      - The noise of a leaf at step t is a function of (key, t, path of the leaf) alone. It is the same after a restart,
        under any sharding, and when leaves are added elsewhere in the tree. The other kinds of noise in this module
        draw different numbers from the same key.
      - Noise is sampled in float32 or wider (float16 and bfloat16 normals have 128 distinct values and are not
        Gaussian). The sum is rounded stochastically to a 16-bit gradient, so noise below its resolution still acts on
        average.
      - A gradient that is not perturbed (masked out, integer) is returned bit for bit.
      - The key that you pass survives donation of the state.

    =========================================  ===========================================================
    Case                                       Result
    =========================================  ===========================================================
    `eta` = 0                                  unchanged
    a schedule makes `eta` negative            counts as 0
    a schedule makes `gamma` negative          the noise grows
    `eta`, `gamma` or `max_norm` NaN           NaN, so that a faulty schedule is noticed
    gradient zero                              noise alone; with relative_to="gradient" and a bound, zero
    NaN or Inf in a leaf                       stays in its leaf (a relative bound then uses the finite leaves)
    float16 at the end of its range            stays finite: at most 65504 in magnitude
    integer, `float0`, `None` leaf             unchanged
    complex leaf                               variance sigma^2 / 2 in each of the two parts
    two instances with the same key            the same numbers twice: give each its own key
    inside `shard_map`                         every device draws the same numbers for its shard, and `max_norm`
                                               bounds each shard: use it outside, under `jit`
    =========================================  ===========================================================

    Args:
      eta: the variance at step 0 (squared radius for the ball), in squared units of the gradient, >= 0: a number, a 0-d
        array or a schedule. The paper tried 0.01, 0.3 and 1.0.
      gamma: the exponent of the decay, >= 0: a number, a 0-d array or a schedule. Use 0 for constant noise, or if `eta`
        is itself a schedule.
      key: an int, a PRNG key or raw uint32 key data. Under `optax.inject_hyperparams`, list it in `static_args`
        together with `distribution`, `relative_to` and `mask`.
      distribution: "gaussian", or "uniform_ball" for perturbed gradient descent.
      max_norm: a bound on the norm of the noise over the whole tree, >= 0, or None. In high dimensions ||n|| hardly
        deviates from sigma * sqrt(size), so an absolute bound is active either always or never, and the relative one is
        more useful.
      relative_to: "none" for a `max_norm` in the gradient's units, "gradient" for a multiple of the gradient's norm.
      mask: which leaves to perturb, as in `l1_penalty`. Default: all.

    Returns:
      A transformation.

    Raises:
      ValueError: a static argument is invalid, or the mask does not match.

    Example:
      >>> noise = noise_injection(eta=1.0, key=7)
      >>> grads = {"w": jnp.zeros(100_000)}
      >>> updates, state = noise.update(grads, noise.init(grads))
      >>> round(float(jnp.std(updates["w"])), 2)
      1.0

    References:
      Neelakantan et al., "Adding gradient noise improves learning for very deep networks", 2015, arXiv 1511.06807,
      equation 1. The ball: Jin et al., "How to escape saddle points efficiently", 2017, arXiv 1703.00887, algorithm 1,
      which perturbs only near saddle points; here every step is perturbed.

    See Also:
      `optax.add_noise`, which samples in the gradient's dtype, splits its key at every step and refuses raw keys.
    """
    name = "noise_injection"
    eta = validate.scalar_or_schedule(name, "eta", eta, low=0)
    gamma = validate.scalar_or_schedule(name, "gamma", gamma, low=0)
    validate.one_of(name, "distribution", distribution, Kind)
    if max_norm is not None:
        max_norm = validate.scalar_or_schedule(name, "max_norm", max_norm, low=0)
    validate.one_of(name, "relative_to", relative_to, NoiseScale)
    salted = salt(name, distribution)

    def perturb(updates: PyTree, state: NoiseState) -> PyTree:
        step = state.noise_step
        start = jnp.maximum(value_at(eta, step), 0)
        power = value_at(gamma, step).astype(start.dtype)
        # Selected, since 1 ** NaN is 1 and would hide a faulty schedule at the first step.
        variance = jnp.where(jnp.isnan(power), jnp.nan, start / (1 + step.astype(start.dtype)) ** power)
        sigma = jnp.sqrt(variance)
        stream = step_words(state.noise_key, step, salted)
        draw = _draw(name, stream, updates, mask, sigma)
        if distribution == "uniform_ball":
            sigma = sigma * _ball_factor(stream, draw.normals).astype(sigma.dtype)
        if max_norm is None:
            return _add(updates, draw, sigma)
        bound = jnp.maximum(value_at(max_norm, step), 0)
        norm = _norm(draw.normals)
        sigma = sigma.astype(norm.dtype)
        norm, bound = norm * sigma, bound.astype(norm.dtype)
        if relative_to == "gradient":
            bound = bound * _norm(updates)
        factor = jnp.where(norm <= bound, 1, bound / jnp.where(norm <= bound, 1, norm))
        return _add(updates, draw, sigma * factor)

    return _noise(name, key, mask, perturb)


def anticorrelated_noise(
    sigma: ScalarOrSchedule, *, key: PRNGKeyLike = 0, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Add the difference of two draws to the update, so that noise does not accumulate in the parameters.

    u <- u + (xi_{t+1} - xi_t),   xi_t ~ N(0, sigma^2), independent,   t = 0, 1, ...

    Guarantees:
      - After t steps the noise in the parameters is xi_t - xi_0, whose variance is 2 sigma^2 for every t.
      - The state holds only a key and a counter: the previous draw is repeated and not stored.
      - As in `noise_injection`, the noise is a function of (key, step, path) alone, is sampled in float32 or wider and
        is rounded stochastically to 16 bits. Each draw is rounded separately, so in 16 bits the differences cancel only
        on average.

    ======================================  ==================================================
    Case                                    Result
    ======================================  ==================================================
    `sigma` = 0                             unchanged
    `sigma` is a schedule                   sigma_{t+1} xi_{t+1} - sigma_t xi_t, which still cancels
    NaN or Inf in a leaf                    stays in its leaf
    a step held by a guard around the       nothing is drawn: the next step continues from the
    optimizer                               same xi
    ======================================  ==================================================

    Args:
      sigma: the standard deviation of one draw in units of the parameters, >= 0: a number, a 0-d array or a schedule.
      key: as in `noise_injection`. Under `optax.inject_hyperparams`, list it in `static_args` together with `mask`.
      mask: which leaves to perturb, as in `l1_penalty`. Default: all.

    Returns:
      A transformation that goes last in the chain, after the learning rate.

    Raises:
      ValueError: a static argument is invalid, or the mask does not match.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), anticorrelated_noise(0.01, key=3))
      >>> params, state = jnp.zeros(1000), tx.init(jnp.zeros(1000))
      >>> for _ in range(100):
      ...     updates, state = tx.update(jnp.zeros(1000), state)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.std(params) < 0.016)  # 0.01 * sqrt(2), not 0.01 * sqrt(100)
      True

    References:
      Orvieto et al., "Anticorrelated noise injection for improved generalization", 2022, arXiv 2202.02831 (Anti-PGD).

    See Also:
      `noise_injection`, whose noise accumulates. Optax has no noise of this kind.
    """
    name = "anticorrelated_noise"
    sigma = validate.scalar_or_schedule(name, "sigma", sigma, low=0, high=_LARGEST)
    salted = salt(name)

    def perturb(updates: PyTree, state: NoiseState) -> PyTree:
        step = state.noise_step
        new, old = jnp.maximum(value_at(sigma, step + 1), 0), jnp.maximum(value_at(sigma, step), 0)
        later = _draw(name, step_words(state.noise_key, step + 1, salted), updates, mask, new)
        earlier = _draw(name, step_words(state.noise_key, step, salted), updates, mask, old)
        difference = [
            None if z is None else new.astype(z.dtype) * z - old.astype(z.dtype) * y
            for z, y in zip(later.normals, earlier.normals, strict=True)
        ]
        return _add(updates, _Draw(difference, later.rounding), jnp.ones((), new.dtype))

    return _noise(name, key, mask, perturb)


def langevin_noise(
    learning_rate: ScalarOrSchedule,
    temperature: ScalarOrSchedule = 1.0,
    *,
    key: PRNGKeyLike = 0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Add the noise that turns gradient descent into Langevin dynamics to the update.

    u <- u + sqrt(2 * learning_rate * temperature) * z,   z_j ~ N(0, 1)

    After `optax.sgd(learning_rate)` and with small steps, the parameters are distributed as exp(-loss / temperature).

    Guarantees:
      - As in `noise_injection`, the noise is a function of (key, step, path) alone, is sampled in float32 or wider and
        is rounded stochastically to 16 bits.

    ==========================================  ================================
    Case                                        Result
    ==========================================  ================================
    `learning_rate` or `temperature` zero       unchanged
    either negative, from a schedule or array   counts as zero
    NaN or Inf in a leaf                        stays in its leaf
    after Adam                                  noise of this size, but not the distribution above
    ==========================================  ================================

    Args:
      learning_rate: the learning rate of the optimizer before it, >= 0: a number, a 0-d array or the same schedule.
      temperature: the temperature in units of the loss, >= 0: a number, a 0-d array or a schedule.
      key: as in `noise_injection`. Under `optax.inject_hyperparams`, list it in `static_args` together with `mask`.
      mask: which leaves to perturb, as in `l1_penalty`. Default: all.

    Returns:
      A transformation that goes last in the chain, after the learning rate.

    Raises:
      ValueError: a static argument is invalid, or the mask does not match.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), langevin_noise(0.1, temperature=0.5))
      >>> updates, _ = tx.update(jnp.zeros(100_000), tx.init(jnp.zeros(100_000)))
      >>> round(float(jnp.var(updates)), 2)  # 2 * 0.1 * 0.5
      0.1

    References:
      Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", 2011, equation 4, with their step
      epsilon = 2 * learning_rate and a temperature.

    See Also:
      `optax.noisy_sgd`, which multiplies its noise by the learning rate and so is not Langevin dynamics.
    """
    name = "langevin_noise"
    learning_rate = validate.scalar_or_schedule(name, "learning_rate", learning_rate, low=0)
    temperature = validate.scalar_or_schedule(name, "temperature", temperature, low=0)
    salted = salt(name)

    def perturb(updates: PyTree, state: NoiseState) -> PyTree:
        step = state.noise_step
        rate, heat = value_at(learning_rate, step), value_at(temperature, step)
        both = jnp.result_type(rate, heat)
        product = jnp.maximum(rate, 0).astype(both) * jnp.maximum(heat, 0).astype(both)
        sigma = jnp.sqrt(2 * jnp.minimum(product, jnp.finfo(both).max / 2))
        return _add(updates, _draw(name, step_words(state.noise_key, step, salted), updates, mask, sigma), sigma)

    return _noise(name, key, mask, perturb)


def perturb_weights(
    loss_fn: Callable[..., Any], sigma: float, *, relative_to: WeightScale = "none", mask: Mask | None = None
) -> Callable[..., Any]:
    """Makes a loss whose weights are perturbed anew at every call, for `jax.grad` or `jax.value_and_grad`.

    noisy_loss(w, ...) = loss_fn(w + n, ...),   n_j ~ N(0, (sigma * r)^2),   r = 1, or the leaf's root mean square

    It wraps the loss instead of being a transformation, because the noise must be present in the forward pass while the
    step starts from the clean weights.

    Guarantees:
      - The gradient is that of `loss_fn` at w + n. n counts as a constant, even if its size depends on w.
      - The noise is a function of (`noise_key`, path) alone. It is sampled in float32 or wider and rounded
        stochastically to 16-bit weights.
      - Masked-out and integer leaves reach `loss_fn` unchanged.

    ============================  ====================================
    Case                          Result
    ============================  ====================================
    `sigma` = 0                   `loss_fn` itself
    zero leaf, "weights"          unperturbed
    NaN or Inf in a leaf          stays in its leaf
    ============================  ====================================

    Args:
      loss_fn: a function whose first argument is the parameters.
      sigma: the standard deviation, >= 0, a number or a 0-d array: in units of the weights, or as a fraction of each
        leaf's root mean square. Papers on AWP and variational noise use 0.005 to 0.075 of it.
      relative_to: "none" for a `sigma` in units of the weights, "weights" for a fraction of the root mean square.
      mask: which leaves to perturb, as in `l1_penalty`. Default: all.

    Returns:
      A function with the signature of `loss_fn` and an additional keyword `noise_key`, a PRNG key: pass a new one at
      each step, for instance `jax.random.fold_in(key, step)`.

    Raises:
      ValueError: a static argument is invalid, the mask does not match, or `noise_key` is not a key.

    Example:
      >>> def loss_fn(w, x):
      ...     return jnp.sum(w * x) ** 2
      >>> noisy_loss = perturb_weights(loss_fn, 0.1)
      >>> grads = jax.grad(noisy_loss)(jnp.ones(3), jnp.ones(3), noise_key=jax.random.key(0))
      >>> bool(jnp.all(grads != 6.0)), bool(jnp.all(jnp.abs(grads - 6.0) < 2.0))
      (True, True)

    References:
      Graves, "Practical variational inference for neural networks", 2011 (fixed weight noise). Wu et al., "Adversarial
      weight perturbation helps robust generalization", 2020, arXiv 2004.05884 (the relative form). Deviation: a random
      direction instead of the adversarial one.
    """
    name = "perturb_weights"
    validate.function(name, "loss_fn", loss_fn, "of the parameters")
    sigma = validate.scalar(name, "sigma", sigma, low=0, high=_LARGEST)
    validate.one_of(name, "relative_to", relative_to, WeightScale)
    salted = salt(name)

    @compiled_once
    def perturbed(clean: PyTree, key: jax.Array) -> PyTree:
        draw = _draw(name, step_words(key, jnp.zeros((), jnp.uint32), salted), clean, mask, value_at(sigma, None))
        if relative_to == "weights":
            pairs = zip(draw.normals, leaves_with_none(clean), strict=True)
            draw = _Draw([None if z is None else z * _root_mean_square(w, z) for z, w in pairs], draw.rounding)
        return _add(clean, draw, value_at(sigma, None))

    @functools.wraps(loss_fn)
    def noisy_loss(params: PyTree, *args: Any, noise_key: PRNGKeyLike, **kwargs: Any) -> Any:
        params = as_arrays(name, params)
        clean = lax.stop_gradient(params)
        noisy = perturbed(clean, raw_key(name, noise_key))
        shifted = jax.tree.map(
            lambda w, c, n: w + lax.stop_gradient(n - c) if is_gradient(w) else w,
            params,
            clean,
            noisy,
            is_leaf=lambda leaf: leaf is None,
        )
        return loss_fn(shifted, *args, **kwargs)

    return noisy_loss


def _noise(
    name: str, key: PRNGKeyLike, mask: Mask | None, perturb: Callable[[PyTree, NoiseState], PyTree]
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from the function that perturbs the updates at a step."""
    data = raw_key(name, key)

    def init(params: optax.Params) -> NoiseState:
        if mask is not None:
            resolve_mask(name, mask, as_arrays(name, params))
        return NoiseState(noise_key=jnp.copy(data), noise_step=jnp.zeros((), jnp.int32))

    @compiled_once
    def change(updates: PyTree, state: NoiseState, params: PyTree | None) -> tuple[PyTree, NoiseState]:
        del params
        noisy = perturb(updates, state)
        return noisy, NoiseState(noise_key=state.noise_key, noise_step=next_step(state.noise_step))

    return transformation(name, init, change)


def _draw(name: str, stream: Words, updates: PyTree, mask: Mask | None, sigma: jax.Array) -> _Draw:
    """Standard normals for every chosen leaf, or zeros, at a tenth of the cost, if `sigma` is 0.

    The branch also separates the samples from the operations that read them. Otherwise XLA would hash every index again
    in each of Adam's three fusions, and on a CPU it ignores optimization barriers. `| 1` makes the condition always
    true in a way that XLA does not detect: with a constant sigma it would remove the branch.
    """
    on = (sigma != 0) & ((stream.first | np.uint32(1)) != 0)
    chosen = leaves_with_none(updates) if mask is None else leaves_with_none(resolve_mask(name, mask, updates))

    leaves: list[Any] = [
        leaf if use is not False else None for leaf, use in zip(leaves_with_none(updates), chosen, strict=True)
    ]
    keys = leaf_words(stream, leaf_names(updates))

    def sample(draw: Callable[..., Any]) -> _Draw:
        drawn = _Draw(normals=[None] * len(leaves), rounding=[None] * len(leaves))
        for group in small_leaves_together(leaves):
            like = leaves[group[0]]
            rounds = like.dtype in (jnp.float16, jnp.bfloat16)
            dtype = like.dtype if jnp.issubdtype(like.dtype, jnp.complexfloating) else accumulator_dtype(like.dtype)
            if len(group) == 1:
                parts = [draw(Words(keys.first[group[0]], keys.second[group[0]]), like, dtype)]
            else:
                some = np.array(group)
                each = jax.vmap(lambda first, second, x, dtype=dtype: draw(Words(first, second), x, dtype))
                stacked = each(keys.first[some], keys.second[some], jnp.stack([leaves[i] for i in group]))
                parts = [(stacked[0][j], stacked[1][j]) for j in range(len(group))]
            for i, (z, spare) in zip(group, parts, strict=True):
                drawn.normals[i], drawn.rounding[i] = z, spare if rounds else None
        return drawn

    def nothing(words: Words, leaf: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        del words
        return zeros_sharded_as(leaf, dtype), zeros_sharded_as(leaf, jnp.uint32)

    return cond_or_select(on, lambda: sample(normal), lambda: sample(nothing), selects=("gpu", "tpu"))


def _add(updates: PyTree, draw: _Draw, sigma: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
    noise = scale_leaves(draw.normals, sigma)
    noisy = [
        leaf if n is None else _add_leaf(leaf, n, spare)
        for leaf, n, spare in zip(leaves, noise, draw.rounding, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def _add_leaf(leaf: jax.Array, noise: jax.Array, spare: jax.Array | None) -> jax.Array:
    wide = leaf.astype(noise.dtype) + noise
    if spare is not None:
        largest = float(jnp.finfo(leaf.dtype).max)  # finite noise on a finite number stays finite
        wide = jnp.where(jnp.isinf(leaf), wide, jnp.clip(wide, -largest, largest))
        wide = rounded_stochastically(wide, leaf.dtype, spare)
    return jnp.where(noise == 0, leaf, wide.astype(leaf.dtype))  # adding 0 would flush subnormals and lose -0.0


def _norm(tree: PyTree) -> jax.Array:
    size, root = gradient_statistics(tree).finite_norm_parts
    return size * root


def _root_mean_square(leaf: jax.Array, like: jax.Array) -> jax.Array:
    return (_norm([leaf]) / max(leaf.size, 1) ** 0.5).astype(like.dtype)


def _ball_factor(stream: Words, normals: list[Any]) -> jax.Array:
    """||n|| / ||z|| for n uniform in the unit ball: U^(1 / dimension) / ||z||, U uniform in (0, 1]."""
    drawn = [z for z in normals if z is not None]
    dimension = sum(z.size * (2 if jnp.issubdtype(z.dtype, jnp.complexfloating) else 1) for z in drawn)
    share = 1 - uniform(bits(stream, jnp.zeros(())).second)
    norm = _norm(normals)
    return share ** (1 / max(dimension, 1)) / jnp.where(norm > 0, norm, 1).astype(jnp.float32)

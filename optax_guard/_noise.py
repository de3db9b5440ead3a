"""Noise on the gradient.

========================================  ============================================================
Function                                  Adds
========================================  ============================================================
`noise_injection(eta, gamma, key=seed)`   Gaussian noise whose variance falls with the step
========================================  ============================================================

Noise goes after the clip and before the optimizer: its norm is sigma * sqrt(number of weights), so a clip behind it
would throw the gradient away. In `guard` that order comes by itself. This is *not* differential privacy: for that the
gradient of each example must be clipped and the noise calibrated to it, which `jax-privacy` does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard import _validate
from optax_guard._prng import key_implementation, leaf_key, raw_key
from optax_guard._rule import scale_leaves
from optax_guard._statistics import accumulator_dtype, gradient_statistics
from optax_guard._step import next_step, value_at
from optax_guard._tree import check_arrays, is_gradient, leaf_names, positions, resolve_mask
from optax_guard._typing import Mask, PRNGKeyLike, ScalarOrSchedule

__all__ = ["NoiseState", "noise_injection"]


class NoiseState(NamedTuple):
    """What `noise_injection` carries."""

    noise_key: jax.Array  # u32[2]: raw key data (length by generator); never changes
    noise_step: jax.Array  # i32[]: calls, t in the variance


def noise_injection(
    eta: ScalarOrSchedule = 0.01,
    gamma: ScalarOrSchedule = 0.55,
    *,
    key: PRNGKeyLike = 0,
    max_norm: ScalarOrSchedule | None = None,
    relative_to: str = "none",
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Add annealed Gaussian noise to the gradient.

    g <- g + n,   n_j ~ N(0, sigma_t^2),   sigma_t^2 = eta / (1 + t)^gamma,   t = 0, 1, ...
    with a bound:   n <- n * min(1, max_norm * r / ||n||_2),   r = 1, or ||g||_2 for relative_to="gradient"

    Guarantees:
      - The noise of a leaf at step t is a function of (key, t, path of the leaf) alone: the same after a restart, for
        any sharding (with JAX's default generator), and when leaves are added elsewhere in the tree.
      - Sampled in float32 or wider (float16 and bfloat16 normals are not Gaussian: 128 distinct values). Into 16-bit
        gradients the sum is rounded stochastically, so that noise below their resolution still acts on average.
      - With `max_norm` the norm of the noise over all leaves is at most the bound (before rounding to 16 bits).
      - The caller's key is copied: donating the state does not delete it.

    =========================================  ===========================================================
    Case                                       Result
    =========================================  ===========================================================
    `eta` = 0                                  unchanged
    `eta` or `gamma` from a schedule negative  `eta` below 0 counts as 0; `gamma` below 0 grows the noise
    gradient zero                              noise alone; with relative_to="gradient" and a bound: zero
    NaN or Inf in a leaf                       stays in its leaf (a relative bound then takes the finite leaves)
    integer, `float0`, `None` leaf             unchanged
    complex leaf                               variance sigma^2 / 2 in each of the two parts
    two instances with the same key            the same noise twice: give each its own key
    =========================================  ===========================================================

    Args:
      eta: variance at step 0, in squared units of the gradient, >= 0: a number, a 0-d array or a schedule. The paper
        tried 0.01, 0.3 and 1.0.
      gamma: exponent of the decay, >= 0: a number, a 0-d array or a schedule. 0 for constant noise.
      key: an int, a PRNG key or raw uint32 key data. Under `optax.inject_hyperparams` list it in `static_args`, with
        `relative_to` and `mask`.
      max_norm: bound on the norm of the noise over the whole tree, >= 0; None for none. In high dimension ||n|| hardly
        varies around sigma * sqrt(size), so an absolute bound is either always or never active: the relative one is the
        useful one.
      relative_to: "none": `max_norm` is in the gradient's units. "gradient": it is a multiple of the gradient's norm.
      mask: which leaves to perturb, as in `l1_penalty`. Default: all.

    Returns:
      A transformation.

    Raises:
      ValueError: wrong static arguments; a mask that does not match.

    Example:
      >>> noise = noise_injection(eta=1.0, key=7)
      >>> grads = {"w": jnp.zeros(100_000)}
      >>> updates, state = noise.update(grads, noise.init(grads))
      >>> round(float(jnp.std(updates["w"])), 2)
      1.0

    References:
      Neelakantan et al., "Adding gradient noise improves learning for very deep networks", 2015, arXiv 1511.06807,
      equation 1.

    See Also:
      `optax.add_noise`: samples in the gradient's dtype, splits its key at every step, refuses raw keys.
    """
    name = "noise_injection"
    _validate.scalar_or_schedule(name, "eta", eta, low=0)
    _validate.scalar_or_schedule(name, "gamma", gamma, low=0)
    if max_norm is not None:
        _validate.scalar_or_schedule(name, "max_norm", max_norm, low=0)
    _validate.one_of(name, "relative_to", relative_to, ("none", "gradient"))
    implementation = key_implementation(key)
    data = raw_key(name, key)

    def init(params: optax.Params) -> NoiseState:
        if mask is not None:
            resolve_mask(name, mask, params)
        return NoiseState(noise_key=jnp.copy(data), noise_step=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra
        check_arrays(name, updates)
        step = state.noise_step
        start = jnp.maximum(value_at(eta, step), 0)
        variance = start / (1 + step.astype(start.dtype)) ** value_at(gamma, step).astype(start.dtype)
        chosen = positions(updates) if mask is None else positions(resolve_mask(name, mask, updates))
        leaves, structure = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
        noise, rounding = [], []
        for leaf, path, use in zip(leaves, leaf_names(updates), chosen, strict=True):
            if use is False or not is_gradient(leaf):
                noise.append(None)
                rounding.append(None)
                continue
            sample_key, rounding_key = jax.random.split(leaf_key(state.noise_key, implementation, step, path))
            noise.append(_sample(sample_key, leaf, jnp.sqrt(variance)))
            rounding.append(rounding_key)
        # Without the barrier XLA samples again in every fusion that reads the noise.
        noise = lax.optimization_barrier(noise)
        if max_norm is not None:
            bound = jnp.maximum(value_at(max_norm, step), 0)
            if relative_to == "gradient":
                size, root = gradient_statistics(updates).finite_norm_parts
                bound = bound * (size * root).astype(bound.dtype)
            noise = _bounded(noise, bound)
        noisy = [leaf if n is None else _add(leaf, n, k) for leaf, n, k in zip(leaves, noise, rounding, strict=True)]
        return jax.tree.unflatten(structure, noisy), NoiseState(noise_key=state.noise_key, noise_step=next_step(step))

    return optax.GradientTransformationExtraArgs(init, update)


def _sample(key: jax.Array, leaf: jax.Array, sigma: jax.Array) -> jax.Array:
    real = accumulator_dtype(leaf.dtype)
    dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else real
    return sigma.astype(dtype) * jax.random.normal(key, leaf.shape, dtype)


def _bounded(noise: list[jax.Array | None], bound: jax.Array) -> list[jax.Array | None]:
    size, root = gradient_statistics(noise).finite_norm_parts
    norm = size * root
    bound = bound.astype(norm.dtype)
    return scale_leaves(noise, jnp.where(norm <= bound, 1, bound / jnp.where(norm <= bound, 1, norm)))


def _add(leaf: jax.Array, noise: jax.Array, key: jax.Array) -> jax.Array:
    wide = leaf.astype(noise.dtype) + noise
    if leaf.dtype not in (jnp.float16, jnp.bfloat16):
        return wide.astype(leaf.dtype)
    return _round_stochastically(wide, leaf.dtype, key)


def _round_stochastically(wide: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """One of the two neighbours of each number in `dtype`, so that the mean over keys is the number itself."""
    near = wide.astype(dtype)
    towards = jnp.where(wide > near.astype(wide.dtype), jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(near, towards)
    gap = jnp.abs(other.astype(wide.dtype) - near.astype(wide.dtype))
    share = jnp.abs(wide - near.astype(wide.dtype)) / jnp.where(gap > 0, gap, 1)
    use_other = (jax.random.uniform(key, wide.shape, wide.dtype) < share) & jnp.isfinite(other)
    return jnp.where(use_other, other, near)

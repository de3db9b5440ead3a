"""The z-loss, which keeps the output logits of a classifier or language model from drifting."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._common import validate
from optax_guard._common.tree import wider_dtype

__all__ = ["z_loss"]


def z_loss(logits: ArrayLike, weight: float | jax.Array = 1e-4) -> jax.Array:
    """A penalty on the log of the softmax's normaliser, to be added to the cross-entropy of the same logits.

    z_loss = weight * log^2 Z, log Z = log(sum_i exp(logits_i)) over the last axis

    A cross-entropy does not change if the same number is added to all logits, so nothing keeps log Z near 0. It drifts,
    and logits far from 0 are coarse in bfloat16. The gradient, 2 weight log(Z) softmax(logits), pulls it back.
    Attention logits are another matter: `max_attention_logits` shows them.

    Guarantees:
      - Computed in float32 or wider for logits of any dtype; the gradient has the logits' dtype and is rounded once.
      - Adding c to all logits changes log Z by c, so at log Z = 0 the loss and its gradient are 0.

    ==============================  ==================================================================
    Case                            Result
    ==============================  ==================================================================
    logits of -Inf (masked tokens)  they do not count, and their gradient is 0
    NaN in a row, or +Inf           that row is not finite; the others are unaffected
    one token                       weight * logit^2
    `weight` = 0                    0
    ==============================  ==================================================================

    Args:
      logits: [..., tokens], real, in any floating dtype; at least one token.
      weight: in [0, Inf), a number or a traced scalar. PaLM's is 1e-4.

    Returns:
      One number per row, [...], in float32 or wider, as Optax's losses: average it with the cross-entropy, under the
      same mask.

    Raises:
      ValueError: `logits` are not floating numbers with a last axis, or `weight` is outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_guard as og
      >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
      >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      >>> loss = jnp.mean(cross_entropy + og.z_loss(logits))
      >>> print(f"{float(jnp.mean(og.z_loss(logits))):.3g}")  # 1e-4 * log(4) ** 2
      0.000192

    References:
      Chowdhery et al. PaLM: Scaling Language Modeling with Pathways. 2022. arXiv 2204.02311, section 5.
      Wortsman et al. Small-scale proxies for large-scale Transformer training instabilities. 2023. arXiv 2309.14322,
      section 3.2.
    """
    expected = "floating numbers [..., tokens] with at least one token"
    logits = validate.array("z_loss", "logits", logits, expected, ndim=1)
    if logits.shape[-1] == 0:
        raise ValueError(f"z_loss: `logits` must be {expected}; got {logits.dtype}{list(logits.shape)}.")
    dtype = wider_dtype(logits.dtype, jnp.float32)
    weight = validate.scalar("z_loss", "weight", weight, low=0)
    log_normaliser = jax.nn.logsumexp(logits.astype(dtype), axis=-1)
    return jnp.asarray(weight, dtype) * jnp.square(log_normaliser)

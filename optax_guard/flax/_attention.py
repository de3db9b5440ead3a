"""An `attention_fn` for the attention layers of linen and nnx that records the largest attention logits."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import linen, nnx
from flax.linen.dtypes import promote_dtype

from optax_guard._common import validate
from optax_guard.attention import max_attention_logits
from optax_guard.attention._logits import fused, keys_of, queries_of

__all__ = ["dot_product_attention", "record_max_logits"]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    exact: bool = False,
) -> jax.Array:
    """An `attention_fn` for linen and nnx: `jax.nn.dot_product_attention`, which records the largest attention logits.

    The layer passes itself on only if it is called with `sow_weights=True`. Then "max_logits", [heads], is sown into
    its intermediates, in place of attention weights; otherwise nothing is recorded.

    Guarantees:
      - The output is that of `jax.nn.dot_product_attention`, as in `nnx.dot_product_attention` without dropout. The
        softmax is in float32 in any dtype, so in 16 bits the output differs from linen's own by rounding.
      - What is recorded is the second result of `og.attention_with_max_logits`.

    Args:
      query: [..., T, heads, size]; arguments up to `is_causal` are those that Flax passes.
      key: [..., S, key heads, size].
      value: Like `key`.
      bias: Added to the logits, and not part of the maxima.
      mask: True where a query may attend, [..., heads or 1, T, S].
      broadcast_dropout: Not used.
      dropout_rng: Not used.
      dropout_rate: Must be 0 unless `deterministic`: dropout needs the weights themselves.
      deterministic: Whether there is no dropout.
      dtype: The dtype to compute in.
      precision: Must be None.
      module: The layer, or None to record nothing.
      is_causal: Whether query t attends to keys s <= t only.
      qk_attn_weights_einsum: Must be None.
      attn_weights_value_einsum: Must be None.
      implementation: As in JAX: "cudnn" for the fused kernel, through `functools.partial`.
      exact: As in `og.attention_with_max_logits`.

    Raises:
      ValueError: Something is asked for that the fused function cannot do. The message says what to use instead.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> from optax_guard.flax import dot_product_attention
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         layer = nn.MultiHeadDotProductAttention(2, attention_fn=dot_product_attention, name="attention")
      ...         return layer(x, sow_weights=True)
      >>> model, x = Model(), jnp.ones((1, 3, 4))
      >>> params = jax.jit(model.init)(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     y, sown = model.apply({"params": params}, x, mutable=["intermediates"])
      ...     return jnp.mean(y), og.collect_max_logits(sown)
      >>> (loss, max_logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, x)
      >>> {layer: maxima.shape for layer, maxima in max_logits.items()}
      {'attention': (2,)}
    """
    del broadcast_dropout, dropout_rng
    owner = "dot_product_attention"
    dropout_rate = validate.scalar(owner, "dropout_rate", dropout_rate, low=0, high=1, static=True)
    refused = {
        "dropout (`dropout_rate`)": dropout_rate > 0 and not validate.boolean(owner, "deterministic", deterministic),
        "`precision`": precision is not None,
        "an einsum of one's own (`qk_attn_weights_einsum`)": qk_attn_weights_einsum is not None,
        "an einsum of one's own (`attn_weights_value_einsum`)": attn_weights_value_einsum is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(
                f"{owner}: {what} is not possible with `jax.nn.dot_product_attention`; use "
                "`record_max_logits(nn.dot_product_attention)`, or `nnx.dot_product_attention` in nnx, as "
                "`attention_fn`."
            )
    if not (module is None or isinstance(module, (linen.Module, nnx.Module))):
        raise ValueError(f"{owner}: `module` must be a layer of linen or nnx, or None; got {validate.shown(module)}.")
    dtype = None if dtype is None else validate.floating_dtype(owner, "dtype", dtype)
    query, key, value = promote_dtype(
        queries_of(owner, query), keys_of(owner, "key", key), keys_of(owner, "value", value), dtype=dtype
    )
    if mask is not None:  # linen's masks are numbers
        mask = validate.array(owner, "mask", mask, "booleans or numbers", kind=np.generic).astype(bool)
    output, maxima = fused(
        owner, query, key, value, bias, mask, is_causal=is_causal, implementation=implementation, exact=exact
    )
    _sow(module, maxima)
    return output


def record_max_logits(attention_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes any `attention_fn` of linen or nnx record the largest attention logits, exactly.

    The layer passes itself on only if it is called with `sow_weights=True`. Then "max_logits", [heads], is sown into
    its intermediates, in place of attention weights; otherwise nothing is recorded or computed.

    Guarantees:
      - The output is that of `attention_fn`, bit for bit.
      - What is recorded is `og.max_attention_logits` of the same queries, keys, `mask` and `is_causal`; the products
        are computed once more for it, in blocks.

    Args:
      attention_fn: A function of query, key and value, and of any of Flax's keywords: `nn.dot_product_attention`,
        `nnx.dot_product_attention`, or one's own. Its logits must be scaled by 1 / sqrt(size).

    Returns:
      A function with the signature of `attention_fn`.

    Raises:
      ValueError: `attention_fn` is not a function.

    Example:
      >>> import flax.linen as nn
      >>> from optax_guard.flax import record_max_logits
      >>> attention_fn = record_max_logits(nn.dot_product_attention)
      >>> layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, attention_fn=attention_fn)
    """
    validate.function("record_max_logits", "attention_fn", attention_fn, "of query, key and value")
    parameters = inspect.signature(attention_fn).parameters

    @functools.wraps(attention_fn)  # Flax looks at the signature to see what to pass
    def recorded(query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, module: Any = None, **kwargs: Any):
        if "module" in parameters:
            kwargs["module"] = None  # it would sow the weights
        if module is not None:
            given = dict(zip(list(parameters)[3:], args, strict=False)) | kwargs
            mask = given.get("mask")
            query_, key_ = promote_dtype(query, key, dtype=given.get("dtype"))
            mask = None if mask is None else mask.astype(bool)
            _sow(module, max_attention_logits(query_, key_, mask=mask, is_causal=given.get("is_causal", False)))
        return attention_fn(query, key, value, *args, **kwargs)

    return recorded


def _sow(module: Any, maxima: jax.Array) -> None:
    """Records the maxima in the intermediates of a layer, if there is one."""
    if isinstance(module, linen.Module):
        module.sow("intermediates", "max_logits", maxima)
    elif module is not None:
        module.sow(nnx.Intermediate, "max_logits", maxima)

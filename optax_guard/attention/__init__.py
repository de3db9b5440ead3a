"""Attention logits: where their maxima come from, and what keeps them from growing until the softmax is one-hot.

The largest logit of every head reaches the optimizer as the extra argument `max_logits=`: a flat dict from the path of
an attention layer, as in `"blocks_0/attention"`, to a float array [heads], or [layers, heads] where layers are stacked
for `jax.lax.scan`. Layers without attention are not in it.

The functions are also in `optax_guard` itself; the types are only here.
"""

from optax_guard._common.new_params import QKClipState
from optax_guard.attention._layout import (
    AttentionLayout,
    Projection,
    equinox_attention,
    linen_attention,
    nnx_attention,
    transformer_attention,
)
from optax_guard.attention._logits import (
    attention_with_max_logits,
    collect_max_logits,
    max_attention_logits,
    max_attention_logits_from_lse,
)
from optax_guard.attention._qk_clip import qk_clip
from optax_guard.attention._z_loss import z_loss

__all__ = [
    "AttentionLayout",
    "Projection",
    "QKClipState",
    "attention_with_max_logits",
    "collect_max_logits",
    "equinox_attention",
    "linen_attention",
    "max_attention_logits",
    "max_attention_logits_from_lse",
    "nnx_attention",
    "qk_clip",
    "transformer_attention",
    "z_loss",
]

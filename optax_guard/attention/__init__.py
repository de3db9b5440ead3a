"""Attention logits: where their maxima come from, and what keeps them from growing until the softmax is one-hot.

The largest logit of every head reaches the optimizer as the extra argument `max_logits=`: a flat dict from the path of
an attention layer, as in `"blocks_0/attention"`, to a float array [heads], or [layers, heads] where layers are stacked
for `jax.lax.scan`. Layers without attention are not in it.

The functions are also in `optax_guard` itself; the types are only here.
"""

__all__: list[str] = []

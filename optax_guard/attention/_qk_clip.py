"""QK-Clip: scales query and key weights back wherever the attention logits of a head have passed a threshold.

Without query-key normalisation the largest attention logit can grow for thousands of steps while gradient norms look
healthy, until the softmax is one-hot. No clip of the gradient stops that, since every single step is ordinary.

=====================================================  =============================================================
You write                                              Result
=====================================================  =============================================================
`guard(optax.chain(optimizer, qk_clip(layers=...)))`   held steps scale nothing
`stabilize(optax.chain(optimizer, qk_clip(...)),       the bound applies to the optimizer's step, and the factors to
max_change=0.01)`                                      what comes of it
`accumulate(guard(optax.chain(...)), every)`           one clip per cycle, by the largest logits of its micro-batches
=====================================================  =============================================================

Inside the wrappers of this library and in `apply_gradients`, the factors apply to the new parameters after everything
that may still change the update: bounds behind `qk_clip` in the chain, `back_off`, the proximal steps. In a plain
`optax.chain` nothing that changes updates may follow it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._common import validate
from optax_guard._common.counters import count_if, next_step, value_at
from optax_guard._common.new_params import FINISHED_LATER, QKClipState, scaled_updates
from optax_guard._common.transformation import transformation_with_extra
from optax_guard._common.tree import as_params
from optax_guard._common.typing import AxisName, PyTree, ScalarOrSchedule
from optax_guard._step.max_logits import layers_of, max_logits_in
from optax_guard.attention._layout import Layer, Layers, check_layouts, factor_of, find_layers

__all__ = ["qk_clip"]

_LEAST = float(jnp.finfo(jnp.float32).tiny)  # a factor of 0 would erase a head


def qk_clip(
    max_logit: ScalarOrSchedule = 100.0, *, layers: Layers, balance: float = 0.5, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales query and key weights of every head whose largest attention logit exceeds a threshold (QK-Clip).

    gamma_h = min(1, max_logit / S_h),       S_h: the largest logit of head h in this step's forward pass
    W_q,h <- gamma_h^balance * (W_q,h + u),  W_k,h <- gamma_h^(1 - balance) * (W_k,h + u)

    so that the logits of the same inputs are gamma_h times those that the step alone would have given. S_h is passed as
    `max_logits=`, a dict from the path of each layer to its maxima [heads] (see `max_attention_logits`).

    Guarantees:
      - Logits are scaled by exactly gamma_h (up to rounding), for every layout: grouped and multi-query, latent, fused,
        with biases. With a zero update, the heads above the threshold are at it afterwards.
      - The update of every other leaf, and of every head whose gamma is 1 and whose key is not shared, is returned bit
        for bit. Within a group that shares a key, the logits of a head whose gamma is 1 agree up to rounding.
      - Nothing scales or bounds the shrinkage afterwards, inside the wrappers of this library (see the module).
      - A held step scales nothing. No NaN or Inf enters the state.

    ==========================================  ====================================================================
    Case                                        Result
    ==========================================  ====================================================================
    a maximum that is NaN, Inf or not above 0   scales nothing for its head, and is counted (`invalid_total`)
    grouped and multi-query                     with gamma_g the smallest of the group: the key by
                                                gamma_g^(1 - balance), query h by gamma_h / gamma_g^(1 - balance),
                                                which may exceed 1
    multi-head latent                           rotated queries by gamma_h; the shared rotated key is not scaled
    biases of queries and keys                  scaled like the weights, as logits are bilinear in W x + b
    query-key normalisation                     refused: with it the weights no longer set the logits
    layers in `max_logits` not in `layers`      not scaled
    `max_logit` = Inf                           nothing is scaled, and the maxima appear in `metrics`
    schedule or array that is NaN or not        scales nothing
    above 0
    moments of the optimizer                    not scaled: they are of the gradient, and follow it
    frozen leaves                               scaled too: leave their layers out of `layers`
    outside of `guard`, `accumulate`            a held step is scaled: put it inside
    ==========================================  ====================================================================

    Args:
      max_logit: the threshold, > 0: a number, a 0-d array or a schedule of this transformation's own steps. Kimi K2 was
        trained with 100.
      layers: which leaves hold queries and keys, and how: `linen_attention()`, `nnx_attention()`,
        `equinox_attention(heads)`, `transformer_attention(heads)`, an `AttentionLayout`, or a tuple of several.
      balance: the share of the shrinkage, in [0, 1], that goes to the queries. 0.5 shrinks both alike.
      axis_name: the axes of `jax.shard_map` over which the batch is split, whose devices must agree on the largest
        logit; not needed inside a `guard` or `accumulate` with that `axis_name`, nor under `jit`.

    Returns:
      A transformation for the end of a chain; its `update` needs `params` and `max_logits=`. Under
      `optax.inject_hyperparams`, list `layers`, `balance` and `axis_name` in `static_args`.

    Raises:
      ValueError: a static argument is invalid; in `init`, `layers` finds nothing, or half of a layer, or query-key
        normalisation; in `update`, `max_logits` is missing, lacks a layer, or has another number of heads.

    Example:
      >>> import optax_guard as og
      >>> layout = og.attention.AttentionLayout(
      ...     query=(og.attention.Projection("q", axis=1),), key=(og.attention.Projection("k", axis=1),)
      ... )
      >>> tx = og.guard(optax.chain(optax.sgd(0.1), og.qk_clip(100.0, layers=layout)))
      >>> params = {"attention": {"q": jnp.ones((4, 2, 3)), "k": jnp.ones((4, 2, 3))}}
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> max_logits = {"attention": jnp.array([400.0, 50.0])}
      >>> params, state = og.apply_gradients(tx, grads, tx.init(params), params, max_logits=max_logits)
      >>> params["attention"]["q"][0, :, 0]
      Array([0.5, 1. ], dtype=float32)

    References:
      Kimi Team, "Kimi K2: open agentic intelligence", 2025, arXiv 2507.20534, algorithm 1 (QK-Clip). Deviations: heads
      that share a key are scaled exactly, where the paper's square roots are not; the shares of query and key are
      adjustable; maxima that are not positive scale nothing.

    See Also:
      `limit_step`, which keeps logits small without knowing about attention; `z_loss`, for the output logits.
    """
    name = "qk_clip"
    max_logit = validate.scalar_or_schedule(name, "max_logit", max_logit, low=0, open_low=True, infinite=True)
    layouts = check_layouts(name, layers)
    balance = validate.scalar(name, "balance", balance, low=0, high=1, static=True)
    validate.axis_name(name, axis_name)

    def init(params: optax.Params) -> QKClipState:
        params = as_params(name, params)
        factors: Any = jnp.zeros((), jnp.float32)  # for the placeholder without leaves of `optax.tree.map_params`
        max_logits = factors
        if jax.tree.leaves(params):
            found = find_layers(name, layouts, params)
            max_logits = {layer.path: jnp.zeros(layer.shape, jnp.float32) for layer in found}
            factors = _factors(found, jax.tree.map(jnp.ones_like, max_logits), balance)
        return QKClipState(
            qk_clip_step=jnp.zeros((), jnp.int32),
            qk_clip_factors=factors,
            qk_clip_threshold=jnp.zeros((), jnp.float32),
            qk_clip_max_logits=max_logits,
            qk_clip_clipped_heads=jnp.zeros((), jnp.int32),
            qk_clip_clipped_total=jnp.zeros((), jnp.int32),
            qk_clip_invalid_total=jnp.zeros((), jnp.int32),
        )

    def change(
        updates: PyTree, state: QKClipState, params: PyTree | None, extra: dict[str, Any]
    ) -> tuple[PyTree, QKClipState]:
        if not jax.tree.leaves(params):  # all of them are hidden, as by `optax.masked`
            return updates, state
        given = layers_of(name, max_logits_in(name, extra, axis_name), state.qk_clip_max_logits)
        threshold = value_at(max_logit, state.qk_clip_step).astype(jnp.float32)
        valid = {layer: jnp.isfinite(maxima) & (maxima > 0) for layer, maxima in given.items()}
        above = {layer: valid[layer] & (maxima > threshold) & (threshold > 0) for layer, maxima in given.items()}
        gammas = {
            layer: jnp.where(above[layer], jnp.maximum(threshold / jnp.where(above[layer], maxima, 1), _LEAST), 1)
            for layer, maxima in given.items()
        }
        clipped, invalid = _count(above), _count({layer: ~good for layer, good in valid.items()})
        new_state = QKClipState(
            qk_clip_step=next_step(state.qk_clip_step),
            qk_clip_factors=_factors(find_layers(name, layouts, params), gammas, balance),
            qk_clip_threshold=jnp.where(jnp.isfinite(threshold) & (threshold > 0), threshold, 0),
            qk_clip_max_logits={layer: jnp.where(jnp.isfinite(x), x, 0) for layer, x in given.items()},
            qk_clip_clipped_heads=clipped,
            qk_clip_clipped_total=count_if(clipped > 0, state.qk_clip_clipped_total),
            qk_clip_invalid_total=jnp.minimum(state.qk_clip_invalid_total, validate.INT32 - invalid) + invalid,
        )
        if FINISHED_LATER not in extra:
            updates = scaled_updates(updates, params, new_state.qk_clip_factors)
        return updates, new_state

    return transformation_with_extra(name, init, change, needs_params=True)


def _factors(found: list[Layer], gammas: dict[str, jax.Array], balance: float) -> dict[str, jax.Array]:
    """The factor of every leaf that holds queries or keys."""
    factors: dict[str, jax.Array] = {}
    for layer in found:
        gamma = gammas[layer.path]
        groups = gamma.reshape(*gamma.shape[:-1], layer.keys, -1)
        key = jnp.power(jnp.min(groups, axis=-1), 1 - balance)
        # Queries that have their keys alone get the power itself, and a gamma of 1 leaves 1.
        alone = layer.keys == gamma.shape[-1]
        query = jnp.power(gamma, balance) if alone else (groups / key[..., None]).reshape(gamma.shape)
        of_role = {"query": query, "key": key, "rotated_query": gamma}
        for name, parts in layer.leaves.items():
            for role, projection in parts:
                factor = _over_stack(layer, projection, layer.shapes[name], of_role[role])
                factors[name] = factors[name] * factor if name in factors else factor
    return factors


def _over_stack(layer: Layer, projection: Any, shape: tuple[int, ...], factors: jax.Array) -> jax.Array:
    def of_one(factors: jax.Array) -> jax.Array:
        return factor_of(projection, shape[layer.stacked :], factors)

    for _ in range(layer.stacked):
        of_one = jax.vmap(of_one)
    return of_one(factors)


def _count(flags: dict[str, jax.Array]) -> jax.Array:
    return sum((jnp.sum(each, dtype=jnp.int32) for each in flags.values()), jnp.zeros((), jnp.int32))

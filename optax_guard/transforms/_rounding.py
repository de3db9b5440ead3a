"""Stochastic rounding of 16-bit parameters, which rounding to nearest stops long before training has ended.

======================================================  ============================================================
You write                                               Result
======================================================  ============================================================
`chain(adamw(1e-4), stochastic_rounding(key=0))`        small updates move bfloat16 parameters, on average
`guard(chain(...))`, `stabilize(chain(...), ...)`       held steps change no bit; bounds come before the rounding
`tx.init(optax.tree.cast(params, jnp.float32))`         float32 moments beside the 16-bit parameters
======================================================  ============================================================

It goes to the end of the chain. Inside the wrappers of this library and in `apply_gradients` it takes effect where the
new parameters are written, after everything that may still change the update: bounds behind it in the chain,
`back_off`, the proximal steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._common.counters import next_step
from optax_guard._common.new_params import FINISHED_LATER, StochasticRoundingState, rounded_updates
from optax_guard._common.prng import raw_key
from optax_guard._common.transformation import transformation_with_extra
from optax_guard._common.tree import as_params, is_gradient, leaves_with_none, variable_free_names
from optax_guard._common.typing import PRNGKeyLike, PyTree

__all__ = ["stochastic_rounding"]


def stochastic_rounding(key: PRNGKeyLike = 0) -> optax.GradientTransformationExtraArgs:
    """Rounds new bfloat16 and float16 parameters up or down at random, so that updates are right on average.

    x = w + u                                    (in float32; u: the finished update)
    w <- up(x)    with probability  (x - down(x)) / (up(x) - down(x)),   else down(x)

    down(x) and up(x) are the neighbours of x in the dtype of the parameter. Rounding to nearest, which happens without
    this, returns w itself whenever |u| is below half the distance to the next number, 0.2 to 0.4 % of |w| in bfloat16.
    Adam's updates get there at learning rates below 1e-3, and with every decaying schedule: the parameters then stand
    still, and the loss with them.

    Guarantees:
      - The mean of the new parameter over keys is w + u (up to float32's own rounding).
      - A sum that the dtype holds is not changed: a zero update moves nothing, and an exact zero stays one.
      - The new parameter of a leaf is a function of w, u, the key, the step and the path of the leaf alone. It is the
        same after a restart and under any sharding, and replicas stay equal.
      - Leaves of all other dtypes are updated as without it, bit for bit.
      - A step that a wrapper holds changes no bit, and does not count.
      - Nothing scales or bounds the rounded update afterwards, inside the wrappers of this library (see the module).

    ==========================================  ====================================================================
    Case                                        Result
    ==========================================  ====================================================================
    NaN or Inf in w or u                        as without it
    the sum is beyond the dtype's range         as without it
    integer, `float0`, `None` leaf, or one      unchanged
    without an update
    `update` with `optax.apply_updates`         the same, if u and the gradient are float32; in 16 bits, the update
                                                that leads from w to the rounded sum is rounded itself, which changes
                                                the new number only where |w| was much larger than it is now
    moments in 16 bits                          not rounded here: b2 = 0.999 of a bfloat16 second moment is that moment,
                                                which therefore never falls. Initialise with float32 parameters
    inside `optax.masked`, `optax.partition`    rounds the leaves that it sees
    members of a `vmap`, shards of              the same random bits for each, which need not be independent
    a `shard_map`
    ==========================================  ====================================================================

    Args:
      key: an int, a PRNG key or raw uint32 key data. It need not differ from that of other transformations. Under
        `optax.inject_hyperparams`, list it in `static_args`.

    Returns:
      A transformation for the end of a chain; its `update` needs `params`.

    Raises:
      ValueError: `key` is not a key, or `params` are missing in `update`.

    Example:
      >>> import optax_guard as og
      >>> tx = og.guard(optax.chain(optax.sgd(1e-3), og.stochastic_rounding(key=0)))
      >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}  # the next smaller number is 0.996
      >>> state, grads = tx.init(params), {"w": jnp.ones(10_000, jnp.bfloat16)}
      >>> params, state = og.apply_gradients(tx, grads, state, params)
      >>> round(float(jnp.mean(params["w"].astype(jnp.float32))), 3)
      0.999

    References:
      Gupta et al., "Deep learning with limited numerical precision", 2015, arXiv 1502.02551, section 3.1. For bfloat16
      parameters: Zamirai et al., "Revisiting BFloat16 training", 2020, arXiv 2010.06192, section 4.

    See Also:
      `loss_scaling`, for float16 gradients. Optax has nothing of the kind; a float32 copy of the parameters, which a
      16-bit copy of them is made from in the model, is more exact and takes 4 bytes more per parameter.
    """
    name = "stochastic_rounding"
    data = raw_key(name, key)

    def init(params: optax.Params) -> StochasticRoundingState:
        params = as_params(name, params)
        leaves: Any = jnp.zeros((), jnp.float32)  # for the placeholder without leaves of `optax.tree.map_params`
        if jax.tree.leaves(params):
            pairs = zip(variable_free_names(params), leaves_with_none(params), strict=True)
            leaves = {path: () for path, leaf in pairs if is_gradient(leaf)}
        return StochasticRoundingState(
            rounding_key=jnp.copy(data), rounding_step=jnp.zeros((), jnp.int32), rounded_leaves=leaves
        )

    def change(
        updates: PyTree, state: StochasticRoundingState, params: PyTree | None, extra: dict[str, Any]
    ) -> tuple[PyTree, StochasticRoundingState]:
        if FINISHED_LATER not in extra and isinstance(state.rounded_leaves, dict):
            updates = rounded_updates(updates, params, state)
        return updates, state._replace(rounding_step=next_step(state.rounding_step))

    return transformation_with_extra(name, init, change, needs_params=True)

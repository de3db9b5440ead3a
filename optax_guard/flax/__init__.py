"""Flax training states that step in place, edits of a guard's state in nnx, attention that records its logits.

====================  ================================================================================================
Class                 In place of
====================  ================================================================================================
`TrainState`          `flax.training.train_state.TrainState`, for linen: `apply_gradients(grads=..., value=loss)`
`Optimizer`           `flax.nnx.Optimizer`, for nnx: `update(model, grads, value=loss)`
====================  ================================================================================================

=====================================  ===============================================================================
Function of an nnx optimizer           Use it
=====================================  ===============================================================================
`clear_halt(optimizer)`                to go on after a halt; also under `nnx.cached_partial`
`add_guard(optimizer, model, tx)`      to put a run in progress under a guard
`remove_guard(optimizer, model, tx)`   to remove the guard again
`inner_state(optimizer)`               to read or set the optimizer's own Variables, inside the guards
=====================================  ===============================================================================

=====================================  ===============================================================================
`attention_fn` of an attention layer   Records the largest attention logits for `og.collect_max_logits`
=====================================  ===============================================================================
`dot_product_attention`                as bounds that cost next to nothing: JAX's attention and its log-sum-exp
`record_max_logits(attention_fn)`      exactly, around any other: computes the products of queries and keys once more
=====================================  ===============================================================================

Flax's own classes work with everything in this library, with two drawbacks. Linen's `TrainState` does not pass the loss
on, so rules that judge by the loss never see it, and both classes write the updates out, which costs a guarded step a
copy of the parameters and the moments. Layout and checkpoints are those of Flax's classes, so a run can switch in
either direction. Equinox and plain JAX need no such class: `optax_guard.apply_gradients` takes their trees directly.

It needs Flax: `pip install flax`. `import optax_guard` does not import this module.
"""

try:
    import flax as _  # noqa: F401 (for the message, before the modules that need it)
except ImportError as error:
    raise ImportError("optax_guard.flax needs Flax: pip install flax") from error

from optax_guard.flax._attention import dot_product_attention, record_max_logits
from optax_guard.flax._optimizer import Optimizer, add_guard, clear_halt, inner_state, remove_guard
from optax_guard.flax._train_state import TrainState

__all__ = [
    "Optimizer",
    "TrainState",
    "add_guard",
    "clear_halt",
    "dot_product_attention",
    "inner_state",
    "record_max_logits",
    "remove_guard",
]

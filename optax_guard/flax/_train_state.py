"""Linen's training state, whose step takes the loss."""

from collections.abc import Mapping
from typing import Any, Self

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from optax_guard._common import validate
from optax_guard._common.tree import checked
from optax_guard._common.typing import PyTree
from optax_guard._step.act import apply_gradients
from optax_guard.state._held import last_step_held, select_old

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """Flax's linen `TrainState`, whose `apply_gradients` takes the loss.

    params, opt_state <- optax_guard.apply_gradients(tx, grads, opt_state, params, value=value, **extra_args)

    Guarantees:
      - Fields, `create`, `replace` and checkpoints are those of `flax.training.train_state.TrainState`.
      - A step that a guard holds leaves `params` and the inner state bit-for-bit unchanged. `step` still counts it, as
        the number of batches seen; `guard/skipped_total` in `metrics(state.opt_state)` counts the held steps.
      - On such a step, all other fields that `apply_gradients` replaces (running statistics, averages, keys) are
        unchanged too, and so are the fp8 scales that take their gradient's value. `keep_if_held` says what counts as
        held. A rewind cannot restore these fields (docs/state/held.md).
      - Under `jax.jit(..., donate_argnums=0)` a guarded step runs in place.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_guard as og
      >>> from optax_guard.flax import TrainState
      >>> model, x = nn.Dense(1), jnp.ones((4, 2))
      >>> tx = og.guard(optax.adam(1e-3), og.clip_by_global_norm(1.0))
      >>> state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=tx)
      >>> @jax.jit
      ... def step(state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(state.apply_fn(p, x))))(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> state, loss = step(state, x)
      >>> int(state.step), bool(og.flight_log(state.opt_state)["value"][0] == loss)
      (1, True)

    See Also:
      `flax.training.train_state.TrainState`, whose `apply_gradients(**kwargs)` also replaces fields on held steps and
      passes nothing on to `tx`.
    """

    def apply_gradients(
        self, *, grads: PyTree, value: Any = None, extra_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        """Takes one optimizer step.

        Args:
          grads: gradients in the structure of `params`.
          value: the loss of this step, passed to `tx` as `value`; None passes nothing.
          extra_args: further arguments for `tx.update`, by name (such as `weight` for `accumulate`).
          **kwargs: fields to replace, as in Flax (`batch_stats=...`), unless the step is held.

        Returns:
          The new state, with `step` one higher.

        Raises:
          ValueError: the structure of `grads` differs from that of `params` (the message names the leaf), `value` is in
            `extra_args`, or a field is replaced by one of another structure, shape or dtype.
        """
        if not (extra_args is None or isinstance(extra_args, Mapping)):
            got = validate.shown(extra_args)
            raise ValueError(f"TrainState.apply_gradients: `extra_args` must be a dict of names to values; got {got}.")
        extra = dict(extra_args or {})
        if "value" in extra:
            raise ValueError("TrainState.apply_gradients: pass the loss as `value=`, not in `extra_args`.")
        if value is not None:
            extra["value"] = value
        # Flax's convention for the scales of fp8 layers: they are not optimized but take their gradient's value.
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        inner_grads, inner_params = (grads["params"], self.params["params"]) if overwrites else (grads, self.params)
        inner_grads, inner_params = checked("TrainState.apply_gradients", inner_grads, inner_params, called="grads")
        params, opt_state = apply_gradients(self.tx, inner_grads, self.opt_state, inner_params, **extra)
        replaced = dict(kwargs)
        if overwrites:
            replaced[OVERWRITE_WITH_GRADIENT] = grads[OVERWRITE_WITH_GRADIENT]
        held = last_step_held(opt_state) if replaced else None
        if held is not None:
            before = {name: getattr(self, name) for name in kwargs}
            if overwrites:
                before[OVERWRITE_WITH_GRADIENT] = self.params[OVERWRITE_WITH_GRADIENT]
            replaced = select_old("TrainState.apply_gradients", held, replaced, before)
        if overwrites:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: replaced.pop(OVERWRITE_WITH_GRADIENT)}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **replaced)

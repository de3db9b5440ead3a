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

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import jax
import numpy as np
import optax

from optax_guard import _halt
from optax_guard._common import validate
from optax_guard._common.state_check import is_single_leaf
from optax_guard._common.tree import checked, difference, find_states
from optax_guard._common.typing import PyTree
from optax_guard._guard import GuardState
from optax_guard._step.act import apply_gradients, as_transformation
from optax_guard.attention import max_attention_logits
from optax_guard.attention._logits import fused, keys_of, queries_of
from optax_guard.state import _migration
from optax_guard.state._held import last_step_held, select_old

try:
    from flax import linen, nnx
    from flax.linen.dtypes import promote_dtype
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError("optax_guard.flax needs Flax: pip install flax") from error

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


class Optimizer(nnx.Optimizer):
    """Flax's `nnx.Optimizer`, whose `update` does not write the updates out.

    params, opt_state <- optax_guard.apply_gradients(tx, grads, opt_state, params, **extra)

    Guarantees:
      - Constructor, attributes and checkpoints are those of `flax.nnx.Optimizer`.
      - A step that a guard holds leaves the model's parameters and the inner state bit-for-bit unchanged; `step` still
        counts it.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> import optax_guard as og
      >>> from optax_guard.flax import Optimizer
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, og.guard(optax.adam(1e-3), og.clip_by_global_norm(1.0)), wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x))))(model)
      ...     optimizer.update(model, grads, value=loss)
      ...     return loss
      >>> loss = step(model, optimizer, jnp.ones((4, 2)))
      >>> bool(og.flight_log(optimizer.opt_state)["value"][0] == loss)
      True

    See Also:
      `flax.nnx.Optimizer`, which also passes the loss on, but makes and returns the updates.
    """

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]  # Flax returns the updates, which are not made here
        self, model: Any, grads: Any, /, **extra: Any
    ) -> None:
        """Updates the model's parameters and the optimizer's state in place.

        Args:
          model: the module whose variables selected by `wrt` are trained.
          grads: the gradients from `nnx.grad` or `nnx.value_and_grad`, with the same `wrt`.
          **extra: passed to `tx.update`; the loss is called `value`.

        Raises:
          ValueError: the structure of `grads` differs from that of the parameters (the message names the leaf).
        """
        name = "Optimizer.update"
        params = _variables(name, "model", model, self)
        pure_grads, params = checked(name, _variables(name, "grads", grads, self), params, called="grads")
        state, pure_extra = nnx.as_pure(self.opt_state), nnx.as_pure(extra)
        params, state = apply_gradients(self.tx, pure_grads, state, params, **pure_extra)
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state, graph=self.graph))
        self.step[...] += 1


def clear_halt(optimizer: nnx.Optimizer) -> None:
    """Clears a halt as `optax_guard.clear_halt` does, in the optimizer's own Variables.

    `optimizer.opt_state = og.clear_halt(optimizer.opt_state)` would replace the Variables. A step under
    `nnx.cached_partial` keeps the old ones, so it would go on holding every step while the optimizer looks healthy.

    Args:
      optimizer: an `nnx.Optimizer`, Flax's or this module's.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, og.guard(optax.sgd(0.1), halt_after=1), wrt=nnx.Param)
      >>> optimizer.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model)))
      >>> clear_halt(optimizer)
      >>> og.raise_if_halted(optimizer.opt_state)
    """
    _check_optimizer("clear_halt", optimizer)
    cleared = _halt.clear_halt(nnx.as_pure(optimizer.opt_state))
    nnx.update(optimizer.opt_state, nnx.state(cleared, graph=optimizer.graph))


def add_guard(optimizer: nnx.Optimizer, model: Any, tx: optax.GradientTransformation) -> None:
    """Puts a guard around the optimizer of a run in progress, as `optax_guard.add_guard_state` does.

    Guarantees:
      - The optimizer's Variables (moments, counters) stay the same objects with the same bits.
      - The guard's own state starts afresh.

    The graph of the optimizer changes: rebuild any step made by `nnx.cached_partial` afterwards, since the old one
    would go on without the guard.

    Args:
      optimizer: an `nnx.Optimizer`, Flax's or this module's.
      model: the module that it trains.
      tx: a transformation with a `guard` in it; it becomes `optimizer.tx`.

    Raises:
      ValueError: as `optax_guard.add_guard_state`.

    Example:
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
      >>> add_guard(optimizer, model, og.guard(optax.adam(0.1)))
      >>> int(og.metrics(optimizer.opt_state)["guard/step"])
      0
    """
    name = "add_guard"
    _check_optimizer(name, optimizer)
    params = _variables(name, "model", model, optimizer)
    state = _migration.put_into_guard(name, tx, params, nnx.as_pure(optimizer.opt_state))
    _put(name, optimizer, model, tx, state)


def remove_guard(optimizer: nnx.Optimizer, model: Any, tx: optax.GradientTransformation) -> None:
    """Removes every guard from the optimizer, as `optax_guard.remove_guard_state` does.

    Guarantees:
      - The optimizer's Variables (moments, counters) stay the same objects with the same bits.

    The graph of the optimizer changes: rebuild any step made by `nnx.cached_partial` afterwards, since the old one
    would go on with the guard.

    Args:
      optimizer: an `nnx.Optimizer` with a guard, Flax's or this module's.
      model: the module that it trains.
      tx: the same transformation without guards; it becomes `optimizer.tx`.

    Raises:
      ValueError: there is no guard in the optimizer, or `tx` is another transformation.

    Example:
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, og.guard(optax.adam(0.1)), wrt=nnx.Param)
      >>> remove_guard(optimizer, model, optax.adam(0.1))
      >>> og.metrics(optimizer.opt_state)
      {}
    """
    name = "remove_guard"
    _check_guarded(name, optimizer)
    _variables(name, "model", model, optimizer)
    as_transformation(name, tx, "tx")
    _put(name, optimizer, model, tx, _migration.remove_guard_state(nnx.as_pure(optimizer.opt_state)))


def inner_state(optimizer: nnx.Optimizer) -> Any:
    """The optimizer's state without guards, in its own Variables: writing into them changes the optimizer.

    `optax_guard.remove_guard_state(optimizer.opt_state)` returns a copy instead.

    Args:
      optimizer: an `nnx.Optimizer` with a guard, Flax's or this module's.

    Returns:
      The state of the transformation without guards.

    Raises:
      ValueError: there is no guard in the optimizer.

    Example:
      >>> import optax_guard as og
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = og.guard(optax.inject_hyperparams(optax.sgd)(0.1))
      >>> optimizer = Optimizer(model, tx, wrt=nnx.Param)
      >>> inner_state(optimizer).hyperparams["learning_rate"][...] = 0.01
      >>> round(float(optimizer.opt_state.guarded_state.hyperparams["learning_rate"]), 3)
      0.01
    """
    _check_guarded("inner_state", optimizer)
    return _migration.without_guards(optimizer.opt_state, keep=nnx.Variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


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


def _check_optimizer(function: str, optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise ValueError(f"{function}: `optimizer` must be an nnx.Optimizer; got {validate.shown(optimizer)}.")


def _check_guarded(function: str, optimizer: Any) -> None:
    _check_optimizer(function, optimizer)
    if not find_states(optimizer.opt_state, GuardState):
        raise ValueError(f"{function}: there is no guard in this `optimizer`.")


def _variables(function: str, argument: str, model: Any, optimizer: nnx.Optimizer) -> PyTree:
    """The part of a model that the optimizer trains, or the gradients of that part."""
    state = None if is_single_leaf(model) else nnx.as_pure(nnx.state(model, optimizer.wrt, graph=optimizer.graph))
    if not jax.tree.leaves(state):
        raise ValueError(
            f"{function}: `{argument}` must hold Variables that the optimizer selects by `wrt`; got "
            f"{validate.shown(model)}."
        )
    return state


def _put(function: str, optimizer: nnx.Optimizer, model: Any, tx: optax.GradientTransformation, state: Any) -> None:
    """Gives the optimizer a new `tx` and `state`, whose arrays stay in their present Variables."""
    fresh = nnx.Optimizer(model, tx, wrt=optimizer.wrt, graph=optimizer.graph).opt_state
    wanted, got = (
        [(path, np.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (nnx.as_pure(fresh), state)
    )
    if wanted != got:
        found = difference("optimizer", state, "tx", nnx.as_pure(fresh), shapes=True)
        raise ValueError(f"{function}: the state of `tx` differs from that of the optimizer: {found}")
    owners = {id(each.get_raw_value()): each for each in jax.tree.leaves(optimizer.opt_state, is_leaf=_is_variable)}
    nnx.update(fresh, nnx.state(state, graph=optimizer.graph))
    optimizer.tx = tx
    optimizer.opt_state = nnx.data(
        jax.tree.map(lambda new, leaf: owners.get(id(leaf), new), fresh, state, is_leaf=_is_variable)
    )

"""The rows: optimizer steps of this library, of Optax beside them, and two forms that look alike and are not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_guard as og

__all__ = [
    "BARE",
    "STEPS",
    "Step",
    "act_first",
    "hold_first",
    "parameters",
    "plain",
    "state_first",
    "step_arguments",
]

PyTree = Any
Function = Callable[..., tuple[PyTree, PyTree]]  # (params, state, grads, value) -> (params, state)
EVERY = 4  # micro-batches a step
_HEADS = 8
BARE = "bare `optax.adamw`"


class Step(NamedTuple):
    """One optimizer step, compiled with parameters and state donated."""

    name: str
    tx: Callable[[], optax.GradientTransformation]
    take: Callable[[optax.GradientTransformation], Function]
    call: int = 3  # which call is counted: neither the first one nor one in which something is due
    state_first: bool = False  # the order of the first two arguments


def parameters(width: int, layers: int = 2) -> PyTree:
    """The shapes of transformer layers, six leaves each: 25 M parameters at a width of 1024."""
    shapes = {
        "attention": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    layer = shapes | {"bias": (width,), "scale": (width,)}
    return {
        f"layer_{i}": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in layer.items()}
        for i in range(layers)
    }


def step_arguments(step: Step, params: PyTree) -> tuple[PyTree, ...]:
    """What the step is called with, as shapes."""
    state = jax.eval_shape(step.tx().init, params)
    first = (state, params) if step.state_first else (params, state)
    return (*first, params, jax.ShapeDtypeStruct((), jnp.float32))


def fast(tx: optax.GradientTransformation) -> Function:
    """Through `apply_gradients`."""

    def step(params: PyTree, state: PyTree, grads: PyTree, value: jax.Array) -> tuple[PyTree, PyTree]:
        del value
        return og.apply_gradients(tx, grads, state, params)

    return step


def fast_with_value(tx: optax.GradientTransformation) -> Function:
    """The same, with the loss."""
    return lambda params, state, grads, value: og.apply_gradients(tx, grads, state, params, value=value)


def fast_with_max_logits(tx: optax.GradientTransformation) -> Function:
    """The same, with attention logits that are on both sides of a threshold."""

    def step(params: PyTree, state: PyTree, grads: PyTree, value: jax.Array) -> tuple[PyTree, PyTree]:
        maxima = value + 20.0 * jnp.arange(_HEADS)
        return og.apply_gradients(tx, grads, state, params, max_logits=dict.fromkeys(params, maxima))

    return step


def plain(tx: optax.GradientTransformation) -> Function:
    """Through `update` and `optax.apply_updates`."""

    def step(params: PyTree, state: PyTree, grads: PyTree, value: jax.Array) -> tuple[PyTree, PyTree]:
        del value
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def plain_with_value(tx: optax.GradientTransformation) -> Function:
    """The same, with the loss."""

    def step(params: PyTree, state: PyTree, grads: PyTree, value: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


def act_first(tx: optax.GradientTransformation) -> Function:
    """A guard written by hand: `lax.cond(finite, act, hold)`."""

    def step(params: PyTree, state: PyTree, grads: PyTree, value: jax.Array) -> tuple[PyTree, PyTree]:
        finite = jnp.isfinite(optax.tree.norm(grads))
        return lax.cond(finite, lambda: plain(tx)(params, state, grads, value), lambda: (params, state))

    return step


def hold_first(tx: optax.GradientTransformation) -> Function:
    """The same with the branches the other way round: `lax.cond(trouble, hold, act)`."""

    def step(params: PyTree, state: PyTree, grads: PyTree, value: jax.Array) -> tuple[PyTree, PyTree]:
        trouble = ~jnp.isfinite(optax.tree.norm(grads))
        return lax.cond(trouble, lambda: (params, state), lambda: plain(tx)(params, state, grads, value))

    return step


def state_first(tx: optax.GradientTransformation) -> Function:
    """The state before the parameters in the arguments, but after them in the results."""
    return lambda state, params, grads, value: plain(tx)(params, state, grads, value)


def _adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3)


def _guarded(inner: optax.GradientTransformation, *rules: og.Rule, **options: Any) -> optax.GradientTransformation:
    return og.guard(inner, og.clip_by_global_norm(1.0), *rules, **options)


def _logit_clipped() -> optax.GradientTransformation:
    """The `attention` leaves hold queries, keys and values side by side."""
    query, key = (
        (og.attention.Projection("attention", axis=2, split={1: (3, _HEADS, -1)}, part=np.s_[:, side]),)
        for side in (0, 1)
    )
    return optax.chain(_adamw(), og.qk_clip(100.0, layers=og.attention.AttentionLayout(query, key)))


def _clipped() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), _adamw())


def _every_rule() -> optax.GradientTransformation:
    return _guarded(
        _adamw(),
        og.clip_by_leaf_norm(1e9),
        og.clip_by_norm_history(),
        og.clip_by_median_norm(),
        og.zclip(),
        og.autoclip(),
        og.adagc(),
        og.skip_spikes(),
        og.skip_nonfinite(),
        og.skip_large(1e8),
        og.record_leaves(256),
    )


STEPS = (
    Step(BARE, _adamw, plain),
    Step("`guard(adamw, clip)`", lambda: _guarded(_adamw()), fast),
    Step("`stabilize(adamw)` with `value=`", lambda: og.stabilize(_adamw()), fast_with_value),
    Step(
        "`stabilize(adamw, max_change=None)` with `value=`",
        lambda: og.stabilize(_adamw(), max_change=None),
        fast_with_value,
    ),
    Step("`optax.chain(clip, adamw)`", _clipped, plain),
    Step("`optax.apply_if_finite(chain(clip, adamw))`", lambda: optax.apply_if_finite(_clipped(), 5), plain),
    Step("`guard(adamw, clip)` through `update`", lambda: _guarded(_adamw()), plain),
    Step(
        "`stabilize(adamw, max_change=None)` with `value=` through `update`",
        lambda: og.stabilize(_adamw(), max_change=None),
        plain_with_value,
    ),
    Step("`guard(chain(adamw, limit_step), clip)`", lambda: _guarded(optax.chain(_adamw(), og.limit_step(0.01))), fast),
    Step(
        "`guard(chain(noise_injection, adamw), clip)`",
        lambda: _guarded(optax.chain(og.noise_injection(1e-4, key=0), _adamw())),
        fast,
    ),
    Step("`chain(optax.add_noise, adamw)`", lambda: optax.chain(optax.add_noise(1e-4, 0.55, key=0), _adamw()), plain),
    Step(
        "`accumulate(guard(adamw, clip), 4)`, a call between", lambda: og.accumulate(_guarded(_adamw()), EVERY), fast, 2
    ),
    Step(
        "`accumulate(guard(adamw, clip), 4)`, the emitting call",
        lambda: og.accumulate(_guarded(_adamw()), EVERY),
        fast,
        4,
    ),
    Step(
        '`accumulate(..., on_nonfinite="propagate")`, a call between',
        lambda: og.accumulate(_guarded(_adamw()), EVERY, on_nonfinite="propagate"),
        fast,
        2,
    ),
    Step(
        '`accumulate(..., on_nonfinite="propagate")`, the emitting call',
        lambda: og.accumulate(_guarded(_adamw()), EVERY, on_nonfinite="propagate"),
        fast,
        4,
    ),
    Step(
        "`optax.MultiSteps(chain(clip, adamw), 4)`, every call",
        lambda: optax.MultiSteps(_clipped(), EVERY).gradient_transformation(),
        plain,
        4,
    ),
    Step(
        "guard with `reset_moments`, `back_off` and `rewind`, a quiet step",
        lambda: _guarded(_adamw(), recovery=(og.reset_moments(), og.back_off(), og.rewind())),
        fast_with_value,
    ),
    Step("`loss_scaling(guard(adamw, clip))`", lambda: og.loss_scaling(_guarded(_adamw())), fast),
    Step(
        "`guard(proximal_l1(adamw), clip)`", lambda: _guarded(og.proximal_l1(_adamw(), 1e-5, learning_rate=1e-3)), fast
    ),
    Step("`guard(chain(adamw, qk_clip), clip)`", lambda: _guarded(_logit_clipped()), fast_with_max_logits),
    Step("`guard(adamw, clip, record_leaves(256))`", lambda: _guarded(_adamw(), og.record_leaves(256)), fast),
    Step("`guard(adamw, ...)` with every rule", _every_rule, fast_with_value),
    Step("bare `optax.contrib.muon`", lambda: optax.contrib.muon(1e-3), plain),
    Step("`guard(muon, clip)`", lambda: _guarded(optax.contrib.muon(1e-3)), fast),
    Step("bare `optax.adafactor`", lambda: optax.adafactor(1e-3), plain),
    Step("`guard(adafactor, clip)`", lambda: _guarded(optax.adafactor(1e-3)), fast),
    Step("bare `optax.lion`", lambda: optax.lion(1e-3), plain),
    Step("`guard(lion, clip)`", lambda: _guarded(optax.lion(1e-3)), fast),
    Step("by hand: `lax.cond(finite, act, hold)`", _adamw, act_first),
    Step("by hand: `lax.cond(trouble, hold, act)`", _adamw, hold_first),
    Step("bare, taking (state, params), returning (params, state)", _adamw, state_first, state_first=True),
)

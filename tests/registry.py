"""Every public transformation with small arguments, for the conformance suite; and why the other names are none."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_guard as og

NOT_TRANSFORMATIONS = {
    "AccumulateState": "a state",
    "ClipState": "a state",
    "FastTransformation": "the type of `guard(...)` and `accumulate(...)`",
    "FlightRecorder": "a part of GuardState",
    "GradientStatistics": "what a rule judges from",
    "GuardState": "a state",
    "LossScalingState": "a state",
    "NoiseState": "a state",
    "PenaltyState": "a state",
    "Rule": "the type of a rule",
    "TrainingHalted": "an exception",
    "Verdict": "what a rule answers",
    "accumulate_gradients": "makes a gradient function",
    "apply_gradients": "takes a step with a transformation",
    "clear_halt": "edits a state",
    "flight_log": "reads a state",
    "flush": "takes a step with what `accumulate` holds",
    "global_norm": "a function of a tree",
    "gradient_statistics": "a function of a tree",
    "has_updated": "reads a state",
    "leaf_names": "a function of a tree",
    "metrics": "reads a state",
    "raise_if_halted": "reads a state",
    "scale_loss": "a function of a state and a loss",
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A public transformation: `factory(**arguments)`."""

    name: str  # in `optax_guard.__all__`
    variant: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    arguments: dict[str, Any] = field(default_factory=dict)
    static_args: tuple[str, ...] = ()  # what its docstring asks for under `optax.inject_hyperparams`
    needs_params: bool = False
    wraps: bool = False  # takes an inner optimizer, as the argument `inner`
    strict: bool = True  # works under strict promotion; stock Adam inside does not
    parameter_copies: int = 0  # trees in the parameters' shapes in its state

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def is_rule(self) -> bool:
        return isinstance(self.make(), og.Rule)

    @property
    def takes_axis_name(self) -> bool:
        return "axis_name" in inspect.signature(self.factory).parameters

    def make(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.arguments, **changes})

    def make_strict(self) -> optax.GradientTransformationExtraArgs:
        """The same around an optimizer that is itself conforming: every dtype, passengers, strict promotion."""
        return self.make(inner=momentum) if self.wraps else self.make()

    def promotion(self) -> AbstractContextManager:
        return jax.numpy_dtype_promotion("strict" if self.strict else "standard")


def adamw(learning_rate: Any) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=0.01)


def momentum(learning_rate: Any) -> optax.GradientTransformation:
    """SGD with momentum that keeps every dtype and lets leaves without a gradient pass."""

    def moves(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.inexact)

    def blend(trace: Any, gradient: Any) -> Any:
        return jnp.asarray(0.5, trace.dtype) * trace + gradient if moves(gradient) else trace

    def step(trace: Any, gradient: Any) -> Any:
        return -jnp.asarray(learning_rate, trace.dtype) * trace if moves(gradient) else gradient

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.TraceState]:
        trace = jax.tree.map(blend, state.trace, updates)
        return jax.tree.map(step, trace, updates), optax.TraceState(trace=trace)

    return optax.GradientTransformation(init, update)


def guarded(learning_rate=0.1, max_norm=1.0, inner=momentum, check_updates=False, axis_name=None):
    rules = og.clip_by_global_norm(max_norm, axis_name=axis_name), og.skip_large(100.0, axis_name=axis_name)
    return og.guard(inner(learning_rate), *rules, history=4, check_updates=check_updates, axis_name=axis_name)


def accumulated(learning_rate=0.1, inner=momentum, every=2, axis_name=None):
    return og.accumulate(inner(learning_rate), every, axis_name=axis_name)


def accumulated_guard(learning_rate=0.1, max_norm=1.0, inner=momentum, every=2, axis_name=None):
    tx = og.guard(inner(learning_rate), og.clip_by_global_norm(max_norm, axis_name=axis_name), axis_name=axis_name)
    return og.accumulate(tx, every, axis_name=axis_name)


def loss_scaled(learning_rate=0.1, inner=momentum, axis_name=None):
    return og.loss_scaling(inner(learning_rate), init=4.0, growth_interval=2, axis_name=axis_name)


def loss_scaled_accumulation(learning_rate=0.1, inner=momentum, axis_name=None):
    tx = og.accumulate(og.guard(inner(learning_rate), axis_name=axis_name), 2, axis_name=axis_name)
    return og.loss_scaling(tx, init=4.0, growth_interval=2, axis_name=axis_name)


def halving_rule(threshold=1.0, axis_name=None):
    """A rule with a memory: halves a gradient whose norm exceeds the largest seen so far by `threshold`."""

    def init(params: Any) -> dict[str, jax.Array]:
        return {"largest_norm": jnp.zeros((), jnp.float32)}

    def judge(statistics: og.GradientStatistics, state: Any, params: Any = None, **extra: Any):
        norm = statistics.norm.astype(jnp.float32)
        scale = jnp.where(norm > state["largest_norm"] + threshold, 0.5, 1.0)
        largest = jnp.where(jnp.isfinite(norm), jnp.maximum(norm, state["largest_norm"]), state["largest_norm"])
        return og.Verdict(scale=scale, skip=jnp.zeros((), bool)), {"largest_norm": largest}

    return og.rule(init, judge, axis_name=axis_name)


def schedule(step: jax.Array) -> jax.Array:
    return 0.5 / (1.0 + step.astype(jnp.float32))


GUARD_STATIC = ("inner", "check_updates", "axis_name")
ACCUMULATE_STATIC = ("inner", "every", "axis_name")
LOSS_SCALING_STATIC = ("inner", "axis_name")

ENTRIES = (
    Entry("clip_by_global_norm", "", og.clip_by_global_norm, {"max_norm": 1.0}),
    Entry("clip_by_global_norm", "schedule", og.clip_by_global_norm, {"max_norm": schedule}),
    Entry("clip_by_leaf_norm", "", og.clip_by_leaf_norm, {"max_norm": 1.0}),
    Entry("clip_by_value", "", og.clip_by_value, {"max_value": 0.5}),
    Entry("adaptive_grad_clip", "", og.adaptive_grad_clip, {"clipping": 0.1}, ("axis",), needs_params=True),
    Entry("skip_nonfinite", "", og.skip_nonfinite),
    Entry("skip_large", "", og.skip_large, {"max_norm": 10.0}),
    Entry("rule", "remembering", halving_rule, {"threshold": 1.0}),
    Entry("l1_penalty", "", og.l1_penalty, {"strength": 0.1}, ("mask",), needs_params=True),
    Entry("l1_penalty", "schedule", og.l1_penalty, {"strength": schedule}, ("mask",), needs_params=True),
    Entry("noise_injection", "", og.noise_injection, {"key": 7}, ("key", "relative_to", "mask")),
    Entry(
        "noise_injection",
        "relative",
        og.noise_injection,
        {"eta": schedule, "max_norm": 0.5, "relative_to": "gradient"},
        ("key", "relative_to", "mask"),
    ),
    Entry("guard", "", guarded, {}, GUARD_STATIC, wraps=True, parameter_copies=1),
    Entry(
        "guard",
        "adamw",
        guarded,
        {"inner": adamw},
        GUARD_STATIC,
        needs_params=True,
        wraps=True,
        strict=False,
        parameter_copies=2,
    ),
    Entry("guard", "check_updates", guarded, {"check_updates": True}, GUARD_STATIC, wraps=True, parameter_copies=1),
    Entry("accumulate", "", accumulated, {}, ACCUMULATE_STATIC, wraps=True, parameter_copies=2),
    Entry(
        "accumulate",
        "guard_adamw",
        accumulated_guard,
        {"inner": adamw},
        ACCUMULATE_STATIC,
        needs_params=True,
        wraps=True,
        strict=False,
        parameter_copies=3,
    ),
    Entry("loss_scaling", "", loss_scaled, {}, LOSS_SCALING_STATIC, wraps=True, parameter_copies=1),
    Entry(
        "loss_scaling", "accumulate", loss_scaled_accumulation, {}, LOSS_SCALING_STATIC, wraps=True, parameter_copies=2
    ),
)

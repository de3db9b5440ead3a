"""Every public transformation with small arguments, for the conformance suite; and why the other names are none."""

import glob
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard._common.tree import is_gradient, wider_dtype

NOT_TRANSFORMATIONS = {
    "accumulation": "a folder",
    "attention": "a folder",
    "attention_with_max_logits": "computes attention",
    "equinox_attention": "describes which leaves are attention's",
    "linen_attention": "describes which leaves are attention's",
    "nnx_attention": "describes which leaves are attention's",
    "transformer_attention": "describes which leaves are attention's",
    "collect_max_logits": "reads a model's intermediates",
    "max_attention_logits": "a function of queries and keys",
    "max_attention_logits_from_lse": "a function of a log-sum-exp",
    "z_loss": "a loss",
    "published": "a module, whose functions are registered too",
    "recovery": "a folder",
    "rules": "a folder",
    "state": "a folder",
    "transforms": "a folder",
    "update_metrics": "a function of parameters before and after a step",
    "Rule": "the type of a rule",
    "TrainingHalted": "an exception",
    "Verdict": "what a rule answers",
    "accumulate_gradients": "makes a gradient function",
    "apply_gradients": "takes a step with a transformation",
    "clear_halt": "edits a state",
    "event_logger": "reads a state in the training loop",
    "find_inner_state": "looks for a state in another",
    "flight_log": "reads a state",
    "flush": "takes a step with what `accumulate` holds",
    "global_norm": "a function of a tree",
    "gradient_statistics": "a function of a tree",
    "has_updated": "reads a state",
    "keep_if_held": "selects by a state",
    "leaf_axes": "makes an `axis_name`",
    "leaf_log": "reads a state",
    "leaf_names": "a function of a tree",
    "metrics": "reads a state",
    "perturb_weights": "wraps a loss",
    "raise_if_halted": "reads a state",
    "sparsity": "a function of a tree",
    "remove_guard_state": "takes a state apart",
    "reset_moments": "an argument of `guard`",
    "rewind": "an argument of `guard`",
    "add_guard_state": "puts a state together",
    "scale_loss": "a function of a state and a loss",
}

# Every public name; of a method as its authors wrote it the name that its messages begin with.
PUBLIC = {
    **{name: getattr(og, name) for name in og.__all__},
    **{
        f"published.{name}": thing
        for name in og.published.__all__
        if inspect.isfunction(thing := getattr(og.published, name))
    },
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A public transformation: `factory(**arguments)`."""

    name: str  # as in `PUBLIC`
    variant: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    arguments: dict[str, Any] = field(default_factory=dict)
    static_args: tuple[str, ...] = ()  # what its docstring asks for under `optax.inject_hyperparams`
    needs_params: bool = False
    wraps: bool = False  # takes an inner optimizer, as the argument `inner`
    holds: bool = False  # a wrapper that lets no number that is not finite into its state
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


def schedule(step: jax.Array) -> jax.Array:
    return 0.5 / (1.0 + step.astype(jnp.float32))


def guarded(learning_rate=0.1, max_norm=1.0, inner=momentum, check_updates=False, axis_name=None):
    rules = og.clip_by_global_norm(max_norm, axis_name=axis_name), og.skip_large(100.0, axis_name=axis_name)
    return og.guard(inner(learning_rate), *rules, recorder_rows=4, check_updates=check_updates, axis_name=axis_name)


def recovering(learning_rate=0.1, max_norm=1.0, inner=momentum, keep=1, axis_name=None):
    rungs = og.reset_moments(after=2, check_every=2), og.back_off(diverged=2.0), og.rewind(every=2, keep=keep, after=3)
    rule = og.clip_by_global_norm(max_norm, axis_name=axis_name)
    return og.guard(inner(learning_rate), rule, recorder_rows=4, recovery=rungs, axis_name=axis_name)


def stabilized(learning_rate=0.1, max_norm=1.0, inner=momentum, max_change="gradual", axis_name=None):
    return og.stabilize(
        inner(learning_rate), max_norm=max_norm, max_change=max_change, recorder_rows=4, axis_name=axis_name
    )


def accumulated(learning_rate=0.1, inner=momentum, every=2, axis_name=None):
    return og.accumulate(inner(learning_rate), every, axis_name=axis_name)


def accumulated_guard(learning_rate=0.1, max_norm=1.0, inner=momentum, every=2, axis_name=None):
    tx = og.guard(inner(learning_rate), og.clip_by_global_norm(max_norm, axis_name=axis_name), axis_name=axis_name)
    return og.accumulate(tx, every, axis_name=axis_name)


def proximal_l1(learning_rate=0.1, strength=0.05, inner=momentum):
    return og.proximal_l1(inner(learning_rate), strength, learning_rate=learning_rate, momentum=0.5)


def proximal_elastic_net(learning_rate=0.1, l1=0.05, l2=schedule, inner=momentum):
    return og.proximal_elastic_net(inner(learning_rate), l1, l2, learning_rate=learning_rate, momentum=0.5)


def proximal_group_lasso(learning_rate=0.1, strength=0.05, inner=momentum):
    return og.proximal_group_lasso(inner(learning_rate), strength, learning_rate=learning_rate, momentum=0.5)


def loss_scaled(learning_rate=0.1, inner=momentum, axis_name=None):
    return og.loss_scaling(inner(learning_rate), init=4.0, growth_interval=2, axis_name=axis_name)


def loss_scaled_accumulation(learning_rate=0.1, inner=momentum, axis_name=None):
    tx = og.accumulate(og.guard(inner(learning_rate), axis_name=axis_name), 2, axis_name=axis_name)
    return og.loss_scaling(tx, init=4.0, growth_interval=2, axis_name=axis_name)


def halving_rule(threshold=1.0, axis_name=None):
    """A rule with a memory: halves a gradient whose norm exceeds the largest seen so far by `threshold`."""

    def init(params: Any) -> dict[str, jax.Array]:
        return {"largest_norm": jnp.zeros((), jnp.float32)}

    def judge(statistics: og.rules.GradientStatistics, state: Any, params: Any = None, **extra: Any):
        norm = statistics.norm.astype(jnp.float32)
        scale = jnp.where(norm > state["largest_norm"] + threshold, 0.5, 1.0)
        largest = jnp.where(jnp.isfinite(norm), jnp.maximum(norm, state["largest_norm"]), state["largest_norm"])
        return og.Verdict(scale=scale, skip=jnp.zeros((), bool)), {"largest_norm": largest}

    return og.rule(init, judge, axis_name=axis_name)


def masked_clip(max_norm=1.0, axis_name=None):
    """A clip of all leaves that are no vectors."""

    def no_vectors(params: Any) -> Any:
        return jax.tree.map(lambda leaf: len(leaf.shape) != 1, params)

    return og.masked_rule(og.clip_by_global_norm(max_norm, axis_name=axis_name), no_vectors)


def second_moment() -> optax.GradientTransformation:
    """Divides by the root of a second moment that is kept like RMSProp's, in every dtype; leaves without one pass."""

    def moves(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.inexact)

    def blend(moment: Any, gradient: Any) -> Any:
        if not moves(gradient):
            return moment
        gradient = gradient.astype(moment.dtype)
        return jnp.asarray(0.5, moment.dtype) * (moment + gradient * jnp.conj(gradient))

    def divide(gradient: Any, moment: Any) -> Any:
        if not moves(gradient):
            return gradient
        root = jnp.sqrt(moment + jnp.asarray(1e-3, moment.dtype))
        return (gradient.astype(moment.dtype) / root).astype(gradient.dtype)

    def init(params: Any) -> optax.ScaleByRmsState:
        def zeros(leaf: Any) -> jax.Array:
            return jnp.zeros_like(leaf, wider_dtype(leaf.dtype, jnp.float32) if moves(leaf) else None)

        return optax.ScaleByRmsState(nu=jax.tree.map(zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByRmsState]:
        moment = jax.tree.map(blend, state.nu, updates)
        return jax.tree.map(divide, updates, moment), optax.ScaleByRmsState(nu=moment)

    return optax.GradientTransformation(init, update)


def spammed(learning_rate=0.1, inner=momentum, threshold=50.0):
    return og.spam_clip(optax.chain(second_moment(), inner(learning_rate)), threshold, restart_every=2, warmup=1)


def stably_spammed(learning_rate=0.1, inner=momentum, gamma3=0.9):
    return og.stable_spam(inner(learning_rate), gamma3=gamma3, restart_every=2)


def spammed_as_published(learning_rate=0.1, inner=momentum, threshold=50.0):
    tx = optax.chain(second_moment(), inner(learning_rate))
    return og.published.spam_clip(tx, threshold, restart_every=2, warmup=1)


def stably_spammed_as_published(learning_rate=0.1, inner=momentum, gamma3=0.9):
    return og.published.stable_spam(inner(learning_rate), gamma3=gamma3, restart_every=2)


def rms_clipped(learning_rate=0.1, inner=momentum, max_rms=1.0):
    return og.clip_by_update_rms(optax.chain(second_moment(), inner(learning_rate)), max_rms)


def logit_clipped(max_logit=100.0, balance=0.5, axis_name=None):
    """`qk_clip` of whatever tree it gets: the first leaf with an axis holds queries and keys alike, too large by 2."""

    def attention(tree: Any) -> tuple[optax.GradientTransformationExtraArgs, dict[str, Any]]:
        leaves = zip(og.leaf_names(tree), jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None), strict=True)
        path = next((name for name, x in leaves if np.shape(x) and is_gradient(x) and x.shape[0]), None)
        if path is None and jax.tree.leaves(tree):
            return optax.with_extra_args_support(optax.identity()), {}
        path = path or "placeholder"
        layer, _, leaf = path.removesuffix("/value").rpartition("/")
        whole = og.attention.Projection(leaf, axis=0, split={0: (1, -1)})
        layout = og.attention.AttentionLayout(query=(whole,), key=(whole,), layers=glob.escape(layer))
        tx = og.qk_clip(max_logit, layers=layout, balance=balance, axis_name=axis_name)
        return tx, {layer: jnp.full((1,), 200.0, jnp.float32)}

    def init(params: Any) -> Any:
        return attention(params)[0].init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        tx, max_logits = attention(updates if params is None else params)
        return tx.update(updates, state, params, **{"max_logits": max_logits, **extra})

    return optax.GradientTransformationExtraArgs(init, update)


GUARD_STATIC = ("inner", "check_updates", "axis_name")
HISTORY_STATIC = ("scope",)
ACCUMULATE_STATIC = ("inner", "every", "axis_name")
NOISE_STATIC = ("key", "distribution", "relative_to", "mask")

UPDATE_NORM_STATIC = ("window", "accept_after", "axis_name")
SPIKE_STATIC = ("window", "on", "accept_after", "axis_name")
LOSS_SCALING_STATIC = ("inner", "axis_name")

ENTRIES = (
    Entry("clip_by_global_norm", "", og.clip_by_global_norm, {"max_norm": 1.0}),
    Entry("clip_by_global_norm", "schedule", og.clip_by_global_norm, {"max_norm": schedule}),
    Entry("clip_by_leaf_norm", "", og.clip_by_leaf_norm, {"max_norm": 1.0}),
    Entry("clip_by_value", "", og.clip_by_value, {"max_value": 0.5}),
    Entry("adaptive_grad_clip", "", og.adaptive_grad_clip, {"clipping": 0.1}, ("axis",), needs_params=True),
    Entry("clip_by_norm_history", "", og.clip_by_norm_history, {"max_norm": 2.0}, HISTORY_STATIC),
    Entry("clip_by_norm_history", "leaf", og.clip_by_norm_history, {"scope": "leaf"}, HISTORY_STATIC),
    Entry("clip_by_median_norm", "", og.clip_by_median_norm, {}, ("window", *HISTORY_STATIC)),
    Entry("clip_by_median_norm", "leaf", og.clip_by_median_norm, {"scope": "leaf"}, ("window", *HISTORY_STATIC)),
    Entry("zclip", "", og.zclip, {}, ("mode",)),
    Entry("published.zclip", "", og.published.zclip, {}, ("mode", "warmup", "skip_update_on_spike")),
    Entry("autoclip", "", og.autoclip, {}, ("window",)),
    Entry("published.autoclip", "", og.published.autoclip, {"window": 16}, ("window",)),
    Entry("adagc", "", og.adagc, {}, ("scope",)),
    Entry("published.adagc", "", og.published.adagc, {}, ("scope", "warmup")),
    Entry("skip_nonfinite", "", og.skip_nonfinite),
    Entry("skip_large", "", og.skip_large, {"max_norm": 10.0}),
    Entry("skip_spikes", "", og.skip_spikes, {"window": 8}, SPIKE_STATIC),
    Entry("published.skip_spikes", "", og.published.skip_spikes, {"window": 4}, ("window", "on", "axis_name")),
    Entry("record_leaves", "", og.record_leaves, {"window": 4}, ("window",)),
    Entry("rule", "remembering", halving_rule, {"threshold": 1.0}),
    Entry("masked_rule", "", masked_clip, {"max_norm": 1.0}),
    Entry("limit_step", "", og.limit_step, {"max_change": 0.1}, ("scope", "axis_name"), needs_params=True),
    Entry(
        "limit_step",
        "leaf",
        og.limit_step,
        {"max_change": schedule, "scope": "leaf"},
        ("scope", "axis_name"),
        needs_params=True,
    ),
    Entry("limit_step_growth", "", og.limit_step_growth, {"start": 0.1}, ("axis_name",), needs_params=True),
    Entry("clip_by_update_norm", "", og.clip_by_update_norm, {"window": 8}, UPDATE_NORM_STATIC),
    Entry(
        "published.clip_by_update_norm", "", og.published.clip_by_update_norm, {"window": 8}, ("window", "axis_name")
    ),
    Entry("clippy", "", og.clippy, {"relative": 0.1, "absolute": 1e-3}, ("axis_name",), needs_params=True),
    Entry("spam_clip", "", spammed, {}, ("inner",), needs_params=True, wraps=True, parameter_copies=2),
    Entry("stable_spam", "", stably_spammed, {}, ("inner",), wraps=True, parameter_copies=1),
    Entry(
        "published.spam_clip",
        "",
        spammed_as_published,
        {},
        ("inner",),
        needs_params=True,
        wraps=True,
        parameter_copies=2,
    ),
    Entry("published.stable_spam", "", stably_spammed_as_published, {}, ("inner",), wraps=True, parameter_copies=1),
    Entry("clip_by_update_rms", "", rms_clipped, {}, ("inner",), needs_params=True, wraps=True, parameter_copies=2),
    Entry("qk_clip", "", logit_clipped, {"max_logit": 100.0}, ("balance", "axis_name"), needs_params=True),
    Entry("qk_clip", "schedule", logit_clipped, {"max_logit": schedule}, ("balance", "axis_name"), needs_params=True),
    Entry("l1_penalty", "", og.l1_penalty, {"strength": 0.1}, ("mask",), needs_params=True),
    Entry("l1_penalty", "schedule", og.l1_penalty, {"strength": schedule}, ("mask",), needs_params=True),
    Entry("dense_penalty", "", og.dense_penalty, {"strength": 0.1}, ("penalty", "mask"), needs_params=True),
    Entry(
        "dense_penalty",
        "pseudo_huber",
        og.dense_penalty,
        {"strength": schedule, "penalty": "pseudo_huber", "delta": 0.1},
        ("penalty", "mask"),
        needs_params=True,
    ),
    Entry("elastic_net_penalty", "", og.elastic_net_penalty, {"l1": 0.1, "l2": schedule}, ("mask",), needs_params=True),
    Entry("shrink_gradients", "", og.shrink_gradients, {"threshold": 0.1}, ("shrinkage",)),
    Entry(
        "shrink_gradients", "dense", og.shrink_gradients, {"threshold": schedule, "shrinkage": "dense"}, ("shrinkage",)
    ),
    Entry("noise_injection", "", og.noise_injection, {"key": 7}, NOISE_STATIC),
    Entry("noise_injection", "uniform_ball", og.noise_injection, {"distribution": "uniform_ball"}, NOISE_STATIC),
    Entry(
        "noise_injection",
        "relative",
        og.noise_injection,
        {"eta": schedule, "max_norm": 0.5, "relative_to": "gradient"},
        NOISE_STATIC,
    ),
    Entry("anticorrelated_noise", "", og.anticorrelated_noise, {"sigma": 0.1, "key": 7}, ("key", "mask")),
    Entry("langevin_noise", "", og.langevin_noise, {"learning_rate": 0.1, "key": 7}, ("key", "mask")),
    Entry("stochastic_rounding", "", og.stochastic_rounding, {"key": 7}, ("key",), needs_params=True),
    Entry("guard", "", guarded, {}, GUARD_STATIC, wraps=True, holds=True, parameter_copies=1),
    Entry(
        "guard",
        "adamw",
        guarded,
        {"inner": adamw},
        GUARD_STATIC,
        needs_params=True,
        wraps=True,
        holds=True,
        strict=False,
        parameter_copies=2,
    ),
    Entry(
        "guard",
        "check_updates",
        guarded,
        {"check_updates": True},
        GUARD_STATIC,
        wraps=True,
        holds=True,
        parameter_copies=1,
    ),
    Entry(
        "guard",
        "recovery",
        recovering,
        {},
        ("inner", "keep", "axis_name"),
        needs_params=True,
        wraps=True,
        holds=True,
        parameter_copies=3,  # the momentum, and a snapshot of parameters and momentum
    ),
    Entry("back_off", "", og.back_off, {}, ("factor", "recover_after", "after", "lowest", "diverged", "axis_name")),
    Entry(
        "stabilize",
        "",
        stabilized,
        {},
        ("inner", "max_norm", "max_change", "axis_name"),
        needs_params=True,
        wraps=True,
        holds=True,
        parameter_copies=1,
    ),
    Entry(
        "stabilize",
        "unbounded",
        stabilized,
        {"max_change": None},
        ("inner", "max_norm", "max_change", "axis_name"),
        wraps=True,
        holds=True,
        parameter_copies=1,
    ),
    Entry(
        "stabilize",
        "max_change",
        stabilized,
        {"max_change": 0.1},
        ("inner", "max_norm", "axis_name"),
        needs_params=True,
        wraps=True,
        holds=True,
        parameter_copies=1,
    ),
    Entry("accumulate", "", accumulated, {}, ACCUMULATE_STATIC, wraps=True, holds=True, parameter_copies=2),
    Entry(
        "accumulate",
        "guard_adamw",
        accumulated_guard,
        {"inner": adamw},
        ACCUMULATE_STATIC,
        needs_params=True,
        wraps=True,
        holds=True,
        strict=False,
        parameter_copies=3,
    ),
    *(
        Entry(
            factory.__name__,
            inner.__name__ if inner is adamw else "",
            factory,
            {"inner": inner},
            ("inner",),
            needs_params=True,
            wraps=True,
            strict=inner is momentum,
            parameter_copies=1 + (inner is adamw),
        )
        for factory in (proximal_l1, proximal_elastic_net, proximal_group_lasso)
        for inner in (momentum, adamw)
    ),
    Entry("loss_scaling", "", loss_scaled, {}, LOSS_SCALING_STATIC, wraps=True, holds=True, parameter_copies=1),
    Entry(
        "loss_scaling",
        "accumulate",
        loss_scaled_accumulation,
        {},
        LOSS_SCALING_STATIC,
        wraps=True,
        holds=True,
        parameter_copies=2,
    ),
)

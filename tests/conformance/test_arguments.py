"""Wrong static arguments, all of them: every argument of every public function times every kind of wrong value.

What comes out is a transformation that works (it is built, initialised and takes one step with finite numbers) or a
ValueError that names function and argument. Everything else is a fault: Python's own errors, a message that does not
say what was wrong, NaN, a hang. `make test` tries a fixed sample, `make test-all` all.
"""

import inspect
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import optax_guard as og
from optax_guard import diagnose, flax, models, preflight, report, smoothing
from optax_guard.recovery._reset import Reset
from optax_guard.recovery._rewind import Rewind

PARAMS = {"layer": {"bias": np.full(2, 0.5, np.float32), "kernel": np.full((3, 2), 0.5, np.float32)}}
GRADS = jax.tree.map(lambda leaf: leaf / 4, PARAMS)
BATCH = np.ones((4, 3), np.float32)
LOSS = np.float32(0.5)
HEADS = (og.attention.Projection("kernel", axis=1),)
HEADS_OF = {name: np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2) for name in ("query", "key", "value")}
MAX_LOGITS = {"layer": np.array([50.0, 200.0], np.float32)}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(batch @ params["layer"]["kernel"] + params["layer"]["bias"][None]))


def judge(statistics: Any, state: Any, params: Any = None, **extra: Any) -> tuple[og.Verdict, Any]:
    return og.Verdict(scale=jnp.ones((), jnp.float32), skip=jnp.zeros((), bool)), state


def init(params: Any) -> optax.EmptyState:
    return optax.EmptyState()


class Accepted(BaseException):
    """Raised by a function of the user's, which is called after the arguments were looked at."""


def accept(*args: Any, **kwargs: Any) -> Any:
    """Stands for a loss or a classifier where running it would take long."""
    raise Accepted


SGD, ADAM = optax.sgd(0.1), optax.scale_by_adam()
GUARD = og.guard(SGD, og.record_leaves(2), recorder_rows=2)
SUM = og.accumulate(SGD, 2)
SCALING = og.loss_scaling(SGD)
RECORDED = GUARD.update(GRADS, GUARD.init(PARAMS), PARAMS)[1]
HELD = GUARD.update(GRADS, GUARD.init(PARAMS), PARAMS, value=np.float32("nan"))[1]
SMOOTHED = smoothing.smooth(accept, 0.5)
MODEL = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
NNX = flax.Optimizer(MODEL, GUARD, wrt=nnx.Param)
LINEN = flax.TrainState.create(apply_fn=None, params=PARAMS, tx=og.guard(SGD))
HOST = {"params": np.ones((3, 2), np.float32), "inputs": BATCH, "key": 0, "progress": False}

# The arguments that a call must have, by function; what has a default is left at it. Functions of `__all__` that are
# not here take nothing that must be given.
REQUIRED: dict[str, dict[str, Any]] = {
    "accumulate": {"inner": SGD, "every": 2},
    "accumulate_gradients": {"loss_fn": loss_fn, "num_micro_batches": 2},
    "anticorrelated_noise": {"sigma": 0.1},
    "apply_gradients": {"tx": SGD, "grads": GRADS, "state": SGD.init(PARAMS), "params": PARAMS},
    "attention_with_max_logits": HEADS_OF,
    "clear_halt": {"state": GUARD.init(PARAMS)},
    "clip_by_global_norm": {"max_norm": 1.0},
    "clip_by_leaf_norm": {"max_norm": 1.0},
    "clip_by_update_rms": {"inner": ADAM},
    "clip_by_value": {"max_value": 1.0},
    "dense_penalty": {"strength": 0.1},
    "elastic_net_penalty": {"l1": 0.1, "l2": 0.1},
    "equinox_attention": {"heads": 2},
    "event_logger": {"write": print},
    "find_inner_state": {"tx": GUARD, "params": PARAMS, "inner_state": SGD.init(PARAMS)},
    "keep_if_held": {"state": GUARD.init(PARAMS), "new": PARAMS, "old": PARAMS},
    "flight_log": {"state": GUARD.init(PARAMS)},
    "flush": {"tx": SUM, "state": SUM.init(PARAMS), "params": PARAMS},
    "global_norm": {"tree": GRADS},
    "gradient_statistics": {"tree": GRADS},
    "guard": {"inner": SGD},
    "has_updated": {"state": SUM.init(PARAMS)},
    "remove_guard_state": {"state": GUARD.init(PARAMS)},
    "l1_penalty": {"strength": 0.1},
    "langevin_noise": {"learning_rate": 0.1},
    "leaf_log": {"state": RECORDED},
    "leaf_names": {"params": PARAMS},
    "leaf_axes": {"specs": jax.tree.map(lambda _: PartitionSpec(), PARAMS)},
    "max_attention_logits": {name: HEADS_OF[name] for name in ("query", "key")},
    "max_attention_logits_from_lse": {"lse": np.ones((3, 2), np.float32)},
    "collect_max_logits": {"tree": {"attention": {"max_logits": np.ones(2, np.float32)}}},
    "masked_rule": {"inner": og.clip_by_global_norm(1.0), "mask": True},
    "limit_step": {"max_change": 0.1},
    "loss_scaling": {"inner": SGD},
    "metrics": {"state": GUARD.init(PARAMS)},
    "perturb_weights": {"loss_fn": loss_fn, "sigma": 0.1},
    "proximal_elastic_net": {"inner": SGD, "l1": 0.1, "l2": 0.1, "learning_rate": 0.1},
    "proximal_group_lasso": {"inner": SGD, "strength": 0.1, "learning_rate": 0.1},
    "proximal_l1": {"inner": SGD, "strength": 0.1, "learning_rate": 0.1},
    "qk_clip": {"layers": og.attention.AttentionLayout(query=HEADS, key=HEADS)},
    "raise_if_halted": {"state": GUARD.init(PARAMS)},
    "rule": {"init": init, "judge": judge},
    "scale_loss": {"state": SCALING.init(PARAMS), "loss": LOSS},
    "shrink_gradients": {"threshold": 0.1},
    "skip_large": {"max_norm": 1.0},
    "spam_clip": {"inner": ADAM},
    "sparsity": {"params": PARAMS},
    "stabilize": {"inner": SGD},
    "stable_spam": {"inner": SGD},
    "transformer_attention": {"heads": 2},
    "update_metrics": {"before": PARAMS, "after": PARAMS},
    "z_loss": {"logits": np.ones((3, 2), np.float32)},
    "add_guard_state": {"tx": GUARD, "params": PARAMS, "inner_state": SGD.init(PARAMS)},
    "published.spam_clip": {"inner": ADAM},
    "published.stable_spam": {"inner": SGD},
    "smoothing.augment_with_noise": {"inputs": BATCH, "sigma": 0.1, "key": 0},
    "smoothing.certified_accuracy": {
        "certificate": smoothing.Certificate(np.array([1, 0]), np.array([0.5, 0.2])),
        "labels": np.array([1, 0]),
        "radii": 0.1,
    },
    "smoothing.certify": {"smoothed": SMOOTHED, **HOST, "n0": 4, "n": 8},
    "smoothing.class_counts": {"smoothed": SMOOTHED, **HOST, "n": 8},
    "smoothing.clopper_pearson_lower": {"successes": 3, "trials": 5, "alpha": 0.1},
    "smoothing.perturbed_accuracy": {"apply_fn": accept, **HOST, "labels": np.array([0, 1, 0, 1]), "draws": 2},
    "smoothing.predict": {"smoothed": SMOOTHED, **HOST, "n": 8},
    "smoothing.smooth": {"apply_fn": accept, "sigma": 0.5},
    "preflight.learning_rate_sweep": {
        "make_tx": optax.sgd,
        "loss_fn": accept,
        "params": PARAMS,
        "batches": np.stack([BATCH] * 2),
        "learning_rates": [0.1, 0.2],
    },
    "preflight.preflight": {"loss_fn": accept, "params": PARAMS, "batch": BATCH, "progress": False, "chunks": 1},
    "diagnose.diagnose": {"loss_fn": accept, "params": PARAMS, "batch": BATCH, "progress": False},
    "diagnose.worst_examples": {"loss_fn": accept, "params": PARAMS, "batch": BATCH, "progress": False},
    "flax.dot_product_attention": HEADS_OF,
    "flax.record_max_logits": {"attention_fn": accept},
    "flax.clear_halt": {"optimizer": NNX},
    "flax.inner_state": {"optimizer": NNX},
    "flax.add_guard": {"optimizer": nnx.Optimizer(MODEL, SGD, wrt=nnx.Param), "model": MODEL, "tx": GUARD},
    "flax.remove_guard": {"optimizer": NNX, "model": MODEL, "tx": SGD},
    "flax.Optimizer.update": {"model": MODEL, "grads": nnx.state(MODEL)},
    "flax.TrainState.apply_gradients": {"grads": GRADS},
    "report.incidents": {"log": report.read_log(RECORDED)},
    "report.story": {"log": report.read_log(RECORDED)},
    "report.read_log": {"state": RECORDED},
    "models.MLP": {"sizes": [3, 2], "rngs": nnx.Rngs(0)},
    "models.ConvNet": {"num_classes": 2, "channels": (4,), "rngs": nnx.Rngs(0)},
    "models.GRU": {"in_features": 2, "hidden_features": 4, "num_classes": 2, "rngs": nnx.Rngs(0)},
    "models.RNN": {"in_features": 2, "hidden_features": 4, "num_classes": 2, "rngs": nnx.Rngs(0)},
    "models.Transformer": {"vocab_size": 5, "max_length": 4, "width": 8, "layers": 1, "heads": 2, "rngs": nnx.Rngs(0)},
}
# What is not tried: functions that draw or read files, whose arguments are paths and axes.
FILES = {"smoothing.plot_certified_accuracy", "preflight.plot", "report.load", "report.load_checkpoint"} | {
    "report.load_log",
    "report.report",
    "report.save_log",
}
MODULES = {
    "": og,
    "published.": og.published,
    "smoothing.": smoothing,
    "preflight.": preflight,
    "diagnose.": diagnose,
    "report.": report,
    "models.": models,
    "flax.": flax,
}


def apply_gradients(grads: Any, extra_args: Any = None) -> Any:
    return LINEN.apply_gradients(grads=grads, extra_args=extra_args)


def update(model: Any, grads: Any) -> None:
    NNX.update(model, grads)


METHODS = {"flax.TrainState.apply_gradients": apply_gradients, "flax.Optimizer.update": update}


def callables() -> dict[str, Callable[..., Any]]:
    """Every public function, by the name that messages use behind that of the module."""
    found = {}
    for prefix, module in MODULES.items():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or prefix == "models.":
                found[prefix + name] = value
    found |= METHODS  # the constructors of these classes are Flax's own
    return {name: function for name, function in found.items() if name not in FILES}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """By name; of a class those of `__init__`, which a metaclass may hide."""
    if not inspect.isclass(function):
        return dict(inspect.signature(function).parameters)
    return dict(list(inspect.signature(function.__init__).parameters.items())[1:])


KINDS: dict[str, Any] = {
    "None": None,
    "text": "text",
    "a number as text": "0.5",
    "bytes": b"0.5",
    "True": True,
    "list": [1, 2],
    "complex": 1j,
    "negative": -1.0,
    "negative whole": -1,
    "zero": 0,
    "NaN": float("nan"),
    "Inf": float("inf"),
    "1e300": 1e300,
    "1e-300": 1e-300,
    "10**20": 10**20,
    "NumPy float": np.float32(0.5),
    "NumPy int": np.int64(3),
    "0-d float array": np.array(0.5),
    "0-d int array": np.array(3),
    "float8": jnp.asarray(0.5, jnp.float8_e4m3fn),
    "masked": np.ma.masked,
    "a class": dict,
    "array of shape (2,)": np.ones(2, np.float32),
    "traced float": None,
    "traced int": None,
}


# Trees, states and data: what is wrong with them is told by the path of a leaf, or by what the state lacks.
DATA = {
    "tree",
    "new",
    "old",
    "grads",
    "params",
    "state",
    "remove_guard_state",
    "like",
    "loss",
    "inputs",
    "batch",
    "batches",
    "before",
    "after",
    "validation",
} | {
    "bias",
    "labels",
    "radii",
    "certificate",
    "successes",
    "log",
}
# What may end otherwise, by function ("" for all) and argument ("" for all), in which kinds (none named: all), and why.
EXCEPTIONS: dict[tuple[str, str], tuple[set[str], str]] = {
    ("", "axis_name"): ({"text", "a number as text"}, "an unbound name is JAX's NameError"),
    ("smoothing.perturbed_accuracy", "weight_mask"): (set(), "its message is that of every `mask`"),
    ("apply_gradients", "state"): (set(), "a bare Optax optimizer is asked, and answers in its own words"),
    ("perturb_weights", "sigma"): ({"10**20"}, "the squared loss of weights that large overflows by itself"),
    ("stabilize", ""): (set(), "its arguments are those of `guard` and two rules, by whose names it speaks"),
}


def cases() -> list[tuple[str, str, str]]:
    """Every function, argument and kind; data only of the functions that a training step calls."""
    triples = []
    for name, function in callables().items():
        for argument, parameter in parameters(function).items():
            data = argument in DATA and "." in name and not name.startswith("flax.")
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and not data:
                triples += [(name, argument, kind) for kind in KINDS]
    return triples


def finite(tree: Any) -> bool:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return all(np.isfinite(leaf).all() for leaf in leaves if np.issubdtype(leaf.dtype, np.inexact))


def call(name: str, argument: str, value: Any) -> Any:
    function = callables()[name]
    arguments = dict(REQUIRED.get(name, {}))
    if name.startswith("models."):
        return nnx.eval_shape(lambda: function(**{**arguments, "rngs": nnx.Rngs(0), argument: value}))
    if parameters(function)[argument].kind is inspect.Parameter.VAR_POSITIONAL:
        first = next(iter(parameters(function)))
        return function(arguments.pop(first), value, **arguments)
    return function(**{**arguments, argument: value})


def use(name: str, made: Any) -> Any:
    """What a user does with it: one step of a transformation, one gradient of a loss."""
    if isinstance(made, (Reset, Rewind)):
        made = og.guard(SGD, recovery=(made,))
    if isinstance(made, optax.GradientTransformation):
        tx = optax.with_extra_args_support(made)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, value=LOSS, max_logits=MAX_LOGITS)
    if name == "accumulate_gradients":
        return made(PARAMS, BATCH)
    if name == "perturb_weights":
        return made(PARAMS, BATCH, noise_key=0)
    if name == "event_logger":
        return made(HELD, PARAMS, wait=True)
    return None if name.startswith("models.") else made  # a model of shapes


def fault(name: str, argument: str, kind: str) -> str | None:
    """What is wrong with how a function takes one argument, or None."""
    try:
        if kind.startswith("traced"):
            example = np.float32(0.5) if kind == "traced float" else np.int32(3)
            jax.make_jaxpr(lambda x: (use(name, call(name, argument, x)), 0.0)[1])(example)
            return None
        with jax.disable_jit():
            result = use(name, call(name, argument, KINDS[kind]))
        return None if argument in DATA or finite(result) else "numbers that are not finite"
    except Accepted:
        return None
    except ValueError as error:
        said = str(error)
        named = f"`{argument}" in said or (argument in DATA and ("leaf `" in said or argument.split("_")[-1] in said))
        return None if name.split(".")[-1] in said and named else f"the message: {said}"
    except Exception as error:  # whatever it is, it is told
        return f"{type(error).__name__}: {error}"


ALL = og.accumulate(og.loss_scaling(og.guard(SGD, og.skip_spikes(), recorder_rows=2), init=1.0), 1)


@pytest.mark.parametrize("argument", ["value", "weight", "tag", "max_logits"])
def test_every_wrong_extra_argument_is_refused_by_name_or_works(argument: str, standard_promotion: None) -> None:
    faults = {}
    for kind, value in KINDS.items():
        try:
            with jax.disable_jit():
                params, state = og.apply_gradients(ALL, GRADS, ALL.init(PARAMS), PARAMS, **{argument: value})
            assert finite((params, state)), kind
        except ValueError as error:
            if f"`{argument}`" not in str(error):
                faults[kind] = error
        except Exception as error:  # whatever it is, it is told
            faults[kind] = error
    assert not faults


def test_every_public_function_is_tried() -> None:
    for name, function in callables().items():
        found = parameters(function).values()
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        missing = [p.name for p in found if p.default is p.empty and p.kind not in kinds]
        assert set(missing) <= set(REQUIRED.get(name, {})), f"{name}: give {missing} in REQUIRED"


def excepted(name: str, argument: str, kind: str) -> bool:
    keys = ((name, argument), ("", argument), (name, ""))
    return any(key in EXCEPTIONS and kind in (EXCEPTIONS[key][0] or KINDS) for key in keys)


def assert_no_fault(tried: list[tuple[str, str, str]]) -> None:
    found = {case: fault(*case) for case in tried if not excepted(*case)}
    assert not {case: what for case, what in found.items() if what}


def test_a_sample_of_wrong_arguments_is_refused_by_name_or_works(standard_promotion: None) -> None:
    assert_no_fault(random.Random(0).sample(cases(), 60))


@pytest.mark.slow
@pytest.mark.parametrize("name", callables())
def test_every_wrong_argument_is_refused_by_name_or_works(name: str, standard_promotion: None) -> None:
    assert_no_fault([case for case in cases() if case[0] == name])


def test_there_are_few_exceptions() -> None:
    assert len(EXCEPTIONS) <= 10
    assert all(reason for _, reason in EXCEPTIONS.values())


MEETS_FLOAT32 = [
    ("clip_by_update_norm", "deviations"),
    ("loss_scaling", "growth_factor"),
    ("skip_spikes", "deviations"),
    ("clip_by_norm_history", "deviations"),
    ("clip_by_value", "max_value"),
    ("proximal_l1", "strength"),
]


@pytest.mark.parametrize(("name", "argument"), MEETS_FLOAT32)
def test_a_number_of_any_dtype_works_under_strict_promotion(name: str, argument: str) -> None:
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert not [what for kind in ("traced int", "float8") if (what := fault(name, argument, kind))]

"""Finds an optimizer's second moment, momentum and learning rate in its state.

For a constant gradient g, an optimizer takes the step -learning_rate * gain / C * g, with the metric C (1, or the root
of a second moment) and the gain (1, or 1 / (1 - momentum) for a momentum that sums gradients). A proximal step needs
both. Optax keeps the moments in the state, but not the constants (decay, eps), except under `optax.inject_hyperparams`.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax._src.transform import (  # states that Optax does not export
    ScaleByRmsWithCountState,
    ScaleByRStdDevWithCountState,
)

from optax_guard._common import validate
from optax_guard._common.counters import value_at
from optax_guard._common.new_params import QKClipState
from optax_guard._common.numerics import accumulator_dtype
from optax_guard._common.tree import (
    check_same_structure,
    find_states,
    is_gradient,
    is_like,
    leaves_with_none,
    path_name,
)
from optax_guard._common.typing import PyTree

__all__ = ["ANY", "Metric", "MetricName", "Path", "Reader", "Response", "injected_learning_rate", "reader", "responses"]

MetricName: TypeAlias = Literal["auto", "second_moment", "identity"]
Metric: TypeAlias = MetricName | Callable[[Any], PyTree]
Path: TypeAlias = tuple[Any, ...]  # keys and not a name, since two leaves may have the same name
ANY: Path = ("*",)  # the path of an array that matches no parameter


class Reader(NamedTuple):
    """How to read an optimizer's state, from the user's arguments."""

    function: str  # for messages
    metric: Metric
    momentum: Any
    b2: Any
    eps: Any


class Response(NamedTuple):
    """The factors of a leaf's step besides the learning rate."""

    metric: jax.Array | None  # C; Inf where the optimizer has only seen zeros; None for 1
    gain: jax.Array | None  # None for 1


class _Moment(NamedTuple):
    """How a type of state keeps its second moment; the numbers are the defaults of its Optax function."""

    field: str
    b2: float | None  # the constant of the bias correction; None if there is none
    eps: float
    eps_in_sqrt: bool
    use_of_mean: str = ""  # "subtracted"; "seen": zero where no gradient was seen, unlike the second moment


_MOMENTS = {
    optax.ScaleByAdamState: _Moment("nu", 0.999, 1e-8, False),
    optax.ScaleByBeliefState: _Moment("nu", 0.999, 1e-16, False, "seen"),
    optax.ScaleByAmsgradState: _Moment("nu_max", None, 1e-8, False),  # corrected already
    optax.ScaleByRmsState: _Moment("nu", None, 1e-8, True),
    ScaleByRmsWithCountState: _Moment("nu", 0.9, 1e-8, True),
    optax.ScaleByRStdDevState: _Moment("nu", None, 1e-8, True, "subtracted"),
    ScaleByRStdDevWithCountState: _Moment("nu", 0.9, 1e-8, True, "subtracted"),
    optax.ScaleByRssState: _Moment("sum_of_squares", None, 1e-7, True),
}


def reader(function: str, metric: Any, momentum: Any, b2: Any, eps: Any) -> Reader:
    """Checks the arguments and makes a `Reader`."""
    if not validate.is_callable(metric):
        validate.one_of(function, "metric", metric, MetricName)
    below_one = {"low": 0, "high": 1, "open_high": True}
    momentum = None if momentum is None else validate.scalar(function, "momentum", momentum, **below_one)
    b2 = None if b2 is None else validate.scalar(function, "b2", b2, **below_one)
    eps = None if eps is None else validate.scalar(function, "eps", eps, low=0)
    return Reader(function, metric, momentum, b2, eps)


def responses(read: Reader, state: Any, params: PyTree, chosen: PyTree, step: jax.Array) -> list[Response]:
    """One `Response` per position; `step` counts the previous steps. Raises if the metric cannot be found."""
    leaves = dict(jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: leaf is None))
    shapes = {path: leaf.shape for path, leaf in leaves.items() if is_gradient(leaf)}
    roots: dict[Path, jax.Array] = {}
    gains: dict[Path, jax.Array] = {}
    unknown: dict[Path, str] = {}
    for node, constants in _states(state, params, {}):
        kind = type(node).__name__
        if isinstance(node, optax.TraceState):
            summed = [path for path, _ in _arrays(node.trace, shapes)]
            gains |= {path: _gain(read, constants, step) for path in summed}
            unknown |= {path: kind for path in summed if path == ANY}
        elif type(node) in _MOMENTS:
            for path, root in _roots(read, node, constants, shapes):
                if path in roots:
                    raise ValueError(f"{read.function}: `inner` keeps two second moments for leaf `{_name(path)}`.")
                roots[path] = root
            unknown |= {path: kind for path in roots if path == ANY}
        elif not isinstance(node, (optax.EmaState, QKClipState)):
            unknown |= {path: kind for part in _parts(node, params)[1] for path, _ in _arrays(part, shapes)}
    needed = [path for path, use in zip(leaves, leaves_with_none(chosen), strict=True) if use and path in shapes]
    _check(read, needed, roots, unknown)
    if callable(read.metric):
        tree = read.metric(state)
        check_same_structure(read.function, "metric", tree, "params", params)
        roots = {
            path: jnp.asarray(root)
            for path, root in zip(leaves, leaves_with_none(tree), strict=True)
            if root is not None
        }
    elif read.metric == "identity":
        roots = {}
    return [Response(roots.get(path), gains.get(path)) for path in leaves]


def _name(path: Path) -> str:
    return "*" if path == ANY else path_name(path)


def injected_learning_rate(function: str, state: Any, params: PyTree) -> jax.Array:
    """The `learning_rate` that `optax.inject_hyperparams` keeps in its state."""
    injected = [_hyperparams(node) for node in find_states(state, tuple, params)]
    rates = [jnp.asarray(each["learning_rate"]) for each in injected if "learning_rate" in each]
    if len(rates) != 1:
        raise ValueError(
            f"{function}: `learning_rate` must be given, as a number or the schedule of `inner`: it is read from "
            f"`optax.inject_hyperparams` only if the state holds exactly one; found {len(rates)}."
        )
    return rates[0]


def _is_state(node: Any) -> bool:
    return hasattr(node, "_fields")


def _hyperparams(node: Any) -> dict[str, Any]:
    found = getattr(node, "hyperparams", None) if _is_state(node) else None
    return found if isinstance(found, dict) else {}


def _states(node: Any, params: PyTree, constants: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every state inside a state, in any nesting, with the hyperparameters injected around it."""
    injected = _hyperparams(node)
    constants = {**constants, **injected}
    if not injected:
        yield node, constants
        if type(node) in _MOMENTS or isinstance(node, (optax.TraceState, optax.EmaState)):
            return  # only arrays inside
    for child in _parts(node, params)[0]:
        yield from _states(child, params, constants)


def _parts(node: Any, params: PyTree) -> tuple[list[Any], list[Any]]:
    """The states directly inside a node, and its other contents: trees like the parameters, and arrays."""
    fields = node if _is_state(node) else (node,)
    parts = jax.tree.leaves(list(fields), is_leaf=lambda part: _is_state(part) or is_like(part, params))
    states = [part for part in parts if _is_state(part) and not is_like(part, params)]
    return states, [part for part in parts if not any(part is state for state in states)]


def _arrays(tree: Any, shapes: dict[Path, Any]) -> Iterator[tuple[Path, Any]]:
    """Yields (path, array) for a tree with the structure of the parameters; the path is `ANY` if none matches."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "ndim") or not is_gradient(leaf):
            continue
        if shapes.get(path) == leaf.shape:
            yield path, leaf
        elif leaf.ndim > 0:  # a single number is a statistic
            yield ANY, leaf


def _check(read: Reader, needed: list[Path], roots: dict[Path, Any], unknown: dict[Path, str]) -> None:
    if callable(read.metric) or read.metric == "identity":
        return
    if read.metric == "second_moment":
        missing = [_name(path) for path in needed if path not in roots]
        if missing:
            raise ValueError(
                f"{read.function}: metric='second_moment', but the state of `inner` has none for leaf `{missing[0]}`; "
                "use metric='identity', or an optimizer that keeps one (Adam, AMSGrad, RMSProp, Adagrad, AdaBelief)."
            )
        return
    for path in needed:
        kind = unknown.get(path, None if path in roots else unknown.get(ANY))
        if kind is not None:
            raise ValueError(
                f"{read.function}: metric='auto' does not know by what {kind} divides the step of leaf "
                f"`{_name(path)}`. Pass metric= as a function from the state of `inner` to that divisor, as "
                "'second_moment' to use the one found beside it, or as 'identity' to shrink by "
                "learning_rate * strength, which under a sign or orthogonalised step (Lion, Muon) is a pull in "
                "proportion to the step and not a penalty of the loss."
            )


def _constant(given: Any, constants: dict[str, Any], names: tuple[str, ...], default: Any) -> jax.Array:
    """The constant that the user gave, else the injected one, else Optax's default."""
    injected = [constants[name] for name in names if name in constants]
    return value_at(given if given is not None else injected[0] if injected else default, None)


def _gain(read: Reader, constants: dict[str, Any], step: jax.Array) -> jax.Array:
    """1 + momentum + ... + momentum^step: `optax.trace` sums gradients and does not average them."""
    if read.momentum is None and "momentum" not in constants:
        raise ValueError(
            f"{read.function}: `inner` has momentum (TraceState), whose constant Optax does not keep in the state: "
            "pass `momentum=`, as to `optax.sgd`. It makes steps and the shrinkage 1 / (1 - momentum) times larger."
        )
    momentum = _constant(read.momentum, constants, ("momentum",), None)
    return (1 - momentum ** (step + 1).astype(momentum.dtype)) / (1 - momentum)


def _roots(read: Reader, node: Any, constants: dict[str, Any], shapes: dict[Path, Any]) -> Iterator[tuple[Path, Any]]:
    """Yields (path, the divisor of the step), which is Inf where every gradient was zero."""
    kind = _MOMENTS[type(node)]
    eps = _constant(read.eps, constants, ("eps",), kind.eps)
    second = dict(_arrays(getattr(node, kind.field), shapes))
    first = dict(_arrays(node.mu, shapes)) if kind.use_of_mean else {}
    correction = jnp.ones((), jnp.float32)
    if kind.b2 is not None:
        b2 = _constant(read.b2, constants, ("b2", "decay"), kind.b2)
        correction = 1 - b2 ** node.count.astype(b2.dtype)
    for path, leaf in second.items():
        real = accumulator_dtype(leaf.dtype)
        share, small = correction.astype(real), eps.astype(real)
        v = leaf.real.astype(real) / share
        seen = v != 0
        if kind.use_of_mean == "subtracted":
            v = jnp.maximum(v - jnp.square(jnp.abs(first[path]).astype(real) / share), 0)
        elif kind.use_of_mean == "seen":
            seen = first[path] != 0
        root = jnp.sqrt(jnp.where(seen, v + small, 1)) if kind.eps_in_sqrt else jnp.sqrt(jnp.where(seen, v, 1)) + small
        yield path, jnp.where(seen, root, jnp.inf)

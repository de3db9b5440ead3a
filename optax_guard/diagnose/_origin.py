"""Where a NaN or Inf comes from: a jaxpr evaluated operation by operation, descending only where one appears.

`jax.experimental.checkify` reports NaN but lets Inf pass (log(0), an overflow in float16), and `jax_debug_infs` stops
at every Inf, even those that a causal mask puts there on purpose. An *origin* is an operation whose inputs are all
finite and whose output is not. Only the origins whose NaN or Inf reaches the loss or the gradient are reported.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util  # JAX has no public way to find an equation's source line
from jax.extend import core

__all__ = ["Origin", "find_origins"]


class Origin(NamedTuple):
    """An operation that made a NaN or Inf from finite numbers."""

    operation: str  # JAX's name of the primitive: log, exp, div, ...
    produced: str  # 'NaN', 'Inf' or 'NaN and Inf'
    file: str  # relative to the working directory if it lies below it
    line: int  # 0 if unknown
    function: str
    backward: bool  # whether it happened while the gradient was taken; the line is the forward operation's
    operands: tuple[str, ...]  # dtype, shape and range of each
    called_from: str | None  # 'file:line' of the innermost frame outside installed packages, if it is another one


class _Tracked(NamedTuple):
    value: Any
    origins: frozenset[int]  # positions in the list of origins; empty where finite


class _Search:
    """Evaluates jaxprs and collects origins."""

    def __init__(self) -> None:
        self.origins: list[Origin] = []

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[_Tracked]) -> list[_Tracked]:
        known: dict[Any, _Tracked] = dict(zip(jaxpr.constvars, map(_clean, consts), strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> _Tracked:
            return _clean(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            for variable, result in zip(equation.outvars, self.evaluate(equation, inputs), strict=True):
                known[variable] = result
        return [read(atom) for atom in jaxpr.outvars]

    def evaluate(self, equation: Any, inputs: list[_Tracked]) -> list[_Tracked]:
        values = [each.value for each in inputs]
        parameters = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            outputs = equation.primitive.bind(*values, **parameters)
        outputs = list(outputs) if equation.primitive.multiple_results else [outputs]
        bad = [_is_bad(output) for output in outputs]
        if not any(bad):
            return [_Tracked(output, frozenset()) for output in outputs]
        inherited = frozenset().union(*(each.origins for each in inputs))
        if inherited or any(
            _is_bad(value) for value in values
        ):  # it was passed in; an argument or a constant has no origin
            return [_Tracked(o, inherited if b else frozenset()) for o, b in zip(outputs, bad, strict=True)]
        inside = self.inside(equation, inputs)
        if inside is not None:
            return inside
        self.origins.append(_describe(equation, values, outputs))
        here = frozenset([len(self.origins) - 1])
        return [_Tracked(o, here if b else frozenset()) for o, b in zip(outputs, bad, strict=True)]

    def inside(self, equation: Any, inputs: list[_Tracked]) -> list[_Tracked] | None:
        """Evaluates the body of an operation; None if it has no body or everything inside stays finite."""
        before = len(self.origins)
        parameters, name = equation.params, equation.primitive.name
        if name == "scan":
            results = self.scan(parameters, inputs)
        elif name == "cond":
            index, *operands = inputs
            branch = parameters["branches"][int(index.value)]
            results = self.run(branch.jaxpr, branch.consts, operands)
        elif name == "while":
            results = self.loop(parameters, inputs)
        else:
            body = next((parameters[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in parameters), None)
            if body is None:
                return None
            plain = getattr(body, "jaxpr", body)
            if len(plain.invars) != len(inputs):
                return None
            results = self.run(plain, getattr(body, "consts", ()), inputs)
        return results if len(self.origins) > before else None

    def scan(self, parameters: Any, inputs: list[_Tracked]) -> list[_Tracked]:
        if "ft_in" in parameters:  # JAX 0.12 keeps the three groups in a tree type of their own
            consts, carry, sliced = (
                [inputs[i] for i in g] for g in parameters["ft_in"].update(range(len(inputs))).unpack()
            )
            carried = len(carry)
        else:
            fixed, carried = parameters["num_consts"], parameters["num_carry"]
            consts, carry, sliced = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
        body, length = parameters["jaxpr"], parameters["length"]
        order = range(length)[::-1] if parameters["reverse"] else range(length)
        rows: dict[int, list[_Tracked]] = {}
        for i in order:
            part = [_Tracked(each.value[i], each.origins) for each in sliced]
            results = self.run(body.jaxpr, body.consts, [*consts, *carry, *part])
            carry, rows[i] = results[:carried], results[carried:]
        stacked = []
        for column in zip(*(rows[i] for i in range(length)), strict=True):
            value = jnp.stack([each.value for each in column])
            stacked.append(_Tracked(value, frozenset().union(*(each.origins for each in column))))
        return [*carry, *stacked]

    def loop(self, parameters: Any, inputs: list[_Tracked]) -> list[_Tracked]:
        cond, body = parameters["cond_jaxpr"], parameters["body_jaxpr"]
        first, second = parameters["cond_nconsts"], parameters["body_nconsts"]
        cond_consts, body_consts = inputs[:first], inputs[first : first + second]
        carry = inputs[first + second :]
        while bool(self.run(cond.jaxpr, cond.consts, [*cond_consts, *carry])[0].value):
            carry = self.run(body.jaxpr, body.consts, [*body_consts, *carry])
        return carry


def find_origins(function: Callable[..., Any], *arguments: Any) -> tuple[list[Any], list[Origin]]:
    """Returns the flat outputs of `function(*arguments)` and, in order, the origins that reach a non-finite output."""
    closed = jax.make_jaxpr(function)(*arguments)
    search = _Search()
    results = search.run(closed.jaxpr, closed.consts, [_clean(leaf) for leaf in jax.tree.leaves(arguments)])
    reached = sorted(frozenset().union(*(each.origins for each in results)))
    return [each.value for each in results], [search.origins[i] for i in reached]


def _clean(value: Any) -> _Tracked:
    return _Tracked(value, frozenset())


def _is_bad(value: Any) -> bool:
    inexact = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)
    return inexact and not bool(jnp.all(jnp.isfinite(value)))


def _describe(equation: Any, values: list[Any], outputs: list[Any]) -> Origin:
    inexact = [np.asarray(o) for o in outputs if jnp.issubdtype(o.dtype, jnp.inexact)]
    kinds = [kind for kind, test in (("NaN", np.isnan), ("Inf", np.isinf)) if any(test(o).any() for o in inexact)]
    frames = list(source_info_util.user_frames(equation.source_info.traceback))
    inner = frames[0] if frames else None
    own = next((frame for frame in frames if "site-packages" not in frame.file_name), None)
    elsewhere = own is not None and inner is not None and own is not inner
    return Origin(
        operation=equation.primitive.name,
        produced=" and ".join(kinds),
        file=_relative(inner.file_name) if inner else "unknown",
        line=inner.start_line if inner else 0,
        function=inner.function_name if inner else "unknown",
        backward="transpose" in str(equation.source_info.name_stack),
        operands=tuple(_range(value) for value in values),
        called_from=f"{_relative(own.file_name)}:{own.start_line}" if elsewhere and own is not None else None,
    )


def _relative(path: str) -> str:
    here = os.path.relpath(path)
    return path if here.startswith("..") else here


def _range(value: Any) -> str:
    if not hasattr(value, "dtype"):
        return repr(value)
    kind = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if (
        not jnp.issubdtype(value.dtype, jnp.number)
        or not value.size
        or jnp.issubdtype(value.dtype, jnp.complexfloating)
    ):
        return kind
    array = np.asarray(value).astype(np.float64)
    return f"{kind} in {array.min():.4g} to {array.max():.4g}"

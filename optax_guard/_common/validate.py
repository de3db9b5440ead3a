"""Checks of static arguments: every message names the function, the argument, its value and the valid range.

A number is returned as a Python float (or int), whatever kind of number it was, since a NumPy scalar, a 0-d NumPy array
or 10**20 could fail under strict promotion, or overflow, inside a step. It is checked as float32 holds it: there, 1e300
is Inf, 1e-40 is 0 and 1 - 1e-9 is 1.

A JAX array may be a tracer or a hyperparameter that `optax.inject_hyperparams` passes in at every step, and a value
inside a step must never raise, so only the shape of an array is checked. If an argument decides what is traced (a
count, a window, a choice), or with `static=True`, a tracer is refused.
"""

import math
import numbers
import operator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_guard._common.axes import LeafAxes
from optax_guard._common.typing import AxisName

__all__ = [
    "INT32",
    "MILLION",
    "array",
    "axis_name",
    "boolean",
    "floating_dtype",
    "function",
    "integer",
    "is_callable",
    "one_of",
    "scalar",
    "scalar_or_schedule",
    "shown",
]

INT32 = 2**31 - 1  # counters are int32
MILLION = 2**20  # the most rows of a history, which is in every checkpoint and may be sorted at every step
_FLOAT32 = jnp.finfo(jnp.float32)


def scalar(
    function: str,
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    infinite: bool = False,
    static: bool = False,
    reason: str = "",
) -> Any:
    """Returns a float, or a 0-d JAX array in float32 or wider; raises unless it is real and in [low, high].

    `open_low` and `open_high` exclude an end, and `reason` explains the ends. Inf is allowed only if `infinite`. With
    `static`, the value of an array is checked too, and a traced array is refused.
    """
    left = "(" if open_low or low == -math.inf else "["
    right = ")" if open_high or (high == math.inf and not infinite) else "]"
    expected = f"a number in {left}{low:g}, {high:g}{right}" + (f" ({reason})" if reason else "")
    if isinstance(value, jax.Array) and not static:
        if value.shape != () or not _is_real(value):
            raise ValueError(
                f"{function}: `{argument}` must be {expected}; got an array {value.dtype}[{value.shape}] that is not a "
                "real scalar."
            )
        kept = value.dtype in (jnp.float32, jnp.float64)
        return value if kept else value.astype(jnp.float32)  # strict promotion refuses any other type with a float32
    number = _concrete(value)
    if number is None:
        raise ValueError(f"{function}: `{argument}` must be {expected}; got {shown(value)}.")
    kept = _as_float32(number)

    def inside(number: float) -> bool:
        above = low < number if open_low else low <= number
        below = number < high if open_high else number <= high
        return above and below and (infinite or math.isfinite(number))

    if inside(number) and not inside(kept):
        expected += f" in float32, where it is {kept:g}"
    if not (inside(number) and inside(kept)):
        raise ValueError(f"{function}: `{argument}` must be {expected}; got {shown(value)}.")
    return number if math.isfinite(kept) else kept


def scalar_or_schedule(function: str, argument: str, value: Any, **limits: Any) -> Any:
    """Like `scalar`, but any function passes, since the value of a schedule is known only inside the step."""
    return value if is_callable(value) else scalar(function, argument, value, **limits)


def array(
    function: str, argument: str, value: Any, expected: str, *, kind: Any = jnp.floating, ndim: int = 0
) -> jax.Array:
    """Returns a JAX array; raises unless `value` is one of a dtype of this kind and `ndim` dimensions or more."""
    try:
        known = not (value is None or isinstance(value, np.ma.MaskedArray))
        made = jnp.asarray(value) if known else None
    except (OverflowError, TypeError, ValueError):
        made = None
    if made is None or not jnp.issubdtype(made.dtype, kind) or made.ndim < ndim:
        got = shown(value) if made is None else f"{made.dtype}{list(made.shape)}"
        raise ValueError(f"{function}: `{argument}` must be {expected}; got {got}.")
    return made


def integer(function: str, argument: str, value: Any, *, low: int, high: int = INT32, reason: str = "") -> int:
    """Returns `value` as a Python int; raises unless it is a whole number in [low, high]. `reason` explains `high`."""
    try:
        if isinstance(value, (bool, np.bool_, np.ma.MaskedArray)):
            raise TypeError
        number = operator.index(value)
    except TypeError:  # JAX's errors for tracers are TypeErrors too
        raise ValueError(f"{function}: `{argument}` must be a whole number >= {low}; got {shown(value)}.") from None
    if number < low:
        raise ValueError(f"{function}: `{argument}` must be a whole number >= {low}; got {shown(value)}.")
    if number > high:
        why = f" ({reason})" if reason else ""
        raise ValueError(
            f"{function}: `{argument}` must be a whole number in [{low}, {high}]{why}; got {shown(value)}."
        )
    return number


def boolean(function: str, argument: str, value: Any) -> bool:
    """Returns a Python bool, or raises unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{function}: `{argument}` must be True or False; got {shown(value)}.")
    return bool(value)


def one_of(function: str, argument: str, value: Any, literal: Any) -> None:
    """Raises unless `value` is in the `Literal` of the signature, so that a type checker and a call agree."""
    choices = get_args(literal)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{function}: `{argument}` must be one of {', '.join(map(repr, choices))}; got {shown(value)}."
        )


def function(function: str, argument: str, value: Any, expected: str) -> None:
    """Raises unless `value` can be called; `expected` describes its arguments."""
    if not is_callable(value):
        raise ValueError(f"{function}: `{argument}` must be a function {expected}; got {shown(value)}.")


def is_callable(value: Any) -> bool:
    """Whether it is a function or a callable object, but not a class, although Python can call that too."""
    return callable(value) and not isinstance(value, type)


def floating_dtype(function: str, argument: str, value: Any, choices: tuple[Any, ...] = ()) -> Any:
    """Returns the dtype; raises unless it is a real floating-point dtype (and among `choices`, if there are any)."""
    names = ", ".join(f"jnp.{jnp.dtype(choice).name}" for choice in choices)
    try:
        dtype = (
            None
            if value is None or isinstance(value, (bool, float, jax.Array, np.ndarray, np.generic))
            else jnp.dtype(value)
        )
    except TypeError:
        dtype = None
    valid = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not valid or (choices and dtype not in [jnp.dtype(choice) for choice in choices]):
        expected = f"one of {names}" if choices else "a floating-point dtype"
        raise ValueError(f"{function}: `{argument}` must be {expected}; got {shown(value)}.")
    return dtype


def axis_name(function: str, value: Any) -> AxisName | None:
    """Returns `axis_name`; raises unless it is one. JAX checks whether its axes are bound."""
    names = value if isinstance(value, tuple) else (value,)
    known = value is None or isinstance(value, LeafAxes)
    if not known and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"{function}: `axis_name` must be the name of a mesh axis, a tuple of names, `leaf_axes(specs)`, or None; "
            f"got {shown(value)}."
        )
    return value


def shown(value: Any) -> str:
    """A short form of a value for a message, which says if it is traced."""
    if isinstance(value, Tracer):
        return f"a traced {value.dtype}{list(value.shape)}, although it must be known when the function is called"
    if getattr(value, "ndim", 0) and value.size > 8:
        return f"an array {value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _is_real(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)


def _concrete(value: Any) -> float | None:
    """The value as a number, or None if it is not a number or not known."""
    if isinstance(value, (Tracer, bool, np.bool_, np.ma.MaskedArray)):
        return None
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        if value.shape != () or not _is_real(value):
            return None
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond float64
        return -math.inf if value < 0 else math.inf


def _as_float32(number: float) -> float:
    """A number as XLA holds it in float32, where subnormals are 0."""
    with np.errstate(over="ignore", under="ignore"):
        kept = float(np.float32(number))
    return 0.0 if abs(kept) < float(_FLOAT32.tiny) else kept

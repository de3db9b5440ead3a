"""Checks of static arguments: every message names function, argument, value and valid range.

Only concrete Python and NumPy numbers are looked at. A JAX array may be a tracer or a hyperparameter that
`optax.inject_hyperparams` feeds in at every step, and a value inside a step must never raise, so of arrays only the
shape is checked.
"""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["boolean", "integer", "one_of", "scalar", "scalar_or_schedule"]


def scalar(
    function: str,
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    infinite: bool = False,
) -> None:
    """Raises unless `value` is a real number in [low, high] (or (low, high]), or a 0-d array of any value."""
    left = "(" if open_low or low == -math.inf else "["
    right = ")" if high == math.inf and not infinite else "]"
    expected = f"a number in {left}{low:g}, {high:g}{right}"
    if isinstance(value, jax.Array):
        if value.shape != () or not (
            jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        ):
            raise ValueError(
                f"{function}: `{argument}` must be {expected}; got an array {value.dtype}[{value.shape}] that is not a "
                "real scalar."
            )
        return
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{function}: `{argument}` must be {expected}; got {value!r}.")
    number = float(value)
    inside = low < number <= high if open_low else low <= number <= high
    if not inside or (math.isinf(number) and not infinite):
        raise ValueError(f"{function}: `{argument}` must be {expected}; got {value!r}.")


def scalar_or_schedule(function: str, argument: str, value: Any, **limits: Any) -> None:
    """As `scalar`, and any callable passes: what a schedule gives is known only inside the step."""
    if not callable(value):
        scalar(function, argument, value, **limits)


def integer(function: str, argument: str, value: Any, *, low: int) -> int:
    """Returns `value` as a Python int, or raises unless it is a whole number of at least `low`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{function}: `{argument}` must be a whole number >= {low}; got {value!r}.") from None
    if number < low:
        raise ValueError(f"{function}: `{argument}` must be a whole number >= {low}; got {value!r}.")
    return number


def boolean(function: str, argument: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{function}: `{argument}` must be True or False; got {value!r}.")


def one_of(function: str, argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{function}: `{argument}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")

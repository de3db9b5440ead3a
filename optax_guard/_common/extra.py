"""Finds the loss and the batch's tag among the extra arguments of an update, and warns of misspelt keywords.

Optax passes extra arguments on by name and ignores unknown ones. It calls the loss `value`; training programs also call
it `loss`, which is used if `value` is not given.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common import validate
from optax_guard._common.axes import axis_names, max_over, mean_over
from optax_guard._common.tree import large_as_inf
from optax_guard._common.typing import AxisName

__all__ = [
    "is_number",
    "loss_in",
    "named_by",
    "representable",
    "tag_in",
    "warn_of_misspellings",
    "with_names_of",
    "with_value",
]

_READ = {  # the extra arguments that are read, and what a person may have meant
    "value": "the loss is called `value`",
    "weight": "a micro-batch's weight is called `weight`",
    "loss": "the loss is called `value`",
    "max_logits": "the largest attention logits are called `max_logits`",
}
_NAMES = "__optax_guard_names__"
_NEAR = 2  # the number of letters that may be changed, added or left out


def loss_in(function: str, extra: dict[str, Any], axis_name: AxisName | None = None) -> jax.Array | None:
    """The loss as a real scalar, f32[] or wider, on which all devices agree; None if none was given."""
    loss = representable(with_value(extra).get("value"))
    if loss is None:
        return None
    if not is_number(loss) or np.shape(loss) != ():
        got = f"an array of shape {np.shape(loss)}" if is_number(loss) else f"{loss!r}"
        raise ValueError(f"{function}: `value` must be the scalar loss; got {got} (a `loss` is used as `value`).")
    if not hasattr(loss, "dtype"):  # a Python number has no dtype of its own
        with large_as_inf():
            array = jnp.asarray(loss, jnp.complex64 if isinstance(loss, complex) else jnp.float32)
    else:
        array = jnp.asarray(loss)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.where(jnp.isfinite(array), jnp.real(array), jnp.nan)
    array = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
    return mean_over(array, axis_name)


def tag_in(function: str, extra: dict[str, Any], axis_name: AxisName | None = None) -> jax.Array | int:
    """The number that identifies the batch, i32[], the largest of all devices; -1 if none was given."""
    tag = extra.get("tag")
    if tag is None:
        return -1
    whole = isinstance(tag, (int, np.integer)) and not isinstance(tag, bool)
    dtype = getattr(tag, "dtype", None)
    array = dtype is not None and jnp.issubdtype(dtype, jnp.integer) and np.shape(tag) == ()
    if not (-1 <= tag <= validate.INT32 if whole else array):
        raise ValueError(
            f"{function}: `tag` must be one integer in [0, 2**31) that identifies the batch, such as its index or "
            f"epoch * batches_per_epoch + index; got {validate.shown(tag)}."
        )
    number = jnp.asarray(tag)
    known = number >= 0  # in an array, what no int32 can hold is no tag either
    if jnp.iinfo(number.dtype).max > validate.INT32:
        known = known & (number <= validate.INT32)
    return max_over([jnp.where(known, number.astype(jnp.int32), -1)], axis_names(axis_name))[0]


def representable(number: Any) -> Any:
    """The same, except that a whole number beyond int32 becomes a float, or Inf if no float can hold it."""
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not whole or abs(int(number)) <= validate.INT32:
        return number
    if abs(int(number)) < 2**1023:
        return float(number)
    return math.inf if number > 0 else -math.inf


def with_value(extra: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments, in which a loss passed as `loss` (a number or an array of numbers) is also `value`."""
    if extra.get("value") is None and is_number(extra.get("loss")):
        return {**extra, "value": extra["loss"]}
    return extra


def warn_of_misspellings(extra: dict[str, Any], receiver: Any = None) -> None:
    """Warns, once for each name, of a keyword that is at most two letters away from one that is read.

    There is no warning for a parameter of the `update` of `receiver`, to which the keywords are passed.
    """
    near = {
        name: word for name in extra for word in _READ if name not in _READ and _distance(name.lower(), word) <= _NEAR
    }
    if not near:
        return
    known = named_by(receiver)
    for name, word in near.items():
        if name not in known:
            _warn(name, word)


@functools.cache
def _warn(name: str, word: str) -> None:
    warnings.warn(f"optax_guard: nothing reads the extra argument `{name}`; {_READ[word]}.", stacklevel=4)


def with_names_of(receiver: Any, update: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` that passes its keywords on to `receiver`, marked with the names that are known there."""
    setattr(update, _NAMES, named_by(receiver))
    return update


def named_by(receiver: Any) -> set[str]:
    """The named parameters of the `update` of `receiver`."""
    try:
        return getattr(receiver.update, _NAMES, None) or set(inspect.signature(receiver.update).parameters)
    except (AttributeError, TypeError, ValueError):  # no receiver, or a function without a signature
        return set()


def is_number(loss: Any) -> bool:
    """Whether this is a number or an array of numbers, and not a string, a function or a key."""
    if isinstance(loss, (bool, int, float, complex)):
        return True
    if isinstance(loss, np.ma.MaskedArray):  # JAX does not accept masked arrays
        return False
    dtype = getattr(loss, "dtype", None)
    return (
        dtype is not None
        and hasattr(loss, "shape")
        and (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool))
    )


def _distance(one: str, other: str) -> int:
    """The number of letters that must be changed, added or left out (the Levenshtein distance)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]

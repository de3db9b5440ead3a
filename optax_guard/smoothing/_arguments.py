"""Checks of the arguments of this module, and its progress bar."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optax_guard._common import validate
from optax_guard._common.prng import raw_key
from optax_guard._common.typing import PRNGKeyLike, PyTree

__all__ = [
    "ABSTAIN",
    "ApplyFn",
    "SmoothedClassifier",
    "bar",
    "check_apply_fn",
    "check_call",
    "check_floats",
    "check_inputs",
    "check_labels",
    "logit_count",
    "number",
    "scipy_special",
    "whole",
]

ApplyFn: TypeAlias = Callable[[PyTree, jax.Array], jax.Array]

ABSTAIN = -1  # the prediction when the samples do not decide the class
_PATIENCE = 2.0  # seconds of work before a progress bar appears


class SmoothedClassifier(NamedTuple):
    """A classifier and the standard deviation of its noise, from `smooth`."""

    apply_fn: ApplyFn  # (params, inputs[batch, ...]) -> logits[batch, classes]
    sigma: float


def check_apply_fn(name: str, apply_fn: Any) -> None:
    expected = "a hashable function (params, inputs) -> logits"
    if not validate.is_callable(apply_fn):
        raise ValueError(f"{name}: `apply_fn` must be {expected}; got {apply_fn!r}.")
    try:
        hash(apply_fn)
    except TypeError:
        hint = "Wrap it in a function that takes its arrays as `params`, as the module's docstring shows."
        raise ValueError(f"{name}: `apply_fn` must be {expected}; got {type(apply_fn).__name__}. {hint}") from None
    try:
        signature = inspect.signature(apply_fn)
    except (ValueError, TypeError):  # a builtin without a signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        hint = "For a function of the inputs alone pass `lambda _, inputs: f(inputs)` and `params` = ()."
        raise ValueError(f"{name}: `apply_fn` must be {expected}; got {apply_fn!r}: {error}. {hint}") from None


def check_call(name: str, smoothed: Any, inputs: ArrayLike, key: PRNGKeyLike, progress: Any) -> tuple[Any, jax.Array]:
    """Checks the call and returns the inputs as an array and the raw data of the key."""
    if not isinstance(smoothed, SmoothedClassifier):
        raise ValueError(f"{name}: `smoothed` must come from `smooth(apply_fn, sigma)`; got {smoothed!r}.")
    progress = validate.boolean(name, "progress", progress)
    return check_inputs(name, inputs), raw_key(name, key)


def check_inputs(name: str, inputs: ArrayLike) -> Any:
    """The inputs as an array with a batch axis, on the host or on their device."""
    if isinstance(inputs, Tracer):
        raise ValueError(f"{name}: `inputs` is traced. Call {name} outside `jit`: it compiles what it runs itself.")
    array = check_floats(name, inputs if hasattr(inputs, "dtype") else np.asarray(inputs))
    if array.ndim == 0:
        raise ValueError(f"{name}: `inputs` must be an array [batch, ...]; got a scalar.")
    return array


def check_floats(name: str, inputs: Any) -> Any:
    dtype = getattr(inputs, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = repr(inputs) if dtype is None else f"{dtype}{list(inputs.shape)}"
        raise ValueError(f"{name}: `inputs` must be a floating-point array, scaled as in training; got {shown}.")
    return inputs


def check_labels(name: str, labels: ArrayLike, batch: int) -> np.ndarray:
    array = np.asarray(labels)
    if batch == 0:
        raise ValueError(f"{name}: accuracy needs at least one input.")
    if array.shape != (batch,) or not np.issubdtype(array.dtype, np.integer):
        shown = f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"{name}: `labels` must be integers [{batch}], one for each input; got {shown}.")
    return array


def logit_count(name: str, apply_fn: ApplyFn, params: PyTree, inputs: Any, batch: int) -> int:
    dtype = jax.dtypes.canonicalize_dtype(inputs.dtype)
    logits = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), dtype))
    shape, kind = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape is None or kind is None or len(shape) != 2 or shape[0] != batch or shape[1] < 2:
        shown = f"{kind}{list(shape)}" if shape is not None else repr(logits)
        raise ValueError(f"{name}: `apply_fn` must return logits [{batch}, classes >= 2]; it returned {shown}.")
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"{name}: `apply_fn` must return logits of a floating dtype; it returned {kind}.")
    return shape[1]


def number(name: str, argument: str, value: Any, low: float, high: float, *, closed_low: bool = False) -> float:
    """Returns a Python float in (low, high), or in [low, high) with `closed_low`. Nothing here runs in `jit`."""
    return validate.scalar(
        name, argument, value, low=low, high=high, open_low=not closed_low, open_high=True, static=True
    )


def whole(name: str, argument: str, value: Any) -> int:
    return validate.integer(name, argument, value, low=1)


def scipy_special(name: str) -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise ImportError(f"{name} needs SciPy: pip install scipy") from error
    return special


@contextlib.contextmanager
def bar(name: str, total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that reports progress; a bar appears if the work takes long."""
    bar = _rich_bar() if progress else None
    if bar is None:
        yield lambda _: None
        return
    task, begin = bar.add_task(name, total=total), time.monotonic()

    def advance(more: int) -> None:
        bar.update(task, advance=more)
        if not bar.live.is_started and time.monotonic() - begin > _PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _rich_bar() -> Any:
    """A progress bar on stderr, or None without `rich` or without a terminal."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    console = Console(stderr=True)
    return Progress(console=console, transient=True) if console.is_interactive or console.is_jupyter else None

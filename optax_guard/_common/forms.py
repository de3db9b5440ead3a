"""The form of a step that may or may not happen, chosen by the platform for which it is lowered.

On a CPU or a TPU, a conditional is fastest: the branch not taken costs nothing, and nothing is copied. On a GPU, the
host would wait for its predicate at every step; it is faster to compute both results and to select one, which XLA fuses
into the kernels of the step. The platform is known when a program is lowered, not when it is traced, so both forms are
traced as one: a conditional and a selection, each with a predicate that is a constant on the platforms of the other
form. XLA removes whichever has the constant.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

__all__ = ["PLATFORMS", "cond_or_select", "form_of", "lowered_for"]

PLATFORMS = {"cpu": ("cpu",), "gpu": ("cuda", "rocm"), "tpu": ("tpu",)}  # and JAX's names for them

_LOOPS_AND_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated", "while", "scan")
_DECOMPOSITIONS = ("cholesky", "eigh", "eig", "svd", "lu", "geqrf", "triangular_solve")
_FOREIGN = ("pure_callback", "ffi_call", "pallas_call")
_WORK = frozenset((*_LOOPS_AND_PRODUCTS, *_DECOMPOSITIONS, *_FOREIGN))

_forced: str | None = None  # a platform whose form is lowered for every platform


@contextmanager
def form_of(platform: str | None) -> Iterator[None]:
    """Lowers the form of one of `PLATFORMS` everywhere, for tests, which run on a CPU; None: of the actual platform.

    It holds for what is traced inside; programs that were compiled before keep their form.
    """
    global _forced
    before, _forced = _forced, platform
    try:
        yield
    finally:
        _forced = before


def lowered_for(platforms: tuple[str, ...]) -> jax.Array:
    """bool[]: whether the program is for one of `platforms`, a constant to the compiler."""
    if _forced is not None:
        return jnp.full((), _forced in platforms, bool)
    names = [name for platform in platforms for name in PLATFORMS[platform]]
    return lax.platform_dependent(**dict.fromkeys(names, _yes), default=_no)


def _yes() -> jax.Array:
    return jnp.ones((), bool)


def _no() -> jax.Array:
    return jnp.zeros((), bool)


def cond_or_select(
    predicate: jax.Array, act: Callable[[], Any], hold: Callable[[], Any], *, selects: tuple[str, ...] = ("gpu",)
) -> Any:
    """`lax.cond(predicate, act, hold)`; on the platforms `selects` both are computed, and one result is selected.

    The results are the same: what `act` computes while `predicate` is False reaches neither the result nor a
    derivative. It is a conditional everywhere if `act` has side effects, or does work beside which a wait is nothing:
    matrix products, loops, a function on the host.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return lax.cond(predicate, act, hold)
    acted, held = _traced(act), _traced(hold)
    if acted.branches:
        return lax.cond(predicate, act, hold)

    def strict(predicate: jax.Array, consts: Any) -> Any:
        return lax.cond(predicate, lambda: acted.run(consts[0]), lambda: held.run(consts[1]))

    @jax.custom_jvp
    def choose(predicate: jax.Array, consts: Any) -> Any:
        selecting = lowered_for(selects)
        result = strict(predicate | selecting, consts)
        return jax.tree.map(functools.partial(_where, predicate | ~selecting), result, held.run(consts[1]))

    @choose.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(strict, primals, tangents)

    return choose(predicate, (acted.consts, held.consts))


class _Traced(NamedTuple):
    """A function without arguments that was traced once: what it closes over, and how to run it on such values."""

    consts: list[Any]
    run: Callable[[list[Any]], Any]
    branches: bool  # whether it must, or had better, run only if its result is used


def _traced(function: Callable[[], Any]) -> _Traced:
    # Inside `jit` it is one equation, so that running it does not trace it again.
    closed, shapes = jax.make_jaxpr(jax.jit(function), return_shape=True)()
    structure = jax.tree.structure(shapes)

    def run(consts: list[Any]) -> Any:
        return jax.tree.unflatten(structure, jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))())

    return _Traced([_as_array(const) for const in closed.consts], run, bool(closed.effects) or _works(closed.jaxpr))


def _works(jaxpr: Any) -> bool:
    """Whether a program does any of `_WORK`."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _WORK:
            return True
        inside = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        if any(_works(getattr(each, "jaxpr", each)) for each in inside if hasattr(each, "eqns")):
            return True
    return False


def _as_array(const: Any) -> Any:
    """The same value. Under `vmap`, a tracer may stand for a NumPy array, which `custom_jvp` refuses: it is copied."""
    value = const
    while isinstance(value, Tracer):
        value = getattr(value, "val", None)
    return jnp.array(const, copy=True) if isinstance(value, (np.ndarray, np.generic)) else const


def _where(predicate: jax.Array, new: Any, old: Any) -> Any:
    return new if new.dtype == jax.dtypes.float0 else lax.select_n(predicate, old, new)

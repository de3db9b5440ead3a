"""Compiling quickly, for tests of what a function computes.

Nearly all of the suite's time is XLA's compiler at work on functions that run once, on a handful of numbers. Its newer
generator of code for CPUs and LLVM's optimizations take most of that. Without them the same program goes through the
same passes over its operations and its sharding, and JAX 0.10 compiles it in a third to a half of the time. JAX 0.12
knows only the second of these options, so that there the same tests also run with the generator that users have.

A test of the compiled program itself (its text, its memory, its aliases) uses `jax.jit` as it is. So do the tests of
the basic numbers: clipping, statistics, noise and the guard, whose jitted steps are few.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.stages import Wrapped

in_place = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA of older JAX makes a temporary copy of the parameters on a CPU"
)

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def quick_options() -> dict[str, Any]:
    """Those of `QUICK` that the compiler knows; XLA renames and removes such options without notice."""
    return {name: value for name, value in QUICK.items() if _knows({name: value})}


def _knows(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def quick_jit(function: Callable[..., Any], **options: Any) -> Wrapped:
    """`jax.jit`, compiled quickly; only for the outermost function, as JAX has it for all such options."""
    return jax.jit(function, compiler_options=quick_options(), **options)

"""Compiling quickly, for tests of what a function computes.

Nearly all of the suite's time is XLA's compiler at work on functions that run once, on a handful of numbers. Its newer
generator of code for CPUs and LLVM's optimizations take most of that. Without them the same program goes through the
same passes over its operations and its sharding, and JAX 0.10 compiles it in less than half of the time. A third option
leaves a program in one piece, which XLA would compile in 32, with a thread for each: for a small program, that saves
another third. JAX 0.12 knows no older generator, so that there the same tests also run with the one that users have.

The whole suite runs under these options (conftest.py) unless the environment says `COMPILER=users`, as `make test-all`
does for the tests of the basic numbers and of compiled programs.
"""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.stages import Wrapped

in_place = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA of older JAX makes a temporary copy of the parameters on a CPU"
)

# By version, since XLA renames and removes such options without notice, and ends the process at an unknown flag.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quick_flags() -> list[str]:
    """`QUICK` as flags of XLA, to be set before anything is compiled."""
    return [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]


def quick_options() -> dict[str, Any]:
    """`QUICK` as options of `jax.jit`, which other backends than the CPU do not all take."""
    return QUICK if jax.default_backend() == "cpu" else {}


def users_jit(function: Callable[..., Any], **options: Any) -> Wrapped:
    """`jax.jit` with XLA's own defaults, for tests in which the rounding of the compiled code matters."""
    users = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    return jax.jit(
        function, compiler_options={name: value for name, value in users.items() if name in quick_options()}, **options
    )


def quick_jit(function: Callable[..., Any], **options: Any) -> Wrapped:
    """`jax.jit`, compiled quickly; only for the outermost function, as JAX has it for all such options."""
    return jax.jit(function, compiler_options=quick_options(), **options)

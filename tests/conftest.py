"""The settings under which every test runs: strict about dtypes and ranks, on 8 CPU devices."""

import gc
import os
from collections.abc import Iterator

import hangs
import jax
import pytest
from compiling import quick_flags

from optax_guard._common.forms import form_of

jax.config.update("jax_num_cpu_devices", 8)  # before the first computation starts a backend
if os.environ.get("COMPILER") != "users":
    with pytest.MonkeyPatch.context() as patch:  # examples, in processes of their own, compile as users do
        patch.setenv("XLA_FLAGS", " ".join([os.environ.get("XLA_FLAGS", ""), *quick_flags()]))
        jax.jit(lambda: 0)()  # XLA reads its flags once, for the first program

_form = form_of(os.environ.get("FORM"))  # "gpu" or "tpu": the form of steps that is lowered for one, on this CPU
_form.__enter__()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(hangs, "hangs")  # for the doctests of the package, too


def pytest_collection_finish() -> None:
    """Python looks for garbage less often and not among modules and tests: else a fifteenth of the time goes there."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")  # not per test, which Hypothesis would call an unsafe fixture
def _strict() -> Iterator[None]:
    """Strict promotion of dtypes and ranks.

    A context and not a global setting, since doctests run in the same session and show stock Optax optimizers, which do
    not work under it.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's default promotion, for tests with stock Optax: Adam and MultiSteps fail under the strict one."""
    with jax.numpy_dtype_promotion("standard"):
        yield

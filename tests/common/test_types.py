"""Types for users: what a checker is told by the signatures."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

import optax_guard as og

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = ROOT / "tests/programs"
MODULES = [
    og,
    og.published,
    *(importlib.import_module(f"optax_guard.{name}") for name in ("models", "preflight", "smoothing")),
]
MODULES += [importlib.import_module(f"optax_guard.{name}") for name in ("diagnose", "flax", "report")]
# Words of the user, what JAX calls a dtype, and patterns for paths.
FREE_WORDS = {"axis_name", "path", "dtype", "param_dtype", "accumulator_dtype"}
PATTERNS = {f"{name}_attention": "layers" for name in ("equinox", "linen", "nnx", "transformer")}


def public_parameters() -> list[tuple[str, inspect.Parameter]]:
    """(function, parameter) of all that a user calls, without patterns, which are no options."""
    found = []
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            made = thing.__init__ if inspect.isclass(thing) and hasattr(thing.__init__, "__code__") else thing
            if inspect.isfunction(made):
                known = inspect.signature(made).parameters.values()
                found += [(name, each) for each in known if each.name != PATTERNS.get(name)]
    return found


def parts_of(annotation: Any) -> list[Any]:
    """The members of a union, else the annotation alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def words_of(annotation: Any) -> list[str]:
    return [word for part in parts_of(annotation) if get_origin(part) is Literal for word in get_args(part)]


OPTIONS = [(function, each.name) for function, each in public_parameters() if words_of(each.annotation)]


def test_every_option_that_is_a_word_is_a_literal() -> None:
    loose = [
        f"{function}({each})"
        for function, each in public_parameters()
        if each.name not in FREE_WORDS
        and (isinstance(each.default, str) or str in parts_of(each.annotation))
        and (not words_of(each.annotation) or str in parts_of(each.annotation) or Any in parts_of(each.annotation))
    ]
    assert not loose, loose
    assert len(OPTIONS) >= 18
    for function, each in public_parameters():
        if isinstance(each.default, str) and each.name not in FREE_WORDS:
            assert each.default in words_of(each.annotation), (function, each)


@pytest.mark.parametrize(("function", "option"), OPTIONS, ids=["-".join(each) for each in OPTIONS])
def test_a_wrong_word_is_in_the_program_that_a_checker_refuses(function: str, option: str) -> None:
    lines = (PROGRAMS / "wrong_program.py").read_text().splitlines()
    assert any(f"{function}(" in line and f"{option}=" in line and "pyright: ignore[" in line for line in lines)


@pytest.mark.slow  # 8 s of CPU: pyright reads JAX; `make lint` checks the same files
def test_a_strict_checker_passes_the_right_program_and_refuses_the_wrong_one() -> None:
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed: THE TYPES THAT USERS SEE ARE NOT CHECKED (pip install pyright)")
    command = [pyright, "--pythonpath", sys.executable, *PROGRAMS.glob("*.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # 20 s: it compiles three steps
def test_the_right_program_runs() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, PROGRAMS / "user_program.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr

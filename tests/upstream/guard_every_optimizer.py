"""A pytest plugin: every optimizer that Optax's tests make is wrapped in a guard without rules.

The guard is silent, so each test must pass as it does without. What takes one gradient per example has the guard after
it, where it belongs. `GUARDED=transform` wraps the parts of optimizers
(`scale_by_adam`) instead of the whole ones, for the tests of those parts. `EVERY=10` takes each tenth test.
"""

import fnmatch
import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
import optax.contrib
import pytest
from optax._src import alias, transform

import optax_guard as og

LEFT_OUT = "left out: "


def factories() -> list[Callable[..., Any]]:
    """The functions of Optax that make an optimizer."""
    found = []
    for module in [transform] if os.environ.get("GUARDED") == "transform" else [alias, *contrib_modules()]:
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            makes = own and "GradientTransformation" in str(function.__annotations__.get("return"))
            if makes and not name.startswith("_"):
                found.append(function)
    return found


def contrib_modules() -> list[Any]:
    names = [each.name for each in pkgutil.iter_modules(optax.contrib.__path__) if not each.name.endswith("_test")]
    return [importlib.import_module(f"optax.contrib.{name}") for name in names]


def guarded(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        made = factory(*args, **kwargs)
        if factory.__name__ == "differentially_private_aggregate":
            return optax.chain(made, og.guard(optax.identity(), recorder_rows=1))
        return og.guard(made, recorder_rows=1)

    return make


def pytest_configure(config: pytest.Config) -> None:
    del config
    replaced = {function: guarded(function) for function in factories()}
    assert len(replaced) > 20, "Optax's optimizers are no longer where they were"
    for name, module in list(sys.modules.items()):
        if name == "optax" or name.startswith("optax."):
            for attribute, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in replaced:
                    setattr(module, attribute, replaced[value])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = items[:: every()]
    for item in items:
        test = key(item.nodeid).rstrip("0123456789")  # the number of its parameters
        for name, reason in exceptions().items():
            pattern, _, word = name.rstrip("]").partition("[")
            if fnmatch.fnmatchcase(test, pattern) and word in parameters(item):
                item.add_marker(pytest.mark.skip(reason=f"{LEFT_OUT}{name}: {reason}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many were left out; a line of the list that matches nothing is named, so that it stays short."""
    stats = terminalreporter.stats
    skipped = [str(report.longrepr) for report in stats.get("skipped", []) if LEFT_OUT in str(report.longrepr)]
    reports = [each for outcome in ("passed", "failed", "skipped", "error") for each in stats.get(outcome, [])]
    terminalreporter.write_line(f"{len({each.nodeid for each in reports})} tests, {len(skipped)} of them left out")
    files = {key(each.nodeid).split("::")[0] for each in reports}
    for name in exceptions():
        if every() == 1 and name.split("::")[0] in files and not any(name in each for each in skipped):
            terminalreporter.write_line(f"FAILED: exceptions.txt lists {name}, which is not there")


def parameters(item: pytest.Item) -> str:
    """What absl's `parameterized` gives a test, as text."""
    return str(getattr(getattr(item, "obj", None), "__x_params_repr__", ""))


def every() -> int:
    return int(os.environ.get("EVERY", "1"))


def key(nodeid: str) -> str:
    return nodeid.rsplit("/", 1)[-1]


@functools.cache
def exceptions() -> dict[str, str]:
    """Test (a pattern) -> reason, from `exceptions.txt`."""
    lines = (Path(__file__).parent / "exceptions.txt").read_text().splitlines()
    pairs = [line.split("  # ") for line in lines if line and not line.startswith("#")]
    return {name.strip(): reason for name, reason in pairs}

"""Running an example as a person runs it."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compiling import quick_flags

ROOT = Path(__file__).parent.parent
SECONDS = 240  # below pytest's own limit, which would leave the process behind


def example(
    *arguments: str, script: str = "quickstart.py", compile_fast: bool = False, columns: int = 120
) -> subprocess.CompletedProcess[str]:
    """`python examples/script arguments`, in a process of its own; `compile_fast` for one that hardly computes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    if compile_fast:
        environment["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick_flags()])
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)


def ended_by_arguments(*arguments: str, script: str = "quickstart.py") -> tuple[Any, str]:
    """The exit status of an example that ends while it reads its arguments, and what it printed.

    In this process: half a dozen imports of JAX are saved. Any other exception fails the test, as a traceback should.
    """
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        module.main(list(arguments))
    return ended.value.code, printed.getvalue()


def table_rows(output: str) -> list[list[str]]:
    """The cells of all tables that rich printed, row by row, without their headers."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]

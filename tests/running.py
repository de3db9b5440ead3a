"""Running an example as a person runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def example(
    *arguments: str, script: str = "quickstart.py", compile_fast: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python examples/script arguments`, in a process of its own; `compile_fast` for one that hardly computes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    if compile_fast:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def table_rows(output: str) -> list[list[str]]:
    """The cells of all tables that rich printed, row by row, without their headers."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]

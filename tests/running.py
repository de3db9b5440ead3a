"""Running an example as a person runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def example(*arguments: str, script: str = "quickstart.py") -> subprocess.CompletedProcess[str]:
    """`python examples/script arguments`, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)

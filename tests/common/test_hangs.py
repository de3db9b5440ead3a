"""A run that hangs says in which test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HANGS = """
def test_of_many_calls():
    deep(200)

def deep(more):
    while more == 0:
        pass
    deep(more - 1)
"""


def test_a_test_that_hangs_is_named_though_its_calls_are_too_many_to_print(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(HANGS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfaulthandler_timeout = 2\nfaulthandler_exit_on_timeout = true\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "hangs", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode != 0
    assert "test_it.py::test_of_many_calls" in run.stderr
    assert "Timeout" in run.stderr


def test_every_run_of_the_suite_has_it(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.has_plugin("hangs")
    assert float(request.config.getini("faulthandler_timeout")) >= 600  # a loaded machine is no hang

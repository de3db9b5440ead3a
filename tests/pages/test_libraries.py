"""docs/libraries.md: each program runs where its library is installed (`make libraries`), the others are marked."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from running import ROOT

PAGE = (ROOT / "docs" / "libraries.md").read_text()
(FIRST,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PROGRAMS = re.findall(r'^```python title="(\S+) ([\d.]+)"\n(.*?)^```\n\n```\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
CHANGES = re.findall(r'^```diff title="(.*?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
SHOWN = {"dm-haiku": "Haiku", "ott-jax": "OTT"}  # whose heading is not their name on the index


@pytest.mark.slow
@pytest.mark.parametrize(("library", "version", "program", "output"), PROGRAMS, ids=[each[0] for each in PROGRAMS])
def test_the_program_runs_with_its_library(
    library: str, version: str, program: str, output: str, tmp_path: Path
) -> None:
    try:
        installed = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed: `make libraries`")
    assert installed == version
    (tmp_path / "program.py").write_text(FIRST + program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "program.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == output


def test_each_program_is_installed_by_the_group_in_its_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    group = [re.sub(r"\[.*\]", "", each) for each in tomllib.loads(text)["dependency-groups"]["libraries"]]
    assert sorted(group) == sorted(f"{library}=={version}" for library, version, *_ in PROGRAMS)


def test_each_library_of_the_table_has_a_program_or_a_short_change_that_says_what_it_is_for() -> None:
    table = re.findall(r"\]\(#([\w-]+)\)", PAGE.split("\n\n```")[0])
    headings = re.findall(r"^###? (\w+)$", PAGE, re.MULTILINE)
    assert sorted(table) == sorted(heading.lower() for heading in headings)
    assert len(PROGRAMS) + len(CHANGES) == len(headings)
    for library, *_ in PROGRAMS:
        assert SHOWN.get(library, library).lower() in table
    for title, change in CHANGES:
        assert re.match(r"not run: .*\w", title)
        assert all(line[0] in "+-" for line in change.splitlines())
        assert len(change.splitlines()) <= 10, title

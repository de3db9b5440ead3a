"""What the package says of itself, and what its source distribution holds."""

import doctest
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from registry import Entry

import optax_guard as og
from optax_guard.rules import _skip

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SDIST = {name.removeprefix("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}


def test_the_source_distribution_holds_all_that_is_tracked() -> None:
    """The tests read documents, examples, benchmarks and settings."""
    missing = [name for name in sorted(SDIST) if not (ROOT / name).exists()]
    assert not missing
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no checkout: this is the source distribution itself")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in tracked.split()} - {"pyproject.toml"} == SDIST


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].split()[0] == version


def test_the_lowest_versions_are_pinned_nowhere_else() -> None:
    """`make lowest` installs the lower bounds that are written here; CI tries every Python that is listed."""
    bounds = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["flax"]]
    assert [re.fullmatch(r"(\w+)>=[\d.]+", bound)[1] for bound in bounds] == ["jax", "jaxlib", "optax", "flax"]
    flax = {line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines if "flax" in line}
    assert flax | {line for line in PROJECT["dependency-groups"]["test"] if "flax" in line} == {bounds[3]}
    listed = [x for x in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", x)]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert all(f'"{each.split()[-1]}"' in workflow for each in listed)


def test_what_a_contributor_is_told_to_look_at_exists() -> None:
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / ".github").rglob("*.*")]
    told = {path for page in pages for path in re.findall(r"\b(?:docs|tests|optax_guard)/[\w/.]*\w", page.read_text())}
    assert len(told) > 10
    assert not [path for path in told if not (ROOT / path).exists()]
    targets = {name for page in pages for name in re.findall(r"`make ([\w./-]+)", page.read_text())}
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    assert not [name for name in targets if not re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE)]


def test_the_rule_in_the_worked_example_works() -> None:
    """In the file that it is said to go into, with its row and its example; as for the task, see StabilityBench."""
    rule, row, _ = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names = dict(vars(_skip))
    exec(compile(rule, "CONTRIBUTING.md", "exec"), names)
    (found,) = doctest.DocTestFinder().find(names["skip_small"], "skip_small", module=False, globs=names)
    assert doctest.DocTestRunner().run(found) == (0, 3)
    offered = type("og", (), {"skip_small": names["skip_small"]})
    entry = eval(row, {"Entry": Entry, "og": offered})
    assert isinstance(entry.make(), og.Rule)

"""The notebooks on the pages are those of examples/notebooks; test_snippets.py runs them and compares their output."""

import importlib.util
import json
import re
from typing import Any

import pytest
from running import ROOT

NAMES = sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.py"))


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("build_notebooks", ROOT / "docs" / "build_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_three() -> None:
    assert NAMES == ["find_the_layer", "rescue_a_run", "which_bound"]


@pytest.mark.parametrize("name", NAMES)
def test_page_and_notebook_are_of_the_source(name: str) -> None:
    build = builder()
    cells = build.cells_of((ROOT / "examples" / "notebooks" / f"{name}.py").read_text())
    code = [cell.text for cell in cells if cell.is_code]
    page = (build.PAGES / f"{name}.md").read_text()
    again = f"{name}: make notebooks"
    assert re.findall(r"```python\n(.*?)\n```", page, re.DOTALL) == code, again
    assert all(cell.text.split("\n", 1)[-1].strip() in page for cell in cells if not cell.is_code), again
    made = json.loads((build.PAGES / f"{name}.ipynb").read_text())["cells"]
    assert ["".join(cell["source"]) for cell in made] == [cell.text for cell in cells], again
    pictures = {path.name for path in build.PAGES.glob(f"{name}-*.png")}
    assert pictures == set(re.findall(r"\((.*?\.png)\)", page))


def test_a_cell_shows_what_it_prints_and_its_last_line_if_that_is_a_figure() -> None:
    build = builder()
    cells = build.cells_of("# above\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 2\nprint(x)\nx + 1\n")
    assert [(cell.is_code, cell.text) for cell in cells] == [
        (False, "# Title\n\nText."),
        (True, "x = 2\nprint(x)\nx + 1"),
    ]
    done = build.ran(cells[1], {})
    assert (done.printed, done.picture) == ("2\n", b"")
    assert build.page("it", [cells[0], done]).endswith(
        "Text.\n\n```python\nx = 2\nprint(x)\nx + 1\n```\n\n```\n2\n```\n"
    )

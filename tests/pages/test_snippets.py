"""Every block of Python in README and on the pages runs as it stands, and prints what the page shows.

The blocks of a page run in order, in one namespace that holds nothing at first: what a page presumes stands on it. A
block without a language is output if it follows a block of Python with nothing in between, and then compared; elsewhere
it is a command of the shell, a formula or a drawing. A block with another language (`diff`, `console`) and one that
names another program in its first line (```python title="...") is not run.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from running import ROOT

BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-x]?\d+\.\d+(e[+-]\d+)?|\d+e[+-]\d+")
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "api" not in p.parts)]
NOTEBOOKS = {str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "notebooks"}
WITH_PYTHON = [str(page.relative_to(ROOT)) for page in PAGES if "```python\n" in page.read_text()]
SLOW = (
    NOTEBOOKS
    | {f"docs/{name}.md" for name in ("flax", "recipes", "state/held")}
    | {
        f"docs/{name}/index.md"
        for name in ("accumulation", "attention", "preflight", "recovery", "report", "smoothing")
    }
)


def run(text: str, names: dict[str, Any]) -> str:
    """What a block prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(text, "program.py", "exec"), names)
    return output.getvalue()


def words(text: str) -> list[str]:
    """Without numbers, whose last digits may differ, and the columns that they widen."""
    return NUMBER.sub("#", text).replace("-", "").split()


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in WITH_PYTHON]
)
def test_the_blocks_of_a_page_run_and_print_what_it_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    text = (ROOT / page).read_text()
    printed, ended = "", -1
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        if language == "python":
            assert max(map(len, code.splitlines())) <= 120  # the site has room for as many (docs/assets/site.css)
            printed, ended = run(code, names), block.end()
            for promised in re.findall(r'\A\s*It prints "(.*?)"', text[ended:]):
                assert printed.startswith(promised + "\n")
        elif language == "" and ended >= 0 and not text[ended : block.start()].strip():
            assert words(printed) == words(code)


def test_the_pages_show_what_is_compared() -> None:
    assert (ROOT / "README.md").read_text().count('It prints "') == 1
    blocks = BLOCK.findall((ROOT / "docs" / "triage.md").read_text())
    assert sum(language == "" for language, _ in blocks) == 7

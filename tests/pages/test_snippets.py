"""Programs on pages run as pasted, and print what the page shows."""

import contextlib
import io
import re
from typing import Any

import jax
import pytest
from running import ROOT

BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-x]?\d+\.\d+(e[+-]\d+)?|\d+e[+-]\d+")


def run(text: str, names: dict[str, Any]) -> str:
    """What a block prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), jax.numpy_dtype_promotion("standard"):
        exec(compile(text, "program.py", "exec"), names)
    return output.getvalue()


def words(text: str) -> list[str]:
    """Without numbers, whose last digits may differ, and the columns that they widen."""
    return NUMBER.sub("#", text).replace("-", "").split()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_program_is_complete(page: str) -> None:
    text = (ROOT / page).read_text()
    program = next(block for language, block in BLOCK.findall(text) if language)
    (promised,) = re.findall(r'It prints "(.*?)"', text)
    assert run(program, {}).startswith(promised + "\n")


def test_the_page_for_a_run_in_trouble_prints_what_it_shows() -> None:
    names: dict[str, Any] = {}
    printed, compared = "", 0
    for language, text in BLOCK.findall((ROOT / "docs" / "triage.md").read_text()):
        if language:
            printed = run(text, names)
        else:
            assert words(printed) == words(text)
            compared += 1
    assert compared == 5


@pytest.mark.slow
def test_every_recipe_runs() -> None:
    names: dict[str, Any] = {}
    for language, text in BLOCK.findall((ROOT / "docs" / "recipes.md").read_text()):
        assert language
        run(text, names)

"""The page for a person in trouble: its program runs as pasted, and prints what the page shows."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax

PAGE = Path(__file__).parent.parent.parent / "docs" / "triage.md"
NUMBER = re.compile(r"[-x]?\d+\.\d+(e[+-]\d+)?|\d+e[+-]\d+")


def test_the_page_prints_what_it_shows() -> None:
    blocks = re.findall(r"^```(python)?\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    printed = ""
    compared = 0
    for language, text in blocks:
        if language:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), jax.numpy_dtype_promotion("standard"):
                exec(compile(text, "program.py", "exec"), names)
            printed = output.getvalue()
        else:  # numbers may differ in their last digits, and columns in their width
            assert _words(printed) == _words(text)
            compared += 1
    assert compared == 5


def _words(text: str) -> list[str]:
    return NUMBER.sub("#", text).replace("-", "").split()

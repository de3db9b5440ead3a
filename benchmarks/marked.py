"""Tables of Markdown pages that a program writes, between a pair of comments.

<!-- begin costs: make bench -->

(written by the program)

<!-- end costs -->
"""

import re
from pathlib import Path

__all__ = ["marked", "put"]


def marked(text: str, name: str) -> str:
    """What stands between the comments of `name`."""
    return _find(text, name)[2].strip()


def put(page: Path, name: str, content: str) -> None:
    """Replaces what stands between the comments of `name`, blank lines around it: Markdown wants them."""
    text = page.read_text()
    found = _find(text, name)
    page.write_text(f"{text[: found.start(2)]}\n{content.strip()}\n\n{text[found.end(2) :]}")


def _find(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"(<!-- begin {name}:[^\n]*-->\n)(.*?)<!-- end {name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"There are no comments <!-- begin {name}: ... --> and <!-- end {name} --> here.")
    return found

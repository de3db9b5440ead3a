"""Parts of the walks over the registry that `make test` takes; `make test-all` takes all of them."""

from collections.abc import Sequence
from typing import Any

import pytest


def in_part(entries: Sequence[Any], every: int = 3, first: int = 0) -> list[Any]:
    """One in `every` for `make test`, all for `make test-all`: of what has to be compiled once for each entry."""
    marks = [[] if i % every == first else pytest.mark.slow for i in range(len(entries))]
    return [pytest.param(entry, id=str(entry), marks=mark) for entry, mark in zip(entries, marks, strict=True)]


def in_turn(entries: Sequence[Any], others: dict[str, Any], every: int) -> list[Any]:
    """All pairs of an entry and one of the others, a dict by name; in `make test` one in `every`, spread over both."""
    return [
        pytest.param(entry, other, id=f"{entry}-{name}", marks=[] if (i + j) % every == 0 else pytest.mark.slow)
        for i, entry in enumerate(entries)
        for j, (name, other) in enumerate(others.items())
    ]

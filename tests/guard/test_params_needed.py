"""What needs the parameters says so by its name, and the page on sharp edges lists it, no more and no less."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from registry import ENTRIES, PUBLIC, Entry, adamw

import optax_guard as og

PARAMS = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 3))}
PAGE = Path(__file__).parent.parent.parent / "docs" / "sharp_edges.md"
RUNGS = {"reset_moments": og.reset_moments(), "rewind": og.rewind()}
# Of an optimizer inside, which needs them by itself, Optax says it.
OURS = [entry for entry in ENTRIES if entry.needs_params and entry.arguments.get("inner") is not adamw]


def step_without_params(tx: optax.GradientTransformationExtraArgs) -> Any:
    return jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS)))


@pytest.mark.parametrize("entry", OURS, ids=str)
def test_what_needs_the_parameters_names_itself(entry: Entry) -> None:
    with pytest.raises(ValueError, match=r"needs the parameters") as caught:
        step_without_params(entry.make())
    assert str(caught.value).startswith(f"{entry.name}: ")


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.needs_params], ids=str)
def test_all_else_works_without(entry: Entry) -> None:
    with entry.promotion():
        step_without_params(entry.make())


@pytest.mark.parametrize("rung", RUNGS)
def test_a_guard_names_the_rung_that_needs_them(rung: str) -> None:
    with pytest.raises(ValueError, match=rf"guard: `recovery=\({rung}\(\.\.\.\),\)` needs the parameters"):
        step_without_params(og.guard(optax.sgd(0.1), recovery=(RUNGS[rung],)))


def test_stabilize_names_its_own_option() -> None:
    with pytest.raises(ValueError, match=r"stabilize: `max_change` needs the parameters"):
        step_without_params(og.stabilize(optax.sgd(0.1), max_change=0.1))
    with pytest.raises(ValueError, match=r"stabilize: `recovery=\(rewind\(\.\.\.\),\)` needs the parameters"):
        step_without_params(og.stabilize(optax.sgd(0.1), max_change=None, recovery=(og.rewind(),)))


def test_the_page_lists_all_that_needs_them() -> None:
    section = PAGE.read_text().split("## Libraries that pass no parameters\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    functions = {name for name, thing in PUBLIC.items() if callable(thing)}  # `recovery` is also a folder
    listed = {name for row in rows for name in re.findall(r"[\w.]*\w", row)} & functions
    assert listed == {entry.name for entry in OURS} | set(RUNGS) | {"guard"}

"""Which branch of each conditional an ordinary step takes.

The step is run on a small tree, without `jit`, and each `lax.cond` notes where in the source it stands and what its
predicate is. A compiled program says of each of its conditionals where in the source it comes from.
"""

import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.accelerators.hlo import Instruction, dearest
from benchmarks.accelerators.steps import Step, parameters
from optax_guard._common import forms

__all__ = ["Taken", "chooser", "places", "taken"]

Place = tuple[str, int]  # file and line
Taken = dict[Place, set[bool]]
FORMS = forms.__file__  # its callers are told apart
SMALL = 8  # width of the tree that is stepped


def taken(step: Step, platform: str) -> Taken:
    """Where the conditionals of the counted call stand on a platform ("gpu", "tpu"), and what their predicates are."""
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), parameters(SMALL))
    grads = jax.tree.map(lambda x: 0.001 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    tx = step.tx()
    take, state = step.take(tx), tx.init(params)
    found: Taken = {}

    def cond(predicate: Any, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any, **options: Any) -> Any:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == FORMS and frame.f_back is not None:
            frame = frame.f_back
        found.setdefault((frame.f_code.co_filename, frame.f_lineno), set()).add(bool(predicate))
        operands = (options["operand"],) if "operand" in options else operands
        return (yes if predicate else no)(*operands)

    with jax.disable_jit(), forms.form_of(platform), mock.patch.object(lax, "cond", cond):
        for _ in range(step.call):
            found.clear()
            first = (state, params) if step.state_first else (params, state)
            params, state = take(*first, grads, jnp.float32(1.0))
    return found


def places(text: str) -> dict[str, Place]:
    """Number of a stack frame of a program -> file and line."""
    tables = dict(re.findall(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)*)", text, re.MULTILINE))
    files = dict(re.findall(r'^(\d+) "(.*)"$', tables.get("FileNames", ""), re.MULTILINE))
    locations = {
        number: (files[file], int(line))
        for number, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)", tables.get("FileLocations", ""), re.MULTILINE
        )
    }
    frames = {
        number: (locations[location], parent)
        for number, location, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", tables.get("StackFrames", ""), re.MULTILINE
        )
    }

    def place(number: str) -> Place:
        here, parent = frames[number]
        return place(parent) if here[0] == FORMS and parent in frames and parent != number else here

    return {number: place(number) for number in frames}


def chooser(text: str, step_taken: Taken, otherwise: bool = False) -> tuple[Any, list[str]]:
    """A choice for `count`, and the conditionals whose branch the ordinary step does not tell, filled as it runs.

    Of those, the branch that moves most is chosen. `otherwise` chooses, of the others, the branches not taken.
    """
    where, unknown = places(text), []

    def choose(conditional: Instruction, bytes_of_branches: list[int]) -> int:
        frame = re.search(r"stack_frame_id=(\d+)", conditional.rest)
        outcomes = step_taken.get(where.get(frame[1], ("", 0)), set()) if frame else set()
        if len(outcomes) != 1 or len(bytes_of_branches) != 2:
            unknown.append(conditional.name)
            return dearest(conditional, bytes_of_branches)
        first_if_true = "true_computation=" in conditional.rest  # else branches are numbered: false, true
        (outcome,) = outcomes
        return int((outcome != first_if_true) != otherwise)

    return choose, unknown

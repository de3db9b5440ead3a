"""The comments on the fields of states: each says dtype and shape, and says the truth about real states."""

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from registry import ENTRIES

import optax_guard as og

ROOMS = (og.accumulation, og.recovery, og.rules, og.state, og.transforms)
STATES = [thing for room in ROOMS for name in room.__all__ if name.endswith("State") and (thing := getattr(room, name))]
PARAMS = {"a": jnp.ones((4, 3)), "b": jnp.ones(5)}
SHORT = {"float32": "f32", "int32": "i32", "bool": "bool", "uint32": "u32"}


def nodes_of(tree: Any) -> Iterator[Any]:
    """Every NamedTuple of the package in a tree."""
    if isinstance(tree, tuple) and type(tree).__module__.startswith("optax_guard"):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    for child in children:
        yield from nodes_of(child)


def more() -> Iterator[optax.GradientTransformation]:
    """What no entry of the registry has: all rungs at once, settings that change shapes."""
    adam = optax.adam(1e-3)
    rungs = (og.reset_moments(), og.back_off(diverged=2.0), og.rewind(keep=3))
    yield og.guard(adam, og.clip_by_global_norm(lambda step: 1.0 * step), recovery=rungs)
    yield og.back_off(diverged=2.0)


@functools.cache  # not at the top: whoever collects the tests would pay
def real_states() -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for tx in [*(entry.make() for entry in ENTRIES), *more()]:
        for node in nodes_of(jax.eval_shape(tx.init, PARAMS)):
            found.setdefault(type(node), []).append(node)
    return found


def comment_of(kind: Any, field: str) -> str:
    line = re.search(rf"^    {field}: [^#\n]*(#.*)?$", inspect.getsource(kind), re.MULTILINE)
    assert line, f"{kind.__name__}.{field}"
    return line[1] or ""


def test_every_public_state_is_found_in_a_real_one() -> None:
    assert {kind.__name__ for kind in STATES} <= {kind.__name__ for kind in real_states()}


def test_every_field_that_is_an_array_says_its_dtype_and_shape() -> None:
    wrong = set()
    for kind, states in real_states().items():
        for state in states:
            for field, value in state._asdict().items():
                if not hasattr(value, "dtype"):
                    continue
                told = re.findall(r"\b(f32|i32|bool|u32)\[([^\]]*)\]", comment_of(kind, field))
                said = {(dtype, len([axis for axis in shape.split(",") if axis.strip()])) for dtype, shape in told}
                if (SHORT[str(value.dtype)], value.ndim) not in said:
                    wrong.add(f"{kind.__name__}.{field} is {value.dtype}{list(value.shape)}, and says {told}")
    assert not wrong, sorted(wrong)


def test_every_field_of_any_type_says_what_it_is() -> None:
    silent = [
        f"{kind.__name__}.{field}"
        for kind in real_states()
        for field, annotation in inspect.get_annotations(kind).items()
        if annotation is Any and not comment_of(kind, field)
    ]
    assert not silent

"""Forty random stacks, which between them use every public name, rung, dtype and way of stepping: see fuzz.py."""

import jax
import numpy as np
import pytest
from fuzz import (
    DTYPES,
    FAULTS,
    ON_NONFINITE,
    OPTIMIZERS,
    RUNGS,
    STEPS,
    WAYS,
    Stack,
    attack,
    check,
    coverage,
    deal,
    run,
    settings,
    table,
)
from registry import ENTRIES, NOT_TRANSFORMATIONS, PUBLIC

STACKS = deal(0)
FAST = 8  # every eighth runs in `make test`; a stack compiles two whole steps


def test_the_stacks_use_everything_public() -> None:
    print(table(STACKS))  # noqa: T201 (shown by -rP: what the forty use)
    used = coverage(STACKS)
    rungs = {name for name, reason in NOT_TRANSFORMATIONS.items() if reason == "an argument of `guard`"} | {"back_off"}
    assert set(RUNGS) == rungs, "a new rung joins RUNGS"
    assert set(used["public names"]) == {entry.name for entry in ENTRIES} | rungs
    assert set(used["public names"]) == set(PUBLIC) - set(NOT_TRANSFORMATIONS) - {"rule"} | rungs | {"rule"}
    assert set(used["dtypes"]) == set(DTYPES)
    assert set(used["ways"]) == {"apply_gradients", *WAYS}
    assert set(used["faults"]) == set(FAULTS)
    assert set(OPTIMIZERS) <= set(used["optimizers"])
    assert {stack.on_nonfinite for stack in STACKS} == set(ON_NONFINITE)


def test_a_seed_deals_the_same_stacks_and_another_deals_others() -> None:
    assert deal(0) == STACKS
    assert not set(deal(1)) & set(STACKS)


@pytest.mark.parametrize(
    "stack",
    [pytest.param(s, id=str(i), marks=[] if i % FAST == 2 else [pytest.mark.slow]) for i, s in enumerate(STACKS)],
)
def test_what_must_hold_holds(stack: Stack) -> None:
    attack(stack)


def test_the_fuzzer_sees_what_it_looks_for() -> None:
    stack = STACKS[0]._replace(
        optimizer="momentum",
        around="",
        before=(),
        after=(),
        rules=(),
        rungs=(),
        outside=("guard",),
        dtype="float32",
        way="donated",
        halt_after=50,
        faults=("", "nan", *[""] * (STEPS - 2)),
    )
    with settings(stack):
        history, _ = run(stack)
    check(stack, history)

    def broken(step: int, **fields: object) -> list:
        params, state, held = history[step]
        return [*history[:step], (params, state._replace(**fields), held), *history[step + 1 :]]

    params, state, held = history[2]
    moved = jax.tree.map(lambda x: np.nextafter(x, np.float32(9)), params)
    with pytest.raises(AssertionError, match="a held step moved the parameters"):
        check(stack, [*history[:2], (moved, state, held), *history[3:]])
    with pytest.raises(AssertionError, match="changed the guarded state"):
        check(stack, broken(2, guarded_state=history[0][1].guarded_state))
    with pytest.raises(AssertionError, match="is nan"):
        check(stack, broken(5, refused_in_row=np.float32(np.nan)))
    with pytest.raises(AssertionError):
        check(stack, broken(STEPS, skipped_total=np.int32(2)))

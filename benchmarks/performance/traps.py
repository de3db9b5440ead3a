"""Two forms that look alike and are not, on some platforms: `docs/sharp_edges.md`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.accelerators.steps import act_first, hold_first, plain, state_first
from benchmarks.performance.measure import Arm, Row, compare, race, say

__all__ = ["FORMS", "form_arm", "trap_rows"]

PyTree = Any
FORMS = {
    "bare": plain,
    "by hand: `lax.cond(finite, act, hold)`": act_first,
    "by hand: `lax.cond(trouble, hold, act)`": hold_first,
    "bare, taking (state, params), returning (params, state)": state_first,
}


def trap_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """The order of a conditional's branches, and that of donated arguments. The rows of `make accelerators`, timed."""
    arms = {name: form_arm(form, params, grads) for name, form in FORMS.items()}
    t = race(arms, grads, max(rounds // 2, 3))
    return [compare("traps", f"{name}, over bare `optax.adamw`", t[name], t["bare"]) for name in list(FORMS)[1:]]


def form_arm(form: Callable[[optax.GradientTransformation], Any], params: PyTree, grads: PyTree) -> Arm:
    """Compiled, with buffers of its own."""
    tx, value = optax.adamw(1e-3), jnp.ones(())
    params = jax.tree.map(jnp.copy, params)
    state = jax.tree.map(jnp.copy, tx.init(params))
    swapped = form is state_first
    first = (state, params) if swapped else (params, state)
    program = jax.jit(form(tx), donate_argnums=(0, 1)).lower(*first, grads, value).compile()
    say(f"compiled {form.__name__}")

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        return program(*((state, params) if swapped else (params, state)), grads, value)

    return Arm(step, params, state)

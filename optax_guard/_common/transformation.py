"""Makes an Optax transformation from a function of checked arguments, so that no check can be forgotten."""

from collections.abc import Callable
from typing import Any, TypeAlias

import optax

from optax_guard._common.state_check import state_check
from optax_guard._common.tree import checked, checked_with_params
from optax_guard._common.typing import PyTree

__all__ = ["transformation", "transformation_with_extra"]

Change: TypeAlias = Callable[[PyTree, Any, PyTree | None], tuple[PyTree, Any]]
ChangeWithExtra: TypeAlias = Callable[[PyTree, Any, PyTree | None, dict[str, Any]], tuple[PyTree, Any]]


def transformation(
    function: str, init: optax.TransformInitFn, change: Change, *, needs_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from `change(updates, state, params)`, which ignores extra arguments."""
    return transformation_with_extra(
        function, init, lambda updates, state, params, _: change(updates, state, params), needs_params=needs_params
    )


def transformation_with_extra(
    function: str, init: optax.TransformInitFn, change: ChangeWithExtra, *, needs_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from `change(updates, state, params, extra)`, which reads or forwards extra arguments.

    `change` receives trees of arrays that agree, and a state that `init` makes; `params` are None only if they were not
    given and are not needed.
    """
    check = checked_with_params if needs_params else checked
    check_state = state_check(function, init)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, params = check(function, updates, params)
        check_state(state, params, updates)
        return change(updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(init, update)

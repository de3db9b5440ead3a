"""How signals change from layer to layer and from time step to time step."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common.typing import PyTree
from optax_guard._host.loss import Problem
from optax_guard._step.observe import gradient_statistics
from optax_guard.preflight._reports import ActivationReport, Growth, slope

__all__ = ["along_time", "layer_growth", "look_at_activations"]

_NEAR = 0.01  # an activation within this distance of its bound counts as saturated


def layer_growth(names: list[str], norms: list[float]) -> tuple[Growth, ...]:
    """One `Growth` for each stack of numbered layers, named as in 'blocks/0/kernel' or 'Dense_0/kernel'."""
    stacks: dict[str, dict[int, float]] = {}
    for name, norm in zip(names, norms, strict=True):
        components = name.split("/")
        for i, component in enumerate(components):
            found = re.search(r"\d+(?!.*\d)", component)
            if found is not None:
                label = component[: found.start()] + "*" + component[found.end() :]
                stack = stacks.setdefault("/".join([*components[:i], label]), {})
                stack[int(found.group())] = float(np.hypot(stack.get(int(found.group()), 0.0), norm))
                break
    growth = []
    for stack, layers in stacks.items():
        if len(layers) > 1:
            order = sorted(layers)
            values = tuple(layers[i] for i in order)
            growth.append(Growth(stack, tuple(map(str, order)), values, -slope(values)))
    return tuple(growth)


def along_time(function: str, p: Problem, batch: PyTree, axis: int) -> Growth:
    """The norm of the gradient with respect to the input of each time step."""
    leaves, structure = jax.tree.flatten(batch)
    long = [
        i
        for i, leaf in enumerate(leaves)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > axis and leaf.shape[axis] > 1
    ]
    if not long:
        raise ValueError(
            f"{function}: no floating-point leaf of `batch` has an axis {axis} of length 2 or more; integers have no "
            "gradient, so embed tokens before they enter the batch."
        )
    where = long[0]

    @jax.jit
    def norms(inputs: jax.Array, chosen: list[jax.Array]) -> jax.Array:
        def loss(inputs: jax.Array) -> jax.Array:
            return p.loss(chosen, jax.tree.unflatten(structure, [*leaves[:where], inputs, *leaves[where + 1 :]]))

        gradient = jnp.moveaxis(jax.grad(loss)(inputs), axis, 0)
        return jax.vmap(lambda g: gradient_statistics(g).norm)(gradient)

    values = tuple(float(x) for x in norms(leaves[where], p.leaves))
    return Growth("time", tuple(map(str, range(len(values)))), values, -slope(values))


def look_at_activations(
    function: str, tapped_loss_fn: Callable[..., Any], p: Problem, batch: PyTree, has_aux: bool
) -> tuple[tuple[ActivationReport, ...], tuple[Growth, ...]]:
    """Size, dead units, saturation and gradient of each tapped activation, and their growth in tap order."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def loss(chosen: list[Any], batch: PyTree, offsets: dict[str, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        values: dict[str, jax.Array] = {}

        def tap(name: str, x: jax.Array) -> jax.Array:
            if not (hasattr(x, "ndim") and x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)):
                raise ValueError(f"{function}: tap {name!r} must be floating-point [examples, ..., units]; got {x!r}.")
            if name in values:
                raise ValueError(f"{function}: two taps are called {name!r}; give each its own name.")
            values[name] = x
            shapes[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return x + offsets[name] if name in offsets else x

        result = tapped_loss_fn(p.tree(chosen), batch, tap)
        result = jnp.asarray(result[0] if has_aux else result)
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise ValueError(
                f"{function}: `tapped_loss_fn` must return the loss, one floating-point number; got {result.dtype}"
                f"{list(result.shape)}."
            )
        return result, list(values.values())

    jax.eval_shape(loss, p.leaves, batch, {})
    if not shapes:
        raise ValueError(f"{function}: `tapped_loss_fn` never called tap(name, activation).")
    names = list(shapes)  # kept here because jit sorts a dict

    @jax.jit
    def look(chosen: list[Any], batch: PyTree, offsets: dict[str, jax.Array]) -> list[tuple[jax.Array, ...]]:
        gradient, values = jax.grad(loss, argnums=2, has_aux=True)(chosen, batch, offsets)
        return [(gradient_statistics(gradient[n]).norm, *_measure(v)) for n, v in zip(names, values, strict=True)]

    offsets = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    reports = []
    for name, row in zip(names, jax.device_get(look(p.leaves, batch, offsets)), strict=True):
        norm, rms, largest, smallest, dead, exact_zeros, near_ends, near_one = (float(x) for x in row)
        bounded = largest <= 1 and not (smallest >= 0 and exact_zeros)  # exact zeros come from a rectifier
        share = (near_ends if smallest >= 0 else near_one) if bounded else None
        reports.append(ActivationReport(name, rms, largest, norm, dead, share))
    if len(names) < 2:
        return tuple(reports), ()
    sizes, norms = (tuple(getattr(r, field) for r in reports) for field in ("root_mean_square", "gradient_norm"))
    forward = Growth("activations", tuple(names), sizes, slope(sizes))
    return tuple(reports), (forward, Growth("gradients of activations", tuple(names), norms, -slope(norms)))


def _measure(x: jax.Array) -> tuple[jax.Array, ...]:
    units = x.reshape(-1, x.shape[-1])
    units = units.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = jnp.abs(units)
    near_one = size > 1 - _NEAR
    return (
        jnp.sqrt(jnp.mean(jnp.square(units))),
        jnp.max(size),
        jnp.min(units),
        jnp.mean(jnp.max(units, axis=0) == jnp.min(units, axis=0), dtype=jnp.float32),
        jnp.any(units == 0),
        jnp.mean(near_one | (size < _NEAR), dtype=jnp.float32),
        jnp.mean(near_one, dtype=jnp.float32),
    )

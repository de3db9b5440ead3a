"""Sharpness: the largest eigenvalues of the Hessian from Hessian-vector products, and the step size they allow.

The eigensolver is ARPACK's implicitly restarted Lanczos method, called through SciPy, on which JAX depends. JAX's own
LOBPCG compiles the product three times and needs three to four times as many products.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._common.new_params import QKClipState
from optax_guard._common.optimizer_state import reader, responses
from optax_guard._common.tree import find_states, leaf_names
from optax_guard._common.typing import PyTree
from optax_guard._host.loss import Problem
from optax_guard._step.act import as_transformation
from optax_guard._step.observe import global_norm

__all__ = ["dynamics", "hessian_product", "largest_eigenvalues", "stable_rate"]

_AVERAGES = (optax.ScaleByAdamState, optax.ScaleByBeliefState, optax.ScaleByAmsgradState)
_DENSE = 24  # up to this many parameters all eigenvalues are computed: Lanczos needs more dimensions than it keeps


def hessian_product(problem: Problem, batch: PyTree) -> tuple[Any, int, np.dtype]:
    """Returns the map (v, scales) -> D H D v on flat NumPy vectors, their size and their dtype.

    D is diag(scales), or 1 without scales. The product is computed in float32 or wider, since second derivatives in 16
    bits are noise.
    """
    dtype = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in problem.leaves) else jnp.float32
    wide = [leaf.astype(dtype) for leaf in problem.leaves]
    sizes = [leaf.size for leaf in wide]
    ones = [jnp.ones_like(leaf) for leaf in wide]

    @jax.jit
    def product(leaves: list[jax.Array], factors: list[jax.Array], batch: PyTree, flat: jax.Array) -> jax.Array:
        pieces = [p.reshape(f.shape) * f for p, f in zip(jnp.split(flat, np.cumsum(sizes)[:-1]), factors, strict=True)]

        def gradient(chosen: list[jax.Array]) -> list[jax.Array]:
            return jax.grad(lambda x: problem.loss(x, batch).astype(dtype))(chosen)

        curved = jax.jvp(gradient, (leaves,), (pieces,))[1]
        return jnp.concatenate([(c * f).ravel() for c, f in zip(curved, factors, strict=True)])

    def apply(vector: np.ndarray, scales: list[jax.Array] | None = None) -> np.ndarray:
        used = ones if scales is None else [scale.astype(dtype) for scale in scales]
        return np.asarray(product(wide, used, batch, jnp.asarray(vector.reshape(-1), dtype)))

    return apply, sum(sizes), np.dtype(dtype)


def largest_eigenvalues(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    dtype: np.dtype,
    wanted: int,
    tolerance: float,
    seed: int,
    max_products: int = 200,
) -> np.ndarray | None:
    """The `wanted` algebraically largest eigenvalues, descending; None if a product is not finite or none converged."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def checked(vector: np.ndarray) -> np.ndarray:
        result = product(vector.astype(dtype))
        if not np.all(np.isfinite(result)):
            raise FloatingPointError
        return result

    wanted = min(wanted, size)
    try:
        if size <= _DENSE:
            matrix = np.stack([checked(row) for row in np.eye(size)]).astype(np.float64)
            return np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1][:wanted]
        basis = min(size, max(12, 3 * wanted + 1))
        start = np.random.default_rng(seed).normal(size=size).astype(dtype)
        operator = LinearOperator((size, size), matvec=checked, dtype=dtype)  # pyright: ignore[reportCallIssue]  # SciPy has no types
        found = eigsh(
            operator,
            k=wanted,
            which="LA",
            v0=start,
            ncv=basis,
            tol=tolerance,  # pyright: ignore[reportArgumentType]  # SciPy has no types; its default is the int 0
            maxiter=max(2, max_products // basis),
            return_eigenvectors=False,
        )
        return np.sort(np.asarray(found, np.float64))[::-1]
    except ArpackNoConvergence as error:
        partial = np.sort(np.asarray(error.eigenvalues, np.float64))[::-1]
        return partial if partial.size else None
    except FloatingPointError:
        return None


def stable_rate(sharpness: float, factor: float) -> float:
    """The largest stable learning rate, factor / sharpness; Inf if the curvature is not positive."""
    return factor / sharpness if sharpness > 0 else float("inf")


def dynamics(
    optimizer: optax.GradientTransformation,
    state: Any,
    problem: Problem,
    gradient: list[jax.Array],
    loss: jax.Array,
    eps: float,
) -> tuple[list[jax.Array] | None, float | None]:
    """Returns the divisors of each leaf's step (None for 1) and the factor of the largest stable learning rate.

    Two updates with the same gradient at fixed parameters reveal the optimizer's constants: a moving average goes from
    (1 - b) g to (1 - b^2) g and a trace from g to (1 + b) g, so their ratio is 1 + b no matter what clips or scales the
    gradient beforehand. The factor is None if the optimizer's form is not known.
    """
    update = as_transformation("preflight", optimizer, "optimizer").update
    params = problem.tree(problem.leaves)

    @jax.jit
    def probe(gradient: list[jax.Array], loss: jax.Array) -> tuple[Any, Any]:
        tree = problem.tree(gradient)
        start = optimizer.init(params)
        extra = {"value": loss, "max_logits": _small_logits(start)}
        _, one = update(tree, start, params, **extra)
        _, two = update(tree, one, params, **extra)
        return one, two

    one, two = probe(gradient, loss)
    b1 = next((b for kind in _AVERAGES if (b := _ratio(one, two, params, kind, "mu")) is not None), None)
    b2 = next((b for kind in _AVERAGES if (b := _ratio(one, two, params, kind, "nu")) is not None), 0.999)
    trace = _ratio(one, two, params, optax.TraceState, "trace")
    used = one if state is None else state
    chosen = jax.tree.map(lambda _: True, params)
    try:
        # The gain of a momentum is not needed: `factor` accounts for it.
        read = reader("preflight", "second_moment", 0.0, b2, eps)
        found = [each.metric for each in responses(read, used, params, chosen, jnp.zeros((), jnp.int32))]
    except ValueError:
        plain = trace is not None or not any(jnp.ndim(leaf) for leaf in jax.tree.leaves(used))
        return None, (2 * (1 + (trace or 0.0)) if plain else None)
    by_name = dict(zip(leaf_names(params), found, strict=True))
    divisors: list[jax.Array] = [by_name[name] for name in problem.names]  # pyright: ignore[reportAssignmentType] (none is missing)
    if not any(bool(jnp.any(jnp.isfinite(leaf))) for leaf in divisors):
        return None, None  # an optimizer that has not stepped yet, as in the middle of an accumulation cycle
    if b1 is not None:
        return divisors, 2 * (1 + b1) / (1 - b1)
    return divisors, 2 * (1 + (trace or 0.0))


def _small_logits(state: Any) -> dict[str, jax.Array]:
    """Maxima for a `qk_clip` in the optimizer, so small that it scales nothing."""
    clips = find_states(state, QKClipState)
    return {layer: jnp.full_like(x, 1e-30) for each in clips for layer, x in each.qk_clip_max_logits.items()}


def _ratio(one: Any, two: Any, params: PyTree, kind: type, field: str) -> float | None:
    """The constant of a moving average or trace, from its values after one and two updates."""
    first, second = find_states(one, kind, params), find_states(two, kind, params)
    if not first or not hasattr(first[0], field):
        return None
    before, after = (float(global_norm(getattr(states[0], field))) for states in (first, second))
    return after / before - 1 if before > 0 and np.isfinite(after) else None

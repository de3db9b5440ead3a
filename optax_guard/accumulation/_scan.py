"""Accumulation inside one call: the gradient of a large batch from small ones by `lax.scan`, with one all-reduce.

=========================================  =========================================================================
You have                                   Use
=========================================  =========================================================================
a batch too large for memory               `accumulate_gradients(loss_fn, 8)` in place of `jax.value_and_grad(loss_fn)`
data parallelism (`jit` or `shard_map`)    the same with `axis_name=`: always one all-reduce per step
batches that come one call at a time       `accumulate`, with gradients that are already reduced
=========================================  =========================================================================
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from optax_guard._common import validate
from optax_guard._common.axes import max_arrays_over
from optax_guard._common.batch import batch_size
from optax_guard._common.eager import compiled_once
from optax_guard._common.tree import as_arrays, is_gradient, path_name, varying_axes, wider_dtype
from optax_guard._common.typing import PyTree
from optax_guard._step.max_logits import as_finite, from_finite, nothing_seen
from optax_guard._step.observe import one_pass_statistics, scale_statistics, squarable
from optax_guard.accumulation._sums import BadMicroBatch

__all__ = ["Remainder", "accumulate_gradients"]

_MAX_LOGITS = "max_logits"
Remainder: TypeAlias = Literal["error", "pad"]


def accumulate_gradients(
    loss_fn: Callable[..., Any],
    num_micro_batches: int,
    *,
    has_aux: bool = False,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    on_nonfinite: BadMicroBatch = "drop_micro",
    remainder: Remainder = "error",
    axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """Computes `jax.value_and_grad` of a mean loss over a batch, one micro-batch at a time.

    value = sum_i w_i loss(params, batch_i) / sum_i w_i          grads = sum_i w_i grad_i / sum_i w_i

    over the micro-batches i whose loss and gradient are finite.

    Guarantees:
      - The result is the gradient of the whole batch if `loss_fn` is a mean and `weight_fn` returns its count.
      - Sums are kept in float32 or wider, divided once, and returned in the parameters' dtypes.
      - With `axis_name`, there is one all-reduce of all sums at the end and none in the loop; each device drops its own
        micro-batches.
      - A micro-batch that is dropped or has weight 0 is deselected, so its NaN does not return as 0 * NaN.
      - A persistently bad stream is noticed: if no micro-batch is left, value and gradient are NaN, so that a `guard`
        holds and counts the step, and eventually halts.
      - Micro-batch i draws from `fold_in(key, i)`, so a scan, a loop and a resumed run draw the same numbers.

    ============================================  ====================================================================
    Case                                          Result
    ============================================  ====================================================================
    NaN or Inf in a micro-batch                   see `on_nonfinite` below; its loss counts as part of it
    weight negative or not finite                 the same
    weight times gradient above 1.8e19            the same, since its square overflows
    all micro-batches dropped                     value and gradient are NaN: `guard` holds and counts the step
    all weights zero                              value 0, gradient 0
    batch not divisible                           an error, or zero rows with `remainder="pad"`
    more micro-batches than rows                  an error
    ============================================  ====================================================================

    ================  ================================================================================================
    `on_nonfinite`    A micro-batch (of one device) with a NaN or an Inf
    ================  ================================================================================================
    "drop_micro"      is left out with its weight; the means are over the others
    "drop_cycle"      invalidates the whole batch: value and gradient are NaN
    "propagate"       enters the sums without being read, which is the cheapest. The gradient is NaN or Inf, and all NaN
                      if the weight is
    ================  ================================================================================================

    Args:
      loss_fn: (params, micro_batch, *args) -> mean loss, or (loss, aux) with `has_aux`; it receives `key=` if one is
        given.
      num_micro_batches: n (>= 1). Micro-batch i holds rows i, i + n, i + 2n, ..., so that the rows of a sharded batch
        stay on their devices.
      has_aux: as in `jax.value_and_grad`.
      weight_fn: a function from a micro-batch to its weight, for instance its number of unmasked tokens. None gives
        equal weights.
      on_nonfinite: "drop_micro", "drop_cycle" or "propagate", as for `accumulate`. The first two read each
        micro-gradient once more. Dropped micro-batches are not counted: return `jnp.isfinite(loss)` as `aux` to see
        them.
      remainder: "error" refuses a batch that is not divisible; "pad" appends rows of zeros, which `weight_fn`
        (required) and `loss_fn` must ignore, as with a mask in the batch.
      axis_name: the mesh axis over which the batch is split (axis 0 of every leaf) and the parameters are not. Inside
        `jax.shard_map` it is a manual axis. Under `jit` the gradient runs in a `shard_map` over that axis alone, and
        other axes (tensor parallelism) are left to `jit`. With None under `jit`, XLA places the communication, once per
        micro-batch. Use None if parameters are sharded over the same axis (FSDP), since they are gathered and scattered
        per micro-batch anyway.
      mesh: under `jit`, the mesh that has the axis; None uses that of `jax.set_mesh`.

    Returns:
      A function (params, batch, *args, key=None) -> (value, grads), or ((value, aux), grads). Each leaf of `aux` has a
      new first axis with an entry per micro-batch (and device, under `jit` with `axis_name`), including dropped ones.
      The exception is the dict `aux["max_logits"]`, for `qk_clip`: the largest of the micro-batches that were kept, on
      all devices.

    Raises:
      ValueError: an argument is invalid, or leaves of the batch disagree in their first axis (the message names them).
      NameError: from JAX, if no mesh has the axis `axis_name`.

    Example:
      >>> import optax_guard as og
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w) ** 2)
      >>> w, batch = jnp.ones(2), jnp.arange(12.0).reshape(6, 2)
      >>> value, grads = og.accumulate_gradients(loss_fn, 3)(w, batch)
      >>> expected = jax.value_and_grad(loss_fn)(w, batch)
      >>> bool(jnp.allclose(value, expected[0])), bool(jnp.allclose(grads, expected[1]))
      (True, True)

    See Also:
      `optax.microbatch`, which sums in the dtype of the output (a sum of 256 bfloat16 gradients may stall) and has
      equal weights.
    """
    name = "accumulate_gradients"
    n = validate.integer(name, "num_micro_batches", num_micro_batches, low=1)
    has_aux = validate.boolean(name, "has_aux", has_aux)
    validate.one_of(name, "on_nonfinite", on_nonfinite, BadMicroBatch)
    validate.one_of(name, "remainder", remainder, Remainder)
    if remainder == "pad" and weight_fn is None:
        raise ValueError(f"{name}: remainder='pad' needs a `weight_fn` that counts rows of zeros as nothing; got None.")
    validate.function(name, "loss_fn", loss_fn, "of (params, micro_batch, ...)")
    if weight_fn is not None:
        validate.function(name, "weight_fn", weight_fn, "of a micro-batch")
    validate.axis_name(name, axis_name)
    if mesh is not None and not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ValueError(f"{name}: `mesh` must be a jax.sharding.Mesh or None; got {validate.shown(mesh)}.")
    if isinstance(axis_name, (tuple, list)):
        raise ValueError(
            f"{name}: `axis_name` must be one mesh axis, over which the batch is split and no parameter is; got "
            f"{axis_name!r}."
        )
    gradient = jax.value_and_grad(_returning(loss_fn, has_aux), has_aux=has_aux)

    def local(params: PyTree, batch: PyTree, args: tuple[Any, ...], key: Any) -> tuple[Any, PyTree, Any, Any]:
        """The means (and largest logits) over this device's rows and all devices."""
        micro_batches = jax.tree.map(lambda x: _split(x, n), batch)
        params = _varying(params, axis_name)

        def body(sums: Any, each: Any) -> tuple[Any, Any]:
            index, micro_batch = each
            keys = {} if key is None else {"key": _fold_in(key, index, axis_name)}
            (value, aux), grads = _with_aux(gradient(params, micro_batch, *args, **keys), has_aux)
            weight = jnp.ones(()) if weight_fn is None else _checked(weight_fn(micro_batch))
            bad = jnp.zeros(())
            if on_nonfinite != "propagate":
                good = (weight == 0) | _fits(value, grads, weight)
                weight, bad = jnp.where(good, weight, 0), jnp.where(good, 0.0, 1.0)
            before, *others, lost = sums
            shares = jax.tree.map(lambda s, x: _plus(s, x, weight), tuple(others), (value, grads, jnp.ones(())))
            aux, found = _without_max_logits(aux)
            larger = jax.tree.map(lambda m, x: jnp.where(weight > 0, jnp.maximum(m, as_finite(x)), m), before, found)
            return (larger, *shares, lost + bad), aux

        no_gradient = jax.tree_util.tree_map_with_path(_zeros, params)  # first, since it refuses what has no gradient
        value_type, aux_type = jax.eval_shape(lambda: _first(gradient, params, micro_batches, args, key, has_aux))
        zeros = (
            jax.tree.map(lambda x: nothing_seen(x.shape), _without_max_logits(aux_type)[1]),
            jnp.zeros((), wider_dtype(value_type.dtype, jnp.float32)),
            no_gradient,
            jnp.zeros(()),  # the weights
            jnp.zeros(()),  # dropped micro-batches, in float32 like the rest, for one all-reduce
        )
        sums, aux = lax.scan(body, _varying(zeros, axis_name), (jnp.arange(n), micro_batches))
        max_logits = jax.tree.map(from_finite, _max_over(sums[0], axis_name))
        sums = sums[1:] if axis_name is None else lax.psum(sums[1:], axis_name)
        value, grads, weight, dropped = sums
        spoiled = (dropped > 0) & ((weight == 0) | (on_nonfinite == "drop_cycle"))
        divide = jnp.where(weight == 0, 1, jnp.where(jnp.isfinite(weight), weight, jnp.nan))
        divide = jnp.where(spoiled, jnp.nan, divide)
        mean = jax.tree.map(lambda s, p: (s / divide.astype(s.dtype)).astype(p.dtype), grads, params)
        return value / divide.astype(value.dtype), mean, aux, max_logits

    def value_and_grads(params: PyTree, batch: PyTree, *args: Any, key: Any = None) -> tuple[Any, PyTree]:
        params, batch = as_arrays(name, params), as_arrays(name, batch)
        if axis_name is None or _bound(axis_name):
            value, grads, aux, max_logits = local(params, _padded(batch, n, 1, remainder), args, key)
        else:
            where = _mesh_with(axis_name, mesh)
            batch = _padded(batch, n, where.shape[axis_name], remainder)
            split, whole = PartitionSpec(axis_name), PartitionSpec()
            value, grads, aux, max_logits = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(whole, split, whole, whole),
                out_specs=(whole, whole, split, whole),
                axis_names={axis_name},
            )(params, batch, args, key)
        if isinstance(max_logits, dict):
            aux = {**aux, _MAX_LOGITS: max_logits}
        return ((value, aux) if has_aux else value), grads

    return compiled_once(value_and_grads)


def _returning(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss function, whose result is checked before JAX sees it."""

    @functools.wraps(loss_fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError("accumulate_gradients: with `has_aux` True, `loss_fn` must return (loss, aux).")
        return result

    return checked


def _split(x: jax.Array, n: int) -> jax.Array:
    """[rows, ...] -> [n, rows / n, ...], rows i, i + n, ... together, so that a sharded axis keeps its devices."""
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def _padded(batch: PyTree, n: int, devices: int, remainder: Remainder) -> PyTree:
    """The batch with a first axis that is divisible by n on every device, or an error."""
    name = "accumulate_gradients"
    rows = batch_size(name, batch)
    pieces = n * devices
    if pieces > rows:
        raise ValueError(f"{name}: `num_micro_batches` must be at most the rows per device; got {n} for {rows} rows.")
    missing = -rows % pieces
    if missing and remainder == "error":
        raise ValueError(
            f"{name}: `num_micro_batches`: {rows} rows are not divisible into {n} micro-batches"
            + (f" on {devices} devices" if devices > 1 else "")
            + '; remainder="pad" appends rows of zeros.'
        )
    if not missing:
        return batch
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)]), batch)


def _plus(total: jax.Array, share: jax.Array, weight: jax.Array) -> jax.Array:
    """The total with this share, selected, since a weight of 0 must also remove a NaN."""
    weight = weight.astype(total.dtype)
    return total + jnp.where(weight == 0, 0, weight * share.astype(total.dtype))


def _fits(value: jax.Array, grads: PyTree, weight: jax.Array) -> jax.Array:
    """Whether loss and weight are finite, and weight times gradient has finite squares in the dtype of its sum."""
    statistics = one_pass_statistics(grads)
    scaled = scale_statistics(statistics, weight.astype(statistics.sum_squares.dtype))
    return jnp.all(squarable(scaled, grads)) & jnp.isfinite(value) & jnp.isfinite(weight)


def _checked(weight: Any) -> jax.Array:
    weight = jnp.asarray(weight)
    if weight.shape != () or jnp.issubdtype(weight.dtype, jnp.complexfloating):
        raise ValueError(
            f"accumulate_gradients: `weight_fn` must return a real scalar; got {weight.dtype}{list(weight.shape)}."
        )
    weight = weight.astype(wider_dtype(weight.dtype, jnp.float32))
    return jnp.where(jnp.isfinite(weight) & (weight >= 0), weight, jnp.nan)


def _zeros(path: Any, param: Any) -> jax.Array:
    if not is_gradient(param):
        raise ValueError(
            "accumulate_gradients: `params` must be floating-point arrays, as `jax.grad` demands; leaf "
            f"`{path_name(path)}` is {param.dtype}{list(param.shape)}."
        )
    return jnp.zeros_like(param, dtype=wider_dtype(param.dtype, jnp.float32))


def _with_aux(result: Any, has_aux: bool) -> tuple[Any, PyTree]:
    value, grads = result
    return (value if has_aux else (value, ())), grads


def _first(
    gradient: Any, params: Any, micro_batches: Any, args: Any, key: Any, has_aux: bool
) -> tuple[jax.Array, PyTree]:
    keys = {} if key is None else {"key": key}
    result = gradient(params, jax.tree.map(lambda x: x[0], micro_batches), *args, **keys)
    return _with_aux(result, has_aux)[0]


def _without_max_logits(aux: PyTree) -> tuple[PyTree, Any]:
    """What is returned for each micro-batch, and the maxima that are not; () if there are none."""
    if not isinstance(aux, dict) or not isinstance(aux.get(_MAX_LOGITS), dict):
        return aux, ()
    return {name: entry for name, entry in aux.items() if name != _MAX_LOGITS}, aux[_MAX_LOGITS]


def _max_over(max_logits: Any, axis_name: str | None) -> Any:
    arrays, structure = jax.tree.flatten(max_logits)
    return structure.unflatten(max_arrays_over(arrays, axis_name))


def _fold_in(key: jax.Array, index: jax.Array, axis_name: str | None) -> jax.Array:
    if axis_name is not None:  # devices hold different rows, so their dropout must differ too
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    return jax.random.fold_in(key, index)


def _bound(axis_name: str) -> bool:
    """Whether a surrounding `shard_map` (or `vmap`) has the axis."""
    try:
        lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def _mesh_with(axis_name: str, mesh: Mesh | None) -> Any:
    where = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if axis_name not in where.axis_names:
        raise NameError(
            f"unbound axis name: {axis_name}. `axis_name` of accumulate_gradients must be an axis of an enclosing "
            f"shard_map, of `mesh=`, or of the mesh of `jax.set_mesh`; the mesh here has {where.axis_names}."
        )
    return where


def _varying(tree: PyTree, axis_name: str | None) -> PyTree:
    """Types the tree as differing between devices, so that JAX does not sum micro-batch gradients over them."""
    if axis_name is None or axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def cast(x: Any) -> Any:
        return x if axis_name in varying_axes(x) else lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)

"""The sums of an accumulation cycle, and how a micro-batch is added to them, leaf by leaf."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._common import validate
from optax_guard._common.axes import axis_names, on_any_device
from optax_guard._common.extra import representable
from optax_guard._common.forms import cond_or_select
from optax_guard._common.numerics import widest_accumulator
from optax_guard._common.tree import (
    check_leaf_count,
    check_same_shapes,
    check_same_structure,
    is_function,
    is_gradient,
    large_as_inf,
    leaf_names,
    leaves_with_none,
    path_name,
    varying_axes,
)
from optax_guard._common.typing import AxisName, PyTree
from optax_guard._step.observe import GradientStatistics, one_pass_statistics, scale_statistics, squarable

__all__ = [
    "BadMicroBatch",
    "Labels",
    "MicroBatch",
    "Reduction",
    "check_reduction",
    "check_shapes",
    "labels",
    "too_large",
    "weight_of",
    "with_other_leaves",
]

BadMicroBatch: TypeAlias = Literal["drop_micro", "drop_cycle", "propagate"]
Reduction: TypeAlias = Literal["mean", "sum", "max", "last"]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


# A tree of reductions, or a function to one; with `PyTree` a type checker would accept every string.
Labels: TypeAlias = Mapping[Any, Any] | tuple[Any, ...] | list[Any] | _Dataclass | Callable[[PyTree], PyTree]


class MicroBatch:
    """One micro-batch on its way into the sum."""

    def __init__(self, state: Any, updates: PyTree, extra: dict[str, Any], reduction: Any, alone: bool):
        self.state, self.updates, self.alone = state, updates, alone
        self.weighted = extra.get("weight") is not None
        self.weight = weight_of(extra, state.accumulated_weight.dtype)
        self.first = state.added == 0
        whole = self.weight + jnp.where(self.first, 0, state.accumulated_weight)  # NaN or Inf if the weight is
        most = 1 / jnp.finfo(whole.dtype).tiny  # whose inverse is still a normal number, by which the sum is multiplied
        self.usable = (whole <= most) & (self.weight >= 0)
        self.sums = leaves_with_none(state.gradient_sum)
        self.kinds = labels(reduction, state.gradient_sum)

    def written(self, adds: jax.Array) -> list[Any]:
        """The sums, including this micro-batch if it counts."""
        if self.alone:
            return self._each(self._share)
        # One branch per outcome, since a `where` over the buffer would cost a second copy of it.
        return cond_or_select(adds, lambda: self._each(self._added), lambda: self.sums)

    def stored(self, sums: list[Any]) -> PyTree:
        """The buffer after this call, which cycles of one call do not need."""
        return self.state.gradient_sum if self.alone else with_other_leaves(sums, self.state.gradient_sum)

    def in_dtype_of_sums(self, statistics: GradientStatistics) -> GradientStatistics:
        """The statistics in the dtype of the sums, in which the whole cycle is judged."""
        dtype = widest_accumulator(self.state.gradient_sum)
        return jax.tree.map(lambda x: x.astype(dtype), statistics)

    def look_if(self, wanted: jax.Array, sums: list[Any], axis_name: AxisName | None) -> GradientStatistics:
        """The statistics of the sums if they are wanted, and non-finite ones otherwise."""

        def look() -> GradientStatistics:
            return self.in_dtype_of_sums(one_pass_statistics(with_other_leaves(sums, self.updates), axis_name))

        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(look))
        return cond_or_select(wanted, look, lambda: _varying_like(nothing, sums, axis_name))

    def fits(self, seen: GradientStatistics, scaled: bool) -> jax.Array:
        """Whether weight times gradient is finite and has finite squares in the dtype of its sum.

        `scaled` says that the gradient has been multiplied since `seen` was computed.
        """
        if not (self.weighted or scaled):
            return jnp.all(seen.finite)
        weight = jnp.where(self.weight > 0, self.weight, 1).astype(seen.magnitude.dtype)
        return jnp.all(squarable(scale_statistics(seen, weight), with_other_leaves(self.sums, self.updates)))

    def _each(self, function: Callable[[Any, Any, str], Any]) -> list[Any]:
        leaves = zip(leaves_with_none(self.updates), self.sums, self.kinds, strict=True)
        return [function(leaf, old, kind) if is_gradient(leaf) else old for leaf, old, kind in leaves]

    def _share(self, leaf: Any, old: Any, kind: str) -> jax.Array:
        leaf = leaf.astype(old.dtype)
        return leaf * self.weight.astype(old.dtype) if self.weighted and kind in ("mean", "sum") else leaf

    def _added(self, leaf: Any, old: Any, kind: str) -> jax.Array:
        share = self._share(leaf, old, kind)
        both = {"max": jnp.maximum, "last": lambda _, new: new}.get(kind, jnp.add)(old, share)
        return jnp.where(self.first, share, both)  # the first of a cycle overwrites the old sum


def too_large(
    wanted: jax.Array, total: PyTree, like: PyTree, kinds: list[str], axis_name: AxisName | None
) -> jax.Array | None:
    """If `wanted`, whether an undivided sum exceeds its gradient's dtype; None if no leaf can."""
    narrow = [
        (leaf, jnp.finfo(old.dtype))
        for leaf, old, kind in zip(leaves_with_none(total), leaves_with_none(like), kinds, strict=True)
        if kind == "sum" and is_gradient(old) and jnp.finfo(old.dtype).maxexp < jnp.finfo(leaf.dtype).maxexp
    ]
    if not narrow:
        return None

    def look() -> jax.Array:
        return jnp.any(jnp.stack([jnp.any(jnp.abs(leaf) > float(info.max)) for leaf, info in narrow]))

    beyond = cond_or_select(wanted, look, lambda: jnp.zeros((), bool))
    return on_any_device(beyond, axis_name)


def labels(reduction: Any, tree: PyTree) -> list[str]:
    """The reduction of every position."""
    if isinstance(reduction, str):
        return [reduction] * len(leaves_with_none(tree))
    chosen = reduction(tree) if is_function(reduction) else reduction
    kinds = get_args(Reduction)
    for path, label in jax.tree_util.tree_leaves_with_path(chosen):
        if not isinstance(label, str) or label not in kinds:
            raise ValueError(
                f"accumulate: `reduction` must hold {', '.join(map(repr, kinds))}; at `{path_name(path)}` it "
                f"holds {label!r}."
            )
    try:
        spread = jax.tree.map(
            lambda label, part: jax.tree.map(lambda _: label, part, is_leaf=lambda x: x is None), chosen, tree
        )
    except (ValueError, TypeError) as error:
        check_same_structure("accumulate", "reduction", chosen, "params", tree, prefix=True)
        raise ValueError(f"accumulate: `reduction` does not match the structure of the parameters: {error}") from error
    return jax.tree.leaves(spread)


def check_reduction(reduction: Any, params: PyTree) -> None:
    for path, leaf, kind in zip(leaf_names(params), leaves_with_none(params), labels(reduction, params), strict=True):
        if kind == "max" and is_gradient(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"accumulate: `reduction` 'max' needs real numbers; `{path}` is {leaf.dtype}.")


def weight_of(extra: dict[str, Any], dtype: Any) -> jax.Array:
    """The call's weight as a scalar; 1 if none was given."""
    given = 1 if extra.get("weight") is None else representable(extra["weight"])
    expected = "a real scalar (for instance the number of tokens)"
    with large_as_inf():
        weight = validate.array("accumulate", "weight", given, expected, kind=jnp.number)
    if weight.shape != () or jnp.issubdtype(weight.dtype, jnp.complexfloating):
        raise ValueError(f"accumulate: `weight` must be {expected}; got {weight.dtype}{list(weight.shape)}.")
    return weight.astype(dtype)


def _varying_like(statistics: GradientStatistics, leaves: list[Any], axis_name: AxisName | None) -> GradientStatistics:
    """Types constants as differing between the devices of a `shard_map`, like the numbers beside them."""
    axes = {axis for leaf in leaves if is_gradient(leaf) for axis in varying_axes(leaf)} - set(axis_names(axis_name))
    return lax.pcast(statistics, tuple(axes), to="varying") if axes else statistics


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda leaf: leaf is None)


def with_other_leaves(sums: list[jax.Array | None], updates: PyTree) -> PyTree:
    """The sums with the structure of `updates`, whose own leaves remain where they carry no gradient."""
    leaves = leaves_with_none(updates)
    chosen = [total if is_gradient(leaf) else leaf for leaf, total in zip(leaves, sums, strict=True)]
    return jax.tree.unflatten(_structure(updates), chosen)


def check_shapes(gradient_sum: PyTree, updates: PyTree) -> None:
    """Raises if shapes differ, since adding would broadcast silently."""
    gradients = jax.tree.map(lambda leaf: leaf if is_gradient(leaf) else None, updates)  # other leaves have no sum
    check_same_shapes("accumulate", "updates", gradients, "params at init", gradient_sum)
    check_leaf_count("accumulate", len(leaves_with_none(gradient_sum)), len(leaves_with_none(updates)))

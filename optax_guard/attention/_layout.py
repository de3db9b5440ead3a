"""Which leaves hold the query and key weights of attention, and how their heads lie in them.

==========================================  ========================================================================
Attention                                   `layers` of `qk_clip`
==========================================  ========================================================================
`flax.linen.MultiHeadDotProductAttention`   `linen_attention()`, also for `SelfAttention`
`flax.nnx.MultiHeadAttention`               `nnx_attention()`
`equinox.nn.MultiheadAttention`             `equinox_attention(heads)`
`optax_guard.models.Transformer`            `transformer_attention(heads)`
anything else                               an `AttentionLayout`
==========================================  ========================================================================
"""

import fnmatch
import itertools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._common import validate
from optax_guard._common.tree import is_gradient, leaves_with_none, variable_free_names
from optax_guard._common.typing import PyTree

__all__ = [
    "AttentionLayout",
    "Layer",
    "Layers",
    "Projection",
    "check_layouts",
    "equinox_attention",
    "factor_of",
    "find_layers",
    "linen_attention",
    "nnx_attention",
    "transformer_attention",
]

_NORMS = frozenset(  # the names of submodules that normalise queries or keys
    f"{name}_{norm}" for name in ("query", "key", "q", "k", "qk") for norm in ("norm", "ln", "layernorm", "rmsnorm")
) | frozenset(("norm_q", "norm_k", "q_layer_norm", "k_layer_norm", "query_layer_norm", "key_layer_norm"))


class Projection(NamedTuple):
    """Where the queries (or keys) of each head lie in one leaf.

    The axes in `split` are split first, `part` is taken of the result, and heads are numbered along `axis`:

    ==================================  ==========================================================================
    Leaf                                Projection
    ==================================  ==========================================================================
    [features, heads, size]             `Projection("query/kernel", axis=1)`
    [features, heads * size]            `Projection("query/kernel", axis=1, split={1: (heads, -1)})`
    [heads, size], a bias               `Projection("query/bias", axis=0, optional=True)`
    [features, size], the only key      `Projection("key/kernel", axis=1, split={1: (1, -1)})`
    [features, 3, heads, size], fused   `Projection("qkv/kernel", axis=2, part=np.s_[:, 0])`; the keys: `np.s_[:, 1]`
    [features, 3 * heads * size]        the same with `split={1: (3, heads, -1)}`
    ==================================  ==========================================================================
    """

    path: str  # below the layer: "query/kernel"
    axis: int  # along which heads are numbered, in the split leaf
    split: dict[int, tuple[int, ...]] | None = None  # sizes by axis of the leaf; one of them may be -1
    part: Any = None  # a NumPy index into the split leaf, of slices and whole numbers; default: everything
    optional: bool = False  # whether the leaf may be missing, as biases may


class AttentionLayout(NamedTuple):
    """Which leaves of a layer hold its queries and keys.

    A layer is every path below which the first leaf of `query` exists. With fewer keys than queries, as in grouped and
    multi-query attention, consecutive queries share a key.
    """

    query: tuple[Projection, ...]
    key: tuple[Projection, ...]
    rotated_query: tuple[Projection, ...] = ()  # of multi-head latent attention: the queries of a shared rotated key
    layers: str = "*"  # a pattern for the paths of layers
    stacked: int = 0  # the number of axes of layers in front of every leaf, stacked for `jax.lax.scan`


Layers: TypeAlias = AttentionLayout | tuple[AttentionLayout, ...]


class Layer(NamedTuple):
    """One layer of attention in given parameters."""

    path: str
    shape: tuple[int, ...]  # of its maxima: the axes of stacked layers, and the number of query heads
    keys: int  # the number of key heads
    leaves: dict[str, tuple[tuple[str, Projection], ...]]  # by the path of a leaf: (role, projection)
    shapes: dict[str, tuple[int, ...]]  # of the leaves
    stacked: int


def linen_attention(layers: str = "*", *, stacked: int = 0) -> AttentionLayout:
    """The layout of `flax.linen.MultiHeadDotProductAttention` and `SelfAttention`.

    Args:
      layers: a pattern for the paths of the layers to choose, as in `"decoder/*"`.
      stacked: the number of axes of layers in front of every leaf: 1 for `nn.scan(..., variable_axes={"params": 0})`.

    Returns:
      An `AttentionLayout`.

    Example:
      >>> linen_attention().query[0]
      Projection(path='query/kernel', axis=1, split=None, part=None, optional=False)
    """
    return _own_axes("linen_attention", layers, stacked)


def nnx_attention(layers: str = "*", *, stacked: int = 0) -> AttentionLayout:
    """The layout of `flax.nnx.MultiHeadAttention`.

    Args:
      layers: as in `linen_attention`.
      stacked: as in `linen_attention`: 1 for modules made by `nnx.vmap`.

    Returns:
      An `AttentionLayout`.

    Example:
      >>> nnx_attention("decoder/*").layers
      'decoder/*'
    """
    return _own_axes("nnx_attention", layers, stacked)


def equinox_attention(heads: int, layers: str = "*", *, stacked: int = 0) -> AttentionLayout:
    """The layout of `equinox.nn.MultiheadAttention`, of which all layers have the same number of heads.

    Args:
      heads: the number of heads, >= 1.
      layers: as in `linen_attention`.
      stacked: as in `linen_attention`: 1 for modules made by `eqx.filter_vmap`.

    Returns:
      An `AttentionLayout`.

    Raises:
      ValueError: an argument is invalid.

    Example:
      >>> equinox_attention(8).key[0].path
      'key_proj/weight'
    """
    name = "equinox_attention"
    heads = validate.integer(name, "heads", heads, low=1)
    return _layout(
        name,
        tuple(
            (
                Projection(f"{side}_proj/weight", axis=0, split={0: (heads, -1)}),
                Projection(f"{side}_proj/bias", axis=0, split={0: (heads, -1)}, optional=True),
            )
            for side in ("query", "key")
        ),
        layers,
        stacked,
    )


def transformer_attention(heads: int, layers: str = "*") -> AttentionLayout:
    """The layout of `optax_guard.models.Transformer`.

    Args:
      heads: its number of heads, >= 1.
      layers: as in `linen_attention`.

    Returns:
      An `AttentionLayout`.

    Raises:
      ValueError: an argument is invalid.

    Example:
      >>> transformer_attention(4, "blocks/0").query[0].split
      {1: (4, -1)}
    """
    name = "transformer_attention"
    heads = validate.integer(name, "heads", heads, low=1)
    sides = (Projection(f"{side}/kernel", axis=1, split={1: (heads, -1)}) for side in ("query", "key"))
    return _layout(name, tuple((side,) for side in sides), layers, 0)


def find_layers(function: str, layouts: tuple[AttentionLayout, ...], params: PyTree) -> list[Layer]:
    """The attention layers in the parameters; a ValueError lists the leaves if a layout fits nothing, or half."""
    names, leaves = variable_free_names(params), leaves_with_none(params)
    shapes = {name: leaf.shape for name, leaf in zip(names, leaves, strict=True) if is_gradient(leaf)}
    found: dict[str, Layer] = {}
    for layout in layouts:
        paths = [path for path in _layer_paths(layout, shapes) if fnmatch.fnmatchcase(path, layout.layers)]
        if not paths:
            raise ValueError(
                f"{function}: `layers` finds no leaf `{layout.query[0].path}` below a path that matches "
                f"{layout.layers!r}; the leaves are {list(shapes)}. Take the description of the library that made "
                "them, or write an `AttentionLayout`."
            )
        for path in paths:
            if path in found:
                raise ValueError(f"{function}: two descriptions in `layers` find the layer {path!r}.")
            found[path] = _layer(function, layout, path, shapes)
    return list(found.values())


def factor_of(projection: Projection, shape: tuple[int, ...], factors: jax.Array) -> jax.Array:
    """An array that broadcasts against a leaf of this shape: the factor of its head for each weight, or 1."""
    groups = _groups(projection, shape)
    split = tuple(size for group in groups for size in group)
    axis, part = projection.axis % len(split), _slices(projection, len(split))
    sizes, index, position = [], [], 0
    for group in groups:  # an axis of the leaf on which the factor does not depend has size 1
        positions = range(position, position + len(group))
        depends = (axis in positions and factors.size > 1) or any(part[i] != slice(None) for i in positions)
        sizes += group if depends else (1,) * len(group)
        index += [part[i] if depends else slice(None) for i in positions]
        position += len(group)
    factors = factors.reshape((-1,) + (1,) * (len(split) - 1 - axis))
    if index == [slice(None)] * len(index):
        whole = jnp.broadcast_to(factors, sizes)
    else:
        whole = jnp.ones(sizes, factors.dtype).at[tuple(index)].set(factors)
    ends = np.cumsum([0, *map(len, groups)])
    return whole.reshape([math.prod(sizes[i:j]) for i, j in itertools.pairwise(ends)])


def check_layouts(function: str, layouts: Any) -> tuple[AttentionLayout, ...]:
    """Raises unless it is a layout, or several."""
    several = (layouts,) if isinstance(layouts, AttentionLayout) else layouts
    if (
        not isinstance(several, (tuple, list))
        or not several
        or not all(isinstance(x, AttentionLayout) for x in several)
    ):
        raise ValueError(
            f"{function}: `layers` must be an AttentionLayout or a tuple of them, as `linen_attention()` makes one; "
            f"got {validate.shown(layouts)}."
        )
    for layout in several:
        validate.integer(function, "layers.stacked", layout.stacked, low=0, high=8, reason="the axes of an array")
        _check_pattern(function, "layers.layers", layout.layers)
        for role, projections in layout._asdict().items():
            if role not in ("query", "key", "rotated_query"):
                continue
            fits = isinstance(projections, (tuple, list)) and all(isinstance(x, Projection) for x in projections)
            if not fits or (not projections and role != "rotated_query") or (projections and projections[0].optional):
                raise ValueError(
                    f"{function}: `layers.{role}` must be a tuple of Projections of which the first is not optional; "
                    f"got {projections!r}."
                )
            for projection in projections:
                if not _is_well_formed(projection):
                    raise ValueError(
                        f"{function}: `layers.{role}` must hold Projections of a path (text), an axis (a whole number) "
                        f"and perhaps `split`, a dict from axes to tuples of whole numbers; got {projection!r}."
                    )
    return tuple(several)


def _is_well_formed(projection: Projection) -> bool:
    """Whether the fields have their types; whether they fit a leaf is seen at `init`."""
    split = {} if projection.split is None else projection.split
    if not (isinstance(projection.path, str) and isinstance(split, dict)):
        return False
    if not all(isinstance(sizes, (tuple, list)) for sizes in split.values()):
        return False
    numbers = [projection.axis, *split, *itertools.chain(*split.values())]
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _check_pattern(function: str, argument: str, layers: Any) -> None:
    if not isinstance(layers, str):
        raise ValueError(
            f"{function}: `{argument}` must be a pattern of paths, as in 'decoder/*'; got {validate.shown(layers)}."
        )


def _own_axes(name: str, layers: str, stacked: int) -> AttentionLayout:
    """Kernels [features, heads, size] and biases [heads, size], as both of Flax's modules have them."""
    query, key = (
        (Projection(f"{side}/kernel", axis=1), Projection(f"{side}/bias", axis=0, optional=True))
        for side in ("query", "key")
    )
    return _layout(name, (query, key), layers, stacked)


def _layout(name: str, sides: tuple[tuple[Projection, ...], ...], layers: str, stacked: int) -> AttentionLayout:
    _check_pattern(name, "layers", layers)
    stacked = validate.integer(name, "stacked", stacked, low=0, high=8, reason="the axes of an array")
    query, key = sides
    return AttentionLayout(query, key, layers=layers, stacked=stacked)


def _layer_paths(layout: AttentionLayout, names: Any) -> list[str]:
    """The paths below which the first query leaf exists; that of a layer without anything around it is empty."""
    end = layout.query[0].path
    stems = [_stem(name) for name in names]
    return [stem[: -len(end)].rstrip("/") for stem in stems if stem == end or stem.endswith(f"/{end}")]


def _layer(function: str, layout: AttentionLayout, path: str, shapes: dict[str, tuple[int, ...]]) -> Layer:
    start = f"{path}/" if path else ""
    inside = {_stem(name)[len(start) :]: name for name in shapes if name.startswith(start)}
    where = f"layer {path!r}" if path else "the attention layer"
    if not layout.rotated_query:  # those of latent attention normalise what comes before the projections
        norms = [name for stem, name in inside.items() if not _NORMS.isdisjoint(stem.split("/"))]
        if norms:
            raise ValueError(
                f"{function}: {where} normalises its queries and keys (`{norms[0]}`). With query-key normalisation the "
                "weights no longer set the logits, so scaling them would have no effect: leave such layers out of "
                "`layers`."
            )
    leaves: dict[str, list[tuple[str, Projection]]] = {}
    counts: dict[str, int] = {}
    for role, projections in (("query", layout.query), ("key", layout.key), ("rotated_query", layout.rotated_query)):
        for projection in projections:
            name = inside.get(projection.path)
            if name is None:
                if projection.optional:
                    continue
                raise ValueError(
                    f"{function}: `layers` finds half of {where}: there is no leaf `{start}{projection.path}`; its "
                    f"leaves are {list(inside.values())}."
                )
            heads = _heads_in(function, name, projection, shapes[name][layout.stacked :])
            side = "key" if role == "key" else "query"
            if counts.setdefault(side, heads) != heads:
                raise ValueError(
                    f"{function}: `layers` finds {heads} {side} heads in `{name}`, but {counts[side]} in another leaf "
                    f"of {where}."
                )
            leaves.setdefault(name, []).append((role, projection))
    if counts["query"] % counts["key"]:
        raise ValueError(
            f"{function}: `layers` finds {counts['query']} query heads and {counts['key']} key heads in {where}; every "
            "key must serve the same number of queries."
        )
    _check_siblings(function, layout, inside, leaves)
    stacks = {shapes[name][: layout.stacked] for name in leaves}
    if len(stacks) > 1 or len(min(stacks)) < layout.stacked:
        raise ValueError(f"{function}: the leaves of {where} differ in their first {layout.stacked} axes, {stacks}.")
    return Layer(
        path=path,
        shape=(*stacks.pop(), counts["query"]),
        keys=counts["key"],
        leaves={name: tuple(found) for name, found in leaves.items()},
        shapes={name: shapes[name] for name in leaves},
        stacked=layout.stacked,
    )


def _check_siblings(function: str, layout: AttentionLayout, inside: dict[str, str], leaves: Any) -> None:
    """Raises if beside a described leaf there is another, as a bias or a low-rank update, which would not scale."""
    for projection in (*layout.query, *layout.key, *layout.rotated_query):
        module = projection.path.rpartition("/")[0]
        beside = [name for stem, name in inside.items() if module and stem.startswith(f"{module}/")]
        other = [name for name in beside if name not in leaves]
        if other:
            raise ValueError(
                f"{function}: `layers` does not describe `{other[0]}`, which lies beside `{projection.path}`; logits "
                "are scaled exactly only if every weight and bias of the queries and keys is."
            )


def _heads_in(function: str, name: str, projection: Projection, shape: tuple[int, ...]) -> int:
    """The number of heads that a projection finds in a leaf."""
    try:
        split = _split_shape(projection, shape)
        if not -len(split) <= projection.axis < len(split):
            raise ValueError(f"it has no axis {projection.axis}")
        heads = _chosen(projection, split)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{function}: `{name}` of shape {shape} does not fit {projection}: {error}.") from error
    if heads == 0:
        raise ValueError(f"{function}: {projection} chooses no head of `{name}` of shape {shape}.")
    return heads


def _split_shape(projection: Projection, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for group in _groups(projection, shape) for size in group)


def _groups(projection: Projection, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For each axis of the leaf the sizes of the axes into which it is split."""
    split = {axis % max(len(shape), 1): sizes for axis, sizes in (projection.split or {}).items()}
    if any(axis >= len(shape) or axis < -len(shape) for axis in projection.split or ()):
        raise ValueError(f"it has no axes {sorted(projection.split or ())}")
    groups = []
    for axis, size in enumerate(shape):
        sizes = split.get(axis, (size,))
        known = math.prod(each for each in sizes if each != -1)
        if sizes.count(-1) > 1 or (known and size % known) or (-1 not in sizes and known != size):
            raise ValueError(f"axis {axis} cannot be split into {sizes}")
        groups.append(tuple(size // known if each == -1 else each for each in sizes))
    return groups


def _slices(projection: Projection, rank: int) -> tuple[slice, ...]:
    """The part as one slice for each axis, so that it keeps all axes."""
    part = () if projection.part is None else projection.part
    part = part if isinstance(part, tuple) else (part,)
    part = tuple(each if isinstance(each, slice) else slice(each, None if each == -1 else each + 1) for each in part)
    if len(part) > rank:
        raise ValueError(f"it has {rank} axes, and the part {len(part)}")
    return part + (slice(None),) * (rank - len(part))


def _chosen(projection: Projection, split: tuple[int, ...]) -> int:
    sizes = [len(range(size)[each]) for size, each in zip(split, _slices(projection, len(split)), strict=True)]
    return 0 if 0 in sizes else sizes[projection.axis]


def _stem(name: str) -> str:
    """The path of a leaf; that of a parameter of flax.nnx ends in the field of its Variable."""
    return name.removesuffix("/value")

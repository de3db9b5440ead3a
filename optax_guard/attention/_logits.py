"""The largest attention logit of every head, which `qk_clip` and the reports need as `max_logits=`.

=======================================================  ==================================================
You have                                                 Use
=======================================================  ==================================================
`jax.nn.dot_product_attention`                           `attention_with_max_logits`, with the same arguments
a fused kernel that returns its log-sum-exp              `max_attention_logits_from_lse(lse)`
queries and keys, and any other attention                `max_attention_logits(query, key, ...)`
Flax's layers                                            `optax_guard.flax.dot_product_attention` or
                                                         `record_max_logits`, then `collect_max_logits`
=======================================================  ==================================================

An attention logit is query . key * scale. What follows the product does not belong to it: of soft-capped logits these
are the largest before the cap, and an additive bias is left out, because scaling query and key weights changes neither
the cap nor the bias. None of these functions has a gradient with respect to the maxima.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from optax_guard._common import validate
from optax_guard._common.tree import wider_dtype
from optax_guard._common.typing import PyTree

__all__ = [
    "attention_with_max_logits",
    "collect_max_logits",
    "fused",
    "keys_of",
    "max_attention_logits",
    "max_attention_logits_from_lse",
    "queries_of",
]

Implementation = Literal["xla", "cudnn"]

RECORD = "max_logits"  # the name of a record among a module's intermediates
_FUSED: Callable[..., Any] = jax.nn.dot_product_attention
_RETURNS_LSE = "return_residual" in inspect.signature(_FUSED).parameters


def max_attention_logits(
    query: ArrayLike,
    key: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    scale: ArrayLike | None = None,
    block_size: int = 256,
) -> jax.Array:
    """The largest attention logit of every head, exactly, in blocks of queries and keys.

    S_h = max over batch, t and s that may attend of scale * query[t, h] . key[s, g(h)]

    Guarantees:
      - Products are accumulated in float32 or wider and never rounded to 16 bits.
      - Temporaries are [..., heads, block_size, block_size]; they do not grow with the lengths.
      - Blocks that `is_causal` or `local_window_size` exclude altogether are not computed.
      - Nothing is kept for the backward pass.

    ==============================  ====================================================================
    Case                            Result
    ==============================  ====================================================================
    grouped or multi-query          query head h uses key head h // (heads / key heads)
    soft-capped logits              the largest before the cap
    no pair of a head may attend    -Inf for that head
    NaN or Inf in a query or key    NaN or Inf for its head, if the pair may attend
    lengths not multiples of        the last block overlaps the one before; the maximum is the same
    `block_size`
    ==============================  ====================================================================

    Args:
      query: [..., T, heads, size].
      key: [..., S, key heads, size] with the same leading axes; `heads` is a multiple of `key heads`.
      mask: booleans that broadcast to [..., heads, T, S]; True may attend.
      is_causal: Whether query t attends to keys s <= t only.
      query_seq_lengths: Whole numbers [...], the lengths without padding.
      key_value_seq_lengths: The same of the keys.
      local_window_size: Keys to the left and to the right that a query sees, (left, right) or one number for both.
      scale: A scalar; 1 / sqrt(size) by default.
      block_size: Queries and keys per block, >= 1. Larger is faster and takes more memory.

    Returns:
      f32[heads], or wider for wider inputs.

    Raises:
      ValueError: Shapes do not fit, or an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> query = key = jnp.arange(6.0).reshape(1, 3, 2, 1)  # 3 positions, 2 heads of size 1
      >>> og.max_attention_logits(query, key, is_causal=True).tolist()
      [16.0, 25.0]

    References:
      Kimi Team. Kimi K2: Open Agentic Intelligence. 2025. arXiv 2507.20534, section 2.1: S_max of algorithm 1.
    """
    owner = "max_attention_logits"
    query, key = lax.stop_gradient((queries_of(owner, query), keys_of(owner, "key", key)))
    _check_shapes(owner, query, key)
    batch, (queries, heads, size), (keys, groups) = query.shape[:-3], query.shape[-3:], key.shape[-3:-1]
    block_size = validate.integer(owner, "block_size", block_size, low=1)
    visible = _Visible(
        _mask(owner, mask, (*batch, heads, queries, keys)),
        _lengths(owner, "query_seq_lengths", query_seq_lengths, batch),
        _lengths(owner, "key_value_seq_lengths", key_value_seq_lengths, batch),
        validate.boolean(owner, "is_causal", is_causal),
        _window(owner, local_window_size),
    )
    dtype = wider_dtype(query.dtype, jnp.float32)
    scale = jnp.asarray(size**-0.5 if scale is None else validate.scalar(owner, "scale", scale), dtype)
    query = query.reshape(*batch, queries, groups, heads // groups, size)
    rows, columns = min(block_size, queries), min(block_size, keys)

    def of_block(corner: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(query, corner[0], rows, axis=len(batch))
        other = lax.dynamic_slice_in_dim(key, corner[1], columns, axis=len(batch))
        product = jnp.einsum("...tkgd,...skd->...kgts", part, other, preferred_element_type=dtype) * scale
        product = product.reshape(*batch, heads, rows, columns)
        seen = visible.block(corner, rows, columns)
        if seen is not None:
            product = jnp.where(_of_rank(seen, product.ndim), product, jnp.asarray(-jnp.inf, dtype))
        return jnp.max(product, axis=(*range(len(batch)), -2, -1))

    # A loop of known length over the blocks that are not excluded: a GPU would wait for the host at one of unknown
    # length. It begins with a block and not with -Inf, whose type would not say how heads are split over devices.
    first, *rest = _corners(queries, keys, rows, columns, visible)
    maxima = of_block(jnp.asarray(first))
    if not rest:
        return maxima
    return lax.scan(
        lambda top, corner: (jnp.maximum(top, of_block(corner)), None), maxima, jnp.asarray(np.stack(rest))
    )[0]


def max_attention_logits_from_lse(lse: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """An upper bound on the largest attention logit of every head, from the log-sum-exp that fused kernels return.

    S_h <= max_t lse[t, h] <= S_h + log(keys)

    For a clip, the bound errs on the safe side: at a threshold of 100 and 8192 keys, logits are held at 91 to 100.

    Guarantees:
      - Never below the largest logit that the kernel summed: the rounding of `lse` to its dtype is added to it.
      - At most log(keys) above it, and one rounding: 0.8 % in bfloat16, 0.1 % in float16.

    =================================  ================================================================
    Case                               Result
    =================================  ================================================================
    a kernel with a soft cap           the bound is that of the capped logits: use `max_attention_logits`
    a kernel with an additive bias     the bound includes the bias: use `max_attention_logits`
    lse above 65504 in float16         Inf
    rows that attend to nothing        leave them out with `where`: kernels return -Inf, Inf or a large number
    =================================  ================================================================

    Args:
      lse: [..., queries, heads], as `jax.nn.dot_product_attention(..., return_residual=True)` returns it. Kernels with
        the layout [..., heads, queries] need a transpose.
      where: booleans that broadcast to `lse`: the rows that count.

    Returns:
      f32[heads], or wider for a wider `lse`.

    Raises:
      ValueError: `lse` is not an array of floating numbers [..., queries, heads].

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> bound = og.max_attention_logits_from_lse(jnp.array([[1.0, 7.0], [3.0, 2.0]]))
      >>> jnp.round(bound).tolist()
      [3.0, 7.0]

    References:
      Dao. FlashAttention-2. 2023. arXiv 2307.08691, section 3.1.1.
    """
    owner = "max_attention_logits_from_lse"
    expected = "floating numbers [..., queries, heads]"
    lse = lax.stop_gradient(validate.array(owner, "lse", lse, expected, ndim=2))
    wide = lse.astype(wider_dtype(lse.dtype, jnp.float32))
    # Half of the last place, by which rounding to the nearest may have made it too small.
    wide = wide + jnp.abs(wide) * jnp.asarray(jnp.finfo(lse.dtype).eps / 2, wide.dtype)
    if where is not None:
        expected = f"booleans that broadcast to `lse`, {list(lse.shape)}"
        where = validate.array(owner, "where", where, expected, kind=jnp.bool_)
        if not _broadcasts(where.shape, lse.shape):
            raise ValueError(f"{owner}: `where` must be {expected}; got {where.dtype}{list(where.shape)}.")
        wide = jnp.where(where, wide, jnp.asarray(-jnp.inf, wide.dtype))
    return jnp.max(wide, axis=tuple(range(wide.ndim - 1)))


def attention_with_max_logits(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`jax.nn.dot_product_attention`, and the largest attention logit of every head.

    The maxima are the upper bounds of `max_attention_logits_from_lse` where JAX returns the log-sum-exp (0.10 does),
    which costs next to nothing. With a `bias`, with `exact` or in an older JAX they come from `max_attention_logits`,
    which computes the products of queries and keys once more.

    Guarantees:
      - The output is that of `jax.nn.dot_product_attention`, bit for bit.
      - The maxima are never too small: at most log(keys) above the largest logit, or exact.

    Args:
      query: [batch, T, heads, size] or [T, heads, size]; this and all others but `exact` as in JAX.
      key: [batch, S, key heads, size] or [S, key heads, size].
      value: Like `key`.
      bias: Added to the logits, and not part of the maxima.
      mask: Booleans that broadcast to [batch, heads, T, S].
      scale: 1 / sqrt(size) by default.
      is_causal: Whether query t attends to keys s <= t only.
      query_seq_lengths: i32[batch], the lengths without padding.
      key_value_seq_lengths: The same of the keys.
      local_window_size: Keys to the left and to the right that a query sees.
      implementation: "xla", "cudnn" or None.
      exact: Whether the maxima are exact. Choose it when the threshold is not well above log(keys), or in float16,
        where a log-sum-exp above 65504 is Inf.

    Returns:
      (output, maxima): an array like `query`, and f32[heads] or wider.

    Raises:
      ValueError: Shapes do not fit, as in JAX.

    Example:
      A layer of one's own, in Equinox or plain JAX, returns the maxima beside its output, and the loss returns them as
      `aux`:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> def layer(params, x):
      ...     query, key, value = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in ("query", "key", "value"))
      ...     mixed, max_logits = og.attention_with_max_logits(query, key, value, is_causal=True)
      ...     return x + mixed.reshape(x.shape), max_logits
      >>> def loss_fn(params, x):
      ...     hidden, max_logits = layer(params["attention"], x)
      ...     return jnp.mean(hidden**2), {"attention": max_logits}
      >>> params = {"attention": {name: jnp.ones((4, 2, 2)) for name in ("query", "key", "value")}}
      >>> grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
      >>> (loss, max_logits), grads = grad_fn(params, jnp.ones((1, 3, 4)))
      >>> max_logits["attention"].shape
      (2,)
    """
    owner = "attention_with_max_logits"
    query = queries_of(owner, query)
    key, value = keys_of(owner, "key", key), keys_of(owner, "value", value)
    if query.ndim > 4:
        raise ValueError(
            f"{owner}: `query` must be [batch, T, heads, size] or [T, heads, size]; got {query.dtype}"
            f"{list(query.shape)}. Reshape the leading axes into one."
        )
    return fused(
        owner,
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        exact=exact,
    )


def fused(
    owner: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None,
    exact: bool,
) -> tuple[jax.Array, jax.Array]:
    """`attention_with_max_logits` of any number of leading axes, for the function that messages name."""
    _check_shapes(owner, query, key)
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"{owner}: `value` must have the shape and dtype of `key`, {key.dtype}{list(key.shape)}; got "
            f"{value.dtype}{list(value.shape)}."
        )
    shape, leading = query.shape, query.shape[:-3] or (1,)  # JAX's function knows one leading axis
    logits = (*leading, query.shape[-2], query.shape[-3], key.shape[-3])
    mask, bias = _mask(owner, mask, logits), _bias(owner, bias, logits)
    if implementation is not None:
        validate.one_of(owner, "implementation", implementation, Implementation)
    exact = validate.boolean(owner, "exact", exact)
    if query.ndim != 4:
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        mask, bias = (_of_one_leading_axis(x, leading) for x in (mask, bias))
    visible = {
        "is_causal": validate.boolean(owner, "is_causal", is_causal),
        "query_seq_lengths": _lengths(owner, "query_seq_lengths", query_seq_lengths, leading),
        "key_value_seq_lengths": _lengths(owner, "key_value_seq_lengths", key_value_seq_lengths, leading),
        "local_window_size": _window(owner, local_window_size),
        "scale": None if scale is None else validate.scalar(owner, "scale", scale),
    }
    same = {**visible, "implementation": implementation}
    if exact or bias is not None or not _RETURNS_LSE:
        output = _FUSED(query, key, value, bias, mask, **same)
        return output.reshape(shape), max_attention_logits(query, key, mask=mask, **visible)
    output, lse = _FUSED(query, key, value, bias, mask, return_residual=True, **same)
    rows, lengths = None, visible["query_seq_lengths"]
    if lengths is not None:
        rows = (jnp.arange(lse.shape[-2])[None] < lengths[:, None])[..., None]
    return output.reshape(shape), max_attention_logits_from_lse(lse, where=rows)


def queries_of(owner: str, query: ArrayLike) -> jax.Array:
    return validate.array(owner, "query", query, "floating numbers [..., T, heads, size]", ndim=3)


def keys_of(owner: str, argument: str, array: ArrayLike) -> jax.Array:
    return validate.array(owner, argument, array, "floating numbers [..., S, key heads, size]", ndim=3)


def collect_max_logits(tree: PyTree) -> dict[str, jax.Array]:
    """Gathers the maxima that attention layers recorded into the `max_logits=` of `qk_clip`.

    A record is whatever stands under the name "max_logits" in nested dicts, lists, tuples or modules; the layer's path
    is the names above it. So this reads linen's intermediates, an `nnx.State` of intermediates, and nested aux of one's
    own alike.

    ====================================  =========================================================
    Case                                  Result
    ====================================  =========================================================
    a layer called twice (shared          the larger of both, per head
    weights)
    layers stacked by `nn.scan`           their maxima as they are: [layers, heads]
    other intermediates beside them       left out
    layers without attention              not in the result
    ====================================  =========================================================

    Args:
      tree: The second result of `model.apply(..., mutable=["intermediates"])`, an `nnx.State` from `nnx.capture` or
        `nnx.pop(model, nnx.Intermediate)`, or any nested container with entries "max_logits".

    Returns:
      A flat dict from paths such as "blocks_0/attention" to [heads] or [layers, heads].

    Raises:
      ValueError: There is no record; the message lists the entries that are there.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_guard as og
      >>> sown = {"intermediates": {"blocks_0": {"attention": {"max_logits": (jnp.array([3.0, 7.0]),)}}}}
      >>> og.collect_max_logits(sown)
      {'blocks_0/attention': Array([3., 7.], dtype=float32)}
    """
    found: dict[str, jax.Array] = {}
    entries = [([_name(part) for part in path], leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for path, leaf in entries:
        if RECORD not in path:
            continue
        layer = path[: path.index(RECORD)]
        name = "/".join(layer[1:] if layer[:1] == ["intermediates"] else layer)
        found[name] = jnp.maximum(found[name], leaf) if name in found else leaf
    if not found:
        there = ", ".join(sorted({"/".join(path) for path, _ in entries})) or "nothing"
        raise ValueError(
            f'collect_max_logits: `tree` must have entries named "{RECORD}"; it has {there}. Attention layers record '
            "them with `optax_guard.flax.dot_product_attention` or `optax_guard.flax.record_max_logits` as "
            "`attention_fn`, when called with `sow_weights=True` and mutable intermediates."
        )
    return found


class _Visible(NamedTuple):
    """Which keys a query may attend to."""

    mask: jax.Array | None  # bool[..., heads or 1, T or 1, S or 1]
    query_lengths: jax.Array | None  # i32[...]
    key_lengths: jax.Array | None  # i32[...]
    is_causal: bool
    window: tuple[int, int] | None

    def meets(self, row: int, column: int, rows: int, columns: int) -> bool:
        """Whether the order of positions lets any query of a block see any of its keys."""
        nearest_left, nearest_right = row - (column + columns - 1), column - (row + rows - 1)
        left, right = (None, None) if self.window is None else self.window
        return not (
            (self.is_causal and nearest_right > 0)
            or (left is not None and nearest_left > left)
            or (right is not None and nearest_right > right)
        )

    def block(self, corner: jax.Array, rows: int, columns: int) -> jax.Array | None:
        """The booleans of a block, for [..., heads, rows, columns]; None if all are True."""
        query, key = corner[0] + jnp.arange(rows)[:, None], corner[1] + jnp.arange(columns)[None]
        parts = []
        if self.mask is not None:
            part = self.mask
            for axis, start, length in ((-2, corner[0], rows), (-1, corner[1], columns)):
                if part.shape[axis] > 1:
                    part = lax.dynamic_slice_in_dim(part, start, length, axis=part.ndim + axis)
            parts.append(part)
        if self.is_causal:
            parts.append(key <= query)
        if self.window is not None:
            parts.append((query <= key + self.window[0]) & (query >= key - self.window[1]))
        for position, lengths in ((query, self.query_lengths), (key, self.key_lengths)):
            if lengths is not None:
                ends = lengths[..., None, None, None]
                parts.append(jnp.expand_dims(position, range(ends.ndim - 2)) < ends)
        rank = max((part.ndim for part in parts), default=0)
        return functools.reduce(jnp.logical_and, (_of_rank(part, rank) for part in parts)) if parts else None


def _corners(queries: int, keys: int, rows: int, columns: int, visible: _Visible) -> np.ndarray:
    """The first query and key of every block in which something may be seen; of all, if there is none."""
    tops = [min(row, queries - rows) for row in range(0, queries, rows)]
    lefts = [min(column, keys - columns) for column in range(0, keys, columns)]
    every = list(itertools.product(tops, lefts))
    return np.asarray([pair for pair in every if visible.meets(*pair, rows, columns)] or every[:1], np.int32)


def _of_rank(array: jax.Array, rank: int) -> jax.Array:
    """The array with unit axes in front."""
    return jnp.expand_dims(array, range(rank - array.ndim))


def _check_shapes(owner: str, query: jax.Array, key: jax.Array) -> None:
    fits = query.ndim >= 3 and key.ndim == query.ndim and query.shape[:-3] == key.shape[:-3]
    fits = fits and query.shape[-1] == key.shape[-1] and 0 not in (*query.shape, *key.shape)
    fits = fits and query.shape[-2] % key.shape[-2] == 0 and query.dtype == key.dtype
    if not (fits and jnp.issubdtype(query.dtype, jnp.floating)):
        raise ValueError(
            f"{owner}: `query` and `key` must be floating numbers of one dtype, [..., T, heads, size] and "
            "[..., S, key heads, size], with heads a multiple of key heads and no empty axis; got "
            f"{query.dtype}{list(query.shape)} and {key.dtype}{list(key.shape)}."
        )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _of_one_leading_axis(array: jax.Array | None, leading: tuple[int, ...]) -> jax.Array | None:
    """An array that broadcasts to [*leading, heads, T, S], with one axis for all the leading ones."""
    if array is None:
        return None
    array = _of_rank(array, max(array.ndim, 3))
    return jnp.broadcast_to(array, (*leading, *array.shape[-3:])).reshape(-1, *array.shape[-3:])


def _mask(owner: str, mask: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if mask is None:
        return None
    expected = f"booleans that broadcast to [..., heads, T, S] = {list(shape)}"
    made = validate.array(owner, "mask", mask, expected, kind=jnp.bool_)
    if not _broadcasts(made.shape, shape):
        raise ValueError(f"{owner}: `mask` must be {expected}; got {made.dtype}{list(made.shape)}.")
    return _of_rank(made, max(made.ndim, 2))


def _bias(owner: str, bias: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if bias is None:
        return None
    expected = f"floating numbers that broadcast to [..., heads, T, S] = {list(shape)}"
    made = validate.array(owner, "bias", bias, expected)
    if not _broadcasts(made.shape, shape):
        raise ValueError(f"{owner}: `bias` must be {expected}; got {made.dtype}{list(made.shape)}.")
    return made.astype(jnp.float32) if jnp.finfo(made.dtype).bits < 16 else made  # no float8 is promoted by itself


def _lengths(owner: str, argument: str, lengths: ArrayLike | None, batch: tuple[int, ...]) -> jax.Array | None:
    if lengths is None:
        return None
    expected = f"whole numbers {list(batch)}, one per sequence"
    made = validate.array(owner, argument, lengths, expected, kind=jnp.integer)
    if made.shape != batch:
        raise ValueError(f"{owner}: `{argument}` must be {expected}; got {made.dtype}{list(made.shape)}.")
    return made.astype(jnp.int32)


def _window(owner: str, window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if window is None:
        return None
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"{owner}: `local_window_size` must be one number or (left, right); got {window!r}.")
    left, right = (validate.integer(owner, "local_window_size", side, low=0, high=2**30) for side in sides)
    return left, right


def _name(part: Any) -> str:
    """An entry of a key path as a person writes it."""
    return jax.tree_util.keystr((part,), simple=True)

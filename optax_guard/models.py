"""Small Flax models whose training goes wrong in known ways, for trying and testing a guard.

=============  ======================================  ========================================================
Model          Made unstable by                        Shows
=============  ======================================  ========================================================
`MLP`          depth with `init_scale` above 1         signals and gradients that grow by a factor per layer
`ConvNet`      `init_scale`, a high learning rate      gradients too large for their filter: unit-wise clipping;
                                                       with `batch_norm=True`, statistics spoilt by a NaN batch
`RNN`          `gain` above 1, long sequences          gradients that explode through time: clipping by norm
`GRU`          as `RNN`, but from a higher `gain`      the same task with gates, for comparison
`Transformer`  `init="explosive"`, no query-key norm,  spiky gradients: skipping, adaptive clipping; unbounded
               a high learning rate                    attention logits, which only `query_key_norm` prevents
=============  ======================================  ========================================================

A guard does not fix an unstable architecture (docs/rules/which_rule.md has an example);
`Transformer(query_key_norm=True)` does.

All models are `flax.nnx` modules; they need Flax, `pip install flax`. They all take `dtype`, the floating
dtype of the computation and the logits (cast the logits to float32 before a cross-entropy), `param_dtype`, that of the
parameters, and `rngs`, the source of the initial parameters. Arguments are static: Python numbers, not arrays.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_guard._common import validate
from optax_guard.attention import max_attention_logits

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("optax_guard.models needs Flax: pip install flax") from error

__all__ = ["GRU", "MLP", "RNN", "ConvNet", "Transformer"]

_Init: TypeAlias = Literal["calm", "explosive"]


class MLP(nnx.Module):
    """A fully connected network: inputs [..., sizes[0]] -> logits [..., sizes[-1]].

    h <- activation(h W_i + b_i), without the activation in the last layer; W_i ~ N(0, init_scale^2 2 / fan_in), b_i = 0

    With `relu`, `init_scale` = 1 preserves the mean square of the signal from layer to layer. Any other value
    multiplies the output by `init_scale` per layer: in a deep network the signal explodes with 1.5 and vanishes with
    0.7 (He et al. 2015, 1502.01852).

    Args:
      sizes: The number of features of the input, of each hidden layer and of the output: two or more whole numbers
        >= 1.
      activation: The elementwise function of the hidden layers.
      init_scale: The gain of each layer at initialisation, in (0, 1e18].
      dtype, param_dtype, rngs: See the module.

    Raises:
      ValueError: An argument is outside its range, or the input does not have `sizes[0]` features.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_guard.models import MLP
      >>> MLP((3, 8, 2), rngs=nnx.Rngs(0))(jnp.ones((5, 3))).shape
      (5, 2)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        init_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = _sizes("MLP", "sizes", sizes, at_least=2)
        validate.function("MLP", "activation", activation, "of an array")
        init_scale = _positive("MLP", "init_scale", init_scale)
        common = _common("MLP", dtype, param_dtype, rngs)
        self.in_features, self.activation, pairs = sizes[0], activation, itertools.pairwise(sizes)
        self.layers = nnx.List(_linear(i, o, init_scale * math.sqrt(2 / i), common, use_bias=True) for i, o in pairs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the logits [..., sizes[-1]] of inputs [..., sizes[0]]."""
        _check_input("MLP", "inputs", inputs, None, self.in_features)
        for layer in self.layers[:-1]:
            inputs = self.activation(layer(inputs))
        return self.layers[-1](inputs)


class ConvNet(nnx.Module):
    """A convolutional network: images [batch, height, width, in_channels] -> logits [batch, num_classes].

    h <- relu(conv_3x3(h)) with stride 2 for each of `channels`, then the mean over positions, then a linear layer.
    Kernels ~ N(0, init_scale^2 2 / fan_in), biases 0; each stage halves height and width. By default there is no batch
    norm, since it would hide gradients too large for their filter. With `batch_norm=True`, batch norm follows each
    convolution. One NaN batch spoils its running statistics (`nnx.BatchStat`) even if a guard holds the step;
    `keep_if_held` protects them. `model.eval()` uses the running statistics, `model.train()` those of the batch.

    Args:
      num_classes, in_channels: The number of logits and of image channels, >= 1.
      channels: The output channels of each stage: one or more whole numbers >= 1.
      init_scale: The gain of each layer at initialisation, in (0, 1e18].
      batch_norm: Whether batch norm (momentum 0.9) follows each convolution.
      dtype, param_dtype, rngs: See the module.

    Raises:
      ValueError: An argument is outside its range, or the images have the wrong rank or number of channels.

    Example:
      >>> ConvNet(10, channels=(4, 8), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 10)

    References:
      Brock, De, Smith, Simonyan. High-Performance Large-Scale Image Recognition Without Normalization. 2021.
      arXiv 2102.06171, section 4. This is a plain network, without their residual branches and weight standardisation.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64),
        init_scale: float = 1.0,
        batch_norm: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        num_classes = _whole("ConvNet", "num_classes", num_classes)
        in_channels = _whole("ConvNet", "in_channels", in_channels)
        channels = _sizes("ConvNet", "channels", channels, at_least=1)
        init_scale = _positive("ConvNet", "init_scale", init_scale)
        _require(isinstance(batch_norm, bool), "ConvNet", "batch_norm", batch_norm, "True or False")
        common = _common("ConvNet", dtype, param_dtype, rngs)
        kernel_init = nnx.initializers.variance_scaling(2 * init_scale**2, "fan_in", "normal")
        self.in_channels, pairs = in_channels, itertools.pairwise((in_channels, *channels))
        self.stages = nnx.List(nnx.Conv(i, o, (3, 3), (2, 2), kernel_init=kernel_init, **common) for i, o in pairs)
        self.norms = nnx.List(nnx.BatchNorm(o, momentum=0.9, **common) for o in channels if batch_norm)
        self.head = nnx.Linear(channels[-1], num_classes, kernel_init=kernel_init, **common)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, in_channels]."""
        _check_input("ConvNet", "images", images, 4, self.in_channels)
        for stage, norm in itertools.zip_longest(self.stages, self.norms):
            images = stage(images)
            images = jax.nn.relu(images if norm is None else norm(images))
        return self.head(jnp.mean(images, axis=(1, 2)))


class RNN(nnx.Module):
    """The vanilla (Elman) recurrent network: inputs [batch, time, in_features] -> logits [batch, num_classes].

    h_t = activation(x_t W + b + h_{t-1} U), h_0 = 0, logits = h_T V + c at the last time T

    W ~ N(0, input_scale^2 / in_features), U = gain * (a random orthogonal matrix), V ~ N(0, 1 / hidden_features),
    b = c = 0. The gradient with respect to an early input passes through U once per step. While `tanh` is nearly
    linear, it grows or shrinks as gain^time; saturation reduces the growth, and `relu` switches half of the units off.
    An explosion therefore needs a small `input_scale` or a gain near 2. Measured growth per step (steps 10 to 40, 32
    units, N(0, 1) inputs):

    gain                        0.8    1.0    1.2    1.6    2.0
    tanh, `input_scale` 0.01    0.80   1.00   1.08   1.08   1.12
    tanh, `input_scale` 1       0.52   0.64   0.76   0.95   1.05
    relu, any `input_scale`     0.53   0.64   0.85   1.07   1.31

    Args:
      in_features, hidden_features: The number of features of one input step and of the state, >= 1.
      num_classes: The number of logits, >= 1 (1 for a regression, such as the adding problem).
      activation: `jnp.tanh`, `jax.nn.relu` or another elementwise function.
      gain: Every singular value of U at initialisation, in (0, 1e18]; see the table above.
      input_scale: The gain of W at initialisation, in (0, 1e18].
      dtype, param_dtype, rngs: See the module.

    Raises:
      ValueError: An argument is outside its range, or the input has the wrong rank or number of features.

    Example:
      >>> RNN(2, 8, 3, gain=1.2, rngs=nnx.Rngs(0))(jnp.ones((4, 10, 2))).shape
      (4, 3)

    References:
      Pascanu, Mikolov, Bengio. On the difficulty of training RNNs. 2013. arXiv 1211.5063, where the
      activation is applied before U.
    """

    _kernels: ClassVar[int] = 1

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_classes: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
        gain: float = 1.0,
        input_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        owner = type(self).__name__
        in_features = _whole(owner, "in_features", in_features)
        hidden_features = _whole(owner, "hidden_features", hidden_features)
        num_classes = _whole(owner, "num_classes", num_classes)
        validate.function(owner, "activation", activation, "of an array")
        gain, input_scale = _positive(owner, "gain", gain), _positive(owner, "input_scale", input_scale)
        common = _common(owner, dtype, param_dtype, rngs)
        square, wide = (hidden_features, hidden_features), self._kernels * hidden_features
        # Drawn in float32, since the QR decomposition behind an orthogonal matrix has no bfloat16 version.
        orthogonal = nnx.initializers.orthogonal(gain)
        blocks = [orthogonal(rngs.params(), square, jnp.float32) for _ in range(self._kernels)]
        self.activation, self.dtype = activation, dtype
        self.recurrent = nnx.Param(jnp.concatenate(blocks, axis=1).astype(param_dtype))
        self.drive = _linear(in_features, wide, input_scale / math.sqrt(in_features), common, use_bias=True)
        self.head = _linear(hidden_features, num_classes, 1 / math.sqrt(hidden_features), common, use_bias=True)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the logits [batch, num_classes] of inputs [batch, time, in_features]."""
        _check_input(type(self).__name__, "inputs", inputs, 3, self.drive.in_features)
        # Scanned as plain arrays, since Flax's own transforms differ between its versions.
        recurrent = self.recurrent[...].astype(self.dtype)
        start = jnp.zeros((inputs.shape[0], recurrent.shape[0]), self.dtype)
        driven = jnp.swapaxes(self.drive(inputs), 0, 1)
        last, _ = jax.lax.scan(lambda state, x: (self._step(state, x, recurrent), None), start, driven)
        return self.head(last)

    def _step(self, state: jax.Array, driven: jax.Array, recurrent: jax.Array) -> jax.Array:
        return self.activation(driven + state @ recurrent)


class GRU(RNN):
    """The gated recurrent unit: inputs [batch, time, in_features] -> logits [batch, num_classes].

    r_t = sigmoid(x_t W_r + b_r + h_{t-1} U_r)
    z_t = sigmoid(x_t W_z + b_z + h_{t-1} U_z)
    n_t = activation(x_t W_n + b_n + r_t * (h_{t-1} U_n))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}, h_0 = 0, logits = h_T V + c at the last time T

    Arguments, initialisation (of each U separately) and errors are those of `RNN`; the kernels lie side by side in the
    order r, z, n. At first the gates are near 1/2, and the gradient changes by a factor of at most about 1/2 + gain / 4
    per step: it vanishes until training opens the gates, and explodes only if `gain` is well above 2.

    Example:
      >>> GRU(2, 8, 3, rngs=nnx.Rngs(0))(jnp.ones((4, 10, 2))).shape
      (4, 3)

    References:
      Cho et al. Learning Phrase Representations using RNN Encoder-Decoder. 2014. arXiv 1406.1078, equations 5 to 8.
      Deviations: r_t multiplies h U_n instead of h, as in cuDNN and `nnx.GRUCell`; biases b are added.
    """

    _kernels: ClassVar[int] = 3

    def _step(self, state: jax.Array, driven: jax.Array, recurrent: jax.Array) -> jax.Array:
        driven_reset, driven_update, driven_new = jnp.split(driven, 3, axis=-1)
        from_reset, from_update, from_new = jnp.split(state @ recurrent, 3, axis=-1)
        reset, update = jax.nn.sigmoid(driven_reset + from_reset), jax.nn.sigmoid(driven_update + from_update)
        return (1 - update) * self.activation(driven_new + reset * from_new) + update * state


class Transformer(nnx.Module):
    """A pre-norm decoder-only transformer: tokens [batch, time] -> next-token logits [batch, time, vocab_size].

    h = E[token] + P[position]; h <- h + attention(norm(h)), h <- h + gelu(norm(h) W_1) W_2 per layer; norm(h) V

    Attention is causal with a float32 softmax, `norm` is RMS norm, and there are no biases. `init` sets the standard
    deviations, with s = sqrt(2 / (5 width)). V has std s in both cases, so the first loss is near log(vocab_size):

      "calm":       s in the layers, 1 for E + P (the "large shortcut")
      "explosive":  4 s in the layers, s for E + P: violates both conditions under which Takase et al. bound gradients

    Without `query_key_norm`, attention logits are unbounded: a high learning rate makes them grow until the softmax is
    one-hot. With it, |logit| <= sqrt(width / heads) max|g_q| max|g_k|, where g are the learned scales of the norm.

    Args:
      vocab_size, max_length: The number of tokens, >= 2 (a token beyond it makes its sequence NaN), and the length of
        the longest sequence, >= 1.
      width: The number of features of h, a multiple of `heads`.
      layers, heads: The number of attention and feed-forward pairs, and of attention heads in each, >= 1.
      query_key_norm: Whether to RMS-normalise queries and keys per head, with a learned scale per feature.
      residual_scaling: Whether to divide the initial output projections of attention and feed-forward by
        sqrt(2 layers).
      init: "calm" or "explosive".
      dtype, param_dtype, rngs: See the module.

    Raises:
      ValueError: An argument is outside its range, or `tokens` is not an integer array [batch, time <= max_length].

    Example:
      >>> Transformer(11, 8, width=8, layers=1, heads=2, rngs=nnx.Rngs(0))(jnp.zeros((2, 8), jnp.int32)).shape
      (2, 8, 11)

    References:
      Takase, Kiyono, Kobayashi, Suzuki. Spike No More. 2023. arXiv 2312.16903. Deviations: E + P is drawn at std 1
      instead of scaled up to it; RMS norm; V is not tied to E.
      Henry et al. Query-Key Normalization for Transformers. 2020. arXiv 2010.04245. Deviation: RMS norm, with scales.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        query_key_norm: bool = False,
        residual_scaling: bool = True,
        init: _Init = "calm",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        vocab_size = _whole("Transformer", "vocab_size", vocab_size, low=2)
        max_length = _whole("Transformer", "max_length", max_length)
        width, heads = _whole("Transformer", "width", width), _whole("Transformer", "heads", heads)
        layers = validate.integer("Transformer", "layers", layers, low=1, high=1000, reason="each is compiled")
        _require(width % heads == 0, "Transformer", "width", width, f"a multiple of `heads` = {heads}")
        query_key_norm = validate.boolean("Transformer", "query_key_norm", query_key_norm)
        residual_scaling = validate.boolean("Transformer", "residual_scaling", residual_scaling)
        validate.one_of("Transformer", "init", init, _Init)
        common = _common("Transformer", dtype, param_dtype, rngs)
        small = math.sqrt(2 / (5 * width))
        std, embedding_std = (small, 1.0) if init == "calm" else (4 * small, small)
        std_out = std / math.sqrt(2 * layers) if residual_scaling else std
        embedding_init = nnx.initializers.normal(embedding_std / math.sqrt(2))
        self.tokens = nnx.Embed(vocab_size, width, embedding_init=embedding_init, **common)
        self.positions = nnx.Embed(max_length, width, embedding_init=embedding_init, **common)
        self.blocks = nnx.List(_Block(width, heads, query_key_norm, std, std_out, common) for _ in range(layers))
        self.norm = nnx.RMSNorm(width, **common)
        self.head = _linear(width, vocab_size, small, common)

    def __call__(self, tokens: jax.Array, *, sow_max_logits: bool = False) -> jax.Array:
        """Returns the logits [batch, time, vocab_size] of tokens [batch, time]; those at t see tokens[:, :t + 1].

        If `sow_max_logits` is True, every block sows the largest attention logit of each head, [heads], as
        "max_logits" in `nnx.Intermediate`, for `optax_guard.collect_max_logits`.
        """
        fits = (
            tokens.ndim == 2
            and tokens.shape[1] <= self.positions.num_embeddings
            and jnp.issubdtype(tokens.dtype, jnp.integer)
        )
        _require(fits, "Transformer", "tokens", tokens, f"integers [batch, time <= {self.positions.num_embeddings}]")
        hidden = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            hidden = block(hidden, sow_max_logits)
        return self.head(self.norm(hidden))


class _Block(nnx.Module):
    """One layer of `Transformer`, attention and then feed-forward, on [batch, time, width]."""

    def __init__(self, width: int, heads: int, query_key_norm: bool, std: float, std_out: float, common: dict) -> None:
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nnx.RMSNorm(width, **common), nnx.RMSNorm(width, **common)
        self.query, self.key, self.value = (_linear(width, width, std, common) for _ in range(3))
        self.output = _linear(width, width, std_out, common)
        self.query_norm = nnx.RMSNorm(width // heads, **common) if query_key_norm else None
        self.key_norm = nnx.RMSNorm(width // heads, **common) if query_key_norm else None
        self.expand, self.contract = _linear(width, 4 * width, std, common), _linear(4 * width, width, std_out, common)

    def queries_and_keys(self, normed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns both as [batch, time, heads, size]; an attention logit is the product of a pair / sqrt(size)."""
        shape = (*normed.shape[:2], self.heads, -1)
        query, key = self.query(normed).reshape(shape), self.key(normed).reshape(shape)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key

    def __call__(self, hidden: jax.Array, sow_max_logits: bool = False) -> jax.Array:
        normed = self.attention_norm(hidden)
        query, key = self.queries_and_keys(normed)
        if sow_max_logits:
            self.sow(nnx.Intermediate, "max_logits", max_attention_logits(query, key, is_causal=True))
        value = self.value(normed).reshape(query.shape)
        # Named, because XLA's implementation takes the softmax in float32 on every backend.
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")
        hidden = hidden + self.output(mixed.reshape(hidden.shape))
        return hidden + self.contract(jax.nn.gelu(self.expand(self.feed_forward_norm(hidden))))


def _linear(fan_in: int, fan_out: int, std: float, common: dict, *, use_bias: bool = False) -> nnx.Linear:
    return nnx.Linear(fan_in, fan_out, use_bias=use_bias, kernel_init=nnx.initializers.normal(std), **common)


def _require(valid: bool, owner: str, argument: str, value: Any, expected: str) -> None:
    if not valid:
        shown = f"{value.dtype}{list(value.shape)}" if getattr(value, "ndim", 0) else repr(value)
        raise ValueError(f"{owner}: `{argument}` must be {expected}; got {shown}.")


def _whole(owner: str, argument: str, value: Any, *, low: int = 1) -> int:
    return validate.integer(owner, argument, value, low=low, high=2**24, reason="it is the size of an array")


def _sizes(owner: str, argument: str, values: Any, *, at_least: int) -> tuple[int, ...]:
    listed = isinstance(values, Sequence) and not isinstance(values, bytes) and len(values) >= at_least
    _require(listed, owner, argument, values, f"a sequence of {at_least} or more whole numbers >= 1")
    return tuple(_whole(owner, f"{argument}[{position}]", value) for position, value in enumerate(values))


def _positive(owner: str, argument: str, value: Any) -> float:
    """At most 1e18, whose square is finite in float32."""
    return validate.scalar(owner, argument, value, low=0, high=1e18, open_low=True, static=True)


def _common(owner: str, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> dict[str, Any]:
    _require(isinstance(rngs, (nnx.Rngs, nnx.RngStream)), owner, "rngs", rngs, "a flax.nnx.Rngs")
    dtype = validate.floating_dtype(owner, "dtype", dtype)
    return {"dtype": dtype, "param_dtype": validate.floating_dtype(owner, "param_dtype", param_dtype), "rngs": rngs}


def _check_input(owner: str, argument: str, array: jax.Array, rank: int | None, features: int) -> None:
    fits = array.ndim >= 1 and array.shape[-1] == features and rank in (None, array.ndim)
    axes = "..., " if rank is None else "_, " * (rank - 1)
    _require(fits, owner, argument, array, f"an array [{axes}{features}]")

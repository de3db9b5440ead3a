"""Which operation, leaf and example did it: faults put in on purpose, found again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import terminal

from optax_guard.diagnose import diagnose as loud
from optax_guard.diagnose import worst_examples
from optax_guard.diagnose._origin import find_origins

diagnose = partial(loud, progress=False)
wrong: Any = loud
HERE = Path(__file__)


def line_of(marker: str) -> int:
    """The number of the line of this file that ends with a comment."""
    lines = HERE.read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.rstrip().endswith(f"# here: {marker}"))


PARAMS = {"first": jnp.full((3, 4), 0.5), "second": jnp.full(4, 0.25), "unused": jnp.ones(2)}


def net(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"]) @ params["second"]


def squares(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.square(net(params, batch["x"]) - batch["y"]))


def data(size: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"x": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32), "y": jnp.zeros(size)}


def test_nan_in_the_data_is_named_as_such_with_its_example() -> None:
    batch = data()
    batch["x"] = batch["x"].at[7, 1].set(jnp.nan)
    found = diagnose(squares, PARAMS, batch)
    assert not found.finite
    assert not found.origins
    assert [(leaf.name, leaf.nans, leaf.infs) for leaf in found.inputs] == [("batch: x", 1, 0)]
    assert found.examples.indices[0] == 7
    assert found.examples.nonfinite == 1
    hit = {leaf.name: leaf.nans for leaf in found.leaves}
    assert hit == {"first": 12, "second": 4, "unused": 0}
    assert "Already in the input: `batch: x` holds 1 NaN" in str(found)
    assert "Examples that carry it: 7, of 12." in str(found)
    json.dumps(found.to_dict())


@jax.jit
def entropy(p: jax.Array) -> jax.Array:
    return jnp.log(p)  # here: log


def surprise(params: Any, batch: Any) -> jax.Array:
    distance = jnp.abs(net(params, batch["x"]) - batch["y"])
    return -jnp.mean(entropy(distance))


def test_log_of_zero_inside_the_net_is_found_with_its_line_and_example() -> None:
    batch = data()
    batch["y"] = batch["y"].at[4].set(net(PARAMS, batch["x"])[4])
    found = diagnose(surprise, PARAMS, batch)
    first = found.origins[0]
    assert (first.operation, first.produced, first.line) == ("log", "Inf", line_of("log"))
    assert first.file.endswith("test_diagnose.py")
    assert first.function == "entropy"
    assert not first.backward
    assert found.examples.indices[0] == 4
    assert f"test_diagnose.py:{line_of('log')} in entropy" in found.story


def half(params: Any, batch: Any) -> jax.Array:
    x = batch["x"].astype(jnp.float16) * jnp.float16(60)
    hidden = jnp.square(x)  # here: overflow
    return jnp.mean((hidden @ params["first"].astype(jnp.float16)).astype(jnp.float32))


def test_an_overflow_in_float16_is_found_where_it_happens() -> None:
    batch = data()
    batch["x"] = batch["x"].at[3, 0].set(5.0)  # 300^2 = 90000 > 65504
    found = diagnose(half, PARAMS, batch)
    first = found.origins[0]
    assert (first.produced, first.line) == ("Inf", line_of("overflow"))
    assert "float16[12,3]" in first.operands[0]
    assert found.examples.indices[0] == 3
    assert found.leaves[0].name == "first"


def root(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.sqrt(jnp.square(net(params, batch["x"]) - batch["y"])))  # here: root


def test_an_infinity_of_the_backward_pass_alone_is_told_as_such() -> None:
    batch = data()
    batch["y"] = batch["y"].at[2].set(net(PARAMS, batch["x"])[2])
    found = diagnose(root, PARAMS, batch)
    assert np.isfinite(found.loss)
    assert not found.finite
    assert found.origins[0].line == line_of("root")
    assert found.examples.indices[0] == 2
    assert found.examples.nonfinite == 1


def test_a_finite_spike_from_one_example_is_found() -> None:
    batch = data()
    batch["y"] = batch["y"].at[9].set(1e4)
    found = diagnose(squares, PARAMS, batch, top=3, chunk_size=5)
    assert found.finite
    assert found.examples.indices[0] == 9
    assert found.examples.ratios[0] > 100
    assert "example 9" in found.story
    assert len(found.examples.indices) == 3


def test_masks_with_infinities_on_purpose_are_no_origin() -> None:
    def attention(w: jax.Array, x: jax.Array) -> jax.Array:
        logits = jnp.where(jnp.tri(4, dtype=bool)[None], jnp.einsum("bi,bj->bij", x, x) * w, -jnp.inf)
        safe = jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), 0)
        jnp.log(x * 0)  # goes nowhere
        return jnp.mean(jax.nn.softmax(logits)) + jnp.mean(safe)

    found = diagnose(attention, jnp.ones(()), jnp.zeros((2, 4)))
    assert found.finite
    assert not found.origins


def inside(kind: str) -> Any:
    def body(h: jax.Array) -> jax.Array:
        return h + jnp.exp(h)  # here: body

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        h = jnp.mean(x) * w
        if kind == "scan":
            h = jax.lax.scan(lambda c, _: (body(c), None), h, None, 12)[0]
        elif kind == "while":
            h = jax.lax.while_loop(lambda c: c[0] < 12, lambda c: (c[0] + 1, body(c[1])), (0, h))[1]
        elif kind == "cond":
            h = jax.lax.cond(h > 0, lambda c: body(1000 * c), lambda c: c, h)
        elif kind == "checkpoint":
            h = jax.checkpoint(body)(1000 * h)
        elif kind == "vmap":
            h = jnp.sum(jax.vmap(body)(1000 * h * jnp.ones(2)))
        return h

    return loss


@pytest.mark.parametrize("kind", ["scan", "while", "cond", "checkpoint", "vmap"])
def test_operations_are_found_inside(kind: str) -> None:
    loss = inside(kind)
    origins = find_origins(loss if kind == "while" else jax.value_and_grad(loss), jnp.ones(()), jnp.ones(2))[1]
    assert origins[0].operation == "exp"
    assert origins[0].line == line_of("body")


def test_what_the_search_computes_is_what_jax_computes() -> None:
    batch = data()
    values, origins = find_origins(jax.value_and_grad(squares), PARAMS, batch)
    assert not origins
    for one, other in zip(values, jax.tree.leaves(jax.value_and_grad(squares)(PARAMS, batch)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_gradients_per_example_are_those_of_a_loop() -> None:
    batch = data()
    worst = worst_examples(squares, PARAMS, batch, top=12, chunk_size=5, progress=False)
    for i in range(12):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        loss, grads = jax.value_and_grad(squares)(PARAMS, alone)
        flat = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])
        np.testing.assert_allclose(worst.all_norms[i], np.linalg.norm(flat), rtol=1e-5)
        np.testing.assert_allclose(worst.all_losses[i], loss, rtol=1e-5)
    assert list(worst.norms) == sorted(worst.all_norms, reverse=True)
    assert str(worst.indices[0]) in str(worst)


def test_the_progress_bar_counts_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    worst_examples(squares, PARAMS, data(), chunk_size=4)
    assert "worst_examples" in screen.getvalue()


X = jnp.ones((4, 3))
W = jnp.ones(3)


@pytest.mark.parametrize("name", ["diagnose", "worst_examples"])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((lambda w, x: x @ w, W, X), {}, "must return one floating-point number"),
        ((squares, PARAMS, {"x": X, "y": jnp.ones(3)}), {}, "leading axes of `batch` differ"),
        ((lambda _, x: jnp.mean(x), {}, X), {}, "nothing to differentiate"),
        ((lambda w, x: jnp.mean(x @ w), W, X), {"top": 0}, "`top` must be a whole number >= 1"),
        ((lambda w, x: jnp.mean(x @ w), W, X), {"chunk_size": 0}, "`chunk_size` must be a whole number >= 1"),
    ],
)
def test_wrong_input_raises_a_sentence(name: str, arguments: Any, options: Any, message: str) -> None:
    function: Any = {"diagnose": loud, "worst_examples": worst_examples}[name]
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        function(*arguments, **options)

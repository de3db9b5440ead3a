"""The audit before the run: against dense Hessians, and against runs that really diverge."""

import itertools
import json
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit
from flax import nnx
from helpers import terminal
from sklearn.datasets import load_digits

import optax_guard as og
from optax_guard.models import RNN, Transformer
from optax_guard.preflight import learning_rate_sweep, plot, preflight

pytestmark = pytest.mark.usefixtures("standard_promotion")  # stock Adam and Flax do not work under the strict one

wrong: Any = preflight
quiet = partial(preflight, progress=False)


def net(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(net(params, batch["x"]) - jax.nn.one_hot(batch["y"], 10)), axis=-1)) / 2


def make(sizes: tuple[int, ...], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return [
        {"kernel": jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), jnp.float32), "bias": jnp.zeros(o)}
        for i, o in itertools.pairwise(sizes)
    ]


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    data = load_digits()
    return {"x": jnp.asarray(data.data[:256] / 16, jnp.float32), "y": jnp.asarray(data.target[:256])}


# Curvature


def dense_hessian(params: Any, batch: Any) -> np.ndarray:
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, batch["x"]))
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        batch = {"x": x, "y": batch["y"]}
        return np.asarray(quick_jit(jax.hessian(lambda w: loss_fn(unravel(w), batch)))(flat), np.float64)


@pytest.mark.slow
def test_eigenvalues_are_those_of_the_dense_hessian(digits: Any) -> None:
    batch = {"x": digits["x"][:, 20:28], "y": digits["y"]}
    params = make((8, 6, 10))
    adam = optax.adam(1e-3, b1=0.8, b2=0.95)
    state = adam.init(params)
    for i in range(3):
        grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x, i=i: x[i * 64 : i * 64 + 64], batch))
        state = adam.update(grads, state, params)[1]
    report = quiet(loss_fn, params, batch, optimizer=adam, state=state, eigenvalues=3, tolerance=1e-4)

    hessian = dense_hessian(params, batch)
    nu = np.asarray(jax.flatten_util.ravel_pytree(optax.tree.get(state, "nu"))[0], np.float64)
    root = np.where(nu > 0, 1 / np.sqrt(np.sqrt(nu / (1 - 0.95**3)) + 1e-8), 0)  # one pixel was 0 in all three batches
    top = np.linalg.eigvalsh(hessian)[::-1][:3]
    conditioned = np.linalg.eigvalsh(root[:, None] * hessian * root)[::-1][:3]
    assert report.eigenvalues is not None
    assert report.preconditioned_eigenvalues is not None
    np.testing.assert_allclose(report.eigenvalues, top, rtol=1e-3)
    np.testing.assert_allclose(report.preconditioned_eigenvalues, conditioned, rtol=2e-3)
    rates = report.stable_learning_rates
    assert rates is not None
    assert rates.optimizer is not None
    np.testing.assert_allclose(rates.sgd, 2 / top[0], rtol=1e-3)
    np.testing.assert_allclose(rates.momentum, 3.8 / top[0], rtol=1e-3)
    np.testing.assert_allclose(rates.optimizer, 2 * 1.8 / 0.2 / conditioned[0], rtol=2e-3)


def test_the_dense_way_for_a_handful_of_parameters_agrees_with_lanczos() -> None:
    rng = np.random.default_rng(0)
    for size in (3, 30):  # below and above the switch
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        values = np.linspace(-5, 4, size)
        matrix = jnp.asarray(basis * values @ basis.T, jnp.float32)
        report = quiet(
            lambda w, x, m=matrix: w @ m @ w / 2 + 0 * jnp.mean(x),
            jnp.ones(size),
            jnp.ones((2, 1)),
            eigenvalues=2,
            tolerance=1e-4,
        )
        assert report.eigenvalues is not None
        np.testing.assert_allclose(report.eigenvalues, values[::-1][:2], rtol=1e-3)


def test_without_positive_curvature_no_rate_is_too_large() -> None:
    report = quiet(lambda w, x: -jnp.sum(w * w) + 0 * jnp.mean(x), jnp.ones(3), jnp.ones((2, 1)))
    assert report.stable_learning_rates == (np.inf, np.inf, None)


EDGES = {
    "sgd": (optax.sgd, "sgd"),
    "momentum": (partial(optax.sgd, momentum=0.9), "momentum"),
    "momentum, read from the optimizer": (partial(optax.sgd, momentum=0.9), "optimizer"),
    "guarded adam": (lambda rate: og.guard(optax.adam(rate), og.clip_by_global_norm(10.0)), "optimizer"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if i else []) for i, n in enumerate(EDGES)])
def test_the_predicted_edge_separates_stable_from_diverging_learning_rates(name: str, digits: Any) -> None:
    """Full-batch training goes on from where it has settled, with its state, at rates around the edge."""
    make_tx, field = EDGES[name]
    slow = make_tx(0.002 if "adam" in name else 0.02)

    @quick_jit
    def settle(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(carry[0], digits)
            return og.apply_gradients(slow, grads, carry[1], carry[0], value=loss), None

        return jax.lax.scan(step, (params, slow.init(params)), None, 300)[0]

    params, state = settle(make((64, 16, 10)))
    report = quiet(loss_fn, params, digits, optimizer=slow, state=state)
    assert report.stable_learning_rates is not None
    edge = getattr(report.stable_learning_rates, field)
    multiples = np.array([0.5, 0.8, 1.25, 2.0], np.float32)

    @quick_jit
    def run(rate: jax.Array) -> jax.Array:
        tx = make_tx(rate)

        def step(carry: Any, _: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(carry[0], digits)
            return og.apply_gradients(tx, grads, carry[1], carry[0], value=loss), loss

        return jax.lax.scan(step, (params, state), None, 60)[1]

    losses = np.stack([np.asarray(run(jnp.float32(m * edge))) for m in multiples])
    rises = np.nanmax(losses, axis=1) > 1.5 * losses[:, 0]
    assert rises.tolist() == [False, False, True, True], (edge, np.nanmax(losses, axis=1), losses[:, 0])


@pytest.mark.slow
def test_nothing_is_claimed_about_an_optimizer_of_unknown_form(digits: Any) -> None:
    small = jax.tree.map(lambda x: x[:16], digits)
    for optimizer in (optax.lion(1e-3), optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()):
        report = quiet(loss_fn, make((64, 10)), small, optimizer=optimizer, tolerance=0.3, chunks=1)
        assert report.stable_learning_rates is not None
        assert report.stable_learning_rates.optimizer is None
        assert any("sweep" in finding for finding in report.findings)


# Norms, noise, precision


def test_norms_noise_scale_and_threshold_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 5)) + 1.0
    w = np.arange(5.0)
    report = quiet(lambda p, x: jnp.mean(x @ p["w"]), {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32))
    parts = x.reshape(8, 8, 5).mean(axis=1)  # the gradient of each part is the mean of its rows
    norm = np.linalg.norm(x.mean(axis=0))
    spread = parts.var(axis=0, ddof=1).sum() / 8
    np.testing.assert_allclose(report.gradient_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(report.leaves[0].parameter_norm, np.linalg.norm(w), rtol=1e-6)
    assert report.gradient_noise_scale is not None
    np.testing.assert_allclose(report.gradient_noise_scale, spread * 64 / (norm**2 - spread), rtol=1e-4)
    assert report.clip_threshold == float(f"{2 * np.sqrt(norm**2 + spread):.2g}")
    assert sum(n for _, n in report.gradient_exponents) == 5


def test_headroom_counts_what_float16_loses() -> None:
    sizes = jnp.array([1.0, 2.0**-20, 2.0**-26, 0.0])
    report = quiet(lambda w, x: jnp.sum(w * sizes.astype(w.dtype)) * jnp.mean(x), jnp.full(4, 300.0), jnp.ones((2, 1)))
    bfloat16, float16 = report.headroom
    assert (float16.underflow_share, float16.subnormal_share) == (1 / 3, 2 / 3)
    assert (bfloat16.underflow_share, bfloat16.subnormal_share) == (0, 0)
    assert float16.gradient_bits == pytest.approx(16, abs=0.01)  # 65504 is 2^16, nearly
    assert float16.loss_scale == 2.0**11
    assert report.gradient_exponents == ((-26, 1), (-20, 1), (0, 1))
    overflow = quiet(lambda w, x: jnp.sum(w * w) * jnp.mean(x), jnp.full(4, 300.0), jnp.ones((2, 1)))
    assert overflow.headroom[1].loss == np.inf
    assert any("not finite in float16" in finding for finding in overflow.findings)


# Growth


def test_taps_show_growth_both_ways_dead_and_saturated_units() -> None:
    depth, width, gain = 6, 64, 1.5
    rng = np.random.default_rng(0)
    kernels = [np.linalg.qr(rng.normal(size=(width, width)))[0] * gain for _ in range(depth)]
    params = {f"layer_{i}": jnp.asarray(k, jnp.float32) for i, k in enumerate(kernels)}

    def tapped(params: Any, x: jax.Array, tap: Any) -> jax.Array:
        for i in range(depth):
            x = tap(f"h{i}", x @ params[f"layer_{i}"])
        tap("dead", jnp.square(x) * jnp.where(jnp.arange(width) < 16, 0, 1)[None])
        tap("saturated", jnp.tanh(jnp.square(x) + 10))
        return jnp.mean(jnp.sum(x, axis=-1))

    x = jnp.asarray(rng.normal(size=(8, width)), jnp.float32)
    report = quiet(lambda p, x: tapped(p, x, lambda _, h: h), params, x, tapped_loss_fn=tapped, tolerance=0.5, chunks=1)
    by_name = {each.name: each for each in report.growth}
    assert by_name["layer_*"].exponent == pytest.approx(0, abs=1e-3)  # a weight's gradient is the product of both
    hidden = {a.name: a for a in report.activations}
    rms = [hidden[f"h{i}"].root_mean_square for i in range(depth)]
    back = [hidden[f"h{i}"].gradient_norm for i in range(depth)]
    np.testing.assert_allclose(np.diff(np.log(rms)), np.log(gain), rtol=1e-3)
    np.testing.assert_allclose(-np.diff(np.log(back)), np.log(gain), rtol=1e-3)
    assert hidden["dead"].dead_share == 0.25
    assert hidden["dead"].saturated_share is None
    assert hidden["saturated"].saturated_share == 1


def test_growth_along_time_is_the_gain_of_a_linear_recurrence() -> None:
    model = RNN(2, 8, 1, activation=lambda x: x, gain=1.3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    batch = np.random.default_rng(0).normal(size=(4, 12, 2)).astype(np.float32)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(x))

    report = quiet(loss, params, batch, time_axis=1, tolerance=0.5, chunks=1)
    along = {each.name: each for each in report.growth}["time"]
    norms = np.array(along.norms)
    assert len(norms) == 12
    assert np.exp(along.exponent) == pytest.approx(1.3, rel=0.03)
    assert any("per time step" in finding for finding in report.findings)


# The whole


@pytest.mark.parametrize(
    ("batch", "length", "width", "layers"),
    [(4, 8, 8, 2), pytest.param(16, 64, 64, 3, marks=pytest.mark.slow)],
    ids=["small", "reference"],
)
def test_a_transformer_is_audited_within_a_minute_with_a_progress_bar(
    batch: int, length: int, width: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(96, length, width=width, heads=4, layers=layers, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    tokens = np.random.default_rng(0).integers(0, 96, (batch, length + 1))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(params))(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    screen = terminal(monkeypatch)
    start = time.process_time()
    report = preflight(loss, params, tokens, optimizer=optax.adamw(1e-3), progress=True)
    assert time.process_time() - start < 240  # wall time is 30 s on two idle cores; CPU time is what others cannot slow
    assert "preflight" in screen.getvalue()
    growth = {each.name: each for each in report.growth}
    assert growth["blocks/*"].positions == tuple(map(str, range(layers)))
    assert report.loss == pytest.approx(np.log(96), rel=0.1)
    assert report.preconditioned_eigenvalues
    text = str(report)
    for words in ("largest stable learning rate, this optimizer", "blocks/*", "float16", "tokens/embedding"):
        assert words in text
    json.dumps(report.to_dict())


def test_a_loss_that_is_not_finite_is_told_and_the_leaf_named() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(params["a"] * x) + jnp.log(params["b"])

    report = quiet(loss, {"a": jnp.ones(()), "b": jnp.zeros(())}, jnp.ones(4))
    assert report.eigenvalues is None
    assert "`b`" in report.findings[0]
    assert "diagnose" in str(report)


def test_pictures_are_written(tmp_path: Any) -> None:
    report = quiet(
        lambda w, x: jnp.mean(jnp.square(x @ (w["layer_0"] * w["layer_1"]))),
        {"layer_0": jnp.ones(3), "layer_1": jnp.ones(3)},
        jnp.ones((4, 3)),
    )
    sweep = learning_rate_sweep(
        optax.sgd, lambda w, x: jnp.mean(jnp.square(w * x)), jnp.ones(()), jnp.ones((9, 4)), [0.1, 3.0]
    )
    for name, result in (("report", report), ("sweep", sweep)):
        plot(result, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


# Bad input

X = jnp.ones((4, 3))
W = jnp.ones(3)
LOSS: Any = lambda w, x: jnp.mean(x @ w)  # noqa: E731  # one line a case


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((lambda w, x: x @ w, W, X), {}, r"must return one floating-point number; got float32\[4\]. Take the mean"),
        ((lambda w, x: (jnp.mean(x @ w), 1), W, X), {}, "pass has_aux=True"),
        ((LOSS, W, X), {"has_aux": True}, r"must return \(loss, aux\)"),
        ((LOSS, W, {"a": X, "b": X[:2]}), {}, "leading axes of `batch` differ: `a` has 4 examples, `b` has 2"),
        ((LOSS, W, X[:0]), {}, "no examples"),
        ((LOSS, W, {"a": X, "rate": jnp.ones(())}), {}, "`rate` of `batch` is a single number"),
        ((LOSS, W, {}), {}, "`batch` has no arrays"),
        ((LOSS, {}, X), {}, "nothing to differentiate"),
        ((LOSS, {"n": jnp.arange(3)}, X), {}, "nothing to differentiate"),
        ((LOSS, {"f": len}, X), {}, "leaf `f` is not an array"),
        ((lambda w, x: jnp.mean(jnp.abs(x @ w)), W + 0j, X), {}, "`.root.` is complex"),
        ((3, W, X), {}, "`loss_fn` must be a function"),
        ((LOSS, W, X), {"momentum": 1.5}, "`momentum` must be"),
        ((LOSS, W, X), {"eigenvalues": 0}, "`eigenvalues` must be a whole number >= 1"),
        ((LOSS, W, X), {"optimizer": 3}, "`optimizer` must be"),
        ((LOSS, W, X), {"state": ()}, "`state` needs the `optimizer`"),
        ((LOSS, W, X), {"time_axis": 2}, "no floating-point leaf of `batch` has an axis 2"),
        ((LOSS, W, X), {"tapped_loss_fn": lambda w, x, _: jnp.mean(x @ w)}, "never called tap"),
    ],
)
def test_wrong_input_raises_a_sentence(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"preflight: .*{message}"):
        wrong(*arguments, **options)


def test_without_rich_or_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = preflight(LOSS, W, X)  # a missing progress bar is no error unless it was asked for
    with pytest.raises(ImportError, match=r"pip install rich"):
        preflight(LOSS, W, X, progress=True)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot(report)


# Sweep


def test_each_run_of_a_sweep_is_that_training_alone_and_sensitivity_is_the_papers(digits: Any) -> None:
    params = make((64, 10))
    batches = jax.tree.map(lambda x: x.reshape(8, 32, *x.shape[1:]), digits)
    rates = [1e-2, 1e-1, 1.0, 300.0]
    sweep = learning_rate_sweep(
        lambda rate: og.guard(optax.adam(rate), og.clip_by_global_norm(1.0)),
        loss_fn,
        params,
        batches,
        rates,
        validation=digits,
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates[1]))
    weights, state = params, tx.init(params)
    step = jax.jit(lambda w, s, b: (jax.grad(loss_fn)(w, b), s))
    for i in range(8):
        grads, state = step(weights, state, jax.tree.map(lambda x, i=i: x[i], batches))
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(sweep.final_losses[1], loss_fn(weights, digits), rtol=1e-4)
    initial = float(loss_fn(params, digits))
    capped = np.minimum(sweep.final_losses, initial)
    np.testing.assert_allclose(sweep.sensitivity, np.mean(capped - capped.min()), rtol=1e-5)
    assert sweep.survived.tolist() == (sweep.final_losses <= initial).tolist()
    assert not sweep.survived[-1]
    assert sweep.best in np.float32(rates)


def test_a_sweep_in_which_every_run_dies_says_so_and_harms_no_other() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(w * x))

    dead = learning_rate_sweep(optax.sgd, loss, jnp.ones(()), jnp.ones((200, 2)), [30.0, 1e9])
    assert np.isnan(dead.sensitivity)
    assert dead.best is None
    assert "no" in str(dead)
    both = learning_rate_sweep(optax.sgd, loss, jnp.ones(()), jnp.ones((200, 2)), [0.1, 1e9])
    assert both.survived.tolist() == [True, False]
    np.testing.assert_allclose(both.sensitivity, 0.5, rtol=1e-5)  # one at the optimum, one counted with the initial 1


def test_integer_leaves_stay_as_they_are_in_a_sweep() -> None:
    params = {"w": jnp.ones(()), "n": jnp.asarray(2, jnp.int32)}
    sweep = learning_rate_sweep(
        optax.sgd, lambda p, x: jnp.mean(jnp.square(p["w"] * p["n"] * x)), params, jnp.ones((3, 2)), [0.01]
    )
    np.testing.assert_allclose(sweep.losses[0], 4 * 0.92 ** (2 * np.arange(3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": []}, "one or more positive numbers"),
        ({"learning_rates": [0.1, -1.0]}, "one or more positive numbers"),
        (
            {"batches": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}},
            "same leading axis of steps.*`a` has .3., `b` .2.",
        ),
        ({"make_tx": lambda rate: rate}, "must return an optax.GradientTransformation"),
        ({"loss_fn": lambda w, x: x * w}, "must return one floating-point number"),
    ],
)
def test_a_sweep_refuses_wrong_input_in_a_sentence(change: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "make_tx": optax.sgd,
        "loss_fn": lambda w, x: jnp.mean(jax.tree.leaves(x)[0] * w),
        "params": jnp.ones(()),
        "batches": jnp.ones((3, 2)),
        "learning_rates": [0.1],
    }
    with pytest.raises(ValueError, match=f"learning_rate_sweep: .*{message}"):
        learning_rate_sweep(**{**arguments, **change})

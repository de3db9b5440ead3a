"""`optax_guard.published` against the authors' algorithms: float64 NumPy, their settings, and no argument given.

The oracles follow the authors' own programs, the places of their epsilons and the order of their statements included.
A function of `optax_guard.published` that has no oracle here fails the first test.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import quick_jit

import optax_guard as og

LEAVES, SIZE = 3, 4
LR, B1, B2 = 0.1, 0.9, 0.999


@pytest.fixture(autouse=True)
def _standard(standard_promotion: None) -> None:
    """Stock Adam inside."""


def history(scale: float, steps: int) -> np.ndarray:
    """f32[steps, leaves, size]: noise, a drift, spikes, a rise and a fall; the usual norm of all is about `scale`."""
    rng = np.random.default_rng(7)
    gradients = rng.standard_normal((1100, LEAVES, SIZE)) * np.array([0.5, 0.1, 0.2])[None, :, None]
    level = np.exp(0.3 * rng.standard_normal(1100) + np.linspace(-0.5, 0.5, 1100))
    level[[3, 70, 130, 131, 260, 511, 1003]] *= [8, 50, 1000, 300, 7, 30, 40]
    level[300:] *= 3
    level[700:] /= 5
    return (scale * level[:steps, None, None] * gradients[:steps]).astype(np.float32)


def losses_of(gradients: np.ndarray) -> np.ndarray:
    losses = np.exp(0.1 * np.random.default_rng(8).standard_normal(1100))
    losses[[62, 63, 200]] = [40.0, 90.0, 50.0]
    return losses[: len(gradients)].astype(np.float32)


def runner(tx: optax.GradientTransformation) -> Callable[[np.ndarray], tuple[np.ndarray, Any]]:
    """Gradients -> the updates, and the state after every step; compiled once for all of one length."""
    params = [np.zeros(SIZE, np.float32)] * LEAVES
    tx = optax.with_extra_args_support(tx)

    def body(state: Any, x: Any) -> Any:
        updates, state = tx.update(list(x[0]), state, params, value=x[1])
        return state, (jnp.stack(updates), state)

    run = quick_jit(lambda g, losses: jax.lax.scan(body, tx.init(params), (g, losses))[1])

    def call(gradients: np.ndarray) -> tuple[np.ndarray, Any]:
        updates, states = run(gradients, losses_of(gradients))
        return np.asarray(updates, np.float64), states

    return call


def replay(tx: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    return runner(tx)(gradients)[0]


# The authors' algorithms: f64[steps, leaves, size], the losses -> the updates


def norm_of(gradient: np.ndarray) -> float:
    return float(np.sqrt(np.sum(gradient**2)))


def torch_clip(gradient: np.ndarray, max_norm: float) -> np.ndarray:
    """`torch.nn.utils.clip_grad_norm_`."""
    return gradient * min(1.0, max_norm / (norm_of(gradient) + 1e-6))


def zclip(
    gradients: np.ndarray,
    losses: Any = None,
    mode: str = "reciprocal",
    clip_factor: float = 1.0,
    max_norm: float = 1.0,
    warmup: int = 25,
    skip_update_on_spike: bool = False,
) -> np.ndarray:
    buffer, out, mean, variance = [], [], 0.0, 0.0
    for gradient in gradients:
        norm = norm_of(gradient)
        if len(buffer) < warmup:
            buffer.append(norm)
            mean, variance = float(np.mean(buffer)), float(np.var(buffer))
            out.append(torch_clip(gradient, max_norm))
            continue
        deviation = np.sqrt(variance)
        z = (norm - mean) / (deviation + 1e-6)
        bound = None
        if mode == "percentile":
            bound = mean + 2.5 * deviation if norm > mean + 2.5 * deviation else None
        elif z > 2.5:
            bound = mean if mode == "mean" else (mean + 2.5 * deviation / (z / 2.5)) * clip_factor
        passes = norm if bound is None else bound
        effective = min(passes, max_norm)
        out.append(gradient * (effective / (norm + 1e-6)) if norm > effective else gradient)
        if bound is None or not skip_update_on_spike:
            mean = 0.97 * mean + 0.03 * passes
            variance = 0.97 * variance + 0.03 * (passes - mean) ** 2
    return np.array(out)


def autoclip(gradients: np.ndarray, losses: Any = None) -> np.ndarray:
    seen, out = [], []
    for gradient in gradients:
        seen.append(norm_of(gradient))
        out.append(torch_clip(gradient, float(np.percentile(seen, 10))))
    return np.array(out)


def adagc(gradients: np.ndarray, losses: Any = None, max_norm: float = 1.0) -> np.ndarray:
    kept, out = [np.inf] * LEAVES, []
    for step, gradient in enumerate(gradients, start=1):
        clipped = gradient * min(1.0, max_norm / (norm_of(gradient) + 1e-6)) if step <= 100 else gradient.copy()
        for i in range(LEAVES):
            norm = norm_of(clipped[i])
            if step <= 100:
                kept[i] = min(kept[i], norm)
                continue
            if norm > 1.04 * kept[i]:
                clipped[i] *= 1.04 * kept[i] / (norm + 1e-6)
                norm = 1.04 * kept[i]
            kept[i] = 0.99 * kept[i] + 0.01 * norm
        out.append(clipped)
    return np.array(out)


def adagc_global(gradients: np.ndarray, losses: Any = None) -> np.ndarray:
    """AdaGC-Global, the authors' variant for the norm of the whole gradient."""
    kept, out = np.inf, []
    for step, gradient in enumerate(gradients, start=1):
        norm = norm_of(gradient)
        if step <= 100:
            out.append(gradient * min(1.0, 1.0 / (norm + 1e-6)))
            kept = min(kept, norm, 1.0)
            continue
        over = norm > 1.04 * kept
        out.append(gradient * (1.04 * kept / (norm + 1e-6)) if over else gradient)
        kept = 0.99 * kept + 0.01 * min(norm, 1.04 * kept)
    return np.array(out)


def skipping(gradients: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """OLMo-core and MaxText: of 129 values, the one to be judged among them, from the 64th on."""
    out = []
    norms = [norm_of(gradient) for gradient in gradients]
    for step, gradient in enumerate(gradients):
        keep = True
        for series in (losses, norms):
            values = series[max(0, step - 128) : step + 1]
            if len(values) >= 64:
                keep = keep and values[-1] - np.mean(values[:-1]) <= 6 * np.std(values[:-1], ddof=1)
        out.append(gradient if keep else 0 * gradient)
    return np.array(out)


def update_norm(gradients: np.ndarray, losses: Any = None) -> np.ndarray:
    """Levanter: of 128 values before this one, once there are 64."""
    out = []
    norms = [norm_of(gradient) for gradient in gradients]
    for step, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
        past = norms[max(0, step - 128) : step]
        limit = np.mean(past) + 3 * max(np.std(past), 1e-6) if len(past) >= 64 else np.inf
        out.append(gradient * (limit / max(norm, 1e-6)) if norm > limit else gradient)
    return np.array(out)


def spam(gradients: np.ndarray, losses: Any = None) -> np.ndarray:
    """With eps = 1e-30, so that it does not matter where it is added."""
    out, m, v, since = [], np.zeros((LEAVES, SIZE)), np.zeros((LEAVES, SIZE)), 151
    for step, gradient in enumerate(gradients, start=1):
        factor = 1 - 0.99 * (1 + np.cos(np.pi * since / 151)) / 2 if since < 150 else 1.0
        if step % 500 == 0:
            m, v = 0 * m, 0 * v
        g = gradient
        if step >= 20 and step % 500 >= 20:
            g = np.where(g**2 > 5000 * v, np.sign(g) * np.sqrt(5000 * v), g)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        out.append(-LR * factor * np.sqrt(1 - B2**step) / (1 - B1**step) * m / (np.sqrt(v) + 1e-30))
        since = 0 if (step + 1) % 500 == 0 else since + 1
    return np.array(out)


def stable_spam(gradients: np.ndarray, losses: Any = None, steps: int | None = None) -> np.ndarray:
    out, zeros = [], np.zeros((LEAVES, SIZE))
    m, v, t, top, first, second = zeros, zeros, 0, np.zeros(LEAVES), np.zeros(LEAVES), np.zeros(LEAVES)
    for call, gradient in enumerate(gradients, start=1):
        scale = 1.0 if steps is None else 0.5 + 0.25 * (1 + np.cos(np.pi * call / (steps + 1)))
        gamma1, b1 = 0.7 * scale, B1 * scale
        t, g = t + 1, gradient.copy()
        for i in range(LEAVES):
            most = np.max(np.abs(g[i]))
            top[i] = 0.999 * top[i] + 0.001 * most
            bound = top[i] / (1 - 0.999**t)
            over = np.abs(g[i]) > bound
            g[i][over] = g[i][over] / most * bound
            norm = norm_of(g[i])
            first[i] = gamma1 * first[i] + (1 - gamma1) * norm
            second[i] = 0.9 * second[i] + 0.1 * norm**2
            if norm > 0:
                g[i] *= first[i] / (1 - gamma1**t) / (np.sqrt(second[i] / (1 - 0.9**t)) + 1e-8) / norm
        restart = call % 1000 == 0
        t = 1 if restart else t
        m, v = b1 * m + (1 - b1) * g, B2 * v + (1 - B2) * g**2
        out.append(-LR * m / (1 - b1**t) / (np.sqrt(v / (1 - B2**t)) + 1e-8))
        if restart:
            m, v = zeros, zeros
    return np.array(out)


class Form(NamedTuple):
    """A published form: what makes it, with no argument but an optimizer, and its authors' algorithm."""

    make: Callable[..., optax.GradientTransformation]
    oracle: Callable[..., np.ndarray]
    steps: int = 1000
    unseen: bool = False  # in the history some elements are 0 at first, and a leaf now and then


FORMS = {
    "adagc": Form(og.published.adagc, adagc),
    "autoclip": Form(og.published.autoclip, autoclip),
    "clip_by_update_norm": Form(og.published.clip_by_update_norm, update_norm),
    "skip_spikes": Form(og.published.skip_spikes, skipping),
    "spam_clip": Form(functools.partial(og.published.spam_clip, optax.adam(LR, eps=1e-30)), spam, unseen=True),
    "stable_spam": Form(functools.partial(og.published.stable_spam, optax.adam(LR)), stable_spam, 1100, unseen=True),
    "zclip": Form(og.published.zclip, zclip),
}


def gradients_of(form: Form, scale: float) -> np.ndarray:
    gradients = history(scale, form.steps)
    if form.unseen:
        gradients[:400, 0, 0] = 0
        gradients[[0, 1, 50, 51, 52], 1] = 0
    return gradients


def test_every_published_form_has_its_authors_algorithm_here() -> None:
    functions = {name: inspect.getdoc(getattr(og.published, name)) for name in og.published.__all__ if name.islower()}
    assert set(functions) == set(FORMS)
    for name, text in functions.items():
        assert inspect.isfunction(getattr(og, name)), f"{name} has no repaired form"
        assert all(part in text for part in ("Faults:", "References:", "Deviation")), name
    switched = [name for name in og.__all__ if "faithful" in parameters_of(getattr(og, name))]
    assert not switched, "two algorithms behind a switch"


def parameters_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) if inspect.isfunction(function) else set()


@pytest.mark.parametrize("name", FORMS)
def test_the_defaults_are_the_authors_algorithm_with_the_authors_settings(name: str) -> None:
    form = FORMS[name]
    run = runner(form.make())
    for scale in (1.0, 1e-6):  # their epsilons are of the size of the second
        gradients = gradients_of(form, scale)
        expected = form.oracle(gradients.astype(np.float64), losses_of(gradients).astype(np.float64))
        got, states = run(gradients)
        sizes = np.sqrt(np.sum(expected**2, axis=2, keepdims=True))
        np.testing.assert_allclose(got, expected, rtol=5e-4, atol=2e-4 * np.median(sizes))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states))


# Their options


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mean", "skip_update_on_spike": True},
        {"mode": "percentile", "warmup": 2, "max_norm": np.inf},
        {"clip_factor": 0.5, "max_norm": np.inf},
    ],
    ids=str,
)
def test_the_options_of_zclip_are_its_authors(options: dict[str, Any]) -> None:
    gradients = history(0.3, 300)
    got = replay(og.published.zclip(**options), gradients)
    np.testing.assert_allclose(got, zclip(gradients.astype(np.float64), **options), rtol=5e-4, atol=1e-5)


def test_adagc_of_the_whole_gradient_and_without_a_bound_in_the_warm_up() -> None:
    gradients = history(1e-5, 300)
    got = replay(og.published.adagc(scope="tree"), gradients)
    np.testing.assert_allclose(got, adagc_global(gradients.astype(np.float64)), rtol=5e-4, atol=1e-9)
    gradients = history(10.0, 150)
    got = replay(og.published.adagc(max_norm=np.inf), gradients)
    np.testing.assert_allclose(got, adagc(gradients.astype(np.float64), max_norm=np.inf), rtol=5e-4, atol=1e-4)


def test_the_decay_of_gamma1_and_b1_over_the_run_as_the_docstring_gives_it() -> None:
    """Their `total_T` and `eta_min`."""
    steps, gradients = 250, gradients_of(FORMS["stable_spam"], 1.0)[:250]

    def scale(step: Any) -> Any:
        return 0.75 + 0.25 * jnp.cos(jnp.pi * (step + 1) / (steps + 1))

    adam = optax.inject_hyperparams(optax.adam)(LR, b1=lambda step: B1 * scale(step))
    tx = og.published.stable_spam(adam, gamma1=lambda step: 0.7 * scale(step))
    expected = stable_spam(gradients.astype(np.float64), steps=steps)
    np.testing.assert_allclose(replay(tx, gradients), expected, rtol=5e-4, atol=1e-4)
    assert np.max(np.abs(expected - stable_spam(gradients.astype(np.float64)))) > 0.01  # it matters


# The figures that the docstrings and pages give


@pytest.mark.parametrize("spam_clip", [og.published.spam_clip, og.spam_clip])
def test_the_warm_up_of_spam_begins_at_the_restart(spam_clip: Any) -> None:
    ones = np.ones((503, LEAVES, SIZE), np.float32)
    make = functools.partial(spam_clip, optax.adam(LR))
    factors = (replay(make(), ones) / replay(make(warmup=0), ones))[:, 0, 0]
    np.testing.assert_allclose(factors[498:], [1, 0.01, 0.010107, 0.010428, 0.010964], atol=1e-6)


def test_percentile_mode_of_zclip_has_no_epsilon_in_its_threshold() -> None:
    gradients = np.zeros((3, LEAVES, SIZE), np.float32)
    gradients[:, 0, 0] = [1e-7, 3e-7, 1e-3]
    got = replay(og.published.zclip(mode="percentile", warmup=2), gradients)
    assert got[2, 0, 0] == pytest.approx(4.5e-7 / 1.001, rel=1e-4)


def test_the_first_value_that_each_published_rule_can_refuse() -> None:
    """OLMo-core and MaxText count the value itself among the 64, Levanter does not."""
    for tx, first in ((og.published.skip_spikes(on="norm"), 63), (og.published.clip_by_update_norm(), 64)):
        run = runner(tx)
        for at in (first - 1, first):
            gradients = np.ones((65, LEAVES, SIZE), np.float32)
            gradients[at] = 1e3
            assert (run(gradients)[0][at, 0, 0] == 1e3) == (at < first)


def test_what_a_restart_of_stable_spam_does_as_published() -> None:
    noise = np.random.default_rng(0).standard_normal((1002, LEAVES, SIZE)).astype(np.float32)
    theirs, ours = (runner(form(optax.adam(LR))) for form in (og.published.stable_spam, og.stable_spam))
    for gradients, low, high in ((noise, 0.05, 0.15), (1 + 0.3 * noise, 0.3, 0.45)):
        updates, states = theirs(gradients)
        assert states.leaf_steps[998:, 0].tolist() == [999, 1, 2, 3]
        assert states.stable_spam_inner_state[0].count[998:].tolist() == [999, 1, 2, 3]
        bound = states.largest_average[:, 0] / (1 - 0.999 ** np.asarray(states.leaf_steps[:, 0], np.float64))
        assert bound[1000] / bound[998] == pytest.approx(316, abs=2)
        assert low < norm_of(updates[999]) / norm_of(ours(gradients)[0][999]) < high


def test_the_units_of_agc_are_optax_units_but_for_rank_3_and_one_long_axis() -> None:
    shapes = {"bias": (4,), "dense": (3, 4), "conv": (2, 2, 3, 4), "heads": (3, 2, 4), "row": (1, 4), "column": (4, 1)}
    rng = np.random.default_rng(0)
    params, gradients = ({k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(2))
    theirs = optax.adaptive_grad_clip(0.1)
    expected = theirs.update(gradients, theirs.init(params), params)[0]
    axis = {**dict.fromkeys(shapes), "heads": 0, "row": (0, 1)}
    for asked, differ in ((None, {"heads", "row"}), (axis, set())):
        ours = og.adaptive_grad_clip(0.1, axis=asked)
        got = ours.update(gradients, ours.init(params), params)[0]
        assert {k for k in shapes if not np.allclose(got[k], expected[k], rtol=1e-5)} == differ

"""Randomized smoothing against closed forms and SciPy, and accuracy under noise."""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from optax_guard import smoothing
from optax_guard.smoothing import ABSTAIN, Certificate, _arguments

# A linear classifier of two classes in the plane: smoothing does not change it, and its margin is known.
NORMAL, OFFSET = np.array([3.0, 4.0]), 0.5
POINTS = np.array([[0.2, 0.2], [-0.5, -0.1], [1.0, 1.0], [-0.9, 0.8], [0.0, -0.5]], np.float32)
MARGINS = np.abs(POINTS.astype(np.float64) @ NORMAL + OFFSET) / 5.0
CLASSES = (POINTS @ NORMAL + OFFSET > 0).astype(np.int32)


def linear(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    score = jnp.sum(inputs * params["w"].astype(inputs.dtype)[None], axis=-1) + params["b"].astype(inputs.dtype)
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def threshold(params: jax.Array, inputs: jax.Array) -> jax.Array:
    """Three classes, of which an input above the threshold is the last."""
    above = inputs[:, 0] > params
    return jax.nn.one_hot(jnp.where(above, 2, 0), 3)


PARAMS = {"w": jnp.asarray(NORMAL, jnp.float32), "b": jnp.float32(OFFSET)}
SMOOTHED = smoothing.smooth(linear, 0.5)


def test_certified_radius_of_a_linear_classifier_is_below_its_margin_and_approaches_it() -> None:
    gaps = []
    for n in (100, 10_000, 200_000):
        prediction, radius = smoothing.certify(SMOOTHED, PARAMS, POINTS, n=n, alpha=0.001, key=1, batch_size=5000)
        sure = prediction != ABSTAIN
        np.testing.assert_array_equal(prediction[sure], CLASSES[sure])
        assert np.all(radius <= MARGINS)
        gaps.append(MARGINS[:4] - radius[:4])  # within the cap; the last point lies on its own
    assert np.all(gaps[2] < gaps[0])
    assert np.all(gaps[2][MARGINS[:4] < 1] < 0.02)


def test_a_certificate_is_wrong_as_often_as_alpha_says() -> None:
    # 2000 certificates of one point, each from its own noise: k is binomial, and the radius exceeds the margin with
    # probability at most alpha = 0.2. A bound that ignored the sampling error would be wrong half of the time.
    points = np.repeat(POINTS[:1], 2000, axis=0)
    _, radius = smoothing.certify(SMOOTHED, PARAMS, points, n=500, alpha=0.2, key=2)
    wrong = np.mean(radius > MARGINS[0])
    assert 0.12 < wrong < 0.2 + 4 * math.sqrt(0.2 * 0.8 / 2000)


def test_counts_are_binomial_with_the_probability_of_the_closed_form() -> None:
    n = 100_000
    counts = smoothing.class_counts(SMOOTHED, PARAMS, POINTS, n=n, key=3)
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts.sum(axis=1), n)
    expected = stats.norm.cdf((POINTS.astype(np.float64) @ NORMAL + OFFSET) / (5.0 * 0.5))
    np.testing.assert_array_less(np.abs(counts[:, 1] / n - expected), 4.5 * np.sqrt(expected * (1 - expected) / n))


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_clopper_pearson_is_scipys_exact_interval(alpha: float) -> None:
    for n in (1, 7, 1000, 100_000):
        for k in sorted({0, 1, n // 2, n - 1, n}):
            oracle = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
            # SciPy finds the bound by bisection, to 2e-12; the tail at our bound says the same to 1e-9.
            bound = smoothing.clopper_pearson_lower(k, n, alpha)
            np.testing.assert_allclose(bound, oracle, rtol=1e-9, atol=4e-12)
            if k:
                np.testing.assert_allclose(stats.binom.sf(k - 1, n, bound), alpha, rtol=1e-9)
    assert smoothing.clopper_pearson_lower(0, 100_000, alpha) == 0
    assert smoothing.clopper_pearson_lower(100_000, 100_000, alpha) == alpha ** (1 / 100_000)


@pytest.mark.parametrize("probability", [0.0, 0.03, 0.5, 0.9, 0.999, 1.0])
def test_clopper_pearson_covers(probability: float) -> None:
    n, alpha = 200, 0.05
    k = np.arange(n + 1)
    missed = smoothing.clopper_pearson_lower(k, n, alpha) > probability
    assert stats.binom.pmf(k, n, probability)[missed].sum() <= alpha
    drawn = np.random.default_rng(0).binomial(n, probability, 20_000)
    assert np.mean(smoothing.clopper_pearson_lower(drawn, n, alpha) > probability) <= alpha + 0.007


def test_predict_tests_the_two_largest_counts_as_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    n, alpha = 100, 0.01
    pairs = [(top, runner) for top in range(0, n + 1, 3) for runner in range(0, min(top, n - top) + 1, 3)]
    counts = np.array([[runner, 0, top] for top, runner in pairs], np.int32)
    monkeypatch.setattr("optax_guard.smoothing._sampling.counts", lambda *_: counts)
    answers = smoothing.predict(SMOOTHED, PARAMS, np.zeros((len(counts), 2), np.float32), n=n, alpha=alpha, key=0)
    for (top, runner), answer in zip(pairs, answers, strict=True):
        p_value = stats.binomtest(top, top + runner, 0.5).pvalue if top else 1.0
        assert answer == (2 if p_value <= alpha and top > runner else ABSTAIN), (top, runner)


def test_predict_abstains_at_the_boundary_and_nowhere_else() -> None:
    boundary = np.array([[0.5, -0.5], [-0.1, -0.05]], np.float32)
    assert np.abs(boundary @ NORMAL + OFFSET).max() < 1e-6
    points = np.concatenate([boundary, POINTS[2:4]])
    answers = smoothing.predict(SMOOTHED, PARAMS, points, n=200, key=4)
    assert answers.tolist() == [ABSTAIN, ABSTAIN, CLASSES[2], ABSTAIN if MARGINS[3] < 0.1 else CLASSES[3]]
    certificate = smoothing.certify(SMOOTHED, PARAMS, boundary, n=200, key=4)
    assert certificate.prediction.tolist() == [ABSTAIN, ABSTAIN]
    assert certificate.radius.tolist() == [0.0, 0.0]


def test_too_few_samples_for_alpha_abstain_always() -> None:
    certain = smoothing.smooth(threshold, 1.0)
    far = np.full((1, 2), 50.0, np.float32)
    assert smoothing.certify(certain, jnp.float32(0), far, n=9, alpha=0.001, key=0) == ([ABSTAIN], [0.0])
    prediction, radius = smoothing.certify(certain, jnp.float32(0), far, n=1000, alpha=0.001, key=0)
    assert prediction == [2]
    np.testing.assert_allclose(radius, stats.norm.ppf(0.001 ** (1 / 1000)), rtol=1e-9)  # the cap


@pytest.mark.parametrize("n", [1, 64, 130])
def test_samples_depend_on_key_input_and_copy_and_not_on_the_batch_size(n: int) -> None:
    key = jax.random.key(5)
    counts = [
        smoothing.class_counts(SMOOTHED, PARAMS, POINTS, n=n, key=key, batch_size=size) for size in (1, 7, 100, 1000)
    ]
    for other in counts[1:]:
        np.testing.assert_array_equal(other, counts[0])
    fewer = smoothing.class_counts(SMOOTHED, PARAMS, POINTS[:2], n=n, key=jax.random.key_data(key))
    np.testing.assert_array_equal(fewer, counts[0][:2])


def test_noise_is_new_for_every_key_input_copy_and_purpose() -> None:
    half = np.full((64, 2), -0.05, np.float32)  # near the boundary, where a count tells the noise
    counts = smoothing.class_counts(SMOOTHED, PARAMS, half, n=1000, key=0)
    assert len(np.unique(counts[:, 0])) > 20
    assert np.any(counts != smoothing.class_counts(SMOOTHED, PARAMS, half, n=1000, key=1))
    # Copies are independent: the variance of a count over inputs is that of the binomial.
    share = counts[:, 1].mean() / 1000
    assert 0.5 < counts[:, 1].var() / (1000 * share * (1 - share)) < 1.8


def test_certify_chooses_on_samples_that_it_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # The class is chosen by one sample and then has to stand on others: were they the same, it would always be right.
    _, radius = smoothing.certify(SMOOTHED, PARAMS, np.repeat(POINTS[3:4], 400, axis=0), n0=1, n=1, alpha=0.6, key=0)
    agree = np.mean(radius > 0)
    probability = stats.norm.cdf((POINTS[3].astype(np.float64) @ NORMAL + OFFSET) / 2.5)
    expected = probability**2 + (1 - probability) ** 2
    assert abs(agree - expected) < 4 * math.sqrt(expected * (1 - expected) / 400)


def test_nan_logits_vote_for_no_class() -> None:
    def half_lost(params: jax.Array, inputs: jax.Array) -> jax.Array:
        logits = threshold(params, inputs)
        return logits.at[:, 1].set(jnp.where(inputs[:, 1] > 0, jnp.nan, logits[:, 1]))

    smoothed = smoothing.smooth(half_lost, 1.0)
    inputs = np.array([[9.0, 0.0], [9.0, 9.0]], np.float32)
    counts = smoothing.class_counts(smoothed, jnp.float32(0), inputs, n=1000, key=0)
    assert counts[0, :2].sum() == 0
    assert 400 < counts[0, 2] < 600
    assert counts[1].sum() == 0
    # All that votes says class 2, but less than half do: nothing can be certified.
    prediction, radius = smoothing.certify(smoothed, jnp.float32(0), inputs, n=1000, key=0)
    assert prediction.tolist() == [ABSTAIN, ABSTAIN]
    assert radius.tolist() == [0.0, 0.0]
    assert smoothing.predict(smoothed, jnp.float32(0), inputs, key=0).tolist() == [2, ABSTAIN]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_models_and_inputs(dtype: Any) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    inputs = jnp.asarray(POINTS, dtype)
    prediction, radius = smoothing.certify(SMOOTHED, params, inputs, n=10_000, key=0)
    assert radius.dtype == np.float64
    np.testing.assert_array_equal(prediction[MARGINS > 0.1], CLASSES[MARGINS > 0.1])
    assert np.all(radius <= MARGINS + 0.01)  # the inputs themselves are rounded
    noisy = smoothing.augment_with_noise(jnp.zeros((1000, 2), dtype), 0.5, key=0)
    assert noisy.dtype == dtype
    assert 0.47 < np.std(noisy.astype(np.float32)) < 0.53
    same = smoothing.perturbed_accuracy(linear, params, inputs, CLASSES, input_sigma=0, weight_sigma=0, key=0)
    assert same.clean == same.input_noise == same.weight_noise == 1.0


def test_no_inputs_give_no_answers() -> None:
    prediction, radius = smoothing.certify(SMOOTHED, PARAMS, POINTS[:0], key=0)
    assert prediction.shape == radius.shape == (0,)


def test_augmented_noise_has_its_size_and_follows_its_key_through_jit() -> None:
    inputs = jnp.ones((2000, 5))
    noisy = jax.jit(lambda sigma, key: smoothing.augment_with_noise(inputs, sigma, key=key))
    first, second = noisy(jnp.float32(0.3), jax.random.key(0)), noisy(jnp.float32(0.3), jax.random.key(1))
    noise = np.asarray(first, np.float64) - 1
    assert abs(noise.std() - 0.3) < 0.01
    assert stats.kstest(noise.ravel() / 0.3, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noise.ravel(), np.asarray(second).ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(first, noisy(jnp.float32(0.3), jax.random.key(0)))
    np.testing.assert_array_equal(smoothing.augment_with_noise(inputs, 0.0, key=0), inputs)


def test_certified_accuracy_is_the_share_and_never_rises() -> None:
    rng = np.random.default_rng(0)
    prediction, labels = rng.integers(-1, 3, 200), rng.integers(0, 3, 200)
    radius = np.where(prediction == ABSTAIN, 0.0, rng.choice([0.0, 0.25, 0.5, 1.3], 200))
    certificate, radii = Certificate(prediction, radius), np.linspace(0, 2, 41)
    curve = smoothing.certified_accuracy(certificate, labels, radii)
    oracle = [np.mean([p == y and r >= at for p, y, r in zip(prediction, labels, radius, strict=True)]) for at in radii]
    np.testing.assert_allclose(curve, oracle, rtol=1e-12)
    assert np.all(np.diff(curve) <= 0)
    assert smoothing.certified_accuracy(certificate, np.full(200, ABSTAIN), 0.0) == 0  # no label excuses an abstention


def test_plot_draws_each_curve_and_its_fall() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    one, two = Certificate(np.array([0, 1]), np.array([0.5, 1.0])), Certificate(np.array([0, -1]), np.array([2.0, 0.0]))
    axes = smoothing.plot_certified_accuracy({"one": one, "two": two}, [0, 1])
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert lines == [[[0, 1], [0.5, 1], [1, 0.5], [1, 0]], [[0, 0.5], [2, 0.5], [2, 0]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert smoothing.plot_certified_accuracy(one, [0, 1], axes=axes) is axes
    pyplot.close(axes.figure)


def test_perturbed_accuracy_without_noise_is_the_clean_one_in_any_batches() -> None:
    labels = np.where(np.arange(5) == 2, 1 - CLASSES, CLASSES)  # one of five wrong
    for size in (1, 2, 1000):
        found = smoothing.perturbed_accuracy(
            linear, PARAMS, POINTS, labels, input_sigma=0, weight_sigma=0, draws=2, key=0, batch_size=size
        )
        assert found[:4] == (0.8, 0.8, 0.8, 0.8)


def test_perturbed_accuracy_is_that_of_the_closed_form() -> None:
    points = np.repeat(POINTS, 100, axis=0)
    labels = np.repeat(CLASSES, 100)
    settings = {"input_sigma": 0.5, "draws": 20, "key": 0}
    found = smoothing.perturbed_accuracy(linear, PARAMS, points, labels, weight_sigma=0.0, **settings)
    expected = stats.norm.cdf(MARGINS / 0.5).mean()
    assert abs(found.input_noise - expected) < 4 * math.sqrt(0.25 / 10_000)
    assert found.clean == found.weight_noise == 1.0
    assert found.clamped_noise == 1.0  # at most 1e-4 away
    # A bound above every noise changes nothing; one at the smallest margin reaches no boundary.
    loose = smoothing.perturbed_accuracy(linear, PARAMS, points, labels, max_norm=100.0, **settings)
    assert loose.clamped_noise == loose.input_noise == found.input_noise
    tight = smoothing.perturbed_accuracy(linear, PARAMS, points, labels, max_norm=0.99 * MARGINS.min(), **settings)
    assert tight.clamped_noise == 1.0
    middle = smoothing.perturbed_accuracy(linear, PARAMS, points, labels, max_norm=0.5, **settings)
    assert found.input_noise < middle.clamped_noise < 1.0
    assert "clamped noise  1.0000  sigma 0.5, norm at most 0.0001" in str(found)


def test_weight_noise_moves_only_the_leaves_of_its_mask() -> None:
    settings = {"input_sigma": 0.0, "weight_sigma": 3.0, "draws": 50, "key": 0}
    everything = smoothing.perturbed_accuracy(linear, PARAMS, POINTS, CLASSES, **settings)
    assert everything.weight_noise < 0.9
    assert everything.input_noise == 1.0
    offset = smoothing.perturbed_accuracy(linear, PARAMS, POINTS, CLASSES, weight_mask="b", **settings)
    assert everything.weight_noise < offset.weight_noise < 1.0
    with pytest.raises(ValueError, match="perturbed_accuracy: `mask` 'c' matches no leaf"):
        smoothing.perturbed_accuracy(linear, PARAMS, POINTS, CLASSES, weight_mask="c", **settings)


def test_linen_nnx_and_equinox_as_the_docstring_shows() -> None:
    eqx = pytest.importorskip("equinox")
    pytest.importorskip("flax")
    from flax import linen, nnx

    inputs = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    dense = linen.Dense(4)
    graph, nnx_params = nnx.split(nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
    equinox_params, rest = eqx.partition(eqx.nn.Linear(2, 4, key=jax.random.key(0)), eqx.is_array)
    cases = (
        (dense.apply, dense.init(jax.random.key(0), inputs)),
        (lambda params, x: nnx.merge(graph, params)(x), nnx_params),
        (lambda params, x: jax.vmap(eqx.combine(params, rest))(x), equinox_params),
        (lambda _, x: x @ jnp.ones((2, 4)), ()),
    )
    with jax.numpy_rank_promotion("allow"):  # linen and nnx add their biases that way
        for apply_fn, params in cases:
            counts = smoothing.class_counts(smoothing.smooth(apply_fn, 1.0), params, inputs, n=10, key=0)
            assert counts.shape == (3, 4)
        weighed = smoothing.perturbed_accuracy(*cases[1], inputs, [0, 1, 2], draws=1, key=0, weight_mask="*kernel*")
        assert 0 <= weighed.weight_noise <= 1


def test_progress_shows_only_on_long_work_before_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    rich_console = pytest.importorskip("rich.console")
    assert _arguments._rich_bar() is None  # tests run without a terminal
    import io

    from rich.progress import Progress

    for patience, shown in ((60.0, False), (-1.0, True)):
        screen = io.StringIO()
        console = rich_console.Console(file=screen, force_terminal=True, force_interactive=True)
        monkeypatch.setattr(_arguments, "_rich_bar", lambda console=console: Progress(console=console))
        monkeypatch.setattr(_arguments, "_PATIENCE", patience)
        smoothing.class_counts(SMOOTHED, PARAMS, POINTS, n=100, key=0)
        assert ("class_counts" in screen.getvalue()) == shown
        assert ("100%" in screen.getvalue()) == shown
    screen.truncate(0)
    smoothing.class_counts(SMOOTHED, PARAMS, POINTS, n=100, key=0, progress=False)
    assert screen.getvalue() == ""


def test_the_bar_counts_every_sample() -> None:
    done: list[int] = []
    from optax_guard.smoothing import _sampling

    key = jax.random.key_data(jax.random.key(0))
    for batch_size in (1, 3, 64, 1000):
        done.clear()
        _sampling.counts("x", SMOOTHED, PARAMS, POINTS, key, 0, 64, batch_size, done.append)
        assert sum(done) == 64 * len(POINTS)


def test_missing_optional_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="certify needs SciPy: pip install scipy"):
        smoothing.certify(SMOOTHED, PARAMS, POINTS, key=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot_certified_accuracy needs Matplotlib: pip install matplotlib"):
        smoothing.plot_certified_accuracy(Certificate(np.zeros(1), np.zeros(1)), [0])


@pytest.mark.parametrize("sigma", [0, 0.0, -1.0, math.nan, math.inf, "1", None, True, np.ones(2), 1j])
def test_smooth_refuses_sigma(sigma: Any) -> None:
    with pytest.raises(ValueError, match=r"smooth: `sigma` must be a number in \(0, inf\); got"):
        smoothing.smooth(linear, sigma)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "100", None, 2**31, math.nan])
@pytest.mark.parametrize("argument", ["n", "n0", "batch_size"])
def test_numbers_of_samples_are_whole_and_positive(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"certify: `{argument}` must be a whole number"):
        smoothing.certify(SMOOTHED, PARAMS, POINTS, key=0, **{argument: value})
    if argument != "n0":
        with pytest.raises(ValueError, match=f"predict: `{argument}` must be a whole number"):
            smoothing.predict(SMOOTHED, PARAMS, POINTS, key=0, **{argument: value})


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan, "0.1", None])
def test_alpha_is_inside_0_and_1(alpha: Any) -> None:
    for name in ("certify", "predict"):
        with pytest.raises(ValueError, match=rf"{name}: `alpha` must be a number in \(0, 1\); got"):
            getattr(smoothing, name)(SMOOTHED, PARAMS, POINTS, alpha=alpha, key=0)
    with pytest.raises(ValueError, match="clopper_pearson_lower: `alpha`"):
        smoothing.clopper_pearson_lower(1, 2, alpha)


CERTIFICATE = Certificate(np.array([0, 1]), np.array([0.5, 1.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smoothing.smooth("model", 1.0), "smooth: `apply_fn` must be a hashable function"),
        (lambda: smoothing.smooth(lambda x: x, 1.0), r"smooth: `apply_fn` must be .* pass `lambda _, inputs"),
        (lambda: smoothing.predict(linear, PARAMS, POINTS, key=0), "predict: `smoothed` must come from `smooth"),
        (lambda: smoothing.predict(SMOOTHED, PARAMS, POINTS, key="a"), "predict: `key` must be an int"),
        (lambda: smoothing.predict(SMOOTHED, PARAMS, POINTS, key=0, progress=1), "predict: `progress` must be True"),
        (lambda: smoothing.predict(SMOOTHED, PARAMS, np.ones((3, 2), np.uint8), key=0), r"got uint8\[3, 2\]"),
        (lambda: smoothing.predict(SMOOTHED, PARAMS, np.float32(1), key=0), "predict: `inputs` must be an array"),
        (
            lambda: jax.jit(lambda x: smoothing.predict(SMOOTHED, PARAMS, x, key=0))(POINTS),
            "predict: `inputs` is traced. Call predict outside `jit`",
        ),
        (
            lambda: smoothing.predict(smoothing.smooth(lambda _, x: x[:, 0], 1.0), (), POINTS, key=0),
            r"predict: `apply_fn` must return logits \[1000, classes >= 2\]; it returned float32\[1000\]",
        ),
        (
            lambda: smoothing.predict(smoothing.smooth(lambda _, x: x[:, :1], 1.0), (), POINTS, key=0, n=200),
            r"it returned float32\[1000, 1\]",
        ),
        (
            lambda: smoothing.predict(smoothing.smooth(lambda _, x: x > 0, 1.0), (), POINTS, key=0),
            "predict: `apply_fn` must return logits of a floating dtype; it returned bool",
        ),
        (lambda: smoothing.augment_with_noise(jnp.ones(3), -1.0, key=0), "augment_with_noise: `sigma`"),
        (lambda: smoothing.augment_with_noise(jnp.ones(3), math.nan, key=0), "augment_with_noise: `sigma`"),
        (lambda: smoothing.augment_with_noise(jnp.arange(3), 1.0, key=0), r"`inputs` must be .* got int32\[3\]"),
        (
            lambda: smoothing.certified_accuracy(CERTIFICATE, [0], 0.0),
            r"`labels` must be integers \[2\], .* int64\[1\]",
        ),
        (lambda: smoothing.certified_accuracy(CERTIFICATE, [[0, 1]], 0.0), r"`labels` must be integers \[2\]"),
        (lambda: smoothing.certified_accuracy(CERTIFICATE, [0.0, 1.0], 0.0), r"`labels` must be integers \[2\]"),
        (lambda: smoothing.certified_accuracy(CERTIFICATE, [0, 1], -0.1), "`radii` must be numbers >= 0"),
        (lambda: smoothing.certified_accuracy(CERTIFICATE, [0, 1], [math.nan]), "`radii` must be numbers >= 0"),
        (lambda: smoothing.certified_accuracy((1, 2), [0, 1], 0.0), "a certificate must come from `certify`"),
        (lambda: smoothing.certified_accuracy(Certificate(np.zeros(0), np.zeros(0)), [], 0.0), "at least one input"),
        (lambda: smoothing.plot_certified_accuracy({}, [0, 1]), "plot_certified_accuracy: `certificates` must be"),
        (lambda: smoothing.clopper_pearson_lower(3, 2, 0.1), r"`successes` must be whole numbers in \[0, 2\]"),
        (lambda: smoothing.clopper_pearson_lower(0.5, 2, 0.1), r"`successes` must be whole numbers in \[0, 2\]"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("input_sigma", -1.0),
        ("input_sigma", math.nan),
        ("weight_sigma", -0.1),
        ("max_norm", -1e-4),
        ("max_norm", math.inf),
        ("draws", 0),
        ("batch_size", 0.5),
        ("labels", [0, 1]),
        ("labels", np.zeros(5)),
        ("inputs", np.zeros((5, 2), int)),
    ],
)
def test_perturbed_accuracy_refuses(argument: str, value: Any) -> None:
    arguments = {"inputs": POINTS, "labels": CLASSES, "key": 0, argument: value}
    with pytest.raises(ValueError, match=f"perturbed_accuracy: `{argument}` must be"):
        smoothing.perturbed_accuracy(linear, PARAMS, **arguments)

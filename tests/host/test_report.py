"""What happened: leaves on record, the story, the page and the command line."""

import gc
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from matplotlib.figure import Figure

import optax_guard as og
from optax_guard.__main__ import main
from optax_guard.report import (
    TrainingLog,
    incidents,
    load_checkpoint,
    load_log,
    read_log,
    report,
    save_log,
    story,
)
from optax_guard.report._picture import render

PARAMS = {"decoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
TX = og.guard(
    optax.sgd(1e-3),
    og.record_leaves(64),
    og.skip_large(1e3),
    og.clip_by_global_norm(4.0),
    recorder_rows=64,
    halt_after=20,
)


@jax.jit
def take_step(params: Any, state: Any, kernel: jax.Array, bias: jax.Array, loss: jax.Array) -> tuple[Any, Any]:
    grads = {"decoder": {"kernel": jnp.full((2, 2), kernel), "bias": jnp.full(2, bias)}}
    return og.apply_gradients(TX, grads, state, params, value=loss)


def run(steps: int, kernel: dict[int, float], loss: dict[int, float] | None = None) -> tuple[Any, Any]:
    """Forty-odd steps with a kernel gradient of norm about 1, but for the steps named."""
    params, state = PARAMS, TX.init(PARAMS)
    for step in range(steps):
        usual = 0.5 * (1 + 0.05 * (-1) ** step)
        size = jnp.asarray(kernel.get(step, usual), jnp.float32)
        value = jnp.asarray((loss or {}).get(step, 2.0 + 0.01 * (-1) ** step), jnp.float32)
        params, state = take_step(params, state, size, jnp.asarray(0.1, jnp.float32), value)
    return params, state


@pytest.fixture(scope="module")
def accident() -> tuple[Any, Any]:
    """The kernel's gradient grows from step 34, is NaN at 40 and 41; the loss is high until 47."""
    growing = {34 + i: 2.0 * 1.1**i for i in range(6)}
    return run(60, growing | {40: np.nan, 41: np.nan}, dict.fromkeys(range(40, 48), 5.0))


# Leaves on record


def test_every_leaf_of_every_step_is_recorded_with_nan_and_inf_as_they_were(accident: Any) -> None:
    _, state = accident
    log = og.leaf_log(state, PARAMS)
    assert log.names == ["decoder/bias", "decoder/kernel"]
    np.testing.assert_array_equal(log.steps, np.arange(60))
    np.testing.assert_allclose(log.norms[:, 0], 0.1 * np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(log.norms[:, 1]), np.isin(np.arange(60), [40, 41]))
    np.testing.assert_allclose(log.norms[39, 1], 2 * 2 * 1.1**5, rtol=1e-6)
    for leaf in jax.tree.leaves(state):  # stored as codes
        assert np.all(np.isfinite(leaf))


def test_the_ring_keeps_the_last_steps_and_infinite_and_overflowing_norms() -> None:
    recorder = og.record_leaves(3)
    state = recorder.init({"a": jnp.zeros(1)})
    for size in (1.0, 2.0, np.inf, 1e30, 5.0):
        updates, state = recorder.update({"a": jnp.full(1, size)}, state)
        np.testing.assert_array_equal(updates["a"], np.float32(size))
    log = og.leaf_log(state)
    np.testing.assert_array_equal(log.steps, [2, 3, 4])
    np.testing.assert_allclose(log.norms[:, 0], [np.inf, 1e30, 5.0], rtol=1e-6)
    assert log.names == ["leaf 0"]


def test_a_rule_that_only_sees_changes_no_step(accident: Any) -> None:
    plain = og.guard(optax.sgd(1e-3), og.skip_large(1e3), og.clip_by_global_norm(4.0))
    grads = {"decoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    ours, _ = og.apply_gradients(TX, grads, TX.init(PARAMS), PARAMS)
    expected, _ = og.apply_gradients(plain, grads, plain.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_leaf_log_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"leaf_log: expected one `record_leaves` in this state, found 0"):
        og.leaf_log(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"the state has 2 leaves but `params` has 1"):
        og.leaf_log(TX.init(PARAMS), jnp.zeros(1))
    with pytest.raises(ValueError, match=r"record_leaves: `window` must be a whole number >= 1; got 0"):
        og.record_leaves(0)


# The story


def test_the_story_names_leaf_cause_warning_action_and_aftermath(accident: Any) -> None:
    lead, accident_text = story(read_log(accident[1], PARAMS))
    assert lead == "Steps 0 to 59 are recorded: 52 applied as they were, 6 clipped, 2 held."
    assert accident_text.startswith("Steps ")
    assert "the gradient of `decoder/kernel` held NaN" in accident_text
    assert re.search(
        r"6 steps earlier the norm of `decoder/kernel` had left its usual range, .*\(x6\.\d+\)", accident_text
    )
    assert "2 held without a trace" in accident_text
    assert "back to the earlier loss 7 steps later" in accident_text


def test_a_finite_spike_and_a_refused_step_are_told_apart() -> None:
    _, state = run(40, {20: 50.0, 30: 5000.0})
    log = read_log(state, PARAMS)
    clip, skip = incidents(log)
    assert (clip.first, clip.kinds) == (20, ("clipped",))
    assert re.search(
        r"reached 100 \(x\d+ the usual\), most of it in `decoder/kernel`; the step was scaled down", clip.text
    )
    assert (skip.first, skip.kinds) == (30, ("skipped",))
    assert "the step was held and left no trace" in skip.text
    assert skip.severity > clip.severity


def test_a_quiet_run_and_a_halted_one() -> None:
    _, quiet = run(12, {})
    assert story(read_log(quiet, PARAMS))[1:] == ["Nothing had to be held or scaled down."]
    _, halted = run(40, dict.fromkeys(range(10, 40), np.nan))
    text = " ".join(story(read_log(halted, PARAMS)))
    assert "The guard has halted" in text
    assert "30 held" in text


def test_what_was_done_outside_the_guard_is_told_from_state_file_and_checkpoint(tmp_path: Path) -> None:
    guarded = og.stabilize(optax.chain(optax.sgd(1.0), og.limit_step_growth(0.02)), recorder_rows=8)
    tx, params = og.accumulate(guarded, 2), jnp.ones((2, 2))
    state = tx.init(params)
    for size in (0.03, np.nan, 0.015, 0.015):
        _, state = og.apply_gradients(tx, jnp.full((2, 2), size), state, params)
    log = read_log(state)
    assert story(log)[1:] == [
        "Not in these numbers: `limit_step_growth` scaled 2 updates down (smallest factor of the last one: 0.667).",
        "Not in these numbers: `limit_step_growth` scaled an update down.",
        "Not in these numbers: `accumulate` dropped a micro-batch (not finite, or of invalid weight).",
    ]
    with ocp.PyTreeCheckpointer() as checkpointer:  # beside an item without a guard, of which only shapes are read
        checkpointer.save(tmp_path / "checkpoints" / "7" / "state", {"state": state})
        other = optax.chain(optax.sgd(1.0), og.limit_step(0.01)).init(params)
        checkpointer.save(tmp_path / "checkpoints" / "7" / "other", {"state": other})
    assert load_checkpoint(tmp_path / "checkpoints").counts == log.counts
    assert load_log(save_log(tmp_path / "log", state)).counts == log.counts


@pytest.mark.parametrize(
    ("bound", "advice"),
    [(og.limit_step_growth(), "warm-up"), (og.limit_step(0.01), "bound too small"), (og.clippy(0.1), "")],
)
def test_a_bound_that_acts_in_many_steps_comes_with_advice(bound: Any, advice: str) -> None:
    tx = og.guard(optax.chain(optax.sgd(1.0), bound), og.clip_by_global_norm(0.4), recorder_rows=32)
    state, params = tx.init(PARAMS), {"decoder": {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.ones(2)}}

    @jax.jit
    def step(state: Any, size: jax.Array) -> Any:
        return og.apply_gradients(tx, jax.tree.map(lambda x: size * x, PARAMS), state, params)[1]

    for i in range(12):
        state = step(state, jnp.float32(0.2))
        if i == 2:  # a few are nothing to change anything for
            assert story(read_log(state))[-1].endswith(").")
    lead, clipping, bounded = story(read_log(state))
    assert lead == "Steps 0 to 11 are recorded: 0 applied as they were, 12 clipped, 0 held."
    assert clipping.startswith("Everyday clipping: 100%")
    assert bounded.startswith("Not in these numbers: ")
    assert advice in bounded
    assert bool(advice) == ("relative to the parameters" in bounded)


# The page


class Outline(HTMLParser):
    """What a screen reader would find."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_one_file_without_network_with_headings_tables_and_words(accident: Any, tmp_path: Path) -> None:
    page = report(accident[1], PARAMS, tmp_path / "night.html")
    text = page.read_text()
    assert not re.search(r"(src|href|srcset)\s*=\s*\"(?!data:)", text)  # nothing is fetched
    assert "http" not in text
    outline = Outline()
    outline.feed(text)
    names = [tag for tag, _ in outline.tags]
    assert names.count("h1") == 1
    assert ("html", {"lang": "en"}) in outline.tags
    images = [attributes for tag, attributes in outline.tags if tag == "img"]
    assert len(images) == 1
    assert "held NaN" in (images[0]["alt"] or "")
    assert names.count("table") == names.count("caption") == 3
    assert all(attributes.get("scope") == "col" for tag, attributes in outline.tags if tag == "th")
    scrolling = [attributes for tag, attributes in outline.tags if attributes.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolling)
    picture = matplotlib.image.imread(tmp_path / "night.png")
    assert picture.shape[1] >= 1000
    assert picture[..., :3].std() > 0.02  # something is drawn


def test_names_are_escaped(tmp_path: Path) -> None:
    params = {"<script>alert(1)</script>": jnp.ones(1)}
    tx = og.guard(optax.sgd(0.1), og.record_leaves(4))
    _, state = og.apply_gradients(tx, jax.tree.map(lambda x: x * jnp.nan, params), tx.init(params), params)
    text = report(state, params, tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_report_without_recorded_leaves_and_without_losses(tmp_path: Path) -> None:
    tx = og.guard(optax.sgd(0.1))
    _, state = og.apply_gradients(tx, jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    text = report(state, path=tmp_path / "page.html").read_text()
    assert "og.record_leaves()" in text


def drawn(log: TrainingLog, monkeypatch: pytest.MonkeyPatch, **options: bool) -> Any:
    """The figure of a log."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    render(log, **options)
    return figures[0]


@pytest.mark.parametrize("narrow", [False, True])
def test_the_legend_is_below_the_steps_and_all_leaves_are_named_where_there_is_room(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = run(12, {3: jnp.nan, 7: 40.0})
    log = read_log(state, PARAMS)
    for each in (log._replace(leaves=None), log):
        figure = drawn(each, monkeypatch, narrow=narrow)
        boxes = [
            *(axis.xaxis.label.get_window_extent() for axis in figure.axes if axis.xaxis.label.get_text()),
            *(axis.get_legend().get_window_extent() for axis in figure.axes[2:3]),
            *(axis.title.get_window_extent() for axis in figure.axes[3:4]),
            *(tick.get_window_extent() for tick in figure.axes[2].get_xticklabels() if tick.get_visible()),
        ]
        legend = figure.axes[2].get_legend().get_window_extent()
        assert not any(box.overlaps(legend) for box in boxes if box.bounds != legend.bounds)
        assert legend.y0 >= 0
    for count, named in ((60, 60), (200, 12)):
        names = [f"layer_{i}/kernel" for i in range(count)]
        leaves = og.rules.LeafLog(log.leaves.steps, np.ones((len(log.leaves.steps), count), np.float32), names)
        assert (
            len(drawn(log._replace(names=names, leaves=leaves), monkeypatch, narrow=narrow).axes[3].get_yticks())
            == named
        )


def test_a_loss_that_ends_in_nan_has_a_cross_where_it_ended_and_triangles_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tx = og.guard(optax.sgd(0.1))
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    for loss in (2.0, 1.0, jnp.nan, jnp.nan):
        params, state = og.apply_gradients(tx, jnp.ones(2), state, params, value=jnp.float32(loss))
    axis = drawn(read_log(state), monkeypatch).axes[0]
    (cross,) = [line for line in axis.lines if line.get_marker() == "X"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (1, 1.0)
    np.testing.assert_array_equal(axis.collections[0].get_offsets()[:, 0], [2, 3])


def test_a_long_log_of_many_leaves_stays_small(tmp_path: Path) -> None:
    """1 024 steps of 200 leaves: under 1 MB."""
    rng = np.random.default_rng(0)
    _, state = run(2, {})
    short = read_log(state, PARAMS)
    rows = np.repeat(short.rows[:1], 1024)
    rows["step"], rows["grad_norm"] = np.arange(1024), np.exp(0.3 * rng.standard_normal(1024))
    names = [f"decoder/layer_{i // 10}/mlp/kernel_{i % 10}" for i in range(200)]
    norms = np.exp(0.2 * rng.standard_normal((1024, 200))).astype(np.float32)
    log = TrainingLog(rows, names, og.rules.LeafLog(np.arange(1024), norms, names), short.totals)
    assert report(log, path=tmp_path / "page.html").stat().st_size < 1_000_000


# Files, checkpoints and the command line


def same(one: TrainingLog, other: TrainingLog) -> None:
    for name in one.rows.dtype.names:
        np.testing.assert_array_equal(one.rows[name], other.rows[name])
    assert one.totals == other.totals
    assert one.leaves is not None
    assert other.leaves is not None
    np.testing.assert_array_equal(one.leaves.norms, other.leaves.norms)
    assert one.leaves.names == other.leaves.names


def test_a_saved_log_is_the_log(accident: Any, tmp_path: Path) -> None:
    path = save_log(tmp_path / "night", accident[1], PARAMS)
    assert path.suffix == ".npz"
    same(load_log(path), read_log(accident[1], PARAMS))


@pytest.fixture(scope="module")
def checkpoint(accident: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CheckpointManager with two steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    params, state = accident
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 10):
            manager.save(step, args=ocp.args.StandardSave({"params": params, "opt_state": state}))
        manager.wait_until_finished()
    return folder


def test_an_orbax_checkpoint_tells_the_same_without_the_program(accident: Any, checkpoint: Path) -> None:
    same(load_checkpoint(checkpoint), read_log(accident[1], PARAMS))
    same(load_checkpoint(checkpoint / "1"), read_log(accident[1], PARAMS))


@pytest.mark.parametrize("names", [("params", "opt"), ("model", "anything"), ("params", "opt", "step")])
def test_named_items_of_a_manager_are_found_whatever_they_are_called(
    accident: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    params, state = accident
    trees = {names[0]: params, names[1]: state} | {name: {"step": jnp.zeros(())} for name in names[2:]}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in trees.items()}))
        manager.wait_until_finished()
    log = load_checkpoint(tmp_path)
    np.testing.assert_array_equal(log.rows["step"], read_log(accident[1], PARAMS).rows["step"])
    numbered = [f"leaf {i}" for i in range(len(log.names))]
    assert log.names == (og.leaf_names(PARAMS) if names[0] == "params" else numbered)


def test_a_state_alone_gives_numbered_leaves(accident: Any, tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", accident[1])
    assert "the gradient of leaf 1 held NaN" in story(load_checkpoint(tmp_path / "state"))[1]


def test_the_command_line_writes_a_page_and_prints_a_log(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "out" / "page.html"
    assert main(["report", str(checkpoint), "-o", str(page)]) == 0
    assert page.exists()
    assert page.with_suffix(".png").exists()
    assert main(["log", str(checkpoint), "-n", "3"]) == 0
    printed = capsys.readouterr().out
    assert "the gradient of `decoder/kernel` held NaN" in printed
    assert len(re.findall(r"^ +\d+ applied", printed, re.M)) == 3


def test_help_as_a_person_expects() -> None:
    text = subprocess.run([sys.executable, "-m", "optax_guard", "--help"], capture_output=True, text=True, check=True)
    assert "report" in text.stdout
    assert "Orbax checkpoint" in text.stdout


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves of a damaged one
def test_whatever_is_wrong_is_said_in_a_sentence_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    whole = save_log(tmp_path / "good.npz", run(2, {})[1], PARAMS).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "unguarded", {"params": PARAMS, "opt_state": optax.adam(0.1).init(PARAMS)})
        checkpointer.save(tmp_path / "damaged", {"opt_state": TX.init(PARAMS)})
        checkpointer.save(tmp_path / "fresh", {"opt_state": TX.init(PARAMS)})
    for each in (tmp_path / "damaged").rglob("*"):
        if each.is_file() and each.name != "_METADATA":
            each.write_bytes(b"")
    for name, message in {
        "missing": "there is no file or folder",
        "text.npz": "is no log of optax_guard, or it is damaged",
        "foreign.npz": "is no log of optax_guard, or it is damaged",
        "cut.npz": "is no log of optax_guard, or it is damaged",
        "empty": "is no Orbax checkpoint",
        "unguarded": "holds no guard of optax_guard",
        "damaged": "cannot be read",
        "fresh": "has recorded nothing yet",
    }.items():
        assert main(["log", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("optax_guard: ")
        assert message in error
        assert "Traceback" not in error
    gc.collect()  # those event loops are this test's
    with pytest.raises(SystemExit, match="2"):
        main([])
    with pytest.raises(ValueError, match="there is no guard in this state"):
        read_log(optax.sgd(0.1).init(PARAMS))

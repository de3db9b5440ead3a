"""The article's programme: its quick run, and that the published page is what the published numbers say."""

import copy
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
from running import ROOT, ended_by_arguments, example


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return __import__("article_report")


@pytest.fixture(scope="module")
def published() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "article.json").read_text())


@pytest.mark.slow
def test_article_runs_its_programme_and_its_table(tmp_path: Path) -> None:
    out, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    run = example("--quick", "--out", str(out), "--results", str(numbers), script="article.py")
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    epochs = re.findall(r"^Epoch: (\d+), Loss: (\d+\.\d{4})$", run.stdout, re.MULTILINE)
    assert [int(epoch) for epoch, _ in epochs] == [1, 2, 3, 4]
    assert float(epochs[-1][1]) < float(epochs[0][1])
    assert out.stat().st_size > 10_000
    results = json.loads(numbers.read_text())
    assert set(results) == {"options", "versions", "seconds", "rows"}
    assert {"jax", "optax", "flax", "python"} <= set(results["versions"])
    assert results["options"]["seeds"] == [0]
    assert len(results["rows"]) == 8 + 5
    for row in results["rows"]:
        assert all(
            math.isfinite(x) for v in row.values() if isinstance(v, list) and not isinstance(v[0], list) for x in v
        )
        assert row["steps_skipped"] == [0]
        sparse = row.get("regularisation", "").startswith("L1")
        assert (row["exact_zeros"][0] > 0) == sparse
        assert row["clamped_noise_loss"][0] == pytest.approx(row["heldout_loss"][0], rel=1e-3)
        assert row["input_noise_loss"][0] > row["heldout_loss"][0]
    accumulated = {row["accumulation"]: row["steps"][0] for row in results["rows"] if "more" not in row}
    assert accumulated == {False: 4 * 62, True: 62}


def test_article_page_is_what_the_published_numbers_say(report: ModuleType, published: dict) -> None:
    assert (ROOT / "docs" / "benchmarks" / "article.md").read_text() == report.words(published)
    assert len(report.select(published)) == 96
    assert len(published["options"]["seeds"]) == 3


def test_article_verdicts_turn_when_the_numbers_do(report: ModuleType, published: dict) -> None:
    turned = copy.deepcopy(published)
    for row in turned["rows"]:  # of no use any more: as good after half of the epochs, and better without varied data
        row["heldout_loss_halfway"] = [0.5 * x for x in row["heldout_loss"]]
        row["train_loss"] = row["heldout_loss"]
    before = {each.claim: report.verdict(each) for each in report.claims(published)}
    after = {each.claim: report.verdict(each) for each in report.claims(turned)}
    assert (before["More epochs help"], after["More epochs help"]) == ("holds", "fails")
    assert (before["L1 prevents overfitting"], after["L1 prevents overfitting"]) == ("holds", "fails")
    assert before["Accumulation gives a better model"] == after["Accumulation gives a better model"]
    good, bad = report.paragraphs(turned)
    assert "*More epochs help*" in bad
    assert "*More epochs help*" not in good


def test_article_verdicts_need_every_seed_and_more_than_a_percent(report: ModuleType) -> None:
    np = report.np
    assert report.difference(np.array([1.0, 2.0, 3.0]), np.array([1.1, 2.1, 3.1])).direction == "lower"
    assert report.difference(np.array([1.0, 2.0, 3.2]), np.array([1.1, 2.5, 3.1])).direction == "the same"
    assert report.difference(np.array([1.0, 2.0, 3.0]), np.array([1.001, 2.001, 3.001])).direction == "the same"
    assert report.difference(np.array([2.0, 3.0]), np.array([1.0, 2.0])).direction == "higher"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "1"], "--epochs must be at least 2"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--quick", "--write-docs"], "needs the full run"),
        (["--out", "no/such/folder/x.png"], "there is no folder"),
    ],
)
def test_article_refuses_bad_arguments_in_a_sentence(arguments: list[str], message: str) -> None:
    status, printed = ended_by_arguments(*arguments, script="article.py")
    assert status == 2
    assert message in printed

"""The recipes of docs/state/logging.md do what the page says: its blocks run as they stand and their output is read."""

import csv
import json
import re
import struct
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

import optax_guard as og

PAGE = Path(__file__).parent.parent.parent / "docs" / "state" / "logging.md"
SIZES = np.linspace(0.1, 2.0, 100).astype(np.float32)
NAN_STEP, HUGE_STEP = 49, 69  # both among those that are logged
SIZES[NAN_STEP], SIZES[HUGE_STEP] = np.nan, 1e3
LOGGED = range(9, 100, 10)
TX = og.guard(optax.sgd(0.1), og.clip_by_global_norm(1.0))


@jax.jit
def train_step(params: Any, state: Any, size: jax.Array) -> tuple[Any, Any]:
    return og.apply_gradients(TX, {"w": jnp.stack([size, 0 * size])}, state, params, value=size)


def block(heading: str) -> str:
    """The code below a heading of the page."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python(?! title=\"not run)[^\n]*\n(.*?)```", section, flags=re.DOTALL))


def run_block(heading: str) -> dict[str, Any]:
    """What a reader has after running it."""
    params = {"w": jnp.ones(2)}
    names = {"params": params, "state": TX.init(params), "batches": SIZES, "train_step": train_step}
    names |= {"jax": jax, "og": og}
    exec(compile(block(heading), str(PAGE), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def expected() -> dict[str, dict[int, float]]:
    """Name -> step -> number, from the definitions: norms but for the NaN, and how many steps were held or clipped."""
    norms = {step: float(SIZES[step]) for step in LOGGED}
    clipped = {step: float(sum(1 for size in SIZES[: step + 1] if size > 1)) for step in LOGGED}
    held = {step: float(step >= NAN_STEP) for step in LOGGED}
    return {"guard/grad_norm": norms, "guard/clipped_total": clipped, "guard/skipped_total": held}


def assert_as_expected(series: dict[str, dict[int, float]]) -> None:
    assert set(series) == set(og.metrics(TX.init({"w": jnp.ones(2)})))
    for name, numbers in expected().items():
        assert list(series[name]) == list(LOGGED)
        np.testing.assert_allclose(list(series[name].values()), list(numbers.values()), rtol=1e-6, err_msg=name)


def read_events(file: Path) -> list[Event]:
    """The records of an event file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, place, events = file.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += 12 + length + 4
    return events


def test_tensorboard_reads_back_every_number() -> None:
    run_block("TensorBoard")
    (file,) = Path("runs/1").iterdir()
    series: dict[str, dict[int, float]] = {}
    for event in read_events(file):
        for value in event.summary.value:
            series.setdefault(value.tag, {})[event.step] = value.simple_value
    assert_as_expected(series)
    assert np.isnan(series["guard/grad_norm"][NAN_STEP])


def test_a_csv_reads_back_every_number() -> None:
    run_block("CSV")
    with Path("metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "step"]

    def number(text: str) -> float:
        return float({"True": "1", "False": "0"}.get(text, text))

    assert_as_expected({name: {int(row["step"]): number(row[name]) for row in rows} for name in names})


def test_weights_and_biases_gets_a_flat_dict_of_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the module: the real one needs an account."""
    logged: dict[int, dict[str, Any]] = {}

    class Run:
        def __enter__(self) -> "Run":
            return self

        def __exit__(self, *_: object) -> None: ...

        def log(self, data: dict[str, Any], step: int) -> None:
            logged[step] = data

    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **_: Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run_block("Weights & Biases")
    assert all(isinstance(number.item(), float | int | bool) for data in logged.values() for number in data.values())
    assert_as_expected({name: {step: float(data[name]) for step, data in logged.items()} for name in logged[9]})


def test_a_scan_returns_every_step() -> None:
    columns = run_block("Every step, without waiting")["columns"]
    np.testing.assert_allclose(columns["guard/grad_norm"], SIZES, rtol=1e-6)
    assert columns["guard/clipped_total"][-1] == expected()["guard/clipped_total"][99]


def test_the_numbers_are_ready_for_json() -> None:
    numbers = run_block("Metrics as numbers")["numbers"]
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["guard/worst_leaf"] == -1

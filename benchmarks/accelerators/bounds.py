"""The bounds: what each row is to stay below on each chip.

Bytes are in units of the parameters on the H100, where the count can be checked by hand, and relative to another row on
the TPU, whose compiler moves much of a step through its fast memory first.
"""

from typing import NamedTuple

from benchmarks.accelerators.measure import Measured
from benchmarks.accelerators.steps import BARE

__all__ = ["BOUNDS", "Bound", "broken", "limits", "said", "worse"]

_SLACK = {"bytes": 5e-3, "temporaries": 5e-4, "conditionals": 0}  # half of the last digit that the table shows


class Bound(NamedTuple):
    """None: unbounded."""

    bytes: float | None = None  # at most so many times the parameters, or times the bytes of `of`
    temporaries: float | None = None  # times the parameters
    conditionals: int | None = None
    of: str = ""
    plus: float = 0.0  # times the parameters, beyond `of`
    same_temporaries: bool = False  # at most the temporaries of `of`


_GUARD = "`guard(adamw, clip)`"
_FLOOR = Bound(8.01, 0.001, 0)
_BOUNDED, _TPU_BOUNDED = Bound(11.01, 1.0, 0), Bound(1.25, of=BARE)  # with a bound on the step
_TPU_FLOOR = Bound(1.0, 0.05, of=BARE)
_OF_GUARD = Bound(1.02, of=_GUARD)
_BETWEEN, _EMITTING = ", a call between", ", the emitting call"
_OURS, _PROPAGATE = "`accumulate(guard(adamw, clip), 4)`", '`accumulate(..., on_nonfinite="propagate")`'


def _inside(name: str, plus: float) -> Bound:
    return Bound(1.0, None, of=f"bare `optax.{name}`", plus=plus)


BOUNDS: dict[str, dict[str, Bound]] = {
    "gpu": {
        _GUARD: _FLOOR,
        "`stabilize(adamw, max_change=None)` with `value=`": _FLOOR,
        "`stabilize(adamw)` with `value=`": _BOUNDED,
        "`guard(adamw, clip)` through `update`": _FLOOR,
        "`stabilize(adamw, max_change=None)` with `value=` through `update`": _FLOOR,
        "`guard(chain(adamw, limit_step), clip)`": _BOUNDED,
        "`guard(chain(noise_injection, adamw), clip)`": _FLOOR,
        _OURS + _BETWEEN: Bound(4.0, 0.0, 1),
        _PROPAGATE + _BETWEEN: Bound(3.0, 0.0, 1),
        _OURS + _EMITTING: Bound(11.01, 0.0, 1),
        _PROPAGATE + _EMITTING: Bound(11.01, 0.0, 1),
        "guard with `reset_moments`, `back_off` and `rewind`, a quiet step": Bound(8.1, 0.01, 1),
        "`loss_scaling(guard(adamw, clip))`": _FLOOR,
        "`guard(proximal_l1(adamw), clip)`": _FLOOR,
        "`guard(chain(adamw, qk_clip), clip)`": _FLOOR,
        "`guard(adamw, clip, record_leaves(256))`": _FLOOR,
        "`guard(adamw, ...)` with every rule": _FLOOR,
        "`guard(muon, clip)`": _inside("contrib.muon", 1.01)._replace(conditionals=0, same_temporaries=True),
        "`guard(adafactor, clip)`": _inside("adafactor", 1.01)._replace(conditionals=0, same_temporaries=True),
        "`guard(lion, clip)`": _inside("lion", 1.01)._replace(conditionals=0, same_temporaries=True),
    },
    "tpu": {
        _GUARD: _TPU_FLOOR,
        "`stabilize(adamw, max_change=None)` with `value=`": _TPU_FLOOR,
        "`stabilize(adamw)` with `value=`": _TPU_BOUNDED,
        "`guard(adamw, clip)` through `update`": Bound(1.12, 0.1, of=BARE),
        "`stabilize(adamw, max_change=None)` with `value=` through `update`": Bound(1.12, 0.1, of=BARE),
        "`guard(chain(adamw, limit_step), clip)`": _TPU_BOUNDED,
        "`guard(chain(noise_injection, adamw), clip)`": Bound(1.0, 0.1, of="`chain(optax.add_noise, adamw)`", plus=1.0),
        _OURS + _EMITTING: Bound(1.43, 0.08, of=BARE),
        _PROPAGATE + _EMITTING: Bound(1.43, 0.08, of=BARE),
        "guard with `reset_moments`, `back_off` and `rewind`, a quiet step": Bound(1.02, 0.05, of=_GUARD),
        "`loss_scaling(guard(adamw, clip))`": Bound(1.0, of=BARE),
        "`guard(proximal_l1(adamw), clip)`": _OF_GUARD,
        "`guard(adamw, clip, record_leaves(256))`": _OF_GUARD,
        "`guard(adamw, ...)` with every rule": _OF_GUARD,
        "`guard(muon, clip)`": _inside("contrib.muon", 1.0),
        "`guard(adafactor, clip)`": _inside("adafactor", 1.0),
        "`guard(lion, clip)`": _inside("lion", 1.0),
    },
}


def limits(bound: Bound, rows: dict[str, Measured]) -> dict[str, float]:
    """What each figure is to stay below. Bytes relative to a row that was not compiled: below nothing."""
    found: dict[str, float] = {}
    if bound.bytes is not None:
        unit = 1.0 if not bound.of else rows[bound.of].bytes if bound.of in rows else float("-inf")
        found["bytes"] = bound.bytes * unit + bound.plus
    temporaries = rows[bound.of].temporaries if bound.same_temporaries else bound.temporaries
    if temporaries is not None:
        found["temporaries"] = temporaries
    if bound.conditionals is not None:
        found["conditionals"] = bound.conditionals
    return found


def broken(row: Measured, bound: Bound, rows: dict[str, Measured]) -> list[str]:
    """Which of the row's figures are above their bound; one of "bytes", "temporaries", "conditionals"."""
    return [name for name, limit in limits(bound, rows).items() if getattr(row, name) > limit + _SLACK[name]]


def worse(row: Measured, bound: Bound, rows: dict[str, Measured], recorded: dict[str, Measured]) -> list[str]:
    """The same, in words; a figure that misses its bound in the results may be what it is there, and no more."""
    found = []
    for name, limit in limits(bound, rows).items():
        held = max(limit, getattr(recorded[row.name], name)) if row.name in recorded else limit
        if getattr(row, name) > held + _SLACK[name]:
            found.append(f"{row.name}: {name} {getattr(row, name):g}, at most {held:g}")
    return found


def said(bound: Bound) -> str:
    """In words."""
    parts = []
    if bound.bytes is not None:
        whose = " of bare AdamW" if bound.of == BARE else f" of {bound.of}" if bound.of else ""
        parts.append(f"{bound.bytes:g}{whose}{f' + {bound.plus:g}' if bound.plus else ''}")
    if bound.same_temporaries:
        parts.append("no more temporaries")
    if bound.temporaries is not None:
        parts.append(f"temporaries {bound.temporaries:g}")
    if bound.conditionals is not None:
        parts.append(f"conditionals {bound.conditionals}")
    return ", ".join(parts)

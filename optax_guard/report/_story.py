"""The story of a run in words, derived from its numbers."""

from typing import NamedTuple

import numpy as np

from optax_guard._common import validate
from optax_guard._step.reading import batches, what_was_seen, where
from optax_guard._step.record import HELD
from optax_guard.report._log import TrainingLog
from optax_guard.report._logits import logit_sentences
from optax_guard.state._counts import Count, in_words

__all__ = ["Departure", "Incident", "first_departure", "incidents", "story", "usual_norms"]

_GAP = 5  # the most steps between two acts of a guard that belong to one incident
_LOOK_BACK = 64  # steps before an incident that are searched for an early sign
_CALM = 8  # with fewer usual steps than this, nothing is called unusual
_FACTOR = 3.0  # an unusual norm is at least this much larger than usual, and six times its own spread
_OFTEN = 10, 0.1  # steps, and of all steps: a bound on the step that acts more often has a cause
_BOUND = 0.5  # a clip to more than this share is routine and not an incident


class Departure(NamedTuple):
    """The first leaf whose norm left its usual range before an incident and did not return."""

    leaf: int
    step: int
    factor: float


class Incident(NamedTuple):
    """Neighbouring steps in which the guard had to act."""

    first: int  # step
    last: int  # step
    kinds: tuple[str, ...]  # the events, most frequent first
    severity: float  # the order of importance: log of the gradient norm relative to usual; large if non-finite
    text: str


def story(log: TrainingLog) -> list[str]:
    """Tells what happened in a run, mostly with one sentence for each incident, in chronological order.

    Args:
      log: from `read_log`, `load_log` or `load_checkpoint`.

    Returns:
      The sentences. The first says how many steps were recorded and how they were judged. Before the incidents comes
      what was done outside the guard, such as by the bound of `stabilize`, in the whole run. If steps were given
      `max_logits=`, the last say when the largest attention logit began to grow, and in which layer and head.

    Example:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.report import read_log, story
      >>> tx = og.guard(optax.sgd(0.1))
      >>> params, state = jnp.ones(2), tx.init(jnp.ones(2))
      >>> for size in (0.1, jnp.nan, 0.1):
      ...     params, state = og.apply_gradients(tx, jnp.full(2, size), state, params)
      >>> for sentence in story(read_log(state, params)):
      ...     print(sentence)
      Steps 0 to 2 are recorded: 2 applied as they were, 0 clipped, 1 held.
      Step 1: the gradient of `(root)` held NaN; the step was held and left no trace.
    """
    rows = log.rows
    held = int(np.isin(rows["event"], HELD).sum())
    clipped = int((rows["event"] == "clipped").sum())
    applied = int((rows["event"] == "applied").sum())
    through = int((rows["event"] == "let_through").sum())
    first = f"Steps {rows['step'][0]} to {rows['step'][-1]} are recorded: {applied} applied as they were, {clipped} "
    first += f"clipped, {held} held" + (f", {through} let through after patience was over." if through else ".")
    sentences = [first]
    if log.totals["halted"]:
        sentences.append("The guard has halted: every later step is held until `clear_halt(state)`.")
    found, counted = incidents(log), [_counted(count, log) for count in log.counts if count.total]
    if not found and clipped:
        share = clipped / len(rows)
        what = "Everyday" if counted else "Nothing but everyday"
        sentences.append(f"{what} clipping: {share:.0%} of the steps were scaled, none by more than half.")
    elif not found and not counted:
        sentences.append("Nothing had to be held or scaled down.")
    return sentences + counted + [incident.text for incident in found] + logit_sentences(rows, log.logits)


def _counted(count: Count, log: TrainingLog) -> str:
    """What was done outside the guard, and what to do about it."""
    text = f"Not in these numbers: {in_words(count)}."
    often = count.total >= max(_OFTEN[0], _OFTEN[1] * log.totals["guard_step"])
    if often and count.name == "limit_step_growth":
        return (
            f"{text} Steps are longer than it lets them grow, relative to the parameters. If they are meant to be, "
            "lead up to them by a linear warm-up or do without the bound (`max_change=None` in `stabilize`); if not, "
            "lower the learning rate."
        )
    if often and count.name == "limit_step":
        return (
            f"{text} Steps are longer than it allows, relative to the parameters: the learning rate is too large, or "
            "the bound too small."
        )
    return text


def incidents(log: TrainingLog, most: int = 30) -> list[Incident]:
    """Lists the incidents of a log in chronological order.

    Args:
      log: as in `story`.
      most: the largest number to return; the most severe are kept.

    Returns:
      What `story` tells, with steps and events as separate fields.
    """
    most = validate.integer("incidents", "most", most, low=1)
    rows = log.rows
    acted = np.isin(rows["event"], HELD) | (rows["event"] == "let_through")
    acted |= (rows["event"] == "clipped") & (rows["scale"] < _BOUND)
    acted |= rows["recovery"] != ""
    groups: list[list[int]] = []
    for i in np.flatnonzero(acted):
        if groups and rows["step"][i] - rows["step"][groups[-1][-1]] <= _GAP:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    usual = usual_norms(rows)
    told = [_incident(log, np.array(group), usual) for group in groups]
    kept = sorted(told, key=lambda incident: -incident.severity)[:most]
    return sorted(kept, key=lambda incident: incident.first)


def usual_norms(rows: np.ndarray) -> float:
    """The median norm of the steps that were applied unchanged or, if there are none, of all finite ones."""
    finite = np.isfinite(rows["grad_norm"])
    calm = finite & (rows["event"] == "applied")
    chosen = rows["grad_norm"][calm if calm.any() else finite]
    return float(np.median(chosen)) if len(chosen) else float("nan")


def first_departure(log: TrainingLog, step: int) -> Departure | None:
    """The leaf that was first to leave its usual range before `step` and stayed outside it until then."""
    if log.leaves is None:
        return None
    before = log.leaves.steps < step
    norms = log.leaves.norms[before].astype(np.float64)
    steps = log.leaves.steps[before]
    if len(norms) < _CALM + 1 or norms.shape[1] == 0:
        return None
    logs = np.log(np.where(np.isfinite(norms) & (norms > 0), norms, np.nan))
    best: Departure | None = None
    for leaf in range(norms.shape[1]):
        column = logs[:, leaf]
        calm = column[: -min(_LOOK_BACK, len(column) // 2)] if len(column) > 2 * _CALM else column
        calm = calm[np.isfinite(calm)]
        if len(calm) < _CALM:
            continue
        middle = np.median(calm)
        spread = 1.4826 * np.median(np.abs(calm - middle))
        out = np.nan_to_num(column, nan=-np.inf) > middle + max(np.log(_FACTOR), 6 * spread)
        run = len(out) if out.all() else int(np.argmin(out[::-1]))
        if run == 0:
            continue
        start = len(out) - run
        if best is None or steps[start] < best.step:
            factor = float(np.exp(np.nanmax(column[start:]) - middle))
            best = Departure(leaf, int(steps[start]), factor)
    return best


def _incident(log: TrainingLog, group: np.ndarray, usual: float) -> Incident:
    rows = log.rows[group]
    events, counts = np.unique(rows["event"], return_counts=True)
    kinds = tuple(str(event) for event in events[np.argsort(-counts)])
    first, last = int(rows["step"][0]), int(rows["step"][-1])
    bad = np.isin(rows["event"], ("nonfinite", "nonfinite_update"))
    largest = np.max(rows["grad_norm"], initial=0.0, where=np.isfinite(rows["grad_norm"]))
    factor = float(largest / usual) if usual > 0 else float("nan")
    severity = 100.0 + int(bad.sum()) if bad.any() else float(np.log(max(factor, 1.0))) if factor == factor else 1.0
    parts = [_cause(log, rows, bad, factor) + batches(rows["tag"]), _warning(log, first), _action(rows)]
    after = _aftermath(log, group)
    text = f"{_when(first, last)}: " + "; ".join(part for part in parts if part) + (f"; {after}." if after else ".")
    return Incident(first, last, kinds, severity, text)


def _when(first: int, last: int) -> str:
    return f"Step {first}" if first == last else f"Steps {first} to {last}"


def _cause(log: TrainingLog, rows: np.ndarray, bad: np.ndarray, factor: float) -> str:
    if bad.any():
        row = rows[bad][0]
        count, leaves = _spoiled(log, int(row["step"]))
        seen = what_was_seen(row, log.names, every_leaf=1 < count == leaves)
        if 1 < count == leaves:
            return f"{seen}, so look at the batch or the loss"
        others = f", and so did {count - 1} other lea{'f' if count == 2 else 'ves'} of {leaves}" if count > 1 else ""
        return seen + others
    if (rows["event"] == "halted").all():
        return "the guard had halted"
    worst = rows[np.argmax(np.where(np.isfinite(rows["grad_norm"]), rows["grad_norm"], -1))]
    size = f"the gradient norm reached {worst['grad_norm']:.3g}"
    size += f" (x{factor:.3g} the usual)" if np.isfinite(factor) and factor >= 1.5 else ""
    leaf = int(worst["worst_leaf"])
    return size + (f", most of it in {where(log.names, leaf)}" if leaf >= 0 else "")


def _spoiled(log: TrainingLog, step: int) -> tuple[int, int]:
    """How many leaves had a norm that was not finite in a step, of how many; 0 if the norms were not recorded."""
    if log.leaves is None or not (log.leaves.steps == step).any():
        return 0, 0
    norms = log.leaves.norms[log.leaves.steps == step][0]
    return int((~np.isfinite(norms)).sum()), len(norms)


def _warning(log: TrainingLog, step: int) -> str:
    early = first_departure(log, step)
    if early is None:
        return ""
    ahead = step - early.step
    return (
        f"{ahead} step{'s' if ahead > 1 else ''} earlier the norm of {where(log.names, early.leaf)} had left its usual "
        f"range, first of all leaves (x{early.factor:.3g})"
    )


def _action(rows: np.ndarray) -> str:
    held = int(np.isin(rows["event"], HELD).sum())
    clipped = rows[rows["event"] == "clipped"]
    through = int((rows["event"] == "let_through").sum())
    did = []
    if held:
        did.append("the step was held and left no trace" if len(rows) == held == 1 else f"{held} held without a trace")
    if len(clipped):
        least = float(np.min(clipped["scale"]))
        one = len(rows) == 1
        did.append(("the step was" if one else f"{len(clipped)} were") + f" scaled down, to {least:.2g} at the least")
    if through:
        did.append(f"{through} let through, patience being over")
    acts = [str(act) for act in rows["recovery"] if act]
    if acts:
        did.append("the ladder acted: " + ", ".join(dict.fromkeys("+".join(acts).replace("_", " ").split("+"))))
    return ", ".join(did)


def _aftermath(log: TrainingLog, group: np.ndarray) -> str:
    """How the loss developed afterwards."""
    rows = log.rows
    before = rows["value"][max(group[0] - 10, 0) : group[0]]
    before = before[np.isfinite(before)]
    after = slice(group[-1] + 1, None)
    values, steps = rows["value"][after], rows["step"][after]
    if len(before) < 3 or len(values) == 0:
        return ""
    level = float(np.median(before))
    slack = max(3 * float(np.median(np.abs(before - level))), 0.02 * abs(level))
    finite = np.isfinite(values)
    smooth = np.array([np.median(values[max(i - 2, 0) : i + 3]) if finite[i] else np.nan for i in range(len(values))])
    back = np.flatnonzero(smooth <= level + slack)
    if len(back) == 0:
        return f"the loss has not come back to {level:.3g} in the {len(values)} steps recorded since"
    wait = int(steps[back[0]] - rows["step"][group[-1]])
    if wait <= 3:
        return "training went on at the earlier loss"
    return f"training went on, back to the earlier loss {wait} steps later"

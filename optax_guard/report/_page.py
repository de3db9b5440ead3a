"""The page: one self-contained HTML file for light and dark themes, narrow windows, paper and screen readers."""

import base64
import html
from pathlib import Path

import numpy as np

from optax_guard.report._log import TrainingLog, leaf_label
from optax_guard.report._picture import render
from optax_guard.report._story import story, usual_norms

__all__ = ["write_page"]

_STYLE = """
:root { color-scheme: light dark; }
:root { --ink: #1a1d21; --back: #ffffff; --faint: #d7dbe0; --soft: #f4f6f8; --accent: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --back: #15181c; --faint: #3a4047; --soft: #1f242a; --accent: #7db3f0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.1rem; }
ol.story { padding-left: 1.4rem; } ol.story li { margin: .4rem 0; overflow-wrap: anywhere; }
code { font-size: .92em; background: var(--soft); padding: .05em .3em; border-radius: .2em; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
summary { cursor: pointer; padding: .3rem 0; }
@media screen and (max-width: 40rem) {
  td:first-child { white-space: normal; }
  .rows, .rows caption, .rows tbody, .rows tr, .rows td { display: block; } .rows thead { display: none; }
  .rows tr { padding: .4rem 0; border-bottom: 1px solid var(--faint); }
  .rows td { display: flex; gap: 1rem; justify-content: space-between; border: 0; padding: .05rem 0; }
  .rows td { white-space: normal; overflow-wrap: anywhere; text-align: right; }
  .rows td::before { content: attr(data-head); flex: none; max-width: 60%; text-align: left; opacity: .75; }
  .rows td:first-child { font-weight: 600; }
}
@media print {
  :root { --ink: #000; --back: #fff; --faint: #bbb; --soft: #fff; }
  main { max-width: none; padding: 0; } h2, figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: .75rem; } th, td { white-space: normal; }
}
"""
_SHOWN = 400  # rows in the table of steps; the log holds the rest


def write_page(log: TrainingLog, path: Path) -> Path:
    """Writes the page, and its picture beside it."""
    if not path.suffix:
        path = path.with_suffix(".html")
    pictures = {
        (dark, narrow): render(log, dark=dark, narrow=narrow) for dark in (False, True) for narrow in (False, True)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".png").write_bytes(pictures[False, False])
    path.write_text(_page(log, pictures), encoding="utf-8")
    return path


def _page(log: TrainingLog, pictures: dict[tuple[bool, bool], bytes]) -> str:
    lead, *rest = story(log)
    rows = log.rows
    title = f"Training report, steps {rows['step'][0]} to {rows['step'][-1]}"
    items = "\n".join(f"<li>{_marked(sentence)}</li>" for sentence in rest)
    alternative = html.escape(
        "The loss, the gradient norm and the verdicts over the steps. " + " ".join(rest), quote=True
    )
    sources = "".join(
        f'<source media="screen{" and (max-width: 40rem)" if narrow else ""}'
        f'{" and (prefers-color-scheme: dark)" if dark else ""}" srcset="{_data(pictures[dark, narrow])}">'
        for dark, narrow in ((True, True), (False, True), (True, False))
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead">{_marked(lead)}</p>
<h2 id="story">What happened</h2>
<ol class="story">
{items}
</ol>
<figure>
<picture>{sources}<img src="{_data(pictures[False, False])}" alt="{alternative}"></picture>
<figcaption>Time runs from left to right in all parts. Held steps left no trace in parameters or optimizer.</figcaption>
</figure>
<h2 id="totals">The whole run</h2>
{_totals(log)}
{_leaves(log)}
<h2 id="steps">Steps on which the guard acted</h2>
{_steps(log)}
</main>
</body>
</html>
"""


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _marked(text: str) -> str:
    """Escapes the text and marks `names` as code."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _number(value: float) -> str:
    if np.isnan(value):
        return "NaN"
    return "Inf" if np.isposinf(value) else "-Inf" if np.isneginf(value) else f"{value:.4g}"


def _table(caption: str, heads: list[str], rows: list[list[str]], text: tuple[int, ...] = ()) -> str:
    """A table that scrolls on its own and is reachable by keyboard; on a telephone, each row is a list of its cells."""
    kind = [' class="text"' if i in text else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{kind[i]}>{html.escape(h)}</th>' for i, h in enumerate(heads))
    named = [f'{kind[i]} data-head="{html.escape(h, quote=True)}"' for i, h in enumerate(heads)]
    body = "\n".join(
        "<tr>" + "".join(f"<td{named[i]}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    label, shape = html.escape(caption, quote=True), ' class="rows"' if len(heads) > 2 else ""
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table{shape}>'
        f"<caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _totals(log: TrainingLog) -> str:
    words = {
        "guard_step": "steps in all",
        "clipped_total": "applied, scaled by a rule",
        "skipped_total": "held, for whatever reason",
        "nonfinite_total": "of these: not finite",
        "let_through_total": "refused, but let through after patience was over",
        "halted": "halted",
    }
    rows = [[words[k], ("yes" if v else "no") if k == "halted" else str(v)] for k, v in log.totals.items()]
    rows += [
        [f"{count.name} {count.counter.words.format(count.counter.many)}", str(count.total)] for count in log.counts
    ]
    rows.append(["usual gradient norm (median of the steps applied as they were)", _number(usual_norms(log.rows))])
    return _table("Counted since the state was made", ["what", "number"], rows, (0,))


def _leaves(log: TrainingLog) -> str:
    if log.leaves is None or log.leaves.norms.size == 0:
        return (
            "<p>Which leaf went first was not recorded. Add <code>og.record_leaves()</code> to the guard to see "
            "every leaf over time.</p>"
        )
    norms = log.leaves.norms.astype(np.float64)
    rows = []
    for i, name in enumerate(log.leaves.names):
        column = norms[:, i]
        usable = np.isfinite(column) & (column > 0)
        bad = int((~np.isfinite(column)).sum())
        if not usable.any():
            rows.append((float(bad), [name, "-" if bad else "0", "-", "-", str(bad)]))
            continue
        middle = float(np.median(column[usable]))
        top = int(np.argmax(np.where(usable, column, -1)))
        peak = column[top] / middle
        cells = [name, _number(middle), f"x{peak:.3g}", str(int(log.leaves.steps[top])), str(bad)]
        rows.append((1e9 * bad + peak, cells))
    rows.sort(key=lambda row: -row[0])
    heads = ["leaf", "median norm", "largest, relative", "at step", "steps not finite"]
    table = _table("Every leaf, the most unusual first", heads, [cells for _, cells in rows], (0,))
    return '<h2 id="leaves">Leaves</h2>\n' + _folded(f"{len(rows)} leaves", table, len(rows))


def _steps(log: TrainingLog) -> str:
    rows = log.rows[log.rows["event"] != "applied"]
    if len(rows) == 0:
        return "<p>None.</p>"
    shown = rows[-_SHOWN:]
    cells = []
    tagged = bool((log.rows["tag"] >= 0).any())
    for row in shown:
        what = str(row["event"]).replace("_", " ")
        if row["recovery"]:
            what += f" ({str(row['recovery']).replace('_', ' ')})"
        loss = _number(row["value"]) if row["value_given"] else "not passed"
        numbers = [_number(row[name]) for name in ("grad_norm", "clipped_norm", "scale")]
        batch = [str(int(row["tag"])) if row["tag"] >= 0 else "-"] if tagged else []
        leaf = leaf_label(log.names, int(row["worst_leaf"]))
        cells.append([str(int(row["step"])), *batch, what, leaf, loss, *numbers])
    heads = ["step", *(["batch"] if tagged else []), "verdict", "worst leaf", "loss", "norm before", "norm let in"]
    heads.append("scale")
    left_out = f" (the last {_SHOWN})" if len(rows) > _SHOWN else ""
    table = _table(f"{len(rows)} of {len(log.rows)} recorded steps{left_out}", heads, cells, (1 + tagged, 2 + tagged))
    return _folded(f"{len(rows)} steps", table, len(shown))


def _folded(summary: str, table: str, rows: int) -> str:
    """A table behind a summary; long tables start closed."""
    return f"<details{' open' if rows <= 20 else ''}><summary>{summary}</summary>{table}</details>"

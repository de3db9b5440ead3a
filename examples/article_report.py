"""The tables, text and picture of `article.py`, made from its results alone.

Which of the article's claims hold is not written here: each claim names a quantity, two settings and a direction, and
the runs decide.
"""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARTICLE = {"regularisation": "plain", "learning_rate": 0.01, "accumulation": False, "noise": False, "augmented": False}
SWITCHES = {"accumulation": "accumulation", "noise": "noise", "augmented": "varied data"}
SAME = 0.01  # a difference below 1 % is none
# Okabe and Ito's palette, which colour-blind people can tell apart.
COLORS = {"plain": "#666666", "L1": "#D55E00", "dense": "#0072B2"}


class Comparison(NamedTuple):
    """One quantity with and without a change: at the article's setting, from a smaller start, and over all settings."""

    here: "Difference"  # at the article's setting
    start: "Difference | None"  # the same from smaller initial weights
    lower: int  # in how many pairs of settings the mean is lower by more than SAME
    higher: int
    pairs: int


class Difference(NamedTuple):
    """Means over the seeds, and whether the seeds agree."""

    changed: float
    before: float
    direction: str  # "lower" or "higher": in every seed, and by more than SAME in the mean; else "the same"


class Claim(NamedTuple):
    """A claim of the article, what it says of the numbers, and the numbers."""

    claim: str
    quantity: str
    changed: str
    before: str
    expected: str  # "lower" or "higher"
    found: Comparison


def select(results: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """The rows of the table with these settings."""
    return [r for r in results["rows"] if "more" not in r and all(r[k] == v for k, v in settings.items())]


def value(row: dict[str, Any], quantity: str) -> np.ndarray:
    """One number per seed; "gap" and shares of steps are made from what the rows hold."""
    if quantity == "gap":
        return value(row, "heldout_loss") - value(row, "train_loss")
    if quantity == "clipped_share":
        return value(row, "steps_clipped") / value(row, "steps")
    return np.asarray(row[quantity], np.float64)


def compare(
    results: dict[str, Any],
    quantity: str,
    changed: dict[str, Any],
    before: dict[str, Any],
    quantity_before: str | None = None,
) -> Comparison:
    """The quantity where `changed` holds against the same setting with `before`, for all settings of the table."""
    pairs = []
    for row in select(results, **before):
        partner = select(results, **{name: row[name] for name in ARTICLE} | before | changed)
        if partner:
            pairs.append((row, value(partner[0], quantity), value(row, quantity_before or quantity)))
    means = [(float(new.mean()), float(old.mean())) for _, new, old in pairs]
    [here] = [
        difference(new, old) for row, new, old in pairs if all(row[k] == v for k, v in (ARTICLE | before).items())
    ]
    settings = ARTICLE | before
    ends = [
        value(row, name)
        for wanted, name in ((settings | changed, quantity), (settings, quantity_before or quantity))
        for row in results["rows"]
        if row.get("more") == "smaller start" and all(row[k] == v for k, v in wanted.items())
    ]
    return Comparison(
        here=here,
        start=difference(*ends) if len(ends) == 2 else None,
        lower=sum(a < b - SAME * abs(b) for a, b in means),
        higher=sum(a > b + SAME * abs(b) for a, b in means),
        pairs=len(pairs),
    )


def difference(new: np.ndarray, old: np.ndarray) -> Difference:
    """Of one quantity, seed by seed."""
    large = abs(new.mean() - old.mean()) > SAME * abs(old.mean())
    direction = "lower" if large and (new < old).all() else "higher" if large and (new > old).all() else "the same"
    return Difference(float(new.mean()), float(old.mean()), direction)


def verdict(claim: Claim) -> str:
    """Holds: here, from a smaller start, and in three quarters of all pairs. Fails: neither, nor in half of them."""
    found = claim.found
    share = (found.lower if claim.expected == "lower" else found.higher) / found.pairs
    agree = [each.direction == claim.expected for each in (found.here, found.start) if each is not None]
    if all(agree) and share >= 0.75:
        return "holds"
    return "fails" if not any(agree) and share <= 0.5 else "holds in places"


def claims(results: dict[str, Any]) -> list[Claim]:
    """What the article says, each with the quantity that decides it."""
    epochs = results["options"]["epochs"]
    half = epochs // 2
    plain, l1, dense, both = ({"regularisation": x} for x in ("plain", "L1", "dense", "L1 then dense"))
    train_half, heldout = "train_loss_halfway", "heldout_loss"
    small, usual = {"learning_rate": 0.001}, {"learning_rate": 0.01}

    def claim(text: str, quantity: str, told: str, new: Any, old: Any, names: tuple[str, str], expected: str) -> Claim:
        return Claim(text, told, *names, expected, compare(results, quantity, new, old))

    def switch(name: str) -> tuple[dict[str, bool], dict[str, bool], tuple[str, str]]:
        return {name: True}, {name: False}, (f"with {SWITCHES[name]}", "without")

    told_half, told_heldout, told_gap = f"training loss after {half} epochs", "held-out loss", "gap"
    longer = compare(results, heldout, {}, {}, "heldout_loss_halfway")
    of_l1, of_dense, of_both = ("with L1", "without"), ("with dense", "with L1"), ("with both", "with L1 alone")
    of_rate = ("at 0.001", "at 0.01")
    return [
        claim("L1 slows training", train_half, told_half, l1, plain, of_l1, "higher"),
        claim("L1 prevents overfitting", "gap", told_gap, l1, plain, of_l1, "lower"),
        claim("L1 improves the loss on new images", heldout, told_heldout, l1, plain, of_l1, "lower"),
        claim("Dense trains faster than L1", train_half, told_half, dense, l1, of_dense, "lower"),
        claim("Dense overfits more than L1", "gap", told_gap, dense, l1, of_dense, "higher"),
        claim("Dense after L1 improves on L1", heldout, told_heldout, both, l1, of_both, "lower"),
        claim(
            "A learning rate of 0.001 tames the gradient",
            "clipped_share",
            "share of clipped steps",
            small,
            usual,
            of_rate,
            "lower",
        ),
        claim("A learning rate of 0.001 gives a better model", heldout, told_heldout, small, usual, of_rate, "lower"),
        claim(
            "Accumulation makes the gradient smaller",
            "largest_gradient_norm",
            "largest gradient norm",
            *switch("accumulation"),
            "lower",
        ),
        claim("Accumulation gives a better model", heldout, told_heldout, *switch("accumulation"), "lower"),
        Claim("More epochs help", told_heldout, f"after {epochs} epochs", f"after {half}", "lower", longer),
        claim("More varied data prevent overfitting", "gap", told_gap, *switch("augmented"), "lower"),
        claim("More varied data improve the loss on new images", heldout, told_heldout, *switch("augmented"), "lower"),
        claim(
            "Noise in training makes the net robust to noise in the image",
            "input_noise_loss",
            "loss on noisy images",
            *switch("noise"),
            "lower",
        ),
        claim(
            "Noise in training makes the net robust to noise in the weights",
            "weight_noise_loss",
            "loss with noisy weights",
            *switch("noise"),
            "lower",
        ),
    ]


def sentence(claim: Claim) -> str:
    """The claim with its numbers."""
    found = claim.found
    count = found.lower if claim.expected == "lower" else found.higher
    told = [f"{number(each.changed)} {claim.changed}, {number(each.before)} {claim.before}" for each in (found.here,)]
    if found.start is not None:
        told.append(f"{number(found.start.changed)} and {number(found.start.before)} with the smaller initial weights")
    unclear = [each is not None and each.direction == "the same" for each in (found.here, found.start)]
    told = [text + " (no difference)" * same for text, same in zip(told, unclear, strict=False)]
    return f"*{claim.claim}*: {claim.quantity} {'; '.join(told)}; {claim.expected} in {count} of {found.pairs} pairs."


def clamped_noise(results: dict[str, Any]) -> str:
    """What noise of the article's size changes, at test time and in training."""
    rows = [r for r in results["rows"] if "more" not in r]
    change = max(float(np.max(np.abs(value(r, "clamped_noise_loss") / value(r, "heldout_loss") - 1))) for r in rows)
    size = f"{results['options']['clamp']:g}"
    text = f"Noise clamped to a norm of {size} changes the loss at test time by a fraction of at most {change:.1g}"
    trained = [r for r in results["rows"] if r.get("more") == f"noise of norm {size}"]
    if trained:
        [plain] = select(results, **ARTICLE)
        shift = float(np.max(np.abs(value(trained[0], "heldout_loss") / value(plain, "heldout_loss") - 1)))
        text += f", and in training by at most {shift:.1g}"
        change = max(change, shift)
    return text + (": it is too small to have any effect." if change < SAME else ".")


def paragraphs(results: dict[str, Any]) -> tuple[str, str]:
    """What holds, and what does not."""
    judged = [(verdict(each), sentence(each)) for each in claims(results)]
    holds = [text for word, text in judged if word == "holds"]
    places = [text for word, text in judged if word == "holds in places"]
    fails = [text for word, text in judged if word == "fails"]
    good = listed(f"**These claims hold** ({len(holds)} of {len(judged)})", holds)
    bad = listed(f"**These claims fail** ({len(fails)})", fails)
    if places:
        bad += "\n\n" + listed(f"**These claims hold in some settings only** ({len(places)})", places)
    return good, bad + "\n\n" + clamped_noise(results)


def listed(title: str, items: list[str]) -> str:
    """A Markdown list under its title."""
    return f"{title}:\n\n" + "\n".join(f"- {item}" for item in items or ["none"])


class Strength(NamedTuple):
    """A strength of a penalty at the article's setting, and what came of it."""

    factor: float  # on the strength that the table has
    losses: np.ndarray  # held out, one per seed
    gap: float


def strengths(results: dict[str, Any], kind: str) -> list[Strength]:
    """All strengths of a penalty that were run."""
    rows = [(1.0, select(results, **ARTICLE | {"regularisation": kind})[0])]
    rows += [
        (float(r["more"].split(" x ")[1]), r) for r in results["rows"] if r.get("more", "").startswith(f"{kind} x ")
    ]
    found = [Strength(factor, value(row, "heldout_loss"), float(value(row, "gap").mean())) for factor, row in rows]
    return sorted(found, key=lambda each: each.factor)


def best(results: dict[str, Any], kind: str) -> Strength:
    """The strength with the lowest held-out loss."""
    return min(strengths(results, kind), key=lambda each: each.losses.mean())


def about_strengths(results: dict[str, Any]) -> str:
    """Whether the comparison of L1 with dense depends on the strengths chosen."""
    l1, dense = best(results, "L1"), best(results, "dense")
    l1_loss, dense_loss = float(l1.losses.mean()), float(dense.losses.mean())
    [plain] = select(results, **ARTICLE)
    winner = "dense" if dense_loss < l1_loss else "L1"
    options = results["options"]
    below = [
        name for name, loss in (("L1", l1_loss), ("dense", dense_loss)) if loss < value(plain, "heldout_loss").mean()
    ]
    compared = {2: "both below", 1: f"only {''.join(below)} below", 0: "neither below"}[len(below)]
    return (
        f"With each at the best of four strengths, {winner} is better: the held-out loss is {number(l1_loss)} with L1 "
        f"at {options['l1'] * l1.factor:g} and {number(dense_loss)} with dense at {options['dense'] * dense.factor:g}, "
        f"{compared} the {number(value(plain, 'heldout_loss').mean())} of plain training; the gap is then "
        f"{number(l1.gap)} with L1 and {number(dense.gap)} with dense."
    )


def about_shrinking(results: dict[str, Any]) -> str:
    """What the article's formulas do when applied literally, to the gradient."""
    rows = {r["more"]: r for r in results["rows"] if r.get("more", "").startswith("shrink")}
    if not rows:
        return ""
    [plain] = select(results, **ARTICLE)
    parts, zeros, better = [], 0.0, []
    for name, row in rows.items():
        loss = value(row, "heldout_loss")
        parts.append(f"{number(loss.mean())} ({name.removeprefix('shrink, ')})")
        zeros = max(zeros, value(row, "exact_zeros").max())
        better.append(loss.mean() < value(plain, "heldout_loss").mean() * (1 - SAME))
    none = "no weight is exactly zero" if zeros == 0 else f"at most {zeros:.0%} of the weights are exactly zero"
    end = "None of them beats it" if not any(better) else "All beat it" if all(better) else "Some of them beat it"
    return (
        f"Applied literally, to the gradient itself, the formulas give a held-out loss of {', '.join(parts)}, "
        f"against {number(value(plain, 'heldout_loss').mean())} for plain training. {end}, and {none}: they filter the "
        "gradient and do not regularise the weights."
    )


def about_zeros(results: dict[str, Any]) -> str:
    """The two forms of L1."""
    rows = {r["more"]: r for r in results["rows"] if "more" in r}
    [proximal] = select(results, **ARTICLE | {"regularisation": "L1"})
    loss, zeros = (
        [value(row, name).mean() for row in (proximal, rows["L1 in the gradient"])]
        for name in ("heldout_loss", "exact_zeros")
    )
    return (
        f"L1 as a proximal step gives a held-out loss of {number(loss[0])} with {zeros[0]:.0%} of the weights exactly "
        f"zero; the same penalty in the gradient gives {number(loss[1])} with {zeros[1]:.0%}."
    )


def about_start(results: dict[str, Any]) -> str:
    """How much depends on the size of the initial weights."""
    usual = select(results, **{name: x for name, x in ARTICLE.items() if name != "regularisation"})
    smaller = [r for r in results["rows"] if r.get("more") == "smaller start"]
    smaller = [r for r in smaller if r | {"regularisation": "plain"} == r | ARTICLE]
    told, firsts = [], []
    for rows in (usual, smaller):
        lowest = min(rows, key=lambda r: value(r, "heldout_loss").mean())
        [plain] = [r for r in rows if r["regularisation"] == "plain"]
        told.append(f"{lowest['regularisation']} ({number(value(lowest, 'heldout_loss').mean())})")
        firsts.append((lowest["regularisation"], f"{value(plain, 'largest_gradient_norm').mean():.1f}"))
    change = "does not change" if firsts[0][0] == firsts[1][0] else "changes"
    return (
        f"The size of the initial weights {change} which of the four is best on held-out images: {told[0]} with the "
        f"usual initialisation, {told[1]} with initial weights {results['options']['start']:g} times as large, where "
        f"the largest gradient norm of plain training is {firsts[1][1]} instead of {firsts[0][1]}."
    )


def about_longer(results: dict[str, Any]) -> str:
    """Whether varied data help when there is enough time to learn them."""
    rows = {r["more"]: r for r in results["rows"] if "more" in r}
    plain, varied = (value(rows[name], "heldout_loss") for name in ("longer", "longer, varied data"))
    better = (varied < plain).all() and varied.mean() < plain.mean() * (1 - SAME)
    return (
        f"With {results['options']['longer']} epochs, varied data {'help' if better else 'do not help'}: the "
        f"held-out loss is {number(varied.mean())} with them and {number(plain.mean())} without."
    )


def about_clip(results: dict[str, Any]) -> str:
    """How plain training ends without the clip."""
    rows = {r["more"]: r for r in results["rows"] if "more" in r}
    told, worse = [], []
    for name, rate in (("no clip", 0.01), ("no clip, rate 0.1", 0.1)):
        [clipped] = select(results, **ARTICLE | {"learning_rate": rate})
        with_clip, without = value(clipped, "heldout_loss"), value(rows[name], "heldout_loss")
        told.append(f"{number(without.mean())} instead of {number(with_clip.mean())} at {rate:g}")
        worse.append(bool((without > with_clip).all() and without.mean() > with_clip.mean() * (1 + SAME)))
    found = (
        "The clip helps"
        if all(worse)
        else "The clip helps at one of two learning rates"
        if any(worse)
        else "The clip does not help"
    )
    return f"{found}: without it, the held-out loss of plain training is {' and '.join(told)}."


def number(x: float) -> str:
    """Three digits that a person reads."""
    return f"{x:.3g}" if abs(x) >= 0.1 or x == 0 else f"{x:.3f}" if abs(x) >= 0.001 else f"{x:.1e}"


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over the seeds."""
    values = np.asarray(values, np.float64)
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values.mean():.3f}"


COLUMNS = (
    ("training loss", lambda r: spread(value(r, "train_loss"))),
    ("held-out loss", lambda r: spread(value(r, "heldout_loss"))),
    ("largest norm", lambda r: f"{value(r, 'largest_gradient_norm').mean():.1f}"),
    ("clipped", lambda r: f"{value(r, 'clipped_share').mean():.0%}"),
    ("zeros", lambda r: f"{value(r, 'exact_zeros').mean():.1%}"),
    ("noisy images", lambda r: f"{value(r, 'input_noise_loss').mean():.3f}"),
    ("noisy weights", lambda r: f"{value(r, 'weight_noise_loss').mean():.3f}"),
    ("clamped noise", lambda r: f"{value(r, 'clamped_noise_loss').mean():.3f}"),
)


def main_rows(results: dict[str, Any], everything: bool = False) -> list[list[str]]:
    """The table's rows with accumulation, noise and varied data off; or all of them."""
    off = {} if everything else dict.fromkeys(SWITCHES, False)
    return [
        [
            row["regularisation"],
            f"{row['learning_rate']:g}",
            *([", ".join(told for name, told in SWITCHES.items() if row[name])] if everything else []),
            *(show(row) for _, show in COLUMNS),
        ]
        for row in sorted(select(results, **off), key=lambda r: -r["learning_rate"])
    ]


def more_rows(results: dict[str, Any]) -> list[list[str]]:
    """The further runs, after plain training."""
    rows = [("plain", *select(results, **ARTICLE))]
    for row in results["rows"]:
        changes = [name_of(key, row[key]) for key, usual in ARTICLE.items() if row.get(key, usual) != usual]
        if "more" in row:
            rows.append((", ".join([row["more"], *changes]), row))
    return [[name, *(show(row) for _, show in COLUMNS)] for name, row in rows]


def name_of(setting: str, value: Any) -> str:
    """A setting that is not the article's, in words."""
    return SWITCHES.get(setting) or (f"rate {value:g}" if setting == "learning_rate" else value)


def effect_rows(results: dict[str, Any]) -> list[list[str]]:
    """What each switch does to four quantities: the median ratio over all pairs of settings, and how many are lower."""
    rows = []
    for name, told in SWITCHES.items():
        cells = [told]
        for quantity in (
            "train_loss",
            "heldout_loss",
            "largest_gradient_norm",
            "input_noise_loss",
            "weight_noise_loss",
        ):
            pairs = [
                (value(select(results, **{k: r[k] for k in ARTICLE} | {name: True})[0], quantity), value(r, quantity))
                for r in select(results, **{name: False})
            ]
            ratio = float(np.median([new.mean() / old.mean() for new, old in pairs]))
            found = compare(results, quantity, {name: True}, {name: False})
            cells.append(f"x {ratio:.2f} ({found.lower}/{found.pairs})")
        rows.append(cells)
    return rows


EFFECTS = ("switched on", "training loss", "held-out loss", "largest norm", "noisy images", "noisy weights")


def _table(title: str, header: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name.replace(" ", "\n") if i else name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def main_table(results: dict[str, Any], everything: bool = False) -> Table:
    """The table for the terminal."""
    extra = ("switched on",) if everything else ()
    header = ("regularisation", "rate", *extra, *(name for name, _ in COLUMNS))
    return _table(f"After {results['options']['epochs']} epochs", header, main_rows(results, everything))


def effects_table(results: dict[str, Any]) -> Table:
    """The effect of the three switches for the terminal."""
    return _table("The effect of the switches, over all pairs of settings", EFFECTS, effect_rows(results))


def more_table(results: dict[str, Any]) -> Table:
    """The further runs, for the terminal."""
    header = ("at the article's setting", *(name for name, _ in COLUMNS))
    return _table("Further runs", header, more_rows(results))


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


ABOUT = (about_strengths, about_start, about_longer, about_zeros, about_shrinking, about_clip)


def words(results: dict[str, Any]) -> str:
    """docs/benchmarks/article.md."""
    options, versions = results["options"], results["versions"]
    good, bad = paragraphs(results)
    further = "\n\n".join(text for text in (tell(results) for tell in ABOUT) if text)
    skipped = sum(int(value(r, "steps_skipped").sum()) for r in results["rows"])
    runs = len(results["rows"]) * len(options["seeds"])
    names = tuple(name for name, _ in COLUMNS)
    half = options["epochs"] // 2
    shape = "-".join(str(x) for x in options["sizes"])
    clamp = f"`max_norm={options['clamp']:g}` is the article's clamp"
    text = f"""# L1 and dense penalties: the article's claims, measured

This project started from an article on exploding gradients. The article regularises the gradient of an autoencoder by
L1 and then by a "dense", continuous formula, trains with SGD (learning rate 0.01, momentum {options["momentum"]}) for
{half} and for {options["epochs"]} epochs, and recommends smaller learning rates, accumulation, more epochs, more varied
data and noise, but shows no table of results. `examples/article.py` runs all of this on scikit-learn's digits. That
script writes this page from the numbers of a run; no verdict on it is written by hand.

![L1 and dense regularisation compared](article.png)

```
python examples/article.py --write-docs    # this page, the picture and benchmarks/results/article.json
```

## Terms

| in the article | here |
|---|---|
| L1-regularised gradient | `proximal_l1`: the penalty strength * sum abs(w), with exact zeros |
| dense regularised gradient | `dense_penalty`: strength / 2 * sum w^2, smooth everywhere |
| one applied after the other | both at once; the order makes no difference to a sum of penalties |
| its formulas, taken literally | `shrink_gradients`, "soft" and "dense", on the gradient itself |
| gradient accumulation | `accumulate`, {options["every"]} batches per step: as many epochs, a quarter of the steps |
| noise | `noise_injection` with an initial variance of {options["eta"]:g}; {clamp} |
| more varied data | the images rotated by up to 10 degrees and shifted by up to half a pixel, anew in each epoch |

An autoencoder with {shape} units ({options["parameters"]} parameters) learns {options["train_images"]} images in
batches of {options["batch"]}; {options["heldout_images"]} others are held out. Images are centred and scaled to a mean
square of 1, so predicting the mean image gives a loss of 1. All runs but two use `guard` with
`clip_by_global_norm({options["max_norm"]:g})`. The strengths, {options["l1"]:g} for L1 and {options["dense"]:g} for
dense, make the two penalties about equal at the initial weights. Every number is a mean over {len(options["seeds"])}
seeds, ± the standard deviation; the seed determines the held-out images, the initial weights, the batches and the
noise. There were {runs} runs; steps held because a gradient was not finite: {skipped}.

## Which claims hold

A claim holds if it is true at the article's setting and with initial weights {options["start"]:g} times as large (the
smaller initial weights), each time for every seed, and in three quarters of all pairs of settings that differ in
nothing else; it fails if it is true in neither of the two and in no more than half of the pairs. Differences below
{SAME:.0%} do not count. The numbers are those at the article's setting and with the smaller initial weights; the gap is
the held-out loss minus the training loss.

{good}

{bad}

{further}

## The table

"Zeros" is the share of weights that are exactly zero, "largest norm" the largest norm of the gradient before the clip,
and "clipped" the share of steps that were clipped. "Noisy images" is the loss in restoring held-out images from
Gaussian noise of {options["input_sigma"]:g} per pixel, "noisy weights" the held-out loss with Gaussian noise on the
weights, {options["weight_sigma"]:g} of the root mean square of each array; "clamped noise" is the loss with noise of
norm {options["clamp"]:g} on the image. Accumulation, noise and varied data are off here.

{markdown(("regularisation", "rate", *names), main_rows(results))}

The next table shows the effect of the three switches: the median, over all pairs of settings, of the ratio on / off,
and the number of pairs in which the quantity is lower by more than {SAME:.0%}.

{markdown(EFFECTS, effect_rows(results))}

Further runs, at a learning rate of 0.01 unless stated otherwise and with all switches off ("smaller start" means
initial weights {options["start"]:g} times as large, "longer" means {options["longer"]} epochs):

{markdown(("row", *names), more_rows(results))}

All {len(select(results))} rows of the table, with every seed, are in `benchmarks/results/article.json`. Measured with
{", ".join(f"{name} {version}" for name, version in versions.items() if name != "optax_guard")}, on a CPU.
"""
    blocks = text.split("\n\n")
    return "\n\n".join(map(wrapped, blocks)).rstrip() + "\n"


def wrapped(block: str) -> str:
    """Paragraphs and the items of lists in lines of 120 characters; tables and code as they are."""
    if block.startswith("- "):
        return "\n".join(textwrap.fill(item, 120, subsequent_indent="  ") for item in block.split("\n"))
    return textwrap.fill(block, 120) if block[0].isalnum() or block[0] in '*"' else block


def picture(results: dict[str, Any], path: Path) -> None:
    """L1 against dense: losses over time, the weights they leave, and how the strength matters."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
    rows = {kind: select(results, **ARTICLE | {"regularisation": kind})[0] for kind in COLORS}
    _losses(axes[0], rows)
    _weights(axes[1], rows, np.asarray(results["options"]["histogram_edges"]))
    _strengths(axes[2], results, rows)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Any, rows: dict[str, Any]) -> None:
    for kind, row in rows.items():
        for name, style in (("heldout_curve", "-"), ("train_curve", ":")):
            curve = np.mean(row[name], axis=0)
            axis.plot(np.arange(1, len(curve) + 1), curve, style, color=COLORS[kind], lw=2)
        axis.plot([], [], color=COLORS[kind], lw=3, label=kind)
    axis.plot([], [], color="black", label="held out")
    axis.plot([], [], ":", color="black", label="training")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(frameon=False)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, steps=[1, 5, 10]))
    axis.set_title("Loss, on held-out and on training images", loc="left", fontweight="bold")


def _weights(axis: Any, rows: dict[str, Any], edges: np.ndarray) -> None:
    middles = (edges[1:] + edges[:-1]) / 2
    zero_at = edges[0] - 1
    for i, (kind, row) in enumerate(rows.items()):
        counts = np.mean(row["weights_histogram"], axis=0)
        share = 100 * counts / counts.sum()
        axis.plot(middles, share[2:-1], color=COLORS[kind], lw=2)
        axis.bar(zero_at + 0.25 * (i - 1), share[0], 0.25, color=COLORS[kind])
        told = f"{kind}: {share[0]:.0f} %"
        axis.text(0.15, 0.83 - 0.07 * i, told, color=COLORS[kind], fontweight="bold", transform=axis.transAxes)
    axis.text(0.15, 0.9, "exactly 0", transform=axis.transAxes)
    ticks = np.arange(np.ceil(edges[0]), edges[-1] + 0.1, 2)
    axis.set_xticks([zero_at, *ticks], ["0", *(f"1e{int(t)}" if t else "1" for t in ticks)])
    axis.set_xlabel("size of a weight")
    axis.set_title("Where the weights end, % of all", loc="left", fontweight="bold")


def _strengths(axis: Any, results: dict[str, Any], rows: dict[str, Any]) -> None:
    plain = value(rows["plain"], "heldout_loss")
    axis.axhline(plain.mean(), color=COLORS["plain"], lw=2)
    for kind in ("L1", "dense"):
        found = strengths(results, kind)
        losses = np.array([each.losses.mean() for each in found])
        error = np.array([each.losses.std(ddof=1) if len(each.losses) > 1 else 0 for each in found])
        ticks = [each.factor for each in found]
        axis.errorbar(ticks, losses, error, fmt="o-", color=COLORS[kind], lw=2, capsize=3)
        axis.annotate(
            kind, (ticks[-1], losses[-1]), (6, 0), textcoords="offset points", color=COLORS[kind], va="center"
        )
    axis.annotate("plain", (ticks[0], plain.mean()), (0, 5), textcoords="offset points", color=COLORS["plain"])
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"x {f:g}" for f in ticks])
    axis.set_xticks([], minor=True)
    axis.margins(x=0.15)
    options = results["options"]
    axis.set_xlabel(f"strength (x 1: {options['l1']:g} for L1, {options['dense']:g} for dense)")
    axis.set_title("Held-out loss, by strength of the penalty", loc="left", fontweight="bold")

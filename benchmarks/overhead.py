"""What a guarded step costs: ratios of medians over interleaved runs in one process.

    python benchmarks/overhead.py            # everything, some 20 minutes on two cores; writes to benchmarks/results/
    python benchmarks/overhead.py --quick    # a small tree and few rounds: checks that it runs, not a measurement

Machines are shared and noisy, so the arms of a row take turns, step by step, and a row is the ratio of their medians
(with the quartiles of the paired ratios). Each arm owns its donated parameters and state; all arms of a row share the
gradients. Times in seconds mean nothing beyond the machine; ratios carry over.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og

PyTree = Any
RESULTS = Path(__file__).parent / "results"
PARTS = ("guard", "rules", "accumulation", "noise", "recovery", "updates", "compilation", "import")


class Row(NamedTuple):
    """One line of the table."""

    what: str
    ratio: float
    low: float  # quartiles of the ratios of single rounds
    high: float
    target: str
    met: bool | None  # None: no target


class Arm(NamedTuple):
    """A compiled step with the buffers it owns."""

    step: Callable[..., tuple[PyTree, PyTree]]
    params: PyTree
    state: PyTree
    temporaries: int  # bytes, by XLA's memory analysis


def transformer_tree(width: int, layers: int, vocabulary: int) -> PyTree:
    """Parameters in the shapes of a decoder-only transformer, 16 leaves a layer."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02)

    def layer() -> PyTree:
        attention = {name: {"kernel": normal(width, width), "bias": normal(width)} for name in "qkvo"}
        norms = {name: {"scale": normal(width), "bias": normal(width)} for name in ("norm_1", "norm_2")}
        mlp = {"up": normal(width, 4 * width), "down": normal(4 * width, width)}
        return attention | norms | {"mlp": mlp | {"up_bias": normal(4 * width), "down_bias": normal(width)}}

    blocks = {f"layer_{i}": layer() for i in range(layers)}
    return {"embedding": normal(vocabulary, width), "final_norm": normal(width), **blocks}


def make_arm(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, fast: bool = True) -> Arm:
    """Compiles one step, with parameters and state donated."""

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        if fast:
            return og.apply_gradients(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = jax.tree.map(jnp.copy, tx.init(params))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    analysis = compiled.memory_analysis()
    return Arm(compiled, params, state, -1 if analysis is None else analysis.temp_size_in_bytes)


def race(arms: dict[str, Arm], grads: PyTree, rounds: int, calls: dict[str, int]) -> dict[str, np.ndarray]:
    """Seconds per round and arm; an arm runs `calls` steps in a round, and arms take turns."""
    live = {name: (arm.params, arm.state) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name, arm in arms.items():
            params, state = live[name]
            start = time.perf_counter()
            for _ in range(calls.get(name, 1)):
                params, state = arm.step(params, state, grads)
            jax.block_until_ready((params, state))
            if turn >= 2:  # two rounds to warm up
                seconds[name].append(time.perf_counter() - start)
            live[name] = (params, state)
    return {name: np.array(times) for name, times in seconds.items()}


def compare(what: str, times: np.ndarray, base: np.ndarray, target: float | None, at_least: bool = False) -> Row:
    """The ratio of medians, against a target."""
    ratio = float(np.median(times) / np.median(base))
    low, high = np.percentile(times / base, [25, 75])
    met = None if target is None else ratio >= target if at_least else ratio <= target
    text = "" if target is None else f"{'>=' if at_least else '<='} {target:g}x"
    return Row(what, ratio, float(low), float(high), text, met)


def guard_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """The guarded step against the bare one and against Optax's."""
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    six = (og.clip_by_global_norm(1.0), og.skip_spikes(), og.clip_by_leaf_norm(1e9), og.skip_nonfinite())
    six += (og.skip_large(1e8), og.clip_by_global_norm(1e9))
    arms = {
        "bare": make_arm(adamw, params, grads, fast=False),
        "guard": make_arm(og.guard(adamw, og.clip_by_global_norm(1.0), og.skip_nonfinite()), params, grads),
        "six": make_arm(og.guard(adamw, *six), params, grads),
        "optax_clip": make_arm(clipped, params, grads, fast=False),
        "optax_finite": make_arm(optax.apply_if_finite(clipped, 5), params, grads, fast=False),
        "protocol": make_arm(og.guard(adamw, og.clip_by_global_norm(1.0)), params, grads, fast=False),
    }
    t = race(arms, grads, rounds, {})
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    extra = (arms["guard"].temporaries - arms["bare"].temporaries) / size
    rule = compare("each further rule, over the guarded step with 2", t["six"], t["guard"], None)
    per_rule = [1 + (x - 1) / 4 for x in (rule.ratio, rule.low, rule.high)]
    return [
        compare("guarded AdamW (clip, skip, recorder) / bare AdamW", t["guard"], t["bare"], 1.20),
        compare("optax.apply_if_finite(chain(clip, adamw)) / guarded", t["optax_finite"], t["guard"], 2.5, True),
        Row("each further rule / guarded step", *per_rule, "<= 1.01x", per_rule[0] <= 1.01),
        compare("optax.chain(clip, adamw) / bare AdamW", t["optax_clip"], t["bare"], None),
        compare("optax.apply_if_finite(chain(clip, adamw)) / bare AdamW", t["optax_finite"], t["bare"], None),
        compare("guarded through `update` (Optax's protocol) / bare AdamW", t["protocol"], t["bare"], None),
        Row(
            "temporaries of the guarded step / parameters, beyond bare", extra, extra, extra, "<= 0.01x", extra <= 0.01
        ),
    ]


def rule_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Each rule beside a clip, over the clip alone."""
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    rules = {
        "clip_by_norm_history": og.clip_by_norm_history(),
        'clip_by_norm_history(scope="leaf")': og.clip_by_norm_history(scope="leaf"),
        "clip_by_median_norm": og.clip_by_median_norm(),
        'clip_by_median_norm(scope="leaf")': og.clip_by_median_norm(scope="leaf"),
        "zclip": og.zclip(),
        "autoclip": og.autoclip(),
        "adagc": og.adagc(),
        "skip_spikes": og.skip_spikes(),
        "record_leaves(1024)": og.record_leaves(1024),
    }
    rows: list[Row] = []
    for names in (list(rules)[:5], list(rules)[5:]):  # in two parts, each with its own base, to save memory
        arms = {"base": make_arm(og.guard(adamw, clip), params, grads)}
        arms |= {name: make_arm(og.guard(adamw, clip, rules[name]), params, grads) for name in names}
        t = race(arms, grads, rounds, {})
        rows += [
            compare(f"guard(adamw, clip, {name}) / guard(adamw, clip)", t[name], t["base"], 1.01) for name in names
        ]
    return rows


def accumulation_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """A cycle of four micro-batches."""
    adamw, every = optax.adamw(1e-3), 4
    chained = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    arms = {
        "bare": make_arm(adamw, params, grads, fast=False),
        "ours": make_arm(og.accumulate(og.guard(adamw, og.clip_by_global_norm(1.0)), every), params, grads),
        "multi": make_arm(optax.MultiSteps(chained, every).gradient_transformation(), params, grads, fast=False),
    }
    t = race(arms, grads, max(rounds // 2, 3), dict.fromkeys(arms, every))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    extra = arms["ours"].temporaries / size
    return [
        compare("optax.MultiSteps(chain(clip, adamw), 4) / accumulate(guard)", t["multi"], t["ours"], 7.0, True),
        compare("accumulate(guard(adamw, clip), 4), a cycle / 4 bare AdamW steps", t["ours"], t["bare"], 0.68),
        Row("temporaries of accumulate / parameters", extra, extra, extra, "<= 0.01x", extra <= 0.01),
    ]


def noise_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Gradient noise in a chain with Adam."""
    adam = optax.adam(1e-3)
    arms = {
        "bare": make_arm(adam, params, grads, fast=False),
        "ours": make_arm(optax.chain(og.noise_injection(0.01, 0.55, key=0), adam), params, grads, fast=False),
        "optax": make_arm(optax.chain(optax.add_noise(0.01, 0.55, key=0), adam), params, grads, fast=False),
    }
    t = race(arms, grads, max(rounds // 2, 3), {})
    return [
        compare("chain(noise_injection, adam) / chain(optax.add_noise, adam)", t["ours"], t["optax"], 0.5),
        compare("chain(noise_injection, adam) / bare adam", t["ours"], t["bare"], None),
    ]


def update_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Bounds on the finished update, and clips by the second moment, around AdamW."""
    adamw = optax.adamw(1e-3)
    txs = {
        "limit_step(tree)": optax.chain(adamw, og.limit_step(1e-3)),
        "limit_step(leaf)": optax.chain(adamw, og.limit_step(1e-3, scope="leaf")),
        "clip_by_update_norm": optax.chain(adamw, og.clip_by_update_norm()),
        "clippy": optax.chain(adamw, og.clippy()),
        "clip_by_update_rms": og.clip_by_update_rms(adamw),
        "spam_clip": og.spam_clip(adamw),
        "stable_spam": og.stable_spam(adamw),
    }
    bare, rows = make_arm(adamw, params, grads, fast=False), []
    for name, tx in txs.items():  # two arms at a time, so that memory holds them
        t = race({"bare": bare, name: make_arm(tx, params, grads, fast=False)}, grads, max(rounds // 3, 3), {})
        rows.append(compare(f"{name} / bare AdamW", t[name], t["bare"], 1.7 if "limit" in name else None))
        bare = make_arm(adamw, params, grads, fast=False)
    return rows


def recovery_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """The rungs of the ladder beside a clip, over the clip alone, a snapshot every 100 steps."""
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    rungs = {"reset_moments": og.reset_moments(), "back_off": og.back_off(), "rewind": og.rewind(every=100, keep=1)}
    ladders = {name: (rung,) for name, rung in rungs.items()} | {"all three": tuple(rungs.values())}
    arms = {"base": make_arm(og.guard(adamw, clip), params, grads)}
    arms |= {name: make_arm(og.guard(adamw, clip, recovery=each), params, grads) for name, each in ladders.items()}
    t = race(arms, grads, rounds, dict.fromkeys(arms, 10))
    return [compare(f"guard(..., recovery={name}) / guard(adamw, clip)", t[name], t["base"], None) for name in ladders]


def compile_rows(leaves: int, rounds: int) -> list[Row]:
    """Tracing and compiling with many leaves."""
    shapes = [(64, 64), (64,), (64, 128)]
    params = {f"leaf_{i:04d}": jnp.zeros(shapes[i % 3]) for i in range(leaves)}
    adamw = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    makers = {
        "bare": lambda: make_arm(adamw, params, params, fast=False),
        "guard": lambda: make_arm(og.guard(adamw, og.clip_by_global_norm(1.0)), params, params),
        "optax_clip": lambda: make_arm(clipped, params, params, fast=False),
        "optax_finite": lambda: make_arm(optax.apply_if_finite(clipped, 5), params, params, fast=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds + 1):
        for name, make in makers.items():
            jax.clear_caches()
            start = time.perf_counter()
            make()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    t = {name: np.array(times) for name, times in seconds.items()}
    return [
        compare(f"compilation, {leaves} leaves: guarded / bare AdamW", t["guard"], t["bare"], 1.5),
        compare(f"compilation, {leaves} leaves: optax.chain(clip, adamw) / bare", t["optax_clip"], t["bare"], None),
        compare(f"compilation, {leaves} leaves: optax.apply_if_finite / bare", t["optax_finite"], t["bare"], None),
    ]


def import_row(rounds: int) -> Row:
    """Milliseconds that `import optax_guard` adds to `import optax`."""
    code = "import time, optax; t = time.perf_counter(); import optax_guard; print(1000 * (time.perf_counter() - t))"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(rounds)
    ]
    low, middle, high = np.percentile(runs, [25, 50, 75])
    return Row("import optax_guard after optax, milliseconds", middle, low, high, "<= 50 ms", bool(middle <= 50))


def setting(params: PyTree, rounds: int) -> str:
    """What was measured, on what."""
    leaves, size = len(jax.tree.leaves(params)), sum(x.size for x in jax.tree.leaves(params))
    text = f"{size / 1e6:.1f} M float32 parameters, {leaves} leaves; {jax.devices()[0].device_kind}, "
    text += f"jax {jax.__version__}, optax {optax.__version__}, Python {platform.python_version()}; {rounds} rounds"
    return text


def save(name: str, heading: str, rows: list[Row], keep: bool = False) -> None:
    """Writes a results file; with `keep`, rows measured before stay unless they were measured anew."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{jax.devices()[0].platform}-jax{jax.__version__}.json"
    old = json.loads(path.read_text())["rows"] if keep and path.exists() else []
    kept = {row["what"]: row for row in old} | {row.what: row._asdict() for row in rows}
    path.write_text(json.dumps({"setting": heading, "rows": list(kept.values())}, indent=1) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")


def table(rows: list[Row]) -> str:
    """The rows as text, one a line."""
    lines = []
    for row in rows:
        verdict = "" if row.met is None else "met" if row.met else "MISSED"
        lines.append(f"{row.what:64s} {row.ratio:8.3f}  [{row.low:.3f}, {row.high:.3f}]  {row.target:9s} {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description="What a guarded step costs, as ratios of medians.")
    parser.add_argument("--quick", action="store_true", help="a small tree and few rounds; writes no results")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per row (default: 15)")
    parser.add_argument("--only", choices=PARTS, help="one part of the table; its rows replace those in the results")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds = 3 if options.quick else options.rounds
    params = transformer_tree(64, 2, 512) if options.quick else transformer_tree(640, 12, 24_000)
    grads = jax.tree.map(lambda x: 0.01 * jnp.cos(100 * x), params)
    heading = setting(params, rounds)
    print(heading, flush=True)
    parts: dict[str, Callable[[], list[Row]]] = {
        "guard": lambda: guard_rows(params, grads, rounds),
        "rules": lambda: rule_rows(params, grads, rounds),
        "accumulation": lambda: accumulation_rows(params, grads, rounds),
        "noise": lambda: noise_rows(params, grads, rounds),
        "recovery": lambda: recovery_rows(params, grads, rounds),
        "updates": lambda: update_rows(params, grads, rounds),
        "compilation": lambda: compile_rows(30 if options.quick else 1000, min(rounds, 3)),
        "import": lambda: [import_row(min(rounds, 5))],
    }
    rows: list[Row] = []
    for name in [options.only] if options.only else PARTS:
        new = parts[name]()
        rows += new
        print(table(new), flush=True)
    if not options.quick:
        save("overhead", heading, rows, keep=options.only is not None)


if __name__ == "__main__":
    main()

"""What one step costs: the guard, each rule, recovery, bounds on the update, noise, exact zeros."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks.performance.measure import Row, compare, made_arms, on_cpu, race

__all__ = ["guard_rows", "noise_rows", "proximal_rows", "recovery_rows", "rule_rows", "update_rows"]

PyTree = Any


def guard_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """The guarded step against the bare one and against Optax's."""
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    six = (clip, og.skip_spikes(), og.clip_by_leaf_norm(1e9), og.skip_nonfinite(), og.skip_large(1e8))
    txs = {
        "bare": (adamw,),
        "guard": og.guard(adamw, clip, og.skip_nonfinite()),
        "six rules": og.guard(adamw, *six, og.clip_by_global_norm(1e9)),
        "optax clip": (clipped,),
        "optax apply_if_finite": (optax.apply_if_finite(clipped, 5),),
        "guard through update": (og.guard(adamw, clip),),
    }
    arms = made_arms(txs, params, grads)
    t = race(arms, grads, rounds)
    six_rules = compare("guard", "", t["six rules"], t["guard"])
    low, middle, high = (1 + (x - 1) / 4 for x in (six_rules.low, six_rules.value, six_rules.high))
    return [
        compare("guard", "guarded AdamW (clip, skip, recorder) over bare `optax.adamw`", t["guard"], t["bare"], 1.2),
        compare(
            "guard",
            "`optax.apply_if_finite(chain(clip, adamw))` over guarded",
            t["optax apply_if_finite"],
            t["guard"],
            on_cpu(2.5),
            at_least=True,
        ),
        Row("guard", "each further rule, over guarded", middle, low, high, target=1.01),
        compare("guard", "`optax.chain(clip, adamw)` over bare", t["optax clip"], t["bare"]),
        compare(
            "guard", "`optax.apply_if_finite(chain(clip, adamw))` over bare", t["optax apply_if_finite"], t["bare"]
        ),
        compare(
            "guard",
            "guarded through `update` instead of `apply_gradients`, over bare",
            t["guard through update"],
            t["bare"],
        ),
    ]


def rule_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Each rule beside a clip, over the clip alone."""
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    rules = {
        "clip_by_leaf_norm(1e9)": og.clip_by_leaf_norm(1e9),
        "clip_by_norm_history()": og.clip_by_norm_history(),
        'clip_by_norm_history(scope="leaf")': og.clip_by_norm_history(scope="leaf"),
        "clip_by_median_norm()": og.clip_by_median_norm(),
        'clip_by_median_norm(scope="leaf")': og.clip_by_median_norm(scope="leaf"),
        "zclip()": og.zclip(),
        "autoclip()": og.autoclip(),
        "adagc()": og.adagc(),
        "skip_spikes()": og.skip_spikes(),
        "skip_nonfinite()": og.skip_nonfinite(),
        "skip_large(1e8)": og.skip_large(1e8),
        "record_leaves(1024)": og.record_leaves(1024),
    }
    rows: list[Row] = []
    arms = made_arms({"clip": og.guard(adamw, clip)}, params, grads)
    for names in (list(rules)[:6], list(rules)[6:]):  # in two parts, to save memory
        arms = {"clip": arms["clip"]}
        arms |= made_arms({name: og.guard(adamw, clip, rules[name]) for name in names}, params, grads)
        t = race(arms, grads, rounds)
        rows += [
            compare("rules", f"`guard(adamw, clip, {name})` over `guard(adamw, clip)`", t[name], t["clip"], 1.01)
            for name in names
        ]
    return rows


def recovery_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """The rungs of the ladder beside a clip, over the clip alone.

    A round is ten steps and holds one look at the moments and one snapshot where `every ten steps` is said, and none
    where it is not: the first is what they cost, ten times as often as by default, the second what waiting for them
    costs.
    """
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    often = (og.reset_moments(check_every=10), og.back_off(), og.rewind(every=10, keep=1))
    seldom = (og.reset_moments(check_every=10**6), og.back_off(), og.rewind(every=10**6, keep=1))
    ladders = {
        "reset_moments, checking every ten steps": often[:1],
        "back_off": often[1:2],
        "rewind, a snapshot every ten steps": often[2:],
        "all three, every ten steps": often,
        "all three, between checks and snapshots": seldom,
    }
    txs = {"clip": og.guard(adamw, clip)}
    txs |= {name: og.guard(adamw, clip, recovery=ladder) for name, ladder in ladders.items()}
    arms = made_arms(txs, params, grads)
    t = race(arms, grads, max(rounds // 2, 3), calls=10)
    rows = [compare("recovery", f"{name}, over `guard(adamw, clip)`", t[name], t["clip"]) for name in ladders]
    between, at_ten = rows[-1], rows[-2]
    value, low, high = (b + (a - b) / 10 for a, b in zip(at_ten[2:5], between[2:5], strict=True))
    return [*rows, Row("recovery", "all three, every hundred steps (from the two rows above)", value, low, high)]


def update_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Bounds on the finished update, and clips by the second moment, around AdamW."""
    adamw = optax.adamw(1e-3)
    txs = {
        "limit_step(1e-3)": optax.chain(adamw, og.limit_step(1e-3)),
        'limit_step(1e-3, scope="leaf")': optax.chain(adamw, og.limit_step(1e-3, scope="leaf")),
        "clip_by_update_norm()": optax.chain(adamw, og.clip_by_update_norm()),
        "clippy()": optax.chain(adamw, og.clippy()),
        "clip_by_update_rms(adamw)": og.clip_by_update_rms(adamw),
        "spam_clip(adamw)": og.spam_clip(adamw),
        "stable_spam(adamw)": og.stable_spam(adamw),
    }
    arms, rows = made_arms({"bare": (adamw,)}, params, grads), []
    for name, tx in txs.items():  # two arms at a time, so that memory holds them
        arms = {"bare": arms["bare"]} | made_arms({name: (tx,)}, params, grads)
        t = race(arms, grads, max(rounds // 2, 3))
        target = 1.7 if name.startswith("limit_step") else None
        rows.append(compare("updates", f"`{name}` over bare `optax.adamw`", t[name], t["bare"], target))
    del arms
    halved, half_grads = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (params, grads))
    rounded = optax.chain(adamw, og.stochastic_rounding())
    t = race(made_arms({"bare": (adamw,), "rounded": rounded}, halved, half_grads), half_grads, max(rounds // 2, 3))
    what = "`chain(adamw, stochastic_rounding())` over bare `optax.adamw`, bfloat16 parameters"
    return [*rows, compare("updates", what, t["rounded"], t["bare"], 1.1)]


def proximal_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Exact zeros."""
    adamw = optax.adamw(1e-3)
    prox = og.proximal_l1(adamw, 1e-5, learning_rate=1e-3)
    clip = og.clip_by_global_norm(1.0)
    arms = made_arms(
        {"bare": (adamw,), "proximal": prox, "guard": og.guard(adamw, clip), "guarded proximal": og.guard(prox, clip)},
        params,
        grads,
    )
    t = race(arms, grads, max(rounds // 2, 3))
    return [
        compare("proximal", "`proximal_l1(adamw, 1e-5)` over bare `optax.adamw`", t["proximal"], t["bare"]),
        compare("proximal", "`guard(proximal_l1(adamw))` over `guard(adamw)`", t["guarded proximal"], t["guard"]),
    ]


def noise_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """Gradient noise in a chain with Adam."""
    adam = optax.adam(1e-3)
    txs = {
        "bare adam": (adam,),
        "noise_injection": (optax.chain(og.noise_injection(0.01, 0.55, key=0), adam),),
        "optax.add_noise": (optax.chain(optax.add_noise(0.01, 0.55, key=0), adam),),
    }
    arms = made_arms(txs, params, grads)
    t = race(arms, grads, max(rounds // 2, 3))
    ours, theirs = t["noise_injection"], t["optax.add_noise"]
    what = "`chain(noise_injection, adam)` over "
    return [
        compare("noise", what + "`chain(optax.add_noise, adam)`", ours, theirs, on_cpu(0.5)),
        compare("noise", what + "bare `optax.adam`", ours, t["bare adam"]),
    ]

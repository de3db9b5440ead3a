"""Names: every public one is registered, every field of a state is found by its own."""

import json
import subprocess
import sys

import jax
import optax
from conforming import PARAMS, STATES
from registry import ENTRIES, NOT_TRANSFORMATIONS, PUBLIC, schedule

import optax_guard as og


def test_every_public_name_is_registered_or_has_a_reason_not_to_be() -> None:
    names = [entry.name for entry in ENTRIES]
    assert sorted({*names, *NOT_TRANSFORMATIONS}) == sorted(PUBLIC)
    assert not set(names) & set(NOT_TRANSFORMATIONS)


def test_state_fields_have_names_of_their_own_that_optax_does_not_use() -> None:
    fields = [name for state in STATES for name in state._fields]
    theirs = {
        name
        for module in (optax, optax.contrib)
        for state in vars(module).values()
        if isinstance(state, type) and issubclass(state, tuple) and hasattr(state, "_fields")
        if not issubclass(state, optax.GradientTransformation)
        for name in state._fields
    }
    assert len(STATES) >= 20
    assert len(fields) == len(set(fields))
    assert "count" in theirs
    assert not theirs & set(fields)


def test_optax_tree_get_finds_every_field_in_one_state_of_everything() -> None:
    inner = optax.chain(og.noise_injection(), og.l1_penalty(schedule), optax.adamw(0.1))
    inner = og.proximal_l1(inner, 0.1, learning_rate=0.1)
    rules = og.record_leaves(), og.skip_spikes(), og.clip_by_global_norm(schedule)
    rules += og.clip_by_norm_history(), og.clip_by_median_norm(), og.zclip(), og.autoclip(), og.adagc()
    recovery = og.reset_moments(), og.back_off(diverged=2.0), og.rewind()
    everything = og.loss_scaling(og.accumulate(og.guard(inner, *rules, recovery=recovery), every=2))
    own = (
        "spam_clip",
        "stable_spam",
        "clip_by_update_norm",
        "clippy",
        "limit_step",
        "limit_step_growth",
        "stabilize",
        "masked_rule",
        "stochastic_rounding",
    )
    own += "published.skip_spikes", "published.clip_by_update_norm"
    alone = [entry.make() for entry in ENTRIES if entry.name in own and not entry.variant]
    states = [jax.eval_shape(tx.init, PARAMS) for tx in (everything, *alone)]
    for name in (name for kind in (*STATES, og.recovery.LossWatch) for name in kind._fields):
        assert [state for state in states if optax.tree.get(state, name) is not None], name


def test_import_brings_in_nothing_that_jax_and_optax_do_not() -> None:
    code = "import sys, json, jax, optax; a = set(sys.modules); import optax_guard; "
    code += "print(json.dumps([*set(sys.modules) - a]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    new = {name.split(".")[0] for name in json.loads(out.stdout)}
    assert "optax_guard" in new
    assert not new & {"flax", "matplotlib", "scipy", "rich", "chex", "orbax", "equinox", "sklearn", "tensorflow"}

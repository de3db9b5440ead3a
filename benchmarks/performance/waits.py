"""How often the host waits for a GPU while it hands out steps, counted in a profile.

XLA lets the host run ahead of a GPU unless the host must know a number to go on: which branch of a conditional to hand
out next. Then it copies the number to itself and waits, and so do all later steps of the program.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks.performance.measure import Arm, Row, made_arms, number, say, transformer_tree
from benchmarks.performance.traps import FORMS, form_arm

__all__ = ["counted", "events_of", "wait_rows"]

PyTree = Any
STEPS = 50
# What CUPTI calls a wait of the host and a copy to it: on the host's lines, and on those of the device.
_WAITS = re.compile(r"cu(Stream|Event|Ctx)Synchronize|cuda(Stream|Event|Device)Synchronize|BlockHostUntilDone")
_SHOWN = re.compile(r"^cu|Memcpy|Wait|Block|Synchron|Graph|Conditional|Thunk")
_COPIES = re.compile(r"MemcpyD(evice)?(2|to)H", re.IGNORECASE)


def wait_rows() -> list[Row]:
    """Waits and copies a step, in steps of several kinds on a small tree: their number does not depend on its size.

    None at all if the profile does not show them in a step that has a conditional for certain.
    """
    params = transformer_tree(64, 2, 512)
    grads = jax.tree.map(lambda x: 0.01 * jnp.cos(100 * x), params)
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    ladder = (og.reset_moments(), og.back_off(), og.rewind())
    txs = {
        "bare `optax.adamw`": (adamw,),
        "guarded": og.guard(adamw, clip, og.skip_nonfinite()),
        "`stabilize(adamw)`": og.stabilize(adamw),
        "`guard(chain(adamw, limit_step), clip)`": og.guard(optax.chain(adamw, og.limit_step(0.01)), clip),
        "`guard(chain(noise_injection, adamw), clip)`": og.guard(
            optax.chain(og.noise_injection(1e-4, key=0), adamw), clip
        ),
        "`accumulate(guard(adamw, clip), 4)`": og.accumulate(og.guard(adamw, clip), 4),
        "guard with `reset_moments`, `back_off` and `rewind`": og.guard(adamw, clip, recovery=ladder),
        "`optax.apply_if_finite(chain(clip, adamw))`": (
            optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), adamw), 5),
        ),
    }
    control = "by hand: `lax.cond(finite, act, hold)`"
    rows: list[Row] = []
    seen = 0
    arms = {control: form_arm(FORMS[control], params, grads)} | made_arms(txs, params, grads)
    for name, arm in arms.items():
        found = Counter(events_of(arm, grads))
        waits, copies = counted(found)
        common = ", ".join(f"{event} {times}" for event, times in found.most_common() if _SHOWN.search(event))
        say(f"{name}: {waits} waits, {copies} copies to the host in {STEPS} steps; {common[:1500]}")
        target = 0.1 if name == "guarded" else None
        rows.append(number("gpu", f"waits of the host a step, {name}", waits / STEPS, target))
        rows.append(number("gpu", f"copies to the host a step, {name}", copies / STEPS))
        seen += (waits + copies) * (name == control)
    if not seen:
        say(f"left out: the profile shows no wait of {control} either, so that it says nothing about the others")
        return []
    return rows


def counted(events: Counter[str]) -> tuple[int, int]:
    """Waits of the host, copies to it."""
    return tuple(sum(n for event, n in events.items() if kind.search(event)) for kind in (_WAITS, _COPIES))


def events_of(arm: Arm, grads: PyTree, steps: int = STEPS) -> Iterable[str]:
    """The names of all events of a profile of so many steps, handed out one after another without waiting."""
    step, params, state = arm
    params, state = jax.block_until_ready(step(params, state, grads))  # the first loads the program
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(steps):
            params, state = step(params, state, grads)
        jax.block_until_ready((params, state))
        jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        return [event.name for plane in profile.planes for line in plane.lines for event in line.events]

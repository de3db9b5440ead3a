"""The same tree in PyTorch, if it is installed: its fused AdamW, alone and after `clip_grad_norm_`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import optax_guard as og
from benchmarks.performance.measure import Arm, Row, compare, made_arms, say, take_turns

__all__ = ["pytorch_rows"]

PyTree = Any


def pytorch_rows(params: PyTree, grads: PyTree, rounds: int) -> list[Row]:
    """The guarded step does more (it holds a bad step); both clip by the global norm."""
    try:
        import torch
    except (ImportError, OSError) as error:
        say(f"left out: PyTorch is not installed ({error})")
        return []
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    adamw, clip = optax.adamw(1e-3), og.clip_by_global_norm(1.0)
    txs = {"bare": (adamw,), "guarded": og.guard(adamw, clip, og.skip_nonfinite())}
    turns = {name: _ours(arm, grads) for name, arm in made_arms(txs, params, grads).items()}
    turns["torch"] = _theirs(torch, device, params, grads, clip=False)
    turns["torch, clipped"] = _theirs(torch, device, params, grads, clip=True)
    t = take_turns(turns, max(rounds // 2, 3))
    version, fused = torch.__version__.split("+")[0], "`AdamW(fused=True)`"
    return [
        compare(
            "pytorch",
            f"PyTorch {version} `clip_grad_norm_` and {fused}, over guarded AdamW",
            t["torch, clipped"],
            t["guarded"],
        ),
        compare("pytorch", f"PyTorch {version} {fused}, over bare `optax.adamw`", t["torch"], t["bare"]),
        compare(
            "pytorch",
            f"PyTorch {version} `clip_grad_norm_` and {fused}, over {fused} alone",
            t["torch, clipped"],
            t["torch"],
        ),
    ]


def _ours(arm: Arm, grads: PyTree) -> Callable[[], None]:
    live = [arm.params, arm.state]

    def turn() -> None:
        live[:] = arm.step(*live, grads)
        jax.block_until_ready(live)

    return turn


def _theirs(torch: Any, device: str, params: PyTree, grads: PyTree, clip: bool) -> Callable[[], None]:
    """A step of PyTorch's on tensors of its own, the gradients held in `grad`."""

    def tensors(tree: PyTree) -> list[Any]:
        return [torch.tensor(np.asarray(x), device=device) for x in jax.tree.leaves(tree)]

    weights = [torch.nn.Parameter(x) for x in tensors(params)]
    for weight, grad in zip(weights, tensors(grads), strict=True):
        weight.grad = grad
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=1e-4, fused=True)

    def turn() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return turn

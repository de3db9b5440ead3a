"""Checks before a run: the loss, the gradient and the curvature at the parameters where training starts.

=======================  ==================================================================================
Function                 Use it for
=======================  ==================================================================================
`preflight`              one report: norms per leaf, growth per layer, sharpness and the largest stable
                         learning rate, headroom in 16 bits, a clip threshold. About six compilations
`learning_rate_sweep`    an experiment: short runs at many learning rates at once
`plot`                   a picture of either
=======================  ==================================================================================

`import optax_guard` does not import this module. It needs SciPy, which comes with JAX; `pip install
rich matplotlib` adds progress bars and pictures.
"""

from optax_guard._host.logits import LayerLogits
from optax_guard.preflight._audit import plot, preflight
from optax_guard.preflight._reports import (
    ActivationReport,
    Growth,
    Headroom,
    LeafReport,
    PreflightReport,
    StableLearningRates,
)
from optax_guard.preflight._sweep import LearningRateSweep, learning_rate_sweep

__all__ = [
    "ActivationReport",
    "Growth",
    "Headroom",
    "LayerLogits",
    "LeafReport",
    "LearningRateSweep",
    "PreflightReport",
    "StableLearningRates",
    "learning_rate_sweep",
    "plot",
    "preflight",
]

"""Before the run: could I have known? One look at the loss, the gradient and the curvature where training starts.

=======================  ==================================================================================
Function                 Take it for
=======================  ==================================================================================
`preflight`              one report: norms per leaf, growth per layer, sharpness and the largest stable
                         learning rate, room left in 16 bits, a clip threshold. About six compilations
`learning_rate_sweep`    the experiment itself: short runs at many learning rates at once
`plot`                   the picture of either
=======================  ==================================================================================

Not imported by `import optax_guard`. Needs SciPy, which JAX brings; `pip install 'optax-guard[preflight]'` adds rich
for progress bars and matplotlib for pictures.
"""

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
    "LeafReport",
    "LearningRateSweep",
    "PreflightReport",
    "StableLearningRates",
    "learning_rate_sweep",
    "plot",
    "preflight",
]

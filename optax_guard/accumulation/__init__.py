"""One optimizer step from many small batches, across calls or inside one.

=====================================  ============================================================
You have                               Use
=====================================  ============================================================
a loop that calls the step each batch  `accumulate(tx, every=4)`, and `apply_gradients`
batches of unequal token counts        the same, and `weight=` the number of tokens in the call
an epoch that ends within a cycle      `flush`: a step with the micro-batches so far
a batch too large for one pass         `accumulate_gradients`, inside one call
=====================================  ============================================================
"""

from optax_guard.accumulation._calls import AccumulateState, accumulate, flush, has_updated
from optax_guard.accumulation._scan import accumulate_gradients

__all__ = [
    "AccumulateState",
    "accumulate",
    "accumulate_gradients",
    "flush",
    "has_updated",
]

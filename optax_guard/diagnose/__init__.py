"""Diagnosis of an anomaly: which operation, which leaf and which examples of the batch caused it.

=====================  =======================================================================================
Function               Use it for
=====================  =======================================================================================
`diagnose`             one bad batch, with the parameters of that moment: the first operation that produced a
                       NaN or Inf and its line, the affected leaves, the examples that cause it
`worst_examples`       a finite spike: the examples with the largest gradients
=====================  =======================================================================================

When a guard holds a step, the parameters do not change, so `diagnose(loss_fn, params, batch)` with the batch just used
reruns exactly that step. `import optax_guard` does not import this module.
"""

from optax_guard._host.logits import LayerLogits
from optax_guard.diagnose._diagnose import Diagnosis, LeafDiagnosis, WorstExamples, diagnose, worst_examples
from optax_guard.diagnose._origin import Origin

__all__ = [
    "Diagnosis",
    "LayerLogits",
    "LeafDiagnosis",
    "Origin",
    "WorstExamples",
    "diagnose",
    "worst_examples",
]

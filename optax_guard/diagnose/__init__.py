"""After an anomaly: which operation, which leaf, which examples of the batch did it.

=====================  =======================================================================================
Function               Take it for
=====================  =======================================================================================
`diagnose`             one bad batch, with the parameters of that moment: the first operation that produced a
                       NaN or Inf with its line, the leaves hit, the examples that carry it
`worst_examples`       a finite spike: the examples with the largest gradients
=====================  =======================================================================================

When a guard holds a step, the parameters are as they were, so `diagnose(loss_fn, params, batch)` on the batch just used
reruns exactly that step. Not imported by `import optax_guard`.
"""

from optax_guard.diagnose._diagnose import Diagnosis, LeafDiagnosis, WorstExamples, diagnose, worst_examples
from optax_guard.diagnose._origin import Origin

__all__ = [
    "Diagnosis",
    "LeafDiagnosis",
    "Origin",
    "WorstExamples",
    "diagnose",
    "worst_examples",
]

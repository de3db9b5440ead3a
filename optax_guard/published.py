"""Published methods as their authors wrote them, with their algorithms, arguments and defaults.

>>> import optax
>>> import optax_guard as og
>>> tx = og.guard(optax.adamw(3e-4), og.published.zclip())

The functions of the same names in `optax_guard` fix their faults: use those for training, and these to compare with the
papers. Each docstring lists the known faults and the deviations from the authors' code.

====================================================  ===========================================================
Method                                                Function
====================================================  ===========================================================
ZClip, AutoClip, AdaGC                                `zclip`, `autoclip`, `adagc`: rules
skipping in OLMo-core and MaxText                     `skip_spikes`: a rule
SPAM, Stable-SPAM                                     `spam_clip`, `stable_spam`: around the optimizer
update clipping in Levanter                           `clip_by_update_norm`: last in a chain
====================================================  ===========================================================

`tests/conformance/test_fidelity.py` compares each of them with its authors' algorithm in float64.
"""

from optax_guard.rules._published import PublishedSpikeState, adagc, autoclip, skip_spikes, zclip
from optax_guard.transforms._published import PublishedUpdateNormState, clip_by_update_norm, spam_clip, stable_spam

__all__ = [
    "PublishedSpikeState",
    "PublishedUpdateNormState",
    "adagc",
    "autoclip",
    "clip_by_update_norm",
    "skip_spikes",
    "spam_clip",
    "stable_spam",
    "zclip",
]

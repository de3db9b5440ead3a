"""Reports on a run: a picture, a page and a story from the state of a guard, and hence from any checkpoint.

=====================================  ====================================================================
Function                               Use it for
=====================================  ====================================================================
`report(state, params, path)`          an HTML page and a PNG beside it
`story(log)`                           the same in a few sentences, for a terminal or a message
`read_log(state, params)`              the numbers behind both
`save_log(path, state, params)`        a small file (.npz) to look at elsewhere; `load_log(path)` reads it
`load_checkpoint(path)`                the log in an Orbax checkpoint
=====================================  ====================================================================

On the command line: `python -m optax_guard report CHECKPOINT` and `python -m optax_guard log CHECKPOINT`.
The picture needs matplotlib, and checkpoints need orbax-checkpoint: `pip install matplotlib orbax-checkpoint`.
"""

from pathlib import Path

import optax

from optax_guard._common.typing import PyTree
from optax_guard.report._log import TrainingLog, load, load_checkpoint, load_log, read_log, save_log
from optax_guard.report._page import write_page
from optax_guard.report._story import Incident, incidents, story

__all__ = [
    "Incident",
    "TrainingLog",
    "incidents",
    "load",
    "load_checkpoint",
    "load_log",
    "read_log",
    "report",
    "save_log",
    "story",
]


def report(state: optax.OptState | TrainingLog, params: PyTree | None = None, path: str | Path = "report.html") -> Path:
    """Writes a guard's record as a self-explanatory page, with its picture as a PNG beside it.

    Args:
      state: an optimizer state that holds one guard, or a `TrainingLog`. With `og.record_leaves()` among the guard's
        rules, the page also tells which leaf left its usual range first and shows all leaves over time.
      params: the parameters (or their shapes), for the names of the leaves.
      path: where to write the page. The picture has the same name with the suffix `.png`.

    Returns:
      The path of the page, a single file that needs no network.

    Raises:
      ValueError: `state` holds no guard or more than one, nothing has been recorded yet, or `params` belong to another
        model.
      ImportError: matplotlib is missing.

    Example:
      >>> import jax.numpy as jnp, optax_guard as og, tempfile
      >>> from optax_guard.report import report
      >>> tx = og.guard(optax.sgd(0.1), og.record_leaves(), og.clip_by_global_norm(1.0))
      >>> params, state = jnp.ones(2), tx.init(jnp.ones(2))
      >>> for size in (0.1, 0.2, jnp.nan, 0.1):
      ...     params, state = og.apply_gradients(tx, jnp.full(2, size), state, params, value=jnp.array(size))
      >>> report(state, params, tempfile.mkdtemp() + "/run.html").name
      'run.html'
    """
    log = state if isinstance(state, TrainingLog) else read_log(state, params)
    return write_page(log, Path(path))

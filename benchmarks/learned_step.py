"""The meta-step with learned learning rates: its gradient by them, too.

One rate for all parameters, one for each (MAML++, Antoniou et al., 2019), or one for each entry
(Meta-SGD, Li et al., 2017). All begin at the same number, so that the steps are those of that
number, which is what they are compared with.
"""

from __future__ import annotations

import dataclasses

from benchmarks import meta_step
from benchmarks.rows import Case, Row


FORMS = ("number", "scalar", "parameter", "entry")
#: See meta_step.py.
CHECKS = {
    "float64": {"dtype": "float64", "adam": "compared"},
    "float32": {"dtype": "float32", "adam": "compared"},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A meta-step, its inner optimizer (``"sgd"`` or ``"adam"``), and what is learned."""

    meta: meta_step.Problem
    optimizer: str
    form: str


def problem(
    network: str, optimizer: str, form: str, dtype: str = "float32", adam: str = "timed"
) -> Problem:
    """Return the problem of the named network."""
    return Problem(meta_step.problem(network, dtype=dtype, adam=adam), optimizer, form)


def _case(optimizer: str, form: str) -> Case:
    options = {"network": "mlp", "optimizer": optimizer, "form": form}
    return Case(f"learned rates, {optimizer}, {form}", "learned_step", options, CHECKS)


CASES = {(o, f): _case(o, f) for o in ("sgd", "adam") for f in FORMS[1:]}
_AT_MOST = {"sgd": 1.15, "adam": 1.2}
_PEER = {"sgd": 1.15, "adam": 2.0}
ROWS = [
    Row("learned", case, "torchopt", "torchopt, a number", _AT_MOST[optimizer], at_most=True)
    for (optimizer, _), case in CASES.items()
]
ROWS += [
    Row("learned", CASES[optimizer, "parameter"], "higher", "torchopt", target)
    for optimizer, target in _PEER.items()
]

"""``torchopt.<TAB>`` shows what a user may type, each thing once; the rest can be imported."""

from __future__ import annotations

import importlib
import inspect
import rlcompleter
import subprocess
import sys
from types import ModuleType

import pytest

import torchopt


#: Public modules, and the modules that are shown in them.
MODULES: dict[str, set[str]] = {
    "torchopt": {
        *("diff", "kernels", "linear_solve", "nn", "projections", "schedules", "solvers"),
        *("typing", "visual"),
    },
    "torchopt.diff": {"implicit", "zero_order"},
    "torchopt.diff.implicit": set(),
    "torchopt.diff.zero_order": set(),
    "torchopt.kernels": set(),
    "torchopt.linear_solve": set(),
    "torchopt.nn": set(),
    "torchopt.projections": set(),
    "torchopt.schedules": set(),
    "torchopt.solvers": set(),
    "torchopt.visual": set(),
}
every_module = pytest.mark.parametrize("module", MODULES)

#: Names of TorchOpt 0.7.3 and of Optax, and what they are called here.
SECOND_NAMES = {
    "AdaDelta": "Adadelta",
    "AdaGrad": "Adagrad",
    "AdaMax": "Adamax",
    "MetaAdaDelta": "MetaAdadelta",
    "MetaAdaGrad": "MetaAdagrad",
    "MetaAdaMax": "MetaAdamax",
    "MetaRMSProp": "MetaRMSprop",
    "RMSProp": "RMSprop",
    "exponential_decay": "schedules.exponential_decay",
    "linear_schedule": "schedules.linear",
    "module_detach_": "stop_gradient",
    "polynomial_schedule": "schedules.polynomial",
    "schedule": "schedules",
    "schedules.join_schedules": "schedules.join",
    "schedules.warmup_cosine_decay_schedule": "schedules.warmup_cosine",
}


def completions(text: str) -> list[str]:
    """Return what Python's own prompt offers after a text that ends in a dot."""
    completer, found = rlcompleter.Completer({"torchopt": torchopt}), []
    while (match := completer.complete(text, len(found))) is not None:
        found.append(match.removeprefix(text).rstrip("()"))
    return found


def followed(name: str) -> object:
    """Return what a dotted name stands for in ``torchopt``."""
    value: object = torchopt
    for part in name.split("."):
        value = getattr(value, part)
    return value


@every_module
def test_what_is_offered_is_public_and_has_that_name(module: str) -> None:
    found = completions(f"{module}.")
    values = {name: getattr(importlib.import_module(module), name) for name in found}
    modules = {name for name, value in values.items() if isinstance(value, ModuleType)}
    assert modules == MODULES[module]
    for name in values.keys() - modules:
        value = values[name]
        assert value.__name__ == name
        assert value.__module__.startswith("torchopt.")
        assert inspect.getdoc(value)
    assert len({id(value) for value in values.values()}) == len(values) > 0


@every_module
def test_nothing_public_is_missing(module: str) -> None:
    """What ``from module import *`` gives, or what is written there as ``import x as x``."""
    value = importlib.import_module(module)
    shown = {id(getattr(value, name)) for name in dir(value)}
    if module == "torchopt":
        shown |= {id(getattr(value.schedules, name)) for name in dir(value.schedules)}
    for name in getattr(value, "__all__", ()):
        assert id(getattr(value, name)) in shown, name
    assert "solve_cg" in dir(torchopt.linear_solve)
    assert {"LBFGS", "minimize", "Unrolled"} <= set(dir(torchopt.solvers))
    assert {"make_dot", "show", "explain"} <= set(dir(torchopt.visual))


def test_only_the_aliases_are_shown_of_typing() -> None:
    expected = {"Hyperparameter", "PyTree", "Schedule", "Step", "TensorTree"}
    assert set(completions("torchopt.typing.")) == expected


@pytest.mark.parametrize(("second", "first"), SECOND_NAMES.items())
def test_second_names_are_there_and_not_shown(second: str, first: str) -> None:
    assert followed(second) is followed(first)
    owner, _, name = f"torchopt.{second}".rpartition(".")
    module = importlib.import_module(owner)
    assert name not in dir(module)
    assert name in module.__all__
    scope: dict[str, object] = {}
    exec(f"from {owner} import {name} as a\nfrom {owner} import *", scope)
    assert scope["a"] is scope[name] is followed(first)


WHEN = """
import torchopt
names = ("diff", "nn", "linear_solve", "solvers", "schedules", "projections", "visual", "typing")
modules = [torchopt, *(getattr(torchopt, name) for name in names)]
before = [dir(module) for module in modules]
for module in modules:
    for name in dir(module):
        getattr(module, name)
import torchopt.core.engine, torchopt.diff.adjoints.base, torchopt.nn.sites, torchopt.schedule
from torchopt.optim.meta import MetaAdam
from torchopt.typing import EmptyState
assert [dir(module) for module in modules] == before
"""


def test_it_does_not_depend_on_what_has_been_imported() -> None:
    done = subprocess.run([sys.executable, "-c", WHEN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

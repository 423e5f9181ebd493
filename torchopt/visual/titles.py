"""What a chain of transformations is called in a picture: by the optimizers of the library."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from torchopt import optimizers
from torchopt.optim.optimizer import Optimizer


#: Signs and learning rates say little, and weight decay only where an optimizer has it.
_SILENT = ("FlipSign", "ScaleByLearningRate")
_DECAY = "AddDecayedWeights"


def optimizer_name(parts: Sequence[str]) -> str:
    """Return the usual name of a chain, from the names of the classes of its parts.

    What consists of the parts of an optimizer of ``torchopt.optimizers`` has its name, whatever it
    is chained with; so a new optimizer there is known here.

    Example:
        >>> optimizer_name(["ClipGradNorm", "FlipSign", "ScaleByAdam", "AddDecayedWeights"])
        'ClipGradNorm + AdamW'
    """
    parts = tuple(parts)
    known, rules = _known()
    names, position = [], 0
    while position < len(parts):
        for length in range(len(parts) - position, 0, -1):
            name = known.get(parts[position : position + length])
            if name is not None:
                names.append(name)
                position += length
                break
        else:
            part = parts[position]
            if part not in (*_SILENT, _DECAY):
                names.append(rules.get(part, re.sub("^ScaleBy(?=[A-Z])", "", part)))
            position += 1
    return " + ".join(names) or "SGD"


def _telling(parts: Sequence[str]) -> tuple[str, ...]:
    """Return a chain from its first to its last part that says something.

    Signs and rates at its ends stand in other chains, or not; one inside (LARS) belongs to it.
    """
    places = [k for k, part in enumerate(parts) if part not in _SILENT]
    return tuple(parts[places[0] : places[-1] + 1]) if places else ()


@functools.cache
def _known() -> tuple[dict[tuple[str, ...], str], dict[str, str]]:
    """Return the names of chains, by their telling parts, and of rules by themselves."""
    chains: dict[tuple[str, ...], str] = {}
    without_decay: dict[tuple[str, ...], str] = {}
    rules: dict[str, str] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(optimizers.__path__)):
        module = importlib.import_module(f"{optimizers.__name__}.{name}")
        for title, recipe in _recipes(module):
            for part in (parts := recipe().parts):
                if type(part).__module__ == module.__name__:
                    rules.setdefault(type(part).__name__, title)
            telling = _telling([type(part).__name__ for part in parts])
            chains.setdefault(telling, title)
            plain = tuple(part for part in telling if part != _DECAY)
            without_decay.setdefault(plain, title)  # of Adam and AdamW it is Adam
    return {**without_decay, **chains}, rules


def _recipes(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the named classes of a file and the recipes that they take their arguments from."""
    for title, cls in vars(module).items():
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            recipe = getattr(vars(cls).get("__init__"), "recipe", None)
            if recipe is not None and not _required(recipe):
                yield title, recipe


def _required(recipe: Callable[..., Any]) -> bool:
    parameters = inspect.signature(recipe).parameters.values()
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in starred for p in parameters)

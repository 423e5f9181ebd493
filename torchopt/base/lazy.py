"""Public names: imported when they are first asked for, and shown, each thing once.

Which ones there are, and where, stands in the stub beside the package's ``__init__.py``, which type
checkers and editors read: an import line for each name. So the list is written once. Something's
second names, of TorchOpt 0.7.3 and Optax, are assignments there: ``AdaMax = Adamax``.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Names(NamedTuple):
    """What a stub says: where each public name is and what it is called there."""

    places: dict[str, tuple[str, str]]
    shown: list[str]  # without second names


def names_of_stub(package: str) -> Names:
    """Return the public names of a package.

    Raises:
        ImportError: If the stub is missing: the package is not installed as a whole.
    """
    try:
        source = pkgutil.get_data(package, "__init__.pyi")  # from archives, too
    except OSError:
        source = None
    if source is None:
        raise ImportError(
            f"{package} lacks its file __init__.pyi, which lists its public names; reinstall it."
        )
    statements = ast.parse(source).body
    places = {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in statements
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    shown = sorted(places)
    for node in statements:
        if isinstance(node, ast.Assign) and isinstance(second := node.targets[0], ast.Name):
            module, _, name = ast.unparse(node.value).rpartition(".")
            places[second.id] = (".".join(places[module]), name) if module else places[name]
    return Names(places, shown)


def imported(module: str, name: str) -> Any:
    """Return what a module has under a name: a value of its own, or a module in it."""
    found = vars(importlib.import_module(module))  # not getattr, which may ask here again
    return found[name] if name in found else importlib.import_module(f"{module}.{name}")


def shown(module: ModuleType) -> Callable[[], list[str]]:
    """Return a ``__dir__`` for a module whose names are there: what a user may type.

    That is what ``__all__`` lists, or else what it imports from the library for others to use; each
    thing once. Files of a package and second names are left out. They can be imported.
    """

    def names() -> list[str]:
        own = vars(module)
        public = own.get("__all__") or [
            name
            for name, value in own.items()
            if not (name.startswith("_") or isinstance(value, ModuleType))
        ]
        better = {name: getattr(own[name], "__name__", name) for name in public}
        return sorted(n for n, b in better.items() if n == b or own.get(b) is not own[n])

    return names


def public(module: ModuleType) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a package by its stub.

    A ``__getattr__`` that the package gets later, for names of an older version, is to be put
    around this one.
    """
    names = names_of_stub(module.__name__)

    def find(name: str) -> Any:
        if name not in names.places:
            raise AttributeError(
                f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module
            )
        value = imported(*names.places[name])
        setattr(module, name, value)
        return value

    return find, lambda: list(names.shown), list(names.places)

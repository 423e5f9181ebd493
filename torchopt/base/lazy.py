"""Public names: imported when they are first asked for, and shown, each thing once.

Which ones there are, and where, stands in the stub beside the package's ``__init__.py``, which type
checkers and editors read: an import line for each name. So the list is written once.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def names_of_stub(package: str) -> dict[str, tuple[str, str]]:
    """Return the public names of a package: where each is, and what it is called there.

    Raises:
        ImportError: If the stub is missing: the package is not installed as a whole.
    """
    try:
        source = pkgutil.get_data(package, "__init__.pyi")  # from archives, too
    except OSError:
        source = None
    if source is None:
        raise ImportError(
            f"{package} lacks its file __init__.pyi, which lists its public names; install it anew."
        )
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imported(module: str, name: str) -> Any:
    """Return what a module has under a name: a value of its own, or a module in it."""
    found = vars(importlib.import_module(module))  # not getattr, which may ask here again
    return found[name] if name in found else importlib.import_module(f"{module}.{name}")


def second_names(package: str, names: Mapping[str, tuple[str, str]]) -> set[str]:
    """Return those of a package's public names that something with a better name has, too.

    It is called so in Optax or was in TorchOpt 0.7.3: it stands here under the name that it has in
    its file, or in a package that is public itself.
    """
    packages = {f"{module}.{name}" for module, name in names.values() if module == package}
    return {
        name
        for name, (module, own) in names.items()
        if module in packages or (name != own and names.get(own) == (module, own))
    }


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
        if name not in names:
            raise AttributeError(
                f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module
            )
        value = imported(*names[name])
        setattr(module, name, value)
        return value

    taught = sorted(names.keys() - second_names(module.__name__, names))
    return find, lambda: list(taught), list(names)

"""The public symbols of the library: what they are called, and where their pages are."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torchopt


@dataclass
class Symbol:
    """One public object with all names it has."""

    name: str  # with its module, such as torchopt.schedules.linear
    value: Any
    aliases: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        """The public module it is found in."""
        return self.name.rpartition(".")[0]

    @property
    def short(self) -> str:
        """The name without ``torchopt.``."""
        return self.name.removeprefix("torchopt.")

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.value) or "").strip().split("\n\n")[0].replace("\n", " ")


def reexported(module: ModuleType) -> list[str]:
    """Return the names that a module re-exports: ``__all__``, or ``from a import b as c``."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    tree = ast.parse(Path(inspect.getfile(module)).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.asname for node in imports for alias in node.names if alias.asname]
    return [name for name in names if not name.startswith("_")]


def own_names(module: ModuleType) -> list[str]:
    """Return the names of functions and classes that a module defines, aliases included."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def public_modules() -> list[ModuleType]:
    """Return torchopt, the modules that it shows, and packages that re-export names.

    The aliases of ``torchopt.typing`` have a page of their own.
    """
    shown = [getattr(torchopt, name) for name in reexported(torchopt) if name != "typing"]
    modules = [torchopt, *(value for value in shown if inspect.ismodule(value))]
    for package in pkgutil.walk_packages(torchopt.__path__, "torchopt."):
        if package.ispkg and "._" not in package.name:
            module = importlib.import_module(package.name)
            modules += [module] if reexported(module) else []
    return list(dict.fromkeys(modules))


def public_names() -> dict[str, Any]:
    """Return every public name with what it stands for; modules aside."""
    found: dict[str, Any] = {}
    for module in public_modules():
        for name in dict.fromkeys([*reexported(module), *own_names(module)]):
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = value
    return found


@functools.cache  # asked for by every link to a symbol
def symbols() -> list[Symbol]:
    """Return the public objects, each once, under the name to teach."""
    by_object: dict[int, Symbol] = {}
    for name, value in public_names().items():
        if id(value) not in by_object:
            by_object[id(value)] = Symbol(name, value)
        else:
            by_object[id(value)].aliases.append(name)
    for symbol in by_object.values():
        names = [symbol.name, *symbol.aliases]
        # a schedule is taught under torchopt.schedules, an alias not at all
        symbol.name = min(names, key=lambda n: _rank(n, symbol.value))
        symbol.aliases = [name for name in names if name != symbol.name]
    return sorted(by_object.values(), key=lambda s: s.name)


def _rank(name: str, value: Any) -> tuple[bool, bool]:
    module, _, last = name.rpartition(".")
    return last != value.__name__, module != value.__module__

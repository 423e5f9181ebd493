"""Which argument of a solver is which argument of its condition."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from torchopt.base import tree
from torchopt.base.levels import is_tracked
from torchopt.base.misuse.given import given, short
from torchopt.diff.implicit.condition import Argument


#: Positions or names of arguments.
Argnums = Union[int, str, Sequence[Union[int, str]]]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Binding:
    """How the calls of a solver become calls of its condition.

    Args:
        solver: Called with the start first.
        condition: Called with the solution first.
        argnums: What the solution is differentiated by, as positions or names in the call of the
            solver.

    Raises:
        TypeError: If an argument is no function, or ``argnums`` no integers or names.
        ValueError: If ``argnums`` names the start, or what the solver has not.
    """

    def __init__(
        self, solver: Callable[..., Any], condition: Callable[..., Any], argnums: Argnums
    ) -> None:
        self.solver, self.condition = solver, condition
        self.signature = inspect.signature(solver)
        self.argnums = argnums
        self.entries = check_argnums(argnums)
        params = list(self.signature.parameters.values())
        self.names = [p.name for p in params if p.kind in _POSITIONAL]
        self.open = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in params)
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in params)
        for entry in self.entries:
            absent = (
                entry >= len(self.names) and not self.open
                if isinstance(entry, int)
                else entry not in self.signature.parameters and not takes_all
            )
            if absent:
                raise ValueError(
                    f"argnums={short(argnums)} names an argument that {self._called} has not."
                )
            if isinstance(entry, str) and self.names[:1] == [entry]:
                raise ValueError(_START)
        self._read(condition)

    @property
    def _called(self) -> str:
        return f"the solver {getattr(self.solver, '__name__', 'given')}{self.signature}"

    def _read(self, condition: Callable[..., Any]) -> None:
        """Find out what the condition takes, and whether the two agree."""
        try:
            self.other: inspect.Signature | None = inspect.signature(condition)
        except (TypeError, ValueError):  # of a function that is not written in Python
            self.other = None
            return
        params = list(self.other.parameters.values())
        self.other_names = [p.name for p in params if p.kind in _POSITIONAL]
        self.other_open = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in params)
        self.other_keywords = [p.name for p in params if p.kind is inspect.Parameter.KEYWORD_ONLY]
        self.other_takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in params)
        if not self.other_names and not self.other_open:
            raise TypeError(
                f"The condition {given(condition)}{self.other} must take the solution as its first "
                "argument."
            )
        mine, others = self.names[1:], self.other_names[1:]
        same = set(mine) == set(others) and len(mine) == len(others)
        if same and mine != others:
            raise ValueError(
                f"{self._called[0].upper()}{self._called[1:]} and the condition "
                f"{getattr(condition, '__name__', 'given')}{self.other} have the same arguments in "
                "another order. Give both the same order, so that none is taken for another."
            )
        #: Whether arguments are matched by name; else by position.
        self.by_name = bool(others) and set(others) <= set(mine) and not self.other_open

    def __call__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any], list[Argument]]:
        """Return the solver's arguments, its keywords, and the condition's arguments.

        Raises:
            TypeError: If the solver or the condition does not take them.
            ValueError: If ``argnums`` names what was not given.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._called}: {error}") from None
        bound.apply_defaults()
        positional, keywords = self._in_order(bound)
        if not positional:
            raise TypeError(f"{self._called} must take the start as its first positional argument.")
        self._check_given(positional, keywords)
        if self.other is None:
            found = [self._made(i, i - 1, name, v) for i, (name, v) in enumerate(positional) if i]
            found += [self._made(name, name, name, v) for name, v in keywords.items()]
        else:
            found = self._matched(positional, keywords)
        return [value for _, value in positional], keywords, found

    def _in_order(
        self, bound: inspect.BoundArguments
    ) -> tuple[list[tuple[str | None, Any]], dict[str, Any]]:
        positional: list[tuple[str | None, Any]] = []
        keywords: dict[str, Any] = {}
        for name, p in self.signature.parameters.items():
            value = bound.arguments[name]
            if p.kind in _POSITIONAL:
                positional.append((name, value))
            elif p.kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend((None, x) for x in value)
            elif p.kind is inspect.Parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                keywords.update(value)
        return positional, keywords

    def _check_given(self, positional: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        names = {name for name, _ in positional} | set(keywords)
        for entry in self.entries:
            if entry >= len(positional) if isinstance(entry, int) else entry not in names:
                raise ValueError(
                    f"argnums={short(self.argnums)} is out of range: {self._called} was called "
                    f"with {len(positional)} positional arguments"
                    f"{f' and {sorted(keywords)}' if keywords else ''}."
                )

    def _made(self, mine: int | str, key: int | str, name: str | None, value: Any) -> Argument:
        wanted = mine in self.entries or name in self.entries
        return Argument(key, value, wanted, repr(name) if name else f"its argument {mine}")

    def _matched(
        self, positional: Sequence[tuple[str | None, Any]], keywords: Mapping[str, Any]
    ) -> list[Argument]:
        """Match by name where all names are known, else by position; keywords always by name."""
        by_position: dict[int, Argument] = {}
        by_keyword: list[Argument] = []
        for i, (name, value) in enumerate(positional):
            if i == 0:
                continue
            if self.by_name and name in self.other_names[1:]:
                k = self.other_names.index(name)
                by_position[k] = self._made(i, k, name, value)
            elif not self.by_name and (i < len(self.other_names) or self.other_open):
                by_position[i] = self._made(i, i, name, value)
            elif name in self.other_keywords or (name and self.other_takes_all):
                by_keyword.append(self._made(i, name, name, value))
            else:
                self._leave_out(self._made(i, i, name, value))
        for name, value in keywords.items():
            made = self._made(name, name, name, value)
            if name in self.other_names[1:]:
                k = self.other_names.index(name)
                if k in by_position:
                    raise TypeError(f"{self._conflict} both give {name!r}.")
                by_position[k] = made._replace(key=k)
            elif name in self.other_keywords or self.other_takes_all:
                by_keyword.append(made)
            else:
                self._leave_out(made)
        ordered = [by_position[k] for k in sorted(by_position)]
        for k, argument in enumerate(ordered, 1):
            if argument.key != k:  # one in between has its default: the rest go by name
                ordered[k - 1] = argument._replace(key=self.other_names[int(argument.key)])
        return [*ordered, *by_keyword]

    @property
    def _conflict(self) -> str:
        name = getattr(self.condition, "__name__", "given")
        return f"{self._called} and its condition {name}{self.other}"

    def _leave_out(self, argument: Argument) -> None:
        """Accept that the condition is not given what only the solver knows, such as a limit."""
        if argument.wanted or any(map(is_tracked, tree.flatten(argument.value)[0])):
            reason = "argnums names it" if argument.wanted else "it requires grad"
            raise TypeError(
                f"The condition {getattr(self.condition, '__name__', 'given')}{self.other} has no "
                f"place for {argument.name} of {self._called}, but {reason}. Give the condition "
                "an argument of that name."
            )


_START = (
    "argnums names the start of the solver (0, its first argument), by which a solution has no "
    "derivative: it satisfies the same condition wherever the solver began. Positions count from "
    "0, so the argument after the start is 1. To differentiate by the start, record the steps "
    "(torchopt.inner_loop), or add a term to the objective that depends on it."
)


def check_argnums(argnums: Argnums) -> tuple[int | str, ...]:
    """Return ``argnums`` as a tuple.

    Raises:
        TypeError: If it holds something else than integers and names.
        ValueError: If it is empty, negative, or names the start.
    """
    entries = (argnums,) if isinstance(argnums, (int, str)) else argnums
    if not isinstance(entries, Sequence) or not all(
        isinstance(x, (int, str)) and not isinstance(x, bool) for x in entries
    ):
        raise TypeError(
            f"argnums must be a position, a name, or a tuple of them, got {given(argnums)}. Write "
            "argnums=1 for the argument after the start."
        )
    if 0 in entries:
        raise ValueError(_START)
    if not entries or any(isinstance(x, int) and x < 0 for x in entries):
        raise ValueError(
            f"argnums must hold positions from 1 on, got {short(argnums)}. Write argnums=1 for the "
            "argument after the start."
        )
    return tuple(entries)

"""Options of the examples: what they have in common, how they are read, and ``--quick``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from common.endings import refuse


THREADS = "CPU threads; one is faster than two for tensors this small"
QUICK = "run for a few seconds, just to check that everything works; unless you set them: "


class Parser(argparse.ArgumentParser):
    """Reads a command line; what is wrong with it is said in one line.

    Args:
        name: What a user types.
        description: One line for ``--help``.
        quick: With ``--quick``, the values of options that are not given. ``None``: there is no
            such option.
        output: The folder, or the file, for results.
    """

    def __init__(
        self, name: str, description: str, quick: Mapping[str, Any] | None, output: Path
    ) -> None:
        super().__init__(prog=name, description=description, formatter_class=_Help)
        self._quick, self._output = quick, output
        if quick is not None:
            self.add_argument("--quick", action="store_true", help=QUICK + _typed(quick))

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an option; in ``--help`` its value is called by its kind."""
        kind = METAVARS.get(options.get("type"))
        if kind is not None and "choices" not in options and names[0].startswith("-"):
            options.setdefault("metavar", kind)
        return super().add_argument(*names, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        """Read the options; ``--quick`` changes defaults, so that what is given counts.

        A quick run has a folder or file of its own, in which a new one replaces the one before.
        """
        given = super().parse_args(args, namespace)
        if self._quick is None or not given.quick:
            return given
        own = self._output.with_name(f"{self._output.stem}-quick{self._output.suffix}")
        self.set_defaults(**self._quick, output=own)
        given = super().parse_args(args, namespace)
        if "overwrite" in given:
            given.overwrite = given.overwrite or (given.output == own and not given.resume)
        return given

    def error(self, message: str) -> NoReturn:
        """End with one line."""
        refuse(f"{self.prog}: {message} (--help lists the options)")


class _Help(argparse.HelpFormatter):
    """Shows defaults as a user types them, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return text
        return f"{text} (default {_as_typed(default)})"


def _as_typed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(repr(str(v)) if " " in str(v) else str(v) for v in values)


def _typed(options: Mapping[str, Any]) -> str:
    """Return options as a user would type them."""
    words = (f"--{name.replace('_', '-')} {_as_typed(v)}" for name, v in options.items())
    return ", ".join(words)


def parser(
    name: str,
    description: str,
    quick: Mapping[str, Any] | None = None,
    threads: str = THREADS,
) -> Parser:
    """Return a parser with the options that every example has.

    Args:
        name: The example's name; its results go to ``runs/NAME``.
        description: One line for ``--help``.
        quick: See :class:`Parser`.
        threads: What ``--help`` says of ``--threads``.
    """
    output = Path("runs") / name
    result = Parser(name, description, quick, output)
    add = result.add_argument
    add("--seed", type=whole, default=0, help="seed of everything random")
    add("--device", type=device, default="cpu", help="where to compute, such as cpu or cuda:0")
    add("--threads", type=positive_int, default=1, help=threads)
    add("--output", type=Path, default=output, help="folder for all results")
    add("--resume", action="store_true", help="continue the run in the output folder")
    add("--overwrite", action="store_true", help="replace the run in the output folder")
    return result


def by_choice(defaults: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Return the default of an option for each choice of another one, in words.

    Args:
        defaults: Names and values for each choice.
        name: Of the option.
    """
    values = {_as_typed(choice): _as_typed(own[name]) for choice, own in defaults.items()}
    if len(set(values.values())) == 1:
        return f"(default {next(iter(values.values()))})"
    return f"(default {', '.join(f'{choice} {value}' for choice, value in values.items())})"


def listed(names: Iterable[str]) -> str:
    """Return choices as a user types them, for ``--help``."""
    return ", ".join(_as_typed(name) for name in names)


# What an option may be ----------------------------------------------------------------------------


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def whole(text: str) -> int:
    """Read a whole number >= 0."""
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive_int(text: str) -> int:
    """Read a whole number >= 1."""
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def two_or_more(text: str) -> int:
    """Read a whole number >= 2."""
    value = _integer(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {value}")
    return value


def positive_float(text: str) -> float:
    """Read a number > 0."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be > 0, got {value}")
    return value


def non_negative_float(text: str) -> float:
    """Read a number >= 0."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {value}")
    return value


def share(text: str) -> float:
    """Read a number strictly between 0 and 1."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be strictly between 0 and 1, got {value}")
    return value


def device(text: str) -> torch.device:
    """Read the name of a device that this machine has."""
    try:
        result = torch.device(text)
        torch.empty(0, device=result)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return result


#: What ``--help`` calls a value.
METAVARS: dict[Any, str] = {
    **dict.fromkeys((whole, positive_int, two_or_more), "N"),
    **dict.fromkeys((positive_float, non_negative_float, share), "X"),
    device: "DEVICE",
    Path: "DIR",
}

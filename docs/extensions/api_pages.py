"""One page for each public symbol: signature, equation, arguments, executed example."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import torchopt
import torchopt.typing as typing
from extensions.files import Folder
from extensions.symbols import Symbol, symbols
from extensions.transcripts import transcript


CLASS_OF_RECIPE = re.compile(r":func:`torchopt\.(\w+)` as ")
EXAMPLES = {
    "params": """
        import torch, torchopt
        parameter = torch.tensor([[1.0, -2.0]], requires_grad=True)
        optimizer = torchopt.{name}([parameter], lr=0.1)
        parameter.square().sum().backward()
        optimizer.step()
        parameter.detach()
        """,
    "closure": """
        import torch, torchopt
        parameter = torch.tensor([[1.0, -2.0]], requires_grad=True)
        optimizer = torchopt.{name}([parameter], lr=0.1)
        def closure():
            optimizer.zero_grad()
            loss = parameter.square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        parameter.detach()
        """,
    "module": """
        import torch, torchopt
        net = torch.nn.Linear(2, 1, bias=False)
        lr = torch.tensor(0.1, requires_grad=True)
        start, x = net.weight, torch.ones(4, 2)
        inner = torchopt.{name}(net, lr=lr)
        for _ in range(2):
            inner.step(net(x).square().mean())

        outer_loss = net(x).square().mean()
        [grad.shape for grad in torch.autograd.grad(outer_loss, [start, lr])]
        """,
}


def recipe_of(value: Any) -> Callable[..., Any] | None:
    """Return the function that a named class takes its arguments from."""
    match = CLASS_OF_RECIPE.match(value.__doc__ or "") if inspect.isclass(value) else None
    return getattr(torchopt, match[1]) if match else None


def page_of(symbol: Symbol) -> str:
    """Return the name of a page; ``Adam`` and ``adam`` differ on every file system."""
    kind = "-class" if symbol.name.rpartition(".")[2][0].isupper() else ""
    return f"{symbol.name}{kind}"


# Groups ----------------------------------------------------------------------------------------

GROUPS = {
    "Functional optimizers": "Recipes: functions that return a transformation of gradients.",
    "Object-oriented optimizers": "Subclasses of `torch.optim.Optimizer`, which change parameters "
    "in place. Methods and attributes are those of `torchopt.Optimizer`.",
    "Differentiable optimizers": "Put new tensors into a network, connected by the graph to the "
    "old ones. Methods and attributes are those of `torchopt.MetaOptimizer`.",
    "Inner loops and state": "Adapt, extract, recover, cut, clone.",
    "Transformations": "The parts that `torchopt.chain` puts together.",
    "Schedules": "Functions of the update count, for any hyperparameter; in `torchopt.schedules`.",
    "Core": "What everything else is made of.",
    "Solvers": "Minimise functions, or find roots, fixed points and least squares; they call them "
    "as often as they need; in `torchopt.solvers`.",
    "Linear systems": "Solve with an operator that is known by its products; in "
    "`torchopt.linear_solve`.",
    "Ways to differentiate": "How an inner problem is differentiated; in `torchopt.diff` and "
    "`torchopt.nn`.",
    "Visualization": "See the graph that a gradient flows through, and why it does not arrive.",
    "Fused kernels": "Whether and why updates are computed by kernels.",
}


def group_of(symbol: Symbol) -> str:
    """Return the heading that a symbol stands under."""
    value, module = symbol.value, symbol.value.__module__
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer):
        return "Object-oriented optimizers"
    if inspect.isclass(value) and issubclass(value, torchopt.MetaOptimizer):
        return "Differentiable optimizers"
    if module.startswith("torchopt.optimizers"):
        last = symbol.name.rpartition(".")[2]
        return "Transformations" if last.startswith("scale_by") else "Functional optimizers"
    if module.startswith("torchopt.transforms") or value is torchopt.chain:
        return "Transformations"
    if module in ("torchopt.nn.snapshot", "torchopt.optim.inner_loop", "torchopt.optim.learned"):
        return "Inner loops and state"
    if symbol.module == "torchopt.schedules":
        return "Schedules"
    if symbol.module == "torchopt.solvers":
        return "Solvers"
    if symbol.module == "torchopt.linear_solve":
        return "Linear systems"
    if symbol.module in ("torchopt.diff", "torchopt.nn"):
        return "Ways to differentiate"
    if symbol.module == "torchopt.visual":
        return "Visualization"
    if symbol.module == "torchopt.kernels" or module == "torchopt.core.accelerated_op":
        return "Fused kernels"
    return "Core" if symbol.module == "torchopt" else f"`{symbol.module}`"


def relatives(symbol: Symbol, everything: list[Symbol]) -> list[Symbol]:
    """Return the other faces of the same optimizer."""
    recipe = recipe_of(symbol.value) or symbol.value
    same = [s for s in everything if s.value is recipe or recipe_of(s.value) is recipe]
    return [s for s in same if s is not symbol]


# Pages -----------------------------------------------------------------------------------------


def write(root: Path, pages: Folder) -> None:
    """Write the pages of all symbols, their index, and the page of the type aliases."""
    everything = symbols()
    for symbol in everything:
        pages.write(f"{page_of(symbol)}.rst", _page(symbol, everything))
    pages.write("types.rst", _types())
    pages.write("extending.rst", EXTENDING)
    pages.write("index.md", _index(everything))


def _heading(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n\n"


def _page(symbol: Symbol, everything: list[Symbol]) -> str:
    directive = "autoclass" if inspect.isclass(symbol.value) else "autofunction"
    text = _heading(symbol.short) + f".. {directive}:: {symbol.name}\n"
    if directive == "autoclass" and (recipe_of(symbol.value) is None or _methods(symbol.value)):
        text += "   :members:\n"
        if any(
            base.__module__.startswith("torchopt.") and all(s.value is not base for s in everything)
            for base in symbol.value.__bases__
        ):
            text += "   :inherited-members:\n"  # what a class without a page of its own defines
    for internal in _returned(symbol.value, everything):
        text += f"\n.. autoclass:: {internal.__module__}.{internal.__name__}\n   :members:\n"
    if symbol.aliases:
        text += "\nAlso called " + ", ".join(f"``{name}``" for name in symbol.aliases) + ".\n"
    others = relatives(symbol, everything)
    if others:
        text += "\n.. rubric:: The same optimizer in the other APIs\n\n"
        text += "".join(f"* :py:obj:`{s.name}`\n" for s in others)
    return text


def _methods(value: type) -> list[str]:
    """Return the names of the public methods that a class defines itself."""
    return [name for name, x in vars(value).items() if inspect.isfunction(x) and name[0] != "_"]


def _returned(value: Any, everything: list[Symbol]) -> list[type]:
    """Return the class of what a function returns, if it is ours and has no page of its own."""
    if inspect.isclass(value):
        return []
    hint = inspect.get_annotations(value).get("return")
    module = sys.modules[value.__module__]
    kind = getattr(module, hint, None) if isinstance(hint, str) else hint
    ours = inspect.isclass(kind) and kind.__module__.startswith("torchopt.")
    return [kind] if ours and all(s.value is not kind for s in everything) else []


def _types() -> str:
    text = f"{_heading('Types')}Aliases in signatures, from ``torchopt.typing``.\n"
    comments = ModuleAnalyzer.for_module("torchopt.typing").find_attr_docs()
    for name in typing.__all__:
        comment = " ".join(comments["", name])
        text += f"\n.. py:data:: torchopt.typing.{name}\n\n   {comment}\n"
    return text


EXTENDING = """\
Rules of your own
=================

A rule is a class decorated with :func:`torchopt.transformation`; see there for an example. It
derives from :class:`torchopt.ElementwiseTransformation` (a rule of each entry, which can be fused),
:class:`torchopt.TensorTransformation` (of each tensor) or
:class:`torchopt.GradientTransformation` (of all tensors).

* Hyperparameters are fields made by :func:`torchopt.hyper`, :func:`torchopt.flag` and
  :func:`torchopt.choice`; what they may be is a :class:`torchopt.HyperSpec`.
* Buffers are declared as :class:`torchopt.Slot`, and numbers that are kept with them as
  :class:`torchopt.Counter`.
"""


def _index(everything: list[Symbol]) -> str:
    text = "# API reference\n\nOne page for each public name. Every example on them is run when "
    text += "the site is built and in the tests.\n"
    found = list(dict.fromkeys([*GROUPS, *(group_of(s) for s in everything)]))
    everything = sorted(everything, key=lambda s: found.index(group_of(s)))
    for group in found:
        members = [s for s in everything if group_of(s) == group]
        if not members:
            continue
        text += f"\n## {group}\n\n{GROUPS.get(group, '')}\n\n| | |\n| --- | --- |\n"
        for s in members:
            also = "".join(f" `{a.removeprefix('torchopt.')}`" for a in s.aliases)
            also = f"<br>also{also}" if also else ""
            text += f"| [`{s.short}`]({page_of(s)}.rst) | {_as_markdown(s.summary)}{also} |\n"
    text += "\n## More\n\n* [Aliases in signatures](types.rst)\n"
    text += "* [Rules of your own](extending.rst): how to declare hyperparameters\n"
    entries = "\n".join(f"{s.short} <{page_of(s)}>" for s in everything)
    entries += "\nRules of your own <extending>\nTypes <types>"
    return f"{text}\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def _as_markdown(summary: str) -> str:
    """Return a one-line docstring, which is reStructuredText, as Markdown."""
    summary = re.sub(r":math:`([^`]*)`", lambda m: f"${m[1]}$", summary)
    summary = re.sub(r":\w+:`([^`]*)`", r"`\1`", summary)
    summary = summary.replace("``", "`").replace("|", r"\|")
    return re.sub(r"(https?://[^\s),;]*[^\s),;.])", r"<\1>", summary)


# Docstrings ------------------------------------------------------------------------------------


def complete_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Give a named class, which has the arguments of its recipe, an executed example."""
    for index, line in enumerate(lines):
        lines[index] = re.sub(r"^(Slots):", r"**\1:**", line)
    recipe = recipe_of(value)
    if recipe is None or what != "class" or "Example:" in (value.__doc__ or ""):
        return  # the last: one whose arguments are others than those of its recipe says it itself
    first = "module" if issubclass(value, torchopt.MetaOptimizer) else "params"
    # a rule that reads the loss gets it from a closure
    way = "closure" if first == "params" and "step(closure)" in (value.__doc__ or "") else first
    example = transcript(inspect.cleandoc(EXAMPLES[way]).format(name=value.__name__))
    place = lines.index("Reference:") if "Reference:" in lines else len(lines)
    lines[place:place] = ["", "Example:", *(f"    {line}" for line in example.splitlines()), ""]


def name_aliases(
    app: Sphinx,
    what: str,
    name: str,
    value: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Write an alias inside another type by its name (Sphinx shows how it holds it)."""

    def plain(text: str | None) -> str | None:
        return text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)

    return plain(signature), plain(returns)


def resolve_internal_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> nodes.Node | None:
    """Resolve ``torchopt.core.transform.GradientTransformation`` to the page of the public name."""
    if node.get("refdomain") != "py":
        return None
    name, domain = node["reftarget"], env.domains["py"]
    # a name by itself is one of the public ones, of the module of its page, or of a type alias
    rooms = ("", "schedules.", "typing.", "diff.", "nn.", "linear_solve.", "solvers.")
    spellings = [name, *(f"torchopt.{room}{name}" for room in rooms)]
    value = next(filter(None, map(_look_up, spellings)), None)
    for symbol in symbols():
        if value is not None and symbol.value is value:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", symbol.name, node, contnode
            )
    alias = f"torchopt.typing.{name.rpartition('.')[2]}"
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", alias, node, contnode)


def _look_up(name: str) -> Any:
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last, None) if module else None
    except ImportError:
        return None


# Examples --------------------------------------------------------------------------------------


def failing_examples(everything: list[Symbol]) -> list[str]:
    """Run the examples in docstrings; return what is wrong with them."""
    problems = []
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    for symbol in everything:
        if recipe_of(symbol.value) is not None:
            continue  # its example is run when its page is written
        tests = finder.find(symbol.value, symbol.name, globs={})
        if not any(test.examples for test in tests):
            problems.append(f"{symbol.name} has no example in its docstring.")
        for test in tests:
            report: list[str] = []
            if runner.run(test, out=report.append).failed:
                problems.append(f"The example of {symbol.name} fails:\n{''.join(report)}")
    return problems

"""``help(torchopt.Adam)``: every argument of every optimizer, what it means, and that it is so."""

from __future__ import annotations

import functools
import inspect
import pydoc
import re
from typing import Any

import pytest
import torch
from cases import ALGORITHMS, SPECIAL_ALGORITHMS
from torch import nn

import torchopt


ROWS = list(dict.fromkeys(ALGORITHMS + SPECIAL_ALGORITHMS))
FACES = list(dict.fromkeys(face for r in ROWS for face in (r.recipe, r.cls, r.meta)))
OTHERS = [
    *(torchopt.FuncOptimizer, torchopt.LBFGS, torchopt.MetaOptimizer, torchopt.MetaSAM),
    *(torchopt.Optimizer, torchopt.SAM, torchopt.sam),
]
NAMED = [
    value
    for value in map(functools.partial(getattr, torchopt), dir(torchopt))
    if inspect.isclass(value) and hasattr(vars(value).get("__init__"), "recipe")
]
IN_PLACE = [cls for cls in NAMED if issubclass(cls, torchopt.Optimizer)]
META = [cls for cls in NAMED if issubclass(cls, torchopt.MetaOptimizer)]
SWITCHES = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}


def name_of(face: Any) -> str:
    return face.__name__


every_class_in_place = pytest.mark.parametrize("cls", IN_PLACE, ids=name_of)
every_meta_class = pytest.mark.parametrize("cls", META, ids=name_of)


def matrix(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def documented(face: Any) -> dict[str, str]:
    """Return the arguments that a docstring explains, in order, with what it says of them."""
    text = inspect.getdoc(face) or ""
    (section,) = re.findall(r"^Args:\n((?:(?: .*)?\n)+)", f"{text}\n", re.M)
    entries = re.findall(r"^    (\*{0,2}\w+): (.*(?:\n     .*)*)", section, re.M)
    return {name.lstrip("*"): meaning for name, meaning in entries}


def test_all_optimizers_are_here() -> None:
    assert {*IN_PLACE, *META} == {face for face in FACES if inspect.isclass(face)}
    assert len(IN_PLACE) == len(META) > 35


@pytest.mark.parametrize("face", [*FACES, *OTHERS], ids=name_of)
def test_each_argument_is_in_the_signature_and_explained(face: Any) -> None:
    arguments = list(inspect.signature(face).parameters)
    meanings = documented(face)
    assert list(meanings) == arguments
    assert all(len(meaning) > 3 for meaning in meanings.values())
    shown = pydoc.render_doc(face, renderer=pydoc.plaintext)
    assert f"{face.__name__}(" in shown
    assert all(f"{name}: " in shown for name in arguments)


@pytest.mark.parametrize("cls", NAMED, ids=name_of)
def test_a_class_has_the_arguments_of_its_recipe_with_their_meanings(cls: Any) -> None:
    recipe = vars(cls)["__init__"].recipe
    own, theirs = (inspect.signature(face).parameters for face in (cls, recipe))
    first, *middle = own.values()
    assert first.name == ("module" if cls in META else "params")
    assert middle[: len(theirs)] == list(theirs.values())
    rest = {p.name: p.default for p in middle[len(theirs) :]}
    assert rest == ({} if cls in META else SWITCHES)
    meanings = {
        name: re.sub(
            r";\s+needs\s+``params``\s+in\s+``update``", "", meaning
        )  # which a class has not
        for name, meaning in documented(recipe).items()
    }
    assert meanings.items() <= documented(cls).items()
    text = inspect.getdoc(cls) or ""
    assert ">>>" not in text, "the example shows the other API"
    assert ".. math::" in text
    assert "Reference:" in text
    assert text.startswith(f":func:`torchopt.{recipe.__name__}` as a ")


# What is said of params, module and the switches is so ----------------------------------------


@every_class_in_place
def test_params_are_tensors_pairs_or_groups(cls: Any) -> None:
    said = documented(cls)["params"]
    assert all(word in said for word in ("iterable of tensors", "pairs", "parameter groups"))
    net = nn.Sequential(matrix(3, 2), matrix(2, 2))
    weights = list(net.parameters())
    assert cls(net.parameters()).param_groups[0]["params"] == weights
    assert cls(iter(weights)).param_groups[0]["params"] == weights
    named = cls(net.named_parameters()).param_groups[0]
    assert named["params"] == weights
    assert named["param_names"] == ["0.weight", "1.weight"]
    optimizer = cls([{"params": [weights[0]], "lr": 0.25}, {"params": [weights[1]]}])
    assert [group["params"] for group in optimizer.param_groups] == [[w] for w in weights]
    assert optimizer.param_groups[0]["lr"] == 0.25 != optimizer.param_groups[1]["lr"]
    with pytest.raises(TypeError, match="parameters"):
        cls(net)


@every_class_in_place
def test_switches_do_what_is_said(cls: Any) -> None:
    said = documented(cls)
    params = [nn.Parameter(torch.ones(2, 2))]
    plain = cls(params).transformation
    assert "ignored" in said["foreach"]
    for foreach in (None, False, True):
        assert cls(params, foreach=foreach).transformation == plain
    for fused in (None, False):
        assert cls(params, fused=fused).transformation == plain
    for keywords in ({"fused": True}, {"use_accelerated_op": True}):
        try:
            parts = cls(params, **keywords).transformation.parts
        except RuntimeError as error:
            assert "requires a fused kernel" in str(error)  # none has been built  # noqa: PT017
        else:
            assert {part.use_accelerated_op for part in parts} == {True}
    for switch in ("capturable", "differentiable"):
        assert "refused" in said[switch]
        cls(params, **{switch: False})
        with pytest.raises(ValueError, match=switch if switch == "capturable" else "in place"):
            cls(params, **{switch: True})
    meta, recipe = re.findall(r"torchopt\.(\w+)\(", said["differentiable"])
    assert getattr(torchopt, meta)._twin is cls
    assert getattr(torchopt, recipe) is vars(cls)["__init__"].recipe


@every_meta_class
def test_module_is_a_network_or_a_list(cls: Any) -> None:
    assert all(word in documented(cls)["module"] for word in ("network", "list", '"lr"'))
    a, b = matrix(3, 2), matrix(2, 2)
    assert [g["params"] for g in cls(a).param_groups] == [a]
    groups = cls([a, {"params": b, "lr": 0.25}]).param_groups
    assert [g["params"] for g in groups] == [a, b]
    assert groups[1]["lr"] == 0.25 != groups[0]["lr"]
    with pytest.raises(TypeError, match="not its parameters"):
        cls(a.parameters())


def test_a_subclass_of_the_users_keeps_its_own_docstring() -> None:
    class Warm(torchopt.Adam):
        """Adam, warm."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__(net.parameters(), lr=0.5)

    assert Warm.__doc__ == "Adam, warm."
    assert Warm(nn.Linear(2, 1)).param_groups[0]["lr"] == 0.5

"""Keywords of other libraries, slips of the keyboard, and networks in the place of a number."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import torchopt


NET = nn.Sequential(nn.Linear(2, 2))


def named(cls: Any, first: Any, **kwargs: Any) -> Any:
    return lambda: cls(first, **kwargs)


PARAMS = list(NET.parameters())
MISTAKES = {
    "a slip": (
        named(torchopt.Adam, PARAMS, weigth_decay=0.1),
        r"Adam\(\) has no argument 'weigth_decay'. Did you mean weight_decay\?",
    ),
    "Optax's rate": (
        named(torchopt.SGD, PARAMS, learning_rate=0.1),
        r"SGD\(\) has no argument 'learning_rate'. Here it is lr\.",
    ),
    "Optax's decays": (
        named(torchopt.MetaAdam, NET, b1=0.9),
        r"MetaAdam\(\) has no argument 'b1'. Here it is betas=\(b1, b2\)\.",
    ),
    "none that is near": (
        named(torchopt.MetaSGD, NET, zzz=1),
        r"MetaSGD\(\) has no argument 'zzz'. It takes lr, momentum, dampening,",
    ),
    "a network": (lambda: torchopt.adam(NET), r"got the network Sequential.*MetaAdam\(net"),
    "parameters": (
        lambda: torchopt.adam(NET.parameters()),
        r"got a generator.*torchopt\.Adam\(net\.parameters\(\)",
    ),
    "a network to init": (
        lambda: torchopt.adam(0.1).init(NET),
        r"init expects a tree of tensors, got the network Sequential\. Give a tree",
    ),
    "no state": (
        lambda: torchopt.adam(0.1).update(PARAMS, None, PARAMS),
        r"got None\. Write state = tx\.init\(params\) first\.$",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_to_type_instead_is_said(name: str) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_options_of_torch_with_one_value_are_taken_with_it_only() -> None:
    same = torchopt.Adam(PARAMS, decoupled_weight_decay=False)
    assert same.defaults == torchopt.Adam(PARAMS).defaults
    with pytest.raises(ValueError, match=r"another algorithm.*torchopt\.AdamW"):
        torchopt.Adam(PARAMS, decoupled_weight_decay=True)


def test_keywords_of_073_are_still_taken() -> None:
    with pytest.warns(FutureWarning, match="moment_requires_grad"):
        torchopt.MetaAdam(NET, lr=0.1, moment_requires_grad=True)


def test_a_block_that_is_not_entered_says_what_it_is() -> None:
    assert repr(torchopt.inner_loop(NET, torchopt.sgd(0.1))).startswith("<inner_loop(...), a block")


def test_help_of_a_class_is_of_the_class() -> None:
    for cls in (torchopt.Adam, torchopt.MetaAdam):
        assert "in ``update``" not in (cls.__doc__ or "")
    assert "twin" not in {name for name in vars(torchopt.MetaAdam) if not name.startswith("_")}


def test_the_other_class_of_an_algorithm_is_that_of_its_module() -> None:
    class MetaMine(torchopt.MetaAdam):
        """A class of somebody's own."""

    assert MetaMine._twin is torchopt.MetaAdam._twin is torchopt.Adam
    assert torchopt.MetaOptimizer._twin is None

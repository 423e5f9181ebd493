"""What an optimizer prints of numbers that are learned, of many of them, and of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt


def learned(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype)
    return numbers.requires_grad_()


def lr_of(text: str) -> str:
    """Return what stands behind ``lr=`` in the last part of a chain."""
    return text.rpartition("ScaleByLearningRate(lr=")[2].removesuffix("))")


SEVERAL = {f"layer{k}": learned(0.1 * k) for k in range(10)}
VALUES = [
    (0.1, "0.1"),
    (learned(0.1), "0.1 (learned)"),
    (learned(1 / 3, dtype=torch.float64), "0.3333 (learned)"),
    (learned(1e-8), "1e-08 (learned)"),
    (learned(2.0), "2.0 (learned)"),
    (nn.Parameter(torch.tensor(0.25)), "0.25 (learned)"),
    (2 * learned(0.1), "0.2 with graph"),
    (torch.tensor(0.1), "tensor(0.1)"),
    (learned(0.1, 0.2, 0.3), "float32[3] (learned)"),
    (2 * learned(0.1, 0.2), "float32[2] with graph"),
    (torch.ones(3, 2), "float32[3, 2]"),
    (torch.tensor(0.1, device="meta"), "float32[]"),
    ({"body": learned(0.1), "head": 0.01}, "{'body': 0.1 (learned), 'head': 0.01}"),
    ({"a": {"w": learned(0.5)}}, "{'a': {'w': 0.5 (learned)}}"),
    (nn.ParameterDict({"w": torch.tensor(0.5)}), "{'w': 0.5 (learned)}"),
    ([learned(0.5), 0.1], "[0.5 (learned), 0.1]"),
    ((learned(0.5),), "(0.5 (learned),)"),
    (SEVERAL, "{'layer0': 0.0 (learned), 'layer1': 0.1 (learned), ... 10 in all}"),
    ([0.1] * 100, "[0.1, 0.1, ... 100 in all]"),
    ([torch.ones(2)] * 5, "[float32[2], float32[2], ... 5 in all]"),
]


@pytest.mark.parametrize(("value", "shown"), VALUES, ids=[shown for _, shown in VALUES])
def test_a_hyperparameter_is_shown_by_its_value(value: Any, shown: str) -> None:
    assert lr_of(repr(torchopt.sgd(lr=value))) == shown


def test_numbers_that_have_no_value_of_their_own_are_shown_by_their_kind() -> None:
    texts = []

    def f(lr: Tensor) -> Tensor:
        texts.append(lr_of(repr(torchopt.sgd(lr))))
        return lr

    torch.func.vmap(f)(torch.rand(3))
    assert texts == ["float32[]"]


def test_each_of_a_pair() -> None:
    assert "betas=(0.5 (learned), 0.75)" in repr(torchopt.adam(betas=(learned(0.5), 0.75)))


def test_labels_and_transformations_are_not_cut() -> None:
    parts = {label: torchopt.scale(k) for k, label in enumerate("abcdef")}
    labels = {f"w{k}": label for k, label in enumerate("abcdef")}
    text = repr(torchopt.partition(parts, labels))
    assert all(f"'{label}': Scale(step_size={k})" in text for k, label in enumerate("abcdef"))
    assert f"labels={labels!r}" in text


def test_differentiable_optimizers_show_the_values_of_their_groups() -> None:
    inner = torchopt.MetaSGD(nn.Linear(2, 1), lr=learned(0.1))
    assert lr_of(repr(inner).removesuffix(")")) == "0.1 (learned)"
    inner.param_groups[0]["lr"] = learned(0.3)
    assert repr(inner).startswith("MetaSGD(Linear lr=0.3 (learned), chain(")


def test_a_functional_optimizer_shows_its_transformation() -> None:
    tx = torchopt.scale(learned(-0.5))
    optimizer = torchopt.FuncOptimizer(tx)
    assert repr(optimizer) == "FuncOptimizer(Scale(step_size=-0.5 (learned)))"
    shown = "FuncOptimizer(Scale(step_size=-0.5 (learned)), inplace=True)"
    assert repr(torchopt.FuncOptimizer(tx, inplace=True)) == shown
    w = torch.ones(2, requires_grad=True)
    optimizer.step(w.sum(), w)
    assert repr(optimizer) == "FuncOptimizer(Scale(step_size=-0.5 (learned)))"


def test_learned_hyperparameters_show_what_they_are_now() -> None:
    module = torchopt.LearnedHyperparameters(torchopt.adam(0.1, betas=(0.9, 0.99)), ["lr", "betas"])
    assert "lr=0.1 (learned), betas=(0.9 (learned), 0.99 (learned))" in repr(module)
    with torch.no_grad():
        for raw in module.parameters():
            raw.add_(1.0)
    numbers = module.numbers()
    assert f"lr={numbers['lr']:.4g} (learned)" in repr(module)
    assert numbers["lr"] > 0.11
    assert all(raw.grad is None and raw.is_leaf for raw in module.parameters())


def test_printing_leaves_no_trace() -> None:
    lr = learned(0.1)
    tx = torchopt.sgd(lr)
    repr(tx)
    assert tx.hyperparameters()["lr"] is lr
    assert lr.requires_grad
    assert lr.grad is None

"""What cannot be learned, bounded or written back says so, and nothing has changed then."""

from typing import Any

import pytest
import torch
from adapting import mlp

import torchopt
from torchopt import LearnedHyperparameters as Learned


NONE: Any = torchopt.Adam
sgd, adam = torchopt.sgd(0.1, momentum=0.5), torchopt.adam(0.1)
REFUSED = {
    "no transformation": (lambda: Learned(NONE), TypeError, "transformation"),
    "unknown": (lambda: Learned(sgd, "rate"), TypeError, "'rate' is no hyperparameter.*'lr'"),
    "flag": (lambda: Learned(sgd, "nesterov"), TypeError, "nesterov is a flag"),
    "no pair": (lambda: Learned(sgd, "lr[0]"), TypeError, "no hyperparameter"),
    "schedule": (
        lambda: Learned(torchopt.sgd(lambda t: 0.1), "lr"),
        TypeError,
        "lr is a schedule: give the number",
    ),
    "each": (lambda: Learned(sgd, each="tensor"), ValueError, "one of.*'entry'.*'tensor'"),
    "no parameters": (lambda: Learned(sgd, each="entry"), TypeError, "give of=net"),
    "iterator": (
        lambda: Learned(sgd, each="entry", of=mlp().parameters()),
        TypeError,
        r"list\(net\.parameters\(\)\)",
    ),
    "scalar": (
        lambda: Learned(torchopt.polyak_sgd(), "max_learning_rate", each="entry", of=mlp()),
        ValueError,
        "each='parameter'",
    ),
    "nothing": (lambda: Learned(torchopt.set_to_zero()), ValueError, "no hyperparameter to learn"),
    "misspelt": (
        lambda: Learned(sgd, reparametrization="sigmiod"),
        ValueError,
        "one of.*'sigmoid'.*got 'sigmiod'",
    ),
    "one bound": (
        lambda: Learned(sgd, "lr", reparametrization="sigmoid"),
        ValueError,
        "'sigmoid' does not keep lr.*>= 0.*Take 'exp'.*\\(0, 1\\)",
    ),
    "two bounds": (
        lambda: Learned(adam, "betas", reparametrization="exp"),
        ValueError,
        r"'exp' does not keep betas\[0\].*Take 'sigmoid'",
    ),
    "beyond": (
        lambda: Learned(sgd, "lr", reparametrization=(-1, 1)),
        ValueError,
        "lr must be between two numbers within its bounds, >= 0",
    ),
    "outside": (
        lambda: Learned(sgd, "lr", reparametrization=(0.2, 1)),
        ValueError,
        "no finite number",
    ),
    "no way": (lambda: Learned(sgd, reparametrization=3), TypeError, "got 3"),
    "of another": (
        lambda: Learned(sgd, "lr", reparametrization={"momentum": "exp"}),
        TypeError,
        "'momentum', which is not learned",
    ),
    "no inverse": (
        lambda: Learned(sgd, "lr", reparametrization=(torch.exp, torch.sqrt)),
        ValueError,
        "inverse to each other",
    ),
    "nan": (
        lambda: Learned(sgd, "lr", reparametrization=(torch.exp, lambda x: (x - 1).log())),
        ValueError,
        "no finite number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def written(learned, optimizer, error, message, method="write_to"):
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error, match=message):
        getattr(learned, method)(optimizer)
    for group, old in zip(optimizer.param_groups, before):
        assert all(group[name] is value for name, value in old.items())


def test_refused_to_be_written():
    net = mlp()
    plain, each = Learned(sgd), Learned(sgd, each="parameter", of=net)
    written(each, torch.optim.SGD(net.parameters(), lr=0.1), TypeError, "one for each group")
    written(plain, torchopt.Adam(net.parameters()), ValueError, "no hyperparameter 'momentum'")
    written(plain, torchopt.SGD(net.parameters()), TypeError, "differentiable", "connect_to")
    few = torchopt.SGD([net[0].weight])
    written(each, few, ValueError, r"4 parameters.*1 without names.*named_parameters")
    other = torchopt.SGD(torch.nn.Linear(2, 2).named_parameters())
    written(each, other, ValueError, "no learned value of 'weight'")
    others: Any = (sgd, net, None)
    for value in others:
        with pytest.raises(TypeError, match="write_to expects an optimizer"):
            plain.write_to(value)
    two = Learned(torchopt.MetaSGD([mlp(), mlp()], lr=0.1))
    written(two, torchopt.MetaSGD([mlp(), mlp(), mlp()]), ValueError, "2 groups.*has 3")


def test_other_hyperparameters_of_a_transformation():
    with pytest.raises(TypeError, match=r"'rate' is no hyperparameter of Chain"):
        sgd.with_hyperparameters({"rate": 0.1})
    with pytest.raises(ValueError, match="lr must be >= 0"):
        sgd.with_hyperparameters({"lr": -0.1})
    assert sgd.with_hyperparameters({}) is sgd


def test_a_transformation_inside_of_a_class_of_ones_own():
    """What a class does not pass on to what it holds is not left as it was without a word."""

    @torchopt.transformation
    class Holder(torchopt.GradientTransformation):
        inner: Any

        def __post_init__(self):
            """Check nothing: the inside has."""

        def hyper_specs(self):
            return self.inner.hyper_specs()

        def hyperparameters(self):
            return self.inner.hyperparameters()

    with pytest.raises(TypeError, match="'lr' of Holder cannot be exchanged"):
        Holder(sgd).with_hyperparameters({"lr": 0.5})
    Holder(sgd).with_hyperparameters({"lr": 0.1})

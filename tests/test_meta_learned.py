"""Hyperparameters of every kind are learned through the differentiable face."""

import pytest
import torch
from adapting import adapted_loss, assert_derivative, batch, mlp
from cases import every_meta_case
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


def _learned(value, *shape):
    return (value * (1 + 0.3 * torch.rand(shape))).requires_grad_(True)


def _kinds(net):
    names = dict(net.named_parameters())
    shared = _learned(0.1)
    per_part = {"0": _learned(0.1), "2": _learned(0.05)}
    per_parameter = {n: _learned(0.1) for n in names}
    per_element = {n: _learned(0.1, *p.shape) for n, p in names.items()}
    per_row = {"0": _learned(0.1, 1), "2": _learned(0.1, 1)}
    return {
        "one": (shared, [shared]),
        "one_of_one_element": (row := _learned(0.1, 1), [row]),
        "per_part": (per_part, list(per_part.values())),
        "per_parameter": (per_parameter, list(per_parameter.values())),
        "per_element": (per_element, list(per_element.values())),
        "per_part_of_one_element": (per_row, list(per_row.values())),
        "part_with_exception": (
            mixed := {"": _learned(0.1), "2.bias": _learned(0.3)},
            list(mixed.values()),
        ),
        "part_number_and_tensor": (
            half := {"0": 0.1, "2": _learned(0.05)},
            [half["2"]],
        ),
    }


KINDS = [
    "one",
    "one_of_one_element",
    "per_part",
    "per_parameter",
    "per_element",
    "per_part_of_one_element",
    "part_with_exception",
    "part_number_and_tensor",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", [torchopt.sgd, torchopt.adam], ids=["sgd", "adam"])
def test_learned_learning_rate_of_every_kind(recipe, kind):
    net, support, query = mlp(), batch(), batch()
    lr, tensors = _kinds(net)[kind]
    function = adapted_loss(net, recipe(lr), support, query)
    assert_derivative(function, tensors)
    assert_derivative(function, [*tensors, *net.parameters()])
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(function(), tensors))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["one", "per_part", "per_element"])
@every_meta_case
def test_every_number_can_be_learned(case, kind):
    net, support, query = mlp(), batch(), batch()
    for name in case.tunable_by_entry if kind == "per_element" else case.tunable:
        value = max(0.75 * case.value(name), 1e-2)  # within bounds, and differences too
        tensors = {
            "one": {"": _learned(value)},
            "per_part": {"0": _learned(value), "2": _learned(value)},
            "per_element": {n: _learned(value, *p.shape) for n, p in net.named_parameters()},
        }[kind]
        tx = case.tx({name: tensors[""] if kind == "one" else tensors})
        steps = case.algorithm.settled + case.algorithm.rests + 1
        if case.flat("gradients") and not case.algorithm.in_places:
            steps = 1  # later gradients depend on the number, and differences may cross a jump
        function = adapted_loss(net, tx, support, query, steps)
        if case.flat(name):
            learned = list(tensors.values())
            grads = torch.autograd.grad(function(), learned, materialize_grads=True)
            assert all((g == 0).all() for g in grads)
        else:
            assert_derivative(function, list(tensors.values()))


@pytest.mark.parametrize("kind", ["both", "first", "second", "per_part"])
def test_learned_betas(kind):
    net, support, query = mlp(), batch(), batch()
    b1, b2 = _learned(0.5), _learned(0.7)
    parts = {"0": _learned(0.5), "2": _learned(0.6)}
    betas, tensors = {
        "both": ((b1, b2), [b1, b2]),
        "first": ((b1, 0.99), [b1]),
        "second": ((0.5, b2), [b2]),
        "per_part": ((parts, b2), [*parts.values(), b2]),
    }[kind]
    function = adapted_loss(net, torchopt.adam(0.05, betas=betas), support, query)
    assert_derivative(function, tensors)


def test_learned_rates_of_two_groups_get_gradients_of_their_own():
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    rates = [torch.tensor(v, requires_grad=True) for v in (0.1, 0.3)]
    (x, y), (u, v) = batch(), batch()

    def function():
        states = [torchopt.extract_state_dict(m) for m in (body, head)]
        optimizer = torchopt.MetaOptimizer(
            [{"params": body, "lr": rates[0]}, {"params": head, "lr": rates[1]}],
            torchopt.sgd(momentum=0.5),
        )
        for _ in range(3):
            optimizer.step((head(torch.tanh(body(x))) - y).square().mean())
        outer = (head(torch.tanh(body(u))) - v).square().mean()
        for m, state in zip((body, head), states):
            torchopt.recover_state_dict(m, state)
        return outer

    assert_derivative(function, rates[:1])
    assert_derivative(function, rates[1:])


def test_a_schedule_of_learned_rates_gives_each_its_gradient():
    net, support, query = mlp(), batch(), batch()
    rates = torch.tensor([0.3, 0.2, 0.1], requires_grad=True)
    function = adapted_loss(net, torchopt.sgd(lambda count: rates[count]), support, query)
    assert (torch.autograd.grad(function(), rates)[0] != 0).all()
    assert_derivative(function, [rates])

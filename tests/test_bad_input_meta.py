"""Bad losses, modules and groups for the differentiable face: an error, and nothing has changed."""

import pytest
import torch
from adapting import batch, mse
from torch import nn
from unchanged import Net, adapted, nothing_changes, refused

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


def test_the_helper_sees_every_kind_of_change():
    def change_parameter(net, optimizer):
        net.head.weight = nn.Parameter(net.head.weight.detach())

    def change_bits(net, optimizer):
        net.norm.running_mean.add_(1)

    def change_state(net, optimizer):
        optimizer.step(mse(net, batch()))

    def change_group(net, optimizer):
        optimizer.param_groups[0]["lr"] = 7.0

    def change_grad(net, optimizer):
        net.norm.weight.grad = torch.ones(4)

    for change in (change_parameter, change_bits, change_state, change_group, change_grad):
        net, optimizer = adapted(steps=int(change is not change_grad))
        with pytest.raises(AssertionError), nothing_changes(net, optimizer):
            change(net, optimizer)


# The loss -----------------------------------------------------------------------------------------


LOSSES = {
    "vector": (lambda net: net(batch()[0]).mean(0), ValueError, r"scalar.*\(2,\).*mean\(\)"),
    "matrix": (lambda net: net(batch()[0]), ValueError, r"scalar.*\(6, 2\)"),
    "empty": (lambda net: net(batch()[0])[:0], ValueError, r"scalar.*\(0, 2\)"),
    "detached": (lambda net: mse(net, batch()).detach(), ValueError, "no graph"),
    "constant": (lambda net: torch.tensor(2.0), ValueError, "no graph"),
    "none": (lambda net: None, TypeError, "tensor.*NoneType"),
    "number": (lambda net: mse(net, batch()).item(), TypeError, "tensor.*float"),
    "tuple": (lambda net: (mse(net, batch()),), TypeError, "tensor.*tuple"),
    "closure": (lambda net: lambda: None, TypeError, "tensor, got NoneType.*return it"),
    "stranger": (lambda net: mse(Net(), batch()), ValueError, "does not depend"),
    "complex": (
        lambda net: mse(net, batch()) * torch.tensor(1j),
        (TypeError, ValueError, RuntimeError),
        "real",
    ),
    "nothing_to_do_with_it": (
        lambda net: torch.randn((), requires_grad=True) * 2,
        ValueError,
        "does not depend",
    ),
}


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "adapted"])
@pytest.mark.parametrize("kind", LOSSES)
def test_bad_losses(kind, steps):
    make, error, message = LOSSES[kind]
    net, optimizer = adapted(steps=steps)
    loss = make(net)
    with refused(error, message, net, optimizer):
        optimizer.step(loss)


def test_no_loss():
    net, optimizer = adapted()
    with refused(TypeError, "loss", net, optimizer):
        optimizer.step()


def test_a_loss_computed_without_grad():
    net, optimizer = adapted()
    with torch.no_grad():
        loss = mse(net, batch())
    with refused(ValueError, "no_grad", net, optimizer):
        optimizer.step(loss)


def test_a_loss_that_is_stale_after_a_step():
    net, optimizer = adapted()
    loss = mse(net, batch())
    optimizer.step(loss)
    with refused(ValueError, "compute it again", net, optimizer):
        optimizer.step(loss)


def test_a_loss_that_is_stale_after_a_recovery():
    net, optimizer = adapted(steps=0)
    optimizer.step(mse(net, batch()), create_graph=False)
    loss = mse(net, batch())
    torchopt.recover_state_dict(net, torchopt.extract_state_dict(Net()))
    with refused(ValueError, "recover_state_dict", net, optimizer):
        optimizer.step(loss)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_step_after_the_graph_was_freed(steps):
    net, optimizer = adapted(steps=steps)
    loss = mse(net, batch())
    loss.backward()
    with refused(RuntimeError, "freed.*retain_graph", net, optimizer):
        optimizer.step(loss)


def test_a_first_order_step_frees_the_graph():
    net, other = Net().eval(), Net().eval()
    first, second = torchopt.MetaSGD(net), torchopt.MetaSGD(other)
    loss = mse(net, batch()) * mse(other, batch())
    first.step(loss, create_graph=False)
    with refused(RuntimeError, "freed.*retain_graph", other, second):
        second.step(loss)


def test_a_parameter_overwritten_behind_the_graph():
    net, optimizer = adapted(steps=0)
    loss = mse(net, batch())
    with torch.no_grad():
        net.head.weight.add_(1.0)
    with refused(RuntimeError, "inplace|modified", net, optimizer):
        optimizer.step(loss)


# The module and its groups ------------------------------------------------------------------------


NOT_MODULES = {
    "generator": lambda net: net.parameters(),
    "list_of_parameters": lambda net: list(net.parameters()),
    "dict_of_parameters": lambda net: dict(net.named_parameters()),
    "group_of_parameters": lambda net: {"params": list(net.parameters())},
    "group_in_a_list": lambda net: [{"params": list(net.parameters()), "lr": 1.0}],
    "tensor": lambda net: net.head.weight,
    "class": lambda net: Net,
    "none": lambda net: None,
}


@pytest.mark.parametrize("kind", NOT_MODULES)
def test_something_else_than_a_module(kind):
    net = Net()
    with refused(TypeError, r"expects an nn\.Module \(the network, not its parameters\)", net):
        torchopt.MetaAdam(NOT_MODULES[kind](net))


def test_no_module_at_all():
    with pytest.raises((TypeError, ValueError), match="module"):
        torchopt.MetaAdam([])


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.Sequential(), nn.BatchNorm1d(2, affine=False)],
    ids=lambda m: m._get_name(),
)
def test_a_module_without_parameters(module):
    with refused(ValueError, f"{type(module).__name__} has no parameters", module):
        torchopt.MetaSGD(module)
    net, optimizer = adapted()
    with refused(ValueError, "no parameters", net, optimizer):
        optimizer.add_param_group(module)


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "adapted"])
def test_all_parameters_frozen(steps):
    net = Net().requires_grad_(False)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    x = torch.randn(6, 3, requires_grad=True)
    for _ in range(steps + 1):
        loss = net(x).square().mean()
        with refused(ValueError, "frozen", net, optimizer):
            optimizer.step(loss)
    net.requires_grad_(True)
    optimizer.step(net(x).square().mean())
    assert net.head.weight.grad_fn is not None


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"learning_rate": 0.1}, TypeError, "'learning_rate' is no hyperparameter"),
        ({"lr": -0.1}, ValueError, "lr must be >= 0, got -0.1"),
        ({"lr": "fast"}, TypeError, "lr must be a number.*'fast'"),
        ({"lr": None}, TypeError, "lr must be a number"),
        ({"lr": float("nan")}, ValueError, "lr must be >= 0, got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be >= 0 and < 1, got 1.0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair"),
        ({"amsgrad": 1}, TypeError, "amsgrad must be True or False"),
        ({"lr": {"weight": 0.1}}, ValueError, "no entry for parameter 'bias'"),
        (
            {"lr": {"weight": 0.1, "bias": 0.1, "wieght": 0.1}},
            ValueError,
            "'wieght' that names no parameter",
        ),
        ({"lr": torch.ones(3)}, ValueError, r"shape \(3,\).*'weight' of shape \(2, 2\)"),
        ({"lr": [0.1, 0.2, 0.3]}, ValueError, "lr"),
        ({"lr": torch.tensor(1j)}, TypeError, "real"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_hyperparameters_of_a_group(group, error, message):
    net, optimizer = adapted()
    extra = nn.Linear(2, 2)
    with (
        nothing_changes(extra),
        refused(error, message, net, optimizer),
    ):
        optimizer.add_param_group({"params": extra, **group})
    with refused(error, message, extra):
        torchopt.MetaAdam({"params": extra, **group})


def test_a_live_hyperparameter_out_of_bounds():
    net, optimizer = adapted()
    for name, bad in (("lr", -1.0), ("betas", (0.9, 1.5)), ("eps", -1e-8), ("lr", "fast")):
        good = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = bad
        loss = mse(net, batch())
        with nothing_changes(net, optimizer), pytest.raises((ValueError, TypeError), match=name):
            optimizer.step(loss)
        optimizer.param_groups[0][name] = good
    optimizer.step(mse(net, batch()))
    assert torchopt.extract_state_dict(optimizer)[0].step == 2


def test_a_shared_parameter_in_two_groups():
    net, optimizer = adapted()
    for module in (net, net.head, nn.Sequential(net.body, nn.ReLU())):
        with refused(ValueError, "weight' belongs to another group already", net, optimizer):
            optimizer.add_param_group(module)
    net, optimizer = adapted(steps=0)
    tied = nn.Linear(3, 4)
    tied.weight = net.body.weight
    with refused(ValueError, "'weight' belongs to another group", net, optimizer):
        optimizer.add_param_group(tied)
    first = nn.Linear(2, 2)
    with refused(ValueError, "belongs to another group", first):
        torchopt.MetaAdam([first, first])


@pytest.mark.parametrize(
    "tx",
    [torchopt.adam, None, 0.1, torch.optim.SGD, nn.Linear(1, 1), "adam"],
    ids=["recipe", "none", "number", "torch_class", "module", "string"],
)
def test_something_else_than_a_transformation(tx):
    net = Net()
    with refused(TypeError, r"MetaOptimizer expects a gradient transformation such as", net):
        torchopt.MetaOptimizer(net, tx)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torchopt.Adam], ids=["torch", "torchopt"])
def test_an_object_oriented_optimizer_instead_of_a_transformation(cls):
    net = Net()
    with refused(TypeError, "gradient transformation.*Adam", net):
        torchopt.MetaOptimizer(net, cls(net.parameters()))

"""Bad input to the differentiable face: a clear error, and everything is what it was."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import torchopt


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(4)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


def batch(n=6):
    return torch.randn(n, 3), torch.randn(n, 2)


def mse(net, data):
    return (net(data[0]) - data[1]).square().mean()


def adapted(cls=torchopt.MetaAdam, steps=1, **options):
    """Return an evaluating network after some steps, and its optimizer."""
    net = Net()
    net(batch()[0])
    net.eval()
    optimizer = cls(net, **{"lr": 0.1, **options})
    for _ in range(steps):
        optimizer.step(mse(net, batch()))
    return net, optimizer


def _picture(net, optimizer):
    """Return every object of a network and an optimizer, with its bits."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    for k, state in enumerate(optimizer.extract_state() if optimizer else ()):
        tensors += [(f"{k}.step", state.step)]
        for slot, column in state.slots.items():
            tensors += [(f"{k}.{slot}.{name}", value) for name, value in column.items()]
    for k, group in enumerate(optimizer.param_groups if optimizer else ()):
        tensors += [(f"group {k}.{name}", value) for name, value in group.items()]
    modules = [
        *net.modules(),
        *(g["params"] for g in (optimizer.param_groups if optimizer else ())),
    ]
    grads = [(f"{n}.grad", p.grad) for n, p in net.named_parameters() if p.is_leaf]
    return [*tensors, *enumerate(modules), *grads]


@contextlib.contextmanager
def nothing_changes(net, optimizer=None):
    """Assert that the block leaves a network and an optimizer as they are, objects and bits."""
    before = [
        (name, value, value.detach().clone() if isinstance(value, torch.Tensor) else None)
        for name, value in _picture(net, optimizer)
    ]
    training = [module.training for module in net.modules()]
    yield
    after = _picture(net, optimizer)
    assert [name for name, _ in after] == [name for name, _, _ in before]
    for (name, value), (_, original, bits) in zip(after, before):
        if isinstance(original, (torch.Tensor, nn.Module)):
            assert value is original, f"{name} is another object"
        else:
            assert value == original, f"{name} is {value!r} instead of {original!r}"
        if bits is not None:
            assert torch.equal(value, bits), f"{name} has other bits"
    assert [module.training for module in net.modules()] == training


@contextlib.contextmanager
def refused(error, message, net, optimizer=None):
    """Assert that the block raises and changes nothing, and that the optimizer still works."""
    with nothing_changes(net, optimizer), pytest.raises(error, match=message):
        yield
    if optimizer is not None and any(p.requires_grad for p in net.parameters()):
        old = [p for p in net.parameters() if p.requires_grad]
        optimizer.step(mse(net, batch()))
        new = [p for p in net.parameters() if p.requires_grad]
        assert all(p is not q for p, q in zip(new, old))
        assert all(p.isfinite().all() for p in new)


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


# The loss ---------------------------------------------------------------------------------------


LOSSES = {
    "vector": (lambda net: net(batch()[0]).mean(0), ValueError, r"scalar.*\(2,\).*mean\(\)"),
    "matrix": (lambda net: net(batch()[0]), ValueError, r"scalar.*\(6, 2\)"),
    "empty": (lambda net: net(batch()[0])[:0], ValueError, r"scalar.*\(0, 2\)"),
    "detached": (lambda net: mse(net, batch()).detach(), ValueError, "no graph"),
    "constant": (lambda net: torch.tensor(2.0), ValueError, "no graph"),
    "none": (lambda net: None, TypeError, "tensor.*NoneType"),
    "number": (lambda net: mse(net, batch()).item(), TypeError, "tensor.*float"),
    "tuple": (lambda net: (mse(net, batch()),), TypeError, "tensor.*tuple"),
    "closure": (lambda net: lambda: mse(net, batch()), TypeError, "tensor.*function"),
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
    with refused(ValueError, "compute it anew", net, optimizer):
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


# The module and its groups ----------------------------------------------------------------------


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


@pytest.mark.parametrize("lr", [-0.1, "fast", None], ids=repr)
def test_bad_learning_rate_of_the_constructor(lr):
    net = Net()
    with refused((ValueError, TypeError), "lr", net):
        torchopt.MetaAdam(net, lr=lr)


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


# States -----------------------------------------------------------------------------------------


def test_a_strangers_state():
    net, optimizer = adapted()
    wide = Net(width=5)
    stranger = torchopt.MetaAdam(wide)
    stranger.step(mse(wide, batch()))
    _, rms = adapted(torchopt.MetaRMSProp)
    module_state = torchopt.extract_state_dict(net)
    cases = [
        (net, torchopt.extract_state_dict(wide), ValueError, r"'body\.weight'.*\(5, 3\)"),
        (net, torchopt.extract_state_dict(net.head), ValueError, r"'body\.weight' is missing"),
        (net, torchopt.extract_state_dict(optimizer), TypeError, "module"),
        (net, net.state_dict(), TypeError, "extract_state_dict"),
        (optimizer, torchopt.extract_state_dict(stranger), ValueError, r"body\.weight"),
        (optimizer, torchopt.extract_state_dict(rms), ValueError, "another optimizer"),
        (optimizer, module_state, TypeError, "MetaAdam"),
        (optimizer, optimizer.state_dict(), TypeError, "MetaAdam"),
        (optimizer, (), ValueError, "0 groups"),
        (optimizer, (3,), TypeError, "MetaAdam"),
    ]
    for target, state, error, message in cases:
        with nothing_changes(net, optimizer), pytest.raises(error, match=message):
            torchopt.recover_state_dict(target, state)
    optimizer.step(mse(net, batch()))
    assert torchopt.extract_state_dict(optimizer)[0].step == 2


def test_a_state_half_of_which_fits_is_refused_as_a_whole():
    first, second = Net(), nn.Linear(2, 2)
    optimizer = torchopt.MetaAdam([first, second], lr=0.1)
    for _ in range(2):
        optimizer.step(second(first(batch()[0])).square().mean())
    one, two = torchopt.extract_state_dict(optimizer, by="deepcopy")
    two.slots["exp_avg"]["weight"] = torch.ones(7)
    one.step = 1
    with nothing_changes(first, optimizer), pytest.raises(ValueError, match="weight"):
        torchopt.recover_state_dict(optimizer, (one, two))


def _edited(change):
    def make(optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        return saved

    return make


GARBAGE = {
    "none": lambda o: None,
    "number": lambda o: 3,
    "empty": lambda o: {},
    "no_state": _edited(lambda s: s.pop("state")),
    "no_groups": _edited(lambda s: s.pop("param_groups")),
    "state_of_numbers": lambda o: {"state": [3], "param_groups": [{}]},
    "no_group_left": lambda o: {"state": [], "param_groups": []},
    "group_missing": _edited(lambda s: s["param_groups"].clear()),
    "group_too_many": _edited(lambda s: s["param_groups"].append({"lr": 0.1})),
    "group_no_dict": _edited(lambda s: s.update(param_groups=[3])),
    "unknown_hyperparameter": _edited(lambda s: s["param_groups"][0].update(rate=1.0)),
    "lr_negative": _edited(lambda s: s["param_groups"][0].update(lr=-1.0)),
    "lr_string": _edited(lambda s: s["param_groups"][0].update(lr="fast")),
    "lr_missing": _edited(lambda s: s["param_groups"][0].pop("lr")),
    "unknown_slot": _edited(lambda s: s["state"][0].update(square_avg=torch.ones(4, 3))),
    "slot_missing": _edited(lambda s: [entry.pop("exp_avg") for entry in s["state"].values()]),
    "slot_entry_missing": _edited(lambda s: s["state"][0].pop("exp_avg")),
    "slot_entry_no_tensor": _edited(lambda s: s["state"][0].update(exp_avg="three")),
    "slot_shape": _edited(lambda s: s["state"][0].update(exp_avg=torch.ones(9))),
    "slot_unknown_parameter": _edited(lambda s: s["state"].update({77: s["state"][0]})),
    "step_string": _edited(lambda s: s["state"][0].update(step="three")),
    "step_negative": _edited(lambda s: s["state"][0].update(step=-1)),
    "step_fraction": _edited(lambda s: s["state"][0].update(step=torch.tensor(1.5))),
    "step_missing": _edited(lambda s: s["state"][0].pop("step")),
    "entry_no_dict": _edited(lambda s: s["state"].update({0: 3})),
    "name_unknown": _edited(lambda s: s["param_groups"][0]["param_names"].__setitem__(0, "tail")),
    "names_too_few": _edited(lambda s: s["param_groups"][0]["param_names"].pop()),
    "params_too_few": _edited(
        lambda s: (s["param_groups"][0].pop("param_names"), s["param_groups"][0]["params"].pop())
    ),
    "of_a_module": lambda o: o.param_groups[0]["params"].state_dict(),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_load_state_dict_of_garbage(kind):
    net, optimizer = adapted(steps=2)
    garbage = GARBAGE[kind](optimizer)
    with refused((ValueError, TypeError), ".", net, optimizer):
        optimizer.load_state_dict(garbage)


def test_load_state_dict_of_another_algorithm_of_torch():
    net, optimizer = adapted()
    twin = Net()
    mse(twin, batch()).backward()
    for cls in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW):
        peer = cls(twin.parameters(), lr=0.01)
        peer.step()
        with refused(ValueError, "another optimizer", net, optimizer):
            optimizer.load_state_dict(peer.state_dict())


def test_load_state_dict_of_an_extracted_state_says_what_to_type():
    net, optimizer = adapted()
    with refused(ValueError, "recover_state_dict", net, optimizer):
        optimizer.load_state_dict(torchopt.extract_state_dict(optimizer))


def test_load_state_dict_of_another_rule():
    net, optimizer = adapted(torchopt.MetaSGD, momentum=0.9)
    _, other = adapted(torchopt.MetaAdam)
    with refused(ValueError, "another optimizer", net, optimizer):
        optimizer.load_state_dict(other.state_dict())


def test_load_state_dict_of_another_network():
    net, optimizer = adapted()
    wide = Net(width=5)
    other = torchopt.MetaAdam(wide)
    other.step(mse(wide, batch()))
    with refused(ValueError, r"body\.weight", net, optimizer):
        optimizer.load_state_dict(other.state_dict())


# Exceptions in the middle of an update ----------------------------------------------------------


class BoomError(Exception):
    """What the users' own code raises below."""


@torchopt.transformation
class _FailsAt(torchopt.ElementwiseTransformation):
    """Raises at the second parameter of the second update, after others have been updated."""

    slots = ("seen",)
    uses_step = True

    def rule(self, g, p, t, slots):
        if t == 2 and g.shape == (4,):
            raise BoomError("in a rule")
        return g, (slots[0] + g,)


def _failing_schedule(count):
    if count == 1:
        raise BoomError("in a schedule")
    return 0.1


class _Masks:
    """A mask that fails at a later call."""

    def __init__(self, good):
        self.good = good

    def __call__(self, params):
        self.good -= 1
        if self.good < 0:
            raise BoomError("in a mask")
        return dict.fromkeys(params, True)


FAILING = {
    "rule": lambda: torchopt.chain(torchopt.scale_by_adam(), _FailsAt(), torchopt.scale(-0.1)),
    "schedule": lambda: torchopt.adam(_failing_schedule),
    "mask": lambda: torchopt.chain(
        torchopt.trace(0.9), torchopt.masked(torchopt.scale(0.5), _Masks(2))
    ),
}


@pytest.mark.parametrize("kind", FAILING)
def test_an_exception_in_the_middle_of_an_update(kind):
    net = Net().eval()
    optimizer = torchopt.MetaOptimizer(net, FAILING[kind]())
    optimizer.step(mse(net, batch()))
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises(BoomError):
        optimizer.step(loss)


def test_a_norm_that_is_not_finite():
    net = Net().eval()
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0, error_if_nonfinite=True), torchopt.adam(0.1))
    optimizer = torchopt.MetaOptimizer(net, tx)
    optimizer.step(mse(net, batch()))
    with refused(RuntimeError, "not finite", net, optimizer):
        optimizer.step(mse(net, batch()) * torch.inf)


def test_a_rule_that_returns_another_shape():
    @torchopt.transformation
    class Sums(torchopt.ElementwiseTransformation):
        def rule(self, g, p, t, slots):
            return g.sum(0, keepdim=True).expand(2, *g.shape), slots

    net = Net().eval()
    optimizer = torchopt.MetaOptimizer(net, Sums())
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises((ValueError, RuntimeError), match="shape"):
        optimizer.step(loss)


def test_a_rule_that_returns_nothing():
    @torchopt.transformation
    class Forgets(torchopt.ElementwiseTransformation):
        def rule(self, g, p, t, slots):
            return None, slots

    net = Net().eval()
    optimizer = torchopt.MetaOptimizer(net, Forgets())
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises((TypeError, ValueError), match="Forgets"):
        optimizer.step(loss)


def test_a_tensor_hook_that_raises():
    net, optimizer = adapted()

    def hook(grad):
        raise BoomError("in a hook")

    loss = mse(net, batch())
    loss.register_hook(hook)
    with refused(BoomError, "in a hook", net, optimizer):
        optimizer.step(loss)


def test_a_backward_hook_of_a_module_that_raises():
    net, optimizer = adapted()

    def hook(module, grad_input, grad_output):
        raise BoomError("in a hook")

    handle = net.head.register_full_backward_hook(hook)
    loss = mse(net, batch())
    with nothing_changes(net, optimizer), pytest.raises(BoomError):
        optimizer.step(loss)
    handle.remove()
    optimizer.step(mse(net, batch()))
    assert torchopt.extract_state_dict(optimizer)[0].step == 2


def test_an_exception_in_the_second_group_leaves_the_first():
    first, second = Net().eval(), nn.Linear(2, 2)
    calls = []

    def schedule(count):
        calls.append(count)
        if count == 1:
            raise BoomError
        return 0.1

    optimizer = torchopt.MetaOptimizer([first, {"params": second, "lr": schedule}], torchopt.adam())
    optimizer.step(second(first(batch()[0])).square().mean())
    loss = second(first(batch()[0])).square().mean()
    with (
        nothing_changes(second, optimizer),
        nothing_changes(first, optimizer),
        pytest.raises(BoomError),
    ):
        optimizer.step(loss)
    assert calls[-1] == 1

"""Hyperparameters as parameters within bounds: values, derivatives, and the way back."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from adapting import assert_derivative, batch, close, mlp, mse
from torch import nn
from torch.distributions import transforms

import torchopt
from torchopt import LearnedHyperparameters as Learned


pytestmark = pytest.mark.usefixtures("float64_by_default")


def adam():
    return torchopt.adam(lr=0.1, betas=(0.7, 0.8), eps=0.05, weight_decay=0.2)


def judged(net, learned, data, steps=3):
    def run():
        with torchopt.inner_loop(net, learned.transformation()) as inner:
            for _ in range(steps):
                inner.step(mse(net, data[0]))
            return mse(net, data[1])

    return run


RECIPES = {
    "sgd": (lambda: torchopt.sgd(0.1, momentum=0.8, dampening=0.3, weight_decay=0.2), None),
    "adam": (adam, None),
    "chain": (
        lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.trace(0.4), adam()),
        ("max_norm", "momentum", "betas", "lr"),
    ),
    "partition": (
        lambda: torchopt.partition(
            {"a": adam(), "b": torchopt.sgd(0.3, 0.5)}, {"0": "a", "2.weight": "b", "2.bias": "a"}
        ),
        None,
    ),
    "named": (
        lambda: torchopt.named_chain(("m", torchopt.trace(0.4)), ("s", torchopt.sgd(0.3))),
        ("m.momentum", "s.lr"),
    ),
    "masked": (lambda: torchopt.chain(torchopt.masked(torchopt.scale(0.5), True), adam()), None),
    "lookahead": (lambda: torchopt.lookahead(torchopt.sgd(0.3, momentum=0.5), 2), None),
    "accumulate": (lambda: torchopt.MultiSteps(torchopt.sgd(0.3, momentum=0.5), 2), None),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_begins_at_the_values_and_gives_their_derivatives(recipe):
    make, names = RECIPES[recipe]
    tx, net, data = make(), mlp(), (batch(), batch())
    learned = Learned(tx, names, of=net)
    given = tx.hyperparameters()
    for name, value in learned.numbers().items():
        assert value == pytest.approx(given[name], rel=1e-12)
    assert_derivative(judged(net, learned, data, steps=4), list(learned.parameters()), directions=2)


@pytest.mark.parametrize("kind", ["exp", "softplus", "identity", "pair", "transform"])
@pytest.mark.parametrize("each", ["group", "parameter", "entry"])
def test_each_form_and_each_way(each, kind):
    ways = {
        "pair": (lambda raw: raw.square(), lambda value: value.sqrt()),
        "transform": transforms.SoftplusTransform(),
    }
    net, data = mlp(), (batch(), batch())
    learned = Learned(
        adam(), {"lr": each, "betas": each}, of=net,
        reparametrization={"lr": ways.get(kind, kind), "betas[1]": "sigmoid"},
    )  # fmt: skip
    shapes = {n: p.shape for n, p in net.named_parameters()}
    expected = {
        "group": {"lr": ()},
        "parameter": {f"lr/{n.replace('.', '/')}": () for n in shapes},
        "entry": {f"lr/{n.replace('.', '/')}": shape for n, shape in shapes.items()},
    }[each]
    assert {k: tuple(x.shape) for k, x in learned.raw.items() if k.startswith("lr")} == {
        k: tuple(shape) for k, shape in expected.items()
    }
    value = learned()["lr"]
    for x in value.values() if each != "group" else [value]:
        close(x, torch.full_like(x, 0.1))
    with torch.no_grad():
        for raw in learned.parameters():
            raw += 0.05 * torch.randn_like(raw)
    assert_derivative(judged(net, learned, data), list(learned.parameters()), directions=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [-1e4, -200.0, -50.0, 50.0, 200.0, 1e4])
def test_stays_within_bounds_however_far_the_raw_numbers_are(far, dtype):
    @torchopt.transformation
    class Rule(torchopt.ElementwiseTransformation):
        rate: float = torchopt.hyper(0.1, gt=0)
        decay: float = torchopt.hyper(0.9, ge=0, lt=1)
        shift: float = torchopt.hyper(3.0, gt=2, le=5)
        below: float = torchopt.hyper(-1.0, lt=-0.5)

        def rule(self, g, p, t, slots, *, rate, decay, shift, below):
            return g * rate * decay * shift * below, slots

    rule: Any = Rule
    for kind in ("exp", "softplus"):
        ways = {"rate": kind, "below": kind}
        learned = Learned(rule(), reparametrization=ways, dtype=dtype)
        assert len(learned.raw) == 4
        with torch.no_grad():
            for raw in learned.parameters():
                raw.fill_(far)
        values = learned()
        torch.stack(list(values.values())).sum().backward()
        for name, value in values.items():
            assert value.isfinite()
            assert Rule.declared[name].allows(value.item())
            assert learned.raw[name].grad.isfinite()
        learned.transformation(detach=True)  # which checks them again


def test_what_is_on_a_bound_is_left_out_or_refused():
    learned = Learned(torchopt.sgd(lr=0.1))
    assert sorted(learned.raw) == ["dampening", "lr"]  # any number may dampen
    assert learned.transformation().hyperparameters()["momentum"] == 0.0
    for kind in (None, (0, 1)):
        with pytest.raises(ValueError, match=r"momentum begins at 0\.0, which no finite number"):
            Learned(torchopt.sgd(lr=0.1), ["lr", "momentum"], reparametrization={"momentum": kind})
    learned = Learned(torchopt.sgd(lr=0.1), "momentum", reparametrization="identity")
    assert learned.numbers() == {"momentum": 0.0}


def test_between_two_numbers():
    ways = {"momentum": (0.5, 0.9), "lr": "softplus"}
    learned = Learned(torchopt.sgd(0.1, 0.8), ("lr", "momentum"), reparametrization=ways)
    assert learned.numbers()["momentum"] == pytest.approx(0.8)
    with torch.no_grad():
        learned.raw["momentum"].fill_(1e3)
    assert 0.8999 < learned.numbers()["momentum"] < 0.9


def test_one_of_a_pair():
    net, data = mlp(), (batch(), batch())
    learned = Learned(adam(), {"betas[1]": "parameter", "lr": "group"}, of=net)
    first, second = learned()["betas"]
    assert first == 0.7
    assert second.keys() == dict(net.named_parameters()).keys()
    assert_derivative(judged(net, learned, data), list(learned.parameters()))


def test_begins_at_tensors_by_name():
    rates = {"0": torch.tensor(0.1), "2": 0.2}
    net = mlp()
    learned = Learned(torchopt.sgd(lr=rates), "lr", each="parameter", of=net)
    assert learned.numbers()["lr"] == pytest.approx(
        {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.2, "2.bias": 0.2}
    )
    with pytest.raises(ValueError, match="several values"):
        Learned(torchopt.sgd(lr=rates), "lr", of=net)
    entries = torch.full((4,), 0.1)
    with pytest.raises(ValueError, match=r"each entry of '0\.bias'"):
        Learned(torchopt.sgd({**rates, "0.bias": entries}), "lr", each="parameter", of=net)


def test_of_functional_trees():
    params = {"a": [torch.randn(3, requires_grad=True)], "b": torch.randn((), requires_grad=True)}
    learned = Learned(torchopt.sgd(0.1, 0.5), ("lr", "momentum"), each="entry", of=params)
    assert sorted(learned.raw) == ["lr/a/0", "lr/b", "momentum/a/0", "momentum/b"]

    def run():
        tx = learned.transformation()
        p, state = params, tx.init(params)
        for _ in range(2):
            grads = {"a": [2 * p["a"][0]], "b": p["b"].cos()}
            p, state = tx.apply_gradients(grads, state, p, inplace=False)
        return p["a"][0].square().sum() + p["b"]

    assert_derivative(run, list(learned.parameters()))


def test_groups_of_a_differentiable_optimizer():
    nets, data = [mlp(), mlp()], batch()
    inner = torchopt.MetaSGD([nets[0], {"params": nets[1], "lr": 0.3}], lr=0.1, momentum=0.5)
    learned = Learned(inner, {"lr": "group", "momentum": "parameter"})
    assert learned.numbers(0)["lr"] == pytest.approx(0.1)
    assert learned.numbers(1)["lr"] == pytest.approx(0.3)
    assert len(learned.raw) == 2 + 8
    with pytest.raises(ValueError, match=r"2 groups.*connect_to"):
        learned.transformation()

    def run():
        with torchopt.inner_loop(nets[0], inner):
            learned.connect_to(inner)
            for _ in range(2):
                inner.step(mse(nets[0], data) + mse(nets[1], data))
            return mse(nets[0], data) + mse(nets[1], data)

    assert_derivative(run, list(learned.parameters()))
    assert inner.param_groups[0]["lr"] == 0.1
    with torch.no_grad():
        learned.raw["1/lr"] += 1.0
    learned.write_to(inner)
    assert inner.param_groups[1]["lr"] == pytest.approx(0.3 * torch.tensor(1.0).exp().item())
    assert inner.param_groups[1]["momentum"]["2.bias"] == pytest.approx(0.5)


def moved(learned):
    with torch.no_grad():
        for k, raw in enumerate(learned.parameters()):
            raw += 0.1 * (k + 1)
    return learned


@pytest.mark.parametrize("cls", [torch.optim.Adam, torchopt.Adam, torchopt.MetaAdam])
def test_writes_numbers_into_groups(cls):
    net = mlp()
    learned = moved(Learned(torchopt.adam(lr=0.1, betas=(0.7, 0.8)), ("lr", "betas")))
    optimizer = cls(net if cls is torchopt.MetaAdam else net.parameters(), lr=0.5)
    learned.write_to(optimizer)
    (group,) = optimizer.param_groups
    assert group["lr"] == learned.numbers()["lr"] != pytest.approx(0.1)
    assert type(group["lr"]) is float
    assert group["betas"] == learned.numbers()["betas"]
    scheduler = cls is not torchopt.MetaAdam and torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not scheduler or scheduler.get_last_lr() == [learned.numbers()["lr"]]


def test_writes_into_a_tensor_of_torch():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam(mlp().parameters(), lr=rate, capturable=False, foreach=False)
    Learned(torchopt.adam(lr=0.1), "lr").write_to(optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    close(rate, torch.tensor(0.1))


@pytest.mark.parametrize("each", ["parameter", "entry"])
@pytest.mark.parametrize("named", [True, False])
def test_writes_values_of_parameters(named, each):
    net, data = mlp(), batch()
    twin = copy.deepcopy(net)
    learned = moved(Learned(torchopt.sgd(lr=0.1), "lr", each=each, of=net))
    items = list(net.named_parameters())
    groups = [items[:1], items[1:]]
    optimizer = torchopt.SGD(
        [{"params": part if named else [p for _, p in part]} for part in groups], lr=0.1
    )
    learned.write_to(optimizer)
    mse(net, data).backward()
    optimizer.step()
    mse(twin, data).backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        close(p, q - learned.numbers()["lr"][name] * q.grad)


def test_writes_into_the_groups_of_labels():
    net = mlp()
    tx = torchopt.partition({"a": adam(), "b": torchopt.sgd(0.3)}, {"0": "a", "2": "b"})
    learned = moved(Learned(tx, ("a.lr", "b.lr")))
    optimizer = torchopt.Optimizer(net.named_parameters(), tx)
    learned.write_to(optimizer)
    rates = {group["label"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {n[0]: value for n, value in learned.numbers().items()}
    assert rates["a"] != 0.1


def test_plain_numbers_for_a_recipe():
    learned = moved(Learned(adam(), ("lr", "betas", "eps")))
    tx = learned.transformation(detach=True)
    expected = torchopt.adam(**learned.numbers(), weight_decay=0.2)
    assert tx == expected
    assert all(not isinstance(v, torch.Tensor) for v in tx.hyperparameters().values())


def test_is_a_module_that_is_saved_copied_and_converted():
    learned = moved(Learned(adam(), each="parameter", of=mlp()))
    twin = Learned(adam(), each="parameter", of=mlp())
    stream = io.BytesIO()
    torch.save(learned.state_dict(), stream)
    stream.seek(0)
    twin.load_state_dict(torch.load(stream))
    for other in (twin, copy.deepcopy(learned), pickle.loads(pickle.dumps(learned))):
        assert other.numbers() == learned.numbers()
        assert other.transformation(detach=True) == learned.transformation(detach=True)
    assert all(x.dtype == torch.float32 for x in learned.float().parameters())
    assert "lr={" in repr(learned)


def test_learns():
    """One step from (1, 1) on curvatures 1 and 4 is best at the rates 1 and 1/4."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.steep = (nn.Parameter(torch.tensor(1.0)) for _ in range(2))

        def loss(self):
            return 0.5 * (self.flat**2 + 4 * self.steep**2)

    net = Point()
    learned = Learned(torchopt.sgd(lr=0.05), each="parameter", of=net)
    outer = torchopt.Adam(learned.parameters(), lr=0.1)
    for _ in range(300):
        outer.zero_grad()
        with torchopt.inner_loop(net, learned.transformation()) as inner:
            inner.step(net.loss())
            net.loss().backward()
        outer.step()
    assert learned.numbers()["lr"] == pytest.approx({"flat": 1.0, "steep": 0.25}, rel=1e-3)

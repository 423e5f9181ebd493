"""A differentiable step from gradients that are given: the step that their loss would make."""

import copy
import io

import pytest
import torch
from adapting import all_close, assert_derivative, batch, close, mlp, mse
from cases import every_meta_case
from odd_modules import Tied, TwoHeads
from torch import nn
from torch.func import functional_call
from unchanged import adapted, refused

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


def gradients(net, data, **options):
    params = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(mse(net, data), params, **{"create_graph": True, **options})


def by_name(net, grads):
    return dict(zip((n for n, p in net.named_parameters() if p.requires_grad), grads))


def slots_of(optimizer):
    (state,) = torchopt.extract_state_dict(optimizer)
    columns = {**state.slots, **state.counters}
    return [x for c in columns.values() for x in (c.values() if isinstance(c, dict) else [c])]


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a is b is None or a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b)


@every_meta_case
def test_is_the_step_of_the_loss(case):
    net, support, query = mlp(), [batch() for _ in range(3)], batch()
    twin, start = copy.deepcopy(net), list(net.parameters())
    begin = list(twin.parameters())
    own, other = (case.meta(n, **case.kwargs) for n in (net, twin))
    for k, data in enumerate(support):
        grads = gradients(net, data)
        assert own.step(grads=by_name(net, grads) if k == 1 else grads) is None
        other.step(mse(twin, data))
    same(list(net.parameters()), list(twin.parameters()))
    same(slots_of(own), slots_of(other))
    found = torch.autograd.grad(mse(net, query), start)
    all_close(found, torch.autograd.grad(mse(twin, query), begin))


@pytest.mark.parametrize("create_graph", [True, False])
def test_the_derivative_by_what_is_given(create_graph):
    net, start = mlp(), mlp().state_dict()
    lr = torch.tensor(0.3, requires_grad=True)
    grads = [torch.randn_like(p, requires_grad=True) for p in net.parameters()]
    data = batch()

    def run():
        net.load_state_dict(start)
        with torchopt.inner_loop(net, torchopt.adam(lr, eps=0.1), create_graph=create_graph) as own:
            own.step(grads=grads)
            own.step(grads=[2 * g.sin() for g in grads])
            return mse(net, data)

    if create_graph:
        assert_derivative(run, [lr, *grads], directions=2)
    else:
        assert_derivative(run, [lr])
        assert all(g is None for g in torch.autograd.grad(run(), grads, allow_unused=True))


def test_accumulated_over_parts_in_a_buffer_that_is_used_again():
    net, twin, data = mlp(), mlp(), batch(8)
    twin.load_state_dict(net.state_dict())
    lr = torch.tensor(0.1, requires_grad=True)
    own, other = (torchopt.MetaAdam(n, lr=lr, eps=0.1) for n in (net, twin))
    start, begin = list(net.parameters()), list(twin.parameters())
    buffer = [torch.zeros_like(p) for p in start]
    for _ in range(3):
        for part in range(4):
            few = [x[2 * part : 2 * part + 2] for x in data]
            for total, g in zip(buffer, gradients(net, few, create_graph=False)):
                total += g / 4
        own.step(grads=buffer)
        for total in buffer:
            total.zero_()
        other.step(mse(twin, data), create_graph=False)
    all_close(list(net.parameters()), list(twin.parameters()))
    query = batch()
    found = torch.autograd.grad(mse(net, query), [lr, *start])
    all_close(found, torch.autograd.grad(mse(twin, query), [lr, *begin]))


def test_gradients_of_functions():
    net, data = mlp(), batch()
    twin = copy.deepcopy(net)

    def loss(params):
        return (functional_call(net, params, data[0]) - data[1]).square().mean()

    own, other = torchopt.MetaAdam(net, lr=0.1), torchopt.MetaAdam(twin, lr=0.1)
    own.step(grads=torch.func.grad(loss)(dict(net.named_parameters())))
    other.step(mse(twin, data))
    all_close(list(net.parameters()), list(twin.parameters()))


def test_none_leaves_a_parameter_and_its_count_alone():
    net = TwoHeads()
    inner = torchopt.MetaAdam(net, lr=0.1)
    before = dict(net.named_parameters())
    inner.step(grads={n: None if "heads.b" in n else torch.ones_like(p) for n, p in before.items()})
    for name, p in net.named_parameters():
        assert (p is before[name]) == ("heads.b" in name)
    (state,) = torchopt.extract_state_dict(inner)
    assert {n for n, count in state.step.items() if count == 0} == {
        "heads.b.weight",
        "heads.b.bias",
    }


def test_frozen_parameters_may_have_none_or_be_left_out():
    found = []
    for form in (list, dict, tuple):
        torch.manual_seed(1)
        net, data = mlp(), batch()
        net[0].weight.requires_grad_(False)
        inner = torchopt.MetaSGD(net, lr=0.1)
        grads = gradients(net, data)
        given = {list: [None, *grads], tuple: grads, dict: by_name(net, grads)}[form]
        inner.step(grads=given)
        found.append([p.detach() for p in net.parameters()])
    same(found[0], found[1])
    same(found[0], found[2])


def test_tied_weights_may_have_any_name():
    net, data = Tied(), batch()
    grads = gradients(net, data)
    named = by_name(net, grads)
    torchopt.MetaSGD(twin := copy.deepcopy(net), lr=0.1).step(grads=named)
    renamed = {n.replace("encode.weight", "decode.weight"): g for n, g in named.items()}
    assert renamed.keys() != named.keys()
    torchopt.MetaSGD(other := copy.deepcopy(net), lr=0.1).step(grads={**named, **renamed})
    torchopt.MetaSGD(net, lr=0.1).step(grads=renamed)
    for n in (net, other):
        same(list(n.parameters()), list(twin.parameters()))


def test_several_networks():
    nets, data = [mlp(), mlp()], batch()
    twins = copy.deepcopy(nets)
    grads = [gradients(net, data) for net in nets]
    own = torchopt.MetaSGD([nets[0], {"params": nets[1], "lr": 0.2}], lr=0.1)
    own.step(grads=[*grads[0], *grads[1]])
    for net, twin, g, lr in zip(nets, twins, grads, (0.1, 0.2)):
        for p, q, x in zip(net.parameters(), twin.parameters(), g):
            close(p, q - lr * x)
    names = [f"{k}.{n}" for k, net in enumerate(twins) for n, _ in net.named_parameters()]
    other = torchopt.MetaSGD([twins[0], {"params": twins[1], "lr": 0.2}], lr=0.1)
    other.step(grads=dict(zip(names, [*grads[0], *grads[1]])))
    for net, twin in zip(nets, twins):
        same(list(net.parameters()), list(twin.parameters()))


def test_hooks_see_each_gradient_once():
    seen = []
    net, data = mlp(), batch()
    net[0].weight.register_hook(lambda g: (seen.append(1), g * 2)[1])
    twin = copy.deepcopy(net)
    twin[0].weight.register_hook(lambda g: g * 2)
    own, other = torchopt.MetaSGD(net, lr=0.1), torchopt.MetaSGD(twin, lr=0.1)
    for k in range(3):
        own.step(grads=gradients(net, data))
        assert len(seen) == k + 1
        other.step(mse(twin, data))
    same(list(net.parameters()), list(twin.parameters()))


def test_under_no_grad_the_new_weights_are_leaves():
    net, data = mlp(), batch()
    lr = torch.tensor(0.1, requires_grad=True)
    inner = torchopt.MetaSGD(net, lr=lr, momentum=0.9)
    for _ in range(2):
        grads = gradients(net, data)
        with torch.no_grad():
            inner.step(grads=grads)
        assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    assert not any(x.requires_grad for x in slots_of(inner))


def test_the_value_reaches_what_reads_it():
    net, data = mlp(), batch()
    twin = copy.deepcopy(net)
    own, other = torchopt.MetaPolyakSGD(net), torchopt.MetaPolyakSGD(twin)
    start, begin = list(net.parameters()), list(twin.parameters())
    loss = mse(net, data)
    grads = torch.autograd.grad(loss, start, create_graph=True)
    own.step(grads=grads, value=loss)
    other.step(mse(twin, data))
    same(list(net.parameters()), list(twin.parameters()))
    found = torch.autograd.grad(mse(net, data), start)
    all_close(found, torch.autograd.grad(mse(twin, data), begin))
    with pytest.raises(ValueError, match=r"value.*got none.*step\(grads=\.\.\., value=loss\)"):
        own.step(grads=gradients(net, data))


def test_states_of_all_kinds():
    """Extracted and recovered, copied, saved and loaded, and put back by a block."""
    net, data = mlp(), batch()
    inner = torchopt.MetaAdam(net, lr=0.1)
    inner.step(grads=gradients(net, data))
    saved, at = torchopt.extract_state_dict(inner), torchopt.extract_state_dict(net)
    stream = io.BytesIO()
    torch.save(inner.state_dict(), stream)
    stream.seek(0)
    ends = []
    with torchopt.inner_loop(net, inner):
        inner.step(grads=gradients(net, data))
        ends.append([p.detach() for p in net.parameters()])
    assert torchopt.extract_state_dict(inner)[0].step == 1
    twin = copy.deepcopy(net)
    loaded = torchopt.MetaAdam(twin, lr=0.1)
    loaded.load_state_dict(torch.load(stream))
    loaded.step(grads=gradients(twin, data))
    ends.append([p.detach() for p in twin.parameters()])
    inner.step(grads=gradients(net, data))
    torchopt.recover_state_dict(inner, saved)
    torchopt.recover_state_dict(net, at)
    inner.step(grads=gradients(net, data))
    ends.append([p.detach() for p in net.parameters()])
    same(ends[0], ends[1])
    same(ends[0], ends[2])
    torchopt.stop_gradient(inner)
    assert not any(x.requires_grad for x in slots_of(inner))


def test_after_its_block():
    net, data = mlp(), batch()
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        pass
    with pytest.raises(RuntimeError, match="has ended"):
        inner.step(grads=gradients(net, data))


ones = lambda net: [torch.ones_like(p) for p in net.parameters()]  # noqa: E731
named = lambda net: {n: torch.ones_like(p) for n, p in net.named_parameters()}  # noqa: E731
BAD = {
    "both": (lambda net: {"loss": mse(net, batch()), "grads": ones(net)}, TypeError, "got both"),
    "value": (lambda net: {"loss": mse(net, batch()), "value": 1.0}, TypeError, "value="),
    "retain": (lambda net: {"grads": ones(net), "retain_graph": True}, TypeError, "retain_graph"),
    "tensor": (lambda net: {"grads": torch.ones(3)}, TypeError, r"list.*dict.*step\(loss\)"),
    "generator": (lambda net: {"grads": iter(ones(net))}, TypeError, "list or tuple"),
    "positional": (lambda net: {"loss": ones(net)}, TypeError, r"step\(grads="),
    "short": (lambda net: {"grads": ones(net)[1:]}, ValueError, "5 gradients for 6 parameters"),
    "misspelt": (
        lambda net: {"grads": {**named(net), "body.wieght": torch.ones(4, 3)}},
        ValueError,
        "'body.wieght', which names no parameter",
    ),
    "missing": (
        lambda net: {"grads": {n: g for n, g in named(net).items() if n != "head.bias"}},
        ValueError,
        "no gradient of 'head.bias'.*None",
    ),
    "none": (lambda net: {"grads": [None] * 6}, ValueError, r"All gradients are None.*\.grad"),
    "number": (lambda net: {"grads": [1.0, *ones(net)[1:]]}, TypeError, "'body.weight'.*float"),
    "shape": (
        lambda net: {"grads": [*ones(net)[:-1], torch.ones(3)]},
        ValueError,
        r"'head.bias' does not fit.*\(3,\)",
    ),
    "dtype": (
        lambda net: {"grads": [g.float() for g in ones(net)]},
        TypeError,
        "'body.weight' does not fit.*float32",
    ),
    "sparse": (
        lambda net: {"grads": [ones(net)[0].to_sparse(), *ones(net)[1:]]},
        TypeError,
        "'body.weight' is sparse",
    ),
}


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "adapted"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_gradients(kind, steps):
    make, error, message = BAD[kind]
    net, inner = adapted(steps=steps)
    arguments = make(net)
    with refused(error, message, net, inner):
        inner.step(**arguments)


def test_a_gradient_of_a_frozen_parameter():
    net, inner = adapted(steps=0)
    net.head.bias.requires_grad_(False)
    with refused(ValueError, "'head.bias', which is frozen", net, inner):
        inner.step(grads=ones(net))


def test_two_gradients_of_a_tied_weight():
    net = Tied()
    inner = torchopt.MetaSGD(net, lr=0.1)
    grads = {n: torch.ones_like(p) for n, p in net.named_parameters(remove_duplicate=False)}
    with pytest.raises(ValueError, match=r"two gradients.*'encode\.weight'"):
        inner.step(grads=grads)
    assert all(p.is_leaf for p in net.parameters())


def test_a_loss_of_another_kind_of_module_says_so():
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"NoneType.*step\(grads=\.\.\.\)"):
        torchopt.MetaSGD(net, lr=0.1).step()

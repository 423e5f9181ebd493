"""``extract_state_dict`` and ``module_clone``: what a state taken from things at hand is."""

import pytest
import torch
from adapting import all_close, assert_unchanged, batch, mse, objects_of, snapshot
from extracting import Net, adapted, every_spelling, every_way, leaves_of
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@every_spelling
def test_extracts_a_module(by, spelling):
    net, _, start = adapted()
    own = dict(objects_of(net))
    state = torchopt.extract_state_dict(net, by=spelling)
    assert isinstance(state, torchopt.ModuleState)
    assert {**state.params, **state.buffers}.keys() == own.keys()
    assert state.params["decode.weight"] is state.params["encode.weight"]
    for name, tensor in {**state.params, **state.buffers}.items():
        assert torch.equal(tensor, own[name])
        assert tensor.requires_grad == own[name].requires_grad
        assert (tensor is own[name]) == (by == "reference")
    weight = state.params["encode.weight"]
    if by == "deepcopy":
        assert weight.is_leaf
        assert isinstance(weight, nn.Parameter)
    else:
        (grad,) = torch.autograd.grad(weight.square().sum(), start[0])
        assert grad.abs().max() > 0


@every_spelling
def test_extracts_an_optimizer(by, spelling):
    _, optimizer, start = adapted()
    (own,) = torchopt.extract_state_dict(optimizer)
    (state,) = torchopt.extract_state_dict(optimizer, by=spelling)
    assert isinstance(state, torchopt.OptState)
    assert state.step == own.step == 2
    assert set(state.exp_avg) == {n for n, p in Net().named_parameters() if p.requires_grad}
    for slot, column in own.slots.items():
        for name, tensor in column.items():
            other = state.slots[slot][name]
            assert torch.equal(other, tensor)
            assert (other is tensor) == (by == "reference")
    moment = state.exp_avg["encode.weight"]
    if by == "deepcopy":
        assert moment.is_leaf
    else:
        (grad,) = torch.autograd.grad(moment.square().sum(), start[0])
        assert grad.abs().max() > 0


@every_spelling
def test_extracts_a_tree(by, spelling):
    leaf = torch.randn(3, requires_grad=True)
    tree = {"a": [leaf, leaf * 2], "b": (leaf, None, 3)}
    state = torchopt.extract_state_dict(tree, by=spelling)
    assert type(state["b"]) is tuple
    assert state["b"][1:] == (None, 3)
    assert state["a"][0] is state["b"][0]
    assert (state["a"][0] is leaf) == (by == "reference")
    assert torch.equal(state["a"][1], tree["a"][1])
    assert state["a"][0].requires_grad
    if by == "deepcopy":
        assert state["a"][1].is_leaf
    else:
        assert torch.autograd.grad(state["a"][1].sum() + state["a"][0].sum(), leaf)[0].eq(3).all()


def test_copies_are_independent_in_memory():
    net = Net()
    for by in ("copy", "deepcopy"):
        state = torchopt.extract_state_dict(net, by=by)
        own = dict(objects_of(net))
        for name, tensor in {**state.params, **state.buffers}.items():
            assert tensor.data_ptr() != own[name].data_ptr()


@every_way
def test_device(by):
    net, optimizer, _ = adapted()
    for target in (net, optimizer, dict(net.named_parameters())):
        here = torchopt.extract_state_dict(target, by=by, device="cpu")
        there = torchopt.extract_state_dict(target, by=by, device="meta")
        assert leaves_of(here)
        assert all(t.device.type == "cpu" for t in leaves_of(here))
        assert all(t.device.type == "meta" for t in leaves_of(there))
    there = torchopt.extract_state_dict(net, by=by, device=torch.device("meta"))
    assert there.params["decode.weight"] is there.params["encode.weight"]
    assert [p.requires_grad for p in there.params.values()] == [
        p.requires_grad for _, p in net.named_parameters(remove_duplicate=False)
    ]
    if by == "reference":
        same = torchopt.extract_state_dict(net, device="cpu")
        assert same.params["head.weight"] is net.head.weight


def test_device_of_module_clone():
    net = Net()
    clone = torchopt.module_clone(net, by="deepcopy", device="meta")
    assert all(t.device.type == "meta" for _, t in objects_of(clone))
    assert all(isinstance(p, nn.Parameter) for p in clone.parameters())
    assert all(t.device.type == "cpu" for _, t in objects_of(net))


@every_way
def test_without_buffers(by):
    net = Net()
    state = torchopt.extract_state_dict(net, by=by, with_buffers=False)
    assert not state.buffers
    buffers = list(net.buffers())
    net(batch()[0])
    moved = [b.clone() for b in buffers]
    torchopt.recover_state_dict(net, state)
    assert all(b is c for b, c in zip(net.buffers(), buffers))
    assert all(torch.equal(b, m) for b, m in zip(net.buffers(), moved))


@every_way
def test_detached_buffers_stay_pristine_at_every_recovery(by):
    net = Net()
    pristine = {n: b.clone() for n, b in net.named_buffers()}
    state = torchopt.extract_state_dict(net, by=by, detach_buffers=True)
    for _ in range(3):
        net(batch()[0])
        assert net.norm.num_batches_tracked == 1
        assert not torch.equal(net.norm.running_mean, pristine["norm.running_mean"])
        torchopt.recover_state_dict(net, state)
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, pristine[name])
            assert buffer is not state.buffers[name]


def test_buffers_by_reference_follow_the_module():
    """Documented: only the tensors are kept, and BatchNorm updates them in place."""
    net = Net()
    state = torchopt.extract_state_dict(net)
    net(batch()[0])
    torchopt.recover_state_dict(net, state)
    assert net.norm.num_batches_tracked == 1


def test_a_copied_state_recovers_more_than_once():
    """What a recovered module does in place must not reach a state that was copied."""
    net = Net()
    for by in ("copy", "deepcopy"):
        state = torchopt.extract_state_dict(net, by=by, detach_buffers=True)
        wanted = {n: t.detach().clone() for n, t in {**state.params, **state.buffers}.items()}
        for _ in range(2):
            torchopt.recover_state_dict(net, state)
            optimizer = torchopt.MetaSGD(net, lr=0.1)
            optimizer.step(mse(net, batch()))
        torchopt.recover_state_dict(net, state)
        for name, tensor in objects_of(net):
            assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("by", ["shallow", "", "Reference", None, 1])
@pytest.mark.parametrize("function", [torchopt.extract_state_dict, torchopt.module_clone])
def test_another_word_is_refused(function, by):
    for target in (Net(), torchopt.MetaSGD(Net()), {"a": torch.ones(2)}):
        with pytest.raises(ValueError, match="'reference', 'copy' or 'deepcopy'"):
            function(target, by=by)


# Clones -------------------------------------------------------------------------------------------


@every_spelling
@pytest.mark.parametrize("when", ["fresh", "adapted"])
def test_module_clone(when, by, spelling):
    net, start = Net(), None
    if when == "adapted":
        net, _, start = adapted()
    net.eval()
    clone, x = torchopt.module_clone(net, by=spelling), batch()[0]
    assert type(clone) is Net
    assert clone is not net
    assert not clone.training
    assert clone.decode.weight is clone.encode.weight
    for (_, t), (_, c) in zip(objects_of(net), objects_of(clone)):
        assert torch.equal(t, c)
        assert t.requires_grad == c.requires_grad
        assert (t is c) == (by == "reference")
    assert torch.equal(clone(x), net(x))
    if by == "deepcopy":
        assert all(p.is_leaf for p in clone.parameters())
    elif when == "adapted":
        trainable = [p for p in start if p.requires_grad]
        grads = torch.autograd.grad(clone(x).square().sum(), trainable)
        assert all(g.abs().max() > 0 for g in grads)
    before = snapshot(net)
    torchopt.MetaSGD(clone, lr=0.1).step(mse(clone, batch()))
    assert_unchanged(net, before)
    assert clone.encode.weight is not net.encode.weight


def test_module_clone_with_buffers_of_its_own():
    net = Net()
    clone = torchopt.module_clone(net, detach_buffers=True)
    assert clone.encode.weight is net.encode.weight
    clone(batch()[0])
    assert clone.norm.num_batches_tracked == 1
    assert net.norm.num_batches_tracked == 0


@every_way
def test_clone_of_an_optimizer_goes_on_by_itself(by):
    net, optimizer, start = adapted()
    clone, data = torchopt.module_clone(optimizer, by=by), batch()
    assert type(clone) is torchopt.MetaAdam
    twin = clone.param_groups[0]["params"]
    assert twin is not net
    before = snapshot(net)
    (own,) = torchopt.extract_state_dict(optimizer)
    net.eval()
    twin.eval()
    clone.step(mse(twin, data))
    assert_unchanged(net, before)
    assert torchopt.extract_state_dict(optimizer)[0].step == own.step == 2
    assert torchopt.extract_state_dict(clone)[0].step == 3
    optimizer.step(mse(net, data))
    all_close(net.parameters(), twin.parameters())
    trainable = [p for p in start if p.requires_grad]
    if by != "deepcopy":
        grads = torch.autograd.grad(mse(twin, data), trainable)
        assert all(g.abs().max() > 0 for g in grads)


def test_clone_of_an_optimizer_has_groups_of_its_own():
    optimizer = torchopt.MetaAdam(Net(), lr=0.1)
    clone = torchopt.module_clone(optimizer)
    clone.param_groups[0]["lr"] = 0.5
    clone.add_param_group(nn.Linear(2, 2))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert len(optimizer.param_groups) == 1


@every_way
def test_clone_of_a_tree(by):
    leaf = torch.randn(3, requires_grad=True)
    tree = {"a": leaf, "b": [leaf * 2]}
    clone = torchopt.module_clone(tree, by=by)
    assert clone is not tree
    assert torch.equal(clone["b"][0], tree["b"][0])
    assert (clone["a"] is leaf) == (by == "reference")

"""Parts with transformations of their own as parameter groups, for schedulers and checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from two_parts import LABELS, TRANSFORMS, loss_of, make, train, two_optimizers

import torchopt


def values(net):
    return {n: p.detach() for n, p in net.named_parameters()}


def by_size(params):
    """Label matrices and vectors, whatever the face gives."""
    if isinstance(params, dict):
        return {n: "body" if p.dim() > 1 else "head" for n, p in params.items()}
    return ["body" if p.dim() > 1 else "head" for p in params]


# Parameter groups -------------------------------------------------------------------------------


def partitioned(net):
    return torchopt.Optimizer(net.named_parameters(), torchopt.partition(TRANSFORMS, LABELS))


def masked(net):
    """The same by masks that exclude each other, over a list."""
    first = [True, True, False, False]
    tx = torchopt.chain(
        torchopt.masked(TRANSFORMS["body"], first),
        torchopt.masked(TRANSFORMS["head"], lambda ps: [len(p) == 1 for p in ps]),
    )
    return torchopt.Optimizer(net.parameters(), tx)


MADE = pytest.mark.parametrize("make_optimizer", [partitioned, masked])


@MADE
def test_schedulers_move_every_rate(make_optimizer):
    net, twin = make(), make()
    optimizer, peers = make_optimizer(net), two_optimizers(twin)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, *peers)]
    train(net, optimizer, schedulers=schedulers[:1])
    train(twin, *peers, schedulers=schedulers[1:])
    assert_close(values(net), values(twin), times=10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03 / 8, 0.1 / 8]


@MADE
def test_a_distributed_checkpoint_moves_no_weight_and_comes_back(make_optimizer):
    net = make()
    optimizer = make_optimizer(net)
    before = copy.deepcopy(values(net))
    get_state_dict(net, optimizer)  # takes a step with every lr at 0
    assert_close(values(net), before)
    assert not any(optimizer.state[p].get("step", 0) > 1 for p in net.parameters())

    net, twin = make(), make()
    optimizer = make_optimizer(net)
    train(net, optimizer)
    model_state, state = copy.deepcopy(get_state_dict(net, optimizer))
    other = make_optimizer(twin)
    set_state_dict(twin, other, model_state_dict=model_state, optim_state_dict=state)
    train(net, optimizer)
    train(twin, other)
    assert_close(values(twin), values(net))


@MADE
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_it_comes_back_from(make_optimizer, how):
    net = make()
    optimizer = make_optimizer(net)
    train(net, optimizer)
    optimizer.param_groups[1]["lr"] = 0.02
    twin = copy.deepcopy(net)
    if how == "state_dict":
        other = make_optimizer(twin)
        other.load_state_dict(optimizer.state_dict())
    elif how == "deepcopy":
        twin, other = copy.deepcopy((net, optimizer))
    elif make_optimizer is masked:
        pytest.skip("a lambda has no pickle")
    else:
        twin, other = pickle.loads(pickle.dumps((net, optimizer)))
    train(net, optimizer)
    train(twin, other)
    assert_close(values(twin), values(net))
    assert other.param_groups[1]["lr"] == 0.02


def test_the_state_of_other_labels_is_refused():
    net = make()
    optimizer = partitioned(net)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["label"] = "tail"
    with pytest.raises(ValueError, match=r"'tail'.*'body'"):
        optimizer.load_state_dict(saved)


def test_groups_of_the_users_keep_their_numbers():
    net = make()
    groups = [
        {"params": net[0].parameters(), "lr": 0.5},
        {"params": net[2].parameters()},
    ]
    optimizer = torchopt.Optimizer(groups, torchopt.partition(TRANSFORMS, by_size))
    made = [(g["label"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
    assert made == [("body", 0.5, 1), ("head", 0.5, 1), ("body", 0.03, 1), ("head", 0.1, 1)]


def test_groups_that_come_later():
    net, extra = make(), nn.Linear(2, 2).double()
    optimizer = torchopt.Optimizer(net.parameters(), torchopt.partition(TRANSFORMS, by_size))
    optimizer.add_param_group({"params": extra.parameters(), "weight_decay": 0.0})
    labels = [group["label"] for group in optimizer.param_groups]
    assert labels == ["body", "head", "body", "head"]
    other = nn.Parameter(torch.ones(3).double())
    optimizer.add_param_group({"params": [other], "label": "head", "lr": 0.25})
    other.grad = torch.ones(3).double()
    optimizer.step()
    assert_close(other.detach(), torch.full((3,), 0.75).double())
    with pytest.raises(ValueError, match="'tail'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "label": "tail"})
    with pytest.raises(ValueError, match="parameter"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, 1)), other]})
    assert len(optimizer.param_groups) == 5
    later = torchopt.Optimizer([net[0].weight], torchopt.partition(TRANSFORMS, ["body"]))
    with pytest.raises(ValueError, match='"label"'):
        later.add_param_group({"params": list(net[2].parameters())})


def test_a_list_keeps_its_order_though_groups_divide_the_parameters():
    """Masks and labels of a list are those of the parameters as they were given."""
    decay = [True, False, True, False]
    labels = ["head", "body", "head", "body"]
    transforms = {"body": torchopt.sgd(0.1), "head": torchopt.sgd(0.2)}
    tx = torchopt.chain(
        torchopt.add_decayed_weights(0.5, mask=decay), torchopt.partition(transforms, labels)
    )
    params = [nn.Parameter(torch.randn(2).double()) for _ in range(4)]
    before = [p.detach().clone() for p in params]
    optimizer = torchopt.Optimizer(params, tx)
    for p in params:
        p.grad = torch.ones(2).double()
    optimizer.step()
    for p, old, decays, label in zip(params, before, decay, labels):
        rate = 0.1 if label == "body" else 0.2
        assert_close(p.detach(), old - rate * (1 + 0.5 * decays * old))


def test_the_norm_of_a_chain_is_that_of_all_groups():
    net, twin = make(), make()
    tx = torchopt.chain(torchopt.clip_grad_norm(0.01), torchopt.partition(TRANSFORMS, LABELS))
    optimizer = torchopt.Optimizer(net.named_parameters(), tx)
    assert [group["max_norm"] for group in optimizer.param_groups] == [0.01, 0.01]
    peers = two_optimizers(twin)
    loss_of(net).backward()
    loss_of(twin).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    for one in (optimizer, *peers):
        one.step()
    assert_close(values(net), values(twin), times=1e5)  # torch adds 1e-6 to the norm


def test_numbers_by_name_within_a_part():
    net = make()
    transforms = {
        "body": torchopt.sgd({"0.weight": 0.1, "0.bias": 0.2}),
        "head": torchopt.adam(0.1, betas=({"2": 0.5}, 0.9)),
    }
    optimizer = torchopt.Optimizer(net.named_parameters(), torchopt.partition(transforms, LABELS))
    loss_of(net).backward()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    optimizer.step()
    assert_close(net[0].bias.detach(), before["0.bias"] - 0.2 * grads["0.bias"])


def test_a_part_without_a_rate_has_one_for_schedulers():
    net = make()
    transforms = {"body": torchopt.set_to_zero(), "head": torchopt.sgd(0.1)}
    optimizer = torchopt.Optimizer(net.named_parameters(), torchopt.partition(transforms, LABELS))
    before = net[0].weight.detach().clone()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(net, optimizer, schedulers=[scheduler])
    assert_close(net[0].weight.detach(), before)


# What cannot be reached ---------------------------------------------------------------------------

HIDDEN = {
    "two-in-a-row": lambda: torchopt.chain(torchopt.sgd(0.1), torchopt.scale_by_learning_rate(0.1)),
    "overlapping": lambda: torchopt.chain(
        torchopt.masked(torchopt.sgd(0.1), [True, True, True, False]),
        torchopt.masked(torchopt.sgd(0.2), [False, False, True, True]),
    ),
    "apart": lambda: torchopt.chain(
        torchopt.masked(torchopt.sgd(0.1), [True, True, False, False]),
        torchopt.clip_grad_norm(1.0),
        torchopt.masked(torchopt.sgd(0.2), [False, False, True, True]),
    ),
    "masked-scale": lambda: torchopt.chain(
        torchopt.masked(torchopt.sgd(0.1), [True, True, False, False]),
        torchopt.masked(torchopt.scale(-0.2), [False, False, True, True]),
    ),
    "scale": lambda: torchopt.chain(torchopt.scale_by_adam(), torchopt.scale(-0.1)),
    "part": lambda: torchopt.partition(
        {"a": torchopt.sgd(0.1), "b": torchopt.scale(-0.1)}, ["a", "a", "b", "b"]
    ),
}
REACHED = {
    "adamw-mask": lambda: torchopt.adamw(0.1, mask=[True, False, True, False]),
    "clipping": lambda: torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(0.1)),
    "freezing": lambda: torchopt.chain(
        torchopt.masked(torchopt.scale(0.0), [True, False, False, False]), torchopt.sgd(0.1)
    ),
    "parts": lambda: torchopt.partition(TRANSFORMS, ["body", "body", "head", "head"]),
    "sign-and-rate": lambda: torchopt.chain(torchopt.scale(-1.0), torchopt.sgd(0.1)),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_rate_out_of_reach_is_told(kind):
    scaled = kind in ("scale", "masked-scale", "part")
    advice = "scale_by_learning_rate" if scaled else r"torchopt\.partition"
    with pytest.warns(UserWarning, match=advice):
        torchopt.Optimizer(make().parameters(), HIDDEN[kind]())


@pytest.mark.parametrize("kind", REACHED)
def test_nothing_is_told_otherwise(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchopt.Optimizer(make().parameters(), REACHED[kind]())

"""What runs twice in a step of SAM, its states, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from refusing import refused
from tolerances import all_finite, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchopt


F64 = {"dtype": torch.float64}


def loss_of(w: Any) -> Tensor:
    a, b = w["a"], w["b"]
    return 0.1 * (a**4).sum() + 0.5 * (a.sum() * b - 1).square().sum()


def start() -> dict[str, Tensor]:
    return {"a": nonzero(3), "b": nonzero(2)}


def closure_of(optimizer: Any, w: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(w)
        loss.backward()
        return loss

    return closure


# What else runs twice -----------------------------------------------------------------------------


class Normed(nn.Module):
    """A network with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, **F64)
        self.norm = nn.BatchNorm1d(3, **F64)
        self.x = nonzero(6, 2)

    def loss(self) -> Tensor:
        return (self.norm(self.linear(self.x)) - self.x.sum(1, keepdim=True)).square().mean()


def test_running_statistics_count_a_batch_once() -> None:
    """With ``module=``, ``keep_buffers``, and in a network's optimizer; else twice, as documented.

    The weights do not depend on it.
    """
    net = Normed()
    once = copy.deepcopy(net)
    once.loss()
    ends = {}
    for way in ("nothing", "module", "keep_buffers", "meta"):
        own = copy.deepcopy(net)
        buffers = dict(own.norm.named_buffers())
        if way == "meta":
            torchopt.MetaSAM(own, torchopt.sgd(0.1)).step(own.loss)
        else:
            module = own if way == "module" else None
            optimizer = torchopt.SAM(own.parameters(), torchopt.sgd(0.1), module=module)
            if way == "keep_buffers":
                own.loss().backward()
                optimizer.first_step()
                with torchopt.keep_buffers(own):
                    own.loss().backward()
                optimizer.second_step()
            else:

                def closure(optimizer: Any = optimizer, own: Any = own) -> Tensor:
                    optimizer.zero_grad()
                    loss = own.loss()
                    loss.backward()
                    return loss

                optimizer.step(closure)
        assert own.norm.num_batches_tracked == (2 if way == "nothing" else 1)
        if way != "nothing":
            assert_close(own.norm.running_mean, once.norm.running_mean)
            assert_close(own.norm.running_var, once.norm.running_var)
        for name, buffer in own.norm.named_buffers():
            assert buffer is buffers[name]
        ends[way] = [p.detach() for p in own.parameters()]
    for end in ends.values():
        assert_close(end, ends["nothing"])


def test_buffers_are_kept_when_the_block_raises_and_shared_ones_stay_shared() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    net[1].running_mean = net[0].running_mean
    mean = net[0].running_mean
    with contextlib.suppress(KeyError), torchopt.keep_buffers(net):
        assert net[0].running_mean is net[1].running_mean is not mean
        net(torch.randn(4, 2))
        raise KeyError
    assert net[0].running_mean is net[1].running_mean is mean
    assert not mean.any()
    with pytest.raises(TypeError, match="keep_buffers expects modules"), torchopt.keep_buffers(1):  # pyright: ignore
        pass


def test_a_graph_through_buffers_stays_valid() -> None:
    """The meta-gradient of a network in evaluation mode reads buffers that a step has seen."""
    net = Normed()
    net.norm.eval()
    first = net.linear.weight
    inner = torchopt.MetaSAM(net, torchopt.sgd(0.1))
    for _ in range(2):
        inner.step(net.loss)
    (found,) = torch.autograd.grad(net.loss(), first)
    assert all_finite(found)
    assert found.any()


def test_hooks_of_a_weight_filter_both_gradients() -> None:
    net = nn.ParameterDict(start())
    net["a"].register_hook(lambda g: g * torch.tensor([1.0, 0.0, 1.0], **F64))
    first = net["a"].detach().clone()
    inner = torchopt.MetaSAM(net, torchopt.sgd(0.1))
    for _ in range(2):
        inner.step(lambda: loss_of(net))
    assert (net["a"] == first).tolist() == [False, True, False]


def test_hooks_of_a_step_run_once() -> None:
    own = {n: nn.Parameter(x) for n, x in start().items()}
    optimizer, calls = torchopt.SAM(own.values(), torchopt.sgd(0.1)), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step(closure_of(optimizer, own))
    assert len(calls) == 1


# States and refusals ------------------------------------------------------------------------------


def test_a_checkpoint_and_a_copy_resume() -> None:
    own = {n: nn.Parameter(x) for n, x in start().items()}
    optimizer = torchopt.SAM(own.values(), torchopt.nadam(0.1), rho=0.3)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, own))
    copies, copied = copy.deepcopy((own, optimizer))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded_at = {n: nn.Parameter(p.detach().clone()) for n, p in own.items()}
    loaded = torchopt.SAM(loaded_at.values(), torchopt.nadam())
    loaded.load_state_dict(torch.load(file))
    for _ in range(2):
        for o, w in ((optimizer, own), (copied, copies), (loaded, loaded_at)):
            o.step(closure_of(o, w))
    for other in (copies, loaded_at):
        assert all(torch.equal(other[n], p) for n, p in own.items())
    assert loaded.param_groups[0]["rho"] == 0.3
    net = nn.ParameterDict({n: p.detach().clone() for n, p in own.items()})
    inner = torchopt.MetaSAM(net, torchopt.nadam())
    inner.load_state_dict(optimizer.state_dict())
    inner.step(lambda: loss_of(net))
    optimizer.step(closure_of(optimizer, own))
    assert_close({n: p.detach() for n, p in net.items()}, {n: p.detach() for n, p in own.items()})


def test_a_copy_keeps_its_module() -> None:
    net = Normed()
    twin, optimizer = copy.deepcopy(
        (net, torchopt.SAM(net.parameters(), torchopt.sgd(0.1), module=net))
    )
    assert optimizer.module is twin


NO_GRADIENT = r"gradients at a second point.*grad_fn=.*step\(closure\)"


def test_without_a_second_gradient_nothing_changes() -> None:
    own = {n: nn.Parameter(x) for n, x in start().items()}
    optimizer = torchopt.SAM(own.values(), torchopt.sgd(0.1, 0.9))
    loss_of(own).backward()
    with refused(ValueError, NO_GRADIENT, *own.values(), optimizer):
        optimizer.step()
    net = nn.ParameterDict(start())
    inner = torchopt.MetaSAM(net, torchopt.sgd(0.1))
    with refused(ValueError, NO_GRADIENT, *net.values()):
        inner.step(loss_of(net))
    tx, w = torchopt.sam(torchopt.sgd(0.1)), start()
    for given in (None, 1.0):
        with pytest.raises(ValueError, match=NO_GRADIENT):
            tx.update(w, tx.init(w), w, grad_fn=given)
    with pytest.raises(ValueError, match=r"grad_fn returned .*\(2,\) for 'a'.*\(3,\)"):
        tx.update(w, tx.init(w), w, grad_fn=lambda w: {"a": w["b"], "b": w["b"]})
    with pytest.raises(ValueError, match="What grad_fn returned"):
        tx.update(w, tx.init(w), w, grad_fn=lambda w: [w["a"]])
    with pytest.raises(ValueError, match="needs the parameters"):
        torchopt.sam(torchopt.sgd(0.1), adaptive=True).update(w, tx.init(w), grad_fn=loss_of)


@pytest.mark.parametrize("api", ["object", "differentiable"])
def test_a_closure_that_raises_the_second_time_leaves_everything(api: str) -> None:
    calls = []

    def loss(w: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second")
        return loss_of(w)

    net = nn.ParameterDict(start())
    before = {n: p.detach().clone() for n, p in net.items()}
    held = dict(net.items())
    if api == "object":
        optimizer: Any = torchopt.SAM(net.parameters(), torchopt.sgd(0.1, 0.9))
        closure: Any = lambda: loss(net).backward()  # noqa: E731
    else:
        optimizer = torchopt.MetaSAM(net, torchopt.sgd(0.1, 0.9))
        closure = lambda: loss(net)  # noqa: E731
    with pytest.raises(KeyError, match="second"):
        optimizer.step(closure)
    for n, p in net.items():
        assert p is held[n]
        assert torch.equal(p, before[n])
    assert len(calls) == 2


def test_the_two_steps_come_in_turn() -> None:
    own = {n: nn.Parameter(x) for n, x in start().items()}
    optimizer = torchopt.SAM(own.values(), torchopt.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"needs first_step\(\)"):
        optimizer.second_step()
    before = {n: p.detach().clone() for n, p in own.items()}
    loss_of(own).backward()
    optimizer.first_step()
    assert not torch.equal(own["a"], before["a"])
    assert own["a"].grad is None
    loss_of(own).backward()
    for call in (optimizer.first_step, optimizer.step):
        with refused(RuntimeError, r"first_step\(\).*restore\(\)", *own.values(), optimizer):
            call()
    optimizer.restore()
    assert all(torch.equal(p, before[n]) for n, p in own.items())
    optimizer.step(closure_of(optimizer, own))


def test_bad_arguments() -> None:
    p = [nn.Parameter(nonzero(2))]
    with pytest.raises(TypeError, match="sam expects"):
        torchopt.SAM(p, torch.optim.SGD)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"rho must be >= 0, got -1\.0"):
        torchopt.sam(torchopt.sgd(0.1), rho=-1.0)
    with pytest.raises(ValueError, match="has a hyperparameter 'rho'"):
        torchopt.sam(torchopt.adadelta())
    with pytest.raises(TypeError, match="adaptive must be True or False"):
        torchopt.sam(torchopt.sgd(0.1), adaptive=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="module must be a network"):
        torchopt.SAM(p, torchopt.sgd(0.1), module=1)  # pyright: ignore[reportArgumentType]


def test_any_network_optimizer_takes_the_function_of_a_loss() -> None:
    """Which it calls once, and under ``torch.no_grad()`` with a graph."""
    weights, calls = start(), []

    def loss(w: Any) -> Tensor:
        calls.append(1)
        return loss_of(w)

    for track in (True, False):
        nets = [nn.ParameterDict({n: x.clone() for n, x in weights.items()}) for _ in range(2)]
        one, two = (torchopt.MetaAdam(net, 0.1) for net in nets)
        for _ in range(2):
            one.step(loss_of(nets[0]))
            with torch.set_grad_enabled(track):
                two.step(lambda net=nets[1]: loss(net))
        assert all(torch.equal(nets[0][n], nets[1][n]) for n in weights)
    assert len(calls) == 4


def test_checkpointed_networks_are_computed_again_with_the_weights_of_each_pass() -> None:
    net, x = nn.Sequential(nn.Linear(2, 4, **F64), nn.Tanh(), nn.Linear(4, 1, **F64)), nonzero(5, 2)
    found = []
    for again in (False, True):
        own = copy.deepcopy(net)
        first, inner = own[0].weight, torchopt.MetaSAM(own, torchopt.sgd(0.1), rho=0.3)

        def loss(own: Any = own, again: bool = again) -> Tensor:
            y = checkpoint(own, x, use_reentrant=False) if again else own(x)
            assert isinstance(y, Tensor)
            return (y - 1).square().mean()

        for _ in range(3):
            inner.step(loss)
        found.append(torch.autograd.grad(loss(), first)[0])
    assert_close(found[1], found[0])

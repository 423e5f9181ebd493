"""Memory that others change: strides and dtypes at one address, storage given back, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


def trained(setting: bool | None) -> tuple[Any, nn.Parameter]:
    torch.manual_seed(4)
    p = nn.Parameter(nonzero(4, 4))
    optimizer = torchopt.Adam([p], lr=0.1, use_accelerated_op=setting)
    for _ in range(3):
        p.grad = nonzero(4, 4)
        optimizer.step()
    p.grad = nonzero(4, 4)
    return optimizer, p


# The object-oriented face -------------------------------------------------------------------------


def transpose(slot: Tensor) -> None:
    slot.t_()


def stride(slot: Tensor) -> None:
    slot.as_strided_((4, 4), (0, 1))


@pytest.mark.parametrize("change", [transpose, stride], ids=lambda f: f.__name__)
@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq"])
def test_a_slot_whose_strides_are_changed_in_place(change: Callable[..., None], slot: str) -> None:
    """It is read as what it now says, at the same address as before."""
    results = []
    for setting in (None, False):
        optimizer, p = trained(setting)
        change(optimizer.state[p][slot])
        for _ in range(2):
            optimizer.step()
        results.append([p.detach(), optimizer.state[p]["exp_avg"]])
    assert_close(*results, times=4)


@needs_library
def test_a_slot_of_another_dtype_at_the_same_address_is_left_to_the_rules() -> None:
    for setting in (None, False):
        optimizer, p = trained(setting)
        before = p.detach().clone()
        slot = optimizer.state[p]["exp_avg"]
        slot.data = slot.data.view(torch.int64)
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("what", ["parameter", "gradient", "slot"])
def test_memory_that_was_given_back_is_refused(setting: Any, what: str) -> None:
    optimizer, p = trained(setting)
    tensors = {"parameter": p, "gradient": p.grad, "slot": optimizer.state[p]["exp_avg"]}
    storage, kept = tensors[what].untyped_storage(), tensors[what].detach().clone()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=f"(?i){what}.*has no memory"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 3
    storage.resize_(size)
    with torch.no_grad():
        tensors[what].copy_(kept)
    optimizer.step()
    twin, q = trained(setting)
    twin.step()
    assert torch.equal(p.detach(), q.detach())


@needs_library
@pytest.mark.parametrize("what", ["gradient", "slot", "parameter"])
def test_memory_that_was_given_back_is_refused_by_kernels(what: str) -> None:
    """A kernel would read the missing address as zeros."""
    params, grads, tx = [nonzero(3)], [nonzero(3)], torchopt.adam()
    _, state = tx.update(grads, tx.init(params), params)
    tensors = {"parameter": params[0], "gradient": grads[0], "slot": state.slots["exp_avg"][0]}
    tensors[what].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        tx.apply_gradients(grads, state, params, inplace=False)


# The functional face: all or nothing --------------------------------------------------------------


def expanded() -> Tensor:
    return nonzero(3).expand(2, 3)


def of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return nonzero(2, 3)


@pytest.mark.parametrize("make", [expanded, of_inference_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("face", ["apply_updates", "apply_gradients"])
def test_a_parameter_that_cannot_be_changed_is_refused_before_any_is(make: Any, face: str) -> None:
    params = {"a": nonzero(4), "b": make(), "c": nonzero(2)}
    before = {k: v.clone() for k, v in params.items()}
    other = {k: nonzero(*v.shape) for k, v in params.items()}
    tx = torchopt.sgd(0.1)
    steps = {
        "apply_updates": lambda: torchopt.apply_updates(params, other),
        "apply_gradients": lambda: tx.apply_gradients(other, tx.init(params), params),
    }
    with pytest.raises(RuntimeError, match=r"Parameter 'b'.*Give its"):
        steps[face]()
    assert all(torch.equal(params[k], before[k]) for k in params)
    new = torchopt.apply_updates(params, other, inplace=False)
    assert_close(new, {k: before[k] + other[k] for k in params})


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_the_optimizer_names_the_expanded_parameter(setting: Any) -> None:
    a, b = nn.Parameter(nonzero(4)), nn.Parameter(expanded())
    optimizer = torchopt.SGD([("a", a), ("b", b)], lr=0.1, use_accelerated_op=setting)
    before = a.detach().clone()
    a.grad, b.grad = nonzero(4), nonzero(2, 3)
    with pytest.raises(RuntimeError, match=r"Parameter 'b'.*expanded"):
        optimizer.step()
    assert torch.equal(a.detach(), before)


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_channels_last_weights_and_slots_stay_so(setting: Any) -> None:
    layout = torch.channels_last
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    twin.load_state_dict(net.state_dict())
    net = net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    x, inner = nonzero(2, 3, 4, 4), torchopt.MetaAdam(net, lr=0.1, use_accelerated_op=setting)
    other = torchopt.MetaAdam(twin, lr=0.1, use_accelerated_op=setting)
    for _ in range(3):
        inner.step(net(x).square().mean())
        other.step(twin(x).square().mean())
        assert net[0].weight.is_contiguous(memory_format=layout)
        assert not net[0].weight.is_contiguous()
        (state,) = torchopt.extract_state_dict(inner)
        for column in state.slots.values():
            assert column["0.weight"].is_contiguous(memory_format=layout)
    assert_close(dict(net.named_parameters()), dict(twin.named_parameters()), times=20)

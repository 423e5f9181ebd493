"""Parameters without dimensions, and hyperparameters whose dtype or shape is another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


F64 = torch.float64


def recipes(w: Any) -> dict[str, torchopt.GradientTransformation]:
    return {
        "adam-decay": torchopt.adam(0.1, weight_decay=w),
        "adam-betas": torchopt.adam(0.1, betas=(w, w), amsgrad=True),
        "adam-eps": torchopt.adam(0.1, eps=w, eps_root=w),
        "adamw-decay": torchopt.adamw(0.1, weight_decay=w),
        "rmsprop-decay": torchopt.rmsprop(0.1, weight_decay=w, centered=True, momentum=w),
        "sgd": torchopt.sgd(w, weight_decay=w, momentum=w, dampening=w),
        "nesterov": torchopt.sgd(0.1, weight_decay=w, momentum=0.9, nesterov=True),
        "scale-adam": torchopt.chain(torchopt.scale(w), torchopt.adam(w)),
        "masked": torchopt.chain(
            torchopt.masked(torchopt.scale(w), lambda p: [True]), torchopt.adam(0.1)
        ),
        "clip": torchopt.chain(torchopt.clip_grad_norm(w), torchopt.rmsprop(0.1)),
    }


def path(tx: Any, p: Tensor, steps: int = 3) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(6)
    params, state = [p], tx.init([p])
    for _ in range(steps):
        g = [nonzero(*p.shape).to(p.dtype)]
        params, state = tx.apply_gradients(g, state, params, inplace=False)
    return params[0], state.slots


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", recipes(0.1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("wide", [(), (1,)], ids=str)
def test_a_wider_hyperparameter_does_not_widen(
    name: str, dtype: Any, shape: Any, wide: Any
) -> None:
    """The values are those of the plain number, in the dtypes of the parameter and its slots."""
    start = torch.full(shape, 0.5, dtype=dtype)
    for steps in (1, 3):
        p, slots = path(recipes(torch.full(wide, 0.125, dtype=F64))[name], start, steps)
        q, expected = path(recipes(0.125)[name], start, steps)
        assert p.dtype is dtype
        assert {x.dtype for column in slots.values() for x in column} == {torch.float32}
        assert slots.keys() == expected.keys()
        if steps > 1 and dtype is torch.bfloat16:
            continue  # a rounding the other way has been taken further
        assert_close(p, q, times=4)
        for slot, column in slots.items():
            assert_close(column[0], expected[slot][0], times=8, what=slot)


#: Those that do not scale a gradient and then divide by its size: their derivative is zero.
SCALED = [name for name in recipes(0.1) if name not in ("masked", "clip")]


@pytest.mark.parametrize("name", SCALED)
def test_the_derivative_by_a_wider_hyperparameter(name: str) -> None:
    """That of the same in float64, to the exactness of float32."""
    grads = []
    for dtype in (torch.float32, F64):
        w = torch.tensor(0.125, dtype=F64, requires_grad=True)
        p, _ = path(recipes(w)[name], torch.tensor(0.5, dtype=dtype))
        (grad,) = torch.autograd.grad(p.square(), w, allow_unused=True)
        grads.append(grad)
    assert grads[0].dtype is F64
    assert_close(grads[0], grads[1], torch.float32, times=50)


# One entry broadcasts to everything ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_a_rate_with_one_entry(shape: tuple[int, ...], setting: Any) -> None:
    lr = torch.full(shape, 0.25, dtype=F64)
    params = [nn.Parameter(nonzero()), nn.Parameter(nonzero(3)), nn.Parameter(nonzero(2, 3))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = torchopt.SGD(params, lr=lr, momentum=0.9, use_accelerated_op=setting)
    theirs = torch.optim.SGD(twins, lr=lr.clone(), momentum=0.9)
    tx, state, values = torchopt.sgd(lr, momentum=0.9), None, [p.detach() for p in params]
    for _ in range(3):
        for p, q in zip(params, twins):
            p.grad = nonzero(*p.shape)
            q.grad = p.grad.clone()
        state = tx.init(values) if state is None else state
        values, state = tx.apply_gradients([p.grad for p in params], state, values, inplace=False)
        ours.step()
        theirs.step()
    assert_close([p.detach() for p in params], [q.detach() for q in twins])
    assert_close(values, [q.detach() for q in twins])


def test_a_learned_rate_with_one_entry_gets_its_gradient() -> None:
    lr = torch.tensor([[0.25]], dtype=F64, requires_grad=True)
    net: Any = nn.Linear(2, 1).double()
    net.register_parameter("scale", nn.Parameter(nonzero()))
    inner, x = torchopt.MetaSGD(net, lr={"weight": lr, "bias": 0.1, "scale": lr}), nonzero(4, 2)
    inner.step((net(x) * net.scale).square().mean())
    (net.weight.sum() + net.scale).backward()
    assert lr.grad is not None
    assert lr.grad.shape == (1, 1)


def test_more_entries_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lr has shape \(2,\)"):
        torchopt.sgd(torch.ones(2)).init([torch.ones(())])

"""The graph behind steps with learned rates is that of the rules: what it needs and frees."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import kernel_calls_fixture as kernel_calls_fixture
from fusing import needs_library
from learning import FACES, Net, judged, of_each, of_entries, problem, shared
from tolerances import assert_close
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree

import torchopt


pytestmark = needs_library

SETTINGS = (False, True)


def stepped(
    tx: Any, count: int = 2, first_order: bool = False
) -> tuple[Tensor, list[Tensor], torchopt.MetaOptimizer]:
    """An outer loss, the parameters at the start, and the optimizer."""
    params, coefficients = problem()
    net = Net(params)
    optimizer = torchopt.MetaOptimizer(net, tx)
    for _ in range(count):
        optimizer.step(net.loss(coefficients), create_graph=not first_order)
    return judged(net.now(), coefficients), params, optimizer


@pytest.mark.parametrize("form", [of_each, of_entries])
def test_rates_that_the_loss_does_not_depend_on(form: Any, kernel_calls: list[int]) -> None:
    """Their derivative is None, and their own graph is neither run nor freed."""
    for setting in SETTINGS:
        params, coefficients = problem()
        logarithms = [x.detach().log().requires_grad_() for x in form(0.1, params)]
        rates = [x.exp() for x in logarithms]
        tx = torchopt.adam(rates).with_accelerated_op(setting)
        grads = [(p**2 * c).detach() for p, c in zip(params, coefficients)]
        new, _ = tx.apply_gradients(grads, tx.init(params), params, inplace=False)
        first, *others = torch.autograd.grad(new[0].sum(), logarithms, allow_unused=True)
        assert first is not None
        assert others == [None, None]
        # what lies behind the others is still there, and what lay behind the first is not
        (second,) = torch.autograd.grad(new[1].sum(), logarithms[1:2])
        assert bool(second.abs().max() > 0)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(new[0].sum(), logarithms[:1])
    assert kernel_calls


def test_unused_hyperparameters_have_no_derivative() -> None:
    """The first step is not damped."""
    for setting in SETTINGS:
        damping = shared(0.3, [])
        tx = torchopt.sgd(0.1, momentum=0.9, dampening=damping).with_accelerated_op(setting)
        loss, params, _ = stepped(tx, count=1)
        found = torch.autograd.grad(loss, [params[0], damping], allow_unused=True)
        assert found[0] is not None
        assert found[1] is None


@pytest.mark.parametrize("form", [shared, of_each, of_entries])
def test_first_order(form: Any, kernel_calls: list[int]) -> None:
    """The gradients are constants, and learned rates have their derivative."""
    results = []
    for setting in SETTINGS:
        torch.manual_seed(1)
        rates = form(0.1, problem()[0])
        leaves = rates if isinstance(rates, list) else [rates]
        tx = torchopt.adam(rates).with_accelerated_op(setting)
        loss, params, optimizer = stepped(tx, first_order=True)
        (state,) = optimizer.extract_state()
        assert not any(x.requires_grad for x in state.slots["exp_avg"].values())
        results.append(torch.autograd.grad(loss, [*leaves, *params]))
    assert kernel_calls
    assert_close(results[1], results[0], times=100)


def test_rates_are_trained_between_two_outer_steps(kernel_calls: list[int]) -> None:
    """First order, an optimizer for the rate: a value changed in place is the one that is used."""
    results = []
    for setting in SETTINGS:
        lr = shared(0.1, [])
        outer = torch.optim.SGD([lr], lr=0.01)
        params, coefficients = problem()
        net = Net(params)
        inner = torchopt.MetaSGD(net, lr=lr, momentum=0.5, use_accelerated_op=setting)
        for _ in range(4):
            inner.step(net.loss(coefficients), create_graph=False)
            outer.zero_grad()
            judged(net.now(), coefficients).backward()
            outer.step()
            torchopt.stop_gradient(net)
            torchopt.stop_gradient(inner)
        results.append([lr.detach().clone(), *(x.detach() for x in net.now())])
    assert kernel_calls
    assert_close(results[1], results[0], times=100)


def test_entries_of_a_dict_may_be_exchanged(kernel_calls: list[int]) -> None:
    results = []
    for setting in SETTINGS:
        params, coefficients = problem()
        rates = dict(zip("012", of_each(0.1, params)))
        net = Net(params)
        inner = torchopt.MetaAdam(net, lr=rates, use_accelerated_op=setting)
        inner.step(net.loss(coefficients))
        inner.step(net.loss(coefficients))
        rates["1"] = other = shared(0.4, [])
        inner.step(net.loss(coefficients))
        inner.param_groups[0]["lr"] = 0.2
        inner.step(net.loss(coefficients))
        results.append(
            torch.autograd.grad(judged(net.now(), coefficients), [other, *rates.values()])
        )
    assert kernel_calls
    assert_close(results[1], results[0], times=100)


@pytest.mark.parametrize("form", [shared, of_entries])
def test_a_rate_changed_before_the_backward_pass_is_an_error(form: Any) -> None:
    """As for every tensor that a derivative needs; without a derivative by it, too."""
    for learned in (True, False):
        rates = form(0.1, problem()[0])
        for rate in rates if isinstance(rates, list) else [rates]:
            rate.requires_grad_(learned)
        loss, params, _ = stepped(torchopt.adam(rates, use_accelerated_op=True))
        with torch.no_grad():
            for rate in rates if isinstance(rates, list) else [rates]:
                rate.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, params)


def test_backward_twice() -> None:
    for setting in SETTINGS:
        lr = shared(0.1, [])
        loss, params, _ = stepped(torchopt.adam(lr).with_accelerated_op(setting))
        first = torch.autograd.grad(loss, [lr, *params], retain_graph=True)
        second = torch.autograd.grad(loss, [lr, *params])
        assert all(map(torch.equal, first, second))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [lr, *params])


def test_derivatives_can_be_changed_in_place() -> None:
    """Each has memory of its own."""
    rates = of_each(0.1, problem()[0])
    loss, _, _ = stepped(torchopt.sgd(rates, use_accelerated_op=True))
    loss.backward()
    before = [rate.grad.clone() for rate in rates if rate.grad is not None]
    assert rates[0].grad is not None
    rates[0].grad.add_(7.0)
    assert all(torch.equal(rate.grad, x) for rate, x in zip(rates[1:], before[1:]))  # pyright: ignore[reportArgumentType]
    assert {rate.grad.untyped_storage().nbytes() for rate in rates} == {8}  # pyright: ignore[reportOptionalMemberAccess]


def test_a_rate_lives_no_longer_than_its_optimizer() -> None:
    """Programs are kept, tensors are not."""
    lr = shared(0.1, [])
    loss, _, optimizer = stepped(torchopt.adam(lr, use_accelerated_op=True))
    reference = weakref.ref(lr)
    del lr, loss, optimizer
    gc.collect()
    assert reference() is None


# torch.func ---------------------------------------------------------------------------------------

TASKS = 3


def outer_loss(make: Any, hypers: list[Tensor], params: list[Tensor], data: Tensor) -> Tensor:
    tx = make(*hypers)
    state = tx.init(params)
    for _ in range(2):
        grads = grad(lambda ps: (data * ps[0] ** 3).sum() * ps[1].sum().tanh())(params)
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    return (params[0].sin() * data).sum() + params[1].square().sum()


@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("where", ["grad", "vmap", "vmap-over-rates", "outside", "second"])
@pytest.mark.parametrize("case", ["sgd", "adam"])
def test_under_torch_func(case: str, where: str, entries: bool, kernel_calls: list[int]) -> None:
    """Tasks by vmap with one rate for all, or with rates of their own."""
    numbers = {"sgd": [0.1, 0.6], "adam": [0.1, 0.6, 0.7, 0.05]}[case]
    params = [nonzero(2, 3), nonzero(4)]
    data = nonzero(TASKS, 2, 3)
    hypers = [torch.tensor(x, dtype=torch.float64) for x in numbers]
    if entries:  # of the first parameter: a row of them, that broadcasts
        hypers[0] = nonzero(1, 3).abs() / 10

    def make(setting: bool, *given: Tensor) -> Any:
        lr = [given[0], given[0].mean()] if entries else given[0]
        if case == "sgd":
            return torchopt.sgd(lr, momentum=given[1], use_accelerated_op=setting)
        _, b1, b2, eps = given
        return torchopt.adam(lr, betas=(b1, b2), eps=eps, use_accelerated_op=setting)

    def results(setting: bool) -> Any:
        def loss(hypers: list[Tensor], params: list[Tensor], data: Tensor) -> Tensor:
            return outer_loss(lambda *h: make(setting, *h), hypers, params, data)

        of_tasks = [
            torch.stack([h * (1 + k / 5) for k in range(TASKS)]).requires_grad_() for h in hypers
        ]
        if where == "grad":
            return grad(loss, argnums=(0, 1))(hypers, params, data[0])
        if where == "vmap":
            return vmap(grad(loss, argnums=(0, 1)), (None, None, 0))(hypers, params, data)
        if where == "vmap-over-rates":
            return vmap(grad(loss, argnums=(0, 1)), (0, None, 0))(of_tasks, params, data)
        if where == "second":
            first = grad(
                lambda h, d: (
                    torch.cat([x.flatten() for x in grad(loss)(h, params, d)]).square().sum()
                )
            )
            return vmap(first)(of_tasks, data)
        total = vmap(loss, (0, None, 0))(of_tasks, params, data).sum()
        first = torch.autograd.grad(total, of_tasks, create_graph=True)
        squares = torch.stack([x.square().sum() for x in first]).sum()
        return [*first, *torch.autograd.grad(squares, of_tasks)]

    flat = _pytree.tree_leaves
    expected = flat(results(False))
    assert not kernel_calls
    found = flat(results(True))
    assert kernel_calls
    assert_close([x.detach() for x in found], [x.detach() for x in expected], times=1000)


def test_a_rule_that_branches_on_a_batch_goes_by_itself() -> None:
    """As by the rules, where torch refuses it."""
    from torchopt.core.hyper import hyper
    from torchopt.core.rules import ElementwiseTransformation
    from torchopt.core.transform import transformation

    @transformation
    class Stepped(ElementwiseTransformation):
        """Adds the gradient twice where the rate is large."""

        lr: Any = hyper(1.0)

        def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, lr: Any) -> Any:
            return (g * lr * 2 if lr > 0.5 else g * lr), slots

    g = nonzero(3)
    for number, factor in ((0.25, 0.25), (0.75, 1.5)):
        lr = torch.tensor(number, dtype=torch.float64, requires_grad=True)
        tx = Stepped(lr).with_accelerated_op(True)
        update, _ = tx.update(g, tx.init(g), inplace=False)
        assert torch.equal(update, g * factor)
        (found,) = torch.autograd.grad(update.sum(), lr)
        assert_close(found, g.sum() * factor / number)

    def of(lr: Tensor) -> Tensor:
        tx = Stepped(lr)
        return tx.update(g, tx.init(g), inplace=False)[0]

    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(of)(torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_faces_agree_on_one_rate() -> None:
    """Three faces, one result."""
    found = []
    for face in FACES.values():
        params, coefficients = problem()
        lr = shared(0.1, params)
        new = face(torchopt.adam(lr, use_accelerated_op=True), params, coefficients, 2)
        found.append(torch.autograd.grad(judged(new, coefficients), [lr, *params]))
    # the update by itself is rounded once more than the new parameter
    assert_close(found[1], found[0], times=100)


@torchopt.transformation
class Sign(torchopt.ElementwiseTransformation):
    """A rule whose derivative is zero."""

    power: Any = torchopt.hyper(1.0)

    def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, power: Any) -> tuple[Tensor, tuple]:
        return (power * g).sign(), ()


@pytest.mark.parametrize("setting", [None, *SETTINGS])
def test_a_derivative_through_a_sign_is_zero_and_not_absent(setting: bool | None) -> None:
    tx, g = Sign(torch.tensor(0.5, requires_grad=True)), nonzero(3).requires_grad_()
    tx = Sign(tx.power, use_accelerated_op=setting)
    update, _ = tx.update(g, tx.init(g), inplace=False)
    first = torch.autograd.grad(update.sum(), [g, tx.power], create_graph=True)
    assert all((x == 0).all() and x.requires_grad for x in first)

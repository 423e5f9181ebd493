"""This library, with fused kernels where there are any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import torchopt
from benchmarks import adam_step as adam_workload
from benchmarks import each_optimizer as each_workload
from benchmarks import learned_step as learned_workload
from benchmarks import meta_step as meta_workload
from benchmarks import own_rule as own_workload
from benchmarks import update_alone as update_workload
from benchmarks.sides.careful_adam import CarefulAdam
from benchmarks.sides.import_cost import import_milliseconds
from benchmarks.sides.kept_bytes import kept_bytes
from benchmarks.sides.torch_problem import batched_meta_step, in_torch, learned_rates, tensors


def version() -> str:
    """Return the version of what is measured."""
    return f"torchopt {torchopt.__version__}, torch {torch.__version__}"


def _numbers(adam: Any, accelerated: bool | None) -> dict[str, Any]:
    return {
        "lr": adam.lr,
        "betas": adam.betas,
        "eps": adam.eps,
        "use_accelerated_op": accelerated,
    }


def meta_step(
    problem: meta_workload.Problem, accelerated: bool | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient, by ``MetaAdam`` in an ``inner_loop``."""
    built = in_torch(problem)
    net, loss = built.network, built.loss
    initial = list(net.parameters())
    optimizer = torchopt.MetaAdam(net, **_numbers(problem.adam, accelerated))

    def work() -> list[Tensor]:
        net.zero_grad()
        for task in built.tasks:
            with torchopt.inner_loop(net, optimizer) as inner:
                for _ in range(built.steps):
                    inner.step(loss(net(task.support_x), task.support_y))
                loss(net(task.query_x), task.query_y).backward()
        return [p.grad for p in initial]

    return work


def learned_step(problem: learned_workload.Problem) -> Callable[[], list[Tensor]]:
    """Return a function that computes one meta-gradient, by parameters and learned rates."""
    built = in_torch(problem.meta)
    net, loss = built.network, built.loss
    named = dict(net.named_parameters())
    rates = []
    if problem.form != "number":
        rates = learned_rates(built.adam.lr, problem.form, list(named.values()))
    lr: Any = built.adam.lr
    if rates:
        lr = rates[0] if problem.form == "scalar" else dict(zip(named, rates))
    if problem.optimizer == "sgd":
        optimizer: Any = torchopt.MetaSGD(net, lr=lr)
    else:
        optimizer = torchopt.MetaAdam(net, **{**_numbers(built.adam, None), "lr": lr})
    leaves = [*named.values(), *rates]

    def work() -> list[Tensor]:
        for x in leaves:
            x.grad = None
        for task in built.tasks:
            with torchopt.inner_loop(net, optimizer) as inner:
                for _ in range(built.steps):
                    inner.step(loss(net(task.support_x), task.support_y))
                loss(net(task.query_x), task.query_y).backward()
        return [x.grad for x in leaves]

    return work


def vmap_step(
    problem: meta_workload.Problem, accelerated: bool | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that computes the meta-gradient of all tasks in one batch."""
    tx = torchopt.adam(**_numbers(problem.adam, accelerated))
    return batched_meta_step(problem, tx.init, partial(tx.apply_gradients, inplace=False))


def _update(
    problem: update_workload.Problem, accelerated: bool | None
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Return the inputs of a differentiable update, and a function from them to its outputs."""
    columns = (problem.grads, problem.params, problem.first_moments, problem.second_moments)
    grads, params, first, second = (tensors(c, requires_grad=True) for c in columns)
    tx = torchopt.adam(**_numbers(problem.adam, accelerated))
    state = torchopt.OptState(problem.step, {"exp_avg": first, "exp_avg_sq": second})

    def update() -> list[Tensor]:
        new_params, new = tx.apply_gradients(grads, state, params, inplace=False)
        return [*new_params, *new.slots["exp_avg"], *new.slots["exp_avg_sq"]]

    return [*grads, *params, *first, *second], update


def update_alone(
    problem: update_workload.Problem, accelerated: bool | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that updates and differentiates a linear function of the outputs."""
    inputs, update = _update(problem, accelerated)
    coefficients = [c for column in problem.coefficients for c in tensors(column)]

    def work() -> list[Tensor]:
        return list(torch.autograd.grad(update(), inputs, coefficients))

    return work


def memory(
    problem: update_workload.Problem, accelerated: bool | None = None
) -> Callable[[], dict[str, list[float]]]:
    """Return a function that measures what an update keeps beyond its inputs and outputs."""
    inputs, update = _update(problem, accelerated)
    return lambda: kept_bytes(inputs, update)


def adam_step(
    problem: adam_workload.Problem, accelerated: bool | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that takes one step in place."""
    params = tensors(problem.params, problem.device, requires_grad=True)
    for param, grad in zip(params, tensors(problem.grads, problem.device)):
        param.grad = grad
    optimizer = torchopt.Adam(params, **_numbers(problem.adam, accelerated))

    def work() -> list[Tensor]:
        optimizer.step()
        return params

    return work


def each_optimizer(
    problem: each_workload.Problem, accelerated: bool | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that takes one step in place, or differentiates an update."""
    kind = getattr(torchopt, problem.name)
    params = tensors(problem.params, requires_grad=True)
    for param, grad in zip(params, tensors(problem.grads)):
        param.grad = grad
    optimizer = kind(params, use_accelerated_op=accelerated, **problem.arguments)
    if not problem.in_place:
        return _differentiated(optimizer.transformation, problem, params)

    def work() -> list[Tensor]:
        optimizer.step()
        return params

    return work


def _differentiated(
    tx: Any, problem: each_workload.Problem, params: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """Return a function that updates and differentiates a linear function of all outputs."""
    grads, numbers = tensors(problem.grads), [p.detach() for p in params]
    state = tx.init(numbers)
    for _ in range(each_workload.STEPS_BEFORE):
        numbers, state = tx.apply_gradients(grads, state, numbers, inplace=False)
    slots = {
        name: [x.detach().requires_grad_() for x in column] for name, column in state.slots.items()
    }
    state = torchopt.OptState(state.step, slots, state.counters)
    columns = [[x.detach().requires_grad_() for x in column] for column in (grads, numbers)]
    inputs = [x for column in (*columns, *slots.values()) for x in column]
    coefficients = tensors(problem.coefficients) * (1 + len(slots))

    def work() -> list[Tensor]:
        new_params, new = tx.apply_gradients(columns[0], state, columns[1], inplace=False)
        outputs = [*new_params, *(x for column in new.slots.values() for x in column)]
        return list(torch.autograd.grad(outputs, inputs, coefficients, materialize_grads=True))

    return work


def own_rule(
    problem: own_workload.Problem, accelerated: bool | None = None
) -> Callable[[], list[Tensor]]:
    """Return a function that takes one step in place, or differentiates an update."""
    tx = CarefulAdam().with_accelerated_op(accelerated)
    numbers = problem.numbers
    grads, params, first, second = (
        tensors(column, requires_grad=True)
        for column in (numbers.grads, numbers.params, numbers.first_moments, numbers.second_moments)
    )
    if problem.in_place:
        for param, grad in zip(params, grads):
            param.grad = grad.detach()
        optimizer = torchopt.Optimizer(params, tx)

        def step() -> list[Tensor]:
            optimizer.step()
            return params

        return step
    state = torchopt.OptState(numbers.step, {"exp_avg": first, "exp_avg_sq": second})
    coefficients = [c for column in numbers.coefficients for c in tensors(column)]
    inputs = [*grads, *params, *first, *second]

    def update() -> list[Tensor]:
        new_params, new = tx.apply_gradients(grads, state, params, inplace=False)
        outputs = [*new_params, *new.slots["exp_avg"], *new.slots["exp_avg_sq"]]
        return list(torch.autograd.grad(outputs, inputs, coefficients))

    return update


def import_time(processes: int) -> Callable[[], dict[str, list[float]]]:
    """Return a function that times ``import torchopt`` in fresh processes."""

    def work() -> dict[str, list[float]]:
        return {
            "milliseconds": [import_milliseconds("torchopt", "torch") for _ in range(processes)]
        }

    return work

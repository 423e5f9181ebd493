"""What a user writes, for a type checker alone: nothing in here is run.

``tests/test_types.py`` lets pyright read it in strict mode. What is marked as wrong is a mistake
that has to be found; in all other lines there must be nothing to complain of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import torchopt
from torchopt import diff, linear_solve, schedules, solvers


Params = dict[str, Tensor]


class Weights(NamedTuple):
    w: Tensor
    b: Tensor


def loss_of(params: Params, x: Tensor) -> Tensor:
    return (x @ params["w"] + params["b"]).square().mean()


# What goes in comes out ------------------------------------------------------------------------


def functional(params: Params, x: Tensor) -> Params:
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(lr=1e-3, betas=(0.9, 0.99)))
    assert_type(tx, torchopt.GradientTransformation)
    state = tx.init(params)
    assert_type(state, torchopt.OptState)
    for _ in range(3):
        grads = torch.func.grad(loss_of)(params, x)
        updates, state = tx.update(grads, state, params, inplace=False)
        assert_type(state, torchopt.OptState)
        params = torchopt.apply_updates(params, updates, inplace=False)
        assert_type(params, Params)
    params, state = tx.apply_gradients(params, state, params, inplace=False)
    assert_type(params, Params)
    assert_type(tx.eval_params(state, params), Params)
    return params


def trees(w: Tensor, weights: Weights, net: nn.Module, x: Tensor) -> None:
    tx = torchopt.sgd(0.1, momentum=0.9)
    updates, state = tx.update(weights, tx.init(weights), weights)
    assert_type(updates, Weights)
    assert_type(torchopt.apply_updates(weights, updates), Weights)
    assert_type(tx.update([w], state)[0], list[Tensor])
    assert_type(tx.update(w, (), w)[0], Tensor)
    assert_type(tx.update((w, w), None)[0], tuple[Tensor, Tensor])
    grads = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    taken, _ = tx.update(grads, state)
    assert_type(taken, tuple[Tensor, ...])
    assert_type(torchopt.tree_get(state, "momentum_buffer"), Any)


def of_a_network(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, nn.Parameter]:
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    tx = torchopt.lookahead(torchopt.adam(1e-2), slow_step_size=0.5, sync_period=5)
    state = tx.init(params)
    for _ in range(3):
        loss = (torch.func.functional_call(net, {**params, **buffers}, (x,)) - y).square().mean()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        updates, state = tx.update(grads, state, params)
        params = torchopt.apply_updates(params, updates)
    return params


def keeping(net: nn.Linear, params: Params, inner: torchopt.MetaAdam) -> None:
    before = torchopt.extract_state_dict(net, by="reference")
    assert_type(before, torchopt.ModuleState)
    assert_type(before.params, Params)
    states = torchopt.extract_state_dict(inner)
    assert_type(states, tuple[torchopt.OptState, ...])
    assert_type(torchopt.extract_state_dict(params, by="copy"), Params)
    assert_type(torchopt.extract_state_dict(states[0], by="deepcopy"), torchopt.OptState)
    assert_type(torchopt.module_clone(net, by="deepcopy"), nn.Linear)
    assert_type(torchopt.module_clone(inner), torchopt.MetaAdam)
    assert_type(torchopt.module_clone(params), Params)
    assert_type(torchopt.stop_gradient(net), nn.Linear)
    assert_type(torchopt.recover_state_dict(params, params), Params)
    torchopt.recover_state_dict(net, before)
    torchopt.recover_state_dict(inner, states)


# Ordinary programs -----------------------------------------------------------------------------


def maml(net: nn.Sequential, tasks: list[tuple[Tensor, Tensor]]) -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    outer = torchopt.Adam([*net.parameters(), lr], lr=1e-3, fused=True)
    for x, y in tasks:
        outer.zero_grad()
        with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
            assert_type(inner, torchopt.MetaOptimizer)
            for _ in range(5):
                inner.step(nn.functional.mse_loss(net(x), y))
            loss = nn.functional.mse_loss(net(x), y)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        outer.step()
    inner = torchopt.MetaAdam(net, lr=lr, eps_root=1e-8)
    inner.step(net(tasks[0][0]).sum(), create_graph=False)
    inner.step(lambda: net(tasks[0][0]).sum())
    torchopt.MetaSGD(module=net, lr={"0": 0.1, "1": lr}, momentum=0.9)
    torchopt.MetaSGD([net, {"params": nn.Linear(2, 2), "lr": 0.1}], lr=lr)
    torchopt.MetaOptimizer(net, torchopt.lion(lr))


def like_torch(net: nn.Module, x: Tensor) -> None:
    torchopt.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True)
    torchopt.AdamW(params=net.parameters(), lr=1e-3, weight_decay=0.1)
    torchopt.RMSprop(net.named_parameters(), lr=1e-3, differentiable=False)
    torchopt.Muon([{"params": [*net.parameters()], "lr": 0.1}], capturable=False, lr=1e-2)
    optimizer = torchopt.Optimizer(net.parameters(), torchopt.adam(1e-3))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [x], "lr": 0.1})
    torchopt.LBFGS(net.parameters(), line_search_fn="strong_wolfe").step(closure)
    torchopt.SAM(net.parameters(), torchopt.sgd(0.1)).step(closure)


def adapted_loss(net: nn.Module, x: Tensor) -> Tensor:
    with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=diff.Checkpointed("sqrt")) as inner:
        inner.step(lambda: net(x).sum())
        return net(x).sum()


def with_old_names(net: nn.Module) -> None:
    torchopt.RMSProp(net.parameters(), lr=0.1)
    torchopt.MetaAdaMax(net, lr=torchopt.linear_schedule(0.1, 0.0, 10))
    torchopt.chain(torchopt.clip_by_global_norm(1.0), torchopt.sgd(torchopt.schedule.constant(1)))


class Warm(torchopt.Adam):
    def __init__(self, net: nn.Module, lr: float = 1e-3) -> None:
        super().__init__(net.parameters(), lr=lr, betas=(0.9, 0.95))


def hyperparameters(net: nn.Module, per_entry: list[Tensor], layers: list[float]) -> None:
    def halved(count: int) -> float:
        return 0.5**count

    torchopt.adam(schedules.warmup_cosine(0.0, 1e-3, 10, 100))
    torchopt.adam(lr=lambda count: 0.1 / (1 + count))
    torchopt.adam(halved)
    torchopt.sgd({"body": 0.1, "head": {"weight": torch.tensor(0.2), "bias": halved}})
    torchopt.sgd(per_entry, weight_decay=layers)
    torchopt.sgd(1, nn.ParameterDict(), weight_decay=nn.Parameter(torch.tensor(0.1)))
    torchopt.inject_hyperparams(torchopt.sgd)(lr=0.1)
    learned = torchopt.LearnedHyperparameters(torchopt.sgd(0.1), ["lr"])
    torchopt.FuncOptimizer(learned.transformation())
    labels = {"0": "body", "1": "head"}
    parts = {"body": torchopt.adamw(1e-3), "head": torchopt.masked(torchopt.sgd(0.1), {"1": True})}
    torchopt.Optimizer(net.named_parameters(), torchopt.partition(parts, labels))


@torchopt.transformation
class Soften(torchopt.ElementwiseTransformation):
    width: torchopt.typing.Hyperparameter = torchopt.hyper(1.0, gt=0)
    ascend: bool = torchopt.flag(False)
    slots = (torchopt.Slot("mean"),)

    def rule(
        self,
        g: Tensor,
        p: Tensor | None,
        t: torchopt.typing.Step,
        slots: tuple[Tensor, ...],
        *,
        width: Tensor,
        ascend: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean = 0.9 * slots[0] + 0.1 * g
        u = mean / (g.abs() + width)
        return (-u if ascend else u), (mean,)


@torchopt.transformation
class Unit(torchopt.TensorTransformation):
    def rule(self, g: Tensor, p: Any, t: Any, slots: Any) -> tuple[Tensor, Any]:
        return g / g.square().sum().sqrt(), slots


def own(params: Params) -> None:
    assert_type(Soften(width=0.5), Soften)
    torchopt.chain(Soften(torch.tensor(2.0)), Unit(), torchopt.scale(-0.1)).init(params)

    def init(params: Params) -> dict[str, int]:
        return {"calls": len(params)}

    def update(
        updates: Params, state: dict[str, int], params: Params | None = None
    ) -> tuple[Params, dict[str, int]]:
        return updates, {"calls": state["calls"] + 1}

    tx = torchopt.GradientTransformation(init, update)
    assert_type(tx.update(params, tx.init(params))[0], Params)
    torchopt.chain(tx, (init, update), torchopt.sgd(0.1))


def problems(theta: Tensor, data: Tensor, tx: torchopt.GradientTransformation) -> None:
    def condition(x: Tensor, theta: Tensor) -> Tensor:
        return x * x - theta

    @diff.implicit.custom_root(condition, argnums=1, solve=linear_solve.solve_cg(rtol=1e-6))
    def root(x: Tensor, theta: Tensor) -> Tensor:
        return x + theta

    assert_type(root(theta, theta), Tensor)

    def step(
        carry: tuple[Tensor, torchopt.OptState], x: Tensor
    ) -> tuple[tuple[Tensor, torchopt.OptState], Tensor]:
        w, state = carry
        w, state = tx.apply_gradients(w - x, state, w, inplace=False)
        return (w, state), (w - x).square().sum()

    (w, state), losses = diff.unroll(
        step, (theta, tx.init(theta)), data, adjoint=diff.Checkpointed("sqrt")
    )
    assert_type(w, Tensor)
    assert_type(state, torchopt.OptState)
    assert_type(losses, Any)

    def objective(x: Tensor, theta: Tensor) -> Tensor:
        return (x - theta).square().sum()

    solution = solvers.minimize(objective, solvers.LBFGS(), theta, theta)
    assert_type(solution, solvers.Solution)
    optimizer = torchopt.FuncOptimizer(tx)
    assert_type(optimizer.step(objective(theta, theta), {"w": theta}), Params)


class Regularized(torchopt.nn.MetaGradientModule):
    def __init__(self, prior: nn.Module, strength: Tensor) -> None:
        super().__init__()
        self.prior = prior
        self.strength = strength
        self.net = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.strength * self.prior(x)


class Implicit(torchopt.nn.ImplicitMetaGradientModule):
    def __init__(self, prior: Tensor) -> None:
        super().__init__()
        self.prior = prior
        self.w = nn.Parameter(torch.zeros(2))

    def objective(self, x: Tensor) -> Tensor:
        return (x @ self.w).square().sum() + (self.w - self.prior).square().sum()

    def solve(self, x: Tensor) -> Implicit:
        inner = torchopt.SGD(self.parameters(), lr=0.1)
        for _ in range(10):
            inner.zero_grad()
            self.objective(x).backward(  # pyright: ignore[reportUnknownMemberType]
                inputs=list(self.parameters())
            )
            inner.step()
        return self


def modules(x: Tensor) -> None:
    net = Regularized(nn.Linear(2, 1), torch.tensor(0.1, requires_grad=True))
    outer = torchopt.Adam(net.meta_parameters(), lr=0.1)
    torchopt.MetaSGD(net, 0.1).step(net(x).sum())
    outer.step()
    implicit = Implicit(torch.zeros(2, requires_grad=True)).solve(x)
    implicit.objective(x).backward()


# Mistakes --------------------------------------------------------------------------------------


def mistakes(net: nn.Module, params: Params, loss: Tensor, tx: Callable[..., Any]) -> None:
    torchopt.adam("0.1")  # wrong: a string
    torchopt.adam(lr=None)  # wrong: None
    torchopt.adam(0.1, (0.9,))  # wrong: one beta
    torchopt.adam(0.1, betas=0.9)  # wrong: a number
    torchopt.adam(learning_rate=0.1)  # wrong: lr
    torchopt.adam(schedules.linear)  # wrong: the class
    torchopt.sgd(["0.1"])  # wrong: a string inside
    torchopt.clip_grad_norm("1.0")  # wrong: a string
    torchopt.Adam(net)  # wrong: a network
    torchopt.Adam(net.parameters)  # wrong: not called
    torchopt.Adam(net.parameters(), lr="0.1")  # wrong: a string
    torchopt.Adam(net.parameters(), learning_rate=0.1)  # wrong: lr
    torchopt.Adam(net.parameters(), differentiable=True)  # wrong: refused
    torchopt.MetaAdam(net.parameters())  # wrong: parameters
    torchopt.MetaAdam(list(net.parameters()), lr=0.1)  # wrong: parameters
    torchopt.MetaAdam(net, lr="0.1")  # wrong: a string
    torchopt.MetaAdam(net, fused=True)  # wrong: in place only
    torchopt.MetaAdam(net).step("loss")  # wrong: a string
    torchopt.MetaOptimizer(net, torchopt.adam)  # wrong: not called
    torchopt.Optimizer(net, torchopt.adam())  # wrong: a network
    torchopt.Optimizer(net.parameters(), torch.optim.Adam)  # wrong: another class
    torchopt.chain(torchopt.adam(), torchopt.sgd)  # wrong: not called
    torchopt.inner_loop(net.parameters(), torchopt.sgd(0.1))  # wrong: parameters
    torchopt.partition({"a": torchopt.adam}, {"w": "a"})  # wrong: not called
    torchopt.masked(torchopt.adam, True)  # wrong: not called
    updates = torchopt.sgd(0.1).update(params, params)  # wrong: parameters as state
    torchopt.apply_updates(params, updates).keys()
    torchopt.extract_state_dict(net, by="refrence")  # wrong: a word
    torchopt.module_clone(net, by="clone")  # wrong: a word
    torchopt.adm(0.1)  # wrong: a name
    torchopt.AdaMax(net)  # wrong: a network
    with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        inner.step(loss, "yes")  # wrong: two positions
    state: torchopt.OptState = torchopt.extract_state_dict(net)  # wrong: a ModuleState
    print(state)

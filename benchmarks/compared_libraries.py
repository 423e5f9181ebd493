"""What a library can do, found out by doing it: one JSON object for the library that is named.

Runs in the library's own environment, ``python compared_libraries.py NAME``, and needs nothing of
this repository. The work is the same for all: a linear regression in double precision is fitted by
three steps of Adam, and a loss afterwards is differentiated; central differences are the truth.
"""

import inspect
import json
import sys


X = [[0.5, -1.2, 0.3], [1.5, 0.4, -0.7], [-0.3, 0.8, 1.1], [0.9, -0.6, 0.2]]
Y = [1.0, -0.5, 0.7, 0.2]
W = [0.3, -0.8, 0.5]
LR, BETA2, STEPS = 0.1, 0.95, 3


# The outer loss as a function of initial weights, learning rate and second decay rate ------------


def torch_problem():
    import torch

    x, y = torch.tensor(X, dtype=torch.float64), torch.tensor(Y, dtype=torch.float64)
    return torch, y, lambda zero: x * torch.tensor([1.0, 1.0, 0.0]) if zero else x


def ours(zero):
    import torchopt

    torch, y, inputs = torch_problem()
    x = inputs(zero)

    def outer(w, lr, beta2):
        tx = torchopt.adam(lr, betas=(0.9, beta2))
        state = tx.init(w)
        for _ in range(STEPS):
            g = torch.func.grad(lambda w: (x @ w - y).square().mean())(w)
            w, state = tx.apply_gradients(g, state, w, inplace=False)
        return (x @ w - y).square().mean() + w.square().sum()

    return outer


def network(torch, w):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(w.detach().clone())

    return Net()


def higher(zero):
    import higher

    torch, y, inputs = torch_problem()
    x = inputs(zero)

    def outer(w, lr, beta2):
        net = network(torch, w)
        opt = torch.optim.Adam(net.parameters(), lr=LR, betas=(0.9, BETA2))
        override = {"lr": [lr], "betas": [(0.9, beta2)]}
        with higher.innerloop_ctx(net, opt, override=override) as (fast, inner):
            fast.update_params([w])
            for _ in range(STEPS):
                inner.step((x @ fast.w - y).square().mean())
            return (x @ fast.w - y).square().mean() + fast.w.square().sum()

    return outer


def betty(zero):
    import logging

    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem, IterativeProblem

    logging.disable(logging.CRITICAL)
    torch, y, inputs = torch_problem()
    x, reached = inputs(zero), []

    def outer(w, lr, beta2):
        class Upper(ImplicitProblem):
            def get_batch(self):
                return None

            def training_step(self, batch):
                (last,) = self.lower.params
                reached.append((x @ last - y).square().mean() + last.square().sum())
                return reached[-1]

            def custom_optimizer_step(self):
                pass

        class Lower(IterativeProblem):
            def get_batch(self):
                return None

            def on_inner_loop_start(self):
                self.params = (w.clone(),)
                self.optimizer.param_groups[0].update(lr=lr, betas=(0.9, beta2))

            def training_step(self, batch):
                return (x @ self.params[0] - y).square().mean()

        start = torch.tensor(W, dtype=torch.float64)
        nets = network(torch, start), network(torch, start)
        config = Config(first_order=False, unroll_steps=STEPS, retain_graph=True, allow_unused=True)
        sgd = torch.optim.SGD(nets[0].parameters(), lr=0.1)
        adam = torch.optim.Adam(nets[1].parameters(), lr=LR, betas=(0.9, BETA2))
        upper = Upper(name="upper", config=config, module=nets[0], optimizer=sgd)
        lower = Lower(name="lower", config=config, module=nets[1], optimizer=adam)
        Engine(
            problems=[upper, lower],
            config=EngineConfig(train_iters=STEPS, logger_type="none"),
            dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
        ).run()
        return reached[-1]

    return outer


def torchopt073(zero):
    import torchopt

    torch, y, inputs = torch_problem()
    x = inputs(zero)

    def outer(w, lr, beta2):
        tx = torchopt.adam(lr, betas=(0.9, beta2))
        params = (w,)
        state = tx.init(params)
        for _ in range(STEPS):
            loss = (x @ params[0] - y).square().mean()
            grads = torch.autograd.grad(loss, params, create_graph=True)
            updates, state = tx.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return (x @ params[0] - y).square().mean() + params[0].square().sum()

    return outer


def torch_optim(zero):
    torch, y, inputs = torch_problem()
    x = inputs(zero)

    def outer(w, lr, beta2):
        w = w.clone()
        beta1 = torch.tensor(0.9) if isinstance(beta2, torch.Tensor) else 0.9
        opt = torch.optim.Adam([w], lr=lr, betas=(beta1, beta2), differentiable=True)
        for _ in range(STEPS):
            loss = (x @ w - y).square().mean()
            (w.grad,) = torch.autograd.grad(loss, w, create_graph=True)
            opt.step()
        return (x @ w - y).square().mean() + w.square().sum()

    return outer


def optax(zero):
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    x, y = jnp.array(X) * jnp.array([1.0, 1.0, 0.0 if zero else 1.0]), jnp.array(Y)

    def outer(w, lr, beta2):
        tx = optax.adam(lr, b2=beta2)
        state = tx.init(w)
        for _ in range(STEPS):
            g = jax.grad(lambda w: ((x @ w - y) ** 2).mean())(w)
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
        return ((x @ w - y) ** 2).mean() + (w**2).sum()

    return outer


# What is found out --------------------------------------------------------------------------------


def derivatives(outer):
    """Return the derivatives by weights, learning rate and second decay rate, in JAX."""
    import jax
    import jax.numpy as jnp

    point = jnp.array(W), jnp.array(LR), jnp.array(BETA2)
    return [g.tolist() for g in jax.grad(outer, (0, 1, 2))(*point)]


def alone(outer, which):
    """Return the derivative by one of them; the others are plain numbers."""
    import torch

    point = [torch.tensor(W, dtype=torch.float64, requires_grad=True), LR, BETA2]
    point[which] = torch.tensor([W, LR, BETA2][which], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(outer(*point), point[which], allow_unused=True)
    return None if found is None else found.tolist()


def reference(w, lr, beta2, zero):
    """Return the outer loss in plain Python, from the formulas of Adam's paper."""
    x = [[a, b, 0.0 if zero else c] for a, b, c in X]

    def residuals(w):
        return [sum(a * b for a, b in zip(row, w)) - y for row, y in zip(x, Y)]

    m, v = [0.0] * len(w), [0.0] * len(w)
    for t in range(1, STEPS + 1):
        r = residuals(w)
        g = [2 * sum(e * row[i] for e, row in zip(r, x)) / len(r) for i in range(len(w))]
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g)]
        hats = [(a / (1 - 0.9**t), b / (1 - beta2**t)) for a, b in zip(m, v)]
        w = [p - lr * a / (b**0.5 + 1e-8) for p, (a, b) in zip(w, hats)]
    return sum(e * e for e in residuals(w)) / len(X) + sum(p * p for p in w)


def error(found, which, zero):
    """Return the largest error relative to central differences, in words where there is none."""
    if found is None:
        return "none arrives"
    values, slopes = found if isinstance(found, list) else [found], []
    for i in range(len(values)):
        sides = []
        for step in (1e-6, -1e-6):
            point = [list(W), LR, BETA2]
            if which == 0:
                point[0][i] += step
            else:
                point[which] += step
            sides.append(reference(*point, zero))
        slopes.append((sides[0] - sides[1]) / 2e-6)
    worst = max((abs(a - b) for a, b in zip(values, slopes)), key=lambda e: (e != e, e))
    return "nan" if worst != worst else worst / max(map(abs, slopes))


def attempt(function):
    """Return what a function finds, or the kind of error it ends with."""
    try:
        return function()
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"


def scheduler(make):
    """Whether a scheduler of torch takes an optimizer."""
    import torch

    p = torch.nn.Parameter(torch.ones(2))
    torch.optim.lr_scheduler.StepLR(make([p]), 1)
    return True


def count(name):
    """Return how many optimizers can be differentiated through."""
    if name == "ours":
        import torchopt

        found = [getattr(torchopt, n) for n in dir(torchopt)]
        meta = {v for v in found if inspect.isclass(v) and issubclass(v, torchopt.MetaOptimizer)}
        return len(meta - {torchopt.MetaOptimizer, torchopt.MetaSAM})
    if name == "higher":
        from higher.optim import DifferentiableOptimizer

        return len(DifferentiableOptimizer.__subclasses__())
    if name == "betty":
        import torch
        from betty import optim

        def steps(cls):
            net = network(torch, torch.ones(2))
            optimizer = cls(net.parameters(), lr=0.1)
            net.w.grad = torch.ones(2)
            optimizer.step()
            w = torch.ones(2, requires_grad=True).clone()
            w.grad = torch.ones(2)
            return bool(optim.patch_optimizer(optimizer, net).step((w,)))

        found = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        return sum(steps(cls) for cls in found)
    if name == "torchopt073":
        import torchopt

        names = {n.lower() for n in dir(torchopt) if n.startswith("Meta")}
        return len(names - {"metaoptimizer"})
    if name == "torch":
        import torch

        found = [v for v in vars(torch.optim).values() if inspect.isclass(v)]
        return sum("differentiable" in inspect.signature(v).parameters for v in found)
    import optax

    makers = [v for v in vars(optax).values() if inspect.isfunction(v)]
    return sum("learning_rate" in inspect.signature(v).parameters for v in makers)


MAKERS = {
    "ours": ours,
    "higher": higher,
    "betty": betty,
    "torchopt073": torchopt073,
    "torch": torch_optim,
    "optax": optax,
}


def scheduled(name):
    """Whether torch's schedulers take its Adam."""
    if name == "torch":
        import torch

        return scheduler(torch.optim.Adam)
    if name in ("ours", "torchopt073"):
        import torchopt

        return scheduler(lambda params: torchopt.Adam(params, lr=0.1))
    return None


def facts(name):
    """Return all that is found out about a library."""

    def of(which, zero=False):
        outer = MAKERS[name](zero)
        found = derivatives(outer) if name == "optax" else alone(outer, which)
        return error(found[which] if name == "optax" else found, which, zero)

    return {
        "weights": attempt(lambda: of(0)),
        "zero feature": attempt(lambda: of(0, zero=True)),
        "lr": attempt(lambda: of(1)),
        "beta2": attempt(lambda: of(2)),
        "scheduler": attempt(lambda: scheduled(name)),
        "optimizers": attempt(lambda: count(name)),
    }


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))

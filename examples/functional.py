"""Functional optimizers: one training run in three styles, and many networks trained at once.

First a small network learns handwritten digits three times: in the style of Optax (pure functions
of parameters and state), in the style of PyTorch (an object that changes the network) and in the
differentiable style (steps that stay connected to what they were computed from). The three are
APIs of one rule, so in double precision their losses agree to the last bit on a CPU; the table
shows the largest relative difference, and that to ``torch.optim.Adam``, which computes the same
formula in another order. The differentiable style also tells how the last loss depends on the
learning rate.

Then an ensemble of networks, each with initial weights, batches and a learning rate of its own, is
trained at once: ``torch.func.vmap`` over the functional style. Its speed is compared with that of
loops over the members, and the accuracy of the members with that of their mean vote.

    python examples/functional.py
    python examples/functional.py --members 128
    python examples/functional.py --output runs/mine --resume       # after an interruption

References: DeepMind's Optax, https://github.com/google-deepmind/optax; model ensembling with
``torch.func``, https://docs.pytorch.org/tutorials/intermediate/ensembling.html; the mean vote:
Lakshminarayanan, Pritzel and Blundell, Simple and scalable predictive uncertainty estimation using
deep ensembles, NeurIPS 2017, https://arxiv.org/abs/1612.01474.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import EXTRA
from common.command import Jobs, parser, plain_endings, positive_float, positive_int
from common.functional_report import STYLES, report
from common.reporting import progress_bar
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import torchopt


Params = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]
TEST_IMAGES = 450  # of 1797
NOT_SETTINGS = ("device", "threads", "output", "resume", "overwrite", "quick")
QUICK: dict[str, Any] = {"compared_steps": 20, "members": 4, "steps": 20, "seeds": 2}
QUICK |= {"timed_members": [4], "timed_steps": 2, "rounds": 1}


# One run in three styles ------------------------------------------------------------------------


def train_functional(network: nn.Module, batches: Batches, lr: float) -> Tensor:
    """Train as with Optax: gradients in, updates out; return the losses."""

    def loss_of(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, params, (x,)), y)

    params = {name: p.detach() for name, p in network.named_parameters()}
    adam = torchopt.adam(lr)
    state = adam.init(params)
    losses = []
    for x, y in batches:
        grads, loss = grad_and_value(loss_of)(params, x, y)
        updates, state = adam.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        losses.append(loss)
    return torch.stack(losses)


def train_object_oriented(
    network: nn.Module, batches: Batches, lr: float, adam: Any = torchopt.Adam
) -> Tensor:
    """Train as with ``torch.optim``: the optimizer changes the network; return the losses."""
    optimizer = adam(network.parameters(), lr=lr)
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def train_differentiable(network: nn.Module, batches: Batches, lr: Tensor) -> Tensor:
    """Train so that the returned losses can be differentiated by ``lr`` or the first weights."""
    optimizer = torchopt.MetaAdam(network, lr=lr)
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(network(x), y)
        optimizer.step(loss)
        losses.append(loss)
    return torch.stack(losses)


def compare_styles(network: nn.Module, batches: Batches, lr: float) -> dict[str, Any]:
    """Train copies of one network in all styles.

    Returns:
        The losses by style, and the derivative of the last one by the learning rate: from the
        differentiable style, and from central differences over the functional style.
    """
    rate = torch.tensor(lr, dtype=torch.float64, requires_grad=True)
    differentiable = train_differentiable(copy.deepcopy(network), batches, rate)
    (slope,) = torch.autograd.grad(differentiable[-1], rate)
    h = 1e-5 * lr
    above, below = (train_functional(network, batches, lr + d)[-1].item() for d in (h, -h))
    runs = (
        train_functional(network, batches, lr),
        train_object_oriented(copy.deepcopy(network), batches, lr),
        differentiable.detach(),
        train_object_oriented(copy.deepcopy(network), batches, lr, torch.optim.Adam),
    )
    return {
        "losses": {style: losses.tolist() for style, losses in zip(STYLES, runs)},
        "slope": slope.item(),
        "slope_by_differences": (above - below) / (2 * h),
    }


# Many networks at once --------------------------------------------------------------------------


def make_network() -> nn.Sequential:
    """Return one network for the digits."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def make_networks(count: int, seed: int) -> list[nn.Module]:
    """Return networks of different initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [make_network() for _ in range(count)]


STRUCTURE = make_network().to("meta")  # for functional_call; it has no weights of its own


def predict(params: Params, x: Tensor) -> Tensor:
    """Return the logits of one network."""
    return functional_call(STRUCTURE, params, (x,))


def loss_of(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of one network."""
    return F.cross_entropy(predict(params, x), y)


def train_step(
    params: Params, state: torchopt.OptState, lr: Tensor, x: Tensor, y: Tensor
) -> tuple[Params, torchopt.OptState, Tensor]:
    """Do one step of one network: a pure function, so that ``vmap`` makes it one of many."""
    adam = torchopt.adam(lr)
    grads, loss = grad_and_value(loss_of)(params, x, y)
    updates, state = adam.update(grads, state, params, inplace=False)
    return torchopt.apply_updates(params, updates, inplace=False), state, loss


def train_together(
    networks: list[nn.Module], rates: Tensor, batches: Batches
) -> tuple[Params, torchopt.OptState, Tensor]:
    """Train all networks at once.

    Args:
        networks: The members, of one structure.
        rates: Their learning rates ``[members]``.
        batches: Images ``[members, batch, 64]`` and labels ``[members, batch]`` of each step.

    Returns:
        Stacked weights, their optimizer state, and the losses ``[steps, members]``.
    """
    stacked, _ = stack_module_state(networks)
    params = {name: p.detach() for name, p in stacked.items()}
    state = vmap(torchopt.adam().init)(params)
    losses = []
    for x, y in batches:
        params, state, loss = vmap(train_step)(params, state, rates, x, y)
        losses.append(loss)
    return params, state, torch.stack(losses)


def train_in_turn(
    networks: list[nn.Module],
    rates: Tensor,
    batches: Batches,
    train: Callable[[nn.Module, Batches, float], Tensor],
) -> Tensor:
    """Train one network after the other by ``train`` and return the losses ``[steps, members]``."""
    losses = []
    for k, (network, lr) in enumerate(zip(networks, rates.tolist())):
        own = [(x[k], y[k]) for x, y in batches]
        losses.append(train(copy.deepcopy(network), own, lr))
    return torch.stack(losses, 1)


def by_torch(network: nn.Module, batches: Batches, lr: float) -> Tensor:
    """Train one network by ``torch.optim``."""
    return train_object_oriented(network, batches, lr, torch.optim.Adam)


#: Ways to train many networks, for the comparison of speed.
WAYS: dict[str, Callable[[list[nn.Module], Tensor, Batches], Any]] = {
    "vmap": train_together,
    "functional": lambda *given: train_in_turn(*given, train_functional),
    "torchopt.Adam": lambda *given: train_in_turn(*given, train_object_oriented),
    "torch.optim.Adam": lambda *given: train_in_turn(*given, by_torch),
}


# Data -------------------------------------------------------------------------------------------


@dataclass
class Digits:
    """Images ``[count, 64]`` in [0, 1] and labels ``[count]``, to train and to test on."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, steps: int, shape: tuple[int, ...], generator: torch.Generator) -> Batches:
        """Draw ``steps`` batches of ``shape``."""
        count = len(self.train_y)
        indices = torch.randint(count, (steps, *shape), generator=generator)
        return [(self.train_x[i], self.train_y[i]) for i in indices.to(self.train_x.device)]


def load_digits(device: torch.device, seed: int) -> Digits:
    """Read scikit-learn's handwritten digits and split them at random.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"The digits need scikit-learn: {EXTRA}") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().div(16).to(device)
    y = torch.from_numpy(labels).long().to(device)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(device)
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(x[train], y[train], x[test], y[test])


# The parts of a run -----------------------------------------------------------------------------


def styles(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the styles on the first split, in double precision."""
    digits = load_digits(args.device, args.seed * 100)
    generator = torch.Generator().manual_seed(args.seed * 100 + 1)
    batches = digits.batches(args.compared_steps, (args.batch,), generator)
    network = make_networks(1, args.seed * 100 + 2)[0].to(args.device).double()
    return compare_styles(network, [(x.double(), y) for x, y in batches], args.compared_lr)


def member_rates(args: argparse.Namespace, members: int) -> Tensor:
    """Return the learning rates of the members: those of the command line in turn."""
    rates = [args.rates[k % len(args.rates)] for k in range(members)]
    return torch.tensor(rates, device=args.device)


def ensemble(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train an ensemble; return mean losses by learning rate and accuracies in percent."""
    digits = load_digits(args.device, seed)
    networks = [n.to(args.device) for n in make_networks(args.members, seed + 2)]
    generator = torch.Generator().manual_seed(seed + 1)
    batches = digits.batches(args.steps, (args.members, args.batch), generator)
    params, _, losses = train_together(networks, member_rates(args, args.members), batches)
    probabilities = vmap(predict, in_dims=(0, None))(params, digits.test_x).softmax(-1)

    def accuracy(p: Tensor) -> Tensor:
        return 100 * (p.argmax(-1) == digits.test_y).double().mean(-1)

    def log_loss(p: Tensor) -> Tensor:
        right = p.gather(-1, digits.test_y.expand(p.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return -right.clamp_min(1e-12).log().double().mean(-1)

    count = len(args.rates)
    groups = [slice(k, None, count) for k in range(count)]
    votes = torch.stack([probabilities[k].mean(0) for k in [*groups, slice(None)]])
    return {
        "losses": [losses[:, k].mean(1).tolist() for k in groups],
        "accuracies": accuracy(probabilities).tolist(),
        "log_losses": log_loss(probabilities).tolist(),
        "vote_accuracies": accuracy(votes).tolist(),  # of each learning rate, then of all
        "vote_log_losses": log_loss(votes).tolist(),
    }


def speed(args: argparse.Namespace, report: Callable[[], None]) -> list[dict[str, Any]]:
    """Time some steps of ensembles of several sizes, by ``vmap`` and by loops in turn."""
    digits = load_digits(args.device, args.seed * 100)
    rows = []
    for round_number in range(args.rounds + 1):  # the first one warms up
        for members in args.timed_members:
            seed = args.seed * 100 + 2
            networks = [n.to(args.device) for n in make_networks(members, seed)]
            generator = torch.Generator().manual_seed(seed + 1)
            batches = digits.batches(args.timed_steps, (members, args.batch), generator)
            given = networks, member_rates(args, members), batches
            seconds = {name: seconds_of(way, given, args.device) for name, way in WAYS.items()}
            row = {"round": round_number, "members": members, "seconds": seconds}
            rows += [row] if round_number else []
        report()
    return rows


def seconds_of(way: Callable[..., Any], given: tuple[Any, ...], device: torch.device) -> float:
    """Return how long one way takes."""
    started = time.perf_counter()
    way(*given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


# Command line -----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description = "Train in three styles, and many networks at once by vmap."
    result = parser("functional", description, QUICK)
    add = result.add_argument
    add("--batch", type=positive_int, default=32, help="images of a batch")
    add("--compared-steps", type=positive_int, default=200, help="steps of the three styles")
    add("--compared-lr", type=positive_float, default=0.01, help="learning rate of these steps")
    add("--members", type=positive_int, default=32, help="networks of an ensemble")
    rates, rates_help = [0.0003, 0.001, 0.003, 0.01], "learning rates of the members, in turn"
    add("--rates", type=positive_float, nargs="+", default=rates, help=rates_help)
    add("--steps", type=positive_int, default=500, help="training steps of an ensemble")
    add("--seeds", type=positive_int, default=5, help="ensembles, for the intervals")
    counts, counts_help = [8, 32, 128], "numbers of networks with which speed is measured"
    add("--timed-members", type=positive_int, nargs="+", default=counts, help=counts_help)
    add("--timed-steps", type=positive_int, default=10, help="steps of a measurement of speed")
    add("--rounds", type=positive_int, default=7, help="measurements of speed")
    args = result.parse_args(argv)
    if args.compared_steps < 2:
        result.error("--compared-steps must be at least 2: the first loss knows no learning rate")
    if args.members < len(args.rates):
        result.error(f"{len(args.rates)} --rates need as many --members, got {args.members}")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do all parts of the run, those that are not finished yet, and report."""
    started = time.monotonic()
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    jobs = Jobs(args.output, settings, args.resume, args.overwrite)
    load_digits(args.device, 0)  # refuse a missing package now
    torch.set_num_threads(args.threads)
    with progress_bar() as bar:
        total = 1 + args.seeds + args.rounds + 1
        task = bar.add_task("three styles", total=total, figures="")
        compared = jobs.run({"part": "styles"}, lambda: [styles(args)])
        bar.update(task, completed=1, description="ensembles   ")
        ensembles = []
        for seed in range(args.seeds):
            work = lambda seed=seed: [ensemble(args, 100 * (args.seed + seed))]  # noqa: E731
            ensembles += jobs.run({"part": "ensemble", "seed": seed}, work)
            accuracy = ensembles[-1]["vote_accuracies"][-1]
            bar.update(task, advance=1, figures=f"accuracy of the vote {accuracy:.1f} %")
        bar.update(task, description="speed       ", figures="")
        timed = jobs.run({"part": "speed"}, lambda: speed(args, lambda: bar.advance(task)))
        bar.update(task, completed=total)
    seconds = round(time.monotonic() - started, 1)
    return report(
        args, jobs, compared[0], ensembles, timed, {"settings": settings, "seconds": seconds}
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the example and return its results."""
    args = parse(argv)
    with plain_endings("functional"):
        return run(args)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)

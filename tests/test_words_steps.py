"""What an error says of steps, loops and hyperparameters; as :mod:`test_words` for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from wording import TX, Entry, check_words, enter, like_tree, loss, net, parameters, tree, using

import torchopt
from torchopt import schedules


def unpack(value: Any) -> None:
    _, _ = value


def inside(function: Callable[[Any, Any], Any]) -> Callable[[], None]:
    def run() -> None:
        network = net()
        with torchopt.inner_loop(network, torchopt.sgd(0.1)) as inner:
            inner.step(loss(network))
            function(network, inner)

    return run


def after_the_block() -> None:
    network = net()
    with torchopt.inner_loop(network, torchopt.sgd(0.1)) as inner:
        inner.step(loss(network))
    inner.step(loss(network))


def of_before(network: nn.Module, inner: Any) -> None:
    value = loss(network)
    inner.step(value, retain_graph=True)
    inner.step(value)


def outside_of_the_block() -> None:
    network = net()
    value = loss(network)
    with torchopt.inner_loop(network, torchopt.sgd(0.1)) as inner:
        inner.step(loss(network))
        inner.step(value)


ORDER = ("in the other order",)
WITH = ("`with torchopt.inner_loop(net, tx) as inner:`",)
LOOPS: dict[str, Entry] = {
    "swapped": (
        lambda: enter(TX(), net()),
        TypeError,
        (*ORDER, "the network Sequential", "inner_loop(net, tx)"),
    ),
    "swapped-meta": (using(net, lambda n: enter(torchopt.MetaAdam(n), n)), TypeError, ORDER),
    "parameters": (lambda: enter(parameters(), TX()), TypeError, ("inner_loop", "got generator")),
    "networks": (lambda: enter([net()], TX()), TypeError, ("got list", "torchopt.MetaSGD([a, b]")),
    "recover": (
        using(net, lambda n: torchopt.recover_state_dict(torchopt.extract_state_dict(n), n)),
        TypeError,
        (*ORDER, "ModuleState", "recover_state_dict(net, state)"),
    ),
    "recover-meta": (
        lambda: torchopt.recover_state_dict((TX().init(tree()),), torchopt.MetaAdam(net())),
        TypeError,
        (*ORDER, "the optimizer MetaAdam", "recover_state_dict(optimizer, state)"),
    ),
    "recover-state-dict": (
        using(net, lambda n: torchopt.recover_state_dict(n, n.state_dict())),
        TypeError,
        ("got OrderedDict", "net.load_state_dict(state)"),
    ),
    "recover-of-optimizer": (
        lambda: torchopt.recover_state_dict(net(), (TX().init(tree()),)),
        TypeError,
        ("an optimizer's", "recover_state_dict(optimizer, state)"),
    ),
    "recover-of-network": (
        using(net, lambda n: torchopt.MetaAdam(n).recover_state(torchopt.extract_state_dict(n))),
        TypeError,
        ("got ModuleState", "recover_state_dict(net, state)"),
    ),
    "pair": (inside(lambda n, inner: unpack(inner)), TypeError, ("no pair", "higher", *WITH)),
    "pair-of-block": (lambda: unpack(torchopt.inner_loop(net(), TX())), TypeError, ("pair", *WITH)),
    "no-with": (lambda: torchopt.inner_loop(net(), TX()).step(1), AttributeError, ("step", *WITH)),
    "no-iteration": (lambda: list(torchopt.inner_loop(net(), TX())), TypeError, WITH),
    "after": (after_the_block, RuntimeError, ("has ended", "inside", "torchopt.MetaOptimizer")),
    "stale": (inside(of_before), ValueError, ("earlier weights", "compute it again")),
    "outside": (
        outside_of_the_block,
        ValueError,
        ("outside of the inner_loop block", "compute it again"),
    ),
    "other": (
        inside(lambda n, inner: inner.step(loss(net()))),
        ValueError,
        ("does not depend", "another network", "compute it again"),
    ),
    "zero-grad": (
        lambda: torchopt.MetaAdam(net()).zero_grad(),
        AttributeError,
        ("'MetaAdam'", "'zero_grad'", "step(loss)", "outer.zero_grad()"),
    ),
    "frozen": (
        using(
            lambda: net().requires_grad_(False),
            lambda n: torchopt.MetaAdam(n).step(loss(n)),
        ),
        ValueError,
        ("all are frozen", "requires_grad_(True)"),
    ),
    "history": (
        inside(lambda n, inner: torchopt.Adam(n.parameters())),
        ValueError,
        ("non-leaf", "torchopt.stop_gradient(net)"),
    ),
}


class Network(nn.Module):
    """A network of a user's, which only fails when it is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what no number has."""
        return x.flatten()


LR = "lr must be a number, a tensor"
VALUES: dict[str, Entry] = {
    "scheduler-class": (
        lambda: torchopt.sgd(lr=StepLR),
        TypeError,
        (LR, "the class StepLR", "StepLR(torchopt.SGD(...), ...)", "torchopt.schedules"),
    ),
    "scheduler-class-object-oriented": (
        lambda: torchopt.SGD(parameters(), lr=StepLR),
        TypeError,
        (LR, "the class StepLR", "StepLR(torchopt.SGD(...), ...)"),
    ),
    "scheduler-class-later": (
        lambda: changed_later(StepLR),
        TypeError,
        (LR, "the class StepLR"),
    ),
    "text-later": (lambda: changed_later("0.1"), TypeError, (LR, "str: '0.1'", "lr=float(value)")),
    "scheduler": (
        lambda: torchopt.sgd(lr=StepLR(torch.optim.SGD(parameters(), lr=0.1), 3)),
        TypeError,
        (LR, "a StepLR", "torchopt.schedules"),
    ),
    "uncalled": (
        lambda: torchopt.sgd(lr=schedules.linear),
        TypeError,
        ("the function linear", "torchopt.schedules.linear(...)"),
    ),
    "uncalled-class": (
        lambda: torchopt.sgd(lr=schedules.cosine_decay),
        TypeError,
        ("the class cosine_decay", "torchopt.schedules.cosine_decay(...)"),
    ),
    "by-schedule": (
        lambda: torchopt.scale_by_schedule(StepLR),
        TypeError,
        ("step_size", "the class StepLR"),
    ),
    "no-arguments": (lambda: torchopt.sgd(lr=lambda: 0.1), TypeError, ("0 arguments", "count")),
    "two-arguments": (lambda: torchopt.sgd(lr=lambda a, b: a), TypeError, ("2 arguments", "count")),
    "returns-none": (
        lambda: torchopt.sgd(lr=lambda count: None).init(tree()),
        TypeError,
        ("The schedule lr", "at count 0", "None"),
    ),
    "network": (
        lambda: torchopt.sgd(net()),
        TypeError,
        (LR[:20], "the network Sequential", "torchopt.MetaOptimizer(net, tx)"),
    ),
    "network-of-users": (
        lambda: torchopt.sgd(Network()).init(tree()),
        TypeError,
        ("lr was asked", "the network Network", "torchopt.MetaOptimizer(net, tx)"),
    ),
    "generator": (
        lambda: torchopt.sgd(parameters()),
        TypeError,
        (LR, "a generator", "torchopt.Adam(net.parameters(), lr=0.1)"),
    ),
    "numpy": (lambda: torchopt.adam(lr=numpy.ones(999)), TypeError, ("ndarray", "torch.as_tensor")),
    "long-text": (lambda: torchopt.adam(lr="x" * 999), TypeError, (LR, "[...]")),
    "long-tree": (lambda: torchopt.adam(lr={"w" * 999: "x" * 999}), TypeError, ("[...]",)),
    "long-pair": (lambda: torchopt.adam(betas=[torch.ones(99)]), TypeError, ("shape (99,)",)),
    "comma": (lambda: torchopt.sgd(lr=(0.1,)).init(tree()), ValueError, ("comma", "lr=0.1")),
    "many-names": (
        lambda: torchopt.MetaSGD(
            nn.ModuleList(nn.Linear(1, 1) for _ in range(99)), lr={"": 1, "x": 1}
        ),
        ValueError,
        ("an entry 'x'", "'0.weight'", "and 190 more"),
    ),
    "misspelt": (
        lambda: torchopt.MetaSGD([{"params": net(), "learning_rate": 0.1}]),
        TypeError,
        ("'learning_rate' is no hyperparameter of MetaSGD", "'lr'"),
    ),
    "schedule-of-text": (lambda: schedules.linear("1", 0.0, 3), TypeError, ("init_value", "'1'")),
    "joined-numbers": (
        lambda: schedules.join([0.1, 0.2], [3]),
        TypeError,
        ("float: 0.1", "constant(value)"),
    ),
    "boundaries": (
        lambda: schedules.piecewise_constant(1.0, [10, 20]),
        TypeError,
        ("{count: factor}", "[10, 20]"),
    ),
    "mask": (
        lambda: torchopt.freeze(net()).init(tree()),
        TypeError,
        ("The mask of 'b'", "a dict of them by name"),
    ),
}


def changed_later(lr: Any) -> None:
    optimizer = torchopt.SGD([p := nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.param_groups[0]["lr"], p.grad = lr, torch.ones(2)
    optimizer.step()


def step_with(value: Any) -> Callable[[], None]:
    return lambda: torchopt.MetaAdam(net()).step(value)


STEPS: dict[str, Entry] = {
    "object-oriented": (
        using(net, lambda n: torchopt.Adam(n.parameters()).step(loss(n))),
        TypeError,
        ("Adam.step", "shape ()", "loss.backward(), optimizer.step()", "torchopt.MetaAdam"),
    ),
    "closure": (step_with(lambda: 0.5), TypeError, ("got float", "without item()")),
    "closure-of-another": (
        step_with(lambda: loss(net())),
        ValueError,
        ("does not depend on the present parameters", "another network"),
    ),
    "number": (step_with(0.5), TypeError, ("got float", "without item()")),
    "none": (step_with(None), TypeError, ("got NoneType", "return it?")),
    "several": (step_with([torch.ones(())]), TypeError, ("got list", "added up")),
    "complex": (step_with(torch.ones(()) * 1j), ValueError, ("complex64", "real")),
    "no-graph": (step_with(torch.ones(())), ValueError, ("no graph", "torch.enable_grad()")),
    "order": (
        lambda: torchopt.FuncOptimizer(TX()).step(tree(), tree()["w"].sum()),
        TypeError,
        ("got dict", "the loss comes first"),
    ),
    "constants": (
        lambda: torchopt.FuncOptimizer(TX()).step(torch.ones(()), like_tree()),
        ValueError,
        ("No parameter requires grad", "requires_grad_(True)"),
    ),
    "other-tree": (
        lambda: torchopt.FuncOptimizer(TX()).step(tree()["w"].sum(), tree()),
        ValueError,
        ("does not depend", "shape (2,)"),
    ),
    "func-zero-grad": (
        lambda: torchopt.FuncOptimizer(TX()).zero_grad(),
        AttributeError,
        ("'FuncOptimizer'", "step(loss)"),
    ),
    "network": (
        lambda: torchopt.Adam(net()),
        TypeError,
        ("the network Sequential", "Adam(net.parameters(), ...)", "torchopt.MetaOptimizer"),
    ),
    "method": (lambda: torchopt.Adam(net().parameters), TypeError, ("Adam(net.parameters())",)),
    "dict": (lambda: torchopt.Adam(tree()), TypeError, ("a dict", "Adam(params.items())")),
    "group": (
        lambda: torchopt.Adam([{"param": list(parameters())}]),
        TypeError,
        ("'params'", "['param']"),
    ),
    "meta-parameters": (
        lambda: torchopt.MetaAdam(parameters()),
        TypeError,
        ("the network, not its parameters", "got generator", "MetaAdam(net, ...)"),
    ),
    "meta-dict": (lambda: torchopt.MetaAdam(tree()), TypeError, ("without the key 'params'",)),
    "meta-state-dict": (
        lambda: torchopt.MetaAdam(net()).load_state_dict(net().state_dict()),
        ValueError,
        ("no state_dict of MetaAdam", "'param_groups'", "'0.weight'"),
    ),
}


def rule_of(returned: Any, slots: tuple[str, ...] = ()) -> Callable[[], Any]:
    """Use a rule that returns something else than an update and its slots."""

    def run() -> None:
        @torchopt.transformation
        class Mine(torchopt.ElementwiseTransformation):
            def rule(self, g: Any, p: Any, t: Any, slots: Any) -> Any:
                return returned(g, slots)

        Mine.slots = slots
        grads = [torch.ones(3)]
        Mine().update(grads, Mine().init(grads), inplace=False)

    return run


RULE = ("The rule of Mine must return two things", "`return update")
RULES: dict[str, Entry] = {
    "update-only": (rule_of(lambda g, slots: g), TypeError, (*RULE, "got a tensor")),
    "nothing": (rule_of(lambda g, slots: None), TypeError, (*RULE, "got None")),
    "three": (rule_of(lambda g, slots: (g, slots, 1)), TypeError, (*RULE, "length 3")),
    "number": (rule_of(lambda g, slots: (1.0, slots)), TypeError, (*RULE, "float: 1.0")),
    "no-slot": (rule_of(lambda g, slots: (g, ()), ("m",)), TypeError, (*RULE, "(new_slot,)")),
}


def required(face: str) -> Callable[[], None]:
    """Require a kernel where a hyperparameter is a tensor of a class of the user's."""
    lr = torch.tensor(0.1).as_subclass(type("Rate", (torch.Tensor,), {}))

    def run() -> None:
        network = net()
        if face == "functional":
            tx = torchopt.adam(lr, use_accelerated_op=True)
            tx.update(like_tree(), tx.init(like_tree()), inplace=False)
        else:
            torchopt.MetaAdam(network, lr=lr, use_accelerated_op=True).step(loss(network))

    return run


KERNELS: dict[str, Entry] = {
    face: (
        required(face),
        RuntimeError,
        ("the hyperparameter lr is a Rate, no plain tensor", "use_accelerated_op=None"),
    )
    for face in ("functional", "differentiable")
}

TABLE: dict[str, Entry] = {
    **{f"loop-{name}": entry for name, entry in LOOPS.items()},
    **{f"value-{name}": entry for name, entry in VALUES.items()},
    **{f"step-{name}": entry for name, entry in STEPS.items()},
    **{f"rule-{name}": entry for name, entry in RULES.items()},
}


@pytest.mark.parametrize("entry", TABLE.values(), ids=TABLE.keys())
def test_words(entry: Entry) -> None:
    check_words(entry)


@pytest.mark.skipif(not torchopt.accelerated_op_available(), reason="no kernels are loaded")
@pytest.mark.parametrize("entry", KERNELS.values(), ids=KERNELS.keys())
def test_required_kernels(entry: Entry) -> None:
    check_words(entry)


def test_what_is_right_is_not_refused() -> None:
    """The neighbours of what the table refuses."""
    network, value = net(), torchopt.MetaAdam(net())
    assert not hasattr(value, "zero_grad")
    assert torchopt.stop_gradient({"w": None, "step": 1}) == {"w": None, "step": 1}
    block = torchopt.inner_loop(network, torchopt.sgd(0.1))
    for _ in range(2):  # a block can be opened again
        with block as inner:
            inner.step(loss(network))
            assert not network[0].weight.is_leaf
        assert network[0].weight.is_leaf
    kept = torchopt.MetaSGD(network, lr=0.1)
    with torchopt.inner_loop(network, kept):
        kept.step(loss(network))
    kept.step(loss(network))  # an optimizer that was given goes on afterwards

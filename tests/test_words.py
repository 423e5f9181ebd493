"""What an error says of trees and transformations: what was given, what was expected, what to type.

Most entries are mistakes that users of TorchOpt, higher and ``torch.optim`` make; each stands for a
kind. A message has to hold the phrases and to be short enough to be read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wording import TX, Entry, check_words, enter, like_tree, loss, net, parameters, tree, using

import torchopt
from torchopt import schedules
from torchopt.core.hyper import hyper


TREE = ("a generator", "list(net.parameters())", "dict(net.named_parameters())")
TREES: dict[str, Entry] = {
    "step": (
        using(net, lambda n: torchopt.FuncOptimizer(TX()).step(loss(n), n.parameters())),
        TypeError,
        ("params must be a tree", *TREE),
    ),
    "step-network": (
        using(net, lambda n: torchopt.FuncOptimizer(TX()).step(loss(n), n)),
        TypeError,
        ("params must be a tree", "the network Sequential", "dict(net.named_parameters())"),
    ),
    "step-method": (
        using(net, lambda n: torchopt.FuncOptimizer(TX()).step(loss(n), n.parameters)),
        TypeError,
        ("the method parameters", "Call it"),
    ),
    "init": (lambda: TX().init(parameters()), TypeError, ("got a generator", *TREE[1:])),
    "init-network": (
        lambda: TX().init(net()),
        TypeError,
        ("got the network Sequential", "named_parameters"),
    ),
    "init-method": (
        lambda: TX().init(net().parameters),
        TypeError,
        ("got the method parameters", "Call it"),
    ),
    "func-init": (lambda: torchopt.FuncOptimizer(TX()).init(parameters()), TypeError, TREE[1:]),
    "grads": (
        lambda: TX().update(iter([torch.ones(2)]), TX().init([torch.ones(2)])),
        TypeError,
        ("grads must be a tree", "list(net.parameters())"),
    ),
    "params": (
        lambda: TX().update([torch.ones(2)], TX().init([torch.ones(2)]), parameters()),
        TypeError,
        ("params must be a tree", *TREE),
    ),
    "apply": (
        lambda: torchopt.apply_updates(parameters(), [torch.ones(2)]),
        TypeError,
        ("params must be a tree", *TREE),
    ),
    "apply-values": (
        lambda: torchopt.apply_updates([torch.ones(2)], like_tree().values()),
        TypeError,
        ("updates must be a tree", "a dict_values"),
    ),
    "why": (lambda: torchopt.kernels.why(TX(), parameters()), TypeError, TREE[1:]),
    "stop": (lambda: torchopt.stop_gradient(parameters()), TypeError, ("stop_gradient", *TREE)),
    "extract": (
        lambda: torchopt.extract_state_dict(parameters()),
        TypeError,
        ("extract_state_dict takes", *TREE),
    ),
    "recover": (
        lambda: torchopt.recover_state_dict(parameters(), like_tree()),
        TypeError,
        ("recover_state_dict takes", *TREE),
    ),
    "clone": (lambda: torchopt.module_clone(parameters()), TypeError, ("module_clone", *TREE)),
    "stop-optimizer": (
        lambda: torchopt.stop_gradient(torch.optim.SGD(parameters(), lr=0.1)),
        TypeError,
        ("got SGD", "state_dict()"),
    ),
    "stop-text": (lambda: torchopt.stop_gradient("w"), TypeError, ("the string 'w'",)),
    "function": (
        lambda: TX().update(lambda p: p, TX().init(tree()), tree()),
        TypeError,
        ("a lambda", "torch.func.grad"),
    ),
    "loss-as-gradient": (
        lambda: TX().update(tree()["w"].sum(), TX().init(tree()), tree()),
        ValueError,
        ("a dict of length 2", "shape ()", "torch.autograd.grad(loss"),
    ),
    "tuple-for-dict": (
        lambda: TX().update(tuple(like_tree().values()), TX().init(tree()), tree()),
        ValueError,
        ("a tuple of length 2", "dict(zip(params, grads))"),
    ),
}


def updated() -> Any:
    return TX().update(like_tree(), TX().init(tree()), tree())


def applied() -> Any:
    return TX().apply_gradients(like_tree(), TX().init(tree()), tree())


PAIR = ("updates, state = tx.update",)
PAIRS: dict[str, Entry] = {
    "apply": (
        lambda: torchopt.apply_updates(tree(), updated()),
        TypeError,
        ("updates must be", "the pair (updates, state)", *PAIR),
    ),
    "state": (
        lambda: TX().update(like_tree(), updated(), tree()),
        TypeError,
        ("got a tuple: the pair", *PAIR),
    ),
    "params": (
        lambda: TX().update(like_tree(), TX().init(tree()), applied()),
        TypeError,
        ("params must be", "the pair", *PAIR),
    ),
    "single": (
        lambda: torchopt.apply_updates(torch.ones(2), (torch.ones(2), TX().init(torch.ones(2)))),
        TypeError,
        ("the pair", *PAIR),
    ),
    "no-state": (
        lambda: TX().update(like_tree(), tree()),
        TypeError,
        ("got dict", "tx.init(params)", "update(grads, state, params)"),
    ),
    "other-order": (
        lambda: TX().update(TX().init(tree()), like_tree()),
        TypeError,
        ("update(grads, state, params)",),
    ),
    "state-as-params": (
        lambda: TX().update(like_tree(), TX().init(tree()), TX().init(tree())),
        TypeError,
        ("params must be", "an OptState", "update(grads, state, params)"),
    ),
    "states": (
        lambda: TX().update(like_tree(), (TX().init(tree()),)),
        TypeError,
        ("a tuple of them", "state[0]"),
    ),
}


def optimizer_of(cls: Any, **kwargs: Any) -> Any:
    return cls(parameters(), **kwargs)


class Undecorated(torchopt.ElementwiseTransformation):
    floor: float = hyper(1.0)


TRANSFORMATION = "expects a gradient transformation such as torchopt.adam(1e-3)"
TRANSFORMATIONS: dict[str, Entry] = {
    "torch-optim": (
        lambda: enter(net(), optimizer_of(torch.optim.SGD, lr=0.5, momentum=0.9)),
        TypeError,
        ("inner_loop", TRANSFORMATION, "the optimizer SGD", "torchopt.sgd(lr=0.5, momentum=0.9)"),
    ),
    "object-oriented": (
        lambda: enter(net(), optimizer_of(torchopt.Adam, lr=0.5)),
        TypeError,
        ("the optimizer Adam", "Give torchopt.adam(lr=0.5)"),
    ),
    "unknown": (
        lambda: enter(net(), optimizer_of(torch.optim.LBFGS)),
        TypeError,
        ("the optimizer LBFGS", "torchopt.transformation"),
    ),
    "generic": (
        lambda: enter(net(), optimizer_of(torchopt.Optimizer, tx=TX())),
        TypeError,
        ("optimizer.transformation",),
    ),
    "class": (lambda: torchopt.chain(torchopt.Adam), TypeError, ("the class Adam", ".adam(lr=")),
    "meta-class": (lambda: enter(net(), torchopt.MetaAdam), TypeError, ("the class MetaAdam",)),
    "in-meta": (
        using(net, lambda n: torchopt.MetaOptimizer(n, torchopt.MetaAdam(n, lr=0.5))),
        TypeError,
        ("the optimizer MetaAdam", "torchopt.adam(lr=0.5)"),
    ),
    "rule-class": (
        lambda: torchopt.chain(type(torchopt.scale(1.0))),
        TypeError,
        ("the class Scale", "Scale(...)"),
    ),
    "list": (
        lambda: torchopt.chain([TX(), TX()]),
        TypeError,
        ("a list of length 2", "chain(a, b)", "chain(*list)"),
    ),
    "uncalled": (
        lambda: torchopt.chain(torchopt.adam),
        TypeError,
        ("chain", "the function adam", "torchopt.adam(...)"),
    ),
    "partial": (lambda: torchopt.chain(TX), TypeError, ("partial", "Call it: adam(...)")),
    "lambda": (
        lambda: torchopt.chain(lambda g: g),
        TypeError,
        ("a lambda", "rule(g, p, t, slots)", "torchopt.transformation"),
    ),
    "method": (lambda: torchopt.chain(TX().init), TypeError, ("the method init", "without .init")),
    "clip": (
        lambda: torchopt.chain(torch.nn.utils.clip_grad_norm_),
        TypeError,
        ("torchopt.clip_grad_norm(...)",),
    ),
    "none": (lambda: torchopt.chain(TX(), None), TypeError, ("got None", "torchopt.identity()")),
    "number": (lambda: torchopt.chain(TX(), 0.1), TypeError, ("torchopt.scale(number)",)),
    "name": (lambda: enter(net(), "sgd"), TypeError, ("str: 'sgd'", "torchopt.sgd(...)")),
    "schedule": (
        lambda: torchopt.chain(TX(), schedules.constant(1.0)),
        TypeError,
        ("constant", "torchopt.scale_by_schedule(schedule)"),
    ),
    "mask-first": (
        lambda: torchopt.masked({"w": True}, TX()),
        TypeError,
        ("a dict of length 1", "masked(transformation, mask)"),
    ),
    "network-second": (
        lambda: torchopt.MetaOptimizer(TX(), net()),
        TypeError,
        ("the network Sequential", "MetaOptimizer(net, tx)"),
    ),
    "parameters-second": (
        lambda: torchopt.Optimizer(TX(), parameters()),
        TypeError,
        ("parameters first", "Optimizer(net.parameters(), tx)"),
    ),
    "func": (
        lambda: torchopt.FuncOptimizer(parameters()),
        TypeError,
        ("a generator", "step(loss, params)"),
    ),
    "undecorated": (Undecorated, TypeError, ("'floor'", "@torchopt.transformation")),
    "step": (lambda: TX().step(loss(net())), TypeError, ("FuncOptimizer(tx).step(loss, params)",)),
}


TABLE: dict[str, Entry] = {
    **{f"tree-{name}": entry for name, entry in TREES.items()},
    **{f"pair-{name}": entry for name, entry in PAIRS.items()},
    **{f"transformation-{name}": entry for name, entry in TRANSFORMATIONS.items()},
}


@pytest.mark.parametrize("entry", TABLE.values(), ids=TABLE.keys())
def test_words(entry: Entry) -> None:
    check_words(entry)

"""The graph as data: checked against graphs known by hand and against a walk of its own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import Case, every_case
from conftest import nonzero
from fusing import needs_library
from torch import Tensor, nn

import torchopt
from torchopt.core import step_tags
from torchopt.visual.graph import FIRST_ORDER, Graph, build
from torchopt.visual.names import named_tensors


Adapted = tuple[dict[str, Tensor], Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def adapted(tx: Any, steps: int = 3, between: Any = None, **options: Any) -> Adapted:
    """Return the initial weights and a loss after some inner steps."""
    net, x = network(), nonzero(5, 2)
    with torchopt.inner_loop(net, tx, **options) as inner:
        start = dict(net.named_parameters())
        for step in range(1, steps + 1):
            inner.step(net(x).square().mean())
            if between is not None:
                between(net, inner, step)
        return start, net(x).square().mean()


def number_of_autograd_nodes(tensor: Tensor) -> int:
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [other for other, _ in node.next_functions if other is not None]
    return len(seen)


def steps_of(graph: Graph) -> list[Any]:
    return [node for node in graph.nodes if node.kind == "step"]


def check_structure(graph: Graph, loss: Tensor) -> None:
    """Check what holds of every graph."""
    assert [node.key for node in graph.nodes] == list(range(len(graph.nodes)))
    assert all(source < user for source, user in graph.edges)
    for source, user in graph.edges:
        after = graph.nodes[source].lane + (graph.nodes[source].kind == "step")
        assert graph.nodes[user].lane >= after
    of_autograd = sum(n.members for n in graph.nodes if n.kind not in ("result", "value"))
    assert of_autograd == number_of_autograd_nodes(loss)
    connected = {key for edge in graph.edges for key in edge}
    assert connected == set(range(len(graph.nodes)))


def test_a_graph_known_by_hand() -> None:
    a, b = nonzero(2, requires_grad=True), nonzero(2, requires_grad=True)
    product = a * b
    loss = (product + a).sum()
    graph = build(loss, {"a": a, "b": b, "product": product, "loss": loss, "other": nonzero(3)})
    labels = [node.label for node in graph.nodes]
    assert sorted(labels) == ["Add", "Mul", "Sum", "a", "b", "loss", "product"]
    edges = {(labels[source], labels[user]) for source, user in graph.edges}
    assert edges == {
        *(("a", "Mul"), ("b", "Mul"), ("Mul", "product"), ("product", "Add"), ("a", "Add")),
        *(("Add", "Sum"), ("Sum", "loss")),
    }
    by_label = {node.label: node for node in graph.nodes}
    kinds = {label: node.kind for label, node in by_label.items()}
    assert kinds["a"] == kinds["b"] == "leaf"
    assert (kinds["product"], kinds["loss"], kinds["Mul"]) == ("value", "result", "operation")
    assert by_label["Mul"].shape == (2,)
    assert by_label["a"].dtype == "float64"
    check_structure(graph, loss)


def test_a_step_that_rules_and_kernels_compute_is_one_node() -> None:
    unfused = torchopt.scale_by_adam().with_accelerated_op(False)
    _, loss = adapted(torchopt.chain(unfused, torchopt.adam(0.1)))
    graph = build(loss)
    check_structure(graph, loss)
    assert [node.label for node in steps_of(graph)] == [f"Adam + Adam step {k}" for k in (1, 2, 3)]


def test_json_holds_the_same() -> None:
    start, loss = adapted(torchopt.adam(0.1))
    graph = build(loss, start)
    data = graph.to_json()
    assert data["nodes"][3]["label"] == graph.nodes[3].label
    assert data["edges"] == [list(edge) for edge in graph.edges]


@pytest.mark.parametrize("accelerated", [None, False])
@every_case
def test_every_optimizer_step_is_one_node(case: Case, accelerated: bool | None) -> None:
    _, loss = adapted(case.tx().with_accelerated_op(accelerated))
    graph = build(loss)
    check_structure(graph, loss)
    found = steps_of(graph)
    name = case.cls.__name__
    assert [node.label for node in found] == [f"{name} step {k}" for k in (1, 2, 3)]
    assert [node.lane for node in found] == [0, 1, 2]
    assert graph.nodes[-1].kind == "result"
    assert graph.nodes[-1].lane == 3
    # a state that gradients do not reach carries no graph, and that is said
    assert case.flat("gradients") or not any(node.cuts for node in graph.nodes)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (torchopt.sgd(0.1), "SGD"),
        (torchopt.sgd(0.1, momentum=0.9), "SGD"),
        (torchopt.adam(0.1, weight_decay=0.1), "Adam"),
        (torchopt.adamw(0.1), "AdamW"),
        (torchopt.rmsprop(0.1), "RMSprop"),
        (torchopt.chain(torchopt.clip_grad_norm(0.1), torchopt.adam(0.1)), "ClipGradNorm + Adam"),
    ],
)
def test_the_usual_name(recipe: Any, name: str) -> None:
    assert [n.label for n in steps_of(build(adapted(recipe, 1)[1]))] == [f"{name} step 1"]


def signature(graph: Graph) -> list[Any]:
    return sorted((n.kind, n.label, n.lane, n.shape) for n in graph.nodes)


@pytest.mark.parametrize("options", [{}, {"create_graph": False}])
def test_the_rules_give_the_same_picture_as_the_kernels(options: Any) -> None:
    def graph(accelerated: bool | None) -> Graph:
        torch.manual_seed(1)
        start, loss = adapted(torchopt.adam(0.1, use_accelerated_op=accelerated), **options)
        return build(loss, start)

    assert signature(graph(False)) == signature(graph(None))


def test_a_learned_learning_rate_enters_each_step() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    start, loss = adapted(torchopt.adam(lr))
    graph = build(loss, [start, {"lr": lr}])
    check_structure(graph, loss)
    (key,) = [node.key for node in graph.nodes if node.name == "lr"]
    users = [graph.nodes[user].label for source, user in graph.edges if source == key]
    assert users == ["Adam step 1", "Adam step 2", "Adam step 3"]


@pytest.mark.parametrize("accelerated", [None, False])
def test_tasks_beside_each_other_have_the_same_lanes(accelerated: bool | None) -> None:
    net, x = network(), nonzero(5, 2)
    tx = torchopt.sgd(0.1, use_accelerated_op=accelerated)
    losses = []
    for _ in range(3):
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(2):
                inner.step(net(x).square().mean())
            losses.append(net(x).square().mean())
    loss = torch.stack(losses).sum()
    graph = build(loss, net)
    check_structure(graph, loss)
    assert sorted((n.label, n.lane) for n in steps_of(graph)) == [
        *[("SGD step 1", 0)] * 3,
        *[("SGD step 2", 1)] * 3,
    ]
    assert graph.nodes[-1].lane == 2


def test_kernels_of_one_step_are_one_node() -> None:
    """Parameters of two dtypes are updated by two kernels."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 1).double()
    inner = torchopt.MetaAdam([first, second], lr=0.1)
    for _ in range(2):
        inner.step(second(first(torch.ones(1, 2)).double()).square().sum())
    loss = second(first(torch.ones(1, 2)).double()).sum()
    found = steps_of(build(loss))
    assert [node.label for node in found] == ["Adam step 1", "Adam step 2"]


@pytest.mark.parametrize("accelerated", [None, False])
def test_the_functional_face(accelerated: bool | None) -> None:
    tx = torchopt.adam(0.1, use_accelerated_op=accelerated)
    params = {"w": nonzero(3, requires_grad=True)}
    names, state = dict(params), tx.init(params)
    for _ in range(2):
        grads = torch.autograd.grad(params["w"].pow(4).sum(), [params["w"]], create_graph=True)
        updates, state = tx.update({"w": grads[0]}, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    loss = params["w"].sum()
    graph = build(loss, names)
    check_structure(graph, loss)
    assert [node.label for node in steps_of(graph)] == ["Adam step 1", "Adam step 2"]
    assert not any(node.cuts for node in graph.nodes)


@pytest.mark.parametrize("accelerated", [None, False])
def test_fast_weights_and_states_stand_between_steps(accelerated: bool | None) -> None:
    names: list[Any] = []

    def name(net: nn.Module, inner: torchopt.MetaOptimizer, step: int) -> None:
        for target in (net, inner):
            names.append(
                torchopt.extract_state_dict(
                    target, enable_visual=True, visual_prefix=f"after{step}."
                )
            )

    tx = torchopt.adam(0.1, use_accelerated_op=accelerated)
    start, loss = adapted(tx, 2, name)
    graph = build(loss, [start, *names])
    check_structure(graph, loss)
    values = {
        n: node for node in graph.nodes if node.kind == "value" for n in node.name.split("\n")
    }
    weights = {f"after{step}.{weight}" for step in (1, 2) for weight in start}
    slots = {f"after1.{slot}.{w}" for slot in ("exp_avg", "exp_avg_sq") for w in start}
    assert set(values) == weights | slots
    key = values["after1.exp_avg.0.weight"].key
    around = [
        *(graph.nodes[source].label for source, user in graph.edges if user == key),
        *(graph.nodes[user].label for source, user in graph.edges if source == key),
    ]
    assert around == ["Adam step 1", "Adam step 2"]


@pytest.mark.parametrize("accelerated", [None, False])
@pytest.mark.parametrize("what", ["network", "optimizer", "both"])
def test_where_stop_gradient_cuts(accelerated: bool | None, what: str) -> None:
    def cut(net: nn.Module, inner: torchopt.MetaOptimizer, step: int) -> None:
        if step == 2 and what in ("network", "both"):
            torchopt.stop_gradient(net)
        if step == 2 and what in ("optimizer", "both"):
            torchopt.stop_gradient(inner)

    _, loss = adapted(torchopt.adam(0.1, use_accelerated_op=accelerated), 3, cut)
    graph = build(loss)
    cuts = {node.label: " ".join(node.cuts) for node in steps_of(graph) if node.cuts}
    assert set(cuts) == {"Adam step 3"}
    assert ("leaves" in cuts["Adam step 3"]) == (what != "optimizer")
    assert ("exp_avg" in cuts["Adam step 3"]) == (what != "network")
    marked = [node for node in graph.nodes if node.kind == "leaf" and "step 3" in str(node.cuts)]
    assert len(marked) == (0 if what == "optimizer" else 4)


@pytest.mark.parametrize("accelerated", [None, False])
def test_first_order_steps_say_so(accelerated: bool | None) -> None:
    tx = torchopt.rmsprop(0.1, use_accelerated_op=accelerated)
    graph = build(adapted(tx, create_graph=False)[1])
    assert [node.cuts for node in steps_of(graph)] == [(FIRST_ORDER,)] * 3


def test_steps_of_several_threads() -> None:
    """Each thread numbers its nodes by itself, so their intervals overlap."""
    losses: list[Tensor] = []
    lock = threading.Barrier(2)

    def work() -> None:
        lock.wait()
        losses.append(adapted(torchopt.adam(0.1, use_accelerated_op=False), 2)[1])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loss = losses[0] + losses[1]
    graph = build(loss)
    check_structure(graph, loss)
    assert sorted(n.label for n in steps_of(graph)) == [*["Adam step 1"] * 2, *["Adam step 2"] * 2]


def test_gradients_of_other_devices_are_told_apart() -> None:
    """Where another thread made the gradients, tags alone bound a step."""
    net = nn.Linear(2, 1, device="meta")
    x = torch.ones(3, 2, device="meta")
    inner = torchopt.MetaAdam(net, lr=0.1, use_accelerated_op=False)
    for _ in range(2):
        inner.step(net(x).square().mean())
    loss = net(x).square().mean()
    graph = build(loss)
    check_structure(graph, loss)
    assert [node.label for node in steps_of(graph)] == ["Adam step 1", "Adam step 2"]
    squares = [n for n in graph.nodes if n.kind == "operation" and n.label == "Pow"]
    assert [node.lane for node in squares] == [0, 1, 2]


@pytest.mark.parametrize("residual", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.thorough
def test_a_hundred_thousand_operations(residual: bool) -> None:
    """Also when the graph is freed afterwards, from its middle too."""
    x = torch.ones(2, requires_grad=True)
    y, kept = x, []
    for count in range(50_000):
        y = y + y.sin() if residual else (y * 1.5).sin()
        if count % 13_000 == 0:
            kept.append(y)
    graph = build(y.sum(), {"x": x})
    assert len(graph.nodes) == 100_003
    del y
    kept.reverse()
    while kept:
        kept.pop()


@needs_library
def test_nothing_is_tagged_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tag was made")

    monkeypatch.setattr(step_tags, "end", refuse)
    with torch.no_grad():
        params = {"w": nonzero(3)}
        tx = torchopt.adam(0.1, use_accelerated_op=False)
        tx.update({"w": nonzero(3)}, tx.init(params), params)

    def loss(w: Tensor) -> Tensor:
        updates, _ = tx.update({"w": w.square()}, tx.init({"w": w}), {"w": w}, inplace=False)
        return updates["w"].sum()

    torch.func.grad(loss)(nonzero(3))  # torch.func discards its graph
    adapted(torchopt.adam(0.1))  # a fused node tells by itself what it is


def test_a_step_that_records_nothing_changes_no_gradient() -> None:
    g = nonzero(3, requires_grad=True).square()
    tx = torchopt.chain()
    tx.update({"w": g}, tx.init({"w": nonzero(3)}), inplace=False)
    assert step_tags.STEP_TAG not in g.grad_fn.metadata


def test_results_without_a_graph_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) and dtype float64 has no graph"):
        build(nonzero(2))
    with pytest.raises(TypeError, match="must be a tensor or a list of tensors, got float"):
        build(1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="empty list"):
        build([])


def test_all_forms_of_names() -> None:
    net = nn.BatchNorm1d(2)
    weight, bias = net.weight, net.bias
    pairs = [("weight", weight), ("bias", bias)]
    buffers = [f"{name}" for name, _ in net.named_buffers()]
    assert named_tensors(None) == []
    for given in (
        dict(pairs),
        {weight: "weight", bias: "bias"},
        net.named_parameters(),
        pairs,
        [{"weight": weight}, ("bias", bias)],
        iter([dict(pairs)]),
    ):
        assert [name for name, _ in named_tensors(given)] == ["weight", "bias"]
    for given in (net, torchopt.extract_state_dict(net)):
        assert [name for name, _ in named_tensors(given)] == ["weight", "bias", *buffers]
    visual = torchopt.extract_state_dict(net, enable_visual=True, visual_prefix="t0.")
    assert named_tensors(visual)[0][0] == "t0.weight"
    assert named_tensors(visual)[0][1] is weight
    nested = {"net": net, "tree": {"a": [weight, bias]}}
    assert [name for name, _ in named_tensors(nested)][-2:] == ["tree.a.0", "tree.a.1"]
    lr = torch.tensor(0.1, requires_grad=True)
    inner = torchopt.MetaSGD(nn.Linear(2, 1), lr=lr, momentum=0.9)
    inner.step(inner.param_groups[0]["params"](torch.ones(1, 2)).sum())
    assert [name for name, _ in named_tensors(inner)] == [
        *("momentum_buffer.weight", "momentum_buffer.bias", "lr")
    ]


@pytest.mark.parametrize("given", [[torch.ones(2)], {"a": 1.0}, 3, [("a", 3)], "weight"])
def test_names_without_tensors_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"Give a module|params must be a module"):
        named_tensors(given)


def test_several_groups_have_names_of_their_own() -> None:
    nets = [nn.Linear(2, 1), nn.Linear(2, 1)]
    inner = torchopt.MetaSGD(nets, lr=0.1, momentum=0.9)
    inner.step(nets[0](torch.ones(1, 2)).sum() + nets[1](torch.ones(1, 2)).sum())
    states = torchopt.extract_state_dict(inner, enable_visual=True, visual_prefix="s.")
    assert [name for name, _ in named_tensors(states)][::2] == [
        *("s.0.momentum_buffer.weight", "s.1.momentum_buffer.weight")
    ]
    torchopt.recover_state_dict(inner, states)  # names do not disturb it


def test_names_do_not_disturb_states_and_trees_have_none() -> None:
    net = nn.Linear(2, 1)
    state = torchopt.extract_state_dict(net, by="deepcopy", enable_visual=True)
    torchopt.recover_state_dict(net, state)
    assert net.weight is state.params["weight"]
    with pytest.raises(ValueError, match="Give make_dot a dict"):
        torchopt.extract_state_dict({"a": net.weight}, enable_visual=True)

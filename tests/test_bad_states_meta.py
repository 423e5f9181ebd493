"""States that do not fit the differentiable face: an error, and nothing has changed."""

import copy

import pytest
import torch
from adapting import batch, mse
from cases import every_pair
from torch import nn
from unchanged import Net, adapted, nothing_changes, refused

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


def test_a_strangers_state():
    net, optimizer = adapted()
    wide = Net(width=5)
    stranger = torchopt.MetaAdam(wide)
    stranger.step(mse(wide, batch()))
    _, rms = adapted(torchopt.MetaRMSProp)
    module_state = torchopt.extract_state_dict(net)
    cases = [
        (net, torchopt.extract_state_dict(wide), ValueError, r"'body\.weight'.*\(5, 3\)"),
        (net, torchopt.extract_state_dict(net.head), ValueError, r"'body\.weight' is missing"),
        (net, torchopt.extract_state_dict(optimizer), TypeError, "module"),
        (net, net.state_dict(), TypeError, "extract_state_dict"),
        (optimizer, torchopt.extract_state_dict(stranger), ValueError, r"body\.weight"),
        (optimizer, torchopt.extract_state_dict(rms), ValueError, "another optimizer"),
        (optimizer, module_state, TypeError, "MetaAdam"),
        (optimizer, optimizer.state_dict(), TypeError, "MetaAdam"),
        (optimizer, (), ValueError, "0 groups"),
        (optimizer, (3,), TypeError, "MetaAdam"),
    ]
    for target, state, error, message in cases:
        with nothing_changes(net, optimizer), pytest.raises(error, match=message):
            torchopt.recover_state_dict(target, state)
    optimizer.step(mse(net, batch()))
    assert torchopt.extract_state_dict(optimizer)[0].step == 2


def test_a_state_half_of_which_fits_is_refused_as_a_whole():
    first, second = Net(), nn.Linear(2, 2)
    optimizer = torchopt.MetaAdam([first, second], lr=0.1)
    for _ in range(2):
        optimizer.step(second(first(batch()[0])).square().mean())
    one, two = torchopt.extract_state_dict(optimizer, by="deepcopy")
    two.slots["exp_avg"]["weight"] = torch.ones(7)
    one.step = 1
    with nothing_changes(first, optimizer), pytest.raises(ValueError, match="weight"):
        torchopt.recover_state_dict(optimizer, (one, two))


def _edited(change):
    def make(optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        return saved

    return make


GARBAGE = {
    "none": lambda o: None,
    "number": lambda o: 3,
    "empty": lambda o: {},
    "no_state": _edited(lambda s: s.pop("state")),
    "no_groups": _edited(lambda s: s.pop("param_groups")),
    "state_of_numbers": lambda o: {"state": [3], "param_groups": [{}]},
    "no_group_left": lambda o: {"state": [], "param_groups": []},
    "group_missing": _edited(lambda s: s["param_groups"].clear()),
    "group_too_many": _edited(lambda s: s["param_groups"].append({"lr": 0.1})),
    "group_no_dict": _edited(lambda s: s.update(param_groups=[3])),
    "unknown_hyperparameter": _edited(lambda s: s["param_groups"][0].update(rate=1.0)),
    "lr_negative": _edited(lambda s: s["param_groups"][0].update(lr=-1.0)),
    "lr_string": _edited(lambda s: s["param_groups"][0].update(lr="fast")),
    "lr_missing": _edited(lambda s: s["param_groups"][0].pop("lr")),
    "unknown_slot": _edited(lambda s: s["state"][0].update(square_avg=torch.ones(4, 3))),
    "slot_missing": _edited(lambda s: [entry.pop("exp_avg") for entry in s["state"].values()]),
    "slot_entry_missing": _edited(lambda s: s["state"][0].pop("exp_avg")),
    "slot_entry_no_tensor": _edited(lambda s: s["state"][0].update(exp_avg="three")),
    "slot_shape": _edited(lambda s: s["state"][0].update(exp_avg=torch.ones(9))),
    "slot_unknown_parameter": _edited(lambda s: s["state"].update({77: s["state"][0]})),
    "step_string": _edited(lambda s: s["state"][0].update(step="three")),
    "step_negative": _edited(lambda s: s["state"][0].update(step=-1)),
    "step_fraction": _edited(lambda s: s["state"][0].update(step=torch.tensor(1.5))),
    "step_missing": _edited(lambda s: s["state"][0].pop("step")),
    "entry_no_dict": _edited(lambda s: s["state"].update({0: 3})),
    "name_unknown": _edited(lambda s: s["param_groups"][0]["param_names"].__setitem__(0, "tail")),
    "names_too_few": _edited(lambda s: s["param_groups"][0]["param_names"].pop()),
    "params_too_few": _edited(
        lambda s: (s["param_groups"][0].pop("param_names"), s["param_groups"][0]["params"].pop())
    ),
    "of_a_module": lambda o: o.param_groups[0]["params"].state_dict(),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_load_state_dict_of_garbage(kind):
    net, optimizer = adapted(steps=2)
    garbage = GARBAGE[kind](optimizer)
    with refused((ValueError, TypeError), ".", net, optimizer):
        optimizer.load_state_dict(garbage)


@every_pair
def test_load_state_dict_of_another_algorithm(algorithm, other):
    net, optimizer = adapted(algorithm.meta)
    _, stranger = adapted(other.meta)
    saved = [stranger.state_dict()]
    if other.torch_cls is not None:
        twin = Net()
        mse(twin, batch()).backward()
        peer = other.torch_cls(twin.parameters(), lr=0.01)
        peer.step()
        saved.append(peer.state_dict())
    for state in saved:
        with refused(ValueError, "another optimizer|decoupled_weight_decay", net, optimizer):
            optimizer.load_state_dict(state)


def test_load_state_dict_of_an_extracted_state_says_what_to_type():
    net, optimizer = adapted()
    with refused(ValueError, "recover_state_dict", net, optimizer):
        optimizer.load_state_dict(torchopt.extract_state_dict(optimizer))


def test_load_state_dict_of_another_network():
    net, optimizer = adapted()
    wide = Net(width=5)
    other = torchopt.MetaAdam(wide)
    other.step(mse(wide, batch()))
    with refused(ValueError, r"body\.weight", net, optimizer):
        optimizer.load_state_dict(other.state_dict())

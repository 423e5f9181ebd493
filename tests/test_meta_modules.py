"""The differentiable face steps modules with a mind of their own."""

import copy

import pytest
import torch
from adapting import adapted_loss, assert_derivative, batch, close, follow, mlp, mse
from odd_modules import MODULES, every_module
from torch import nn

import torchopt


pytestmark = pytest.mark.usefixtures("float64_by_default")


@every_module
def test_module_computes_with_the_new_weights(kind):
    net, data = MODULES[kind](), batch()
    twin = copy.deepcopy(net)
    if kind == "spectral_norm":  # its buffers move at every use in training
        net.eval()
        twin.eval()
    before = net(data[0]).detach()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    for _ in range(2):
        optimizer.step(mse(net, data))
    found = net(data[0])
    twin.load_state_dict(net.state_dict())
    close(found, twin(data[0]).data)
    assert (found - before).abs().max() > 1e-3


@every_module
def test_module_meta_gradient_against_central_differences(kind):
    net = MODULES[kind]()
    if kind == "spectral_norm":
        net.eval()
    # a bias before BatchNorm has gradient zero: Adam would only amplify its rounding errors
    function = adapted_loss(net, torchopt.sgd(0.1, momentum=0.5), batch(), batch(), steps=2)
    if kind == "weight_norm":  # see UnitRows: only its first derivative can be compared
        net[0].requires_grad_(False)
    assert_derivative(function, [p for p in net.parameters() if p.requires_grad])


def test_transformer_layer_in_eval_mode_uses_the_new_weights_without_grad():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).eval()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torchopt.MetaSGD(layer, lr=0.5).step(layer(x).square().mean())
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():  # the fused inference path reads the weights by itself
        close(layer(x), twin(x), rtol=1e-10)
        assert not torch.allclose(layer(x), x)


def test_batch_norm_buffers_move_as_with_torch_optim():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin, buffer = copy.deepcopy(net), net[1].running_mean
    optimizer, peer = torchopt.MetaSGD(net, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        data = batch()
        optimizer.step(mse(net, data))
        follow(peer, twin, data)
    assert net[1].running_mean is buffer
    assert net[1].num_batches_tracked == 3
    for b, c in zip(net.buffers(), twin.buffers()):
        close(b, c)
        assert not b.requires_grad
    x = torch.randn(5, 3)
    kept = [b.clone() for b in net.buffers()]
    close(net.eval()(x), twin.eval()(x).data)
    assert all(torch.equal(b, k) for b, k in zip(net.buffers(), kept))


def test_hooks_keep_firing():
    net, data, calls = mlp(), batch(), []
    net[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    net[0].register_forward_hook(lambda *_: calls.append("forward"))
    net[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torchopt.MetaAdam(net)
    for k in range(1, 4):
        optimizer.step(mse(net, data))
        assert [calls.count(w) for w in ("pre", "forward", "backward")] == [k, k, k]


def test_submodules_work_on_their_own():
    net, data = mlp(), batch()
    torchopt.MetaSGD(net, lr=0.5).step(mse(net, data))
    close(net[0](data[0]), data[0] @ net[0].weight.T + net[0].bias)
    close(net[2](torch.tanh(net[0](data[0]))), net(data[0]))


def test_weights_behave_as_plain_tensors_in_operations():
    net = mlp()
    torchopt.MetaSGD(net).step(mse(net, batch()))
    weight = net[0].weight
    assert type(weight * 2) is torch.Tensor
    assert type(weight.detach()) is torch.Tensor
    assert type(torch.cat([weight, weight])) is torch.Tensor
    assert "grad_fn" in repr(weight)


def test_parametrization_of_an_adapted_module_after_stop_gradient():
    net, data = mlp(), batch()
    torchopt.MetaSGD(net).step(mse(net, data))
    expected = net(data[0]).detach()
    nn.utils.parametrizations.weight_norm(torchopt.stop_gradient(net)[0])
    close(net(data[0]).data, expected)
    torchopt.MetaSGD(net).step(mse(net, data))
    assert net[0].parametrizations.weight.original0.grad_fn is not None

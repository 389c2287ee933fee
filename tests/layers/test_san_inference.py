"""SAN attention computed row by row of the neighbourhood, as inference on a CPU does, against the general path."""
import copy

import pytest
import torch
from torch import nn

import timm_gsa.layers.san_attention as san_attention
from timm_gsa.layers import PairwiseAttention, PatchwiseAttention


@pytest.fixture(params=[PairwiseAttention, PatchwiseAttention])
def layer(request):
    """A layer in eval mode, all of whose norms do something; some of their factors are negative or 0."""
    torch.manual_seed(0)
    layer = request.param(48, kernel_size=5, dim_key=4, dim_out=24, num_groups=3).double().eval()
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
        norm.weight.data[::7] = 0
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return layer


@pytest.fixture
def by_rows(monkeypatch):
    """Counts how often weights are computed row by row."""
    calls = []
    for name in ('difference_network', 'patch_network'):
        network = getattr(san_attention, name)
        monkeypatch.setattr(san_attention, name, lambda *args, network=network: calls.append(1) or network(*args))
    return calls


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('batch, height, width', [(1, 1, 1), (2, 2, 7), (3, 11, 6)])
def test_inference_agrees_with_the_general_path(layer, by_rows, batch, height, width, channels_last):
    x = torch.randn(batch, 48, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    assert not by_rows
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
    assert len(by_rows) == 2


@pytest.mark.parametrize('change', [
    lambda layer: layer.train(),
    lambda layer: setattr(layer, 'norm1', nn.GroupNorm(1, layer.norm1.num_features).double()),
    lambda layer: setattr(layer, 'act2', nn.GELU()),
    lambda layer: setattr(layer, 'conv1', nn.Sequential(layer.conv1)),
    lambda layer: layer.norm2.register_forward_hook(lambda module, args, output: 2 * output),
    lambda layer: layer.act1.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
])
def test_layers_changed_by_hand_take_the_general_path(layer, by_rows, change):
    change(layer)
    x = torch.randn(2, 48, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert not by_rows


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # of vmap over a loop of addcmul_
def test_transforms_and_autocast_take_the_general_path(layer, by_rows):
    x = torch.randn(3, 2, 48, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))
        assert len(by_rows) == 3
        with torch.autocast('cpu', dtype=torch.bfloat16):
            layer.float()(x[0].float())
    assert len(by_rows) == 3


def test_half_precision_takes_the_general_path(layer, by_rows):
    with torch.no_grad():
        layer.bfloat16()(torch.randn(1, 48, 6, 6, dtype=torch.bfloat16))
    assert not by_rows

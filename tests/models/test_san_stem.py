"""The stem of SAN, which inference on a CPU, eager and compiled, computes in forms of its own up to its pool."""
import copy

import pytest
import timm
import torch
from torch import nn

import timm_gsa
from timm_gsa.layers._pool import HalvingMaxPool


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, backend='aot_eager', fullgraph=True)


def stem_of(in_chans=3):
    """Up to the pool; some factors of the norm are negative."""
    torch.manual_seed(0)
    stem = timm.create_model('san_tiny_patchwise', in_chans=in_chans, dtype=torch.float64).conv1[:4].eval()
    nn.init.normal_(stem.norm.weight)
    nn.init.normal_(stem.norm.bias)
    nn.init.normal_(stem.norm.running_mean)
    nn.init.uniform_(stem.norm.running_var, 0.5, 2.)
    return stem


@pytest.fixture
def pools(monkeypatch):
    """Shapes of the maps that reach the pool itself."""
    shapes = []
    forward = HalvingMaxPool.forward
    monkeypatch.setattr(HalvingMaxPool, 'forward', lambda self, x: shapes.append(x.shape) or forward(self, x))
    return shapes


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('size', [(64, 64), (33, 70), (2, 3)])
@pytest.mark.parametrize('in_chans', [1, 3, 4])
def test_forms_agree_with_the_layers(pools, in_chans, size, channels_last):
    stem = stem_of(in_chans)
    x = torch.randn(3, in_chans, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = stem(x).detach()
    fused = timm_gsa.fuse(stem)
    assert type(fused.norm) is nn.Identity and fused.conv.bias is not None
    assert len(pools) == 1
    with torch.no_grad():
        for run in (stem, fused, compiled(stem), compiled(fused)):
            torch.testing.assert_close(run(x), expected)
        assert len(pools) == 1
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert in_chans == 1 or stem(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize('run', [lambda stem: stem, compiled], ids=['eager', 'compiled'])
@pytest.mark.parametrize('change', [
    lambda stem: stem.norm.train(),
    lambda stem: setattr(stem, 'norm', nn.BatchNorm2d(32, track_running_stats=False).double()),
    lambda stem: setattr(stem, 'conv', nn.Conv2d(3, 32, 3, padding=1).double()),
    lambda stem: setattr(stem, 'act', nn.GELU()),
    lambda stem: stem.act.register_forward_hook(lambda module, args, output: 2 * output),
])
def test_what_the_forms_cannot_do_goes_through_the_layers(pools, change, run):
    stem = stem_of()
    change(stem)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = copy.deepcopy(stem)(x).detach()
    pools.clear()
    with torch.no_grad():
        torch.testing.assert_close(run(stem)(x), expected)
    assert len(pools) == 1


def test_many_channels_are_compiled_through_the_layers(pools):
    with torch.no_grad():
        compiled(stem_of(5))(torch.randn(2, 5, 16, 16, dtype=torch.float64))
    assert len(pools) == 1

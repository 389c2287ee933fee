"""The stem of SAN, which inference on a CPU computes in a form of its own up to its pool."""
import pytest
import timm
import torch
from torch import nn

import timm_gsa
import timm_gsa.ops._paths as paths
from timm_gsa.models.san import HalvingMaxPool


@pytest.fixture
def stem():
    torch.manual_seed(0)
    stem = timm.create_model('san_tiny_patchwise', dtype=torch.float64).conv1.eval()
    nn.init.normal_(stem.norm.running_mean)
    nn.init.uniform_(stem.norm.running_var, 0.5, 2.)
    return stem


@pytest.fixture
def parts(monkeypatch):
    """Sizes of the batches that reach the pool, as if two images made a large block of memory."""
    sizes = []
    monkeypatch.setattr(paths, '_LARGEST_BLOCK', 2 * 2 * 32 * 64 * 64 * 8)
    forward = HalvingMaxPool.forward
    monkeypatch.setattr(HalvingMaxPool, 'forward', lambda self, x: sizes.append(len(x)) or forward(self, x))
    return sizes


def test_parts_agree_with_the_whole(stem, parts):
    assert stem.conv.out_channels == 32
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    expected = stem(x).detach()
    assert parts == [5]
    with torch.no_grad():
        torch.testing.assert_close(stem(x), expected)
        assert parts[1:] == [2, 2, 1]
        fused = timm_gsa.fuse(stem)
        torch.testing.assert_close(fused(x), expected)
    assert type(fused.norm) is nn.Identity and parts[4:] == [2, 2, 1]


@pytest.mark.parametrize('change', [
    lambda stem: stem.norm.train(),
    lambda stem: setattr(stem, 'norm', nn.BatchNorm2d(32, track_running_stats=False).double()),
    lambda stem: stem.act.register_forward_hook(lambda module, args, output: None),
])
def test_what_needs_the_whole_batch_gets_it(stem, parts, change):
    change(stem)
    with torch.no_grad():
        stem(torch.randn(5, 3, 64, 64, dtype=torch.float64))
    assert parts == [5]


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, backend='aot_eager', fullgraph=True)


@pytest.mark.parametrize('size', [(64, 64), (33, 70), (2, 3)])
@pytest.mark.parametrize('in_chans', [1, 3, 4])
def test_compiled_form_agrees_with_the_layers(parts, in_chans, size):
    stem = timm.create_model('san_tiny_patchwise', in_chans=in_chans, dtype=torch.float64).conv1[:4].eval()
    nn.init.normal_(stem.norm.running_mean)
    nn.init.normal_(stem.norm.weight)
    x = torch.randn(2, in_chans, *size, dtype=torch.float64)
    expected = stem(x).detach()
    fused = timm_gsa.fuse(stem)
    parts.clear()
    with torch.no_grad():
        torch.testing.assert_close(compiled(stem)(x), expected)
        torch.testing.assert_close(compiled(fused)(x), expected)
    assert not parts


@pytest.mark.parametrize('change', [
    lambda stem: stem.norm.train(),
    lambda stem: setattr(stem, 'conv', nn.Conv2d(5, 32, kernel_size=1).double()),
    lambda stem: stem.act.register_forward_hook(lambda module, args, output: None),
])
def test_what_the_compiled_form_cannot_do_goes_through_the_layers(stem, parts, change):
    change(stem)
    x = torch.randn(2, stem.conv.in_channels, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        compiled(stem)(x)
    assert len(parts) == 1

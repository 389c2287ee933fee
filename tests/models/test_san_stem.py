"""The stem of SAN, which inference on a CPU, eager and compiled, computes in forms of its own up to its pool."""
import pytest
import timm
import torch
from torch import nn

import timm_gsa


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


def has_a_form(stem, x):
    """Whether all up to the pool is computed at once."""
    choices = timm_gsa.explain(nn.Sequential(stem), x)['0']
    return [(choice.operation, choice.form) for choice in choices] == [('san_stem', 'cpu')]


def compiled_calls(stem, x):
    names = []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == 'call_function')
        return graph.forward

    torch._dynamo.reset()
    torch.compile(stem, backend=record, fullgraph=True)(x)
    return names


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('in_chans, size', [(3, (64, 64)), (3, (33, 70)), (1, (33, 70)), (4, (2, 3))])
def test_forms_agree_with_the_layers(in_chans, size, channels_last):
    stem = stem_of(in_chans)
    x = torch.randn(3, in_chans, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = stem(x).detach()
    fused = timm_gsa.fuse(stem)
    assert type(fused.norm) is nn.Identity and fused.conv.bias is not None
    with torch.no_grad():
        for run in (stem, fused, compiled(stem), compiled(fused)):
            torch.testing.assert_close(run(x), expected)
        for each in (stem, fused):
            assert has_a_form(each, x) and not any('conv2d' in name for name in compiled_calls(each, x))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert in_chans == 1 or stem(x).is_contiguous(memory_format=layout)


def patched(stem):
    forward = stem.conv.forward
    stem.conv.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize('run', [lambda stem: stem, compiled], ids=['eager', 'compiled'])
@pytest.mark.parametrize('change', [
    lambda stem: stem.norm.train(),
    lambda stem: setattr(stem, 'norm', nn.BatchNorm2d(32, track_running_stats=False).double()),
    lambda stem: setattr(stem, 'conv', nn.Conv2d(3, 32, 3, padding=1).double()),
    lambda stem: setattr(stem, 'act', nn.GELU()),
    lambda stem: setattr(stem, 'act', nn.Identity()),
    lambda stem: setattr(stem, 'pool', nn.AvgPool2d(2)),
    lambda stem: stem.act.register_forward_hook(lambda module, args, output: 2 * output),
    lambda stem: stem.pool.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    patched,
])
def test_what_the_forms_cannot_do_goes_through_the_layers(change, run):
    stem = stem_of()
    change(stem)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with timm_gsa.use_backend('torch'), torch.no_grad():
        expected = stem(x)
    with torch.no_grad():
        assert not has_a_form(stem, x) if run is not compiled else True
        torch.testing.assert_close(run(stem)(x), expected)


def test_many_channels_are_compiled_through_the_layers():
    with torch.no_grad():
        calls = compiled_calls(stem_of(5), torch.randn(2, 5, 16, 16, dtype=torch.float64))
    assert any('conv2d' in name for name in calls)

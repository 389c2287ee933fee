"""SAN attention with channels innermost against the equation: inference on a CPU, compiled, or on small maps."""
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from timm_gsa.layers import PairwiseAttention, PatchwiseAttention

from .san_layers import CHANGES, generally, images, short_cuts, traced_calls

WHOLE = {PairwiseAttention: ['pairwise_attention'], PatchwiseAttention: ['patchwise_attention']}


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def goes_innermost(layer, x, mode):
    """Whether a layer is computed so; the compiler is then given the convolutions outside the network alone."""
    if mode is eager:
        return short_cuts(layer, x) == WHOLE[type(layer)]
    convolutions = sum('conv2d' in name for name in traced_calls(layer, x))
    return convolutions == (2 if isinstance(layer, PairwiseAttention) else 1)


def eager(module):
    return module


def compiled(module):
    return torch.compile(module, backend='aot_eager', fullgraph=True)


eager_fast = pytest.mark.parametrize('mode', [eager, pytest.param(compiled, marks=pytest.mark.slow)])


@eager_fast
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 7), (3, 11, 6)])
def test_agrees_with_the_general_path(layer, mode, shape, channels_last):
    x = images(*shape, channels_last)
    expected = generally(layer, x).detach()
    with torch.no_grad():
        out = mode(layer)(x)
        assert goes_innermost(layer, x, mode)
    torch.testing.assert_close(out, expected)
    if mode is eager and shape[1:] != (1, 1):
        assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@eager_fast
@pytest.mark.parametrize('kind', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('window', [(1, 1), (3, 4), (7, 2)])
def test_windows_of_every_kind(kind, mode, window):
    layer = kind(32, kernel_size=window[0], dilation=window[1]).double().eval()
    x = torch.randn(2, 32, 17, 9, dtype=torch.float64)
    expected = generally(layer, x).detach()
    with torch.no_grad():
        torch.testing.assert_close(mode(layer)(x), expected)
        assert goes_innermost(layer, x, mode)


@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason='torch 2.5 compiles for some sizes anew')
@pytest.mark.slow
def test_one_graph_for_all_sizes(layer):
    inputs = [images(*shape) for shape in ((2, 11, 6), (3, 9, 14), (5, 8, 8), (2, 3, 40))]
    expected = [generally(layer, x).detach() for x in inputs]
    counter = CompileCounterWithBackend('aot_eager')
    run = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x, out in zip(inputs, expected, strict=True):
            torch.testing.assert_close(run(x), out)
    assert counter.frame_count == 1


@pytest.mark.parametrize(('mode', 'change'), [
    *((eager, change) for change in CHANGES),
    *(pytest.param(compiled, change, marks=pytest.mark.slow) for change in CHANGES[:8])])
@pytest.mark.filterwarnings('ignore:.*weight_norm', 'ignore:.*spectral_norm')
def test_layers_changed_by_hand_take_the_general_path(layer, mode, change):
    change(layer)
    x = images(2, 6, 6)
    with torch.no_grad():
        expected = generally(layer, x)
        torch.testing.assert_close(mode(layer)(x), expected)
        assert not goes_innermost(layer, x, mode)


@eager_fast
def test_gradients_autocast_and_half_precision_take_the_general_path(layer, mode):
    mode(layer)(images(2, 6, 6)).sum().backward()
    assert not goes_innermost(layer, images(2, 6, 6).requires_grad_(), eager)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        mode(layer.float())(images(2, 6, 6).float())
        assert not goes_innermost(layer, images(2, 6, 6).float(), eager)
    with torch.no_grad():
        mode(layer.bfloat16())(images(2, 6, 6).bfloat16())
        assert not goes_innermost(layer, images(2, 6, 6).bfloat16(), eager)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='the CPU code of inductor needs a C++ compiler')
@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason='inductor of torch 2.5 fails at its CPU code')
@pytest.mark.parametrize('channels_last', [False, True])
def test_compiled_code_agrees_with_eager_mode(layer, channels_last):
    run = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 11, 6), (3, 9, 14)):
            x = images(*shape, channels_last)
            torch.testing.assert_close(run(x), layer(x))

"""The GSA module in one operation, as inference on a CPU computes it, against the operations it consists of."""
import pytest
import torch
import torch.nn.functional as F

from timm_gsa import use_backend
from timm_gsa.ops import content_and_row_attention, content_attention, global_attention, row_attention
from timm_gsa.ops.gsa import halve

from ..gradients import outputs_and_gradients


def inputs(height, width, batch=3, heads=2, depth=3, bias=True, dtype=torch.float64):
    """Map, projection, tables, and factor and shift."""
    channels = heads * depth
    tables = (torch.randn(2 * length - 1, depth, dtype=dtype) for length in (height, width))
    return (
        torch.randn(batch, channels, height, width, dtype=dtype),
        torch.randn(3 * channels, channels, dtype=dtype) / channels ** 0.5,
        torch.randn(3 * channels, dtype=dtype) if bias else None,
        *tables,
        *torch.randn(2, channels, dtype=dtype),
    )


def global_attention_reference(*args):
    with use_backend('reference'):
        return global_attention(*args)


@pytest.mark.parametrize('query_norm', [None, 'softmax', 'rms'])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('height, width', [
    (1, 1), (1, 9), (8, 1), (5, 7), (2, 2), (6, 7), (7, 6), (12, 8), (33, 18), (90, 61), (80, 62)])
def test_agrees_with_its_parts(height, width, bias, stride, query_norm):
    tensors = inputs(height, width, bias=bias)
    out = global_attention(*tensors, stride, query_norm)
    assert out.shape[2:] == (-(-height // stride), -(-width // stride))
    torch.testing.assert_close(out, global_attention_reference(*tensors, stride, query_norm), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('query_norm', ['softmax', 'rms'])
@pytest.mark.parametrize('depth', [1, 8, 16, 20])
def test_queries_are_normalised_over_heads_of_any_size(depth, query_norm):
    tensors = inputs(6, 7, batch=5, depth=depth)
    torch.testing.assert_close(
        global_attention(*tensors, 1, query_norm), global_attention_reference(*tensors, 1, query_norm),
        rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings('error')
def test_later_blocks_of_images_fit_into_the_memory_of_the_first():
    tensors = inputs(35, 54, batch=5, heads=1, depth=2)
    torch.testing.assert_close(
        global_attention(*tensors), global_attention_reference(*tensors), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(6, 5), (6, 8), (40, 30)])
def test_takes_and_keeps_any_memory_layout(size, stride):
    x, *more = inputs(*size)
    expected = global_attention(x, *more, stride)
    assert expected.is_contiguous()
    slices = x.repeat(1, 2, 1, 2)[:, :6, :, :size[1]]
    for laid_out in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, slices):
        out = global_attention(laid_out, *more, stride)
        torch.testing.assert_close(out, expected)
        assert out.stride() == torch.empty_like(laid_out[..., ::stride, ::stride]).stride()


@pytest.mark.parametrize('size, stride', [((5, 7), 1), ((5, 7), 2), ((6, 8), 2), ((2, 1), 2)])
def test_is_a_sound_operator(size, stride):
    for bias in (True, False):
        x, *more = inputs(*size, bias=bias)
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.library.opcheck(torch.ops.timm_gsa.global_attention.default, (laid_out, *more, stride, 'rms'))


def test_float32_is_as_close_as_its_parts():
    exact = inputs(20, 28, heads=4, depth=8)
    single = [x.float() for x in exact]
    expected = global_attention_reference(*exact)
    ours, parts = (
        (f(*single) - expected).norm() / expected.norm() for f in (global_attention, global_attention_reference))
    assert ours < 2 * parts + 1e-7


def test_has_gradients():
    tensors = inputs(6, 4)
    torch.testing.assert_close(
        outputs_and_gradients(global_attention, *tensors), outputs_and_gradients(global_attention_reference, *tensors))


@pytest.mark.parametrize('requires_grad', [False, True])
def test_compiled_code_takes_a_batch_without_images(requires_grad):
    tensors = [x.requires_grad_(requires_grad) for x in inputs(6, 4, batch=0)]
    out = torch.compile(global_attention, backend='aot_eager', fullgraph=True)(*tensors)
    assert out.shape == tensors[0].shape and out.requires_grad == requires_grad
    if requires_grad:
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in tensors)


def test_takes_half_precision_with_an_affine_map_of_float32():
    *half, scale, shift = inputs(5, 4, dtype=torch.float32)
    out = global_attention(*(x.bfloat16() for x in half), scale, shift)
    assert out.dtype == torch.bfloat16
    expected = global_attention_reference(*half, scale, shift)
    assert (out - expected).norm() < 0.05 * expected.norm()


def maps_of_heads(height, width, batch=3, heads=2, depth=3):
    """Query, key, value and column, and a table for rows."""
    maps = torch.randn(4, batch, heads, depth, height, width, dtype=torch.float64)
    return *maps, torch.randn(2 * width - 1, depth, dtype=torch.float64)


def sum_of_both(query, key, value, column, table):
    return content_attention(query, key, value) + row_attention(query, column, table)


@pytest.mark.parametrize('depth', [3, 12])
@pytest.mark.parametrize('height, width', [(1, 1), (6, 4), (8, 46), (2, 92), (27, 28), (60, 54)])
def test_content_and_row_are_the_sum_of_both(height, width, depth):
    tensors = maps_of_heads(height, width, depth=depth)
    ours, theirs = (outputs_and_gradients(f, *tensors) for f in (content_and_row_attention, sum_of_both))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_content_and_row_of_large_maps_hold_no_more_than_the_maps_they_are_given():
    """The backward pass computes softmax and contexts anew."""
    tensors = [x.requires_grad_() for x in maps_of_heads(64, 64)]
    held = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        content_and_row_attention(*tensors)
    assert held.keys() <= {x.data_ptr() for x in tensors}
    assert sum(held.values()) <= 1.01 * sum(x.numel() for x in tensors)


@pytest.mark.parametrize('dynamic', [False, True])
def test_content_and_row_compile_at_every_size(dynamic):
    compiled = torch.compile(content_and_row_attention, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for size in [(28, 30), (30, 28), (6, 4), (7, 9)]:
        tensors = maps_of_heads(*size)
        ours, theirs = (outputs_and_gradients(f, *tensors) for f in (compiled, sum_of_both))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(6, 8), (1, 1), (5, 8), (6, 7)])
def test_maps_are_halved_as_by_the_pool(size, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
    ours, theirs = (
        outputs_and_gradients(f, x)
        for f in (halve, lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)))
    torch.testing.assert_close(ours, theirs)
    x.requires_grad_()
    assert torch.autograd.gradcheck(halve, x) and torch.autograd.gradgradcheck(halve, x)

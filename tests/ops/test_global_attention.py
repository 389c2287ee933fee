"""The GSA module in one operation, as inference on a CPU computes it, against the operations it consists of."""
import pytest
import torch

from timm_gsa.ops import (
    content_and_row_attention,
    content_attention,
    global_attention,
    global_attention_reference,
    row_attention,
)
from timm_gsa.ops.global_attention import _HalvedPairs, halved

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


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('height, width', [
    (1, 1), (1, 9), (8, 1), (5, 7), (2, 2), (6, 7), (7, 6), (12, 8), (33, 18), (90, 61), (80, 62)])
def test_agrees_with_its_parts(height, width, bias, stride):
    tensors = inputs(height, width, bias=bias)
    out = global_attention(*tensors, stride)
    assert out.shape[2:] == (-(-height // stride), -(-width // stride))
    torch.testing.assert_close(out, global_attention_reference(*tensors, stride), rtol=1e-9, atol=1e-9)


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
            torch.library.opcheck(torch.ops.timm_gsa.global_attention.default, (laid_out, *more, stride))


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


def test_content_and_row_are_the_sum_of_both():
    query, key, value, column = torch.randn(4, 2, 3, 4, 5, 6, dtype=torch.float64)
    table = torch.randn(11, 4, dtype=torch.float64)
    expected = content_attention(query, key, value) + row_attention(query, column, table)
    torch.testing.assert_close(content_and_row_attention(query, key, value, column, table), expected)


def test_pairs_of_a_gpu_are_halved_as_by_the_pool():
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_HalvedPairs.apply(x), halved(x))
    torch.autograd.gradcheck(_HalvedPairs.apply, x)
    torch.autograd.gradgradcheck(_HalvedPairs.apply, x)

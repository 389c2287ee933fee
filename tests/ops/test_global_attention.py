"""The GSA module in one operation, as inference on a CPU computes it, against the operations it consists of."""
import pytest
import torch

from timm_gsa.ops import global_attention, global_attention_reference

from ..gradients import outputs_and_gradients


def inputs(height, width, batch=3, heads=2, channels=3, dtype=torch.float64):
    """Slices of a common projection, tables, and factor and shift."""
    qkv = torch.randn(batch, 3, heads, channels, height, width, dtype=dtype)
    tables = (torch.randn(2 * length - 1, channels, dtype=dtype) for length in (height, width))
    return *qkv.unbind(1), *tables, *torch.randn(2, heads * channels, dtype=dtype)


@pytest.mark.parametrize('height, width', [(1, 1), (1, 9), (8, 1), (5, 7), (33, 18), (90, 61)])
def test_agrees_with_its_parts(height, width):
    tensors = inputs(height, width)
    out = global_attention(*tensors)
    assert out.is_contiguous()
    torch.testing.assert_close(out, global_attention_reference(*tensors), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('channels_last', [False, True])
def test_takes_any_memory_layout(channels_last):
    query, key, value, *more = inputs(6, 5)
    expected = global_attention(query, key, value, *more)
    laid_out = [x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in (query, key, value)]
    torch.testing.assert_close(global_attention(*laid_out, *more), expected)


def test_float32_is_as_close_as_its_parts():
    exact = inputs(20, 28, heads=4, channels=8)
    single = [x.float() for x in exact]
    expected = global_attention_reference(*exact)
    ours, parts = (
        (f(*single) - expected).norm() / expected.norm() for f in (global_attention, global_attention_reference))
    assert ours < 2 * parts + 1e-7


def test_has_gradients():
    tensors = inputs(6, 4)
    torch.testing.assert_close(
        outputs_and_gradients(global_attention, *tensors), outputs_and_gradients(global_attention_reference, *tensors))

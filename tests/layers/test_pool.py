"""Pools against torch's own, whose results they must give to the bit."""
import pytest
import torch
from torch import nn

from timm_gsa.layers._pool import HalvingAveragePool, HalvingMaxPool, OverlappingMaxPool, overlapping_average_pool

PAIRS = [
    (HalvingMaxPool(), nn.MaxPool2d(2)),
    (HalvingAveragePool(), nn.AvgPool2d(2)),
    (OverlappingMaxPool(), nn.MaxPool2d(3, 2, 1)),
]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slices'])
@pytest.mark.parametrize('size', [(1, 1), (1, 4), (5, 1), (2, 2), (3, 5), (8, 7), (7, 8), (12, 10)])
@pytest.mark.parametrize('pool, expected', PAIRS)
def test_pools_are_those_of_torch(pool, expected, size, layout, dtype):
    x = torch.randn(2, 3, *size, dtype=dtype)
    x[0, 0, 0, 0], x[1, 1, -1, -1] = torch.nan, -torch.inf
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == 'slices':
        x = x.repeat(1, 1, 2, 1)[:, :, ::2]
    if not isinstance(pool, OverlappingMaxPool) and min(size) < 2:
        height, width = size
        with torch.no_grad(), pytest.raises(ValueError, match=f'maps must be at least 2 x 2, got {height} x {width}'):
            pool(x)
        return
    with torch.no_grad():
        torch.testing.assert_close(pool(x), expected(x), rtol=0, atol=0, equal_nan=True)
        if layout != 'slices':
            assert pool(x).stride() == expected(x).stride()


@pytest.mark.parametrize('pool, expected', PAIRS)
def test_gradients_of_equal_pixels_are_those_of_torch(pool, expected):
    tied = torch.zeros(1, 1, 7, 8, requires_grad=True)
    grads = [torch.autograd.grad(each(tied).sum(), tied)[0] for each in (pool, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize('pool, expected', PAIRS)
def test_pools_take_a_batch_without_images_and_one_image_alone_as_torch_does(pool, expected):
    with torch.no_grad():
        for x in (torch.randn(0, 3, 8, 8), torch.randn(3, 8, 8)):
            torch.testing.assert_close(pool(x), expected(x))


@pytest.mark.parametrize('pool, expected', PAIRS)
def test_scripted_pools_agree(pool, expected):
    x = torch.randn(1, 2, 7, 8)
    torch.testing.assert_close(torch.jit.script(pool)(x), expected(x))


@pytest.mark.parametrize('size', [(1, 1), (1, 4), (5, 1), (2, 2), (3, 5), (8, 7), (7, 8), (12, 10)])
def test_average_pool_counts_what_the_windows_cover(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = nn.functional.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)
    with torch.no_grad():
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.float()):
            out = overlapping_average_pool(laid_out)
            torch.testing.assert_close(out, expected.to(out.dtype))
    torch.testing.assert_close(overlapping_average_pool(x.requires_grad_()), expected)

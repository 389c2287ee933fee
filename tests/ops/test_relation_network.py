import pytest
import torch

from timm_gsa.ops import (
    difference_network,
    difference_network_reference,
    patch_network,
    patch_network_reference,
)

SIZES = [(1, 1), (2, 5), (7, 4), (12, 9)]


def laid_out(x, layout):
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'slice':  # as a projection to query, key and value hands it on
        return torch.cat([x, x], dim=1)[:, :x.shape[1]]
    return x


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice'])
@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (3, 1), (3, 4), (7, 1), (5, 2)])
@pytest.mark.parametrize('size', SIZES)
def test_difference_network_by_rows_is_the_one_on_all_places(size, kernel_size, dilation, layout):
    query, key = (laid_out(torch.randn(3, 5, *size, dtype=torch.float64), layout) for _ in range(2))
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 5), (4,), (6, 4), (6,))]
    arguments = query, key, *weights, kernel_size, dilation
    out = difference_network(*arguments)
    assert out.shape == (3, 6, kernel_size ** 2, *size) and out.is_contiguous()
    torch.testing.assert_close(out, difference_network_reference(*arguments))


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'slice'])
@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (3, 1), (3, 4), (7, 1), (5, 2)])
@pytest.mark.parametrize('size', SIZES)
def test_patch_network_by_rows_is_the_one_on_all_places(size, kernel_size, dilation, layout):
    key = laid_out(torch.randn(3, 4, *size, dtype=torch.float64), layout)
    places = 4 * kernel_size ** 2
    scale, shift = torch.randn(2, places, dtype=torch.float64)
    scale[::5] = 0
    weight = torch.randn(6, 2 * places, dtype=torch.float64)[:, places:]  # as the columns of a larger matrix
    arguments = key, scale, shift, weight, kernel_size, dilation
    out = patch_network(*arguments)
    assert out.shape == (3, 6, *size)
    torch.testing.assert_close(out, patch_network_reference(*arguments))

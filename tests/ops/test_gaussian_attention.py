"""Gaussian attention against loops over positions, the limits of its radius, and its precision."""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_gsa.ops import gaussian_attention, gaussian_attention_reference, gaussian_weight

from ..gradients import outputs_and_gradients

SIZES = [(1, 1), (1, 6), (7, 1), (5, 3), (4, 4)]
BOTH = pytest.mark.parametrize('function', [gaussian_attention, gaussian_attention_reference])


def map_of(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 10 + width)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def radius_of(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def loops(value: torch.Tensor, radius: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """The equation, one position and one neighbour at a time."""
    batch, channels, height, width = value.shape
    positions = [(row, column) for row in range(height) for column in range(width)]
    out = torch.zeros_like(value)
    for row, column in positions:
        kernel = {}
        for r, c in positions:
            squared = ((row - r) / dilation) ** 2 + ((column - c) / dilation) ** 2
            kernel[r, c] = torch.exp(-squared / (2 * (radius * radius + 1e-6)))
        total = sum(kernel.values())
        for r, c in positions:
            out[:, :, row, column] += kernel[r, c] / total * value[:, :, r, c]
    return out


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('radius, dilation', [(1., 1), (0.3, 1), (4., 1), (1., 2), (0.7, 4)])
@BOTH
def test_equals_loops_over_positions(function, size, radius, dilation):
    inputs = map_of(*size), radius_of(radius)
    ours = outputs_and_gradients(lambda v, r: function(v, r, dilation), *inputs)
    theirs = outputs_and_gradients(lambda v, r: loops(v, r, dilation), *inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_code_gives_the_same_at_every_size(dynamic):
    compiled = torch.compile(gaussian_attention, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for size in [(7, 7), (12, 12), (6, 9), (13, 11), (1, 130)]:  # maps of up to 128 positions have a form of their own
        inputs = map_of(*size), radius_of(1.3)
        ours = outputs_and_gradients(compiled, *inputs)
        theirs = outputs_and_gradients(gaussian_attention_reference, *inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('size', [(7, 7), (12, 12), (6, 9), (13, 11), (1, 130), (130, 1), (40, 33)])
def test_channels_last_is_kept_and_gives_the_same(size, compiled):
    torch._dynamo.reset()  # else sizes of other tests count towards the limit of graphs
    value = map_of(*size).contiguous(memory_format=torch.channels_last)
    ours = torch.compile(gaussian_attention, backend='aot_eager', fullgraph=True) if compiled else gaussian_attention
    inputs = value, radius_of(1.3)
    assert ours(*inputs).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        outputs_and_gradients(ours, *inputs),
        outputs_and_gradients(gaussian_attention_reference, *inputs),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_separable_form_equals_the_dense_reference(dtype, tolerance):
    value, radius = map_of(13, 11).to(dtype), torch.tensor(1.3, dtype=dtype)
    ours = outputs_and_gradients(gaussian_attention, value, radius)[:2]
    theirs = outputs_and_gradients(gaussian_attention_reference, value, radius)[:2]
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('size', [(12, 11), (11, 12), (12, 12), (1, 130), (40, 33)])
def test_large_maps_equal_the_dense_reference(size):
    inputs = map_of(*size), radius_of(1.7)
    ours, theirs = (
        outputs_and_gradients(lambda v, r, f=f: f(v, r, 2), *inputs)
        for f in (gaussian_attention, gaussian_attention_reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('size', [(6, 9), (13, 14)])
def test_takes_any_memory_layout(size):
    value = map_of(*size)
    expected = gaussian_attention(value, radius_of(1.))
    torch.testing.assert_close(
        gaussian_attention(value.contiguous(memory_format=torch.channels_last), radius_of(1.)), expected)
    torch.testing.assert_close(gaussian_attention(value.transpose(-1, -2), radius_of(1.)), expected.transpose(-1, -2))


# What the map of weights must look like


@pytest.mark.parametrize('length', [1, 2, 7, 30])
@pytest.mark.parametrize('radius', [1e-3, 0.5, 1., 20., 1e6])
def test_rows_of_the_map_sum_to_one(length, radius):
    weight = gaussian_weight(length, radius_of(radius))
    assert weight.shape == (length, length)
    torch.testing.assert_close(weight.sum(1), torch.ones(length, dtype=torch.float64))


def test_weights_of_a_pair_stand_as_the_row_sums_of_the_kernel():
    """The kernel is symmetric, so M_ij Z_i = M_ji Z_j with Z its row sums."""
    radius = 1.7
    sums = [sum(math.exp(-(i - j) ** 2 / (2 * (radius ** 2 + 1e-6))) for j in range(9)) for i in range(9)]
    weight = gaussian_weight(9, radius_of(radius))
    for i in range(9):
        for j in range(9):
            assert weight[i, j] / weight[j, i] == pytest.approx(sums[j] / sums[i], rel=1e-9)


@pytest.mark.parametrize('radius, centre', [(0.25, 0.999), (0.5, 0.619), (1., 0.159), (2., 0.040), (3., 0.018)])
def test_weight_of_the_centre(radius, centre):
    """The centre weights of the specification, far from the border of the map."""
    middle = gaussian_weight(57, radius_of(radius))[28, 28].square().item()  # of both axes
    assert middle == pytest.approx(centre, abs=6e-4)


@BOTH
def test_a_vanishing_radius_leaves_the_map_as_it_is(function):
    value = map_of(5, 6)
    for radius in (0., 1e-3):
        torch.testing.assert_close(function(value, radius_of(radius)), value, rtol=0., atol=1e-12)


@BOTH
def test_a_boundless_radius_gives_the_spatial_mean(function):
    value = map_of(5, 6)
    mean = value.mean((-2, -1), keepdim=True).expand_as(value)
    torch.testing.assert_close(function(value, radius_of(1e6)), mean, rtol=0., atol=1e-9)


@BOTH
def test_the_sign_of_the_radius_does_not_matter(function):
    value = map_of(5, 6)
    assert torch.equal(function(value, radius_of(-1.4)), function(value, radius_of(1.4)))


@BOTH
def test_the_radius_receives_a_gradient(function):
    _, _, gradient = outputs_and_gradients(function, map_of(5, 6), radius_of(1.))
    assert gradient.shape == () and gradient.abs() > 1e-3


def test_dilation_measures_distances_in_cells_of_the_coarse_grid():
    dilated = gaussian_weight(9, radius_of(1.5), dilation=3)
    torch.testing.assert_close(dilated, gaussian_weight(9, radius_of(4.5)), rtol=1e-5, atol=1e-7)
    assert torch.equal(gaussian_weight(9, radius_of(1.5), dilation=1), gaussian_weight(9, radius_of(1.5)))


# Precision and cost


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('radius', [0.5, 1., 40.])
def test_the_map_of_weights_is_float32_whatever_the_radius_is_stored_in(dtype, radius):
    """299 cells squared are beyond float16, and bfloat16 does not tell 255 from 256."""
    stored = torch.tensor(radius, dtype=dtype)
    weight = gaussian_weight(300, stored)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), gaussian_weight(300, stored.double()), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_map_of_weights(dtype):
    radius = torch.tensor(1.3)
    expected = gaussian_weight(300, radius)
    with torch.autocast('cpu', dtype):
        weight = gaussian_weight(300, radius)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, expected)


def test_cost_is_that_of_two_products_along_the_axes():
    with FlopCounterMode(display=False) as counter:
        gaussian_attention(torch.empty(2, 12, 28, 20, device='meta'), torch.empty((), device='meta'))
    assert counter.get_total_flops() == 2 * 2 * 12 * 28 * 20 * (28 + 20)

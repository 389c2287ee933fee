"""The prior-attention layer against loops over positions in float64, and the limits of its radius."""
import copy
import math

import pytest
import torch
import torch.nn as nn

from timm_gsa.layers import PriorAttention


def layer_of(**kwargs) -> PriorAttention:
    """A float64 layer from 4 to 8 channels, 3 of which come from attention."""
    torch.manual_seed(0)
    return PriorAttention(4, 8, **{'ratio': 0.4, 'dtype': torch.float64, **kwargs})


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height))


def loops(layer: PriorAttention, x: torch.Tensor, stride: int = 1, dilation: int = 1, cell: int = 1) -> torch.Tensor:
    """The module of the specification, one position and one neighbour at a time; `cell` positions are one distance."""
    batch, _, height, width = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    places = [(row, column) for row in range(-1, 2) for column in range(-1, 2)]
    grid = [(row, column) for row in range(rows) for column in range(columns)]

    def inside(r: int, c: int) -> bool:
        return 0 <= r < height and 0 <= c < width

    def matrix(conv: nn.Conv2d) -> torch.Tensor:
        return conv.weight[:, :, 0, 0]

    convolved = torch.zeros(batch, layer.conv.weight.shape[0], rows, columns, dtype=x.dtype)
    value = {}
    for row, column in grid:
        for i, j in places:
            r, c = row * stride + i * dilation, column * stride + j * dilation
            if inside(r, c):
                convolved[:, :, row, column] += x[:, :, r, c] @ layer.conv.weight[:, :, i + 1, j + 1].t()
        window = [(row, column)]
        if stride == 2:
            window = [(2 * row + i, 2 * column + j) for i, j in places if inside(2 * row + i, 2 * column + j)]
        value[row, column] = sum(x[:, :, r, c] for r, c in window) / len(window) @ matrix(layer.value).t()
    attended = torch.zeros(batch, 3, rows, columns, dtype=x.dtype)
    for row, column in grid:
        kernel = {}
        for r, c in grid:
            squared = ((row - r) ** 2 + (column - c) ** 2) / cell ** 2
            kernel[r, c] = torch.exp(-squared / (2 * (layer.radius ** 2 + 1e-6)))
        mean = sum(kernel[p] * value[p] for p in grid) / sum(kernel.values())
        attended[:, :, row, column] = mean @ matrix(layer.proj).t()
    return torch.cat([convolved, attended], dim=1)


def outputs_and_gradients(function, layer: PriorAttention, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer = copy.deepcopy(layer)
    out = function(layer, x)
    probe = torch.linspace(-1., 1., out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad((out * probe).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize('size', [(1, 1), (4, 3), (3, 6), (1, 5)])
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(stride=2, radius=0.6),
    dict(dilation=2, radius=2.),
    dict(dilation=1, attn_dilation=2),
], ids=str)
def test_equals_loops_over_positions(size, kwargs):
    layer = layer_of(**kwargs)
    stride, dilation = kwargs.get('stride', 1), kwargs.get('dilation', 1)
    cell = kwargs.get('attn_dilation', dilation)
    ours = outputs_and_gradients(lambda layer, x: layer(x), layer, image(*size))
    theirs = outputs_and_gradients(
        lambda layer, x: loops(layer, x, stride, dilation, cell), layer, image(*size))
    assert len(ours) == 6  # output, input, radius and three convolutions
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('size', [(1, 1), (2, 7), (7, 5), (8, 8)])
@pytest.mark.parametrize('kwargs', [dict(), dict(stride=2), dict(dilation=3)], ids=str)
def test_output_size_is_that_of_the_convolution_it_replaces(size, kwargs):
    x = image(*size)
    dilation = kwargs.get('dilation', 1)
    conv = nn.Conv2d(4, 8, 3, kwargs.get('stride', 1), padding=dilation, dilation=dilation, dtype=x.dtype)
    assert layer_of(**kwargs)(x).shape == conv(x).shape


@pytest.mark.parametrize('radius', [0., 1e-3])
def test_a_vanishing_radius_leaves_two_projections(radius):
    layer, x = layer_of(), image(5, 4)
    nn.init.constant_(layer.radius, radius)
    torch.testing.assert_close(layer(x)[:, 5:], layer.proj(layer.value(x)), rtol=0., atol=1e-12)


def test_a_boundless_radius_projects_the_spatial_mean():
    layer, x = layer_of(), image(5, 4)
    nn.init.constant_(layer.radius, 1e6)
    mean = layer.value(x).mean((-2, -1), keepdim=True)
    torch.testing.assert_close(layer(x)[:, 5:], layer.proj(mean).expand(-1, -1, 5, 4), rtol=0., atol=1e-9)


def test_the_sign_of_the_radius_does_not_matter():
    layer, x = layer_of(), image(5, 4)
    expected = layer(x)
    layer.radius.data.neg_()
    assert torch.equal(layer(x), expected)


def test_the_radius_learns():
    """It finds the width of the blur that made its targets."""
    teacher, layer = layer_of(radius=1.6), layer_of(radius=1.)
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = teacher(x).detach()
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        gradient, = torch.autograd.grad(loss, [layer.radius])
        layer.radius.data -= 0.02 * gradient.sign()
    assert layer.radius.item() == pytest.approx(1.6, abs=0.03)


def test_attention_ignores_what_the_image_shows():
    """The map depends on distance alone, so the attended channels are linear in the input."""
    layer, x, other = layer_of(), image(5, 4), image(5, 4).flip(-1)
    torch.testing.assert_close(layer(x + 2. * other), layer(x) + 2. * layer(other))


@pytest.mark.parametrize('dim_out, ratio, attended', [
    (64, 0.1, 6), (128, 0.1, 12), (256, 0.1, 25), (512, 0.1, 51), (128, 0.25, 32), (10, 0.99, 9),
])
def test_the_share_of_channels_is_truncated(dim_out, ratio, attended):
    layer = PriorAttention(dim_out, ratio=ratio, device='meta')
    assert layer.conv.out_channels == dim_out - attended
    assert layer.value.out_channels == layer.proj.out_channels == attended


def test_initialisation_has_the_documented_scale():
    torch.manual_seed(0)
    layer = PriorAttention(128, 512, ratio=0.25, radius=1.5)
    assert layer.radius.item() == 1.5
    assert layer.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (384 * 9)), rel=0.02)
    assert layer.value.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert layer.proj.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)

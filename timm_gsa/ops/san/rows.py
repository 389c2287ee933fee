"""The relation networks on padded keys, row by row of the neighbourhood and image by image.

The tensors of one step are K times smaller than one image's relations and stay in the cache of a CPU. Backward passes
recompute the relations and store none. These functions are not differentiable themselves. Matrices may have another
dtype than maps; results have that of the maps.
"""
from collections.abc import Iterator

import torch

from .neighbourhood import windows

__all__ = [
    'difference_input_gradients',
    'difference_logits',
    'difference_products',
    'patch_gradients',
    'patch_hidden',
    'rectified_moments',
]


def rectified_moments(
        query: torch.Tensor,
        padded: torch.Tensor,
        kernel_size: int,
        dilation: int,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Sum of [a; 1] [a; 1]^T over batch, places and positions, (C + 1, C + 1), float64, for a = relu(query - key)."""
    size = query.shape[1] + 1
    moments = query.new_zeros(size, size, dtype=torch.float64)
    for _, _, rectified in _differences(query, padded, kernel_size, dilation):
        rectified = rectified.to(dtype)
        moments += rectified @ rectified.t()
    return moments


def difference_logits(
        query: torch.Tensor,
        padded: torch.Tensor,
        folded: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """weight2 relu(folded [a; 1]) + bias2, (B, G, K * K, H, W), for a matrix `folded` of shape (M, C + 1)."""
    folded, weight2, bias2 = (x.to(query.dtype) for x in (folded, weight2, bias2))
    height, width = query.shape[-2:]
    out = query.new_empty(len(query), len(weight2), kernel_size, kernel_size * height * width)
    for image, row, rectified in _differences(query, padded, kernel_size, dilation):
        hidden = torch.mm(folded, rectified).relu_()
        torch.addmm(bias2[:, None], weight2, hidden, out=out[image, :, row])
    return out.view(len(query), -1, kernel_size ** 2, height, width)


def difference_products(
        grad: torch.Tensor,
        query: torch.Tensor,
        padded: torch.Tensor,
        folded: torch.Tensor,
        weight2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of the logits: that of weight2, sum dy [a; 1]^T (M, C + 1), and that of bias2.

    dy is the gradient of `folded` [a; 1].
    """
    folded, weight2 = folded.to(query.dtype), weight2.to(query.dtype)
    by_row = grad.reshape(len(query), len(weight2), kernel_size, -1)
    grad_weight2, products = torch.zeros_like(weight2), torch.zeros_like(folded)
    for image, row, rectified in _differences(query, padded, kernel_size, dilation):
        hidden, grad_hidden = _hidden_and_gradient(rectified, by_row[image, :, row], folded, weight2)
        grad_weight2.addmm_(by_row[image, :, row], hidden.t())
        products.addmm_(grad_hidden, rectified.t())
    return grad_weight2, products, grad.sum((0, 2, 3, 4))


def difference_input_gradients(
        grad: torch.Tensor,
        query: torch.Tensor,
        padded: torch.Tensor,
        folded: torch.Tensor,
        back: torch.Tensor,
        correction: torch.Tensor | None,
        weight2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and padded keys, where that of a is back dy - correction [a; 1].

    `back` has the shape (C, M), `correction` (C, C + 1); None stands for zeros.
    """
    folded, back, weight2 = (x.to(query.dtype) for x in (folded, back, weight2))
    correction = None if correction is None else correction.to(query.dtype)
    by_row = grad.reshape(len(query), len(weight2), kernel_size, -1)
    grad_query, grad_padded = torch.empty_like(query), torch.zeros_like(padded)
    channels, height, width = query.shape[1:]
    for image, row, rectified in _differences(query, padded, kernel_size, dilation):
        _, grad_hidden = _hidden_and_gradient(rectified, by_row[image, :, row], folded, weight2)
        grad_rectified = torch.mm(back, grad_hidden)
        if correction is not None:
            grad_rectified.addmm_(correction, rectified, alpha=-1)
        _where_positive(grad_rectified, rectified[:-1])
        by_place = grad_rectified.view(channels, kernel_size, height, width)
        if row == 0:
            torch.sum(by_place, 1, out=grad_query[image])
        else:
            grad_query[image] += by_place.sum(1)
        for place in range(kernel_size):
            _window(grad_padded[image], row, place, dilation, height, width).sub_(by_place[:, place])
    return grad_query, grad_padded


def patch_hidden(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`timm_gsa.ops.patch_network` of padded keys, (B, M, H, W)."""
    scale, shift, weight = (x.to(padded.dtype) for x in (scale, shift, weight))
    neighbours = windows(padded, kernel_size, dilation)
    batch, height, width = len(padded), *neighbours.shape[-2:]
    by_row = _by_row(weight, kernel_size)
    out = padded.new_zeros(batch, len(weight), height * width)
    for image, row, rectified in _mapped_keys(neighbours, scale, shift):
        out[image].addmm_(by_row[row], rectified)
    return out.view(batch, -1, height, width)


def patch_gradients(
        grad: torch.Tensor,
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the four tensor arguments of `patch_hidden` from the gradient of its result."""
    scale, shift, weight = (x.to(padded.dtype) for x in (scale, shift, weight))
    neighbours = windows(padded, kernel_size, dilation)
    channels, height, width = padded.shape[1], *neighbours.shape[-2:]
    by_row = _by_row(weight, kernel_size)
    grad = grad.flatten(2)
    factor = scale.view(channels, kernel_size, kernel_size)
    grad_padded = torch.zeros_like(padded)
    grad_scale, grad_shift = (padded.new_zeros(channels, kernel_size, kernel_size) for _ in range(2))
    grad_by_row = torch.zeros_like(by_row)
    for image, row, rectified in _mapped_keys(neighbours, scale, shift):
        grad_by_row[row].addmm_(grad[image], rectified.t())
        grad_mapped = _where_positive(torch.mm(by_row[row].t(), grad[image]), rectified)
        by_place = grad_mapped.view(channels, kernel_size, height, width)
        grad_shift[:, row] += by_place.sum((-2, -1))
        product = torch.mul(by_place, neighbours[image, :, row], out=rectified.view(by_place.shape))
        grad_scale[:, row] += product.sum((-2, -1))
        by_place *= factor[:, row, :, None, None]
        for place in range(kernel_size):
            _window(grad_padded[image], row, place, dilation, height, width).add_(by_place[:, place])
    grad_weight = grad_by_row.view(kernel_size, len(weight), channels, kernel_size).permute(1, 2, 0, 3)
    return grad_padded, grad_scale.flatten(), grad_shift.flatten(), grad_weight.reshape(weight.shape)


def _differences(
        query: torch.Tensor,
        padded: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Image, row of the neighbourhood, and relu(query - key) as a matrix (C + 1, K * H * W) whose last row is 1.

    The same memory is overwritten for every row.
    """
    batch, channels, height, width = query.shape
    neighbours = windows(padded, kernel_size, dilation)
    rectified = query.new_ones(channels + 1, kernel_size, height, width)
    for image in range(batch):
        for row in range(kernel_size):
            torch.sub(query[image, :, None], neighbours[image, :, row], out=rectified[:-1]).relu_()
            yield image, row, rectified.view(channels + 1, -1)


def _hidden_and_gradient(
        rectified: torch.Tensor,
        grad: torch.Tensor,
        folded: torch.Tensor,
        weight2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden channels (M, K * H * W) after their rectifier, and the gradient of them before it."""
    hidden = torch.mm(folded, rectified).relu_()
    return hidden, _where_positive(torch.mm(weight2.t(), grad), hidden)


def _by_row(weight: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Columns of a weight (M, C * K * K) by rows of the neighbourhood, (K, M, C * K)."""
    return weight.view(len(weight), -1, kernel_size, kernel_size).permute(2, 0, 1, 3).flatten(2)


def _mapped_keys(
        neighbours: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Image, row of the neighbourhood, and relu(scale * key + shift) as a matrix (C * K, H * W) in reused memory."""
    batch, channels, kernel_size, _, height, width = neighbours.shape
    places = (channels, kernel_size, kernel_size, 1, 1)
    scale, shift = scale.view(places), shift.view(places)
    mapped = neighbours.new_empty(channels, kernel_size, height, width)
    for image in range(batch):
        for row in range(kernel_size):
            torch.addcmul(shift[:, row], neighbours[image, :, row], scale[:, row], out=mapped).relu_()
            yield image, row, mapped.view(channels * kernel_size, -1)


def _where_positive(grad: torch.Tensor, rectified: torch.Tensor) -> torch.Tensor:
    """Gradient of a rectifier, in place, from its output."""
    return torch.ops.aten.threshold_backward.grad_input(grad, rectified, 0, grad_input=grad)


def _window(
        padded: torch.Tensor,
        row: int,
        column: int,
        dilation: int,
        height: int,
        width: int,
) -> torch.Tensor:
    """The neighbours of all positions at one place, as a view (..., H, W) of the padded map."""
    top, left = row * dilation, column * dilation
    return padded[..., top:top + height, left:left + width]

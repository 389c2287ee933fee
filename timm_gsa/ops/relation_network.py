"""From relations to attention weights: the small networks of SAN, their norms given as affine maps or batch norms.

Every operation here has a plain reference that builds the relations of all K * K places at once. The operations
themselves go row by row of the neighbourhood and image by image, so that what they hold stays in the cache of a CPU:
K times less than one image's relations. Backward passes compute the relations anew and keep none.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3.1 and 3.2.
"""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ._paths import differentiable_gradients
from .neighbourhood import reflect_pad, same_padding, windows
from .relation import patch, subtraction

__all__ = [
    'difference_moments',
    'difference_network',
    'difference_network_reference',
    'normed_difference_network',
    'normed_difference_network_reference',
    'patch_moments',
    'patch_network',
    'patch_network_reference',
]


def difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """Two linear maps on the rectified difference of each position's query and each neighbour's key.

    out[:, k, l] = weight2 relu(weight1 relu(query[:, l] - key[:, neighbour k of l]) + bias1) + bias2

    A norm before the first rectifier is an affine map of query and key.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        weight1: Matrix of shape (M, C).
        bias1: Vector of shape (M,).
        weight2: Matrix of shape (G, M).
        bias2: Vector of shape (G,).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, G, K * K, H, W), places in row-major order.
    """
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    scale = torch.ones_like(bias1)
    out, _, _ = _DifferenceNetwork.apply(
        query, padded, weight1, scale, bias1, weight2, bias2, None, kernel_size, dilation)
    return out


def difference_network_reference(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """The same as `difference_network` on the materialised differences."""
    relation = subtraction(query, key, kernel_size, dilation).relu()
    hidden = (torch.einsum('mc,bckhw->bmkhw', weight1, relation) + bias1[:, None, None, None]).relu()
    return torch.einsum('gm,bmkhw->bgkhw', weight2, hidden) + bias2[:, None, None, None]


def normed_difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`difference_network` with a batch norm, over batch, places and positions, after the first linear map.

    out[:, k, l] = weight2 relu(scale * norm(weight1 relu(query[:, l] - key[:, neighbour k of l])) + shift) + bias2

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        weight1: Matrix of shape (M, C).
        scale: Factors of the norm, (M,).
        shift: Summands of the norm, (M,).
        eps: What the norm adds to the variance.
        weight2: Matrix of shape (G, M).
        bias2: Vector of shape (G,).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, G, K * K, H, W), places in row-major order, and the mean and the variance (with the divisor
        n) of the M channels before the norm, which no gradient flows through.
    """
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    return _DifferenceNetwork.apply(query, padded, weight1, scale, shift, weight2, bias2, eps, kernel_size, dilation)


def normed_difference_network_reference(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as `normed_difference_network` on the materialised differences."""
    relation = subtraction(query, key, kernel_size, dilation).relu()
    hidden = torch.einsum('mc,bckhw->bmkhw', weight1, relation)
    variance, mean = torch.var_mean(hidden, (0, 2, 3, 4), correction=0)
    normed = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps).relu()
    out = torch.einsum('gm,bmkhw->bgkhw', weight2, normed) + bias2[:, None, None, None]
    return out, mean.detach(), variance.detach()


def patch_network(
        key: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """A linear map on the rectified, affinely mapped keys of each position's neighbourhood.

    out[:, l] = sum over channels c and places k of
                weight[:, c, k] * relu(scale[c, k] * key[c, neighbour k of l] + shift[c, k])

    Args:
        key: Map of shape (B, C, H, W).
        scale: Factors of shape (C * K * K,), places of a channel one after another in row-major order.
        shift: Summands, laid out as `scale`.
        weight: Matrix of shape (M, C * K * K), columns laid out as `scale`.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, M, H, W).
    """
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    return _PatchNetwork.apply(padded, scale, shift, weight, kernel_size, dilation)


def patch_network_reference(
        key: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """The same as `patch_network` on the materialised patches."""
    relation = (patch(key, kernel_size, dilation) * scale[:, None, None] + shift[:, None, None]).relu()
    return torch.einsum('mc,bchw->bmhw', weight, relation)


def difference_moments(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the differences of all positions' queries and their neighbours' keys.

    Those of `subtraction` over batch, places and positions, from sums over windows. Computed in float64, as the
    variance is the difference of sums that may be much larger.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Mean and variance (with the divisor n) of each channel, (C,), float64.
    """
    centre = key.detach().mean((0, 2, 3), keepdim=True)
    query = (query - centre).double()
    padded = reflect_pad((key - centre).double(), same_padding(kernel_size, dilation))
    height, width = query.shape[-2:]
    both = torch.cat([padded, padded.square()], dim=1)
    offsets = range(0, kernel_size * dilation, dilation)
    both = torch.stack([both[..., top:top + height, :] for top in offsets]).sum(0)
    both = torch.stack([both[..., left:left + width] for left in offsets]).sum(0)
    first, second = both.chunk(2, dim=1)
    places = kernel_size ** 2
    mean = (query - first / places).mean((0, 2, 3))
    square = (query.square() - 2 / places * query * first + second / places).mean((0, 2, 3))
    return mean, square - mean.square()


def patch_moments(key: torch.Tensor, kernel_size: int, dilation: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the keys that all positions see at each place of their neighbourhood.

    Those of `patch` over batch and positions, from sums over windows. Computed in float64, as the variance is the
    difference of sums that may be much larger.

    Args:
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Mean and variance (with the divisor n) of each channel and place, (C * K * K,), float64.
    """
    batch, channels, height, width = key.shape
    centre = key.detach().mean((0, 2, 3), keepdim=True)
    padded = reflect_pad((key - centre).double(), same_padding(kernel_size, dilation))
    both = torch.stack([padded.sum(0), padded.square().sum(0)])
    offsets = range(0, kernel_size * dilation, dilation)
    sums = torch.stack([both[..., top:top + height, :].sum(-2) for top in offsets], -2)
    sums = torch.stack([sums[..., left:left + width].sum(-1) for left in offsets], -1)
    mean, square = sums / (batch * height * width)
    return (mean + centre.view(-1, 1, 1)).flatten(), (square - mean.square()).flatten()


class _DifferenceNetwork(torch.autograd.Function):
    """`normed_difference_network`, or `difference_network` with a factor where `eps` is None, on padded keys.

    Of the norm nothing but matrices of C x C numbers has to be known. With a = relu(query - key) and the hidden
    channels h = weight1 a, sum a and sum a a^T give mean and variance of h, and with sum dy a^T also the gradients of
    weight1, scale and shift, for dy the gradient of what the norm gives.
    """

    @staticmethod
    def forward(
            ctx: Any,
            query: torch.Tensor,
            padded: torch.Tensor,
            weight1: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight2: torch.Tensor,
            bias2: torch.Tensor,
            eps: float | None,
            kernel_size: int,
            dilation: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        channels = query.shape[1]
        count = query[:, 0].numel() * kernel_size ** 2
        first, second = query.new_zeros(channels), query.new_zeros(channels, channels)
        mean, variance, rate = torch.zeros_like(scale), torch.ones_like(scale), torch.ones_like(scale)
        if eps is not None:
            moments = query.new_zeros(channels + 1, channels + 1, dtype=torch.float64)
            for _, _, rectified in _differences(query, padded, kernel_size, dilation):
                moments += rectified @ rectified.t()
            moments /= count
            first, second = moments[:-1, -1], moments[:-1, :-1]
            wide = weight1.double()
            mean = wide @ first
            variance = ((wide @ (second - first * first[:, None])) * wide).sum(1).clamp(min=0)
            rate = (variance + eps).rsqrt()
            first, second, mean, variance, rate = (x.to(query.dtype) for x in (first, second, mean, variance, rate))
        height, width = query.shape[-2:]
        out = query.new_empty(len(query), len(weight2), kernel_size, kernel_size * height * width)
        folded = _folded(weight1, scale * rate, shift - mean * scale * rate)
        for image, row, rectified in _differences(query, padded, kernel_size, dilation):
            hidden = torch.mm(folded, rectified).relu_()
            torch.addmm(bias2[:, None], weight2, hidden, out=out[image, :, row])
        ctx.save_for_backward(query, padded, weight1, scale, shift, weight2, bias2, first, second, mean, rate)
        ctx.eps, ctx.window, ctx.count = eps, (kernel_size, dilation), count
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return out.view(len(query), -1, kernel_size ** 2, height, width), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, padded, weight1, scale, shift, weight2, bias2, first, second, mean, rate = ctx.saved_tensors
        kernel_size, dilation = ctx.window
        if torch.is_grad_enabled():  # for gradients of gradients
            return differentiable_gradients(
                _difference_network, ctx.saved_tensors[:7], grads[0], ctx.eps, *ctx.window)
        grad = grads[0].reshape(len(query), len(weight2), kernel_size, -1)
        factor = scale * rate
        folded = _folded(weight1, factor, shift - mean * factor)

        def hidden_and_gradient(image: int, row: int, rectified: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = torch.mm(folded, rectified).relu_()
            grad_hidden = torch.mm(weight2.t(), grad[image, :, row])
            return hidden, _where_positive(grad_hidden, hidden)

        grad_weight2 = torch.zeros_like(weight2)
        products = torch.zeros_like(folded)  # sums of dy a^T and, last, of dy
        for image, row, rectified in _differences(query, padded, *ctx.window):
            hidden, grad_hidden = hidden_and_gradient(image, row, rectified)
            grad_weight2.addmm_(grad[image, :, row], hidden.t())
            products.addmm_(grad_hidden, rectified.t())
        products, grad_shift = products[:, :-1], products[:, -1]
        grad_scale = ((products * weight1).sum(1) - mean * grad_shift) * rate
        grad_weight1 = products * factor[:, None]
        back = (weight1 * factor[:, None]).t()
        correction = None
        if ctx.eps is not None:  # da = weight1^T factor (dy - grad_shift / n - (h - mean) rate grad_scale / n)
            slope = (factor * rate * grad_scale / ctx.count)[:, None]
            level = (factor * grad_shift / ctx.count)[:, None] - slope * mean[:, None]
            grad_weight1 -= slope * (weight1 @ second) * ctx.count + level * first * ctx.count
            correction = weight1.t() @ torch.cat([weight1 * slope, level], dim=1)

        grad_query, grad_padded = torch.empty_like(query), torch.zeros_like(padded)
        channels, height, width = query.shape[1:]
        for image, row, rectified in _differences(query, padded, *ctx.window):
            grad_hidden = hidden_and_gradient(image, row, rectified)[1]
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
        return (
            grad_query, grad_padded, grad_weight1, grad_scale, grad_shift, grad_weight2, grads[0].sum((0, 2, 3, 4)),
            None, None, None,
        )


def _difference_network(
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        eps: float | None,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    relation = (query[:, :, None, None] - windows(padded, kernel_size, dilation)).flatten(2, 3).relu()
    hidden = torch.einsum('mc,bckhw->bmkhw', weight1, relation)
    if eps is None:
        hidden = hidden * scale[:, None, None, None] + shift[:, None, None, None]
    else:
        hidden = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps)
    return torch.einsum('gm,bmkhw->bgkhw', weight2, hidden.relu()) + bias2[:, None, None, None]


def _differences(
        query: torch.Tensor,
        padded: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Image, row of the neighbourhood, and relu(query - key) as a matrix (C + 1, K * H * W) whose last row is 1.

    One matrix, written anew for every row.
    """
    batch, channels, height, width = query.shape
    neighbours = windows(padded, kernel_size, dilation)
    rectified = query.new_ones(channels + 1, kernel_size, height, width)
    for image in range(batch):
        for row in range(kernel_size):
            torch.sub(query[image, :, None], neighbours[image, :, row], out=rectified[:-1]).relu_()
            yield image, row, rectified.view(channels + 1, -1)


def _folded(weight: torch.Tensor, factor: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    """Matrix (M, C + 1) that is applied to numbers and a 1: factor * (weight x) + summand."""
    return torch.cat([weight * factor[:, None], summand[:, None]], dim=1)


class _PatchNetwork(torch.autograd.Function):
    """`patch_network` on padded keys."""

    @staticmethod
    def forward(
            ctx: Any,
            padded: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(padded, scale, shift, weight)
        ctx.window = kernel_size, dilation
        neighbours = windows(padded, kernel_size, dilation)
        batch, height, width = len(padded), *neighbours.shape[-2:]
        by_row = _by_row(weight, kernel_size)
        out = padded.new_zeros(batch, len(weight), height * width)
        for image, row, rectified in _mapped_keys(neighbours, scale, shift):
            out[image].addmm_(by_row[row], rectified)
        return out.view(batch, -1, height, width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        padded, scale, shift, weight = ctx.saved_tensors
        kernel_size, dilation = ctx.window
        if torch.is_grad_enabled():  # for gradients of gradients
            return differentiable_gradients(_patch_network, ctx.saved_tensors, grads[0], *ctx.window)
        neighbours = windows(padded, kernel_size, dilation)
        channels, height, width = padded.shape[1], *neighbours.shape[-2:]
        by_row = _by_row(weight, kernel_size)
        grad = grads[0].flatten(2)
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
        return grad_padded, grad_scale.flatten(), grad_shift.flatten(), grad_weight.reshape(weight.shape), None, None


def _patch_network(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    keys = windows(padded, kernel_size, dilation).flatten(1, 3)
    return torch.einsum('mc,bchw->bmhw', weight, (keys * scale[:, None, None] + shift[:, None, None]).relu())


def _by_row(weight: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Columns of a weight (M, C * K * K) by rows of the neighbourhood, (K, M, C * K)."""
    return weight.view(len(weight), -1, kernel_size, kernel_size).permute(2, 0, 1, 3).flatten(2)


def _mapped_keys(
        neighbours: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Image, row of the neighbourhood, and relu(scale * key + shift) as a matrix (C * K, H * W), written anew."""
    batch, channels, kernel_size, _, height, width = neighbours.shape
    places = (channels, kernel_size, kernel_size, 1, 1)
    scale, shift = scale.view(places), shift.view(places)
    mapped = neighbours.new_empty(channels, kernel_size, height, width)
    for image in range(batch):
        for row in range(kernel_size):
            torch.addcmul(shift[:, row], neighbours[image, :, row], scale[:, row], out=mapped).relu_()
            yield image, row, mapped.view(channels * kernel_size, -1)


def _where_positive(grad: torch.Tensor, rectified: torch.Tensor) -> torch.Tensor:
    """Gradient of a rectifier, in place, from what it gave."""
    return torch.ops.aten.threshold_backward.grad_input(grad, rectified, 0, grad_input=grad)


def _window(
        padded: torch.Tensor,
        row: int,
        column: int,
        dilation: int,
        height: int,
        width: int,
) -> torch.Tensor:
    """What all positions of a map see at one place, as a view (..., H, W) on the padded map."""
    top, left = row * dilation, column * dilation
    return padded[..., top:top + height, left:left + width]

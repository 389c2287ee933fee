"""From relations to attention weights: the small networks of SAN, with norms that are fixed affine maps, for inference.

Every operation here has a plain reference that builds the relations of all K * K places at once. The operations
themselves go row by row of the neighbourhood and image by image, so that what they hold stays in the cache of a CPU:
K times less than one image's relations.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3.1 and 3.2.
"""
import torch

from .neighbourhood import neighbourhood
from .relation import patch, subtraction

__all__ = [
    'difference_network',
    'difference_network_reference',
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

    A norm before the first rectifier is an affine map of query and key. Not differentiable.

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
    batch, channels, height, width = query.shape
    area = kernel_size * height * width
    neighbours = neighbourhood(key, kernel_size, dilation)
    out = query.new_empty(batch, weight2.shape[0], kernel_size, area)
    relation = query.new_empty(channels, kernel_size, height, width)
    hidden = query.new_empty(weight1.shape[0], area)
    for image in range(batch):
        for row in range(kernel_size):
            torch.sub(query[image, :, None], neighbours[image, :, row], out=relation).relu_()
            torch.addmm(bias1[:, None], weight1, relation.view(channels, area), out=hidden).relu_()
            torch.addmm(bias2[:, None], weight2, hidden, out=out[image, :, row])
    return out.view(batch, -1, kernel_size ** 2, height, width)


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

    Not differentiable.

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
    batch, channels, height, width = key.shape
    places = (channels, kernel_size, kernel_size, 1, 1)
    scale, shift = scale.view(places), shift.view(places)
    by_row = weight.view(-1, *places[:3]).permute(2, 0, 1, 3).flatten(2)  # (K, M, C * K)
    neighbours = neighbourhood(key, kernel_size, dilation)
    out = key.new_zeros(batch, weight.shape[0], height * width)
    mapped = key.new_empty(channels, kernel_size, height, width)
    for image in range(batch):
        for row in range(kernel_size):
            torch.addcmul(shift[:, row], neighbours[image, :, row], scale[:, row], out=mapped).relu_()
            out[image].addmm_(by_row[row], mapped.view(channels * kernel_size, -1))
    return out.view(batch, -1, height, width)


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

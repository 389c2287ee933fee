"""Relations between a position and its neighbours: what SAN computes attention weights from.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3.1 and 3.2.
"""
import torch

from .neighbourhood import neighbourhood

__all__ = ['coordinates', 'patch', 'subtraction']


def subtraction(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """Difference of each position's query and the keys of its K x K neighbours.

    delta(x_i, x_j) = query(x_i) - key(x_j)    (the paper's "subtraction" relation)

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, C, K * K, H, W), places in row-major order.
    """
    relation = query[:, :, None, None] - neighbourhood(key, kernel_size, dilation)
    return relation.flatten(2, 3)


def patch(key: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """The K x K neighbours of each position, laid out along the channels.

    Args:
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, C * K * K, H, W); channel c * K * K + k holds channel c at place k (row-major).
    """
    return neighbourhood(key, kernel_size, dilation).flatten(1, 3)


def coordinates(height: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Horizontal and vertical coordinates of a map, each running from -1 to 1 over the pixel centres.

    Built in at least float32 whatever the dtype of the features, because neighbouring coordinates of a large map
    are not apart in half precision. An axis of one pixel has the coordinate -1, as the authors' code.

    Returns:
        Tensor of shape (1, 2, H, W); channel 0 varies along the width, channel 1 along the height.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Not torch.linspace, which ties an exported or compiled program to one size.
    rows = torch.arange(height, device=device, dtype=dtype) * 2 / max(height - 1, 1) - 1
    columns = torch.arange(width, device=device, dtype=dtype) * 2 / max(width - 1, 1) - 1
    return torch.stack([columns[None, :].expand(height, width), rows[:, None].expand(height, width)]).unsqueeze(0)

"""Operations of SAN, self-attention over small neighbourhoods.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3.1 to 3.3.
"""
import torch

from .._backend import Form, Operation, compute
from . import cpu, gpu, plain, reference, stem
from .neighbourhood import neighbourhood, reflect_pad, same_padding
from .plain import coordinates, patch, subtraction

__all__ = [
    'AGGREGATION',
    'DIFFERENCE',
    'DIFFERENCE_MOMENTS',
    'NORMED_DIFFERENCE',
    'PATCH',
    'PATCH_MOMENTS',
    'PAIRWISE',
    'PAIRWISE_WEIGHTS',
    'PATCHWISE',
    'PATCHWISE_WEIGHTS',
    'STEM',
    'aggregation',
    'coordinates',
    'difference_moments',
    'difference_network',
    'neighbourhood',
    'normed_difference_network',
    'patch',
    'patch_moments',
    'patch_network',
    'reflect_pad',
    'subtraction',
]


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """Sum of each position's K x K neighbours, weighted per position, place and weight group.

    out[b, c, l] = sum over places k of weight[b, c mod G, k, l] * value[b, c, neighbour k of l]    (equations 2 and 4)

    Neighbours outside the map are mirrored (`reflect_pad`). Channels c, c + G, c + 2G, ... share one weight.
    Sums of half precision inputs are accumulated in float32.

    Args:
        value: Map of shape (B, C, H, W).
        weight: Weights of shape (B, G, K * K, H, W), places in row-major order, C a multiple of G.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, C, H, W) and dtype of `value`.

    Raises:
        ValueError: The shapes of `value` and `weight` do not fit together, or K is even.
    """
    _check(value, weight, kernel_size)
    same_padding(kernel_size, dilation)
    if not torch.jit.is_scripting():
        return compute(AGGREGATION, value, weight, kernel_size, dilation)
    return plain.aggregation(value, weight, kernel_size, dilation)


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
        Tensor of shape (B, G, K * K, H, W) and dtype of `weight2`, places in row-major order.
    """
    return compute(DIFFERENCE, query, key, weight1, bias1, weight2, bias2, kernel_size, dilation)


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
        Tensor of shape (B, G, K * K, H, W) and dtype of `weight2`, places in row-major order, and the mean and the
        variance (with the divisor n) of the M channels before the norm, float64, which no gradient flows through.
    """
    return compute(
        NORMED_DIFFERENCE, query, key, weight1, scale, shift, eps, weight2, bias2, kernel_size, dilation)


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
        Tensor of shape (B, M, H, W) and dtype of `key`.
    """
    return compute(PATCH, key, scale, shift, weight, kernel_size, dilation)


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
    return compute(DIFFERENCE_MOMENTS, query, key, kernel_size, dilation)


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
    return compute(PATCH_MOMENTS, key, kernel_size, dilation)


def _check(value: torch.Tensor, weight: torch.Tensor, kernel_size: int) -> None:
    if value.dim() != 4 or weight.dim() != 5:
        raise ValueError(
            'value must be (B, C, H, W) and weight (B, G, K * K, H, W), '
            f'got shapes {list(value.shape)} and {list(weight.shape)}'
        )
    if weight.shape[0] != value.shape[0] or weight.shape[3:] != value.shape[2:]:
        raise ValueError(
            'value and weight must agree in batch size, height and width, '
            f'got shapes {list(value.shape)} and {list(weight.shape)}'
        )
    if weight.shape[2] != kernel_size ** 2:
        raise ValueError(f'weight must hold kernel_size ** 2 = {kernel_size ** 2} places, got {weight.shape[2]}')
    if value.shape[1] % weight.shape[1] != 0:
        raise ValueError(
            f'channels of value must be a multiple of the weight groups, got {value.shape[1]} and {weight.shape[1]}'
        )


AGGREGATION = Operation(
    'aggregation', reference.aggregation, plain.aggregation,
    cpu=Form(cpu.aggregation, cpu.why_not_aggregation),
    triton=Form(gpu.aggregation, gpu.why_not_aggregation),
)
DIFFERENCE = Operation(
    'difference_network', reference.difference_network, plain.difference_network,
    cpu=Form(cpu.difference_network, cpu.why_not_network),
    triton=Form(gpu.difference_network, gpu.why_not_difference_network),
)
NORMED_DIFFERENCE = Operation(
    'normed_difference_network', reference.normed_difference_network, plain.normed_difference_network,
    cpu=Form(cpu.normed_difference_network, cpu.why_not_network),
    triton=Form(gpu.normed_difference_network, gpu.why_not_normed_difference_network),
)
PATCH = Operation(
    'patch_network', reference.patch_network, plain.patch_network,
    cpu=Form(cpu.patch_network, cpu.why_not_network),
    triton=Form(gpu.patch_network, gpu.why_not_patch_network),
)
DIFFERENCE_MOMENTS = Operation(
    'difference_moments', reference.difference_moments, plain.difference_moments,
    triton=Form(gpu.difference_moments, gpu.why_not_moments),
)
PATCH_MOMENTS = Operation('patch_moments', reference.patch_moments, plain.patch_moments)

# Short cuts through layers: from query, key and value to the sum, and from query and key to the weights.
PAIRWISE = Operation('pairwise_attention', cpu=Form(cpu.pairwise_attention, cpu.why_not_layer))
PATCHWISE = Operation('patchwise_attention', cpu=Form(cpu.patchwise_attention, cpu.why_not_layer))
PAIRWISE_WEIGHTS = Operation(
    'pairwise_weights',
    cpu=Form(cpu.pairwise_weights, cpu.why_not_weights),
    triton=Form(gpu.pairwise_weights, gpu.why_not_pairwise_weights),
)
PATCHWISE_WEIGHTS = Operation(
    'patchwise_weights',
    cpu=Form(cpu.patchwise_weights, cpu.why_not_weights),
    triton=Form(gpu.patchwise_weights, gpu.why_not_patchwise_weights),
)
STEM = Operation('san_stem', cpu=Form(stem.stem, stem.why_not_stem))

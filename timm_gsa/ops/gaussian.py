"""Gaussian attention: every position averages the whole map with weights that fall off with distance.

Source: Tan et al., "Explicitly Modeled Attention Maps for Image Classification", arXiv 2006.07872. The paper's
equations were not readable for us; the form below is a reconstruction.
"""
import torch

from ._backend import Form, Operation, compute, statically_true, why_not_cpu, wide_type

__all__ = ['gaussian_attention', 'gaussian_attention_reference', 'gaussian_weight']


def gaussian_weight(length: int, radius: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """Attention along one axis: row softmax of -(i - j)^2 / (2 r^2), with r^2 = radius^2 + 1e-6.

    Args:
        length: Number of positions along the axis.
        radius: One number, () or (1,), the radius in cells of the undilated grid; the sign does not matter.
        dilation: Cells of this axis that make one cell of the undilated grid.

    Returns:
        Tensor of shape (length, length) whose rows sum to 1, in at least float32.
    """
    wide = wide_type(radius.dtype)
    position = torch.arange(length, device=radius.device, dtype=wide) / dilation
    distance = (position[:, None] - position[None, :]).square()
    radius = radius.to(wide)
    variance = radius * radius + 1e-6
    exponent = distance / (-2. * variance)
    # Zero negligible weights: subnormal numbers are slow on a CPU.
    exponent = exponent.masked_fill(exponent < (-670. if wide == torch.float64 else -70.), float('-inf'))
    return exponent.softmax(-1)


def gaussian_attention(value: torch.Tensor, radius: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """Average of all positions of a map, weighted by a Gaussian of their distance.

    out[:, p] = sum over positions q of softmax over q of (-||p - q||^2 / (2 r^2)) * value[:, q]

    The weights factor over the two axes, so this is a product with a (W, W) and with a (H, H) matrix.

    Args:
        value: Map of shape (B, C, H, W).
        radius: One number, () or (1,), the radius in cells of the map (of the undilated map where `dilation` > 1).
        dilation: Cells of the map that make one cell of the undilated map.

    Returns:
        Tensor of shape (B, C, H, W) and dtype of `value`.
    """
    if not torch.jit.is_scripting():
        return compute(GAUSSIAN, value, radius, dilation)
    return _separable(value, radius, dilation)


def _separable(value: torch.Tensor, radius: torch.Tensor, dilation: int) -> torch.Tensor:
    height, width = value.shape[-2:]
    rows = gaussian_weight(height, radius, dilation).to(value.dtype)
    columns = gaussian_weight(width, radius, dilation).to(value.dtype)
    return rows @ (value @ columns.t())


def _why_not_cpu(value: torch.Tensor, radius: torch.Tensor, dilation: int) -> str | None:
    return why_not_cpu(value)


def _on_cpu(value: torch.Tensor, radius: torch.Tensor, dilation: int) -> torch.Tensor:
    """`gaussian_attention` without the copies by which matmul makes one product of many."""
    batch, channels, height, width = value.shape
    rows = gaussian_weight(height, radius, dilation).to(value.dtype)
    square = statically_true(height == width)
    columns = rows if square else gaussian_weight(width, radius, dilation).to(value.dtype)
    if value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
        pixels = value.permute(0, 2, 3, 1)
        averaged = torch.bmm(columns.expand(batch * height, -1, -1), pixels.reshape(-1, width, channels))
        averaged = torch.bmm(rows.expand(batch, -1, -1), averaged.view(batch, height, -1))
        return averaged.view(pixels.shape).permute(0, 3, 1, 2)
    if statically_true(height * width <= 128):  # the map of all pairs is no larger, and spares products by channel
        return (value.flatten(2) @ torch.kron(rows, columns).t()).view(value.shape)
    averaged = (value.reshape(-1, width) @ columns.t()).view(-1, height, width)
    return torch.bmm(rows.expand(averaged.shape[0], -1, -1), averaged).view(value.shape)


def gaussian_attention_reference(value: torch.Tensor, radius: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """The same as `gaussian_attention` with the dense map of N x N weights that published costs refer to."""
    height, width = value.shape[-2:]
    wide = wide_type(radius.dtype)
    rows = torch.arange(height, device=value.device, dtype=wide) / dilation
    columns = torch.arange(width, device=value.device, dtype=wide) / dilation
    position = torch.cartesian_prod(rows, columns)
    distance = (position[:, None] - position[None, :]).square().sum(-1)
    weight = (-distance / (2. * (radius.to(wide).square() + 1e-6))).softmax(-1).to(value.dtype)
    return (value.flatten(2) @ weight.t()).reshape(value.shape)


GAUSSIAN = Operation(
    'gaussian_attention', gaussian_attention_reference, _separable, cpu=Form(_on_cpu, _why_not_cpu))

"""Axial mixing: every row (or column) of a map times one matrix that all rows and all channels share.

Source: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", arXiv 2109.05422.
"""
import torch
import torch.nn.functional as F

from ._backend import Operation, compute, statically_true, wide_type

__all__ = [
    'COLUMN_MIXING',
    'ROW_MIXING',
    'column_mixing',
    'column_mixing_reference',
    'resize_mixing_bias',
    'resize_mixing_matrix',
    'row_mixing',
    'row_mixing_reference',
]


def row_mixing(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mix the positions of every row of a map, along its width.

    out[b, c, h, i] = sum over columns j of matrix[i, j] * x[b, c, h, j] + bias[i]

    Args:
        x: Map of shape (B, C, H, W).
        matrix: Weights of shape (W, W), shared by all rows and channels.
        bias: Summand of each column, shape (W,).

    Returns:
        Map of shape (B, C, H, W); the plain form gives it with channels innermost in memory.

    Raises:
        ValueError: `matrix` or `bias` is not of the size of the rows (`resize_mixing_matrix` makes it fit).
    """
    _check(matrix, bias, x.shape[-1], 'width')
    if not torch.jit.is_scripting():
        return compute(ROW_MIXING, x, matrix, bias)
    return _by_rows(x, matrix, bias)


def _by_rows(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A product for each row, with channels innermost."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels)
    mixed = torch.baddbmm(bias.unsqueeze(-1), matrix.expand(batch * height, width, width), rows)
    return mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)


def column_mixing(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mix the positions of every column of a map, along its height.

    out[b, c, i, w] = sum over rows j of matrix[i, j] * x[b, c, j, w] + bias[i]

    Args:
        x: Map of shape (B, C, H, W).
        matrix: Weights of shape (H, H), shared by all columns and channels.
        bias: Summand of each row, shape (H,).

    Returns:
        Map of shape (B, C, H, W); the plain form gives it with channels innermost in memory.

    Raises:
        ValueError: `matrix` or `bias` is not of the size of the columns (`resize_mixing_matrix` makes it fit).
    """
    _check(matrix, bias, x.shape[-2], 'height')
    if not torch.jit.is_scripting():
        return compute(COLUMN_MIXING, x, matrix, bias)
    return _by_columns(x, matrix, bias)


def _by_columns(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A product for each image, with channels innermost."""
    batch, channels, height, width = x.shape
    columns = x.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    mixed = torch.baddbmm(bias.unsqueeze(-1), matrix.expand(batch, height, height), columns)
    return mixed.view(batch, height, width, channels).permute(0, 3, 1, 2)


def row_mixing_reference(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`row_mixing` as the sum in its equation."""
    return torch.einsum('ij,bchj->bchi', matrix, x) + bias


def column_mixing_reference(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`column_mixing` as the sum in its equation."""
    return torch.einsum('ij,bcjw->bciw', matrix, x) + bias[:, None]


def resize_mixing_matrix(matrix: torch.Tensor, length: int) -> torch.Tensor:
    """Resample a mixing matrix to another number of positions.

    The entries are samples of a kernel at pairs of cell centres, interpolated bicubically. The factor old / new length
    keeps the sums of the rows, hence what constant rows become. A matrix that already fits is returned as it is; where
    a compiler or exporter leaves the length open, interpolation at the same length gives the same numbers to the bit.

    Our choice: the authors' code has a fixed size. On synthetic operators of smooth kernels the error was below that of
    bilinear interpolation and of resampling the map instead; trained matrices were not available.

    Args:
        matrix: Weights of shape (L, L).
        length: New number of positions.

    Returns:
        Weights of shape (length, length) and the dtype of `matrix`.
    """
    if _fits(matrix, length):
        return matrix
    wide = matrix.to(wide_type(matrix.dtype))
    resized = F.interpolate(wide[None, None], [length, length], mode='bicubic', align_corners=False)
    return (resized[0, 0] * (matrix.shape[0] / length)).to(matrix.dtype)


def resize_mixing_bias(bias: torch.Tensor, length: int) -> torch.Tensor:
    """Resample the summands of axial mixing to another number of positions, linearly between cell centres.

    Args:
        bias: Summands of shape (L,).
        length: New number of positions.

    Returns:
        Summands of shape (length,) and the dtype of `bias`; `bias` itself where it fits.
    """
    if _fits(bias, length):
        return bias
    wide = bias.to(wide_type(bias.dtype))
    resized = F.interpolate(wide[None, None], [length], mode='linear', align_corners=False)
    return resized[0, 0].to(bias.dtype)


def _fits(x: torch.Tensor, length: int) -> bool:
    same = x.shape[0] == length
    if not torch.jit.is_scripting():
        return statically_true(same)
    return same


def _check(matrix: torch.Tensor, bias: torch.Tensor, length: int, axis: str) -> None:
    if not torch.jit.is_scripting():
        if matrix.shape != (length, length) or bias.shape != (length,):
            raise ValueError(
                f'matrix and bias must have the shapes {(length, length)} and {(length,)} for maps of {axis} {length}, '
                f'got {tuple(matrix.shape)} and {tuple(bias.shape)}'
            )


ROW_MIXING = Operation('row_mixing', row_mixing_reference, _by_rows)
COLUMN_MIXING = Operation('column_mixing', column_mixing_reference, _by_columns)

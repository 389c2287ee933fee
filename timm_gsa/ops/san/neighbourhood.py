"""Neighbourhoods of a feature map: reflection padding and K x K windows, which all of SAN's operations use."""
import torch
import torch.nn.functional as F

from .._backend import is_compiling

__all__ = ['neighbourhood', 'reflect_pad', 'reflected_index', 'same_padding', 'windows']


def same_padding(kernel_size: int, dilation: int = 1) -> int:
    """Padding in pixels that keeps the size of a map under an odd window of `kernel_size` places a side.

    Raises:
        ValueError: `kernel_size` is not an odd number >= 1 or `dilation` is smaller than 1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be odd and >= 1, got {kernel_size}')
    if dilation < 1:
        raise ValueError(f'dilation must be >= 1, got {dilation}')
    return dilation * (kernel_size - 1) // 2


def reflected_index(size: int, padding: int, device: torch.device) -> torch.Tensor:
    """Source index of each of the `size + 2 * padding` places of an axis under repeated reflection.

    The border pixel is not repeated: the sequence runs 0, 1, ..., size - 1, size - 2, ..., 1, 0, 1, ... in both
    directions, as often as the padding asks. An axis of one pixel repeats that pixel.

    Returns:
        int64 tensor of shape (size + 2 * padding,).
    """
    if size == 1:
        return torch.zeros(1 + 2 * padding, dtype=torch.long, device=device)
    place = torch.arange(-padding, size + padding, device=device).abs() % (2 * size - 2)
    return torch.where(place < size, place, 2 * size - 2 - place)


def reflect_pad(x: torch.Tensor, padding: int) -> torch.Tensor:
    """Pad the last two axes by mirroring without repeating the border (index -i holds index i).

    Plain reflection exists while `padding < min(H, W)`. Below that this function reflects repeatedly, back and forth
    between the borders, which is the same map wherever plain reflection exists. The rule for smaller maps is ours:
    the SAN authors' code either fails there or reads outside the map.

    Args:
        x: Map of shape (B, C, H, W), any dtype and memory layout.
        padding: Pixels to add on each of the four sides.

    Returns:
        Tensor of shape (B, C, H + 2 * padding, W + 2 * padding).
    """
    if padding == 0:
        return x
    height, width = x.shape[-2], x.shape[-1]
    exotic = x.dtype == torch.float16 and x.device.type == 'cpu'  # torch 2.5 has no reflection for it
    if padding < height and padding < width and not exotic:
        return F.pad(x, (padding, padding, padding, padding), mode='reflect')
    rows = reflected_index(height, padding, x.device)
    columns = reflected_index(width, padding, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def neighbourhood(x: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """View of the K x K neighbours of every position of a map, reflected at the borders.

    Args:
        x: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        View of shape (B, C, K, K, H, W) on the padded map; [:, :, i, j, h, w] is the value at offset
        (i - K // 2, j - K // 2) * dilation from (h, w).
    """
    return windows(reflect_pad(x, same_padding(kernel_size, dilation)), kernel_size, dilation)


def joined_reflect_pad(x: torch.Tensor, padding: int, axes: tuple[int, int]) -> torch.Tensor:
    """`reflect_pad` along these axes by concatenation of slices, for a compiler.

    Inductor writes a concatenation to memory once; a padding it would compute anew in every kernel that reads it. The
    padding must be above 0 and below the axes' lengths.
    """
    for axis in axes:
        length = x.shape[axis]
        first, last = x.narrow(axis, 1, padding), x.narrow(axis, length - padding - 1, padding)
        x = torch.cat([first.flip(axis), x, last.flip(axis)], dim=axis)
    return x


def windows(padded: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """View (..., H + 2 * padding, W + 2 * padding), padded by `same_padding`, as (..., K, K, H, W)."""
    # Unfolded by the size of the window, not of the map, which would tie an exported program to one size.
    span = dilation * (kernel_size - 1) + 1
    view = padded.unfold(-2, span, 1).unfold(-2, span, 1)[..., ::dilation, ::dilation]
    view = view.movedim((-2, -1), (-4, -3))
    if not torch.jit.is_scripting():
        if is_compiling():
            # Free in inference, as the compiler fuses it. Without it torch compares K with the size of the map to
            # choose a memory layout, and compiles anew for smaller maps.
            view = view.clone(memory_format=torch.contiguous_format)
    return view

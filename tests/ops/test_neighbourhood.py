"""Reflection padding and K x K windows, on maps of any size down to one pixel."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_gsa.ops import neighbourhood, reflect_pad
from timm_gsa.ops.san.neighbourhood import same_padding

SIZES = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (4, 1), (4, 4)]


def mirrored(index: int, size: int) -> int:
    """Where a place outside of an axis is taken from: walk there, turning round at both ends."""
    place, step = 0, 1 if index >= 0 else -1
    for _ in range(abs(index) if size > 1 else 0):
        if not 0 <= place + step < size:
            step = -step
        place += step
    return place


@pytest.mark.parametrize("padding", range(7))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reflect_pad_goes_back_and_forth_on_small_maps(size: tuple[int, int], padding: int) -> None:
    x = torch.randn(2, 3, *size)
    want = np.pad(x.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode="reflect")
    assert np.array_equal(reflect_pad(x, padding).numpy(), want)


@pytest.mark.parametrize("padding", range(7))
@pytest.mark.parametrize("size", [(7, 7), (7, 12), (9, 8)], ids=str)
def test_reflect_pad_is_plain_reflection_where_that_exists(size: tuple[int, int], padding: int) -> None:
    x = torch.randn(2, 3, *size)
    assert torch.equal(reflect_pad(x, padding), F.pad(x, (padding,) * 4, mode="reflect"))


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (4, 3)], ids=str)
def test_reflect_pad_at_the_limit_of_plain_reflection(size: tuple[int, int]) -> None:
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    want = np.pad(x.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
    assert np.array_equal(reflect_pad(x, 3).numpy(), want)


@pytest.mark.parametrize("padding", [1, 3, 6])
@pytest.mark.parametrize("size", [*SIZES, (7, 9)], ids=str)
def test_reflect_pad_gradient_folds_every_mirrored_place_back(size: tuple[int, int], padding: int) -> None:
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    height, width = size
    cotangent = torch.randn(2, 2, height + 2 * padding, width + 2 * padding, dtype=torch.float64)
    want = torch.zeros_like(x)
    for row in range(height + 2 * padding):
        for column in range(width + 2 * padding):
            source = mirrored(row - padding, height), mirrored(column - padding, width)
            want[:, :, source[0], source[1]] += cotangent[:, :, row, column]
    (grad,) = torch.autograd.grad(reflect_pad(x, padding), x, cotangent)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


def test_reflect_pad_second_derivatives_on_a_small_map() -> None:
    x = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reflect_pad(x, 4).sin(), x)
    assert torch.autograd.gradgradcheck(lambda x: reflect_pad(x, 4).sin(), x)


@pytest.mark.parametrize("size", [(2, 3), (7, 9)], ids=str)
def test_reflect_pad_of_any_layout_and_dtype(size: tuple[int, int]) -> None:
    x = torch.arange(2 * 4 * size[0] * size[1]).view(2, 4, *size)
    want = np.pad(x.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="reflect")
    layouts = (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.repeat_interleave(2, dim=1)[:, ::2],
    )
    for layout in layouts:
        for dtype in (torch.int64, torch.float64, torch.float32, torch.float16):
            padded = reflect_pad(layout.to(dtype), 3)
            assert padded.dtype == dtype
            assert np.array_equal(padded.long().numpy(), want)


@pytest.mark.parametrize("sizes", [(4, 12), (2, 3)], ids=["plain", "small"])
def test_reflect_pad_exports_with_a_size_that_varies(sizes: tuple[int, int]) -> None:
    class Pad(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reflect_pad(x, 3)

    smallest, largest = sizes
    dynamic = {2: torch.export.Dim("height", min=smallest, max=largest)}
    width = largest
    program = torch.export.export(Pad(), (torch.randn(2, 3, largest, width),), dynamic_shapes={"x": dynamic}).module()
    for height in range(smallest, largest + 1):
        x = torch.randn(2, 3, height, width)
        assert torch.equal(program(x), reflect_pad(x, 3))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7)], ids=str)
def test_neighbourhood_holds_the_value_at_each_offset(size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    x = torch.randn(2, 3, *size)
    found = neighbourhood(x, kernel_size, dilation)
    assert found.shape == (2, 3, kernel_size, kernel_size, *size)
    for i in range(kernel_size):
        for j in range(kernel_size):
            for h in range(size[0]):
                for w in range(size[1]):
                    row = mirrored(h + (i - kernel_size // 2) * dilation, size[0])
                    column = mirrored(w + (j - kernel_size // 2) * dilation, size[1])
                    assert torch.equal(found[:, :, i, j, h, w], x[:, :, row, column])


def test_neighbourhood_copies_nothing_but_the_padded_map() -> None:
    found = neighbourhood(torch.randn(2, 3, 8, 9), kernel_size=7)
    assert found.untyped_storage().nbytes() == 4 * 2 * 3 * (8 + 6) * (9 + 6)


@pytest.mark.parametrize(("kernel_size", "dilation", "padding"), [(1, 1, 0), (3, 1, 1), (7, 1, 3), (3, 4, 4)])
def test_same_padding_keeps_the_size(kernel_size: int, dilation: int, padding: int) -> None:
    assert same_padding(kernel_size, dilation) == padding


@pytest.mark.parametrize(("kernel_size", "dilation", "message"), [
    (4, 1, "kernel_size must be odd and >= 1, got 4"),
    (0, 1, "kernel_size must be odd and >= 1, got 0"),
    (-3, 1, "kernel_size must be odd and >= 1, got -3"),
    (3, 0, "dilation must be >= 1, got 0"),
])
def test_windows_that_do_not_exist_are_refused(kernel_size: int, dilation: int, message: str) -> None:
    for refusing in (same_padding, lambda k, d: neighbourhood(torch.zeros(1, 1, 9, 9), k, d)):
        with pytest.raises(ValueError, match=message):
            refusing(kernel_size, dilation)

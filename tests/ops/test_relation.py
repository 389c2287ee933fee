"""Relations of a position to its neighbours against the SAN authors' numbers and against loops over positions."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_gsa.ops import coordinates, patch, subtraction

from ..san_fixtures import MANIFEST, assert_agrees, golden, made_input

# Stride and zero padding exist in the authors' operators only, their networks use neither.
CASES = [
    name for name, case in MANIFEST["op_cases"].items()
    if case["op"].startswith("subtraction") and case["stride"] == 1 and case["pad_mode"] == "reflect"
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_subtraction_agrees_with_the_authors(name: str, dtype: torch.dtype) -> None:
    case, want = MANIFEST["op_cases"][name], golden("ops", name)
    names = ["x"] if case["op"] == "subtraction" else ["x1", "x2"]
    inputs = [made_input(f"ops/{name}/{x}", want[f"grad_{x}"].shape).to(dtype).requires_grad_() for x in names]
    out = subtraction(inputs[0], inputs[-1], case["k"], case["dilation"]).flatten(3)
    cotangent = made_input(f"ops/{name}/cotangent", want["out"].shape).to(dtype)
    grads = torch.autograd.grad(out, inputs, cotangent)
    got = {"out": out, **{f"grad_{x}": grad for x, grad in zip(names, grads, strict=True)}}
    assert_agrees("ops", name, got, dtype)


def test_subtraction_takes_the_neighbour_from_the_centre() -> None:
    query, key = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    relation = subtraction(query, key, kernel_size=3)
    assert relation.shape == (2, 3, 9, 4, 5)
    assert torch.equal(relation[:, :, 5, 2, 1], query[:, :, 2, 1] - key[:, :, 2, 2])  # to the right
    assert torch.equal(relation[:, :, 7, 2, 1], query[:, :, 2, 1] - key[:, :, 3, 1])  # below
    assert torch.equal(relation[:, :, 0, 0, 0], query[:, :, 0, 0] - key[:, :, 1, 1])  # mirrored at the corner


def test_subtraction_of_any_layout() -> None:
    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 6, 5, 4)
    want = subtraction(query, key, 5)
    last = subtraction(*(x.to(memory_format=torch.channels_last) for x in (query, key)), 5)
    turned = subtraction(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key)), 5)
    assert torch.equal(last, want)
    assert torch.equal(turned, want)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_patch_lays_places_out_along_the_channels(kernel_size: int, dilation: int) -> None:
    key = torch.randn(2, 3, 13, 14)
    padding = dilation * (kernel_size // 2)
    padded = F.pad(key, (padding,) * 4, mode="reflect")
    want = F.unfold(padded, kernel_size, dilation=dilation).view(2, -1, 13, 14)
    assert torch.equal(patch(key, kernel_size, dilation), want)


def test_patch_of_one_pixel_repeats_it() -> None:
    key = torch.randn(2, 3, 1, 1)
    assert torch.equal(patch(key, 7), key.repeat_interleave(49, dim=1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 1), (7, 9), (112, 56)])
def test_coordinates_run_from_minus_one_to_one(height: int, width: int) -> None:
    grid = coordinates(height, width, torch.device("cpu"), torch.float64)
    assert grid.shape == (1, 2, height, width)
    for h in range(height):
        for w in range(width):
            x = -1 + 2 * w / (width - 1) if width > 1 else -1.
            y = -1 + 2 * h / (height - 1) if height > 1 else -1.
            np.testing.assert_allclose(grid[0, :, h, w], [x, y], atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_coordinates_are_never_half_precision(dtype: torch.dtype) -> None:
    grid = coordinates(3, 600, torch.device("cpu"), dtype)
    assert grid.dtype == torch.float32
    assert len(grid[0, 0, 0].unique()) == 600

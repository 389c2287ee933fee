"""Axial mixing: the sums of its equations, and matrices from one size to another."""
import pytest
import torch

from timm_gsa.ops import (
    column_mixing,
    column_mixing_reference,
    resize_mixing_bias,
    resize_mixing_matrix,
    row_mixing,
    row_mixing_reference,
)

from ..gradients import outputs_and_gradients

BOTH = [(row_mixing, row_mixing_reference, -1), (column_mixing, column_mixing_reference, -2)]
SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (1, 6, 7, 1), (3, 4, 1, 6), (2, 5, 8, 8)]


def inputs(shape: tuple[int, ...], axis: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    length = shape[axis]
    return [torch.randn(*size, dtype=dtype) for size in (shape, (length, length), (length,))]


@pytest.mark.parametrize(('mixing', 'reference', 'axis'), BOTH)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_mixing_is_the_sum_of_its_equation(mixing, reference, axis, shape, layout):
    x, matrix, bias = inputs(shape, axis)
    x = x.contiguous(memory_format=layout)
    for got, want in zip(
            outputs_and_gradients(mixing, x, matrix, bias), outputs_and_gradients(reference, x, matrix, bias),
            strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('mixing', 'reference', 'axis'), BOTH)
def test_mixing_takes_views_that_are_not_contiguous(mixing, reference, axis):
    x, matrix, bias = inputs((2, 4, 6, 6), axis)
    x = x.transpose(-1, -2)[:, ::2, 1:]
    matrix, bias = matrix[:x.shape[axis], :x.shape[axis]].t(), bias[:x.shape[axis]]
    torch.testing.assert_close(mixing(x, matrix, bias), reference(x, matrix, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('mixing', 'reference', 'axis'), BOTH)
def test_gradients_of_gradients(mixing, reference, axis):
    tensors = [x.requires_grad_() for x in inputs((1, 2, 2, 3), axis)]
    assert torch.autograd.gradgradcheck(mixing, tensors)


@pytest.mark.parametrize(('mixing', 'reference', 'axis'), BOTH)
def test_mixing_of_each_image_by_vmap(mixing, reference, axis):
    x, matrix, bias = inputs((3, 2, 4, 5), axis)
    mapped = torch.vmap(lambda image: mixing(image[None], matrix, bias)[0])(x)
    torch.testing.assert_close(mapped, reference(x, matrix, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('mixing', 'reference', 'axis'), BOTH)
def test_no_images(mixing, reference, axis):
    x, matrix, bias = inputs((0, 2, 4, 5), axis)
    assert mixing(x, matrix, bias).shape == x.shape


@pytest.mark.parametrize(('mixing', 'axis', 'name'), [(row_mixing, -1, 'width'), (column_mixing, -2, 'height')])
def test_a_matrix_of_another_size_is_refused(mixing, axis, name):
    x, matrix, bias = inputs((2, 3, 5, 7), axis)
    length = x.shape[axis]
    for wrong in ((matrix[1:], bias), (matrix[1:, 1:], bias), (matrix, bias[1:])):
        with pytest.raises(ValueError, match=rf'shapes \({length}, {length}\) and \({length},\) for maps of {name}'):
            mixing(x, *wrong)


# From one size to another


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_size_is_the_same_tensor(dtype):
    matrix, bias = torch.randn(7, 7).to(dtype), torch.randn(7).to(dtype)
    assert resize_mixing_matrix(matrix, 7) is matrix and resize_mixing_bias(bias, 7) is bias
    for other in (resize_mixing_matrix(matrix, 9), resize_mixing_bias(bias, 9)):
        assert other.dtype == dtype and set(other.shape) == {9}


@pytest.mark.parametrize('length', [1, 2, 7, 14, 56])
def test_interpolation_at_the_same_size_is_the_identity_to_the_bit(length, monkeypatch):
    """What a compiled program with open sizes computes."""
    monkeypatch.setattr('timm_gsa.ops.axial_mixing._fits', lambda x, length: False)
    for dtype in (torch.float32, torch.float64):
        matrix, bias = torch.randn(length, length, dtype=dtype), torch.randn(length, dtype=dtype)
        assert torch.equal(resize_mixing_matrix(matrix, length), matrix)
        assert torch.equal(resize_mixing_bias(bias, length), bias)


@pytest.mark.parametrize(('old', 'new'), [(56, 64), (14, 24), (7, 12), (64, 56), (7, 3), (5, 1), (1, 4)])
def test_the_mean_over_an_axis_stays_the_mean(old, new):
    """And so the sum of every row: what mixing makes of a constant map does not depend on its size."""
    mean = torch.full((old, old), 1 / old, dtype=torch.float64)
    torch.testing.assert_close(resize_mixing_matrix(mean, new), torch.full((new, new), 1 / new, dtype=torch.float64))
    constant = torch.full((old,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(resize_mixing_bias(constant, new), constant[:1].expand(new))


@pytest.mark.parametrize(('old', 'new', 'error'), [(56, 64, .005), (14, 16, .02), (7, 8, .04), (56, 96, .005)])
def test_a_smooth_operator_stays_the_operator(old, new, error):
    """A Gaussian of 0.15 of the axis, on smooth signals, against the operator made for the new grid."""
    def operator(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        return (-((place[:, None] - place) / 0.15).square() / 2).softmax(1), place

    (matrix, _), (want, place) = operator(old), operator(new)
    signal = torch.stack([(2 * torch.pi * k * place + k).cos() for k in (0.5, 1, 1.5)], 1)
    difference = resize_mixing_matrix(matrix, new) @ signal - want @ signal
    assert difference.norm() < error * (want @ signal).norm()


def test_rows_and_columns_of_a_matrix_are_not_swapped():
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[1] = 1.  # one position takes from all
    resized = resize_mixing_matrix(matrix, 16)
    assert resized[2:4].abs().min() > 0.3 and resized[8:].abs().max() < 1e-12


def test_gradients_reach_the_matrix_that_is_resampled():
    matrix = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_mixing_matrix(x, 7), [matrix])
    assert torch.autograd.gradcheck(lambda x: resize_mixing_bias(x, 3), [bias])

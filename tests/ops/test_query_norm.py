"""Norms of queries over the channels of a head."""
import pytest
import torch

from timm_gsa.ops import normalise_query

NORMS = ['softmax', 'rms']


def test_none_leaves_the_query_as_it_is():
    query = torch.randn(2, 3, 4, 5, 6)
    assert normalise_query(query, None) is query


def test_equals_the_definitions_channel_by_channel():
    query = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    softmax, rms = (normalise_query(query, norm) for norm in NORMS)
    torch.testing.assert_close(softmax, query.exp() / query.exp().sum(2, keepdim=True))
    torch.testing.assert_close(rms, query / ((query ** 2).sum(2, keepdim=True) / 4 + 1e-6).sqrt())


@pytest.mark.parametrize('norm', NORMS)
def test_takes_any_axis(norm):
    query = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    moved = normalise_query(query.movedim(2, -1), norm, -1)
    torch.testing.assert_close(moved, normalise_query(query, norm).movedim(2, -1))


@pytest.mark.parametrize('norm', NORMS)
def test_gradients_and_gradients_of_gradients(norm):
    query = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalise_query(x, norm), query)
    assert torch.autograd.gradgradcheck(lambda x: normalise_query(x, norm), query)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_normalised_in_float32(norm, dtype):
    """In float16, 300 ** 2 would overflow and 1e-4 ** 2 would vanish."""
    for size in (1e-4, 1., 300.):
        query = (size * torch.randn(2, 2, 8, 3, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
        out = normalise_query(query, norm)
        assert out.dtype == dtype
        torch.testing.assert_close(out, normalise_query(query.double(), norm).to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('size', [0., 1e-30, 1e30])
def test_is_bounded_whatever_the_size_of_the_query(norm, size):
    query = size * torch.randn(1, 2, 16, 3, 3)
    out = normalise_query(query, norm)
    assert out.isfinite().all() and out.abs().max() <= 4. + 1e-6  # the square root of 16 channels

"""Norms of queries over the channels of a head, which keep a deep global self-attention network finite.

Our choice; Shen et al., arXiv 2010.03019, are not known to normalise queries. The softmax is that of the queries of
Shen et al., "Efficient Attention", arXiv 1812.01243.
"""
import torch

from .._backend import wide_softmax, wide_type

__all__ = ['QUERY_NORMS', 'check_query_norm', 'normalise_query']

QUERY_NORMS = (None, 'softmax', 'rms')


def check_query_norm(query_norm: str | None) -> None:
    """Raise ValueError if `query_norm` is none of `QUERY_NORMS`."""
    if query_norm not in QUERY_NORMS:
        raise ValueError(f"query_norm must be None, 'softmax' or 'rms', got {query_norm!r}")


def normalise_query(query: torch.Tensor, query_norm: str | None, dim: int = 2) -> torch.Tensor:
    """Normalise queries over the d channels of their head.

    'softmax':  out[k] = exp(query[k]) / sum over j of exp(query[j])
    'rms':      out[k] = query[k] / sqrt(mean over j of query[j] ** 2 + 1e-6)

    Both are computed in at least float32. With either, content and positional attention are linear in the value, as a
    convolution is: an outlier grows from layer to layer by a factor, not by a power.

    Args:
        query: Tensor of any shape, for instance (B, heads, d, H, W).
        query_norm: None for the queries as they are, 'softmax' or 'rms'.
        dim: Axis of the d channels.

    Returns:
        Tensor of the shape and dtype of `query`.
    """
    if query_norm is None:
        return query
    if query_norm == 'softmax':
        return wide_softmax(query, dim).to(query.dtype)
    x = query.to(wide_type(query.dtype))
    return (x * (x.square().mean(dim, keepdim=True) + 1e-6).rsqrt()).to(query.dtype)

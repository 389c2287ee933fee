"""Operations of the three papers as functions on tensors; `use_backend` chooses what computes them."""
from ._backend import explain, use_backend
from .gaussian import gaussian_attention, gaussian_attention_reference, gaussian_weight
from .gsa import (
    column_attention,
    content_and_row_attention,
    content_attention,
    global_attention,
    normalise_query,
    resize_relative_table,
    row_attention,
)
from .san import (
    aggregation,
    coordinates,
    difference_moments,
    difference_network,
    neighbourhood,
    normed_difference_network,
    patch,
    patch_moments,
    patch_network,
    reflect_pad,
    subtraction,
)

__all__ = [
    'aggregation',
    'column_attention',
    'content_and_row_attention',
    'content_attention',
    'coordinates',
    'difference_moments',
    'difference_network',
    'explain',
    'gaussian_attention',
    'gaussian_attention_reference',
    'gaussian_weight',
    'global_attention',
    'neighbourhood',
    'normalise_query',
    'normed_difference_network',
    'patch',
    'patch_moments',
    'patch_network',
    'reflect_pad',
    'resize_relative_table',
    'row_attention',
    'subtraction',
    'use_backend',
]

"""Operations of the papers as functions on tensors, each beside its plain reference."""
from ._backend import explain, use_backend
from .aggregation import aggregation, aggregation_reference
from .axial_mixing import (
    column_mixing,
    column_mixing_reference,
    resize_mixing_bias,
    resize_mixing_matrix,
    row_mixing,
    row_mixing_reference,
)
from .gaussian_attention import gaussian_attention, gaussian_attention_reference, gaussian_weight
from .gsa import (
    column_attention,
    content_and_row_attention,
    content_attention,
    global_attention,
    normalise_query,
    resize_relative_table,
    row_attention,
)
from .neighbourhood import neighbourhood, reflect_pad
from .relation import coordinates, patch, subtraction
from .relation_network import (
    difference_moments,
    difference_network,
    difference_network_reference,
    normed_difference_network,
    normed_difference_network_reference,
    patch_moments,
    patch_network,
    patch_network_reference,
)

__all__ = [
    'aggregation',
    'aggregation_reference',
    'column_attention',
    'column_mixing',
    'column_mixing_reference',
    'content_and_row_attention',
    'content_attention',
    'coordinates',
    'difference_moments',
    'difference_network',
    'difference_network_reference',
    'explain',
    'gaussian_attention',
    'gaussian_attention_reference',
    'gaussian_weight',
    'global_attention',
    'neighbourhood',
    'normalise_query',
    'normed_difference_network',
    'normed_difference_network_reference',
    'patch',
    'patch_moments',
    'patch_network',
    'patch_network_reference',
    'reflect_pad',
    'resize_mixing_bias',
    'resize_mixing_matrix',
    'resize_relative_table',
    'row_attention',
    'row_mixing',
    'row_mixing_reference',
    'subtraction',
    'use_backend',
]

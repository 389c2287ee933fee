"""Operations of the three papers as functions on tensors, each beside its plain reference."""
from .aggregation import aggregation, aggregation_reference
from .content_attention import content_attention, content_attention_reference
from .gaussian_attention import gaussian_attention, gaussian_attention_reference, gaussian_weight
from .neighbourhood import neighbourhood, reflect_pad
from .position_attention import column_attention, column_attention_reference, resize_relative_table, row_attention
from .relation import coordinates, patch, subtraction
from .relation_network import (
    difference_network,
    difference_network_reference,
    patch_network,
    patch_network_reference,
)

__all__ = [
    'aggregation',
    'aggregation_reference',
    'column_attention',
    'column_attention_reference',
    'content_attention',
    'content_attention_reference',
    'coordinates',
    'difference_network',
    'difference_network_reference',
    'gaussian_attention',
    'gaussian_attention_reference',
    'gaussian_weight',
    'neighbourhood',
    'patch',
    'patch_network',
    'patch_network_reference',
    'reflect_pad',
    'resize_relative_table',
    'row_attention',
    'subtraction',
]

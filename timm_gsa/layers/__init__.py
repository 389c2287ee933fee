"""The attention layers of the papers and their rivals, usable alone in any network."""
from .attention_condenser import AttentionCondenser
from .global_self_attention import GlobalSelfAttention
from .prior_attention import PriorAttention
from .san_attention import PairwiseAttention, PatchwiseAttention
from .sparse_mlp import AxialMixing, DepthwiseBlock, SparseMLP

__all__ = [
    'AttentionCondenser',
    'AxialMixing',
    'DepthwiseBlock',
    'GlobalSelfAttention',
    'PairwiseAttention',
    'PatchwiseAttention',
    'PriorAttention',
    'SparseMLP',
]

"""The attention layers of the three papers, usable alone in any network."""
from .global_self_attention import GlobalSelfAttention
from .prior_attention import PriorAttention
from .san_attention import PairwiseAttention, PatchwiseAttention

__all__ = ['GlobalSelfAttention', 'PairwiseAttention', 'PatchwiseAttention', 'PriorAttention']

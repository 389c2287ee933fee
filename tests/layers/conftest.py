"""Layers of SAN of both kinds."""
import pytest
import torch
from torch import nn

from timm_gsa.layers import PairwiseAttention, PatchwiseAttention


@pytest.fixture(params=[PairwiseAttention, PatchwiseAttention])
def layer(request):
    """A layer in eval mode, all of whose norms do something; some of their factors are negative or 0."""
    torch.manual_seed(0)
    layer = request.param(48, kernel_size=5, dim_key=4, dim_out=24, num_groups=3).double().eval()
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
        norm.weight.data[::7] = 0
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return layer

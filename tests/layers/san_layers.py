"""What tests of SAN's layers share."""
import torch
from torch import nn

# What only the general path can compute.
CHANGES = [
    lambda layer: layer.norm2.train(),
    lambda layer: setattr(layer, 'norm1', nn.GroupNorm(1, layer.norm1.num_features).double()),
    lambda layer: setattr(layer, 'act2', nn.GELU()),
    lambda layer: setattr(layer, 'conv1', nn.Sequential(layer.conv1)),
    lambda layer: layer.norm2.register_forward_hook(lambda module, args, output: 2 * output),
    lambda layer: layer.act1.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
]


def images(batch, height, width, channels_last=False):
    x = torch.randn(batch, 48, height, width, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x

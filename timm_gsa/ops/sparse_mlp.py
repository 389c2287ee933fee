"""The branches of a sparse MLP joined on a CPU, in inference.

Source: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", arXiv 2109.05422.
"""
from typing import Any

import torch

from ._backend import Form, Operation, records_gradients, why_not_cpu, why_not_pristine

__all__ = ['JOIN']


def why_not_join(layer: Any, *branches: torch.Tensor) -> str | None:
    """Why `join` may not do the work of `layer.fuse`."""
    reason = why_not_pristine(layer, {'fuse': False})
    if reason is not None:
        return reason
    if layer.training:
        return 'the layer is in training mode'
    if torch.compiler.is_compiling():
        return 'a compiler plans its own buffers'
    if records_gradients(*branches, layer.fuse.weight):
        return 'gradients are recorded'
    return why_not_cpu(*branches, layer.fuse.weight)


def join(layer: Any, *branches: torch.Tensor) -> torch.Tensor:
    """fuse(concat(branches)) as a sum of one product for each branch, so that nothing is concatenated.

    Args:
        layer: Holds `fuse`, a 1 x 1 convolution without bias.
        *branches: Maps of shape (B, C, H, W).

    Returns:
        Map of shape (B, C, H, W) with channels innermost in memory.
    """
    batch, channels, height, width = branches[0].shape
    weights = layer.fuse.weight[:, :, 0, 0].t().split(channels)
    first, *others = (branch.permute(0, 2, 3, 1).reshape(-1, channels) for branch in branches)
    out = torch.mm(first, weights[0])
    for pixels, weight in zip(others, weights[1:], strict=True):
        torch.addmm(out, pixels, weight, out=out)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


JOIN = Operation('sparse_mlp_join', cpu=Form(join, why_not_join))

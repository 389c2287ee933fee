"""Batch norms as affine maps."""
import torch.nn as nn

from ..ops._backend import affine_of

__all__ = ['affine_of', 'watched']


def watched(*modules: nn.Module) -> bool:
    """True if a hook watches or changes what a module takes or gives."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)

"""Folding of norms into the convolutions before them, for inference."""
import copy
from typing import TypeVar

import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .layers import PairwiseAttention, PriorAttention
from .models.dcac import CondenserBlock
from .models.san import SANBlock, SANStem
from .models.smlpnet import SMLPBlock
from .ops._backend import affine_of, why_not_untouched

__all__ = ['fuse']

Model = TypeVar('Model', bound=nn.Module)


def fuse(model: Model) -> Model:
    """Copy of a model for inference whose batch norms are folded into the layers before them, where algebra allows.

    Folded are norms that follow a convolution, a `PriorAttention` (into its 3 x 3 convolution and its projection) or a
    `PairwiseAttention` (into its values: the weights sum to 1, so that a shift of the values is a shift of the output).
    The norm of a `SparseMLP` goes into the depthwise convolution before it.
    Kept are norms that act before an activation or a residual sum only, the one between the two steps of
    `GlobalSelfAttention` and the one after it, as its output has no bias, and those in and after
    `PatchwiseAttention`, whose weights do not sum to 1. Parts that hooks watch, and those with a parametrization or
    a patched `forward`, are left as they are.

    The copy gives the same outputs up to rounding, is no longer meant for training, and its state dict differs from
    that of the model: save the model, not the copy.

    Args:
        model: A model of this package, a ResNet of timm, or a part of one, in eval mode.

    Returns:
        A copy in eval mode; the model itself stays as it is.

    Raises:
        ValueError: The model is in training mode, in which norms are no fixed maps.
    """
    if model.training:
        raise ValueError('model must be in eval mode to be fused, got one in training mode: call model.eval() before')
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            for first, second in _neighbours(module):
                layer, norm = module.get_submodule(first), module.get_submodule(second)
                if _fold(layer, norm):
                    parent, _, name = second.rpartition('.')
                    setattr(module.get_submodule(parent), name, nn.Identity())
    return model


def _neighbours(module: nn.Module) -> list[tuple[str, str]]:
    """Names of children of which one is applied to what the other gives, and nothing else is."""
    if isinstance(module, SANBlock):
        return [('attn', 'norm2')]
    if isinstance(module, SMLPBlock) and _untouched(module.conv, module.mix):
        return [('conv.conv', 'mix.norm')]
    if isinstance(module, ResNet):
        return [('conv1', 'bn1')]
    if isinstance(module, BasicBlock):
        return [('conv1', 'bn1'), ('conv2', 'bn2')]
    if isinstance(module, (Bottleneck, CondenserBlock)):
        return [('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3')]
    if type(module) in (nn.Sequential, SANStem):
        names = [name for name, _ in module.named_children()]
        return list(zip(names, names[1:], strict=False))
    return []


def _fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Fold a norm into the layer before it; false, and nothing done, where that is not possible."""
    if not _untouched(layer, norm):
        return False
    if isinstance(layer, nn.Sequential) and len(layer) > 0:  # a stem of several convolutions
        return _fold(layer[-1], norm)
    if type(norm) is not nn.BatchNorm2d or affine_of(norm) is None:
        return False
    if type(layer) is nn.Conv2d:
        _fold_convolution(layer, norm, slice(None), slice(None))
    elif type(layer) is PriorAttention and type(layer.conv) is type(layer.proj) is nn.Conv2d:
        split = layer.conv.out_channels
        _fold_convolution(layer.conv, norm, slice(None), slice(split))
        _fold_convolution(layer.proj, norm, slice(None), slice(split, None))
    elif type(layer) is PairwiseAttention and type(layer.qkv) is nn.Conv2d:
        _fold_convolution(layer.qkv, norm, slice(2 * layer.dim_key, None), slice(None))
    else:
        return False
    return True


def _untouched(*modules: nn.Module) -> bool:
    return all(why_not_untouched(module) is None for module in modules)


def _fold_convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d, rows: slice, channels: slice) -> None:
    """Fold some channels of a norm into some output channels of a convolution, which has a bias from then on."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    if conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=conv.weight.requires_grad)
    weight, bias = fuse_conv_bn_weights(
        conv.weight[rows],
        conv.bias[rows],
        mean[channels],
        variance[channels],
        norm.eps,
        norm.weight[channels] if norm.affine else None,
        norm.bias[channels] if norm.affine else None,
    )
    conv.weight[rows] = weight
    conv.bias[rows] = bias

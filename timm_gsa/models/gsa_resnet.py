"""GSA-ResNet: bottleneck ResNets with global self-attention in place of every 3x3 convolution.

Paper: Shen, Bello, Vemulapalli, Jia and Chen, "Global Self-Attention Networks for Image Recognition",
https://arxiv.org/abs/2010.03019

This is a reconstruction: the body of the paper could not be read and no code of the authors exists.

* Verified by arithmetic: parameters and multiply-adds of the 38-, 50- and 101-layer networks agree with the values
  believed to be the paper's (14.2 M; 18.1 M and 7.2 GFLOPs; 30.4 M and 12.2 GFLOPs, two FLOPs to a multiply-add).
* From the paper's Figure 1: two parallel branches that are summed, the column step before the row step, a norm between.
* Our choice: the query's norm over the channels of a head, no bias or norm on key and value, 8 heads sharing one table
  a layer, initialisation, average pool before the norm in blocks that halve the map, 1x1 stride-2 shortcut, resampling
  of tables, the stem for small images, and the tiny network.
"""
from typing import Any

import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import register_model
from timm.models.resnet import Bottleneck

from ..layers import GlobalSelfAttention
from ._attention_resnet import AttentionResNet
from ._zoo import (
    SMALL_STEM,
    SMALL_STEM_SIZE,
    cifar100_cfg,
    create_from_zoo,
    default_cfg,
    tiny_imagenet_cfg,
    zoo_cfgs,
)

__all__ = ['GSAResNet']


class GSAResNet(AttentionResNet):
    """ResNet with `GlobalSelfAttention` in place of the 3x3 convolutions of its bottlenecks.

    Built for `img_size`, run at any size: position tables are resampled along their offset axis where a map differs.
    Attention reaches the whole map in every block, so with `output_stride` below 32 there is nothing to dilate: later
    stages attend over larger maps.

    Args:
        *args: Positional arguments of timm's ResNet.
        num_heads: Attention heads of every layer.
        attn_stages: Stages that use attention, of 1 to 4; the others keep their convolutions.
        attn_branches: 'both', or the ablations 'content' and 'position' (`GlobalSelfAttention`).
        query_norm: 'softmax', 'rms' or None: norm of the queries over the channels of a head (`GlobalSelfAttention`).
            'none' is None as well: `timm.create_model` drops arguments that are None.
        img_size: Height and width of the images that position tables are built for; where None 224, with the small
            stem 32.
        **kwargs: Keyword arguments of timm's ResNet; its `stem_type` may also be 'small'.
    """

    def __init__(
            self,
            *args: Any,
            num_heads: int = 8,
            attn_stages: tuple[int, ...] = (1, 2, 3, 4),
            attn_branches: str = 'both',
            query_norm: str | None = 'softmax',
            img_size: int | tuple[int, int] | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        query_norm = None if query_norm == 'none' else query_norm
        if img_size is None:
            img_size = SMALL_STEM_SIZE if kwargs.get('stem_type') == SMALL_STEM else 224

        def attention(conv: nn.Conv2d, reduction: int, dilation: int) -> nn.Module:
            if conv.groups != 1 or conv.in_channels != conv.out_channels:
                raise ValueError(
                    'attention needs the same number of channels in and out and cardinality 1, '
                    f'got {conv.in_channels}, {conv.out_channels} and {conv.groups}'
                )
            height, width = (-(-size // reduction) for size in to_2tuple(img_size))
            return GlobalSelfAttention(
                conv.out_channels,
                (height, width),
                num_heads=num_heads,
                stride=conv.stride[0],
                norm_layer=kwargs.get('norm_layer', nn.BatchNorm2d),
                branches=attn_branches,
                query_norm=query_norm,
                device=conv.weight.device,
                dtype=conv.weight.dtype,
            )

        self.replace_convs(attn_stages, attention)


_COMMON_CFG: dict[str, Any] = dict(classifier='fc', paper_ids='arXiv:2010.03019')


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return default_cfg(first_conv='conv1', **_COMMON_CFG, **kwargs)


default_cfgs = zoo_cfgs({
    'gsa_resnet26.untrained': _cfg(),
    'gsa_resnet38.untrained': _cfg(),
    'gsa_resnet50.tin200': tiny_imagenet_cfg('gsa_resnet50.tin200', first_conv='conv1', **_COMMON_CFG),
    'gsa_resnet50.untrained*': _cfg(),
    'gsa_resnet101.untrained': _cfg(),
    'gsa_resnet_tiny.c100': cifar100_cfg('gsa_resnet_tiny.c100', first_conv='conv1.0', **_COMMON_CFG),
})


def _create_gsa_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GSAResNet:
    return create_from_zoo(GSAResNet, variant, pretrained, sized=True, **kwargs)


@register_model
def gsa_resnet26(pretrained: bool = False, **kwargs: Any) -> GSAResNet:
    """GSA-ResNet-26."""
    model_args = dict(block=Bottleneck, layers=(1, 2, 4, 1))
    return _create_gsa_resnet('gsa_resnet26', pretrained, **dict(model_args, **kwargs))


@register_model
def gsa_resnet38(pretrained: bool = False, **kwargs: Any) -> GSAResNet:
    """GSA-ResNet-38."""
    model_args = dict(block=Bottleneck, layers=(2, 3, 5, 2))
    return _create_gsa_resnet('gsa_resnet38', pretrained, **dict(model_args, **kwargs))


@register_model
def gsa_resnet50(pretrained: bool = False, **kwargs: Any) -> GSAResNet:
    """GSA-ResNet-50."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_gsa_resnet('gsa_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def gsa_resnet101(pretrained: bool = False, **kwargs: Any) -> GSAResNet:
    """GSA-ResNet-101."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_gsa_resnet('gsa_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def gsa_resnet_tiny(pretrained: bool = False, **kwargs: Any) -> GSAResNet:
    """A GSA-ResNet small enough to train on a CPU, for 64 px images; not from the paper."""
    model_args = dict(
        block=Bottleneck, layers=(1, 1, 1, 1), channels=(32, 64, 128, 128), stem_type='deep', stem_width=12,
        num_heads=4, img_size=64)
    return _create_gsa_resnet('gsa_resnet_tiny', pretrained, **dict(model_args, **kwargs))

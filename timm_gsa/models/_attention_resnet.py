"""A timm ResNet whose 3x3 convolutions are replaced by attention."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import get_norm_layer
from timm.models.resnet import Bottleneck, ResNet, downsample_conv

from ..layers._pool import OverlappingMaxPool
from ._zoo import SMALL_STEM, check_stem

__all__ = ['AttentionResNet']


class AttentionResNet(ResNet):
    """timm's ResNet with the 3x3 convolution of its residual blocks replaced by an attention layer.

    Stem, head, shortcuts, feature taps and everything else are those of the installed timm; so are the parameter
    names. The layer replaced is `conv2` of a Bottleneck and `conv1` of a BasicBlock.

    `stem_type` may also be 'small', for images of about 32 px: one 3x3 convolution of stride 1 and no pool, so that
    stages 1 to 4 stand at strides 1, 2, 4, 8 to the image. Ours; none of the papers is known to have it.

    Raises:
        ValueError: `stem_type` is neither '', 'deep', 'deep_tiered' nor 'small', `output_stride` is none that the stem
            allows (8, 16 or 32, with the small one also 2 or 4), or a pool is asked for that the small one has not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        stem_type, output_stride = kwargs.get('stem_type', ''), kwargs.get('output_stride', 32)
        check_stem(stem_type, output_stride, ('', 'deep', 'deep_tiered', SMALL_STEM))
        stem_stride = 4
        if stem_type == SMALL_STEM:
            if kwargs.get('replace_stem_pool'):
                raise ValueError(f'replace_stem_pool must be False with stem_type {SMALL_STEM!r}, which has no pool')
            # The strides that timm builds are those to the stem's output, times its own stem's 4.
            kwargs.update(stem_type='', output_stride=min(4 * output_stride, 32))
            stem_stride = 1
        super().__init__(*args, **kwargs)
        self._stem_stride = stem_stride
        if stem_type == SMALL_STEM:
            weight = self.get_parameter('conv1.weight')
            self.conv1 = nn.Conv2d(
                weight.shape[1],
                weight.shape[0],
                kernel_size=3,
                padding=1,
                bias=False,
                device=weight.device,
                dtype=weight.dtype,
            )
            nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
            self.maxpool: nn.Module = nn.Identity()
            for feature in self.feature_info:
                feature['reduction'] = max(feature['reduction'] // 4, 1)
        elif repr(self.maxpool) == repr(nn.MaxPool2d(kernel_size=3, stride=2, padding=1)):
            self.maxpool = OverlappingMaxPool()
        for stage in range(2, 5):
            block = getattr(self, f'layer{stage}')[0]
            if block.downsample is None:
                # Stride became dilation between stages of one width, where timm needs no convolution in the shortcut.
                # Weights trained at stride 32 have one.
                weight = block.conv1.weight
                block.downsample = downsample_conv(
                    weight.shape[1],
                    weight.shape[1],
                    kernel_size=1,
                    norm_layer=get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d)),
                    device=weight.device,
                    dtype=weight.dtype,
                )
                nn.init.kaiming_normal_(block.downsample[0].weight, mode='fan_out', nonlinearity='relu')

    def replace_convs(self, stages: Sequence[int], attn_layer: Callable[[nn.Conv2d, int, int], nn.Module]) -> None:
        """Put attention in the place of convolutions; for the constructor of a subclass.

        Args:
            stages: Stages in which convolutions are replaced, of 1 to 4.
            attn_layer: Called with each convolution, the stride at which its input stands to the image, and the number
                of cells that `output_stride` makes of one cell of the stage's map (not the dilation of the
                convolution, which in the first block of a stage is still that of the stage before); returns the
                module to put in its place, which has to keep the convolution's stride.

        Raises:
            ValueError: `stages` holds another number than 1 to 4.
        """
        if not set(stages) <= {1, 2, 3, 4}:
            raise ValueError(f'attn_stages must be numbers from 1 to 4, got {tuple(stages)}')
        reduction = self._stem_stride
        for stage in range(1, 5):
            blocks = getattr(self, f'layer{stage}')
            dilation = self._stem_stride * 2 ** (stage - 1) // (reduction * blocks[0].stride)
            for block in blocks:
                name = 'conv2' if isinstance(block, Bottleneck) else 'conv1'
                conv = getattr(block, name)
                if stage in stages:
                    setattr(block, name, attn_layer(conv, reduction, dilation))
                reduction *= block.stride

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise as timm's ResNet, the attention layers by their own rule.

        Args:
            zero_init_last: Zero-initialise the last norm of each residual branch.
        """
        for module in self.modules():  # timm's leaves norms and classifier alone, which to_empty() would need
            if not isinstance(module, nn.Conv2d) and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if hasattr(module, 'rel_h') or hasattr(module, 'radius'):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the position tables and radii, which weight decay would only pull towards no attention."""
        return {name for name, _ in self.named_parameters() if name.endswith(('.rel_h', '.rel_w', '.radius'))}

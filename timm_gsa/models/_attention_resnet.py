"""A timm ResNet whose 3x3 convolutions are replaced by attention."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import get_norm_layer
from timm.models.resnet import Bottleneck, ResNet, downsample_conv

__all__ = ['AttentionResNet']


class AttentionResNet(ResNet):
    """timm's ResNet with the 3x3 convolution of its residual blocks replaced by an attention layer.

    Stem, head, shortcuts, feature taps and everything else are those of the installed timm; so are the parameter
    names. The layer replaced is `conv2` of a Bottleneck and `conv1` of a BasicBlock.

    Raises:
        ValueError: `output_stride` is neither 8, 16 nor 32.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        output_stride = kwargs.get('output_stride', 32)
        if output_stride not in (8, 16, 32):  # timm's ResNet only asserts it, without a word
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
        super().__init__(*args, **kwargs)
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
        reduction = 4
        for stage in range(1, 5):
            blocks = getattr(self, f'layer{stage}')
            dilation = 2 ** (stage + 1) // (reduction * blocks[0].stride)
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

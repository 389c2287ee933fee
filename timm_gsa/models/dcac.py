"""DC-AC: a convolutional network with double-condensing attention condensers, for small devices.

Papers: Wong et al., "Faster Attention Is What You Need: A Fast Self-Attention Neural Network Backbone Architecture for
the Edge via Double-Condensing Attention Condensers", https://arxiv.org/abs/2208.06980; the network itself is that of
Cancer-Net SCa-DC-AC by the same group. Written from a description of it; nothing of their code (AGPL) is copied.

Verified against the authors' code in float64: reduced networks of the same class, outputs, gradients and running
statistics; parameters (those published for one class) and names of the full one. Whether it is the AttendNeXt of the
paper or a smaller sibling is not known, nor is its accuracy on ImageNet. AttendNet-A and -B (arXiv 2009.14385) cannot
be rebuilt: they were designed by a machine, and the tables of their layers are unpublished. Our choice:
`output_stride`, stochastic depth, and `dcac_mini`.
"""
import re
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType, get_act_layer, get_norm_layer, register_notrace_function
from timm.models import register_model
from timm.models.resnet import Bottleneck, ResNet

from ..layers._pool import HalvingAveragePool
from ..ops._backend import wide_softmax
from ._zoo import create_from_zoo, default_cfg, zoo_cfgs

__all__ = ['DCAC', 'CondenserBlock', 'checkpoint_filter_fn']

register_notrace_function(wide_softmax)  # asks for the dtype, which torch.fx cannot trace

_GROUPS = 4  # of every 3 x 3 convolution but the first of the network
_TYPES = {'basic': 1, 'bottleneck': 2}  # output channels over width


class CondenserBlock(nn.Module):
    """Block whose branch gates a projection of its input, or is added to the input.

    with attention:     out = act(softmax over channels of F(x) * downsample(x))
    without attention:  out = act(F(x) + x)

    basic:       F = bn2(conv2(act(bn1(conv1(pool(x))))))                        conv1, conv2 3 x 3
    bottleneck:  F = bn3(conv3(act(bn2(conv2(pool(act(bn1(conv1(x)))))))))       conv2 3 x 3, conv1 and conv3 1 x 1

    `downsample` is pool, 1 x 1 convolution and norm. `pool` averages 2 x 2 pixels with stride 2, and leaves out a last
    odd row or column. All 3 x 3 convolutions have 4 groups, and none a bias. The softmax makes about 1 / C of what it
    gates: outputs of fresh networks are small.

    Args:
        in_dim: Channels of the input.
        width: Channels between the convolutions, a multiple of 4; those of the output, or half of them (bottleneck).
        block_type: 'basic' or 'bottleneck'.
        attention: Gate, as the first block of every stage does.
        stride: 1 or 2.
        dilation: Dilation of the 3 x 3 convolutions.
        act_layer: Activation layer.
        norm_layer: Norm layer.
        drop_path: Rate of stochastic depth of F without attention; a gate cannot be left out.
        min_size: Smallest side of the images of the network, for the error of `pool` on smaller ones.

    Raises:
        ValueError: `width` is no multiple of 4, or a block without attention does not keep size and channels.
    """

    def __init__(
            self,
            in_dim: int,
            width: int,
            block_type: str,
            attention: bool,
            stride: int = 1,
            dilation: int = 1,
            act_layer: LayerType = nn.SiLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            min_size: int | None = None,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        dim = width * _TYPES[block_type]
        if width % _GROUPS != 0:
            raise ValueError(f'width must be a multiple of {_GROUPS}, got {width}')
        if not attention and (in_dim != dim or stride != 1):
            raise ValueError(
                f'a block without attention must keep {dim} channels with stride 1, got {in_dim} with stride {stride}')
        norm_layer = get_norm_layer(norm_layer)
        self.bottleneck = block_type == 'bottleneck'

        def grouped(channels: int) -> nn.Conv2d:
            return nn.Conv2d(
                channels,
                width,
                kernel_size=3,
                padding=dilation,
                dilation=dilation,
                groups=_GROUPS,
                bias=False,
                **dd,
            )

        self.pool: nn.Module = HalvingAveragePool(min_size) if stride == 2 else nn.Identity()
        if self.bottleneck:
            self.conv1 = nn.Conv2d(in_dim, width, kernel_size=1, bias=False, **dd)
        else:
            self.conv1 = grouped(in_dim)
        self.bn1 = norm_layer(width, **dd)
        self.conv2 = grouped(width)
        self.bn2 = norm_layer(width, **dd)
        self.conv3: nn.Module = nn.Identity()
        self.bn3: nn.Module = nn.Identity()
        if self.bottleneck:
            self.conv3 = nn.Conv2d(width, dim, kernel_size=1, bias=False, **dd)
            self.bn3 = norm_layer(dim, **dd)
        self.act = get_act_layer(act_layer)()
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.downsample: nn.Module | None = None
        if attention:
            self.downsample = nn.Sequential(OrderedDict(
                pool=HalvingAveragePool(min_size) if stride == 2 else nn.Identity(),
                conv=nn.Conv2d(in_dim, dim, kernel_size=1, bias=False, **dd),
                norm=norm_layer(dim, **dd),
            ))

    def condense(self, x: torch.Tensor) -> torch.Tensor:
        """The branch F, (B, output channels, H, W) of the output; its softmax over channels is the attention."""
        if self.bottleneck:
            x = self.pool(self.act(self.bn1(self.conv1(x))))
            x = self.act(self.bn2(self.conv2(x)))
            return self.bn3(self.conv3(x))
        x = self.act(self.bn1(self.conv1(self.pool(x))))
        return self.bn2(self.conv2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        condensed = self.condense(x)
        if self.downsample is not None:
            return self.act(wide_softmax(condensed, 1).type_as(condensed) * self.downsample(x))
        return self.act(self.drop_path(condensed) + x)


class DCAC(ResNet):
    """Network of four stages of `CondenserBlock` on the frame of timm's ResNet: its head, feature taps and tools.

    The stem is `conv1` (3 x 3 convolution of stride 2, norm, activation, 3 x 3 convolution of 4 groups), `bn1`, `act1`
    and, in the place of ResNet's `maxpool`, an average pool over 3 x 3 pixels with stride 2 whose padding counts. The
    first block of every stage has attention. Features have strides 2, 4, 8, 16, 32. From the stage on where
    `output_stride` is reached, pools are left out and 3 x 3 convolutions dilated instead.

    Args:
        layers: Blocks of stages 1 to 4.
        widths: Widths of their blocks, multiples of 4.
        block_types: 'basic', whose output has as many channels, or 'bottleneck', whose output has twice as many, for
            each stage.
        stem_width: Channels of the stem, a multiple of 4.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the image.
        output_stride: Stride of the last stage at most, 8, 16 or 32.
        global_pool: Type of global pooling.
        act_layer: Activation layer.
        norm_layer: Norm layer.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the blocks without attention, rising linearly to this rate at the last.

    Raises:
        ValueError: A block type or `output_stride` is not as above, an argument for the stages has not four entries, or
            widths are no multiples of 4.
    """

    def __init__(
            self,
            layers: tuple[int, ...],
            widths: tuple[int, ...],
            block_types: tuple[str, ...] = ('basic', 'basic', 'bottleneck', 'bottleneck'),
            stem_width: int = 32,
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            act_layer: LayerType = nn.SiLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (('layers', layers), ('widths', widths), ('block_types', block_types)):
            if len(value) != 4:
                raise ValueError(f'{name} must have one entry for each of the 4 stages, got {tuple(value)}')
        if not set(block_types) <= set(_TYPES):
            raise ValueError(f"block_types must be 'basic' or 'bottleneck', got {tuple(block_types)}")
        if min(layers) < 1:
            raise ValueError(f'layers must be >= 1, got {tuple(layers)}')
        if stem_width % _GROUPS != 0:
            raise ValueError(f'stem_width must be a multiple of {_GROUPS}, got {stem_width}')
        if output_stride not in (8, 16, 32):  # timm's ResNet only asserts it, without a word
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        dims = [width * _TYPES[block_type] for width, block_type in zip(widths, block_types, strict=True)]
        super().__init__(
            Bottleneck,
            (0, 0, 0, 0),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            channels=tuple(dim // Bottleneck.expansion for dim in dims),
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            **dd,
        )
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, stem_width, kernel_size=3, stride=2, padding=1, bias=False, **dd),
            norm_layer(stem_width, **dd),
            act_layer(),
            nn.Conv2d(stem_width, stem_width, kernel_size=3, padding=1, groups=_GROUPS, bias=False, **dd),
        )
        self.bn1 = norm_layer(stem_width, **dd)
        self.act1 = act_layer()
        self.maxpool = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)
        self.feature_info = [dict(num_chs=stem_width, reduction=2, module='act1')]
        droppable = sum(layers) - len(layers)
        rates = [drop_path_rate * (block + 1) / droppable for block in range(droppable)]
        previous, reduction, dilation = stem_width, 4, 1
        for stage, (depth, width, block_type, dim) in enumerate(
                zip(layers, widths, block_types, dims, strict=True), start=1):
            stride, first_dilation = (1 if stage == 1 else 2), dilation
            if stage > 1 and reduction >= output_stride:
                stride = 1
                dilation *= 2
            reduction *= stride
            blocks = [
                CondenserBlock(
                    previous if block == 0 else dim,
                    width,
                    block_type,
                    attention=block == 0,
                    stride=stride if block == 0 else 1,
                    dilation=first_dilation if block == 0 else dilation,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    drop_path=rates.pop(0) if block > 0 else 0.,
                    min_size=output_stride - 3,  # the first two halvings round up, the others down
                    **dd,
                )
                for block in range(depth)
            ]
            setattr(self, f'layer{stage}', nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f'layer{stage}'))
            previous = dim

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise every module as PyTorch does by default: what the authors trained from.

        Args:
            zero_init_last: Without effect; the authors' networks start with plain norms.
        """
        for module in self.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The authors' state dicts reach the model through loaders that know no filter, too.
        if prefix + _OFFICIAL_FIRST in state_dict:
            official = {k[len(prefix):]: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
            state_dict.update({prefix + k: v for k, v in checkpoint_filter_fn(official, self).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


_OFFICIAL_FIRST = 'stem.conv1.weight'

# Where the authors' modules stand in `DCAC`; the first pattern that fits the start of a name wins. Their shortcut has
# the pool at 0 where there is one, and convolution and norm next.
_OFFICIAL_PREFIXES = (
    (r'stem\.conv1\.', 'conv1.0.'),
    (r'stem\.bn1\.', 'conv1.1.'),
    (r'stem\.conv2\.', 'conv1.3.'),
    (r'stem\.bn2\.', 'bn1.'),
    (r'blocks\.0\.0\.downsample\.0\.', 'layer1.0.downsample.conv.'),
    (r'blocks\.0\.0\.downsample\.1\.', 'layer1.0.downsample.norm.'),
    (r'blocks\.([1-3])\.0\.downsample\.1\.', r'layer\1.0.downsample.conv.'),
    (r'blocks\.([1-3])\.0\.downsample\.2\.', r'layer\1.0.downsample.norm.'),
    (r'blocks\.([0-3])\.(\d+\.(?:conv|bn)[1-3])\.', r'layer\1.\2.'),
    (r'head\.fc\.', 'fc.'),
)


def _our_name(official: str) -> str:
    for pattern, prefix in _OFFICIAL_PREFIXES:
        match = re.match(pattern, official)
        if match:
            ours = match.expand(prefix)
            if official.startswith('blocks.'):  # they count stages from 0
                ours = re.sub(r'^layer\d', f'layer{int(official[len("blocks.")]) + 1}', ours)
            return ours + official[match.end():]
    return official


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """State dict of the authors' code under our names; any other state dict as it is.

    What does not follow their naming is passed on, for the loader to report.

    Args:
        state_dict: State dict with the authors' names or ours.
        model: The model that will load it.

    Returns:
        State dict with the names of `DCAC`.
    """
    if _OFFICIAL_FIRST not in state_dict:
        return state_dict
    return {_our_name(key): tensor for key, tensor in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    # The pools of stages 2 to 4 round down, so that smaller images have no map left.
    return default_cfg(
        first_conv='conv1.0', classifier='fc', min_input_size=(3, 29, 29), paper_ids='arXiv:2208.06980', **kwargs)


default_cfgs = zoo_cfgs({
    'dcac_325mf.untrained': _cfg(),
    'dcac_mini.untrained': _cfg(
        num_classes=100, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, interpolation='bilinear'),
})


def _create_dcac(variant: str, pretrained: bool = False, **kwargs: Any) -> DCAC:
    return create_from_zoo(DCAC, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def dcac_325mf(pretrained: bool = False, **kwargs: Any) -> DCAC:
    """DC-AC of 325 million FLOPs, the authors' name for its size."""
    model_args = dict(layers=(2, 2, 3, 1), widths=(40, 84, 176, 372))
    return _create_dcac('dcac_325mf', pretrained, **dict(model_args, **kwargs))


@register_model
def dcac_mini(pretrained: bool = False, **kwargs: Any) -> DCAC:
    """A DC-AC small enough to train on a CPU, for 64 px images; not from a paper."""
    model_args = dict(layers=(2, 2, 3, 1), widths=(40, 80, 144, 256))
    return _create_dcac('dcac_mini', pretrained, **dict(model_args, **kwargs))

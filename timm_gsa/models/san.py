"""SAN: self-attention networks built from pairwise or patchwise attention over small neighbourhoods.

Paper: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020,
https://arxiv.org/abs/2004.13621, official code https://github.com/hszhao/SAN (MIT licence).

Verified against the authors' code in float64: operations, attention modules and whole networks, outputs, gradients and
running statistics; all six parameter counts and costs. The authors' checkpoints load under their own names. Our choice:
maps smaller than reflection allows, `output_stride` (the authors' networks have none), stochastic depth, the form for
small images and the tiny networks.
"""
import functools
import re
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerType, get_act_layer, get_norm_layer
from timm.models import register_model
from timm.models._manipulate import checkpoint
from timm.models.resnet import Bottleneck, ResNet

from ..layers import PairwiseAttention, PatchwiseAttention
from ..layers._pool import HalvingMaxPool
from ..ops._backend import short_cut
from ..ops.san import STEM
from ._zoo import SMALL_STEM, check_stem, cifar100_cfg, create_from_zoo, default_cfg, zoo_cfgs

__all__ = ['SAN', 'SANBlock', 'checkpoint_filter_fn']

_ATTENTION = {'pairwise': PairwiseAttention, 'patchwise': PatchwiseAttention}


class SANStem(nn.Sequential):
    """First convolution, norm, activation, pool and stage 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return self._forward(x)
        for module in self:
            x = module(x)
        return x

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = list(self)
        pooled = short_cut(STEM, self, x, HalvingMaxPool)
        if pooled is not None:
            x, modules = pooled, modules[4:]
            del pooled  # the blocks do not need it
        for module in modules:
            x = module(x)
        return x


class SANBlock(nn.Module):
    """Pre-activation residual block: x + conv(act(norm2(attn(act(norm1(x)))))).

    Args:
        dim: Channels C of input and output.
        attn_type: 'pairwise' or 'patchwise'.
        kernel_size: Places a side of the attention's neighbourhood.
        dilation: Distance in pixels between its places.
        act_layer: Activation layer.
        norm_layer: Norm layer.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
            self,
            dim: int,
            attn_type: str,
            kernel_size: int,
            dilation: int = 1,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.act1 = act_layer(inplace=True)
        self.attn = _ATTENTION[attn_type](
            dim, kernel_size=kernel_size, dilation=dilation, act_layer=act_layer, norm_layer=norm_layer, **dd)
        self.norm2 = norm_layer(self.attn.dim_out, **dd)
        self.act2 = act_layer(inplace=True)
        self.conv = nn.Conv2d(self.attn.dim_out, dim, kernel_size=1, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.act1(self.norm1(x))
        x = self.act2(self.norm2(self.attn(x)))
        return shortcut + self.drop_path(self.conv(x))


def _check_stages(attn_type: str, **stages: tuple[int, ...]) -> None:
    if attn_type not in _ATTENTION:
        raise ValueError(f"attn_type must be 'pairwise' or 'patchwise', got {attn_type!r}")
    for name, value in stages.items():
        if len(value) != 5:
            raise ValueError(f'{name} must have one number for each of the 5 stages, got {tuple(value)}')
    if any(c % 32 for c in stages['channels']):
        raise ValueError(f"channels must be multiples of 32, got {tuple(stages['channels'])}")


class SAN(ResNet):
    """Self-attention network on the frame of timm's ResNet: its head, feature taps and tools, SAN's stem and stages.

    The authors' stem and stage 0 (up to its 1x1 convolution and blocks) are `conv1`, their norm `bn1`; the pool of
    stage 1 is `maxpool`; stages 1 to 4 are `layer1` to `layer4`, each pool, conv, blocks, norm and activation.
    Features have strides 2, 4, 8, 16, 32. From the stage on where `output_stride` is reached, pools are left out and
    neighbourhoods dilated instead. The small stem leaves the pools of stages 0 and 1 out, so that features have strides
    1, 1, 2, 4, 8, and dilates nothing for that: on 32 px the last maps, of 4 pixels, are the smallest in which a 7 x 7
    neighbourhood is reflected. The first convolution is 1x1 at full resolution either way.

    Args:
        layers: Blocks of stages 0 to 4.
        attn_type: 'pairwise' or 'patchwise'.
        kernel_sizes: Places a side of the neighbourhood, stages 0 to 4.
        channels: Channels of stages 0 to 4, multiples of 32.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the image.
        output_stride: Stride of the last stage at most, 8, 16 or 32; with the small stem also 2 or 4.
        stem_type: '', or 'small' for images of about 32 px.
        global_pool: Type of global pooling.
        act_layer: Activation layer.
        norm_layer: Norm layer.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly to this rate at the last block.

    Raises:
        ValueError: `attn_type`, `stem_type`, `output_stride` or the length of a per-stage argument is not as above.
    """

    def __init__(
            self,
            layers: tuple[int, ...],
            attn_type: str,
            kernel_sizes: tuple[int, ...] = (3, 7, 7, 7, 7),
            channels: tuple[int, ...] = (64, 256, 512, 1024, 2048),
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            stem_type: str = '',
            global_pool: str = 'avg',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        check_stem(stem_type, output_stride, ('', SMALL_STEM))
        _check_stages(attn_type, layers=layers, kernel_sizes=kernel_sizes, channels=channels)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(
            Bottleneck,
            (0, 0, 0, 0),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            channels=tuple(c // Bottleneck.expansion for c in channels[1:]),
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            **dd,
        )
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        block = functools.partial(SANBlock, attn_type=attn_type, act_layer=act_layer, norm_layer=norm_layer, **dd)
        rates = [drop_path_rate * number / max(sum(layers) - 1, 1) for number in range(sum(layers))]
        pooled_from = 2 if stem_type == SMALL_STEM else 0  # first stage with a pool
        pool = functools.partial(HalvingMaxPool, min_size=min(output_stride, 2 ** (5 - pooled_from)))
        stem = channels[0]
        self.conv1 = SANStem(OrderedDict(
            conv=nn.Conv2d(in_chans, stem, kernel_size=1, bias=False, **dd),
            norm=norm_layer(stem, **dd),
            act=act_layer(inplace=True),
        ))
        self.bn1 = norm_layer(stem, **dd)
        self.act1 = act_layer(inplace=True)
        self.maxpool = pool() if pooled_from == 0 else nn.Identity()  # of stage 1
        stride, dilation, previous = 1, 1, stem
        self.feature_info = []
        for stage, (dim, depth, kernel_size) in enumerate(zip(channels, layers, kernel_sizes, strict=True)):
            halves = stage >= pooled_from
            if halves and stage > 0 and stride >= output_stride:
                dilation *= 2
                halves = False
            stride *= 2 if halves else 1
            modules: OrderedDict[str, nn.Module] = OrderedDict(
                pool=pool() if halves else nn.Identity(),
                proj=nn.Conv2d(previous, dim, kernel_size=1, bias=False, **dd),
            )
            for number in range(depth):
                modules[f'block{number}'] = block(
                    dim=dim, kernel_size=kernel_size, dilation=dilation, drop_path=rates.pop(0))
            if stage == 0:
                for name, module in modules.items():
                    self.conv1.add_module(name, module)
            else:
                if stage == 1:
                    del modules['pool']  # it is `maxpool`
                modules['norm'] = norm_layer(dim, **dd)
                modules['act'] = act_layer()  # not in place: gradient checkpointing recomputes it on its own
                setattr(self, f'layer{stage}', nn.Sequential(modules))
            self.feature_info.append(
                dict(num_chs=dim, reduction=stride, module=f'layer{stage}' if stage > 0 else 'act1'))
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

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass; those of stage 0, whose maps are largest, one by one as well."""
        super().set_grad_checkpointing(enable)
        for module in self.conv1:
            if isinstance(module, SANBlock):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: the stem with stage 0, then stages (coarse) or blocks."""
        if coarse:
            blocks: Any = r'^layer(\d+)'
        else:
            blocks = [
                (r'^layer(\d+)\.proj', (0,)),
                (r'^layer(\d+)\.block(\d+)', None),
                (r'^layer(\d+)\.norm', (99999,)),
            ]
        return dict(stem=r'^conv1|bn1|maxpool', blocks=blocks)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The authors' files reach the model through loaders that know no filter (timm's load_checkpoint, validate.py).
        if prefix + 'conv_in.weight' in state_dict:
            official = {k[len(prefix):]: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
            state_dict.update({prefix + k: v for k, v in checkpoint_filter_fn(official, self).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


# Where the authors' modules stand in `SAN`; the first pattern that fits the start of a name wins.
_OFFICIAL_PREFIXES = (
    (r'conv_in\.', 'conv1.conv.'),
    (r'bn_in\.', 'conv1.norm.'),
    (r'conv0\.', 'conv1.proj.'),
    (r'layer0\.(\d+)\.', r'conv1.block\1.'),
    (r'bn0\.', 'bn1.'),
    (r'conv([1-4])\.', r'layer\1.proj.'),
    (r'layer([1-4])\.(\d+)\.', r'layer\1.block\2.'),
    (r'bn([1-4])\.', r'layer\1.norm.'),
)
_OFFICIAL_BLOCK_NAMES = {
    'bn1': 'norm1',
    'bn2': 'norm2',
    'sam.conv1': 'attn.query',
    'sam.conv2': 'attn.key',
    'sam.conv3': 'attn.value',
    'sam.conv_p': 'attn.position',
    'sam.conv_w.0': 'attn.norm1',
    'sam.conv_w.2': 'attn.conv1',
    'sam.conv_w.3': 'attn.norm2',
    'sam.conv_w.5': 'attn.conv2',
}


def _our_name(official: str) -> str:
    for pattern, prefix in _OFFICIAL_PREFIXES:
        match = re.match(pattern, official)
        if match:
            path, dot, leaf = official[match.end():].rpartition('.')
            return f'{match.expand(prefix)}{_OFFICIAL_BLOCK_NAMES.get(path, path)}{dot}{leaf}'
    return official


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """State dict of the authors' code under our names; any other state dict as it is.

    Their three projections to query, key and value become one, `qkv`. What does not follow their naming and projections
    that do not fit together are passed on, for the loader to report.

    Args:
        state_dict: State dict with the authors' names (without the prefix `module.` of their training script) or ours.
        model: The model that will load it.

    Returns:
        State dict with the names of `SAN`.
    """
    if 'conv_in.weight' not in state_dict:
        return state_dict
    out = {_our_name(key): tensor for key, tensor in state_dict.items()}
    for name in [name for name in out if '.attn.query.' in name]:
        parts = [name.replace('.query.', f'.{part}.') for part in ('query', 'key', 'value')]
        if len({out[part].shape[1:] if part in out else None for part in parts}) == 1:
            out[name.replace('.query.', '.qkv.')] = torch.cat([out.pop(part) for part in parts])
    return out


# Five pools round down, so that smaller images have no map left.
_COMMON_CFG: dict[str, Any] = dict(
    first_conv='conv1.conv', classifier='fc', min_input_size=(3, 32, 32), paper_ids='arXiv:2004.13621')


def _cfg(**kwargs: Any) -> dict[str, Any]:
    # Preprocessing and licence of the authors' weights.
    return default_cfg(
        interpolation='bilinear', license='mit', origin_url='https://github.com/hszhao/SAN', **_COMMON_CFG, **kwargs)


def _tiny_cfg(name: str) -> dict[str, Any]:
    return cifar100_cfg(name, **_COMMON_CFG)


default_cfgs = zoo_cfgs({
    'san10_pairwise.untrained': _cfg(),
    'san15_pairwise.untrained': _cfg(),
    'san19_pairwise.untrained': _cfg(),
    'san10_patchwise.untrained': _cfg(),
    'san15_patchwise.untrained': _cfg(),
    'san19_patchwise.untrained': _cfg(),
    'san_tiny_pairwise.c100': _tiny_cfg('san_tiny_pairwise.c100'),
    'san_tiny_patchwise.c100': _tiny_cfg('san_tiny_patchwise.c100'),
})


def _create_san(variant: str, pretrained: bool = False, **kwargs: Any) -> SAN:
    return create_from_zoo(
        SAN,
        variant,
        pretrained,
        advice="The authors' own file loads with pretrained_cfg_overlay=dict(file=PATH); "
        '`timm-gsa convert-san` makes a folder for the Hub of it.',
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


@register_model
def san10_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10 with pairwise self-attention."""
    model_args = dict(layers=(2, 1, 2, 4, 1), attn_type='pairwise')
    return _create_san('san10_pairwise', pretrained, **dict(model_args, **kwargs))


@register_model
def san10_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10 with patchwise self-attention."""
    model_args = dict(layers=(2, 1, 2, 4, 1), attn_type='patchwise')
    return _create_san('san10_patchwise', pretrained, **dict(model_args, **kwargs))


@register_model
def san15_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15 with pairwise self-attention."""
    model_args = dict(layers=(3, 2, 3, 5, 2), attn_type='pairwise')
    return _create_san('san15_pairwise', pretrained, **dict(model_args, **kwargs))


@register_model
def san15_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15 with patchwise self-attention."""
    model_args = dict(layers=(3, 2, 3, 5, 2), attn_type='patchwise')
    return _create_san('san15_patchwise', pretrained, **dict(model_args, **kwargs))


@register_model
def san19_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19 with pairwise self-attention."""
    model_args = dict(layers=(3, 3, 4, 6, 3), attn_type='pairwise')
    return _create_san('san19_pairwise', pretrained, **dict(model_args, **kwargs))


@register_model
def san19_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19 with patchwise self-attention."""
    model_args = dict(layers=(3, 3, 4, 6, 3), attn_type='patchwise')
    return _create_san('san19_patchwise', pretrained, **dict(model_args, **kwargs))


_TINY = dict(layers=(1, 1, 2, 1, 1), channels=(32, 64, 128, 256, 512), kernel_sizes=(3, 3, 3, 3, 3))


@register_model
def san_tiny_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """A SAN with pairwise self-attention small enough to train on a CPU, for 64 px images; not from the paper."""
    model_args = dict(_TINY, attn_type='pairwise')
    return _create_san('san_tiny_pairwise', pretrained, **dict(model_args, **kwargs))


@register_model
def san_tiny_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """A SAN with patchwise self-attention small enough to train on a CPU, for 64 px images; not from the paper."""
    model_args = dict(_TINY, attn_type='patchwise')
    return _create_san('san_tiny_patchwise', pretrained, **dict(model_args, **kwargs))

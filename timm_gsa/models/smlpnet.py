"""sMLPNet: depthwise convolutions and sparse MLPs over rows and columns, without attention.

Paper: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", AAAI 2022,
https://arxiv.org/abs/2109.05422, official code https://github.com/microsoft/SPACH (MIT licence).

Verified against the authors' code in float64: whole networks, outputs, gradients and running statistics; all three
parameter counts and costs; the names in their state dicts. Their checkpoints load under their own names; no released
file was at hand to try. Our choice: images of other sizes and aspect ratios (the authors' networks take one square
size), and `smlpnet_mini`. Mixing has a matrix for each size of map, so that there is no `output_stride`.
"""
import argparse
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerType,
    Mlp,
    create_classifier,
    get_act_layer,
    get_norm_layer,
    to_2tuple,
)
from timm.models import register_model
from timm.models._builder import _resolve_pretrained_source, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq

from ..layers import DepthwiseBlock, SparseMLP
from ..ops._backend import statically_true
from ..ops.pooling import check_map
from ._weights import read_checkpoint
from ._zoo import cifar100_cfg, create_from_zoo, default_cfg, zoo_cfgs

__all__ = ['SMLPBlock', 'SMLPNet', 'checkpoint_filter_fn']

_STRIDES = (4, 8, 16, 32)  # of the maps of the four stages


class SMLPBlock(nn.Module):
    """Token mixing and channel mixing, each a residual branch.

    x = x + drop_path(mix(conv(x)));  x = x + drop_path(mlp(norm(x)))

    Args:
        dim: Channels C.
        feat_size: Height and width of the map.
        mlp_ratio: Hidden channels of the channel MLP, as a multiple of C.
        act_layer: Activation layer.
        norm_layer: Norm layer of token mixing; that of channel mixing is a LayerNorm over channels.
        drop_path: Rate of stochastic depth of both branches, drawn for each by itself.
    """

    def __init__(
            self,
            dim: int,
            feat_size: tuple[int, int],
            mlp_ratio: float = 3.,
            act_layer: LayerType = nn.GELU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = DepthwiseBlock(dim, act_layer=act_layer, norm_layer=norm_layer, **dd)
        self.mix = SparseMLP(dim, feat_size, act_layer=act_layer, norm_layer=norm_layer, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=get_act_layer(act_layer), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.mix(self.conv(x)))
        pixels = self.mlp(self.norm(x.permute(0, 2, 3, 1)))
        return x + self.drop_path2(pixels.permute(0, 3, 1, 2))


def _check_map(x: torch.Tensor, conv: nn.Conv2d) -> None:
    """Name what is wrong with a map that `conv` would take as it is, or refuse without the size of images."""
    if statically_true(x.dim() == 3):
        raise ValueError('expected 4D input (got 3D input)')
    if statically_true(x.dim() == 4) and statically_true(x.shape[1] == conv.in_channels):
        check_map(x, conv.kernel_size[0], _STRIDES[-1])


class SMLPStage(nn.Module):
    """Patches to pixels by a strided convolution without bias or norm, then blocks."""

    def __init__(self, downsample: nn.Conv2d, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            _check_map(x, self.downsample)
        # Channels innermost from here on, whatever the image's layout: products over channels then copy nothing.
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SMLPNet(nn.Module):
    """Network of four stages at strides 4, 8, 16, 32, with C, 2C, 4C, 8C channels.

    The parameters depend on `img_size`, which may be any, square or not; sides are rounded down to multiples of the
    strides. An image of another size runs too, with the axial matrices resampled to it, and so loads a state dict of
    another size: a start for training at that size rather than a trained network. `forward_features` ends with the
    norm; the maps of `forward_intermediates` are those before it, unless `norm` is set.

    Args:
        depths: Blocks of the four stages.
        dim: Channels C of the first stage.
        mlp_ratio: Hidden channels of the channel MLPs, as a multiple of the stage's channels.
        img_size: Side, or height and width, of the images the network is built for, at least 32.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the image.
        output_stride: 32, the only stride there is.
        global_pool: Type of global pooling.
        act_layer: Activation layer; the authors' is the exact GELU.
        norm_layer: Norm layer of token mixing and at the end.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this rate at the last.

    Raises:
        ValueError: `output_stride` is not 32, `img_size` is smaller than 32, or `depths` has not four numbers.
    """

    def __init__(
            self,
            depths: tuple[int, ...],
            dim: int,
            mlp_ratio: float = 3.,
            img_size: int | tuple[int, int] = 224,
            num_classes: int = 1000,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            act_layer: LayerType = nn.GELU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        height, width = to_2tuple(img_size)
        if len(depths) != len(_STRIDES):
            raise ValueError(f'depths must have one number for each of the 4 stages, got {tuple(depths)}')
        if min(height, width) < _STRIDES[-1]:
            raise ValueError(f'img_size must be at least {_STRIDES[-1]}, got {img_size}')
        if output_stride != _STRIDES[-1]:
            raise ValueError(
                f'output_stride must be 32, got {output_stride}: '
                'the mixing matrices of a stage belong to the positions of its map'
            )
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        rates = [drop_path_rate * block / max(sum(depths) - 1, 1) for block in range(sum(depths))]
        self.feature_info = [
            dict(num_chs=dim * stride // _STRIDES[0], reduction=stride, module=f'stages.{stage}')
            for stage, stride in enumerate(_STRIDES)
        ]
        stages: list[nn.Module] = []
        previous, channels, kernel = in_chans, dim, _STRIDES[0]
        for depth, stride in zip(depths, _STRIDES, strict=True):
            blocks: list[nn.Module] = [
                SMLPBlock(
                    channels,
                    (height // stride, width // stride),
                    mlp_ratio=mlp_ratio,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    drop_path=rates.pop(0),
                    **dd,
                )
                for _ in range(depth)
            ]
            downsample = nn.Conv2d(previous, channels, kernel_size=kernel, stride=kernel, bias=False, **dd)
            stages.append(SMLPStage(downsample, blocks))
            previous, channels, kernel = channels, 2 * channels, 2
        self.stages = nn.Sequential(*stages)
        self.num_features = previous
        self.norm: nn.Module = get_norm_layer(norm_layer)(previous, **dd)
        pool, self.fc = create_classifier(previous, num_classes, pool_type=global_pool, **dd)
        self.global_pool = pool
        self.head_hidden_size = self.num_features * pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every module as PyTorch does by default: what the authors trained from."""
        for module in self.modules():
            reset = getattr(module, 'reset_parameters', None)
            if reset is not None:
                reset()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing: the authors decay all matrices, those of axial mixing too."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: the patches of the image, then stages (coarse) or blocks."""
        blocks: list[tuple[str, tuple[int] | None]] = [
            (r'^stages\.(\d+)\.downsample', (0,)),
            (r'^stages\.(\d+)\.blocks\.(\d+)', None),
        ]
        if coarse:
            blocks = [(r'^stages\.(\d+)', None)]
        return dict(stem=r'^stages\.0\.downsample', blocks=[*blocks, (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks one by one in the backward pass."""
        for stage in self.stages:
            assert isinstance(stage, SMLPStage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """Classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: Type of global pooling; the present one where None.
        """
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        like = next(self.parameters())
        pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=like.device, dtype=like.dtype)
        self.global_pool = pool
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features and the maps of stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages by number, 0 to 3 or negative; the last n for a number n; all where None.
            norm: Let the norm act on the map of the last stage.
            stop_early: Run no stage after the last one asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return the maps alone.

        Returns:
            The features (those of the last stage that ran, after the norm if it is the last of the network) and the
            maps, or the maps alone.

        Raises:
            ValueError: `output_fmt` is another one.
            AssertionError: There is no such stage.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        maps = []
        for number, stage in enumerate(self.stages[:last_taken + 1] if stop_early else self.stages):
            x = stage(x)
            if number in taken:
                maps.append(self.norm(x) if norm and number == last else x)
        if intermediates_only:
            return maps
        if last_taken == last or not stop_early:
            x = self.norm(x)
        return x, maps

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps asked for do not need.

        Args:
            indices: Stages by number, 0 to 3 or negative, or the last n for a number n.
            prune_norm: Remove the norm, too; it goes with the last stage in any case.
            prune_head: Remove the classifier, too; it goes with the last stage in any case.

        Returns:
            Numbers of the stages asked for.
        """
        taken, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened:
            self.stages = self.stages[:last + 1]
            self.num_features = self.feature_info[last]['num_chs']
        if shortened or prune_head:
            self.reset_classifier(0, '')
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map of the last stage after the norm, (B, num_features, H / 32, W / 32)."""
        return self.norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of a map of features, or with `pre_logits` what the classifier would take."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The authors' state dicts reach the model through loaders that know no filter, too.
        if prefix + _OFFICIAL_FIRST in state_dict:
            official = {k[len(prefix):]: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
            state_dict.update({prefix + k: v for k, v in checkpoint_filter_fn(official, self).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


# The authors' files

_OFFICIAL_FIRST = 'to_patch_embedding.0.0.weight'

# Where the authors' modules stand in a block of ours. `proj_h` mixes horizontally and `proh_w` vertically.
_OFFICIAL_BLOCK_NAMES = {
    'token_mix.0.conv_merge.BN': 'conv.norm',
    'token_mix.0.conv_merge.Conv': 'conv.conv',
    'token_mix.1.BN': 'mix.norm',
    'token_mix.1.proj_h': 'mix.width',
    'token_mix.1.proh_w': 'mix.height',
    'token_mix.1.fuse': 'mix.fuse',
    'channel_mix.1': 'norm',
    'channel_mix.2.net.0': 'mlp.fc1',
    'channel_mix.2.net.3': 'mlp.fc2',
}
_OFFICIAL_NAMES = {
    **{f'to_patch_embedding.{stage}.0': f'stages.{stage}.downsample' for stage in range(4)},
    'batch_norm': 'norm',
    'mlp_head.0': 'fc',
}


def _our_name(official: str, depths: list[int]) -> str:
    """Name in `SMLPNet` of what the authors call `official`; the same name where they have no such module."""
    path, _, leaf = official.rpartition('.')
    match = re.fullmatch(r'(token_mix|channel_mix)\.(\d+)\.(.+)', path)
    if match is None:
        return f'{_OFFICIAL_NAMES[path]}.{leaf}' if path in _OFFICIAL_NAMES else official
    name, block = _OFFICIAL_BLOCK_NAMES.get(f'{match[1]}.{match[3]}'), int(match[2])  # blocks of all stages in a row
    for stage, depth in enumerate(depths):
        if block < depth and name is not None:
            return f'stages.{stage}.blocks.{block}.{name}.{leaf}'
        block -= depth
    return official


def depths_of(model: SMLPNet) -> list[int]:
    """Blocks of each stage."""
    return [len(stage.blocks) for stage in model.stages if isinstance(stage, SMLPStage)]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """State dict of the authors' code under our names; any other state dict as it is.

    What does not follow their naming is passed on, for the loader to report. Matrices for another size of image are
    passed on, too; they are resampled when they are loaded.

    Args:
        state_dict: State dict with the authors' names or ours.
        model: The model that will load it.

    Returns:
        State dict with the names of `SMLPNet`.
    """
    if _OFFICIAL_FIRST not in state_dict:
        return state_dict
    assert isinstance(model, SMLPNet)
    depths = depths_of(model)
    out = {}
    for official, tensor in state_dict.items():
        name = _our_name(official, depths)
        if re.search(r'\.mix\.(width|height)\.weight$', name) and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # a 1 x 1 convolution over positions
        out[name] = tensor
    return out


def read_official(path: str | Path) -> dict[str, Any] | None:
    """State dict `model` of a checkpoint as the authors' training script writes it.

    Such a file also holds the script's arguments, an argparse.Namespace. That class and tensors are allowed; a pickle
    that asks for anything else is refused, and none of its code runs.

    Args:
        path: A file of torch.save.

    Returns:
        The state dict of the network that was trained and evaluated, not that of its moving average; None where the
        file holds no dict with the key `model`.

    Raises:
        RuntimeError: The pickle asks for another class, which the message names, or the file is no checkpoint.
    """
    try:
        loaded = read_checkpoint(Path(path), (argparse.Namespace,))
    except RuntimeError as error:
        raise RuntimeError(f'{path}: {error}') from error
    state = loaded.get('model') if isinstance(loaded, dict) else None
    return state if isinstance(state, dict) else None


_COMMON_CFG: dict[str, Any] = dict(
    first_conv='stages.0.downsample', classifier='fc', min_input_size=(3, 32, 32), paper_ids='arXiv:2109.05422')


def _cfg() -> dict[str, Any]:
    return default_cfg(license='mit', origin_url='https://github.com/microsoft/SPACH', **_COMMON_CFG)


default_cfgs = zoo_cfgs({
    'smlpnet_tiny.untrained': _cfg(),
    'smlpnet_small.untrained': _cfg(),
    'smlpnet_base.untrained': _cfg(),
    'smlpnet_mini.c100': cifar100_cfg('smlpnet_mini.c100', **_COMMON_CFG),
})


def _create_smlpnet(variant: str, pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    feature_cfg = dict(dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs.pop('feature_cfg', {}))
    state = _state_of_authors(variant, **kwargs) if pretrained else None
    if state is not None:
        kwargs['pretrained_cfg_overlay'] = {**(kwargs.get('pretrained_cfg_overlay') or {}), 'state_dict': state}
    model = create_from_zoo(
        SMLPNet,
        variant,
        pretrained,
        advice="The authors' own file loads with pretrained_cfg_overlay=dict(file=PATH); "
        '`timm-gsa convert-smlpnet` makes a folder for the Hub of it.',
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    if state is not None:
        for module in model.modules():  # the network, and with features_only what is around it
            getattr(module, 'pretrained_cfg', {}).pop('state_dict', None)
    return model


def _state_of_authors(
        variant: str,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **_: Any,
) -> dict[str, Any] | None:
    """State dict of a file in the authors' form, where weights come from one; timm would take the moving average."""
    cfg = resolve_pretrained_cfg(
        variant, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)
    source, path = _resolve_pretrained_source(vars(cfg))
    if source != 'file' or str(path).endswith('.safetensors') or not Path(str(path)).is_file():
        return None
    return read_official(str(path))


@register_model
def smlpnet_tiny(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """sMLPNet-T."""
    model_args = dict(dim=80, depths=(2, 8, 14, 2))
    return _create_smlpnet('smlpnet_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def smlpnet_small(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """sMLPNet-S."""
    model_args = dict(dim=96, depths=(2, 10, 24, 2), drop_path_rate=0.2)
    return _create_smlpnet('smlpnet_small', pretrained, **dict(model_args, **kwargs))


@register_model
def smlpnet_base(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """sMLPNet-B."""
    model_args = dict(dim=112, depths=(2, 10, 24, 2), drop_path_rate=0.3)
    return _create_smlpnet('smlpnet_base', pretrained, **dict(model_args, **kwargs))


@register_model
def smlpnet_mini(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """An sMLPNet small enough to train on a CPU, for 64 px images; not from the paper, whose smallest is tiny."""
    model_args = dict(dim=24, depths=(2, 3, 6, 1), img_size=64)
    return _create_smlpnet('smlpnet_mini', pretrained, **dict(model_args, **kwargs))

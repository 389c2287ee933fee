"""Shared by the model files: pretrained configs, and building a model from them."""
from importlib.resources import files
from typing import Any, TypeVar

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._builder import _resolve_pretrained_source, resolve_pretrained_cfg

from ._cifar100 import CIFAR100_LABELS, CIFAR100_MEAN, CIFAR100_STD
from ._tiny_imagenet import TINY_IMAGENET_LABELS, TINY_IMAGENET_WNIDS
from ._weights import checked, fetch_weights, hub_id

__all__ = [
    'SMALL_STEM',
    'SMALL_STEM_SIZE',
    'check_stem',
    'cifar100_cfg',
    'create_from_zoo',
    'default_cfg',
    'entries',
    'tiny_imagenet_cfg',
    'zoo_cfgs',
]

SMALL_STEM = 'small'  # `stem_type` without the first two downsamplings
SMALL_STEM_SIZE = 32  # side of the images that it is made for, in pixels

ModelT = TypeVar('ModelT', bound=nn.Module)

_PRETRAINED: list[str] = []


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """Pretrained config of an ImageNet-1k model at 224 px and stride 32, updated by `kwargs`.

    A family adds what depends on its network: `first_conv` and `classifier`, and its paper.
    """
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'license': 'apache-2.0',
        **kwargs,
    }


def _packaged_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """Pretrained config of the entry `name` (arch.tag), trained at 64 px, with weights in the package.

    timm loads the file. `pretrained_cfg_overlay=dict(file=None)` makes it load the same bytes from the Hub.
    """
    return default_cfg(
        file=str(files('timm_gsa') / 'weights' / f'{name}.safetensors'), hf_hub_id=hub_id(name),
        input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0,
        **kwargs,
    )


def cifar100_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """Pretrained config of an entry trained on CIFAR-100, with weights in the package."""
    return _packaged_cfg(
        name, num_classes=100, label_names=CIFAR100_LABELS, interpolation='bilinear',
        mean=CIFAR100_MEAN, std=CIFAR100_STD,
        **kwargs,
    )


def tiny_imagenet_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """Pretrained config of an entry trained on Tiny ImageNet, with weights in the package."""
    named = zip(TINY_IMAGENET_LABELS, TINY_IMAGENET_WNIDS, strict=True)
    return _packaged_cfg(
        name, num_classes=200, label_names=TINY_IMAGENET_LABELS,
        label_descriptions={label: f'{label}, WordNet {wnid}' for label, wnid in named},
        **kwargs,
    )


def check_stem(stem_type: str, output_stride: int, stem_types: tuple[str, ...]) -> None:
    """Check the stem and output stride of a model.

    Raises:
        ValueError: The family has no such stem, or the stem does not allow the output stride.
    """
    if stem_type not in stem_types:
        raise ValueError(f'stem_type must be one of {", ".join(map(repr, stem_types))}, got {stem_type!r}')
    strides = (2, 4, 8, 16, 32) if stem_type == SMALL_STEM else (8, 16, 32)
    if output_stride not in strides:
        allowed = f'{", ".join(map(str, strides[:-1]))} or {strides[-1]}'
        raise ValueError(f'output_stride must be {allowed}, got {output_stride}')


def zoo_cfgs(cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Registry form of {'arch.tag': config}; remembers which entries have weights.

    An asterisk after a tag makes it the config of the bare name, as timm has it.
    """
    _PRETRAINED.extend(name for name, cfg in cfgs.items() if cfg.get('file') or cfg.get('hf_hub_id'))
    return generate_default_cfgs(cfgs)


def entries(variant: str = '') -> list[str]:
    """Names (arch.tag) of the entries with weights, of all architectures or of one, best first."""
    return [name for name in _PRETRAINED if name.startswith(f'{variant}.' if variant else '')]


def create_from_zoo(
        model_cls: type[ModelT],
        variant: str,
        pretrained: bool = False,
        advice: str = 'Use pretrained=False for random initialisation.',
        sized: bool = False,
        **kwargs: Any,
) -> ModelT:
    """timm's `build_model_with_cfg` with checked weights.

    Without weights, an architecture of a paper is built as in the paper: 1,000 classes and 224 px. If `pretrained` is
    set and neither a tag nor a file is given, the architecture's first entry is taken, with its classes and size.

    Args:
        model_cls: Class of the model.
        variant: Registered name of the architecture.
        pretrained: Load the weights of its pretrained config.
        advice: Last sentence of the error message for a model without weights.
        sized: Pass the input size of the pretrained config as `img_size`, where the caller gives none.
        **kwargs: Passed on to timm.

    Raises:
        RuntimeError: `pretrained` is set and the config names no weights (the message lists entries that have some), or
            the weights are damaged or do not fit.
        huggingface_hub.errors.HfHubHTTPError, LocalEntryNotFoundError: The Hub does not have them, or is offline.
    """
    def resolved() -> Any:
        return resolve_pretrained_cfg(
            variant,
            pretrained_cfg=kwargs.get('pretrained_cfg'),
            pretrained_cfg_overlay=kwargs.get('pretrained_cfg_overlay'),
        )

    if pretrained:
        cfg = resolved()
        load_from, _ = _resolve_pretrained_source(vars(cfg))
        if not load_from and kwargs.get('pretrained_cfg') is None and entries(variant):
            kwargs['pretrained_cfg'] = entries(variant)[0].partition('.')[2]
            cfg = resolved()
            load_from, _ = _resolve_pretrained_source(vars(cfg))
        if not load_from:
            raise RuntimeError(
                f'No pretrained weights are published for {variant}; '
                f'timm_gsa has weights for {", ".join(sorted(entries()))}. {advice}'
            )
        if load_from == 'hf-hub':
            checked_id = fetch_weights(cfg.hf_hub_id, variant, cfg.hf_hub_filename, kwargs.get('cache_dir'))
            # timm resolves the file again. The commit makes it take the checked one, whatever the Hub has by then.
            kwargs['pretrained_cfg_overlay'] = {**(kwargs.get('pretrained_cfg_overlay') or {}), 'hf_hub_id': checked_id}
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    registered = resolve_pretrained_cfg(variant, pretrained_cfg=kwargs.get('pretrained_cfg'))
    if kwargs.get('stem_type') == SMALL_STEM and not registered.has_weights:
        # Without weights the config says which image size the network is made for, and that depends on the stem.
        size = dict(input_size=(3, SMALL_STEM_SIZE, SMALL_STEM_SIZE), pool_size=(SMALL_STEM_SIZE // 8,) * 2)
        kwargs['pretrained_cfg_overlay'] = {**size, **overlay}
    if sized:
        kwargs.setdefault('img_size', resolved().input_size[1:])
    filter_fn = checked(kwargs.pop('pretrained_filter_fn', None))
    return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)

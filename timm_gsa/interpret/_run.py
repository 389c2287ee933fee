"""Runs a model and reads its attention layers on the way.

Everything is read out of an ordinary forward pass by hooks that are gone afterwards; nothing in the models knows of it.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from . import _condenser, _global_self_attention, _prior_attention, _san, _sparse_mlp
from ._reader import Reader

__all__ = ['attention_layers', 'cells_of', 'reader_of', 'run', 'unwrapped']

_READERS: tuple[Reader, ...] = (
    _global_self_attention.READER,
    _san.READER,
    _prior_attention.READER,
    _sparse_mlp.READER,
    _condenser.BLOCK_READER,
    _condenser.LAYER_READER,
)


def reader_of(module: nn.Module) -> Reader | None:
    """Reader of a module; None if the module is no attention layer."""
    for reader in _READERS:
        if type(module) in reader.layers and reader.has_attention(module):
            return reader
    return None


def cells_of(
        points: Sequence[tuple[float, float]] | torch.Tensor | None,
        images: torch.Tensor,
) -> Callable[[tuple[int, int]], torch.Tensor]:
    """Function from the size of a map to the row and column (P, 2) that covers each of the points."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            'images must be a floating point batch (B, channels, height, width), '
            f'got {images.dtype} of shape {list(images.shape)}'
        )
    height, width = images.shape[-2:]
    if points is None:
        points = [(width / 2, height / 2)]
    at = torch.as_tensor(points, dtype=torch.float64, device='cpu')
    if at.dim() != 2 or at.shape[0] == 0 or at.shape[1] != 2:
        raise ValueError(f'points must be pairs (x, y), got {points}')
    size = torch.tensor([width, height])
    if not ((at >= 0) & (at < size)).all():  # false for NaN
        raise ValueError(f'points must lie in 0 <= x < {width} and 0 <= y < {height}, got {at.tolist()}')

    def cells(feat_size: tuple[int, int]) -> torch.Tensor:
        return (at * torch.tensor(feat_size[::-1]) / size).long().flip(-1)

    return cells


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of compilers and of data parallelism."""
    while True:
        if '_orig_mod' in model._modules:  # compiled
            model = model.get_submodule('_orig_mod')
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def attention_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Attention layers to read, by the names they have without the compiler's wrappers.

    Args:
        model: Model in eval mode.
        names: Names of layers, or of modules that contain some; all where None.

    Raises:
        ValueError: A module is in training mode, the model has no attention layer, or a name is none of its layers.
    """
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f'model must be in eval mode, but {name or type(model).__name__} is in training mode: call model.eval()'
            )
    layers = {
        name.replace('_orig_mod.', ''): module
        for name, module in model.named_modules() if reader_of(module) is not None
    }
    if not layers:
        raise ValueError(
            f'model must contain attention layers of timm_gsa.layers, got a {type(model).__name__} with none '
            '(scripted, traced and exported programs keep none)'
        )
    if names is None:
        return layers
    names = [names] if isinstance(names, str) else list(names)
    for chosen in names:
        if not any(f'{name}.'.startswith(f'{chosen}.') for name in layers):
            raise ValueError(f'layers must be of {", ".join(layers)}, or contain some of them; got {chosen!r}')
    return {
        name: layer for name, layer in layers.items()
        if any(f'{name}.'.startswith(f'{chosen}.') for chosen in names)
    }


def run(
        model: nn.Module,
        images: torch.Tensor,
        modules: Mapping[str, nn.Module],
        read: Callable[[str, nn.Module, torch.Tensor, torch.Tensor], Any],
) -> dict[str, Any]:
    """Results of `read` from name, module, input and output of each module, in the order in which the modules run.

    Raises:
        RuntimeError: An attention layer among the modules did not run.
    """
    results: dict[str, Any] = {}

    def hook(name: str, module: nn.Module) -> RemovableHandle:
        def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            results[name] = read(name, module, args[0], output)
        return module.register_forward_hook(forward)

    handles = [hook(name, module) for name, module in modules.items()]
    try:
        with _eager(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, module in modules.items() if reader_of(module) is not None and name not in results]
    if missing:
        raise RuntimeError(f'{", ".join(missing)} did not run when the model was called')
    return results


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled parts run uncompiled, as compiled code does not see new hooks."""
    compiled = any(m._compiled_call_impl is not None or '_orig_mod' in m._modules for m in model.modules())
    if compiled and hasattr(torch.compiler, 'set_stance'):  # torch 2.6
        return torch.compiler.set_stance('force_eager')
    return nullcontext()

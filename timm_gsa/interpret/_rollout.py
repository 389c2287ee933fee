"""Attention rollout: how far positions reach through all layers of a network."""
from collections.abc import Callable, Sequence
from itertools import dropwhile
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._reader import transposed, wide
from ._run import attention_layers, cells_of, reader_of, run, unwrapped

__all__ = ['NoRolloutError', 'attention_rollout']


class NoRolloutError(ValueError):
    """Something other than attention mixes positions between the attention layers of a model."""


class _Step(NamedTuple):
    """One layer of a rollout; `back` takes shares (B, P, h, w) of its output to the positions it attended to."""

    feat_size: tuple[int, int]
    out_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    back: Callable[[torch.Tensor], torch.Tensor]


def attention_rollout(
        model: nn.Module,
        images: torch.Tensor,
        points: Sequence[tuple[float, float]] | torch.Tensor | None = None,
) -> torch.Tensor:
    """How far positions of the first attention layer's input reach chosen positions of the last, through all layers.

    Attention rollout (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers"): the product over the
    layers of (A + I) / 2, where A holds the weights of one layer with rows that sum to 1 and I is its shortcut. Our
    choice, as the paper has transformers: A is the mean over heads or weight groups of absolute weights (of GSA those
    of content and position together, with the mean factor of the norm between); a position of a halved map stands for
    those it covers, in equal parts.

    It ignores what the layers do to channels and reads best for pairwise SAN, whose weights are positive and sum to 1.
    It describes only networks whose positions meet in attention alone, and so not prior attention, where a convolution
    stands beside it.

    Args:
        model: As for `attention_maps`.
        images: As for `attention_maps`.
        points: Positions (x, y) in pixels of `images`. Where None, the mean over all positions, which is what the
            pooled features of a classifier come from.

    Returns:
        Tensor of shape (B, P, H, W), P = 1 where `points` is None, over the map that the first attention layer
        attends to. Non-negative, and sums to 1 over the map.

    Raises:
        NoRolloutError: Something other than attention mixes positions between the model's layers (a ValueError).
        ValueError: As for `attention_maps`.
        RuntimeError: A layer did not run.
    """
    model = unwrapped(model)
    cells = None if points is None else cells_of(points, images)
    with torch.inference_mode(False), torch.no_grad():
        convs = {
            name: module for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        }
        results = run(model, images, attention_layers(model) | convs, _step)
        steps: list[_Step] = []
        for name, step in dropwhile(lambda item: item[1] is None, results.items()):  # behind the stem
            if step is None:
                raise NoRolloutError(
                    f'model must mix positions by attention alone for a rollout, but {name} is a convolution'
                )
            steps.append(step)
        last = steps[-1]
        share = _first_share(images, None if cells is None else cells(last.out_size), last)
        for step in reversed(steps):
            share = _spread(share, step.out_size)
            share = (step.back(share) + _spread(share, step.feat_size)) / 2
        return share


def _first_share(images: torch.Tensor, cells: torch.Tensor | None, last: _Step) -> torch.Tensor:
    """Shares (B, P, h, w) of the last layer's positions: all of one cell, or equal ones where there are no cells."""
    area = last.out_size[0] * last.out_size[1]
    if cells is None:
        share = images.new_full((1, area), 1 / area)
    else:
        share = F.one_hot(cells[:, 0] * last.out_size[1] + cells[:, 1], area)
    share = share.to(device=last.device, dtype=last.dtype)
    return share.expand(images.shape[0], -1, -1).unflatten(2, last.out_size)


def _step(name: str, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> _Step | None:
    """The layer's step; None for a convolution."""
    reader = reader_of(layer)
    if reader is None:
        return None
    share_back = reader.share_back
    if isinstance(share_back, str):
        raise NoRolloutError(
            f'model must mix positions by attention alone for a rollout, but layer {name} {share_back}')
    return _Step(
        (x.shape[-2], x.shape[-1]), (output.shape[-2], output.shape[-1]), x.device, wide(x).dtype,
        lambda share: share_back(name, layer, x, share),
    )


def _spread(share: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Shares of the positions of a map, handed on in equal parts to those of the larger map it was pooled from."""
    if share.shape[-2:] == size:
        return share
    out_size = (share.shape[-2], share.shape[-1])
    return transposed(lambda value: F.adaptive_avg_pool2d(value, out_size), share, size)

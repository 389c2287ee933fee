"""Parameters and multiply-adds of a model, counted without running it."""
from __future__ import annotations

from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode


def parameters_and_multiply_adds(name: str, **kwargs: Any) -> tuple[int, int]:
    """Count a registered model at the input size of its pretrained config.

    Multiply-adds are those of convolutions, matrix products and SAN's aggregation; norms, activations, pooling,
    softmax and subtractions count nothing, as in the papers.

    Args:
        name: Name of the model for `timm.create_model`.
        **kwargs: Arguments of the model.

    Returns:
        Number of parameters and of multiply-adds for one image.
    """
    model = timm.create_model(name, device='meta', **kwargs).eval()
    image = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2

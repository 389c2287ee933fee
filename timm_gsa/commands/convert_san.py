"""Turn a checkpoint of the SAN authors' training script into a folder that timm loads and the Hub takes.

example:
  timm-gsa convert-san model_best.pth --model san10_pairwise --out san10_pairwise.in1k --verify

It writes model.safetensors, the weights under our names, and config.json into a new folder, which
timm.create_model('local-dir:san10_pairwise.in1k', pretrained=True) loads. No code of the checkpoint's pickle is run.
The checkpoint must hold exactly the network's tensors. If anything is wrong, nothing is left behind.
The exit status is 1 if the checkpoint could not be converted.
"""
import argparse

import torch
import torch.nn as nn

from ..models import san
from . import _convert


def official_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the authors' state dict of a network holds: tensors of `model` under their names."""
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, san.SANBlock)]
    modules = ['conv_in', 'bn_in', 'fc']
    for stage in range(5):
        modules += [f'conv{stage}', f'bn{stage}']
        modules += [
            f'layer{stage}.{block}.{part}'
            for block in range(len(blocks)) for part in (*san._OFFICIAL_BLOCK_NAMES, 'conv')]
    ours = model.state_dict()
    for name, block in blocks:
        sizes = [block.attn.dim_key, block.attn.dim_key, block.attn.dim_out]
        for leaf in ('weight', 'bias'):
            parts = ours.pop(f'{name}.attn.qkv.{leaf}').split(sizes)
            ours.update({
                f'{name}.attn.{part}.{leaf}': tensor
                for part, tensor in zip(('query', 'key', 'value'), parts, strict=True)
            })
    return _convert.under_their_names(ours, modules, san._our_name)


AUTHORS = _convert.Authors(
    models=tuple(f'san{depth}_{kind}' for depth in (10, 15, 19) for kind in ('pairwise', 'patchwise')),
    file='model_best.pth',
    key='state_dict',
    tensors=official_tensors,
    filter_fn=san.checkpoint_filter_fn,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    _convert.add_arguments(parser, AUTHORS)


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; returns 1 if it could not be."""
    return _convert.run(args, AUTHORS)

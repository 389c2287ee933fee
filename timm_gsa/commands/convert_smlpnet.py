"""Turn a checkpoint of the sMLPNet authors' training script into a folder that timm loads and the Hub takes.

example:
  timm-gsa convert-smlpnet smlp_s.pth --model smlpnet_small --out smlpnet_small.in1k --verify

It writes model.safetensors, the weights under our names, and config.json into a new folder, which
timm.create_model('local-dir:smlpnet_small.in1k', pretrained=True) loads. Of the checkpoint it takes what the authors
evaluate, the state dict `model`, not the moving average. No code of its pickle is run: beside tensors it may hold an
argparse.Namespace, the arguments of their script, and nothing else. The checkpoint must hold exactly the network's
tensors. If anything is wrong, nothing is left behind. The exit status is 1 if the checkpoint could not be converted.
"""
import argparse
from functools import partial

import torch
import torch.nn as nn

from ..models import smlpnet
from . import _convert


def official_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the authors' state dict of a network holds: tensors of `model` under their names and in their shapes."""
    assert isinstance(model, smlpnet.SMLPNet)
    depths = smlpnet.depths_of(model)
    kinds = [part.split('.', 1) for part in smlpnet._OFFICIAL_BLOCK_NAMES]
    modules = [*smlpnet._OFFICIAL_NAMES, *(f'{kind}.{n}.{part}' for n in range(sum(depths)) for kind, part in kinds)]
    tensors = _convert.under_their_names(model.state_dict(), modules, partial(smlpnet._our_name, depths=depths))
    return {
        name: tensor[..., None, None] if name.endswith(('proj_h.weight', 'proh_w.weight')) else tensor
        for name, tensor in tensors.items()
    }


AUTHORS = _convert.Authors(
    models=('smlpnet_tiny', 'smlpnet_small', 'smlpnet_base'),
    file='smlp_s.pth',
    key='model',
    tensors=official_tensors,
    filter_fn=smlpnet.checkpoint_filter_fn,
    allowed=(argparse.Namespace,),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    _convert.add_arguments(parser, AUTHORS)


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; returns 1 if it could not be."""
    return _convert.run(args, AUTHORS)

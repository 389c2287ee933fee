"""Turn a checkpoint of the SAN authors' training script into a folder that timm loads and the Hub takes.

example:
  timm-gsa convert-san model_best.pth --model san10_pairwise --out san10_pairwise.in1k --verify

It writes model.safetensors, the weights under our names, and config.json into a new folder, which
timm.create_model('local-dir:san10_pairwise.in1k', pretrained=True) loads. No code of the checkpoint's pickle is run.
The checkpoint must hold exactly the network's tensors. If anything is wrong, nothing is left behind.
The exit status is 1 if the checkpoint could not be converted.
"""
import argparse
import hashlib
import json
import os
import pickle
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from ..models._weights import WEIGHTS_NAME
from ..models.san import _OFFICIAL_BLOCK_NAMES, SANBlock, _our_name, checkpoint_filter_fn
from ._files import hub_config

# The networks that the authors trained.
MODELS = tuple(f'san{depth}_{kind}' for depth in (10, 15, 19) for kind in ('pairwise', 'patchwise'))
TAG = 'in1k'
LISTED = 20  # names of each kind of problem


class ConversionError(Exception):
    """Reason why a conversion failed, for the user."""


def official_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of `model` under the names of the authors' state dict."""
    ours = dict(model.state_dict())
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, SANBlock)]
    for name, block in blocks:
        sizes = [block.attn.dim_key, block.attn.dim_key, block.attn.dim_out]
        for leaf in ('weight', 'bias'):
            parts = ours.pop(f'{name}.attn.qkv.{leaf}').split(sizes)
            ours.update({
                f'{name}.attn.{part}.{leaf}': tensor
                for part, tensor in zip(('query', 'key', 'value'), parts, strict=True)
            })
    modules = ['conv_in', 'bn_in', 'fc']
    for stage in range(5):
        modules += [f'conv{stage}', f'bn{stage}']
        modules += [
            f'layer{stage}.{block}.{part}' for block in range(len(blocks)) for part in (*_OFFICIAL_BLOCK_NAMES, 'conv')]
    leaves = dict.fromkeys(name.rpartition('.')[2] for name in ours)
    names = [f'{module}.{leaf}' for module in modules for leaf in leaves]
    return {name: ours[_our_name(name)] for name in names if _our_name(name) in ours}


def read(path: Path) -> dict[str, Any]:
    """State dict of a checkpoint, without the prefix of the authors' wrapper.

    Raises:
        ConversionError: There is no such file, it is no checkpoint, or its pickle asks for more than tensors.
    """
    try:
        with path.open('rb') as file:
            zipped = file.read(4) == b'PK\x03\x04'  # format since torch 1.6; only this one can be memory-mapped
    except OSError as error:
        raise ConversionError(error.strerror or str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            checkpoint = torch.load(str(path), map_location='cpu', weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many kinds of errors for damaged files
        raise ConversionError(_reason(error)) from error
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state, dict):
        raise ConversionError(f'holds an object of type {type(state).__name__}, not a state dict')
    if not state or not all(isinstance(name, str) for name in state):
        raise ConversionError('holds no state dict: there are no names of tensors')
    if all(name.startswith('module.') for name in state):
        state = {name.removeprefix('module.'): value for name, value in state.items()}
    return dict(state)


def _reason(error: Exception) -> str:
    """One line on why torch could not read a file, without its advice to switch the protection off."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r'GLOBAL (\S+)', text)
        return f'refused, since its pickle asks for {name[1]}' if name else 'no checkpoint of torch, or a damaged one'
    return f'no checkpoint of torch, or a damaged one ({text.partition(chr(10))[0].partition(". ")[0] or repr(error)})'


def check(state: dict[str, Any], model: nn.Module) -> None:
    """Check that a state dict has the authors' names, shapes and types for `model`.

    Raises:
        ConversionError: It differs; the message lists the names.
    """
    wanted = official_tensors(model)
    problems: dict[str, list[str]] = {
        'missing': [name for name in wanted if name not in state],
        'unexpected': [name for name in state if name not in wanted],
        'of another shape': [],
        'no tensor of the right type': [],
        'not finite': [],
    }
    for name, value in state.items():
        if name not in wanted:
            continue
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != 'cpu':
            problems['no tensor of the right type'].append(name)
        elif value.dtype != wanted[name].dtype:
            problems['no tensor of the right type'].append(f'{name}: {value.dtype}, not {wanted[name].dtype}')
        elif value.shape != wanted[name].shape:
            problems['of another shape'].append(f'{name}: {tuple(value.shape)}, not {tuple(wanted[name].shape)}')
        elif value.is_floating_point() and not value.isfinite().all():
            problems['not finite'].append(name)
    lines = []
    for kind, names in problems.items():
        if names:
            lines.append(f'{len(names)} {kind}:')
            lines += [f'  {name}' for name in names[:LISTED]]
            if len(names) > LISTED:
                lines.append(f'  and {len(names) - LISTED} more')
    if lines:
        raise ConversionError('\n'.join([f'does not hold the weights of this model{_whose(state)}', *lines]))


def _whose(state: dict[str, Any]) -> str:
    """Remark on the network that a state dict belongs to; empty if none matches."""
    shapes = {name: getattr(value, 'shape', None) for name, value in state.items()}
    for name in MODELS:
        model = timm.create_model(name, device='meta')
        if shapes == {key: tensor.shape for key, tensor in official_tensors(model).items()}:
            return f'; its names and shapes are those of {name}'
        if state.keys() == model.state_dict().keys():
            return "; its names are those of this package, not the authors'"
    return ''


def write(state: dict[str, torch.Tensor], model: nn.Module, folder: Path) -> None:
    """Write the authors' weights under our names, and the config of their entry; `state` is emptied."""
    tensors = checkpoint_filter_fn(state, model)
    state.clear()
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses views and shared storage
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen or not tensor.is_contiguous():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    weights, config = folder / WEIGHTS_NAME, folder / 'config.json'
    save_file(tensors, weights, metadata={'format': 'pt'})
    config.write_text(json.dumps(hub_config(model, pretrained_cfg={'tag': TAG}), indent=2))
    for path in (weights, config):
        path.chmod(0o644)


def difference(checkpoint: Path, name: str, folder: Path) -> float:
    """Largest absolute difference of the logits between checkpoint and folder, for a fixed input."""
    before = _logits(name, pretrained_cfg_overlay={'file': str(checkpoint)})
    after = _logits(f'local-dir:{folder}')
    return (before - after).abs().max().item()


@torch.inference_mode()
def _logits(name: str, **kwargs: Any) -> torch.Tensor:
    model = timm.create_model(name, pretrained=True, **kwargs).eval()
    return model(torch.randn(1, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0)))


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def convert(checkpoint: Path, name: str, out: Path, verify: bool = False) -> None:
    """Convert a checkpoint of the authors into the folder `out`, which must be new or empty.

    Raises:
        ConversionError: The checkpoint is not that of the network, or `verify` found a difference.
        OSError, SafetensorError: The folder could not be written.
    """
    with tqdm(total=4 if verify else 3, desc='reading', unit='step', leave=False, disable=None) as bar:
        model = timm.create_model(name, device='meta')
        state = read(checkpoint)
        check(state, model)
        tqdm.write(f'read {checkpoint}: {len(state)} tensors of {name}')
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as temporary:
            folder = Path(temporary) / out.name  # the outer folder is readable by its owner only
            folder.mkdir()
            _advance(bar, 'writing')
            write(state, model, folder)
            if verify:
                _advance(bar, 'verifying')
                largest = difference(checkpoint, name, folder)
                if largest != 0.:
                    raise ConversionError(f'largest difference of the logits after conversion {largest}, should be 0.0')
                tqdm.write(f'verified: largest difference of the logits after conversion {largest}')
            _advance(bar, 'hashing')
            weights = folder / WEIGHTS_NAME
            size, digest = weights.stat().st_size, sha256(weights)
            os.replace(folder, out)
    print(f'wrote {out}: {weights.name} of {size} bytes, sha256 {digest}')


def _advance(bar: tqdm, step: str) -> None:
    bar.update()
    bar.set_description(step)


def _printable(text: str) -> str:
    """Text with control characters escaped, because names in a checkpoint are not trusted."""
    return ''.join(c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help="the authors' file, such as model_best.pth")
    parser.add_argument('--model', required=True, choices=MODELS, help='the network it holds')
    parser.add_argument('--out', required=True, metavar='DIR', type=Path, help='folder to write, new or empty')
    parser.add_argument('--verify', action='store_true', help='compare logits before and after; takes more memory')


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; returns 1 if that failed."""
    out = args.out.resolve()
    if out.is_dir() and (any(out.iterdir()) or out == Path.cwd()):
        raise ValueError(f'--out must be an empty folder of its own, got {args.out}')
    if out.exists() and not out.is_dir():
        raise ValueError(f'--out must be a folder, {args.out} is no folder')
    if not out.parent.is_dir():
        raise ValueError(f'--out must be in an existing folder, there is no folder {args.out.parent}')
    try:
        convert(args.checkpoint, args.model, out, args.verify)
    except ConversionError as error:
        print(_printable(f'{args.checkpoint}: not converted: {error}'), file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        print(f'{args.out}: not written: {getattr(error, "strerror", None) or error}', file=sys.stderr)
        return 1
    return 0

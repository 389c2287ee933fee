"""Converts checkpoints of the papers' authors into folders that timm and the Hub load; shared by the commands."""
import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from ..models._weights import WEIGHTS_NAME, read_checkpoint
from ._files import hub_config

TAG = 'in1k'
LISTED = 20  # names of each kind of problem


class ConversionError(Exception):
    """Reason why a conversion failed, for the user."""


@dataclass(frozen=True)
class Authors:
    """Names and files of the authors of a paper.

    Attributes:
        models: The networks that they trained.
        file: Name of a file of theirs, as an example.
        key: Key of the state dict in their checkpoints; a bare state dict is taken, too.
        tensors: Tensors of a model of ours under their names and in their shapes.
        filter_fn: State dict under our names, from one of theirs and the model that will load it.
        allowed: Classes that a pickle of theirs may hold beside tensors.
    """

    models: tuple[str, ...]
    file: str
    key: str
    tensors: Callable[[nn.Module], dict[str, torch.Tensor]]
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]]
    allowed: tuple[type, ...] = ()


def under_their_names(
        ours: dict[str, torch.Tensor],
        modules: list[str],
        our_name: Callable[[str], str],
) -> dict[str, torch.Tensor]:
    """A state dict under the authors' names.

    Args:
        ours: State dict under our names.
        modules: Names of modules that networks of theirs may have.
        our_name: Our name of a tensor of theirs.
    """
    leaves = dict.fromkeys(name.rpartition('.')[2] for name in ours)
    names = [f'{module}.{leaf}' for module in modules for leaf in leaves]
    return {name: ours[our_name(name)] for name in names if our_name(name) in ours}


def read(path: Path, authors: Authors) -> dict[str, Any]:
    """State dict of a checkpoint, without the prefix of torch's parallel wrappers.

    Raises:
        ConversionError: There is no such file, it is no checkpoint, or its pickle asks for more than it may.
    """
    try:
        checkpoint = read_checkpoint(path, authors.allowed)
    except OSError as error:
        raise ConversionError(error.strerror or str(error)) from error
    except RuntimeError as error:
        raise ConversionError(str(error)) from error
    state = checkpoint.get(authors.key, checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state, dict):
        raise ConversionError(f'holds an object of type {type(state).__name__}, not a state dict')
    if not state or not all(isinstance(name, str) for name in state):
        raise ConversionError('holds no state dict: there are no names of tensors')
    if all(name.startswith('module.') for name in state):
        state = {name.removeprefix('module.'): value for name, value in state.items()}
    return dict(state)


def check(state: dict[str, Any], model: nn.Module, authors: Authors) -> None:
    """Compare a state dict of the authors' names with what `model` needs.

    Raises:
        ConversionError: It holds something else; with the names.
    """
    wanted = authors.tensors(model)
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
        raise ConversionError('\n'.join([f'does not hold the weights of this model{_whose(state, authors)}', *lines]))


def _whose(state: dict[str, Any], authors: Authors) -> str:
    """Remark on which network a state dict belongs to; nothing where it is none, or differs in more than that."""
    shapes = {name: getattr(value, 'shape', None) for name, value in state.items()}
    for name in authors.models:
        model = timm.create_model(name, device='meta')
        if shapes == {key: tensor.shape for key, tensor in authors.tensors(model).items()}:
            return f'; its names and shapes are those of {name}'
        if state.keys() == model.state_dict().keys():
            return "; its names are those of this package, not the authors'"
    return ''


def write(state: dict[str, torch.Tensor], model: nn.Module, folder: Path, authors: Authors) -> None:
    """Write the authors' weights under our names, and the config of their entry; `state` is emptied."""
    tensors = authors.filter_fn(state, model)
    state.clear()
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors takes neither views nor one tensor under two names
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
    """Largest absolute difference of the logits of a fixed input, by the checkpoint itself and by the folder."""
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


def convert(checkpoint: Path, name: str, out: Path, authors: Authors, verify: bool = False) -> None:
    """Convert a checkpoint of the authors into the folder `out`, which must be new or empty.

    Raises:
        ConversionError: The checkpoint is not that of the network, or `verify` found a difference.
        OSError, SafetensorError: The folder could not be written.
    """
    with tqdm(total=4 if verify else 3, desc='reading', unit='step', leave=False, disable=None) as bar:
        model = timm.create_model(name, device='meta')
        state = read(checkpoint, authors)
        check(state, model, authors)
        tqdm.write(f'read {checkpoint}: {len(state)} tensors of {name}')
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as temporary:
            folder = Path(temporary) / out.name  # a folder of its own, as the outer one is for its owner only
            folder.mkdir()
            _advance(bar, 'writing')
            write(state, model, folder, authors)
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
    """Text without what a terminal would obey, as names in a checkpoint are anyone's."""
    return ''.join(c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in text)


def add_arguments(parser: argparse.ArgumentParser, authors: Authors) -> None:
    """Declare the arguments of a command."""
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', type=Path, help=f"the authors' file, such as {authors.file}")
    parser.add_argument('--model', required=True, choices=authors.models, help='the network it holds')
    parser.add_argument('--out', required=True, metavar='DIR', type=Path, help='folder to write, new or empty')
    parser.add_argument('--verify', action='store_true', help='compare logits before and after; takes more memory')


def run(args: argparse.Namespace, authors: Authors) -> int:
    """Convert the checkpoint; returns 1 if it could not be."""
    out = args.out.resolve()
    if out.is_dir() and (any(out.iterdir()) or out == Path.cwd()):
        raise ValueError(f'--out must be an empty folder of its own, got {args.out}')
    if out.exists() and not out.is_dir():
        raise ValueError(f'--out must be a folder, {args.out} is no folder')
    if not out.parent.is_dir():
        raise ValueError(f'--out must be in an existing folder, there is no folder {args.out.parent}')
    try:
        convert(args.checkpoint, args.model, out, authors, args.verify)
    except ConversionError as error:
        print(_printable(f'{args.checkpoint}: not converted: {error}'), file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        print(f'{args.out}: not written: {getattr(error, "strerror", None) or error}', file=sys.stderr)
        return 1
    return 0

"""Fetches pretrained weights and checks them before timm loads them.

timm and huggingface_hub check the length of a download but not its content. They fall back to a pickle if a repository
has no safetensors file, and leave missing parameters random if the number of classes differs. The checks here run
before and inside timm's own loading.
"""
import functools
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

__all__ = [
    'ORGANIZATION',
    'WEIGHTS_NAME',
    'checked',
    'fetch_weights',
    'git_sha1',
    'hub_id',
    'read_checkpoint',
    'recorded',
]

ORGANIZATION = 'timm-gsa'  # on the Hugging Face Hub
WEIGHTS_NAME = 'model.safetensors'


@functools.cache
def _results(tag: str) -> dict[str, Any]:
    path = files('timm_gsa') / 'weights' / f'{tag}.json'
    return json.loads(path.read_text(encoding='utf-8'))['models'] if path.is_file() else {}


def recorded(entry: str) -> dict[str, Any]:
    """Record of the weights of an entry (arch.tag): size, sha256, accuracy, and `revision` once published.

    Raises:
        KeyError: No weights are recorded under that name.
    """
    return _results(entry.partition('.')[2])[entry]


def hub_id(entry: str) -> str:
    """Repository of an entry on the Hub, with the pinned commit once the weights are published."""
    revision = _results(entry.partition('.')[2]).get(entry, {}).get('revision')
    return f'{ORGANIZATION}/{entry}' + (f'@{revision}' if revision else '')


def fetch_weights(
        model_id: str,
        arch: str,
        filename: str | None = None,
        cache_dir: str | Path | None = None,
) -> str:
    """Download the weights of a repository into the Hub's cache and check them against their SHA-256.

    Args:
        model_id: organization/name or organization/name@revision.
        arch: Architecture that will load them.
        filename: File in the repository; None: model.safetensors.
        cache_dir: The Hub's cache; None: its default.

    Returns:
        organization/name@commit of the checked files. timm loads exactly these for it, without a request.

    Raises:
        RuntimeError: The file is no safetensors file, or the repository holds another architecture, or the weights or
            the config.json have another digest than the Hub or the registry states. In the last case the file is
            deleted from the cache, so that the next call downloads it again.
        huggingface_hub.errors.EntryNotFoundError: The repository has no such file, or nothing is cached and the Hub
            cannot be reached. Other errors of huggingface_hub pass through.
    """
    repo_id, _, revision = model_id.partition('@')
    filename = filename or WEIGHTS_NAME
    entry = repo_id.rpartition('/')[2]
    ours = repo_id == f'{ORGANIZATION}/{entry}'
    if ours and entry.partition('.')[0] != arch:
        raise RuntimeError(f'{repo_id} holds weights of {entry.partition(".")[0]}, not of {arch}')
    if not filename.endswith('.safetensors'):
        raise RuntimeError(f'{filename} of {repo_id} is no safetensors file, and no other weights are loaded')
    path = Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))
    try:
        pinned = recorded(entry)['sha256'] if ours and filename == WEIGHTS_NAME and model_id == hub_id(entry) else None
    except KeyError:
        pinned = None
    _check_digest(path, filename, model_id, pinned)
    try:
        with safe_open(path, framework='pt'):
            pass
    except SafetensorError as error:
        raise RuntimeError(f'{filename} of {model_id} is no safetensors file: {error}') from error
    snapshot = path.parents[filename.count('/')]
    if (snapshot / 'config.json').is_file():  # timm has already read it for a name that starts with hf-hub:
        _check_digest(snapshot / 'config.json', 'config.json', model_id)
    return f'{repo_id}@{snapshot.name}'


def _check_digest(path: Path, filename: str, model_id: str, pinned: str | None = None) -> None:
    """Raise RuntimeError if a cached file has another digest than it should, and delete it."""
    # The name of a cached file is the Hub's digest of its content: SHA-256, or SHA-1 as git computes it.
    blob = path.resolve()
    data = blob.read_bytes()
    for expected in dict.fromkeys((pinned or blob.name, blob.name)):
        actual = _digests(expected, data)
        if not actual or expected in actual:
            continue
        advice = 'It was deleted from the cache; try again to download it anew.'
        try:
            for file in (path, blob):
                file.unlink(missing_ok=True)
        except OSError as error:
            advice = f'It could not be deleted from the cache: {error}.'
        raise RuntimeError(
            f'{filename} of {model_id} is damaged: its digest should be {expected} and is {actual[0]}. {advice}')


def _digests(name: str, data: bytes) -> list[str]:
    """Digests of `data` of the same kind as `name`; empty if `name` is no digest."""
    if re.fullmatch('[0-9a-f]{64}', name):
        return [hashlib.sha256(data).hexdigest()]
    if re.fullmatch('[0-9a-f]{40}', name):  # some mirrors use the plain SHA-1
        return [git_sha1(data), hashlib.sha1(data, usedforsecurity=False).hexdigest()]
    return []


def git_sha1(data: bytes) -> str:
    """Digest of a file's content in git and on the Hub."""
    digest = hashlib.sha1(b'blob %d\0' % len(data), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


def read_checkpoint(path: Path, allowed: tuple[type, ...] = ()) -> Any:
    """What a file of torch.save holds, on the CPU; none of the code of its pickle runs.

    Args:
        path: The file.
        allowed: Classes that its pickle may ask for beside tensors and plain containers.

    Raises:
        OSError: The file cannot be read.
        RuntimeError: It is no checkpoint, or its pickle asks for another class, which the message names.
    """
    with path.open('rb') as file:
        zipped = file.read(4) == b'PK\x03\x04'  # the format since torch 1.6, the only one that can be mapped
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
            warnings.simplefilter('ignore')
            return torch.load(str(path), map_location='cpu', weights_only=True, mmap=zipped)
    except Exception as error:  # torch's readers stumble over damaged files in all kinds of ways
        raise RuntimeError(_why_unread(error)) from error


def _why_unread(error: Exception) -> str:
    """Why torch could not read a file, in one line; its own advice is to switch the protection off."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        name = re.search(r'GLOBAL (\S+)', text)
        return f'refused, since its pickle asks for {name[1]}' if name else 'no checkpoint of torch, or a damaged one'
    return f'no checkpoint of torch, or a damaged one ({text.partition(chr(10))[0].partition(". ")[0] or repr(error)})'


def checked(filter_fn: Callable[..., dict[str, Any]] | None) -> Callable[..., dict[str, Any]]:
    """timm's `pretrained_filter_fn`: `filter_fn`, then checks that timm does not make."""

    def filter_and_check(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        if filter_fn is not None:
            state_dict = filter_fn(state_dict, model)
        _check(state_dict, model)
        return state_dict

    return filter_and_check


def _check(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Raise RuntimeError for tensors that are missing, not of floating point, or not finite.

    `load_state_dict` checks shapes and, for the same number of classes, unexpected names.
    """
    own = model.state_dict()
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or ()
    classifier = tuple(f'{name}.' for name in ((names,) if isinstance(names, str) else names))
    problems = [
        f'{key} is missing' for key in own
        if key not in state_dict
        and not key.endswith('num_batches_tracked')
        and not key.startswith(classifier)  # timm drops it for another number of classes
    ]
    for key, tensor in state_dict.items():
        if key in own and own[key].is_floating_point() and not tensor.is_floating_point():
            problems.append(f'{key} is of {tensor.dtype}')
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f'{key} holds values that are not finite')
    if problems:
        more = f' and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise RuntimeError(f'weights that do not fit {type(model).__name__}: {"; ".join(problems[:8])}{more}')

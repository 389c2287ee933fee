"""Where pretrained weights come from, and what is checked before they reach a model.

timm and huggingface_hub check the length of a download but not its content, fall back to a pickle where a repository
has no safetensors file, and leave parameters random that a file lacks when the number of classes differs. The checks
here stand before and inside timm's own loading; what they let pass, timm loads.
"""
import functools
import hashlib
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import hf_hub_download

__all__ = ['ORGANIZATION', 'WEIGHTS_NAME', 'checked', 'fetch_weights', 'hub_id', 'recorded']

ORGANIZATION = 'timm-gsa'  # on the Hugging Face Hub
WEIGHTS_NAME = 'model.safetensors'


@functools.cache
def _results(tag: str) -> dict[str, Any]:
    path = files('timm_gsa') / 'weights' / f'{tag}.json'
    return json.loads(path.read_text(encoding='utf-8'))['models'] if path.is_file() else {}


def recorded(entry: str) -> dict[str, Any]:
    """What is recorded of the weights of an entry (arch.tag): size, sha256, accuracy, `revision` once published.

    Raises:
        KeyError: No weights are recorded under that name.
    """
    return _results(entry.partition('.')[2])[entry]


def hub_id(entry: str) -> str:
    """Repository of an entry on the Hub, with the commit that its weights are pinned to once they are published."""
    revision = recorded(entry).get('revision')
    return f'{ORGANIZATION}/{entry}' + (f'@{revision}' if revision else '')


def fetch_weights(model_id: str, arch: str, cache_dir: str | Path | None = None) -> None:
    """Bring the weights of a repository into the Hub's cache, where timm finds them, and check what came.

    Args:
        model_id: organization/name or organization/name@revision.
        arch: Architecture that will load them.
        cache_dir: The Hub's cache; its own default where None.

    Raises:
        RuntimeError: The file is not what the Hub or the registry says it is (it is deleted from the cache, so that the
            next call downloads it anew), or the repository is that of another architecture's entry.
        huggingface_hub.errors.EntryNotFoundError: The repository has no model.safetensors, or nothing is cached and the
            Hub cannot be reached. What else the download may raise is huggingface_hub's.
    """
    repo_id, _, revision = model_id.partition('@')
    entry = repo_id.rpartition('/')[2]
    ours = repo_id == f'{ORGANIZATION}/{entry}'
    if ours and entry.partition('.')[0] != arch:
        raise RuntimeError(f'{repo_id} holds weights of {entry.partition(".")[0]}, not of {arch}')
    path = Path(hf_hub_download(repo_id, WEIGHTS_NAME, revision=revision or None, cache_dir=cache_dir))
    try:
        pinned = recorded(entry)['sha256'] if ours and model_id == hub_id(entry) else None
    except KeyError:
        pinned = None
    # A file in the cache bears the name by which the Hub knows its content: SHA-256, or SHA-1 as git computes it.
    blob = path.resolve()
    data = blob.read_bytes()
    for expected, actual in ((pinned, [hashlib.sha256(data).hexdigest()]), (blob.name, _digests(blob.name, data))):
        if expected and actual and expected not in actual:
            for file in (path, blob):
                file.unlink(missing_ok=True)
            raise RuntimeError(
                f'{WEIGHTS_NAME} of {model_id} is damaged: its digest should be {expected} and is {actual[0]}. It was '
                'deleted from the cache; try again to download it anew.'
            )


def _digests(name: str, data: bytes) -> list[str]:
    """Digests of `data` of the kind that `name` looks like; none where it looks like no digest."""
    if re.fullmatch('[0-9a-f]{64}', name):
        return [hashlib.sha256(data).hexdigest()]
    if re.fullmatch('[0-9a-f]{40}', name):  # some mirrors give the plain SHA-1
        blob = hashlib.sha1(b'blob %d\0' % len(data), usedforsecurity=False)
        blob.update(data)
        return [blob.hexdigest(), hashlib.sha1(data, usedforsecurity=False).hexdigest()]
    return []


def checked(filter_fn: Callable[..., dict[str, Any]] | None) -> Callable[..., dict[str, Any]]:
    """timm's `pretrained_filter_fn`: `filter_fn`, then a check of what would otherwise load without a word."""

    def filter_and_check(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        if filter_fn is not None:
            state_dict = filter_fn(state_dict, model)
        _check(state_dict, model)
        return state_dict

    return filter_and_check


def _check(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Raises RuntimeError for tensors that are missing, no floating point numbers where they should be, or not finite.

    Shapes and, for the same number of classes, superfluous names are left to `load_state_dict`.
    """
    wanted = {
        key: tensor for key, tensor in model.state_dict().items()
        if not key.endswith('num_batches_tracked')
        and not key.startswith('fc.')  # timm leaves it out for other classes
    }
    problems = [f'{key} is missing' for key in wanted if key not in state_dict]
    for key, tensor in state_dict.items():
        if key in wanted and wanted[key].is_floating_point() and not tensor.is_floating_point():
            problems.append(f'{key} is of {tensor.dtype}')
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f'{key} holds values that are not finite')
    if problems:
        more = f' and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise RuntimeError(f'weights that do not fit {type(model).__name__}: {"; ".join(problems[:8])}{more}')

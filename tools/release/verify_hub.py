"""Download published entries into an empty cache and compare them with their records.

    python tools/release/verify_hub.py                  # every entry with a pinned commit
    python tools/release/verify_hub.py ENTRY ...        # these; an entry without a pin is taken from its main branch

For each: SHA-256 of the weights and commit as pinned, and the logits of the recorded fixed input, from models built by
repository name and by architecture name. Exit status 1 on any difference.
"""
from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from _hub_entry import TENSORS, Entry, EntryError, all_entries, close
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from tqdm import tqdm

from timm_gsa.models._weights import ORGANIZATION, WEIGHTS_NAME


def problems(entry: Entry, organization: str, cache_dir: str) -> Iterator[str]:
    """Download an entry's repository into `cache_dir`; yield differences from its record."""
    repo_id, revision = f'{organization}/{entry.name}', entry.record.get('revision')
    path = Path(hf_hub_download(repo_id, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != entry.record['sha256']:
        yield f'SHA-256 {digest} instead of {entry.record["sha256"]}'
    commit = path.parent.name  # snapshots/<commit>/model.safetensors
    if revision is not None and commit != revision:
        yield f'commit {commit} instead of {revision}'
    model_id = f'{repo_id}@{revision}' if revision else repo_id
    expected = load_file(entry.folder / TENSORS)
    for route, name, overlay in (
            ('repository name', f'hf-hub:{model_id}', {}),
            ('architecture name', entry.name, dict(file=None, hf_hub_id=model_id)),
    ):
        try:
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir).eval()
        except RuntimeError as error:  # of our own checks or of load_state_dict
            yield f'by {route}: {error}'
            continue
        if model.pretrained_cfg['architecture'] != entry.arch:
            yield f'by {route}: the architecture is {model.pretrained_cfg["architecture"]}'
            continue
        with torch.inference_mode():
            if not close(model(expected['input']), expected['output']):
                yield f'other logits by {route}'


def main(argv: Sequence[str] | None = None) -> int:
    """Verify what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('entries', nargs='*', metavar='ENTRY', help='arch.tag; all published ones where none is given')
    parser.add_argument('--org', default=ORGANIZATION, help='organisation or user on the Hub (default: %(default)s)')
    args = parser.parse_args(argv)
    try:
        entries = [Entry(name) for name in args.entries or all_entries()]
    except EntryError as error:
        parser.error(str(error))
    if not args.entries:
        entries = [entry for entry in entries if entry.record.get('revision')]
        if not entries:
            print('no entry has a pinned commit yet: nothing is published')
    rows = []
    for entry in tqdm(entries, unit='entry', disable=None):
        with tempfile.TemporaryDirectory() as cache_dir:
            try:
                found = '; '.join(problems(entry, args.org, cache_dir)) or 'good'
            except Exception as error:  # becomes a row of the table
                found = f'{type(error).__name__}: {" ".join(str(error).split())}'
        rows.append((f'{args.org}/{entry.name}', entry.record.get('revision') or 'not pinned', found))
    for name, revision, found in rows:
        print(f'{name:<44} {revision:<40} {found}')
    return int(any(found != 'good' for _, _, found in rows))


if __name__ == '__main__':
    raise SystemExit(main())

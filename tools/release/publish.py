"""Publish entries on the Hugging Face Hub: model.safetensors, config, card and test vectors in one commit each.

    python tools/release/publish.py --dry-run                     # check every entry, list what would be done
    python tools/release/publish.py gsa_resnet_tiny.c100          # needs a token: `hf auth login` or HF_TOKEN
    python tools/release/hub_configs.py pin ENTRY COMMIT          # afterwards, with the commit that was printed

An entry that is already on the Hub gives no commit, so that a failed run can be repeated. A repository with another
architecture is not changed. Exit status 1 if an entry could not be published.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _hub_entry import Entry, EntryError, all_entries, content, front_matter
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.utils import RepositoryNotFoundError
from tqdm import tqdm

from timm_gsa.models._weights import ORGANIZATION, git_sha1

WEIGHTS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack', '.onnx', '.gguf')


def local_files(entry: Entry, organization: str) -> dict[str, Path | bytes]:
    """Checked files for the repository.

    Raises:
        EntryError: The entry's folder, weights or card are not what they should be.
    """
    files = entry.repository(organization)
    if front_matter(content(files['README.md']).decode()).get('license') is None:
        raise EntryError('README.md names no license')
    return files


def differing(api: HfApi, repo_id: str, revision: str, files: dict[str, Path | bytes]) -> Iterator[str]:
    """Names of files that are missing in the repository or differ there."""
    remote: dict[str, Any] = {info.path: info for info in api.get_paths_info(repo_id, list(files), revision=revision)}
    for name, source in files.items():
        data = content(source)
        info = remote.get(name)
        lfs = getattr(info, 'lfs', None)
        if lfs is not None:
            same = lfs.sha256 == hashlib.sha256(data).hexdigest()
        else:
            same = info is not None and info.blob_id == git_sha1(data)
        if not same:
            yield name


def refuse_other_content(api: HfApi, repo_id: str, revision: str, arch: str) -> None:
    """Raise EntryError if a repository holds anything but weights of `arch`."""
    names = api.list_repo_files(repo_id, revision=revision)
    if 'config.json' in names:
        path = hf_hub_download(repo_id, 'config.json', revision=revision, endpoint=api.endpoint, token=api.token)
        try:
            found = json.loads(Path(path).read_text(encoding='utf-8')).get('architecture')
        except (ValueError, AttributeError):
            found = None
        if found != arch:
            raise EntryError(f'{repo_id} holds the architecture {found!r}, not {arch!r}; it is left as it is')
    elif any(name.endswith(WEIGHTS_SUFFIXES) for name in names):
        raise EntryError(f'{repo_id} holds weights without a config.json; it is left as it is')


def head(api: HfApi, repo_id: str) -> str | None:
    """Commit of the repository's main branch; None if there is no repository."""
    try:
        return api.model_info(repo_id).sha
    except RepositoryNotFoundError:
        return None


def publish(api: HfApi, entry: Entry, organization: str, private: bool, dry_run: bool) -> str:
    """Publish one entry.

    Returns:
        What was done and the commit of the repository.

    Raises:
        EntryError: The entry is not fit to be published, or its repository holds something else.
        Exception: Any error of huggingface_hub; the repository is then unchanged or complete.
    """
    files = local_files(entry, organization)
    repo_id = f'{organization}/{entry.name}'
    revision = head(api, repo_id)
    names = list(files)
    if revision is not None:
        refuse_other_content(api, repo_id, revision, entry.arch)
        names = list(differing(api, repo_id, revision, files))
    if not names:
        return f'up to date at {revision}'
    if dry_run:
        return f'would {"create the repository and " if revision is None else ""}upload {", ".join(names)}'
    if revision is None:
        api.create_repo(repo_id, private=private, exist_ok=True)
        revision = head(api, repo_id)
    operations = [
        CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
        for name, source in files.items() if name in names
    ]
    try:
        # parent_commit makes another commit in between an error.
        return 'published at ' + api.create_commit(
            repo_id, operations, commit_message=f'Add {entry.name}', parent_commit=revision).oid
    except Exception:
        # The commit may have been made although its answer was lost.
        revision = head(api, repo_id)
        if revision is None or list(differing(api, repo_id, revision, files)):
            raise
        return f'published at {revision}'


def main(argv: Sequence[str] | None = None) -> int:
    """Publish what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('entries', nargs='*', metavar='ENTRY', help='arch.tag; all where none is given')
    parser.add_argument('--org', default=ORGANIZATION, help='organisation or user on the Hub (default: %(default)s)')
    parser.add_argument('--dry-run', action='store_true', help='check and report, change nothing')
    parser.add_argument('--private', action='store_true', help='make new repositories private')
    args = parser.parse_args(argv)
    try:
        entries = [Entry(name) for name in args.entries or all_entries()]
    except EntryError as error:
        parser.error(str(error))
    api = HfApi(library_name='timm_gsa')
    status = 0
    for entry in tqdm(entries, unit='entry', disable=None):
        try:
            outcome = publish(api, entry, args.org, args.private, args.dry_run)
        except Exception as error:  # the other entries are still published
            outcome = f'FAILED: {type(error).__name__}: {str(error).strip()}'
            status = 1
        tqdm.write(f'{args.org}/{entry.name}: {outcome}', file=sys.stderr if 'FAILED' in outcome else sys.stdout)
    return status


if __name__ == '__main__':
    raise SystemExit(main())

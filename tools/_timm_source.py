"""What a release of timm holds besides its wheel: found on this machine, or downloaded once and checked.

timm's wheel carries the library alone; train.py, validate.py and the other scripts exist only in its repository. The
tools of this folder look them up here. Nothing in this module imports timm or torch.
"""
from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.util
import io
import os
import re
import secrets
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

REPOSITORY = "https://github.com/huggingface/pytorch-image-models"
ARCHIVES = f"{REPOSITORY}/archive/refs/tags"
ARCHIVES_VARIABLE = "TIMM_GSA_ARCHIVES"  # environment variable: a mirror of ARCHIVES
VERSION_FILE = "timm/version.py"
CHECKSUMS_FILE = "SHA256SUMS"

# What `LC_ALL=C; sha256sum *.py timm/version.py | sha256sum` prints in a checkout of the release's tag. The files are
# pinned and not the archive, because GitHub may compress a tag differently tomorrow. A release that is not listed is
# checked for its version only.
PINNED = {
    "1.0.21": "1a7d808161ab90a474a183c72a0b58395fbe36828a0f4ee7f5c266b72d3df3ae",
    "1.0.22": "b7d29906f700e2ad867bf807a92831961dbb791548ac40be205e494fc5ac229d",
    "1.0.23": "8db64781fe39c30ae7b122bc9d0b975f962685c1e13d7025226149d51fa16859",
    "1.0.24": "0a7996dca75966cfb6e71161919a3d2eb4742c7e40e45bfd3ccc3d8beccfb570",
    "1.0.25": "33f907e33a8f5c58e90efe10a99174fe4a72b758b9f21db7635288fae14fe863",
    "1.0.26": "e60459f891dac9668d4510fd398cc078284d80940eeb327ce08863a9d29628fe",
    "1.0.27": "27a4c23b959be8703d07dfe280592671781d6dafcff2632d141cec4b313c0efc",
    "1.0.28": "ad615758232fb49b27efb745b43f11b26849cbbbd4d65d562559b569e0ac7cf3",
}

# The archive of 1.0.28 is 3.5 MB, 13 MB unpacked, its largest script 74 kB.
ARCHIVE_LIMIT = 64 << 20
UNPACKED_LIMIT = 256 << 20
FILE_LIMIT = 4 << 20
TIMEOUT = 30  # seconds without a byte from the server


class SourceError(RuntimeError):
    """timm's sources cannot be had; the message says why and is meant for the user."""


class DownloadError(SourceError):
    """timm's sources cannot be downloaded, or what was downloaded is not what it should be."""


@dataclass(frozen=True)
class InstalledTimm:
    """The timm that `import timm` finds: its version and the folder of the package."""

    version: str
    folder: Path


def installed_timm() -> InstalledTimm:
    """Find the installed timm without importing it.

    Returns:
        Version and package folder of the timm that `import timm` would import.

    Raises:
        SourceError: timm is not installed, or does not say its version.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"timm is not installed for {sys.executable}; pip install timm")
    folder = Path(spec.submodule_search_locations[0])
    version = read_version(folder.parent)
    if version is None:
        raise SourceError(f"the installed timm does not say its version in {folder / 'version.py'}")
    return InstalledTimm(version, folder)


def read_version(folder: Path) -> str | None:
    """Read the version of a checkout of timm, as text: nothing of it is run.

    Args:
        folder: the folder that holds `timm/version.py`.

    Returns:
        The version, or None where there is no such file or no version in it.
    """
    try:
        text = (folder / VERSION_FILE).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _parse_version(text)


def cache_root() -> Path:
    """Name the folder that downloads are kept in: `timm_gsa` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Returns:
        The folder, which need not exist.

    Raises:
        SourceError: there is no home folder either.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG specification: a relative path is to be ignored
        return Path(named) / "timm_gsa"
    try:
        return Path.home() / ".cache" / "timm_gsa"
    except RuntimeError as error:
        raise SourceError(f"no folder for the cache ({error}); set XDG_CACHE_HOME") from error


def archive_url(version: str) -> str:
    """Name the source archive of a release.

    Args:
        version: a release of timm, such as "1.0.31".

    Returns:
        Its address on GitHub, or below `$TIMM_GSA_ARCHIVES` where that is set.

    Raises:
        SourceError: `$TIMM_GSA_ARCHIVES` is no http address.
    """
    base = os.environ.get(ARCHIVES_VARIABLE) or ARCHIVES
    if not base.startswith(("http://", "https://")):
        raise SourceError(f"{ARCHIVES_VARIABLE} must begin with http:// or https://, got {base}")
    return f"{base.rstrip('/')}/v{version}.tar.gz"


def release_scripts(version: str) -> Path:
    """Return the folder with the top-level scripts of a release, downloading them when they are not in the cache.

    Any number of processes may call this at once: one downloads, the others wait for it. The folder appears in the
    cache complete and checked, or not at all.

    Args:
        version: a release of timm, such as "1.0.31".

    Returns:
        A folder with the release's top-level `*.py`, `timm/version.py` and their `SHA256SUMS`.

    Raises:
        DownloadError: the archive cannot be downloaded, is damaged, or is not that release's.
        SourceError: the version is no release's, the cache cannot be used, or the scripts in it were changed.
    """
    if not re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?", version):
        raise SourceError(
            f"the installed timm is {version}, which is no release: there is nothing to download. Name the checkout "
            f"of {REPOSITORY} that it was installed from"
        )
    folder = cache_root() / f"timm-{version}"
    if not folder.is_dir():
        url = archive_url(version)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(f"{folder.name}.lock")):
                if not folder.is_dir():
                    _store(_download_release(url, version), folder)
        except OSError as error:
            raise SourceError(f"cannot write to the cache {folder.parent}: {error}; set XDG_CACHE_HOME") from error
    _verify(folder, version)
    return folder


def unpack(archive: bytes, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read files out of a gzipped tar archive into memory; nothing is written, so no member can land anywhere.

    Args:
        archive: the bytes of a `.tar.gz` whose members all lie below one folder, as in GitHub's archives and in sdists.
        wanted: called with a member's name without that folder; says whether to read it.

    Returns:
        The contents of the wanted files by name.

    Raises:
        DownloadError: the archive is damaged or too large, or holds what no honest archive holds: a name that leads
            out of it, the same wanted name twice, or a wanted name that is not a regular file.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as stream:
            content = stream.read(UNPACKED_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DownloadError(f"the archive is damaged: {error}") from error
    if len(content) > UNPACKED_LIMIT:
        raise DownloadError(f"the archive unpacks to more than {UNPACKED_LIMIT >> 20} MiB")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name:
                    raise DownloadError(f"the archive holds a path that leads out of it: {member.name!r}")
                name = "/".join(path.parts[1:])
                if not wanted(name):
                    continue
                file = tar.extractfile(member) if member.isreg() else None
                if file is None or name in files or member.size > FILE_LIMIT:
                    raise DownloadError(
                        f"the archive's {name} must be one regular file of at most {FILE_LIMIT >> 20} MiB"
                    )
                files[name] = file.read()
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DownloadError(f"the archive is damaged: {error}") from error
    return files


def _parse_version(text: str) -> str | None:
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock which the system releases should this process die."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which is downloading to {path.parent}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download_release(url: str, version: str) -> dict[str, bytes]:
    """Download a release and return its scripts, checked."""
    files = unpack(_download(url), lambda name: name == VERSION_FILE or ("/" not in name and name.endswith(".py")))
    inside = _parse_version(files.get(VERSION_FILE, b"").decode(errors="replace"))
    if inside != version:
        raise DownloadError(
            f"{url} holds timm {inside}, not {version}" if inside else f"{url} holds no version in {VERSION_FILE}"
        )
    digest = _digest(_checksums(files))
    if digest != PINNED.get(version, digest):
        raise DownloadError(
            f"the scripts in {url} are not those of timm {version}: "
            f"their digest is {digest}, it should be {PINNED[version]}"
        )
    return files


def _download(url: str) -> bytes:
    from tqdm import tqdm  # type: ignore[import-untyped]

    print(f"downloading {url}", file=sys.stderr, flush=True)
    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
    content = bytearray()
    with response:
        expected = response.length  # None when the server does not say, as GitHub does not
        with tqdm(total=expected, unit="B", unit_scale=True, desc="timm's sources", disable=None) as bar:
            while len(content) <= ARCHIVE_LIMIT:
                try:
                    chunk = response.read(1 << 16)
                except (OSError, http.client.HTTPException) as error:
                    raise DownloadError(f"{url} broke off after {len(content)} bytes: {error}") from error
                if not chunk:
                    break
                content += chunk
                bar.update(len(chunk))
    if len(content) > ARCHIVE_LIMIT:
        raise DownloadError(f"{url} is larger than {ARCHIVE_LIMIT >> 20} MiB")
    if expected is not None and len(content) != expected:
        raise DownloadError(f"{url} broke off after {len(content)} of {expected} bytes")
    return bytes(content)


def _checksums(files: Mapping[str, bytes]) -> str:
    """List files as `sha256sum *.py timm/version.py` does."""
    names = sorted(files, key=lambda name: (name == VERSION_FILE, name))
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names)


def _digest(checksums: str) -> str:
    return hashlib.sha256(checksums.encode()).hexdigest()


def _store(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files and their checksums, so that `folder` appears whole. The caller holds the lock."""
    for abandoned in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        shutil.rmtree(abandoned)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for name, content in {**files, CHECKSUMS_FILE: _checksums(files).encode()}.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there is none left after the rename


def _verify(folder: Path, version: str) -> None:
    """Refuse a cached folder that is not what was downloaded."""
    try:
        checksums = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8")
        listed = dict(line.split("  ", 1)[::-1] for line in checksums.splitlines())
        files = {name: (folder / name).read_bytes() for name in listed}
    except (OSError, ValueError) as error:
        problem = f"{CHECKSUMS_FILE}: {error}" if isinstance(error, ValueError) else str(error)
    else:
        if checksums == _checksums(files) and PINNED.get(version, _digest(checksums)) == _digest(checksums):
            return
        changed = [name for name, digest in listed.items() if digest != hashlib.sha256(files[name]).hexdigest()]
        problem = f"changed: {', '.join(changed) or CHECKSUMS_FILE}"
    raise SourceError(
        f"{folder} is not as it was downloaded ({problem}). Delete that folder to have it downloaded anew, "
        f"or name it as you would a checkout to run changed scripts on purpose"
    )

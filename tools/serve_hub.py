"""Serve a folder of entries as a small, read-only Hugging Face Hub on this machine.

    python tools/serve_hub.py DIR --port 8123
    HF_ENDPOINT=http://127.0.0.1:8123 python tools/classify.py --model hf-hub:timm-gsa/NAME

DIR/NAME/... is served as timm-gsa/NAME/..., as it is when the server starts. The page of a repository, search, uploads
and access tokens are the real Hub's: whoever reaches the port may read all entries.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import signal
import socketserver
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar
from urllib.parse import parse_qs, unquote

MAIN = 'main'
NAME = re.compile(r'\w([\w.-]*\w)?', re.ASCII)  # of an organization or a repository: others the client refuses


@dataclass(frozen=True)
class File:
    """A file of a repository: how to open it, and by what the Hub knows its content.

    Args:
        open: Opens it for reading in binary mode; OSError where that cannot be done any more.
        size: Bytes.
        sha1: Digest by which git knows the content.
        sha256: Digest by which git-lfs knows it.
        lfs: The Hub keeps it with git-lfs, as it does with large files.
    """

    open: Callable[[], BinaryIO]
    size: int
    sha1: str
    sha256: str
    lfs: bool

    @classmethod
    def read(cls, open: Callable[[], BinaryIO], size: int, name: str) -> File:
        """Compute the digests of a file of `size` bytes."""
        sha1 = hashlib.sha1(b'blob %d\0' % size, usedforsecurity=False)
        sha256 = hashlib.sha256()
        with open() as file:
            while chunk := file.read(1 << 20):
                sha1.update(chunk)
                sha256.update(chunk)
        return cls(open, size, sha1.hexdigest(), sha256.hexdigest(), name.endswith('.safetensors'))

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> File:
        """A file that is held in memory."""
        return cls.read(partial(io.BytesIO, data), len(data), name)

    @classmethod
    def of_path(cls, path: Path) -> File:
        """A file on disk; once it has changed, opening it raises OSError."""
        stamp = _stamp(path.stat())

        def open_unchanged() -> BinaryIO:
            file = path.open('rb')
            if _stamp(os.fstat(file.fileno())) != stamp:
                file.close()
                raise OSError(f'{path.name} has changed since the server started')
            return file

        return cls.read(open_unchanged, stamp[0], path.name)

    @property
    def etag(self) -> str:
        """Digest that the Hub gives and under which the client caches the file."""
        return self.sha256 if self.lfs else self.sha1

    def listing(self, path: str) -> dict[str, Any]:
        """What the Hub's listings say of it."""
        entry = {'type': 'file', 'path': path, 'size': self.size, 'oid': self.sha1}
        if self.lfs:  # git itself holds a pointer to the file
            pointer = (
                f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n'.encode())
            entry['oid'] = _git_sha1('blob', pointer)
            entry['lfs'] = {'oid': self.sha256, 'size': self.size, 'pointerSize': len(pointer)}
        return entry


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _git_sha1(kind: str, data: bytes) -> str:
    return hashlib.sha1(b'%s %d\0' % (kind.encode(), len(data)) + data, usedforsecurity=False).hexdigest()


class Repository:
    """Files under one commit, which follows from their names and content.

    Args:
        files: The files by their path, parts separated by slashes.
    """

    def __init__(self, files: Mapping[str, File]) -> None:
        self.files = dict(files)
        self.commit = commit_id(files)

    @classmethod
    def of_folder(cls, folder: Path) -> Repository:
        """All files below a folder but hidden ones and those that a link takes from outside."""
        root = folder.resolve()
        return cls({
            path.relative_to(folder).as_posix(): File.of_path(path)
            for path in sorted(folder.rglob('*'))
            if path.is_file() and path.resolve().is_relative_to(root)
            and not any(part.startswith('.') for part in path.relative_to(folder).parts)
        })

    def at(self, revision: str) -> tuple[str, Mapping[str, File]] | None:
        """Commit and files of a revision, None where there is no such revision."""
        return (self.commit, self.files) if revision in (MAIN, self.commit) else None


def commit_id(files: Mapping[str, File], *more: str) -> str:
    """An id of 40 hexadecimal digits, from names and content of the files and what else tells commits apart."""
    lines = [f'{path}\0{file.sha256}' for path, file in sorted(files.items())]
    return _git_sha1('commit', '\n'.join([*lines, *more]).encode())


class HubHandler(BaseHTTPRequestHandler):
    """Answers one client as the Hub would; a route is a method that answers one kind of request."""

    protocol_version = 'HTTP/1.1'
    server_version = 'serve_hub'
    disable_nagle_algorithm = True  # headers and body are written apart: 40 ms a request otherwise
    timeout = 60  # seconds a client may keep silent
    server: HubServer

    _REPO, _REVISION = '(?P<repo>[^/]+/[^/]+)', '(?P<revision>[^/]+)'
    ROUTES: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ('HEAD GET', f'/{_REPO}/resolve/{_REVISION}/(?P<path>.+)', 'resolve'),
        ('GET', f'/api/models/{_REPO}(/revision/{_REVISION})?', 'model_info'),
        ('GET', f'/api/models/{_REPO}/tree/{_REVISION}(/(?P<path>.*))?', 'tree'),
        ('POST', f'/api/models/{_REPO}/paths-info/{_REVISION}', 'paths_info'),
    )
    MAX_BODY = 1 << 20  # bytes of a request: more is nothing that a reader sends

    def answer(self) -> None:
        """Find the route of a request and follow it."""
        path, _, query = self.path.partition('?')
        self.query = {key: values[-1] for key, values in parse_qs(query).items()}
        allowed: list[str] = []
        for methods, pattern, name in self.ROUTES:
            # Parts are separated before they are decoded: the client writes a slash inside a revision as %2F.
            if match := re.fullmatch(pattern, path):
                if self.command in methods.split():
                    parts = match.groupdict().items()
                    getattr(self, name)(**{key: unquote(value) for key, value in parts if value is not None})
                    return
                allowed += methods.split()
        self.close_connection = True  # a body may follow that nobody reads
        if allowed:
            self.fail(405, message=f'{self.command} is not possible here', headers={'Allow': ', '.join(allowed)})
        else:
            self.fail(404, message='there is no such page')

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """A file, or what the Hub says of it.

        The Hub itself answers for large files with a redirect to another host; the client takes the file from the first
        host just as well.
        """
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        headers = {'X-Repo-Commit': commit}
        if path not in files:
            self.fail(404, 'EntryNotFound', f'{ascii(path)} does not exist in {repo}', headers)
            return
        file = files[path]
        headers |= {'ETag': f'"{file.etag}"', 'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream'}
        if file.lfs:
            headers |= {'X-Linked-Etag': f'"{file.etag}"', 'X-Linked-Size': str(file.size)}
        self.send_file(file, headers)

    def send_file(self, file: File, headers: dict[str, str]) -> None:
        """Send a file, or the part of it that is asked for."""
        try:
            wanted = byte_range(self.headers.get('Range'), file.size) if self.command == 'GET' else None
        except ValueError as error:
            self.fail(416, message=str(error), headers={**headers, 'Content-Range': f'bytes */{file.size}'})
            return
        if self.headers.get('If-Range', f'"{file.etag}"') != f'"{file.etag}"':
            wanted = None  # the part would continue another content
        start, stop = wanted or (0, file.size)
        if wanted:
            headers = {**headers, 'Content-Range': f'bytes {start}-{stop - 1}/{file.size}'}
        try:
            content = file.open()
        except OSError as error:
            self.fail(500, message=str(error))
            return
        with content:
            self.send_head(206 if wanted else 200, stop - start, headers)
            if self.command == 'GET':
                content.seek(start)
                self.send_content(content, start, stop)

    def send_content(self, content: BinaryIO, start: int, stop: int) -> None:
        """Send the bytes of a file from `start`, where it stands, to `stop`."""
        while start < stop and (chunk := content.read(min(1 << 20, stop - start))):
            self.wfile.write(chunk)
            start += len(chunk)
        if start < stop:
            self.close_connection = True  # the file became shorter: let the client see that something is missing

    def model_info(self, repo: str, revision: str = MAIN) -> None:
        """The repository with the names of its files."""
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for path, file in sorted(files.items()):
            sibling: dict[str, Any] = {'rfilename': path}
            if 'blobs' in self.query:
                listing = file.listing(path)
                sibling |= {'size': file.size, 'blobId': listing['oid']}
                if file.lfs:
                    sibling['lfs'] = {**listing['lfs'], 'sha256': file.sha256}
            siblings.append(sibling)
        self.send_json({
            'id': repo, 'modelId': repo, 'author': repo.partition('/')[0], 'sha': commit,
            'private': False, 'gated': False, 'disabled': False, 'tags': [], 'siblings': siblings,
        })

    def tree(self, repo: str, revision: str, path: str = '') -> None:
        """Files and folders below a folder."""
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        recursive = self.query.get('recursive', '').lower() in ('true', '1')
        inside = f'{path.rstrip("/")}/' if path else ''
        listed = [
            entry for entry in listings(files)
            if entry['path'].startswith(inside) and (recursive or '/' not in entry['path'][len(inside):])
        ]
        if not listed and path:
            self.fail(404, 'EntryNotFound', f'{ascii(path)} does not exist in {repo}', {'X-Repo-Commit': commit})
            return
        self.send_json(listed)

    def paths_info(self, repo: str, revision: str) -> None:
        """The same for some paths; those that do not exist are left out."""
        found, body = self.find(repo, revision), self.read_body()
        if found is None or body is None:
            return
        try:
            if 'json' in self.headers.get('Content-Type', ''):
                paths = json.loads(body)['paths']
            else:
                paths = parse_qs(body.decode()).get('paths', [])
            wanted = {paths} if isinstance(paths, str) else set(paths)
        except (ValueError, KeyError, TypeError):
            self.fail(400, message='paths are to be given as a form or as JSON')
            return
        self.send_json([entry for entry in listings(found[1]) if entry['path'] in wanted])

    def find(self, repo: str, revision: str) -> tuple[str, Mapping[str, File]] | None:
        """Commit and files of a revision of a repository; answers the request where there is none."""
        repository = self.server.repositories.get(repo)
        if repository is None:
            self.fail(404, 'RepoNotFound', f'there is no repository {ascii(repo)}')
            return None
        found = repository.at(revision)
        if found is None:
            self.fail(404, 'RevisionNotFound', f'{repo} has no revision {ascii(revision)}')
        return found

    def read_body(self) -> bytes | None:
        """The body of a request; answers the request where it is too long or its length is unknown."""
        length = self.headers.get('Content-Length', '')
        if not length.isdecimal() or int(length) > self.MAX_BODY:
            self.close_connection = True
            self.fail(413 if length.isdecimal() else 411, message=f'a body of up to {self.MAX_BODY} bytes is expected')
            return None
        return self.rfile.read(int(length))

    def fail(
            self,
            status: int,
            code: str | None = None,
            message: str = '',
            headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer with an error, which the client tells by `code` and shows with `message`."""
        # The client shows the message of the JSON body beside that of the header. In a header it has to be ASCII.
        headers = {**(headers or {}), 'X-Error-Message': message.encode('ascii', 'replace').decode()}
        if code:
            headers['X-Error-Code'] = code
        if self.command == 'POST':
            self.close_connection = True  # what is unread of the body is no further request
        self.send_json({'error': message}, status, headers)

    def send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON."""
        data = json.dumps(content).encode()
        self.send_head(status, len(data), {'Content-Type': 'application/json', **(headers or {})})
        if self.command != 'HEAD':
            self.wfile.write(data)

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        """Send status and headers of an answer."""
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(length)}.items():
            self.send_header(key, value)
        if self.close_connection:
            self.send_header('Connection', 'close')
        self.end_headers()


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last that a Range header asks for; None where that is the whole file.

    Raises:
        ValueError: None of these bytes exist.
    """
    match = re.fullmatch(r'bytes=(\d{0,18})-(\d{0,18})', (header or '').strip())
    if not match or match[0] == 'bytes=-':  # several ranges or another unit: to be ignored, says RFC 9110
        return None
    first, last = match[1], match[2]
    if first and last and int(first) > int(last):
        return None
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise ValueError(f'{match[0]} is outside of {size} bytes')
    return start, stop


def listings(files: Mapping[str, File]) -> list[dict[str, Any]]:
    """What the Hub lists of files and of the folders they are in, sorted by path."""
    folders = {parent.as_posix() for path in files for parent in PurePosixPath(path).parents} - {'.'}
    entries = [file.listing(path) for path, file in files.items()]
    for folder in folders:
        inside = {path: file for path, file in files.items() if path.startswith(f'{folder}/')}
        entries.append({'type': 'directory', 'path': folder, 'size': 0, 'oid': commit_id(inside)})
    return sorted(entries, key=lambda entry: entry['path'])


class HubServer(ThreadingHTTPServer):
    """Serves repositories, each request in a thread of its own.

    Args:
        repositories: By organization/name.
        host: Name or address to listen on.
        port: Port to listen on; 0 for one that is free.
        handler: What answers.

    Raises:
        OSError: The address cannot be listened on.
    """

    allow_reuse_port = False  # two servers on one port would share its requests
    request_queue_size = 128

    def __init__(
            self,
            repositories: Mapping[str, Repository],
            host: str = '127.0.0.1',
            port: int = 0,
            handler: type[HubHandler] = HubHandler,
    ) -> None:
        super().__init__((host, port), handler)
        self.repositories = dict(repositories)

    def server_bind(self) -> None:
        """Bind without asking a name server for the machine's name, which takes long where there is none."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f'http://{self.server_name}:{self.server_port}'


def entries(folder: Path, organization: str) -> dict[str, Repository]:
    """Repositories of a folder: its subfolders that hold files, by organization/name."""
    found = {
        f'{organization}/{path.name}': Repository.of_folder(path)
        for path in sorted(folder.iterdir()) if path.is_dir() and NAME.fullmatch(path.name)
    }
    return {name: repository for name, repository in found.items() if repository.files}


def _organization(name: str) -> str:
    if not NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f'{name!r} is no name of an organization')
    return name


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f'{text!r} is no port: 0 to 65535')
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve what the command line names until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('dir', type=Path, metavar='DIR', help='folder with one subfolder for each entry')
    parser.add_argument('--port', type=_port, default=0, help='port to listen on (default: one that is free)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: %(default)s)')
    parser.add_argument('--org', type=_organization, help="organization to serve them under (default: timm_gsa's)")
    args = parser.parse_args(argv)
    try:
        if args.org is None:
            from timm_gsa.models._weights import ORGANIZATION  # imports torch: 5 seconds that --org saves
            args.org = ORGANIZATION
        repositories = entries(args.dir, args.org)
    except OSError as error:
        parser.error(f'cannot read {error.filename or args.dir}: {error.strerror or error}')
    except ImportError as error:
        parser.error(f'without timm_gsa ({error}) --org is needed')
    if not repositories:
        parser.error(f'{args.dir} holds no entries: DIR/NAME/config.json and the like are expected')
    try:
        server = HubServer(repositories, args.host, args.port)
    except OSError as error:
        parser.error(f'cannot listen on {args.host}:{args.port}: {error.strerror or error}')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with server:
            for name, repository in repositories.items():
                print(f'{name}@{repository.commit}: {len(repository.files)} files', file=sys.stderr)
            print(f'HF_ENDPOINT={server.endpoint}', flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == '__main__':
    main()

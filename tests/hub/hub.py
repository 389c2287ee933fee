"""A Hub for tests, on the loopback interface: repositories in memory, uploads, tokens, a log and faults to order.

It answers the requests that huggingface_hub makes for the downloads and uploads of these tests, and no others.

    python tests/hub/hub.py 8000    # serve until Ctrl-C, to rehearse a publication; prints what the client needs
"""
import base64
import contextlib
import hashlib
import json
import re
import socketserver
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote

READ, WRITE = 'hf_read', 'hf_write'  # tokens
MAIN = 'main'


def git_sha1(kind, data):
    return hashlib.sha1(b'%s %d\0' % (kind.encode(), len(data)) + data, usedforsecurity=False).hexdigest()


class File:
    """Content of a file and the digests by which the Hub knows it. Large files, here safetensors, are in git-lfs."""

    def __init__(self, data, path):
        self.data, self.lfs = data, path.endswith('.safetensors')
        self.sha1, self.sha256 = git_sha1('blob', data), hashlib.sha256(data).hexdigest()
        self.etag = self.sha256 if self.lfs else self.sha1

    def listing(self, path):
        entry = {'type': 'file', 'path': path, 'size': len(self.data), 'oid': self.sha1}
        if self.lfs:  # git itself holds a pointer to the file
            pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'
            entry['oid'] = git_sha1('blob', pointer.encode())
            entry['lfs'] = {'oid': self.sha256, 'size': len(self.data), 'pointerSize': len(pointer)}
        return entry


class Repository:
    """Files with all commits that led to them."""

    def __init__(self, private=False):
        self.private = private
        self.commits = {}  # files by id, oldest first
        self.titles = []
        self.commit_files({}, title='initial commit')

    @property
    def commit(self):
        return next(reversed(self.commits))

    @property
    def files(self):
        return self.commits[self.commit]

    def commit_files(self, changed, deleted=(), title=''):
        """Commit {path: bytes} and deletions of paths; returns the id."""
        files = dict(self.files) if self.commits else {}
        files.update({path: File(data, path) for path, data in changed.items()})
        for path in deleted:
            del files[path]
        lines = [f'{path}\0{file.sha256}' for path, file in sorted(files.items())]
        commit = git_sha1('commit', '\n'.join([*lines, title, *self.commits]).encode())
        self.commits[commit] = files
        self.titles.append(title)
        return commit

    def read(self, path):
        """Content of a file on main."""
        return self.files[path].data

    def at(self, revision):
        commit = self.commit if revision == MAIN else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose path matches `pattern`; the first ordered is the first to happen.

    Args:
        skip, times: How many of these requests go well before, and how many go wrong then.
        status: Answer that, with an empty body.
        drop: Close the connection without an answer, 'before' or 'after' doing what was asked for.
        flip: Place in the file of a byte that is sent wrong.
        etag: Say that of the content.
        action: Called before the request is answered.
    """

    method: str
    pattern: str
    skip: int = 0
    times: float = 1
    status: int = 0
    drop: str = ''
    flip: int | None = None
    etag: str = ''
    action: object = None


@dataclass
class Request:
    """A request of the log. `sent` counts bytes of bodies."""

    method: str
    path: str
    status: int = 0
    sent: int = 0


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub would where nothing else is ordered; a route is a method that answers one kind of request."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and body are written apart: 40 ms a request otherwise
    timeout = 60
    REPO, REVISION = '(?P<repo>[^/]+/[^/]+)', '(?P<revision>[^/]+)'
    ROUTES = (
        ('HEAD GET', f'/{REPO}/resolve/{REVISION}/(?P<path>.+)', 'resolve'),
        ('GET', f'/api/models/{REPO}(/revision/{REVISION})?', 'model_info'),
        ('GET', f'/api/models/{REPO}/tree/{REVISION}(/(?P<path>.*))?', 'tree'),
        ('POST', f'/api/models/{REPO}/paths-info/{REVISION}', 'paths_info'),
        ('GET', '/api/whoami-v2', 'whoami'),
        ('POST', '/api/repos/create', 'create'),
        ('POST', '/api/validate-yaml', 'validate_yaml'),
        ('POST', f'/api/models/{REPO}/preupload/{REVISION}', 'preupload'),
        ('POST', f'/api/models/{REPO}/commit/{REVISION}', 'commit'),
    )

    def answer(self):
        path, _, query = self.path.partition('?')
        self.query = {key: values[-1] for key, values in parse_qs(query).items()}
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.token = self.headers.get('Authorization', '').removeprefix('Bearer ') or None
        self.silent = False
        self.request_log, self.fault = Request(self.command, path), None
        if path == '/api/agent-harnesses':  # what the client asks or not depends on where it runs
            self.fail(404)
            return
        self.fault = fault = self.server.enter(self.request_log)
        if fault and fault.action:
            fault.action()
        if fault and fault.status:
            self.fail(fault.status, message='a fault that was ordered')
            return
        if fault and fault.drop:
            self.close_connection = self.silent = True
            if fault.drop == 'before':
                return
        if self.token and self.token not in self.server.tokens:
            self.fail(401, message='Invalid credentials in Authorization header')
            return
        for methods, pattern, name in self.ROUTES:
            # Parts are separated before they are decoded: the client writes a slash inside a revision as %2F.
            match = re.fullmatch(pattern, path) if self.command in methods.split() else None
            if match:
                getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                return
        self.fail(404, message='there is no such page')

    do_GET = do_HEAD = do_POST = answer  # noqa: N815

    def resolve(self, repo, revision, path):
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        headers = {'X-Repo-Commit': commit}
        if path not in files:
            self.fail(404, 'EntryNotFound', f'{ascii(path)} does not exist in {repo}', headers)
            return
        file = files[path]
        etag = (self.fault and self.fault.etag) or file.etag
        headers |= {'ETag': f'"{etag}"', 'Content-Type': 'application/octet-stream'}
        if file.lfs:
            headers |= {'X-Linked-Etag': f'"{etag}"', 'X-Linked-Size': str(len(file.data))}
        data = bytearray(file.data)
        if self.fault and self.fault.flip is not None:
            data[self.fault.flip] ^= 1
        self.send(200, bytes(data), headers)

    def model_info(self, repo, revision=MAIN):
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for path, file in sorted(files.items()):
            listing = file.listing(path)
            sibling = {'rfilename': path, 'size': listing['size'], 'blobId': listing['oid']}
            siblings.append(sibling | ({'lfs': {**listing['lfs'], 'sha256': file.sha256}} if file.lfs else {}))
        self.send_json({
            'id': repo, 'modelId': repo, 'author': repo.partition('/')[0], 'sha': commit,
            'private': False, 'gated': False, 'disabled': False, 'tags': [], 'siblings': siblings,
        })

    def tree(self, repo, revision, path=''):
        found = self.find(repo, revision)
        if found is None:
            return
        recursive = self.query.get('recursive', '').lower() in ('true', '1')
        inside = f'{path.rstrip("/")}/' if path else ''
        self.send_json([
            entry for entry in listings(found[1])
            if entry['path'].startswith(inside) and (recursive or '/' not in entry['path'][len(inside):])])

    def paths_info(self, repo, revision):
        found = self.find(repo, revision)
        if found is None:
            return
        as_json = 'json' in self.headers.get('Content-Type', '')
        paths = json.loads(self.body)['paths'] if as_json else parse_qs(self.body.decode()).get('paths', [])
        self.send_json([entry for entry in listings(found[1]) if entry['path'] in paths])

    def find(self, repo, revision):
        """Commit and files of a revision; answers the request where there is none."""
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self.token):
            self.fail(404 if self.token else 401, 'RepoNotFound', 'Repository not found')
            return None
        found = repository.at(revision)
        if found is None:
            self.fail(404, 'RevisionNotFound', f'{repo} has no revision {ascii(revision)}')
        return found

    def may_write(self, namespace):
        if not self.token:
            self.fail(401, message='Invalid username or password.')
        elif namespace not in self.server.tokens[self.token]:
            self.fail(403, message=f"You don't have the rights to write to the namespace {namespace}")
        else:
            return True
        return False

    def whoami(self):
        if not self.token:
            self.fail(401, message='Invalid username or password.')
            return
        namespaces = self.server.tokens[self.token]
        self.send_json({
            'type': 'user', 'name': 'tester', 'fullname': 'tester',
            'orgs': [{'type': 'org', 'name': name} for name in namespaces],
            'auth': {'accessToken': {'displayName': 'test', 'role': 'write' if namespaces else 'read'}},
        })

    def create(self):
        asked = json.loads(self.body)
        namespace = asked.get('organization') or 'tester'
        name = f'{namespace}/{asked["name"]}'
        if not self.may_write(namespace):
            return
        url = f'{self.server.endpoint}/{name}'
        if name in self.server.repositories:
            self.send_json({'error': 'You already created this model repo', 'url': url}, 409)
            return
        private = asked.get('visibility') == 'private' or bool(asked.get('private'))
        self.server.repositories[name] = Repository(private=private)
        self.send_json({'url': url, 'name': name, 'id': name})

    def validate_yaml(self):
        self.send_json({'errors': [], 'warnings': []})

    def preupload(self, repo, revision):
        """All files go into the commit itself: neither git-lfs nor xet is needed."""
        found = self.find(repo, revision) if self.may_write(repo.partition('/')[0]) else None
        if found:
            self.send_json({'files': [
                {'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False,
                 'oid': found[1][file['path']].sha1 if file['path'] in found[1] else None}
                for file in json.loads(self.body)['files']]})

    def commit(self, repo, revision):
        found = self.find(repo, revision) if self.may_write(repo.partition('/')[0]) else None
        if not found:
            return
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        changed = {}
        for operation in operations:
            if operation['key'] != 'file':
                self.fail(400, message=f'{operation["key"]} is not possible')
                return
            changed[operation['value']['path']] = base64.b64decode(operation['value']['content'], validate=True)
        with self.server.lock:
            repository = self.server.repositories[repo]
            if header['value'].get('parentCommit', repository.commit) != repository.commit:
                self.fail(412, message='A commit has happened since. Please refresh and try again.')
                return
            commit = repository.commit_files(changed, title=header['value']['summary'])
        self.send_json({
            'success': True, 'commitOid': commit, 'commitUrl': f'{self.server.endpoint}/{repo}/commit/{commit}',
            'hookOutput': '',
        })

    def fail(self, status, code=None, message='', headers=None):
        """Answer with an error, which the client tells by `code` and shows with `message`."""
        headers = {**(headers or {}), 'X-Error-Message': message.encode('ascii', 'replace').decode()}
        self.send_json({'error': message}, status, {**headers, 'X-Error-Code': code} if code else headers)

    def send_json(self, content, status=200, headers=None):
        self.send(status, json.dumps(content).encode(), {'Content-Type': 'application/json', **(headers or {})})

    def send(self, status, data, headers):
        if self.silent:
            return
        self.request_log.status = status
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)
            self.request_log.sent += len(data)

    def log_message(self, *args):
        pass


def listings(files):
    """What the Hub lists of files and of the folders they are in, sorted by path."""
    folders = {parent.as_posix() for path in files for parent in PurePosixPath(path).parents} - {'.'}
    entries = [file.listing(path) for path, file in files.items()]
    entries += [{'type': 'directory', 'path': path, 'size': 0, 'oid': git_sha1('tree', path.encode())}
                for path in folders]
    return sorted(entries, key=lambda entry: entry['path'])


class Hub(ThreadingHTTPServer):
    """The server, its log and its faults. Use as a context manager: it serves inside."""

    request_queue_size = 128

    def __init__(self, port=0):
        super().__init__(('127.0.0.1', port), Handler)
        self.repositories = {}
        self.tokens = {READ: (), WRITE: ('timm-gsa', 'someone', 'tester')}  # namespaces that they may write to
        self.log = []
        self.faults = []
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def server_bind(self):
        """Bind without asking a name server for the machine's name, which takes long where there is none."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address

    def handle_error(self, request, client_address):
        """Say nothing of clients that went away."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def endpoint(self):
        """What HF_ENDPOINT is to be."""
        return f'http://{self.server_name}:{self.server_port}'

    def publish(self, name, files):
        """Make a repository organization/name with {path: bytes}; returns it."""
        repository = self.repositories.setdefault(name, Repository())
        repository.commit_files(files, title='Add model')
        return repository

    def order(self, method, pattern, **kwargs):
        """Order a fault for requests of a method, or '*', whose path contains the regular expression."""
        fault = Fault(method, pattern, **kwargs)
        with self.lock:
            self.faults.append(fault)
        return fault

    def enter(self, request):
        """Log a request; returns the fault that is due, if any."""
        with self.lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.method in ('*', request.method) and re.search(fault.pattern, request.path):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times:
                        fault.times -= 1
                        return fault
        return None

    def requests(self, method=None, pattern=''):
        """Requests of the log, of one method where it is given, whose path contains the regular expression."""
        with self.lock:
            return [r for r in self.log if method in (None, r.method) and re.search(pattern, r.path)]

    def forget(self):
        """Empty the log and cancel all faults."""
        with self.lock:
            self.log.clear()
            self.faults.clear()


if __name__ == '__main__':
    with Hub(int(sys.argv[1])) as served:
        print(f'export HF_ENDPOINT={served.endpoint} HF_TOKEN={WRITE}', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()

"""A Hub for tests: writable, with access tokens, a log of requests, and faults to order.

It extends the read-only one of tools/serve_hub.py and keeps all files in memory. conftest.py makes fixtures of it.
"""
import base64
import io
import json
import re
import threading
import time
from dataclasses import dataclass, field

import serve_hub

READ, WRITE = 'hf_read', 'hf_write'  # tokens


class Repository(serve_hub.Repository):
    """Files with all commits that led to them. `gated` are the tokens that may download, where not everybody may."""

    def __init__(self, private=False, gated=None):
        self.private, self.gated = private, gated
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
        files.update({path: serve_hub.File.of_bytes(data, path) for path, data in changed.items()})
        for path in deleted:
            del files[path]
        # Unlike that of a folder the id depends on what went before: two commits never share one.
        commit = serve_hub.commit_id(files, title, *self.commits)
        self.commits[commit] = files
        self.titles.append(title)
        return commit

    def read(self, path):
        """Content of a file on main."""
        with self.files[path].open() as file:
            return file.read()

    def at(self, revision):
        commit = self.commit if revision == serve_hub.MAIN else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose path matches `pattern`; the first ordered is the first to happen.

    Args:
        skip, times: How many of these requests go well before, and how many go wrong then.
        delay: Seconds to wait before anything is answered.
        status, headers: Answer that, with an empty body.
        drop: Close the connection without an answer, 'before' or 'after' doing what was asked for.
        cut: Close the connection after so many bytes of the body; further bytes of the file, where it is sent in parts.
        stall: Seconds to send nothing after `cut` bytes, before the connection is closed.
        flip: Place in the file of a byte that is sent wrong.
        size: Pretend that the file has this size, everywhere.
        length: Pretend that the answer has this length, in Content-Length only.
        etag: Say that of the content.
        action: Called before the request is answered.
    """

    method: str
    pattern: str
    skip: int = 0
    times: float = 1
    delay: float = 0
    status: int = 0
    headers: dict = field(default_factory=dict)
    drop: str = ''
    cut: int | None = None
    stall: float = 0
    flip: int | None = None
    size: int | None = None
    length: int | None = None
    etag: str = ''
    action: object = None


@dataclass
class Request:
    """A request of the log. `sent` counts bytes of bodies only."""

    method: str
    path: str
    range: str | None
    token: str | None
    time: float
    status: int = 0
    sent: int = 0

    def __str__(self):
        return f'{self.method} {self.path} -> {self.status}'


class Handler(serve_hub.HubHandler):
    """Answers as the Hub would where nothing else is ordered."""

    _REPO, _REVISION = serve_hub.HubHandler._REPO, serve_hub.HubHandler._REVISION
    ROUTES = (
        *serve_hub.HubHandler.ROUTES,
        ('GET', '/api/whoami-v2', 'whoami'),
        ('POST', '/api/repos/create', 'create'),
        ('POST', '/api/validate-yaml', 'validate_yaml'),
        ('POST', f'/api/models/{_REPO}/preupload/{_REVISION}', 'preupload'),
        ('POST', f'/api/models/{_REPO}/commit/{_REVISION}', 'commit'),
    )
    MAX_BODY = 1 << 28

    def answer(self):
        token = self.headers.get('Authorization', '').removeprefix('Bearer ') or None
        self.token, self.fault = token, None
        path = self.path.partition('?')[0]
        if path == '/api/agent-harnesses':  # what the client asks or not depends on where it runs
            self.request_log = Request(self.command, path, None, token, 0)
            self.fail(404)
            return
        self.request_log, self.fault = self.server.enter(
            Request(self.command, path, self.headers.get('Range'), token, time.monotonic()))
        fault = self.fault
        if fault and fault.action:
            fault.action()
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.status:
            self.fail(fault.status, headers=fault.headers, message='a fault that was ordered')
        elif fault and fault.drop == 'before':
            self.hang_up()
        elif fault and fault.drop == 'after':
            self.wfile = io.BytesIO()
            self.authorize()
            self.hang_up()
        else:
            self.authorize()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def authorize(self):
        if self.token and self.token not in self.server.tokens:
            self.fail(401, message='Invalid credentials in Authorization header')
        else:
            super().answer()

    def hang_up(self):
        self.close_connection = True

    def find(self, repo, revision):
        repository = self.server.repositories.get(repo)
        if repository is not None and repository.private and not self.token:
            self.fail(401, 'RepoNotFound', 'Invalid username or password.')
            return None
        if repository is None:
            self.fail(404 if self.token else 401, 'RepoNotFound', 'Repository not found')
            return None
        if repository.gated is not None and '/resolve/' in self.path:
            if not self.token:
                self.fail(401, 'GatedRepo', f'Access to model {repo} is restricted. You must be authenticated.')
                return None
            if self.token not in repository.gated:
                self.fail(403, 'GatedRepo', f'Access to model {repo} is restricted and you are not authorized.')
                return None
        return super().find(repo, revision)

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
        asked = json.loads(self.read_body())
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
        content = json.loads(self.read_body())['content']
        if re.match(r'---\r?\n(.*\n)*?---', content):
            self.send_json({'errors': [], 'warnings': []})
        else:
            self.send_json({'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata in repo card'}]})

    def preupload(self, repo, revision):
        """All files go into the commit itself: neither git-lfs nor xet is needed."""
        asked = json.loads(self.read_body())
        found = self.find(repo, revision) if self.may_write(repo.partition('/')[0]) else None
        if found:
            files = found[1]
            self.send_json({'files': [
                {'path': path, 'uploadMode': 'regular', 'shouldIgnore': False,
                 'oid': files[path].sha1 if path in files else None}
                for path in (file['path'] for file in asked['files'])
            ]})

    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        found = self.find(repo, revision) if self.may_write(repo.partition('/')[0]) else None
        if not found:
            return
        header = lines[0]['value']
        changed, deleted = {}, []
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file' and value['encoding'] == 'base64':
                changed[value['path']] = base64.b64decode(value['content'], validate=True)
            elif line['key'] == 'deletedFile' and value['path'] in found[1]:
                deleted.append(value['path'])
            elif line['key'] == 'deletedFile':
                self.fail(404, 'EntryNotFound', "A file with this name doesn't exist")
                return
            else:
                self.fail(400, message=f'{line["key"]} is not possible')
                return
        with self.server.lock:
            repository = self.server.repositories[repo]
            if revision != serve_hub.MAIN:
                self.fail(403, message='only main can be committed to')
                return
            if header.get('parentCommit', repository.commit) != repository.commit:
                self.fail(412, message='A commit has happened since. Please refresh and try again.')
                return
            commit = repository.commit_files(changed, deleted, header['summary'])
        self.send_json({
            'success': True, 'commitOid': commit, 'commitUrl': f'{self.server.endpoint}/{repo}/commit/{commit}',
            'hookOutput': '',
        })

    def send_file(self, file, headers):
        fault = self.fault
        if fault and fault.size is not None:
            with file.open() as content:
                data = content.read(fault.size)
            # As the Hub does, take the digest for granted.
            file = serve_hub.File(lambda: io.BytesIO(data), fault.size, file.sha1, file.sha256, file.lfs)
            if file.lfs:
                headers = {**headers, 'X-Linked-Size': str(fault.size)}
        if fault and fault.etag:
            headers = {**headers, 'ETag': f'"{fault.etag}"', 'X-Linked-Etag': f'"{fault.etag}"'}
        super().send_file(file, headers)

    def send_content(self, content, start, stop):
        data = bytearray(content.read(stop - start))
        fault = self.fault
        if fault and fault.flip is not None and start <= fault.flip < stop:
            data[fault.flip - start] ^= 1
        short = len(data) < stop - start
        if fault and fault.cut is not None:
            short = short or fault.cut < len(data)
            del data[fault.cut:]
        self.wfile.write(data)
        if fault and fault.stall:
            self.server.closing.wait(fault.stall)
        if short or (fault and fault.length is not None):
            self.hang_up()

    def send_head(self, status, length, headers):
        self.request_log.status = status
        if self.fault and self.fault.length is not None and status < 300:
            length = self.fault.length
        super().send_head(status, length, headers)
        self.wfile = _Counting(self.wfile, self.request_log)

    def handle_one_request(self):
        plain = self.wfile
        super().handle_one_request()
        self.wfile = plain

    def log_message(self, *args):
        pass


class _Counting:
    """A stream that counts what is written to it into the log."""

    def __init__(self, stream, request):
        self.stream, self.request = stream, request

    def write(self, data):
        written = self.stream.write(data)
        self.request.sent += len(data)
        return written

    def flush(self):
        self.stream.flush()


class Hub(serve_hub.HubServer):
    """The server, its log and its faults. Use as a context manager: it serves inside."""

    def __init__(self):
        super().__init__({}, handler=Handler)
        self.tokens = {READ: (), WRITE: ('timm-gsa', 'someone', 'tester')}  # namespaces that they may write to
        self.log = []
        self.faults = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def publish(self, name, files, **kwargs):
        """Make a repository organization/name with {path: bytes}; returns it."""
        repository = self.repositories.setdefault(name, Repository(**kwargs))
        repository.commit_files(files, title='Add model')
        return repository

    def order(self, method, pattern, **kwargs):
        """Order a fault for requests of a method, or '*', whose path contains the regular expression."""
        fault = Fault(method, pattern, **kwargs)
        with self.lock:
            self.faults.append(fault)
        return fault

    def enter(self, request):
        """Log a request; returns it and the fault that is due, if any."""
        with self.lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.method in ('*', request.method) and re.search(fault.pattern, request.path):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times:
                        fault.times -= 1
                        return request, fault
        return request, None

    def requests(self, method=None, pattern=''):
        """Requests of the log, of one method where it is given, whose path contains the regular expression."""
        with self.lock:
            return [r for r in self.log if method in (None, r.method) and re.search(pattern, r.path)]

    def forget(self):
        """Empty the log and cancel all faults."""
        with self.lock:
            self.log.clear()
            self.faults.clear()

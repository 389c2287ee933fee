"""tools/timm_script.py: where it takes timm's scripts from, and that it runs them as they would run by themselves.

Most tests run the tool as a user does, in a subprocess, against stand-ins made here: a release of "timm" served from
loopback, and installed packages `timm` and `timm_gsa` of a few lines, so that no torch is imported. The tests at the
end use the real packages; those that need timm's real scripts take them from $TIMM_REPO.
"""
import fcntl
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "timm_script.py"
VERSION = "9.8.7"  # of the stand-in
FOLDER = f"pytorch-image-models-{VERSION}"
TIMM_REPO = os.environ.get("TIMM_REPO")

REPORT = """
import json, sys
import timm

if __name__ == "__main__":
    main = sys.modules["__main__"]
    print(json.dumps(dict(
        argv=sys.argv, file=__file__, main=main.__file__, timm=timm.__file__, models=timm.MODELS, path=sys.path,
    )))
"""
EXIT = """
import sys

if __name__ == "__main__":
    how = sys.argv[1]
    if how == "raise":
        raise LookupError("from the script")
    sys.exit(how if how == "a message" else int(how))
"""
WAIT = """
import signal, sys, time

def stop(number, frame):
    print("cleaned up", flush=True)
    sys.exit(7)

if __name__ == "__main__":
    if "--handle" in sys.argv:
        signal.signal(signal.SIGTERM, stop)
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""
WORKERS = """
import multiprocessing, sys
import timm

def where(number):
    return number, timm.__file__, __name__

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(where, [3])[0])
"""
RELEASE = {
    "train.py": REPORT,
    "validate.py": EXIT,
    "benchmark.py": WAIT,
    "bulk_runner.py": WORKERS,
    "hubconf.py": "import timm\n",
    "convert/convert_from_mxnet.py": EXIT,
    "README.md": "stand-in\n",
    "timm/__init__.py": 'raise RuntimeError("the timm beside the scripts was imported")\n',
    "timm/version.py": f"__version__ = '{VERSION}'\n",
}


def member(name: str, content: str = "", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    data = content.encode()
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(files: dict[str, str], *extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Pack files as GitHub does: below one folder, gzipped."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for info, data in [*(member(f"{FOLDER}/{name}", content) for name, content in files.items()), *extra]:
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


class Server(ThreadingHTTPServer):
    """Serves one archive, or whatever `answer` does instead; lists the paths it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.answer: Callable[[Handler], None] = lambda handler: handler.send(archive(RELEASE))
        self.asked = threading.Event()
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/tags"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.asked.set()
        self.server.answer(self)

    def send(self, body: bytes, length: int | None = None, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


class Machine:
    """A user's machine: stand-ins for the installed packages, an empty cache, and the tool."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        self.cache = home / "cache" / "timm_gsa"
        self.scripts = self.cache / f"timm-{VERSION}"
        self.site = home / "site"
        self.install(VERSION)
        package = self.site / "timm_gsa"
        package.mkdir()
        (package / "__init__.py").write_text("import timm\n\ntimm.MODELS.append('gsa_resnet_tiny')\n")
        self.env = {name: value for name, value in os.environ.items() if name != "TIMM_REPO"}
        self.env |= {
            "PYTHONPATH": str(self.site),
            "XDG_CACHE_HOME": str(home / "cache"),
            "TIMM_GSA_ARCHIVES": url,
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def install(self, version: str) -> None:
        package = self.site / "timm"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("MODELS = []\n")
        (package / "version.py").write_text(f"__version__ = '{version}'\n")

    def checkout(self, version: str = VERSION) -> Path:
        folder = self.home / "a checkout"
        for name, content in {**RELEASE, "timm/version.py": f'__version__ = "{version}"\n'}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return folder

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(TOOL), *arguments],
            capture_output=True, text=True, timeout=60, cwd=self.home, env={**self.env, **env},
        )

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(TOOL), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.home, env={**self.env, **env},
        )

    def left_in_cache(self) -> set[str]:
        """What lies in the cache, but for the lock, which is empty and stays."""
        if not self.cache.exists():
            return set()
        return {path.name for path in self.cache.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def machine(tmp_path: Path, server: Server) -> Machine:
    return Machine(tmp_path, server.url)


def report(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Where the scripts come from


def test_downloads_the_tag_of_the_installed_timm_once(machine: Machine, server: Server) -> None:
    first, second = machine.run("train"), machine.run("train")
    assert report(first)["file"] == report(second)["file"] == str(machine.scripts / "train.py")
    assert server.requests == [f"/tags/v{VERSION}.tar.gz"]
    assert "downloading" in first.stderr and second.stderr == ""


def test_keeps_only_the_scripts_with_checksums_that_sha256sum_accepts(machine: Machine) -> None:
    assert machine.run("train").returncode == 0
    kept = {str(path.relative_to(machine.scripts)) for path in machine.scripts.rglob("*") if path.is_file()}
    scripts = {name for name in RELEASE if name.endswith(".py") and "/" not in name}
    assert kept == scripts | {"timm/version.py", "SHA256SUMS"}
    names = [*sorted(scripts), "timm/version.py"]
    expected = [f"{hashlib.sha256(RELEASE[name].encode()).hexdigest()}  {name}" for name in names]
    assert (machine.scripts / "SHA256SUMS").read_text().splitlines() == expected
    assert machine.left_in_cache() == {machine.scripts.name}


def test_cache_hit_makes_no_request_and_needs_no_writable_cache(machine: Machine, server: Server) -> None:
    machine.run("train")
    for lock in machine.cache.glob("*.lock"):
        lock.unlink()
    machine.cache.chmod(0o555)
    try:
        assert machine.run("train", TIMM_GSA_ARCHIVES="http://127.0.0.1:1").returncode == 0
        assert {path.name for path in machine.cache.iterdir()} == {machine.scripts.name}  # root may write all the same
    finally:
        machine.cache.chmod(0o755)
    assert len(server.requests) == 1


def test_cache_is_below_home_without_an_absolute_xdg_cache_home(machine: Machine) -> None:
    for ignored in ("", "relative"):
        found = report(machine.run("train", HOME=str(machine.home), XDG_CACHE_HOME=ignored))["file"]
        assert found == str(machine.home / ".cache" / "timm_gsa" / f"timm-{VERSION}" / "train.py")


def test_each_release_has_its_own_cache_entry(machine: Machine, server: Server) -> None:
    machine.run("train")
    machine.install("9.8.8")
    server.answer = lambda handler: handler.send(archive({**RELEASE, "timm/version.py": "__version__ = '9.8.8'"}))
    assert report(machine.run("train"))["file"] == str(machine.cache / "timm-9.8.8" / "train.py")
    assert machine.left_in_cache() == {"timm-9.8.7", "timm-9.8.8"}


def test_named_folder_comes_before_the_environment_and_the_cache(machine: Machine, server: Server) -> None:
    checkout = machine.checkout()
    for arguments, env in (
        (["--timm-repo", str(checkout)], {"TIMM_REPO": "/nowhere"}),
        ([f"--timm-repo={checkout}"], {}),
        ([f"--timm-repo={checkout.name}"], {}),
        ([], {"TIMM_REPO": str(checkout)}),
    ):
        result = machine.run(*arguments, "train", **env)
        assert report(result)["file"] == str(checkout / "train.py")
        assert result.stderr == ""
    assert server.requests == [] and not machine.cache.exists()


def test_empty_timm_repo_counts_as_unset(machine: Machine, server: Server) -> None:
    assert report(machine.run("train", TIMM_REPO=""))["file"] == str(machine.scripts / "train.py")


def test_checkout_of_another_version_runs_with_a_warning_naming_both(machine: Machine) -> None:
    result = machine.run("--timm-repo", str(machine.checkout("9.9.0.dev0")), "train")
    assert report(result)["models"] == ["gsa_resnet_tiny"]
    assert "warning" in result.stderr and "9.9.0.dev0" in result.stderr and VERSION in result.stderr


def test_checkout_without_a_version_runs_with_a_warning(machine: Machine) -> None:
    checkout = machine.checkout()
    (checkout / "timm" / "version.py").unlink()
    result = machine.run("--timm-repo", str(checkout), "train")
    assert report(result)["models"] == ["gsa_resnet_tiny"]
    assert "warning" in result.stderr and "no version found" in result.stderr


def test_missing_folder_is_named(machine: Machine) -> None:
    result = machine.run("--timm-repo", "nowhere", "train")
    assert result.returncode == 1 and result.stdout == ""
    assert str(machine.home / "nowhere") in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["trian", "hubconf", "convert/convert_from_mxnet", "timm/version", ".."])
def test_missing_script_lists_those_there_are(machine: Machine, name: str) -> None:
    result = machine.run("--timm-repo", str(machine.checkout()), name)
    assert result.returncode == 1
    assert f"no script {name} in" in result.stderr and "benchmark, bulk_runner, train, validate\n" in result.stderr


# What may be wrong with a download


def assert_refused(machine: Machine, result: subprocess.CompletedProcess[str], *said: str) -> None:
    """One clear error that ends in what to do by hand; nothing left behind; and the next try works."""
    assert result.returncode == 1 and result.stdout == ""
    assert "Traceback" not in result.stderr
    for words in said:
        assert words in result.stderr
    assert f"git clone --depth 1 --branch v{VERSION} " in result.stderr
    assert machine.left_in_cache() == set()


def check_that_the_next_try_works(machine: Machine, server: Server) -> None:
    server.answer = lambda handler: handler.send(archive(RELEASE))
    assert report(machine.run("train"))["models"] == ["gsa_resnet_tiny"]


def test_offline_explains_what_to_do_and_that_works(machine: Machine, server: Server) -> None:
    result = machine.run("train", "--model", "a b", TIMM_GSA_ARCHIVES="http://127.0.0.1:1/tags")
    url = f"http://127.0.0.1:1/tags/v{VERSION}.tar.gz"
    assert_refused(machine, result, f"{url} cannot be reached", f"curl -fL {url} | tar xz")
    (told,) = re.findall(rf"python (.*) --timm-repo {FOLDER} train --model 'a b'\n", result.stderr)
    assert told == str(TOOL)
    subprocess.run(["tar", "xz"], input=archive(RELEASE), cwd=machine.home, check=True)
    assert report(machine.run("--timm-repo", FOLDER, "train", "--model", "a b"))["argv"][1:] == ["--model", "a b"]
    assert server.requests == []


@pytest.mark.parametrize("status", [404, 500])
def test_server_error_is_named(machine: Machine, server: Server, status: int) -> None:
    server.answer = lambda handler: handler.send(b"no", status=status)
    assert_refused(machine, machine.run("train"), f"v{VERSION}.tar.gz: the server answered {status}")
    check_that_the_next_try_works(machine, server)


def test_connection_that_breaks_off_is_refused(machine: Machine, server: Server) -> None:
    whole = archive(RELEASE)
    server.answer = lambda handler: handler.send(whole[:-20], length=len(whole))
    assert_refused(machine, machine.run("train"), f"broke off after {len(whole) - 20}")
    check_that_the_next_try_works(machine, server)


def test_broken_chunked_answer_is_refused(machine: Machine, server: Server) -> None:
    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"1000\r\n" + archive(RELEASE)[:100])
        handler.close_connection = True

    server.answer = answer
    assert_refused(machine, machine.run("train"), "broke off")


def test_answer_that_is_no_http_is_refused(machine: Machine, server: Server) -> None:
    def answer(handler: Handler) -> None:
        handler.wfile.write(b"SSH-2.0\r\n")

    server.answer = answer
    assert_refused(machine, machine.run("train"), "cannot be reached")


def test_endless_answer_is_refused(machine: Machine, server: Server) -> None:
    hung_up = threading.Event()

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(128):
                handler.wfile.write(bytes(1 << 20))
        except (BrokenPipeError, ConnectionResetError):
            hung_up.set()

    server.answer = answer
    assert_refused(machine, machine.run("train"), "is larger than 64 MiB")
    assert hung_up.wait(30), "it read to the end all the same"


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1:]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:-20], id="truncated"),
        pytest.param(lambda whole: whole[:-8] + bytes(8), id="checksum"),
        pytest.param(flipped, id="one_byte"),
        pytest.param(lambda whole: b"<html>sign in</html>", id="html"),
        pytest.param(lambda whole: gzip.compress(b"x" * 5000), id="no_tar"),
        pytest.param(lambda whole: gzip.compress(gzip.decompress(whole)[:1100]), id="half_a_tar"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: gzip.compress(bytes(257 << 20), 1), id="bomb"),
    ],
)
def test_damaged_archive_is_refused(machine: Machine, server: Server, damage: Callable[[bytes], bytes]) -> None:
    server.answer = lambda handler: handler.send(damage(archive(RELEASE)))
    assert_refused(machine, machine.run("train"))
    check_that_the_next_try_works(machine, server)


@pytest.mark.parametrize(
    "inside, said",
    [("__version__ = '9.8.6'\n", f"holds timm 9.8.6, not {VERSION}"), ("", "holds no version in timm/version.py")],
)
def test_archive_of_another_version_is_refused(machine: Machine, server: Server, inside: str, said: str) -> None:
    server.answer = lambda handler: handler.send(archive({**RELEASE, "timm/version.py": inside}))
    assert_refused(machine, machine.run("train"), said)
    check_that_the_next_try_works(machine, server)


def test_version_is_read_and_never_run(machine: Machine, server: Server) -> None:
    ran = machine.home / "ran"
    code = f"open({str(ran)!r}, 'w')\n__version__ = '{VERSION}'\n"
    server.answer = lambda handler: handler.send(archive({**RELEASE, "timm/version.py": code}))
    assert machine.run("train").returncode == 0
    assert not ran.exists()


@pytest.mark.parametrize(
    "extra, said",
    [
        (member(f"{FOLDER}/../../evil.py", "evil"), "leads out of it"),
        (member("/tmp/evil.py", "evil"), "leads out of it"),
        (member(f"{FOLDER}\\..\\evil.py", "evil"), "leads out of it"),
        (member(f"{FOLDER}/evil.py", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "evil.py must be one"),
        (member(f"{FOLDER}/evil.py", type=tarfile.LNKTYPE, linkname=f"{FOLDER}/README.md"), "evil.py must be one"),
        (member(f"{FOLDER}/evil.py", type=tarfile.FIFOTYPE), "evil.py must be one"),
        (member(f"{FOLDER}/evil.py", type=tarfile.DIRTYPE), "evil.py must be one"),
        (member("other/train.py", "evil"), "train.py must be one"),
        (member(f"{FOLDER}/evil.py", "#" * (5 << 20)), "evil.py must be one regular file of at most 4 MiB"),
    ],
    ids=["parent", "absolute", "backslash", "symlink", "hardlink", "fifo", "folder", "twice", "huge"],
)
def test_archive_with_an_unsafe_member_is_refused(
        machine: Machine,
        server: Server,
        extra: tuple[tarfile.TarInfo, bytes],
        said: str,
) -> None:
    before = set(machine.home.rglob("*"))
    server.answer = lambda handler: handler.send(archive(RELEASE, extra))
    assert_refused(machine, machine.run("train"), said)
    assert {path for path in set(machine.home.rglob("*")) - before if machine.cache.parent not in path.parents} <= {
        machine.cache.parent
    }
    assert not Path("/tmp/evil.py").exists()


def test_pinned_release_with_other_scripts_is_refused(machine: Machine, server: Server) -> None:
    version = "1.0.28"  # in the table of the tool
    machine.install(version)
    server.answer = lambda handler: handler.send(archive({**RELEASE, "timm/version.py": f"__version__ = '{version}'"}))
    result = machine.run("train")
    assert result.returncode == 1 and "are not those of timm 1.0.28" in result.stderr
    assert "ad615758232fb49b27efb745b43f11b26849cbbbd4d65d562559b569e0ac7cf3" in result.stderr
    assert machine.left_in_cache() == set()


def test_installed_development_version_is_not_looked_for(machine: Machine, server: Server) -> None:
    machine.install("9.9.0.dev0")
    result = machine.run("train")
    assert result.returncode == 1 and "9.9.0.dev0, which is no release" in result.stderr
    assert "--timm-repo" in result.stderr and server.requests == []


def test_mirror_must_be_an_http_address(machine: Machine) -> None:
    result = machine.run("train", TIMM_GSA_ARCHIVES="/srv/archives")
    assert result.returncode == 1
    assert "TIMM_GSA_ARCHIVES must begin with http:// or https://, got /srv/archives" in result.stderr


def test_cache_that_cannot_be_written_is_named(machine: Machine) -> None:
    machine.cache.parent.write_text("a file where the cache should be")
    result = machine.run("train")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"cannot write to the cache {machine.cache}" in result.stderr and "XDG_CACHE_HOME" in result.stderr


@pytest.mark.parametrize("damage", ["edited", "removed", "checksums", "no_checksums"])
def test_changed_cache_is_refused_and_told_how_to_mend(machine: Machine, server: Server, damage: str) -> None:
    machine.run("train")
    if damage == "edited":
        (machine.scripts / "train.py").write_text("print('edited')")
    elif damage == "removed":
        (machine.scripts / "train.py").unlink()
    elif damage == "checksums":
        (machine.scripts / "SHA256SUMS").write_text("garbage\n")
    else:
        (machine.scripts / "SHA256SUMS").unlink()
    result = machine.run("validate", "0")
    assert result.returncode == 1 and f"{machine.scripts} is not as it was downloaded" in result.stderr
    assert ("train.py" if damage in ("edited", "removed") else "SHA256SUMS") in result.stderr
    assert "Traceback" not in result.stderr and len(server.requests) == 1
    shutil.rmtree(machine.scripts)
    check_that_the_next_try_works(machine, server)


def test_two_processes_at_once_download_once(machine: Machine, server: Server) -> None:
    def answer(handler: Handler) -> None:
        server.go_on.wait(30)
        handler.send(archive(RELEASE))

    server.answer = answer
    with machine.start("train") as first:
        assert server.asked.wait(30)
        with machine.start("train") as second:
            assert second.stderr is not None and "waiting for another process" in second.stderr.readline()
            server.go_on.set()
            for process in (first, second):
                out, err = process.communicate(timeout=30)
                assert process.returncode == 0, err
                assert json.loads(out)["models"] == ["gsa_resnet_tiny"]
    assert len(server.requests) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_process_ended_while_downloading_leaves_nothing(machine: Machine, server: Server, number: int) -> None:
    def answer(handler: Handler) -> None:
        whole = archive(RELEASE)
        handler.send(whole[:100], length=len(whole))
        server.go_on.wait(30)

    server.answer = answer
    with machine.start("train") as process:
        assert process.stderr is not None and "downloading" in process.stderr.readline()
        assert server.asked.wait(30)
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in err
    assert machine.left_in_cache() == set()
    check_that_the_next_try_works(machine, server)


def test_remains_of_a_killed_process_are_removed(machine: Machine) -> None:
    remains = machine.cache / f".timm-{VERSION}-0badf00d"
    remains.mkdir(parents=True)
    (remains / "train.py").write_text("half")
    assert machine.run("train").returncode == 0
    assert machine.left_in_cache() == {machine.scripts.name}


def test_terminal_shows_a_progress_bar(machine: Machine) -> None:
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    try:
        subprocess.run(
            [sys.executable, str(TOOL), "train"],
            stdout=subprocess.PIPE, stderr=other_end, cwd=machine.home, env=machine.env, check=True, timeout=60,
        )
        assert "100%" in os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(other_end)


# How the scripts are run


@pytest.fixture
def local(machine: Machine) -> Machine:
    """A machine on which TIMM_REPO names a checkout."""
    machine.env["TIMM_REPO"] = str(machine.checkout())
    return machine


def test_arguments_reach_the_script_as_they_are(local: Machine) -> None:
    tricky = [
        "--timm-repo", "x", "--help", "-h", "--", "", " ", "a b", "--lr=1e-3", "-", "'\"", "*", "$HOME", "é\n", "--",
        "@file", "\udcff",
    ]
    found = report(local.run("train", *tricky))
    assert found["argv"] == [str(local.home / "a checkout" / "train.py"), *tricky]
    assert report(local.run("train.py", "--", "x"))["argv"][1:] == ["--", "x"]
    assert report(local.run("train"))["argv"][1:] == []


def test_installed_timm_wins_over_the_one_beside_the_script(local: Machine) -> None:
    checkout = local.home / "a checkout"
    for folder in (local.home, checkout):
        local.home = folder
        found = report(local.run("train"))
        assert found["timm"] == str(local.site / "timm" / "__init__.py")
        assert found["file"] == found["main"] == str(checkout / "train.py")
        assert str(checkout) not in found["path"] and "" not in found["path"] and str(TOOL.parent) not in found["path"]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_find_the_installed_timm_and_the_scripts_functions(local: Machine, method: str) -> None:
    result = local.run("bulk_runner", method)
    assert result.returncode == 0, result.stderr
    main = "__main__" if method == "fork" else "__mp_main__"
    assert result.stdout.strip() == str((3, str(local.site / "timm" / "__init__.py"), main))


@pytest.mark.parametrize("status", [0, 1, 2, 77, 255])
def test_exit_status_is_the_scripts(local: Machine, status: int) -> None:
    result = local.run("validate", str(status))
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "")


def test_script_that_ends_with_a_message_or_an_exception_shows_it(local: Machine) -> None:
    result = local.run("validate", "a message")
    assert (result.returncode, result.stderr) == (1, "a message\n")
    result = local.run("validate", "raise")
    assert result.returncode == 1 and result.stderr.endswith("LookupError: from the script\n")


@pytest.mark.parametrize(
    "number, arguments, status, printed",
    [
        (signal.SIGTERM, [], -signal.SIGTERM, ""),
        (signal.SIGTERM, ["--handle"], 7, "cleaned up\n"),
        (signal.SIGINT, [], -signal.SIGINT, "interrupted\n"),
    ],
)
def test_signals_reach_the_script(
        local: Machine,
        number: int,
        arguments: list[str],
        status: int,
        printed: str,
) -> None:
    with local.start("benchmark", *arguments) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, printed)


def test_help_and_no_arguments_say_how_to_use_it(machine: Machine, server: Server) -> None:
    (machine.site / "timm" / "version.py").unlink()  # neither needs a timm
    asked, nothing = machine.run("--help"), machine.run()
    assert asked.returncode == 0 and nothing.returncode == 2
    assert asked.stdout == nothing.stderr
    for words in ("train, validate, inference, benchmark, onnx_export", "--timm-repo DIR", "TIMM_REPO", "_ARCHIVES="):
        assert words in asked.stdout
    assert server.requests == []


@pytest.mark.parametrize("arguments", [["--timm-repo"], ["--timm", "x", "train"], ["--verbose", "train"]])
def test_wrong_command_line_is_refused(machine: Machine, arguments: list[str]) -> None:
    result = machine.run(*arguments)
    assert result.returncode == 2 and "usage: timm_script.py" in result.stderr


@pytest.mark.parametrize("package", ["timm", "timm_gsa"])
def test_missing_package_is_named(local: Machine, package: str) -> None:
    shutil.rmtree(local.site / package)
    # -S: without the packages that are really installed
    command = [sys.executable, "-S", str(TOOL), "train"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=local.home, env=local.env, timeout=60)
    assert result.returncode == 1 and result.stdout == ""
    assert f"{package} is not installed for {sys.executable}; pip install" in result.stderr


def test_error_inside_our_package_is_not_hidden(local: Machine) -> None:
    (local.site / "timm_gsa" / "__init__.py").write_text("import a_module_that_is_missing\n")
    result = local.run("train")
    assert result.returncode == 1 and "a_module_that_is_missing" in result.stderr
    assert "timm_gsa is not installed" not in result.stderr


# With the real packages


def source_module() -> Any:
    spec = importlib.util.spec_from_file_location("_timm_source", TOOL.with_name("_timm_source.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_installed_timm_is_the_one_that_is_imported() -> None:
    import timm

    found = source_module().installed_timm()
    assert found.version == timm.__version__
    assert found.folder == Path(timm.__file__).parent


def real_env(**env: str) -> dict[str, str]:
    """The environment of this test run, with our own autoload switched off: the tool must not need it."""
    return {**os.environ, "TIMM_GSA_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", **env}


def test_both_ranks_of_torchrun_create_a_model_of_ours(tmp_path: Path, server: Server) -> None:
    version = source_module().installed_timm().version
    if version in source_module().PINNED:
        pytest.skip("a stand-in for a release whose digest is pinned is refused")
    code = """
import os
import timm

if __name__ == "__main__":
    timm.create_model("gsa_resnet_tiny")
    os.write(1, f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} is done\\n".encode())
"""
    release = {**RELEASE, "train.py": code, "timm/version.py": f"__version__ = '{version}'\n"}
    server.answer = lambda handler: handler.send(archive(release))
    env = real_env(XDG_CACHE_HOME=str(tmp_path), TIMM_GSA_ARCHIVES=server.url, NO_PROXY="*", no_proxy="*", TIMM_REPO="")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TOOL), "train"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, env=env,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2 is done", "rank 1 of 2 is done"]
    assert len(server.requests) == 1


# With timm's real scripts

needs_scripts = pytest.mark.skipif(not TIMM_REPO, reason="TIMM_REPO does not name a checkout with timm's real scripts")


def run_real(name: str, *arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(TOOL), "--timm-repo", os.path.abspath(TIMM_REPO or ""), name, *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, env=real_env(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of two classes, sixteen to train on, and a model trained on them by timm's train.py."""
    from PIL import Image

    home = tmp_path_factory.mktemp("training")
    dice = random.Random(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, base in (("dark", 0), ("light", 160)):
            folder = home / "data" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = bytes(base + dice.randrange(64) for _ in range(64 * 64 * 3))
                Image.frombytes("RGB", (64, 64), pixels).save(folder / f"{label}_{number}.png")
    run_real(
        "train", "--data-dir", "data", "--train-split", "train", "--val-split", "val", "--model", "gsa_resnet_tiny",
        "--num-classes", "2", "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "-b", "8", "-j", "1",
        "--device", "cpu", "--no-prefetcher", "--output", "output", "--experiment", "tiny",
        cwd=home,
    )
    return home


@needs_scripts
def test_real_train_shows_timms_own_help(tmp_path: Path) -> None:
    shown = run_real("train", "--help", cwd=tmp_path)
    assert shown.startswith("usage: train.py") and "--train-split" in shown


@needs_scripts
@pytest.mark.slow
def test_real_train_then_validate(trained: Path) -> None:
    assert (trained / "output" / "tiny" / "summary.csv").is_file()
    shown = run_real(
        "validate", "--data-dir", "data/val", "--model", "gsa_resnet_tiny", "--num-classes", "2", "-b", "8", "-j", "1",
        "--device", "cpu", "--no-prefetcher", "--checkpoint", "output/tiny/last.pth.tar",
        cwd=trained,
    )
    result = json.loads(shown[shown.index("--result") + len("--result"):])
    assert result["model"] == "gsa_resnet_tiny" and 0 <= result["top1"] <= 100


@needs_scripts
@pytest.mark.slow
def test_real_inference(trained: Path) -> None:
    pytest.importorskip("pandas", reason="timm's inference.py needs pandas")
    run_real(
        "inference", "--data-dir", "data/val", "--model", "gsa_resnet_tiny", "--num-classes", "2", "-b", "8", "-j", "1",
        "--device", "cpu", "--checkpoint", "output/tiny/last.pth.tar", "--results-dir", "results",
        "--results-format", "csv", "--topk", "1",
        cwd=trained,
    )
    (table,) = (trained / "results").glob("*.csv")
    assert len(table.read_text().splitlines()) == 1 + 8


@needs_scripts
@pytest.mark.slow
def test_real_benchmark(tmp_path: Path, ours: str) -> None:
    shown = run_real(
        "benchmark", "--model", ours, "--bench", "both", "-b", "2", "--num-warm-iter", "1", "--num-bench-iter", "5",
        "--device", "cpu", "--precision", "float32",
        cwd=tmp_path,
    )
    result = json.loads(shown[shown.index("--result") + len("--result"):])
    assert result["model"] == ours
    assert result["infer_samples_per_sec"] > 0 and result["train_samples_per_sec"] > 0


@needs_scripts
@pytest.mark.slow
def test_real_onnx_export_of_a_checkpoint(trained: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="timm's onnx_export.py needs onnx")
    run_real(
        "onnx_export", "--model", "gsa_resnet_tiny", "--num-classes", "2", "--img-size", "64",
        "--checkpoint", "output/tiny/last.pth.tar", "tiny.onnx",
        cwd=trained,
    )
    onnx.checker.check_model(onnx.load(trained / "tiny.onnx"))


@needs_scripts
@pytest.mark.slow
def test_real_onnx_export_for_all_batches_and_sizes(tmp_path: Path, ours: str) -> None:
    import timm
    import torch

    import timm_gsa  # noqa: F401

    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="timm's onnx_export.py needs it")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported graph")
    if torch.__version__.startswith("2.5."):
        pytest.skip("today's onnxscript and torch 2.5 fail at timm's own ResNet")
    run_real("onnx_export", "--model", ours, "--dynamo", "--dynamic-size", "model.onnx", cwd=tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    model = timm.create_model(ours, pretrained=True).eval()
    for batch in (1, 3):
        for height, width in ((64, 64), (96, 80)):
            x = torch.randn(batch, 3, height, width)
            with torch.no_grad():
                scores, expected = torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), model(x)
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

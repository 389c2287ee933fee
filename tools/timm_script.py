"""Run one of timm's own scripts, unmodified, with the models of timm_gsa known.

    python tools/timm_script.py train --model gsa_resnet_tiny --pretrained --data-dir DIR ...
    python tools/timm_script.py validate --model gsa_resnet_tiny --checkpoint output/train/.../model_best.pth.tar ...
    torchrun --nproc_per_node 2 tools/timm_script.py train ...
"""
from __future__ import annotations

import argparse
import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from _timm_source import (
    ARCHIVES_VARIABLE,
    REPOSITORY,
    DownloadError,
    InstalledTimm,
    SourceError,
    archive_url,
    cache_root,
    installed_timm,
    read_version,
    release_scripts,
)

DESCRIPTION = """\
Run one of timm's own scripts, unmodified, with the models of timm_gsa known.

positional arguments:
  NAME             train, validate, inference, benchmark, onnx_export, or any other
                   script at the top level of timm's repository
  ARGS             passed on to the script as they are; `NAME --help` lists its own
"""

EPILOG = f"""\
Where the scripts come from, the first that applies:
  1. --timm-repo DIR
  2. the folder in the environment variable TIMM_REPO
  3. the cache: timm_gsa/timm-VERSION in $XDG_CACHE_HOME, else in ~/.cache
  4. the source archive of the installed timm release, downloaded to the cache once, from
     {REPOSITORY}
     ({ARCHIVES_VARIABLE}=URL: from URL/vVERSION.tar.gz instead)

`import timm` in the scripts is always the installed timm, whatever lies beside them.

examples:
  python tools/timm_script.py train --help
  python tools/timm_script.py train --model gsa_resnet_tiny --pretrained --data-dir DIR --num-classes 10
  python tools/timm_script.py validate --model gsa_resnet_tiny --data-dir DIR --num-classes 10 --checkpoint FILE
  torchrun --nproc_per_node 2 tools/timm_script.py train ...
  python tools/timm_script.py bulk_runner --model-list 'gsa_*' tools/timm_script.py benchmark
"""


def main(argv: Sequence[str]) -> None:
    """Run the script that the command line names; it ends the process as it would when run by itself.

    Args:
        argv: the command line without the program: `[--timm-repo DIR] NAME [ARGS ...]`.

    Raises:
        SystemExit: status 2 for a wrong command line, 1 when the script cannot be had, else the script's own status.
    """
    own, command = _split(argv)
    parser = _parser()
    options = parser.parse_args(own)
    if not command:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    name, *arguments = command
    try:
        timm = installed_timm()
        script = _find_script(options.timm_repo or os.environ.get("TIMM_REPO"), name, timm)
    except DownloadError as error:
        _fail(f"{error}\n\n{_by_hand(timm.version, command)}")
    except SourceError as error:
        _fail(f"{error}\n(a checkout is named by --timm-repo DIR, given before {name}, or by TIMM_REPO)")
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    _run(script, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm_script.py",
        usage="%(prog)s [-h] [--timm-repo DIR] NAME [ARGS ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--timm-repo",
        metavar="DIR",
        help="checkout of timm's repository to take the scripts from; must be given before NAME",
    )
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into our options and the command from NAME on: argparse cannot pass on every argument as it is."""
    start = 0
    while start < len(argv) and argv[start].startswith("-"):
        start += 2 if argv[start] == "--timm-repo" else 1
    return list(argv[:start]), list(argv[start:])


def _find_script(repo: str | None, name: str, timm: InstalledTimm) -> Path:
    """Return the path of a script, in the folder the user named or in the release's."""
    if repo:
        folder = Path(os.path.abspath(Path(repo).expanduser()))
        if not folder.is_dir():
            raise SourceError(f"no folder {folder}; it must be a checkout of {REPOSITORY}")
    else:
        folder = release_scripts(timm.version)
    # Modules without a main part (hubconf.py, setup.py) are not scripts.
    modules = (path for path in sorted(folder.glob("*.py")) if path.is_file())
    scripts = {path.stem: path for path in modules if b"__main__" in path.read_bytes()}
    script = scripts.get(name.removesuffix(".py"))
    if script is None:
        raise SourceError(f"no script {name} in {folder}; there are: {', '.join(scripts) or 'none at all'}")
    if repo and (version := read_version(folder)) != timm.version:
        _say(
            f"warning: the scripts in {folder} are those of timm {version or '(no version found)'}, "
            f"the installed timm is {timm.version}"
        )
    return script


def _by_hand(version: str, command: Sequence[str]) -> str:
    """Say what to do without a network."""
    folder = f"pytorch-image-models-{version}"
    return (
        f"Where there is a network, get the scripts by hand, with either of\n"
        f"    git clone --depth 1 --branch v{version} {REPOSITORY}.git {folder}\n"
        f"    curl -fL {archive_url(version)} | tar xz\n"
        f"and name the folder {folder} that this makes:\n"
        f"    python {shlex.quote(sys.argv[0])} --timm-repo {folder} {shlex.join(command)}\n"
        f"(or set TIMM_REPO to it). What is downloaded is kept in {cache_root()}."
    )


def _run(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as the main program of this process.

    In this process, so that signals, exit status, standard streams and torchrun's environment are the script's own. As
    `runpy` leaves `sys.path` alone, the `timm` folder that lies beside the script in a checkout never shadows the
    installed one, neither here nor in spawned workers, which take over this `sys.path` and the script as main module.
    """
    here = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0] or os.curdir).resolve() == here:
        del sys.path[0]  # no tool of ours is to shadow a module that the script imports
    try:
        import timm_gsa  # noqa: F401  # registers the models, also where autoload is switched off
    except ModuleNotFoundError as error:
        if error.name != "timm_gsa":
            raise
        _fail(f"timm_gsa is not installed for {sys.executable}; pip install -e {shlex.quote(str(here.parent))}")
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _say(message: str) -> None:
    print(f"timm_script: {message}", file=sys.stderr, flush=True)


def _fail(message: str, status: int = 1) -> NoReturn:
    _say(f"error: {message}")
    raise SystemExit(status)


if __name__ == "__main__":
    main(sys.argv[1:])

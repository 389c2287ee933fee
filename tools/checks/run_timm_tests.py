#!/usr/bin/env python
"""Run timm's own model tests on the models of this package.

Fetches the source archive of the installed timm release with pip (once, into the user's cache folder), unpacks its
tests into a temporary folder and runs tests/test_models.py there on our models, by `_timm_tests_plugin.py`. The tables
in that file name every test of timm that is changed or left out, with the reason, which is printed with each run.

    python tools/checks/run_timm_tests.py                      # the tiny models and the smallest real one of each kind
    python tools/checks/run_timm_tests.py --all                # every registered model
    python tools/checks/run_timm_tests.py 'san*' --repeat 3    # chosen models, with three seeds
    python tools/checks/run_timm_tests.py gsa_resnet26 -- -k backward -x

A run is good if every applicable test ran and passed for every chosen model. A skip, a test that did not run, a test of
a new timm release that the tables do not name, and fewer test functions than the release has are failures too.

Exit status: 0 good, 1 not good, 2 a wrong argument or an unusable archive, 3 the archive could not be fetched.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from _timm_tests_plugin import PACKAGE, our_models, reason_excused

from timm_gsa.models._families import FAMILIES

PLUGIN = Path(__file__).with_name("_timm_tests_plugin.py")
DEFAULT_MODELS = tuple(name for family in FAMILIES for name in (*family.tiny, *family.smallest))

# Least number of test functions for each model, counted with the excused ones and without those that need weights,
# from that timm release on.
MINIMUM_FUNCTIONS: dict[tuple[int, ...], int] = {(1, 0, 21): 11, (1, 0, 31): 28}

VERSION_FILE = "timm/version.py"

PYTEST_INI = """\
[pytest]
filterwarnings =
    ignore::pytest.PytestUnknownMarkWarning
"""


class ArchiveError(Exception):
    """The archive is not usable."""


class FetchError(Exception):
    """The archive cannot be fetched."""


def cache_root() -> Path:
    """Folder for archives: timm_gsa in $XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "timm_gsa"


def read_tests(archive: Path, version: str) -> dict[str, bytes]:
    """Read timm's tests from a source archive of timm.

    Args:
        archive: A .tar.gz file, of the package index or of timm's repository.
        version: The release that it must hold.

    Returns:
        Contents of every file below tests/, by path relative to the archive's folder.

    Raises:
        ArchiveError: The file cannot be read, holds another release or has no tests.
    """
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, mode="r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                if name == VERSION_FILE or fnmatch.fnmatch(name, "tests/*.py"):
                    file = tar.extractfile(member)
                    files[name] = file.read() if file else b""
    except (OSError, EOFError, zlib.error, tarfile.TarError) as e:
        raise ArchiveError(f"{archive}: {e}") from e
    match = re.search(r"""^__version__\s*=\s*['"]([^'"]+)['"]""", files.pop(VERSION_FILE, b"").decode(), re.MULTILINE)
    if match is None:
        raise ArchiveError(f"{archive}: no {VERSION_FILE} with a version in it, so no source archive of timm")
    if match[1] != version:
        raise ArchiveError(f"{archive}: holds timm {match[1]}, the installed one is {version}")
    if "tests/test_models.py" not in files:
        raise ArchiveError(f"{archive}: timm {version} without tests/test_models.py")
    return files


def fetch_archive(version: str, folder: Path) -> Path:
    """Return the source archive of a timm release, from `folder` or by pip.

    Args:
        version: The release.
        folder: Folder of archives; created if missing.

    Returns:
        Path of the archive, checked by `read_tests`.

    Raises:
        ArchiveError: The downloaded archive is not that release.
        FetchError: pip could not download it.
    """
    target = folder / f"timm-{version}.tar.gz"
    if target.exists():
        try:
            read_tests(target, version)
            return target
        except ArchiveError as e:
            print(f"fetching anew: {e}", flush=True)
    print(f"fetching the source archive of timm {version} with pip", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # Even for a download pip runs the build backend, which it installs for that.
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet",
            "--no-deps", "--no-binary", "timm", "--dest", temporary, f"timm=={version}",
        ]  # fmt: skip
        pip = subprocess.run(command, capture_output=True, text=True)
        files = list(Path(temporary).glob("timm-*.tar.gz"))
        if pip.returncode != 0 or len(files) != 1:
            said = "\n".join(pip.stderr.strip().splitlines()[-8:]) or f"exit status {pip.returncode}, no archive"
            raise FetchError(
                f"pip could not fetch the source archive of timm {version}:\n{said}\n"
                f"Without a network, fetch it elsewhere with\n"
                f"    pip download --no-binary timm --no-deps timm=={version}\n"
                f"and give it with --archive timm-{version}.tar.gz, or put it into {folder}. If timm {version} is no "
                f"release of the package index, give a source archive of it with --archive."
            )
        read_tests(files[0], version)
        os.replace(files[0], target)
    return target


def choose_models(patterns: Sequence[str], registered: Sequence[str]) -> list[str]:
    """Choose the registered names that match any of the shell patterns, in the order of `registered`.

    Raises:
        ValueError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(registered, pattern):
            raise ValueError(f"no model of {PACKAGE} matches {pattern!r}; there are {', '.join(registered)}")
    return [n for n in registered if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def run_tests(
        tests: Mapping[str, bytes],
        models: Sequence[str],
        seed: int,
        pytest_args: Sequence[str],
) -> tuple[int, dict[str, Any] | None]:
    """Run timm's tests once.

    Args:
        tests: What `read_tests` returns.
        models: Registered names.
        seed: Seed of the run.
        pytest_args: More arguments for pytest.

    Returns:
        Exit status of pytest and the plugin's report, None where pytest ended before it could write one.
    """
    env = dict(os.environ)
    env.pop("GITHUB_ACTIONS", None)  # with it timm leaves out tests and big models
    env.pop("PYTEST_ADDOPTS", None)  # the run must be the same wherever it is started
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if "PYTHONPATH" in env:  # the folder changes below
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in env["PYTHONPATH"].split(os.pathsep) if p)
    with tempfile.TemporaryDirectory(prefix="timm_tests_") as temporary:
        # the tests alone: beside a timm folder they would import that one, not the installed one
        folder = Path(temporary)
        for name, content in tests.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        shutil.copy(PLUGIN, folder)
        (folder / "pytest.ini").write_text(PYTEST_INI, encoding="ascii")
        (folder / "tmp").mkdir()
        env["TMPDIR"] = str(folder / "tmp")  # some torch leaves a folder behind when it is ended
        report = folder / "report.json"
        command = [
            sys.executable, "-m", "pytest", "tests/test_models.py", "-c", "pytest.ini", "--rootdir", ".",
            "-p", PLUGIN.stem, "-p", "no:cacheprovider", "-q", "--tb=short", "-rfEsxX", "--durations=5",
            "--disable-warnings", "--our-models", ",".join(models), "--our-seed", str(seed),
            "--our-report", str(report), *pytest_args,
        ]  # fmt: skip
        status = subprocess.run(command, cwd=folder, env=env).returncode
        return status, json.loads(report.read_text(encoding="utf-8")) if report.exists() else None


def functions_of(report: dict[str, Any], model: str) -> set[str]:
    """Names of the test functions that apply to a model."""
    return {c["function"] for c in report["cases"].values() if c["model"] == model}


def judge(status: int, report: dict[str, Any] | None, version: str) -> list[str]:
    """Problems of a run.

    Args:
        status: Exit status of pytest.
        report: The plugin's report.
        version: The timm release, for the number of test functions to expect.

    Returns:
        One sentence for each problem; empty for a good run.
    """
    if report is None:
        return [f"pytest ended with status {status} before it could report"]
    problems = []
    idle = [case for case, what in report["cases"].items() if what["outcome"] == "not run"]
    if idle:
        problems.append(f"{len(idle)} applicable cases did not run, the first is {idle[0]}")
    for case, what in report["cases"].items():
        if what["outcome"] not in ("passed", "not run"):
            problems.append(f"{case}: {what['outcome']}" + (f" ({what['message']})" if "message" in what else ""))
    if not report["cases"]:
        problems.append(f"no test was collected for {', '.join(report['models'])}")
    release = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    known = max((r for r in MINIMUM_FUNCTIONS if r <= release), default=min(MINIMUM_FUNCTIONS))
    weightless = set(report["needs_weights"])
    for model in report["models"]:
        excused = {function for function in report["functions"] if reason_excused(function, model)}
        count = len((functions_of(report, model) | excused) - weightless)
        if count < MINIMUM_FUNCTIONS[known]:
            problems.append(f"{model}: {count} test functions, timm {version} has at least {MINIMUM_FUNCTIONS[known]}")
    for function, model in report["missing"]:
        problems.append(f"{function}: runs for other models, not for {model}")
    for function in report["undecided"]:
        problems.append(f"{function}: new in timm's tests; decide on it in a table of {PLUGIN.name}")
    for function in report["contradictions"]:
        problems.append(f"{function}: in NOT_OURS of {PLUGIN.name}, yet timm aims it at a model of ours")
    if status != 0 and not problems:
        problems.append(f"pytest ended with status {status}")
    return problems


def summarize(report: dict[str, Any]) -> str:
    """Table of a run: number of cases and outcomes for each model."""
    outcomes = ("passed", "failed", "skipped", "not run")
    lines = [f"{'model':24}{'functions':>10}{'cases':>8}" + "".join(f"{o:>9}" for o in outcomes) + f"{'seconds':>9}"]
    for model in report["models"]:
        cases = [c for c in report["cases"].values() if c["model"] == model]
        count = Counter(c["outcome"] for c in cases)
        lines.append(
            f"{model:24}{len(functions_of(report, model)):>10}{len(cases):>8}"
            + "".join(f"{count[o]:>9}" for o in outcomes)
            + f"{sum(c['seconds'] for c in cases):>9.1f}"
            + ("  with weights" if model in report["with_weights"] else "")
        )
    return "\n".join(lines)


def left_out(report: dict[str, Any]) -> str:
    """List of timm's tests that were left out, with reasons."""
    lines = [f"{len(report['left_out'])} of timm's {len(report['functions'])} test functions left out:"]
    lines += _by_reason(report["left_out"])
    lines.append(f"{len(report['excused'])} cases of the other functions left out:")
    lines += _by_reason({case.partition("::")[2]: reason for case, reason in report["excused"].items()})
    if without := [m for m in report["models"] if m not in report["with_weights"]]:
        tests = ", ".join(report["needs_weights"])
        lines.append(f"no weights, so no test of loading them ({tests}): {', '.join(without)}")
    return "\n".join(lines)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"  {reason}: {', '.join(sorted(those))}" for reason, those in sorted(names.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, pytest_args = argv[:cut], argv[cut + 1:]
    parser = argparse.ArgumentParser(
        description="Run timm's own model tests on the models of this package.",
        usage="%(prog)s [MODEL-PATTERN ...] [--all] [--repeat N] [--seed S] [--archive FILE] [-- PYTEST-ARGUMENT ...]",
    )
    add = parser.add_argument
    default = " ".join(DEFAULT_MODELS)
    add("patterns", nargs="*", metavar="MODEL-PATTERN", help=f"shell patterns of registered names (default: {default})")
    add("--all", action="store_true", help="every registered model")
    add("--repeat", type=int, default=1, metavar="N", help="run N times, each time with another seed")
    add("--seed", type=int, metavar="S", help="seed of the first run, the next ones count on (default: any, printed)")
    add("--archive", type=Path, metavar="FILE", help="source archive of the installed timm release (default: by pip)")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error(f"--repeat must be at least 1, got {args.repeat}")
    if args.all and args.patterns:
        parser.error(f"--all stands for every model, leave out {' '.join(args.patterns)}")
    seed = random.randrange(2**31) if args.seed is None else args.seed

    try:
        version = timm.__version__
        tests = read_tests(args.archive or fetch_archive(version, cache_root()), version)
        models = choose_models(["*"] if args.all else args.patterns or DEFAULT_MODELS, our_models())
    except FetchError as e:
        print(e, file=sys.stderr)
        return 3
    except (ArchiveError, ValueError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 2

    print("timm's time limits are not applied: they measure the machine", flush=True)
    bad = 0
    for run in range(args.repeat):
        which = f"run {run + 1} of {args.repeat}"
        print(f"\n{which}: timm {version}, --seed {seed + run}, {', '.join(models)}", flush=True)
        status, report = run_tests(tests, models, seed + run, pytest_args)
        problems = judge(status, report, version)
        if report is not None:
            print(f"\n{summarize(report)}")
            if run == 0:
                print(f"\n{left_out(report)}")
        if problems:
            bad += 1
            print(f"\n{which} is not good:\n  " + "\n  ".join(problems))
    print(f"\n{args.repeat - bad} of {args.repeat} runs good", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    # an exception, so that pytest ends with this process and the temporary folder goes
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None

r"""Train every network of a comparison with every seed, by timm's train.py; resumable.

    python tools/measure/run_comparison.py hub_configs/recipes/comparisons/c100.yaml --output DIR --minutes 8 \
        --train pytorch-image-models/train.py -- --data-dir DATA

The same command continues where the last one stopped: an interrupted run resumes after its last complete epoch, and
finished runs are skipped. The first seed of all networks comes before the second. Arguments after -- are passed to
every run. A run's folder is DIR/NAME-seedN, with the output of train.py in train.log, for compare_runs.py.

Exit status: 0 if all runs are finished, 1 if one failed, 2 for a wrong command line, 3 if the time was over.
"""
from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

ROOT = Path(__file__).parents[2]
FINISHED = 'finished'  # file in the folder of a finished run
PATIENCE = 10  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    Attributes:
        seeds: Seeds of every network.
        runs: Arguments of train.py by the name of the run.
    """

    seeds: list[int]
    runs: dict[str, list[str]]

    @classmethod
    def of(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            ValueError: The file is no plan.
            OSError: The file is unreadable.
        """
        try:
            given = yaml.safe_load(path.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f'{path} is no plan: {error}') from error
        if not isinstance(given, dict) or set(given) != {'seeds', 'runs'}:
            raise ValueError(f'{path} is no plan: it must hold seeds and runs, nothing else')
        seeds, runs = given['seeds'], given['runs']
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise ValueError(f'{path}: seeds must be a list of whole numbers, got {seeds}')
        if not isinstance(runs, dict) or not runs or not all(
                isinstance(each, str) for item in runs.items() for each in item):
            raise ValueError(f'{path}: runs must be names with arguments of train.py, got {runs}')
        return cls(seeds, {name: shlex.split(arguments) for name, arguments in runs.items()})


def default_script() -> Path | None:
    """train.py of the checkout of timm that TIMM_REPO names."""
    repo = os.environ.get('TIMM_REPO')
    return Path(repo, 'train.py') if repo else None


def train(script: Path, folder: Path, arguments: Sequence[str], seconds: float) -> int | None:
    """Start or resume one run and wait for it.

    Args:
        script: timm's train.py.
        folder: Its output folder; the run resumes from `last.pth.tar` there.
        arguments: Arguments of train.py.
        seconds: Time after which it is stopped.

    Returns:
        Its exit status; None if it was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / 'last.pth.tar'
    command = [
        sys.executable, str(script), *arguments, '--output', str(folder.parent), '--experiment', folder.name,
        *(['--resume', str(last)] if last.exists() else []),
    ]
    with (folder / 'train.log').open('ab') as log:
        log.write(f'$ {shlex.join(command)}\n'.encode())
        log.flush()
        # A process group of its own, so that the workers that read images are stopped with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds if math.isfinite(seconds) else None)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
    if status == 0:
        (folder / FINISHED).touch()
    return status


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a run with all its processes, unless it has ended: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the unfinished part of a comparison; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, common = arguments, []
    if '--' in arguments:
        own, common = arguments[:arguments.index('--')], arguments[arguments.index('--') + 1:]
    parser = argparse.ArgumentParser(
        usage='%(prog)s [options] PLAN --output DIR [-- ARGS ...]',
        description=(__doc__ or '').partition('\n')[0],
        epilog='Arguments after -- are passed to train.py in every run.',
    )
    parser.add_argument('plan', metavar='PLAN', type=Path, help='a file of hub_configs/recipes/comparisons')
    parser.add_argument('--output', metavar='DIR', type=Path, required=True, help='folder of all runs')
    parser.add_argument(
        '--train', metavar='FILE', type=Path, default=default_script(),
        help="timm's train.py; that of the checkout in TIMM_REPO if not given")
    parser.add_argument('--minutes', type=float, default=math.inf, help='stop after this time; when done if not given')
    parser.add_argument('--only', metavar='NAME', nargs='+', help='these runs of the plan')
    parser.add_argument('--seeds', type=int, nargs='+', help='instead of those of the plan')
    args = parser.parse_args(own)
    if not args.minutes > 0:
        parser.error(f'argument --minutes: must be positive, got {args.minutes}')
    if args.train is None or not args.train.is_file():
        parser.error(f"argument --train: must be timm's train.py, got {args.train}; a checkout of "
                     'https://github.com/huggingface/pytorch-image-models has it')
    deadline = time.monotonic() + 60 * args.minutes
    try:
        plan = Plan.of(args.plan)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    unknown = set(args.only or ()) - set(plan.runs)
    if unknown:
        parser.error(f'argument --only: {", ".join(sorted(unknown))} not in the plan, which has {", ".join(plan.runs)}')
    names = args.only or list(plan.runs)
    runs = [(args.output.absolute() / f'{name}-seed{seed}', name, seed) for seed in args.seeds or plan.seeds
            for name in names]

    signal.signal(signal.SIGTERM, _stop)  # so that the run in progress is stopped too
    failed: list[Path] = []
    for folder, name, seed in runs:
        if (folder / FINISHED).exists():
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            break
        print(f'{folder.name}: {"resumed" if (folder / "last.pth.tar").exists() else "started"}', flush=True)
        status = train(args.train.absolute(), folder, [*plan.runs[name], '--seed', str(seed), *common], left)
        if status is None:
            break
        if status != 0:
            failed.append(folder)
            print(f'{folder.name}: failed with exit status {status}; see {folder / "train.log"}', flush=True)
    done = sum((folder / FINISHED).exists() for folder, _, _ in runs)
    print(f'{done} of {len(runs)} runs are finished')
    if done == len(runs):
        return 0
    return 1 if failed else 3


if __name__ == '__main__':
    raise SystemExit(main())

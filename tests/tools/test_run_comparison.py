"""The tool that trains all networks of a comparison: order, resuming, limits of time, and what it leaves behind."""
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_comparison

# Takes the place of train.py: an epoch is a line in its folder, the checkpoint holds their number.
STAND_IN = '''
import argparse, os, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("output", "experiment", "resume", "seed", "data-dir", "config"):
    parser.add_argument(f"--{name}")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--pace", type=float, default=0)
parser.add_argument("--fail", action="store_true")
args = parser.parse_args()
folder = pathlib.Path(args.output, args.experiment)
first = int(pathlib.Path(args.resume).read_text()) if args.resume else 0
with open(folder.parent / "order", "a") as file:
    print(args.experiment, args.seed, args.data_dir, first, file=file)
print("in", os.getcwd())
if args.pace:
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True)"
    worker = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)", str(folder / "held")], stdout=subprocess.PIPE)
    worker.stdout.readline()
for epoch in range(first, args.epochs):
    time.sleep(args.pace if epoch else 0)
    (folder / "last.pth.tar").write_text(str(epoch + 1))
    if args.fail and epoch == 1:
        sys.exit("something is wrong")
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a stand-in for train.py and a plan."""
    script = tmp_path / 'train.py'
    script.write_text(STAND_IN)
    monkeypatch.setenv('TIMM_REPO', str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / 'plan.yaml').write_text('seeds: [0, 7]\nruns:\n  one: --epochs 2\n  two: "--config \'a b\'"\n')
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def run(home, *arguments, plan='plan.yaml'):
    return run_comparison.main([str(home / plan), '--output', str(home / 'out'), *arguments])


def order(home):
    return (home / 'out' / 'order').read_text().splitlines()


def worker_is_gone(folder: Path) -> bool:
    """Whether the process that a run started has let go of what it holds, at the latest in a few seconds."""
    with (folder / 'held').open('w') as file:
        for _ in range(50):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.1)
    return False


def test_every_network_is_trained_with_every_seed_and_only_once(home, capsys):
    assert run(home, '--', '--data-dir', 'DATA') == 0
    expected = ['one-seed0 0 DATA 0', 'two-seed0 0 DATA 0', 'one-seed7 7 DATA 0', 'two-seed7 7 DATA 0']
    assert order(home) == expected
    assert capsys.readouterr().out.endswith('4 of 4 runs are finished\n')
    log = (home / 'out' / 'two-seed7' / 'train.log').read_text()
    assert "--config 'a b' --seed 7 --data-dir DATA" in log and f'in {run_comparison.ROOT}' in log
    assert run(home, '--', '--data-dir', 'DATA') == 0 and order(home) == expected


def test_only_and_seeds_choose(home):
    assert run(home, '--only', 'two', '--seeds', '3', '4') == 0
    assert [line.split()[0] for line in order(home)] == ['two-seed3', 'two-seed4']


@pytest.mark.slow
def test_a_run_cut_off_by_the_clock_resumes_and_nothing_of_it_goes_on(home, capsys):
    (home / 'slow.yaml').write_text('seeds: [0]\nruns: {slow: --pace 30}\n')
    start = time.monotonic()
    assert run(home, '--minutes', '0.1', plan='slow.yaml') == 3
    assert time.monotonic() - start < 20
    assert '0 of 1 runs are finished' in capsys.readouterr().out
    assert not (home / 'out' / 'slow-seed0' / 'finished').exists()
    assert worker_is_gone(home / 'out' / 'slow-seed0')
    (home / 'slow.yaml').write_text('seeds: [0]\nruns: {slow: ""}\n')
    assert run(home, plan='slow.yaml') == 0
    assert 'slow-seed0: resumed' in capsys.readouterr().out
    assert [line.split()[-1] for line in order(home)] == ['0', '1']
    assert (home / 'out' / 'slow-seed0' / 'train.log').read_text().count('$ ') == 2


def test_a_run_that_fails_is_named_and_the_others_go_on(home, capsys):
    (home / 'bad.yaml').write_text('seeds: [0]\nruns: {bad: --fail, good: ""}\n')
    assert run(home, plan='bad.yaml') == 1
    output = capsys.readouterr().out
    assert 'bad-seed0: failed with exit status 1' in output and '1 of 2 runs are finished' in output
    assert 'something is wrong' in (home / 'out' / 'bad-seed0' / 'train.log').read_text()


def test_a_tool_that_is_told_to_stop_stops_its_run(home):
    (home / 'slow.yaml').write_text('seeds: [0]\nruns: {slow: --pace 60}\n')
    code = (f'import run_comparison as tool; tool.TRAIN = ({str(home / "train.py")!r},); '
            f'raise SystemExit(tool.main([{str(home / "slow.yaml")!r}, "--output", {str(home / "out")!r}]))')
    environment = {**os.environ, 'PYTHONPATH': str(Path(run_comparison.__file__).parent)}
    process = subprocess.Popen([sys.executable, '-c', code], env=environment)
    marker = home / 'out' / 'slow-seed0' / 'last.pth.tar'
    try:
        for _ in range(300):
            if marker.exists():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert worker_is_gone(home / 'out' / 'slow-seed0')


@pytest.mark.parametrize('text, message', [
    ('- a\n', 'must hold seeds and runs'),
    ('seeds: [0]\nruns: {}\n', 'runs must be names'),
    ('seeds: [a]\nruns: {x: y}\n', 'seeds must be a list of whole numbers'),
    ('seeds: [\n', 'is no plan'),
])
def test_other_files_are_no_plans(home, text, message, capsys):
    (home / 'other.yaml').write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run(home, plan='other.yaml')
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_unknown_names_are_refused(home, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(home, '--only', 'three')
    assert stopped.value.code == 2
    assert 'three not in the plan, which has one, two' in capsys.readouterr().err

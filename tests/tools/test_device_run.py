"""The one command for a machine with a GPU, run on a CPU with models that it can carry."""
import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest

import timm_gsa

SCRIPT = Path(benchmark.__file__).with_name('device_run.sh')
SMALL = dict(DEVICE='cpu', DTYPE='float32', BATCH='1', SIZE='64', ROUNDS='1', ONLY='Gaussian 7 x 7',
             MODELS='priorattn_resnet_tiny', BASE='test_resnet')


def device_run(folder, **settings):
    before = [str(Path(timm_gsa.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'PYTHON': sys.executable, 'OUT': str(folder), 'PYTHONPATH': os.pathsep.join(before),
                   **SMALL, **settings}
    return subprocess.run(['bash', str(SCRIPT)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_step_leaves_its_results(tmp_path):
    run = device_run(tmp_path / 'results', TORCHDYNAMO_DISABLE='1')  # to compile for a CPU takes minutes
    assert run.returncode == 0, run.stdout + run.stderr
    steps = ['doctor', 'operations', 'training', 'training_compiled', 'inference', 'inference_compiled']
    steps.append('profile')
    summary = (tmp_path / 'results' / 'summary.txt').read_text().splitlines()
    assert [line.partition(': done after')[0] for line in summary] == steps
    for step in steps[1:-1]:
        report = json.loads((tmp_path / 'results' / f'{step}.json').read_text())
        assert report['machine']['compiled'] is step.endswith('_compiled') and report['rows']
        assert '| what |' in (tmp_path / 'results' / f'{step}.txt').read_text()
    assert 'convolution_backward' in (tmp_path / 'results' / 'profile.txt').read_text()
    assert 'all right' in run.stdout and '| priorattn_resnet_tiny |' in run.stdout


@pytest.mark.slow
def test_a_step_that_fails_leaves_the_others_their_time_and_none_runs_beyond_it(tmp_path):
    shim = tmp_path / 'python'
    shim.write_text(
        '#!/bin/sh\ncase "$*" in *timm_gsa\\ doctor*) exit 3;; *py\\ operations*) echo begun; sleep 60;; esac\n')
    shim.chmod(0o755)
    run = device_run(tmp_path / 'results', PYTHON=str(shim), LIMIT='30')
    assert run.returncode == 1
    summary = (tmp_path / 'results' / 'summary.txt').read_text()
    assert 'doctor: failed with status 3 after' in summary
    assert 'operations: out of time after' in summary and 'profile: done after' in summary
    assert (tmp_path / 'results' / 'operations.txt').read_text() == 'begun\n'

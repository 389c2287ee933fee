"""The command that tells what can be used on a machine and checks that it computes rightly."""
import argparse

import pytest
import torch

from timm_gsa.commands import doctor
from timm_gsa.ops import _backend, _checks


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(argv))


def test_lists_versions_device_backends_and_weights(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert f'torch            {torch.__version__.partition("+")[0]}' in out
    assert 'device           cpu: ' in out
    assert 'backend cpu      available' in out
    assert 'weights          gsa_resnet_tiny.c100' in out


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a CUDA device')
def test_says_why_triton_is_not_available(capsys):
    run()
    assert 'backend triton   not available: there is no CUDA device' in capsys.readouterr().out


def test_an_unknown_device_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="--device must be a device of this machine, 'cudaa' is not"):
        run('--device', 'cudaa')


def test_check_passes_on_a_cpu(capsys):
    assert run('--check') == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith('all right') and 'column_attention' in out and 'WRONG' not in out


def test_a_wrong_form_is_found(monkeypatch, capsys):
    column = next(case.operation for case in _checks.FAMILIES['gsa']() if case.operation.name == 'column_attention')
    wrong = column._replace(
        torch=lambda *tensors: 1.01 * column.torch(*tensors),
        cpu=_backend.Form(lambda *tensors: column.torch(*tensors) / 0, column.cpu.why_not),
    )
    cases = [case._replace(operation=wrong) for case in _checks.FAMILIES['gsa']() if case.operation is column]
    monkeypatch.setattr(_checks, 'FAMILIES', {'gsa': lambda: iter(cases)})
    assert run('--check') == 1
    out = capsys.readouterr().out
    assert 'WRONG' in out and 'failed' in out and 'all right' not in out

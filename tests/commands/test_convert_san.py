"""Converting checkpoints of the SAN authors: the folder that comes out, and all that must not go in."""
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from timm_gsa.commands import _convert, convert_san, main

from ..san_fixtures import MANIFEST, golden, made_input, official_names, official_shapes, official_state
from ..versions import reads_local_dir

pytestmark = reads_local_dir

NAME = 'san10_pairwise'
OFFICIAL = official_shapes(NAME)
NETWORKS = [f'san{depth}_{kind}' for depth in (10, 15, 19) for kind in ('pairwise', 'patchwise')]


@pytest.fixture(scope='module')
def weights():
    return official_state(NAME)


@pytest.fixture
def place(tmp_path):
    """A folder whose files, of up to 85 MB, are gone after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def hollow(name):
    """Tensors of the right names, shapes and types that take no room in a file."""
    return {
        key: torch.tensor(0) if key.endswith('num_batches_tracked') else torch.ones(()).expand(shape)
        for key, shape in official_shapes(name).items()
    }


def authors_file(path, state, old=True):
    """Write what the authors' training script does, with momentum as large as the weights."""
    parameters = [key for key in state if key.endswith(('weight', 'bias'))]
    torch.save(
        {
            'epoch': 100,
            'state_dict': OrderedDict((f'module.{key}', tensor) for key, tensor in state.items()),
            'optimizer': {
                'state': {i: {'momentum_buffer': torch.zeros_like(state[key])} for i, key in enumerate(parameters)},
                'param_groups': [{'lr': 1e-4, 'momentum': 0.9, 'params': list(range(len(parameters)))}],
            },
            'scheduler': {'T_max': 100, 'eta_min': 0, 'last_epoch': 100},
            'top1_val': 0.749,
            'top5_val': 0.921,
        },
        path,
        _use_new_zipfile_serialization=not old,
    )
    return path


def arguments(checkpoint, out, name=NAME):
    return ['convert-san', str(checkpoint), '--model', name, '--out', str(out)]


def assert_refused(capsys, checkpoint, name=NAME):
    """The command fails on a checkpoint without writing anything; returns what it says."""
    before = sorted(checkpoint.parent.iterdir())
    assert main(arguments(checkpoint, checkpoint.parent / 'out', name)) == 1
    assert sorted(checkpoint.parent.iterdir()) == before
    said = capsys.readouterr()
    assert said.out == '' and said.err.startswith(f'{checkpoint}: not converted: ')
    return said.err.partition(': not converted: ')[2]


# What comes out


def test_converted_checkpoint_gives_the_authors_logits_from_every_source(place, weights, capsys):
    assert main([*arguments(authors_file(place / 'best.pth', weights), place / 'out'), '--verify']) == 0
    said = capsys.readouterr().out
    assert f'{len(weights)} tensors' in said and 'difference of the logits after conversion 0.0' in said
    size, digest = re.search(r'model\.safetensors of (\d+) bytes, sha256 ([0-9a-f]{64})\n', said).groups()
    path = place / 'out' / 'model.safetensors'
    assert int(size) == path.stat().st_size and digest == hashlib.sha256(path.read_bytes()).hexdigest()

    assert sorted(p.name for p in place.iterdir()) == ['best.pth', 'out']
    assert sorted(p.name for p in (place / 'out').iterdir()) == ['config.json', 'model.safetensors']
    assert [p.stat().st_mode & 0o777 for p in (place / 'out').iterdir()] == [0o644, 0o644]
    umask = os.umask(0)
    os.umask(umask)
    assert (place / 'out').stat().st_mode & 0o777 == 0o777 & ~umask
    with safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'pt'}

    x = made_input(f'{NAME}/x', tuple(MANIFEST['model_cases'][NAME]['shape']))
    want = torch.from_numpy(golden(NAME, 'eval')['logits']).float()
    for source, overlay in ((f'local-dir:{place / "out"}', {}), (NAME, {'file': str(path)})):
        model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert all(torch.equal(value, weights[key]) for key, value in official_names(model.state_dict()).items())
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_config_describes_the_authors_weights_and_no_machine(place, weights):
    assert main(arguments(authors_file(place / 'best.pth', weights), place / 'out')) == 0
    text = (place / 'out' / 'config.json').read_text()
    config = json.loads(text)
    assert config['architecture'] == NAME and config['num_classes'] == 1000 and config['num_features'] == 2048
    assert 'model_args' not in config
    assert config['pretrained_cfg']['tag'] == 'in1k' and config['pretrained_cfg']['license'] == 'mit'
    assert not {'file', 'url', 'hf_hub_id', 'source'} & set(config['pretrained_cfg'])
    assert place.name not in text and str(Path.home()) not in text


@pytest.mark.parametrize('layout', ['zipped', 'bare', 'bare, old', 'views'])
def test_every_layout_of_a_checkpoint_gives_the_same_weights(place, weights, layout):
    path = place / 'best.pth'
    if layout == 'zipped':
        authors_file(path, weights, old=False)
    elif layout == 'views':
        flat = torch.cat([tensor.flatten() for tensor in weights.values() if tensor.is_floating_point()])
        state, start = dict(weights), 0
        for key, tensor in weights.items():
            if tensor.is_floating_point():
                state[key] = flat[start:start + tensor.numel()].view_as(tensor)
                start += tensor.numel()
        state['conv4.weight'] = weights['conv4.weight'].transpose(0, 1).contiguous().transpose(0, 1)
        state['bn4.weight'] = state['bn4.bias'] = weights['bn4.weight']
        torch.save(state, path)
        weights = {**weights, 'bn4.bias': weights['bn4.weight']}
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=layout == 'bare')
    assert zipfile.is_zipfile(path) == (layout != 'bare, old')
    (place / 'out').mkdir()  # an empty folder may be there
    assert main(arguments(path, place / 'out')) == 0
    held = official_names(load_file(place / 'out' / 'model.safetensors'))
    assert held.keys() == weights.keys()
    assert all(held[key].dtype == weights[key].dtype and torch.equal(held[key], weights[key]) for key in weights)


@pytest.mark.parametrize('name', NETWORKS)
def test_names_wanted_are_those_of_the_authors(name):
    wanted = convert_san.official_tensors(timm.create_model(name, device='meta'))
    assert {key: tuple(tensor.shape) for key, tensor in wanted.items()} == official_shapes(name)


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the memory of a process from Linux')
def test_conversion_takes_no_more_memory_than_twice_the_file(place, weights):
    path = authors_file(place / 'best.pth', weights)
    program = '''
import re, sys
def memory(key):
    return 1024 * int(re.search(rf'{key}:\\s+(\\d+) kB', open('/proc/self/status').read())[1])
from timm_gsa.commands import main
before = memory('VmRSS')
assert main(sys.argv[1:]) == 0
print(memory('VmHWM') - before)
'''  # in a fresh process, whose heap has no free memory
    done = subprocess.run(
        [sys.executable, '-c', program, *arguments(path, place / 'out')], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 2 * path.stat().st_size


# What does not go in


@pytest.mark.parametrize(('change', 'said'), [
    ({'conv_in.weight': None}, ['1 missing:', '  conv_in.weight']),
    ({'bn2.num_batches_tracked': None}, ['1 missing:', '  bn2.num_batches_tracked']),
    ({'layer2.2.bn1.weight': torch.ones(3)}, ['1 unexpected:', '  layer2.2.bn1.weight']),
    ({'e\x1b[2Jvil\n': torch.ones(3)}, ['1 unexpected:', r'  e\x1b[2Jvil']),
    ({'fc.weight': torch.ones(100, 2048)}, ['1 of another shape:', '  fc.weight: (100, 2048), not (1000, 2048)']),
    ({'bn0.bias': torch.zeros(64, dtype=torch.float16)},
     ['1 no tensor of the right type:', '  bn0.bias: torch.float16, not torch.float32']),
    ({'bn0.bias': torch.zeros(64).to_sparse()}, ['1 no tensor of the right type:', '  bn0.bias']),
    ({'bn0.bias': torch.zeros(64, device='meta')}, ['1 no tensor of the right type:', '  bn0.bias']),
    ({'bn0.bias': [0.] * 64}, ['1 no tensor of the right type:', '  bn0.bias']),
    ({'fc.bias': torch.full((1000,), float('nan')), 'bn3.running_var': torch.full((1024,), float('inf'))},
     ['2 not finite:', '  bn3.running_var', '  fc.bias']),
    ({'fc.bias': None, 'head.bias': torch.ones(1000), 'bn0.bias': torch.ones(7)},
     ['1 missing:', '  fc.bias', '1 unexpected:', '  head.bias', '1 of another shape:', '  bn0.bias: (7,), not (64,)']),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, capsys, change, said):
    state = {**hollow(NAME), **change}
    state = {key: value for key, value in state.items() if value is not None}
    path = tmp_path / 'best.pth'
    torch.save({'state_dict': {f'module.{key}': value for key, value in state.items()}}, path)
    lines = assert_refused(capsys, path).splitlines()
    assert [line for line in lines[1:] if line.strip()] == said


@pytest.mark.parametrize(('other', 'said', 'listed'), [
    ('san15_pairwise', 'unexpected', [key for key in official_shapes('san15_pairwise') if key not in OFFICIAL]),
    ('san10_patchwise', 'missing', [key for key in OFFICIAL if key not in official_shapes('san10_patchwise')]),
])
def test_checkpoint_of_another_network_is_recognised(tmp_path, capsys, other, said, listed):
    wrong = assert_refused(capsys, authors_file(tmp_path / 'best.pth', hollow(other))).splitlines()
    assert other in wrong[0]
    *names, last = wrong[wrong.index(f'{len(listed)} {said}:') + 1:][:21]
    assert len(set(names)) == 20 and {name.strip() for name in names} <= set(listed)
    assert (last == f'  and {len(listed) - 20} more') == (len(listed) > 20)


def test_checkpoint_of_our_own_names_is_recognised(tmp_path, capsys):
    state = timm.create_model(NAME, device='meta').state_dict()
    torch.save({key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in state.items()}, tmp_path / 'best.pth')
    assert 'names are those of this package' in assert_refused(capsys, tmp_path / 'best.pth')


class Hostile:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('layout', ['plain pickle', 'old', 'zipped'])
def test_pickle_that_runs_code_is_refused_unread(tmp_path, capsys, layout):
    path, trace = tmp_path / 'best.pth', tmp_path / 'trace'
    checkpoint = {'state_dict': hollow(NAME), 'optimizer': Hostile(trace)}
    if layout == 'plain pickle':
        path.write_bytes(pickle.dumps(checkpoint['optimizer'], protocol=2))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=layout == 'zipped')
    said = assert_refused(capsys, path)
    assert not trace.exists()
    assert re.fullmatch(r'refused, since its pickle asks for \w+\.system\n', said)
    if layout != 'plain pickle':  # the file is one that would have done it
        torch.load(path, weights_only=False)
        assert trace.exists()


def cut(path, old):
    """The first half of a checkpoint."""
    torch.save({'state_dict': {'conv_in.weight': torch.zeros(9999)}}, path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[:20000])


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of TorchScript, as the test writes some
@pytest.mark.parametrize(('make', 'said'), [
    (lambda path: None, 'No such file or directory'),
    (lambda path: path.mkdir(), 'Is a directory'),
    (lambda path: path.touch(), 'no checkpoint of torch, or a damaged one'),
    (lambda path: path.write_text('<!DOCTYPE html>\n<html>'), 'no checkpoint of torch, or a damaged one'),
    (lambda path: path.write_bytes(b'PK\x03\x04'), 'no checkpoint of torch, or a damaged one'),
    (lambda path: path.write_bytes(bytes(range(256)) * 99), 'no checkpoint of torch, or a damaged one'),
    (lambda path: cut(path, old=False), 'no checkpoint of torch, or a damaged one'),
    (lambda path: cut(path, old=True), 'no checkpoint of torch, or a damaged one'),
    (script, 'TorchScript'),
    (lambda path: torch.save([torch.ones(2)], path), 'type list'),
    (lambda path: torch.save(torch.ones(2), path), 'type Tensor'),
    (lambda path: torch.save({'state_dict': torch.ones(2)}, path), 'type Tensor'),
    (lambda path: torch.save({}, path), 'no state dict'),
    (lambda path: torch.save({0: torch.ones(2)}, path), 'no state dict'),
], ids=['missing', 'folder', 'empty', 'text', 'zip header', 'bytes', 'cut zip', 'cut old', 'TorchScript', 'list',
        'tensor', 'tensor as state dict', 'nothing', 'numbers'])
def test_file_of_the_wrong_kind_is_refused_in_one_line(tmp_path, capsys, recwarn, make, said):
    make(tmp_path / 'best.pth')
    recwarn.clear()
    wrong = assert_refused(capsys, tmp_path / 'best.pth')
    assert said in wrong and wrong.count('\n') == 1 and 'weights_only=False' not in wrong
    assert not recwarn.list


@pytest.mark.parametrize(('name', 'out', 'said'), [
    ('no_such_model', 'new', NETWORKS),
    ('gsa_resnet26', 'new', NETWORKS),
    ('san_tiny_pairwise', 'new', NETWORKS),
    (NAME, 'full', ['full', 'empty']),
    (NAME, 'full/file', ['file', 'no folder']),
    (NAME, 'no/such', ['no folder']),
    (NAME, '.', ['empty']),
])
def test_command_line_that_cannot_work_is_refused(tmp_path, capsys, monkeypatch, name, out, said):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').write_text('mine')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    with pytest.raises(SystemExit) as exit:
        main(arguments('best.pth', '.' if out == '.' else tmp_path / out, name))
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in said)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'full', 'here']
    assert (tmp_path / 'full' / 'file').read_text() == 'mine'


# What goes wrong on the way


def test_difference_found_by_verify_fails_and_leaves_nothing(place, weights, capsys, monkeypatch):
    save_file = _convert.save_file

    def save_another(tensors, *args, **kwargs):
        save_file({**tensors, 'fc.bias': tensors['fc.bias'] + 0.5}, *args, **kwargs)

    monkeypatch.setattr(_convert, 'save_file', save_another)
    torch.save(weights, place / 'best.pth')
    assert main([*arguments(place / 'best.pth', place / 'out'), '--verify']) == 1
    assert re.search(r'difference of the logits after conversion 0\.5\d*, should be 0\.0', capsys.readouterr().err)
    assert [p.name for p in place.iterdir()] == ['best.pth']


def test_interrupted_conversion_leaves_nothing(place, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    torch.save(hollow(NAME), place / 'best.pth')
    monkeypatch.setattr(os, 'replace', interrupt)  # the last step, with everything written
    with pytest.raises(KeyboardInterrupt):
        main(arguments(place / 'best.pth', place / 'out'))
    assert [p.name for p in place.iterdir()] == ['best.pth']


def test_full_disk_is_reported_in_one_line_and_leaves_nothing(place, capsys):
    resource = pytest.importorskip('resource')
    torch.save(hollow(NAME), place / 'best.pth')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # Python ignores the signal and raises OSError
    try:
        assert main(arguments(place / 'best.pth', place / 'out')) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.startswith(f'{place / "out"}: not written: ') and said.count('\n') == 1
    assert [p.name for p in place.iterdir()] == ['best.pth']

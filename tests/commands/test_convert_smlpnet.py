"""Converting checkpoints of the sMLPNet authors: what differs from SAN's, which test_convert_san.py has whole."""
import argparse
import collections
import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_gsa.commands import convert_smlpnet, main

from ..golden import made_state, official_shapes
from ..versions import reads_local_dir

pytestmark = reads_local_dir

NETWORKS = ('smlpnet_tiny', 'smlpnet_small', 'smlpnet_base')
NAME = 'smlpnet_mini'  # takes the place of one of them where files are written


@pytest.fixture
def with_mini(monkeypatch):
    """The command takes the small network, too."""
    authors = dataclasses.replace(convert_smlpnet.AUTHORS, models=(*NETWORKS, NAME))
    monkeypatch.setattr(convert_smlpnet, 'AUTHORS', authors)


@pytest.fixture
def weights():
    """State dict of the small network as the authors' code would name it."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in convert_smlpnet.official_tensors(timm.create_model(NAME, device='meta')).items()}
    return made_state(shapes)


def authors_file(path, state, **more):
    """Write what the authors' training script does."""
    torch.save({
        'model': state, 'optimizer': {'state': {}}, 'lr_scheduler': {}, 'epoch': 299,
        'model_ema': {name: tensor + 1 for name, tensor in state.items()}, 'scaler': {'scale': 1024.},
        'args': argparse.Namespace(model='smlpnet_tiny', lr=5e-4), **more}, path)
    return path


def arguments(checkpoint, out, name=NAME):
    return ['convert-smlpnet', str(checkpoint), '--model', name, '--out', str(out)]


@pytest.mark.parametrize('name', NETWORKS)
def test_names_and_shapes_wanted_are_those_of_the_authors(name):
    wanted = convert_smlpnet.official_tensors(timm.create_model(name, device='meta'))
    assert {key: tuple(tensor.shape) for key, tensor in wanted.items()} == official_shapes('smlpnet', name)


@pytest.mark.parametrize('bare', [False, True], ids=['training script', 'bare state dict'])
def test_converted_checkpoint_gives_the_logits_of_the_file(tmp_path, with_mini, weights, capsys, bare):
    path = tmp_path / 'smlp.pth'
    torch.save(weights, path) if bare else authors_file(path, weights)
    assert main([*arguments(path, tmp_path / 'out'), '--verify']) == 0
    said = capsys.readouterr().out
    assert f'{len(weights)} tensors of {NAME}' in said and 'difference of the logits after conversion 0.0' in said
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']

    held = load_file(tmp_path / 'out' / 'model.safetensors')
    expected = timm.create_model(NAME)
    expected.load_state_dict(weights)
    assert held.keys() == expected.state_dict().keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in expected.state_dict().items())  # not the average
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == NAME and config['pretrained_cfg']['tag'] == 'in1k'
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected.eval()(x), rtol=0., atol=0.)


@pytest.mark.parametrize(('change', 'said'), [
    ({'token_mix.3.1.proh_w.bias': None}, ['1 missing:', '  token_mix.3.1.proh_w.bias']),
    ({'token_mix.0.1.proj_v.weight': torch.ones(3)}, ['1 unexpected:', '  token_mix.0.1.proj_v.weight']),
    ({'token_mix.0.1.proj_h.weight': torch.ones(16, 16)},
     ['1 of another shape:', '  token_mix.0.1.proj_h.weight: (16, 16), not (16, 16, 1, 1)']),
    ({'mlp_head.0.bias': torch.full((100,), float('nan'))}, ['1 not finite:', '  mlp_head.0.bias']),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, with_mini, weights, capsys, change, said):
    state = {key: value for key, value in {**weights, **change}.items() if value is not None}
    path = authors_file(tmp_path / 'smlp.pth', state)
    assert main(arguments(path, tmp_path / 'out')) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f'{path}: not converted: ') and lines[1:] == said
    assert [p.name for p in tmp_path.iterdir()] == ['smlp.pth']


def test_checkpoint_of_another_network_is_recognised(tmp_path, capsys):
    path = tmp_path / 'smlp.pth'
    hollow = {
        key: torch.tensor(0) if key.endswith('num_batches_tracked') else torch.ones(()).expand(shape)
        for key, shape in official_shapes('smlpnet', 'smlpnet_base').items()}
    torch.save({'model': hollow}, path)
    assert main(arguments(path, tmp_path / 'out', 'smlpnet_small')) == 1
    assert 'its names and shapes are those of smlpnet_base' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['smlp.pth']


def test_pickle_that_asks_for_more_than_arguments_is_refused(tmp_path, with_mini, weights, capsys):
    path = authors_file(tmp_path / 'smlp.pth', weights, extra=collections.deque([1]))
    assert main(arguments(path, tmp_path / 'out')) == 1
    said = capsys.readouterr().err
    assert said == f'{path}: not converted: refused, since its pickle asks for collections.deque\n'
    assert [p.name for p in tmp_path.iterdir()] == ['smlp.pth']


def test_networks_without_files_of_the_authors_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments(tmp_path / 'smlp.pth', tmp_path / 'out'))
    assert exit.value.code == 2 and 'smlpnet_base' in capsys.readouterr().err

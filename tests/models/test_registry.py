"""The registry: which models there are, how timm lists them, and what asking for missing weights answers."""
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from timm_gsa.models._families import FAMILIES, family_of, tiny_models, trained_models
from timm_gsa.models._zoo import entries

FILES = tuple(family.name for family in FAMILIES)


def test_every_model_is_registered_under_its_file(registered):
    assert timm.is_model(registered)
    [file] = [file for file in FILES if registered in timm.list_models(module=file)]
    assert family_of(registered).name == file
    entry_point = timm.model_entrypoint(registered)
    assert entry_point.__module__ == f'timm_gsa.models.{file}' and entry_point.__name__ == registered
    assert len(entry_point.__doc__.splitlines()) == 1
    assert hasattr(sys.modules[entry_point.__module__], registered)


def test_registered_models_are_those_promised(promised):
    assert {name for file in FILES for name in timm.list_models(module=file)} == set(promised)


def test_names_stay_clear_of_timm():
    """timm's own tests and list_pretrained('test_*') take every name that begins with test_ for theirs."""
    alone = subprocess.run(
        [sys.executable, '-c', 'import timm; print(*timm.list_models())'],
        env={**os.environ, 'TIMM_GSA_AUTOLOAD': '0'}, check=True, capture_output=True, text=True)
    theirs = alone.stdout.split()
    assert 'resnet50' in theirs and 'gsa_resnet50' not in theirs
    ours = [name for file in FILES for name in timm.list_models(module=file)]
    assert not set(ours) & set(theirs)
    assert not [name for name in ours if name.startswith('test_')]


def test_filters_of_list_models():
    assert timm.list_models('gsa_resnet*') == [
        'gsa_resnet26', 'gsa_resnet38', 'gsa_resnet50', 'gsa_resnet101', 'gsa_resnet_tiny']
    assert timm.list_models('san*', exclude_filters='*_tiny_*', module='san') == [
        f'san{depth}_{kind}' for depth in (10, 15, 19) for kind in ('pairwise', 'patchwise')]
    assert timm.list_models(['priorattn*18', 'san15*']) == ['priorattn_resnet18', 'san15_pairwise', 'san15_patchwise']
    assert timm.list_models('dcac*') == ['dcac_325mf', 'dcac_mini']
    assert set(FILES) <= set(timm.list_modules())


def test_models_with_weights_are_known_as_such(registered):
    assert timm.is_model_pretrained(registered) == (registered in tiny_models())
    assert timm.list_pretrained(f'{registered}.*') == sorted(entries(registered))
    assert set(entries(registered)) <= set(timm.list_models(pretrained=True))
    assert bool(entries(registered)) == (registered in trained_models())


def test_a_tag_may_follow_the_name(registered, create):
    tag = 'c100' if registered in tiny_models() else 'untrained'
    cfg = create(f'{registered}.{tag}', device='meta').pretrained_cfg
    assert (cfg['architecture'], cfg['tag']) == (registered, tag)
    with pytest.raises(RuntimeError, match='nonsense'):
        create(f'{registered}.nonsense', device='meta')


@pytest.mark.parametrize('tag', ['', '.untrained'])
def test_missing_weights_are_said_to_be_missing(real, tag):
    with pytest.raises(RuntimeError) as caught:
        timm.create_model(real + tag, pretrained=True, device='meta')
    message = str(caught.value)
    assert message.startswith(f'No pretrained weights are published for {real};')
    first_sentence = message.split('. ')[0]
    assert 'gsa_resnet_tiny.c100, priorattn_resnet_tiny.c100' in first_sentence
    for named in timm.list_pretrained([f'{family.prefix}*' for family in FAMILIES]):
        assert named in message


@pytest.mark.parametrize('way', ['overlay file', 'overlay state dict', 'config'])
def test_weights_from_elsewhere_are_not_missing(create, tmp_path, way):
    """On architectures without published weights, which is where the error above must not get in the way."""
    shape = dict(channels=(32, 64, 96, 128), stem_type='deep', stem_width=12, img_size=64, num_classes=7)
    model = create('gsa_resnet26', **shape).eval()
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    cfg = dict(timm.get_pretrained_cfg('gsa_resnet26').to_dict(), num_classes=7, first_conv='conv1.0')
    sources = {
        'overlay file': dict(pretrained_cfg_overlay=dict(file=str(path), num_classes=7)),
        'overlay state dict': dict(pretrained_cfg_overlay=dict(state_dict=model.state_dict(), num_classes=7)),
        'config': dict(pretrained_cfg=dict(cfg, file=str(path))),
    }
    loaded = timm.create_model('gsa_resnet26', pretrained=True, **shape, **sources[way]).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0., atol=0.)

"""publish.py and verify_hub.py of tools/release against a Hub that takes uploads, and goes wrong to order."""
import json
import re
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path

import _hub_entry
import huggingface_hub
import pytest
import timm
import torch
import verify_hub

import timm_gsa  # noqa: F401
from timm_gsa.models._zoo import entries

pytestmark = pytest.mark.skipif(
    int(huggingface_hub.__version__.partition('.')[0]) < 2, reason='a maintainer publishes with a client of today')

ROOT = Path(__file__).parents[2]
ENTRY = 'san_tiny_pairwise.c100'
REPO = f'timm-gsa/{ENTRY}'
FILES = ['README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors']


@pytest.fixture
def publish(hub, hub_module, cache, monkeypatch, capsys):
    """Runs publish.py with a token that may write, or another, on a Hub without entries; returns status and output."""
    hub.repositories.clear()
    module = import_module('publish')

    def publish(*arguments, token=hub_module.WRITE):
        api = partial(huggingface_hub.HfApi, endpoint=hub.endpoint, token=token)
        monkeypatch.setattr(module, 'HfApi', api)
        status = module.main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return publish


@pytest.fixture
def weights():
    return (ROOT / 'timm_gsa' / 'weights' / f'{ENTRY}.safetensors').read_bytes()


def test_publishes_all_files_in_one_commit_and_nothing_the_second_time(hub, publish, weights):
    status, out, _ = publish(ENTRY)
    repository = hub.repositories[REPO]
    assert status == 0 and list(hub.repositories) == [REPO]
    assert sorted(repository.files) == FILES and repository.titles == ['initial commit', f'Add {ENTRY}']
    assert repository.read('model.safetensors') == weights
    assert repository.read('README.md') == (ROOT / 'hub_configs' / ENTRY / 'README.md').read_bytes()
    assert out == f'{REPO}: published at {repository.commit}\n' and not repository.private
    hub.forget()
    assert publish(ENTRY)[:2] == (0, f'{REPO}: up to date at {repository.commit}\n')
    assert len(repository.titles) == 2
    assert not hub.requests('POST', '/(commit|preupload|create)')


def test_publishes_all_entries_under_another_name_in_private(hub, publish):
    status, out, _ = publish('--org', 'someone', '--private')
    assert status == 0 and len(out.splitlines()) == len(hub.repositories) == len(entries())
    for name, repository in hub.repositories.items():
        assert name.startswith('someone/') and repository.private
        card = repository.read('README.md').decode()
        assert f'hf-hub:{name}' in card and 'hf-hub:timm-gsa' not in card


def test_dry_run_touches_nothing(hub, publish):
    status, out, _ = publish(ENTRY, '--dry-run')
    assert status == 0 and 'would create the repository and upload' in out and all(name in out for name in FILES)
    assert not hub.repositories and {request.method for request in hub.log} == {'GET'}


def test_uploads_only_what_differs_and_leaves_other_files_alone(hub, publish):
    publish(ENTRY)
    repository = hub.repositories[REPO]
    kept = repository.read('model.safetensors')
    repository.commit_files({'README.md': b'---\nlicense: mit\n---\n', '.gitattributes': b'x'}, title='by hand')
    assert 'upload README.md\n' in publish(ENTRY, '--dry-run')[1]
    hub.forget()
    assert publish(ENTRY)[0] == 0
    [sent] = hub.requests('POST', '/preupload')
    assert sorted(repository.files) == ['.gitattributes', *FILES]
    assert repository.read('README.md') == (ROOT / 'hub_configs' / ENTRY / 'README.md').read_bytes()
    assert repository.read('model.safetensors') == kept and len(repository.titles) == 4


@pytest.mark.parametrize('content, complaint', [
    ({'config.json': b'{"architecture": "resnet50"}', 'model.safetensors': b'x'}, "'resnet50'"),
    ({'config.json': b'[]', 'model.safetensors': b'x'}, 'architecture None'),
    ({'pytorch_model.bin': b'x'}, 'without a config.json'),
])
def test_leaves_a_repository_with_other_content_alone(hub, publish, content, complaint):
    repository = hub.publish(REPO, content)
    before = dict(repository.files), list(repository.titles)
    status, out, err = publish(ENTRY)
    assert (status, out) == (1, '') and complaint in err and 'left as it is' in err
    assert (dict(repository.files), repository.titles) == before


@pytest.mark.parametrize('token, complaint', [('READ', '403'), (False, '401'), ('hf_unknown', '401')])
def test_token_without_rights_is_reported_and_makes_nothing(hub, hub_module, publish, token, complaint):
    status, out, err = publish(ENTRY, token=getattr(hub_module, str(token), token))
    assert (status, out) == (1, '') and 'FAILED' in err and complaint in err
    assert not hub.repositories


@pytest.mark.parametrize('route, fault', [
    ('/api/repos/create', dict(status=500)), ('/preupload/', dict(drop='before')), ('/commit/', dict(drop='before')),
])
def test_a_run_that_failed_in_the_middle_can_be_repeated(hub, publish, weights, route, fault):
    order = hub.order('POST', route, **fault)
    status, _, err = publish(ENTRY)
    assert order.times == 0
    made = hub.repositories.get(REPO)
    if status:
        assert 'FAILED' in err
        assert made is None or made.titles == ['initial commit']  # nothing, or all of it
    else:
        assert made.read('model.safetensors') == weights
    assert publish(ENTRY)[0] == 0
    repository = hub.repositories[REPO]
    assert sorted(repository.files) == FILES and repository.titles == ['initial commit', f'Add {ENTRY}']


def test_lost_answer_to_a_commit_is_found_out(hub, publish):
    hub.order('POST', '/commit/', drop='after')
    status, out, _ = publish(ENTRY)
    assert (status, out) == (0, f'{REPO}: published at {hub.repositories[REPO].commit}\n')


def test_commit_in_between_is_not_overwritten(hub, publish):
    publish(ENTRY)
    repository = hub.repositories[REPO]
    repository.commit_files({'README.md': b'other'}, title='by hand')
    hub.order('POST', '/commit/', times=0)
    hub.order('POST', '/preupload/', action=lambda: repository.commit_files({'NOTE': b'!'}, title='in between'))
    status, _, err = publish(ENTRY)
    assert status == 1 and '412' in err
    assert repository.titles[-1] == 'in between'


def test_one_entry_that_fails_does_not_stop_the_others(hub, publish):
    hub.publish(REPO, {'config.json': b'{"architecture": "resnet50"}'})
    status, out, err = publish()
    assert status == 1 and out.count('published at') == len(entries()) - 1 and err.count('FAILED') == 1


@pytest.mark.parametrize('name', ['README.md', 'config.json', 'model.safetensors'])
def test_entry_that_drifted_is_not_published(hub, publish, tmp_path, monkeypatch, name):
    entry = _hub_entry
    path = tmp_path / name
    path.write_bytes(b'other')
    if name == 'model.safetensors':
        monkeypatch.setattr(entry.Entry, 'weights', path)
    else:
        shutil.copytree(ROOT / 'hub_configs', tmp_path / 'hub_configs')
        shutil.copy(path, tmp_path / 'hub_configs' / ENTRY / name)
        monkeypatch.setattr(entry, 'CONFIGS', tmp_path / 'hub_configs')
    status, _, err = publish(ENTRY)
    assert status == 1 and 'FAILED' in err and (name in err)
    assert not hub.repositories and not hub.log


def test_unknown_entry_is_a_wrong_argument(publish, capsys):
    with pytest.raises(SystemExit) as error:
        publish('resnet50.a1_in1k')
    assert error.value.code == 2 and ENTRY in capsys.readouterr().err


@pytest.fixture
def verify(hub, cache, capsys):
    def verify(*arguments):
        status = verify_hub.main(list(arguments))
        return status, capsys.readouterr().out
    return verify


def test_verify_finds_published_entries_good(hub, publish, verify, monkeypatch):
    publish(ENTRY)
    assert verify() == (0, 'no entry has a pinned commit yet: nothing is published\n')
    status, out = verify(ENTRY)
    assert status == 0 and re.fullmatch(rf'{REPO} +not pinned +good\n', out)
    commit = hub.repositories[REPO].commit
    entry = _hub_entry.Entry
    plain = entry.__init__

    def pinned(self, name):
        plain(self, name)
        if name == ENTRY:
            self.record['revision'] = commit
    monkeypatch.setattr(entry, '__init__', pinned)
    status, out = verify()
    assert status == 0 and re.fullmatch(rf'{REPO} +{commit} +good\n', out)


def other_weights(hub):
    data = bytearray(hub.repositories[REPO].read('model.safetensors'))
    data[-1] ^= 1
    hub.repositories[REPO].commit_files({'model.safetensors': bytes(data)})


def other_architecture(hub, name='san_tiny_patchwise', **overrides):
    config = json.loads(hub.repositories[REPO].read('config.json'))
    config['architecture'] = name
    config['pretrained_cfg'].update(overrides)
    hub.repositories[REPO].commit_files({'config.json': json.dumps(config).encode()})


@pytest.mark.parametrize('damage, complaint', [
    (other_weights, 'SHA-256'),
    (other_architecture, 'by repository name'),
    (lambda hub: hub.repositories.clear(), 'RepositoryNotFoundError'),
    (lambda hub: hub.order('GET', 'safetensors', flip=5000, times=9), 'SHA-256'),
])
def test_verify_finds_what_is_not_as_published(hub, publish, verify, damage, complaint):
    publish(ENTRY)
    damage(hub)
    status, out = verify(ENTRY)
    assert status == 1 and complaint in out and len(out.splitlines()) == 1


def test_pushed_by_timm_itself_a_model_of_the_wheel_leaks_no_path_and_comes_back(hub, hub_module, cache):
    model = timm.create_model('san_tiny_pairwise', pretrained=True).eval()
    timm.models.push_to_hf_hub(model, 'someone/net', token=hub_module.WRITE, safe_serialization=True)
    repository = hub.repositories['someone/net']
    assert sorted(repository.files) == ['README.md', 'config.json', 'model.safetensors']
    for name in ('README.md', 'config.json'):
        assert b'weights/' not in repository.read(name) and str(ROOT).encode() not in repository.read(name)
    again = timm.create_model('hf-hub:someone/net', pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image), model(image))

"""What users get from a Hub: the right weights, or an error of ours.

The real client and timm's own loading run against a Hub on this machine. Retries, resumed downloads, tokens and locks
are tested by huggingface_hub; here are the checks that this package adds. After every test no file in the cache differs
from what its name says.
"""
import hashlib
import json
import math
import pickle
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load, save

import timm_gsa  # noqa: F401

pytestmark = pytest.mark.skipif(
    int(huggingface_hub.__version__.partition('.')[0]) < 2,
    reason='what older clients do about faults differs and was not measured')

ARCH = 'gsa_resnet_tiny'
ENTRY = f'{ARCH}.c100'
OURS = f'timm-gsa/{ENTRY}'
THEIRS = 'someone/net'  # nothing is pinned of it
WEIGHTS = f'{ENTRY}/resolve/.*/model.safetensors'
ALWAYS = math.inf


def by_name(**kwargs):
    return timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=dict(file=None), **kwargs)


def by_hub_id(repo=OURS, **kwargs):
    return timm.create_model(f'hf-hub:{repo}', pretrained=True, **kwargs)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """These models are tiny: where other processes run, waiting for a second thread takes longer than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def check(image):
    """Check a model against one that has the wheel's own file."""
    expected = timm.create_model(ARCH, pretrained=True).eval()

    @torch.no_grad()
    def check(model):
        model = model.eval()
        if model.num_classes == expected.num_classes:
            torch.testing.assert_close(model(image), expected(image))
        torch.testing.assert_close(model.forward_features(image), expected.forward_features(image))

    return check


@pytest.fixture
def weights(entry_files):
    return entry_files[ENTRY]['model.safetensors']


@pytest.fixture
def theirs(hub, entry_files):
    """Publish files as someone else's repository: the entry's own, changed by {path: bytes or None for none}."""
    def publish(changes=None):
        files = {**entry_files[ENTRY], **(changes or {})}
        return hub.publish(THEIRS, {path: data for path, data in files.items() if data is not None})
    return publish


@pytest.fixture(autouse=True)
def sound_cache(cache):
    """After each test the cache holds no file that is not what its name says, and no link to nowhere."""
    yield
    for path in cache.glob('models--*/blobs/*'):
        if not path.name.endswith('.incomplete'):
            assert path.name in digests(path.read_bytes()), f'{path} is half-written or damaged'
    for path in cache.glob('models--*/snapshots/**/*'):
        assert path.exists(), f'{path} leads nowhere'


def digests(data):
    """Names that the Hub may give to data: SHA-256, and SHA-1 as git computes it."""
    git = hashlib.sha1(b'blob %d\0' % len(data) + data, usedforsecurity=False)
    return hashlib.sha256(data).hexdigest(), git.hexdigest()


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


def blobs(cache, repo=OURS):
    return sorted(path.name for path in (cache / f'models--{repo.replace("/", "--")}' / 'blobs').glob('*'))


@pytest.mark.parametrize('arch, source', [(ARCH, 'name'), ('san_tiny_pairwise', 'hub id')])
def test_download_gives_the_weights_of_the_wheel_and_the_next_call_downloads_nothing(
        arch, source, hub, cache, entry_files, image):
    entry = f'{arch}.c100'

    def create():
        if source == 'hub id':
            return by_hub_id(f'timm-gsa/{entry}')
        return timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=dict(file=None))

    own = timm.create_model(arch, pretrained=True).eval()
    assert not hub.log  # the wheel's own file needs no network
    with torch.no_grad():
        torch.testing.assert_close(create().eval()(image), own(image))
        files = ['model.safetensors', 'config.json'] if source == 'hub id' else ['model.safetensors']
        assert sum(r.sent for r in hub.requests('GET')) == sum(len(entry_files[entry][name]) for name in files)
        assert len(hub.requests('GET')) == len(files) and len(hub.log) <= 3 * len(files)
        hub.forget()
        torch.testing.assert_close(create().eval()(image), own(image))
        assert not hub.requests('GET') and not sum(r.sent for r in hub.log)


def test_once_downloaded_a_pinned_commit_needs_no_request(hub, cache, check):
    commit = hub.repositories[OURS].commit
    hub.repositories[OURS].commit_files({'model.safetensors': b'a later commit'})
    check(by_hub_id(f'{OURS}@{commit}'))
    hub.forget()
    check(by_hub_id(f'{OURS}@{commit}'))
    assert not hub.log


@pytest.mark.parametrize(
    'kwargs', [dict(num_classes=7), dict(num_classes=0), dict(in_chans=1), dict(features_only=True)])
def test_download_serves_other_heads_and_channels_too(kwargs, hub, cache, image):
    own = timm.create_model(ARCH, pretrained=True, **kwargs)
    model = by_name(**kwargs)
    head = f'{own.pretrained_cfg["classifier"]}.'
    for (name, tensor), expected in zip(model.state_dict().items(), own.state_dict().values(), strict=True):
        if not name.startswith(head) or 'num_classes' not in kwargs:
            torch.testing.assert_close(tensor, expected)


def test_offline_a_model_comes_from_the_cache_or_the_error_names_what_is_missing(hub, cache, check, monkeypatch):
    check(by_name())
    hub.forget()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    check(by_name())
    with pytest.raises(LocalEntryNotFoundError):
        by_name(cache_dir=cache / 'empty')
    assert not hub.log and not (cache / 'empty').exists()


@pytest.mark.parametrize(
    'source, repo, place', [('name', OURS, 100), ('name', THEIRS, 1_000_000), ('hub id', OURS, 100)])
def test_flipped_byte_is_refused_and_not_kept(source, repo, place, hub, cache, theirs, weights, check):
    theirs()
    place %= len(weights)

    def create():
        if source == 'hub id':
            return by_hub_id(repo)
        return timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=dict(file=None, hf_hub_id=repo))

    hub.order('GET', 'model.safetensors', flip=place)
    expected, actual = digests(weights)[0], digests(flipped(weights, place))[0]
    with pytest.raises(RuntimeError, match=f'model.safetensors of {repo} .*{expected}.*{actual}'):
        create()
    assert expected not in blobs(cache, repo)
    hub.forget()
    check(create())
    assert sum(r.sent for r in hub.requests('GET', 'model.safetensors')) == len(weights)


def test_weights_replaced_on_the_hub_are_not_those_pinned_here(hub, cache, weights, check):
    other = flipped(weights, 1_000_000)
    hub.repositories[OURS].commit_files({'model.safetensors': other})  # of which the Hub gives the right digest
    for create in (by_name, by_hub_id):
        with pytest.raises(RuntimeError, match=f'{digests(weights)[0]}.*{digests(other)[0]}'):
            create()
    hub.repositories[OURS].commit_files({'model.safetensors': weights})
    check(by_name())
    check(by_hub_id())


def test_file_damaged_in_the_cache_is_refused_and_downloaded_again(hub, cache, theirs, weights, check):
    theirs()
    check(by_hub_id(THEIRS))
    blob = cache / f'models--{THEIRS.replace("/", "--")}' / 'blobs' / digests(weights)[0]
    blob.write_bytes(flipped(weights, 1_000_000))
    with pytest.raises(RuntimeError, match=f'model.safetensors of {THEIRS} .*{digests(weights)[0]}'):
        by_hub_id(THEIRS)
    check(by_hub_id(THEIRS))


def test_digest_of_a_mirror_that_keeps_all_files_in_git_serves_as_well(hub, cache, theirs, weights, check):
    theirs()
    hub.order('*', 'model.safetensors', times=ALWAYS, etag=digests(weights)[1])
    check(by_hub_id(THEIRS))
    (blob,) = [path for path in cache.glob('models--*/blobs/*') if path.name == digests(weights)[1]]
    blob.write_bytes(flipped(weights, 5000))
    with pytest.raises(RuntimeError, match=digests(weights)[1]):
        by_hub_id(THEIRS)


def test_no_other_file_gets_between_the_check_and_the_model(hub, cache, weights, check):
    """The repository changes after the weights were checked, before timm asks for them once more."""
    other = changed(weights, CONV, lambda t: -t)
    hub.order(
        'HEAD', WEIGHTS, skip=1, action=lambda: hub.repositories[OURS].commit_files({'model.safetensors': other}))
    check(by_name())


def changed(weights, name, change):
    """Weights of which one tensor is changed by a function, or taken away."""
    tensors = load(weights)
    tensor = tensors.pop(name, None)
    return save(tensors if change is None else {**tensors, name: change(tensor)})


CONV, HEAD = 'layer1.0.conv1.weight', 'fc.weight'


FILES = {
    'empty': lambda weights: b'',
    'cut short': lambda weights: weights[:100_000],
    'web page': lambda weights: b'<!DOCTYPE html><html>log in first</html>',
}


def nan(tensor):
    return tensor.flatten().index_fill(0, torch.tensor(5), math.nan).view_as(tensor)


TENSORS = {
    'integers': (CONV, lambda t: (t * 10).to(torch.int8)),
    'another shape': (CONV, lambda t: t[1:].clone()),
    'missing': (CONV, None),
    'head missing': (HEAD, None),
    'not a number': (CONV, nan),
    'head not a number': (HEAD, nan),
    'statistics infinite': ('bn1.running_var', lambda t: t / 0),
    'more than asked for': ('layer9.weight', lambda t: torch.ones(3)),
}


@pytest.mark.parametrize('what', FILES)
def test_file_that_is_no_safetensors_is_refused(what, theirs, cache, weights, check):
    theirs({'model.safetensors': FILES[what](weights)})
    with pytest.raises(RuntimeError, match='model.safetensors of someone/net is no safetensors file'):
        by_hub_id(THEIRS)
    theirs()  # mended by its owner
    check(by_hub_id(THEIRS))


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=7)])
@pytest.mark.parametrize('what', TENSORS)
def test_tensor_that_does_not_fit_is_refused_by_name(what, kwargs, theirs, cache, weights):
    name, change = TENSORS[what]
    theirs({'model.safetensors': changed(weights, name, change)})
    if kwargs and (name == HEAD and change is None or name == 'layer9.weight'):
        by_hub_id(THEIRS, **kwargs)  # timm drops the head, and with it the check for names that are too many
        return
    with pytest.raises(RuntimeError, match=re.escape(name.removesuffix('.weight'))):
        by_hub_id(THEIRS, **kwargs)


def config(entry_files, **changes):
    return json.dumps({**json.loads(entry_files[ENTRY]['config.json']), **changes}).encode()


@pytest.mark.parametrize('repo', [OURS, THEIRS])
@pytest.mark.parametrize('architecture', ['san_tiny_pairwise', 'no_such_net'])
def test_config_of_another_architecture_is_refused(architecture, repo, hub, cache, theirs, entry_files):
    theirs()
    hub.repositories[repo].commit_files({'config.json': config(entry_files, architecture=architecture)})
    with pytest.raises(RuntimeError, match=architecture if repo == OURS else None):
        by_hub_id(repo)


def test_flipped_byte_in_the_config_is_refused(hub, cache, entry_files):
    place = re.search(rb'"mean": \[\s*0\.', entry_files[ENTRY]['config.json']).end()
    hub.order('GET', 'config.json', flip=place)
    try:
        with pytest.raises(RuntimeError, match='config.json'):
            by_hub_id()
    finally:
        for path in cache.glob('models--*/snapshots/*/config.json'):
            path.resolve().unlink()
            path.unlink()


@pytest.fixture
def trap(tmp_path):
    """A pickle that makes a file when it is loaded, and that file."""
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'executed',)

    yield pickle.dumps(Trap())
    assert not (tmp_path / 'executed').exists()


def test_pickle_instead_of_safetensors_is_not_even_downloaded(trap, theirs, hub, cache):
    name = 'pytorch_model.bin'
    theirs({'model.safetensors': None, name: trap})
    with pytest.raises(EntryNotFoundError, match='model.safetensors'):
        by_hub_id(THEIRS)
    assert not hub.requests(pattern=name)


def test_pickle_under_the_name_of_safetensors_is_refused(trap, theirs, cache):
    theirs({'model.safetensors': trap})
    with pytest.raises(RuntimeError, match='no safetensors file'):
        by_hub_id(THEIRS)


def test_pickle_that_the_config_names_is_not_loaded(trap, theirs, hub, cache, entry_files):
    pretrained = {**json.loads(entry_files[ENTRY]['config.json'])['pretrained_cfg'], 'hf_hub_filename': 'other.bin'}
    theirs({'config.json': config(entry_files, pretrained_cfg=pretrained), 'other.bin': trap})
    with pytest.raises((RuntimeError, ValueError), match='other.bin'):
        by_hub_id(THEIRS)
    assert not hub.requests(pattern='other.bin')



"""What users get where the Hub, the network, the disk or a repository is not well: the right weights or an error.

All of it with the real client and timm's own loading, against a Hub on this machine. Three things hold in every test:
no model has weights that nobody trained, no file in the cache is another than its name says, nothing hangs.
"""
import contextlib
import errno
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
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


@pytest.fixture
def waits(monkeypatch):
    """The client does not wait before it tries again; what it would have waited is listed instead."""
    waits = []

    class Time:
        sleep = waits.append

        def __getattr__(self, name):
            return getattr(time, name)

    from huggingface_hub import file_download
    from huggingface_hub.utils import _http
    monkeypatch.setattr(file_download, 'time', Time())
    monkeypatch.setattr(_http, 'time', Time())
    return waits


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


def run(source, env, **kwargs):
    return subprocess.run(
        [sys.executable, '-c', source], env=env, capture_output=True, text=True, timeout=120, **kwargs)


# Prints a digest of the logits for the image of these tests.
LOGITS = """
import hashlib, timm, torch, timm_gsa
torch.set_num_threads(1)

@torch.no_grad()
def logits(**kwargs):
    model = timm.create_model('gsa_resnet_tiny', pretrained=True, **kwargs).eval()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return hashlib.sha256(model(image).numpy().tobytes()).hexdigest()

FROM_HUB = dict(pretrained_cfg_overlay=dict(file=None))
"""


# ---- the Hub is well


@pytest.mark.parametrize('arch', [ARCH, 'priorattn_resnet_tiny', 'san_tiny_pairwise', 'san_tiny_patchwise'])
@pytest.mark.parametrize('source', ['name', 'hub id'])
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
    for (name, tensor), expected in zip(model.state_dict().items(), own.state_dict().values(), strict=True):
        if not name.startswith('fc.') or 'num_classes' not in kwargs:
            torch.testing.assert_close(tensor, expected)


# ---- no network, no Hub


def test_without_network_a_process_uses_its_cache_or_says_what_it_lacks(hub, client_env, cache, check):
    check(by_name())
    hub.forget()
    done = run(LOGITS + """
import sys
assert logits(**FROM_HUB) == logits()
try:
    timm.create_model('gsa_resnet_tiny', pretrained=True, cache_dir=sys.argv[1], **FROM_HUB)
except Exception as error:
    print(type(error).__name__, error)
""".replace('sys.argv[1]', repr(str(cache / 'empty'))), {**client_env, 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('LocalEntryNotFoundError ')
    assert not hub.log and not (cache / 'empty').exists()


def test_without_a_hub_an_empty_cache_is_an_error_in_bounded_time(hub, cache, waits, monkeypatch):
    hub.__exit__()  # nobody listens any more
    with pytest.raises(LocalEntryNotFoundError, match='check your connection'):
        by_name()
    assert sum(waits) <= 31  # once for safetensors, not again for a pickle
    assert not list(cache.glob('models--*/blobs/*'))


def test_without_a_hub_the_cache_serves(hub, cache, waits, check):
    check(by_hub_id())
    hub.__exit__()
    check(by_hub_id())
    check(by_name())
    assert not waits


@pytest.mark.parametrize('status', [500, 503, 429, 403])
def test_a_hub_that_only_gives_errors_leaves_the_cache_in_use(status, hub, cache, waits, check):
    check(by_hub_id())
    hub.order('*', '', times=ALWAYS, status=status)
    check(by_hub_id())
    assert not waits


# ---- not there, not allowed


def test_missing_repository_file_and_revision_are_told_apart(hub, cache, theirs):
    with pytest.raises(RepositoryNotFoundError, match='no/such'):
        by_hub_id('no/such')
    del hub.repositories[OURS]
    with pytest.raises(RepositoryNotFoundError, match=ENTRY):
        by_name()
    theirs({'model.safetensors': None})
    with pytest.raises(EntryNotFoundError, match='model.safetensors'):
        by_hub_id(THEIRS)
    with pytest.raises(RevisionNotFoundError, match='v9'):
        by_hub_id(f'{THEIRS}@v9')
    theirs().commit_files({}, ['config.json'])
    with pytest.raises(EntryNotFoundError, match='config.json'):
        by_hub_id(THEIRS)


def test_gated_repository_needs_a_token_that_was_granted_access(hub, hub_module, cache, check, monkeypatch):
    hub.repositories[OURS].gated = (hub_module.READ,)
    with pytest.raises(GatedRepoError, match='(?s)401.*gated'):
        by_name()
    monkeypatch.setenv('HF_TOKEN', hub_module.WRITE)
    with pytest.raises(GatedRepoError, match='(?s)403.*gated'):
        by_name()
    monkeypatch.setenv('HF_TOKEN', 'hf_unknown')
    with pytest.raises(HfHubHTTPError, match='Invalid credentials'):
        by_name()
    assert not list(cache.glob('models--*/blobs/*'))
    monkeypatch.setenv('HF_TOKEN', hub_module.READ)
    check(by_name())


def test_private_repository_looks_missing_without_a_token(hub, hub_module, cache, check, monkeypatch):
    hub.repositories[OURS].private = True
    with pytest.raises(RepositoryNotFoundError, match='private'):
        by_hub_id()
    monkeypatch.setenv('HF_TOKEN', hub_module.READ)
    check(by_hub_id())


def test_forbidden_is_an_error_that_carries_the_answer_of_the_hub(hub, cache):
    hub.order('*', WEIGHTS, times=ALWAYS, status=403)
    with pytest.raises(LocalEntryNotFoundError) as caught:
        by_name()
    assert '403 Forbidden' in str(caught.value.__cause__)  # the message itself speaks of the connection


# ---- the Hub is busy or broken


def test_too_many_requests_are_made_again_after_the_time_the_hub_names(hub, cache, check):
    hub.order('GET', WEIGHTS, status=429, headers={'Retry-After': '1'})
    check(by_name())
    first, second = hub.requests('GET')
    assert (first.status, second.status) == (429, 200) and second.time - first.time >= 1


def test_too_many_requests_for_ever_are_an_error_in_bounded_time(hub, cache, waits):
    hub.order('*', WEIGHTS, times=ALWAYS, status=429, headers={'Retry-After': '5'})
    with pytest.raises(LocalEntryNotFoundError) as caught:
        by_name()
    assert '429 Too Many Requests' in str(caught.value.__cause__)
    assert waits == [6.] * 5


@pytest.mark.parametrize('status', [500, 503])
def test_two_errors_of_the_hub_are_outlasted(status, hub, cache, waits, check):
    hub.order('HEAD', WEIGHTS, times=2, status=status)
    check(by_name())
    assert [r.status for r in hub.requests('HEAD')][:3] == [status, status, 200] and waits == [1]


def test_error_of_the_hub_while_it_should_send_the_file_is_an_error_and_the_next_call_succeeds(hub, cache, check):
    hub.order('GET', WEIGHTS, status=500)
    with pytest.raises(HfHubHTTPError, match='500'):
        by_name()
    assert not blobs(cache)
    check(by_name())


@pytest.mark.parametrize('method', ['HEAD', 'GET'])
def test_connection_that_is_dropped_without_an_answer(method, hub, cache, waits, check):
    hub.order(method, WEIGHTS, drop='before')
    if method == 'GET':
        check(by_name())
    else:
        # The client repeats a HEAD for refused connections and errors of the Hub, not for this.
        with pytest.raises(Exception, match='disconnected'):
            by_name()
        assert not blobs(cache)
        check(by_name())


def test_hub_that_does_not_answer_is_given_up(hub, cache, check, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.3)
    check(by_name())
    hub.order('HEAD', WEIGHTS, times=ALWAYS, delay=1)
    start = time.monotonic()
    check(by_name())
    assert time.monotonic() - start < 5


def test_hub_that_never_answers_is_given_up_with_an_empty_cache_too(hub, cache, waits, monkeypatch):
    from huggingface_hub import file_download
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.1)  # 10 seconds otherwise
    monkeypatch.setattr(file_download, '_ETAG_RETRY_TIMEOUT', 0.1)  # 60 seconds otherwise
    hub.order('HEAD', WEIGHTS, times=ALWAYS, delay=0.5)
    with pytest.raises(LocalEntryNotFoundError, match='check your connection'):
        by_name()
    assert len(hub.requests('HEAD')) == 7 and sum(waits) == 23  # hence 393 seconds at most
    assert not blobs(cache)


def test_download_that_stands_still_is_begun_again(hub, cache, waits, check, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.5)
    hub.order('GET', WEIGHTS, cut=100_000, stall=30)
    start = time.monotonic()
    check(by_name())
    assert time.monotonic() - start < 10 and len(hub.requests('GET')) == 2


# ---- parts and lies


@pytest.mark.parametrize('cut', [0, 1, 65_536, 900_000, -1])
@pytest.mark.parametrize('chunk', [65_536, None])
def test_cut_connection_is_resumed_where_whole_chunks_end(cut, chunk, hub, cache, weights, waits, check, monkeypatch):
    if chunk:
        monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', chunk)
    cut %= len(weights)
    hub.order('GET', WEIGHTS, cut=cut)
    check(by_name())
    kept = cut // constants.DOWNLOAD_CHUNK_SIZE * constants.DOWNLOAD_CHUNK_SIZE
    assert [r.range for r in hub.requests('GET')] == [None, f'bytes={kept}-' if kept else None]
    assert sum(r.sent for r in hub.requests('GET')) == len(weights) + cut - kept
    assert blobs(cache) == [digests(weights)[0]]


def test_connection_cut_again_and_again_is_resumed_while_bytes_come(hub, cache, weights, waits, check, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 65_536)
    hub.order('GET', WEIGHTS, times=ALWAYS, cut=3 * 65_536)
    check(by_name())
    assert len(hub.requests('GET')) == -(-len(weights) // (3 * 65_536)) > 6


def test_resuming_does_not_join_two_contents(hub, cache, weights, waits, check, monkeypatch):
    """The file changes on the Hub between the first part and the second."""
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 65_536)
    other = flipped(weights, 1_000_000)
    hub.order('GET', WEIGHTS, cut=500_000)
    hub.order('GET', WEIGHTS, skip=0, action=lambda: hub.repositories[OURS].commit_files({'model.safetensors': other}))
    with pytest.raises(RuntimeError, match=f'model.safetensors.*{digests(weights)[0]}.*{digests(other)[0]}'):
        by_name()
    hub.repositories[OURS].commit_files({'model.safetensors': weights})
    check(by_name())


def test_connection_cut_for_ever_is_an_error_in_bounded_time(hub, cache, waits, check):
    hub.order('GET', WEIGHTS, times=ALWAYS, cut=1000)
    with pytest.raises(Exception, match='incomplete message body|peer closed'):
        by_name()
    assert len(hub.requests('GET')) == 6 and sum(waits) <= 6
    assert not blobs(cache)
    hub.forget()
    check(by_name())


def test_answer_shorter_than_announced_before_is_refused(hub, cache, check):
    hub.order('GET', WEIGHTS, cut=1000, length=1000)
    with pytest.raises(OSError, match='should be of size 1795360 but has size 1000'):
        by_name()
    assert not blobs(cache)
    check(by_name())


def test_answer_with_fewer_bytes_than_its_length_says_is_asked_for_again(hub, cache, weights, waits, check):
    hub.order('GET', WEIGHTS, length=len(weights) + 100)
    check(by_name())
    assert len(hub.requests('GET')) == 2


@pytest.mark.parametrize('repo', [OURS, THEIRS])
def test_file_cut_short_on_the_hub_is_refused_though_its_length_is_right(repo, hub, cache, theirs, weights, check):
    theirs()
    hub.order('*', 'model.safetensors', times=ALWAYS, size=1_000_000)
    expected, actual = digests(weights)[0], digests(weights[:1_000_000])[0]
    with pytest.raises(RuntimeError, match=f'model.safetensors of {repo} .*{expected}.*{actual}'):
        by_hub_id(repo)
    hub.forget()
    check(by_hub_id(repo))


# ---- wrong bytes


@pytest.mark.parametrize('place', [3, 100, 1_000_000, -1], ids=['header length', 'header', 'tensor', 'last'])
@pytest.mark.parametrize('repo', [OURS, THEIRS])
@pytest.mark.parametrize('source', ['name', 'hub id'])
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


@pytest.mark.parametrize('repo', [OURS, THEIRS])
def test_file_that_was_damaged_in_the_cache_is_found_and_fetched_anew(repo, hub, cache, theirs, weights, check):
    theirs()
    check(by_hub_id(repo))
    blob = cache / f'models--{repo.replace("/", "--")}' / 'blobs' / digests(weights)[0]
    blob.write_bytes(flipped(weights, 1_000_000))
    with pytest.raises(RuntimeError, match=f'model.safetensors of {repo} .*{digests(weights)[0]}'):
        by_hub_id(repo)
    check(by_hub_id(repo))


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


# ---- wrong content, of which the Hub gives the right digest


def changed(weights, name, change):
    """Weights of which one tensor is changed by a function."""
    tensors = load(weights)
    tensors[name] = change(tensors[name])
    return save(tensors)


CONV, HEAD = 'layer1.0.conv1.weight', 'fc.weight'


def broken(weights, what):
    tensors = load(weights)
    header = int.from_bytes(weights[:8], 'little')
    if what == 'empty':
        return b''
    if what == 'no header':
        return b'\0' * 64
    if what == 'length of header':
        return (1 << 60).to_bytes(8, 'little') + weights[8:]
    if what == 'header':
        return weights[:8] + b'[' + weights[9:]
    if what == 'too short':
        return weights[:8 + header + 1000]
    if what == 'web page':
        return b'<!DOCTYPE html><html>log in first</html>'
    key, change = {
        'conv of integers': (CONV, lambda t: (t * 10).to(torch.int8)),
        'head of integers': (HEAD, lambda t: (t * 10).to(torch.int8)),
        'conv of booleans': (CONV, lambda t: t > 0),
        'conv of another shape': (CONV, lambda t: t[1:].clone()),
        'head of another shape': (HEAD, lambda t: t[1:].clone()),
        'conv of the right number of elements': (CONV, lambda t: t.flatten()),
        'first conv for other channels': ('conv1.0.weight', lambda t: t[:, :1].clone()),
        'conv missing': (CONV, None),
        'statistics missing': ('bn1.running_var', None),
        'head missing': (HEAD, None),
        'more than asked for': (HEAD, lambda t: t),
        'not a number': (CONV, lambda t: t.flatten().index_fill(0, torch.tensor(5), math.nan).view_as(t)),
        'head not a number': (HEAD, lambda t: t.flatten().index_fill(0, torch.tensor(5), math.nan).view_as(t)),
        'statistics infinite': ('bn1.running_var', lambda t: t / 0),
    }[what]
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key])
    if what == 'more than asked for':
        tensors['layer9.weight'] = torch.ones(3)
    return save(tensors)


FILES = ['empty', 'no header', 'length of header', 'header', 'too short', 'web page']
TENSORS = {
    'conv of integers': CONV, 'head of integers': HEAD, 'conv of booleans': CONV,
    'conv of another shape': CONV, 'head of another shape': HEAD, 'conv of the right number of elements': CONV,
    'first conv for other channels': 'conv1.0', 'conv missing': CONV, 'statistics missing': 'bn1.running_var',
    'head missing': HEAD, 'more than asked for': 'layer9.weight',
    'not a number': CONV, 'head not a number': HEAD, 'statistics infinite': 'bn1.running_var',
}


@pytest.mark.parametrize('what', FILES)
def test_file_that_is_no_safetensors_is_refused(what, theirs, cache, weights, check):
    theirs({'model.safetensors': broken(weights, what)})
    with pytest.raises(RuntimeError, match='model.safetensors of someone/net is no safetensors file'):
        by_hub_id(THEIRS)
    theirs()  # mended by its owner
    check(by_hub_id(THEIRS))


@pytest.mark.parametrize('what', TENSORS)
def test_tensor_that_does_not_fit_is_refused_by_name(what, theirs, cache, weights):
    theirs({'model.safetensors': broken(weights, what)})
    with pytest.raises(RuntimeError, match=re.escape(TENSORS[what])):
        by_hub_id(THEIRS)


@pytest.mark.parametrize('kwargs', [dict(num_classes=7), dict(num_classes=0), dict(features_only=True)])
@pytest.mark.parametrize('what', [
    'conv of integers', 'conv of another shape', 'conv missing', 'statistics missing', 'not a number'])
def test_tensor_that_does_not_fit_is_refused_for_another_head_too(what, kwargs, theirs, cache, weights):
    theirs({'model.safetensors': broken(weights, what)})
    with pytest.raises(RuntimeError, match=re.escape(TENSORS[what].removesuffix('.weight'))):
        by_hub_id(THEIRS, **kwargs)


# ---- wrong config.json


def config(entry_files, **changes):
    return json.dumps({**json.loads(entry_files[ENTRY]['config.json']), **changes}).encode()


@pytest.mark.parametrize('repo', [OURS, THEIRS])
@pytest.mark.parametrize('architecture', ['san_tiny_pairwise', 'gsa_resnet26', 'resnet18', 'no_such_net'])
@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=7)])
def test_config_of_another_architecture_is_refused(architecture, repo, kwargs, hub, cache, theirs, entry_files):
    theirs()
    hub.repositories[repo].commit_files({'config.json': config(entry_files, architecture=architecture)})
    timms_own = architecture == 'resnet18'  # nothing of this package is asked then
    with pytest.raises(
            (RuntimeError, AttributeError) if timms_own else RuntimeError,
            match=architecture if repo == OURS and not timms_own else None):
        by_hub_id(repo, **kwargs)


@pytest.mark.parametrize('data', [b'', b'{', b'[]', b'{"architecture": "gsa_resnet_tiny"}', b'\xff\xfe'])
def test_config_that_is_none_gives_no_model_or_the_right_one(data, theirs, cache, check):
    theirs({'config.json': data})
    try:
        model = by_hub_id(THEIRS)
    except Exception:
        return
    check(model)


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


# ---- pickles


@pytest.fixture
def trap(tmp_path):
    """A pickle that makes a file when it is loaded, and that file."""
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'executed',)

    yield pickle.dumps(Trap())
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'model.bin'])
def test_pickle_instead_of_safetensors_is_not_even_downloaded(name, trap, theirs, hub, cache):
    theirs({'model.safetensors': None, name: trap})
    with pytest.raises(EntryNotFoundError, match='model.safetensors'):
        by_hub_id(THEIRS)
    assert not hub.requests(pattern=name)


def test_pickle_under_the_name_of_safetensors_is_refused(trap, theirs, cache):
    theirs({'model.safetensors': trap})
    with pytest.raises(RuntimeError, match='no safetensors file'):
        by_hub_id(THEIRS)


@pytest.mark.parametrize('kind', ['trap', 'tensors'])
def test_pickle_that_the_config_names_is_not_loaded(kind, trap, theirs, hub, cache, entry_files, weights, tmp_path):
    if kind == 'tensors':
        torch.save(load(weights), tmp_path / 'weights.bin')
        trap = (tmp_path / 'weights.bin').read_bytes()
    pretrained = {**json.loads(entry_files[ENTRY]['config.json'])['pretrained_cfg'], 'hf_hub_filename': 'other.bin'}
    theirs({'config.json': config(entry_files, pretrained_cfg=pretrained), 'other.bin': trap})
    with pytest.raises((RuntimeError, ValueError), match='other.bin'):
        by_hub_id(THEIRS)
    assert not hub.requests(pattern='other.bin')


def test_flipped_byte_in_another_file_that_the_config_names_is_refused(theirs, hub, cache, entry_files, weights):
    pretrained = {**json.loads(entry_files[ENTRY]['config.json'])['pretrained_cfg'], 'hf_hub_filename': 'x.safetensors'}
    theirs({'config.json': config(entry_files, pretrained_cfg=pretrained), 'x.safetensors': weights})
    hub.order('GET', 'x.safetensors', flip=1_000_000)
    try:
        with pytest.raises(RuntimeError, match='x.safetensors'):
            by_hub_id(THEIRS)
    finally:  # or this module's own check of the cache would tell nothing new
        for path in cache.glob('models--someone--net/snapshots/*/*.safetensors'):  # both lead to one blob
            path.resolve().unlink(missing_ok=True)
            path.unlink()


# ---- many, killed, full, read-only


def test_eight_processes_at_once_download_once_and_are_all_right(hub, client_env, weights):
    hub.order('GET', WEIGHTS, times=ALWAYS, delay=0.3)  # so that they do meet
    done = run(LOGITS + """
import os, time
expected = logits()
start = time.time() + 1
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        try:
            time.sleep(max(0, start - time.time()))
            os._exit(0 if logits(**FROM_HUB) == expected else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(4)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
""", client_env)
    assert done.stdout.strip() == str([0] * 8), done.stderr
    assert sum(r.sent for r in hub.requests('GET')) <= 2 * len(weights)
    first_head = min(r.time for r in hub.requests('HEAD'))
    assert sum(r.time - first_head < 0.3 for r in hub.requests('HEAD')) >= 4  # that many before anybody had the file
    blobs = list(Path(client_env['HF_HOME']).glob('hub/models--*/blobs/*'))
    assert [path.name for path in blobs] == [digests(weights)[0]]


def test_killed_while_it_downloads_the_next_process_begins_anew(hub, client_env, cache, weights, check):
    hub.order('GET', WEIGHTS, cut=900_000, stall=60)
    process = subprocess.Popen([sys.executable, '-c', LOGITS + 'logits(**FROM_HUB)'], env=client_env)
    try:
        deadline = time.monotonic() + 90
        while not any(r.sent >= 900_000 for r in hub.requests('GET')) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
    assert digests(weights)[0] not in blobs(cache)
    assert all(name.endswith('.incomplete') for name in blobs(cache))
    start = time.monotonic()
    check(by_name())  # the dead process holds no lock
    assert time.monotonic() - start < 10


@contextlib.contextmanager
def files_up_to(size):
    """Writing to a file beyond a size fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_full_disk_is_an_error_and_leaves_nothing(hub, cache, check):
    with files_up_to(1 << 20), pytest.raises(OSError) as caught:
        by_name()
    assert caught.value.errno == errno.EFBIG
    assert not blobs(cache)
    check(by_name())


@pytest.fixture
def locked_folder(monkeypatch):
    """Makes a folder in which nothing can be written, by root neither: until the test ends this process is nobody."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to nobody
        path = Path(folder)
        path.chmod(0o755)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(path / 'token'))
        root = os.geteuid() == 0

        def lock():
            for inside in (path, *path.rglob('*')):
                if not inside.is_symlink():
                    inside.chmod(0o555 if inside.is_dir() else 0o444)
            if root:
                try:
                    os.seteuid(65534)
                except OSError as error:
                    pytest.skip(f'root writes everywhere and cannot become another user: {error}')
            return path

        try:
            yield path, lock
        finally:
            if root:
                os.seteuid(0)
            for inside in (path, *path.rglob('*')):
                if not inside.is_symlink():
                    inside.chmod(0o755)


def test_read_only_cache_serves_what_it_holds(hub, cache, check, locked_folder):
    folder, lock = locked_folder
    check(by_name(cache_dir=folder))
    lock()
    hub.forget()
    check(by_name(cache_dir=folder))
    assert not hub.requests('GET')


def test_empty_read_only_cache_is_an_error(hub, cache, locked_folder):
    folder, lock = locked_folder
    lock()
    with pytest.raises(PermissionError, match=re.escape(str(folder))):
        by_name(cache_dir=folder)


def test_damaged_file_in_a_read_only_cache_is_named(hub, cache, weights, locked_folder):
    folder, lock = locked_folder
    by_name(cache_dir=folder)
    blob = next(folder.glob('models--*/blobs/*'))
    blob.write_bytes(flipped(weights, 1_000_000))
    lock()
    with pytest.raises(RuntimeError, match=f'model.safetensors of {OURS} .*{digests(weights)[0]}'):
        by_name(cache_dir=folder)


# ---- tools/serve_hub.py


TOOL = Path(__file__).parents[2] / 'tools' / 'serve_hub.py'


@pytest.fixture
def folder(tmp_path, entry_files):
    """A folder of two entries, with things beside and in them that are not to be served."""
    folder = tmp_path / 'hub'
    for entry in (ENTRY, 'san_tiny_pairwise.c100'):
        (folder / entry / 'test').mkdir(parents=True)
        (folder / entry / '.git').mkdir()
        for name, data in {**entry_files[entry], 'test/x.txt': b'0123456789', '.git/config': b'secret'}.items():
            (folder / entry / name).write_bytes(data)
    (tmp_path / 'secret').write_text('secret')
    (folder / 'secret').write_text('secret')
    (folder / ENTRY / 'link').symlink_to(tmp_path / 'secret')
    (folder / '.hidden').mkdir()
    (folder / '.hidden' / 'config.json').write_text('{}')
    (folder / 'empty').mkdir()
    return folder


@pytest.fixture
def served(folder, cache, monkeypatch):
    """Host and port of a process of the tool, which this process's client talks to."""
    process = subprocess.Popen(
        [sys.executable, str(TOOL), str(folder), '--org', 'timm-gsa'],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        match = re.fullmatch(r'HF_ENDPOINT=(http://(127.0.0.1:\d+))\n', process.stdout.readline())
        monkeypatch.setattr(constants, 'ENDPOINT', match[1])
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', match[1] + '/{repo_id}/resolve/{revision}/{filename}')
        yield match[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_served_folder_is_a_hub_to_the_client(served, folder, cache, weights, waits, check, monkeypatch):
    check(by_hub_id())
    check(by_name())
    api = huggingface_hub.HfApi()
    info = api.model_info(OURS, files_metadata=True)
    assert sorted(s.rfilename for s in info.siblings) == ['config.json', 'model.safetensors', 'test/x.txt']
    assert {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs} == {'model.safetensors': digests(weights)[0]}
    snapshot = Path(api.snapshot_download(OURS))
    assert snapshot.name == info.sha and (snapshot / 'test' / 'x.txt').read_bytes() == b'0123456789'
    verified = api.verify_repo_checksums(OURS)
    assert verified.checked_count == 3 and not (verified.mismatches or verified.missing_paths or verified.extra_paths)
    assert [i.path for i in api.get_paths_info(OURS, ['test', 'config.json', 'no'])] == ['config.json', 'test']
    assert [i.path for i in api.list_repo_tree(OURS)] == ['config.json', 'model.safetensors', 'test']
    assert [i.path for i in api.list_repo_tree(OURS, 'test')] == ['test/x.txt']
    assert api.revision_exists(OURS, info.sha) and not api.revision_exists(OURS, 'v9')
    assert not api.file_exists(OURS, 'link') and not api.file_exists(OURS, '.git/config')
    for name in ('secret', 'empty', 'no'):
        assert not api.repo_exists(f'timm-gsa/{name}')
    with pytest.raises(HfHubHTTPError, match='404'):
        api.create_repo('timm-gsa/new', token='hf_any')
    with pytest.raises(EntryNotFoundError):
        huggingface_hub.hf_hub_download(OURS, 'pytorch_model.bin')
    (folder / ENTRY / 'config.json').write_text('{}')  # of which neither digest nor commit are known
    with pytest.raises(ValueError) as caught:
        huggingface_hub.hf_hub_download(OURS, 'config.json', force_download=True)
    assert 'config.json has changed' in str(caught.value.__cause__)


@pytest.mark.parametrize('wanted, status, part', [
    (None, 200, b'0123456789'), ('bytes=0-0', 206, b'0'), ('bytes=3-5', 206, b'345'), ('bytes=7-', 206, b'789'),
    ('bytes=-2', 206, b'89'), ('bytes=-99', 206, b'0123456789'), ('bytes=8-99', 206, b'89'), ('bytes=10-', 416, None),
    ('bytes=-0', 416, None), ('bytes=5-3', 200, b'0123456789'), ('bytes=0-1,3-4', 200, b'0123456789'),
    ('lines=1-2', 200, b'0123456789'), ('bytes=-', 200, b'0123456789'),
])
def test_served_folder_gives_parts_of_files(wanted, status, part, served):
    connection = http.client.HTTPConnection(served, timeout=10)
    for method in ('GET', 'HEAD', 'GET'):  # on one connection: what is sent ends where it is said to
        connection.request(method, f'/{OURS}/resolve/main/test/x.txt', headers={'Range': wanted} if wanted else {})
        answer = connection.getresponse()
        body = answer.read()
        if method == 'HEAD':
            assert (answer.status, body, answer.headers['Content-Length']) == (200, b'', '10')
            continue
        assert answer.status == status
        if part is not None:
            assert body == part
        if status == 206:
            start = b'0123456789'.index(part)
            assert answer.headers['Content-Range'] == f'bytes {start}-{start + len(part) - 1}/10'
    connection.close()


@pytest.mark.parametrize('method, path, status', [
    ('GET', '/{repo}/resolve/main/../../../secret', 404), ('GET', '/{repo}/resolve/main/..%2f..%2f..%2fsecret', 404),
    ('GET', '/{repo}/resolve/main//etc/passwd', 404), ('GET', '/timm-gsa/../resolve/main/secret', 404),
    ('GET', '/timm-gsa/%2e%2e/resolve/main/secret', 404), ('GET', '/timm-gsa/.hidden/resolve/main/config.json', 404),
    ('GET', '/{repo}/resolve/x%0d%0aSet-Cookie:y/config.json', 404), ('GET', '/', 404), ('GET', '/%ff%00', 404),
    ('PUT', '/{repo}/resolve/main/config.json', 405), ('DELETE', '/api/models/{repo}', 405),
    ('POST', '/api/repos/create', 404), ('POST', '/api/models/{repo}/commit/main', 404),
    ('POST', '/api/models/{repo}/paths-info/main', 400), ('BREW', '/', 501),
])
def test_served_folder_is_read_only_and_closed(method, path, status, served, folder):
    connection = http.client.HTTPConnection(served, timeout=10)
    connection.request(method, path.format(repo=OURS), body=b'[1' if method == 'POST' else None,
                       headers={'Content-Type': 'application/json'})
    answer = connection.getresponse()
    assert answer.status == status and b'secret' not in answer.read().replace(b'/secret', b'')
    assert 'Set-Cookie' not in answer.headers
    connection.close()
    assert (folder / ENTRY / 'config.json').stat().st_size > 100


def test_serving_what_cannot_be_served_is_an_error(folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in [
            ([tmp_path / 'no'], 'cannot read'),
            ([folder / 'secret'], 'cannot read'),
            ([folder / 'empty'], 'no entries'),
            ([folder, '--port', port], 'Address already in use'),
            ([folder, '--port', '65536'], '0 to 65535'),
            ([folder, '--org', 'a/b'], 'organization'),
        ]:
            done = subprocess.run(
                [sys.executable, str(TOOL), '--org', 'timm-gsa', *map(str, arguments)],
                capture_output=True, text=True, timeout=60)
            assert done.returncode == 2 and message in done.stderr, done.stderr
            assert 'Traceback' not in done.stderr and not done.stdout


def test_commit_of_a_served_folder_follows_from_its_content(folder, hub_module):
    entries = hub_module.serve_hub.entries
    before = entries(folder, 'a')
    assert {name: r.commit for name, r in entries(folder, 'b').items()} == {
        name.replace('a/', 'b/', 1): r.commit for name, r in before.items()}
    (folder / ENTRY / 'test' / 'x.txt').write_bytes(b'9123456789')
    changed = {name for name, r in entries(folder, 'a').items() if r.commit != before[name].commit}
    assert changed == {f'a/{ENTRY}'}

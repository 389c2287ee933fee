"""A Hub on this machine with the entries of the package, and the real client configured for it."""
import importlib.util
import os
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from timm_gsa.models._zoo import entries

ENTRIES = tuple(entries())


@pytest.fixture(scope='session')
def hub_module():
    """tests/hub/hub.py"""
    path = Path(__file__).with_name('hub.py')
    spec = importlib.util.spec_from_file_location('timm_gsa_tests_hub', path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def entry_files():
    """{entry: {path: bytes}} as published."""
    configs = Path(__file__).parents[2] / 'hub_configs'
    return {
        entry: {
            'model.safetensors': (files('timm_gsa') / 'weights' / f'{entry}.safetensors').read_bytes(),
            'config.json': (configs / entry / 'config.json').read_bytes(),
        }
        for entry in ENTRIES
    }


@pytest.fixture
def hub(hub_module, entry_files):
    """A Hub on a free port of this machine, with the entries of the package."""
    from timm_gsa.models._weights import ORGANIZATION
    with hub_module.Hub() as hub:
        for entry, content in entry_files.items():
            hub.publish(f'{ORGANIZATION}/{entry}', content)
        yield hub


@pytest.fixture
def cache(hub, tmp_path, monkeypatch):
    """The client of this process talks to the Hub; yields its cache, which is empty."""
    import huggingface_hub
    from huggingface_hub import constants
    for key in list(os.environ):
        if 'proxy' in key.lower() or key.startswith(('HF_', 'HUGGING_FACE_')):
            monkeypatch.delenv(key)
    home = tmp_path / 'hf'
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(home / 'hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(home / 'token'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
    close = getattr(huggingface_hub, 'close_session', lambda: None)  # the session keeps proxies and connections
    close()
    yield home / 'hub'
    close()

"""Other ways to the entries: timm's name prefixes, transformers' wrapper around timm."""
import json
import os
import subprocess
import sys
from pathlib import Path

import interop_table
import pytest
import timm
import torch

import hub_configs

from ..versions import reads_local_dir

pytestmark = reads_local_dir

ROOT = Path(__file__).parents[2]
ARCHITECTURE = 'san_tiny_pairwise'
ENTRY = f'{ARCHITECTURE}.c100'

SCRIPT = """
import json
from pathlib import Path
import timm
import torch

import hub_configs
from PIL import Image
import timm_gsa  # nothing is installed here that would register the models
{body}
print(json.dumps(result))
"""


@pytest.fixture(scope='module')
def repositories(tmp_path_factory):
    """A folder with whole repositories of the entries, as for a lab without network."""
    folder = tmp_path_factory.mktemp('repositories')
    assert hub_configs.main(['export', str(folder), ENTRY]) == 0
    assert sorted(p.relative_to(folder / ENTRY).as_posix() for p in folder.rglob('*.*') if p.is_file()) == [
        'README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors']
    return folder


@pytest.fixture(scope='module')
def endpoint(hub_module, repositories):
    with hub_module.Hub() as hub:
        files = {
            path.relative_to(repositories / ENTRY).as_posix(): path.read_bytes()
            for path in (repositories / ENTRY).rglob('*') if path.is_file()}
        hub.publish(f'timm-gsa/{ENTRY}', files)
        yield hub.endpoint


@pytest.fixture
def run(endpoint, tmp_path):
    """Runs code in a fresh process that knows only the loopback Hub; returns what it leaves in `result`."""
    def run(body):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING'))}
        environment |= dict(
            HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_TELEMETRY='1', PYTHONPATH=str(ROOT))
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT.format(body=body)], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    return run


def test_timm_finds_the_entry_by_both_prefixes_and_its_config(hub, cache, repositories):
    x = torch.randn(1, 3, 64, 64)
    own, *others = (
        timm.create_model(name, pretrained=True).eval()
        for name in (ENTRY, f'hf-hub:timm-gsa/{ENTRY}', f'local-dir:{repositories / ENTRY}'))
    assert all(torch.equal(own(x), other(x)) for other in others)
    cfg, name, args = timm.models.load_model_config_from_hf(f'timm-gsa/{ENTRY}')
    assert (name, args, cfg['label_names'][69]) == (ARCHITECTURE, {}, 'rocket')


@pytest.mark.interop
def test_transformers_classifies_with_the_entry(run, record_property):
    did = "`AutoModelForImageClassification`, `pipeline`: an entry's repository on a Hub"
    interop_table.record(record_property, 'transformers', did, ARCHITECTURE)
    pytest.importorskip('transformers', reason='transformers is not installed')
    photo = ROOT / 'timm_gsa' / 'photos' / 'rocket.jpg'
    logits, own, best = run(f"""
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
photo = Image.open({str(photo)!r}).convert('RGB')
model = AutoModelForImageClassification.from_pretrained('timm-gsa/{ENTRY}').eval()
pixels = AutoImageProcessor.from_pretrained('timm-gsa/{ENTRY}')(photo, return_tensors='pt')['pixel_values']
own = timm.create_model('{ENTRY}', pretrained=True).eval()
with torch.no_grad():
    result = [model(pixels).logits[0].tolist(), own(pixels)[0].tolist()]
classify = pipeline('image-classification', 'timm-gsa/{ENTRY}')
result.append([each['label'] for each in classify(photo)])
""")
    assert logits == pytest.approx(own, abs=1e-5)
    assert 'rocket' in best

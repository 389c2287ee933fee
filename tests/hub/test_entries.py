"""hub_configs/: entries that follow the registry and the recorded results, cards that the Hub and users can read."""
import json
import re
import shutil
from pathlib import Path

import _hub_entry
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from timm.models import save_for_hf

import timm_gsa
from timm_gsa.models._weights import ORGANIZATION
from timm_gsa.models._zoo import entries

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'hub_configs'
ENTRIES = entries()
TINY = [name for name in ENTRIES if name.endswith('.c100')]

pytestmark = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split('.')[:3])) < (1, 0, 31),
    reason='configs are written as timm 1.0.31 and later write them')


@pytest.fixture
def hub_entry(tmp_path, monkeypatch):
    """The module of the entries, working on copies of what it reads and writes."""
    shutil.copytree(CONFIGS, tmp_path / 'hub_configs')
    shutil.copytree(ROOT / 'timm_gsa' / 'weights', tmp_path / 'weights')
    monkeypatch.setattr(_hub_entry, 'CONFIGS', tmp_path / 'hub_configs')
    monkeypatch.setattr(_hub_entry, 'PACKAGED', tmp_path / 'weights')
    return _hub_entry


def test_folders_are_what_the_registry_and_the_results_give(run_tool):
    done = run_tool(ROOT / 'tools' / 'release' / 'hub_configs.py', 'check')
    assert (done.returncode, done.stdout) == (0, ''), done.stdout + done.stderr
    assert sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()) == sorted([*ENTRIES, 'recipes'])


def test_every_registered_entry_with_weights_has_its_folder(promised):
    with_weights = {name for name in timm.list_pretrained() if name.partition('.')[0] in promised}
    assert with_weights == set(ENTRIES)
    for name in ENTRIES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id.partition('@')[0] == f'{ORGANIZATION}/{name}'


@pytest.mark.parametrize('damage, complaint', [
    (lambda e: (e.folder / 'README.md').write_text('# Another card'), 'README.md is not what the registry gives'),
    (lambda e: (e.folder / 'config.json').unlink(), 'config.json is missing'),
    (lambda e: (e.folder / 'entry.yaml').write_text(
        (e.folder / 'entry.yaml').read_text().replace('revision: null', 'revision: 1')), 'entry.yaml is not what'),
    (lambda e: (e.folder / 'pytorch_model.bin').touch(), 'pytorch_model.bin belongs to no entry'),
    (lambda e: e.weights.write_bytes(e.weights.read_bytes()[:-1] + b'\0'), 'SHA-256'),
    (lambda e: e.weights.unlink(), 'is missing'),
    (lambda e: shutil.copy(e.folder.parent / TINY[2] / 'test' / 'rand_tensors.safetensors', e.folder / 'test'),
     'output is not what the weights give'),
])
def test_check_finds_what_drifted(hub_entry, damage, complaint):
    entry = hub_entry.Entry(TINY[3])
    assert list(entry.problems()) == []
    damage(entry)
    assert any(complaint in problem for problem in entry.problems())


def test_build_repairs_and_pin_reaches_the_registry(hub_entry, tmp_path):
    entry = hub_entry.Entry(TINY[3])
    shutil.rmtree(entry.folder)
    entry.write()
    assert list(entry.problems()) == []
    for name in ('config.json', 'README.md'):
        assert (entry.folder / name).read_bytes() == (CONFIGS / entry.name / name).read_bytes()
    written, stored = (
        yaml.safe_load((folder / 'entry.yaml').read_text()) for folder in (entry.folder, CONFIGS / entry.name))
    logits, expected = (each['expected'].pop('logits') for each in (written, stored))
    assert logits == pytest.approx(expected, abs=2e-4)  # rounded to four places, of figures that machines differ in
    assert written == stored
    entry.pin('0' * 40)
    assert yaml.safe_load((entry.folder / 'entry.yaml').read_text())['revision'] == '0' * 40
    results = json.loads((tmp_path / 'weights' / 'c100.json').read_text())
    assert results['models'][entry.name]['revision'] == '0' * 40
    assert list(hub_entry.Entry(TINY[3]).problems()) == []


@pytest.mark.parametrize('name', ENTRIES)
def test_config_describes_the_model_and_no_place_on_this_machine(name):
    config = json.loads((CONFIGS / name / 'config.json').read_text())
    assert [key for key in config if key != 'label_descriptions'] == [
        'architecture', 'num_classes', 'num_features', 'global_pool', 'label_names', 'pretrained_cfg']
    architecture, _, tag = name.partition('.')
    assert (config['architecture'], config['pretrained_cfg']['tag']) == (architecture, tag)
    assert config['num_classes'] == len(config['label_names']) == {'c100': 100, 'tin200': 200}[tag]
    assert not {'file', 'url', 'hf_hub_id', 'source'} & set(config['pretrained_cfg'])
    assert str(ROOT) not in json.dumps(config)


@pytest.mark.parametrize('name', ENTRIES)
def test_card_is_one_that_the_hub_reads(name):
    card = ModelCard.load(CONFIGS / name / 'README.md')
    data = card.data.to_dict()
    assert (data['library_name'], data['pipeline_tag']) == ('timm', 'image-classification')
    assert data['license'] == 'apache-2.0'
    record = json.loads((ROOT / 'timm_gsa' / 'weights' / f'{name.partition(".")[2]}.json').read_text())
    assert data['datasets'] == [record['dataset']['hub']] and 'timm' in data['tags']
    results = record['models'][name]
    [top1, top5] = card.data.eval_results
    assert (top1.metric_value, top5.metric_value) == (results['top1'], results['top5'])
    assert card.data.model_name == name
    for heading in ('Model Details', 'Model Usage', 'Results', 'Citation'):
        assert f'\n## {heading}\n' in card.text
    assert results['sha256'] in card.text and 'hf-hub:timm-gsa/' in card.text and str(ROOT) not in card.text


def test_what_the_card_tells_users_to_do_works(tmp_path, monkeypatch):
    name = TINY[0]
    shutil.copy(CONFIGS / name / 'config.json', tmp_path)
    shutil.copy(Path(timm_gsa.__file__).parent / 'weights' / f'{name}.safetensors', tmp_path / 'model.safetensors')
    shutil.copy(ROOT / 'timm_gsa' / 'photos' / 'rocket.jpg', tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / name / 'README.md').read_text()
    scope = {}
    for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        exec(block.replace(f'hf-hub:{ORGANIZATION}/{name}', f'local-dir:{tmp_path}'), scope)
    assert 'rocket' in scope['names']
    assert scope['embedding'].shape == (1, scope['model'].num_features)


@pytest.mark.parametrize('name', ENTRIES)
def test_model_made_from_the_wheel_saves_without_a_trace_of_it(name, tmp_path):
    model = timm.create_model(name, pretrained=True).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert 'weights' not in (tmp_path / 'config.json').read_text()
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image), model(image))

"""The weights in the wheel: what they are recorded to be, and loadable in every way timm knows."""
import hashlib
import json
from importlib.resources import files

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from timm_gsa.models._families import family_of, tiny_models

WEIGHTS = files('timm_gsa') / 'weights'
RESULTS = json.loads((WEIGHTS / 'c100.json').read_text())


@pytest.mark.parametrize('name', tiny_models())
def test_recorded_file_is_the_one_shipped(name):
    path = WEIGHTS / f'{name}.c100.safetensors'
    recorded = RESULTS['models'][f'{name}.c100']
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (recorded['size'], recorded['sha256'])
    assert recorded['images'] == 10000 and recorded['top1'] >= 50
    assert RESULTS['recipe'] and RESULTS['dataset']['citation']


def test_all_weights_stay_small():
    assert sum(len(path.read_bytes()) for path in WEIGHTS.iterdir()) < 10e6


@pytest.mark.parametrize('name', tiny_models())
def test_pretrained_weights_load_without_network(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert timm.is_model_pretrained(name) and f'{name}.c100' in timm.list_pretrained(name)
    model = timm.create_model(name, pretrained=True).eval()
    assert model.num_classes == 100 and len(model.pretrained_cfg['label_names']) == 100
    image = torch.randn(2, 3, 64, 64)
    logits = model(image)
    assert logits.std() > 0.3  # trained, not as initialised
    torch.testing.assert_close(timm.create_model(f'{name}.c100', pretrained=True).eval()(image), logits)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()(image)
    if not family_of(name).final_norm:
        torch.testing.assert_close(features[-1], model.forward_features(image))
    grey = timm.create_model(name, pretrained=True, in_chans=1, num_classes=7).eval()
    colour = model.forward_features(image[:, :1].expand(-1, 3, -1, -1))
    error = grey.forward_features(image[:, :1]) - colour  # timm adds the channels' weights up in the file's own fp16
    assert error.norm() < 5e-3 * colour.norm()


@pytest.mark.parametrize('name', tiny_models())
def test_trained_models_know_a_rocket(name):
    from PIL import Image
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with Image.open(str(files('timm_gsa') / 'photos' / 'rocket.jpg')) as photo:
        best = model(transform(photo).unsqueeze(0)).topk(5).indices[0]
    assert 'rocket' in [model.pretrained_cfg['label_names'][i] for i in best]

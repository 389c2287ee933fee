"""The weights in the wheel: what they are recorded to be, and loadable in every way timm knows."""
import hashlib
import json
from importlib.resources import files

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from timm_gsa.models._families import family_of, tiny_models
from timm_gsa.models._zoo import entries

WEIGHTS = files('timm_gsa') / 'weights'


@pytest.mark.parametrize('entry', entries())
def test_recorded_file_is_the_one_shipped(entry):
    results = json.loads((WEIGHTS / f'{entry.partition(".")[2]}.json').read_text())
    recorded = results['models'][entry]
    data = (WEIGHTS / f'{entry}.safetensors').read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (recorded['size'], recorded['sha256'])
    assert recorded['images'] == results['dataset']['test_images'] == 10000
    assert results['recipe'] and results['dataset']['citation']
    assert recorded['top1'] > 30


def test_all_weights_stay_small():
    assert all(path.stat().st_size <= 35e6 for path in WEIGHTS.iterdir())
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 45e6


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


@pytest.mark.parametrize('name, photo, label', [
    *((name, 'rocket', 'rocket') for name in tiny_models()),
    ('gsa_resnet50', 'rocket', 'projectile'),
    ('gsa_resnet50', 'coffee', 'espresso'),
])
def test_trained_models_know_what_is_in_photos(name, photo, label):
    from PIL import Image
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with Image.open(str(files('timm_gsa') / 'photos' / f'{photo}.jpg')) as image:
        best = model(transform(image).unsqueeze(0)).topk(5).indices[0]
    assert label in [model.pretrained_cfg['label_names'][i] for i in best]


class TestModelOfThePaper:
    """`gsa_resnet50`: as in the paper without weights, of 200 classes and 64 px with them."""

    def test_bare_name_takes_the_trained_entry(self, monkeypatch):
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        model = timm.create_model('gsa_resnet50', pretrained=True).eval()
        cfg = model.pretrained_cfg
        assert (cfg['tag'], cfg['num_classes'], model.num_classes) == ('tin200', 200, 200)
        assert resolve_model_data_config(model)['input_size'] == (3, 64, 64)
        assert cfg['label_names'][:2] == ('goldfish', 'European fire salamander')
        assert cfg['label_descriptions']['goldfish'] == 'goldfish, WordNet n01443537'
        image = torch.randn(2, 3, 64, 64)
        again = timm.create_model('gsa_resnet50.tin200', pretrained=True).eval()
        assert torch.equal(again(image), model(image))

    def test_without_weights_it_is_the_network_of_the_paper(self):
        cfg = timm.get_pretrained_cfg('gsa_resnet50')
        assert (cfg.tag, cfg.num_classes, cfg.input_size) == ('untrained', 1000, (3, 224, 224))
        model = timm.create_model('gsa_resnet50', device='meta')
        assert model.num_classes == 1000 and sum(p.numel() for p in model.parameters()) == 18_052_856

    @pytest.mark.parametrize('arguments', [dict(num_classes=10), dict(img_size=160), dict(features_only=True)])
    def test_fine_tuning_starts_from_its_weights(self, arguments):
        model = timm.create_model('gsa_resnet50', pretrained=True, **arguments).eval()
        image = torch.randn(1, 3, 64, 64)
        whole = timm.create_model('gsa_resnet50', pretrained=True).eval()
        expected = whole.forward_features(image)
        actual = model(image)[-1] if 'features_only' in arguments else model.forward_features(image)
        if 'img_size' in arguments:  # tables go to the other size and back
            assert model.layer1[0].conv2.rel_h.shape[0] == 79
            assert (actual - expected).norm() < 0.5 * expected.norm()
        else:
            assert torch.equal(actual, expected)

    def test_a_file_of_ones_own_is_for_the_network_of_the_paper(self, tmp_path):
        torch.save(timm.create_model('gsa_resnet50').state_dict(), tmp_path / 'mine.pth')
        overlay = dict(file=str(tmp_path / 'mine.pth'))
        model = timm.create_model('gsa_resnet50', pretrained=True, pretrained_cfg_overlay=overlay)
        assert model.num_classes == 1000 and model.pretrained_cfg['tag'] == 'untrained'

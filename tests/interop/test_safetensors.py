"""safetensors: a model written by timm's `save_for_hf` and read again through `local-dir:`."""
import pytest
import timm
import torch

pytestmark = pytest.mark.interop


def test_folder_gives_the_model_back(ours, needs, create, tmp_path):
    safetensors = needs('safetensors', "timm's `save_for_hf`, then `local-dir:` (timm 1.0.28 or later)", ours)
    if tuple(map(int, timm.__version__.split('.')[:3])) < (1, 0, 28):
        pytest.skip('such a timm takes the safetensors file of a local-dir for a pickle')
    model = create(ours, num_classes=7, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    assert {path.name for path in (tmp_path / 'saved').iterdir()} == {'config.json', 'model.safetensors'}
    with safetensors.safe_open(tmp_path / 'saved' / 'model.safetensors', framework='pt') as file:
        assert set(file.keys()) == set(model.state_dict())
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    images = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))

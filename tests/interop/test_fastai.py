"""fastai: `vision_learner` by the name of a model."""
import pytest
import timm
import torch
from PIL import Image

pytestmark = pytest.mark.interop


@pytest.fixture
def folder(tmp_path):
    """Twelve noisy images of each of two classes, one reddish."""
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 100, (70, 80, 3), generator=generator, dtype=torch.uint8)
        label = ('red', 'grey')[number % 2]
        if label == 'red':
            pixels[..., 0] += 120
        (tmp_path / 'images' / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / 'images' / label / f'{number}.png')
    return tmp_path / 'images'


def changed(before, after):
    return {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}


def test_vision_learner_trains_head_then_body(ours, needs, folder, own_weights):
    needs('fastai', '`vision_learner`: an epoch on a frozen body, one on all of it', ours)
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, accuracy, vision_learner
    torch.manual_seed(0)
    images = ImageDataLoaders.from_folder(
        folder, valid_pct=1 / 3, seed=1, item_tfms=Resize(64), bs=8, num_workers=0, device=torch.device('cpu'))
    learner = vision_learner(images, ours, metrics=accuracy, path=folder)
    body, head = learner.model
    plain = timm.create_model(ours, pretrained=True, num_classes=0).eval()
    [normalize] = [each for each in images.after_batch.fs if isinstance(each, Normalize)]
    assert normalize.mean.flatten().tolist() == pytest.approx(plain.pretrained_cfg['mean'])
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(x), plain.forward_features(x))

    weights = own_weights(body)
    frozen = {name: each for name, each in weights.items() if 'norm' not in name}  # fastai trains norms always
    start = {name: each.detach().clone() for name, each in weights.items()}
    classifier = head[-1].weight.detach().clone()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, 0.01)
        assert not changed(start, frozen) and not torch.equal(classifier, head[-1].weight)
        learner.unfreeze()
        learner.fit_one_cycle(1, 0.01)
        assert changed(start, weights) == set(weights)
        loss, right = learner.validate()
    assert 0 <= right <= 1 and torch.tensor(loss).isfinite()
    assert all(each.isfinite().all() for each in weights.values())

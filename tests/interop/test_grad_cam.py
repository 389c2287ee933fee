"""pytorch-grad-cam: class-specific maps of a stage and of an attention layer."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_gsa.commands._inputs import PHOTOS as PACKAGED

pytestmark = pytest.mark.interop

PHOTOS = sorted(PACKAGED.glob('*.jpg'))
HEIGHT, WIDTH = 96, 128


@pytest.fixture
def model(ours):
    return timm.create_model(ours, pretrained=True).eval()


@pytest.fixture
def photos(model):
    config = timm.data.resolve_data_config(dict(input_size=(3, HEIGHT, WIDTH)), model=model)
    transform = timm.data.create_transform(**config)
    return torch.stack([transform(Image.open(path).convert('RGB')) for path in PHOTOS])


@pytest.mark.parametrize('place', ['stage', 'attention'])
def test_map_follows_its_definition_and_the_class(ours, place, needs, model, photos, own_layers):
    needs('grad-cam', '`GradCAM` at a stage and at an attention layer', ours, module='pytorch_grad_cam')
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    stages = [model.get_submodule(info['module']) for info in model.feature_info]
    layer = stages[-1] if place == 'stage' else list(own_layers(stages[-2]).values())[-1]
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    scores = model(photos)
    handle.remove()
    best = scores.topk(2).indices.T
    maps = []
    for classes in best:
        [gradient] = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), seen[0], retain_graph=True)
        expected = (seen[0] * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach().numpy()
        with GradCAM(model, [layer]) as cam:
            found = cam(photos, [ClassifierOutputTarget(each) for each in classes.tolist()])
        assert found.shape == (len(PHOTOS), HEIGHT, WIDTH)
        # Scaled to 0 to 1 before and after it is drawn out.
        np.testing.assert_allclose(found, scale_cam_image(scale_cam_image(expected, (WIDTH, HEIGHT))), atol=1e-3)
        maps.append(found)
    assert (np.ptp(maps, axis=(2, 3)) > 0.5).mean() > 0.5  # some maps are empty
    assert np.abs(maps[0] - maps[1]).max() > 0.1

"""The pretrained configs: complete, and true of the model they stand for."""
import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_gsa.models._families import FAMILIES, family_of, tiny_models


def is_small(name: str) -> bool:
    """True of the models that are ours alone, for images of 64 px and 100 classes."""
    return name in tiny_models(untrained=True)


@pytest.fixture
def cfg(registered):
    return timm.get_pretrained_cfg(registered).to_dict()


def test_says_where_the_model_comes_from(registered, cfg):
    family = family_of(registered)
    assert cfg['license'] == ('apache-2.0' if is_small(registered) else family.code_license or 'apache-2.0')
    assert cfg['paper_ids'] == f'arXiv:{family.arxiv}'


def test_says_what_the_input_is(registered, cfg):
    tiny = is_small(registered)
    assert cfg['input_size'] == ((3, 64, 64) if tiny else (3, 224, 224))
    assert cfg['fixed_input_size'] is False
    assert len(cfg['mean']) == len(cfg['std']) == 3
    assert all(0 < value < 1 for value in (*cfg['mean'], *cfg['std']))
    assert cfg['interpolation'] in ('bilinear', 'bicubic') and 0.8 < cfg['crop_pct'] <= 1
    assert cfg['num_classes'] == (100 if tiny else 1000)


def test_layers_it_names_exist(registered, cfg, create):
    model = create(registered, device='meta')
    first = model.get_submodule(cfg['first_conv'])
    assert isinstance(first, nn.Conv2d) and first.in_channels == 3
    assert first is next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    classifier = model.get_submodule(cfg['classifier'])
    assert isinstance(classifier, nn.Linear) and classifier is model.get_classifier()
    assert classifier.out_features == cfg['num_classes']


def test_pool_size_is_the_size_of_the_last_map(registered, cfg, create):
    model = create(registered, device='meta').eval()
    assert model.forward_features(torch.empty(1, *cfg['input_size'], device='meta')).shape[2:] == cfg['pool_size']


@pytest.mark.parametrize('registered', [
    *tiny_models(untrained=True),
    *(pytest.param(name, marks=pytest.mark.slow) for family in FAMILIES for name in family.smallest),
])
def test_smallest_input_runs_and_smaller_does_not(registered, cfg, create):
    """`min_input_size` is there where the number of pools sets one; without it one pixel will do."""
    model = create(registered, device='meta').eval()
    smallest = cfg.get('min_input_size') or (3, 1, 1)
    assert model.forward_features(torch.empty(1, *smallest, device='meta')).shape[2:] == (1, 1)
    if smallest[1] > 1:
        size = f'{smallest[1]} x {smallest[2]}'
        with pytest.raises(ValueError, match=f'images must be at least {size} pixels'):
            model(torch.empty(1, 3, smallest[1] - 1, smallest[2] - 1, device='meta'))


def test_class_names_match_the_classes(registered, cfg):
    if registered not in tiny_models():
        assert cfg.get('label_names') is None
    else:
        assert len(set(cfg['label_names'])) == cfg['num_classes']
        assert all(isinstance(label, str) and label for label in cfg['label_names'])


def test_model_carries_its_config(registered, create):
    model = create(registered, device='meta')
    assert model.pretrained_cfg is model.default_cfg
    assert model.pretrained_cfg['architecture'] == registered
    assert model.pretrained_cfg['tag'] == ('c100' if registered in tiny_models() else 'untrained')
    data = resolve_model_data_config(model)
    transform = create_transform(**data)
    from PIL import Image
    image = transform(Image.new('RGB', (90, 70), 'red'))
    assert image.shape == model.pretrained_cfg['input_size']
    red, green = image[0, 0, 0], image[1, 0, 0]
    assert red == pytest.approx((1 - data['mean'][0]) / data['std'][0], rel=1e-4)
    assert green == pytest.approx(-data['mean'][1] / data['std'][1], rel=1e-4)


def test_other_arguments_do_not_change_the_config(registered, create):
    before = timm.get_pretrained_cfg(registered).to_dict()
    create(registered, device='meta', num_classes=3, in_chans=1, global_pool='max')
    assert timm.get_pretrained_cfg(registered).to_dict() == before

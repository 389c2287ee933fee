"""Every family at other sizes and aspect ratios than it was built for, and GSA's tables from one size to another."""
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import load_checkpoint

import timm_gsa
import timm_gsa.layers.global_self_attention as global_self_attention
from timm_gsa.layers import GlobalSelfAttention, PriorAttention
from timm_gsa.models._families import FAMILIES, family_of, tiny_models

TINY = tiny_models(untrained=True)
SMALLEST = [name for family in FAMILIES for name in family.smallest]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gsa(**kwargs) -> nn.Module:
    """A tiny GSA-ResNet whose residual branches count from the start."""
    return timm.create_model('gsa_resnet_tiny', zero_init_last=False, **kwargs).eval()


def convolutional_sizes(height: int, width: int, count: int = 5) -> list[tuple[int, int]]:
    """Sizes of the features of timm's ResNets: every halving rounds up."""
    return [(-(-height // 2 ** n), -(-width // 2 ** n)) for n in range(1, count + 1)]


def sizes(features: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [tuple(feature.shape[-2:]) for feature in features]


@pytest.mark.parametrize('size', [(64, 64), (33, 47), (96, 64), (128, 128), (32, 32), (65, 34)])
@pytest.mark.parametrize('name', TINY)
def test_tiny_models_run_at_any_size(name, size):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 100) and out.isfinite().all()


# Smallest images, where there is a limit.
LIMITS = {
    'san_tiny_pairwise': 32, 'san_tiny_patchwise': 32, 'smlpnet_mini': 32, 'dcac_mini': 29,
    'gsa_resnet_tiny': 1, 'priorattn_resnet_tiny': 1,
}

WRONG = {
    'four channels': (lambda: torch.randn(1, 4, 64, 64), 'to have 3 channels, but got 4 channels'),
    'NHWC': (lambda: torch.randn(1, 64, 64, 3), 'to have 3 channels, but got 64 channels'),
    'no batch': (lambda: torch.randn(3, 64, 64), r'expected 4D input \(got 3D input\)'),
    'five axes': (lambda: torch.randn(1, 1, 3, 64, 64), 'Expected 3D .unbatched. or 4D .batched. input to conv2d'),
    'float64': (lambda: torch.randn(1, 3, 64, 64).double(), 'Double|double'),
    'float16': (lambda: torch.randn(1, 3, 64, 64).half(), 'Half'),
    'uint8': (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'Byte|unsigned char'),
    'sparse': (lambda: torch.randn(1, 3, 64, 64).to_sparse(), 'sparse|unsupported memory format'),
    'no pixels': (lambda: torch.randn(1, 3, 0, 64), "Kernel size can't be greater|must be at least"),
}


@pytest.fixture(scope='module', params=LIMITS)
def small(request) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()


@pytest.fixture(scope='module')
def resnet() -> nn.Module:
    return timm.create_model('resnet26d').eval()


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference', 'cpu'])
@pytest.mark.parametrize('kind', WRONG)
def test_wrong_images_give_the_errors_of_a_timm_resnet(small, resnet, kind, backend, grad):
    make, message = WRONG[kind]
    with torch.set_grad_enabled(grad), timm_gsa.use_backend(backend):
        for model in (resnet, small):
            with pytest.raises((RuntimeError, ValueError), match=message):
                model(make())


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference', 'cpu'])
def test_too_small_images_are_told_the_smallest_size(small, backend, grad):
    name = small.pretrained_cfg['architecture']
    limit = LIMITS[name]
    with torch.set_grad_enabled(grad), timm_gsa.use_backend(backend):
        assert small(torch.randn(1, 3, limit, limit)).isfinite().all()
        for height, width in ((1, 1), (8, 8), (limit - 1, 64), (64, limit - 1)):
            if limit > 1:
                with pytest.raises(ValueError, match=f'images must be at least {limit} x {limit} pixels'):
                    small(torch.randn(1, 3, height, width))


@pytest.mark.parametrize('name, kwargs, limit', [
    ('san_tiny_patchwise', dict(output_stride=8), 8),
    ('san_tiny_pairwise', dict(stem_type='small'), 8),
    ('dcac_mini', dict(output_stride=16), 13),
    ('dcac_mini', dict(output_stride=8), 5),
])
def test_the_smallest_size_follows_the_strides(name, kwargs, limit):
    model = timm.create_model(name, **kwargs).eval()
    assert model(torch.randn(1, 3, limit, limit)).shape == (1, 100)
    with pytest.raises(ValueError, match=f'images must be at least {limit} x {limit} pixels'):
        model(torch.randn(1, 3, limit - 1, limit))


@pytest.mark.parametrize('name', TINY)
def test_tiny_models_train_at_another_size(name):
    model = timm.create_model(name).train()
    model(torch.randn(2, 3, 47, 72)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize('name', ['gsa_resnet_tiny', 'priorattn_resnet_tiny'])
@pytest.mark.parametrize('size', [(64, 64), (33, 47), (97, 75), (1, 1)])
def test_features_have_the_sizes_of_a_convolutional_resnet(name, size):
    x = torch.randn(1, 3, *size)
    ours = timm.create_model(name, features_only=True).eval()
    theirs = timm.create_model(
        'resnet50', features_only=True, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8).eval()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    with torch.no_grad():
        assert sizes(ours(x)) == sizes(theirs(x)) == convolutional_sizes(*size)


@pytest.mark.parametrize('name', ['san_tiny_pairwise', 'san_tiny_patchwise', 'smlpnet_mini'])
@pytest.mark.parametrize('size', [(33, 47), (97, 75)])
def test_sizes_round_down_where_the_authors_networks_round_down(name, size):
    """SAN's pools leave out a last odd row or column, sMLPNet's patches what fills none; from 32 px on."""
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, *size))
    assert sizes(features) == [(size[0] // stride, size[1] // stride) for stride in family_of(name).strides]


@pytest.mark.parametrize('size', [(33, 47), (97, 75)])
def test_dcac_halves_up_in_its_stem_and_down_in_its_stages(size):
    """Convolution and pool of the stem have a padding, the 2 x 2 pools of the stages none."""
    model = timm.create_model('dcac_mini', features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, *size))
    stem = convolutional_sizes(*size, count=2)
    assert sizes(features) == stem + [(stem[1][0] // 2 ** n, stem[1][1] // 2 ** n) for n in (1, 2, 3)]


@pytest.mark.parametrize('name', SMALLEST)
def test_smallest_models_extract_features_at_96_px(name):
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 96, 96))
    assert sizes(features) == [(96 // stride, 96 // stride) for stride in family_of(name).strides]
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    assert all(feature.isfinite().all() for feature in features)


@pytest.mark.parametrize('name', ['san10_pairwise', 'san10_patchwise', 'san_tiny_pairwise', 'san_tiny_patchwise'])
def test_san_extracts_features_at_32_px(name):
    """Its last maps, 2 and 1 pixels wide, are smaller than its neighbourhoods."""
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(2, 3, 32, 32))
    assert sizes(features) == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert all(feature.isfinite().all() for feature in features)


@pytest.mark.parametrize('name', SMALLEST)
def test_smallest_models_classify_another_aspect_ratio(name):
    model = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 160, 224))
    assert out.shape == (1, 10) and out.isfinite().all()


# The tables of GSA-ResNet


@pytest.mark.parametrize('img_size, expected', [
    (64, [(31, 31), (31, 31), (15, 15), (15, 15), (7, 7), (7, 7)]),
    (96, [(47, 47), (47, 47), (23, 23), (23, 23), (11, 11), (11, 11)]),
    ((33, 47), [(17, 23), (17, 23), (9, 11), (9, 11), (5, 5), (5, 5)]),
    (1, [(1, 1)] * 6),
])
def test_tables_are_built_for_the_size_asked_for(img_size, expected):
    """One layer in stage 1, two in 2 and 3, one in 4; the first of stages 2 to 4 runs before the map is halved."""
    model = gsa(layers=(1, 2, 2, 1), img_size=img_size)
    layers = [layer for layer in model.modules() if isinstance(layer, GlobalSelfAttention)]
    assert [(len(layer.rel_h), len(layer.rel_w)) for layer in layers] == expected


@pytest.mark.parametrize('img_size', [64, (33, 47), (97, 40)])
@pytest.mark.parametrize('output_stride', [32, 16, 8])
def test_a_model_built_for_a_size_needs_no_resampling_there(img_size, output_stride, monkeypatch):
    def refuse(table: torch.Tensor, length: int) -> torch.Tensor:
        assert len(table) == 2 * length - 1
        return table

    monkeypatch.setattr(global_self_attention, 'resize_relative_table', refuse)
    height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    model = gsa(img_size=img_size, output_stride=output_stride)
    with torch.no_grad():
        assert model(torch.randn(1, 3, height, width)).isfinite().all()


def test_the_same_size_is_bit_identical_to_no_interpolation(monkeypatch):
    model, x = gsa(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        twin = gsa()
        twin.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        monkeypatch.setattr(global_self_attention, 'resize_relative_table', lambda table, length: table)
        assert torch.equal(model(x), expected) and torch.equal(twin(x), expected)


@pytest.mark.parametrize('old, new', [(64, 96), (96, 64), (64, (48, 80)), ((33, 47), 64), (64, 32)])
def test_a_state_dict_of_another_size_loads_resampled(old, new):
    source, target = gsa(img_size=old), gsa(img_size=new)
    target.load_state_dict(source.state_dict())
    height, width = new if isinstance(new, tuple) else (new, new)
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-5)
        rebuilt = gsa(img_size=new)  # for the size directly, from what the other resampled
        rebuilt.load_state_dict(target.state_dict())
        assert torch.equal(rebuilt(x), target(x))


@pytest.fixture(params=['safetensors', 'pth'])
def checkpoint(request, tmp_path) -> tuple[nn.Module, Path]:
    """A model for 64 px and the file it was saved to, by timm's trainer or as a Hub would have it."""
    model = gsa()
    path = tmp_path / f'model.{request.param}'
    if request.param == 'safetensors':
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save({'epoch': 3, 'arch': 'gsa_resnet_tiny', 'state_dict': model.state_dict()}, path)
    return model, path


@pytest.mark.parametrize('img_size', [96, (32, 80)])
def test_a_checkpoint_of_another_size_loads_by_every_route_of_timm(checkpoint, img_size):
    source, path = checkpoint
    loaded = gsa(img_size=img_size)
    load_checkpoint(loaded, str(path))
    models = [
        loaded,
        gsa(img_size=img_size, checkpoint_path=str(path)),
        gsa(img_size=img_size, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
    ]
    height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected = source(x)
        for model in models:
            assert model.layer1[0].conv2.rel_h.shape[0] == 2 * (height // 4) - 1
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_pretrained_model_takes_another_size_classes_and_channels_at_once(checkpoint):
    source, path = checkpoint
    model = gsa(
        img_size=96, num_classes=7, in_chans=1, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert model(torch.randn(1, 1, 96, 96)).shape == (1, 7)
    torch.testing.assert_close(model.layer4[0].conv3.weight, source.layer4[0].conv3.weight)
    assert model.layer4[0].conv2.rel_w.shape[0] == 11


def test_a_state_dict_of_another_number_of_heads_is_refused():
    with pytest.raises(RuntimeError, match=r'size mismatch for layer1\.0\.conv2\.rel_h'):
        gsa(img_size=96, num_heads=2).load_state_dict(gsa(num_heads=4).state_dict())


# Prior attention at other output strides


@pytest.mark.parametrize('name', ['priorattn_resnet18', 'priorattn_resnet50'])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_a_gaussian_keeps_its_reach_over_the_image_at_other_output_strides(name, output_stride):
    def reaches(output_stride: int) -> list[float]:
        """Pixels of the image that a radius of one spans, layer by layer."""
        model = timm.create_model(name, output_stride=output_stride, device='meta')
        found = []
        for layer in model.modules():
            if isinstance(layer, PriorAttention):
                layer.register_forward_hook(
                    lambda layer, _, out: found.append(layer.attn_dilation * 224 / out.shape[-1]))
        model(torch.empty(1, 3, 224, 224, device='meta'))
        return found

    assert reaches(output_stride) == reaches(32)


@pytest.mark.parametrize('name', TINY)
def test_no_images_give_no_logits(name):
    """As the last batch of a process may have it; timm's ResNets take it."""
    model = timm.create_model(name).eval()
    images = torch.randn(0, 3, 64, 64, requires_grad=True)
    with torch.no_grad():
        assert model(images).shape == (0, 100)
    model(images).sum().backward()
    assert images.grad is not None and images.grad.shape == images.shape

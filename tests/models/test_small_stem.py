"""`stem_type='small'`: every family on images of about 32 px, and the plain ResNet it is compared with."""
import pytest
import timm
import torch
from torch import nn

from timm_gsa.layers import GlobalSelfAttention, PriorAttention, global_self_attention
from timm_gsa.layers._pool import HalvingMaxPool
from timm_gsa.models._families import FAMILIES
from timm_gsa.models.san import SANBlock

WITH_STEM = [name for family in FAMILIES if family.small_stem for name in family.tiny]


@pytest.fixture(params=WITH_STEM)
def ours(request):
    """Name of a tiny model of each kind that has the small stem."""
    return request.param


@pytest.fixture
def small(create, ours):
    """Makes the tiny model of each kind with the small stem."""
    return lambda **kwargs: create(ours, fresh=True, stem_type='small', num_classes=10, **kwargs)


def test_features_have_the_strides_they_name(small):
    for output_stride, reductions in ((32, [1, 1, 2, 4, 8]), (8, [1, 1, 2, 4, 8]), (4, [1, 1, 2, 4, 4]),
                                      (2, [1, 1, 2, 2, 2])):
        model = small(features_only=True, output_stride=output_stride).eval()
        with torch.no_grad():
            features = model(torch.randn(2, 3, 32, 40))
        assert model.feature_info.reduction() == reductions
        assert [feature.shape[-2:] for feature in features] == [(32 // r, 40 // r) for r in reductions]
        assert [feature.shape[1] for feature in features] == model.feature_info.channels()


def test_reductions_are_those_of_the_whole_model_too(small):
    model = small()
    final, features = model.forward_intermediates(torch.randn(2, 3, 32, 32))
    assert [info['reduction'] for info in model.feature_info] == [1, 1, 2, 4, 8]
    assert [feature.shape[-1] for feature in features] == [32, 32, 16, 8, 4]
    assert final.shape[-2:] == (4, 4)


def test_every_parameter_gets_a_finite_gradient(small):
    model = small(in_chans=1).train()
    model(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_scripted_and_checkpointed_models_give_the_same(small):
    model, x = small(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.)  # zero at first where it would hide a branch
            norm.momentum = 1.
        model.train()(x)
        model.eval()
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)
    plain = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize('name', ['gsa_resnet26', 'san10_pairwise', 'san10_patchwise', 'priorattn_resnet18'])
def test_untrained_configs_follow_the_stem(name):
    cfg = timm.create_model(name, stem_type='small', device='meta').pretrained_cfg
    assert (cfg['input_size'], cfg['pool_size']) == ((3, 32, 32), (4, 4))
    model = timm.create_model(name, stem_type='small', device='meta', pretrained_cfg_overlay=dict(
        input_size=(3, 48, 48), crop_pct=1.))
    cfg = model.pretrained_cfg
    assert (cfg['input_size'], cfg['pool_size'], cfg['crop_pct']) == ((3, 48, 48), (4, 4), 1.)
    assert isinstance(model.get_submodule(cfg['first_conv']), nn.Conv2d)
    cfg = timm.create_model(name, device='meta').pretrained_cfg
    assert (cfg['input_size'], cfg['pool_size']) == ((3, 224, 224), (7, 7))


def test_configs_of_weights_stay_as_they_are(ours):
    cfg = timm.create_model(ours, stem_type='small', device='meta').pretrained_cfg
    assert (cfg['input_size'], cfg['pool_size']) == ((3, 64, 64), (2, 2))


@pytest.mark.parametrize('kwargs, message', [
    (dict(stem_type='smal'), r"stem_type must be one of .*'small', got 'smal'"),
    (dict(stem_type='small', output_stride=1), 'output_stride must be 2, 4, 8, 16 or 32, got 1'),
    (dict(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
])
def test_unknown_stems_and_strides_are_refused(ours, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(ours, device='meta', **kwargs)


def test_a_pool_to_replace_is_refused():
    with pytest.raises(ValueError, match='replace_stem_pool must be False'):
        timm.create_model('gsa_resnet26', stem_type='small', replace_stem_pool=True, device='meta')


# The convolutional twin


@pytest.mark.parametrize('stem_type', ['', 'small'])
@pytest.mark.parametrize('family', ['gsa_resnet50', 'priorattn_resnet50'])
def test_without_attention_stages_a_model_is_timms_resnet(family, stem_type):
    shape = dict(layers=(1, 1, 2, 1), channels=(16, 16, 32, 32), num_classes=10)
    twin = timm.create_model(family, attn_stages=(), stem_type=stem_type, **shape).eval()
    resnet = timm.create_model('resnet50', **shape).eval()
    if stem_type == 'small':
        resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert list(twin.state_dict()) == list(resnet.state_dict())
    with torch.no_grad():
        for norm in (module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.)
        resnet.load_state_dict(twin.state_dict())
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(twin(x), resnet(x))


def test_the_stem_starts_as_timms_convolutions_do():
    torch.manual_seed(0)
    stem = timm.create_model('gsa_resnet26', stem_type='small').conv1
    assert stem.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # fan out


# GSA-ResNet


@pytest.mark.parametrize('kwargs, rows', [
    ({}, [63, 63, 31, 31, 15, 15, 7]),
    ({'img_size': 48}, [95, 95, 47, 47, 23, 23, 11]),
])
def test_tables_fit_the_maps_of_small_images(kwargs, rows, monkeypatch):
    def refuse(table: torch.Tensor, length: int) -> torch.Tensor:
        assert len(table) == 2 * length - 1
        return table

    monkeypatch.setattr(global_self_attention, 'resize_relative_table', refuse)
    size = kwargs.get('img_size', 32)
    for output_stride in (8, 2):
        model = timm.create_model(
            'gsa_resnet26', layers=(1, 2, 2, 2), channels=(16, 16, 16, 16), stem_type='small',
            output_stride=output_stride, **kwargs)
        with torch.no_grad():
            assert model(torch.randn(2, 3, size, size)).isfinite().all()
        if output_stride == 8:
            tables = [layer.rel_h for layer in model.modules() if isinstance(layer, GlobalSelfAttention)]
            assert [len(table) for table in tables] == rows


# SAN


@pytest.mark.parametrize('name', ['san10_pairwise', 'san10_patchwise'])
def test_san_leaves_out_two_pools_and_no_parameter(name):
    model = timm.create_model(name, stem_type='small', device='meta')
    usual = timm.create_model(name, device='meta')
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in usual.state_dict().items()}
    pools = [sum(isinstance(module, HalvingMaxPool) for module in each.modules()) for each in (model, usual)]
    assert pools == [3, 5]
    blocks = [module for module in model.modules() if isinstance(module, SANBlock)]
    assert {block.attn.dilation for block in blocks} == {1}


def test_san_reflects_within_its_last_map_of_32_px():
    """Maps are never smaller than a 7 x 7 neighbourhood needs, 4 pixels."""
    model = timm.create_model('san10_patchwise', stem_type='small', device='meta')
    sizes = []
    for module in model.modules():
        if isinstance(module, SANBlock):
            module.register_forward_hook(
                lambda module, inputs, out: sizes.append((module.attn.kernel_size, out.shape[-1])))
    model(torch.empty(1, 3, 32, 32, device='meta'))
    assert sizes == [(3, 32)] * 2 + [(7, 32)] + [(7, 16)] * 2 + [(7, 8)] * 4 + [(7, 4)]
    assert all(size > kernel_size // 2 for kernel_size, size in sizes)


# Prior attention


@pytest.mark.parametrize('name', ['priorattn_resnet18', 'priorattn_resnet50'])
@pytest.mark.parametrize('output_stride', [2, 4])
def test_a_gaussian_keeps_its_reach_at_other_output_strides(name, output_stride):
    def reaches(output_stride: int) -> list[float]:
        """Pixels of the image that a radius of one spans, layer by layer."""
        model = timm.create_model(name, stem_type='small', output_stride=output_stride, device='meta')
        found = []
        for layer in model.modules():
            if isinstance(layer, PriorAttention):
                layer.register_forward_hook(
                    lambda layer, _, out: found.append(layer.attn_dilation * 32 / out.shape[-1]))
        model(torch.empty(1, 3, 32, 32, device='meta'))
        return found

    assert reaches(output_stride) == reaches(32)
    assert set(reaches(32)) == {2., 4., 8.}

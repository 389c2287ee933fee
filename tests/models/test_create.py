"""Creating models: every argument of timm.create_model that a ResNet takes, devices, dtypes and input sizes."""
import pytest
import timm
import torch
from timm.layers import DropPath

from timm_gsa.models.dcac import CondenserBlock

from .blocks import blocks_of

POOLS = {'avg': 1, 'max': 1, 'avgmax': 1, 'catavgmax': 2, 'fast': 1}


@pytest.mark.parametrize('num_classes', [1, 7, 1000])
def test_num_classes_sets_the_width_of_the_output(name, create, num_classes):
    model = create(name, num_classes=num_classes).eval()
    assert model.num_classes == num_classes
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, num_classes)


def test_num_classes_0_leaves_pooled_features(name, create):
    model = create(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize('in_chans', [1, 2, 5])
def test_in_chans_sets_the_channels_of_the_first_convolution(name, create, in_chans):
    model = create(name, in_chans=in_chans, num_classes=7).eval()
    assert next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).in_channels == in_chans
    assert model(torch.randn(1, in_chans, 64, 64)).shape == (1, 7)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, in_chans + 1, 64, 64))


def test_grey_weights_are_the_sum_of_colour_weights(ours, create):
    """What timm does, by the config's `first_conv`, when pretrained weights meet another `in_chans`."""
    colour = create(ours).eval()
    source = dict(file=None, state_dict=colour.state_dict())
    grey = timm.create_model(ours, pretrained=True, pretrained_cfg_overlay=source, in_chans=1).eval()
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('pool', POOLS)
def test_global_pool(name, create, pool):
    model = create(name, global_pool=pool, num_classes=7).eval()
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    pooled = model.forward_head(features, pre_logits=True)
    average, largest = features.mean((2, 3)), features.amax((2, 3))
    expected = {
        'max': largest,
        'avgmax': (average + largest) / 2,
        'catavgmax': torch.cat([average, largest], 1),
    }.get(pool, average)
    torch.testing.assert_close(pooled, expected)
    assert model.fc.in_features == pooled.shape[1] == POOLS[pool] * features.shape[1]
    assert model.forward_head(features).shape == (2, 7)


def test_no_global_pool_keeps_the_map(name, create):
    model = create(name, global_pool='', num_classes=0).eval()
    x = torch.randn(2, 3, 64, 96)
    assert model(x).shape == (2, model.num_features, 2, 3)
    torch.testing.assert_close(model(x), model.forward_features(x))


def test_drop_rate_acts_before_the_classifier_in_training_only(name, create):
    model = create(name, drop_rate=0.5, num_classes=7)
    plain = create(name, num_classes=7)
    x = torch.randn(4, 3, 64, 64)
    features = model.eval().forward_features(x)
    torch.testing.assert_close(model(x), plain.eval()(x))
    dropped, whole = model.train().forward_head(features, pre_logits=True), features.mean((2, 3))
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0., 2 * whole))
    assert 0.3 < (dropped[whole > 0] == 0).float().mean() < 0.7


def test_drop_path_rate_rises_to_the_last_block(name, create):
    model = create(name, drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates) and rates[0] > 0.
    assert rates[-1] == pytest.approx(0.3)
    rates = list(dict.fromkeys(rates))  # both branches of a block of sMLPNet have the same
    steps = torch.tensor([0., *rates]).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.3 / len(rates)))
    stages = [model.get_submodule(info['module']) for info in model.feature_info]
    summing = [  # stages with residual sums; a gate of DC-AC has no branch that could be left out
        stage for stage in stages
        if any(not isinstance(module, CondenserBlock) or module.downsample is None for module in blocks_of(stage))
    ]
    last = [name for name, module in summing[-1].named_modules() if isinstance(module, DropPath)]
    assert last, 'the last stage has no stochastic depth'


def test_drop_path_is_stochastic_in_training_and_nothing_in_eval(name, create):
    model, plain = create(name, drop_path_rate=0.5), create(name)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0., atol=0.)
        model.train(), plain.train()
        torch.manual_seed(1)
        once = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), once, rtol=0., atol=0.)
        assert not torch.allclose(model(x), once)
        torch.testing.assert_close(plain(x), plain(x), rtol=0., atol=0.)


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_sets_the_sizes_of_maps(name, create, family, output_stride):
    if output_stride not in family.output_strides:
        assert_stride_is_refused(create, name, family, output_stride)
        return
    model = create(name, output_stride=output_stride).eval()
    info = [(f['num_chs'], f['reduction']) for f in model.feature_info]
    assert [reduction for _, reduction in info] == [min(r, output_stride) for r in family.strides]
    with torch.no_grad():
        features, maps = model.forward_intermediates(torch.randn(1, 3, 64, 96))
    assert features.shape == (1, model.num_features, 64 // output_stride, 96 // output_stride)
    assert [m.shape for m in maps] == [(1, c, 64 // r, 96 // r) for c, r in info]
    assert features.isfinite().all()


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_of_a_real_model(real, create, family, output_stride):
    if output_stride not in family.output_strides:
        assert_stride_is_refused(create, real, family, output_stride)
        return
    model = create(real, output_stride=output_stride, device='meta').eval()
    features = model.forward_features(torch.empty(1, 3, 224, 224, device='meta'))
    assert features.shape == (1, model.num_features, 224 // output_stride, 224 // output_stride)


def test_weights_fit_every_output_stride(name, create, family):
    for output_stride in family.output_strides:
        model = create(name, output_stride=output_stride).eval()
        model.load_state_dict(create(name).state_dict())
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize('output_stride', [0, 4, 12, 64])
def test_other_output_strides_are_refused(ours, create, family, output_stride):
    assert_stride_is_refused(create, ours, family, output_stride)


def assert_stride_is_refused(create, model, family, output_stride):
    *first, last = map(str, family.output_strides)
    allowed = f'{", ".join(first)} or {last}' if first else last
    for features_only in (False, True):
        with pytest.raises(ValueError, match=f'output_stride must be {allowed}, got {output_stride}'):
            create(model, output_stride=output_stride, features_only=features_only, device='meta')


def test_unknown_arguments_are_refused(registered, create):
    with pytest.raises(TypeError, match='unheard_of'):
        create(registered, device='meta', unheard_of=1)


def test_arguments_of_a_model_reach_a_real_one(real, create):
    model = create(
        real, num_classes=5, in_chans=4, global_pool='catavgmax', drop_rate=0.1, drop_path_rate=0.2, device='meta')
    assert model(torch.empty(2, 4, 160, 192, device='meta')).shape == (2, 5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_reaches_every_parameter(name, create, dtype):
    model = create(name, dtype=dtype).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {k: v.dtype for k, v in tensors.items() if v.is_floating_point() and v.dtype != dtype} == {}
    with torch.no_grad():
        out = model(torch.randn(1, 3, 64, 64, dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize('by', ['argument', 'context'])
def test_meta_device_reaches_every_tensor(name, create, by):
    if by == 'argument':
        model = create(name, device='meta', dtype=torch.bfloat16, drop_path_rate=0.1)
    else:
        with torch.device('meta'):
            model = create(name, drop_path_rate=0.1)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [k for k, v in tensors.items() if v.device.type != 'meta'] == []
    x = torch.empty(2, 3, 64, 64, device='meta', dtype=model.fc.weight.dtype)
    assert model(x).device.type == 'meta'


def test_meta_model_takes_the_weights_of_a_real_one(name, create):
    """Nothing a model computes with is outside its state dict."""
    model = create(name).eval()
    copy = create(name, device='meta')
    copy.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        torch.testing.assert_close(copy.eval()(x), model(x), rtol=0., atol=0.)


def test_init_weights_makes_a_meta_model_whole(ours, create):
    model = timm.create_model(ours, device='meta', dtype=torch.float64).to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float('nan'))  # what fresh memory may hold
    torch.manual_seed(0)
    model.init_weights()
    fresh = dict(timm.create_model(ours, dtype=torch.float64).state_dict())
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if key.endswith('radius') or fresh[key].unique().numel() == 1 < fresh[key].numel():  # constants
            assert torch.equal(tensor, fresh[key]), key
        else:
            assert tensor.isfinite().all(), key
        if tensor.numel() >= 256:
            assert tensor.std().item() == pytest.approx(fresh[key].std().item(), rel=0.3), key
    assert model.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 96), (96, 64), (97, 75)])
def test_any_input_size_runs(name, create, size):
    model = create(name, num_classes=7).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 7) and out.isfinite().all()


def test_nothing_is_kept_from_input_to_input(name, create):
    model = create(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        keys = list(vars(model)), [list(vars(module)) for module in model.modules()]
        model(torch.randn(1, 3, 48, 96))
        assert (list(vars(model)), [list(vars(module)) for module in model.modules()]) == keys
        torch.testing.assert_close(model(x), before, rtol=0., atol=0.)
        model.double()(x.double())
        torch.testing.assert_close(model.float()(x), before, rtol=0., atol=0.)


def test_images_of_a_batch_do_not_see_each_other_in_eval(name, create):
    model = create(name, dtype=torch.float64).eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]))

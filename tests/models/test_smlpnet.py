"""sMLPNet: the authors' numbers, names and files; and what timm promises of a model."""
import argparse
import collections
import functools
import io
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

import timm_gsa
from timm_gsa.layers import AxialMixing, SparseMLP
from timm_gsa.models.smlpnet import SMLPBlock, SMLPNet, checkpoint_filter_fn

from ..golden import assert_agrees, made_input, made_state, manifest, official_shapes

COUNTS = {  # parameters, multiply-adds at 224 px
    'smlpnet_tiny': (24_123_584, 4_989_451_520),
    'smlpnet_small': (48_558_136, 10_312_161_792),
    'smlpnet_base': (65_880_408, 13_986_515_200),
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}
REDUCED = dict(dim=8, depths=(1, 2, 2, 1), img_size=64, num_classes=10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, size: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() // 2


def mini(lively: bool = True, **kwargs) -> nn.Module:
    """The smallest model, in float64, with norms as training leaves them."""
    torch.manual_seed(0)
    model = timm.create_model('smlpnet_mini', num_classes=7, dtype=torch.float64, **kwargs)
    if lively:
        model.load_state_dict(trained())
    return model.eval()


@functools.cache
def trained() -> dict[str, torch.Tensor]:
    model = mini(lively=False).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                module.momentum = 1.
        model(images(8))
    return model.state_dict()


def images(batch=2, height=64, width=64, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, dtype=dtype)


# Sizes


@pytest.mark.parametrize('name', COUNTS)
def test_counts_are_exact(name):
    model = timm.create_model(name, device='meta').eval()
    assert (parameters(model), multiply_adds(model, 224)) == COUNTS[name]


@pytest.mark.parametrize(('arguments', 'counts'), [
    (dict(num_classes=100), (23_546_684, 47_866_036, 65_073_108)),
    (dict(num_classes=10), (23_488_994, 47_796_826, 64_992_378)),
    (dict(img_size=256), (24_133_160, 48_569_928, 65_892_200)),
    (dict(img_size=384), (24_184_024, 48_632_536, 65_954_808)),
], ids=str)
def test_counts_of_other_classes_and_sizes(arguments, counts):
    assert tuple(parameters(timm.create_model(name, device='meta', **arguments)) for name in COUNTS) == counts


def test_multiply_adds_at_384():
    found = [multiply_adds(timm.create_model(name, img_size=384, device='meta').eval(), 384) for name in COUNTS]
    assert [round(each / 1e9, 3) for each in found] == [14.951, 30.731, 41.600]


def test_the_small_one_is_small():
    model = timm.create_model('smlpnet_mini', device='meta').eval()
    assert parameters(model) <= 1_200_000 and multiply_adds(model, 64) < 100e6
    assert model.pretrained_cfg['input_size'] == (3, 64, 64) and model.num_classes == 100


# The authors' numbers


def official(name: str) -> str:
    """Name of a reduced network's parameter in the authors' state dict: the inverse of the filter."""
    [found] = [theirs for theirs in official_reduced() if OUR_NAMES[theirs] == name]
    return found


def official_reduced() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dict of the reduced network, from those of the tiny one."""
    blocks = sum(REDUCED['depths'])
    tiny = official_shapes('smlpnet', 'smlpnet_tiny')
    shapes = {}
    widths, sides = (8, 16, 32, 64), (16, 8, 4, 2)
    stage_of = [stage for stage, depth in enumerate(REDUCED['depths']) for _ in range(depth)]
    for name, shape in tiny.items():
        kind, number = name.split('.')[:2]
        if kind in ('token_mix', 'channel_mix'):
            if int(number) >= blocks:
                continue
            width, side = widths[stage_of[int(number)]], sides[stage_of[int(number)]]
            old_width, old_side = next((80 * 2 ** i, 56 // 2 ** i) for i, n in enumerate((2, 10, 24, 26)) if
                                       int(number) < n)
            scale = {old_width: width, 3 * old_width: 3 * width, old_side: side, 1: 1, 3: 3}
            shapes[name] = tuple(scale[n] for n in shape)
        else:
            scale = {80 * 2 ** i: width for i, width in enumerate(widths)} | {3: 3, 4: 4, 2: 2, 1000: 10}
            shapes[name] = tuple(scale[n] for n in shape)
    return shapes


def our_names() -> dict[str, str]:
    """Our name of each of the authors' parameters of the reduced network, found by value."""
    model = SMLPNet(**REDUCED, device='meta')
    markers = {name: torch.full(shape, float(i), device='cpu') for i, (name, shape) in
               enumerate(official_reduced().items())}
    filtered = checkpoint_filter_fn(markers, model)
    by_marker = {float(t.flatten()[0]): name for name, t in filtered.items()}
    return {name: by_marker[float(t.flatten()[0])] for name, t in markers.items()}


OUR_NAMES = our_names()


def reduced(dtype: torch.dtype) -> SMLPNet:
    model = SMLPNet(**REDUCED)
    model.load_state_dict(made_state(official_reduced()))
    return model.to(dtype)


def run_reduced(mode: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    case = manifest('smlpnet')['cases']['reduced']
    model = reduced(dtype).train(mode == 'train')
    assert parameters(model) == case['params']
    taps = {
        **{f'embed{i}': f'stages.{i}.downsample' for i in range(4)}, **{f'stage{i}': f'stages.{i}' for i in range(4)},
        'token_mix0_dw': 'stages.0.blocks.0.conv', 'token_mix0': 'stages.0.blocks.0.mix', 'norm': 'norm',
        'pooled': 'global_pool',
    }
    got = {}
    for name, module in taps.items():
        model.get_submodule(module).register_forward_hook(
            lambda module, args, out, name=name: got.update({name: out}))
    model.stages[0].blocks[0].mlp.register_forward_hook(
        lambda module, args, out: got.update(channel_mix0=out.permute(0, 3, 1, 2)))
    x = made_input(case['input_label'], tuple(case['input_shape'])).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()
    logits = model(x)
    loss = F.cross_entropy(logits, torch.tensor(case['labels']))
    loss.backward()
    got |= {'logits': logits, 'loss': loss, 'grad_input': x.grad}
    shapes = official_reduced()
    tensors = dict(model.named_parameters())
    got |= {f'grad_{name}': tensors[ours].grad.reshape(shapes[name]) for name, ours in OUR_NAMES.items()
            if ours in tensors}
    if mode == 'train':
        state = model.state_dict()
        got |= {f'newstat_{name}': state[ours] for name, ours in OUR_NAMES.items() if '.running_' in name}
        assert all(t == 1 for name, t in state.items() if name.endswith('num_batches_tracked'))
    return got


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_a_reduced_network_agrees_with_the_authors(mode, layout, dtype):
    assert_agrees('smlpnet', 'reduced', mode, run_reduced(mode, dtype, layout), TOLERANCES[dtype])


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_the_tiny_network_agrees_with_the_authors(dtype):
    model = timm.create_model('smlpnet_tiny').eval()
    model.load_state_dict(made_state(official_shapes('smlpnet', 'smlpnet_tiny')))
    model.to(dtype)
    got = {}
    taps = {
        **{f'embed{i}': f'stages.{i}.downsample' for i in range(4)}, **{f'stage{i}': f'stages.{i}' for i in range(4)},
        'token_mix0_dw': 'stages.0.blocks.0.conv', 'token_mix0': 'stages.0.blocks.0.mix', 'norm': 'norm',
        'pooled': 'global_pool',
    }
    for name, module in taps.items():
        model.get_submodule(module).register_forward_hook(
            lambda module, args, out, name=name: got.update({name: out}))
    model.stages[0].blocks[0].mlp.register_forward_hook(
        lambda module, args, out: got.update(channel_mix0=out.permute(0, 3, 1, 2)))
    with torch.no_grad():
        got['logits'] = model(made_input('smlp/smlpnet_tiny/x', (1, 3, 224, 224)).to(dtype))
    assert_agrees('smlpnet', 'smlpnet_tiny', '', got, TOLERANCES[dtype])
    assert got['logits'].argmax() == manifest('smlpnet')['cases']['smlpnet_tiny']['argmax']


def test_made_weights_are_those_of_the_manifest():
    from ..golden import made_weight
    for example in manifest('smlpnet')['filler_examples']:
        make, name = (made_weight, example['name']) if 'name' in example else (made_input, example['input'])
        first = make(name, tuple(example['shape'])).flatten()[:3]
        torch.testing.assert_close(first, torch.tensor(example['first3']), rtol=1e-7, atol=0.)


@pytest.mark.parametrize('change', [
    'no final norm', 'epsilon of the layer norm', 'epsilon of batch norms', 'tanh in GELU'])
def test_a_detail_that_is_easily_missed_shows(change):
    """In float64, by the sensitivities that the golden numbers were checked for."""
    model = reduced(torch.float64).eval()
    x = made_input('smlp/reduced/x', (2, 3, 64, 64)).double()
    with torch.no_grad():
        want = model(x)
        for module in list(model.modules()):
            if change == 'epsilon of the layer norm' and isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            if change == 'epsilon of batch norms' and isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3
            if change == 'tanh in GELU' and isinstance(module, nn.GELU):
                module.approximate = 'tanh'
        if change == 'no final norm':
            model.norm = nn.Identity()
        assert (model(x) - want).abs().max() > 1e-6 * want.abs().max()


# The authors' names and files


@pytest.mark.parametrize('name', COUNTS)
def test_names_and_shapes_map_one_to_one(name):
    shapes = official_shapes('smlpnet', name)
    model = timm.create_model(name, device='meta')
    filtered = checkpoint_filter_fn({k: torch.empty(shape, device='meta') for k, shape in shapes.items()}, model)
    assert {k: t.shape for k, t in filtered.items()} == {k: t.shape for k, t in model.state_dict().items()}


class AnotherClass:
    pass


@pytest.fixture
def theirs(tmp_path):
    """State dict of the reduced network, and what writes a file as the authors' script does."""
    state = made_state(official_reduced())
    path = tmp_path / 'smlp.pth'

    def save(model=state, **more):
        average = {name: tensor + 1 for name, tensor in state.items()}
        torch.save({
            'model': model, 'optimizer': {'state': {}}, 'lr_scheduler': {}, 'epoch': 299, 'model_ema': average,
            'scaler': {'scale': 1024.}, 'args': argparse.Namespace(model='smlpnet_tiny', lr=5e-4), **more}, path)
        return path

    return state, save


def create_reduced(path, **kwargs):
    shape = {**REDUCED, **kwargs}
    return timm.create_model(
        'smlpnet_tiny', pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=10, input_size=(3, 64, 64)), **shape)


def test_a_file_of_the_authors_loads_whole(theirs):
    state, save = theirs
    model = create_reduced(save())
    held = model.state_dict()
    assert len(held) == len(state)
    for name, tensor in state.items():
        assert torch.equal(held[OUR_NAMES[name]].flatten(), tensor.flatten()), name  # not the moving average
    assert 'state_dict' not in model.pretrained_cfg and model.pretrained_cfg['file'].endswith('smlp.pth')


def test_a_file_of_the_authors_loads_for_other_classes_channels_sizes_and_features(theirs):
    _, save = theirs
    path = save()
    x = images(dtype=torch.float32)
    whole = create_reduced(path).eval()
    other = create_reduced(path, num_classes=5, in_chans=1, img_size=(96, 64)).eval()
    assert other(x[:, :1]).shape == (2, 5)
    torch.testing.assert_close(other.stages[3].downsample.weight, whole.stages[3].downsample.weight)
    assert other.stages[0].blocks[0].mix.height.weight.shape == (24, 24)
    features = create_reduced(path, features_only=True).eval()
    assert 'state_dict' not in features.pretrained_cfg
    torch.testing.assert_close(features(x), whole.forward_intermediates(x, intermediates_only=True))


def test_a_bare_state_dict_and_our_own_names_load(theirs, tmp_path):
    state, save = theirs
    path = tmp_path / 'bare.pth'
    model = create_reduced(save())
    for tensors in (state, model.state_dict(), {'state_dict': model.state_dict()}):
        torch.save(tensors, path)
        loaded = create_reduced(path).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())
        timm.models.load_checkpoint(other := SMLPNet(**REDUCED), str(path))
        assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_a_pickle_that_asks_for_more_is_refused_by_name(theirs):
    _, save = theirs
    with pytest.raises(RuntimeError, match=r'refused, since its pickle asks for .*AnotherClass'):
        create_reduced(save(extra=AnotherClass()))
    with pytest.raises(RuntimeError, match=r'refused, since its pickle asks for collections\.deque'):
        create_reduced(save(extra=collections.deque([1])))


def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path):
    path = tmp_path / 'smlp.pth'
    path.write_bytes(pickle.dumps('no tensors') + b'rest')
    with pytest.raises(RuntimeError, match='no checkpoint'):
        create_reduced(path)


@pytest.mark.parametrize(('change', 'reported'), [
    (lambda s: s.pop('to_patch_embedding.0.0.weight'), r'stages\.0\.downsample\.weight'),
    (lambda s: s.pop('token_mix.3.1.proh_w.bias'), r'stages\.2\.blocks\.0\.mix\.height\.bias'),
    (lambda s: s.pop('batch_norm.running_var'), r'norm\.running_var'),
    (lambda s: s.update({'token_mix.6.1.BN.weight': torch.zeros(4)}), r'token_mix\.6\.1\.BN\.weight'),
    (lambda s: s.update({'token_mix.0.1.proj_v.weight': torch.zeros(4)}), r'token_mix\.0\.1\.proj_v\.weight'),
    (lambda s: s.update({'mlp_head.0.weight': torch.zeros(10, 65)}), r'fc\.weight'),
    (lambda s: s.update({'token_mix.1.1.proj_h.weight': torch.zeros(9, 8, 1, 1)}), r'mix\.width\.weight'),
    (lambda s: s.update({'token_mix.1.1.proj_h.weight': torch.full((8, 8, 1, 1), torch.nan)}), 'not finite'),
])
def test_what_does_not_fit_is_reported(theirs, change, reported):
    state, save = theirs
    state = dict(state)
    change(state)
    with pytest.raises(RuntimeError, match=reported):
        create_reduced(save(state))


def test_missing_weights_are_said_to_be_missing():
    with pytest.raises(RuntimeError, match='No pretrained weights are published for smlpnet_base; .*dict.file=PATH'):
        timm.create_model('smlpnet_base', pretrained=True, device='meta')


# A citizen of timm


def test_an_output_stride_is_refused():
    for output_stride in (8, 16):
        with pytest.raises(ValueError, match=f'output_stride must be 32, got {output_stride}: the mixing matrices'):
            timm.create_model('smlpnet_tiny', output_stride=output_stride)
    assert timm.create_model('smlpnet_mini', output_stride=32, features_only=True).feature_info.reduction()[-1] == 32


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(img_size=31), 'img_size must be at least 32, got 31'),
    (dict(img_size=(64, 16)), r'img_size must be at least 32, got \(64, 16\)'),
    (dict(depths=(1, 2)), r'depths must have one number for each of the 4 stages, got \(1, 2\)'),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('smlpnet_mini', **arguments)


@pytest.mark.parametrize(('name', 'rate'), [('smlpnet_tiny', 0.), ('smlpnet_small', 0.2), ('smlpnet_base', 0.3)])
def test_drop_path_rates_are_the_authors(name, rate):
    model = timm.create_model(name, device='meta')
    blocks = [module for module in model.modules() if isinstance(module, SMLPBlock)]
    for n, block in enumerate(blocks):
        for branch in (block.drop_path1, block.drop_path2):
            assert getattr(branch, 'drop_prob', 0.) == pytest.approx(rate * n / (len(blocks) - 1))


def test_both_branches_of_a_block_are_dropped_each_by_itself():
    block = SMLPBlock(4, (3, 3), drop_path=0.5).double().train()
    nn.init.constant_(block.mlp.fc2.bias, 3.)
    x = torch.randn(256, 4, 3, 3, dtype=torch.float64)
    kept = []
    for name in ('drop_path1', 'drop_path2'):
        getattr(block, name).register_forward_hook(
            lambda module, args, out: kept.append(out.flatten(1).abs().sum(1) > 0))
    block(x)
    tokens, channels = kept
    for both in (tokens & channels, tokens & ~channels, ~tokens & channels, ~tokens & ~channels):
        assert 30 < both.sum() < 100


def test_initial_weights_are_those_of_torch():
    model = timm.create_model('smlpnet_mini')
    mixing = model.stages[0].blocks[0].mix.width
    assert 0.2 < mixing.weight.abs().max() <= 0.25 and mixing.bias.abs().max() <= 0.25  # 1 / sqrt(16)
    meta = timm.create_model('smlpnet_mini', device='meta').to_empty(device='cpu')
    meta.init_weights()
    assert all(p.isfinite().all() for p in meta.parameters()) and meta.stages[1].blocks[0].norm.weight.eq(1).all()
    assert meta.eval()(images(dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize('size', [(64, 64), (33, 47), (96, 64), (32, 128), (97, 75)])
def test_any_size_runs_and_trains(size):
    model = mini().train()
    out = model(images(4, *size))
    out.square().mean().backward()
    assert out.shape == (4, 7) and out.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize('size', [(96, 96), (64, 96), (33, 47), (32, 64)])
def test_a_model_of_another_size_takes_the_state_dict_and_needs_no_resampling(size, monkeypatch):
    source, target = mini(), mini(img_size=size)
    target.load_state_dict(source.state_dict())
    x = images(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x), rtol=1e-9, atol=1e-9)

        def refuse(tensor, length):
            assert tensor.shape[0] == length
            return tensor

        monkeypatch.setattr('timm_gsa.layers.sparse_mlp.resize_mixing_matrix', refuse)
        monkeypatch.setattr('timm_gsa.layers.sparse_mlp.resize_mixing_bias', refuse)
        assert target(x).isfinite().all()


def test_features_only_and_intermediates():
    model = mini(lively=False)
    features = timm.create_model('smlpnet_mini', features_only=True, dtype=torch.float64).eval()
    features.load_state_dict({k.replace('stages.', 'stages_', 1): v for k, v in model.state_dict().items()
                              if k.startswith('stages')})
    graph = timm.create_model('smlpnet_mini', features_only=True, feature_cfg=dict(feature_cls='fx'))
    assert graph.feature_info.channels() == features.feature_info.channels() == [24, 48, 96, 192]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    x = images(2, 64, 96)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features(x), maps, rtol=0., atol=0.)
    assert [m.shape for m in maps] == [(2, 24, 16, 24), (2, 48, 8, 12), (2, 96, 4, 6), (2, 192, 2, 3)]
    torch.testing.assert_close(final, model.forward_features(x), rtol=0., atol=0.)
    torch.testing.assert_close(
        model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0], final, rtol=0., atol=0.)
    last, taken = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert torch.equal(last, maps[1]) and torch.equal(taken[0], maps[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt='NHWC')


@pytest.mark.parametrize('indices', [[0], [2], [1, 3], [-1], 2])
def test_pruned_models_keep_what_is_asked_for(indices):
    model = mini()
    x = images()
    maps = model.forward_intermediates(x, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices)
    assert taken == ([2, 3] if indices == 2 else [i % 4 for i in indices])
    kept = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    torch.testing.assert_close(kept, [maps[i] for i in taken], rtol=0., atol=0.)
    assert len(model.stages) == max(taken) + 1 and model.num_classes == 0 and isinstance(model.fc, nn.Identity)


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x))).backward()
    return out.detach(), {key.removeprefix('_orig_mod.'): p.grad.clone() for key, p in model.named_parameters()}


def assert_same_gradients(one, other):
    torch.testing.assert_close(one[0], other[0])
    for key, grad in one[1].items():
        torch.testing.assert_close(other[1][key], grad, msg=lambda text, key=key: f'{key}: {text}')


def test_gradient_checkpointing_changes_nothing_and_recomputes_every_block():
    model, x = mini(), images(4)
    want = gradients(model, x)
    model.set_grad_checkpointing()
    ran = []
    for module in model.modules():
        if isinstance(module, SMLPBlock):
            module.register_forward_pre_hook(lambda module, args: ran.append(module))
    assert_same_gradients(gradients(model, x), want)
    assert len(ran) == 2 * 12
    model.set_grad_checkpointing(False)
    ran.clear()
    gradients(model, x)
    assert len(ran) == 12


def test_group_matcher_finds_every_parameter_in_order():
    model = mini(lively=False)
    groups = timm.models.group_parameters(model, model.group_matcher())
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(groups) == 1 + 12 + 1 and sum(map(len, groups.values())) == len(list(model.parameters()))
    assert len(coarse) == 1 + 4 + 1
    layer = {name: number for number, names in groups.items() for name in names}
    assert layer['stages.0.downsample.weight'] == 0 < layer['stages.0.blocks.0.mix.fuse.weight']
    assert layer['stages.1.downsample.weight'] < layer['stages.3.blocks.0.norm.weight'] < layer['fc.weight']
    assert model.no_weight_decay() == set()


def test_classifier_and_pool_change():
    model, x = mini(), images()
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (2, 3) and model.head_hidden_size == 2 * 192 and model.fc.weight.dtype == torch.float64
    model.reset_classifier(0)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 192, 2, 2)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_layouts_and_views_agree(training):
    model = mini().train(training)
    x = images(4, 64, 96)
    for momentum in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        momentum.momentum = 0.
    want = gradients(model, x)
    assert_same_gradients(gradients(model, x.contiguous(memory_format=torch.channels_last)), want)
    wide = torch.randn(4, 3, 64, 192, dtype=torch.float64)
    wide[..., ::2] = x
    assert_same_gradients(gradients(model, wide[..., ::2]), want)
    model.to(memory_format=torch.channels_last)
    assert_same_gradients(gradients(model, x), want)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_one_graph_with_the_gradients_of_eager_mode(training):
    torch._dynamo.reset()
    model, other, x = mini().train(training), mini().train(training), images(4)
    compiled = torch.compile(other, backend='aot_eager', fullgraph=True)
    assert_same_gradients(gradients(compiled, x), gradients(model, x))


SHALLOW = dict(lively=False, depths=(1, 1, 1, 1))  # tracing with open sizes takes seconds a block


def test_one_dynamic_graph_serves_all_sizes():
    torch._dynamo.reset()
    model, counter = mini(**SHALLOW), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((2, 96, 80), (3, 128, 96), (5, 64, 64), (2, 97, 145)):
            x = images(*size)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


SIZES = [(2, 64, 64), (3, 96, 64), (2, 80, 112), (1, 64, 97)]
OPEN = {'x': {axis: Dim.DYNAMIC for axis in (0, 2, 3)}} if hasattr(Dim, 'DYNAMIC') else {}


@pytest.mark.skipif(not OPEN, reason='torch 2.5 has no Dim.DYNAMIC')
def test_an_exported_program_serves_all_sizes():
    model, file = mini(**SHALLOW), io.BytesIO()
    torch.export.save(export(model, (images(),), strict=False, dynamic_shapes=OPEN), file)
    file.seek(0)
    program = torch.export.load(file).module()
    with torch.no_grad():
        for size in SIZES:
            x = images(*size)
            torch.testing.assert_close(program(x), model(x))


@pytest.mark.skipif(not OPEN, reason='torch 2.5 has no Dim.DYNAMIC')
def test_an_onnx_graph_serves_all_sizes(tmp_path):
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package, reason='torch.onnx.export needs it')
    onnxruntime = pytest.importorskip('onnxruntime', reason='runs the exported graph')
    model, path = mini(**SHALLOW).float(), tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (images(dtype=torch.float32),), path, dynamo=True, dynamic_shapes=OPEN, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    [name] = [one.name for one in session.get_inputs()]
    for size in SIZES:
        x = images(*size, dtype=torch.float32)
        [got] = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-3, atol=1e-3)


def test_scripts_run_and_train_alike():
    model, file = mini(), io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in SIZES:
        x = images(*size)
        torch.testing.assert_close(scripted(x), model(x))
    x = images(4)
    assert_same_gradients(gradients(scripted, x), gradients(model, x))


def test_torch_fx_sees_layers_as_nodes():
    model, x = mini(), images()
    graph = timm.models.create_feature_extractor(model, ['stages.1.blocks.0.mix.width', 'norm', 'fc'])
    out = graph(x)
    torch.testing.assert_close(out['fc'], model(x))
    torch.testing.assert_close(out['norm'], model.forward_features(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_half_parameters_stay_close(dtype):
    model, x = mini().float(), images(4, dtype=torch.float32)
    want = gradients(model, x)
    with torch.autocast('cpu', dtype=dtype):
        got = gradients(model, x)
    assert (got[0] - want[0]).norm() < 0.05 * want[0].norm()
    one, other = (torch.cat([g.flatten() for g in each[1].values()]) for each in (got, want))
    assert one @ other > 0.97 * one.norm() * other.norm()
    half = timm.create_model('smlpnet_mini', num_classes=7, dtype=dtype).eval()
    half.load_state_dict(model.state_dict())
    assert all(p.dtype == dtype for p in half.parameters())
    for size in ((64, 64), (96, 80)):
        y = images(2, *size, dtype=torch.float32)
        out = half(y.to(dtype))
        assert out.dtype == dtype and (out - model(y)).norm() < 0.05 * model(y).norm()


def test_no_images_give_no_logits():
    model = mini()
    x = images(0).requires_grad_()
    assert model(x).shape == (0, 7)
    model(x).sum().backward()
    assert x.grad.shape == x.shape


def test_fused_norms_change_nothing():
    model, x = mini(), images(2, 96, 64)
    fused = timm_gsa.fuse(model)
    norms = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == [*(name for name, module in model.named_modules()
                       if isinstance(module, nn.BatchNorm2d) and name.endswith('conv.norm')), 'norm']
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-9, atol=1e-9)


def test_gradients_of_each_image():
    model, x = mini(), images(3)
    weights = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(weights, image, label):
        out = torch.func.functional_call(model, (weights, buffers), image[None])
        return F.cross_entropy(out, label[None])

    labels = torch.arange(3)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, labels)
    whole = gradients(model, x)[1]
    for key, grad in each.items():
        torch.testing.assert_close(grad.mean(0), whole[key], msg=lambda text, key=key: f'{key}: {text}')


def test_a_hub_folder_of_a_model_loads(tmp_path):
    model, x = mini().float(), images(dtype=torch.float32)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0., atol=0.)


def test_every_layer_is_where_it_belongs():
    model = timm.create_model('smlpnet_base', img_size=(224, 448), device='meta')
    mixings = [m for m in model.modules() if isinstance(m, SparseMLP)]
    assert len(mixings) == 38
    assert [len(mixings[i].height.weight) for i in (0, 2, 12, 36)] == [56, 28, 14, 7]
    assert [len(mixings[i].width.weight) for i in (0, 2, 12, 36)] == [112, 56, 28, 14]
    assert sum(isinstance(m, AxialMixing) for m in model.modules()) == 2 * 38

"""sMLPNet: the authors' numbers, names and files, and what no other family has."""
import argparse
import collections
import functools
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_gsa
from timm_gsa.layers import AxialMixing, SparseMLP
from timm_gsa.models.smlpnet import SMLPBlock, SMLPNet, checkpoint_filter_fn

from ..golden import assert_agrees, made_input, made_state, manifest, official_shapes

NETWORKS = ('smlpnet_tiny', 'smlpnet_small', 'smlpnet_base')
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}
REDUCED = dict(dim=8, depths=(1, 2, 2, 1), img_size=64, num_classes=10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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


@pytest.mark.parametrize('name', NETWORKS)
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


# What is particular of this family; what all families do is in the other files of this folder


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
    F.cross_entropy(model(x), labels).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(each[key].mean(0), parameter.grad, msg=lambda text, key=key: f'{key}: {text}')


def test_every_layer_is_where_it_belongs():
    model = timm.create_model('smlpnet_base', img_size=(224, 448), device='meta')
    mixings = [m for m in model.modules() if isinstance(m, SparseMLP)]
    assert len(mixings) == 38
    assert [len(mixings[i].height.weight) for i in (0, 2, 12, 36)] == [56, 28, 14, 7]
    assert [len(mixings[i].width.weight) for i in (0, 2, 12, 36)] == [112, 56, 28, 14]
    assert sum(isinstance(m, AxialMixing) for m in model.modules()) == 2 * 38

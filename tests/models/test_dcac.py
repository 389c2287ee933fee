"""DC-AC: the authors' numbers and names, and what no other family has."""
import functools

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath

import timm_gsa
from timm_gsa.models.dcac import DCAC, CondenserBlock, checkpoint_filter_fn

from ..golden import assert_agrees, made_input, made_state, manifest, official_shapes

REDUCED = dict(layers=(2, 1, 2, 1), widths=(8, 12, 16, 20), num_classes=10)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The authors' numbers


def reduced(dtype: torch.dtype) -> DCAC:
    model = DCAC(**REDUCED)
    model.load_state_dict(made_state(official_shapes('dcac', 'dcac_reduced')))
    return model.to(dtype)


def our_names() -> dict[str, str]:
    """Our name of each of the authors' tensors of the reduced network, by the marker that the filter passes on."""
    shapes = official_shapes('dcac', 'dcac_reduced')
    filtered = checkpoint_filter_fn({name: torch.tensor(i) for i, name in enumerate(shapes)}, nn.Identity())
    return {list(shapes)[int(marker)]: name for name, marker in filtered.items()}


def run(mode: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    case = manifest('dcac')['cases']['dcac_reduced']
    model = reduced(dtype).train(mode == 'train')
    assert parameters(model) == case['params']
    got = {}

    def tap(name):
        return lambda module, args, out: got.update({name: out})

    model.maxpool.register_forward_hook(tap('stem'))
    for stage in range(4):
        layer = model.get_submodule(f'layer{stage + 1}')
        layer.register_forward_hook(tap(f'stage{stage}'))
        layer[0].register_forward_hook(tap(f'stage{stage}_block0'))
    x = made_input(case['input_label'], tuple(case['input_shape'])).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()
    got['logits'] = model(x)
    F.cross_entropy(got['logits'], torch.tensor(case['labels'])).backward()
    got['grad_input'] = x.grad
    tensors, state = dict(model.named_parameters()), model.state_dict()
    for name, ours in our_names().items():
        if ours in tensors:
            got[f'grad_{name}'] = tensors[ours].grad
        elif mode == 'train' and '.running_' in name:
            got[f'newstat_{name}'] = state[ours]
    return got


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_a_reduced_network_agrees_with_the_authors(mode, layout, dtype):
    tolerance = TOLERANCES[dtype]
    if dtype == torch.float32 and mode == 'train':
        noise = manifest('dcac')['cases']['dcac_reduced']['float32_noise_of_official_code'][mode]
        tolerance = 10 * noise['grad_params_max']  # of the authors' own code: norms of small numbers amplify rounding
    assert_agrees('dcac', 'dcac_reduced', mode, run(mode, dtype, layout), tolerance)


def test_logits_agree_beside_their_bias():
    """Which is 700 times as large as what depends on the image."""
    from ..golden import golden
    bias = made_state({'head.fc.bias': (10,)})['head.fc.bias'].double()
    want = torch.from_numpy(golden('dcac', 'dcac_reduced', 'eval')['logits']) - bias
    got = run('eval', torch.float64, torch.contiguous_format)['logits'] - bias
    assert want.abs().max() < 0.05 and (got - want).abs().max() < 1e-10 * want.abs().max()


@pytest.mark.parametrize('name', ['dcac_325mf'])
def test_names_and_shapes_map_one_to_one(name):
    model = timm.create_model(name)
    state = made_state(official_shapes('dcac', name))
    filtered = checkpoint_filter_fn(state, model)
    assert {k: t.shape for k, t in filtered.items()} == {k: t.shape for k, t in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(t, filtered[k]) for k, t in model.state_dict().items())


def by_hand(block: CondenserBlock, x: torch.Tensor) -> torch.Tensor:
    """The equation of a block in eval mode, with batch norms written out."""
    def norm(bn, y):
        y = (y - bn.running_mean[:, None, None]) / (bn.running_var + 1e-5).sqrt()[:, None, None]
        return y * bn.weight[:, None, None] + bn.bias[:, None, None]

    def pool(y):
        rows, columns = y.shape[-2] // 2, y.shape[-1] // 2
        return y[..., :2 * rows, :2 * columns].unflatten(-1, (columns, 2)).unflatten(-3, (rows, 2)).mean((-1, -3))

    def conv(weight, y):
        return F.conv2d(y, weight, padding=weight.shape[-1] // 2, groups=4 if weight.shape[-1] == 3 else 1)

    def act(y):
        return y * y.sigmoid()

    strided = isinstance(block.pool, nn.AvgPool2d)
    if block.bottleneck:
        y = act(norm(block.bn1, conv(block.conv1.weight, x)))
        y = act(norm(block.bn2, conv(block.conv2.weight, pool(y) if strided else y)))
        y = norm(block.bn3, conv(block.conv3.weight, y))
    else:
        y = act(norm(block.bn1, conv(block.conv1.weight, pool(x) if strided else x)))
        y = norm(block.bn2, conv(block.conv2.weight, y))
    if block.downsample is None:
        return act(y + x)
    gated = norm(block.downsample.norm, conv(block.downsample.conv.weight, pool(x) if strided else x))
    weights = (y - y.amax(1, keepdim=True)).exp()
    return act(weights / weights.sum(1, keepdim=True) * gated)


@pytest.mark.parametrize('size', [(8, 8), (7, 5), (2, 3)])
@pytest.mark.parametrize('arguments', [
    dict(in_dim=8, width=12, block_type='basic', attention=True, stride=2),
    dict(in_dim=8, width=12, block_type='basic', attention=True),
    dict(in_dim=8, width=8, block_type='basic', attention=False),
    dict(in_dim=8, width=12, block_type='bottleneck', attention=True, stride=2),
    dict(in_dim=24, width=12, block_type='bottleneck', attention=False),
], ids=str)
def test_a_block_is_its_equation(arguments, size):
    block = CondenserBlock(**arguments).double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.2, 1.)
    block.eval()
    x = torch.randn(2, arguments['in_dim'], *size, dtype=torch.float64, requires_grad=True)
    got, want = block(x), by_hand(block, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    probe, inputs = torch.randn_like(got), [x, *block.parameters()]
    for one, other in zip(
            torch.autograd.grad((got * probe).sum(), inputs), torch.autograd.grad((want * probe).sum(), inputs),
            strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_attention_is_over_channels():
    block = CondenserBlock(8, 12, 'basic', attention=True)
    attention = block.condense(torch.randn(2, 8, 5, 5)).softmax(1)
    torch.testing.assert_close(attention.sum(1), torch.ones(2, 5, 5))


# What is particular of this family; what all families do is in the other files of this folder


def mini(lively: bool = True, **kwargs) -> nn.Module:
    """The small model, in float64, with norms as training leaves them and logits that depend on the image.

    Those of a fresh one are its classifier's bias: every stage divides by about the number of its channels.
    """
    torch.manual_seed(0)
    model = timm.create_model('dcac_mini', **{'num_classes': 7, 'dtype': torch.float64, **kwargs})
    if lively:
        model.load_state_dict(trained())
    return model.eval()


@functools.cache
def trained() -> dict[str, torch.Tensor]:
    model, x = mini(lively=False).train(), images(32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                module.momentum = 1.
        model(x)
        model.eval()
        nn.init.zeros_(model.fc.bias)
        model.fc.weight.div_(model(x).std())
        assert model(x).std(0).min() > 0.1
    return model.state_dict()


def images(batch=2, height=64, width=64, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, dtype=dtype)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
    (dict(widths=(8, 12)), r'widths must have one entry for each of the 4 stages, got \(8, 12\)'),
    (dict(widths=(8, 12, 18, 20)), 'width must be a multiple of 4, got 18'),
    (dict(layers=(1, 0, 1, 1)), r'layers must be >= 1, got \(1, 0, 1, 1\)'),
    (dict(block_types=('basic', 'deep', 'basic', 'basic')), "block_types must be 'basic' or 'bottleneck'"),
    (dict(stem_width=30), 'stem_width must be a multiple of 4, got 30'),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('dcac_mini', **arguments)


def test_a_block_without_attention_keeps_its_input():
    with pytest.raises(ValueError, match='must keep 8 channels with stride 1, got 8 with stride 2'):
        CondenserBlock(8, 8, 'basic', attention=False, stride=2)


def test_the_smallest_size_is_the_one_in_the_config():
    model = timm.create_model('dcac_325mf', device='meta').eval()
    assert model.forward_features(torch.empty(1, 3, 29, 29, device='meta')).shape[2:] == (1, 1)
    with pytest.raises(ValueError, match='images must be at least 29 x 29 pixels'):
        model(torch.empty(1, 3, 28, 28, device='meta'))
    assert model.pretrained_cfg['min_input_size'] == (3, 29, 29)


def test_drop_path_is_where_there_is_something_to_add_to():
    model = mini(drop_path_rate=0.4)
    rates = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert rates == pytest.approx({
        'layer1.1.drop_path': 0.1, 'layer2.1.drop_path': 0.2, 'layer3.1.drop_path': 0.3, 'layer3.2.drop_path': 0.4})
    assert not torch.equal(model.train()(images(4)), model(images(4)))


def test_all_norms_are_folded():
    model, x = mini(), images(2, 96, 64)
    fused = timm_gsa.fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-8, atol=1e-8)


def test_initial_weights_are_those_of_torch():
    model = timm.create_model('dcac_mini')
    bound = 1 / (model.layer1[0].conv1.weight[0].numel() ** 0.5)
    assert 0.9 * bound < model.layer1[0].conv1.weight.abs().max() <= bound

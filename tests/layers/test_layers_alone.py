"""Every public layer in plain PyTorch, away from timm's registry and models."""
import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn as nn

import timm_gsa.layers
from timm_gsa.layers import (
    AttentionCondenser,
    AxialMixing,
    DepthwiseBlock,
    GlobalSelfAttention,
    PairwiseAttention,
    PatchwiseAttention,
    PriorAttention,
    SparseMLP,
)

# Each makes a layer of 32 channels in; channels out follow.
LAYERS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    'gsa': (partial(GlobalSelfAttention, 32, (6, 5), num_heads=4), 32),
    'gsa_stride': (partial(GlobalSelfAttention, 32, (6, 5), num_heads=4, stride=2, qkv_bias=True), 32),
    'prior': (partial(PriorAttention, 32, 48, ratio=0.25), 48),
    'prior_stride': (partial(PriorAttention, 32, stride=2, ratio=0.25), 32),
    'pairwise': (partial(PairwiseAttention, 32, kernel_size=5), 8),
    'patchwise': (partial(PatchwiseAttention, 32, dim_out=32, kernel_size=3, num_groups=4), 32),
    'condenser': (partial(AttentionCondenser, 32, groups=4), 32),
    'axial': (partial(AxialMixing, 6, 'height'), 32),
    'depthwise': (partial(DepthwiseBlock, 32), 32),
    'sparse': (partial(SparseMLP, 32, (6, 5)), 32),
}
EACH = pytest.mark.parametrize('make, channels', LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


BATCH_NORM = {'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'}
SHAPES = {  # of the layers above, by the names that checkpoints hold
    'gsa': {'qkv.weight': (96, 32, 1, 1), 'rel_h': (11, 8), 'rel_w': (9, 8), 'norm': (32,)},
    'gsa_stride': {
        'qkv.weight': (96, 32, 1, 1), 'qkv.bias': (96,), 'rel_h': (11, 8), 'rel_w': (9, 8), 'norm': (32,)},
    'prior': {
        'conv.weight': (36, 32, 3, 3), 'value.weight': (12, 32, 1, 1), 'proj.weight': (12, 12, 1, 1), 'radius': (1,)},
    'prior_stride': {
        'conv.weight': (24, 32, 3, 3), 'value.weight': (8, 32, 1, 1), 'proj.weight': (8, 8, 1, 1), 'radius': (1,)},
    'pairwise': {
        'qkv.weight': (12, 32, 1, 1), 'qkv.bias': (12,), 'position.weight': (2, 2, 1, 1), 'position.bias': (2,),
        'norm1': (4,), 'conv1.weight': (2, 4, 1, 1), 'norm2': (2,), 'conv2.weight': (1, 2, 1, 1), 'conv2.bias': (1,)},
    'patchwise': {
        'qkv.weight': (36, 32, 1, 1), 'qkv.bias': (36,), 'norm1': (20,), 'conv1.weight': (4, 20, 1, 1),
        'norm2': (4,), 'conv2.weight': (36, 4, 1, 1), 'conv2.bias': (36,)},
    'condenser': {
        'conv1.weight': (16, 8, 3, 3), 'conv1.bias': (16,), 'conv2.weight': (32, 16, 1, 1), 'conv2.bias': (32,),
        'scale': (1,)},
    'axial': {'weight': (6, 6), 'bias': (6,)},
    'depthwise': {'norm': (32,), 'conv.weight': (32, 1, 3, 3)},
    'sparse': {
        'norm': (32,), 'width.weight': (5, 5), 'width.bias': (5,), 'height.weight': (6, 6), 'height.bias': (6,),
        'fuse.weight': (32, 96, 1, 1)},
}


def image(height: int = 6, width: int = 5, channels: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_these_are_all_public_layers():
    assert {make.func.__name__ for make, _ in LAYERS.values()} == set(timm_gsa.layers.__all__)


@pytest.mark.parametrize('name', LAYERS)
def test_state_dict_has_the_promised_names_and_shapes(name):
    expected = {}
    for key, shape in SHAPES[name].items():
        if key.startswith('norm'):
            expected |= {f'{key}.{part}': () if part == 'num_batches_tracked' else shape for part in BATCH_NORM}
        else:
            expected[key] = shape
    assert {key: tuple(tensor.shape) for key, tensor in LAYERS[name][0]().state_dict().items()} == expected


def test_qkv_holds_query_key_and_value_in_this_order():
    """A channel of the value alone reaches the content output of its own channel only."""
    layer = GlobalSelfAttention(4, (3, 3), num_heads=2, query_norm=None).eval()
    nn.init.zeros_(layer.qkv.weight)
    nn.init.zeros_(layer.rel_h)
    nn.init.zeros_(layer.rel_w)
    with torch.no_grad():
        layer.qkv.weight[0, 0] = 1.  # first query channel, of the first head
        layer.qkv.weight[8 + 1, 1] = 1.  # second value channel, of the first head
    x = image(3, 3, 4)
    expected = torch.zeros_like(x)
    expected[:, 1] = x[:, 0] * x[:, 1].mean((-2, -1), keepdim=True)  # zero keys: an even context
    torch.testing.assert_close(layer(x), expected)


@EACH
@pytest.mark.parametrize('size', [(6, 5), (9, 4), (1, 1)])
def test_runs_and_trains_in_a_plain_network(make, channels, size):
    net = nn.Sequential(nn.Conv2d(3, 32, 1), make(), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 7, 1))
    x = image(*size, channels=3)
    out = net(x)
    assert out.shape[:2] == (2, 7)
    out.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    net.eval()
    torch.testing.assert_close(net(x[:1]), net(x)[:1])  # images do not see each other


def test_layers_with_tables_stack_with_the_size_each_runs_at():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        GlobalSelfAttention(16, feat_size=(9, 12), num_heads=4, stride=2),
        GlobalSelfAttention(16, feat_size=(5, 6), num_heads=4),
        PriorAttention(16, 24, stride=2, ratio=0.25),
    )
    assert net(image(9, 12, channels=3)).shape == (2, 24, 3, 3)
    assert net(image(14, 7, channels=3)).shape == (2, 24, 4, 2)


@pytest.mark.parametrize('norm_layer', ['groupnorm1', nn.Identity, nn.InstanceNorm2d])
def test_norms_of_other_kinds_serve(norm_layer):
    layer = GlobalSelfAttention(32, 6, num_heads=4, norm_layer=norm_layer)
    torch.testing.assert_close(layer(image(6, 6)[:1]), layer(image(6, 6))[:1])


@EACH
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_device_and_dtype_reach_every_tensor(make, channels, dtype):
    for tensor in make(device='meta', dtype=dtype).state_dict().values():
        assert tensor.is_meta and tensor.dtype in (dtype, torch.int64)
    layer = make(dtype=dtype)
    assert layer(image().to(dtype)).dtype == dtype


@pytest.mark.parametrize('make', [
    partial(GlobalSelfAttention, 256, 14, qkv_bias=True),
    partial(PriorAttention, 256, ratio=0.25, radius=1.5),
    partial(PairwiseAttention, 256),
    partial(PatchwiseAttention, 256),
], ids=lambda make: make.func.__name__)
def test_a_layer_of_the_meta_device_comes_to_life_by_its_reset(make):
    layer = make(device='meta').to_empty(device='cpu')
    for tensor in layer.state_dict().values():
        tensor.fill_(-7)
    layer.reset_parameters()
    for name, expected in make().state_dict().items():
        tensor = layer.state_dict()[name]
        if expected.numel() > 100 and expected.std() > 0:  # drawn at random: the same scale, around zero
            assert tensor.std().item() == pytest.approx(expected.std().item(), rel=0.2), name
            assert abs(tensor.mean().item()) < 0.3 * expected.std().item(), name
        elif name.startswith('norm') or name == 'radius':
            assert torch.equal(tensor, expected), name
        assert (tensor != -7).all(), name
    assert layer(image(14, 14, 256)).isfinite().all()


@EACH
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(make, channels, copied):
    layer = make().eval()
    twin = copied(layer)
    assert torch.equal(twin(image()), layer(image()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.)
    assert not torch.equal(twin(image()), layer(image()))


@EACH
def test_a_state_dict_carries_the_whole_layer(make, channels, tmp_path):
    layer, other = make().eval(), make().eval()
    torch.save(layer.state_dict(), tmp_path / 'layer.pth')
    other.load_state_dict(torch.load(tmp_path / 'layer.pth', weights_only=True))
    assert torch.equal(other(image()), layer(image()))


@pytest.mark.parametrize('make, message', [
    (lambda: GlobalSelfAttention(30, 4), 'num_heads must divide dim = 30, got 8'),
    (lambda: GlobalSelfAttention(32, 4, num_heads=0), 'num_heads must divide dim = 32, got 0'),
    (lambda: GlobalSelfAttention(32, 4, stride=3), 'stride must be 1 or 2, got 3'),
    (lambda: GlobalSelfAttention(32, 4, query_norm='l2'), "query_norm must be None, 'softmax' or 'rms', got 'l2'"),
    (lambda: GlobalSelfAttention(32, 0), 'feat_size must be positive, got 0'),
    (lambda: GlobalSelfAttention(32, (4, -1)), r'feat_size must be positive, got \(4, -1\)'),
    (lambda: PriorAttention(32, stride=0), 'stride must be 1 or 2, got 0'),
    (lambda: PriorAttention(32, dilation=0), 'dilation must be >= 1, got 0'),
    (lambda: PriorAttention(32, attn_dilation=-2), 'attn_dilation must be >= 1, got -2'),
    (lambda: PriorAttention(32, radius=0.), 'radius must be positive, got 0.0'),
    (lambda: PriorAttention(8), 'ratio must leave 1 to 7 of 8 channels to attention, got 0.1'),
    (lambda: PriorAttention(32, 16, ratio=1.), 'ratio must leave 1 to 15 of 16 channels to attention, got 1.0'),
    (lambda: PriorAttention(32, ratio=-0.5), 'ratio must leave 1 to 31 of 32 channels to attention, got -0.5'),
    (lambda: PairwiseAttention(32, kernel_size=4), 'kernel_size must be odd .* got 4'),
    (lambda: PatchwiseAttention(32, kernel_size=0), 'kernel_size must be odd .* got 0'),
    (lambda: PairwiseAttention(32, dilation=0), 'dilation must be >= 1, got 0'),
    (lambda: PatchwiseAttention(8), r'dim_key must be >= 1, got 0'),
    (lambda: PairwiseAttention(32, num_groups=3), 'num_groups must divide dim_out = 8, got 3'),
])
def test_wrong_arguments_raise_naming_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize('name', timm_gsa.layers.__all__)
def test_documentation_covers_every_argument_and_the_shapes(name):
    layer = getattr(timm_gsa.layers, name)
    text = inspect.getdoc(layer)
    for argument in inspect.signature(layer).parameters:
        assert argument in ('device', 'dtype') or f'\n    {argument}: ' in text
    assert '\nShape:\n    Input (B, ' in text and '\nRaises:\n' in text

"""What the models attend to: maps compared with what the layers do with them, and the rollout with dense products."""
import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import nn

from timm_gsa import attention_maps, attention_rollout
from timm_gsa.interpret import AxialMaps, CondenserMaps, GateMaps, GaussianMaps, GlobalMaps, NeighbourhoodMaps
from timm_gsa.layers import (
    AttentionCondenser,
    GlobalSelfAttention,
    PairwiseAttention,
    PatchwiseAttention,
    PriorAttention,
    SparseMLP,
)
from timm_gsa.models._families import family_of, tiny_models
from timm_gsa.models.dcac import CondenserBlock
from timm_gsa.ops import column_attention, content_attention, normalise_query, row_attention

LAYERS = (GlobalSelfAttention, PairwiseAttention, PatchwiseAttention, PriorAttention)


@pytest.fixture(params=[name for name in tiny_models(attention=True) if family_of(name).name != 'smlpnet'])
def ours(request):
    """Name of a tiny model of each kind of attention; mixing matrices have tests of their own."""
    return request.param


def attention_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def watched(model, images):
    """Input, values and output of every attention layer, picked up from its submodules."""
    seen = {name: [] for name in attention_layers(model)}
    handles = []
    for name, layer in attention_layers(model).items():
        source = layer.value if isinstance(layer, PriorAttention) else layer.qkv
        handles += [
            module.register_forward_hook(lambda module, args, output, name=name: seen[name].append(output))
            for module in (source, layer)
        ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for name, layer in attention_layers(model).items():
        if not isinstance(layer, PriorAttention):
            channels = layer.dim if isinstance(layer, GlobalSelfAttention) else layer.dim_out
            seen[name][0] = seen[name][0][:, -channels:]
    return seen


def randomise_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.3, 3)


def centres(size, image_size):
    """A point in every position of a map, in pixels of the image, row by row."""
    return [
        ((column + 0.5) * image_size[1] / size[1], (row + 0.5) * image_size[0] / size[0])
        for row in range(size[0]) for column in range(size[1])
    ]


@pytest.mark.parametrize('size', [(64, 64), (75, 50), (33, 97)])
def test_weights_applied_to_the_values_give_the_layers_own_output(create, ours, size):
    model = create(ours).eval().double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    points = [(0, 0), (size[1] - 1e-9, size[0] - 1e-9), (0.61 * size[1], 0.3 * size[0]), (0.2 * size[1], 0.9 * size[0])]
    maps = attention_maps(model, images, points)
    layers = attention_layers(model)
    assert list(maps) == list(layers)
    for name, (value, output) in watched(model, images).items():
        attention = maps[name]
        assert attention.layer == name
        assert attention.feat_size == value.shape[-2:] and attention.out_size == output.shape[-2:]
        assert attention.stride == (size[0] / value.shape[-2], size[1] / value.shape[-1])
        assert all(weight.shape[::2] == (2, 4, value.shape[-1]) for weight in attention.maps.values())
        assert attention.cells[0].tolist() == [0, 0]
        assert attention.cells[1].tolist() == [output.shape[-2] - 1, output.shape[-1] - 1]
        attended = attention.attend(value)
        if isinstance(layers[name], PriorAttention):
            attended = layers[name].proj(attended[..., None])[..., 0]
            output = output[:, -attended.shape[1]:]
        expected = output[..., attention.cells[:, 0], attention.cells[:, 1]]
        torch.testing.assert_close(attended, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize('query_norm', [None, 'softmax', 'rms'])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(1, 1), (1, 6), (5, 7), (8, 4)])
def test_every_map_of_gsa_is_the_step_it_stands_for(size, stride, query_norm):
    layer = GlobalSelfAttention(12, size, num_heads=3, stride=stride, query_norm=query_norm).double().eval()
    randomise_norms(layer)
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    out_size = tuple(math.ceil(n / stride) for n in size)
    with torch.no_grad():
        query, key, value = layer.qkv(x).unflatten(1, (3, 3, 4)).unbind(1)
        query = normalise_query(query, query_norm)
        column = column_attention(query, value, layer.rel_h)
        normed = layer.norm(column.flatten(1, 2)).unflatten(1, (3, 4))
        row = row_attention(query, normed, layer.rel_w)
    maps, = attention_maps(nn.Sequential(layer).eval(), x, centres(out_size, size)).values()
    assert isinstance(maps, GlobalMaps) and not maps.normalised

    def applied(weight, source):
        return torch.einsum('bhpm,bhdm->bhdp', weight.flatten(3), source.flatten(3))

    def pooled(full):
        full = full.flatten(1, 2)
        return full if stride == 1 else F.avg_pool2d(full, 2, 2, ceil_mode=True, count_include_pad=False)

    for weight, source, step in (
            (maps.content, value, content_attention(query, key, value)),
            (maps.column, value, column),
            (maps.row, normed, row),
    ):
        torch.testing.assert_close(applied(weight, source).flatten(1, 2), pooled(step).flatten(2))
    position = maps.scale[:, None] * applied(maps.position, value).flatten(1, 2) + maps.constant
    torch.testing.assert_close(position, pooled(row).flatten(2))


@pytest.mark.parametrize('size', [(4, 4), (3, 5), (1, 1)])
def test_maps_of_sparse_mlp_are_a_row_and_a_column_of_its_matrices(size):
    layer = SparseMLP(6, (4, 4)).double().eval()
    randomise_norms(layer)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    maps, = attention_maps(nn.Sequential(layer).eval(), x, centres(size, size)).values()
    assert isinstance(maps, AxialMaps) and set(maps.maps) == {'row', 'column'} and not maps.normalised
    assert all(weight.shape == (2, 1, size[0] * size[1], *size) for weight in maps.maps.values())
    with torch.no_grad():
        value = layer.act(layer.norm(x))
        torch.testing.assert_close(layer.fuse(maps.attend(value).unflatten(-1, size)), layer(x))
    for point, (row, column) in enumerate(maps.cells.tolist()):
        outside = maps.row[0, 0, point].clone()
        outside[row] = 0
        assert not outside.any()
        torch.testing.assert_close(maps.row[0, 0, point, row], layer.width.matrix(size[1])[column].detach())
        torch.testing.assert_close(maps.column[1, 0, point, :, column], layer.height.matrix(size[0])[row].detach())
        assert int((maps.column[0, 0, point] != 0).sum()) <= size[0]


def test_maps_of_a_whole_smlpnet_give_what_fuse_takes():
    torch.manual_seed(0)
    model = timm.create_model('smlpnet_mini', dtype=torch.float64).eval()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseMLP):
            layer.act.register_forward_hook(lambda module, args, output, name=name: seen.update({name: [output]}))
            layer.fuse.register_forward_hook(lambda module, args, output, name=name: seen[name].append(args[0]))
    points = [(0, 0), (70, 40)]
    maps = attention_maps(model, images, points)
    assert list(maps) == list(seen) != []
    for name, (value, fused) in seen.items():
        cells = maps[name].cells
        assert maps[name].feat_size == value.shape[-2:]
        torch.testing.assert_close(maps[name].attend(value), fused[..., cells[:, 0], cells[:, 1]])


def test_gates_of_dcac_give_the_blocks_own_output():
    torch.manual_seed(0)
    model = timm.create_model('dcac_mini', dtype=torch.float64).eval()
    randomise_norms(model)
    images = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    gated = {
        name: module for name, module in model.named_modules()
        if isinstance(module, CondenserBlock) and module.downsample is not None
    }
    seen = {}
    for name, block in gated.items():
        block.downsample.register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(output))
        block.register_forward_hook(lambda module, args, output, name=name: seen[name].append(output))
    maps = attention_maps(model, images, [(5, 5), (79, 63)])
    assert list(maps) == list(gated) and len(gated) == 4
    for name, (value, output) in seen.items():
        gate = maps[name]
        assert isinstance(gate, GateMaps) and gate.feat_size == value.shape[-2:]
        assert (gate.gate > 0).all()
        torch.testing.assert_close(gate.gate.sum(1), torch.ones_like(gate.gate[:, 0]))
        expected = output[..., gate.cells[:, 0], gate.cells[:, 1]]
        torch.testing.assert_close(gated[name].act(gate.attend(value)), expected)
        weight = gate.maps['gate']
        assert weight.shape == (*value.shape[:2], 2, *value.shape[2:])
        torch.testing.assert_close(torch.einsum('bcphw,bchw->bcp', weight, value), gate.attend(value))


@pytest.mark.parametrize('size', [(1, 1), (5, 6)])
def test_maps_of_a_condenser_give_its_own_output(size):
    layer = AttentionCondenser(4, scale=0.3).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    maps, = attention_maps(nn.Sequential(layer).eval(), x, centres(size, size)).values()
    assert isinstance(maps, CondenserMaps)
    with torch.no_grad():
        torch.testing.assert_close(maps.attend(x), layer(x).flatten(2))
        torch.testing.assert_close(maps.attention, layer.attention(x))
    torch.testing.assert_close(maps.maps['scale'].sum((-2, -1)), torch.full((2, 1, size[0] * size[1]), 0.3).double())


@pytest.mark.parametrize('kind, dilation', [
    (PairwiseAttention, 1), (PairwiseAttention, 2), (PatchwiseAttention, 1), (PatchwiseAttention, 3)])
@pytest.mark.parametrize('size', [(1, 1), (2, 3), (9, 6)])
def test_neighbourhood_weights_fold_what_is_mirrored(kind, dilation, size):
    layer = kind(64, kernel_size=5, dilation=dilation).double().eval()
    randomise_norms(layer)
    x = torch.randn(2, 64, *size, dtype=torch.float64)
    maps, = attention_maps(nn.Sequential(layer).eval(), x, centres(size, size)).values()
    assert isinstance(maps, NeighbourhoodMaps)
    assert maps.places.shape == (2, layer.num_groups, size[0] * size[1], 5, 5)
    torch.testing.assert_close(maps.weight.sum((-2, -1)), maps.places.sum((-2, -1)))
    assert maps.normalised == (kind is PairwiseAttention)
    if maps.normalised:
        assert (maps.places > 0).all()
        torch.testing.assert_close(maps.places.sum((-2, -1)), torch.ones_like(maps.places[..., 0, 0]))
    with torch.no_grad():
        value = layer.qkv(x)[:, -layer.dim_out:]
        torch.testing.assert_close(maps.attend(value), layer(x).flatten(2))


@pytest.mark.parametrize('dilation', [1, 2])
def test_gaussian_weights_fall_off_with_the_distance(dilation):
    layer = PriorAttention(16, ratio=0.5, radius=1.7, attn_dilation=dilation).double().eval()
    maps, = attention_maps(nn.Sequential(layer).eval(), torch.randn(3, 16, 9, 11, dtype=torch.float64)).values()
    assert isinstance(maps, GaussianMaps) and maps.normalised
    assert (maps.radius, maps.dilation, maps.cells.tolist()) == (layer.radius.item(), dilation, [[4, 5]])
    assert maps.weight.shape == (3, 1, 1, 9, 11)
    distance = (torch.arange(9.)[:, None] - 4) ** 2 + (torch.arange(11.) - 5) ** 2
    expected = torch.exp(-distance.double() / (2 * (layer.radius.item() ** 2 + 1e-6) * dilation ** 2))
    torch.testing.assert_close(maps.weight[2, 0, 0], expected / expected.sum())


@pytest.mark.parametrize('output_stride', [8, 16])
def test_maps_of_dilated_networks_are_exact(create, ours, output_stride):
    model = create(ours, output_stride=output_stride).eval().double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    maps = attention_maps(model, images, [(13, 50)])
    for name, (value, output) in watched(model, images).items():
        attended = maps[name].attend(value)
        layer = model.get_submodule(name)
        if isinstance(layer, PriorAttention):
            attended = layer.proj(attended[..., None])[..., 0]
            output = output[:, -attended.shape[1]:]
        (row, column), = maps[name].cells.tolist()
        torch.testing.assert_close(attended[..., 0], output[..., row, column], rtol=1e-9, atol=1e-8)


def test_only_the_layers_asked_for_are_read(create):
    model = create('san_tiny_pairwise').eval()
    images = torch.randn(1, 3, 64, 64)
    assert list(attention_maps(model, images, layers=['layer2', 'conv1.block0.attn'])) == [
        'conv1.block0.attn', 'layer2.block0.attn', 'layer2.block1.attn']
    assert list(attention_maps(model, images, layers=['layer3'])) == ['layer3.block0.attn']


def test_points_default_to_the_centre(create, ours):
    model = create(ours).eval()
    images = torch.randn(1, 3, 48, 80)
    given, default = attention_maps(model, images, torch.tensor([[40., 24.]])), attention_maps(model, images)
    for name, attention in default.items():
        assert attention.cells.tolist() == [[n // 2 for n in attention.out_size]]
        for kind, weight in attention.maps.items():
            assert torch.equal(weight, given[name].maps[kind])


def same(maps, others):
    assert list(maps) == list(others)
    for name, attention in maps.items():
        for kind, weight in attention.maps.items():
            torch.testing.assert_close(weight, others[name].maps[kind], rtol=1e-4, atol=1e-5)


def test_models_inside_wrappers_give_the_same_maps(create, ours):
    model = create(ours).eval()
    images = torch.randn(1, 3, 64, 64)
    maps = attention_maps(model, images)
    same(maps, attention_maps(nn.DataParallel(model), images))
    averaged = attention_maps(torch.optim.swa_utils.AveragedModel(model).eval(), images)
    same(maps, {name.removeprefix('module.'): attention for name, attention in averaged.items()})
    features = create(ours, features_only=True).eval()
    found = attention_maps(features, images)
    same(maps, dict(zip(maps, found.values(), strict=True)))
    assert set(found) <= {name for name, _ in features.named_modules()}


def test_distributed_wrapper_gives_the_same_maps(create, monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')
    model = create('san_tiny_patchwise').eval()
    images = torch.randn(1, 3, 64, 64)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        same(attention_maps(model, images), attention_maps(nn.parallel.DistributedDataParallel(model).eval(), images))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_models_give_the_same_maps(create):
    model = create('gsa_resnet_tiny').eval()
    images = torch.randn(1, 3, 64, 64)
    maps = attention_maps(model, images)
    compiled = torch.compile(model, backend='eager')
    compiled(images)  # code without hooks is there now
    same(maps, attention_maps(compiled, images))
    if not hasattr(torch.compiler, 'set_stance'):
        pytest.skip('torch cannot run compiled parts uncompiled before 2.6')
    model.layer3 = torch.compile(model.layer3, backend='eager')
    model.layer4.compile(backend='eager')
    model(images)
    same(maps, attention_maps(model, images))
    same(maps, attention_maps(model, images, layers=['layer1', 'layer2', 'layer3', 'layer4']))


def test_nothing_stays_behind_in_the_model(create, ours):
    model = create(ours).eval()
    images = torch.randn(1, 3, 64, 64)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(images)
    with torch.inference_mode():
        maps = attention_maps(model, images.clone())
    with pytest.raises(RuntimeError):
        attention_maps(model, torch.randn(1, 5, 64, 64))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for attention in maps.values():
        for weight in attention.maps.values():
            assert not weight.requires_grad and not weight.is_inference()
    with torch.no_grad():
        assert torch.equal(model(images), before)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_weights_are_of_at_least_float32(create, ours, dtype):
    images = torch.randn(1, 3, 64, 64)
    exact = attention_maps(create(ours).eval(), images)
    maps = attention_maps(create(ours).eval().to(dtype), images.to(dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = attention_maps(create(ours).eval(), images)
    for name, attention in exact.items():
        for kind, weight in attention.maps.items():
            assert maps[name].maps[kind].shape == weight.shape
            assert maps[name].maps[kind].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert mixed[name].maps[kind].dtype == torch.float32
            assert maps[name].maps[kind].isfinite().all() and mixed[name].maps[kind].isfinite().all()


def test_frozen_norms_are_affine_maps_too(create):
    model = create('gsa_resnet_tiny').eval()
    images = torch.randn(1, 3, 64, 64)
    maps = attention_maps(model, images)
    frozen = attention_maps(freeze_batch_norm_2d(copy.deepcopy(model)).eval(), images)
    for name in maps:
        torch.testing.assert_close(maps[name].scale, frozen[name].scale)
        torch.testing.assert_close(maps[name].constant, frozen[name].constant)


class Idle(nn.Module):
    """Holds an attention layer and does not call it."""

    def __init__(self):
        super().__init__()
        self.attn = PairwiseAttention(32)

    def forward(self, x):
        return x


@pytest.mark.parametrize('arguments, message', [
    (dict(points=[(64, 0)]), 'points must lie in 0 <= x < 64 and 0 <= y < 48'),
    (dict(points=[(0, -0.1)]), 'points must lie'),
    (dict(points=[(0, math.nan)]), 'points must lie'),
    (dict(points=[]), r'points must be pairs \(x, y\)'),
    (dict(points=[(1, 2, 3)]), 'points must be pairs'),
    (dict(layers=['layer9']), "got 'layer9'"),
    (dict(layers=['layer1.0.conv']), r'layers must be of layer1\.0\.conv2'),
    (dict(images=torch.zeros(3, 48, 64)), 'images must be a floating point batch'),
    (dict(images=torch.zeros(1, 3, 48, 64, dtype=torch.uint8)), 'images must be a floating point batch'),
])
def test_bad_arguments_are_named(create, arguments, message):
    model = create('gsa_resnet_tiny').eval()
    with pytest.raises(ValueError, match=message):
        attention_maps(model, **{'images': torch.zeros(1, 3, 48, 64), **arguments})


def test_models_that_cannot_be_read_are_named(create):
    images = torch.zeros(1, 3, 64, 64)
    model = create('gsa_resnet_tiny')
    with pytest.raises(ValueError, match='eval mode, but GSAResNet is in training mode'):
        attention_maps(model.train(), images)
    model.eval().layer2.train()
    with pytest.raises(ValueError, match='but layer2 is in training mode'):
        attention_maps(model, images)
    with pytest.raises(ValueError, match='must contain attention layers of timm_gsa.layers, got a ResNet'):
        attention_maps(timm.create_model('resnet18').eval(), images)
    with pytest.raises(ValueError, match='scripted, traced and exported programs keep none'):
        attention_maps(torch.jit.script(model.eval()), images)
    with pytest.raises(ValueError, match='layer1.0.conv2 must have a batch norm with running statistics'):
        attention_maps(create('gsa_resnet_tiny', norm_layer='groupnorm1').eval(), images)
    with pytest.raises(RuntimeError, match='attn did not run'):
        attention_maps(Idle().eval(), images)


def dense_rollout(model, images, combine):
    """Product of dense (A + I) / 2 over the layers, with every matrix written out."""
    maps = attention_maps(model, images)
    total, previous = None, None
    for name, attention in maps.items():
        out_size, size = attention.out_size, attention.feat_size
        full = attention_maps(model, images, centres(out_size, images.shape[-2:]), [name])[name]
        weight = combine(full)
        weight = weight / weight.sum(-1, keepdim=True)
        step = (weight + spread(out_size, size)) / 2
        if total is not None:
            step = step @ spread(size, previous) @ total
        total, previous = step, out_size
    return total


def spread(size, larger):
    """Matrix that averages what each position of a map covers of a larger one."""
    positions = torch.eye(larger[0] * larger[1], dtype=torch.float64).unflatten(-1, larger)
    return F.adaptive_avg_pool2d(positions, size).flatten(1).t()


def combine_global(maps):
    scale = maps.scale.unflatten(0, (maps.content.shape[1], -1)).mean(1)[:, None, None, None]
    return (maps.content + scale * maps.position).abs().mean(1).flatten(2)


def combine_neighbours(maps):
    # Absolute values by place: where places are mirrored onto one position, they must not cancel.
    absolute = maps.places.abs().mean(1)
    batch, points = absolute.shape[:2]
    weight = torch.zeros(batch, points, *maps.feat_size, dtype=torch.float64)
    reach = absolute.shape[-1] // 2
    for point, (row, column) in enumerate(maps.cells.tolist()):
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                at = [reflect(row + i, maps.feat_size[0]), reflect(column + j, maps.feat_size[1])]
                weight[:, point, at[0], at[1]] += absolute[:, point, i + reach, j + reach]
    return weight.flatten(2)


def reflect(index, size):
    if size == 1:
        return 0
    index = abs(index) % (2 * size - 2)
    return min(index, 2 * size - 2 - index)


@pytest.mark.parametrize('name, combine', [
    ('gsa_resnet_tiny', combine_global),
    ('san_tiny_pairwise', combine_neighbours),
    ('san_tiny_patchwise', combine_neighbours),
])
def test_rollout_is_the_product_over_the_layers(create, name, combine):
    model = create(name).eval().double()
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    maps = attention_maps(model, images)
    last, first = list(maps.values())[-1], list(maps.values())[0]
    share = attention_rollout(model, images, centres(last.out_size, (40, 56)))
    assert share.shape == (2, last.out_size[0] * last.out_size[1], *first.feat_size)
    torch.testing.assert_close(share.flatten(2), dense_rollout(model, images, combine))
    torch.testing.assert_close(attention_rollout(model, images), share.mean(1, keepdim=True))
    assert (share >= 0).all()
    torch.testing.assert_close(share.sum((-2, -1)), torch.ones_like(share[..., 0, 0]))


def test_rollout_refuses_networks_in_which_convolutions_mix_positions(create):
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='layer2.0.conv2 has a convolution beside it'):
        attention_rollout(create('priorattn_resnet_tiny').eval(), images)
    with pytest.raises(ValueError, match='but layer2.0.conv2 is a convolution'):
        attention_rollout(create('gsa_resnet_tiny', attn_stages=(1, 4)).eval(), images)
    with pytest.raises(ValueError, match='but layer 0 passes its input on beside the mixing'):
        attention_rollout(nn.Sequential(SparseMLP(3, 8)).eval(), images)
    with pytest.raises(ValueError, match='but layer layer1.0 has convolutions within its attention'):
        attention_rollout(create('dcac_mini').eval(), images)
    late = attention_rollout(create('gsa_resnet_tiny', attn_stages=(3, 4)).eval(), images)
    assert late.shape == (1, 1, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_maps_of_a_gpu_are_those_of_a_cpu(create, ours):
    model = create(ours).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = attention_maps(model, images)
    for name, attention in attention_maps(model.double().cuda(), images.double().cuda()).items():
        for kind, weight in attention.maps.items():
            assert weight.is_cuda
            torch.testing.assert_close(weight.float().cpu(), maps[name].maps[kind], rtol=1e-3, atol=1e-3)

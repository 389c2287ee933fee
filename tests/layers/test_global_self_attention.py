"""The GSA layer against loops over positions in float64, at its own and other sizes, and its tables in state dicts."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.prune

from timm_gsa import explain, use_backend
from timm_gsa.layers import GlobalSelfAttention
from timm_gsa.ops import resize_relative_table

from ..gradients import bytes_held


def layer_of(feat_size: int | tuple[int, int], **kwargs) -> GlobalSelfAttention:
    """A float64 layer of 6 channels and 2 heads whose norm is not the identity."""
    torch.manual_seed(0)
    layer = GlobalSelfAttention(6, feat_size, num_heads=2, dtype=torch.float64, **kwargs)
    for name, tensor in (*layer.norm.named_parameters(), *layer.norm.named_buffers()):
        if name != 'num_batches_tracked':
            nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 6, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height))


def embedding(table: torch.Tensor, offset: int, length: int) -> torch.Tensor:
    """The table's row for an offset between positions of an axis that may have another length than it was built for."""
    built = (len(table) + 1) // 2
    at = offset * (built - 1) / (length - 1) if length > 1 else 0.
    below = math.floor(at + 1e-9)
    share = max(at - below, 0.)
    row = (1. - share) * table[below + built - 1]
    if share > 1e-9:
        row = row + share * table[below + built]
    return row * built / length


def loops(layer: GlobalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The module of the specification, one position and one neighbour at a time."""
    batch, channels, height, width = x.shape
    heads, depth = 2, 3
    positions = [(row, column) for row in range(height) for column in range(width)]
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
    projected = {}
    for b in range(batch):
        for p in positions:
            projected[b, p] = weight @ x[b, :, p[0], p[1]] + (0. if bias is None else bias)

    def part(index: int, b: int, h: int, p: tuple[int, int]) -> torch.Tensor:
        """Normalised query (0), key (1) or value (2) of a head."""
        start = index * channels + h * depth
        vector = projected[b, p][start:start + depth]
        if index == 0 and layer.query_norm == 'softmax':
            return vector.exp() / sum(number.exp() for number in vector)
        if index == 0 and layer.query_norm == 'rms':
            return vector / (sum(number ** 2 for number in vector) / depth + 1e-6) ** 0.5
        return vector

    columns, content = {}, {}
    for b in range(batch):
        for h in range(heads):
            total = sum(part(1, b, h, p).exp() for p in positions)
            for p in positions:
                query = part(0, b, h, p)
                content[b, h, p] = sum(
                    (query * part(1, b, h, m).exp() / total).sum() * part(2, b, h, m) for m in positions)
                columns[b, h, p] = sum(
                    (query * embedding(layer.rel_h, i - p[0], height)).sum() * part(2, b, h, (i, p[1]))
                    for i in range(height))
    merged = {(b, p): torch.cat([columns[b, h, p] for h in range(heads)]) for b in range(batch) for p in positions}
    if layer.training:
        mean = sum(merged.values()) / len(merged)
        variance = sum((v - mean) ** 2 for v in merged.values()) / len(merged)
    else:
        mean, variance = layer.norm.running_mean, layer.norm.running_var
    normed = {
        key: (v - mean) / torch.sqrt(variance + layer.norm.eps) * layer.norm.weight + layer.norm.bias
        for key, v in merged.items()
    }
    out = torch.zeros(batch, channels, height, width, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            part_of = slice(h * depth, (h + 1) * depth)
            for p in positions:
                query = part(0, b, h, p)
                row = sum(
                    (query * embedding(layer.rel_w, j - p[1], width)).sum() * normed[b, (p[0], j)][part_of]
                    for j in range(width))
                out[b, part_of, p[0], p[1]] = content[b, h, p] + row
    if layer.stride == 1:
        return out
    pooled = torch.zeros(batch, channels, (height + 1) // 2, (width + 1) // 2, dtype=x.dtype)
    for row in range(pooled.shape[2]):
        for column in range(pooled.shape[3]):
            window = [
                out[:, :, r, c]
                for r in range(2 * row, min(2 * row + 2, height)) for c in range(2 * column, min(2 * column + 2, width))
            ]
            pooled[:, :, row, column] = sum(window) / len(window)
    return pooled


def outputs_and_gradients(function, layer: GlobalSelfAttention, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer = copy.deepcopy(layer)
    out = function(layer, x)
    probe = torch.linspace(-1., 1., out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad((out * probe).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize('query_norm', [None, 'softmax', 'rms'])
@pytest.mark.parametrize('built, size, kwargs, training', [
    ((1, 1), (1, 1), {}, False),
    ((4, 3), (4, 3), {}, True),
    ((3, 5), (3, 5), dict(stride=2), True),
    ((3, 5), (3, 5), dict(stride=2, qkv_bias=True), False),
    ((1, 4), (1, 4), dict(stride=2), True),
    ((3, 3), (5, 4), {}, True),  # larger than built for
    ((5, 4), (3, 2), dict(stride=2), False),  # smaller
    ((4, 2), (2, 4), {}, True),  # one axis larger, the other smaller
    ((3, 1), (1, 3), {}, False),  # to and from one position
])
def test_equals_loops_over_positions(built, size, kwargs, training, query_norm):
    layer = layer_of(built, query_norm=query_norm, **kwargs).train(training)
    x = image(*size)
    ours = outputs_and_gradients(lambda layer, x: layer(x), layer, x)
    theirs = outputs_and_gradients(loops, layer, x)
    assert len(ours) == 7 + ('qkv_bias' in kwargs)  # qkv.weight (and bias), rel_h, rel_w, norm.weight, norm.bias
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('size', [(1, 1), (2, 7), (7, 5), (8, 8)])
@pytest.mark.parametrize('stride', [1, 2])
def test_output_size_is_that_of_a_convolution_with_padding(size, stride):
    x = image(*size)
    conv = nn.Conv2d(6, 6, 3, stride, padding=1, dtype=x.dtype)
    assert layer_of(4, stride=stride).eval()(x).shape == conv(x).shape


def test_training_updates_the_statistics_of_the_norm_alone():
    layer = layer_of(4)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer(image(4, 4))
    changed = {name for name, buffer in layer.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == set(before) == {'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}


def test_training_keeps_no_weights_and_no_copies():
    """Seven maps wait for the backward pass: input, projection, normalised query, and two of the column step."""
    layer = GlobalSelfAttention(16, 56, num_heads=2)
    x = torch.randn(2, 16, 56, 56, requires_grad=True)
    assert bytes_held(layer, x) < 7.2 * x.nbytes


def test_channels_last_gives_the_same():
    layer = layer_of((5, 4)).eval()
    x = image(5, 4)
    expected = layer(x)
    torch.testing.assert_close(layer.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last)), expected)


# Tables and sizes


def test_its_own_size_uses_the_tables_as_they_are():
    layer = layer_of((4, 3))
    assert resize_relative_table(layer.rel_h, 4) is layer.rel_h and resize_relative_table(layer.rel_w, 3) is layer.rel_w


@pytest.mark.parametrize('old, new', [((4, 3), (7, 6)), ((7, 6), (4, 3)), ((4, 7), (7, 4)), ((5, 5), (1, 9))])
def test_tables_of_another_size_load_resampled(old, new):
    source, target = layer_of(old).eval(), layer_of(new).eval()
    given = source.state_dict()
    kept = {name: tensor.clone() for name, tensor in given.items()}
    assert str(target.load_state_dict(given)) == '<All keys matched successfully>'
    assert target.rel_h.shape == (2 * new[0] - 1, 3) and target.rel_w.shape == (2 * new[1] - 1, 3)
    assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())  # not the caller's
    x = image(*new)
    torch.testing.assert_close(target(x), source(x), rtol=1e-12, atol=1e-12)


def test_tables_of_the_same_size_load_unchanged():
    source, target = layer_of((4, 3)), layer_of((4, 3))
    nn.init.normal_(source.rel_h)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.rel_h, source.rel_h) and torch.equal(target.rel_w, source.rel_w)


def test_tables_of_another_size_load_inside_a_network_and_by_assignment():
    source = nn.Sequential(nn.Conv2d(3, 6, 1, dtype=torch.float64), layer_of((4, 3)))
    with torch.device('meta'):
        target = nn.Sequential(nn.Conv2d(3, 6, 1), GlobalSelfAttention(6, (6, 5), num_heads=2))
    target.load_state_dict(source.state_dict(), assign=True)
    assert target[1].rel_h.shape == (11, 3) and isinstance(target[1].rel_h, nn.Parameter)
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('given', [
    torch.zeros(7, 2),  # another number of channels a head
    torch.zeros(9, 2),
    torch.zeros(8, 3),  # no such number of offsets
    torch.zeros(7),
    torch.zeros(7, 3, 1),
])
def test_tables_that_cannot_fit_raise_as_any_wrong_shape(given):
    layer = layer_of((4, 4))
    state_dict = {**layer.state_dict(), 'rel_h': given}
    with pytest.raises(RuntimeError, match=r'size mismatch for rel_h: .*checkpoint'):
        layer.load_state_dict(state_dict)


def test_missing_tables_are_reported():
    layer = layer_of((4, 4))
    state_dict = {name: tensor for name, tensor in layer.state_dict().items() if name != 'rel_w'}
    with pytest.raises(RuntimeError, match='Missing key.*"rel_w"'):
        layer.load_state_dict(state_dict)
    assert layer.load_state_dict(state_dict, strict=False).missing_keys == ['rel_w']


def test_initialisation_has_the_documented_scale():
    torch.manual_seed(0)
    layer = GlobalSelfAttention(256, 56, num_heads=8, qkv_bias=True)
    assert layer.qkv.weight.std().item() == pytest.approx(256 ** -0.5, rel=0.02)
    assert layer.rel_h.std().item() == pytest.approx(32 ** -0.5, rel=0.05)
    assert layer.rel_w.std().item() == pytest.approx(32 ** -0.5, rel=0.05)
    assert not layer.qkv.bias.any()


def forms(layer: nn.Module, x: torch.Tensor) -> list[str]:
    """What computes a layer: names of operations and their forms."""
    return [f'{choice.operation}: {choice.form}' for choice in explain(nn.Sequential(layer), x)['0']]


@pytest.mark.parametrize('query_norm', [None, 'softmax', 'rms'])
@pytest.mark.parametrize('kwargs', [dict(stride=1), dict(stride=2), dict(qkv_bias=True)])
@pytest.mark.parametrize('size', [(6, 6), (5, 9), (1, 1)])
def test_inference_in_one_operation_agrees_with_the_steps(size, kwargs, query_norm):
    layer, x = layer_of(6, query_norm=query_norm, **kwargs).eval(), image(*size)
    expected = layer(x)
    assert 'global_self_attention: cpu' not in forms(layer, x) and expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())
        assert forms(layer, x) == ['global_self_attention: cpu']


def biased(layer):
    layer.qkv.bias = nn.Parameter(torch.randn(18, dtype=torch.float64))


def padded(layer):
    layer.qkv = nn.Conv2d(6, 18, 3, padding=1, dtype=torch.float64)


def patched(layer):
    forward = layer.qkv.forward
    layer.qkv.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize('change', [
    lambda layer: layer.norm.train(),
    lambda layer: setattr(layer, 'norm', nn.GroupNorm(1, 6).double()),
    lambda layer: setattr(layer, 'norm', timm.layers.BatchNormAct2d(6).double().eval()),
    lambda layer: layer.norm.register_forward_hook(lambda norm, args, out: 2 * out),
    lambda layer: layer.norm.register_forward_pre_hook(lambda norm, args: (args[0] + 1,)),
    lambda layer: layer.norm.register_full_backward_hook(lambda norm, given, returned: None),
    lambda layer: layer.qkv.register_forward_hook(lambda qkv, args, out: 2 * out),
    lambda layer: layer.qkv.register_full_backward_pre_hook(lambda qkv, grads: None),
    lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.qkv),
    lambda layer: torch.nn.utils.weight_norm(layer.qkv),
    lambda layer: torch.nn.utils.spectral_norm(layer.qkv),
    lambda layer: torch.nn.utils.prune.l1_unstructured(layer.qkv, 'weight', 0.5),
    lambda layer: setattr(layer, 'qkv', nn.Sequential(layer.qkv)),
    padded,
    patched,
])
@pytest.mark.filterwarnings('ignore:.*weight_norm')
def test_layers_changed_by_hand_go_step_by_step(change):
    torch.manual_seed(0)
    layer, x = layer_of(6).eval(), image(6, 6)
    change(layer)
    with use_backend('torch'), torch.no_grad():
        expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        assert 'global_self_attention: cpu' not in forms(layer, x)


def test_a_bias_given_by_hand_is_added():
    layer, x = layer_of(6).eval(), image(6, 6)
    before = layer(x)
    biased(layer)
    with torch.no_grad():
        out = layer(x)
        with use_backend('reference'):
            torch.testing.assert_close(out, layer(x))
    assert not torch.allclose(out, before)


def test_global_hooks_see_the_projection_and_the_norm():
    layer, x = layer_of(6).eval(), image(6, 6)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        with torch.no_grad():
            layer(x)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, GlobalSelfAttention]


@pytest.mark.parametrize('train', [False, True])
def test_backward_hooks_of_the_projection_fire(train):
    layer, x = layer_of(6).train(train), image(6, 6).requires_grad_()
    seen = []
    layer.qkv.register_full_backward_hook(lambda module, given, returned: seen.append(returned[0].shape))
    layer(x).sum().backward()
    assert seen == [(2, 18, 6, 6)]


@pytest.mark.parametrize('traced', [(4, 4), (6, 3), (1, 1), (9, 9)])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_a_trace_holds_at_every_size(traced):
    """Also one that was made at the size the tables are built for, or at a single position."""
    layer = layer_of((4, 4)).eval()
    trace = torch.jit.trace(layer, image(*traced), check_trace=False)
    for size in [(4, 4), (6, 3), (3, 8), (9, 9), (1, 1), (2, 1)]:
        torch.testing.assert_close(trace(image(*size)), layer(image(*size)))


def test_explain_names_the_submodule_that_keeps_a_short_cut_out():
    layer, x = layer_of(6).eval(), image(6, 6)
    layer.qkv.register_full_backward_hook(lambda module, given, returned: None)
    with torch.no_grad():
        choices = explain(nn.Sequential(layer), x)['0']
    assert choices[0].operation == 'global_self_attention' and choices[0].form == 'torch'
    assert choices[0].reasons == {'triton': 'the tensors are not on a GPU', 'cpu': 'qkv has a hook'}

"""SparseMLP and DepthwiseBlock: the authors' numbers, the traps of their equation, and maps of other sizes."""
import io

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounter

import timm_gsa
from timm_gsa.layers import AxialMixing, DepthwiseBlock, SparseMLP
from timm_gsa.ops import column_mixing_reference, row_mixing_reference

from ..golden import assert_agrees, made_input, made_state

# Names and shapes of the authors' modules, and our names.
SHAPES = {
    'smlp_block': {
        **{f'BN.{leaf}': (6,) for leaf in ('weight', 'bias', 'running_mean', 'running_var')},
        'proj_h.weight': (7, 7, 1, 1), 'proj_h.bias': (7,), 'proh_w.weight': (7, 7, 1, 1), 'proh_w.bias': (7,),
        'fuse.weight': (6, 18, 1, 1),
    },
    'dwconv_block': {
        **{f'conv_merge.BN.{leaf}': (6,) for leaf in ('weight', 'bias', 'running_mean', 'running_var')},
        'conv_merge.Conv.weight': (6, 1, 3, 3),
    },
}
NAMES = {
    'smlp_block': {'BN': 'norm', 'proj_h': 'width', 'proh_w': 'height', 'fuse': 'fuse'},
    'dwconv_block': {'conv_merge.BN': 'norm', 'conv_merge.Conv': 'conv'},
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


def our_name(module: str, official: str) -> str:
    path, _, leaf = official.rpartition('.')
    return f'{NAMES[module][path]}.{leaf}'


def layer(module: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer with the authors' weights."""
    made = SparseMLP(6, 7) if module == 'smlp_block' else DepthwiseBlock(6)
    state = {our_name(module, name): tensor for name, tensor in made_state(SHAPES[module]).items()}
    state = {name: t.flatten(1) if name in ('width.weight', 'height.weight') else t for name, t in state.items()}
    assert set(made.state_dict()) - set(state) == {'norm.num_batches_tracked'}
    made.load_state_dict(state, strict=False)
    return made.to(dtype)


def run(module: str, mode: str, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    made = layer(module, dtype).train(mode == 'train')
    x = made_input(f'smlp/{module}/x', (2, 6, 7, 7)).to(dtype).contiguous(memory_format=layout).requires_grad_()
    out = made(x)
    out.backward(made_input(f'smlp/{module}/cotangent', (2, 6, 7, 7)).to(dtype))
    parameters = dict(made.named_parameters())
    got = {'out': out, 'grad_x': x.grad}
    for name, shape in SHAPES[module].items():
        if '.running_' not in name:
            got[f'grad_{name}'] = parameters[our_name(module, name)].grad.reshape(shape)
    return got


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('module', SHAPES)
def test_layers_agree_with_the_authors(module, mode, layout, dtype):
    assert_agrees('smlpnet', 'modules', f'{module}/{mode}', run(module, mode, dtype, layout), TOLERANCES[dtype])


# Traps. Each is a plausible reading of the paper; the authors' numbers tell them apart.


def by_hand(made: SparseMLP, x: torch.Tensor, **changes: bool) -> torch.Tensor:
    """The layer's equation term by term, or with one thing changed."""
    y = made.norm(x)
    z = nn.functional.gelu(y)
    width, height = made.width, made.height
    if changes.get('swapped'):
        width, height = height, width
    matrices = [m.t() if changes.get('transposed') else m for m in (width.weight, height.weight)]
    biases = [0 * b if changes.get('without_bias') else b for b in (width.bias, height.bias)]
    parts = [z, row_mixing_reference(z, matrices[0], biases[0]), column_mixing_reference(z, matrices[1], biases[1])]
    if changes.get('identity_before_norm'):
        parts[0] = x
    if changes.get('identity_before_act'):
        parts[0] = y
    if changes.get('identity_last'):
        parts = [*parts[1:], parts[0]]
    out = torch.einsum('oi,bihw->bohw', made.fuse.weight[:, :, 0, 0], torch.cat(parts, 1))
    if changes.get('norm_after_fuse'):
        out = made.norm(out)
    if changes.get('act_after_fuse'):
        out = nn.functional.gelu(out)
    return out


@pytest.mark.parametrize('trap', [
    'swapped', 'transposed', 'without_bias', 'identity_before_norm', 'identity_before_act', 'identity_last',
    'norm_after_fuse', 'act_after_fuse',
])
def test_a_plausible_other_reading_is_not_the_layer(trap):
    made = layer('smlp_block').eval()
    x = made_input('smlp/smlp_block/x', (2, 6, 7, 7)).double()
    with torch.no_grad():
        out = made(x)
        torch.testing.assert_close(by_hand(made, x), out, rtol=1e-12, atol=1e-12)
        other = by_hand(made, x, **{trap: True})
    assert (other - out).abs().max() > 0.05 * out.abs().max()


def test_width_moves_along_the_width_and_height_along_the_height():
    made = SparseMLP(1, (3, 5), norm_layer=nn.Identity, act_layer=nn.Identity).double()
    with torch.no_grad():
        made.fuse.weight.copy_(torch.tensor([0., 1., 100.]).view(1, 3, 1, 1))
        for mixing, length in ((made.width, 5), (made.height, 3)):
            mixing.weight.copy_(torch.eye(length).roll(1, 0))  # takes from the position before
            mixing.bias.zero_()
    x = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    x[0, 0, 1, 2] = 1.
    want = torch.zeros_like(x)
    want[0, 0, 1, 3] = 1.
    want[0, 0, 2, 2] = 100.
    assert torch.equal(made(x), want)


# Sizes


@pytest.mark.parametrize('size', [(7, 7), (9, 5), (1, 1), (14, 7)])
def test_a_map_of_another_size_runs_and_trains(size):
    torch.manual_seed(0)
    made = SparseMLP(4, 7)
    out = made(torch.randn(3, 4, *size))
    out.square().mean().backward()
    assert out.shape == (3, 4, *size)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    assert made.width.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(('old', 'new'), [(7, (9, 5)), ((9, 5), 7), (7, 14), (8, 1)])
def test_a_state_dict_of_another_size_loads_resampled(old, new):
    torch.manual_seed(0)
    source, target = SparseMLP(4, old).double().eval(), SparseMLP(4, new).double().eval()
    target.load_state_dict(source.state_dict())
    size = new if isinstance(new, tuple) else (new, new)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(target(x), source(x), rtol=1e-12, atol=1e-12)


def test_a_matrix_that_is_not_square_is_refused():
    state = SparseMLP(4, 7).state_dict()
    state['width.weight'] = state['width.weight'][:, :5]
    with pytest.raises(RuntimeError, match='size mismatch for width.weight'):
        SparseMLP(4, 7).load_state_dict(state)


# Inference without a concatenation


def join_of(made, x):
    [choice] = [c for c in timm_gsa.explain(nn.Sequential(made), x)['0'] if c.operation == 'sparse_mlp_join']
    return choice


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('size', [(7, 7), (5, 9), (1, 1)])
def test_joined_branches_are_those_of_the_convolution(size, layout):
    torch.manual_seed(0)
    made = SparseMLP(6, 7).double().eval()
    x = torch.randn(3, 6, *size, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad():
        assert join_of(made, x).form == 'cpu'
        with timm_gsa.use_backend('torch'):
            want = made(x)
        torch.testing.assert_close(made(x), want, rtol=1e-12, atol=1e-12)


def test_branches_are_joined_by_the_convolution_where_more_than_its_result_is_wanted():
    made, x = SparseMLP(6, 7).eval(), torch.randn(2, 6, 7, 7)
    assert join_of(made, x).reasons['cpu'] == 'gradients are recorded'
    seen = []
    with torch.no_grad():
        handle = made.fuse.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
        assert join_of(made, x).reasons['cpu'] == 'fuse has a hook'
        assert seen == [(2, 18, 7, 7)]
        handle.remove()
        made.fuse = nn.Conv2d(18, 6, kernel_size=1)
        assert join_of(made, x).reasons['cpu'] == 'fuse has a bias'
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert join_of(SparseMLP(6, 7).eval(), x).form == 'torch'


# Everything else that a layer alone owes


def test_autocast_and_half_parameters_stay_close():
    torch.manual_seed(0)
    made, x = SparseMLP(8, 6).eval(), torch.randn(2, 8, 6, 6)
    want = made(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = made(x)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - want).norm() < 0.03 * want.norm()
    for size in ((6, 6), (9, 4)):
        y = torch.randn(2, 8, *size)
        half = made.bfloat16()(y.bfloat16())
        want = made.float()(y)
        assert half.dtype == torch.bfloat16 and (half - want).norm() < 0.03 * want.norm()


def test_one_graph_serves_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    made = SparseMLP(4, (5, 7)).double().eval()
    compiled = torch.compile(made, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((5, 7), (9, 4), (12, 8)):
            x = torch.randn(2, 4, *size, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), made(x), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_a_script_runs_at_every_size():
    made, file = SparseMLP(4, 7).eval(), io.BytesIO()
    torch.jit.save(torch.jit.script(made), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in ((7, 7), (5, 9)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(scripted(x), made(x))


def test_on_the_meta_device_and_from_there():
    made = SparseMLP(4, (3, 5), device='meta', dtype=torch.float64)
    assert made(torch.empty(2, 4, 6, 6, device='meta', dtype=torch.float64)).shape == (2, 4, 6, 6)
    assert all(p.is_meta and p.dtype == torch.float64 for p in made.parameters())
    axial = AxialMixing(9, 'width', device='meta').to_empty(device='cpu')
    axial.reset_parameters()
    assert 0.25 < max(axial.weight.max(), -axial.weight.min()) <= 1 / 3 and axial.bias.abs().max() <= 1 / 3


def test_the_norm_folds_into_the_depthwise_convolution():
    from timm_gsa.models.smlpnet import SMLPBlock
    torch.manual_seed(0)
    block = SMLPBlock(6, (5, 7)).double()
    for _ in range(3):
        block.train()(torch.randn(4, 6, 5, 7, dtype=torch.float64))
    nn.init.normal_(block.mix.norm.weight)
    nn.init.normal_(block.mix.norm.bias)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    block.eval()
    fused = timm_gsa.fuse(block)
    assert type(fused.mix.norm) is nn.Identity and type(fused.conv.norm) is nn.BatchNorm2d
    torch.testing.assert_close(fused(x), block(x), rtol=1e-12, atol=1e-12)
    for part in ('conv', 'mix', 'conv.conv', 'mix.norm'):
        handle = block.get_submodule(part).register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(timm_gsa.fuse(block)(x), block(x), rtol=1e-12, atol=1e-12)
        handle.remove()


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: SparseMLP(4, 0), 'feat_size must be positive, got 0'),
    (lambda: SparseMLP(4, (3, -1)), r'feat_size must be positive, got \(3, -1\)'),
    (lambda: DepthwiseBlock(0), 'dim must be >= 1, got 0'),
    (lambda: AxialMixing(0, 'width'), 'length must be >= 1, got 0'),
    (lambda: AxialMixing(3, 'rows'), "axis must be 'width' or 'height', got 'rows'"),
])
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""AttentionCondenser: what the papers say of it, and its steps one by one."""
import io

import pytest
import torch
import torch.nn.functional as F

from timm_gsa.layers import AttentionCondenser


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pooled_by_loops(x: torch.Tensor) -> torch.Tensor:
    rows, columns = (range(0, length, 2) for length in x.shape[-2:])
    return torch.stack([torch.stack([x[..., i:i + 2, j:j + 2].amax((-2, -1)) for j in columns], -1) for i in rows], -2)


@pytest.mark.parametrize('size', [(8, 8), (7, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize('groups', [1, 3])
def test_the_output_is_its_equation(size, groups):
    layer = AttentionCondenser(6, embed_dim=9, groups=groups, scale=0.7).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    embedded = F.conv2d(pooled_by_loops(x), layer.conv1.weight, layer.conv1.bias, padding=1, groups=groups).relu()
    key = torch.einsum('oi,bihw->bohw', layer.conv2.weight[:, :, 0, 0], embedded) + layer.conv2.bias[:, None, None]
    attention = torch.stack([key[..., i // 2, j // 2] for i in range(size[0]) for j in range(size[1])], -1).view_as(x)
    torch.testing.assert_close(layer.attention(x), attention)
    torch.testing.assert_close(layer(x), 0.7 * x + attention)
    probe = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((layer(x) * probe).sum(), inputs)
    want = torch.autograd.grad(((layer.scale * x + attention) * probe).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_the_smaller_the_scale_the_more_the_output_is_the_attention():
    layer, x = AttentionCondenser(8), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        attention = layer.attention(x)
        distances = []
        for scale in (1., 0.1, 0.01, 0.):
            layer.scale.fill_(scale)
            distances.append((layer(x) - attention).norm().item())
    assert distances == sorted(distances, reverse=True) and distances[-1] == 0.


def test_attention_is_condensed():
    """A quarter of the positions and half of the channels, at least one for each group."""
    layer = AttentionCondenser(8)
    shapes = []
    layer.conv1.register_forward_hook(lambda module, args, out: shapes.extend([args[0].shape, out.shape]))
    layer(torch.randn(1, 8, 6, 6))
    assert shapes == [(1, 8, 3, 3), (1, 4, 3, 3)]
    assert AttentionCondenser(4, groups=4).conv1.out_channels == 4


def test_layouts_types_and_ways_out_of_python():
    layer, x = AttentionCondenser(8, groups=2).eval(), torch.randn(2, 8, 7, 5)
    want = layer(x)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), want)
    assert layer(x[:0]).shape == (0, 8, 7, 5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert (layer(x) - want).norm() < 0.03 * want.norm()
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager', fullgraph=True)(x), want)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), want)
    made = AttentionCondenser(8, device='meta', dtype=torch.float64)
    assert made(torch.empty(1, 8, 5, 5, device='meta', dtype=torch.float64)).dtype == torch.float64
    made = made.to_empty(device='cpu')
    made.reset_parameters()
    assert made.scale.item() == 1. and made.conv1.weight.isfinite().all()


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(dim=6, groups=4), 'groups must divide dim = 6, got 4'),
    (dict(dim=6, groups=0), 'groups must divide dim = 6, got 0'),
    (dict(dim=6, embed_dim=4, groups=3), 'groups must divide embed_dim = 4, got 3'),
])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionCondenser(**arguments)

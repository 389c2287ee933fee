"""Content attention against a loop over positions, and the cost its right-to-left product promises."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_gsa.ops import content_attention
from timm_gsa.ops.gsa import cpu
from timm_gsa.ops.gsa.reference import content_attention as content_attention_reference

from ..gradients import heads_in, outputs_and_gradients

SIZES = [(1, 1), (1, 6), (5, 3), (4, 4)]


def tensors(height: int, width: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value of two images, two heads, three key and four value channels."""
    generator = torch.Generator().manual_seed(height * 10 + width)
    shapes = [(2, 2, channels, height, width) for channels in (3, 3, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def loops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The equation, one position and one neighbour at a time."""
    batch, heads, channels, height, width = query.shape
    positions = [(row, column) for row in range(height) for column in range(width)]
    out = torch.zeros_like(value)
    for b in range(batch):
        for h in range(heads):
            total = sum(key[b, h, :, r, c].exp() for r, c in positions)  # one sum for each key channel
            for row, column in positions:
                for r, c in positions:
                    weight = key[b, h, :, r, c].exp() / total
                    score = sum(query[b, h, k, row, column] * weight[k] for k in range(channels))
                    out[b, h, :, row, column] += score * value[b, h, :, r, c]
    return out


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('function', [content_attention, content_attention_reference])
def test_equals_loops_over_positions(function, size):
    inputs = tensors(*size)
    torch.testing.assert_close(
        outputs_and_gradients(function, *inputs), outputs_and_gradients(loops, *inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_equals_reference(dtype):
    inputs = tensors(7, 9, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    ours, theirs = (outputs_and_gradients(f, *inputs) for f in (content_attention, content_attention_reference))
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_takes_any_memory_layout():
    query, key, value = tensors(4, 6)
    expected = content_attention(query, key, value)
    packed = torch.cat([query, key, value], dim=2).transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(content_attention(*packed.split([3, 3, 4], dim=2)), expected)


def innermost(x):
    return heads_in(x, torch.channels_last)


@pytest.mark.parametrize('laid_out', [
    innermost,
    lambda x: x.mT.contiguous().mT,
    lambda x: innermost(x.mT).mT,
    lambda x: x.repeat(1, 2, 1, 1, 2)[:, :2, :, :, :6],
])
def test_gradients_take_any_memory_layout(laid_out):
    inputs = tensors(4, 6)
    expected = outputs_and_gradients(content_attention, *inputs)
    torch.testing.assert_close(
        outputs_and_gradients(lambda *maps: content_attention(*map(laid_out, maps)), *inputs), expected)


def test_gradients_of_a_packed_map_agree():
    inputs = tensors(4, 6)
    expected = outputs_and_gradients(content_attention, *inputs)
    packed = innermost(torch.cat(inputs, dim=2)).requires_grad_()  # heads of query, key and value
    out = content_attention(*packed.split([3, 3, 4], dim=2))
    probe = torch.linspace(-1., 1., out.numel(), dtype=out.dtype).reshape(out.shape)
    grad, = torch.autograd.grad((out * probe).sum(), packed)
    torch.testing.assert_close([out, *grad.split([3, 3, 4], dim=2)], expected)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_takes_fewer_queries_than_keys(layout):
    query, key, value = (heads_in(x, layout) for x in tensors(6, 4))
    asked = query[..., :3, :2]
    ours, theirs = (
        outputs_and_gradients(f, asked, key, value) for f in (content_attention, content_attention_reference))
    assert ours[0].shape == (*value.shape[:3], 3, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    of_all = content_attention(query, key, value)
    torch.testing.assert_close(ours[0], of_all[..., :3, :2])


def test_has_gradients_of_gradients():
    inputs = [x.requires_grad_() for x in tensors(3, 2)]
    assert torch.autograd.gradgradcheck(content_attention, inputs)


def test_weights_of_a_key_channel_sum_to_one():
    query, key, value = tensors(5, 7)
    everything = content_attention(query, key, torch.ones_like(value))
    torch.testing.assert_close(everything, query.sum(2, keepdim=True).expand_as(everything))


def test_a_constant_on_a_key_channel_changes_nothing_however_large():
    query, key, value = tensors(5, 7)
    shift = torch.tensor([1e4, -1e4, 700.], dtype=key.dtype)[:, None, None]
    torch.testing.assert_close(
        content_attention(query, key + shift, value), content_attention(query, key, value), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_softmax_over_many_positions_keeps_half_precision_finite_and_close(dtype):
    """4,096 positions with logits to 80 and more: exp would overflow float16 and its sum would stop growing."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 8, 64, 64, generator=generator).to(dtype)
    key = key * 20.
    exact = content_attention(query.double(), key.double(), value.double())
    ours = content_attention(query, key, value)
    assert ours.dtype == dtype
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_even_weights_of_many_positions_survive_half_precision(dtype):
    """1 / 4,096 for every position: a sum of 4,096 values in order would stop far short of it."""
    value = torch.full((1, 1, 4, 64, 64), 1.5, dtype=dtype)
    query = torch.ones_like(value)
    ours = content_attention(query, torch.zeros_like(value), value)
    torch.testing.assert_close(ours, torch.full_like(ours, 6.), rtol=1e-2, atol=0.)


def test_cost_is_linear_in_the_number_of_positions():
    def cost(side: int) -> int:
        query, key, value = torch.empty(3, 1, 8, 16, side, side, device='meta')
        with FlopCounterMode(display=False) as counter:
            content_attention(query, key, value)
        return counter.get_total_flops()

    assert cost(28) == 2 * 2 * 8 * 28 ** 2 * 16 ** 2  # two products of d x d a head and position, two FLOPs each
    assert cost(56) == 4 * cost(28)


@pytest.mark.parametrize('layout', ['slices', 'channels_last'])
def test_operators_are_sound(layout):
    """On slices of a projection, as a layer has them, in several blocks of images."""
    packed = torch.randn(3, 3 * 4 * 2, 5, 7, dtype=torch.float64)
    if layout == 'channels_last':
        packed = packed.contiguous(memory_format=torch.channels_last)
    query, key, value = (part.unflatten(1, (2, 4)).requires_grad_() for part in packed.split(8, 1))
    operators = torch.ops.timm_gsa
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, '_block', lambda: key[0].numel())
        torch.library.opcheck(operators.content_attention.default, (query, key, value))
        grad = torch.randn(value.shape, dtype=torch.float64)
        torch.library.opcheck(
            operators.content_attention_backward.default, (grad, *(x.detach() for x in (query, key, value))))
        torch.testing.assert_close(
            outputs_and_gradients(content_attention, query, key, value),
            outputs_and_gradients(content_attention_reference, query, key, value), rtol=1e-11, atol=1e-12)

"""The networks between relations and attention weights, row by row, against those on all places at once."""
import pytest
import torch

from timm_gsa.ops import (
    difference_moments,
    difference_network,
    normed_difference_network,
    patch,
    patch_moments,
    patch_network,
    subtraction,
)
from timm_gsa.ops.san import reference
from timm_gsa.ops.san.neighbourhood import reflect_pad, same_padding

from ..gradients import outputs_and_gradients

SIZES = [(1, 1), (2, 5), (7, 4), (12, 9)]
WINDOWS = [(1, 1), (3, 1), (3, 4), (7, 1), (5, 2)]
LAYOUTS = ['contiguous', 'channels_last', 'slice']


def laid_out(x, layout):
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'slice':  # as a projection to query, key and value hands it on
        return torch.cat([x, x], dim=1)[:, :x.shape[1]]
    return x


def in_layout(function, layout):
    return lambda first, *tensors: function(laid_out(first, layout), *tensors)


def difference_inputs(size, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(size[0])
    shapes = ((3, 5, *size), (3, 5, *size), (4, 5), *shapes, (6, 4), (6,))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def patch_inputs(size, kernel_size):
    generator = torch.Generator().manual_seed(size[0])
    places = 4 * kernel_size ** 2
    shapes = (3, 4, *size), (places,), (places,), (6, places)
    key, scale, shift, weight = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    scale[::5] = 0
    return key, scale, shift, weight


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('size', SIZES)
def test_difference_network(size, window, layout):
    inputs = difference_inputs(size, (4,))
    ours, theirs = (
        outputs_and_gradients(in_layout(lambda *x, f=f: f(*x, *window), layout), *inputs)
        for f in (difference_network, reference.difference_network))
    assert ours[0].shape == (3, 6, window[0] ** 2, *size) and ours[0].is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('size', SIZES)
def test_normed_difference_network(size, window):
    inputs = difference_inputs(size, (4,), (4,))
    inputs[3][1] = 0.  # factors of the norm may vanish

    def call(function, part):
        return lambda q, k, w, scale, shift, *more: function(q, k, w, scale, shift, 1e-3, *more, *window)[part]

    for part in range(3):
        ours, theirs = (
            call(f, part)(*inputs) for f in (normed_difference_network, reference.normed_difference_network))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours, theirs = (
        outputs_and_gradients(call(f, 0), *inputs)
        for f in (normed_difference_network, reference.normed_difference_network))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_normed_difference_network_in_float32():
    inputs = difference_inputs((17, 14), (4,), (4,), dtype=torch.float32)

    def call(function):
        return lambda q, k, w, scale, shift, *more: function(q, k, w, scale, shift, 1e-5, *more, 7)[0]

    ours, theirs = (
        outputs_and_gradients(call(f), *inputs)
        for f in (normed_difference_network, reference.normed_difference_network))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('size', SIZES)
def test_patch_network(size, window, layout):
    inputs = patch_inputs(size, window[0])
    ours, theirs = (
        outputs_and_gradients(in_layout(lambda *x, f=f: f(*x, *window), layout), *inputs)
        for f in (patch_network, reference.patch_network))
    assert ours[0].shape == (3, 6, *size)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_patch_network_with_columns_of_a_larger_matrix():
    key, scale, shift, weight = patch_inputs((5, 4), 3)
    part = torch.cat([weight, weight], dim=1)[:, weight.shape[1]:]
    torch.testing.assert_close(
        patch_network(key, scale, shift, part, 3), reference.patch_network(key, scale, shift, weight, 3))


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('size', SIZES)
def test_moments_are_those_of_the_relations(size, window):
    query, key = (1000. + torch.randn(2, 3, *size, dtype=torch.float64) for _ in range(2))

    def of_differences(query, key):
        relation = subtraction(query, key, *window).flatten(2)
        return torch.stack([relation.mean((0, 2)), relation.var((0, 2), correction=0)])

    def of_patches(key):
        relation = patch(key, *window).flatten(2)
        return torch.stack([relation.mean((0, 2)), relation.var((0, 2), correction=0)])

    for ours, theirs, inputs in (
            (lambda q, k: torch.stack(difference_moments(q, k, *window)), of_differences, (query, key)),
            (lambda k: torch.stack(patch_moments(k, *window)), of_patches, (key,)),
    ):
        torch.testing.assert_close(
            outputs_and_gradients(ours, *inputs), outputs_and_gradients(theirs, *inputs), rtol=1e-9, atol=1e-9)


def test_moments_of_keys_that_hardly_differ():
    """float32 sums of squares would lose their variance altogether."""
    key = 100. + 1e-3 * torch.randn(4, 2, 8, 8)
    _, variance = difference_moments(key, key, 3)
    expected = subtraction(key.double(), key.double(), 3).flatten(2).var((0, 2), correction=0)
    torch.testing.assert_close(variance, expected, rtol=1e-6, atol=0.)


def test_gradients_of_gradients():
    size, window = (4, 3), (3, 1)
    inputs = [x.requires_grad_() for x in difference_inputs(size, (4,))]
    assert torch.autograd.gradgradcheck(lambda *x: difference_network(*x, *window), inputs, fast_mode=True)
    inputs = [x.requires_grad_() for x in difference_inputs(size, (4,), (4,))]
    assert torch.autograd.gradgradcheck(
        lambda q, k, w, scale, shift, *more: normed_difference_network(
            q, k, w, scale, shift, 1e-3, *more, *window)[0], inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda *x: patch_network(*x, *window), [x.requires_grad_() for x in patch_inputs(size, 3)], fast_mode=True)


def as_operators(size, window, eps):
    """Each operator of the networks and its arguments, tensors first."""
    pad = reflect_padded(window)
    query, key, *matrices = difference_inputs(size, (4,), (4,))
    patch_key, *more = patch_inputs(size, window[0])
    return [
        (torch.ops.timm_gsa.difference_network, [query, pad(key), *matrices], (eps, *window)),
        (torch.ops.timm_gsa.patch_network, [pad(patch_key), *more], window),
    ]


def reflect_padded(window):
    return lambda x: reflect_pad(x, same_padding(*window))


@pytest.mark.parametrize('eps', [None, 1e-3])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_operators_are_sound(layout, eps):
    for operator, tensors, more in as_operators((5, 4), (3, 2), eps):
        first, *rest = (x.requires_grad_() for x in tensors)
        torch.library.opcheck(operator.default, (laid_out(first, layout), *rest, *more))
        assert torch.autograd.gradgradcheck(
            lambda *x, operator=operator, more=more: first_of(operator(*x, *more)), (first, *rest), fast_mode=True)


def first_of(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


@pytest.mark.parametrize('eps', [None, 1e-3])
def test_operators_of_gradients_are_sound(eps):
    for operator, tensors, more in as_operators((5, 4), (3, 1), eps):
        out = operator(*tensors, *more)
        grad = torch.randn_like(first_of(out))
        kept = [] if isinstance(out, torch.Tensor) else [out[3]]
        backward = getattr(torch.ops.timm_gsa, f'{operator.__name__}_backward').default
        torch.library.opcheck(
            backward, (grad, *tensors, *kept, *more), test_utils=('test_schema', 'test_faketensor'))


def test_compiled_networks_agree_with_eager_ones():
    window = 5, 1
    calls = [
        (lambda q, k, w, *more: difference_network(q, k, w, *more, *window), ((4,),)),
        (lambda q, k, w, s, t, *more: normed_difference_network(q, k, w, s, t, 1e-3, *more, *window)[0], ((4,), (4,))),
    ]
    cases = [(call, difference_inputs((9, 6), *shapes)) for call, shapes in calls]
    cases.append((lambda *x: patch_network(*x, *window), patch_inputs((9, 6), window[0])))
    for call, inputs in cases:
        torch._dynamo.reset()
        compiled = torch.compile(call, backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(outputs_and_gradients(compiled, *inputs), outputs_and_gradients(call, *inputs))

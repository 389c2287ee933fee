"""SAN's layers under everything that watches, changes or differentiates them."""
import copy

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_gsa
from timm_gsa.layers import PairwiseAttention, PatchwiseAttention
from timm_gsa.ops import difference_network, normed_difference_network, patch_network
from timm_gsa.ops.san import reference

from .san_layers import generally, images

TINY = ['san_tiny_pairwise', 'san_tiny_patchwise']


def randoms(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize('create_graph', [False, True])
def test_gradients_of_inputs_that_depend_on_one_another(create_graph):
    x, = randoms((2, 4, 5, 6))
    x.requires_grad_()
    more = randoms((3, 4), (3,), (2, 3), (2,))
    normed = randoms((3, 4), (3,), (3,)), randoms((2, 3), (2,))
    scale, shift, weight = randoms((36,), (36,), (3, 36))
    calls = [
        lambda f, h, p: f(x, x.sin(), *more, 3),
        lambda f, h, p: h(x, x.sin(), *normed[0], 1e-3, *normed[1], 3)[0],
        lambda f, h, p: p(x, scale * x.mean(), shift, weight, 3),
    ]
    for call in calls:
        ours, theirs = (
            torch.autograd.grad(call(*functions).square().sum(), x, create_graph=create_graph)[0]
            for functions in (
                (difference_network, normed_difference_network, patch_network),
                (reference.difference_network, reference.normed_difference_network, reference.patch_network)))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('kind', [PairwiseAttention, PatchwiseAttention])
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_gradients_of_a_layer_in_training_with_a_graph_of_their_own(kind, kernel_size):
    torch.manual_seed(0)
    layer = kind(32, kernel_size=kernel_size).double()
    x = torch.randn(1, 32, 28, 28, dtype=torch.float64, requires_grad=True)

    def gradient():
        return torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x, create_graph=True)[0]

    torch.testing.assert_close(gradient(), generally(gradient))


class LoRA(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.low = conv, nn.Conv2d(2, 2, 1, bias=False).double()

    def forward(self, x):
        return self.conv(x) + self.low(x)


@pytest.mark.parametrize('change', [
    lambda layer: torch.nn.utils.prune.l1_unstructured(layer.position, 'weight', 0.5),
    lambda layer: torch.nn.utils.weight_norm(layer.position),
    lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.position),
    lambda layer: torch.nn.utils.spectral_norm(layer.position),
    lambda layer: setattr(layer, 'position', LoRA(layer.position)),
])
@pytest.mark.parametrize('size', [6, 28])
@pytest.mark.filterwarnings('ignore:.*weight_norm')
def test_the_map_of_positions_trains_in_every_form(change, size):
    torch.manual_seed(0)
    layer = PairwiseAttention(48, kernel_size=3).double()
    change(layer)
    parameters = list(layer.position.parameters())
    for _ in range(2):
        layer.zero_grad()
        layer(images(1, size, size)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize('name', TINY)
def test_global_hooks_see_every_module_that_computes(name):
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    counts = []
    for backend in ('auto', 'torch'):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, seen=seen: seen.append(module))
        try:
            with torch.no_grad(), timm_gsa.use_backend(backend):
                model(x)
        finally:
            handle.remove()
        counts.append(len(seen))
        assert any(module is model.conv1.block0.attn.conv1 for module in seen)
    assert counts[0] == counts[1]


@pytest.mark.parametrize('name', ['qkv', 'norm1', 'act1', 'conv1', 'norm2', 'act2', 'conv2'])
def test_backward_hooks_fire(layer, name):
    seen = []
    getattr(layer, name).register_full_backward_hook(lambda module, given, returned: seen.append(1))
    for change in ('act1', 'act2'):
        getattr(layer, change).inplace = False
    layer(images(1, 28, 28).requires_grad_()).sum().backward()
    assert seen == [1]


def test_a_network_without_a_bias_at_its_end(layer):
    layer.conv2.bias = None
    x = images(2, 6, 6)
    for train in (False, True):
        expected = generally(copy.deepcopy(layer.train(train)), x)
        torch.testing.assert_close(layer(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), generally(layer, x))


def test_forward_mode_and_jacobians(layer):
    x, tangent = images(1, 3, 2), torch.randn(1, 48, 3, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(layer)(x)
    out, derivative = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close(derivative, (jacobian * tangent).sum((-4, -3, -2, -1)))
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), jacobian)


@pytest.mark.parametrize('name', TINY)
def test_another_default_device(name):
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.device('meta'):
            out = model(x)
    assert torch.equal(out, expected)
    with torch.device('meta'):
        model.train()(x.expand(2, -1, -1, -1)).sum().backward()


@pytest.mark.parametrize('name', TINY)
def test_products_are_counted_alike_by_every_backend(name):
    model, counts = timm.create_model(name).eval(), set()
    for backend in ('auto', 'torch', 'reference'):
        for gradients in (False, True):
            with timm_gsa.use_backend(backend), torch.set_grad_enabled(gradients):
                with FlopCounterMode(display=False) as counter:
                    model(torch.randn(1, 3, 64, 64))
            counts.add(counter.get_total_flops())
    assert max(counts) <= 1.03 * min(counts)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize(('image', 'message'), [
    (torch.randn(1, 4, 64, 64), 'channels'),
    (torch.randn(1, 64, 64, 3), 'channels'),
    (torch.randn(1, 3, 64, 64, dtype=torch.float64), '[Ii]nput type|same dtype|scalar type'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), '[Ii]nput type|same dtype|scalar type'),
])
@pytest.mark.parametrize('name', TINY)
def test_images_that_do_not_fit_get_the_errors_of_torch(name, image, message, gradients):
    model = timm.create_model(name).eval()
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=message):
        model(image)

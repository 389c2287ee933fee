"""Every layer by every backend, in every way that torch runs a module, against the plain form in float64."""
import copy
import functools

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import timm_gsa
from timm_gsa.layers import (
    AttentionCondenser,
    GlobalSelfAttention,
    PairwiseAttention,
    PatchwiseAttention,
    PriorAttention,
    SparseMLP,
)
from timm_gsa.ops._backend import _GUARDS_CONTEXT

LAYERS = {
    'gsa': functools.partial(GlobalSelfAttention, 8, (6, 5), num_heads=2),
    'gsa stride 2': functools.partial(GlobalSelfAttention, 8, (6, 5), num_heads=2, stride=2, query_norm='rms'),
    'gsa bare': functools.partial(GlobalSelfAttention, 8, (6, 5), num_heads=2, query_norm=None, qkv_bias=True),
    'gsa position': functools.partial(GlobalSelfAttention, 8, (6, 5), num_heads=2, branches='position'),
    'gsa content': functools.partial(GlobalSelfAttention, 8, (6, 5), num_heads=2, branches='content'),
    'pairwise': functools.partial(PairwiseAttention, 8, dim_out=8, dim_key=2, kernel_size=3, num_groups=2),
    'pairwise 5': functools.partial(PairwiseAttention, 8, dim_out=4, dim_key=3, kernel_size=5, num_groups=2),
    'patchwise': functools.partial(PatchwiseAttention, 8, dim_out=8, dim_key=2, kernel_size=3, num_groups=2),
    'patchwise 1': functools.partial(PatchwiseAttention, 8, dim_out=8, dim_key=2, kernel_size=1, num_groups=2),
    'prior': functools.partial(PriorAttention, 8, ratio=0.25),
    'prior stride 2': functools.partial(PriorAttention, 8, ratio=0.25, stride=2),
    'sparse mlp': functools.partial(SparseMLP, 8, (6, 5)),
    'condenser': functools.partial(AttentionCondenser, 8),
}
# Compilers take seconds: each layer is compiled in one mode, and one of each kind with every backend.
COMPILED = [
    ('gsa', True), ('gsa stride 2', False), ('gsa bare', False), ('gsa position', True), ('gsa content', False),
    ('pairwise', True), ('pairwise 5', False), ('patchwise', False), ('patchwise 1', True),
    ('prior', True), ('prior stride 2', False), ('sparse mlp', True), ('condenser', False),
]
BACKENDS = ['auto', 'cpu', 'reference']


@pytest.fixture(params=LAYERS)
def name(request) -> str:
    return request.param


def make(name: str, train: bool) -> nn.Module:
    """A float64 layer whose norms do something."""
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return layer.train(train)


def image(batch: int = 2, height: int = 6, width: int = 5) -> torch.Tensor:
    return torch.randn(batch, 8, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height))


def probe_like(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1., 1., x.numel(), dtype=torch.float64, device=x.device).view(x.shape).to(x.dtype)


def derivatives(layer: nn.Module, x: torch.Tensor, create_graph: bool = False) -> list[torch.Tensor]:
    """Output, gradients of input and parameters, and running statistics; with `create_graph` second gradients too."""
    layer = copy.deepcopy(layer)
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]
    out = layer(x.sin())
    grads = torch.autograd.grad((out * probe_like(out)).sum(), leaves, create_graph=create_graph)
    results = [out, *grads, *(buffer for buffer in layer.buffers())]
    if create_graph:
        total = sum((grad * probe_like(grad)).sum() for grad in grads)
        results += torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [each.detach() for each in results]


def by(backend: str, function, *args):
    with timm_gsa.use_backend(backend):
        return function(*args)


@pytest.mark.parametrize('create_graph', [False, True])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('backend', BACKENDS)
def test_outputs_and_gradients(name, backend, train, create_graph):
    layer = make(name, train)
    expected = by('torch', derivatives, layer, image(), create_graph)
    torch.testing.assert_close(by(backend, derivatives, layer, image(), create_graph), expected, rtol=1e-8, atol=1e-8)


def test_first_gradients_are_the_same_if_second_ones_may_follow(name):
    layer = make(name, True)
    plain = derivatives(layer, image())
    torch.testing.assert_close(derivatives(layer, image(), True)[:len(plain)], plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [(6, 5), (5, 8), (9, 7)])
def test_inference(name, backend, size):
    layer = make(name, False)
    with torch.no_grad():
        expected = by('torch', layer, image(2, *size))
        torch.testing.assert_close(by(backend, layer, image(2, *size)), expected, rtol=1e-9, atol=1e-9)
        innermost = image(2, *size).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(by(backend, layer, innermost), expected, rtol=1e-9, atol=1e-9)


def outcome(backend: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | type[Exception]:
    try:
        return by(backend, layer, x)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('train', [False, True])
def test_parameters_of_another_dtype_do_what_they_do_in_plain_operators(name, train, grad):
    """The same result, or an error of the same class."""
    layer, x = make(name, train), image()
    owners = [key for key, module in layer.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for owner in owners:
        mixed = copy.deepcopy(layer)
        for parameter in mixed.get_submodule(owner).parameters(recurse=False):
            parameter.data = parameter.data.float()
        with torch.set_grad_enabled(grad):
            expected, actual = (outcome(backend, copy.deepcopy(mixed), x) for backend in ('torch', 'auto'))
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        else:
            assert actual is expected, owner


@pytest.mark.parametrize('grad', [False, True])
def test_forward_mode(name, grad):
    layer, x = make(name, False), image()
    tangent = probe_like(x)
    _, expected = torch.func.jvp(functools.partial(by, 'torch', layer), (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(out.tangent, expected)
    step = 1e-6
    with torch.no_grad():
        measured = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(measured, expected.detach(), rtol=1e-4, atol=1e-5)


def test_vmap_and_jacrev(name):
    layer = make(name, False)
    images = torch.stack([image(), 2 * image()])
    expected = torch.stack([layer(each) for each in images])
    torch.testing.assert_close(torch.vmap(layer)(images), expected)
    x = image(1)
    jacobian = torch.func.jacrev(lambda x: layer(x).mean((2, 3)))(x)
    row = torch.autograd.grad(layer(x.requires_grad_()).mean((2, 3))[0, 1], x)[0]
    torch.testing.assert_close(jacobian[0, 1], row)


@pytest.mark.parametrize(('name', 'train'), COMPILED)
def test_compiled(name, train):
    torch._dynamo.reset()
    layer = make(name, train)
    expected = derivatives(layer, image())
    compiled = copy.deepcopy(layer)
    compiled.forward = torch.compile(compiled.forward, backend='aot_eager', fullgraph=True)
    x = image().requires_grad_()
    out = compiled(x.sin())
    grads = torch.autograd.grad((out * probe_like(out)).sum(), [x, *compiled.parameters()])
    torch.testing.assert_close([out, *grads], expected[:1 + len(grads)])


@pytest.mark.parametrize('name', ['gsa stride 2', 'pairwise', 'patchwise', 'prior', 'sparse mlp'])
def test_compiled_code_follows_the_backend(name):
    torch._dynamo.reset()
    layer = make(name, False)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = layer(image())
        for backend, graphs in (('auto', 1), ('reference', 2), ('auto', 2)):
            torch.testing.assert_close(by(backend, compiled, image()), expected)
            assert counter.frame_count == graphs or not _GUARDS_CONTEXT


@pytest.mark.parametrize('traced', [(6, 5), (9, 9)])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_traced(name, traced):
    layer = make(name, False)
    trace = torch.jit.trace(layer, image(1, *traced), check_trace=False)
    for size in [(6, 5), (9, 9), (7, 10)]:
        torch.testing.assert_close(trace(image(2, *size)), layer(image(2, *size)))


@pytest.mark.parametrize('backend', ['auto', 'torch', 'cpu', 'reference'])
def test_half_precision_and_autocast(name, backend):
    layer, x = make(name, False), image()
    expected = layer(x).detach()
    with torch.no_grad():
        halved = copy.deepcopy(layer).bfloat16()
        out = by(backend, halved, x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() < 0.05 * expected.norm()
        with torch.autocast('cpu', torch.bfloat16):
            out = by(backend, copy.deepcopy(layer).float(), x.float())
        assert (out.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('backend', ['auto', 'torch', 'cpu', 'reference'])
def test_another_default_device(name, backend, grad):
    layer = make(name, False)
    with torch.set_grad_enabled(grad):
        expected = by(backend, layer, image())
        x = image()
        with torch.device('meta'):
            out = by(backend, layer, x)
            if grad:
                out.sum().backward()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('grad', [False, True])
def test_explained(name, grad):
    with torch.set_grad_enabled(grad):
        for choices in timm_gsa.explain(nn.Sequential(make(name, False)), image()).values():
            for choice in choices:
                assert choice.form in ('cpu', 'torch') and 'triton' not in choice.form
                assert all(isinstance(reason, str) and reason for reason in choice.reasons.values())

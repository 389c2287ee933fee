"""torch.compile: one graph in eval and in training, with the results of eager mode, and few graphs over many sizes."""
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from .blocks import LESS, SHALLOW, assert_logits_close, blocks_of, one_fast

# Depth of networks and the different blocks they have: in a ResNet the first of a stage and all others. The last stage
# of DC-AC has one block only.
DEEP = {
    'gsa_resnet50': (16, 8), 'san19_pairwise': (19, 5), 'san19_patchwise': (19, 5), 'priorattn_resnet50': (16, 8),
    'smlpnet_tiny': (26, 7), 'dcac_325mf': (8, 7),
}


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    nn.functional.cross_entropy(out, torch.arange(len(x))).backward()
    return out.detach(), {key.removeprefix('_orig_mod.'): p.grad.clone() for key, p in model.named_parameters()}


def test_one_graph_in_eval(name, create):
    model = create(name, dtype=torch.float64).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_one_graph_in_training_under_autocast(name, create):
    model = create(name, num_classes=7, drop_rate=0.1, drop_path_rate=0.1, **SHALLOW.get(name, {})).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = compiled(torch.randn(4, 3, 64, 64))
    assert out.isfinite().all() and out.requires_grad
    assert counter.frame_count == 1


@pytest.mark.parametrize('training', [pytest.param(False, marks=pytest.mark.slow), True], ids=['eval', 'train'])
def test_compiled_gradients_are_those_of_eager_mode(name, create, training):
    shape = SHALLOW.get(name, {})
    model, other = (create(name, num_classes=7, dtype=torch.float64, **shape).train(training) for _ in range(2))
    compiled = torch.compile(other, backend='aot_eager', fullgraph=True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    (out, grads), (compiled_out, compiled_grads) = gradients(model, x), gradients(compiled, x)
    torch.testing.assert_close(compiled_out, out)
    for key, grad in grads.items():
        torch.testing.assert_close(compiled_grads[key], grad, msg=lambda text, key=key: f'{key}: {text}')
    for (key, buffer), (_, other_buffer) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(other_buffer, buffer, msg=lambda text, key=key: f'{key}: {text}')


@pytest.mark.parametrize('ours', one_fast(SHALLOW))
def test_few_graphs_serve_all_sizes(ours, create):
    """One for the first shape, one for other sizes, one for other batches, whether a map is larger than K or not."""
    model = create(ours, dtype=torch.float64, **SHALLOW[ours]).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    with torch.no_grad():
        for size in ((2, 64, 64), (2, 96, 80), (3, 128, 96), (2, 160, 128)):
            x = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
            torch.testing.assert_close(compiled(x), model(x))
            counts.append(counter.frame_count)
    assert counts[-1] <= 3, counts


@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason="torch 2.5 compiles timm's ResNets more often too")
@pytest.mark.parametrize('name', one_fast((*SHALLOW, 'resnet26')))
def test_one_dynamic_graph_serves_all_sizes(name, create):
    """Where height and width differ at first; torch takes them for one number, and compiles anew, where they agree."""
    model = create(name, device='meta', **SHALLOW.get(name, {})).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((2, 96, 80), (3, 128, 96), (5, 64, 64), (2, 97, 145), (4, 224, 224)):
            compiled(torch.empty(size[0], 3, *size[1:], device='meta'))
    assert counter.frame_count == 1


@pytest.fixture(params=one_fast(DEEP))
def deep(request, create):
    """A network of the papers, with nothing to compute, and the numbers of its blocks and of different ones."""
    return create(request.param, device='meta').eval(), *DEEP[request.param]


def test_deep_network_is_one_graph(deep):
    """Nothing is left to eager mode, where deep networks compiled piece by piece end at torch's default limit."""
    counter = CompileCounter()
    with torch.no_grad():
        torch.compile(deep[0], backend=counter)(torch.empty(2, 3, 64, 64, device='meta'))
    assert counter.frame_count == 1
    frames = torch._dynamo.utils.counters['frames']
    assert frames['total'] == frames['ok'] == 1
    assert not torch._dynamo.utils.counters['graph_break']


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason="torch 2.5 compiles timm's ResNets more often too")
def test_blocks_compiled_one_by_one_share_graphs(deep):
    """As many graphs as there are different blocks, which torch's default limit allows."""
    network, depth, different = deep
    config = torch._dynamo.config
    blocks = blocks_of(network)
    counter = CompileCounter()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    limit = 'fail_on_recompile_limit_hit'  # else all beyond the limit runs in eager mode without a word
    if not hasattr(config, limit):
        limit = 'fail_on_cache_limit_hit'  # before torch 2.6
    with torch.no_grad(), config.patch({limit: True}):
        network(torch.empty(2, 3, 64, 64, device='meta'))
    assert (len(blocks), counter.frame_count) == (depth, different)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='the CPU code of inductor needs a C++ compiler')
@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason='inductor of torch 2.5 fails at its CPU code')
@pytest.mark.parametrize('ours, mode', [
    *((name, 'default') for name in LESS),
    *((name, 'max-autotune') for name in ('gsa_resnet_tiny', 'san_tiny_patchwise')),  # a minute each
])
def test_inductor_serves_all_sizes(ours, create, mode):
    """With the results of eager mode and, as the first image is not square, one graph for even and odd maps."""
    model = create(ours, num_classes=7, **LESS[ours]).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, mode=mode)
    with torch.no_grad():
        for batch, *size in ((2, 96, 80), (3, 80, 112), (2, 128, 96), (2, 97, 145), (4, 160, 64)):
            x = torch.randn(batch, 3, *size)
            assert_logits_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='the CPU code of inductor needs a C++ compiler')
@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason='inductor of torch 2.5 fails at its CPU code')
def test_inductor_trains_alike(create):
    """The most intricate of the models: windows, softmax and shared weights in one block."""
    model, other = (create('san_tiny_pairwise', num_classes=7, layers=(1, 0, 1, 0, 0)).train() for _ in range(2))
    x = torch.randn(4, 3, 64, 64)
    (out, grads), (compiled_out, compiled_grads) = (
        gradients(each, x) for each in (model, torch.compile(other, fullgraph=True)))
    torch.testing.assert_close(compiled_out, out, rtol=1e-3, atol=1e-3)
    both = [torch.cat([g.flatten() for g in each.values()]) for each in (grads, compiled_grads)]
    assert (both[0] - both[1]).norm() < 1e-3 * both[0].norm()

"""torch.compile: one graph in eval and in training, with the results of eager mode, and few graphs over many sizes."""
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
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
    model = create(name, num_classes=7, drop_rate=0.1, drop_path_rate=0.1).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = compiled(torch.randn(4, 3, 64, 64))
    assert out.isfinite().all() and out.requires_grad
    assert counter.frame_count == 1


def test_nothing_breaks_the_graph(ours, create):
    torch._dynamo.utils.counters.clear()
    explained = torch._dynamo.explain(create(ours).train())(torch.randn(2, 3, 64, 64))
    assert (explained.graph_count, explained.graph_break_count, explained.break_reasons) == (1, 0, [])


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_compiled_gradients_are_those_of_eager_mode(name, create, training):
    model, other = (create(name, num_classes=7, dtype=torch.float64).train(training) for _ in range(2))
    compiled = torch.compile(other, backend='aot_eager', fullgraph=True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    (out, grads), (compiled_out, compiled_grads) = gradients(model, x), gradients(compiled, x)
    torch.testing.assert_close(compiled_out, out)
    for key, grad in grads.items():
        torch.testing.assert_close(compiled_grads[key], grad, msg=lambda text, key=key: f'{key}: {text}')
    for (key, buffer), (_, other_buffer) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(other_buffer, buffer, msg=lambda text, key=key: f'{key}: {text}')


def test_few_graphs_serve_all_sizes(name, create):
    """One for the first shape, one for other sizes, one for other batches, whether a map is larger than K or not."""
    model = create(name, dtype=torch.float64).eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    with torch.no_grad():
        for size in ((2, 64, 64), (2, 96, 80), (3, 128, 96), (2, 160, 128)):
            x = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
            torch.testing.assert_close(compiled(x), model(x))
            counts.append(counter.frame_count)
    assert counts[-1] <= 3, counts


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

"""Whole networks by every backend: the same outputs, gradients and running statistics."""
import pytest
import torch
import torch.nn as nn

import timm_gsa


def results(model, x):
    model.zero_grad()
    out = model(x)
    nn.functional.cross_entropy(out, torch.arange(len(x))).backward()
    return {
        'out': out.detach(), **{key: p.grad for key, p in model.named_parameters()},
        **{f'{key} after': buffer for key, buffer in model.named_buffers()}}


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('backend', ['auto', 'cpu', 'reference'])
def test_a_network_computes_the_same_by_every_backend(ours, create, backend, training):
    model, other = (create(ours, num_classes=7, dtype=torch.float64).train(training) for _ in range(2))
    x = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    with timm_gsa.use_backend('torch'):
        expected = results(model, x)
    with timm_gsa.use_backend(backend):
        got = results(other, x)
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f'{key}: {text}')

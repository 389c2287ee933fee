"""Outputs are finite, for pretrained and for deep networks, on inputs far from any photo."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from stability import probe

from timm_gsa.models._families import tiny_models, trained_models


def pictures(count: int = 4, size: int = 64) -> torch.Tensor:
    """Smooth pictures with the statistics of normalised photos."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(count, 3, side, side, generator=generator) for side in (5, 32))
    x = F.interpolate(coarse, size, mode='bicubic') + 0.3 * F.interpolate(fine, size, mode='bilinear')
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


@pytest.mark.parametrize('name', [
    name if name in tiny_models() else pytest.param(name, marks=pytest.mark.slow) for name in trained_models()])
def test_pretrained_models_are_finite_under_every_condition(name):
    model = timm.create_model(name, pretrained=True).eval()
    results = list(probe(model, pictures()))
    assert len(results) > 15 and all(outputs > 0 for _, outputs, _, _ in results)
    assert [condition for condition, _, wrong, _ in results if wrong] == []


def deep(query_norm: str) -> nn.Module:
    """A random network of 26 layers whose residual branches count, with norms that know the statistics of pictures."""
    torch.manual_seed(0)
    model = timm.create_model('gsa_resnet26', num_classes=10, img_size=64, query_norm=query_norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
            nn.init.ones_(module.weight)
    with torch.no_grad():
        model(pictures(16))
    return model.eval()


@pytest.mark.parametrize('query_norm', ['softmax', 'rms'])
def test_a_deep_network_with_normalised_queries_is_finite_at_any_contrast(query_norm):
    model = deep(query_norm)
    with torch.no_grad():
        for contrast in (0., 0.1, 1., 3., 10., 100., 1000.):
            assert model(contrast * pictures()).isfinite().all(), contrast


def test_a_deep_network_with_bare_queries_is_not():
    """Why `query_norm` is not None by default."""
    model = deep('none')
    with torch.no_grad():
        assert model(pictures()).isfinite().all()
        assert not model(3. * pictures()).isfinite().all()

"""bfloat16 and float16, by autocast and as the model's own dtype: finite and close to float32, forward and backward."""
import copy
import functools

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_gsa.layers import (
    AttentionCondenser,
    DepthwiseBlock,
    GlobalSelfAttention,
    PairwiseAttention,
    PatchwiseAttention,
    PriorAttention,
    SparseMLP,
)
from timm_gsa.models._families import tiny_models
from timm_gsa.models.dcac import CondenserBlock
from timm_gsa.models.san import SANBlock
from timm_gsa.models.smlpnet import SMLPBlock

NAMES = tiny_models(untrained=True)
LAYERS = {
    'gsa': functools.partial(GlobalSelfAttention, 64, 14, stride=2),
    'prior': functools.partial(PriorAttention, 64, stride=2, ratio=0.25),
    'pairwise': functools.partial(PairwiseAttention, 64, act_layer=nn.SiLU),
    'patchwise': functools.partial(PatchwiseAttention, 64, act_layer=nn.SiLU),
    'sparse mlp': functools.partial(SparseMLP, 64, 14),
    'depthwise': functools.partial(DepthwiseBlock, 64),
    'condenser': functools.partial(AttentionCondenser, 64, groups=4, act_layer=nn.SiLU),
}
HALVES = [torch.bfloat16, torch.float16]
SCALE = 1024.  # of the loss, as a GradScaler's, so that float16 gradients do not underflow


@functools.cache
def images() -> torch.Tensor:
    """Four smooth pictures with the statistics of normalised photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(4, 3, side, side, generator=generator) for side in (5, 32))
    x = F.interpolate(coarse, 64, mode='bicubic') + 0.3 * F.interpolate(fine, 64, mode='bilinear')
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


@functools.cache
def prototype(name: str) -> nn.Module:
    """A model with norms that know the statistics of the images, conditioned so that errors tell of its arithmetic.

    Its activations are smooth, as a rounding that flips the sign of a ReLU's input changes gradients by leaps, and its
    residual branches are at a fifth of their strength, as random ones of full strength multiply any rounding from
    block to block. Both hold for timm's own ResNet as well.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, act_layer='silu')
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
            if key.endswith('.bn3'):  # timm starts it at zero
                nn.init.constant_(module.weight, 0.2)
        elif isinstance(module, SANBlock):
            module.conv.weight.data *= 0.2
        elif isinstance(module, SMLPBlock):
            module.mix.fuse.weight.data *= 0.2
            module.mlp.fc2.weight.data *= 0.2
    with torch.no_grad():
        model(images())
    return model


def results(module: nn.Module, x: torch.Tensor, **autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the gradients of all parameters and of the input as one vector, both in float64."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', **autocast):
        out = module(x)
        if out.ndim == 2:
            loss = F.cross_entropy(out.float(), torch.arange(4))
        else:
            loss = (out.float() * torch.linspace(-1., 1., out.numel()).reshape(out.shape)).mean()
    (loss * SCALE).backward()
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    gradients = [tensor.grad.double().flatten() / SCALE for tensor in (*module.parameters(), x)]
    return out.detach().double(), torch.cat(gradients)


def half_results(module: nn.Module, x: torch.Tensor, dtype: torch.dtype, autocast: bool) -> tuple[torch.Tensor, ...]:
    if autocast:
        return results(module, x, dtype=dtype)
    return results(copy.deepcopy(module).to(dtype), x.to(dtype), enabled=False)


def assert_close(
        ours: tuple[torch.Tensor, ...],
        theirs: tuple[torch.Tensor, ...],
        tolerances: tuple[float, float],
) -> None:
    for got, expected, tolerance in zip(ours, theirs, tolerances, strict=True):
        assert got.isfinite().all()
        assert (got - expected).norm() / expected.norm() < tolerance


@functools.cache
def float32_results(name: str, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return results(prototype(name).train(training), images(), enabled=False)


MODES = pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'own dtype'])


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@MODES
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', NAMES)
def test_models_are_finite_and_close_to_float32(name, training, autocast, dtype):
    ours = half_results(prototype(name).train(training), images(), dtype, autocast)
    tolerances = (0.1, 0.35) if dtype == torch.bfloat16 else (0.0125, 0.08)
    assert_close(ours, float32_results(name, training), tolerances)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_models_as_they_are_created_are_finite(name, dtype):
    model = timm.create_model(name, num_classes=10, dtype=dtype)
    out, gradients = results(model.train(), images().to(dtype), enabled=False)
    assert out.isfinite().all() and gradients.isfinite().all() and gradients.norm() > 0.


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@MODES
@pytest.mark.parametrize('name', LAYERS)
def test_layers_are_close_to_float32(name, autocast, dtype):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(4, 64, 14, 14)
    ours = half_results(layer, x, dtype, autocast)
    tolerances = (0.02, 0.03) if dtype == torch.bfloat16 else (0.0025, 0.004)
    assert_close(ours, results(layer, x, enabled=False), tolerances)


# What stays in float32


class Softmaxes(TorchDispatchMode):
    """Keeps the results of all softmaxes as they leave the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.results.append(out.detach().clone())
        return out


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@MODES
@pytest.mark.parametrize('name, layer, softmaxes', [
    ('gsa_resnet_tiny', GlobalSelfAttention, 2),  # of the query and of the keys
    ('san_tiny_pairwise', PairwiseAttention, 1),
    ('priorattn_resnet_tiny', PriorAttention, 2),  # one for each axis
    ('dcac_mini', CondenserBlock, 0.5),  # the four at the start of a stage are gates
])
def test_every_softmax_is_in_float32(name, layer, softmaxes, autocast, dtype):
    model = copy.deepcopy(prototype(name)).eval()
    layers = sum(isinstance(module, layer) for module in model.modules())
    x = images()
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=autocast), Softmaxes() as recorded:
        model(x)
    assert [result.dtype for result in recorded.results] == [torch.float32] * int(softmaxes * layers)


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_autocast_leaves_gaussian_maps_as_they_are(dtype):
    model = copy.deepcopy(prototype('priorattn_resnet_tiny')).eval()
    for module in model.modules():
        if isinstance(module, PriorAttention):
            nn.init.uniform_(module.radius, 0.7, 3.)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))  # square maps may share one of both axes
    recorded = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=enabled), Softmaxes() as maps:
            model(x)
        recorded.append(maps.results)
    assert len(recorded[0]) > 0
    assert all(torch.equal(plain, cast) for plain, cast in zip(*recorded, strict=True))


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@MODES
def test_distances_of_neighbours_on_a_large_map_stay_apart(autocast, dtype):
    """Neighbours of a 112 x 112 map are 0.018 apart, which half precision near 1 cannot tell from 0.016 or 0.023."""
    torch.manual_seed(0)
    layer = PairwiseAttention(32, kernel_size=3).eval()
    with torch.no_grad():
        layer.qkv.weight.zero_()  # nothing but positions is left
        layer.qkv.bias.zero_()
        nn.init.eye_(layer.position.weight[:, :, 0, 0])
        nn.init.normal_(layer.conv1.weight, std=20.)
        nn.init.normal_(layer.conv2.weight, std=2.)
        x = torch.zeros(1, 32, 112, 112)
        query, key, _ = layer.project(x)
        expected = layer.attention(query, key)
        if not autocast:
            layer, query, key = layer.to(dtype), query.to(dtype), key.to(dtype)
        with torch.autocast('cpu', dtype=dtype, enabled=autocast):
            ours = layer.attention(query, key)
    assert expected.std() > 0.01  # positions matter here
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.0025
    assert (ours - expected).norm() / (expected - 1 / 9).norm() < tolerance


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_content_attention_over_many_positions_survives_large_keys(dtype):
    """4,096 positions, and keys as large as 100: exp of them is beyond float16, and of most far below it."""
    torch.manual_seed(0)
    layer = GlobalSelfAttention(32, 64, num_heads=4).eval()
    with torch.no_grad():
        layer.qkv.weight[32:64] *= 25.
        x = torch.randn(1, 32, 64, 64)
        expected = layer(x)
        with torch.autocast('cpu', dtype=dtype):
            ours = layer(x).float()
    assert ours.isfinite().all()
    assert (ours - expected).norm() / expected.norm() < (0.02 if dtype == torch.bfloat16 else 0.0025)

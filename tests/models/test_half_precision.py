"""bfloat16 and float16, by autocast and as the model's own dtype: finite and close to float32, forward and backward."""
import copy
import functools

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_gsa.layers import GlobalSelfAttention, PairwiseAttention, PatchwiseAttention, PriorAttention
from timm_gsa.models.san import SANBlock

NAMES = ['gsa_resnet_tiny', 'san_tiny_pairwise', 'san_tiny_patchwise', 'priorattn_resnet_tiny']
LAYERS = {
    'gsa': functools.partial(GlobalSelfAttention, 64, 14, stride=2),
    'prior': functools.partial(PriorAttention, 64, stride=2, ratio=0.25),
    'pairwise': functools.partial(PairwiseAttention, 64, act_layer=nn.SiLU),
    'patchwise': functools.partial(PatchwiseAttention, 64, act_layer=nn.SiLU),
}
HALVES = [torch.bfloat16, torch.float16]
SCALE = 1024.  # of the loss, as a GradScaler's, so that float16 gradients do not underflow


@functools.cache
def images() -> torch.Tensor:
    """Eight smooth pictures with the statistics of normalised photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(8, 3, side, side, generator=generator) for side in (5, 32))
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
    model = timm.create_model(name, num_classes=10, act_layer=ACT)
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
        if key.endswith('.bn3'):  # timm starts it at zero
            nn.init.constant_(module.weight, 0.2)
        elif isinstance(module, SANBlock):
            module.conv.weight.data *= 0.2
    with torch.no_grad():
        model(images())
    return model


def logits_and_gradient(model: nn.Module, x: torch.Tensor, **autocast) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradients of all parameters and of the input as one vector, both in float64."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', **autocast):
        logits = model(x)
        loss = F.cross_entropy(logits.float(), torch.arange(8))
    (loss * SCALE).backward()
    gradients = [tensor.grad.double().flatten() / SCALE for tensor in (*model.parameters(), x)]
    return logits.detach().double(), torch.cat(gradients)


@functools.cache
def float32_result(name: str, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_and_gradient(prototype(name).train(training), images(), enabled=False)


def assert_close(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    for got, expected, tolerance in zip(ours, theirs, TOLERANCES[dtype], strict=True):
        assert got.isfinite().all()
        assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', NAMES)
def test_autocast_is_finite_and_close_to_float32(name, training, dtype):
    ours = logits_and_gradient(prototype(name).train(training), images(), dtype=dtype)
    assert_close(ours, float32_result(name, training), dtype)


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name', NAMES)
def test_a_model_of_half_precision_is_finite_and_close_to_float32(name, training, dtype):
    model = copy.deepcopy(prototype(name)).train(training).to(dtype)
    with torch.no_grad():
        assert model(images().to(dtype)).dtype == dtype
    ours = logits_and_gradient(model, images().to(dtype), enabled=False)
    assert_close(ours, float32_result(name, training), dtype)


# What stays in float32


class Softmaxes(TorchDispatchMode):
    """Keeps the results of all softmaxes over positions or neighbours, as they leave the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.results.append(out.detach().clone())
        return out


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'own dtype'])
@pytest.mark.parametrize('name, softmaxes', [
    ('gsa_resnet_tiny', 6),  # one a layer
    ('san_tiny_pairwise', 7),
    ('priorattn_resnet_tiny', 10),  # the two axes of each layer
])
def test_every_softmax_is_in_float32(name, softmaxes, autocast, dtype):
    model = copy.deepcopy(prototype(name)).eval()
    x = images()
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=autocast), Softmaxes() as recorded:
        model(x)
    assert [result.dtype for result in recorded.results] == [torch.float32] * softmaxes


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_autocast_leaves_gaussian_maps_as_they_are(dtype):
    model = copy.deepcopy(prototype('priorattn_resnet_tiny')).eval()
    for module in model.modules():
        if isinstance(module, PriorAttention):
            nn.init.uniform_(module.radius, 0.7, 3.)
    recorded = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=enabled), Softmaxes() as maps:
            model(images())
        recorded.append(maps.results)
    assert len(recorded[0]) == 10
    assert all(torch.equal(plain, cast) for plain, cast in zip(*recorded, strict=True))


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

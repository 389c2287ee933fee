"""Exact parameters and costs of every registered model: what the reconstructions are held against.

On the meta device: nothing is computed. torch's flop counter counts a multiply-add as two.
"""
import pytest
import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import timm_gsa.layers.prior_attention as prior_attention
from timm_gsa.layers import PairwiseAttention, PatchwiseAttention
from timm_gsa.models._families import FAMILIES, tiny_models
from timm_gsa.ops import gaussian_attention_reference

TINY = tiny_models(untrained=True)


def create(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, device='meta', **kwargs).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count(model: nn.Module, size: int = 224) -> dict[str, dict[str, int]]:
    """FLOPs of every module by its name (the model's own is 'Global') and kind of operation."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device='meta'))
    return {
        name.removeprefix(f'{type(model).__name__}.'): {str(kind): flops for kind, flops in kinds.items()}
        for name, kinds in counter.get_flop_counts().items()
    }


def flops(model: nn.Module, size: int = 224) -> int:
    return sum(count(model, size)['Global'].values())


def test_these_are_all_registered_models():
    ours = {*GSA, *SAN, *PRIOR, *SMLP, *DCAC, *TINY}
    assert ours == {name for family in FAMILIES for name in timm.list_models(module=family.name)}


# GSA-ResNet

GSA = {  # parameters, multiply-adds at 224 px and 1,000 classes
    'gsa_resnet26': (10_352_600, 2_309_742_592),
    'gsa_resnet38': (14_202_728, 2_947_479_552),
    'gsa_resnet50': (18_052_856, 3_585_216_512),
    'gsa_resnet101': (30_398_392, 6_089_601_024),
}


@pytest.mark.parametrize('name', GSA)
def test_gsa_resnet_counts(name):
    model = create(name)
    assert (parameters(model), flops(model)) == (GSA[name][0], 2 * GSA[name][1])


@pytest.mark.parametrize('stages, expected_parameters, multiply_adds', [
    ((1, 2, 3, 4), 18_052_856, 3_585_216_512),
    ((2, 3, 4), 18_120_872, 3_671_920_640),
    ((3, 4), 18_504_232, 3_718_483_968),
    ((4,), 20_848_296, 3_999_870_976),
    ((), 25_557_032, 4_089_184_256),
    ((1,), 25_489_016, 4_002_480_128),
    ((1, 2), 25_105_656, 3_955_916_800),
    ((1, 2, 3), 22_761_592, 3_674_529_792),
])
def test_gsa_resnet_counts_by_the_stages_that_use_attention(stages, expected_parameters, multiply_adds):
    model = create('gsa_resnet50', attn_stages=stages)
    assert (parameters(model), flops(model)) == (expected_parameters, 2 * multiply_adds)


@pytest.mark.parametrize('name, expected_parameters, gflops', [
    ('gsa_resnet38', 12_358_628, 5.891),
    ('gsa_resnet50', 16_208_756, 7.167),
    ('gsa_resnet101', 28_554_292, 12.176),
])
def test_gsa_resnet_counts_with_100_classes(name, expected_parameters, gflops):
    model = create(name, num_classes=100)
    assert parameters(model) == expected_parameters
    assert round(flops(model) / 1e9, 3) == gflops


@pytest.mark.parametrize('name, expected_parameters, gflops', [
    ('gsa_resnet38', 12_339_428, 1.783),
    ('gsa_resnet50', 16_186_484, 2.182),
    ('gsa_resnet101', 28_518_964, 3.805),
])
def test_gsa_resnet_counts_on_32_px_with_the_small_stem(name, expected_parameters, gflops):
    model = create(name, num_classes=100, stem_type='small')
    assert parameters(model) == expected_parameters
    assert round(flops(model, 32) / 1e9, 3) == gflops


@pytest.mark.parametrize('heads, million, gflops', [(1, 18.285, 8.294), (4, 18.086, 7.331), (16, 18.036, 7.090)])
def test_gsa_resnet_counts_by_the_number_of_heads(heads, million, gflops):
    model = create('gsa_resnet50', num_heads=heads)
    assert (round(parameters(model) / 1e6, 3), round(flops(model) / 1e9, 3)) == (million, gflops)


# SAN

SAN = {  # parameters; multiply-adds in G of trunk, blocks and attention convolutions, aggregation, and all
    'san10_pairwise': (10_531_848, 0.421, 1.092, 0.495, 0.034, 2.044),
    'san10_patchwise': (11_841_124, 0.421, 1.092, 0.242, 0.034, 1.791),
    'san15_pairwise': (14_065_436, 0.421, 1.638, 0.744, 0.055, 2.859),
    'san15_patchwise': (16_181_310, 0.421, 1.638, 0.363, 0.055, 2.478),
    'san19_pairwise': (17_596_156, 0.421, 2.152, 0.989, 0.073, 3.636),
    'san19_patchwise': (20_518_470, 0.421, 2.152, 0.483, 0.073, 3.130),
}


@pytest.mark.parametrize('name', SAN)
def test_san_counts(name):
    model = create(name)
    aggregation = 0  # one multiply-add a neighbour, channel and position

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal aggregation
        aggregation += out.numel() * layer.kernel_size ** 2

    convolutions = {key for key, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    for layer in model.modules():
        if isinstance(layer, (PairwiseAttention, PatchwiseAttention)):
            layer.register_forward_hook(add)
    by_module = count(model)
    costs = {key: kinds['aten.convolution'] // 2 for key, kinds in by_module.items() if key in convolutions}
    trunk = sum(cost for key, cost in costs.items() if '.block' not in key)
    attention = sum(cost for key, cost in costs.items() if '.attn.' in key and not key.endswith('.qkv'))
    blocks = sum(costs.values()) - trunk - attention
    total = sum(by_module['Global'].values()) // 2
    assert parameters(model) == SAN[name][0]
    assert [round(cost / 1e9, 3) for cost in (trunk, blocks, attention, aggregation, total)] == list(SAN[name][1:])


# Prior attention

PRIOR = {  # parameters, GFLOPs with everything counted two: separable form, dense form
    'priorattn_resnet18': (10_700_334, 3.41, 3.50),
    'priorattn_resnet34': (19_729_205, 6.77, 6.95),
    'priorattn_resnet50': (24_586_134, 7.93, 7.99),
    'priorattn_resnet101': (42_718_504, 15.02, 15.11),
    'priorattn_resnet152': (57_656_118, 22.12, 22.29),
}


@pytest.mark.parametrize('name', PRIOR)
def test_prior_attention_counts(name):
    model = create(name)
    assert parameters(model) == PRIOR[name][0]
    assert round(flops(model) / 1e9, 2) == PRIOR[name][1]


@pytest.mark.parametrize('name', list(PRIOR)[:-1])  # the last is below
def test_prior_attention_counts_with_the_dense_map(name, monkeypatch):
    monkeypatch.setattr(prior_attention, 'gaussian_attention', gaussian_attention_reference)
    model = create(name)
    assert round(flops(model) / 1e9, 2) == PRIOR[name][2]


@pytest.mark.parametrize('name, expected_parameters, gflops', [
    ('priorattn_resnet18', 11_287_682, 3.54),
    ('priorattn_resnet34', 20_962_966, 7.11),
])
def test_prior_attention_counts_of_basic_blocks_with_a_tenth_of_attention(name, expected_parameters, gflops):
    model = create(name, attn_ratio=0.1)
    assert parameters(model) == expected_parameters
    assert round(flops(model) / 1e9, 2) == gflops


def test_prior_attention_saves_at_depth_152_what_the_paper_claims(monkeypatch):
    """6.4 % of the parameters and 6.7 % of the cost of the attention-augmented ResNet-152 (61.6 M, 23.8 GFLOPs).

    In the convention of that network's paper: two FLOPs for the multiply-adds of convolutions, one for attention.
    """
    monkeypatch.setattr(prior_attention, 'gaussian_attention', gaussian_attention_reference)
    model = create('priorattn_resnet152')
    kinds = count(model)['Global']
    products = sum(value for kind, value in kinds.items() if kind in ('aten.mm', 'aten.bmm'))
    dense = sum(kinds.values()) / 1e9
    gflops = dense - products / 2 / 1e9
    assert round(dense, 2) == PRIOR['priorattn_resnet152'][2]
    assert round(gflops, 2) == 22.19
    assert 1 - parameters(model) / 61.6e6 == pytest.approx(0.064, abs=5e-4)
    assert 1 - gflops / 23.8 == pytest.approx(0.067, abs=1e-3)


# sMLPNet

SMLP = {  # parameters, multiply-adds at 224 px and 1,000 classes
    'smlpnet_tiny': (24_123_584, 4_989_451_520),
    'smlpnet_small': (48_558_136, 10_312_161_792),
    'smlpnet_base': (65_880_408, 13_986_515_200),
}


@pytest.mark.parametrize('name', SMLP)
def test_smlpnet_counts(name):
    model = create(name)
    assert (parameters(model), flops(model)) == (SMLP[name][0], 2 * SMLP[name][1])


@pytest.mark.parametrize(('arguments', 'counts'), [
    (dict(num_classes=100), (23_546_684, 47_866_036, 65_073_108)),
    (dict(num_classes=10), (23_488_994, 47_796_826, 64_992_378)),
    (dict(img_size=256), (24_133_160, 48_569_928, 65_892_200)),
    (dict(img_size=384), (24_184_024, 48_632_536, 65_954_808)),
], ids=str)
def test_smlpnet_counts_of_other_classes_and_sizes(arguments, counts):
    assert tuple(parameters(create(name, **arguments)) for name in SMLP) == counts


def test_smlpnet_multiply_adds_at_384():
    billions = [flops(create(name, img_size=384), 384) / 2e9 for name in SMLP]
    assert [round(each, 3) for each in billions] == [14.951, 30.731, 41.600]


# DC-AC

DCAC = {'dcac_325mf': (2_376_600, 319_695_780)}


def test_dcac_counts():
    model = create('dcac_325mf')
    assert (parameters(model), flops(model)) == (DCAC['dcac_325mf'][0], 2 * DCAC['dcac_325mf'][1])
    assert parameters(create('dcac_325mf', num_classes=1)) == 1_632_345  # the paper's 1.6 M


# Tiny models


@pytest.mark.parametrize('name', TINY)
def test_tiny_models_are_small(name):
    model = create(name)
    size = model.pretrained_cfg['input_size'][-1]
    assert size in (32, 64)
    assert parameters(model) <= 1_200_000
    assert flops(model, size) < 2 * 100e6

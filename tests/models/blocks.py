"""What the networks of all families are made of."""
from collections.abc import Iterable

import pytest
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck

from timm_gsa.models.dcac import CondenserBlock
from timm_gsa.models.san import SANBlock
from timm_gsa.models.smlpnet import SMLPBlock

# Arguments that leave one layer of each kind: compilers and exporters take seconds for each.
LESS = {
    'gsa_resnet_tiny': dict(attn_stages=(4,)),
    'san_tiny_pairwise': dict(layers=(0, 1, 0, 0, 0)),
    'san_tiny_patchwise': dict(layers=(0, 1, 0, 0, 0)),
    'priorattn_resnet_tiny': dict(attn_stages=(4,)),
    'smlpnet_mini': dict(depths=(1, 0, 0, 1)),
    'dcac_mini': dict(layers=(1, 1, 1, 1)),
}

# The same with a layer of SAN whose windows are larger than its maps.
SHALLOW = LESS | {name: dict(layers=(0, 1, 0, 0, 1)) for name in LESS if name.startswith('san')}

BLOCKS = (BasicBlock, Bottleneck, SANBlock, SMLPBlock, CondenserBlock)


def one_fast(names: Iterable[str]) -> list:
    """Parameters of a test that takes seconds for each network: all but the first run with `--slow` alone."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def assert_logits_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Shallow networks with the statistics of deep ones give logits of hundreds: the tolerance follows their size."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * max(expected.abs().max().item(), 10.))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    return [block for block in module.modules() if isinstance(block, BLOCKS)]


def stages_of(model: nn.Module) -> list[str]:
    """Names of the modules that give features and hold blocks, in the order in which they run."""
    names = [info['module'] for info in model.feature_info]
    return [name for name in names if blocks_of(model.get_submodule(name))]

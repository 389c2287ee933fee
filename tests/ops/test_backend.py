"""The choice of backends: precision of float32, modules in full precision, untouched modules, mixing by name."""
import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import timm_gsa
from timm_gsa.layers import PairwiseAttention, SparseMLP
from timm_gsa.ops import _backend

matmul = torch.backends.cuda.matmul


@pytest.fixture
def precisions():
    """Both settings as they were, afterwards."""
    if not hasattr(matmul, 'fp32_precision'):
        pytest.skip('torch has one setting before 2.9')
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield
    torch.backends.fp32_precision, matmul.fp32_precision = before


@pytest.mark.parametrize('everywhere', ['none', 'ieee', 'tf32'])
@pytest.mark.parametrize('own', ['none', 'ieee', 'tf32'])
def test_tf32_of_products_is_inherited_unless_they_have_their_own_setting(precisions, own, everywhere):
    torch.backends.fp32_precision = everywhere
    matmul.fp32_precision = own
    assert _backend.allows_tf32() == ((everywhere if own == 'none' else own) == 'tf32')


class Convolutions(TorchDispatchMode):
    """Dtypes of the inputs of convolutions."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if 'convolution' in function.name():
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('device, dtype, computed', [
    ('cuda', torch.float32, torch.float64),
    ('cuda', torch.bfloat16, torch.float64),
    ('cpu', torch.float32, torch.float32),
    ('cpu', torch.bfloat16, torch.float32),
    ('cpu', torch.float64, torch.float64),
])
def test_positions_are_mapped_without_tf32_and_half_precision(device, dtype, computed):
    with FakeTensorMode(), torch.no_grad(), Convolutions() as convolutions:
        layer = PairwiseAttention(32, kernel_size=3, device=device, dtype=dtype)
        out = layer.mapped_position(torch.empty(1, 2, 5, 5, device=device, dtype=dtype))
    assert convolutions.dtypes == [computed]
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module[0])


@pytest.mark.parametrize('change, reason', [
    (lambda module: None, None),
    (lambda module: module[0].register_forward_hook(lambda *_: None), '0 has a hook'),
    (lambda module: module.register_forward_pre_hook(lambda *_: None), 'has a hook'),
    (lambda module: module[0].register_full_backward_hook(lambda *_: None), '0 has a hook'),
    (lambda module: module[0].register_full_backward_pre_hook(lambda *_: None), '0 has a hook'),
    (lambda module: setattr(module[0], 'forward', lambda x: x), '0 has a patched forward'),
    (parametrized, '0 has a parametrization'),
])
def test_what_touches_a_module_is_named(change, reason):
    module = nn.Sequential(nn.Conv2d(2, 2, 1))
    change(module)
    assert _backend.why_not_untouched(module) == reason


def test_global_hooks_touch_every_module():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _backend.why_not_untouched(nn.ReLU()) == 'a global hook watches every module'
    finally:
        handle.remove()


def test_mixing_is_an_operation_with_a_reference():
    model, x = nn.Sequential(SparseMLP(3, 4)).eval(), torch.randn(1, 3, 4, 4)
    for backend, form in (('auto', 'torch'), ('reference', 'reference'), ('cpu', 'torch')):
        with timm_gsa.use_backend(backend), torch.no_grad():
            choices = timm_gsa.explain(model, x)
        forms = [(c.operation, c.form) for each in choices.values() for c in each if c.operation.endswith('_mixing')]
        assert forms == [('row_mixing', form), ('column_mixing', form)]


def test_sizes_that_a_program_leaves_open_are_not_statically_true():
    assert _backend.statically_true(2 < 3) and not _backend.statically_true(3 < 2)
    node = torch.fx.Graph().placeholder('x')
    assert not _backend.statically_true(torch.fx.Proxy(node) == 1)

"""Triton kernels prove themselves: a wrong one is refused, one that cannot be launched gives way to plain operators.

What is in `TestKernels` runs in Triton's interpreter, as those of the other files, in one process of their own.
"""
import importlib
import json

import pytest
import timm
import torch

import timm_gsa
from timm_gsa.layers import GlobalSelfAttention
from timm_gsa.ops import _backend, _checks, _kernels
from timm_gsa.ops.san import gpu

from .triton_runs import INTERPRETED, Interpreted, needs_interpreter, run_interpreted

CPU = torch.device('cpu')


@pytest.mark.slow
@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason='is in the interpreter')
def test_in_the_interpreter() -> None:
    """One size of each kernel at least."""
    run_interpreted()


@pytest.mark.slow
@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason='is in the interpreter')
def test_at_all_sizes_in_the_interpreter() -> None:
    run_interpreted('--slow', '-m', 'slow')


class OutOfResources(Exception):
    """As Triton's own, which a launch raises."""


def kernels():
    return importlib.import_module('timm_gsa.ops.gsa.triton_attention')


class TestKernels(Interpreted):
    def test_a_kernel_made_wrong_is_refused(self, monkeypatch, tmp_path) -> None:
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
        _kernels.why_not_proven.cache_clear()
        right = kernels().attend
        monkeypatch.setattr(kernels(), 'attend', lambda *args, **more: 1.01 * right(*args, **more))
        with pytest.warns(UserWarning, match='without its Triton kernels on cpu: the kernels fail their check: output'):
            reason = _kernels.why_not_proven('gsa', torch.float32, CPU)
        assert 'column_attention off by 1.0e-02' in reason
        assert list(json.loads(_kernels.cache_file().read_text()).values()) == [reason]

    def test_a_kernel_with_wrong_gradients_is_refused(self, monkeypatch) -> None:
        right = kernels().attend_backward

        def wrong(*args):
            query, value, table = right(*args)
            return query, value, 0.9 * table

        monkeypatch.setattr(kernels(), 'attend_backward', wrong)
        assert 'gradients of column_attention' in _checks.fault('gsa', 'triton', torch.float32, CPU)

    def test_a_launch_without_resources_is_computed_plainly(self, monkeypatch) -> None:
        def fail(*args, **more):
            raise OutOfResources('out of resource: shared memory, Required: 192512, Hardware limit: 166912')

        for name in ('attend', 'attend_backward', 'content', 'content_backward', 'gather', 'gather_backward', 'fused'):
            monkeypatch.setattr(kernels(), name, fail)
        _kernels._warn_once.cache_clear()
        layer, x = GlobalSelfAttention(16, (5, 7), num_heads=2), torch.randn(2, 16, 5, 7, requires_grad=True)
        for train in (True, False):
            layer.train(train)
            expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
            with timm_gsa.use_backend('triton'), pytest.warns(UserWarning, match='shared memory, Required: 192512'):
                _kernels._warn_once.cache_clear()
                actual = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        with timm_gsa.use_backend('triton'), torch.no_grad(), pytest.warns(UserWarning, match='of fused: out of'):
            inferred = layer(x)
        torch.testing.assert_close(inferred, layer(x), rtol=1e-4, atol=1e-4)

    def test_another_error_is_not_hidden(self, monkeypatch) -> None:
        def fail(*args, **more):
            raise RuntimeError('an illegal memory access')

        monkeypatch.setattr(kernels(), 'content', fail)
        maps = torch.randn(3, 1, 2, 4, 3, 3).unbind()
        with timm_gsa.use_backend('triton'), pytest.raises(RuntimeError, match='illegal memory access'):
            timm_gsa.ops.content_attention(*maps)

    @pytest.mark.parametrize('operator', ['column_attention', 'content_attention', 'content_and_row_attention'])
    def test_operators_are_sound(self, operator) -> None:
        """Fakes give the strides that kernels return, also for the table of heads of 8 channels."""
        torch.use_deterministic_algorithms(False)  # opcheck compares memory that nothing was written to
        query, key, value, column = torch.randn(4, 1, 3, 4, 2, 8).permute(0, 1, 4, 5, 2, 3)
        tensors = {
            'column_attention': (query, value, torch.randn(5, 8)),
            'content_attention': (query, key, value),
            'content_and_row_attention': (query, key, value, column, torch.randn(7, 8)),
        }[operator]
        tensors = [x.detach().requires_grad_() for x in tensors]
        torch.library.opcheck(getattr(torch.ops.timm_gsa, f'triton_{operator}').default, tensors)

    def test_what_the_interpreter_cannot_multiply_is_computed_plainly(self) -> None:
        layer, x = GlobalSelfAttention(8, 3, num_heads=2).bfloat16(), torch.randn(1, 8, 3, 3, dtype=torch.bfloat16)
        with timm_gsa.use_backend('triton'), torch.no_grad():
            choices = timm_gsa.explain(torch.nn.Sequential(layer), x)['0']
        reason = "Triton's interpreter has no products of bfloat16"
        assert all(choice.form == 'torch' and choice.reasons['triton'] == reason for choice in choices[1:])
        assert [choice.operation for choice in choices[1:]] == ['column_attention', 'content_and_row_attention']

    @pytest.mark.slow
    def test_a_whole_model_trains(self) -> None:
        model = timm.create_model('gsa_resnet_tiny', num_classes=3, img_size=32)
        images = torch.randn(2, 3, 32, 32)
        results = []
        for backend in ('torch', 'triton'):
            model.zero_grad()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.reset_running_stats()
            with timm_gsa.use_backend(backend):
                model.train()
                loss = model(images).square().sum()
                loss.backward()
                model.eval()
                with torch.no_grad():
                    results.append([loss, model(images), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)
        with timm_gsa.use_backend('triton'), torch.no_grad():
            choices = timm_gsa.explain(model, images)
        assert choices['layer1.0.conv2'] == [_backend.Choice('global_self_attention', 'triton', {})]


def test_a_grid_has_one_axis_that_a_device_has() -> None:
    assert _kernels.grid_of(2 ** 31 - 1) == (2 ** 31 - 1,)
    with pytest.raises(_kernels.TooManyPrograms, match='at most 2147483647 programs, got 2147483648'):
        _kernels.grid_of(2 ** 31)


def test_more_programs_than_a_grid_has_are_computed_plainly() -> None:
    _kernels._warn_once.cache_clear()
    launch = _kernels.guarded(lambda count: ('plain', count))(lambda count: ('kernel', *_kernels.grid_of(count)))
    assert launch(7) == ('kernel', 7)
    with pytest.warns(UserWarning, match='at most 2147483647 programs'):
        assert launch(2 ** 31) == ('plain', 2 ** 31)


@pytest.mark.parametrize(('shape', 'strides', 'innermost', 'expected'), [
    ((2, 24, 5, 7), (840, 1, 168, 24), (1,), ([105, 0, 21, 3], 8, 839)),
    ((2, 24, 5, 7), (840, 35, 7, 1), (), ([840, 35, 7, 1], 1, 839)),
    ((1, 24, 5, 1), (999, 1, 20, 3), (1,), ([0, 0, 5, 0], 4, 103)),
])
def test_layouts_are_told_in_steps_of_a_common_factor(shape, strides, innermost, expected) -> None:
    x = torch.empty(2000, dtype=torch.bfloat16).as_strided(shape, strides)
    assert _kernels.layout_of(x, innermost) == expected


def test_caches_are_bounded() -> None:
    """No cache keyed by sizes grows without end."""
    for cache in (_kernels._warn_once, _kernels.why_not_proven, gpu._memory_on):
        assert cache.cache_parameters()['maxsize'] is not None


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason='needs a machine without a CUDA device')
def test_triton_without_a_device_is_an_error_that_says_why() -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: there is no CUDA device"), \
            timm_gsa.use_backend('triton'):
        pass


def test_an_unknown_backend_is_an_error_that_names_all() -> None:
    with pytest.raises(ValueError, match="one of 'auto', 'reference', 'torch', 'cpu', 'triton', got 'cuda'"), \
            timm_gsa.use_backend('cuda'):
        pass


def test_the_choice_holds_within_the_context_and_the_thread_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layer, x = torch.nn.Sequential(GlobalSelfAttention(8, 4, num_heads=2)).eval(), torch.randn(1, 8, 4, 4)

    def form() -> str:
        with torch.no_grad():
            return timm_gsa.explain(layer, x)['0'][0].form

    assert form() == 'cpu'
    with timm_gsa.use_backend('torch'):
        assert form() == 'torch'
        with timm_gsa.use_backend('reference'):
            assert form() == 'reference'
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(form).result() == 'cpu'
    assert form() == 'cpu'


def test_a_damaged_cache_is_checked_anew(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    _kernels.cache_file().parent.mkdir()
    _kernels.cache_file().write_text('{"cut')
    assert _kernels._read() == {}
    _kernels._write({'a': None})
    assert _kernels._read() == {'a': None} and len(list(_kernels.cache_file().parent.iterdir())) == 1


def test_tf32_is_read_by_either_interface(monkeypatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert _backend.allows_tf32() == allowed
    finally:
        matmul.allow_tf32 = before

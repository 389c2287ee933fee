"""The tool that measures speed and memory: what it measures, and that plain formulations give what ours give."""
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import timm_gsa.layers.san_attention as san_attention

from ..ops.triton_runs import needs_cuda, needs_triton

CPU = torch.device('cpu')


@pytest.mark.slow
def test_operations_are_measured_against_their_plain_formulations(tmp_path, capsys):
    report = tmp_path / 'report.json'
    arguments = ['operations', '--device', 'cpu', '--only', '7 x 7', '--batch-size', '1', '--rounds', '2']
    assert benchmark.main([*arguments, '--json', str(report)]) == 0
    rows = json.loads(report.read_text())['rows']
    groups = {row['group'] for row in rows}
    kinds = (
        'aggregation', 'PatchwiseAttention', 'PairwiseAttention', 'GlobalSelfAttention', 'GSA position', 'SparseMLP',
        'Gaussian')
    assert {(group.split(' 7 x 7')[0], group.split(', ')[-1]) for group in groups} == {
        (kind, way) for kind in kinds for way in ('forward', 'training')}
    for group in groups:
        first, *others = (row for row in rows if row['group'] == group)
        assert first['ratio'] == 1 and others[-1]['name'] == 'ours'
        for row in (first, *others):
            assert len(row['seconds']) == 2 and min(row['seconds']) > 0
            assert row['ratio'] == pytest.approx(first['median'] / row['median'])
            assert row['peak'] > 0
    table = capsys.readouterr().out
    assert table.count('\n| ') == len(rows) + 1
    machine = json.loads(report.read_text())['machine']
    assert machine['rounds'] == 2 and machine['small_step_us'] > 0


@pytest.mark.parametrize('what', [
    'inference', pytest.param('training', marks=pytest.mark.slow), pytest.param('scaling', marks=pytest.mark.slow)])
def test_models_are_measured_beside_a_resnet50(what, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'BASE', 'test_resnet')  # small enough to be measured in a moment
    names = ('san_tiny_patchwise', 'priorattn_resnet_tiny', 'smlpnet_mini', 'dcac_mini')
    arguments = ['--models', *names, '--batch-size', '2', '--rounds', '1',
                 '--img-size', '64', '--img-sizes', '64', '96', '--batch-sizes', '1', '2', '--device', 'cpu',
                 '--channels-last']
    assert benchmark.main([what, *arguments]) == 0
    table = capsys.readouterr().out
    if what == 'scaling':
        for group in ('64 px, batch 2', '96 px, batch 2', '64 px, batch 1'):
            assert table.count(f'inference, {group}') == 1
        assert '96 px, batch 1' not in table
    else:
        assert '| test_resnet eager |' in table and '| san_tiny_patchwise plain |' in table
    assert all(f'| {name} |' in table for name in names)


@pytest.mark.slow
def test_layers_stand_beside_convolutions_and_their_products_alone(capsys):
    assert benchmark.main(['layers', '--device', 'cpu', '--batch-size', '1', '--img-size', '64', '--rounds', '1']) == 0
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if ' ± ' in line]
    groups = [row[0] for row in rows if row[0] != '| ']
    counts = [int(group.split()[1]) for group in groups if 'forward' in group and 'all' not in group]
    assert len(counts) == 7 and sum(counts) == 16  # kinds and layers
    assert groups[-2:] == ['| all, forward', '| all, training']
    names = '3 x 3 convolution', 'ours', 'its matrix products alone'
    for half, totals in ((rows[:21], rows[-6:-3]), (rows[21:42], rows[-3:])):
        for i, (name, total) in enumerate(zip(names, totals, strict=True)):
            assert total[1] == name and all(row[1].startswith(name) for row in half[i::3])
            expected = sum(count * float(row[2].split()[0]) for count, row in zip(counts, half[i::3], strict=True))
            assert float(total[2].split()[0]) == pytest.approx(expected, abs=1)


def test_products_alone_are_counted_and_leave_the_same_result():
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    held = []
    count, products = benchmark.products_of(lambda: held.append(torch.mm(left, right)))
    expected = held[0].clone()
    held[0].zero_()
    products()
    assert count == 3 * 4 * 5 and torch.equal(held[0], expected)
    total = torch.zeros(1, 3, 5)
    count, products = benchmark.products_of(lambda: total.baddbmm_(left[None], right[None]))
    products()
    assert count == 3 * 4 * 5
    torch.testing.assert_close(total[0], 2 * expected)


def test_models_are_built_for_the_size_and_those_that_do_not_take_it_left_out(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(benchmark, 'model_run', lambda setting, model, *more: measured.append(model) or (lambda: None))
    sized = ['halonet26t', 'botnet26t_256', 'gsa_resnet_tiny']
    options = ['--base', 'test_resnet', '--device', 'cpu', '--rounds', '1', '--img-size']
    assert benchmark.main(['inference', '--models', *sized, *options, '224']) == 0
    written = capsys.readouterr()
    assert 'halonet26t is left out: it takes no images of 224 px' in written.err and 'halonet' not in written.out
    assert [len(model(torch.randn(1, 3, 224, 224))) for model in measured] == [1] * 4  # gsa_resnet_tiny plain, too
    assert benchmark.main(['inference', '--models', 'halonet26t', *options, '256']) == 0
    assert '| halonet26t |' in capsys.readouterr().out


def test_plain_formulations_give_the_same_outputs_and_are_put_back(create, ours):
    model = create(ours).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = san_attention.aggregation
    run = benchmark.inferred(model, (images,))
    torch.testing.assert_close(benchmark.plainly(run)(), run())
    with pytest.raises(ZeroDivisionError):
        benchmark.plainly(lambda: 1 / 0)()
    assert san_attention.aggregation is before


@pytest.mark.parametrize('name', ['san_tiny_patchwise', 'san_tiny_pairwise'])
def test_plain_formulations_take_no_fast_path(create, name):
    model = create(name).eval()
    with benchmark.plain(), torch.no_grad():
        choices = sum(benchmark.timm_gsa.explain(model, torch.randn(1, 3, 64, 64)).values(), [])
    assert {choice.form for choice in choices} == {'reference'}
    sums = [choice for choice in choices if choice.operation == 'aggregation']
    assert len(sums) == sum(hasattr(module, 'attention') for module in model.modules())


def test_fused_models_have_fewer_norms_and_the_first_of_a_group_keeps_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(benchmark, 'model_run', lambda setting, model, *args: seen.setdefault(
        setting.fused, []).append(sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())) or (lambda: None))
    setting = benchmark.Setting(CPU, torch.float32, False, False, 1, fused=True)
    [group] = benchmark.model_groups(setting, 1, 64, ['san_tiny_pairwise'], training=False).values()
    group()
    assert max(seen[True]) < min(seen[False])


def test_norms_are_folded_for_inference_alone(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(['training', '--fuse'])
    assert 'for inference and scaling, not training' in capsys.readouterr().err


def test_peak_counts_what_is_held_at_once():
    def run():
        first = torch.ones(1000, dtype=torch.float64)
        second = first + 1
        del first
        return second + 1

    assert 16_000 <= benchmark.peak_bytes(run, CPU) < 20_000


def test_least_bytes_of_a_stage_are_those_of_its_inputs_and_outputs():
    value, weight = (math.prod(shape) * 2 for shape in ((256, 64, 56, 56), (256, 8, 49, 56, 56)))
    assert benchmark.least_bytes(256, 64, 56, 7, 2) == {
        'forward': 2 * value + weight, 'backward': 3 * value + 2 * weight, 'training': 5 * value + 3 * weight}


def test_kernels_are_related_to_the_least_bytes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(benchmark, 'kernels_seconds', lambda run: 3e-3)
    monkeypatch.setattr(benchmark, 'bandwidth', lambda device: 1e9)
    monkeypatch.setattr(benchmark, 'peak_bytes', lambda run, device: 1)
    monkeypatch.setattr(benchmark, 'seconds', lambda run, device: 1.)
    setting = benchmark.Setting(torch.device('cuda'), torch.float32, False, False, 1)
    runs = {'other': lambda: None, 'ours': benchmark.Moving(lambda: None, 2_000_000)}
    rows = benchmark.measure('group', runs, setting, tqdm(disable=True))
    assert [row.bound for row in rows] == [None, pytest.approx(1.5)]
    first, _, other, ours = benchmark.table(rows).splitlines()
    assert first.endswith('| kernels over least bytes |')
    assert other.endswith('| 1.00 | |') and ours.endswith('| 1.00 | 1.50 |')


def test_what_does_not_fit_or_comes_too_late_is_left_out(capsys):
    def too_large():
        raise torch.OutOfMemoryError

    setting = benchmark.Setting(CPU, torch.float32, False, False, 3)
    runs = {'first': lambda: torch.ones(9), 'large': too_large, 'last': lambda: torch.ones(9)}
    rows = benchmark.measure('group', runs, setting, tqdm(disable=True))
    assert [row.name for row in rows] == ['first', 'last'] and len(rows[0].seconds) == 3
    rows = benchmark.measure('group', runs, setting, tqdm(disable=True), deadline=time.monotonic())
    assert [(row.name, len(row.seconds)) for row in rows] == [('first', 1)]
    errors = capsys.readouterr().err
    assert 'group: out of memory in large' in errors and 'group: no time left for last' in errors


def test_gradients_are_asked_for_with_a_dense_one_of_the_output():
    seen = []

    def function(x):
        y = 2 * x
        y.register_hook(lambda grad: seen.append((grad.stride(), grad.is_contiguous())))
        return y

    inputs = (torch.ones(2, 3),)
    for way in (benchmark.stepped, benchmark.backward):
        run = way(function, inputs)
        assert torch.equal(run()[0], run()[0])
    assert seen == [((3, 1), True)] * 4


def test_profile_names_what_a_training_step_spends_its_time_in(capsys):
    arguments = ['--models', 'priorattn_resnet_tiny', '--batch-size', '2', '--img-size', '64', '--device', 'cpu']
    assert benchmark.main(['profile', *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('priorattn_resnet_tiny\n') and 'convolution_backward' in printed


INTERPRETED = """
import _global_loop, torch
from timm_gsa.ops.san.reference import aggregation as aggregation_reference
torch.manual_seed(0)
for shape, groups, kernel_size in (((2, 6, 5, 4), 3, 3), ((1, 8, 4, 7), 1, 7)):
    value, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    weight = torch.randn(shape[0], groups, kernel_size ** 2, *shape[2:], requires_grad=True)
    both = []
    for function in (_global_loop.aggregation, aggregation_reference):
        out = function(value, weight, kernel_size)
        both.append((out, *torch.autograd.grad(out, (value, weight), grad)))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
print('agree')
"""


@pytest.mark.slow
@needs_triton
def test_formulation_of_the_papers_kernels_agrees_with_the_reference():
    tools = Path(benchmark.__file__).parent
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join([str(tools), *sys.path])}
    run = subprocess.run([sys.executable, '-c', INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.stdout == 'agree\n', run.stderr


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_operations_on_a_gpu(tmp_path):
    report = tmp_path / 'report.json'
    arguments = ['operations', '--only', 'aggregation 14', '--batch-size', '32', '--rounds', '2', '--channels-last']
    assert benchmark.main([*arguments, '--dtype', 'bfloat16', '--json', str(report)]) == 0
    rows = json.loads(report.read_text())['rows']
    assert {row['group'].split()[-1] for row in rows} == {'forward', 'backward', 'training'}
    for row in rows:
        assert (row['bound'] is not None) == row['name'].startswith('ours')
        assert row['bound'] is None or 0.3 < row['bound'] < 30


def test_rows_know_their_median_and_spread():
    row = benchmark.Row('group', 'name', seconds=[1., 2., 3., 4., 10.])
    assert row.median == 3 and row.spread == pytest.approx((7 - 1.5) / 2 / 3)
    assert benchmark.Row('group', 'name', seconds=[1.]).spread == 0


def test_no_group_of_that_name_is_an_error(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(['operations', '--device', 'cpu', '--only', 'nothing'])
    assert "no group has 'nothing' in its name" in capsys.readouterr().err


@pytest.mark.interop
@pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='the plot needs matplotlib')
def test_ratios_are_drawn(tmp_path):
    rows = [benchmark.Row('group', 'first', [2.]), benchmark.Row('group', 'second', [1.], ratio=2.)]
    benchmark.draw(rows, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 24)) > 10


@pytest.mark.interop
@pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='the plot needs matplotlib')
def test_growth_is_drawn(tmp_path):
    rows = [
        benchmark.Row(f'inference, {side} px, batch {batch}', name, [side ** 2 * batch * 1e-6], peak=side * batch)
        for side, batch in ((128, 1), (256, 1), (512, 1), (256, 4)) for name in ('first', 'second')]
    benchmark.draw_growth(rows, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 24)) > 10

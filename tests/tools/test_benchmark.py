"""The tool that measures speed and memory: what it measures, and that plain formulations give what ours give."""
import importlib.util
import json

import benchmark
import pytest
import torch
from PIL import Image

import timm_gsa.layers.san_attention as san_attention

CPU = torch.device('cpu')


def test_operations_are_measured_against_their_plain_formulations(tmp_path, capsys):
    report = tmp_path / 'report.json'
    arguments = ['operations', '--device', 'cpu', '--only', '7 x 7', '--batch-size', '1', '--rounds', '2']
    assert benchmark.main([*arguments, '--json', str(report)]) == 0
    rows = json.loads(report.read_text())['rows']
    groups = {row['group'] for row in rows}
    assert len(groups) == 10 and all('7 x 7' in group for group in groups)
    for group in groups:
        first, *others = (row for row in rows if row['group'] == group)
        assert first['ratio'] == 1 and others[-1]['name'] == 'ours'
        for row in (first, *others):
            assert len(row['seconds']) == 2 and min(row['seconds']) > 0
            assert row['ratio'] == pytest.approx(first['median'] / row['median'])
            assert row['peak'] > 0
    table = capsys.readouterr().out
    assert table.count('\n| ') == len(rows) + 1
    assert json.loads(report.read_text())['machine']['rounds'] == 2


@pytest.mark.parametrize('what', ['inference', 'training', 'scaling'])
def test_models_are_measured_beside_a_resnet50(what, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'BASE', 'test_resnet')  # small enough to be measured in a moment
    arguments = ['--models', 'san_tiny_patchwise', 'priorattn_resnet_tiny', '--batch-size', '2', '--rounds', '1',
                 '--img-size', '64', '--img-sizes', '64', '96', '--device', 'cpu', '--channels-last']
    assert benchmark.main([what, *arguments]) == 0
    table = capsys.readouterr().out
    if what == 'scaling':
        assert 'inference, 64 px, batch 2' in table and 'inference, 96 px, batch 2' in table
    else:
        assert '| test_resnet eager |' in table and '| san_tiny_patchwise plain |' in table
    assert '| priorattn_resnet_tiny |' in table


def test_plain_formulations_give_the_same_outputs_and_are_put_back(create, ours):
    model = create(ours).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = san_attention.aggregation
    run = benchmark.inferred(model, (images,))
    torch.testing.assert_close(benchmark.plainly(run)(), run())
    with pytest.raises(ZeroDivisionError):
        benchmark.plainly(lambda: 1 / 0)()
    assert san_attention.aggregation is before


def test_peak_counts_what_is_held_at_once():
    def run():
        first = torch.ones(1000, dtype=torch.float64)
        second = first + 1
        del first
        return second + 1

    assert 16_000 <= benchmark.peak_bytes(run, CPU) < 20_000


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

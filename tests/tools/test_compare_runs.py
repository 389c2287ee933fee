"""The tool that compares runs of train.py: what it takes from their folders, and the table and picture it makes."""
import importlib.util
import json

import compare_runs
import pytest
import timm
import yaml
from PIL import Image

RECIPE = dict(
    num_classes=10, gp=None, in_chans=None, input_size=[3, 32, 32], img_size=None, lr=0.1, epochs=3, opt='sgd')
RESNET = dict(model='gsa_resnet26', model_kwargs=dict(stem_type='small', attn_stages=[]))
TINY = dict(model='gsa_resnet_tiny', model_kwargs={})


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run, as train.py leaves it."""
    def make(name, top1, log=None, **args):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(yaml.safe_dump({**RECIPE, 'seed': 0, 'output': str(tmp_path), **args}))
        lines = ['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr']
        lines += [f'{epoch},1.5,1.4,{value},90.0,0.1' for epoch, value in enumerate(top1)]
        (folder / 'summary.csv').write_text('\r\n'.join(lines) + '\r\n')
        if log:
            (folder / 'train.log').write_text(log)
        return folder
    return make


def log_of(rates):
    return '\n'.join(
        f'Train: 2 [{number: 4}/9 ( 10%)]  Loss: 1.32 (1.19)  Time: 0.294s,  {rate:.2f}/s  (1.559s,   41.04/s)  LR: 0.1'
        for number, rate in enumerate(rates)
    )


def rows_of(output):
    lines = [line for line in output.splitlines() if line.startswith('| ')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_runs_of_one_network_are_one_row_with_mean_and_spread(run, tmp_path, capsys):
    folders = [
        run('resnet26-seed0', [10, 20, 50], seed=0, **RESNET),
        run('tiny-seed0', [10, 20, 61.5], seed=0, **TINY),
        run('resnet26-seed1', [10, 20, 54], seed=1, **RESNET),
        run('resnet26-seed2', [10, 60, 52], seed=2, **RESNET),
    ]
    report = tmp_path / 'figures.json'
    assert compare_runs.main([*map(str, folders), '--json', str(report)]) == 0
    output = capsys.readouterr().out
    resnet = timm.create_model('gsa_resnet26', num_classes=10, device='meta', **RESNET['model_kwargs'])
    parameters = sum(parameter.numel() for parameter in resnet.parameters())
    first, second = rows_of(output)
    # the last epoch counts, not the best one
    assert first[:2] == ['resnet26', f'{parameters:,}']
    assert first[3:] == ['52.00 ± 2.00', '50.00 to 54.00', '3', '3', '']
    assert second[0] == 'tiny' and second[3:] == ['61.50', '', '1', '3', '']
    assert 'runs differ' not in output and 'same number' not in output
    groups = json.loads(report.read_text())
    assert [group['name'] for group in groups] == ['resnet26', 'tiny']
    assert groups[0]['deviation'] == pytest.approx(2.) and groups[1]['deviation'] is None
    assert [each['seed'] for each in groups[0]['runs']] == [0, 1, 2]
    assert groups[0]['runs'][2]['curve'] == {'0': 10., '1': 60., '2': 52.}


@pytest.mark.interop
@pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='the picture needs matplotlib')
def test_curves_are_drawn(run, tmp_path):
    folders = [
        run('a-seed0', [10, 20], **RESNET), run('a-seed1', [15, 25], seed=1, **RESNET), run('b-seed0', [3], **TINY)]
    picture = tmp_path / 'curves.png'
    assert compare_runs.main([*map(str, folders), '--plot', str(picture)]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 600 and len(drawn.getcolors(1 << 24)) > 10


def test_multiply_adds_are_those_of_the_size_trained_at(run, capsys):
    found = []
    for size in (32, 64):
        compare_runs.main([str(run(f'a{size}', [1], **dict(RESNET, input_size=[3, size, size])))])
        found.append(float(rows_of(capsys.readouterr().out)[0][2].split()[0]))
        compare_runs.main([str(run(f'b{size}', [1], **dict(RESNET, input_size=None, img_size=size)))])
        assert float(rows_of(capsys.readouterr().out)[0][2].split()[0]) == found[-1]
    # ResNet-26 at 224 px without stem and classifier, for maps of 32 px and twice that; M and G
    body = (2_342_256_640 - 118_013_952 - 2_048_000) * (32 / 56) ** 2 / 1e6
    assert found == pytest.approx([body + 1.8, (body + 1.8) * 4 / 1000], rel=0.002)


def test_rates_are_medians_over_steps(run, capsys):
    folders = [
        run('x-seed0', [1, 2, 3], log=log_of([9, 1000, 1200]), seed=0, **TINY),
        run('x-seed1', [1, 2, 3], log=log_of([9, 3000, 3200]), seed=1, **TINY),
    ]
    compare_runs.main(list(map(str, folders)))
    assert rows_of(capsys.readouterr().out)[0][-1] == '2,000'


def test_a_resumed_run_is_read_once(run, capsys):
    folder = run('x', [10, 20, 30], **TINY)
    with (folder / 'summary.csv').open('a') as file:  # killed after the third epoch, resumed from the second
        file.write('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n2,1,1,31,90,0.1\n3,1,1,35,90,0.1\n')
    compare_runs.main([str(folder)])
    assert compare_runs.curve_of(compare_runs.Run.of(folder)) == {0: 10., 1: 20., 2: 31., 3: 35.}
    assert rows_of(capsys.readouterr().out)[0][3:7] == ['35.00', '', '1', '4']


def test_runs_without_telling_names_are_called_by_model_and_arguments(run, capsys):
    compare_runs.main([str(run('20260101-gsa', [1], **RESNET)), str(run('20260102-gsa', [2], seed=1, **RESNET))])
    assert rows_of(capsys.readouterr().out)[0][0] == 'gsa_resnet26 attn_stages=[] stem_type=small'


def test_what_else_differs_is_said(run, capsys):
    compare_runs.main([
        str(run('a-seed0', [1, 2], lr=0.1, workers=2, **TINY)), str(run('b-seed0', [1], lr=0.2, workers=4, **RESNET))])
    output = capsys.readouterr().out
    assert 'The runs differ in `lr`: 0.1, 0.2.' in output and 'workers' not in output
    assert 'The runs do not have the same number of epochs.' in output


def test_mistakes_are_named(run, tmp_path, capsys):
    whole, broken = run('whole', [1], **TINY), run('broken', [1], model='no_such_model')
    empty = run('empty', [], seed=1, **TINY)
    twice = run('twice', [1], **TINY)
    (tmp_path / 'nothing').mkdir()
    for folders, message in (
        ([tmp_path / 'nothing'], 'is no output folder of train.py: it holds no args.yaml'),
        ([empty], 'holds no epoch with eval_top1'),
        ([broken], 'no_such_model'),
        ([whole, twice], r'must differ in their seeds, got [0, 0]'),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare_runs.main(list(map(str, folders)))
        assert stopped.value.code == 2 and message in capsys.readouterr().err

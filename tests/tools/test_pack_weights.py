"""Packing a checkpoint of timm's train.py: what is kept of it, what is measured and recorded."""
import json

import pack_weights
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Folder that takes the place of the package's."""
    (tmp_path / 'weights').mkdir()
    monkeypatch.setattr(pack_weights, 'WEIGHTS', tmp_path / 'weights')
    return tmp_path / 'weights'


@pytest.fixture
def images(tmp_path):
    """A data set of three classes with two images each, as a folder."""
    for label in 'abc':
        (tmp_path / 'data' / 'val' / label).mkdir(parents=True)
        for number in range(2):
            Image.new('RGB', (64, 64), (40 * number, 90, 10)).save(tmp_path / 'data' / 'val' / label / f'{number}.png')
    return tmp_path / 'data'


def test_packed_file_holds_matrices_in_half_precision_and_all_else_as_it_is(tmp_path):
    state = timm.create_model('gsa_resnet_tiny').state_dict()
    pack_weights.pack(state, tmp_path / 'x.safetensors')
    packed = load_file(tmp_path / 'x.safetensors')
    assert packed.keys() == state.keys()
    for key, tensor in state.items():
        kept = tensor.half() if tensor.ndim > 1 else tensor
        assert packed[key].dtype == kept.dtype and torch.equal(packed[key], kept), key
    assert [path.name for path in tmp_path.glob('*x.safetensors*')] == ['x.safetensors']


def test_curve_counts_the_epochs_of_all_stages(tmp_path):
    head = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
    (tmp_path / 'first.csv').write_text(f'{head}0,4.5,4.25,10.0,30.0,0.001\n2,3.5,3.25,23.456,49.0,0.0\n')
    (tmp_path / 'second.csv').write_text(f'{head}1,3.0,2.75,30.0,57.0,0.0003109916\n')
    points = pack_weights.curve([tmp_path / 'first.csv', tmp_path / 'second.csv'])
    assert [point['epoch'] for point in points] == [1, 3, 5]
    assert points[1] == dict(epoch=3, lr=0., train_loss=3.5, eval_loss=3.25, eval_top1=23.46, eval_top5=49.)
    assert points[2]['lr'] == 0.000311


def test_baseline_is_measured_and_recorded_without_its_weights(weights, images, tmp_path, capsys):
    arguments = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8)
    model = timm.create_model('resnet26', num_classes=100, **arguments)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(100) == 1)  # always the second class
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'best.pth.tar')
    (weights / 'c100.json').write_text('{"recipe": {}, "models": {"other": {}}}')
    pack_weights.main([
        str(tmp_path / 'best.pth.tar'), 'gsa_resnet_tiny.c100', '--data-dir', str(images), '--split', 'val',
        '--note', 'cut off', '--baseline', 'resnet26',
        '--model-kwargs', *(f'{key}={value}'.replace(' ', '') for key, value in arguments.items()),
    ])
    assert [path.name for path in weights.iterdir()] == ['c100.json']
    results = json.loads((weights / 'c100.json').read_text())
    assert list(results) == ['recipe', 'models'] and list(results['models']) == ['other', 'baseline']
    baseline = results['models']['baseline']
    assert (baseline['images'], baseline['top1']) == (6, 33.33)
    assert (baseline['model'], baseline['note']) == ('resnet26', 'cut off')
    assert baseline['parameters'] == sum(p.numel() for p in model.parameters())
    assert json.loads(capsys.readouterr().out) == {'baseline': baseline}

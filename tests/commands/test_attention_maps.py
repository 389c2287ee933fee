"""Figures of attention and of learned positions. They need the extra `interpret`."""
import argparse
import copy
import importlib.util
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from timm_gsa.commands import _inputs, main
from timm_gsa.commands._figure import RELEVANCE, SHARE, WEIGHT, draw_panel, panels, relevance_panel, rollout_panel
from timm_gsa.commands._inputs import PHOTOS, Classifier, read_image
from timm_gsa.layers import GlobalSelfAttention

from ..versions import reads_local_dir

ROCKET = PHOTOS / 'rocket.jpg'

figures = [
    pytest.mark.interop,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ('matplotlib', 'pytorch_grad_cam')),
        reason='figures need matplotlib and pytorch-grad-cam'),
]


def with_figures(test):
    for mark in figures:
        test = mark(test)
    return test


@pytest.fixture(scope='module')
def classifiers():
    return {name: Classifier(name) for name in (
        'gsa_resnet_tiny', 'san_tiny_pairwise', 'san_tiny_patchwise', 'priorattn_resnet_tiny')}


@pytest.fixture
def checkpoint(tmp_path):
    """A file as timm's train.py leaves it, of a model with three classes, and the folder it was trained on."""
    torch.manual_seed(0)
    model = timm.create_model('priorattn_resnet_tiny', num_classes=3).eval()
    path = tmp_path / 'model_best.pth.tar'
    torch.save(dict(epoch=1, state_dict=model.state_dict(), args=argparse.Namespace(lr=0.1)), path)
    for name in ('cat_10', 'cat_9', 'dog'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / name / 'photo.png')
    return model, path, tmp_path / 'train'


def test_own_checkpoint_is_used_with_the_classes_of_its_folder(checkpoint):
    model, path, folder = checkpoint
    classifier = Classifier('priorattn_resnet_tiny', path, folder)
    photo = read_image(ROCKET)
    with torch.no_grad():
        expected = model(classifier.transform(photo)[None]).softmax(-1)[0]
    predictions = classifier.predict(photo, 3)
    assert classifier.class_names == ['cat 9', 'cat 10', 'dog']  # in timm's order
    assert {p.name: p.probability for p in predictions} == pytest.approx(
        dict(zip(classifier.class_names, expected.tolist(), strict=True)))


def test_class_names_come_from_a_text_file_too(checkpoint, tmp_path):
    (tmp_path / 'names.txt').write_text('a\n\nb_c\n d \n')
    assert Classifier('priorattn_resnet_tiny', checkpoint[1], tmp_path / 'names.txt').class_names == ['a', 'b c', 'd']


class Evil:
    def __reduce__(self):
        return exec, ('raise SystemError("executed")',)


@pytest.mark.parametrize('content, message', [
    (b'', 'not one that can be loaded safely'),
    (b'not a checkpoint', 'not one that can be loaded safely'),
    (dict(state_dict={}, args=Evil()), 'not one that can be loaded safely'),
    (dict(state_dict={'fc.weight': torch.zeros(3, 128)}), 'does not fit the model'),
    (None, 'does not exist'),
])
def test_checkpoints_that_are_none_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / 'model.pth.tar'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as stop:
        main(['classify', str(ROCKET), '--model', 'gsa_resnet_tiny', '--checkpoint', str(path), '--save-dir', 'out'])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_folder_without_classes_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['classify', str(ROCKET), '--classes', str(tmp_path)])
    assert f'found none in {tmp_path}' in capsys.readouterr().err


@pytest.mark.parametrize('size', [(640, 480), (300, 700), (500, 500)])
@pytest.mark.parametrize('crop_mode', ['center', 'squash'])
def test_view_is_what_the_model_sees_and_pixels_are_found_in_it(size, crop_mode, tmp_path, monkeypatch):
    model = timm.create_model('test_resnet')  # 160 px, of which its transform crops a part
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    resolve = _inputs.resolve_model_data_config
    monkeypatch.setattr(
        _inputs, 'resolve_model_data_config', lambda *a, **k: {**resolve(*a, **k), 'crop_mode': crop_mode})
    classifier = Classifier('test_resnet', tmp_path / 'model.pth')
    centre = np.array(size) // 2 + [60, -45]
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[centre[1] - 6:centre[1] + 7, centre[0] - 6:centre[0] + 7] = 255
    photo = Image.fromarray(pixels)
    view = np.asarray(classifier.view(photo)).mean(-1)
    assert view.shape == (3 * 160, 3 * 160) and classifier.view_scale == 3
    found = [(view.sum(axis) * (np.arange(480) + 0.5)).sum() / view.sum() for axis in (0, 1)]
    assert classifier.locate(photo, tuple(centre)) == pytest.approx(found, abs=3)
    seen = classifier.transform(photo).mean(0).numpy()
    bright = np.unravel_index(seen.argmax(), seen.shape)
    assert bright == pytest.approx((found[1] / 3, found[0] / 3), abs=3 + 6 * 160 / min(size))
    with pytest.raises(ValueError, match='point must lie in what the model sees'):
        classifier.locate(photo, (-1 if crop_mode == 'squash' else 0, size[1] + 1))


@reads_local_dir
def test_maps_have_the_size_of_the_architecture_under_any_name(tmp_path):
    save_for_hf(timm.create_model('gsa_resnet50', pretrained=True), tmp_path, safe_serialization=True)
    for name in ('gsa_resnet50', 'gsa_resnet50.tin200', f'local-dir:{tmp_path}'):
        assert [Classifier(name, for_maps=maps).input_size for maps in (True, False)] == [(3, 96, 96), (3, 64, 64)]
    assert Classifier('gsa_resnet50', img_size=48, for_maps=True).input_size == (3, 48, 48)


@with_figures
def test_panels_hold_the_weights_of_the_last_layer_of_each_stage(classifiers):
    photo = read_image(ROCKET)
    titles = {
        name: [(panel.title, panel.kind, panel.weight.shape, panel.unit) for panel in panels(classifier, photo)]
        for name, classifier in classifiers.items()}
    assert titles['san_tiny_patchwise'] == [
        ('conv1.block0.attn', 'weight', (32, 32), WEIGHT), ('layer1.block0.attn', 'weight', (16, 16), WEIGHT),
        ('layer2.block1.attn', 'weight', (8, 8), WEIGHT), ('layer3.block0.attn', 'weight', (4, 4), WEIGHT),
        ('layer4.block0.attn', 'weight', (2, 2), WEIGHT)]
    assert titles['san_tiny_pairwise'] == [(*panel[:3], SHARE) for panel in titles['san_tiny_patchwise']]
    assert titles['priorattn_resnet_tiny'] == [
        (f'layer{stage}.0.conv2', 'weight', (size, size), SHARE) for stage, size in ((2, 8), (3, 4), (4, 2))]
    assert titles['gsa_resnet_tiny'] == [
        (f'layer{stage}.0.conv2 {kind}', kind, (size, size), WEIGHT)
        for stage, size in ((1, 16), (2, 16), (3, 8), (4, 4)) for kind in ('content', 'position')]
    for name in ('san_tiny_pairwise', 'priorattn_resnet_tiny'):
        for panel in panels(classifiers[name], photo, (10., 400.)):
            assert panel.weight.sum() == pytest.approx(100, abs=1e-3)
    assert [p.title for p in panels(classifiers['san_tiny_pairwise'], photo, layers=['layer2'])] == [
        'layer2.block0.attn', 'layer2.block1.attn']


@with_figures
def test_weight_of_a_gaussian_lies_where_the_ring_is(classifiers):
    classifier, photo = classifiers['priorattn_resnet_tiny'], read_image(ROCKET)
    panel = panels(classifier, photo, (400., 60.))[0]
    assert np.unravel_index(panel.weight.argmax(), panel.weight.shape) == (1, 7)  # of 8 x 8 over 448 px
    view = classifier.view(photo)
    plain, marked = (draw_panel(view, panel, point, 320) for point in (None, (400., 60.)))
    assert plain.height == 320
    changed = np.argwhere((np.asarray(plain) != np.asarray(marked)).any(-1))
    across = changed.mean(0)[1] / plain.width
    assert len(changed) and 0.75 < across < 0.95 and changed.mean(0)[0] < 160


@with_figures
def test_rollout_and_relevance_cover_every_family(classifiers):
    photo = read_image(ROCKET)
    for name, classifier in classifiers.items():
        rollout = rollout_panel(classifier, photo, (200., 200.))
        assert (rollout is None) == (name == 'priorattn_resnet_tiny')
        if rollout is not None:
            assert rollout.weight.sum() == pytest.approx(100, abs=1e-2) and not rollout.signed
        relevance = relevance_panel(classifier, photo, 'rocket')
        assert relevance.title == 'relevance for rocket' and relevance.unit == RELEVANCE
        assert relevance.weight.shape == (64, 64) and relevance.weight.max() - relevance.weight.min() > 20
        assert all(p.grad is None for p in classifier.model.parameters())


@with_figures
@pytest.mark.parametrize(('stage', 'length'), [('layer3', 4), ('layer4', 2)])
def test_rollout_of_another_model_with_our_layers_is_drawn_where_it_has_one(classifiers, stage, length):
    classifier = copy.copy(classifiers['gsa_resnet_tiny'])
    classifier.model = timm.create_model('resnet18', num_classes=10).eval()
    block = classifier.model.get_submodule(f'{stage}.1')
    block.conv2 = GlobalSelfAttention(block.conv2.in_channels, feat_size=(length, length))
    block.eval()
    rollout = rollout_panel(classifier, read_image(ROCKET), (200., 200.))
    if stage == 'layer3':  # layer4 convolves behind it
        assert rollout is None
    else:
        assert rollout.weight.sum() == pytest.approx(100, abs=1e-2)


@with_figures
def test_command_draws_models_below_one_another_with_a_row_for_each_place_and_kind(tmp_path, capsys):
    sizes = {}
    for key, arguments in dict(
            gsa=['--model', 'gsa_resnet_tiny'],
            both=['--model', 'gsa_resnet_tiny', 'priorattn_resnet_tiny'],
            two=['--model', 'priorattn_resnet_tiny', '--point', '100', '100', '--point', '200', '20'],
            layer=['--model', 'san_tiny_pairwise', '--layers', 'layer2'],
    ).items():
        out = tmp_path / 'new' / f'{key}.png'
        assert main(['attention-maps', str(ROCKET), *arguments, '--out', str(out)]) == 0
        assert capsys.readouterr().out == f'{out}\n'
        with Image.open(out) as picture:
            sizes[key] = picture.size
            assert len(picture.getcolors(1 << 24)) > 1000
    line, cell = sizes['gsa'][1] / 2, sizes['gsa'][0] / 7  # content and position; photo, 4 stages, rollout, relevance
    assert sizes['both'] == pytest.approx((7 * cell, 3 * line), abs=3)
    assert sizes['two'] == pytest.approx((5 * cell, 2 * line), abs=3)  # photo, 3 stages, relevance
    assert sizes['layer'] == pytest.approx((5 * cell, line), abs=3)  # photo, 2 layers, rollout, relevance
    assert len(list((tmp_path / 'new').iterdir())) == 4


@with_figures
@pytest.mark.parametrize('arguments, message', [
    (['--point', '1', '5000'], 'the middle 214 x 214 pixels of 320 x 214, got 1 5000'),
    (['--layers', 'layer9'], "got 'layer9'"),
    (['--model', 'resnet18', '--checkpoint', 'x'], 'checkpoint x does not exist'),
    (['--model', 'gsa_resnet_tiny', 'resnet18', '--checkpoint', 'x'], 'belongs to one model, got 2'),
    (['--model', 'gsa_resnet26'], 'No pretrained weights'),
    (['--img-size', '0'], 'at least 1'),
])
def test_command_refuses_what_it_cannot_draw(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(['attention-maps', str(ROCKET), *arguments, '--out', str(tmp_path / 'out' / 'figure.png')])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@with_figures
def test_tables_and_radii_are_drawn_for_the_models_that_learn_them(tmp_path, capsys):
    for name in ('gsa_resnet_tiny', 'priorattn_resnet_tiny'):
        assert main(['positions', '--model', name, '--out', str(tmp_path / f'{name}.png')]) == 0
        with Image.open(tmp_path / f'{name}.png') as picture:
            assert min(picture.size) > 400 and len(picture.getcolors(1 << 24)) > 50
    with pytest.raises(SystemExit):
        main(['positions', '--model', 'san_tiny_pairwise', '--out', str(tmp_path / 'none.png')])
    assert '--model must have tables of relative positions or radii, san_tiny_pairwise' in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


@with_figures
def test_classify_draws_where_it_looked(tmp_path):
    widths = []
    for arguments in ([], ['--where']):
        assert main(['classify', str(ROCKET), '--save-dir', str(tmp_path), *arguments]) == 0
        with Image.open(tmp_path / 'rocket.png') as picture:
            widths.append(picture.width)
    assert widths[1] > widths[0] + 200


def test_missing_libraries_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    for arguments in (
            ['classify', str(ROCKET), '--where', '--save-dir', str(tmp_path / 'out')],
            ['attention-maps', str(ROCKET), '--out', str(tmp_path / 'out.png')],
            ['positions', '--out', str(tmp_path / 'out.png')],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert 'needs matplotlib' in error and 'pip install "timm-gsa[interpret]"' in error
    assert not list(tmp_path.iterdir())

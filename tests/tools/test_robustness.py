"""The tool that turns and attacks images: the attack stays where it has to and does what it should."""
import importlib.util
import json
import re

import numpy as np
import pytest
import robustness
import timm
import torch
import yaml
from PIL import Image
from robustness import TURNS, Attack, OnPixels, other_classes, probe
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.1, 0.4)


@pytest.fixture
def model():
    """A small network on pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, 5),
    )
    return OnPixels(network, MEAN, STD).eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(6, 3, 8, 8).mul(1.6).sub(0.3).clamp(0, 1)  # some pixels are black, some white


def attacked(attack, model, images, classes, steps):
    found = attack.start(images, torch.Generator().manual_seed(0))
    for _ in range(steps):
        found = attack.step(model, found, images, classes)
    return found


@pytest.mark.parametrize('epsilon, step_size', [(8., 2.), (1., 4.), (0.5, 0.1)])
@pytest.mark.parametrize('targeted', [True, False])
def test_attacked_pixels_stay_within_epsilon_and_between_black_and_white(model, images, epsilon, step_size, targeted):
    attack = Attack(epsilon, step_size, targeted)
    for steps in (0, 1, 7):
        found = attacked(attack, model, images, torch.arange(6) % 5, steps)
        change = (found - images).abs()
        assert change.max() <= epsilon / 255 + 1e-6 and found.min() >= 0 and found.max() <= 1
        assert change.max() > 0.9 * epsilon / 255  # it is in pixels of 0 to 1, not of what the network sees


def test_an_untargeted_attack_raises_the_loss_and_a_targeted_one_lowers_that_of_its_target(model, images):
    classes = torch.arange(6) % 5
    start = F.cross_entropy(model(images), classes, reduction='none')
    for targeted, better in ((False, torch.gt), (True, torch.lt)):
        after = [
            F.cross_entropy(model(attacked(Attack(8., 2., targeted), model, images, classes, steps)), classes,
                            reduction='none')
            for steps in (1, 4, 12)
        ]
        assert better(after[1], start).all() and better(after[2], start).all()
        assert better(after[1].mean(), after[0].mean()) and better(after[2].mean(), after[1].mean())


def test_a_step_follows_the_gradient_with_respect_to_pixels():
    """Logits whose gradient changes its sign at the mean: only through the normalisation can it be right."""
    class Square(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.stack([x.square().mean((1, 2, 3)), torch.zeros(len(x))], -1)

    seen = []
    images = torch.rand(2, 3, 4, 4) * 0.6 + 0.2
    mean = torch.tensor(MEAN).view(3, 1, 1)
    labels = torch.zeros(2, dtype=torch.long)
    found = Attack(8., 2., targeted=True).step(OnPixels(Square(), MEAN, STD), images, images, labels)
    torch.testing.assert_close(seen[0], (images - mean) / torch.tensor(STD).view(3, 1, 1))
    torch.testing.assert_close(found, images + 2 / 255 * (images - mean).sign())
    away = Attack(8., 2., targeted=False).step(OnPixels(Square(), MEAN, STD), images, images, labels)
    torch.testing.assert_close(away, images - 2 / 255 * (images - mean).sign())


def test_no_image_of_a_batch_depends_on_the_others(model, images):
    classes = torch.arange(6) % 5
    together = Attack().step(model, images, images, classes)
    alone = torch.cat([Attack().step(model, x[None], x[None], c[None]) for x, c in zip(images, classes, strict=True)])
    assert torch.equal(together, alone)


def test_parameters_collect_no_gradients(model, images):
    Attack().step(model, images, images, torch.zeros(6, dtype=torch.long))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_targets_are_all_other_classes_and_never_the_right_one():
    labels = torch.arange(4).repeat(200)
    targets = other_classes(labels, 4, torch.Generator().manual_seed(0))
    assert {(int(a), int(b)) for a, b in zip(labels, targets, strict=True)} == {
        (a, b) for a in range(4) for b in range(4) if a != b}


def test_turns_are_what_they_are_called():
    image = torch.tensor([[1., 2.], [3., 4.]]).expand(1, 3, 2, 2)
    turned = {name: turn(image)[0, 0].tolist() for name, turn in TURNS.items()}
    assert turned == {
        'clean': [[1, 2], [3, 4]],
        '90 degrees': [[2, 4], [1, 3]],  # anticlockwise
        '180 degrees': [[4, 3], [2, 1]],
        '270 degrees': [[3, 1], [4, 2]],
        'upside down': [[3, 4], [1, 2]],
    }


def test_accuracy_is_counted_for_each_condition():
    """A model that sees in which corner the light is, and images with it in the corner of their class."""
    class Corner(nn.Module):
        def forward(self, x):
            return 10 * torch.stack([x[:, 0, 0, 0], x[:, 0, 0, -1], x[:, 0, -1, 0], x[:, 0, -1, -1]], -1)

    images = torch.full((4, 3, 4, 4), 0.25)
    for label, (row, column) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        images[label, :, row, column] = 0.75
    batches = [(images[:3], torch.tensor([0, 1, 2])), (images[3:], torch.tensor([0]))]  # the last label is wrong
    model = OnPixels(Corner(), (0., 0., 0.), (1., 1., 1.))
    result = probe(model, batches, Attack(8.), [2, 1], 4)
    assert result.pop('target hit, 2 steps') in (0., 25.)  # the image with the wrong label may have its corner for one
    assert result == {
        'clean': 75., '90 degrees': 0., '180 degrees': 25., '270 degrees': 0., 'upside down': 0.,
        'PGD, 1 steps': 75., 'PGD, 2 steps': 75.}
    strong = probe(model, batches, Attack(255., 255.), [1], 4)
    assert strong['PGD, 1 steps'] == 0. and strong['target hit, 1 steps'] == 100.
    with pytest.raises(ValueError, match='a class 2, the model has 2 classes'):
        probe(model, batches, Attack(), [1], 2)


def test_runs_with_different_seeds_are_one_row():
    table = robustness.table({
        'a-seed0': {'clean': 40., '90 degrees': 10.}, 'b': {'clean': 1., '90 degrees': 2.},
        'a-seed1': {'clean': 44., '90 degrees': 11.},
    })
    assert table.splitlines()[2:] == ['| a | 2 | 42.0 | 10.5 |', '| b | 1 | 1.0 | 2.0 |']


@pytest.mark.interop
@pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='the picture needs matplotlib')
def test_accuracies_are_drawn(tmp_path):
    conditions = dict.fromkeys([*TURNS, 'PGD, 2 steps', 'target hit, 2 steps'], 40.)
    robustness.draw({'one': conditions, 'two': {**conditions, 'clean': 80.}}, tmp_path / 'picture.png')
    with Image.open(tmp_path / 'picture.png') as drawn:
        assert drawn.width > 600 and len(drawn.getcolors(1 << 24)) > 10


# The command line


@pytest.fixture
def data(tmp_path):
    """Four images for each of three classes."""
    torch.manual_seed(2)
    for label in 'abc':
        (tmp_path / 'data' / 'val' / label).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / 'data' / 'val' / label / f'{number}.png')
    return tmp_path / 'data'


def test_a_run_of_train_is_probed_as_its_arguments_say(data, tmp_path, capsys):
    torch.manual_seed(3)
    kwargs = dict(layers=[1, 1, 1, 1], channels=[16, 16, 16, 16], stem_type='small', attn_stages=[])
    network = timm.create_model('gsa_resnet26', num_classes=3, **kwargs)
    run = tmp_path / 'runs' / 'twin-seed0'
    run.mkdir(parents=True)
    torch.save({'state_dict': network.state_dict()}, run / 'last.pth.tar')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(
        model='gsa_resnet26', model_kwargs=kwargs, num_classes=3, gp=None, input_size=[3, 32, 32], img_size=None,
        mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5], interpolation='bilinear', crop_pct=1.0)))
    report = tmp_path / 'report.json'
    assert robustness.main([
        '--data-dir', str(data), '--split', 'val', '--checkpoint', str(run / 'last.pth.tar'), '--num-samples', '6',
        '--batch-size', '4', '--steps', '1', '--device', 'cpu', '--json', str(report),
        '--untargeted',
    ]) == 0
    found = json.loads(report.read_text())
    assert found['images'] == 6 and list(found['top1']) == ['twin-seed0']
    assert list(found['top1']['twin-seed0']) == [*TURNS, 'PGD, 1 steps']
    assert found['attack'] == dict(epsilon=8., step_size=2., targeted=False)
    # two images of each class, as timm's own pipeline would show them to the network
    images = torch.stack([
        torch.from_numpy(np.array(Image.open(data / 'val' / label / f'{number}.png'))).permute(2, 0, 1) / 255
        for label in 'abc' for number in (0, 2)
    ])
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), 0.5
    with torch.no_grad():
        hits = network.eval()((images - mean) / std).argmax(-1) == torch.tensor([0, 0, 1, 1, 2, 2])
    assert found['top1']['twin-seed0']['clean'] == pytest.approx(100 * hits.float().mean().item())
    assert '| twin | 1 |' in capsys.readouterr().out


def test_networks_without_attention_stand_beside_those_with_it(data, tmp_path, capsys):
    paths = []
    for name in ('smlpnet_mini', 'dcac_mini', 'gsa_resnet_tiny'):
        run = tmp_path / 'runs' / f'{name}-seed0'
        run.mkdir(parents=True)
        paths.append(run / 'last.pth.tar')
        torch.save({'state_dict': timm.create_model(name, num_classes=3).state_dict()}, paths[-1])
        (run / 'args.yaml').write_text(yaml.safe_dump(dict(
            model=name, model_kwargs={}, num_classes=3, gp=None, input_size=[3, 64, 64], img_size=None,
            mean=[0.5, 0.5, 0.5], std=[0.3, 0.3, 0.3], interpolation='bilinear', crop_pct=1.0)))
    assert robustness.main([
        '--data-dir', str(data), '--split', 'val', '--checkpoint', *map(str, paths), '--num-samples', '3',
        '--steps', '1', '--device', 'cpu']) == 0
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if ' | 1 | ' in line]
    assert [row[0] for row in rows] == ['| smlpnet_mini', '| dcac_mini', '| gsa_resnet_tiny']
    assert {len(row) for row in rows} == {2 + len(TURNS) + 2}


def test_a_pretrained_model_is_probed_and_the_result_repeats(data, capsys):
    arguments = ['--data-dir', str(data), '--split', 'val', '--model', 'san_tiny_patchwise', '--num-samples', '3',
                 '--steps', '2', '--device', 'cpu']
    assert robustness.main(arguments) == 0
    table = capsys.readouterr().out
    assert '| san_tiny_patchwise | 1 |' in table and 'target hit, 2 steps' in table
    assert robustness.main(arguments) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'gsa_resnet26'], 'No pretrained weights are published for gsa_resnet26'),
    (['--checkpoint', 'nowhere/last.pth.tar'], 'nowhere is no output folder of train.py: it holds no args.yaml'),
    (['--epsilon', '0'], r'argument --epsilon: must be in \(0, 255\], got 0'),
])
def test_mistakes_are_named(data, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        robustness.main(['--data-dir', str(data), '--split', 'val', '--device', 'cpu', *arguments])
    assert stopped.value.code == 2

    assert re.search(message, capsys.readouterr().err)

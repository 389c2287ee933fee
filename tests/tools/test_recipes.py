"""The training recipes: that timm's train.py takes every value, and that they are what their sources say.

What needs the real argument parser takes train.py from $TIMM_REPO.
"""
import importlib.util
import math
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from run_comparison import Plan
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs

from timm_gsa.commands._cost import parameters_and_multiply_adds
from timm_gsa.models._families import FAMILIES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'hub_configs' / 'recipes'
RECIPES = {path.stem: path for path in sorted(FOLDER.glob('*.yaml'))}
PLANS = sorted((FOLDER / 'comparisons').glob('*.yaml'))
TIMM_REPO = os.environ.get('TIMM_REPO')

FOR_ALL = {'c100_tiny', 'finetune', 'imagenette_tiny', 'tin200'}  # recipes that are the same for all families
IMAGES = {'in1k': 1_281_167, 'c100': 50_000}
TFLOPS = 50  # sustained, by the assumption of the README

# Settings of train.py that recipes may have, with their types; a missspelt one would be taken without a word.
SETTINGS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(('model', 'train_split', 'val_split', 'opt', 'sched', 'interpolation', 'train_interpolation',
                     'amp_dtype', 'torchcompile', 'lr_base_scale', 'eval_metric', 'dist_bn', 'device',
                     'train_size_schedule', 'aa', 'remode'), str),
    **dict.fromkeys(('num_classes', 'epochs', 'batch_size', 'validation_batch_size', 'lr_base_size', 'workers',
                     'warmup_epochs', 'checkpoint_hist', 'lr_cycle_limit', 'val_interval', 'seed',
                     'train_batches_per_epoch', 'aug_repeats', 'recount'), int),
    **dict.fromkeys(('lr', 'lr_base', 'momentum', 'weight_decay', 'clip_grad', 'warmup_lr', 'min_lr', 'smoothing',
                     'hflip', 'color_jitter', 'crop_pct', 'mixup', 'lr_cycle_mul', 'lr_cycle_decay', 'cutmix',
                     'mixup_switch_prob', 'reprob', 'model_ema_decay'), (int, float)),
    **dict.fromkeys(('amp', 'channels_last', 'pin_mem', 'sched_on_updates', 'warmup_prefix', 'pretrained',
                     'use_multi_epochs_loader', 'model_ema', 'model_ema_force_cpu'), bool),
    **dict.fromkeys(('input_size', 'mean', 'std', 'scale', 'ratio', 'train_img_sizes'), list),
    **dict.fromkeys(('model_kwargs', 'opt_kwargs'), dict),
}
MACHINE = ('train_split', 'val_split', 'pin_mem', 'workers', 'checkpoint_hist')  # nobody's claim


def read(name):
    return yaml.safe_load(RECIPES[name].read_text())


def create(recipe, **kwargs):
    given = dict(num_classes=recipe.get('num_classes'), **recipe.get('model_kwargs', {}), **kwargs)
    return timm.create_model(recipe['model'], **given)


@pytest.fixture(params=RECIPES)
def name(request):
    return request.param


def test_there_is_a_recipe_for_each_family_and_data_set():
    """Of the families that run on 32 px, where one data set is; no recipe of DC-AC could be read."""
    small = {family.name.removesuffix('_resnet') for family in FAMILIES if family.small_stem}
    by_family = {f'{data}_{name}' for data in IMAGES for name in (*small, 'resnet')} | {'in1k_smlpnet'}
    assert by_family <= set(RECIPES) <= by_family | FOR_ALL


def test_every_setting_is_one_of_train_and_of_its_type(name):
    for key, value in read(name).items():
        assert key in SETTINGS, key
        assert isinstance(value, SETTINGS[key]) and (SETTINGS[key] is bool) == (type(value) is bool), (key, value)


def test_its_model_takes_its_images(name):
    recipe = read(name)
    if 'model' not in recipe:
        recipe['model'] = 'gsa_resnet_tiny'  # of those for all tiny ones
    model = create(recipe, device='meta')
    size = recipe.get('input_size') or model.pretrained_cfg['input_size']
    if 'train_img_sizes' not in recipe:
        assert tuple(size) == tuple(model.pretrained_cfg['input_size'])
    assert model(torch.empty(2, *size, device='meta')).shape == (2, recipe.get('num_classes') or model.num_classes)


@pytest.mark.parametrize('name', [name for name in RECIPES if name.startswith('in1k')])
def test_every_value_for_imagenet_says_where_it_comes_from(name):
    text = RECIPES[name].read_text()
    assert 'UNTESTED' in text.splitlines()[0] + text.splitlines()[1]
    for line in text.splitlines():
        if line and not line.startswith(('#', *MACHINE, 'smoothing: 0.1001')):  # the last has a comment above
            assert re.search(r'#.*\[(read|derived|recalled|ours)\]', line) or line.startswith('model: '), line


@pytest.mark.parametrize('data, apart', [('c100', {'model', 'model_kwargs'}), ('in1k', {'model'})])
def test_the_twin_is_trained_as_the_attention_models_it_is_compared_with(data, apart):
    families = ('gsa', 'san', 'priorattn') if data == 'c100' else ('gsa',)
    twin = read(f'{data}_resnet')
    for family in families:
        other = read(f'{data}_{family}')
        assert {k: v for k, v in other.items() if k not in apart} == {k: v for k, v in twin.items() if k not in apart}


# Of the sources


def rates_of(recipe, updates=0):
    """Learning rate in each epoch, or at each update where the recipe steps by update."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=recipe['lr'])
    args = Namespace(**recipe)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    rates = []
    for epoch in range(epochs):
        if recipe.get('sched_on_updates'):
            for update in range(updates):
                scheduler.step_update(epoch * updates + update)
                rates.append(optimizer.param_groups[0]['lr'])
        else:
            scheduler.step(epoch)
            rates.append(optimizer.param_groups[0]['lr'])
    return rates


def test_san_has_the_authors_schedule():
    """CosineAnnealingLR of torch over 100 epochs, stepped after each."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    assert rates_of(read('in1k_san')) == pytest.approx(expected)


def test_san_has_the_authors_optimizer():
    """Plain momentum, and weight decay on every parameter."""
    recipe = read('in1k_san')
    model = create(recipe, device='meta')
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(Namespace(**recipe)), **recipe['opt_kwargs'])
    assert type(optimizer) is torch.optim.SGD
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group['weight_decay'], group['momentum'], group['nesterov'], group['lr']) == (1e-4, 0.9, False, 0.1)


def test_san_has_the_authors_label_smoothing():
    """The target gets 0.9, each of the other 999 classes 0.1 / 999."""
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 1000, dtype=torch.float64), torch.randint(1000, (8,))
    target = torch.full((8, 1000), 0.1 / 999, dtype=torch.float64).scatter(1, labels[:, None], 0.9)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    found = LabelSmoothingCrossEntropy(smoothing=read('in1k_san')['smoothing'])(logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_smlpnet_has_the_authors_schedule():
    """20 epochs of warm-up from 1e-6, a cosine over all 300 to 1e-5, the rate for 1,024 images."""
    rates = rates_of(read('in1k_smlpnet'))
    assert len(rates) == 300
    assert rates[1:20] == pytest.approx([1e-6 + epoch * (1e-3 - 1e-6) / 20 for epoch in range(1, 20)])
    expected = [1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) for epoch in range(20, 300)]
    assert rates[20:] == pytest.approx(expected)


def test_prior_attention_has_the_cycles_of_the_digest():
    """Linear warm-up over 15 epochs, cosines that start at epochs 25, 45 and 85 anew, the last epoch has number 164."""
    rates = rates_of(read('in1k_priorattn'), updates=4)
    assert len(rates) == 4 * 165
    assert rates[:60] == pytest.approx([0.05 * update / 60 for update in range(60)])
    starts = [update / 4 for update in range(1, len(rates)) if rates[update] > rates[update - 1]][60:]
    assert starts == [25, 45, 85]
    for start, length in ((15, 10), (25, 20), (45, 40), (85, 80)):
        expected = [0.025 * (1 + math.cos(math.pi * update / (4 * length))) for update in range(4 * length)]
        assert rates[4 * start:4 * (start + length)] == pytest.approx(expected)


# Costs


@pytest.mark.slow
def test_costs_in_the_readme_follow_from_multiply_adds():
    """Three times the multiply-adds of a forward pass, two operations each, for every image of every epoch."""
    text = (FOLDER / 'README.md').read_text()
    pattern = r'^\| (\w+)\.yaml \| `(\w+)` \| (\d+) \| ([\d.]+) G \| ([\d.]+) \| ([\d.]+) (h|min) \|$'
    rows = re.findall(pattern, text, re.MULTILINE)
    assert {row[0] for row in rows} == set(RECIPES) - FOR_ALL
    for stem, model, epochs, multiply_adds, exaflops, duration, unit in rows:
        recipe = read(stem)
        kwargs = recipe.get('model_kwargs', {})
        cost = parameters_and_multiply_adds(model, num_classes=recipe.get('num_classes') or 1000, **kwargs)[1]
        expected_epochs = 165 if stem == 'in1k_priorattn' else recipe['epochs']
        total = 6 * cost * IMAGES[stem.partition('_')[0]] * expected_epochs / 1e18
        hours = total * 1e6 / TFLOPS / 3600
        assert int(epochs) == expected_epochs
        assert float(multiply_adds) == pytest.approx(cost / 1e9, abs=0.006)
        assert float(exaflops) == pytest.approx(total, rel=0.06)
        assert float(duration) == pytest.approx(hours if unit == 'h' else 60 * hours, rel=0.06)


# Comparisons


@pytest.mark.parametrize('path', list((FOLDER / 'comparisons').glob('c100*.yaml')), ids=lambda path: path.stem)
def test_runs_of_a_comparison_differ_in_the_network_alone(path):
    plan = Plan.of(path)
    assert len(plan.seeds) == 3
    parser = ArgumentParser()
    parser.add_argument('--config')
    parser.add_argument('--model')
    parser.add_argument('--model-kwargs', nargs='*')
    seen, settings = [], []
    for arguments in plan.runs.values():
        given, others = parser.parse_known_args(arguments)
        recipe = yaml.safe_load((ROOT / given.config).read_text())
        seen.append((given.model or recipe['model'], str(given.model_kwargs or recipe.get('model_kwargs'))))
        settings.append([others, {k: v for k, v in recipe.items() if k not in ('model', 'model_kwargs')}])
    assert len(set(seen)) == len(seen)
    assert all(each == settings[0] for each in settings)


@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_networks_of_a_comparison_take_the_images_of_their_recipe(path):
    parser = ArgumentParser()
    for argument, more in (('--config', {}), ('--model', {}), ('--model-kwargs', {'nargs': '*', 'default': []})):
        parser.add_argument(argument, **more)
    parser.add_argument('--img-size', type=int)
    for arguments in Plan.of(path).runs.values():
        given, _ = parser.parse_known_args(arguments)
        recipe = yaml.safe_load((ROOT / given.config).read_text())
        recipe['model'] = given.model or recipe['model']
        own = dict(pair.split('=') for pair in given.model_kwargs)
        recipe['model_kwargs'] = {
            **recipe.get('model_kwargs', {}), **{k: yaml.safe_load(v) for k, v in own.items()}}
        size = given.img_size or recipe['input_size'][-1]
        logits = create(recipe, device='meta').eval()(torch.empty(2, 3, size, size, device='meta'))
        assert logits.shape == (2, recipe['num_classes'])


def test_fine_tuning_and_its_counterpart_differ_in_start_and_learning_rate_alone():
    runs = Plan.of(FOLDER / 'comparisons' / 'imagenette_tiny.yaml').runs
    pairs = {name.removesuffix('_scratch') for name in runs if name.endswith('_scratch')}
    assert set(runs) == {f'{name}_{start}' for name in pairs for start in ('scratch', 'finetuned')}
    for name in pairs:
        assert runs[f'{name}_finetuned'] == [*runs[f'{name}_scratch'], '--pretrained', '--lr', '0.002']
    assert read('imagenette_tiny')['lr'] == read('c100_tiny')['lr']  # that the weights were trained with
    assert read('finetune')['lr'] == 0.002


# With timm's real script

needs_scripts = pytest.mark.skipif(not TIMM_REPO, reason="TIMM_REPO does not name a checkout with timm's real scripts")


@pytest.fixture(scope='module')
def script():
    """timm's train.py as a module."""
    spec = importlib.util.spec_from_file_location('timm_train', Path(TIMM_REPO) / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_scripts
def test_the_real_parser_takes_every_value(name, script, monkeypatch):
    recipe = read(name)
    actions = {action.dest: action for action in script.parser._actions}
    for key, value in recipe.items():
        action = actions[key]
        assert action.choices is None or value in action.choices
        if action.nargs == 0:  # a switch
            assert isinstance(value, bool)
        elif action.type is not None:
            values = value if isinstance(value, list) else [value]
            assert [action.type(str(each)) for each in values] == values
            assert not isinstance(action.nargs, int) or len(values) == action.nargs
        else:
            assert isinstance(value, dict if key.endswith('_kwargs') else str)
    before = dict(script.parser._defaults)
    defaults = {dest: action.default for dest, action in actions.items()}
    try:
        monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(RECIPES[name]), '--data-dir', 'DIR'])
        parsed, text = script._parse_args()
    finally:
        script.parser._defaults = before
        for dest, action in actions.items():
            action.default = defaults[dest]
    assert {key: getattr(parsed, key) for key in recipe} == recipe
    assert {key: value for key, value in yaml.safe_load(text).items() if key in recipe} == recipe


@needs_scripts
@pytest.mark.parametrize('path', PLANS, ids=lambda path: path.stem)
def test_the_real_parser_takes_every_run_of_a_comparison(path, script, monkeypatch):
    for arguments in Plan.of(path).runs.values():
        monkeypatch.setattr(sys, 'argv', ['train.py', *arguments[2:], '--seed', '0'])
        parsed, _ = script._parse_args()
        assert shlex.join(arguments[:1]) == '--config'
        timm.create_model(parsed.model, device='meta', **parsed.model_kwargs)

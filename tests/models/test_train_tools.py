"""What training needs around a model: checkpointing, parameter groups, averages, copies, saving and loading."""
import copy
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters, load_checkpoint, resume_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver, ModelEmaV3, freeze, unfreeze
from torch import nn

import timm_gsa
from timm_gsa.models.san import SANBlock
from timm_gsa.models.smlpnet import SMLPBlock

from ..versions import reads_local_dir
from .blocks import blocks_of, stages_of


def images(dtype=torch.float32, size=64):
    return torch.randn(4, 3, size, size, dtype=dtype)


def train_step(model, x, optimizer=None):
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 7)
    model.zero_grad()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.item()


def assert_same_gradients(model, other):
    parameters = dict(other.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, parameters[key].grad, msg=lambda text, key=key: f'{key}: {text}')


def test_every_parameter_gets_a_finite_gradient(name, create):
    model = create(name, num_classes=7).train()
    train_step(model, images())
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_fresh_model_learns(ours):
    torch.manual_seed(0)
    model = timm.create_model(ours, num_classes=7).train()
    # The last gate of DC-AC divides the features by their number, so that its classifier has a longer way.
    lr, steps = (1e-2, 100) if ours.startswith('dcac') else (2e-3, 12)
    optimizer = create_optimizer_v2(model, 'adamw', lr=lr, weight_decay=0.05)
    x = images(size=32)
    losses = [train_step(model, x, optimizer) for _ in range(steps)]
    assert losses[-1] < 0.3 * losses[0]


# Gradient checkpointing


def count_calls(modules):
    calls = [0] * len(modules)

    def count(index):
        def hook(*args):
            calls[index] += 1
        return hook

    for index, module in enumerate(modules):
        # A layer in the middle of a block: blocks themselves may be called by another way.
        name = {SANBlock: 'attn', SMLPBlock: 'mix'}.get(type(module), 'conv2')
        inner = module.get_submodule(name)
        inner.register_forward_hook(count(index))
    return calls


def test_checkpointing_recomputes_every_block_and_changes_nothing(name, create):
    kwargs = dict(num_classes=7, dtype=torch.float64, drop_path_rate=0.2)
    plain, model = create(name, **kwargs).train(), create(name, **kwargs).train()
    model.set_grad_checkpointing()
    calls, plain_calls = count_calls(blocks_of(model)), count_calls(blocks_of(plain))
    x = images(torch.float64)
    losses = []
    for each in (plain, model):
        torch.manual_seed(1)  # the same paths are dropped
        losses.append(train_step(each, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_same_gradients(model, plain)
    assert plain_calls == [1] * len(plain_calls)
    assert calls == [2] * len(calls)


def test_checkpointing_can_be_switched_off(name, create):
    model = create(name, num_classes=7).train()
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    calls = count_calls(blocks_of(model))
    train_step(model, images(size=32))
    assert calls == [1] * len(calls)


def test_checkpointing_does_nothing_without_gradients(name, create):
    model = create(name).eval()
    x = images()
    with torch.no_grad():
        before = model(x)
        model.set_grad_checkpointing()
        calls = count_calls(blocks_of(model))
        torch.testing.assert_close(model(x), before, rtol=0., atol=0.)
    assert calls == [1] * len(calls)


@pytest.mark.parametrize('way', ['forward_intermediates', 'features_only'])
def test_checkpointing_of_features(name, create, way):
    if way == 'features_only':
        if timm.__version__ == '1.0.21':
            pytest.skip('that timm fails at its own ResNet: an activation in place after what is recomputed')
        plain, model = (create(name, features_only=True, dtype=torch.float64).train() for _ in range(2))
        run = nn.Module.__call__
    else:
        plain, model = (create(name, num_classes=0, dtype=torch.float64).train() for _ in range(2))

        def run(model, x):
            return model.forward_intermediates(x, intermediates_only=True)
    model.set_grad_checkpointing()
    x = images(torch.float64).requires_grad_()
    for each in (plain, model):
        sum(m.square().mean() for m in run(each, x)).backward()
    assert_same_gradients(model, plain)


# Parameter groups


@pytest.mark.parametrize('coarse', [False, True])
def test_layer_groups_follow_the_network(name, create, coarse):
    model = create(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    keys = [key for group in groups.values() for key in group]
    assert sorted(keys) == sorted(key for key, _ in model.named_parameters())
    stem = stem_of(model)
    assert groups[0] and set(groups[0]) == {key for key, _ in model.named_parameters() if key.startswith(stem)}
    assert sorted(groups[max(groups)]) == ['fc.bias', 'fc.weight']
    layer = {key: index for index, group in groups.items() for key in group}
    order = [layer[key] for key, _ in model.named_parameters()]  # parameters are registered in the order they are used
    assert order == sorted(order)
    # One group for the stem, one for the classifier, and between them one for each stage or for each block of a stage.
    blocks = sum(len(blocks_of(model.get_submodule(stage))) for stage in stages_of(model))
    assert len(groups) == 2 + (4 if coarse else blocks)


def stem_of(model):
    """Starts of the names of what runs before the first block."""
    return ('stages.0.downsample',) if hasattr(model, 'stages') else ('conv1', 'bn1')


def test_layer_groups_of_every_model(registered, create):
    model = create(registered, device='meta')
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    order = [layer[key] for key, _ in model.named_parameters()]
    assert order == sorted(order) and order[0] == 0


def test_layer_decay_reaches_every_parameter_once(name, create):
    model = create(name)
    tables = {key for key, _ in model.named_parameters() if key.endswith(('.rel_h', '.rel_w', '.radius'))}
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=_no_weight_decay(model), layer_decay=0.5)
    seen = [id(p) for group in groups for p in group['params']]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    group_of = {id(p): group for group in groups for p in group['params']}
    scale = {key: group_of[id(p)]['lr_scale'] for key, p in model.named_parameters()}
    assert scale['fc.weight'] == 1. and min(scale.values()) < 0.1
    assert {scale[key] for key in scale if key.startswith(stem_of(model))} == {min(scale.values())}
    assert {group_of[id(p)]['weight_decay'] for key, p in model.named_parameters() if key in tables} <= {0.}


def _no_weight_decay(model):
    return model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()


def test_no_weight_decay_names_tables_and_radii(registered, create):
    model = create(registered, device='meta')
    kinds = {key.rpartition('.')[2] for key in _no_weight_decay(model)}
    assert kinds == ({'rel_h', 'rel_w'} if 'gsa' in registered else {'radius'} if 'prior' in registered else set())
    assert _no_weight_decay(model) <= {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize('way', ['optimizer', 'layer decay', 'groups'])
def test_weight_decay_leaves_tables_radii_norms_and_biases_alone(name, create, way):
    model = create(name)
    if way == 'groups':
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=_no_weight_decay(model))
    else:
        layer_decay = 0.7 if way == 'layer decay' else None
        groups = create_optimizer_v2(
            model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=layer_decay).param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert len(decay) == sum(1 for _ in model.parameters())
    left_alone = {key for key, p in model.named_parameters() if decay[id(p)] == 0.}
    assert left_alone == {
        key for key, p in model.named_parameters()
        if p.ndim <= 1 or key.endswith(('.rel_h', '.rel_w', '.radius'))
    }
    assert {decay[id(p)] for key, p in model.named_parameters() if key not in left_alone} == {0.05}


# Averages and copies


def test_ema_follows_the_model(name, create):
    model = create(name, num_classes=7).train()
    ema = ModelEmaV3(model, decay=0.9)
    before = copy.deepcopy(ema.module.state_dict())
    train_step(model, images(), torch.optim.SGD(model.parameters(), lr=0.1))
    ema.update(model)
    now = model.state_dict()
    for key, average in ema.module.state_dict().items():
        if average.is_floating_point():
            torch.testing.assert_close(average, 0.9 * before[key] + 0.1 * now[key], rtol=1e-4, atol=1e-6)
    assert ema.module(images()).isfinite().all()


@pytest.mark.parametrize('way', ['deepcopy', 'pickle'])
def test_copies_are_equal_and_independent(name, create, way):
    model = create(name).eval()
    x = images()
    with torch.no_grad():
        model(x)  # nothing that a forward pass leaves behind may stand in the way
        if way == 'deepcopy':
            other = copy.deepcopy(model)
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            other = torch.load(file, weights_only=False)
        torch.testing.assert_close(other(x), model(x), rtol=0., atol=0.)
        next(model.parameters()).zero_()
        assert next(other.parameters()).all()


def test_freezing_stops_parameters_and_norms(name, create):
    model = create(name, num_classes=7).train()
    parts = [*(key for key, _ in model.named_children() if key in ('conv1', 'bn1')), *stages_of(model)[:2]]
    freeze(model, parts)
    before = copy.deepcopy(model.state_dict())
    train_step(model, images(), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    for key, tensor in model.state_dict().items():
        if key.startswith(tuple(f'{part}.' for part in parts)):
            assert torch.equal(tensor, before[key]), key
    unfreeze(model, parts)
    train_step(model, images())
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


# Checkpoints and the Hub's layout


def test_training_checkpoint_round_trip(name, create, tmp_path):
    def optimizer_for(model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    model = create(name, num_classes=7).train()
    optimizer, ema = optimizer_for(model), ModelEmaV3(model, decay=0.5)
    x = images()
    train_step(model, x, optimizer)
    ema.update(model)
    saver = CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), max_history=1)
    saver.save_checkpoint(epoch=3, metric=50.)
    path = str(tmp_path / 'checkpoint-3.pth.tar')

    resumed = create(name, num_classes=7).train()
    resumed_optimizer = optimizer_for(resumed)
    assert resume_checkpoint(resumed, path, resumed_optimizer, log_info=False) == 4
    for each, its_optimizer in ((model, optimizer), (resumed, resumed_optimizer)):
        train_step(each, x, its_optimizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key

    averaged = ema.module(x)
    load_checkpoint(resumed, path)  # takes the average where there is one
    torch.testing.assert_close(resumed.eval()(x), averaged, rtol=0., atol=0.)


@pytest.mark.parametrize('wrapped', ['', 'module.', '_orig_mod.'])
def test_create_model_loads_a_checkpoint(name, create, tmp_path, wrapped):
    model = create(name, num_classes=7).eval()
    path = tmp_path / 'checkpoint.pth'
    torch.save({'state_dict': {wrapped + key: tensor for key, tensor in model.state_dict().items()}}, path)
    loaded = create(name, fresh=True, num_classes=7, checkpoint_path=str(path))
    x = images()
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=0., atol=0.)


@reads_local_dir
def test_hub_folder_round_trip(ours, create, tmp_path):
    model = create(ours, num_classes=7).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    text = (tmp_path / 'config.json').read_text()
    config = json.loads(text)
    assert config['architecture'] == ours and config['num_classes'] == 7
    assert str(Path(timm_gsa.__file__).parent) not in text  # a path of this machine
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    torch.testing.assert_close(loaded(x), model(x), rtol=0., atol=0.)

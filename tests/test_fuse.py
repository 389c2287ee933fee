"""timm_gsa.fuse: the same outputs with fewer norms, and models left as they are."""
import pytest
import timm
import torch
from torch import nn

import timm_gsa
from timm_gsa.layers import PairwiseAttention


def lively(model):
    """All norms do something, as after training; one factor vanishes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1., 1.)
            module.weight.data[0] = 0.
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


# What is left, by the end of its name.
LEFT = {
    'gsa_resnet_tiny': ('conv2.norm', 'bn2'),
    'priorattn_resnet_tiny': (),
    'san_tiny_pairwise': ('bn1', 'norm1', 'attn.norm2', 'layer1.norm', 'layer2.norm', 'layer3.norm', 'layer4.norm'),
    'san_tiny_patchwise': ('bn1', 'norm1', 'norm2', 'layer1.norm', 'layer2.norm', 'layer3.norm', 'layer4.norm'),
    'resnet18': (),
    'resnet26d': (),  # a stem of three convolutions, pools in its shortcuts
}


@pytest.mark.parametrize('name', LEFT)
def test_outputs_stay_and_norms_go(name, images):
    torch.manual_seed(0)
    model = lively(timm.create_model(name, dtype=torch.float64))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = timm_gsa.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images))
        torch.testing.assert_close(fused.forward_features(images), model.forward_features(images))
    assert not fused.training and len(norms(fused)) < len(norms(model))
    assert all(key.endswith(LEFT[name]) for key in norms(fused)), norms(fused)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_parts_of_a_model(images):
    model = lively(timm.create_model('priorattn_resnet_tiny', dtype=torch.float64))
    stem = nn.Sequential(model.conv1, model.bn1)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    fused = timm_gsa.fuse(stem.eval())
    torch.testing.assert_close(fused(x), stem(x))
    assert not norms(fused)


def test_features(images):
    model = lively(timm.create_model('gsa_resnet_tiny', features_only=True, dtype=torch.float64))
    torch.testing.assert_close(timm_gsa.fuse(model)(images), model(images))


def test_a_fused_model_is_fused_already(images):
    model = lively(timm.create_model('san_tiny_pairwise', dtype=torch.float64))
    once = timm_gsa.fuse(model)
    twice = timm_gsa.fuse(once)
    assert norms(once) == norms(twice)
    assert torch.equal(once(images), twice(images))


def test_fused_weights_still_have_gradients(images):
    model = timm_gsa.fuse(lively(timm.create_model('priorattn_resnet_tiny', dtype=torch.float64)))
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('watched', ['conv1', 'bn1', 'layer1.0.conv2'])
def test_watched_parts_stay(watched, images):
    model = lively(timm.create_model('priorattn_resnet_tiny', dtype=torch.float64))
    model.get_submodule(watched).register_forward_hook(lambda module, args, output: output.abs())
    fused = timm_gsa.fuse(model)
    torch.testing.assert_close(fused(images), model(images))
    assert norms(fused) == [watched.replace('conv', 'bn')]


@pytest.mark.parametrize('path', ['layer2.0.conv2', 'layer2.0.conv2.conv', 'layer2.0.conv2.proj', 'layer2.0.bn2'])
@pytest.mark.parametrize('change', ['patched forward', 'parametrization', 'another class'])
def test_changed_parts_stay(path, change, images):
    model = lively(timm.create_model('priorattn_resnet_tiny', dtype=torch.float64))
    module = model.get_submodule(path)
    if change == 'patched forward':
        forward = module.forward
        module.forward = lambda x: forward(x).abs()
    elif change == 'parametrization':
        part = module if hasattr(module, 'weight') else module.value
        nn.utils.parametrize.register_parametrization(part, 'weight', Doubled())
    else:
        module.__class__ = type(f'Other{type(module).__name__}', (type(module),), {'forward': absolute(type(module))})
    fused = timm_gsa.fuse(model.eval())
    torch.testing.assert_close(fused(images), model(images))
    assert norms(fused) == ['layer2.0.bn2']


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def absolute(kind):
    return lambda self, x: kind.forward(self, x).abs()


@pytest.mark.parametrize('replace', [
    lambda model: setattr(model, 'bn1', nn.GroupNorm(1, model.bn1.num_features).double()),
    lambda model: setattr(model, 'bn1', nn.BatchNorm2d(model.bn1.num_features, track_running_stats=False).double()),
    lambda model: nn.utils.parametrizations.weight_norm(model.conv1[-1]),
])
def test_what_is_no_plain_pair_stays(replace, images):
    model = lively(timm.create_model('priorattn_resnet_tiny', dtype=torch.float64))
    replace(model)
    fused = timm_gsa.fuse(model.eval())
    assert type(fused.bn1) is type(model.bn1)
    torch.testing.assert_close(fused(images), model(images))


def test_norms_without_parameters_are_folded():
    layer = PairwiseAttention(32, kernel_size=3).double()
    chain = nn.Sequential(layer, nn.BatchNorm2d(8, affine=False).double()).eval()
    nn.init.normal_(chain[1].running_mean)
    x = torch.randn(2, 32, 6, 6, dtype=torch.float64)
    fused = timm_gsa.fuse(chain)
    torch.testing.assert_close(fused(x), chain(x))
    assert type(fused[1]) is nn.Identity


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match='model must be in eval mode to be fused, got one in training mode'):
        timm_gsa.fuse(timm.create_model('gsa_resnet_tiny'))

"""The classifier: finding it, replacing it, and leaving device, dtype, mode and the rest of the model alone."""
import pytest
import torch
from torch import nn


@pytest.fixture
def model(name, create):
    return create(name, num_classes=7).eval()


def test_get_classifier(model):
    assert model.get_classifier() is model.fc
    assert model.get_submodule(model.get_classifier(name_only=True)) is model.fc
    assert isinstance(model.fc, nn.Linear) and model.fc.in_features == model.head_hidden_size


@pytest.mark.parametrize('num_classes', [1, 12])
def test_reset_classifier_changes_nothing_but_the_head(model, num_classes):
    x = torch.randn(2, 3, 64, 64)
    before = model.forward_features(x)
    model.reset_classifier(num_classes)
    assert model.num_classes == num_classes
    assert model(x).shape == (2, num_classes)
    torch.testing.assert_close(model.forward_features(x), before, rtol=0., atol=0.)


def test_reset_classifier_to_none_and_back(model):
    x = torch.randn(2, 3, 64, 96)
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), model.forward_features(x))
    model.reset_classifier(5, 'avg')
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize('pool', ['max', 'catavgmax'])
def test_reset_classifier_to_another_pool(model, pool):
    model.reset_classifier(5, pool)
    x = torch.randn(2, 3, 64, 64)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.global_pool.pool_type == pool
    assert model.fc.in_features == pooled.shape[1] and model(x).shape == (2, 5)
    torch.testing.assert_close(pooled[:, -model.num_features:], model.forward_features(x).amax((2, 3)))


# What timm's own ResNet of the installed release keeps; newer ones keep all of it.
KEPT = {
    'dtype': (dict(dtype=torch.float64), lambda model: model.fc.weight.dtype),
    'device': (dict(device='meta'), lambda model: model.fc.weight.device.type),
    'pool': (dict(global_pool='max'), lambda model: model.global_pool.pool_type),
    'mode': ({}, lambda model: (model.fc.training, model.global_pool.training)),
}


@pytest.mark.parametrize('kept', KEPT)
def test_reset_classifier_keeps(ours, create, kept):
    kwargs, what = KEPT[kept]

    def reset(name):
        model = create(name, num_classes=7, **kwargs).eval()
        before = what(model)
        model.reset_classifier(5)
        return what(model) == before

    if not reset('resnet26'):
        pytest.skip(f"the ResNet of this timm does not keep the {kept}, which is not ours to change")
    assert reset(ours)


def test_only_the_head_learns_when_the_rest_is_frozen(model):
    model.requires_grad_(False)
    model.reset_classifier(5)
    model.train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {'fc.weight', 'fc.bias'}
    assert {key for key, p in model.named_parameters() if p.grad is not None} == {'fc.weight', 'fc.bias'}


def test_head_sizes_of_a_real_model(real, create):
    model = create(real, device='meta')
    x = torch.empty(1, 3, 224, 224, device='meta')
    assert model(x).shape == (1, 1000)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)

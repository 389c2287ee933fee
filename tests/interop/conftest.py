"""Shared by the tests with other libraries: rows of README.md's table, and a check that our layers train."""
import interop_table
import pytest
import timm
import torch
from huggingface_hub import constants
from torch.nn import functional as F

from timm_gsa import layers
from timm_gsa.models._families import family_of, tiny_models

OWN = tuple(getattr(layers, name) for name in layers.__all__)


@pytest.fixture(params=tiny_models())
def ours(request):
    """Name of a tiny model of each kind that has weights."""
    return request.param


@pytest.fixture
def pyramid(ours):
    """Indices of the features of strides 4 to 32."""
    strides = family_of(ours).strides
    return [strides.index(stride) for stride in (4, 8, 16, 32)]


@pytest.fixture(scope='session')
def assert_maps_close():
    """Asserts that maps are the same but for rounding, by the largest value of each."""
    def assert_maps_close(maps, expected):
        for actual, each in zip(maps, expected, strict=True):
            torch.testing.assert_close(actual, each, rtol=1e-4, atol=1e-5 * each.abs().max().item())
    return assert_maps_close


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Requests to the Hub are errors."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


@pytest.fixture(autouse=True)
def named(request):
    """Each test has a row of the table."""
    yield
    assert 'library' in dict(request.node.user_properties)


@pytest.fixture
def needs(record_property):
    """Names the test's row of the table; returns the library, or skips the test if it is missing."""
    def needs(library, did, model, module=None):
        interop_table.record(record_property, library, did, model)
        return pytest.importorskip(module or library.replace('-', '_'), reason=f'{library} is not installed')
    return needs


@pytest.fixture(scope='session')
def control(families):
    """Name and arguments of timm's own ResNet, for failures that are not ours."""
    return 'resnet26', families['resnet26']


@pytest.fixture(scope='session')
def own_layers():
    """{name: layer of timm_gsa.layers} of a model or a wrapper of it."""
    return lambda model: {name: module for name, module in model.named_modules() if isinstance(module, OWN)}


@pytest.fixture(scope='session')
def own_weights(own_layers):
    """{name: parameter} of these layers without biases, some of which cancel by the equations."""
    return lambda model: {
        f'{layer}.{name}': parameter for layer, module in own_layers(model).items()
        for name, parameter in module.named_parameters() if not name.endswith('bias')}


@pytest.fixture(scope='session')
def assert_own_layers_learn(own_weights):
    """Asserts after a backward pass that all these layers have gradients."""
    def assert_own_layers_learn(model):
        weights = own_weights(model)
        assert weights
        for name, parameter in weights.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    return assert_own_layers_learn


@pytest.fixture
def batch():
    """Images and labels of three classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 0])


@pytest.fixture
def fresh_classifier(ours):
    """Returns the pretrained model with a new classifier of three classes, the same each time."""
    def fresh_classifier():
        torch.manual_seed(0)
        return timm.create_model(ours, pretrained=True, num_classes=3)
    return fresh_classifier


@pytest.fixture
def plain_step(fresh_classifier, batch):
    """State of `fresh_classifier` after one step of SGD on `batch`, by PyTorch alone."""
    model = fresh_classifier().train()
    images, labels = batch
    F.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model.state_dict()

"""What the tests with other libraries share: rows of README.md's table, and what attention has to do in training."""
import interop_table
import pytest
import timm
import torch
from huggingface_hub import constants
from torch.nn import functional as F

from timm_gsa.layers import GlobalSelfAttention, PairwiseAttention, PatchwiseAttention, PriorAttention
from timm_gsa.models._families import tiny_models

ATTENTION = (GlobalSelfAttention, PairwiseAttention, PatchwiseAttention, PriorAttention)


@pytest.fixture(params=tiny_models())
def ours(request):
    """Name of a tiny model of each kind that has weights."""
    return request.param


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks the Hub gets an error."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


@pytest.fixture(autouse=True)
def named(request):
    """Sees to it that each test has its row."""
    yield
    assert 'library' in dict(request.node.user_properties)


@pytest.fixture
def needs(record_property):
    """Names the test's row of the README's table; gives the library, or skips the test where it is missing."""
    def needs(library, did, model, module=None):
        interop_table.record(record_property, library, did, model)
        return pytest.importorskip(module or library.replace('-', '_'), reason=f'{library} is not installed')
    return needs


@pytest.fixture(scope='session')
def control(families):
    """Name and arguments of timm's own ResNet: what fails with it, too, is no matter of ours."""
    return 'resnet26', families['resnet26']


@pytest.fixture(scope='session')
def attention_layers():
    """{name: attention layer} of a model, whatever is wrapped around it."""
    return lambda model: {name: module for name, module in model.named_modules() if isinstance(module, ATTENTION)}


@pytest.fixture(scope='session')
def attention_weights(attention_layers):
    """{name: parameter} of all attention layers of a model, but for biases: some of them cancel by the equations."""
    return lambda model: {
        f'{layer}.{name}': parameter for layer, module in attention_layers(model).items()
        for name, parameter in module.named_parameters() if not name.endswith('bias')}


@pytest.fixture(scope='session')
def assert_attention_learns(attention_weights):
    """Asserts after a backward pass that it reached all attention."""
    def assert_attention_learns(model):
        weights = attention_weights(model)
        assert weights
        for name, parameter in weights.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    return assert_attention_learns


@pytest.fixture
def batch():
    """Images and their classes, of three."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 0])


@pytest.fixture
def fresh_classifier(ours):
    """Makes the same model each time: the pretrained one, with a new classifier of three classes."""
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

"""The records of the families agree with the registry, and nothing but a record says what the classifier is called."""
import sys

import pytest
import timm
import torch
from torch import nn

from timm_gsa.models import _families
from timm_gsa.models._families import FAMILIES, family_of, tiny_models
from timm_gsa.models._weights import checked


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


def test_record_names_models_of_its_module(family):
    registered = timm.list_models(module=family.name)
    assert registered and all(name.startswith(family.prefix) and family_of(name) is family for name in registered)
    assert {*family.tiny, *family.smallest, *family.usual, *family.reported} <= set(registered)
    assert len(family.tiny) == len(family.smallest)
    assert hasattr(sys.modules['timm_gsa.models'], family.name)


def test_record_agrees_with_the_pretrained_configs(family):
    for name in timm.list_models(module=family.name):
        assert timm.get_pretrained_cfg(name).paper_ids == f'arXiv:{family.arxiv}'
    for name in family.smallest:
        assert timm.get_pretrained_cfg(name).license == (family.code_license or 'apache-2.0')

def test_tiny_models_are_those_with_weights_unless_all_are_wanted():
    every = tiny_models(untrained=True)
    assert every == tuple(name for family in FAMILIES for name in family.tiny)
    assert tiny_models() == tuple(name for name in every if timm.is_model_pretrained(name))


def test_record_says_what_the_models_can(family):
    for name in family.tiny:
        model = timm.create_model(name, device='meta')
        assert tuple(info['reduction'] for info in model.feature_info) == family.strides
        assert hasattr(model, 'norm') == family.final_norm
        for argument, able in (('img_size', family.sized), ('stem_type', family.small_stem)):
            value = {'img_size': 96, 'stem_type': 'small'}[argument]
            if able:
                timm.create_model(name, device='meta', **{argument: value})
            else:
                with pytest.raises(TypeError, match=argument):
                    timm.create_model(name, device='meta', **{argument: value})


def test_figures_that_were_not_read_at_the_source_say_what_they_rest_on(family):
    assert bool(family.reported) == bool(family.reported_status)
    assert family.bibtex.startswith('@') and family.verified and family.ours


def test_a_name_of_no_family_is_an_error():
    with pytest.raises(ValueError, match="model must start with gsa_resnet, .*, got 'resnet50'"):
        family_of('resnet50')


def test_families_without_attention_are_left_out_where_attention_is_shown(monkeypatch):
    other = _families.Family(
        name='mlp', title='MLP', arxiv='0', bibtex='@', prefix='mlp', tiny=('mlp_tiny',), smallest=('mlp50',),
        usual=(), verified='-', ours='-', attention=False)
    monkeypatch.setattr(_families, 'FAMILIES', (*FAMILIES, other))
    assert tiny_models(untrained=True)[-1] == 'mlp_tiny'
    assert 'mlp_tiny' not in tiny_models(attention=True, untrained=True)


@pytest.mark.parametrize('classifier', ['head', ('head', 'head_dist')])
def test_the_classifier_may_be_missing_under_the_name_of_the_config_alone(classifier):
    model = nn.ModuleDict({'stem': nn.Linear(2, 2), 'head': nn.Linear(2, 3)})
    model.pretrained_cfg = {'classifier': classifier}
    stem = {key: torch.ones_like(tensor) for key, tensor in model.state_dict().items() if key.startswith('stem')}
    assert checked(None)(dict(stem), model) == stem
    model.pretrained_cfg = {'classifier': 'fc'}
    with pytest.raises(RuntimeError, match=r'head\.weight is missing; head\.bias is missing'):
        checked(None)(dict(stem), model)

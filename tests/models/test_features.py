"""Features: forward_features and head, features_only in every form, forward_intermediates, pruning, feature_info."""
import pytest
import timm
import torch
from torch import nn

from .blocks import stages_of

CLASSES = ('list', 'dict', 'hook', 'fx', 'getter')


@pytest.fixture
def model(name, create):
    return create(name, num_classes=7).eval()


def image(height=64, width=96):
    return torch.randn(2, 3, height, width)


def places(indices, count):
    """Numbers of the maps that `indices` asks for, of so many."""
    if indices is None or isinstance(indices, int):
        return list(range(count))[-(indices or count):]
    return [index % count for index in indices]


def assert_same(maps, others):
    assert len(maps) == len(others)
    for one, other in zip(maps, others, strict=True):
        torch.testing.assert_close(one, other)


def test_forward_is_features_then_head(model):
    x = image()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 3)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.fc(pooled), model(x))
    torch.testing.assert_close(model.forward_head(features), model(x))


def test_feature_info_tells_the_truth(model, family):
    info = model.feature_info
    assert tuple(f['reduction'] for f in info) == family.strides
    maps = model.forward_intermediates(image(), intermediates_only=True)
    assert [m.shape for m in maps] == [(2, f['num_chs'], 64 // f['reduction'], 96 // f['reduction']) for f in info]
    seen = {}
    for f in info:
        model.get_submodule(f['module']).register_forward_hook(
            lambda module, args, out, f=f: seen.update({f['reduction']: out.clone()}))
    x = image()
    model(x)
    assert_same([seen[r] for r in family.strides], model.forward_intermediates(x, intermediates_only=True))


@pytest.mark.parametrize('out_indices', [None, (0, 1, 2, 3), (2,), (0, 3), (-1,), (-4, -2), (1, -1), 2], ids=str)
def test_features_only_gives_the_maps_asked_for(name, create, family, out_indices):
    whole = create(name).eval()
    net = create(name, features_only=True, **({} if out_indices is None else {'out_indices': out_indices})).eval()
    taken = places(out_indices, len(family.strides))
    x = image()
    expected = whole.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert_same(net(x), expected)
    assert net.feature_info.channels() == [m.shape[1] for m in expected]
    assert net.feature_info.reduction() == [64 // m.shape[2] for m in expected]
    assert net.feature_info.module_name() == [whole.feature_info[i]['module'] for i in taken]


@pytest.mark.parametrize('feature_cls', CLASSES)
def test_features_only_agrees_in_every_form(name, create, feature_cls):
    """In float64, as torch.fx sees the layers of SAN's stem apart, of which inference rounds otherwise."""
    whole = create(name).double().eval()
    net = create(name, features_only=True, feature_cls=feature_cls, out_indices=(0, 2, 3)).double().eval()
    x = image().double()
    with torch.no_grad():
        maps = net(x)
        if feature_cls == 'dict':
            assert list(maps) == ['0', '2', '3']
            maps = list(maps.values())
        assert_same(maps, whole.forward_intermediates(x, indices=[0, 2, 3], intermediates_only=True))
    assert net.feature_info.channels() == [m.shape[1] for m in maps]


@pytest.mark.parametrize('size', [32, 96])
def test_features_only_at_small_sizes(name, create, family, size):
    net = create(name, features_only=True).eval()
    assert [m.shape[-1] for m in net(image(size, size))] == [size // r for r in family.strides]


def test_features_only_with_output_stride(name, create, family):
    for output_stride in family.output_strides:
        net = create(name, features_only=True, output_stride=output_stride).eval()
        reductions = [min(r, output_stride) for r in family.strides]
        assert net.feature_info.reduction() == reductions
        assert [m.shape[-2:] for m in net(image())] == [(64 // r, 96 // r) for r in reductions]


def test_features_only_of_a_real_model(real, create):
    net = create(real, features_only=True, device='meta').eval()
    maps = net(torch.empty(1, 3, 224, 160, device='meta'))
    info = net.feature_info
    assert [m.shape for m in maps] == [
        (1, c, 224 // r, 160 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]


def test_features_only_trains(name, create):
    net = create(name, features_only=True, out_indices=(1, -2)).train()
    sum(m.square().mean() for m in net(image(64, 64))).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []
    last = create(name, device='meta').feature_info[-1]['module'].replace('.', '_')  # the extractor flattens names
    assert not any(key.startswith((last, 'norm', 'fc')) for key, _ in net.named_parameters())


@pytest.mark.parametrize('indices', [None, 2, 4, [1, 3], (-1,), [-4, -1]], ids=str)
def test_forward_intermediates_indices(model, family, indices):
    taken = places(indices, len(family.strides))
    x = image()
    final, maps = model.forward_intermediates(x, indices=indices)
    every = model.forward_intermediates(x, intermediates_only=True)
    assert_same(maps, [every[i] for i in taken])
    torch.testing.assert_close(final, model.forward_features(x))


def test_forward_intermediates_norm_acts_on_the_last_map_where_there_is_one(model, family):
    """None follows the last stage of a ResNet; SAN's belongs to its stages."""
    x = image()
    *before, last = model.forward_intermediates(x, norm=True, intermediates_only=True)
    *plain, plain_last = model.forward_intermediates(x, intermediates_only=True)
    assert_same(before, plain)
    torch.testing.assert_close(last, model.forward_features(x))
    assert torch.allclose(last, plain_last) != family.final_norm


@pytest.mark.parametrize('last', [0, 1, 2, 3, -1])
def test_forward_intermediates_stop_early_runs_no_further(model, family, last):
    last %= len(family.strides)
    ran = []
    stages = stages_of(model)
    for number, stage in enumerate(stages):
        model.get_submodule(stage).register_forward_hook(lambda *args, number=number: ran.append(number))
    x = image()
    final, maps = model.forward_intermediates(x, indices=[last], stop_early=True)
    first = len(family.strides) - len(stages)  # map of the first stage; before it is that of the stem
    assert ran == list(range(last - first + 1))
    if last == len(family.strides) - 1:
        torch.testing.assert_close(final, model.forward_features(x))
    elif last >= first:
        torch.testing.assert_close(final, maps[-1])
    ran.clear()
    assert_same(model.forward_intermediates(x, indices=[last], intermediates_only=True), maps)
    assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize('arguments', [dict(output_fmt='NHWC'), dict(indices=[5]), dict(indices=6), dict(indices=[-6])])
def test_forward_intermediates_refuses_what_it_cannot_give(model, arguments):
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(image(), **arguments)


@pytest.mark.parametrize('indices', [[0], [2], [1, 3], [-1], 1, 3], ids=str)
def test_prune_intermediate_layers_keeps_what_is_asked_for(model, family, indices):
    x = image()
    stages = [info['module'] for info in model.feature_info]
    every = model.forward_intermediates(x, intermediates_only=True)
    size = sum(p.numel() for p in model.parameters())
    taken = model.prune_intermediate_layers(indices)
    assert taken == places(indices, len(family.strides))
    assert_same(model.forward_intermediates(x, indices=taken, intermediates_only=True), [every[i] for i in taken])
    assert isinstance(model.fc, nn.Identity) and model.num_classes == 0
    gone = (*(f'{stage}.' for stage in stages[max(taken) + 1:]), 'fc.')
    left = [key for key, _ in model.named_parameters()]
    assert not any(key.startswith(gone) for key in left)
    assert sum(p.numel() for p in model.parameters()) < size
    model.train()
    maps = model.forward_intermediates(x, indices=taken, norm=True, intermediates_only=True)
    sum(m.square().mean() for m in maps).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_prune_can_keep_the_head(model):
    x = image()
    before = model(x)
    last = len(model.feature_info) - 1
    assert model.prune_intermediate_layers([last], prune_head=False) == [last]
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize('training', [False, True])
def test_graph_feature_extractor(model, training):
    """torch.fx takes attention as one node and finds everything around it; in float64, as it sees SAN's stem apart."""
    nodes = [*(model.feature_info[i]['module'] for i in (0, 2, -1)), 'global_pool.flatten']
    x = image().double()
    graph = timm.models.create_feature_extractor(model.double().train(training), nodes)
    with torch.no_grad():
        out = graph(x)
        assert [v.shape[0] for v in out.values()] == [2, 2, 2, 2]
        if not training:
            torch.testing.assert_close(out['global_pool.flatten'], model.forward_head(model.forward_features(x), True))


def test_graph_of_the_whole_model_trains_alike(name, create):
    model = create(name, dtype=torch.float64).train()
    nodes = timm.models.get_graph_node_names(model)[0]
    graph = timm.models.create_feature_extractor(create(name, dtype=torch.float64).train(), [nodes[-1]])
    x = image(64, 64).double()
    model(x).square().sum().backward()
    graph(x)[nodes[-1]].square().sum().backward()
    grads = dict(graph.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad, msg=lambda text, key=key: f'{key}: {text}')

"""Features: forward_features and head, features_only in every form, forward_intermediates, pruning, feature_info."""
import pytest
import timm
import torch
from torch import nn

CLASSES = ('list', 'dict', 'hook', 'fx', 'getter')


@pytest.fixture
def model(name, create):
    return create(name, num_classes=7).eval()


def image(height=64, width=96):
    return torch.randn(2, 3, height, width)


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


def test_feature_info_tells_the_truth(model):
    info = model.feature_info
    assert [f['reduction'] for f in info] == [2, 4, 8, 16, 32]
    maps = model.forward_intermediates(image(), intermediates_only=True)
    assert [m.shape for m in maps] == [(2, f['num_chs'], 64 // f['reduction'], 96 // f['reduction']) for f in info]
    seen = {}
    for f in info:
        model.get_submodule(f['module']).register_forward_hook(
            lambda module, args, out, f=f: seen.update({f['reduction']: out.clone()}))
    x = image()
    model(x)
    assert_same([seen[r] for r in (2, 4, 8, 16, 32)], model.forward_intermediates(x, intermediates_only=True))


@pytest.mark.parametrize(
    ('out_indices', 'taken'),
    [
        ((0, 1, 2, 3, 4), [0, 1, 2, 3, 4]), ((2,), [2]), ((0, 3), [0, 3]), ((-1,), [4]), ((-5, -2), [0, 3]),
        ((1, -1), [1, 4]), (2, [3, 4]),
    ],
    ids=str,
)
def test_features_only_gives_the_maps_asked_for(name, create, out_indices, taken):
    whole = create(name).eval()
    net = create(name, features_only=True, out_indices=out_indices).eval()
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
    net = create(name, features_only=True, feature_cls=feature_cls, out_indices=(0, 2, 4)).double().eval()
    x = image().double()
    with torch.no_grad():
        maps = net(x)
        if feature_cls == 'dict':
            assert list(maps) == ['0', '2', '4']
            maps = list(maps.values())
        assert_same(maps, whole.forward_intermediates(x, indices=[0, 2, 4], intermediates_only=True))
    assert net.feature_info.channels() == [m.shape[1] for m in maps]


@pytest.mark.parametrize('size', [32, 96])
def test_features_only_at_small_sizes(name, create, size):
    net = create(name, features_only=True).eval()
    assert [m.shape[-1] for m in net(image(size, size))] == [size // r for r in (2, 4, 8, 16, 32)]


@pytest.mark.parametrize('output_stride', [8, 16])
def test_features_only_with_output_stride(name, create, output_stride):
    net = create(name, features_only=True, output_stride=output_stride).eval()
    reductions = [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
    assert net.feature_info.reduction() == reductions
    assert [m.shape[-2:] for m in net(image())] == [(64 // r, 96 // r) for r in reductions]


def test_features_only_of_a_real_model(real, create):
    net = create(real, features_only=True, device='meta').eval()
    maps = net(torch.empty(1, 3, 224, 160, device='meta'))
    info = net.feature_info
    assert [m.shape for m in maps] == [
        (1, c, 224 // r, 160 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]


def test_features_only_trains(name, create):
    net = create(name, features_only=True, out_indices=(1, 3)).train()
    sum(m.square().mean() for m in net(image(64, 64))).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []
    assert not any(key.startswith(('layer4', 'fc')) for key, _ in net.named_parameters())


@pytest.mark.parametrize(
    ('indices', 'taken'),
    [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), (5, [0, 1, 2, 3, 4]), ([1, 3], [1, 3]), ((-1,), [4]), ([-4, 4], [1, 4])],
    ids=str,
)
def test_forward_intermediates_indices(model, indices, taken):
    x = image()
    final, maps = model.forward_intermediates(x, indices=indices)
    every = model.forward_intermediates(x, intermediates_only=True)
    assert_same(maps, [every[i] for i in taken])
    torch.testing.assert_close(final, model.forward_features(x))


@pytest.mark.parametrize('norm', [False, True])
def test_forward_intermediates_norm_changes_nothing(model, norm):
    """No norm follows the last stage, as in timm's ResNet: SAN's belongs to its stages."""
    x = image()
    assert_same(
        model.forward_intermediates(x, norm=norm, intermediates_only=True),
        model.forward_intermediates(x, intermediates_only=True),
    )


@pytest.mark.parametrize('last', [0, 1, 2, 3, 4])
def test_forward_intermediates_stop_early_runs_no_further(model, last):
    ran = []
    for stage in range(1, 5):
        model.get_submodule(f'layer{stage}').register_forward_hook(lambda *args, stage=stage: ran.append(stage))
    x = image()
    final, maps = model.forward_intermediates(x, indices=[last], stop_early=True)
    assert ran == list(range(1, last + 1))
    if last > 0:
        torch.testing.assert_close(final, maps[-1])
    ran.clear()
    assert_same(model.forward_intermediates(x, indices=[last], intermediates_only=True), maps)
    assert ran == [1, 2, 3, 4]


@pytest.mark.parametrize('arguments', [dict(output_fmt='NHWC'), dict(indices=[5]), dict(indices=6), dict(indices=[-6])])
def test_forward_intermediates_refuses_what_it_cannot_give(model, arguments):
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(image(), **arguments)


@pytest.mark.parametrize('indices', [[0], [2], [1, 3], [-1], 1, 3], ids=str)
def test_prune_intermediate_layers_keeps_what_is_asked_for(model, indices):
    x = image()
    every = model.forward_intermediates(x, intermediates_only=True)
    size = sum(p.numel() for p in model.parameters())
    taken = model.prune_intermediate_layers(indices)
    assert taken == (list(range(5 - indices, 5)) if isinstance(indices, int) else [i % 5 for i in indices])
    assert_same(model.forward_intermediates(x, indices=taken, intermediates_only=True), [every[i] for i in taken])
    assert isinstance(model.fc, nn.Identity) and model.num_classes == 0
    gone = tuple(f'layer{stage}.' for stage in range(max(taken) + 1, 5)) + ('fc.',)
    left = [key for key, _ in model.named_parameters()]
    assert not any(key.startswith(gone) for key in left)
    assert sum(p.numel() for p in model.parameters()) < size
    model.train()
    sum(m.square().mean() for m in model.forward_intermediates(x, indices=taken, intermediates_only=True)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_prune_can_keep_the_head(model):
    x = image()
    before = model(x)
    assert model.prune_intermediate_layers([4], prune_head=False) == [4]
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize('training', [False, True])
def test_graph_feature_extractor(model, training):
    """torch.fx takes attention as one node and finds everything around it; in float64, as it sees SAN's stem apart."""
    nodes = ['act1', 'layer2', 'layer4', 'global_pool.flatten']
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

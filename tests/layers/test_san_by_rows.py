"""SAN attention computed row by row of the neighbourhood, as on a CPU, against the equation."""
import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import timm_gsa.ops.san.cpu as cpu
from timm_gsa.layers import PairwiseAttention, PatchwiseAttention

from ..gradients import bytes_held, outputs_and_gradients
from .san_layers import CHANGES, generally, images, short_cuts, traced_calls

WEIGHTS = {PairwiseAttention: ['pairwise_weights'], PatchwiseAttention: ['patchwise_weights']}


@pytest.fixture
def by_rows(monkeypatch):
    """Maps of any size are large enough for training by rows."""
    monkeypatch.setattr(cpu, '_LARGE', 1)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 7), (3, 11, 6)])
def test_inference_agrees_with_the_general_path(layer, by_rows, shape, channels_last):
    x = images(*shape, channels_last)
    expected = generally(layer, x).detach()
    assert short_cuts(layer, x) == WEIGHTS[type(layer)]  # gradients are recorded
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        assert len(short_cuts(layer, x)) == 1
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
        weight = layer.attention(*layer.project(x)[:2])
    torch.testing.assert_close(weight, generally(layer.attention, *layer.project(x)[:2]).detach())


@pytest.mark.parametrize('training', [True, False], ids=['training', 'frozen norms'])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [(1, 1, 2), (2, 2, 7), (3, 11, 6)])
def test_training_agrees_with_the_general_path(layer, by_rows, shape, channels_last, training):
    """Output, gradients of the input and all parameters, and running statistics after two steps."""
    other = copy.deepcopy(layer.train(training))
    x = images(*shape, channels_last)

    def twice(layer):
        def run(x, *parameters):
            def once(x):
                return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

            once(x.detach())
            return once(x)

        names = [name for name, _ in layer.named_parameters()]
        return outputs_and_gradients(run, x, *layer.parameters())

    assert short_cuts(copy.deepcopy(layer), x) == WEIGHTS[type(layer)]
    ours, theirs = twice(layer), generally(twice, other)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize('change', [
    lambda norm: setattr(norm, 'momentum', None),
    lambda norm: setattr(norm, 'momentum', 0.5),
    lambda norm: norm.__init__(norm.num_features, track_running_stats=False, dtype=torch.float64),
    lambda norm: norm.__init__(norm.num_features, affine=False, dtype=torch.float64),
])
def test_norms_of_every_setting_train_alike(layer, by_rows, change):
    for norm in (layer.norm1, layer.norm2):
        change(norm)
    other = copy.deepcopy(layer.train())
    x = images(2, 6, 5)
    assert short_cuts(copy.deepcopy(layer), x) == WEIGHTS[type(layer)]
    for _ in range(3):
        torch.testing.assert_close(layer(x), generally(other, x))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


def test_one_number_a_channel_cannot_be_normalised(by_rows):
    """As by the norm itself; of the pairwise kind every place is a number."""
    layer = PatchwiseAttention(48, kernel_size=5).double().train()
    for run in (lambda: layer(images(1, 1, 1)), lambda: generally(layer, images(1, 1, 1))):
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            run()


@pytest.mark.parametrize('kind', [PairwiseAttention, PatchwiseAttention])
def test_small_maps_train_on_the_general_path(kind):
    layer = kind(48, kernel_size=5)
    assert not short_cuts(layer, torch.randn(2, 48, 14, 14))
    assert short_cuts(layer, torch.randn(1, 48, 28, 28)) == WEIGHTS[kind]


@pytest.mark.parametrize('kind', [PairwiseAttention, PatchwiseAttention])
def test_training_on_large_maps_keeps_no_relations(kind):
    """What autograd holds of a layer is no more than its weights and a few maps."""
    layer = kind(64, kernel_size=7)
    x = torch.randn(1, 64, 32, 32, requires_grad=True)
    weights = 4 * layer.num_groups * 49 * 32 * 32
    assert bytes_held(layer, x) < weights + 8 * 4 * x.numel()


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.filterwarnings('ignore:.*weight_norm', 'ignore:.*spectral_norm')
def test_layers_changed_by_hand_take_the_general_path(layer, by_rows, change, train):
    if train and change is CHANGES[0]:
        pytest.skip('norms in training are no change to a layer in training')
    x = images(2, 6, 6)
    layers = [copy.deepcopy(layer.train(train)) for _ in range(3)]
    for each in layers:
        torch.manual_seed(1)
        change(each)
    torch.testing.assert_close(layers[0](x), generally(layers[1], x))
    assert not short_cuts(layers[2], x)


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_transforms_and_autocast_take_the_general_path(layer, by_rows):
    x = torch.randn(3, 2, 48, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert not short_cuts(layer.float(), x[0].float())


def test_half_precision_takes_the_general_path(layer, by_rows):
    with torch.no_grad():
        assert not short_cuts(layer.bfloat16(), torch.randn(1, 48, 6, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize('size', [14, 30])
@pytest.mark.parametrize('kind', [PairwiseAttention, PatchwiseAttention])
def test_training_mode_computes_alike_without_gradients(kind, size):
    layer = kind(32, kernel_size=5).train()
    x = torch.randn(2, 32, size, size)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x), expected)


def test_large_batches_go_in_parts_at_inference(layer, by_rows, monkeypatch):
    """As if a block of memory were large from two images on; the last part is smaller."""
    x = images(5, 9, 8)
    expected = layer(x).detach()
    batches, calls = [], []
    aggregation = cpu.plain.aggregation
    monkeypatch.setattr(
        cpu.plain, 'aggregation', lambda value, *more: batches.append(len(value)) or aggregation(value, *more))
    monkeypatch.setattr(cpu, '_LARGEST_BLOCK', 2 * 2 * 3 * 25 * 72 * 8)
    layer.qkv.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert batches == [2, 2, 1] and calls == [5]


@pytest.mark.parametrize('training', [True, False], ids=['training', 'frozen norms'])
def test_compiled_training_agrees_with_eager_mode_in_one_graph(layer, training):
    """Outputs, all gradients, and running statistics, which follow each batch once, over sizes that vary."""
    torch._dynamo.reset()
    other = copy.deepcopy(layer.train(training))
    counter = CompileCounter()
    run = torch.compile(other, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 11, 6), (3, 9, 14), (5, 8, 8), (2, 3, 40), (2, 30, 31)):
        steps = [step(each, images(*shape), layer) for each, layer in ((layer, layer), (run, other))]
        torch.testing.assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other.state_dict(), layer.state_dict())
    assert counter.frame_count == 1


def step(run, x, layer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(x.shape, dtype=x.dtype, generator=generator).requires_grad_()
    out = run(x)
    probe = torch.randn(out.shape, dtype=x.dtype, generator=generator)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize('training', [True, False], ids=['training', 'frozen norms'])
def test_compiled_training_takes_every_layout(layer, training):
    torch._dynamo.reset()
    other = copy.deepcopy(layer.train(training))
    run = torch.compile(other, backend='aot_eager', fullgraph=True)
    for channels_last in (False, True):
        x = images(2, 9, 7, channels_last)
        steps = [step(each, x, layer) for each, layer in ((layer, layer), (run, other))]
        torch.testing.assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize('kind', [PairwiseAttention, PatchwiseAttention])
def test_compiled_training_needs_a_part_of_the_memory(kind):
    """At its peak in a step, of what the general path needs when it is compiled alike."""
    peaks = []
    for call in (lambda function: function(), generally):
        torch._dynamo.reset()
        layer = kind(64, kernel_size=7)
        run = torch.compile(layer, backend='aot_eager', fullgraph=True)
        x = torch.randn(2, 64, 20, 20, requires_grad=True)
        peaks.append(call(lambda run=run, x=x: peak(lambda: run(x).sum().backward())))
    assert peaks[0] < 0.5 * peaks[1]


def peak(run):
    """Bytes held at most beyond those before, of the second call."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.slow
@pytest.mark.parametrize('change', CHANGES[:8])  # a compiler refuses backward hooks
def test_compiled_training_of_layers_changed_by_hand_takes_the_general_path(layer, change):
    x = images(2, 6, 6)
    assert any('timm_gsa.difference_network' in name or 'timm_gsa.patch_network' in name
               for name in traced_calls(layer, x))
    change(layer)
    assert not any('_network' in name for name in traced_calls(layer, x))

"""Precision and memory layout: autocast, half and double parameters, channels_last, views that are not contiguous."""
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = [torch.bfloat16, torch.float16]
# Relative error of the whole vector that rounding every step to so few bits may add up to.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}


def images(dtype=torch.float32, size=64):
    return torch.randn(4, 3, size, size, dtype=dtype)


def relative_error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(model, x):
    model.zero_grad()
    nn.functional.cross_entropy(model(x).float(), torch.arange(len(x))).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}


def flat(grads):
    return torch.cat([grad.double().flatten() for grad in grads.values()])


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_autocast_stays_close_to_float32(name, create, dtype):
    model = create(name, num_classes=7).eval()
    x = images()
    exact, exact_grads = model(x), gradients(model, x)
    with torch.autocast('cpu', dtype=dtype):
        out = model(x)
    with torch.autocast('cpu', dtype=dtype):
        grads = gradients(model, x)
    assert out.dtype == dtype
    assert relative_error(out, exact) < TOLERANCE[dtype]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    assert relative_error(flat(grads), flat(exact_grads)) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_autocast_trains(name, create, dtype):
    """With batch statistics, and images as far from 0 and 1 as normalised photos are."""
    model = create(name, num_classes=7).train()
    with torch.autocast('cpu', dtype=dtype):
        grads = gradients(model, 2.5 * images())
    assert [key for key, grad in grads.items() if not grad.isfinite().all()] == []
    assert [key for key, buffer in model.named_buffers() if not buffer.isfinite().all()] == []


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_half_parameters_stay_close_to_float32(name, create, dtype):
    model = create(name, num_classes=7).eval()
    x = images()
    exact, exact_grads = model(x), gradients(model, x)
    model.to(dtype)
    out, grads = model(x.to(dtype)), gradients(model, x.to(dtype))
    assert out.dtype == dtype and all(grad.dtype == dtype for grad in grads.values())
    assert relative_error(out, exact) < 2 * TOLERANCE[dtype]
    assert relative_error(flat(grads), flat(exact_grads)) < 4 * TOLERANCE[dtype]


class Softmaxes(TorchDispatchMode):
    """Records the dtype of every softmax that runs."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if 'softmax' in str(func):
            self.dtypes.append(out.dtype)
        return out


@pytest.mark.parametrize('way', ['autocast', 'parameters'])
def test_attention_is_normalised_in_float32(ours, create, way):
    model = create(ours, dtype=torch.bfloat16 if way == 'parameters' else None).eval()
    x = images(torch.bfloat16 if way == 'parameters' else torch.float32)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=way == 'autocast'), Softmaxes() as seen:
        model(x)
    assert set(seen.dtypes) <= {torch.float32}
    assert bool(seen.dtypes) == (ours != 'san_tiny_patchwise'), 'only patchwise attention has no softmax'


def test_double_is_the_same_network_only_finer(name, create):
    model = create(name, num_classes=7).eval()
    x = images()
    with torch.no_grad():
        out = model(x)
        exact = model.double()(x.double())
    assert exact.dtype == torch.float64
    assert 0 < relative_error(out, exact) < 1e-5
    assert all(grad.dtype == torch.float64 for grad in gradients(model, x.double()).values())


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_channels_last_changes_nothing(name, create, training):
    model, other = (create(name, num_classes=7, dtype=torch.float64).train(training) for _ in range(2))
    other = other.to(memory_format=torch.channels_last)
    x = images(torch.float64)
    last = x.to(memory_format=torch.channels_last)
    grads, others = gradients(model, x), gradients(other, last)
    for key, grad in grads.items():
        torch.testing.assert_close(others[key], grad, msg=lambda text, key=key: f'{key}: {text}')
    for (key, buffer), (_, other_buffer) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(other_buffer, buffer, msg=lambda text, key=key: f'{key}: {text}')
    model.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(other(last), model(x))


def test_layout_of_the_input_changes_nothing(name, create):
    model = create(name, num_classes=7, dtype=torch.float64).eval()
    wide = torch.randn(2, 3, 128, 96, dtype=torch.float64)
    with torch.no_grad():
        for view in (wide[:, :, ::2], wide[:, :, 30:94, 17:81], wide.transpose(2, 3), wide[:1].expand(3, -1, -1, -1)):
            torch.testing.assert_close(model(view), model(view.clone(memory_format=torch.contiguous_format)))


def test_inputs_are_left_alone(name, create):
    """Activations work in place: never on what the caller handed in."""
    model = create(name, num_classes=7)
    x = images().requires_grad_()
    before = x.detach().clone()
    model(x).sum().backward()
    assert torch.equal(x, before) and x.grad.isfinite().all() and x.grad.abs().sum() > 0

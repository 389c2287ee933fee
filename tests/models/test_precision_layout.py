"""Precision and memory layout: autocast, half and double parameters, channels_last, views that are not contiguous."""
import pytest
import timm
import torch
from torch import nn

import timm_gsa  # noqa: F401

HALVES = [torch.bfloat16, torch.float16]
# Largest relative error of the logits, and smallest cosine of the gradients, against float32.
CLOSE = {torch.bfloat16: (0.04, 0.98), torch.float16: (0.01, 0.995)}


def images(dtype=torch.float32, size=64):
    """Smooth on the whole, with some noise, and of the scale that normalised photos have."""
    smooth = nn.functional.interpolate(torch.randn(4, 3, size // 8, size // 8), size=size, mode='bicubic')
    return (smooth + 0.3 * torch.randn(4, 3, size, size)).to(dtype)


def relative_error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    nn.functional.cross_entropy(out.float(), torch.arange(len(x))).backward()
    return out.detach(), {key: p.grad.clone() for key, p in model.named_parameters()}


def assert_close_in(dtype, result, exact):
    (out, grads), (exact_out, exact_grads) = result, exact
    error, cosine = CLOSE[dtype]
    assert out.dtype == dtype and relative_error(out, exact_out) < error
    one, other = (torch.cat([grad.double().flatten() for grad in each.values()]) for each in (grads, exact_grads))
    assert one.isfinite().all() and one @ other > cosine * one.norm() * other.norm()
    assert 0.9 < one.norm() / other.norm() < 1.1


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_autocast_stays_close_to_float32(pretrained, dtype):
    """With trained weights: fresh ones amplify rounding, those of timm's ResNet too."""
    model = timm.create_model(pretrained, pretrained=True).eval()
    torch.manual_seed(0)
    x = images()
    exact = gradients(model, x)
    with torch.autocast('cpu', dtype=dtype):
        result = gradients(model, x)
    assert all(grad.dtype == torch.float32 for grad in result[1].values())
    assert_close_in(dtype, result, exact)


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_half_parameters_stay_close_to_float32(pretrained, dtype):
    """Against float32 arithmetic on the same rounded weights and images."""
    model = timm.create_model(pretrained, pretrained=True).eval().to(dtype)
    torch.manual_seed(0)
    x = images(dtype)
    result = gradients(model, x)
    exact = gradients(model.float(), x.float())
    assert all(grad.dtype == dtype for grad in result[1].values())
    assert_close_in(dtype, result, exact)


def test_double_is_the_same_network_only_finer(name, create):
    model = create(name, num_classes=7).eval()
    x = images()
    with torch.no_grad():
        out = model(x)
        exact = model.double()(x.double())
    assert exact.dtype == torch.float64
    assert 0 < relative_error(out, exact) < 1e-5
    assert all(grad.dtype == torch.float64 for grad in gradients(model, x.double())[1].values())


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_channels_last_changes_nothing(name, create, training):
    model, other = (create(name, num_classes=7, dtype=torch.float64).train(training) for _ in range(2))
    other = other.to(memory_format=torch.channels_last)
    x = images(torch.float64)
    last = x.to(memory_format=torch.channels_last)
    (_, grads), (_, others) = gradients(model, x), gradients(other, last)
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

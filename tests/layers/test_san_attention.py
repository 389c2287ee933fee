"""The attention layers of SAN against the authors' numbers and against the equations written with NumPy."""
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_gsa.layers import PairwiseAttention, PatchwiseAttention

from ..san_fixtures import MANIFEST, assert_agrees, golden, made_input, made_weight, modes, official_attention

LAYERS = {"pairwise": PairwiseAttention, "patchwise": PatchwiseAttention}
KINDS = list(LAYERS)


def made_layer(kind: str, kernel_size: int = 3, dim: int = 64, **kwargs: Any) -> nn.Module:
    """A layer of float64 whose weights, norms included, are made as for the golden numbers."""
    layer = LAYERS[kind](dim, kernel_size=kernel_size, dtype=torch.float64, **kwargs)
    for name, tensor in official_attention(layer.state_dict(), layer.dim_key).items():
        tensor.copy_(made_weight(name, tensor.shape))
    return layer.eval()


def batch_norm(x: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
    mean, var, weight, bias = (
        t.detach().numpy().reshape(1, -1, *[1] * (x.ndim - 2))
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / np.sqrt(var + norm.eps) * weight + bias


def conv(x: np.ndarray, module: nn.Conv2d) -> np.ndarray:
    out = np.einsum("oi,bi...->bo...", module.weight.detach().numpy()[:, :, 0, 0], x)
    return out if module.bias is None else out + module.bias.detach().numpy().reshape(1, -1, *[1] * (x.ndim - 2))


def equations(layer: nn.Module, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Output and weights (B, G, K * K, H, W) by the paper's equations in eval mode, one place at a time."""
    x = image.detach().numpy()
    (batch, _, height, width), size = x.shape, layer.kernel_size
    padding = layer.dilation * (size // 2)

    def shifted(z: np.ndarray) -> np.ndarray:  # (B, C, K * K, H, W)
        padded = np.pad(z, ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode="reflect")
        steps = [layer.dilation * i for i in range(size)]
        return np.stack([padded[:, :, top:top + height, left:left + width] for top in steps for left in steps], axis=2)

    query, key, value = np.split(conv(x, layer.qkv), [layer.dim_key, 2 * layer.dim_key], axis=1)
    if isinstance(layer, PairwiseAttention):
        columns, rows = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        position = conv(np.stack([columns, rows])[None], layer.position)
        offset = (position[:, :, None] - shifted(position)).repeat(batch, axis=0)
        relation = np.concatenate([query[:, :, None] - shifted(key), offset], axis=1)
    else:
        relation = np.concatenate([query, shifted(key).reshape(batch, -1, height, width)], axis=1)
    weight = conv(np.maximum(batch_norm(relation, layer.norm1), 0), layer.conv1)
    weight = conv(np.maximum(batch_norm(weight, layer.norm2), 0), layer.conv2)
    if isinstance(layer, PairwiseAttention):
        weight = np.exp(weight) / np.exp(weight).sum(2, keepdims=True)
    else:
        weight = weight.reshape(batch, layer.num_groups, size ** 2, height, width)
    of_channel = weight[:, np.arange(layer.dim_out) % layer.num_groups]
    return (of_channel * shifted(value)).sum(2), weight


# Against the authors' code


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("group", "mode"), modes(MANIFEST["sam_cases"]))
def test_agrees_with_the_authors(group: str, mode: str, dtype: torch.dtype) -> None:
    case, want = MANIFEST["sam_cases"][group], golden(group, mode)
    layer = made_layer(case["kind"], case["k"]).to(dtype).train(mode == "train")
    shape = (case["batch"], case["planes"][0], *case["hw"])
    x = made_input(f"{group}/x", shape).to(dtype).requires_grad_()
    weights = []
    attention = layer.attention
    layer.attention = lambda query, key: weights.append(attention(query, key)) or weights[-1]
    out = layer(x)
    out.backward(made_input(f"{group}/cotangent", want["out"].shape).to(dtype))
    grads = official_attention({name: p.grad for name, p in layer.named_parameters()}, layer.dim_key)
    got = {f"grad_{name}": grad for name, grad in grads.items()}
    assert_agrees(group, mode, {**got, "out": out, "attention": weights[0].flatten(3), "grad_x": x.grad}, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_names_are_those_of_stored_checkpoints(kind: str) -> None:
    norms = {f"{n}.{leaf}" for n in ("norm1", "norm2") for leaf in ("weight", "bias", "running_mean", "running_var")}
    names = {"qkv.weight", "qkv.bias", "conv1.weight", "conv2.weight", "conv2.bias"} | norms
    names |= {"norm1.num_batches_tracked", "norm2.num_batches_tracked"}
    if kind == "pairwise":
        names |= {"position.weight", "position.bias"}
    assert set(LAYERS[kind](32).state_dict()) == names


# Against the equations, where the authors' code cannot go


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (3, 3), (5, 3), (8, 7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_equations(kind: str, size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    layer = made_layer(kind, kernel_size, dilation=dilation)
    x = made_input("x", (2, 64, *size)).double()
    out, weight = equations(layer, x)
    query, key, _ = layer.project(x)
    np.testing.assert_allclose(layer(x).detach(), out, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer.attention(query, key).detach(), weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_equations_at_other_widths(kind: str) -> None:
    layer = made_layer(kind, 5, 20, dim_out=12, dim_key=3, num_groups=4)
    x = made_input("x", (1, 20, 4, 9)).double()
    out, weight = equations(layer, x)
    assert out.shape == (1, 12, 4, 9) and weight.shape == (1, 4, 25, 4, 9)
    np.testing.assert_allclose(layer(x).detach(), out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_on_maps_smaller_than_reflection_allows(kind: str, size: tuple[int, int]) -> None:
    layer = made_layer(kind, 7, 16, dim_out=4, dim_key=2, num_groups=2)
    x = made_input("x", (1, 16, *size)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(kind: str, mode: str) -> None:
    layer = made_layer(kind, 7).train(mode == "train")
    x = made_input("x", (2, 64, 5, 9)).double()
    cotangent = made_input("cotangent", (2, 16, 5, 9)).double()
    layouts = (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.repeat_interleave(2, dim=1)[:, ::2],
    )
    results = []
    for i, layout in enumerate((*layouts, x)):
        if i == len(layouts):
            layer = layer.to(memory_format=torch.channels_last)
        leaf = layout.detach().requires_grad_()
        out = layer(leaf)
        results.append((out, *torch.autograd.grad(out, (leaf, *layer.parameters()), cotangent)))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-9, atol=1e-9)


# Paths of execution


def scripted(layer: nn.Module, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    return torch.jit.script(layer)


def exported(layer: nn.Module, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    height, width = (torch.export.Dim(name, min=4, max=99) for name in ("height", "width"))
    sizes = {0: torch.export.Dim("batch", max=9), 2: height, 3: width}
    return torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()


def compiled(layer: nn.Module, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("path", [scripted, exported, compiled])
@pytest.mark.parametrize("kind", KINDS)
def test_every_path_agrees(kind: str, path: Callable, mode: str) -> None:
    if path is exported and mode == "train" and torch.__version__.startswith("2.5."):
        pytest.skip("programs that torch 2.5 exports in training cannot be trained: norms change in place")
    layer = made_layer(kind).train(mode == "train")
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    call = path(layer, made_input("other", (3, 64, 6, 6)).double())
    results = []
    for run in (layer, call):
        layer.load_state_dict(state)
        x = made_input("x", (2, 64, 5, 9)).double().requires_grad_()
        out = run(x)
        grads = torch.autograd.grad(out.sin().sum(), (x, *layer.parameters()))
        results.append((out, grads, layer.norm1.running_mean.clone(), layer.norm2.running_var.clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


# Precision


@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_of_a_large_map_are_close_to_float32(kind: str, how: str) -> None:
    """In bfloat16 the coordinates of a map of this size differ by no more than their own rounding error."""
    torch.manual_seed(0)
    layer = LAYERS[kind](64, kernel_size=3).train()
    layer.norm1.momentum = layer.norm2.momentum = 1.
    x = torch.randn(1, 64, 96, 112)
    with torch.no_grad():
        layer(x)  # norms of realistic scale
        layer.eval()
        query, key, _ = layer.project(x)
        want = layer.attention(query, key)
        if how == "weights":
            layer, x = layer.bfloat16(), x.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            query, key, _ = layer.project(x)
            got = layer.attention(query, key)
    if kind == "pairwise":
        assert got.dtype == torch.float32
        assert (got.sum(2) - 1).abs().max() < 1e-5
    spread = (want - want.mean(2, keepdim=True)).norm()
    assert (got - want).norm() / spread < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gradients_are_close_to_float32(kind: str, dtype: torch.dtype) -> None:
    layer = made_layer(kind, 7).float().train()
    results = []
    for enabled in (False, True):
        x = made_input("x", (2, 64, 14, 14)).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = layer(x)
        results.append((out, *torch.autograd.grad(out.float().square().mean(), (x, layer.qkv.weight))))
    for got, want in zip(results[1], results[0], strict=True):
        assert got.isfinite().all()
        assert (got.float() - want).norm() / want.norm() < (0.1 if dtype == torch.bfloat16 else 0.02)


# Arguments


def test_widths_default_to_the_paper() -> None:
    layer = PairwiseAttention(256)
    assert (layer.kernel_size, layer.dim_key, layer.dim_out, layer.num_groups) == (7, 16, 64, 8)


@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(dim=64, kernel_size=4), "kernel_size must be odd and >= 1, got 4"),
    (dict(dim=64, dilation=0), "dilation must be >= 1, got 0"),
    (dict(dim=64, num_groups=3), "num_groups must divide dim_out = 16, got 3"),
    (dict(dim=64, num_groups=0), "num_groups must divide dim_out = 16, got 0"),
    (dict(dim=16), "num_groups must divide dim_out = 4, got 0"),
    (dict(dim=8, dim_out=8), r"dim_key must be >= 1, got 0 \(a sixteenth of dim = 8 where not given\)"),
])
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_out_of_range_are_refused(kind: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[kind](**kwargs)

"""Aggregation against the SAN authors' numbers and against loops over single numbers, on every path of execution."""
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_gsa.ops import aggregation, reflect_pad
from timm_gsa.ops.san.reference import aggregation as aggregation_reference

from ..san_fixtures import MANIFEST, arrays, assert_agrees, golden, made_input

# Stride and zero padding exist in the authors' operator only, their networks use neither.
CASES = [
    name for name, case in MANIFEST["op_cases"].items()
    if case["op"] == "aggregation" and case["stride"] == 1 and case["pad_mode"] == "reflect"
]
SIZES = [(1, 1), (1, 4), (2, 3), (3, 5), (5, 4), (7, 6)]
HALF = [torch.bfloat16, torch.float16]


def made_case(
        size: tuple[int, int],
        kernel_size: int,
        channels: int = 6,
        groups: int = 3,
        batch: int = 2,
        dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, weight and cotangent."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(batch, groups, kernel_size ** 2, *size, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype),
    )


def with_gradients(
        operation: Callable[..., torch.Tensor],
        value: torch.Tensor,
        weight: torch.Tensor,
        cotangent: torch.Tensor,
        *args: int,
) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of value and weight; inputs keep their memory layout."""
    leaves = value.detach().requires_grad_(), weight.detach().requires_grad_()
    out = operation(*leaves, *args)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))


def loops(
        value: torch.Tensor,
        weight: torch.Tensor,
        cotangent: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, ...]:
    """Output and both gradients, one product (of every image) at a time."""
    v, w, g = value.numpy(), weight.numpy(), cotangent.numpy()
    (_, channels, height, width), groups = v.shape, w.shape[1]
    padding = dilation * (kernel_size // 2)
    rows = np.pad(np.arange(height), padding, mode="reflect")
    columns = np.pad(np.arange(width), padding, mode="reflect")
    out, grad_v, grad_w = np.zeros_like(v), np.zeros_like(v), np.zeros_like(w)
    for c, i, j in np.ndindex(channels, height, width):
        group = c % groups
        for ky, kx in np.ndindex(kernel_size, kernel_size):
            y, x, place = rows[i + ky * dilation], columns[j + kx * dilation], ky * kernel_size + kx
            out[:, c, i, j] += w[:, group, place, i, j] * v[:, c, y, x]
            grad_v[:, c, y, x] += w[:, group, place, i, j] * g[:, c, i, j]
            grad_w[:, group, place, i, j] += v[:, c, y, x] * g[:, c, i, j]
    return torch.from_numpy(out), torch.from_numpy(grad_v), torch.from_numpy(grad_w)


def assert_all_close(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], tolerance: float = 1e-12) -> None:
    for name, a, b in zip(("output", "gradient of value", "gradient of weight"), got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


# What it computes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operation", [aggregation, aggregation_reference])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_authors(name: str, operation: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    case, want = MANIFEST["op_cases"][name], golden("ops", name)
    value, weight, cotangent = (
        made_input(f"ops/{name}/{x}", want[f"grad_{x}" if x != "cotangent" else "out"].shape).to(dtype)
        for x in ("x", "weight", "cotangent")
    )
    weight = weight.unflatten(3, case["hw"])
    out, grad_x, grad_weight = with_gradients(operation, value, weight, cotangent, case["k"], case["dilation"])
    assert_agrees("ops", name, {"out": out, "grad_x": grad_x, "grad_weight": grad_weight.flatten(3)}, dtype)


def test_inputs_of_the_golden_numbers_are_those_stored_with_them() -> None:
    for name in ("x", "weight", "cotangent"):
        stored = torch.from_numpy(arrays("ops")[f"aggregation_k3_min/in_{name}"])
        assert torch.equal(made_input(f"ops/aggregation_k3_min/{name}", stored.shape), stored)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_loops(size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    case = made_case(size, kernel_size)
    want = loops(*case, kernel_size, dilation)
    assert_all_close(with_gradients(aggregation, *case, kernel_size, dilation), want)
    assert_all_close(with_gradients(aggregation_reference, *case, kernel_size, dilation), want)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (8, 1), (5, 5), (16, 2)])
def test_channels_share_weights_modulo_the_groups(channels: int, groups: int) -> None:
    case = made_case((4, 3), 3, channels, groups)
    assert_all_close(with_gradients(aggregation, *case, 3), loops(*case, 3, 1))


@pytest.mark.parametrize("wanted", ["value", "weight"])
def test_gradient_of_one_input_alone(wanted: str) -> None:
    value, weight, cotangent = made_case((5, 4), 3)
    _, grad_value, grad_weight = loops(value, weight, cotangent, 3, 1)
    leaf, want = (value, grad_value) if wanted == "value" else (weight, grad_weight)
    leaf.requires_grad_()
    (grad,) = torch.autograd.grad(aggregation(value, weight, 3), leaf, cotangent)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


def test_empty_batch() -> None:
    out, grad_value, grad_weight = with_gradients(aggregation, *made_case((4, 5), 3, batch=0), 3)
    assert out.shape == grad_value.shape == (0, 6, 4, 5)
    assert grad_weight.shape == (0, 3, 9, 4, 5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [3, 32])
@pytest.mark.parametrize("layout", [
    "channels_last", "value only", "places innermost", "permuted", "sliced", "expanded"])
def test_memory_layout_does_not_matter(layout: str, groups: int, batch: int) -> None:
    value, weight, cotangent = made_case((5, 7), 3, 2 * groups, groups, batch)
    if layout == "expanded":
        value = value[:, :1].expand(-1, 2 * groups, -1, -1)
        weight = weight[:, :, :1, :1].expand(-1, -1, 9, 5, -1)
        cotangent = cotangent[:, :, :, :1].expand(-1, -1, -1, 7)
    want = loops(value, weight, cotangent, 3, 1)
    if layout in ("channels_last", "value only", "places innermost"):
        value, cotangent = (x.to(memory_format=torch.channels_last) for x in (value, cotangent))
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last_3d)
    elif layout == "places innermost":
        weight = weight.flatten(1, 2).to(memory_format=torch.channels_last).unflatten(1, (groups, 9))
    elif layout == "permuted":
        value, cotangent = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (value, cotangent))
        weight = weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    elif layout == "sliced":
        value = value.repeat_interleave(2, dim=3)[..., ::2]
        weight = weight.repeat_interleave(3, dim=1)[:, 1::3]
        cotangent = torch.cat([cotangent, cotangent], dim=1)[:, 2 * groups:]
    assert_all_close(with_gradients(aggregation, value, weight, cotangent, 3), want)
    with torch.no_grad():
        torch.testing.assert_close(aggregation(value, weight, 3), want[0], rtol=1e-12, atol=1e-12)


# Derivatives in every way torch takes them


@pytest.mark.parametrize(("size", "dilation"), [((3, 4), 1), ((2, 1), 1), ((3, 3), 2)])
def test_gradcheck(size: tuple[int, int], dilation: int) -> None:
    value, weight, _ = made_case(size, 3, channels=4, groups=2)
    inputs = value.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: aggregation(v, w, 3, dilation), inputs)


@pytest.mark.parametrize("size", [(2, 3), (1, 1)], ids=str)
def test_second_derivatives(size: tuple[int, int]) -> None:
    value, weight, _ = made_case(size, 3, channels=2, groups=1, batch=1)
    inputs = value.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v, w: aggregation(v, w, 3), inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms() -> None:
    value, weight, cotangent = made_case((4, 5), 3, batch=3)
    _, grad_value, grad_weight = loops(value, weight, cotangent, 3, 1)

    def loss(value: torch.Tensor, weight: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        return (aggregation(value[None], weight[None], 3)[0] * cotangent).sum()

    for weights, axis in ((weight, 0), (weight[0], None)):
        got = torch.func.vmap(torch.func.grad(loss), (0, axis, 0))(value, weights, cotangent)
        _, want, _ = loops(value, weights.expand_as(weight), cotangent, 3, 1)
        torch.testing.assert_close(got, want)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(value, weight, cotangent)
    torch.testing.assert_close(per_sample, (grad_value, grad_weight))


def test_backward_keeps_its_two_inputs_only() -> None:
    value, weight, _ = made_case((8, 9), 7)
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        aggregation(value.requires_grad_(), weight.requires_grad_(), 7)
    assert sum(kept.values()) == value.numel() + reflect_pad(value, 3).numel() + weight.numel()


# Paths of execution


class Module(nn.Module):
    def __init__(self, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation

    def forward(self, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return aggregation(value, weight, self.kernel_size, self.dilation)


def scripted(module: Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    return torch.jit.script(module)


def traced(module: Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    return torch.jit.trace(module, inputs)


def exported(module: Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    return torch.export.export(module, inputs).module()


def compiled(module: Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("path", "size", "kernel_size", "dilation"), [
    *((path, (6, 5), 3, 2) for path in (scripted, traced, exported, compiled)),
    *((path, (2, 3), 5, 1) for path in (scripted, traced, exported, compiled)),
    *((path, (1, 1), 3, 1) for path in (scripted, traced, exported, compiled)),
])
def test_every_path_agrees(path: Callable, size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    value, weight, cotangent = made_case(size, kernel_size)
    call = path(Module(kernel_size, dilation), value, weight)
    want = loops(value, weight, cotangent, kernel_size, dilation)
    assert_all_close(with_gradients(call, value, weight, cotangent), want)
    with torch.no_grad():
        torch.testing.assert_close(call(value, weight), want[0], rtol=1e-12, atol=1e-12)
    last = value.to(memory_format=torch.channels_last)
    torch.testing.assert_close(call(last, weight), want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    case = made_case((6, 5), 3, dtype=torch.float32)
    want = loops(*(x.double() for x in case), 3, 1)
    got = with_gradients(torch.compile(aggregation, fullgraph=True), *case, 3)
    assert_all_close(tuple(x.double() for x in got), want, tolerance=1e-5)


def test_compiled_once_for_sizes_that_vary() -> None:
    torch._dynamo.reset()
    call = torch.compile(Module(3, 1), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((8, 10), (5, 13)):  # torch would tie a width of 9 to the K * K places
            value, weight, cotangent = made_case(size, 3)
            torch.testing.assert_close(call(value, weight), loops(value, weight, cotangent, 3, 1)[0])


@pytest.mark.parametrize(("size", "kernel_size", "dilation", "dtype"), [
    *((*case, torch.float64) for case in (
        ((6, 5), 3, 2), ((9, 20), 5, 1), ((20, 9), 7, 1), ((2, 17), 5, 1), ((3, 4), 1, 1))),
    ((6, 5), 3, 2, torch.bfloat16)])
def test_compiled_inference_agrees_in_every_layout(
        size: tuple[int, int], kernel_size: int, dilation: int, dtype: torch.dtype) -> None:
    value, weight, cotangent = made_case(size, kernel_size, dtype=dtype)
    want = loops(*(x.double() for x in (value, weight, cotangent)), kernel_size, dilation)[0].to(dtype)
    call = compiled(Module(kernel_size, dilation), value, weight)
    innermost = weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    with torch.no_grad():
        for values in (value, value.contiguous(memory_format=torch.channels_last)):
            for weights in (weight, innermost):
                out = call(values, weights)
                assert out.stride() == values.stride()
                torch.testing.assert_close(out, want)


def test_compiled_training_takes_sizes_that_vary_and_keeps_its_inputs_alone() -> None:
    torch._dynamo.reset()
    call = torch.compile(Module(7, 1), backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((12, 12), (9, 11), (16, 10)):
        case = made_case(size, 7)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            got = with_gradients(call, *case)
        assert_all_close(got, loops(*case, 7, 1))
        padded = reflect_pad(case[0], 3)
        assert 0 < sum(x.numel() for x in kept) <= sum(x.numel() for x in (*case[:2], padded))


@pytest.mark.parametrize("groups", [3, 32])
@pytest.mark.parametrize("padded_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
def test_compiled_training_is_a_sound_operator(groups: int, padded_last: bool, weight_last: bool) -> None:
    value, weight, _ = made_case((5, 8), 3, 2 * groups, groups)
    padded = reflect_pad(value, 1)
    if padded_last:
        padded = padded.contiguous(memory_format=torch.channels_last)
    if weight_last:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    inputs = padded.requires_grad_(), weight.requires_grad_(), 3, 1
    torch.library.opcheck(torch.ops.timm_gsa.shifted_sum.default, inputs)
    call = partial(torch.ops.timm_gsa.shifted_sum, kernel_size=3, dilation=1)
    assert torch.autograd.gradgradcheck(call, inputs[:2], fast_mode=True)


def test_exported_with_sizes_that_vary() -> None:
    batch, height, width = (torch.export.Dim(name, min=4, max=64) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: height, 3: width}, {0: batch, 3: height, 4: width}
    value, weight, _ = made_case((8, 9), 5, batch=6)
    program = torch.export.export(Module(5, 1), (value, weight), dynamic_shapes=sizes)
    value, weight, cotangent = made_case((5, 13), 5, batch=4)
    torch.testing.assert_close(program.module()(value, weight), loops(value, weight, cotangent, 5, 1)[0])


# Precision


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_half_precision_rounds_the_sum_only_once(kernel_size: int, dtype: torch.dtype) -> None:
    case = made_case((12, 13), kernel_size, channels=16, groups=2, dtype=dtype)
    exact = with_gradients(aggregation_reference, *(x.double() for x in case), kernel_size)
    terms = with_gradients(aggregation_reference, *(x.double().abs() for x in case), kernel_size)
    with torch.no_grad():
        plain = aggregation(*case[:2], kernel_size)
    paths = {
        "eager": with_gradients(aggregation, *case, kernel_size),
        "compiled": with_gradients(compiled(Module(kernel_size, 1)), *case),
    }
    assert torch.equal(plain, paths["eager"][0])
    for path, (out, grad_value, grad_weight) in paths.items():
        assert out.dtype == grad_value.dtype == grad_weight.dtype == dtype
        u = unit_roundoff(dtype)
        single = 100 * unit_roundoff(torch.float32)  # at most 49 additions
        assert ((out - exact[0]).abs() <= 1.01 * u * exact[0].abs() + single * terms[0]).all(), path
        inside = (..., slice(4, 8), slice(4, 9))  # folding the mirrored border back adds up to four rounded sums
        limit = 1.01 * u * exact[1].abs() + single * terms[1]
        assert ((grad_value - exact[1]).abs()[inside] <= limit[inside]).all(), path
        assert ((grad_value - exact[1]).abs() <= 4 * u * terms[1]).all(), path
        # The 8 products summed for a weight are rounded one by one.
        assert ((grad_weight - exact[2]).abs() <= 2.01 * u * terms[2]).all(), path


@pytest.mark.parametrize(("dtype", "kernel_size"), [(torch.bfloat16, 21), (torch.float16, 47)], ids=str)
def test_half_precision_sums_beyond_its_own_integers(dtype: torch.dtype, kernel_size: int) -> None:
    places = kernel_size ** 2
    value = torch.ones(1, 1, 1, 1, dtype=dtype)
    out = aggregation(value, torch.ones(1, 1, places, 1, 1, dtype=dtype), kernel_size)
    assert out.item() == torch.tensor(places).to(dtype).item()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_mixed_precision_follows_the_value(dtype: torch.dtype) -> None:
    value, weight, cotangent = made_case((6, 7), 5, channels=16, groups=2, dtype=torch.float32)
    exact = aggregation_reference(value.to(dtype).double(), weight.double(), 5)
    terms = aggregation_reference(value.to(dtype).double().abs(), weight.double().abs(), 5)
    out, grad_value, grad_weight = with_gradients(aggregation, value.to(dtype), weight, cotangent, 5)
    assert (out.dtype, grad_value.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    assert ((out - exact).abs() <= 2.01 * unit_roundoff(dtype) * terms).all()  # the weights' rounding and the result's
    out, grad_value, grad_weight = with_gradients(aggregation, value, weight.to(dtype), cotangent, 5)
    assert (out.dtype, grad_value.dtype, grad_weight.dtype) == (torch.float32, torch.float32, dtype)
    torch.testing.assert_close(out, aggregation(value, weight.to(dtype).float(), 5))


def test_autocast_leaves_float32_alone() -> None:
    case = made_case((6, 7), 5, dtype=torch.float32)
    want = with_gradients(aggregation, *case, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(aggregation, *case, 5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Arguments


@pytest.mark.parametrize(("value", "weight", "kernel_size", "dilation", "message"), [
    ((6, 4, 5), (1, 3, 9, 4, 5), 3, 1, r"value must be \(B, C, H, W\).* got shapes \[6, 4, 5\] and \[1, 3, 9, 4, 5\]"),
    ((1, 6, 4, 5), (1, 3, 9, 20), 3, 1, r"weight \(B, G, K \* K, H, W\), got shapes \[1, 6, 4, 5\] and \[1, 3, 9, 20"),
    ((1, 6, 4, 5), (1, 3, 25, 4, 5), 3, 1, r"weight must hold kernel_size \*\* 2 = 9 places, got 25"),
    ((1, 6, 4, 5), (1, 4, 9, 4, 5), 3, 1, "channels of value must be a multiple of the weight groups, got 6 and 4"),
    ((1, 6, 4, 5), (1, 3, 9, 3, 5), 3, 1, r"agree in batch size, height and width, got .*\[1, 3, 9, 3, 5\]"),
    ((1, 6, 4, 5), (1, 3, 9, 4, 1), 3, 1, r"agree in batch size, height and width, got .*\[1, 3, 9, 4, 1\]"),
    ((2, 6, 4, 5), (1, 3, 9, 4, 5), 3, 1, r"agree in batch size, height and width, got .*\[2, 6, 4, 5\]"),
    ((1, 6, 4, 5), (1, 3, 16, 4, 5), 4, 1, "kernel_size must be odd and >= 1, got 4"),
    ((1, 6, 4, 5), (1, 3, 9, 4, 5), 3, 0, "dilation must be >= 1, got 0"),
])
def test_arguments_that_do_not_fit_are_refused(
        value: tuple[int, ...],
        weight: tuple[int, ...],
        kernel_size: int,
        dilation: int,
        message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        aggregation(torch.zeros(value), torch.zeros(weight), kernel_size, dilation)

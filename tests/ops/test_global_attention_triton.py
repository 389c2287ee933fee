"""The Triton kernels behind GSA's operations: in Triton's interpreter on any machine, and on a GPU where there is one.

What is in `TestKernels` runs in a process of its own, started by test_kernels.py.
"""
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import timm_gsa
from timm_gsa.layers import GlobalSelfAttention
from timm_gsa.ops import column_attention, content_attention, global_attention, row_attention
from timm_gsa.ops.gsa.plain import column_attention as plain_column
from timm_gsa.ops.gsa.plain import content_and_row_attention as plain_gather
from timm_gsa.ops.gsa.plain import content_attention as plain_content

from .triton_runs import INTERPRETED, Interpreted, Launches, needs_cuda, needs_triton, spilled

backend = importlib.import_module("timm_gsa.ops._backend")
KERNELS = "timm_gsa.ops.gsa.triton_attention"

# Heads, channels of a head, height and width, layout: heads that share a block and that fill one, narrow ones on lines
# longer than half a tile, lines of one position, of a block and of several, channels that are no power of two.
CASES = [
    (3, 4, (5, 7), "last"),
    (2, 8, (17, 3), "first"),
    (1, 12, (1, 1), "last"),
    (2, 32, (7, 7), "first"),
    (2, 5, (34, 1), "last"),
    (4, 8, (33, 5), "last"),
    (3, 8, (40, 2), "first"),
    (1, 16, (1, 66), "last"),
    (2, 40, (3, 4), "slice"),
]


def made(heads: int, depth: int, size: tuple[int, int], layout: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A map (2, heads, d, H, W); in a slice, heads and channels are no single axis and all around is NaN."""
    x = torch.randn(2, *size, heads, depth, dtype=torch.float64).to(device, dtype)
    if layout == "first":
        return x.permute(0, 3, 4, 1, 2).contiguous()
    if layout == "last":  # as a projection to query, key and value has it
        packed = torch.full((2, *size, 3, heads, depth), float("nan"), dtype=dtype, device=device)
        packed[:, :, :, 1] = x
        return packed[:, :, :, 1].permute(0, 3, 4, 1, 2)
    around = torch.full((3, size[0] + 2, size[1] + 1, heads + 1, depth + 3), float("nan"), dtype=dtype, device=device)
    inside = around[1:, 1:-1, 1:, :-1, 2:-1]
    inside.copy_(x)
    return inside.permute(0, 3, 4, 1, 2)


def case(
        heads: int,
        depth: int,
        size: tuple[int, int],
        layout: str,
        dtype: torch.dtype,
        device: str = "cpu",
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Query, key, value and cotangent, and the two tables."""
    torch.manual_seed(0)
    maps = [made(heads, depth, size, layout, dtype, device) for _ in range(4)]
    tables = [torch.randn(2 * length - 1, depth, dtype=torch.float64).to(device, dtype) for length in size]
    return maps, *tables


def exact(function: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a function gives in float64, and its gradients, for all but the last tensor, which is the cotangent."""
    inputs = [x.double().detach().requires_grad_() for x in tensors[:-1]]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, tensors[-1].double())


def assert_near(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error = (a.double() - b).norm() / (b.norm() + 0.1 * b.numel() ** 0.5)
        assert error <= limit, float(error)  # false of NaN


def far(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same map with these strides."""
    last = sum(stride * (size - 1) for stride, size in zip(strides, x.shape, strict=True))
    storage = torch.UntypedStorage(x.element_size() * (last + 1))
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, strides).copy_(x)


def transposed(*maps: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(-1, -2) for x in maps]


def assert_all_agree(kernels: Any, arguments: tuple[Any, ...], dtype: torch.dtype, device: str) -> None:
    """All functions of the module agree with the plain forms in float64, along columns and, by `gather`, rows."""
    (query, key, value, grad), table_h, table_w = case(*arguments, dtype, device)
    heads, depth = value.shape[1:3]
    got = kernels.attend(query, value, table_h), *kernels.attend_backward(grad, query, value, table_h)
    assert_near(got, exact(plain_column, query, value, table_h, grad), dtype)
    got = kernels.content(query, key, value), *kernels.content_backward(grad, query, key, value)
    assert_near(got, exact(plain_content, query, key, value, grad), dtype)

    column = made(*arguments, dtype, device)
    got = kernels.gather(query, key, value, column, table_w), *kernels.gather_backward(
        grad, query, key, value, column, table_w)
    assert_near(got, exact(plain_gather, query, key, value, column, table_w, grad), dtype)

    scale, shift = torch.randn(2, heads * depth, device=device)
    q, k, v, h, w, a, b = (x.double() for x in (query, key, value, table_h, table_w, scale, shift))
    column = plain_column(q, v, h) * a.view(heads, depth, 1, 1) + b.view(heads, depth, 1, 1)
    both = plain_content(q, k, v) + plain_column(*transposed(q, column), w).transpose(-1, -2)
    assert_near((kernels.fused(query, key, value, table_h, table_w, scale, shift),), (both,), dtype)


# Where the kernels are taken


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_why_no_triton", lambda device: None)


def operators(function: Any, *tensors: torch.Tensor) -> list[str]:
    """Operators of this package in the graph that torch.compile makes of a call."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("timm_gsa")]


@needs_triton
def test_a_gpu_computes_by_operators(on_a_gpu: None) -> None:
    with torch._subclasses.FakeTensorMode():
        query, key, value = torch.empty(3, 2, 4, 8, 6, 5, device="cuda").unbind()
        tables = [torch.empty(2 * length - 1, 8, device="cuda") for length in (6, 5)]
        assert operators(content_attention, query, key, value) == ["timm_gsa.triton_content_attention.default"]
        assert operators(column_attention, query, value, tables[0]) == ["timm_gsa.triton_column_attention.default"]
        assert operators(row_attention, query, value, tables[1]) == ["timm_gsa.triton_column_attention.default"]
        wide = torch.empty(2, 1, 80, 6, 5, device="cuda")
        assert operators(content_attention, wide, wide, wide) == []
        assert operators(content_attention, *(x.double() for x in (query, key, value))) == []


@needs_triton
def test_a_gpu_computes_a_layer_at_once_in_inference(on_a_gpu: None) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 16, 6, 5, device="cuda")
        affine = [torch.empty(16, device="cuda")] * 2
        tables = [torch.empty(2 * length - 1, 8, device="cuda") for length in (6, 5)]
        out = global_attention(x, torch.empty(48, 16, device="cuda"), None, *tables, *affine, 2)
        assert out.shape == (2, 16, 3, 3)
        layer = GlobalSelfAttention(16, (6, 5), num_heads=2, device="cuda").eval()
        with torch.no_grad():
            assert operators(layer, x) == ["timm_gsa.triton_global_attention.default"]
        names = [f"timm_gsa.triton_{name}_attention.default" for name in ("column", "content_and_row")]
        assert operators(layer, x) == names


@needs_triton
def test_exported_programs_hold_no_operator_of_ours(on_a_gpu: None) -> None:
    with torch._subclasses.FakeTensorMode():
        layer = GlobalSelfAttention(16, (6, 5), num_heads=2, device="cuda").eval()
        program = torch.export.export(layer, (torch.empty(2, 16, 6, 5, device="cuda"),))
    assert not any("timm_gsa" in str(node.target) for node in program.graph.nodes)


# What they are compiled to


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.slow
@pytest.mark.parametrize(("depth", "size"), [(8, 56), (16, 56), (16, 28), (32, 14), (64, 7), (32, 40)])
def test_compiled_for_a_gpu_they_keep_what_they_need_in_registers(
        depth: int,
        size: int,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module(KERNELS)
    launches = recorded(kernels, monkeypatch)
    monkeypatch.setattr(kernels, "_PROGRAMS", 8)  # each takes several lines, as in a batch of usual size
    everything(kernels, depth, (size, size), "last")
    names = {name for name, each in launches.items() if each.variants}
    assert names >= {"_attend_backward", "_context", "_content", "_content_backward"}
    assert ("_attend_tiles" in names) == (depth == 8)
    assert ("_merge" in names) == (size > 14)
    for name in names:
        for program in launches[name].compiled():
            if name not in ("_unfold", "_merge"):
                assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\S* .*, 0x10", program.asm["ptx"]), name
            stack, local, told = spilled(program, tmp_path / f"{name}.cubin")
            assert stack <= 64 and local == 0, (name, told)


def recorded(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    """All kernels of the module, none of which is launched from now on."""
    import triton

    launches = {
        name: Launches(kernel) for name, kernel in vars(kernels).items()
        if isinstance(kernel, triton.JITFunction) and any(param.do_not_specialize for param in kernel.params)
    }
    for name, launch in launches.items():
        monkeypatch.setattr(kernels, name, launch)
    return launches


def everything(kernels: Any, depth: int, size: tuple[int, int], layout: str) -> None:
    (query, key, value, grad), table_h, table_w = case(8, depth, size, layout, torch.bfloat16)
    kernels.fused(query, key, value, table_h, table_w, *torch.ones(2, 8 * depth))
    kernels.content(query, key, value)
    kernels.gather_backward(grad, query, key, value, value, table_w)
    kernels.attend_backward(grad, query, value, table_h)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_maps_of_other_sizes_need_no_compilation(depth: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes are of several blocks. Channels first, numbers of positions have the same common factor with 8."""
    kernels = importlib.import_module(KERNELS)
    launches = recorded(kernels, monkeypatch)
    counts = []
    for size in ((72, 80), (97, 88), (128, 103), (96, 96)):
        everything(kernels, depth, size, layout)
        counts.append({name: len(each.variants) for name, each in launches.items()})
    assert counts[0]["_context"] == 2  # with and without softmax
    assert all(count == counts[0] for count in counts)


# What they compute


class TestKernels(Interpreted):
    """On CPU tensors, in Triton's interpreter, whose matrix products do not take bfloat16."""

    @pytest.mark.parametrize("arguments", [
        (3, 4, (4, 3), "last"), (1, 5, (34, 1), "first"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[:5] + CASES[7:]),
    ])
    def test_agree_with_the_plain_forms(self, arguments: tuple[Any, ...]) -> None:
        assert_all_agree(importlib.import_module(KERNELS), arguments, torch.float32, "cpu")

    @pytest.mark.parametrize("arguments", [
        (1, 8, (33, 1), "last"), pytest.param((2, 8, (33, 2), "first"), marks=pytest.mark.slow),
    ])
    def test_agree_in_half_precision(self, arguments: tuple[Any, ...]) -> None:
        assert_all_agree(importlib.import_module(KERNELS), arguments, torch.float16, "cpu")

    @pytest.mark.parametrize("layout", ["last", pytest.param("first", marks=pytest.mark.slow)])
    def test_positions_are_split_where_images_and_heads_are_few(self, layout: str) -> None:
        kernels = importlib.import_module(KERNELS)
        (query, key, value, grad), _, _ = case(1, 4, (23, 31), layout, torch.float32)
        assert kernels._splits(2, 23 * 31, 128) == (3, 256)
        assert kernels._splits(1024, 56 * 56, 128) == (1, 25 * 128)
        key[0, :, :, :9] = float("-inf")  # of more than a split
        got = kernels.content(query, key, value), *kernels.content_backward(grad, query, key, value)
        assert_near(got, exact(plain_content, query, key, value, grad), torch.float32)

    def test_gradient_of_a_float32_table_is_not_rounded_to_half(self) -> None:
        (query, _, value, grad), table, _ = case(2, 8, (34, 2), "last", torch.float16)
        for length in (34, 7):
            q, v, g = (x[..., :length, :] for x in (query, value, grad))
            wide = table[34 - length:33 + length].float()
            with timm_gsa.use_backend("triton"):
                leaf = wide.clone().requires_grad_()
                out = column_attention(q, v, leaf)
            (got,) = torch.autograd.grad(out, leaf, g)
            assert out.dtype == torch.float16 and got.dtype == torch.float32
            expected = exact(plain_column, q, v, wide, g)[3]
            assert ((got - got.half()).abs() > 0).any()
            assert (got.double() - expected).norm() < 3e-4 * expected.norm()

    @pytest.mark.parametrize("layout", ["last", "first"])
    def test_offsets_beyond_32_bits(self, layout: str) -> None:
        """Rows, then images, lie 2^30 numbers apart: pages of memory that nobody touches cost nothing."""
        kernels = importlib.import_module(KERNELS)
        maps, table, _ = case(1, 4, (3, 2), layout, torch.float32)
        query, key, value, grad = (torch.cat([x, x[:1]]) for x in maps)
        inner, step = (1, 8, 4) if layout == "last" else (6, 2, 1), 2 ** 30
        for strides in ((24, 4, inner[0], step, inner[2]), (step, 4, *inner)):
            q, k, v, g = (far(x, strides) for x in (query, key, value, grad))
            got = kernels.attend(q, v, table), *kernels.attend_backward(g, q, v, table)
            assert_near(got, exact(plain_column, query, value, table, grad), torch.float32)
            got = kernels.content(q, k, v), *kernels.content_backward(g, q, k, v)
            assert_near(got, exact(plain_content, query, key, value, grad), torch.float32)

    def test_gradients_may_be_expanded(self) -> None:
        kernels = importlib.import_module(KERNELS)
        (query, key, value, _), _, _ = case(1, 4, (2, 3), "last", torch.float32)
        grad = torch.randn(2, 1, 4, 1, 1).expand_as(value)
        got = kernels.content(query, key, value), *kernels.content_backward(grad, query, key, value)
        assert_near(got, exact(plain_content, query, key, value, grad), torch.float32)
        rows = grad[..., :1] * torch.arange(1., 3.)[:, None]
        got = kernels.content(query, key, value), *kernels.content_backward(rows.expand_as(value), query, key, value)
        assert_near(got, exact(plain_content, query, key, value, rows.expand_as(value)), torch.float32)

    def test_take_no_images(self) -> None:
        kernels = importlib.import_module(KERNELS)
        (query, key, value, grad), table, _ = case(2, 4, (3, 3), "last", torch.float32)
        maps = query[:0], key[:0], value[:0]
        assert kernels.gather(*maps, value[:0], table).shape == maps[0].shape
        assert kernels.content(*maps).shape == maps[0].shape
        assert [x.shape for x in kernels.content_backward(grad[:0], *maps)] == [maps[0].shape] * 3
        assert kernels.attend(maps[0], maps[2], table).shape == maps[0].shape
        grads = kernels.attend_backward(grad[:0], maps[0], maps[2], table)
        assert not grads[2].any()


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", [
    *CASES, (8, 8, (56, 56), "last"), (8, 16, (56, 56), "last"), (8, 16, (28, 28), "last"), (8, 32, (14, 14), "last"),
    (8, 64, (7, 7), "last"), (8, 8, (75, 40), "last"), (2, 32, (40, 50), "first"), (2, 64, (9, 66), "last"),
])
def test_on_a_gpu(arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert_all_agree(importlib.import_module(KERNELS), arguments, dtype, "cuda")


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize(("dim", "size", "stride"), [(64, (56, 56), 1), (128, (15, 9), 2), (256, (14, 14), 1)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_trains_on_a_gpu_as_on_a_cpu(
        dim: int,
        size: tuple[int, int],
        stride: int,
        compiled: bool,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    layer = GlobalSelfAttention(dim, size, stride=stride).double()
    x = torch.randn(2, dim, *size, dtype=torch.float64)
    grad = torch.randn_like(layer(x))

    def results(layer: Any, x: torch.Tensor, grad: torch.Tensor, run: Any) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        out = run(x)
        found = torch.autograd.grad(out, [x, *layer.parameters()], grad)
        layer.eval()
        with torch.no_grad():
            inferred = run(x)
        layer.train()
        return [y.double().cpu() for y in (out, *found, inferred, layer.norm.running_mean, layer.norm.running_var)]

    layer.norm.reset_running_stats()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = results(layer, x, grad, layer)
    layer.load_state_dict(state)
    layer = layer.to("cuda", torch.float32).to(memory_format=torch.channels_last)
    x, grad = (y.to("cuda", torch.float32).to(memory_format=torch.channels_last) for y in (x, grad))
    torch._dynamo.reset()
    got = results(layer, x, grad, torch.compile(layer, fullgraph=True) if compiled else layer)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm()

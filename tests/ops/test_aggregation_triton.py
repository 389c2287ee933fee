"""The Triton kernels behind the aggregation: in Triton's interpreter on any machine, and on a GPU where there is one.

Triton decides at its import whether it interprets, so what is in `TestKernels` runs in a process of its own, started by
test_kernels.py. The interpreter takes about a second for the smallest map; hence their sizes.
"""
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

import timm_gsa
from timm_gsa.layers import PairwiseAttention, PatchwiseAttention
from timm_gsa.ops import aggregation
from timm_gsa.ops.san import gpu
from timm_gsa.ops.san.reference import aggregation as aggregation_reference

from .test_aggregation import with_gradients
from .triton_runs import INTERPRETED, Interpreted, Launches, needs_cuda, needs_triton, spilled

backend = importlib.import_module("timm_gsa.ops._backend")


IMPORTED = "timm_gsa.ops.san.triton_aggregation" in sys.modules  # before any test ran
FIRST = ("first", "first inside", "permuted", "expanded")
WEIGHTS = {  # axes of (B, G, K * K, H, W) from the outermost in memory to the innermost
    "gkp": (0, 1, 2, 3, 4),
    "pgk": (0, 3, 4, 1, 2),
    "kpg": (0, 2, 3, 4, 1),
    "pkg": (0, 3, 4, 2, 1),
}


def laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same map in another layout; what lies around it in memory is NaN."""
    if layout == "first":
        return x.contiguous()
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "expanded":
        return x[:, :1, :1, :1].expand_as(x)
    batch, channels, height, width = x.shape
    around = x.new_full((batch + 1, channels + 9, height + 1, width + 3), float("nan"))
    if layout == "last inside":
        around = around.to(memory_format=torch.channels_last)
    inside = around[1:, 8:-1, :-1, 2:-1]
    inside.copy_(x)
    return inside


def ordered(weight: torch.Tensor, order: str) -> torch.Tensor:
    axes = WEIGHTS[order]
    return weight.permute(axes).contiguous().permute([axes.index(axis) for axis in range(5)])


def made_case(
        batch: int,
        sharing: int,
        groups: int,
        size: tuple[int, int],
        kernel_size: int,
        layout: str = "last",
        order: str = "pkg",
        dtype: torch.dtype = torch.float64,
        weight_dtype: torch.dtype | None = None,
        device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, weight and cotangent."""
    generator = torch.Generator().manual_seed(0)
    value, weight, cotangent = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in (
            (batch, sharing * groups, *size),
            (batch, groups, kernel_size ** 2, *size),
            (batch, sharing * groups, *size),
        )
    )
    weight = ordered(weight.to(weight_dtype or dtype), order)
    return laid(value.to(dtype), layout), weight, laid(cotangent.to(dtype), layout)


def assert_agrees(
        got: tuple[torch.Tensor, ...],
        case: tuple[torch.Tensor, ...],
        kernel_size: int,
        dilation: int = 1,
        slack: float = 1.01,
) -> None:
    """Within one rounding to the type of each result, and of the sums in float32 or float64, of the reference."""
    exact = with_gradients(aggregation_reference, *(x.double().contiguous() for x in case), kernel_size, dilation)
    terms = with_gradients(aggregation_reference, *(x.double().abs().contiguous() for x in case), kernel_size, dilation)
    single = torch.finfo(torch.float64 if case[0].dtype == torch.float64 else torch.float32).eps
    for name, a, b, size in zip(("output", "gradient of value", "gradient of weight"), got, exact, terms, strict=True):
        limit = slack * torch.finfo(a.dtype).eps / 2 * b.abs() + 50 * single * size + torch.finfo(a.dtype).tiny
        wrong = ~((a.double() - b).abs() <= limit)  # true of NaN
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} differ"


class Module(nn.Module):
    def forward(self, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return aggregation(value, weight, 3)


# Where the kernels are taken


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has Triton for its CUDA device, as fake tensors see it."""
    monkeypatch.setattr(backend, "_why_no_triton", lambda device: None)


def form(value: torch.Tensor, weight: torch.Tensor) -> str:
    """What computes an aggregation of 3 x 3 places."""
    class Sum(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            out = aggregation(value, weight, 3)
            assert out.shape == value.shape
            return out

    [choice] = timm_gsa.explain(Sum(), value)[""]
    return choice.form


def on_cuda(
        height: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(2, 6, height, width, device="cuda", dtype=dtype),
        torch.empty(2, 3, 9, height, width, device="cuda", dtype=weight_dtype),
    )


@needs_triton
@pytest.mark.parametrize(("arguments", "taken"), [
    ((2, 2), True),
    ((9, 8, torch.bfloat16), True),
    ((9, 8, torch.float64, torch.float16), True),
    ((1, 8), False),
    ((8, 1), False),
    ((4, 4, torch.complex64, torch.complex64), False),
])
def test_kernels_serve_a_gpu_where_plain_reflection_exists(
        with_triton: None,
        arguments: tuple,
        taken: bool,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "why_not_plain_tensors", lambda *tensors: None)  # fake ones
    with torch._subclasses.FakeTensorMode():
        assert form(*on_cuda(*arguments)) == ("triton" if taken else "torch")


@needs_triton
def test_kernels_do_not_serve_a_cpu(with_triton: None) -> None:
    value, weight, _ = made_case(1, 2, 3, (4, 5), 3)
    torch.testing.assert_close(aggregation(value, weight, 3), aggregation_reference(value, weight, 3))
    assert form(value, weight) == "torch"


@pytest.mark.skipif(torch.__version__ < "2.8", reason="fake tensors of a GPU ask earlier torch for its driver")
@pytest.mark.parametrize("missing", ["Triton", "CUDA", "torch 2.8"])
def test_without_triton_a_gpu_takes_the_way_of_the_cpu(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    why_not = backend._triton_on.__wrapped__
    assert why_not(torch.device("cuda")) is None
    if missing == "Triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
    else:
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    assert missing.split()[-1] in why_not(torch.device("cuda")) or missing == "torch 2.8"
    monkeypatch.setattr(backend, "_why_no_triton", why_not)
    with torch._subclasses.FakeTensorMode():
        assert form(*on_cuda(4, 5)) == "torch"


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_triton_asks_for_a_capability(
        capability: tuple[int, int],
        served: bool,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.import_module("timm_gsa.ops._kernels"), "why_not_started", lambda device: None)
    assert (backend._triton_on.__wrapped__(torch.device("cuda:0")) is None) is served


@needs_triton
def test_compiler_sees_one_operator(with_triton: None) -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._subclasses.FakeTensorMode():
        out = torch.compile(aggregation, backend=compiler, fullgraph=True)(*on_cuda(4, 5, torch.bfloat16), 3)
    assert (out.dtype, out.device.type) == (torch.bfloat16, "cuda")
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == ["timm_gsa.triton_aggregation.default"]


@needs_triton
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_no_operator_of_ours(strict: bool, with_triton: None) -> None:
    with torch._subclasses.FakeTensorMode():
        program = torch.export.export(Module(), on_cuda(4, 5), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.addcmul_.default" in targets or "aten.addcmul.default" in targets
    assert not any("timm_gsa" in target for target in targets)


def test_export_is_known_from_compilation() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (1 if backend.is_exporting() else 2)

    torch._dynamo.reset()
    x = torch.zeros(1)
    assert torch.compile(Asks(), backend="eager", fullgraph=True)(x).item() == 2
    if hasattr(torch.compiler, "is_exporting"):
        assert torch.export.export(Asks(), (x,)).module()(x).item() == 1


@needs_triton
def test_function_transforms_take_plain_operators(with_triton: None) -> None:
    reasons = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        reasons.append(backend.why_not_triton("san", torch.empty(1, device="cuda")))
        return x

    with torch._subclasses.FakeTensorMode():
        ask(torch.ones(()))
        torch.func.grad(ask)(torch.ones(()))
        torch.func.vmap(ask)(torch.ones(2))
    assert reasons == ["FakeTensor takes plain operators", *["torch.func's transforms take plain operators"] * 2]


def test_import_leaves_the_kernels_alone() -> None:
    assert not IMPORTED


# What they are compiled to


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "kernel_size", "layout", "order", "dtype", "access"), [
    (90, 7, "last", "pkg", torch.bfloat16, "v4.b32"),
    (80, 7, "last", "pkg", torch.float16, "v4.b32"),
    (90, 3, "last", "kpg", torch.float32, "v4.b32"),
    (80, 3, "last", "gkp", torch.bfloat16, None),
    (80, 7, "first", "gkp", torch.float32, "b32"),
    (90, 3, "first", "gkp", torch.bfloat16, "b16"),
    (90, 3, "first", "pkg", torch.float64, "b64"),
])
def test_compiled_for_a_gpu_each_keeps_its_sums_in_registers_and_reads_16_bytes_at_once_where_channels_are_innermost(
        capability: int,
        kernel_size: int,
        layout: str,
        order: str,
        dtype: torch.dtype,
        access: str | None,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = recorded(monkeypatch, capability)
    case = made_case(2, 8, 8, (kernel_size, 12), kernel_size, layout, order, dtype)
    with_gradients(torch.ops.timm_gsa.triton_aggregation, *case, kernel_size, 1)
    programs = [program for launch in launches.values() for program in launch.compiled()]
    assert len(programs) == 3
    for number, program in enumerate(programs):
        accesses = set(re.findall(r"(?:ld|st)\.global\.(\S+)", program.asm["ptx"]))
        assert accesses
        if access is not None:
            assert accesses == {access}
            assert program.metadata.shared == 0  # no detour between layouts
        stack, local, told = spilled(program, tmp_path / f"{number}.cubin")
        assert stack <= 32 and local == 0, told  # at most 8 registers are spilled, those set before the loops


def recorded(monkeypatch: pytest.MonkeyPatch, capability: int = 90) -> dict[Any, Launches]:
    """The kernels that are launched from now on, each with its first tile."""
    kernels = importlib.import_module("timm_gsa.ops.san.triton_aggregation")
    launches: dict[Any, Launches] = {}

    class Tiled:
        """In place of the tuned kernel."""

        def __init__(self, kernel: Any, *kind: Any) -> None:
            self.launches = launches.setdefault(kernel, Launches(kernel, capability))
            self.tile = kernels._tiles(kernel, *kind)[0]

        def __getitem__(self, grid: Callable[..., tuple[int, ...]]) -> Callable[..., None]:
            return lambda *args, **named: self.launches[grid(self.tile)](*args, **named, **self.tile)

    monkeypatch.setattr(kernels, "_tuned", Tiled)
    return launches


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("layout", "order"), [("last", "pkg"), ("first", "gkp")])
def test_maps_of_other_sizes_need_no_compilation(layout: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one variant of a kernel for each number of pixels that the last strip of a row may hold."""
    launches = recorded(monkeypatch)
    for size in ((56, 56), (71, 64), (9, 12), (40, 44)):
        with_gradients(
            torch.ops.timm_gsa.triton_aggregation, *made_case(2, 8, 8, size, 3, layout, order, torch.bfloat16), 3, 1)
    assert [len(launch.variants) for launch in launches.values()] == [1, 1, 1]
    for width in range(56, 64):
        case = made_case(2, 8, 8, (5, width), 3, layout, order, torch.bfloat16)
        with_gradients(torch.ops.timm_gsa.triton_aggregation, *case, 3, 1)
    assert [len(launch.variants) for launch in launches.values()] == [1, 4, 1]


# What they compute


class TestKernels(Interpreted):
    """On CPU tensors, in Triton's interpreter."""

    @pytest.fixture
    def kernels(self) -> Any:
        return importlib.import_module("timm_gsa.ops.san.triton_aggregation")

    @pytest.fixture
    def fused(self, kernels: Any) -> Callable[..., torch.Tensor]:
        return torch.ops.timm_gsa.triton_aggregation

    @pytest.fixture
    def everywhere(self) -> Iterator[None]:
        """`aggregation` takes the kernels on a CPU too."""
        with timm_gsa.use_backend("triton"):
            yield

    @pytest.mark.parametrize(("batch", "sharing", "groups", "size", "kernel_size", "dilation", "layout", "order"), [
        (2, 2, 1, (2, 11), 3, 1, "first", "gkp"),
        (1, 5, 3, (2, 3), 3, 1, "last inside", "pgk"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [
            (1, 1, 1, (1, 6), 1, 1, "first", "gkp"),
            (1, 3, 2, (3, 2), 3, 1, "first inside", "gkp"),
            (2, 1, 2, (3, 3), 3, 1, "permuted", "pkg"),
            (1, 2, 1, (3, 10), 3, 2, "expanded", "gkp"),
            (2, 8, 2, (3, 12), 3, 1, "last", "pkg"),
            (1, 9, 2, (3, 5), 5, 1, "last", "kpg"),
            (1, 2, 6, (2, 10), 3, 1, "last", "gkp"),
            (2, 4, 8, (5, 13), 3, 2, "last inside", "pkg"),
            (1, 1, 2, (4, 9), 7, 1, "last", "pkg"),
            (1, 18, 2, (2, 3), 3, 1, "last", "pkg"),
        ]),
    ])
    def test_agrees_with_the_reference(
            self,
            fused: Callable[..., torch.Tensor],
            batch: int,
            sharing: int,
            groups: int,
            size: tuple[int, int],
            kernel_size: int,
            dilation: int,
            layout: str,
            order: str,
    ) -> None:
        case = made_case(batch, sharing, groups, size, kernel_size, layout, order)
        assert_agrees(with_gradients(fused, *case, kernel_size, dilation), case, kernel_size, dilation)

    @pytest.mark.parametrize(("sharing", "groups", "size", "kernel_size", "layout"), [
        pytest.param(1, 1, (4, 6), 7, "first", marks=pytest.mark.slow),
        (4, 2, (2, 11), 3, "last"),
    ])
    def test_every_tile_gives_the_same_numbers(
            self,
            kernels: Any,
            sharing: int,
            groups: int,
            size: tuple[int, int],
            kernel_size: int,
            layout: str,
            monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        case = made_case(1, sharing, groups, size, kernel_size, layout, dtype=torch.float32)
        tiles = kernels._tiles
        results = []
        for choice in range(2):
            monkeypatch.setattr(kernels, "_tiles", lambda *kind, n=choice: [tiles(*kind)[n]])
            results.append(with_gradients(torch.ops.timm_gsa.triton_aggregation, *case, kernel_size, 1))
        assert_agrees(results[0], case, kernel_size)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize(("dtype", "weight_dtype"), [
        pytest.param(torch.float32, torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.float16, torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.slow),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        pytest.param(torch.float64, torch.bfloat16, marks=pytest.mark.slow),
    ], ids=str)
    def test_dtypes(self, fused: Callable[..., torch.Tensor], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        case = made_case(1, 2, 2, (2, 5), 3, dtype=dtype, weight_dtype=weight_dtype)
        got = with_gradients(fused, *case, 3, 1)
        assert tuple(x.dtype for x in got) == (dtype, dtype, weight_dtype)
        # The interpreter cuts what it stores in bfloat16 off, where a GPU rounds.
        assert_agrees(got, case, 3, slack=2.02)

    def test_autocast_leaves_types_alone(self, everywhere: None) -> None:
        case = made_case(1, 1, 2, (2, 3), 3, dtype=torch.bfloat16, weight_dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = aggregation(*case[:2], 3)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, aggregation(*case[:2], 3))

    @pytest.mark.parametrize("layout", ["first", "last"])
    def test_offsets_beyond_32_bits(self, fused: Callable[..., torch.Tensor], layout: str) -> None:
        value, weight, cotangent = made_case(1, 2, 2, (2, 3), 3, layout, dtype=torch.float32)
        step = 2 ** 30  # pages of memory that nobody touches cost nothing
        far = torch.empty(0, dtype=torch.float32).set_(
            torch.UntypedStorage(4 * (step * 2 + 64)), 0, (1, 4, 2, 3),
            (64, 6, step, 1) if layout == "first" else (64, 1, step, 4),
        )
        far.copy_(value)
        assert_agrees(with_gradients(fused, far, weight, cotangent, 3, 1), (value, weight, cotangent), 3)

    def test_empty_batch(self, fused: Callable[..., torch.Tensor]) -> None:
        out, grad_value, grad_weight = with_gradients(fused, *made_case(0, 2, 3, (4, 5), 3), 3, 1)
        assert out.shape == grad_value.shape == (0, 6, 4, 5)
        assert grad_weight.shape == (0, 3, 9, 4, 5)

    # Derivatives and transformations

    @pytest.mark.parametrize("wanted", ["value", "weight"])
    def test_only_what_is_wanted_is_computed_and_kept(
            self,
            kernels: Any,
            wanted: str,
            monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        value, weight, cotangent = made_case(1, 1, 2, (2, 3), 3)
        launched, kept = [], []
        launch = kernels._launch
        monkeypatch.setattr(kernels, "_launch", lambda kernel, *args: launched.append(kernel) or launch(kernel, *args))
        leaf, other = (value, weight) if wanted == "value" else (weight, value)
        leaf.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = torch.ops.timm_gsa.triton_aggregation(value, weight, 3, 1)
        (grad,) = torch.autograd.grad(out, leaf, cotangent)
        assert [x.data_ptr() for x in kept] == [other.data_ptr()]
        assert launched == [kernels._forward, kernels._value_grad if wanted == "value" else kernels._weight_grad]
        (want,) = torch.autograd.grad(aggregation_reference(value, weight, 3), leaf, cotangent)
        torch.testing.assert_close(grad, want)

    @pytest.mark.slow
    def test_gradcheck(self, fused: Callable[..., torch.Tensor]) -> None:
        value, weight, _ = made_case(1, 2, 1, (2, 3), 3)
        inputs = value.requires_grad_(), weight.requires_grad_()
        assert torch.autograd.gradcheck(lambda v, w: fused(v, w, 3, 1), inputs, fast_mode=True)

    def test_second_derivatives(self, fused: Callable[..., torch.Tensor]) -> None:
        value, weight, cotangent = made_case(1, 2, 1, (2, 3), 3)
        inputs = [x.requires_grad_() for x in (value, weight, cotangent)]

        def second(operation: Callable[..., torch.Tensor], *args: int) -> tuple[torch.Tensor, ...]:
            grads = torch.autograd.grad(operation(value, weight, *args), (value, weight), cotangent, create_graph=True)
            return torch.autograd.grad(sum((grad ** 2).sum() for grad in grads), inputs)

        for got, want in zip(second(fused, 3, 1), second(aggregation_reference, 3), strict=True):
            torch.testing.assert_close(got, want)

    @pytest.mark.slow
    def test_torch_accepts_the_operators(self) -> None:
        value, weight, cotangent = made_case(1, 1, 2, (2, 3), 3)
        operators = torch.ops.timm_gsa
        arguments = (value.requires_grad_(), weight.requires_grad_(), 3, 1)
        torch.library.opcheck(operators.triton_aggregation.default, arguments)
        few = ("test_schema", "test_autograd_registration", "test_faketensor")
        value, weight = value.detach(), weight.detach()
        arguments = (cotangent, weight, 3, 1)
        torch.library.opcheck(operators.triton_aggregation_value_grad.default, arguments, test_utils=few)
        for order in WEIGHTS.values():
            arguments = (cotangent, value, 3, 1, 2, torch.float32, list(order))
            torch.library.opcheck(operators.triton_aggregation_weight_grad.default, arguments, test_utils=few)

    @pytest.mark.parametrize(("order", "expected"), [("gkp", "gkp"), ("kpg", "kpg"), ("pkg", "pkg"), ("pgk", "pkg")])
    def test_gradient_of_the_weight_is_laid_out_for_whole_stores(
            self,
            order: str,
            expected: str,
    ) -> None:
        _, weight, _ = made_case(2, 1, 3, (4, 5), 3, order=order)
        assert gpu._weight_order(weight) == list(WEIGHTS[expected])

    def test_fake_tensors_have_the_strides_of_real_ones(self, fused: Callable[..., torch.Tensor]) -> None:
        case = made_case(2, 1, 2, (2, 3), 3, "last inside")
        real = fused(*case[:2], 3, 1)
        mode = torch._subclasses.FakeTensorMode()
        fake = fused(*(mode.from_tensor(x) for x in case[:2]), 3, 1)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        meta = fused(*(x.to("meta") for x in case[:2]), 3, 1)
        assert meta.shape == real.shape

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [None, True])
    def test_compiled(self, everywhere: None, dynamic: bool | None) -> None:
        torch._dynamo.reset()
        call = torch.compile(aggregation, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for size in ((3, 4), (4, 3)) if dynamic else ((3, 4),):
            case = made_case(2, 1, 2, size, 3)
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert_agrees(with_gradients(call, *case, 3), case, 3)


# On a GPU


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Has the kernels take their n-th tile, the first if nothing else is said: to compile and time all takes long."""
    kernels = importlib.import_module("timm_gsa.ops.san.triton_aggregation")
    every = kernels._tiles

    def choose(n: int) -> None:
        kernels._tuned.cache_clear()
        monkeypatch.setattr(kernels, "_tiles", lambda *kind: [every(*kind)[n % len(every(*kind))]])

    choose(0)
    yield choose
    kernels._tuned.cache_clear()


@pytest.fixture
def float32_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize(
    ("batch", "sharing", "groups", "size", "kernel_size", "dilation", "layout", "order", "dtype"),
    [
        (2, 8, 2, (112, 112), 3, 1, "last", "pkg", torch.bfloat16),
        (2, 8, 8, (56, 56), 7, 1, "last", "pkg", torch.bfloat16),
        (3, 8, 16, (28, 28), 7, 1, "last inside", "kpg", torch.bfloat16),
        (5, 8, 32, (14, 14), 7, 1, "last", "pkg", torch.bfloat16),
        (3, 8, 64, (7, 7), 7, 1, "last", "pkg", torch.bfloat16),
        (2, 8, 8, (56, 56), 7, 1, "first", "gkp", torch.bfloat16),
        (2, 8, 4, (20, 23), 3, 1, "last", "pgk", torch.float16),
        (2, 8, 4, (20, 22), 3, 1, "last", "gkp", torch.float32),
        (2, 8, 4, (20, 21), 3, 1, "first inside", "pkg", torch.float64),
        (1, 9, 3, (4, 29), 7, 1, "last", "pkg", torch.float32),
        (2, 1, 5, (31, 3), 5, 1, "permuted", "gkp", torch.float16),
        (2, 20, 1, (9, 17), 3, 3, "last", "gkp", torch.float64),
        (2, 2, 17, (9, 17), 3, 2, "last inside", "pkg", torch.float32),
    ],
)
def test_on_a_gpu(
        batch: int,
        sharing: int,
        groups: int,
        size: tuple[int, int],
        kernel_size: int,
        dilation: int,
        layout: str,
        order: str,
        dtype: torch.dtype,
        tiles: Callable[[int], None],
) -> None:
    case = made_case(batch, sharing, groups, size, kernel_size, layout, order, dtype, device="cuda")
    got = with_gradients(aggregation, *case, kernel_size, dilation)
    assert_agrees(got, case, kernel_size, dilation)
    again = with_gradients(aggregation, *case, kernel_size, dilation)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("layout", ["first", "last"])
def test_every_tile_gives_the_same_numbers_on_a_gpu(layout: str, tiles: Callable[[int], None]) -> None:
    case = made_case(2, 8, 16, (21, 35), 5, layout, dtype=torch.float32, device="cuda")
    results = []
    for n in range(2):
        tiles(n)
        results.append(with_gradients(aggregation, *case, 5))
    assert_agrees(results[0], case, 5)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("attention", [PairwiseAttention, PatchwiseAttention])
def test_attention_under_autocast_on_a_gpu(
        attention: type[nn.Module],
        channels_last: bool,
        compiled: bool,
        float32_throughout: None,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layer = attention(64, kernel_size=3).cuda().to(memory_format=memory_format)
    x = torch.randn(4, 64, 28, 28, device="cuda").to(memory_format=memory_format)
    kernels = importlib.import_module("timm_gsa.ops.san.triton_aggregation")
    launch = kernels._launch
    launched = []

    def record(kernel: Any, *args: Any) -> None:
        launched.append(kernel)
        launch(kernel, *args)

    monkeypatch.setattr(kernels, "_launch", record)

    def step(call: Callable[..., torch.Tensor], autocast: bool) -> list[torch.Tensor | None]:
        leaves = [x.detach().requires_grad_(), *layer.parameters()]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = call(leaves[0])
        return [out, *torch.autograd.grad((out.float() ** 2).sum(), leaves, allow_unused=True)]

    torch._dynamo.reset()
    got = step(torch.compile(layer, fullgraph=True) if compiled else layer, autocast=True)
    assert set(launched) == {kernels._forward, kernels._value_grad, kernels._weight_grad}
    with timm_gsa.use_backend("torch"):
        want = step(layer, autocast=False)
    for a, b in zip(got, want, strict=True):
        if b is not None and b.norm() > 1e-3 * want[1].norm():  # some biases have no influence
            assert (a.float() - b).norm() <= 0.05 * b.norm()


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_compiled_for_sizes_that_vary_on_a_gpu(tiles: Callable[[int], None]) -> None:
    torch._dynamo.reset()
    call = torch.compile(aggregation, fullgraph=True, dynamic=True)
    for size in ((20, 31), (17, 24), (56, 42)):
        case = made_case(2, 8, 4, size, 3, dtype=torch.bfloat16, device="cuda")
        with torch._dynamo.config.patch(error_on_recompile=size != (20, 31)):
            assert_agrees(with_gradients(call, *case, 3), case, 3)


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_exported_on_a_gpu_and_run_there_and_on_a_cpu(tiles: Callable[[int], None]) -> None:
    value, weight, _ = made_case(2, 8, 4, (14, 15), 3, dtype=torch.float32, device="cuda")
    want = aggregation(value, weight, 3)
    program = torch.export.export(Module(), (value, weight))
    torch.testing.assert_close(program.module()(value, weight), want)
    moved = torch.export.passes.move_to_device_pass(program, "cpu")
    torch.testing.assert_close(moved.module()(value.cpu(), weight.cpu()), want.cpu())


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_captured_in_a_graph_of_the_device(tiles: Callable[[int], None]) -> None:
    value, weight, _ = made_case(2, 8, 4, (14, 14), 3, dtype=torch.bfloat16, device="cuda")
    want = aggregation(value, weight, 3)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = aggregation(value, weight, 3)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_memory_on_a_gpu_is_that_of_the_results(tiles: Callable[[int], None]) -> None:
    case = made_case(8, 8, 8, (56, 56), 3, dtype=torch.bfloat16, device="cuda")
    with_gradients(aggregation, *case, 3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = with_gradients(aggregation, *case, 3)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.1 * sum(x.numel() * x.element_size() for x in results)


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_weights_beyond_32_bits_on_a_gpu(tiles: Callable[[int], None]) -> None:
    side = 6700  # 49 * side ** 2 > 2 ** 31
    generator = torch.Generator("cuda").manual_seed(0)
    value, weight = (
        torch.randn(1, 1, *places, side, side, device="cuda", dtype=torch.bfloat16, generator=generator)
        for places in ((), (49,))
    )
    out = aggregation(value, weight, 7)[..., -5:, -8:]
    corner = value[..., -13:, -16:].double(), weight[..., -13:, -16:].double()
    want = aggregation_reference(*corner, 7)[..., -5:, -8:]
    torch.testing.assert_close(out.double(), want, rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2 or INTERPRETED, reason="needs two CUDA devices")
@needs_triton
def test_on_a_device_that_is_not_the_current_one(tiles: Callable[[int], None]) -> None:
    case = made_case(2, 8, 4, (14, 14), 3, dtype=torch.bfloat16, device="cuda:1")
    assert_agrees(with_gradients(aggregation, *case, 3), case, 3)

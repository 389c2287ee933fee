"""The Triton kernels behind SAN's small networks: in Triton's interpreter on any machine, on a GPU where there is one.

Triton decides at its import whether it interprets, so what is in `TestKernels` runs in a process of its own, started by
test_kernels.py.
"""
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_gsa.ops.san.neighbourhood import reflect_pad, same_padding, windows
from timm_gsa.ops.san.plain import on_differences, on_patches

from .test_aggregation_triton import laid
from .test_global_attention_triton import far
from .triton_runs import INTERPRETED, Interpreted, Launches, needs_cuda, needs_triton, spilled

PAIRWISE = [(112, 3, 6, 4, 2), (56, 7, 18, 16, 8), (28, 7, 34, 32, 16), (14, 7, 66, 64, 32), (7, 7, 130, 128, 64)]
PATCHWISE = [(112, 3, 4, 2), (56, 7, 16, 8), (28, 7, 32, 16), (14, 7, 64, 32), (7, 7, 128, 64)]
SHAPES = [  # size, K, dilation, C, M, G, layout: what is odd, alone, or more than a power of two
    ((1, 6), 1, 1, 1, 1, 1, "first"),
    ((5, 4), 3, 1, 3, 2, 5, "last"),
    ((5, 4), 3, 2, 6, 5, 2, "last inside"),
    ((3, 7), 3, 1, 18, 16, 8, "last"),
    ((3, 4), 3, 1, 34, 17, 1, "first inside"),
    ((9, 8), 7, 1, 3, 2, 1, "last"),  # in one tile, as the interpreter takes long for many
]


@pytest.fixture
def kernels() -> Any:
    return importlib.import_module("timm_gsa.ops.san.triton_relation_network")


def randoms(*shapes: tuple[int, ...], device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def difference_case(
        size: tuple[int, int],
        kernel_size: int,
        dilation: int,
        channels: int,
        hidden: int,
        groups: int,
        layout: str = "last",
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Maps and matrices of the sizes that networks have, the matrices as exact as the maps, and a gradient."""
    shapes = (
        *((batch, channels, *size),) * 2, (hidden, channels + 1), (groups, hidden), (groups,), (channels, hidden),
        (channels, channels + 1), (batch, groups, kernel_size ** 2, *size),
    )
    query, key, folded, weight2, bias2, back, correction, grad = (
        x.to(dtype) for x in randoms(*shapes, device=device))
    scale = channels ** -0.5
    grad = grad.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    padded = laid(reflect_pad(key, same_padding(kernel_size, dilation)), layout)
    return dict(
        query=laid(query, layout), padded=padded, folded=folded * scale, weight2=weight2 * hidden ** -0.5, bias2=bias2,
        back=back * hidden ** -0.5, correction=correction * scale / 4, grad=grad)


def relations(query: torch.Tensor, padded: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """[relu(query - key); 1] of all places, (B, C + 1, K * K, H, W)."""
    rectified = (query[:, :, None, None] - windows(padded, kernel_size, dilation)).flatten(2, 3).relu()
    return torch.cat([rectified, torch.ones_like(rectified[:, :1])], dim=1)


def by_difference_functions(kernels: Any, case: dict[str, torch.Tensor], *window: int) -> list[torch.Tensor]:
    maps, folded, weight2 = (case["query"], case["padded"]), case["folded"], case["weight2"]
    return [
        kernels.rectified_moments(*maps, *window, weight2.dtype),
        kernels.difference_logits(*maps, folded, weight2, case["bias2"], *window),
        *kernels.difference_products(case["grad"], *maps, folded, weight2, *window),
        *kernels.difference_input_gradients(
            case["grad"], *maps, folded, case["back"], case["correction"], weight2, *window),
        *kernels.difference_input_gradients(case["grad"], *maps, folded, case["back"], None, weight2, *window),
    ]


def by_differences(case: dict[str, torch.Tensor], *window: int) -> list[torch.Tensor]:
    """What `by_difference_functions` gives, in float64 and on all relations at once."""
    case = {name: x.double() for name, x in case.items()}
    query, padded, weight2, grad = case["query"], case["padded"], case["weight2"], case["grad"]
    one = relations(query, padded, *window)
    before = torch.einsum("mc,bckhw->bmkhw", case["folded"], one)
    logits = torch.einsum("gm,bmkhw->bgkhw", weight2, before.relu()) + case["bias2"][:, None, None, None]
    dy = torch.einsum("gm,bgkhw->bmkhw", weight2, grad) * (before > 0)
    results = [
        torch.einsum("bckhw,bdkhw->cd", one, one), logits, torch.einsum("bgkhw,bmkhw->gm", grad, before.relu()),
        torch.einsum("bmkhw,bckhw->mc", dy, one), grad.sum((0, 2, 3, 4)),
    ]
    for correction in (case["correction"], None):
        da = torch.einsum("cm,bmkhw->bckhw", case["back"], dy)
        if correction is not None:
            da = da - torch.einsum("cd,bdkhw->bckhw", correction, one)
        da = da * (one[:, :-1] > 0)
        leaves = query.detach().requires_grad_(), padded.detach().requires_grad_()
        difference = (leaves[0][:, :, None, None] - windows(leaves[1], *window)).flatten(2, 3)
        results += torch.autograd.grad(difference, leaves, da)
    return results


def patch_case(
        size: tuple[int, int],
        kernel_size: int,
        dilation: int,
        channels: int,
        hidden: int,
        layout: str = "last",
        dtype: torch.dtype = torch.float32,
        batch: int = 2,
        device: str = "cpu",
) -> list[torch.Tensor]:
    """Padded keys, scale, shift, weight and gradient."""
    places = channels * kernel_size ** 2
    shapes = (batch, channels, *size), (places,), (places,), (hidden, places), (batch, hidden, *size)
    key, scale, shift, weight, grad = (x.to(dtype) for x in randoms(*shapes, device=device))
    scale[::5] = 0
    padded = laid(reflect_pad(key, same_padding(kernel_size, dilation)), layout)
    return [padded, scale, shift, weight * places ** -0.5, laid(grad, layout)]


def by_patch_functions(kernels: Any, case: list[torch.Tensor], *window: int) -> list[torch.Tensor]:
    *inputs, grad = case
    return [kernels.patch_hidden(*inputs, *window), *kernels.patch_gradients(grad, *inputs, *window)]


def by_patches(case: list[torch.Tensor], *window: int) -> list[torch.Tensor]:
    """What `by_patch_functions` gives, in float64 and on all patches at once."""
    *inputs, grad = (x.double() for x in case)
    leaves = [x.requires_grad_() for x in inputs]
    out = on_patches(*leaves, *window)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_near(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    """Each number within the tolerance of the largest of its result, NaN never."""
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max()
        assert error <= tolerance * b.abs().max(), f"result {n}: {error} where the largest is {b.abs().max()}"


# What they are compiled to


@pytest.fixture
def launches(kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Launches]:
    """The kernels, none of which is launched."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = {
        name: Launches(kernel) for name, kernel in vars(kernels).items()
        if isinstance(kernel, triton.JITFunction) and any(param.do_not_specialize for param in kernel.params)
    }
    for name, launch in launches.items():
        monkeypatch.setattr(kernels, name, launch)
    return launches


def compiled(launches: dict[str, Launches]) -> list[Any]:
    return [program for launch in launches.values() for program in launch.compiled()]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("layout", ["last", "first"])
def test_maps_of_other_sizes_need_no_compilation(
        kernels: Any,
        launches: dict[str, Launches],
        layout: str,
) -> None:
    window, dtype = (3, 1), torch.bfloat16
    for size in ((8, 9), (7, 13), (16, 16), (20, 3)):
        case = difference_case(size, *window, 24, 16, 8, layout, dtype=dtype)
        by_difference_functions(kernels, case, *window)
        by_patch_functions(kernels, patch_case(size, *window, 16, 8, layout, dtype=dtype), *window)
    counts = {name: len(launch.variants) for name, launch in launches.items()}
    # Gradients of query and key, each with and without a norm.
    assert counts.pop("_difference_input_gradient") == 4
    assert counts and set(counts.values()) == {1}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.slow
@pytest.mark.parametrize("channels", [18, 24])
def test_compiled_for_a_gpu_they_keep_their_sums_in_registers(
        kernels: Any,
        launches: dict[str, Launches],
        channels: int,
        tmp_path: Path,
) -> None:
    window, dtype = (7, 1), torch.bfloat16
    by_difference_functions(kernels, difference_case((8, 9), *window, channels, 16, 8, dtype=dtype), *window)
    by_patch_functions(kernels, patch_case((8, 9), *window, 16, 8, dtype=dtype), *window)
    programs = compiled(launches)
    assert len(programs) == 10
    for number, program in enumerate(programs):
        stack, local, told = spilled(program, tmp_path / f"{number}.cubin")
        assert stack <= 32 and local == 0, told  # at most 8 registers are spilled


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("dtype", "channels", "hidden", "groups", "served"), [
    pytest.param(torch.bfloat16, 18, 16, 8, True, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, 130, 128, 64, True, marks=pytest.mark.slow),
    pytest.param(torch.float32, 34, 32, 16, True, marks=pytest.mark.slow),
    (torch.float32, 130, 128, 64, False),
])
def test_shared_memory_is_what_they_say(
        kernels: Any,
        launches: dict[str, Launches],
        dtype: torch.dtype,
        channels: int,
        hidden: int,
        groups: int,
        served: bool,
) -> None:
    window, most = (3, 1), kernels.difference_memory(channels, hidden, groups, dtype)
    assert (most <= 227 * 1024) == served  # of an H100
    if served:
        by_difference_functions(
            kernels, difference_case((8, 9), *window, channels, hidden, groups, dtype=dtype), *window)
        assert most / 2 < max(program.metadata.shared for program in compiled(launches)) <= most
        for launch in launches.values():
            launch.variants.clear()
    by_patch_functions(kernels, patch_case((8, 9), *window, channels - 2, groups, dtype=dtype), *window)
    shared = max(program.metadata.shared for program in compiled(launches))
    assert shared <= kernels.patch_memory(channels - 2, groups, dtype) <= 99 * 1024


# What they compute


class TestKernels(Interpreted):
    """On CPU tensors, in Triton's interpreter."""

    @pytest.mark.parametrize(("size", "kernel_size", "dilation", "channels", "hidden", "groups", "layout"), [
        *SHAPES[1:2], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in (SHAPES[:1] + SHAPES[2:])),
    ])
    def test_differences(
            self,
            kernels: Any,
            size: tuple[int, int],
            kernel_size: int,
            dilation: int,
            channels: int,
            hidden: int,
            groups: int,
            layout: str,
            monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if kernel_size == 7:
            monkeypatch.setattr(kernels, "_tile", lambda *kind, **most: (256, 4))
        case = difference_case(size, kernel_size, dilation, channels, hidden, groups, layout)
        got = by_difference_functions(kernels, case, kernel_size, dilation)
        assert_near(got, by_differences(case, kernel_size, dilation), 1e-5)

    @pytest.mark.parametrize(("size", "kernel_size", "dilation", "channels", "hidden", "groups", "layout"), [
        *SHAPES[1:2], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in (SHAPES[:1] + SHAPES[2:])),
    ])
    def test_patches(
            self,
            kernels: Any,
            size: tuple[int, int],
            kernel_size: int,
            dilation: int,
            channels: int,
            hidden: int,
            groups: int,
            layout: str,
            monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if kernel_size == 7:
            monkeypatch.setattr(kernels, "_tile", lambda *kind, **most: (256, 4))
        case = patch_case(size, kernel_size, dilation, channels, hidden, layout)
        got = by_patch_functions(kernels, case, kernel_size, dilation)
        assert_near(got, by_patches(case, kernel_size, dilation), 1e-5)

    def test_half_precision_with_maps_and_matrices_of_float32(self, kernels: Any) -> None:
        window, dtype, wide = (3, 1), torch.float16, torch.float32  # the interpreter has no products of bfloat16
        case = difference_case((4, 5), *window, 6, 4, 2, dtype=dtype)
        matrices = "folded", "bias2", "back", "correction"
        for names, maps in ((matrices, dtype), ((*matrices, "query", "padded"), wide)):
            mixed = case | {name: case[name].float() for name in names}
            got = by_difference_functions(kernels, mixed, *window)
            assert [x.dtype for x in got] == [torch.float64, dtype, *[wide] * 3, *[maps] * 4]
            assert_near(got, by_differences(case, *window), 0.03)
            if maps == wide:  # gradients of float32 maps are not rounded to the type of the matrices
                assert all((x != x.half()).any() for x in got[5:])
        case = patch_case((4, 5), *window, 6, 4, dtype=dtype)
        mixed = [x.float() if 0 < n < 4 else x for n, x in enumerate(case)]
        got = by_patch_functions(kernels, mixed, *window)
        assert [x.dtype for x in got] == [dtype, dtype, *[torch.float32] * 3]
        assert_near(got, by_patches(case, *window), 0.03)

    def test_float32_maps_are_subtracted_before_they_are_rounded(self, kernels: Any) -> None:
        window = 3, 1
        case = difference_case((4, 5), *window, 6, 4, 2, dtype=torch.float16)
        case |= {name: case[name].float() + 1000 for name in ("query", "padded")}
        assert_near(by_difference_functions(kernels, case, *window), by_differences(case, *window), 0.03)

    @pytest.mark.slow
    def test_tiles_of_half_precision_on_maps_that_do_not_fill_them(self, kernels: Any) -> None:
        window = 3, 1
        case = difference_case((9, 15), *window, 66, 20, 3, dtype=torch.float16)
        assert_near(by_difference_functions(kernels, case, *window), by_differences(case, *window), 0.03)
        case = patch_case((9, 15), *window, 20, 3, dtype=torch.float16)
        assert_near(by_patch_functions(kernels, case, *window), by_patches(case, *window), 0.03)

    @pytest.mark.slow
    def test_logits_lie_with_groups_innermost_and_maps_with_channels(self, kernels: Any) -> None:
        window = 3, 1
        case = difference_case((4, 5), *window, 6, 4, 2, "first")
        got = by_difference_functions(kernels, case, *window)
        assert got[1].permute(0, 3, 4, 2, 1).is_contiguous()
        case = patch_case((4, 5), *window, 6, 4, "first")
        maps = got[5:] + by_patch_functions(kernels, case, *window)[:2]
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)

    @pytest.mark.slow
    def test_gradients_may_lie_anyhow(self, kernels: Any) -> None:
        window = 3, 1
        case = difference_case((4, 5), *window, 3, 4, 2)
        want = by_differences(case, *window)
        assert_near(
            by_difference_functions(kernels, case | {"grad": case["grad"].contiguous()}, *window), want, 1e-5)
        constant = case | {"grad": torch.tensor(0.5).expand_as(case["grad"])}
        assert_near(by_difference_functions(kernels, constant, *window), by_differences(constant, *window), 1e-5)

    @pytest.mark.parametrize(("programs", "buffer"), [
        (6, 2 ** 20), *(pytest.param(*limits, marks=pytest.mark.slow) for limits in ((1, 2 ** 20), (64, 100))),
    ])
    def test_places_and_positions_are_shared_among_programs(
            self,
            kernels: Any,
            programs: int,
            buffer: int,
            monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        window = 3, 1
        case, patches = difference_case((3, 4), *window, 3, 2, 2, batch=3), patch_case((3, 4), *window, 3, 2, batch=3)
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        monkeypatch.setattr(kernels, "_BUFFER", buffer)
        assert_near(by_difference_functions(kernels, case, *window), by_differences(case, *window), 1e-5)
        assert_near(by_patch_functions(kernels, patches, *window), by_patches(patches, *window), 1e-5)

    def test_offsets_beyond_32_bits(self, kernels: Any) -> None:
        """Rows lie 2^30 numbers apart: pages of memory that nobody touches cost nothing."""
        window, step = (3, 1), 2 ** 30
        case = difference_case((2, 3), *window, 3, 2, 2, batch=1)
        far_case = case | {name: far(case[name], (64, 1, step, 8)) for name in ("query", "padded")}
        assert_near(by_difference_functions(kernels, far_case, *window), by_differences(case, *window), 1e-5)
        padded, *more = patches = patch_case((2, 3), *window, 3, 2, batch=1)
        got = by_patch_functions(kernels, [far(padded, (64, 1, step, 8)), *more], *window)
        assert_near(got, by_patches(patches, *window), 1e-5)

    def test_empty_batch(self, kernels: Any) -> None:
        window = 3, 1
        case = difference_case((4, 5), *window, 3, 4, 2, batch=0)
        for a, b in zip(by_difference_functions(kernels, case, *window), by_differences(case, *window), strict=True):
            assert torch.equal(a.double(), b)
        patches = patch_case((4, 5), *window, 3, 2, batch=0)
        for a, b in zip(by_patch_functions(kernels, patches, *window), by_patches(patches, *window), strict=True):
            assert torch.equal(a.double(), b)

    def test_composed_to_a_network_with_batch_norm(self, kernels: Any) -> None:
        size, window, eps = (5, 4), (3, 1), 1e-3
        shapes = (2, 3, *size), (2, 3, 7, 6), (4, 3), (4,), (4,), (2, 4), (2,), (2, 2, 9, *size)
        *inputs, grad = (x.float() for x in randoms(*shapes))
        wide = [x.double().requires_grad_() for x in inputs]
        want = on_differences(*wide, eps, *window)[0]
        want = [want, *torch.autograd.grad(want, wide, grad.double())]
        leaves = [x.requires_grad_() for x in inputs]
        out = torch.ops.timm_gsa.triton_difference_network(*leaves, eps, *window)[0]
        assert_near([out, *torch.autograd.grad(out, leaves, grad)], want, 1e-4)

    def test_torch_accepts_the_operators(self) -> None:
        query, padded, *matrices = (
            x.float() for x in randoms((1, 3, 3, 4), (1, 3, 5, 6), (2, 3), (2,), (2,), (2, 2), (2,)))
        few = ("test_schema", "test_autograd_registration", "test_faketensor")
        for eps in (None, 1e-3):
            arguments = (query, padded, *matrices, eps, 3, 1)
            torch.library.opcheck(torch.ops.timm_gsa.triton_difference_network.default, arguments, test_utils=few)
            out = torch.ops.timm_gsa.triton_difference_network(*arguments)
            backward = torch.ops.timm_gsa.triton_difference_network_backward.default
            torch.library.opcheck(
                backward, (torch.randn_like(out[0]), query, padded, *matrices, out[3], eps, 3, 1), test_utils=few)


# On a GPU


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestOnAGPU:
    @pytest.mark.parametrize(("side", "kernel_size", "channels", "hidden", "groups"), PAIRWISE)
    def test_differences(
            self,
            kernels: Any,
            side: int,
            kernel_size: int,
            channels: int,
            hidden: int,
            groups: int,
            dtype: torch.dtype,
    ) -> None:
        window, memory = (kernel_size, 1), kernels.difference_memory(channels, hidden, groups, dtype)
        if memory > torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin:
            pytest.skip("the device has too little shared memory")
        case = difference_case((side, side), *window, channels, hidden, groups, dtype=dtype, batch=3, device="cuda")
        got = by_difference_functions(kernels, case, *window)
        assert_near(got, by_differences(case, *window), 2e-5 if dtype == torch.float32 else 0.03)
        again = by_difference_functions(kernels, case, *window)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

    @pytest.mark.parametrize(("side", "kernel_size", "channels", "hidden"), PATCHWISE)
    def test_patches(
            self,
            kernels: Any,
            side: int,
            kernel_size: int,
            channels: int,
            hidden: int,
            dtype: torch.dtype,
    ) -> None:
        window = kernel_size, 1
        case = patch_case((side, side), *window, channels, hidden, dtype=dtype, batch=3, device="cuda")
        got = by_patch_functions(kernels, case, *window)
        assert_near(got, by_patches(case, *window), 2e-5 if dtype == torch.float32 else 0.03)
        again = by_patch_functions(kernels, case, *window)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

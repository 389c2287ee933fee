"""When an operation may take a path that writes into buffers of its own."""
import functools
import importlib.util
from collections.abc import Callable

import torch

__all__ = [
    'compiled_for_cpu',
    'eager_on_cpu',
    'in_parts',
    'inference_on_cpu',
    'is_exporting',
    'is_known_to_hold',
    'records_gradients',
    'triton_serves',
]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.jit.unused
def eager_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether an operation runs eagerly on a CPU in float32 or float64, with or without gradients.

    Not so where a compiler, exporter or tracer looks on, autocast would choose other dtypes, a batch is empty, or a
    tensor is more than a plain one (functorch's transforms, forward-mode gradients, fake and distributed tensors).
    """
    return all(
        type(x) in _PLAIN and x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64) for x in tensors
    ) and not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled('cpu')
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(x.numel() == 0 for x in tensors)
    )


def records_gradients(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@torch.jit.unused
def inference_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether `eager_on_cpu`, and no gradients are recorded."""
    return eager_on_cpu(*tensors) and not records_gradients(*tensors)


@torch.jit.unused
def compiled_for_cpu(*tensors: torch.Tensor) -> bool:
    """Whether torch.compile makes code for a CPU in float32 or float64, and not a program to be exported.

    A program must load where this package, which registers its operators, is not.
    """
    return (
        torch.compiler.is_compiling()
        and not is_exporting()
        and all(x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64) for x in tensors)
    )


def triton_serves(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels compute on these: on a GPU, eagerly and compiled, but not in what is exported or traced.

    An exported program must run where this package or Triton is not: in onnxruntime, in C++, on a CPU. It holds plain
    slices, which its own compiler may fuse.
    """
    device = tensors[0].device
    return (
        device.type == 'cuda'
        and all(x.device == device and x.dtype in _FLOATS for x in tensors)
        and not is_exporting()
        and not torch.jit.is_tracing()
        and _runs_triton(device)
    )


@torch.compiler.assume_constant_result
def _runs_triton(device: torch.device) -> bool:
    # torch.func does not differentiate operators that are registered in Python.
    return _finds_triton(device) and not torch._C._are_functorch_transforms_active()


@functools.cache
def _finds_triton(device: torch.device) -> bool:
    # What came with torch 2.8 is the first that compiles the kernels, and Triton asks for such a device. Where there is
    # none to ask, tensors are fake: traced for a device elsewhere.
    return (
        torch.version.cuda is not None
        and torch.__version__ >= '2.8'
        and importlib.util.find_spec('triton') is not None
        and (not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0))
    )


@torch.compiler.assume_constant_result  # called as it is: within a graph, torch 2.11 answers True while it compiles
def is_exporting() -> bool:
    """Whether torch.export looks on, which torch before 2.7 cannot say: its programs hold the form for the compiler."""
    return getattr(torch.compiler, 'is_exporting', bool)()


@torch.jit.unused
def is_known_to_hold(condition: bool) -> bool:
    """Whether a condition on sizes holds; false where a program that is exported or compiled leaves them open.

    To ask for it itself would tie the program to the answer at the sizes it was made at; ONNX graphs would then be
    wrong at other sizes without an error.
    """
    if not torch.compiler.is_compiling():
        return condition
    if torch.compiler.is_dynamo_compiling() and not hasattr(torch.compiler, 'is_exporting'):
        return condition  # dynamo before torch 2.7 cannot ask the other question
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes long to import

    return statically_known_true(condition)


# The C library gives larger blocks back to the system, which hands every page out anew.
_LARGEST_BLOCK = 2 ** 25


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, held: int) -> torch.Tensor:
    """function(x), in parts of the batch where what it holds for all images would be a large block of memory.

    Args:
        function: Of a tensor, each of whose images is computed by itself.
        x: Batch of images.
        held: Numbers in the largest tensor that `function` makes of an image.
    """
    size = held * x.element_size()
    if len(x) * size <= _LARGEST_BLOCK:
        return function(x)
    return torch.cat([function(part) for part in x.split(max(1, _LARGEST_BLOCK // 2 // size))])

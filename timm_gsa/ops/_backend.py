"""Chooses the form that computes an operation, and says why. The only file that asks what a call runs on and under.

An operation has at most four forms:

    reference   the textbook formulation, slow, for comparison
    torch       plain operators of torch: any device, transform, export and trace
    cpu         blocks that stay in the cache of a CPU, in float32 and float64
    triton      Triton kernels, on a GPU

The forms cpu and triton have a verifier: it takes the arguments of a call and returns None, or the reason why the form
does not compute it. 'auto' takes the first of triton, cpu and torch that has no reason against it. `use_backend`
selects one form; the plain form computes the calls that it cannot. `explain` shows the choices.
"""
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn.modules import module as nn_module

__all__ = [
    'BACKENDS',
    'Affine',
    'Choice',
    'Form',
    'Operation',
    'affine_of',
    'allows_tf32',
    'chooses_by_speed',
    'compute',
    'explain',
    'in_full_precision',
    'is_compiling',
    'is_exporting',
    'records_gradients',
    'short_cut',
    'statically_true',
    'use_backend',
    'why_not_available',
    'why_not_cpu',
    'why_not_plain_tensors',
    'why_not_pristine',
    'why_not_triton',
    'why_not_untouched',
    'wide_softmax',
    'wide_type',
]

BACKENDS = ('auto', 'reference', 'torch', 'cpu', 'triton')

WIDEST_HEAD = 64  # channels of a head that Triton kernels keep on the chip, of any dtype, on any device they serve

_SELECTED: ContextVar[str] = ContextVar('timm_gsa_backend', default='auto')
_RECORD: ContextVar[list['Choice'] | None] = ContextVar('timm_gsa_choices', default=None)

_PLAIN = (torch.Tensor, nn.Parameter)
_WIDE = (torch.float32, torch.float64)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Form(NamedTuple):
    """A form of an operation: what computes it, and the verifier that returns None or why it cannot."""

    compute: Callable[..., Any]
    why_not: Callable[..., str | None]


class Operation(NamedTuple):
    """An operation and its forms.

    A short cut through a whole layer has no forms 'reference' and 'torch': there the layer computes its own equation.
    """

    name: str
    reference: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    cpu: Form | None = None
    triton: Form | None = None


class Choice(NamedTuple):
    """What computed a call: the operation, its form, and why each faster form did not.

    `form` is one of 'triton', 'cpu', 'torch' and 'reference'; the values of `reasons` are sentences about the call. An
    operation named as a whole layer whose form is 'torch' or 'reference' is computed step by step: the choices of the
    steps follow.
    """

    operation: str
    form: str
    reasons: dict[str, str]


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in what half precision would spoil: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax over an axis, computed and returned in at least float32."""
    return x.softmax(dim, dtype=wide_type(x.dtype))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend, in eager mode and in code that is compiled inside the context.

    The choice holds for this thread or asynchronous task alone. Plain operators of torch compute the calls that the
    backend cannot; `explain` names them.

    Args:
        name: 'auto' for the fastest form of each call, 'torch' for plain operators, 'reference' for the textbook
            formulation, 'cpu', or 'triton' (with `TRITON_INTERPRET=1` on CPU tensors, in Triton's interpreter).

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: The backend cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f'name must be one of {", ".join(map(repr, BACKENDS))}, got {name!r}')
    reason = why_not_available(name)
    if reason is not None:
        raise RuntimeError(f'backend {name!r} cannot run here: {reason}')
    token = _SELECTED.set(name)
    try:
        yield
    finally:
        _SELECTED.reset(token)


def why_not_available(name: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    if name != 'triton':
        return None
    if interprets():
        return None if importlib.util.find_spec('triton') is not None else 'Triton is not installed'
    if not torch.cuda.is_available():
        return 'there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)'
    return _why_no_triton(torch.device('cuda', torch.cuda.current_device()))


def compute(operation: Operation, *args: Any) -> Any:
    """Result of an operation, computed by the form chosen for these arguments."""
    chosen, reasons = _choice(operation, args)
    form = getattr(operation, chosen)
    _record(operation.name, chosen, reasons)
    return (form.compute if isinstance(form, Form) else form)(*args)


def short_cut(operation: Operation, layer: nn.Module, *args: Any) -> Any:
    """Result of a whole layer, computed in place of its submodules; None if no form can: the layer then computes it."""
    chosen, reasons = _choice(operation, (layer, *args))
    _record(operation.name, chosen, reasons)
    if chosen not in ('cpu', 'triton'):
        return None
    return getattr(operation, chosen).compute(layer, *args)


def _choice(operation: Operation, args: tuple[Any, ...]) -> tuple[str, dict[str, str]]:
    """Name of the form that computes a call, and why forms before it do not."""
    selected = _selected()
    if selected == 'reference' or selected == 'torch':
        return selected, {}
    if any(isinstance(each, torch.fx.Proxy) for each in args):
        return 'torch', dict.fromkeys(('triton', 'cpu'), 'torch.fx records plain operators')
    reasons: dict[str, str] = {}
    for name in ('triton', 'cpu'):
        form = getattr(operation, name)
        if form is None or selected not in ('auto', name):
            continue
        reason = form.why_not(*args)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    return 'torch', reasons


def chooses_by_speed() -> bool:
    """True unless the user selected a backend, which then computes all calls it can, also where another is faster."""
    return _selected() == 'auto'


# Dynamo guards on a ContextVar from torch 2.9 on; before, what is compiled keeps the backend of its first call.
_GUARDS_CONTEXT = tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 9)


def _selected() -> str:
    if _GUARDS_CONTEXT or not torch.compiler.is_compiling():
        return _SELECTED.get()
    return _selected_once()


@torch.compiler.assume_constant_result
def _selected_once() -> str:
    return _SELECTED.get()


def _record(operation: str, form: str, reasons: dict[str, str]) -> None:
    if torch.compiler.is_compiling():
        return
    record = _RECORD.get()
    if record is not None:
        record.append(Choice(operation, form, reasons))


def explain(model: nn.Module, images: torch.Tensor) -> dict[str, list[Choice]]:
    """Run a model once and return what computes each of its layers, and why faster forms do not.

    The choice depends on the modes in which `explain` is called: gradients, training and autocast. A compiled model
    runs without its compiled code.

    Args:
        model: Model of this package, or any network with layers of `timm_gsa.layers`.
        images: Batch of images as the model takes them.

    Returns:
        For each module that calls operations of this package, by its name in the model, the choices in order.
    """
    model = getattr(model, '_orig_mod', model)
    choices: dict[str, list[Choice]] = {}
    record: list[Choice] = []
    stack: list[tuple[str, int]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack.append((name, len(record)))
        return hook

    def leave(*_: Any) -> None:
        name, start = stack.pop()
        if len(record) > start:
            choices.setdefault(name, []).extend(record[start:])
            del record[start:]

    handles = []
    for name, module in model.named_modules():
        # A hook on a part without parameters, as a pool is, would keep short cuts from doing its work.
        own = type(module).__module__.startswith(__package__.partition('.')[0] + '.')
        if own and name and next(module.parameters(), None) is not None:
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    token = _RECORD.set(record)
    try:
        model(images)
    finally:
        _RECORD.reset(token)
        for handle in handles:
            handle.remove()
    if record:
        choices[''] = record
    return choices


# The circumstances of a call.


def why_not_plain_tensors(*tensors: torch.Tensor) -> str | None:
    """Why a call may use plain operators of torch alone: tracers, exporters and transforms know no others."""
    if torch.jit.is_tracing():
        return 'torch.jit.trace records plain operators'
    if is_exporting():
        return 'torch.export records plain operators'
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "torch.func's transforms take plain operators"
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode AD takes plain operators'
    for x in tensors:
        if type(x) not in _PLAIN:
            return f'{type(x).__name__} takes plain operators'
        if x.layout != torch.strided:
            return f'{x.layout} takes plain operators'
    return None


def why_not_cpu(*tensors: torch.Tensor) -> str | None:
    """Why the forms for a CPU cannot compute a call."""
    reason = why_not_plain_tensors(*tensors)
    if reason is not None:
        return reason
    for x in tensors:
        if x.device.type != 'cpu':
            return 'the tensors are not on a CPU'
        if x.dtype not in _WIDE:
            return f'{x.dtype} is neither float32 nor float64'
        if x.dtype != tensors[0].dtype:
            return f'the tensors differ in dtype: {tensors[0].dtype} and {x.dtype}'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast is enabled'
    if not torch.compiler.is_compiling() and any(x.numel() == 0 for x in tensors):
        return 'a tensor is empty'
    return None


def why_not_triton(family: str, *tensors: torch.Tensor, widest: int | None = None) -> str | None:
    """Why Triton kernels cannot compute a call.

    Args:
        family: Family of the kernels; before 'auto' uses them on a device, they have to pass their check.
        *tensors: Arguments of the kernels.
        widest: Channels of a head, which kernels keep on the chip.
    """
    device = tensors[0].device
    interpreted = interprets() and _selected() == 'triton'
    if device.type != 'cuda' and not (interpreted and device.type == 'cpu'):
        return 'the tensors are not on a GPU'
    reason = why_not_plain_tensors(*tensors)
    if reason is not None:
        return reason
    for x in tensors:
        if x.device != device:
            return 'the tensors are on several devices'
        if x.dtype not in _FLOATS:
            return f'{x.dtype} is no supported dtype'
    if widest is not None and widest > WIDEST_HEAD:
        return f'heads have more than {WIDEST_HEAD} channels'
    if interpreted:
        return None
    reason = _why_no_triton(device)
    if reason is None and chooses_by_speed():
        return _why_not_proven(family, tensors[0].dtype, device)
    return reason


def interprets() -> bool:
    """True if Triton runs kernels in its interpreter, which it decides when it is imported."""
    return os.environ.get('TRITON_INTERPRET') == '1'


@torch.compiler.assume_constant_result
def _why_no_triton(device: torch.device) -> str | None:
    return _triton_on(device)


@torch.compiler.assume_constant_result
def _why_not_proven(family: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # tensors are fake
        return None
    from ._kernels import why_not_proven

    return why_not_proven(family, dtype, device)


@functools.cache
def _triton_on(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return 'torch was built without CUDA'
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 8):
        return f'torch {torch.__version__} is older than 2.8'
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed'
    if not torch.cuda.is_available():  # tensors are fake: traced for a device elsewhere
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 'the compute capability of the device is below 8.0'
    from ._kernels import why_not_started

    return why_not_started(device)


def allows_tf32() -> bool:
    """True if float32 products on a GPU may round their factors to TF32, by torch's newer setting or by the older."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, 'fp32_precision'):  # before torch 2.9; later, reading the older setting may raise
        return matmul.allow_tf32
    precision = matmul.fp32_precision
    if precision == 'none':  # inherits the setting of all backends
        precision = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return precision == 'tf32'


_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST_DEVICES = ('cpu', 'cuda', 'xpu', 'mps', 'hpu')  # asking for others is an error


def in_full_precision(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(x) without autocast, with float32 parameters if its own are half precision, and without TF32.

    cuDNN rounds the factors of float32 convolutions to TF32 by default: on a GPU the module computes in float64.

    Args:
        module: Module with few channels.
        x: Input in float32 or float64.

    Returns:
        Output in the dtype of `x`.
    """
    if x.device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _call_wide(module, x)
    return _call_wide(module, x)


def _call_wide(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x.device.type == 'cuda' else torch.float32
    replaced = _HALF if dtype == torch.float32 else (*_HALF, torch.float32)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    wide = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.dtype in replaced}
    if not wide:
        return module(x)
    return torch.func.functional_call(module, wide, (x.to(torch.promote_types(dtype, x.dtype)),)).to(x.dtype)


def records_gradients(*tensors: torch.Tensor) -> bool:
    """True if autograd records what is done with tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_compiling() -> bool:
    """True while a compiler or an exporter traces a call."""
    return torch.compiler.is_compiling()


@torch.compiler.assume_constant_result  # called as it is: within a graph, torch 2.11 answers True while it compiles
def is_exporting() -> bool:
    """True under torch.export, which torch before 2.7 cannot tell: its programs hold the form for the compiler."""
    return getattr(torch.compiler, 'is_exporting', bool)()


@torch.jit.unused
def statically_true(condition: bool) -> bool:
    """True if a condition on sizes holds; False if a program that is exported, traced or compiled leaves them open.

    The condition itself would tie the program to the sizes it was built with, without an error at other sizes.
    """
    if torch.jit.is_tracing() or isinstance(condition, torch.fx.Proxy):
        return False
    if not torch.compiler.is_compiling():
        return condition
    if torch.compiler.is_dynamo_compiling() and not hasattr(torch.compiler, 'is_exporting'):
        return condition  # dynamo before torch 2.7 cannot ask the other question
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes long to import

    return statically_known_true(condition)


# What a short cut may assume of the submodules whose work it does.

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
_SIMPLE = (nn.ReLU, nn.Identity)
_NO_ACT = (type(None), nn.Identity)


def why_not_untouched(module: nn.Module) -> str | None:
    """Why a module may not be replaced by the computation that its class stands for; None if nothing touches it.

    Hooks watch or change what a module computes, global ones that of every module; a patched `forward` and
    parametrizations replace it. The same holds for its submodules.
    """
    reason = _why_watched()
    if reason is not None:
        return reason
    for name, part in module.named_modules():
        reason = _why_touched(part)
        if reason is not None:
            return f'{name} {reason}'.lstrip()
    return None


def _why_watched() -> str | None:
    if any(getattr(nn_module, f'_global{name}', None) for name in _HOOKS):
        return 'a global hook watches every module'
    return None


def _why_touched(module: nn.Module) -> str | None:
    """Why one module is not untouched, without its submodules and without global hooks."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return 'has a hook'
    if 'forward' in module.__dict__:
        return 'has a patched forward'
    return 'has a parametrization' if 'parametrizations' in module._modules else None


def why_not_pristine(
        layer: nn.Module,
        biases: Mapping[str, bool | None],
        simple: tuple[type[nn.Module], ...] = (),
) -> str | None:
    """Why a short cut may not do the work of a layer's submodules; None if all are as they were built.

    A submodule is pristine if it is of the very class that the layer builds (`nn.Conv2d` of 1 x 1 pixels, stride 1 and
    one group; a batch norm without an activation; `nn.ReLU`), nothing watches or changes it (forward, forward-pre,
    backward and backward-pre hooks, global ones too, parametrizations, a patched `forward`), and its parameters are its
    own.

    Args:
        layer: The layer.
        biases: Names of its submodules; True or False if a convolution must or must not have a bias, None if both do.
        simple: Further classes without parameters that a submodule may be of.
    """
    reason = _why_watched()
    if reason is not None:
        return reason
    for name, bias in biases.items():
        module = getattr(layer, name)
        reason = None if type(module) in simple else _why_not_own_class(module, bias)
        reason = reason or _why_touched(module)
        if reason is not None:
            return f'{name} {reason}'
    return None


def _why_not_own_class(module: Any, bias: bool | None) -> str | None:
    if type(module) is nn.Conv2d:
        if module._parameters.get('weight') is None:
            return 'has a weight that is no parameter of it'
        if (module.kernel_size, module.stride, module.groups, module.padding) != ((1, 1), (1, 1), 1, (0, 0)):
            return 'is no 1 x 1 convolution with stride 1 and one group'
        if bias is not None and (module.bias is not None) != bias:
            return 'has a bias' if module.bias is not None else 'has no bias'
        return None
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        from timm.layers import BatchNormAct2d, SyncBatchNormAct

        own = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
        plain = isinstance(getattr(module, 'act', None), _NO_ACT) and isinstance(getattr(module, 'drop', None), _NO_ACT)
        return None if own and plain else f'is a {type(module).__name__}'
    return None if type(module) in _SIMPLE else f'is a {type(module).__name__}'


class Affine(NamedTuple):
    """Factor and summand of each channel, (C,)."""

    scale: torch.Tensor
    shift: torch.Tensor


def affine_of(norm: Any) -> Affine | None:
    """Factor and summand of each channel, in at least float32, of a batch norm that uses its running statistics.

    None if the norm is no such map: in training mode, without running statistics, of another kind, or with an
    activation in it.
    """
    mean, variance = getattr(norm, 'running_mean', None), getattr(norm, 'running_var', None)
    if norm.training or mean is None or variance is None or not isinstance(getattr(norm, 'act', None), _NO_ACT):
        return None
    wide = wide_type(mean.dtype)
    scale = (variance.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -mean.to(wide) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    return Affine(scale, shift)

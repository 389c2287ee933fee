"""When an operation may take a path that writes into buffers of its own."""
import torch

__all__ = ['eager_on_cpu', 'inference_on_cpu']

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@torch.jit.unused
def eager_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether an operation runs eagerly on a CPU in float32 or float64, with or without gradients.

    Not so where a compiler, exporter or tracer looks on, autocast would choose other dtypes, or a tensor is more than a
    plain one (functorch's transforms, forward-mode gradients, fake and distributed tensors).
    """
    return all(
        type(x) in _PLAIN and x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64) for x in tensors
    ) and not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled('cpu')
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@torch.jit.unused
def inference_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether `eager_on_cpu`, and no gradients are recorded."""
    return eager_on_cpu(*tensors) and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))

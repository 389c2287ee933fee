"""When an operation may take a path that writes into buffers of its own."""
import torch

__all__ = ['inference_on_cpu']

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@torch.jit.unused
def inference_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether plain eager inference runs on a CPU in float32 or float64.

    Not so where gradients are recorded, a compiler, exporter or tracer looks on, autocast would choose other dtypes, or
    a tensor is more than a plain one (functorch's transforms, fake and distributed tensors).
    """
    return all(
        type(x) in _PLAIN and x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64) for x in tensors
    ) and not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled('cpu')
        or torch._C._functorch.maybe_current_level() is not None
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )

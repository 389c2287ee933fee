"""What two ways to compute the same are given, and what is compared of them."""
import torch


def outputs_and_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Output of a function, and the gradients that a fixed cotangent gives its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    probe = torch.linspace(-1., 1., out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad((out * probe).sum(), leaves)]


def heads_in(x: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Maps of heads (B, heads, channels, H, W) with the memory layout of maps (B, heads * channels, H, W)."""
    return x.flatten(1, 2).contiguous(memory_format=layout).unflatten(1, x.shape[1:3])


def bytes_held(function, *inputs) -> int:
    """Bytes of all storages that autograd holds of a call for its backward pass."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(held.values())

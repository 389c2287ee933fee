"""SAN's operations on a GPU: operators whose kernels are in triton_aggregation.py and triton_relation_network.py."""
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import _autograd
from .._backend import why_not_triton
from .._kernels import why_no_products
from . import plain
from .layers import hidden_of_patches, logits_of_differences, why_not_own_parts
from .neighbourhood import same_padding
from .networks import define_networks

__all__ = [
    'aggregation',
    'difference_moments',
    'difference_network',
    'normed_difference_network',
    'pairwise_weights',
    'patch_network',
    'patchwise_weights',
    'why_not_aggregation',
    'why_not_difference_network',
    'why_not_moments',
    'why_not_normed_difference_network',
    'why_not_pairwise_weights',
    'why_not_patch_network',
    'why_not_patchwise_weights',
]


# The sum over neighbours.


def why_not_aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> str | None:
    reason = why_not_triton('san', value, weight)
    if reason is None and same_padding(kernel_size, dilation) >= min(value.shape[-2:]):
        return 'a map smaller than plain reflection allows'
    return reason


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """The sum over neighbours by a kernel, where plain reflection exists (padding < min(H, W)).

    Values and weights may have different floating-point types: each is read as it is, sums are float32 (float64 for
    float64 values), the output has the type of the value.
    """
    return _aggregation(value, weight, kernel_size, dilation)


def _forward(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    from . import triton_aggregation  # imports Triton

    return triton_aggregation.forward(value, weight, kernel_size, dilation)


def _value_grad(grad: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    from . import triton_aggregation

    return triton_aggregation.value_grad(grad, weight, kernel_size, dilation)


def _weight_grad(
        grad: torch.Tensor,
        value: torch.Tensor,
        kernel_size: int,
        dilation: int,
        groups: int,
        dtype: torch.dtype,
        order: Sequence[int],
) -> torch.Tensor:
    from . import triton_aggregation

    out = _empty_weight(grad, value, kernel_size, dilation, groups, dtype, order)
    return triton_aggregation.weight_grad(grad, value, out, kernel_size, dilation)


def _empty_weight(
        grad: torch.Tensor,
        value: torch.Tensor,
        kernel_size: int,
        dilation: int,
        groups: int,
        dtype: torch.dtype,
        order: Sequence[int],
) -> torch.Tensor:
    shape = value.shape[0], groups, kernel_size ** 2, value.shape[2], value.shape[3]
    out = value.new_empty([shape[axis] for axis in order], dtype=dtype)
    return out.permute([order.index(axis) for axis in range(5)])


def _weight_order(weight: torch.Tensor) -> list[int]:
    """Axes of a weight from the outermost in memory to the innermost, for a gradient that can be written fast.

    They are those of the weight itself, unless its places are innermost: one more step between the channels of a
    pixel, and no store fills a sector. Whoever needs the gradient in that order copies it for less.
    """
    group, place, row = weight.stride()[1:4]
    if group != 1 and place != 1:
        return [0, 1, 2, 3, 4]
    return [0, 2, 3, 4, 1] if place > row else [0, 3, 4, 2, 1]


def _flops(first: Any, second: Any, kernel_size: int, *_: Any, **__: Any) -> int:
    """A multiply-add for each channel, position and place; the first argument is a map."""
    batch, channels, height, width = first
    return 2 * batch * channels * height * width * kernel_size ** 2


def _like_first(x: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    return torch.empty_like(x)


_aggregation = _autograd.operator('triton_aggregation', _forward, _like_first, _flops, 'CUDA')
_aggregation_value_grad = _autograd.operator(
    'triton_aggregation_value_grad', _value_grad, _like_first, _flops, 'CUDA')
_aggregation_weight_grad = _autograd.operator(
    'triton_aggregation_weight_grad', _weight_grad, _empty_weight, _flops, 'CUDA')


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep of two tensors those that the gradient of the other takes."""
    first, second, ctx.kernel_size, ctx.dilation = inputs[:4]
    ctx.save_for_backward(
        first if ctx.needs_input_grad[1] else None,
        second if ctx.needs_input_grad[0] else None,
    )
    if len(inputs) == 4:
        ctx.weight = second.shape[1], second.dtype, _weight_order(second)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    value, weight = ctx.saved_tensors
    window = ctx.kernel_size, ctx.dilation
    return (
        None if weight is None else _aggregation_value_grad(grad, weight, *window),
        None if value is None else _aggregation_weight_grad(grad, value, *window, *ctx.weight),
        None,
        None,
    )


def _gradients_of_value_grad(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    first, weight = ctx.saved_tensors
    window = ctx.kernel_size, ctx.dilation
    return (
        None if weight is None else _aggregation(grad, weight, *window),
        None if first is None else _aggregation_weight_grad(first, grad, *window, *ctx.weight),
        None,
        None,
    )


def _gradients_of_weight_grad(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    first, value = ctx.saved_tensors
    window = ctx.kernel_size, ctx.dilation
    return (
        None if value is None else _aggregation(value, grad, *window),
        None if first is None else _aggregation_value_grad(first, grad, *window),
        *[None] * 5,
    )


# Gradients of gradients are these operators again, which take no tensor but their arguments.
_autograd.register('triton_aggregation', _gradients, _keep)
_autograd.register('triton_aggregation_value_grad', _gradients_of_value_grad, _keep)
_autograd.register('triton_aggregation_weight_grad', _gradients_of_weight_grad, _keep)

for _name, _function in (
        ('triton_aggregation', _forward),
        ('triton_aggregation_value_grad', _value_grad),
        ('triton_aggregation_weight_grad', _weight_grad),
):
    _autograd.implement(_name, _function, 'CPU')  # in Triton's interpreter


# The networks between relations and weights.


def _kernels() -> Any:
    from . import triton_relation_network  # imports Triton

    return triton_relation_network


# On a CPU in Triton's interpreter.
difference_network, normed_difference_network, patch_network = define_networks(
    'triton_', _kernels, ('CUDA', 'CPU'), torch.channels_last, groups_innermost=True)


def why_not_difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> str | None:
    tensors = query, key, weight1, bias1, weight2, bias2
    return _why_not(weight2.dtype, query.shape[1], weight1.shape[0], weight2.shape[0], *tensors)


def why_not_normed_difference_network(query: torch.Tensor, key: torch.Tensor, *more: Any) -> str | None:
    weight1, scale, shift, _, weight2, bias2 = more[:6]
    tensors = query, key, weight1, scale, shift, weight2, bias2
    return _why_not(weight2.dtype, query.shape[1], weight1.shape[0], weight2.shape[0], *tensors)


def why_not_patch_network(key: torch.Tensor, *more: Any) -> str | None:
    return _why_not(key.dtype, key.shape[1], more[2].shape[0], None, key, *more[:3])


def _why_not(dtype: torch.dtype, channels: int, hidden: int, groups: int | None, *tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot compute a network.

    Args:
        dtype: In which products are taken.
        channels: Channels of the maps that go into it.
        hidden: Channels after the first linear map.
        groups: Channels after the second one; None for a network of patches.
        tensors: What goes into it.
    """
    device = tensors[0].device
    return (
        why_not_triton('san', *tensors)
        or why_no_products(dtype, device)
        or why_no_products(tensors[0].dtype, device)
        or _why_no_memory(device, dtype, channels, hidden, groups)
    )


@torch.compiler.assume_constant_result
def _why_no_memory(device: torch.device, dtype: torch.dtype, *sizes: int | None) -> str | None:
    return _memory_on(device, dtype, *sizes)


@functools.lru_cache(maxsize=256)
def _memory_on(
        device: torch.device,
        dtype: torch.dtype,
        channels: int,
        hidden: int,
        groups: int | None,
) -> str | None:
    """Why the shared memory of a multiprocessor does not do for the kernels."""
    if device.type != 'cuda' or not torch.cuda.is_available():  # interpreted, or traced for a device elsewhere
        return None
    if groups is None:
        needed = _kernels().patch_memory(channels, hidden, dtype)
    else:
        needed = _kernels().difference_memory(channels, hidden, groups, dtype)
    # What every device that Triton serves has, where torch does not tell.
    available = getattr(torch.cuda.get_device_properties(device), 'shared_memory_per_block_optin', 99 * 1024)
    if needed <= available:
        return None
    return f'the network needs {needed // 1024} kB of shared memory, the device has {available // 1024}'


def why_not_moments(query: torch.Tensor, key: torch.Tensor, kernel_size: int, dilation: int) -> str | None:
    return why_not_triton('san', query, key)


def difference_moments(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`difference_moments` from sums that the kernel of the aggregation takes: nothing is stored between its places."""
    return plain.moments_from_sums(query, key, _window_sums, kernel_size, dilation)


def _window_sums(x: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    batch, _, height, width = x.shape
    weight = x.new_ones(()).expand(batch, 1, kernel_size ** 2, height, width)
    if why_not_aggregation(x, weight, kernel_size, dilation) is not None:
        return plain.window_sums(x, kernel_size, dilation)
    return aggregation(x, weight, kernel_size, dilation)


# The weights of a layer.


def why_not_pairwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> str | None:
    tensors = query, *layer.parameters()
    return why_not_triton('san', *tensors) or why_not_own_parts(layer) or _why_not(
        query.dtype, layer.dim_key + 2, layer.conv1.out_channels, layer.conv2.out_channels, *tensors)


def why_not_patchwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> str | None:
    tensors = query, *layer.parameters()
    return why_not_triton('san', *tensors) or why_not_own_parts(layer) or _why_not(
        query.dtype, layer.dim_key, layer.conv1.out_channels, None, *tensors)


def pairwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Weights of `PairwiseAttention`: places and, innermost, groups lie together in memory.

    The softmax is taken of the axes in that order, or else torch would copy all into another; in at least float32.
    """
    logits = logits_of_differences(
        layer, query, key, layer.mapped_position(query),
        difference_moments, difference_network, normed_difference_network)
    return logits.permute(0, 3, 4, 2, 1).softmax(3, dtype=logits.dtype).permute(0, 4, 3, 1, 2)


def patchwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Weights of `PatchwiseAttention`, with groups innermost in memory, then places, as the sum reads them best.

    The parameters of `conv2` are permuted, which are small.
    """
    hidden = layer.act2(layer.norm2(hidden_of_patches(layer, query, key, plain.patch_moments, patch_network)))
    groups, conv = layer.num_groups, layer.conv2
    weight = conv.weight.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1)
    bias = None if conv.bias is None else conv.bias.unflatten(0, (groups, -1)).t().flatten()
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    return F.conv2d(hidden, weight, bias).unflatten(1, (-1, groups)).transpose(1, 2)

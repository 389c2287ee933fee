"""From relations to attention weights: the small networks of SAN, their norms given as affine maps or batch norms.

Every operation here has a plain reference that builds the relations of all K * K places at once. The operations
themselves keep no relations: backward passes compute them anew. What goes over relations is in _relation_rows.py, for
CPUs, and in Triton kernels; what is here are matrices and norms, which are the same everywhere.

Source: Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3.1 and 3.2.
"""
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import _relation_rows
from ._autograd import differentiable_gradients
from ._paths import is_exporting, triton_serves
from .aggregation import aggregation
from .neighbourhood import reflect_pad, same_padding, windows
from .relation import patch, subtraction

__all__ = [
    'difference_moments',
    'difference_network',
    'difference_network_reference',
    'normed_difference_network',
    'normed_difference_network_reference',
    'patch_moments',
    'patch_network',
    'patch_network_reference',
]


def difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """Two linear maps on the rectified difference of each position's query and each neighbour's key.

    out[:, k, l] = weight2 relu(weight1 relu(query[:, l] - key[:, neighbour k of l]) + bias1) + bias2

    A norm before the first rectifier is an affine map of query and key.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        weight1: Matrix of shape (M, C).
        bias1: Vector of shape (M,).
        weight2: Matrix of shape (G, M).
        bias2: Vector of shape (G,).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, G, K * K, H, W), places in row-major order.
    """
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    network = _difference_operator if _is_operator(query, weight1, weight2) else _DifferenceNetwork.apply
    return network(
        query, padded, weight1, torch.ones_like(bias1), bias1, weight2, bias2, None, kernel_size, dilation)[0]


def difference_network_reference(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """The same as `difference_network` on the materialised differences."""
    relation = subtraction(query, key, kernel_size, dilation).relu()
    hidden = (torch.einsum('mc,bckhw->bmkhw', weight1, relation) + bias1[:, None, None, None]).relu()
    return torch.einsum('gm,bmkhw->bgkhw', weight2, hidden) + bias2[:, None, None, None]


def normed_difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`difference_network` with a batch norm, over batch, places and positions, after the first linear map.

    out[:, k, l] = weight2 relu(scale * norm(weight1 relu(query[:, l] - key[:, neighbour k of l])) + shift) + bias2

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        weight1: Matrix of shape (M, C).
        scale: Factors of the norm, (M,).
        shift: Summands of the norm, (M,).
        eps: What the norm adds to the variance.
        weight2: Matrix of shape (G, M).
        bias2: Vector of shape (G,).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, G, K * K, H, W), places in row-major order, and the mean and the variance (with the divisor
        n) of the M channels before the norm, float64, which no gradient flows through.
    """
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    network = _difference_operator if _is_operator(query, weight1, weight2) else _DifferenceNetwork.apply
    return network(query, padded, weight1, scale, shift, weight2, bias2, eps, kernel_size, dilation)[:3]


def normed_difference_network_reference(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as `normed_difference_network` on the materialised differences."""
    relation = subtraction(query, key, kernel_size, dilation).relu()
    hidden = torch.einsum('mc,bckhw->bmkhw', weight1, relation)
    variance, mean = torch.var_mean(hidden, (0, 2, 3, 4), correction=0)
    normed = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps).relu()
    out = torch.einsum('gm,bmkhw->bgkhw', weight2, normed) + bias2[:, None, None, None]
    return out, mean.detach().double(), variance.detach().double()


def patch_network(
        key: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """A linear map on the rectified, affinely mapped keys of each position's neighbourhood.

    out[:, l] = sum over channels c and places k of
                weight[:, c, k] * relu(scale[c, k] * key[c, neighbour k of l] + shift[c, k])

    Args:
        key: Map of shape (B, C, H, W).
        scale: Factors of shape (C * K * K,), places of a channel one after another in row-major order.
        shift: Summands, laid out as `scale`.
        weight: Matrix of shape (M, C * K * K), columns laid out as `scale`.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, M, H, W).
    """
    padded = reflect_pad(key, same_padding(kernel_size, dilation))
    network = _patch_operator if _is_operator(key, weight) else _PatchNetwork.apply
    return network(padded, scale, shift, weight, kernel_size, dilation)


def patch_network_reference(
        key: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """The same as `patch_network` on the materialised patches."""
    relation = (patch(key, kernel_size, dilation) * scale[:, None, None] + shift[:, None, None]).relu()
    return torch.einsum('mc,bchw->bmhw', weight, relation)


def difference_moments(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the differences of all positions' queries and their neighbours' keys.

    Those of `subtraction` over batch, places and positions, from sums over windows. Computed in float64, as the
    variance is the difference of sums that may be much larger.

    Args:
        query: Map of shape (B, C, H, W).
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Mean and variance (with the divisor n) of each channel, (C,), float64.
    """
    centre = key.detach().mean((0, 2, 3), keepdim=True)
    query, key = (query - centre).double(), (key - centre).double()
    first, second = _window_sums(torch.cat([key, key.square()], dim=1), kernel_size, dilation).chunk(2, dim=1)
    places = kernel_size ** 2
    mean = (query - first / places).mean((0, 2, 3))
    square = (query.square() - 2 / places * query * first + second / places).mean((0, 2, 3))
    return mean, square - mean.square()


def patch_moments(key: torch.Tensor, kernel_size: int, dilation: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the keys that all positions see at each place of their neighbourhood.

    Those of `patch` over batch and positions, from sums over windows. Computed in float64, as the variance is the
    difference of sums that may be much larger.

    Args:
        key: Map of shape (B, C, H, W).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Mean and variance (with the divisor n) of each channel and place, (C * K * K,), float64.
    """
    batch, channels, height, width = key.shape
    centre = key.detach().mean((0, 2, 3), keepdim=True)
    padded = reflect_pad((key - centre).double(), same_padding(kernel_size, dilation))
    both = torch.stack([padded.sum(0), padded.square().sum(0)])
    offsets = range(0, kernel_size * dilation, dilation)
    sums = torch.stack([both[..., top:top + height, :].sum(-2) for top in offsets], -2)
    sums = torch.stack([sums[..., left:left + width].sum(-1) for left in offsets], -1)
    mean, square = sums / (batch * height * width)
    return (mean + centre.view(-1, 1, 1)).flatten(), (square - mean.square()).flatten()


def _window_sums(x: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Sums of a map's neighbourhoods, (B, C, H, W)."""
    batch, _, height, width = x.shape
    if triton_serves(x):  # nothing is stored between its places
        return aggregation(x, x.new_ones(()).expand(batch, 1, kernel_size ** 2, height, width), kernel_size, dilation)
    x = reflect_pad(x, same_padding(kernel_size, dilation))
    offsets = range(0, kernel_size * dilation, dilation)
    x = torch.stack([x[..., top:top + height, :] for top in offsets]).sum(0)
    return torch.stack([x[..., left:left + width] for left in offsets]).sum(0)


@torch.jit.unused
def kernels_serve(dtype: torch.dtype, channels: int, hidden: int, groups: int | None, *tensors: torch.Tensor) -> bool:
    """Whether Triton kernels compute a network on a GPU; else it goes by rows.

    Args:
        dtype: In which products are taken.
        channels: Channels of the maps that go into it.
        hidden: Channels after the first linear map.
        groups: Channels after the second one; None for a network of patches.
        tensors: What goes into it.
    """
    return (
        dtype in (torch.float32, torch.bfloat16, torch.float16)
        and triton_serves(*tensors)
        and _fits(tensors[0].device, dtype, channels, hidden, groups)
    )


@torch.compiler.assume_constant_result
def _fits(device: torch.device, dtype: torch.dtype, channels: int, hidden: int, groups: int | None) -> bool:
    return _has_memory(device, dtype, channels, hidden, groups)


@functools.cache
def _has_memory(device: torch.device, dtype: torch.dtype, channels: int, hidden: int, groups: int | None) -> bool:
    """Whether a multiprocessor has the shared memory that the kernels take."""
    if not torch.cuda.is_available():  # traced for a device elsewhere
        return True
    from ._relation_network_triton import difference_memory, patch_memory  # imports Triton

    if groups is None:
        needed = patch_memory(channels, hidden, dtype)
    else:
        needed = difference_memory(channels, hidden, groups, dtype)
    # What every device that Triton serves has, where torch does not tell.
    return needed <= getattr(torch.cuda.get_device_properties(device), 'shared_memory_per_block_optin', 99 * 1024)


def _is_for_kernels(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> bool:
    """Whether `kernels_serve` a network of differences with these linear maps, or of patches with one."""
    dtype, groups = (x.dtype, None) if second is None else (second.dtype, second.shape[0])
    return x.dtype != torch.float64 and kernels_serve(dtype, x.shape[1], first.shape[0], groups, x, first)


def _kernels(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> Any:
    """The module that goes over the relations of a map: both have the same functions."""
    for_kernels = _is_for_kernels(x, first, second)
    return importlib.import_module('._relation_network_triton', __package__) if for_kernels else _relation_rows


def _is_operator(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> bool:
    """Whether networks are operators: for a compiler, which would look into the others, and of Triton kernels.

    An exported program must load where this package, which registers them, is not. In eager mode on a CPU the first
    call of an operator would take a second: it imports the compiler.
    """
    return (torch.compiler.is_compiling() and not is_exporting()) or _is_for_kernels(x, first, second)


def _normed_difference_network(
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        eps: float | None,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`normed_difference_network`, or `difference_network` with a factor where `eps` is None, on padded keys.

    Of the norm nothing but matrices of C x C numbers has to be known. With a = relu(query - key) and the hidden
    channels h = weight1 a, the moments of [a; 1] give mean and variance of h, and with sum dy a^T also the gradients of
    weight1, scale and shift, for dy the gradient of what the norm gives. These matrices are float64.

    Returns:
        Logits in the dtype of weight2, by kernels with groups innermost in memory, then places; mean and variance,
        (M,); moments of [a; 1], (C + 1, C + 1), zeros where no norm asks for them.
    """
    kernels, window = _kernels(query, weight1, weight2), (kernel_size, dilation)
    if eps is None:
        moments = query.new_zeros(query.shape[1] + 1, query.shape[1] + 1, dtype=torch.float64)
    else:
        moments = kernels.rectified_moments(query, padded, *window, weight2.dtype).double()
        moments /= _count(query, kernel_size)
    mean, variance, rate = _statistics(weight1.double(), moments, eps)
    folded = _folded(weight1.double(), scale * rate, shift - mean * scale * rate).to(_wide(query))
    return kernels.difference_logits(query, padded, folded, weight2, bias2, *window), mean, variance, moments


def _difference_gradients(
        grad: torch.Tensor,
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        moments: torch.Tensor,
        eps: float | None,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the seven tensors that `_normed_difference_network` takes, from that of the logits."""
    kernels, window = _kernels(query, weight1, weight2), (kernel_size, dilation)
    count = _count(query, kernel_size)
    wide1 = weight1.double()
    mean, _, rate = _statistics(wide1, moments, eps)
    factor = scale * rate
    folded = _folded(wide1, factor, shift - mean * factor).to(_wide(query))
    grad_weight2, products, grad_bias2 = kernels.difference_products(grad, query, padded, folded, weight2, *window)
    products, grad_shift = products[:, :-1].double(), products[:, -1].double()
    grad_scale = ((products * wide1).sum(1) - mean * grad_shift) * rate
    grad_weight1 = products * factor[:, None]
    correction = None
    if eps is not None:  # da = weight1^T factor (dy - grad_shift / n - (h - mean) rate grad_scale / n)
        slope = (factor * rate * grad_scale / count)[:, None]
        level = (factor * grad_shift / count)[:, None] - slope * mean[:, None]
        first, second = moments[:-1, -1], moments[:-1, :-1]
        grad_weight1 -= slope * (wide1 @ second) * count + level * first * count
        correction = (wide1.t() @ torch.cat([wide1 * slope, level], dim=1)).to(_wide(query))
    back = (wide1 * factor[:, None]).t().to(_wide(query)).contiguous()
    grad_query, grad_padded = kernels.difference_input_gradients(
        grad, query, padded, folded, back, correction, weight2, *window)
    grads = grad_weight1, grad_scale, grad_shift, grad_weight2, grad_bias2
    return grad_query, grad_padded, *_like((weight1, scale, shift, weight2, bias2), grads)


def _plain_difference_network(
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        eps: float | None,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    dtype = weight2.dtype
    query, padded, weight1, scale, shift, weight2, bias2 = (
        x.to(_wide(query)) for x in (query, padded, weight1, scale, shift, weight2, bias2))
    relation = (query[:, :, None, None] - windows(padded, kernel_size, dilation)).flatten(2, 3).relu()
    hidden = torch.einsum('mc,bckhw->bmkhw', weight1, relation)
    if eps is None:
        hidden = hidden * scale[:, None, None, None] + shift[:, None, None, None]
    else:
        hidden = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps)
    return (torch.einsum('gm,bmkhw->bgkhw', weight2, hidden.relu()) + bias2[:, None, None, None]).to(dtype)


def _count(query: torch.Tensor, kernel_size: int) -> int:
    """Relations of a channel in a batch."""
    return query[:, 0].numel() * kernel_size ** 2


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(
        weight1: torch.Tensor,
        moments: torch.Tensor,
        eps: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and inverse standard deviation, 1 without a norm, of the hidden channels before it, (M,)."""
    first, second = moments[:-1, -1], moments[:-1, :-1]
    mean = weight1 @ first
    variance = ((weight1 @ (second - first * first[:, None])) * weight1).sum(1).clamp(min=0)
    return mean, variance, torch.ones_like(variance) if eps is None else (variance + eps).rsqrt()


def _folded(weight: torch.Tensor, factor: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    """Matrix (M, C + 1) that is applied to numbers and a 1: factor * (weight x) + summand."""
    return torch.cat([weight * factor[:, None], summand[:, None]], dim=1)


def _like(inputs: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Gradients in the dtypes of what they belong to, each contiguous."""
    return [grad.to(x.dtype).contiguous() for x, grad in zip(inputs, grads, strict=True)]


def _keep_differences(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[3])
    ctx.more = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients_of_differences(backward: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # for gradients of gradients
        return differentiable_gradients(_plain_difference_network, ctx.saved_tensors[:7], grad, *ctx.more)
    return *backward(grad, *ctx.saved_tensors, *ctx.more), None, None, None


class _DifferenceNetwork(torch.autograd.Function):
    """`_normed_difference_network`, differentiable."""

    forward = staticmethod(_normed_difference_network)
    setup_context = staticmethod(_keep_differences)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _gradients_of_differences(_difference_gradients, ctx, grads[0])


_difference_operator = torch.library.custom_op(
    'timm_gsa::difference_network', _normed_difference_network, mutates_args=())
_difference_gradients_operator = torch.library.custom_op(
    'timm_gsa::difference_network_backward', _difference_gradients, mutates_args=())


@_difference_operator.register_fake
def _like_logits(
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        eps: float | None,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels, height, width = query.shape
    groups, places = weight2.shape[0], kernel_size ** 2
    if _is_for_kernels(query, weight1, weight2):
        logits = query.new_empty(batch, height, width, places, groups, dtype=weight2.dtype).permute(0, 4, 3, 1, 2)
    else:
        logits = query.new_empty(batch, groups, places, height, width)
    mean, variance = (torch.empty_like(scale, dtype=torch.float64) for _ in range(2))
    return logits, mean, variance, query.new_empty(channels + 1, channels + 1, dtype=torch.float64)


@_difference_gradients_operator.register_fake
def _like_difference_inputs(
        grad: torch.Tensor,
        query: torch.Tensor,
        padded: torch.Tensor,
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        *more: Any,
) -> tuple[torch.Tensor, ...]:
    maps = (_like_map(x, _is_for_kernels(query, weight1, weight2)) for x in (query, padded))
    return *maps, *(x.new_empty(x.shape) for x in (weight1, scale, shift, weight2, bias2))


_difference_operator.register_autograd(
    lambda ctx, grad, *_: _gradients_of_differences(_difference_gradients_operator, ctx, grad),
    setup_context=_keep_differences,
)


def _patch_hidden(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """`patch_network` on padded keys; by kernels with channels innermost in memory."""
    return _kernels(padded, weight).patch_hidden(padded, scale, shift, weight, kernel_size, dilation)


def _patch_gradients(
        grad: torch.Tensor,
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the four tensors that `_patch_hidden` takes, from that of what it gives."""
    kernels, window = _kernels(padded, weight), (kernel_size, dilation)
    grad_padded, *grads = kernels.patch_gradients(grad, padded, scale, shift, weight, *window)
    return grad_padded, *_like((scale, shift, weight), tuple(grads))


def _plain_patch_hidden(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    dtype = padded.dtype
    padded, scale, shift, weight = (x.to(_wide(padded)) for x in (padded, scale, shift, weight))
    keys = windows(padded, kernel_size, dilation).flatten(1, 3)
    keys = (keys * scale[:, None, None] + shift[:, None, None]).relu()
    return torch.einsum('mc,bchw->bmhw', weight, keys).to(dtype)


def _keep_patches(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.window = inputs[4:]


def _gradients_of_patches(backward: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # for gradients of gradients
        return differentiable_gradients(_plain_patch_hidden, ctx.saved_tensors, grad, *ctx.window)
    return *backward(grad, *ctx.saved_tensors, *ctx.window), None, None


class _PatchNetwork(torch.autograd.Function):
    """`_patch_hidden`, differentiable."""

    forward = staticmethod(_patch_hidden)
    setup_context = staticmethod(_keep_patches)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _gradients_of_patches(_patch_gradients, ctx, grads[0])


_patch_operator = torch.library.custom_op('timm_gsa::patch_network', _patch_hidden, mutates_args=())
_patch_gradients_operator = torch.library.custom_op(
    'timm_gsa::patch_network_backward', _patch_gradients, mutates_args=())


@_patch_operator.register_fake
def _like_hidden(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    margin = 2 * same_padding(kernel_size, dilation)
    height, width = padded.shape[-2:]
    hidden = padded.new_empty(padded.shape[0], weight.shape[0], height - margin, width - margin)
    return _like_map(hidden, _is_for_kernels(padded, weight))


@_patch_gradients_operator.register_fake
def _like_patch_inputs(grad: torch.Tensor, padded: torch.Tensor, *more: Any) -> tuple[torch.Tensor, ...]:
    matrices = more[:3]
    return _like_map(padded, _is_for_kernels(padded, matrices[2])), *(x.new_empty(x.shape) for x in matrices)


def _like_map(x: torch.Tensor, for_kernels: bool) -> torch.Tensor:
    """An empty map, laid out as what comes by rows, or as kernels lay out maps: with channels innermost."""
    return torch.empty_like(x, memory_format=torch.channels_last if for_kernels else torch.preserve_format)


_patch_operator.register_autograd(
    lambda ctx, grad: _gradients_of_patches(_patch_gradients_operator, ctx, grad), setup_context=_keep_patches)

"""SAN's operations on a CPU: the networks by rows of the neighbourhood, layers with channels innermost in inference."""
from collections.abc import Callable
from typing import Any

import torch

from .._backend import (
    is_compiling,
    records_gradients,
    statically_true,
    why_not_cpu,
    why_not_plain_tensors,
    wide_type,
)
from . import plain, rows
from .innermost import buffered, difference_attention, patch_attention, weighted_sum
from .layers import by_batch, conv2_bias, fixed_norms, hidden_of_patches, logits_of_differences, why_not_own_parts
from .neighbourhood import joined_reflect_pad, reflect_pad, same_padding, windows
from .networks import define_networks

__all__ = [
    'aggregation',
    'difference_network',
    'normed_difference_network',
    'pairwise_attention',
    'pairwise_weights',
    'patch_network',
    'patchwise_attention',
    'patchwise_weights',
    'why_not_aggregation',
    'why_not_layer',
    'why_not_network',
    'why_not_weights',
]

# Positions of a map from which training recomputes relations and does not keep them, and inference goes by rows.
_LARGE = 28 * 28

# Bytes of the weights of a batch; parts have half of it. The C library returns blocks of 2 ** 25 bytes to the system,
# which clears every page before it is used again, and a convolution may need a second block.
_LARGEST_BLOCK = 2 ** 24


# The sum over neighbours, in the form that a compiler turns into the fastest code.


def why_not_aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> str | None:
    if not is_compiling():
        return 'in eager mode the plain form is the fastest'
    reason = why_not_plain_tensors(value, weight)
    if reason is None and value.device.type != 'cpu':
        return 'the tensors are not on a CPU'
    if reason is None and records_gradients(value, weight):
        return 'gradients are recorded: the form would keep all shifted values'
    return reason


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    weight = weight.to(value.dtype)
    wide = wide_type(value.dtype)
    height, width = value.shape[-2:]
    padding = same_padding(kernel_size, dilation)
    square = kernel_size, kernel_size
    short, long = statically_true(width < 16), statically_true(width >= 16)
    if short or long:
        channels_last, groups_last = value.stride(1) == 1, weight.stride(1) == 1
        if short or channels_last or groups_last:
            by_row = weight.unflatten(2, square).permute(2, 0, 4, 5, 3, 1).to(wide).unbind()
            out = weighted_sum(
                value.to(wide), list(by_row if groups_last else buffered(*by_row)), kernel_size, dilation,
            ).to(value.dtype)
            return out if channels_last else out.contiguous()
    if long and padding > 0 and padding < height and padding < width:
        padded = joined_reflect_pad(plain.grouped(value.to(wide), weight.shape[1]), padding, (-2, -1))
        shifted = padded.unfold(-2, height, dilation).unfold(-2, width, dilation)
    else:
        shifted = windows(plain.grouped(reflect_pad(value, padding).to(wide), weight.shape[1]), kernel_size, dilation)
    factors = weight.unflatten(2, square)[:, None]
    return (shifted * factors).sum((-4, -3)).to(value.dtype).flatten(1, 2)


# The networks, by rows.


difference_network, normed_difference_network, patch_network = define_networks(
    '', lambda: rows, ('CPU',), torch.preserve_format, groups_innermost=False)


def why_not_network(*args: Any) -> str | None:
    """Why a network cannot go by rows."""
    return why_not_cpu(*(x for x in args if isinstance(x, torch.Tensor)))


# The weights of a layer, by rows.


def why_not_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why the weights of a layer cannot be computed by a network that keeps no relations.

    In training mode the choice is the same with and without gradients: norms over a small batch magnify rounding.
    """
    reason = _why_not(layer, query)
    if reason is not None or is_compiling():
        return reason
    trains = by_batch(layer) or records_gradients(query, *layer.parameters())
    if trains and query.shape[-2:].numel() < _LARGE:
        return 'the map is small: in training its relations fit into the cache'
    return None


def _why_not(layer: Any, query: torch.Tensor) -> str | None:
    tensors = query, *layer.parameters()
    reason = why_not_cpu(*tensors)
    if reason is None and any(x.dtype != query.dtype for x in tensors):
        return 'the tensors have several dtypes'
    return reason or why_not_own_parts(layer)


def pairwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Weights of `PairwiseAttention`."""
    return _pairwise_weights(layer, query, key, layer.mapped_position(query))


def _pairwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    logits = logits_of_differences(
        layer, query, key, position, plain.difference_moments, difference_network, normed_difference_network)
    if is_compiling() or by_batch(layer) or records_gradients(logits):
        return logits.softmax(2)
    # In place and image by image: a second block of that size takes longer.
    for image in logits:
        image.sub_(image.amax(1, keepdim=True)).exp_()
        image.div_(image.sum(1, keepdim=True))
    return logits


def patchwise_weights(layer: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Weights of `PatchwiseAttention`."""
    hidden = hidden_of_patches(layer, query, key, plain.patch_moments, patch_network)
    return layer.conv2(layer.act2(layer.norm2(hidden))).unflatten(1, (-1, layer.kernel_size ** 2))


# Layers from query, key and value to the sum, in inference.


def why_not_layer(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    if records_gradients(query, *layer.parameters()):
        return 'gradients are recorded'
    reason = _why_not(layer, query)
    if reason is None and len(fixed_norms(layer)) != 2:
        return 'norm1 and norm2 are no fixed affine maps: they use the statistics of the batch'
    return reason


def pairwise_attention(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`PairwiseAttention` with channels innermost; by rows and in parts of the batch in eager mode on large maps."""
    position = layer.mapped_position(query)
    if _goes_by_rows(query):
        return _in_parts(layer, lambda q, k: _pairwise_weights(layer, q, k, position), query, key, value)
    (scale1, shift1), (scale2, shift2) = fixed_norms(layer)
    scale, scale_position = scale1[:, None, None].split([layer.dim_key, 2])
    shift, shift_position = shift1[:, None, None].split([layer.dim_key, 2])
    out = difference_attention(
        query * scale + shift,
        key * scale,
        value,
        position * scale_position + shift_position,
        position * scale_position,
        layer.conv1.weight[:, :, 0, 0] * scale2[:, None],
        shift2,
        layer.conv2.weight[:, :, 0, 0],
        layer.kernel_size,
        layer.dilation,
    )
    return _laid_out_as(value, out)


def patchwise_attention(layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`PatchwiseAttention` with channels innermost; by rows and in parts of the batch in eager mode on large maps."""
    if _goes_by_rows(query):
        return _in_parts(layer, lambda q, k: patchwise_weights(layer, q, k), query, key, value)
    (scale1, shift1), (scale2, shift2) = fixed_norms(layer)
    out = patch_attention(
        query,
        key,
        value,
        scale1,
        shift1,
        layer.conv1.weight[:, :, 0, 0] * scale2[:, None],
        shift2,
        layer.conv2.weight[:, :, 0, 0],
        conv2_bias(layer),
        layer.kernel_size,
        layer.dilation,
    )
    return _laid_out_as(value, out)


def _goes_by_rows(query: torch.Tensor) -> bool:
    return not is_compiling() and query.shape[-2:].numel() >= _LARGE


def _laid_out_as(value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out if is_compiling() or value.stride(1) == 1 else out.contiguous()


def _in_parts(layer: Any, weights: Callable[..., torch.Tensor], *maps: torch.Tensor) -> torch.Tensor:
    """Sum over neighbours in parts of the batch whose weights are no large block of memory."""
    query, window = maps[0], (layer.kernel_size, layer.dilation)
    size = layer.num_groups * layer.kernel_size ** 2 * query.shape[-2:].numel() * query.element_size()
    images = len(query) if len(query) * size <= _LARGEST_BLOCK else max(1, _LARGEST_BLOCK // 2 // size)
    outs = []
    for query, key, value in zip(*(x.split(images) for x in maps), strict=True):
        outs.append(plain.aggregation(value, weights(query, key), *window))
    return outs[0] if len(outs) == 1 else torch.cat(outs)

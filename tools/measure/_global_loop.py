"""Neighbourhood aggregation on a GPU in the form of the paper's own kernels, for comparison in the benchmark.

One thread computes one element and reads its inputs from global memory in a loop: an output loops over the taps, a
gradient of the padded value over the taps that read it, a gradient of the weight over the channels that share it. The
gradient of the padding is then added to the border. Contiguous float32 maps, no dilation.
"""
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ['aggregation']

BLOCK = 256


@triton.jit
def _reflected(index, size):
    return size - 1 - tl.abs(size - 1 - tl.abs(index))


@triton.jit
def _forward(out, value, weight, count, channels, groups, height, width, K: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    x, y, plane = i % width, i // width % height, i // (width * height)
    image, group = plane // channels, plane % channels % groups
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(K * K):
        row = _reflected(y + tap // K - K // 2, height)
        column = _reflected(x + tap % K - K // 2, width)
        v = tl.load(value + (plane * height + row) * width + column, mask=valid)
        w = tl.load(weight + (((image * groups + group) * K * K + tap) * height + y) * width + x, mask=valid)
        total += v * w
    tl.store(out + i, total, mask=valid)


@triton.jit
def _value_grad(out, grad, weight, count, channels, groups, height, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of the padded value."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    wide, high = width + K // 2 * 2, height + K // 2 * 2
    x, y, plane = i % wide, i // wide % high, i // (wide * high)
    image, group = plane // channels, plane % channels % groups
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(K * K):
        row, column = y - tap // K, x - tap % K
        inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        g = tl.load(grad + (plane * height + row) * width + column, mask=inside, other=0.)
        at = (((image * groups + group) * K * K + tap) * height + row) * width + column
        total += g * tl.load(weight + at, mask=inside, other=0.)
    tl.store(out + i, total, mask=valid)


@triton.jit
def _weight_grad(out, grad, value, count, channels, groups, height, width, K: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    x, y, tap = i % width, i // width % height, i // (width * height) % (K * K)
    group, image = i // (width * height * K * K) % groups, i // (width * height * K * K) // groups
    row = _reflected(y + tap // K - K // 2, height)
    column = _reflected(x + tap % K - K // 2, width)
    total = tl.zeros([BLOCK], tl.float32)
    for channel in range(channels // groups):
        plane = (image * channels + channel * groups + group) * height
        g = tl.load(grad + (plane + y) * width + x, mask=valid)
        total += g * tl.load(value + (plane + row) * width + column, mask=valid)
    tl.store(out + i, total, mask=valid)


def _launched(
        kernel: Any,
        out: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        value: torch.Tensor,
        groups: int,
        kernel_size: int,
) -> torch.Tensor:
    sizes = value.shape[1], groups, value.shape[2], value.shape[3]
    kernel[(triton.cdiv(out.numel(), BLOCK),)](out, a, b, out.numel(), *sizes, K=kernel_size, BLOCK=BLOCK)
    return out


class _Aggregation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor, kernel_size: int) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        ctx.kernel_size = kernel_size
        return _launched(_forward, torch.empty_like(value), value, weight, value, weight.shape[1], kernel_size)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        value, weight = ctx.saved_tensors
        grad, pad, more = grads[0].contiguous(), ctx.kernel_size // 2, (value, weight.shape[1], ctx.kernel_size)
        shape = *value.shape[:2], value.shape[2] + 2 * pad, value.shape[3] + 2 * pad
        padded = _launched(_value_grad, value.new_empty(shape), grad, weight, *more)
        for axis in (2, 3):
            size = value.shape[axis]
            padded.narrow(axis, pad + 1, pad).add_(padded.narrow(axis, 0, pad).flip(axis))
            padded.narrow(axis, size - 1, pad).add_(padded.narrow(axis, pad + size, pad).flip(axis))
        grad_value = padded[..., pad:pad + value.shape[2], pad:pad + value.shape[3]].contiguous()
        return grad_value, _launched(_weight_grad, torch.empty_like(weight), grad, value, *more), None


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """`timm_gsa.ops.aggregation` without dilation, computed in contiguous float32."""
    if dilation != 1:
        raise ValueError(f'dilation must be 1, got {dilation}')
    return _Aggregation.apply(value.float().contiguous(), weight.float().contiguous(), kernel_size).to(value.dtype)

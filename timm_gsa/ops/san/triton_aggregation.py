"""Neighbourhood aggregation on a GPU: three Triton kernels, which are one another's gradients.

    forward                    out[c, p]   = sum over k of w[c mod G, k, p] * x[c, reflect(p + k)]
    value_grad                 dx[c, q]    = sum over k and p with reflect(p + k) = q of w[c mod G, k, p] * g[c, p]
    weight_grad                dw[j, k, p] = sum over c with c mod G = j of g[c, p] * x[c, reflect(p + k)]

Each is linear in both of its inputs, so derivatives of any order are these again. `timm_gsa.ops.aggregation` is the
function to call and says what is computed. Importing this module imports Triton.

Bytes. SAN shares a weight among 8 channels: of the 8 + K * K + 8 numbers per pixel and group that must be moved, at
K = 7 the weights are 49. At 56 x 56, C = 64, bfloat16 and 256 images:

    forward                    x 0.10 + w 0.63 + out 0.10 GB = 0.83 GB, 0.19 ms at 4.3 TB/s
    value_grad                 g 0.10 + w 0.63 + dx 0.10 GB, the same
    weight_grad                g 0.10 + x 0.10 + dw 0.63 GB, the same

Nothing else touches the memory: no padded copy, no unfolded one, no partial sums. Both gradients in one kernel would
move 1.56 GB instead of 1.66, and neither could be left out.

Tiles. A weight brings 8 multiply-adds, so an H200 that reads 4.3 TB/s has time for 2.2 instructions to each, loads,
conversions and addresses included. Therefore a thread keeps T neighbouring pixels of a row, which share the values they
load, and R channels, which share the weights. Where channels are innermost in memory a thread takes 16 bytes of them at
once, E groups side by side and L lanes of channels that share weights; elsewhere the lanes go along the row. Compiled
for sm_90 (bfloat16, channels innermost, K = 7) the loops hold 2.2 to 2.4 instructions per multiply-add in the forward
pass, 2.1 in the gradient of the weight and 2.9 to 3.0 in that of the value, which looks for mirrored pixels everywhere.
The order of each sum does not depend on the tile.

Weights should come with the groups innermost, or the pixels, but not the places: 16 bytes at a time need neighbours
that are summed alike.
"""
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._kernels import grid_of, layout_of

__all__ = ['forward', 'value_grad', 'weight_grad']

_MOST_SHARING = 16  # channels sharing a weight that a thread block serves; more of them read the weights again

# Sizes and strides; the few that alignment depends on reach a kernel as constants (UNIT, V).
_NUMBERS = (
    'batch', 'height', 'width', 'groups', 'sharing', 'scale',
    'a_b', 'a_s', 'a_g', 'a_h', 'a_w', 'b_b', 'b_s', 'b_g', 'b_h', 'b_w', 'w_b', 'w_k', 'w_g', 'w_h', 'w_w',
)


@triton.jit
def _reflected(index, size):
    # Once at either end. Pixels that a strip has beyond the map may reach further, and are not stored.
    return tl.maximum(size - 1 - tl.abs(size - 1 - tl.abs(index)), 0)


@triton.jit
def _program(batch, height, width, T: tl.constexpr, N: tl.constexpr, OFFSET: tl.constexpr):
    """Row that a program serves, block of strips at that row in all images, and share of the channels."""
    blocks = tl.cdiv(batch.to(OFFSET) * tl.cdiv(width, T), N)
    program = tl.program_id(0).to(OFFSET)
    return program % height, program // height % blocks, program // height // blocks


@triton.jit
def _strips(block, batch, width, T: tl.constexpr, N: tl.constexpr, OFFSET: tl.constexpr):
    """The N strips of T pixels of a block: their images and first columns, (N, 1, 1), and which exist."""
    strip = block * N + tl.arange(0, N)[:, None, None]
    across = tl.cdiv(width, T)
    exists = strip < batch.to(OFFSET) * across
    strip = tl.minimum(strip, batch.to(OFFSET) * across - 1)
    return (strip // across).to(tl.int64), strip % across * T, exists


@triton.jit
def _channels(share, groups, R: tl.constexpr, L: tl.constexpr, E: tl.constexpr):
    """Groups (1, L, E) of a share, and the R channels of each thread among those that share their weights."""
    blocks = groups // E
    g = tl.broadcast_to((share % blocks * E + tl.arange(0, E))[None, None, :], [1, L, E])
    first = share // blocks * (R * L) + tl.arange(0, L)[None, :, None]
    channels = ()
    for r in tl.static_range(R):
        channels = channels + (first + r * L,)
    return g, channels


@triton.jit
def _planes(
        base, image, s, g, stride_b, stride_s, stride_g,
        UNIT: tl.constexpr, V: tl.constexpr, OFFSET: tl.constexpr,
):
    """Pointers (N, L, E) to the first pixel of each channel, or weight, of each strip's image."""
    if UNIT:
        at = s.to(OFFSET) * stride_s * V + g.to(OFFSET)
    else:
        at = (s.to(OFFSET) * stride_s + g.to(OFFSET) * stride_g) * V
    return base + image * stride_b * V + at


@triton.jit
def _load(pointer, ACC: tl.constexpr, mask=None, other: tl.constexpr = None):
    x = tl.load(pointer, mask=mask, other=other)
    if x.dtype == tl.bfloat16:  # one instruction a number, where the conversion takes two for every other one
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(ACC)


@triton.jit
def _store(
        a, sums, image, y, x, exists, width, s, g, sharing, a_b, a_s, a_g, a_h, a_w,
        UNIT: tl.constexpr, V: tl.constexpr, OFFSET: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
):
    for r in tl.static_range(R):
        plane = _planes(a, image, s[r], g, a_b, a_s, a_g, UNIT, V, OFFSET)
        for t in tl.static_range(T):
            at = (y * a_h + (x + t) * a_w) * V
            keep = exists & (x + t < width) & (s[r] < sharing)
            tl.store(plane + at, sums[t][r].to(a.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
        a, b, w, batch, height, width, groups, sharing, scale,
        a_b, a_s, a_g, a_h, a_w, b_b, b_s, b_g, b_h, b_w, w_b, w_g, w_k, w_h, w_w,
        A_UNIT: tl.constexpr, A_V: tl.constexpr, B_UNIT: tl.constexpr, B_V: tl.constexpr,
        W_UNIT: tl.constexpr, W_V: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
        T: tl.constexpr, N: tl.constexpr, E: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):
    """a: output. b: value. w: weight."""
    PAD: tl.constexpr = K // 2 * D
    y, block, share = _program(batch, height, width, T, N, OFFSET)
    image, x, exists = _strips(block, batch, width, T, N, OFFSET)
    g, s = _channels(share, groups, R, L, E)

    values = ()
    for r in tl.static_range(R):
        channel = tl.minimum(s[r], sharing - 1)
        values = values + (_planes(b, image, channel, g, b_b, b_s, b_g, B_UNIT, B_V, OFFSET),)
    weights = _planes(w, image, g * 0, g, w_b, 0, w_g, W_UNIT, W_V, OFFSET) + y * w_h * W_V
    place = w_k.to(OFFSET) * W_V

    columns = ()
    for j in tl.static_range(T + 2 * PAD):
        columns = columns + (_reflected(x + (j - PAD), width) * b_w * B_V,)
    w_columns = ()
    for t in tl.static_range(T):
        w_columns = w_columns + (tl.minimum(x + t, width - 1) * w_w * W_V,)

    sums = ((tl.zeros([N, L, E], ACC),) * R,) * T
    for ky in range(K):
        row = _reflected(y + (ky * D - PAD), height) * b_h * B_V
        for j in tl.static_range(T + 2 * PAD):
            v = ()
            for r in tl.static_range(R):
                v = v + (_load(values[r] + (row + columns[j]), ACC),)
            new = ()
            for t in tl.static_range(T):
                if j >= t and j <= t + 2 * PAD and (j - t) % D == 0:
                    factor = _load(weights + (w_columns[t] + (ky * K + (j - t) // D) * place), ACC)
                    sums_t = ()
                    for r in tl.static_range(R):
                        sums_t = sums_t + (tl.fma(factor, v[r], sums[t][r]),)
                    new = new + (sums_t,)
                else:
                    new = new + (sums[t],)
            sums = new
    _store(a, sums, image, y, x, exists, width, s, g, sharing, a_b, a_s, a_g, a_h, a_w, A_UNIT, A_V, OFFSET, T, R)


@triton.jit
def _with_mirrored(
        factor, weights, first, step, x, width,
        t: tl.constexpr, j: tl.constexpr, REST: tl.constexpr,
        T: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):
    """Adds the weights by which pixel x + j - PAD saw pixel x + t mirrored at the left and at the right."""
    C: tl.constexpr = K // 2
    PAD: tl.constexpr = C * D
    # Where x = n they are q = n + t and p = n + j - PAD pixels from the left border, and the place is -(q + p).
    for n in tl.static_range(0, PAD + 1, T):
        if n + t > 0 and n + j >= PAD and 2 * n + t + j <= 2 * PAD and (2 * n + t + j - PAD) % D == 0:
            at = (first + C - (2 * n + t + j - PAD) // D) * step
            factor += _load(weights + at, ACC, x == n, 0.)
    # Where x is n before the last column, they are q = n - t and p = n - j + PAD from it, and the place is q + p.
    for n in tl.static_range(REST - 1, PAD + T, T):
        if n > t and n + PAD >= j and 2 * n <= t + j and (2 * n - t - j + PAD) % D == 0:
            at = (first + C + (2 * n - t - j + PAD) // D) * step
            factor += _load(weights + at, ACC, x == width - 1 - n, 0.)
    return factor


@triton.jit(do_not_specialize=_NUMBERS)
def _value_grad(
        a, b, w, batch, height, width, groups, sharing, scale,
        a_b, a_s, a_g, a_h, a_w, b_b, b_s, b_g, b_h, b_w, w_b, w_g, w_k, w_h, w_w,
        A_UNIT: tl.constexpr, A_V: tl.constexpr, B_UNIT: tl.constexpr, B_V: tl.constexpr,
        W_UNIT: tl.constexpr, W_V: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr, REST: tl.constexpr,
        T: tl.constexpr, N: tl.constexpr, E: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):
    """a: gradient of the value. b: gradient of the output. w: weight.

    Each pixel q gathers from the pixels p that saw it, as it is or mirrored. Where that happens along a row is known
    when the kernel is compiled: the last strip of a row holds REST pixels.
    """
    C: tl.constexpr = K // 2
    PAD: tl.constexpr = C * D
    y, block, share = _program(batch, height, width, T, N, OFFSET)
    image, x, exists = _strips(block, batch, width, T, N, OFFSET)
    g, s = _channels(share, groups, R, L, E)

    grads = ()
    for r in tl.static_range(R):
        channel = tl.minimum(s[r], sharing - 1)
        grads = grads + (_planes(b, image, channel, g, b_b, b_s, b_g, B_UNIT, B_V, OFFSET),)
    weights = _planes(w, image, g * 0, g, w_b, 0, w_g, W_UNIT, W_V, OFFSET)
    place = w_k.to(OFFSET) * W_V

    sums = ((tl.zeros([N, L, E], ACC),) * R,) * T
    for mirror in range(3):
        # The row itself, then its images above and below the map, which exist near a border only.
        seen_y = tl.where(mirror == 0, y, tl.where(mirror == 1, -y, 2 * (height - 1) - y))
        above = (mirror == 1) & (y > 0) & (y <= PAD)
        below = (mirror == 2) & (y < height - 1) & (y >= height - 1 - PAD)
        start = tl.maximum((seen_y + PAD - (height - 1) + D - 1) // D, 0)
        stop = tl.minimum((seen_y + PAD) // D, K - 1) + 1
        for ky in range(start, tl.where((mirror == 0) | above | below, stop, 0)):
            row = seen_y + PAD - ky * D
            for j in tl.static_range(T + 2 * PAD):
                column = x + (j - PAD)
                inside = (column >= 0) & (column < width)
                v = ()
                for r in tl.static_range(R):
                    v = v + (_load(grads[r] + (row * b_h + column * b_w) * B_V, ACC, inside, 0.),)
                here = weights + (row * w_h + column * w_w) * W_V
                new = ()
                for t in tl.static_range(T):
                    if j >= t and j <= t + 2 * PAD:
                        factor = tl.zeros([N, L, E], ACC)
                        if (j - t) % D == 0:
                            factor = _load(here + (ky * K + C + (t + PAD - j) // D) * place, ACC, inside, 0.)
                        factor = _with_mirrored(
                            factor, here, ky * K, place, x, width, t, j, REST, T, K, D, ACC,
                        )
                        sums_t = ()
                        for r in tl.static_range(R):
                            sums_t = sums_t + (tl.fma(factor, v[r], sums[t][r]),)
                        new = new + (sums_t,)
                    else:
                        new = new + (sums[t],)
                sums = new
    _store(a, sums, image, y, x, exists, width, s, g, sharing, a_b, a_s, a_g, a_h, a_w, A_UNIT, A_V, OFFSET, T, R)


@triton.jit(do_not_specialize=_NUMBERS)
def _weight_grad(
        a, b, w, batch, height, width, groups, sharing, scale,
        a_b, a_s, a_g, a_h, a_w, b_b, b_s, b_g, b_h, b_w, w_b, w_g, w_k, w_h, w_w,
        A_UNIT: tl.constexpr, A_V: tl.constexpr, B_UNIT: tl.constexpr, B_V: tl.constexpr,
        W_UNIT: tl.constexpr, W_V: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
        T: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):
    """a: gradient of the output. b: value. w: gradient of the weight."""
    PAD: tl.constexpr = K // 2 * D
    y, block, share = _program(batch, height, width, T, N, OFFSET)
    image, x, exists = _strips(block, batch, width, T, N, OFFSET)
    g = (share * E + tl.arange(0, E))[None, None, :]

    grads = _planes(a, image, g * 0, g, a_b, a_s, a_g, A_UNIT, A_V, OFFSET) + y * a_h * A_V
    values = _planes(b, image, g * 0, g, b_b, b_s, b_g, B_UNIT, B_V, OFFSET)
    results = _planes(w, image, g * 0, g, w_b, 0, w_g, W_UNIT, W_V, OFFSET) + y * w_h * W_V
    place = w_k.to(OFFSET) * W_V
    a_channel = a_s.to(OFFSET) * A_V
    b_channel = b_s.to(OFFSET) * B_V

    a_columns = ()
    for t in tl.static_range(T):
        a_columns = a_columns + (tl.minimum(x + t, width - 1) * a_w * A_V,)
    columns = ()
    for j in tl.static_range(T + 2 * PAD):
        columns = columns + (_reflected(x + (j - PAD), width) * b_w * B_V,)

    for ky in range(K):
        row = _reflected(y + (ky * D - PAD), height) * b_h * B_V
        sums = ((tl.zeros([N, 1, E], ACC),) * K,) * T
        for s in range(sharing):
            d = ()
            for t in tl.static_range(T):
                d = d + (_load(grads + (a_columns[t] + s * a_channel), ACC),)
            for j in tl.static_range(T + 2 * PAD):
                v = _load(values + (row + columns[j] + s * b_channel), ACC)
                new = ()
                for t in tl.static_range(T):
                    places = ()
                    for kx in tl.static_range(K):
                        if j == t + kx * D:
                            places = places + (tl.fma(d[t], v, sums[t][kx]),)
                        else:
                            places = places + (sums[t][kx],)
                    new = new + (places,)
                sums = new
        for t in tl.static_range(T):
            keep = exists & (x + t < width)
            for kx in tl.static_range(K):
                result = sums[t][kx]
                if w.dtype.element_ty.primitive_bitwidth == 16:  # no conversion leads there from float64
                    result = result.to(tl.float32)
                at = (x + t) * w_w * W_V + (ky * K + kx) * place
                tl.store(results + at, result.to(w.dtype.element_ty), mask=keep)


def _tiles(kernel: Any, last: bool, groups: int, sharing: int, width: int, itemsize: int) -> list[dict[str, int]]:
    """What to choose from, where channels are innermost in memory (`last`) or not."""
    e = math.gcd(groups, 16) if last else 1
    threads = 128 * min(e, 16 // itemsize) // e  # for one group each, of four warps
    if kernel is _weight_grad:
        return [{'T': t, 'N': threads, 'E': e} for t in ((2, 1) if last else (4, 2))]
    share = min(sharing, _MOST_SHARING)
    if last:
        sizes = ((4, 2), (2, 4)) if e > 2 else ((2, 1), (2, 4))
    else:
        sizes = ((4, share), (2, share))
    tiles = []
    for t, r in sizes:
        lanes = triton.next_power_of_2(triton.cdiv(share, r))
        tile = {'T': t, 'N': max(threads // lanes, 1), 'E': e, 'R': triton.cdiv(share, lanes), 'L': lanes}
        tiles.append(tile | ({'REST': (width - 1) % t + 1} if kernel is _value_grad else {}))
    return tiles


@functools.lru_cache(maxsize=64)
def _tuned(kernel: Any, *kind: Any) -> Any:
    """The kernel with the fastest of its tiles. They are measured once for each power of two of a map's pixels."""
    configs = [triton.Config(tile, num_warps=4) for tile in _tiles(kernel, *kind)]
    return triton.autotune(configs, key=['scale', 'K', 'D', 'A_UNIT', 'W_UNIT'])(kernel)


class _Map(NamedTuple):
    """How a map (batch, sharing, group, height, width) or a weight (batch, group, place, height, width) lies in memory.

    steps: Strides in steps of `factor` numbers.
    unit: True if the stride of the groups is 1 instead.
    factor: As of `layout_of`.
    span: Numbers that an image spans.
    """

    steps: list[int]
    unit: bool
    factor: int
    span: int


def _map(x: torch.Tensor, groups: int, last: bool) -> _Map:
    axis = 1
    if x.dim() == 4:
        x = x.unflatten(1, (x.shape[1] // groups, groups))
        axis = 2
    unit = last and groups > 1 and x.stride(axis) == 1
    layout = layout_of(x, (axis,) if unit else ())
    return _Map(layout.steps, unit, layout.factor, layout.span)


def _launch(kernel: Any, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, kernel_size: int, dilation: int) -> None:
    batch, channels, height, width = b.shape
    if b.numel() == 0:
        return
    groups, last = w.shape[1], b.stride(1) == 1
    sharing = channels // groups
    maps = dict(A=_map(a, groups, last), B=_map(b, groups, last), W=_map(w, groups, last))
    constants: dict[str, Any] = dict(K=kernel_size, D=dilation)
    constants['ACC'] = tl.float64 if b.dtype == torch.float64 else tl.float32
    for name, layout in maps.items():
        constants |= {f'{name}_UNIT': layout.unit, f'{name}_V': layout.factor}
    span = max(batch * height * width, *(layout.span for layout in maps.values()))
    constants['OFFSET'] = tl.int32 if span < 2 ** 30 else tl.int64
    numbers = [batch, height, width, groups, sharing, (height * width).bit_length()]
    numbers += [step for layout in maps.values() for step in layout.steps]

    def grid(tile: dict[str, int]) -> tuple[int]:
        blocks = height * triton.cdiv(batch * triton.cdiv(width, tile['T']), tile['N'])
        shares = 1 if kernel is _weight_grad else triton.cdiv(sharing, tile['R'] * tile['L'])
        return grid_of(blocks * (groups // tile['E']) * shares)

    # Of the width only what the last strip of a row holds matters, and strips are of at most 4 pixels.
    kind = kernel, last, groups, sharing, (width - 1) % 4 + 1 if kernel is _value_grad else 0, b.element_size()
    with torch.cuda.device_of(b):
        if isinstance(kernel, triton.JITFunction):
            # Multiply-adds are written out; Triton 3.9 warns whoever does not choose.
            _tuned(*kind)[grid](a, b, w, *numbers, **constants, enable_fp_fusion=True)
        else:  # Triton's interpreter, which has no time to measure
            kernel[grid](a, b, w, *numbers, **constants, **_tiles(*kind)[0])


def forward(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """The sum over neighbours."""
    out = torch.empty_like(value)
    _launch(_forward, out, value, weight, kernel_size, dilation)
    return out


def value_grad(grad: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Gradient of the values from that of the output."""
    out = torch.empty_like(grad)
    _launch(_value_grad, out, grad, weight, kernel_size, dilation)
    return out


def weight_grad(
        grad: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """Gradient of the weights from that of the output, written into `out`."""
    _launch(_weight_grad, grad, value, out, kernel_size, dilation)
    return out

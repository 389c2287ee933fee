"""GSA's operations on a GPU: Triton kernels for the axial steps and the content branch, and for their gradients.

    attend              out[x]    = sum over i of (query[x] . table[i - x + L - 1]) * value[i]   along one axis of a map
    attend_backward     its gradients to query, value and table
    content             out[n]    = sum over k of query[k, n] * context[k], context = softmax(key) value^T
    content_backward    its gradients to query, key and value
    gather              content and the row step, summed
    gather_backward     its gradients
    fused               `gather` after the column step and an affine map, for inference

gpu.py registers them as operators; the functions of `timm_gsa.ops` say what is computed. Importing this module imports
Triton.

Bytes. Every kernel reads each of its maps once and writes each result once; logits, of which a map has L times as many
as positions, never leave the chip. A layer in inference moves 12 maps: its input and the projection (4), key and value
for the context (2), query, value and the result of the column step (3), query, that result and the output of the row
step, which adds the content (3).

Axial steps. A program takes one line of a map and head at a time. The products of its queries with all embeddings of
offsets are a matrix (x, offset); the logits (x, i) are picked from it, offset i - x + L - 1 in row x, and go as one
matrix into the product with the values. Lines longer than a block go block by block. The gradient of the table is
summed in each program and then over programs, so that no order of sums depends on timing.

Content. A context is a d x d matrix for each head. Heads narrower than 16 channels share a block of 16, as tensor cores
multiply no fewer; what belongs to two heads is masked.
"""
import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._backend import allows_tf32

__all__ = ['attend', 'attend_backward', 'content', 'content_backward', 'fused', 'gather', 'gather_backward']

_BLOCK = 32  # positions of a line at a time, at most
_TILE = 64  # the same where heads are narrow
_EACH = 4  # lines of a program in a forward pass
_PROGRAMS = 1024  # that share the lines of a batch in a backward pass


@triton.jit
def _line(line, heads, across, b_stride, n_stride, w_stride, UNIT: tl.constexpr, DEPTH: tl.constexpr):
    """Offset of the first number of a line, where lines are numbered by image, position across, and head."""
    n = line % heads
    at = (line // (heads * across)).to(tl.int64) * b_stride + line // heads % across * w_stride
    return at + n * (DEPTH if UNIT else n_stride)


@triton.jit
def _channels(D: tl.constexpr, d_stride, UNIT: tl.constexpr):
    c = tl.arange(0, D)
    return c if UNIT else c * d_stride


@triton.jit
def _rows(base, first, length, stride, channels, DEPTH: tl.constexpr, B: tl.constexpr, D: tl.constexpr):
    """Pointers (B, D) to the positions of a line from `first` on, and which of them exist."""
    x = first + tl.arange(0, B)
    there = (x < length)[:, None] & (tl.arange(0, D) < DEPTH)[None, :]
    return base + (x[:, None] * stride + channels[None, :]), there


@triton.jit
def _embeddings(table, first, length, DEPTH: tl.constexpr, B: tl.constexpr, D: tl.constexpr):
    """The 2B embeddings (2B, D) that a block of positions and one of neighbours can meet, the first of offset row
    `first`; 0 where there is none."""
    row = first + tl.arange(0, 2 * B)[:, None]
    c = tl.arange(0, D)[None, :]
    return tl.load(table + row * DEPTH + c, mask=(row >= 0) & (row < 2 * length - 1) & (c < DEPTH), other=0.)


@triton.jit
def _logits(q, r, B: tl.constexpr, PRECISION: tl.constexpr):
    """(B, B) from queries (B, D) and embeddings (2B, D), of which row i - x + B - 1 is that of x and i."""
    products = tl.dot(q, tl.trans(r), input_precision=PRECISION).to(q.dtype)
    offset = tl.arange(0, B)[None, :] - tl.arange(0, B)[:, None] + B - 1
    return tl.gather(products, offset, 1)


@triton.jit
def _attend(
        q, v, table, context, scale, shift, out, lines, each, heads, across, length,
        q_b, q_n, q_d, q_l, q_w, v_b, v_n, v_d, v_l, v_w, o_b, o_n, o_d, o_l, o_w,
        Q_UNIT: tl.constexpr, V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
        DEPTH: tl.constexpr, D: tl.constexpr, VDEPTH: tl.constexpr, E: tl.constexpr,
        B: tl.constexpr, BLOCKS: tl.constexpr,
        CONTENT: tl.constexpr, AFFINE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of `each` lines."""
    first = tl.program_id(0) * each
    q_channels, v_channels, o_channels = _channels(D, q_d, Q_UNIT), _channels(E, v_d, V_UNIT), _channels(E, o_d, O_UNIT)
    e = tl.arange(0, E)
    for line in range(first, tl.minimum(first + each, lines)):
        n = line % heads
        queries = q + _line(line, heads, across, q_b, q_n, q_w, Q_UNIT, DEPTH)
        values = v + _line(line, heads, across, v_b, v_n, v_w, V_UNIT, VDEPTH)
        results = out + _line(line, heads, across, o_b, o_n, o_w, O_UNIT, VDEPTH)
        for x_block in range(BLOCKS):
            x = x_block * B
            pointers, there = _rows(queries, x, length, q_l, q_channels, DEPTH, B, D)
            asked = tl.load(pointers, mask=there, other=0.)
            total = tl.zeros([B, E], tl.float32)
            for i_block in range(BLOCKS):
                i = i_block * B
                r = _embeddings(table, i - x - B + length, length, DEPTH, B, D)
                from_, here = _rows(values, i, length, v_l, v_channels, VDEPTH, B, E)
                known = tl.load(from_, mask=here, other=0.)
                total = tl.dot(_logits(asked, r, B, PRECISION), known, total, input_precision=PRECISION)
            if CONTENT:
                image = (line // (heads * across)).to(tl.int64)
                d = tl.arange(0, D)[:, None]
                at = (image * heads + n) * (DEPTH * VDEPTH) + d * VDEPTH + e[None, :]
                summed = tl.load(context + at, mask=(d < DEPTH) & (e < VDEPTH)[None, :], other=0.)
                total = tl.dot(asked, summed.to(asked.dtype), total, input_precision=PRECISION)
            if AFFINE:
                factor = tl.load(scale + n * VDEPTH + e, mask=e < VDEPTH, other=0.).to(tl.float32)
                summand = tl.load(shift + n * VDEPTH + e, mask=e < VDEPTH, other=0.).to(tl.float32)
                total = total * factor[None, :] + summand[None, :]
            pointers, there = _rows(results, x, length, o_l, o_channels, VDEPTH, B, E)
            tl.store(pointers, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _attend_backward(
        q, v, g, table, dq, dv, partial, lines, each, heads, across, length,
        q_b, q_n, q_d, q_l, q_w, v_b, v_n, v_d, v_l, v_w, g_b, g_n, g_d, g_l, g_w,
        dq_b, dq_n, dq_d, dq_l, dq_w, dv_b, dv_n, dv_d, dv_l, dv_w,
        Q_UNIT: tl.constexpr, V_UNIT: tl.constexpr, G_UNIT: tl.constexpr,
        DQ_UNIT: tl.constexpr, DV_UNIT: tl.constexpr,
        DEPTH: tl.constexpr, D: tl.constexpr, VDEPTH: tl.constexpr, E: tl.constexpr,
        B: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of `each` lines. Sums over blocks gather in memory where a line has several, and nobody else writes there."""
    program = tl.program_id(0)
    q_channels, v_channels, g_channels = _channels(D, q_d, Q_UNIT), _channels(E, v_d, V_UNIT), _channels(E, g_d, G_UNIT)
    dq_channels, dv_channels = _channels(D, dq_d, DQ_UNIT), _channels(E, dv_d, DV_UNIT)
    neighbour = tl.arange(0, 2 * B)[None, :] + tl.arange(0, B)[:, None] - (B - 1)  # i of x and offset
    met = (neighbour >= 0) & (neighbour < B)
    neighbour = tl.minimum(tl.maximum(neighbour, 0), B - 1)
    slot = tl.arange(0, 2 * B)[:, None] * D + tl.arange(0, D)[None, :]
    sums = partial + program.to(tl.int64) * (2 * BLOCKS - 1) * (2 * B * D) + slot
    found = tl.zeros([2 * B, D], tl.float32)
    for line in range(program * each, tl.minimum(program * each + each, lines)):
        queries = q + _line(line, heads, across, q_b, q_n, q_w, Q_UNIT, DEPTH)
        values = v + _line(line, heads, across, v_b, v_n, v_w, V_UNIT, VDEPTH)
        grads = g + _line(line, heads, across, g_b, g_n, g_w, G_UNIT, VDEPTH)
        query_grads = dq + _line(line, heads, across, dq_b, dq_n, dq_w, DQ_UNIT, DEPTH)
        value_grads = dv + _line(line, heads, across, dv_b, dv_n, dv_w, DV_UNIT, VDEPTH)
        for x in range(BLOCKS):
            pointers, there = _rows(queries, x * B, length, q_l, q_channels, DEPTH, B, D)
            asked = tl.load(pointers, mask=there, other=0.)
            pointers, there = _rows(grads, x * B, length, g_l, g_channels, VDEPTH, B, E)
            grad = tl.load(pointers, mask=there, other=0.).to(asked.dtype)
            asked_grad = tl.zeros([B, D], tl.float32)
            for i in range(BLOCKS):
                r = _embeddings(table, (i - x - 1) * B + length, length, DEPTH, B, D)
                from_, here = _rows(values, i * B, length, v_l, v_channels, VDEPTH, B, E)
                known = tl.load(from_, mask=here, other=0.)
                known_grad = tl.dot(tl.trans(_logits(asked, r, B, PRECISION)), grad, input_precision=PRECISION)
                logits_grad = tl.dot(grad, tl.trans(known), input_precision=PRECISION).to(asked.dtype)
                products_grad = tl.where(met, tl.gather(logits_grad, neighbour, 1), 0.).to(asked.dtype)
                asked_grad = tl.dot(products_grad, r, asked_grad, input_precision=PRECISION)
                to, here = _rows(value_grads, i * B, length, dv_l, dv_channels, VDEPTH, B, E)
                if BLOCKS == 1:
                    found = tl.dot(tl.trans(products_grad), asked, found, input_precision=PRECISION)
                    tl.store(to, known_grad.to(dv.dtype.element_ty), mask=here)
                else:
                    more = tl.dot(tl.trans(products_grad), asked, input_precision=PRECISION)
                    kept = sums + (i - x + BLOCKS - 1) * (2 * B * D)
                    tl.store(kept, tl.load(kept) + more)
                    tl.store(to, tl.load(to, mask=here, other=0.) + known_grad, mask=here)
                    tl.debug_barrier()  # other threads may read what this one wrote
            pointers, there = _rows(query_grads, x * B, length, dq_l, dq_channels, DEPTH, B, D)
            tl.store(pointers, asked_grad.to(dq.dtype.element_ty), mask=there)
    if BLOCKS == 1:
        tl.store(sums, found)


@triton.jit
def _unfold(table, out, length, DEPTH: tl.constexpr, PADDED: tl.constexpr, W: tl.constexpr):
    """One row of the embeddings of all pairs, [d, x, i], 0 up to whole blocks."""
    d, x = tl.program_id(0) // PADDED, tl.program_id(0) % PADDED
    i = tl.arange(0, W)
    there = (x < length) & (i < length)
    r = tl.load(table + (i - x + length - 1) * DEPTH + d, mask=there, other=0.)
    tl.store(out + tl.program_id(0) * PADDED + i, r, mask=i < PADDED)


@triton.jit
def _tile(tile, heads, across, LINES: tl.constexpr, HEADS: tl.constexpr):
    """Image, first position across and first head of a tile of LINES lines, HEADS of them at one position."""
    wide = tl.cdiv(across, LINES // HEADS)
    blocks = heads // HEADS
    image = (tile // (wide * blocks)).to(tl.int64)
    return image, tile // blocks % wide * (LINES // HEADS), tile % blocks * HEADS


@triton.jit
def _tile_rows(
        x, image, w, n, first, across, length, b_stride, n_stride, d_stride, l_stride, w_stride,
        UNIT: tl.constexpr, B: tl.constexpr, LINES: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr,
):
    """Pointers (B, LINES * E) to the channels of a tile's lines, and which of them exist."""
    at = tl.arange(0, LINES * E)
    c = at % (HEADS * E)
    if UNIT:
        base = x + image * b_stride + w * w_stride + n * E
        columns = at // (HEADS * E) * w_stride + c
    else:
        base = x + image * b_stride + w * w_stride + n * n_stride
        columns = at // (HEADS * E) * w_stride + c // E * n_stride + c % E * d_stride
    row = first + tl.arange(0, B)
    there = (row < length)[:, None] & (w + at // (HEADS * E) < across)[None, :]
    return base + (row[:, None] * l_stride + columns[None, :]), there


@triton.jit
def _tile_queries(
        q, image, w, n, d, first, across, length, b_stride, n_stride, d_stride, l_stride, w_stride,
        B: tl.constexpr, LINES: tl.constexpr, HEADS: tl.constexpr,
):
    """Pointers (B, LINES) to one channel of the queries of a tile's lines, and which of them exist."""
    line = tl.arange(0, LINES)
    base = q + image * b_stride + d * d_stride + w * w_stride + n * n_stride
    columns = line // HEADS * w_stride + line % HEADS * n_stride
    row = first + tl.arange(0, B)
    there = (row < length)[:, None] & (w + line // HEADS < across)[None, :]
    return base + (row[:, None] * l_stride + columns[None, :]), there


@triton.jit
def _attend_narrow(
        q, v, embedding, context, scale, shift, out, heads, across, length,
        q_b, q_n, q_d, q_l, q_w, v_b, v_n, v_d, v_l, v_w, o_b, o_n, o_d, o_l, o_w,
        V_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
        DEPTH: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr,
        LINES: tl.constexpr, HEADS: tl.constexpr,
        CONTENT: tl.constexpr, AFFINE: tl.constexpr, PRECISION: tl.constexpr,
):
    PADDED: tl.constexpr = B * BLOCKS
    image, w, n = _tile(tl.program_id(0), heads, across, LINES, HEADS)
    x = tl.program_id(1) * B
    row, column = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    head, e = n + (tl.arange(0, LINES) % HEADS)[:, None], tl.arange(0, E)[None, :]
    total = tl.zeros([B, LINES, E], tl.float32)
    for block in range(BLOCKS):
        i = block * B
        pointers, mask = _tile_rows(
            v, image, w, n, i, across, length, v_b, v_n, v_d, v_l, v_w,
            V_UNIT, B, LINES, HEADS, E)
        known = tl.load(pointers, mask=mask, other=0.)
        for d in range(DEPTH):
            r = tl.load(embedding + d * (PADDED * PADDED) + (x + row) * PADDED + i + column)
            queries, asking = _tile_queries(
                q, image, w, n, d, x, across, length, q_b, q_n, q_d, q_l, q_w,
                B, LINES, HEADS)
            asked = tl.load(queries, mask=asking, other=0.).to(tl.float32)
            gathered = tl.reshape(tl.dot(r, known, input_precision=PRECISION), [B, LINES, E])
            if CONTENT:
                if block == 0:
                    at = ((image * heads + head) * DEPTH + d) * E + e
                    gathered += tl.load(context + at)[None, :, :]
            total += asked[:, :, None] * gathered
    if AFFINE:
        factor = tl.load(scale + head * E + e).to(tl.float32)
        summand = tl.load(shift + head * E + e).to(tl.float32)
        total = total * factor[None, :, :] + summand[None, :, :]
    pointers, mask = _tile_rows(
        out, image, w, n, x, across, length, o_b, o_n, o_d, o_l, o_w,
        O_UNIT, B, LINES, HEADS, E)
    tl.store(pointers, tl.reshape(total, [B, LINES * E]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _block(x, image, first, n_stride, d_stride, b_stride, DEPTH: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr):
    """Pointers (1, C) to the channels of an image from `first` on."""
    c = (first + tl.arange(0, C))[None, :]
    if UNIT:
        return x + image * b_stride + c
    return x + image * b_stride + c // DEPTH * n_stride + c % DEPTH * d_stride


@triton.jit
def _pixels(p, width, h_stride, w_stride, FLAT: tl.constexpr):
    """Offsets (P, 1) of positions."""
    if FLAT:
        return p[:, None] * w_stride
    return (p // width * h_stride + p % width * w_stride)[:, None]


@triton.jit
def _own_head(first, image, heads, DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr):
    """Offsets (C, C) of a block's contexts among those (B, heads, d, d) of all, and which pairs are of one head."""
    k, e = (first + tl.arange(0, C))[:, None], (first + tl.arange(0, C))[None, :]
    same = (k // DEPTH == e // DEPTH) & (k < heads * DEPTH) & (k < first + USED) & (e < first + USED)
    return image * heads * (DEPTH * DEPTH) + k * DEPTH + e % DEPTH, same


@triton.jit
def _context(
        a, v, out, largest, heads, positions, width,
        a_b, a_n, a_d, a_h, a_w, v_b, v_n, v_d, v_h, v_w,
        A_UNIT: tl.constexpr, A_FLAT: tl.constexpr, V_UNIT: tl.constexpr, V_FLAT: tl.constexpr,
        DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
        SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):
    """out = w v^T over all positions, for w = a, or w = softmax(a), whose logarithm of sums goes to `largest`."""
    blocks = tl.cdiv(heads * DEPTH, USED)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * USED
    c = tl.arange(0, C)
    used = (c < USED) & (first + c < heads * DEPTH)
    weights = _block(a, image, first, a_n, a_d, a_b, DEPTH, A_UNIT, C)
    values = _block(v, image, first, v_n, v_d, v_b, DEPTH, V_UNIT, C)
    total = tl.zeros([C, C], tl.float32)
    most = tl.full([C], float('-inf'), tl.float32)
    summed = tl.zeros([C], tl.float32)
    for start in range(0, positions, P):
        p = start + tl.arange(0, P)
        there = (p < positions)[:, None] & used[None, :]
        w = tl.load(weights + _pixels(p, width, a_h, a_w, A_FLAT), mask=there, other=0.)
        known = tl.load(values + _pixels(p, width, v_h, v_w, V_FLAT), mask=there, other=0.)
        if SOFTMAX:
            w = tl.where((p < positions)[:, None], w.to(tl.float32), float('-inf'))
            more = tl.maximum(most, tl.max(w, 0))
            faded = tl.exp(most - more)
            w = tl.exp(w - more[None, :])
            summed = summed * faded + tl.sum(w, 0)
            total = total * faded[:, None]
            most = more
        total = tl.dot(tl.trans(w.to(known.dtype)), known, total, input_precision=PRECISION)
    if SOFTMAX:
        total = total / summed[:, None]
        tl.store(largest + image * heads * DEPTH + first + c, most + tl.log(summed), mask=used)
    at, same = _own_head(first, image, heads, DEPTH, USED, C)
    tl.store(out + at, total, mask=same)


@triton.jit
def _content(
        q, context, out, heads, positions, width,
        q_b, q_n, q_d, q_h, q_w, o_b, o_n, o_d, o_h, o_w,
        Q_UNIT: tl.constexpr, Q_FLAT: tl.constexpr, O_UNIT: tl.constexpr, O_FLAT: tl.constexpr,
        DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(heads * DEPTH, USED)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * USED
    c = tl.arange(0, C)
    p = tl.program_id(1) * P + tl.arange(0, P)
    there = (p < positions)[:, None] & ((c < USED) & (first + c < heads * DEPTH))[None, :]
    at, same = _own_head(first, image, heads, DEPTH, USED, C)
    queries = _block(q, image, first, q_n, q_d, q_b, DEPTH, Q_UNIT, C)
    asked = tl.load(queries + _pixels(p, width, q_h, q_w, Q_FLAT), mask=there, other=0.)
    summed = tl.load(context + at, mask=same, other=0.).to(asked.dtype)
    results = _block(out, image, first, o_n, o_d, o_b, DEPTH, O_UNIT, C)
    total = tl.dot(asked, summed, input_precision=PRECISION).to(out.dtype.element_ty)
    tl.store(results + _pixels(p, width, o_h, o_w, O_FLAT), total, mask=there)


@triton.jit
def _content_backward(
        k, v, g, context, context_grad, largest, level, dq, dk, dv, heads, positions, width,
        k_b, k_n, k_d, k_h, k_w, v_b, v_n, v_d, v_h, v_w, g_b, g_n, g_d, g_h, g_w,
        dq_b, dq_n, dq_d, dq_h, dq_w, dk_b, dk_n, dk_d, dk_h, dk_w, dv_b, dv_n, dv_d, dv_h, dv_w,
        K_UNIT: tl.constexpr, K_FLAT: tl.constexpr, V_UNIT: tl.constexpr, V_FLAT: tl.constexpr,
        G_UNIT: tl.constexpr, G_FLAT: tl.constexpr, DQ_UNIT: tl.constexpr, DQ_FLAT: tl.constexpr,
        DK_UNIT: tl.constexpr, DK_FLAT: tl.constexpr, DV_UNIT: tl.constexpr, DV_FLAT: tl.constexpr,
        DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
        ADD: tl.constexpr, PRECISION: tl.constexpr,
):
    """`level`: the sums over positions of each key channel's weights times their gradients. ADD: to what `dq` holds."""
    blocks = tl.cdiv(heads * DEPTH, USED)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * USED
    c = tl.arange(0, C)
    used = (c < USED) & (first + c < heads * DEPTH)
    p = tl.program_id(1) * P + tl.arange(0, P)
    there = (p < positions)[:, None] & used[None, :]
    at, same = _own_head(first, image, heads, DEPTH, USED, C)
    keys = _block(k, image, first, k_n, k_d, k_b, DEPTH, K_UNIT, C)
    values = _block(v, image, first, v_n, v_d, v_b, DEPTH, V_UNIT, C)
    grads = _block(g, image, first, g_n, g_d, g_b, DEPTH, G_UNIT, C)
    w = tl.load(keys + _pixels(p, width, k_h, k_w, K_FLAT), mask=there, other=0.).to(tl.float32)
    known = tl.load(values + _pixels(p, width, v_h, v_w, V_FLAT), mask=there, other=0.)
    grad = tl.load(grads + _pixels(p, width, g_h, g_w, G_FLAT), mask=there, other=0.).to(known.dtype)
    channel = image * heads * DEPTH + first + c
    w = tl.exp(w - tl.load(largest + channel, mask=used, other=0.)[None, :])
    w = tl.where(there, w, 0.)

    summed = tl.load(context + at, mask=same, other=0.).to(known.dtype)
    asked_grad = tl.dot(grad, tl.trans(summed), input_precision=PRECISION)
    summed_grad = tl.load(context_grad + at, mask=same, other=0.).to(known.dtype)
    known_grad = tl.dot(w.to(known.dtype), summed_grad, input_precision=PRECISION)
    key_grad = tl.dot(known, tl.trans(summed_grad), input_precision=PRECISION)
    key_grad = w * (key_grad - tl.load(level + channel, mask=used, other=0.)[None, :])

    results = _block(dq, image, first, dq_n, dq_d, dq_b, DEPTH, DQ_UNIT, C) + _pixels(p, width, dq_h, dq_w, DQ_FLAT)
    if ADD:
        asked_grad += tl.load(results, mask=there, other=0.).to(tl.float32)
    tl.store(results, asked_grad.to(dq.dtype.element_ty), mask=there)
    results = _block(dk, image, first, dk_n, dk_d, dk_b, DEPTH, DK_UNIT, C)
    tl.store(results + _pixels(p, width, dk_h, dk_w, DK_FLAT), key_grad.to(dk.dtype.element_ty), mask=there)
    results = _block(dv, image, first, dv_n, dv_d, dv_b, DEPTH, DV_UNIT, C)
    tl.store(results + _pixels(p, width, dv_h, dv_w, DV_FLAT), known_grad.to(dv.dtype.element_ty), mask=there)


def attend(
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
        context: torch.Tensor | None = None,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The column step of query (B, heads, d, H, W) and value (B, heads, e, H, W), with a table (2 * H - 1, d).

    `context`, (B, heads, d, e), adds the product of the queries with it; `affine`, factor and summand of each channel,
    (heads * e,), is applied to the result. Dtypes of query, value and table are equal.
    """
    out = torch.empty_like(value)
    batch, heads, depth, length, across = query.shape
    lines = batch * heads * across
    if lines == 0:
        return out
    scale, shift = affine or (table, table)
    summed = table if context is None else context
    branches: dict[str, Any] = dict(CONTENT=context is not None, AFFINE=affine is not None)
    with torch.cuda.device_of(query):
        if _is_narrow(query, value):
            sizes = _tile_sizes(query, value)
            _attend_narrow[_tiles(value, sizes), sizes['BLOCKS']](
                query, value, _embedding(table, length), summed, scale, shift, out, heads, across, length,
                *query.stride(), *value.stride(), *out.stride(),
                V_UNIT=_is_unit(value), O_UNIT=_is_unit(out), **sizes, **branches,
            )
            return out
        _attend[(triton.cdiv(lines, _EACH),)](
            query, value, table.contiguous(), summed, scale, shift, out,
            lines, _EACH, heads, across, length, *query.stride(), *value.stride(), *out.stride(),
            Q_UNIT=_is_unit(query), V_UNIT=_is_unit(value), O_UNIT=_is_unit(out),
            **_line_sizes(query, value), **branches,
        )
    return out


def attend_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend` to query, value and table from that of its result."""
    batch, heads, depth, length, across = query.shape
    lines = batch * heads * across
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    if lines == 0:
        return grad_query, grad_value, torch.zeros_like(table)
    # One block of 64 where shared memory of any device holds it, as sums over several go through memory.
    twice = query.dtype != torch.float32 and max(depth, value.shape[2]) <= 16
    sizes = _line_sizes(query, value, 2 * _BLOCK if twice else _BLOCK)
    size, blocks = sizes['B'], sizes['BLOCKS']
    each = triton.cdiv(lines, _PROGRAMS)
    programs = triton.cdiv(lines, each)
    new = query.new_empty if blocks == 1 else query.new_zeros
    partial = new(programs, 2 * blocks - 1, 2 * size, sizes['D'], dtype=torch.float32)
    value_sums = grad_value if blocks == 1 else torch.zeros_like(value, dtype=torch.float32)
    with torch.cuda.device_of(query):
        _attend_backward[(programs,)](
            query, value, grad, table.contiguous(), grad_query, value_sums, partial,
            lines, each, heads, across, length,
            *query.stride(), *value.stride(), *grad.stride(), *grad_query.stride(), *value_sums.stride(),
            Q_UNIT=_is_unit(query), V_UNIT=_is_unit(value), G_UNIT=_is_unit(grad),
            DQ_UNIT=_is_unit(grad_query), DV_UNIT=_is_unit(value_sums), **sizes,
        )
    # Slot s holds offsets from (s - blocks) * size + 1 on.
    sums = partial.sum(0)
    grad_table = sums.new_zeros((2 * blocks) * size, sizes['D'])
    for slot in range(2 * blocks - 1):
        grad_table[slot * size:(slot + 2) * size] += sums[slot]
    first = blocks * size - length  # of the table's rows
    return (
        grad_query,
        grad_value if blocks == 1 else grad_value.copy_(value_sums),
        grad_table[first:first + 2 * length - 1, :depth].to(table.dtype),
    )


def content(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention of query, key and value (B, heads, d, H, W), of equal dtypes."""
    out = torch.empty_like(value)
    if out.numel() == 0:
        return out
    context, _ = _summed(key, value, softmax=True)
    sizes = _head_sizes(value)
    with torch.cuda.device_of(query):
        _content[_grid(value, sizes)](
            query, context, out, *_extent(value), *query.stride(), *out.stride(),
            Q_UNIT=_is_unit(query), Q_FLAT=_is_flat(query), O_UNIT=_is_unit(out), O_FLAT=_is_flat(out), **sizes,
        )
    return out


def content_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grad_query: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `content` to query, key and value from that of its result.

    What is given as `grad_query` is added to, in place.
    """
    add = grad_query is not None
    grad_query = torch.empty_like(query) if grad_query is None else grad_query
    grads = grad_query, torch.empty_like(key), torch.empty_like(value)
    if value.numel() == 0:
        return grads
    context, largest = _summed(key, value, softmax=True)
    context_grad, _ = _summed(query, grad, softmax=False)
    level = (context * context_grad).sum(-1)
    sizes = _head_sizes(value)
    maps = dict(K=key, V=value, G=grad, DQ=grads[0], DK=grads[1], DV=grads[2])
    with torch.cuda.device_of(query):
        _content_backward[_grid(value, sizes)](
            key, value, grad, context, context_grad, largest, level, *grads, *_extent(value),
            *(step for x in maps.values() for step in x.stride()),
            **{f'{name}_UNIT': _is_unit(x) for name, x in maps.items()},
            **{f'{name}_FLAT': _is_flat(x) for name, x in maps.items()},
            **sizes, ADD=add,
        )
    return grads


def gather(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        normed: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    """Content, and the row step of what the column step gave, of query, key, value, normed (B, heads, d, H, W)."""
    context, _ = _summed(key, value, softmax=True)
    return attend(query.mT, normed.mT, table, context=context).mT


def gather_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        normed: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `gather` to its five tensors from that of its result."""
    grad_query, grad_normed, grad_table = attend_backward(grad.mT, query.mT, normed.mT, table)
    grads = content_backward(grad, query, key, value, grad_query.mT)
    return *grads, grad_normed.mT, grad_table


def fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table_h: torch.Tensor,
        table_w: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
) -> torch.Tensor:
    """`gather` of scale * column step + shift, for query, key and value (B, heads, d, H, W)."""
    return gather(query, key, value, attend(query, value, table_h, affine=(scale, shift)), table_w)


def _is_narrow(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether embeddings go into the product with the values before the queries do.

    out[x] = sum over d of query[x, d] * (sum over i of table[i - x, d] * value[i]) has d / 2 times as many
    multiply-adds, but in products of which one side is the same for all lines, with nothing to be picked from logits.
    """
    depth, length = value.shape[2], query.shape[3]
    return length > _BLOCK and query.shape[2] <= 8 and depth == 8 and query.dtype != torch.float32


def _embedding(table: torch.Tensor, length: int) -> torch.Tensor:
    """(d, L, L) embeddings of the offsets i - x, [d, x, i]; 0 up to whole blocks."""
    depth, padded = table.shape[1], triton.cdiv(length, _TILE) * _TILE
    out = table.new_empty(depth, padded, padded)
    _unfold[(depth * padded,)](
        table.contiguous(), out, length, DEPTH=depth, PADDED=padded, W=triton.next_power_of_2(padded), num_warps=1,
    )
    return out


def _tile_sizes(query: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    heads, depth = value.shape[1:3]
    lines = 128 // depth
    return dict(
        DEPTH=query.shape[2], E=depth, B=_TILE, BLOCKS=triton.cdiv(query.shape[3], _TILE), LINES=lines,
        HEADS=math.gcd(lines, heads), PRECISION=_precision(), num_warps=4,
    )


def _tiles(value: torch.Tensor, sizes: dict[str, Any]) -> int:
    batch, heads, _, _, across = value.shape
    return batch * triton.cdiv(across, sizes['LINES'] // sizes['HEADS']) * (heads // sizes['HEADS'])


def _summed(weight: torch.Tensor, value: torch.Tensor, softmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts (B, heads, d, d), float32, and the logarithm of the sums that the softmax divides by, (B, heads, d)."""
    batch, heads, depth = value.shape[:3]
    out = value.new_empty(batch, heads, depth, depth, dtype=torch.float32)
    largest = value.new_empty(batch, heads, depth, dtype=torch.float32)
    sizes = _head_sizes(value)
    if sizes['C'] <= 32:
        sizes['num_warps'] = 2
    with torch.cuda.device_of(value):
        _context[_grid(value, sizes)[:1]](
            weight, value, out, largest, *_extent(value), *weight.stride(), *value.stride(),
            A_UNIT=_is_unit(weight), A_FLAT=_is_flat(weight), V_UNIT=_is_unit(value), V_FLAT=_is_flat(value),
            **sizes, SOFTMAX=softmax, num_stages=2,
        )
    return out, largest


def _is_unit(x: torch.Tensor) -> bool:
    """Whether the channels of all heads lie one after another in memory."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _is_flat(x: torch.Tensor) -> bool:
    return x.stride(3) == x.shape[4] * x.stride(4)


def _extent(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[1], x.shape[3] * x.shape[4], x.shape[4]


def _precision() -> str:
    """How factors of products are rounded; those of half precision are exact in any case."""
    return 'tf32' if allows_tf32() else 'ieee'


def _line_sizes(query: torch.Tensor, value: torch.Tensor, block: int = _BLOCK) -> dict[str, Any]:
    depth, value_depth, length = query.shape[2], value.shape[2], query.shape[3]
    size = max(16, min(block, triton.next_power_of_2(length)))
    return dict(
        DEPTH=depth, D=max(16, triton.next_power_of_2(depth)),
        VDEPTH=value_depth, E=max(16, triton.next_power_of_2(value_depth)),
        B=size, BLOCKS=triton.cdiv(length, size), PRECISION=_precision(),
        num_warps=4 if size > _BLOCK or (length > _BLOCK and max(depth, value_depth) > 16) else 1,
    )


def _head_sizes(x: torch.Tensor) -> dict[str, Any]:
    heads, depth = x.shape[1:3]
    used = max(1, 16 // depth) * depth  # channels of whole heads
    return dict(
        DEPTH=depth, USED=used, C=max(16, triton.next_power_of_2(used)), P=128 if used <= 32 else 64,
        PRECISION=_precision(), num_warps=4 if used <= 64 else 8,
    )


def _grid(x: torch.Tensor, sizes: dict[str, Any]) -> tuple[int, int]:
    batch, heads, depth, height, width = x.shape
    return batch * triton.cdiv(heads * depth, sizes['USED']), triton.cdiv(height * width, sizes['P'])

"""GSA's operations on a GPU: Triton kernels for the axial steps and the content branch, and for their gradients.

    attend              out[x]    = sum over i of (query[x] . table[i - x + L - 1]) * value[i]   along one axis of a map
    attend_backward     its gradients to query, value and table
    content             out[n]    = sum over k of query[k, n] * context[k], context = softmax(key) value^T
    content_backward    its gradients to query, key and value
    gather              the sum of content and the row step
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
summed in each program and then over programs, so that no order of sums depends on timing. It is a float32 sum and is
rounded to the dtype of the table alone.

Content. A context is a d x d matrix for each head. Heads narrower than 16 channels share a block of 16, as tensor cores
multiply no fewer; what belongs to two heads is masked. If images and heads are too few to fill a GPU, the positions of
an image are split over several programs, and a second kernel merges their contexts in a fixed order.

Offsets. That of an image is a 64-bit number. Offsets within an image are of the type INDEX, which is 64 bits only for
images that need it. Sizes and strides are not specialised, so a map of another size needs no compilation. What vector
loads depend on are constants: whether channels, or positions, are innermost in memory, and V, a common factor of the
other strides, which are given in steps of V numbers.
"""
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._backend import allows_tf32
from .._kernels import grid_of, layout_of

__all__ = ['attend', 'attend_backward', 'content', 'content_backward', 'fused', 'gather', 'gather_backward']

_BLOCK = 32  # positions of a line at a time, at most
_TILE = 64  # the same where heads have few channels
_EACH = 4  # lines of a program in a forward pass
_PROGRAMS = 1024  # that share the lines of a batch in a backward pass
_CONTEXTS = 512  # programs that fill a GPU: fewer share the positions of an image

# Arguments that change with the size of a map. A stride of 1 is a constant of the kernel: it says how a map lies.
_SIZES = (
    'batch', 'lines', 'each', 'heads', 'across', 'length', 'blocks', 'count', 'padded', 'positions', 'width', 'splits',
    'per_split', 'chunks', 'rows',
)
_STRIDES = tuple(f'{name}_{axis}' for name in ('q', 'k', 'v', 'g', 'o', 'w', 'dq', 'dk', 'dv') for axis in 'bndlhw')
_kernel = triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)


# Axial steps.


@triton.jit
def _line(
        line, heads, across, s_b, s_n, s_w,
        UNIT: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr, INDEX: tl.constexpr,
):
    """Offset of the first number of a line. Lines are numbered by image, position across, and head."""
    image = (line // (heads * across)).to(tl.int64)
    at = image * s_b * V + (line // heads % across).to(INDEX) * s_w * V
    head = (line % heads).to(INDEX)
    if UNIT:
        return at + head * DEPTH
    return at + head * s_n * V


@triton.jit
def _rows(
        base, first, length, s_l, s_d,
        UNIT: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr, B: tl.constexpr, D: tl.constexpr, INDEX: tl.constexpr,
):
    """Pointers (B, D) to the positions of a line from `first` on, and which of them exist."""
    x = (first + tl.arange(0, B)).to(INDEX)[:, None]
    c = tl.arange(0, D).to(INDEX)[None, :]
    exists = (x < length) & (c < DEPTH)
    if UNIT:
        return base + (x * s_l * V + c), exists
    return base + (x * s_l + c * s_d) * V, exists


@triton.jit
def _embeddings(table, first, length, dtype: tl.constexpr, DEPTH: tl.constexpr, B: tl.constexpr, D: tl.constexpr):
    """The 2B embeddings (2B, D) of the offsets between a block of positions and one of neighbours, from row `first` on.

    Rows that the table does not have are 0.
    """
    row = first + tl.arange(0, 2 * B)[:, None]
    c = tl.arange(0, D)[None, :]
    exists = (row >= 0) & (row < 2 * length - 1) & (c < DEPTH)
    return tl.load(table + row * DEPTH + c, mask=exists, other=0.).to(dtype)


@triton.jit
def _zero(line):
    """0, of which the compiler knows no value: an index that it is added to is computed for each line.

    The backward kernel has no registers to hold the index through the loop over lines.
    """
    return tl.minimum(line, 0).to(tl.int32)


@triton.jit
def _logits(query, embedding, zero, B: tl.constexpr, PRECISION: tl.constexpr):
    """(B, B) from queries (B, D) and embeddings (2B, D), of which row i - x + B - 1 is that of x and i."""
    products = tl.dot(query, tl.trans(embedding), input_precision=PRECISION).to(query.dtype)
    offset = tl.arange(0, B)[None, :] - tl.arange(0, B)[:, None] + B - 1 + zero
    return tl.gather(products, offset, 1)


@triton.jit
def _with_content(
        total, query, context, image, head, heads,
        DEPTH: tl.constexpr, D: tl.constexpr, VDEPTH: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds the products (B, E) of queries (B, D) with the context of their head."""
    d = tl.arange(0, D)[:, None]
    e = tl.arange(0, E)[None, :]
    at = (image * heads + head) * (DEPTH * VDEPTH) + d * VDEPTH + e
    factors = tl.load(context + at, mask=(d < DEPTH) & (e < VDEPTH), other=0.).to(query.dtype)
    return tl.dot(query, factors, total, input_precision=PRECISION)


@triton.jit
def _affine(total, scale, shift, head, VDEPTH: tl.constexpr, E: tl.constexpr):
    """scale * total + shift for the channels of a head."""
    e = tl.arange(0, E)
    factor = tl.load(scale + head * VDEPTH + e, mask=e < VDEPTH, other=0.).to(tl.float32)
    summand = tl.load(shift + head * VDEPTH + e, mask=e < VDEPTH, other=0.).to(tl.float32)
    return total * factor[None, :] + summand[None, :]


@_kernel
def _attend(
        q, v, table, context, scale, shift, out, lines, each, heads, across, length, blocks,
        q_b, q_n, q_d, q_l, q_w, v_b, v_n, v_d, v_l, v_w, o_b, o_n, o_d, o_l, o_w,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, V_UNIT: tl.constexpr, V_V: tl.constexpr,
        O_UNIT: tl.constexpr, O_V: tl.constexpr,
        DEPTH: tl.constexpr, D: tl.constexpr, VDEPTH: tl.constexpr, E: tl.constexpr,
        B: tl.constexpr, SINGLE: tl.constexpr, INDEX: tl.constexpr,
        CONTENT: tl.constexpr, AFFINE: tl.constexpr, PRECISION: tl.constexpr,
):
    """The step along `each` lines of `blocks` blocks; SINGLE: of one block."""
    first = tl.program_id(0).to(INDEX) * each
    count = 1 if SINGLE else blocks
    for line in range(first, tl.minimum(first + each, lines)):
        queries = q + _line(line, heads, across, q_b, q_n, q_w, Q_UNIT, Q_V, DEPTH, INDEX)
        values = v + _line(line, heads, across, v_b, v_n, v_w, V_UNIT, V_V, VDEPTH, INDEX)
        results = out + _line(line, heads, across, o_b, o_n, o_w, O_UNIT, O_V, VDEPTH, INDEX)
        for x in range(count):
            at, exists = _rows(queries, x * B, length, q_l, q_d, Q_UNIT, Q_V, DEPTH, B, D, INDEX)
            query = tl.load(at, mask=exists, other=0.)
            total = tl.zeros([B, E], tl.float32)
            for i in range(count):
                embedding = _embeddings(table, (i - x - 1) * B + length, length, query.dtype, DEPTH, B, D)
                values_at, inside = _rows(values, i * B, length, v_l, v_d, V_UNIT, V_V, VDEPTH, B, E, INDEX)
                value = tl.load(values_at, mask=inside, other=0.)
                logits = _logits(query, embedding, 0, B, PRECISION)
                total = tl.dot(logits, value, total, input_precision=PRECISION)
            if CONTENT:
                image = (line // (heads * across)).to(tl.int64)
                total = _with_content(total, query, context, image, line % heads, heads, DEPTH, D, VDEPTH, E, PRECISION)
            if AFFINE:
                total = _affine(total, scale, shift, line % heads, VDEPTH, E)
            at, exists = _rows(results, x * B, length, o_l, o_d, O_UNIT, O_V, VDEPTH, B, E, INDEX)
            tl.store(at, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _pair_gradients(query, value, grad, embedding, zero, B: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of the values (B, E) and of the products (B, 2B) of queries with embeddings, for a pair of blocks."""
    logits = _logits(query, embedding, zero, B, PRECISION)
    grad_value = tl.dot(tl.trans(logits), grad, input_precision=PRECISION)
    grad_logits = tl.dot(grad, tl.trans(value), input_precision=PRECISION).to(query.dtype)
    i = tl.arange(0, 2 * B)[None, :] + tl.arange(0, B)[:, None] - (B - 1) + zero  # of x and offset
    inside = (i >= 0) & (i < B)
    i = tl.minimum(tl.maximum(i, 0), B - 1)
    return grad_value, tl.where(inside, tl.gather(grad_logits, i, 1), 0.).to(query.dtype)


@_kernel
def _attend_backward(
        q, v, g, table, dq, dv, partial, lines, each, heads, across, length, blocks,
        q_b, q_n, q_d, q_l, q_w, v_b, v_n, v_d, v_l, v_w, g_b, g_n, g_d, g_l, g_w,
        dq_b, dq_n, dq_d, dq_l, dq_w, dv_b, dv_n, dv_d, dv_l, dv_w,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, V_UNIT: tl.constexpr, V_V: tl.constexpr,
        G_UNIT: tl.constexpr, G_V: tl.constexpr, DQ_UNIT: tl.constexpr, DQ_V: tl.constexpr,
        DV_UNIT: tl.constexpr, DV_V: tl.constexpr,
        DEPTH: tl.constexpr, D: tl.constexpr, VDEPTH: tl.constexpr, E: tl.constexpr,
        B: tl.constexpr, SINGLE: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of `each` lines. With several blocks, sums gather in memory that no other program writes to."""
    first = tl.program_id(0).to(INDEX) * each
    count = 1 if SINGLE else blocks
    slot = tl.arange(0, 2 * B)[:, None] * D + tl.arange(0, D)[None, :]
    workspace = partial + tl.program_id(0).to(tl.int64) * (2 * count - 1) * (2 * B * D) + slot
    grad_table = tl.zeros([2 * B, D], tl.float32)
    for line in range(first, tl.minimum(first + each, lines)):
        queries = q + _line(line, heads, across, q_b, q_n, q_w, Q_UNIT, Q_V, DEPTH, INDEX)
        values = v + _line(line, heads, across, v_b, v_n, v_w, V_UNIT, V_V, VDEPTH, INDEX)
        grads = g + _line(line, heads, across, g_b, g_n, g_w, G_UNIT, G_V, VDEPTH, INDEX)
        grad_queries = dq + _line(line, heads, across, dq_b, dq_n, dq_w, DQ_UNIT, DQ_V, DEPTH, INDEX)
        grad_values = dv + _line(line, heads, across, dv_b, dv_n, dv_w, DV_UNIT, DV_V, VDEPTH, INDEX)
        for x in range(count):
            at, exists = _rows(queries, x * B, length, q_l, q_d, Q_UNIT, Q_V, DEPTH, B, D, INDEX)
            query = tl.load(at, mask=exists, other=0.)
            at, exists = _rows(grads, x * B, length, g_l, g_d, G_UNIT, G_V, VDEPTH, B, E, INDEX)
            grad = tl.load(at, mask=exists, other=0.).to(query.dtype)
            grad_query = tl.zeros([B, D], tl.float32)
            for i in range(count):
                embedding = _embeddings(table, (i - x - 1) * B + length, length, query.dtype, DEPTH, B, D)
                values_at, inside = _rows(values, i * B, length, v_l, v_d, V_UNIT, V_V, VDEPTH, B, E, INDEX)
                value = tl.load(values_at, mask=inside, other=0.)
                grad_value, grad_products = _pair_gradients(query, value, grad, embedding, _zero(line), B, PRECISION)
                grad_query = tl.dot(grad_products, embedding, grad_query, input_precision=PRECISION)
                sums_at, inside = _rows(grad_values, i * B, length, dv_l, dv_d, DV_UNIT, DV_V, VDEPTH, B, E, INDEX)
                if SINGLE:
                    grad_table = tl.dot(tl.trans(grad_products), query, grad_table, input_precision=PRECISION)
                    tl.store(sums_at, grad_value.to(dv.dtype.element_ty), mask=inside)
                else:
                    more = tl.dot(tl.trans(grad_products), query, input_precision=PRECISION)
                    sums = workspace + (i - x + count - 1) * (2 * B * D)
                    tl.store(sums, tl.load(sums) + more)
                    tl.store(sums_at, tl.load(sums_at, mask=inside, other=0.) + grad_value, mask=inside)
                    tl.debug_barrier()  # other threads may read what this one wrote
            at, exists = _rows(grad_queries, x * B, length, dq_l, dq_d, DQ_UNIT, DQ_V, DEPTH, B, D, INDEX)
            tl.store(at, grad_query.to(dq.dtype.element_ty), mask=exists)
    if SINGLE:
        tl.store(workspace, grad_table)


# Axial steps of heads of few channels.


@_kernel
def _unfold(table, out, count, length, padded, DEPTH: tl.constexpr, N: tl.constexpr, INDEX: tl.constexpr):
    """N of the embeddings [d, x, i] of all pairs; 0 up to whole blocks."""
    n = tl.program_id(0).to(INDEX) * N + tl.arange(0, N)
    d, x, i = n // padded // padded, n // padded % padded, n % padded
    exists = (n < count) & (x < length) & (i < length)
    embedding = tl.load(table + (i - x + length - 1) * DEPTH + d, mask=exists, other=0.)
    tl.store(out + n, embedding.to(out.dtype.element_ty), mask=n < count)


@triton.jit
def _tile(tile, heads, across, LINES: tl.constexpr, HEADS: tl.constexpr):
    """Image, first position across and first head of a tile of LINES lines, HEADS of them at one position."""
    wide = tl.cdiv(across, LINES // HEADS)
    blocks = heads // HEADS
    image = (tile // (wide * blocks)).to(tl.int64)
    return image, tile // blocks % wide * (LINES // HEADS), tile % blocks * HEADS


@triton.jit
def _tile_rows(
        base, image, position, head, first, across, length, s_b, s_n, s_d, s_l, s_w,
        UNIT: tl.constexpr, V: tl.constexpr, B: tl.constexpr, LINES: tl.constexpr, HEADS: tl.constexpr,
        E: tl.constexpr, INDEX: tl.constexpr,
):
    """Pointers (B, LINES * E) to the channels of a tile's lines, and which of them exist."""
    at = tl.arange(0, LINES * E).to(INDEX)
    c = at % (HEADS * E)
    base += image * s_b * V + position.to(INDEX) * s_w * V
    if UNIT:
        base += head * E
        columns = at // (HEADS * E) * s_w * V + c
    else:
        base += head.to(INDEX) * s_n * V
        columns = (at // (HEADS * E) * s_w + c // E * s_n + c % E * s_d) * V
    row = (first + tl.arange(0, B)).to(INDEX)[:, None]
    exists = (row < length) & (position + at // (HEADS * E) < across)[None, :]
    return base + (row * s_l * V + columns[None, :]), exists


@triton.jit
def _tile_queries(
        base, image, position, head, channel, first, across, length, s_b, s_n, s_d, s_l, s_w,
        UNIT: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr, B: tl.constexpr, LINES: tl.constexpr,
        HEADS: tl.constexpr, INDEX: tl.constexpr,
):
    """Pointers (B, LINES) to one channel of the queries of a tile's lines, and which of them exist."""
    line = tl.arange(0, LINES).to(INDEX)
    base += image * s_b * V
    columns = (position + line // HEADS) * s_w * V
    if UNIT:
        columns += (head + line % HEADS) * DEPTH + channel
    else:
        columns += ((head + line % HEADS) * s_n + channel * s_d) * V
    row = (first + tl.arange(0, B)).to(INDEX)[:, None]
    exists = (row < length) & (position + line // HEADS < across)[None, :]
    return base + (row * s_l * V + columns[None, :]), exists


@_kernel
def _attend_tiles(
        q, v, embedding, context, scale, shift, out, heads, across, length, blocks,
        q_b, q_n, q_d, q_l, q_w, v_b, v_n, v_d, v_l, v_w, o_b, o_n, o_d, o_l, o_w,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, V_UNIT: tl.constexpr, V_V: tl.constexpr,
        O_UNIT: tl.constexpr, O_V: tl.constexpr,
        DEPTH: tl.constexpr, E: tl.constexpr, B: tl.constexpr, LINES: tl.constexpr, HEADS: tl.constexpr,
        INDEX: tl.constexpr, CONTENT: tl.constexpr, AFFINE: tl.constexpr, PRECISION: tl.constexpr,
):
    """The step of one block of positions of LINES lines."""
    padded = blocks * B
    image, position, head = _tile(tl.program_id(0) // blocks, heads, across, LINES, HEADS)
    x = tl.program_id(0) % blocks * B
    pairs = (x + tl.arange(0, B)).to(INDEX)[:, None] * padded + tl.arange(0, B)[None, :]
    every_head, e = head + (tl.arange(0, LINES) % HEADS)[:, None], tl.arange(0, E)[None, :]
    total = tl.zeros([B, LINES, E], tl.float32)
    for block in range(blocks):
        at, exists = _tile_rows(
            v, image, position, head, block * B, across, length, v_b, v_n, v_d, v_l, v_w,
            V_UNIT, V_V, B, LINES, HEADS, E, INDEX)
        value = tl.load(at, mask=exists, other=0.)
        for channel in range(DEPTH):
            factors = tl.load(embedding + tl.full([], 1, INDEX) * channel * padded * padded + pairs + block * B)
            queries_at, inside = _tile_queries(
                q, image, position, head, channel, x, across, length, q_b, q_n, q_d, q_l, q_w,
                Q_UNIT, Q_V, DEPTH, B, LINES, HEADS, INDEX)
            query = tl.load(queries_at, mask=inside, other=0.).to(tl.float32)
            part = tl.reshape(tl.dot(factors, value, input_precision=PRECISION), [B, LINES, E])
            if CONTENT:
                if block == 0:
                    part += tl.load(context + ((image * heads + every_head) * DEPTH + channel) * E + e)[None, :, :]
            total += query[:, :, None] * part
    if AFFINE:
        factor = tl.load(scale + every_head * E + e).to(tl.float32)
        summand = tl.load(shift + every_head * E + e).to(tl.float32)
        total = total * factor[None, :, :] + summand[None, :, :]
    at, exists = _tile_rows(
        out, image, position, head, x, across, length, o_b, o_n, o_d, o_l, o_w,
        O_UNIT, O_V, B, LINES, HEADS, E, INDEX)
    tl.store(at, tl.reshape(total, [B, LINES * E]).to(out.dtype.element_ty), mask=exists)


# Content.


@triton.jit
def _block_of_heads(block, heads, DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr):
    """Image and first channel of a block of whole heads, and which of its C channels are used."""
    blocks = tl.cdiv(heads * DEPTH, USED)
    first = block % blocks * USED
    c = tl.arange(0, C)
    return (block // blocks).to(tl.int64), first, (c < USED) & (first + c < heads * DEPTH)


@triton.jit
def _pixels(
        base, image, first, p, width, s_b, s_n, s_d, s_h, s_w,
        ORDER: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr, C: tl.constexpr, INDEX: tl.constexpr,
):
    """Pointers (P, C) to the channels of an image from `first` on, at positions p.

    ORDER says what is innermost in memory: 'channels' of all heads, 'positions' row by row, or 'any'.
    """
    base += image * s_b * V
    p = p.to(INDEX)[:, None]
    c = (first + tl.arange(0, C)).to(INDEX)[None, :]
    if ORDER == 'channels':
        return base + (p * s_w * V + c)
    elif ORDER == 'positions':
        return base + ((c // DEPTH * s_n + c % DEPTH * s_d) * V + p)
    else:
        return base + (p // width * s_h + p % width * s_w + c // DEPTH * s_n + c % DEPTH * s_d) * V


@triton.jit
def _own_head(first, image, heads, DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr):
    """Offsets (C, C) of a block's contexts among those (B, heads, d, d) of all, and which pairs are of one head."""
    k, e = (first + tl.arange(0, C))[:, None], (first + tl.arange(0, C))[None, :]
    same = (k // DEPTH == e // DEPTH) & (k < heads * DEPTH) & (k < first + USED) & (e < first + USED)
    return image * heads * (DEPTH * DEPTH) + k * DEPTH + e % DEPTH, same


@triton.jit
def _softmax_step(weight, largest):
    """One step of a softmax over rows: exp(weight - maximum), the new maximum, and the factor of earlier sums.

    The weights are (P, C), the largest of earlier ones (C,). A maximum of -inf gives weights of 0.
    """
    maximum = tl.maximum(largest, tl.max(weight, 0))
    finite = tl.where(maximum == float('-inf'), 0., maximum)
    return tl.exp(weight - finite[None, :]), maximum, tl.exp(largest - finite)


@_kernel
def _context(
        weight, v, context, lse, batch, heads, positions, width, splits, per_split,
        w_b, w_n, w_d, w_h, w_w, v_b, v_n, v_d, v_h, v_w,
        W_ORDER: tl.constexpr, W_V: tl.constexpr, V_ORDER: tl.constexpr, V_V: tl.constexpr,
        DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
        INDEX: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sum over the positions of a split of weight value^T, or of softmax(weight) value^T with its `lse`.

    Contexts are (splits, B, heads, d, d), lse (splits, B, heads, d). A softmax is that over the split alone.
    """
    split = tl.program_id(0) % splits
    image, first, used = _block_of_heads(tl.program_id(0) // splits, heads, DEPTH, USED, C)
    total = tl.zeros([C, C], tl.float32)
    largest = tl.full([C], float('-inf'), tl.float32)
    norm = tl.zeros([C], tl.float32)
    start = split * per_split
    for begin in range(start, tl.minimum(start + per_split, positions), P):
        p = begin + tl.arange(0, P)
        exists = (p < positions)[:, None] & used[None, :]
        at = _pixels(weight, image, first, p, width, w_b, w_n, w_d, w_h, w_w, W_ORDER, W_V, DEPTH, C, INDEX)
        factors = tl.load(at, mask=exists, other=0.)
        at = _pixels(v, image, first, p, width, v_b, v_n, v_d, v_h, v_w, V_ORDER, V_V, DEPTH, C, INDEX)
        value = tl.load(at, mask=exists, other=0.)
        if SOFTMAX:
            factors = tl.where((p < positions)[:, None], factors.to(tl.float32), float('-inf'))
            factors, largest, shrink = _softmax_step(factors, largest)
            norm = norm * shrink + tl.sum(factors, 0)
            total = total * shrink[:, None]
        total = tl.dot(tl.trans(factors.to(value.dtype)), value, total, input_precision=PRECISION)
    image += split * batch
    if SOFTMAX:
        total = total / norm[:, None]
        at = image * heads * DEPTH + first + tl.arange(0, C)
        tl.store(lse + at, largest + tl.log(norm), mask=used)
    at, same = _own_head(first, image, heads, DEPTH, USED, C)
    tl.store(context + at, total, mask=same)


@_kernel
def _merge(
        partial, partial_lse, context, lse, rows, splits,
        DEPTH: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SOFTMAX: tl.constexpr,
):
    """R rows of the contexts (B, heads, d, d) from those of all splits, in the order of the splits."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, D)[None, :]
    exists = (row < rows)[:, None] & (c < DEPTH)
    largest = tl.full([R], float('-inf'), tl.float32)
    norm = tl.zeros([R], tl.float32)
    total = tl.zeros([R, D], tl.float32)
    for split in range(splits):
        at = row + rows * split
        part = tl.load(partial + at[:, None] * DEPTH + c, mask=exists, other=0.)
        if SOFTMAX:
            part_lse = tl.load(partial_lse + at, mask=row < rows, other=0.)
            weight, largest, shrink = _softmax_step(part_lse[None, :], largest)
            weight = tl.sum(weight, 0)
            norm = norm * shrink + weight
            total = total * shrink[:, None]
            part = tl.where((weight > 0)[:, None], part * weight[:, None], 0.)  # where it is 0, `part` is 0 / 0
        total += part
    if SOFTMAX:
        total = total / norm[:, None]
        tl.store(lse + row, largest + tl.log(norm), mask=row < rows)
    tl.store(context + row[:, None] * DEPTH + c, total, mask=exists)


@_kernel
def _content(
        q, context, out, heads, positions, width, chunks,
        q_b, q_n, q_d, q_h, q_w, o_b, o_n, o_d, o_h, o_w,
        Q_ORDER: tl.constexpr, Q_V: tl.constexpr, O_ORDER: tl.constexpr, O_V: tl.constexpr,
        DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
        INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    """The product of P queries with the contexts of a block of heads."""
    image, first, used = _block_of_heads(tl.program_id(0) // chunks, heads, DEPTH, USED, C)
    p = tl.program_id(0) % chunks * P + tl.arange(0, P)
    exists = (p < positions)[:, None] & used[None, :]
    at = _pixels(q, image, first, p, width, q_b, q_n, q_d, q_h, q_w, Q_ORDER, Q_V, DEPTH, C, INDEX)
    query = tl.load(at, mask=exists, other=0.)
    at, same = _own_head(first, image, heads, DEPTH, USED, C)
    factors = tl.load(context + at, mask=same, other=0.).to(query.dtype)
    total = tl.dot(query, factors, input_precision=PRECISION).to(out.dtype.element_ty)
    at = _pixels(out, image, first, p, width, o_b, o_n, o_d, o_h, o_w, O_ORDER, O_V, DEPTH, C, INDEX)
    tl.store(at, total, mask=exists)


@_kernel
def _content_backward(
        k, v, g, context, grad_context, lse, delta, dq, dk, dv, heads, positions, width, chunks,
        k_b, k_n, k_d, k_h, k_w, v_b, v_n, v_d, v_h, v_w, g_b, g_n, g_d, g_h, g_w,
        dq_b, dq_n, dq_d, dq_h, dq_w, dk_b, dk_n, dk_d, dk_h, dk_w, dv_b, dv_n, dv_d, dv_h, dv_w,
        K_ORDER: tl.constexpr, K_V: tl.constexpr, V_ORDER: tl.constexpr, V_V: tl.constexpr,
        G_ORDER: tl.constexpr, G_V: tl.constexpr, DQ_ORDER: tl.constexpr, DQ_V: tl.constexpr,
        DK_ORDER: tl.constexpr, DK_V: tl.constexpr, DV_ORDER: tl.constexpr, DV_V: tl.constexpr,
        DEPTH: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
        INDEX: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients at P positions. `delta`: for each key channel, the sum of its weights times their gradients.

    ADD: the gradient of the query is added to what `dq` holds.
    """
    image, first, used = _block_of_heads(tl.program_id(0) // chunks, heads, DEPTH, USED, C)
    p = tl.program_id(0) % chunks * P + tl.arange(0, P)
    exists = (p < positions)[:, None] & used[None, :]
    at = _pixels(k, image, first, p, width, k_b, k_n, k_d, k_h, k_w, K_ORDER, K_V, DEPTH, C, INDEX)
    weight = tl.load(at, mask=exists, other=0.).to(tl.float32)
    at = _pixels(v, image, first, p, width, v_b, v_n, v_d, v_h, v_w, V_ORDER, V_V, DEPTH, C, INDEX)
    value = tl.load(at, mask=exists, other=0.)
    at = _pixels(g, image, first, p, width, g_b, g_n, g_d, g_h, g_w, G_ORDER, G_V, DEPTH, C, INDEX)
    grad = tl.load(at, mask=exists, other=0.).to(value.dtype)
    channel = image * heads * DEPTH + first + tl.arange(0, C)
    weight = tl.exp(weight - tl.load(lse + channel, mask=used, other=0.)[None, :])
    weight = tl.where(exists, weight, 0.)

    at, same = _own_head(first, image, heads, DEPTH, USED, C)
    factors = tl.load(context + at, mask=same, other=0.).to(value.dtype)
    grad_query = tl.dot(grad, tl.trans(factors), input_precision=PRECISION)
    factors = tl.load(grad_context + at, mask=same, other=0.).to(value.dtype)
    grad_value = tl.dot(weight.to(value.dtype), factors, input_precision=PRECISION)
    grad_key = tl.dot(value, tl.trans(factors), input_precision=PRECISION)
    grad_key = weight * (grad_key - tl.load(delta + channel, mask=used, other=0.)[None, :])

    at = _pixels(dq, image, first, p, width, dq_b, dq_n, dq_d, dq_h, dq_w, DQ_ORDER, DQ_V, DEPTH, C, INDEX)
    if ADD:
        grad_query += tl.load(at, mask=exists, other=0.).to(tl.float32)
    tl.store(at, grad_query.to(dq.dtype.element_ty), mask=exists)
    at = _pixels(dk, image, first, p, width, dk_b, dk_n, dk_d, dk_h, dk_w, DK_ORDER, DK_V, DEPTH, C, INDEX)
    tl.store(at, grad_key.to(dk.dtype.element_ty), mask=exists)
    at = _pixels(dv, image, first, p, width, dv_b, dv_n, dv_d, dv_h, dv_w, DV_ORDER, DV_V, DEPTH, C, INDEX)
    tl.store(at, grad_value.to(dv.dtype.element_ty), mask=exists)


# How maps lie in memory, and what sizes follow.


class _Maps(NamedTuple):
    """Arguments of a kernel for its maps (B, heads, d, H, W): strides, in the order of the maps, and constants."""

    strides: list[int]
    constants: dict[str, Any]


def _lines_of(**maps: torch.Tensor) -> _Maps:
    """For a kernel of axial steps. Maps are named by their prefixes in the kernel."""
    strides: list[int] = []
    constants: dict[str, Any] = {}
    largest = max(x[:, :, 0].numel() for x in maps.values())  # number of a line
    for name, x in maps.items():
        unit = _is_unit(x)
        layout = layout_of(x, (1, 2) if unit else ())
        strides += layout.steps
        constants |= {f'{name}_UNIT': unit, f'{name}_V': layout.factor}
        largest = max(largest, layout.span)
    return _Maps(strides, constants | {'INDEX': _index(largest)})


def _pixels_of(**maps: torch.Tensor) -> _Maps:
    """For a kernel of the content branch."""
    strides: list[int] = []
    constants: dict[str, Any] = {}
    largest = 0
    for name, x in maps.items():
        order = 'any'
        if x.stride(3) == x.shape[4] * x.stride(4):  # rows follow one another
            order = 'channels' if _is_unit(x) else 'positions' if x.stride(4) == 1 else 'any'
        if order != 'any':
            x = x.flatten(3).unsqueeze(3)  # a single row, as the kernel takes it
        layout = layout_of(x, {'channels': (1, 2), 'positions': (3, 4), 'any': ()}[order])
        strides += layout.steps
        constants |= {f'{name}_ORDER': order, f'{name}_V': layout.factor}
        largest = max(largest, layout.span)
    return _Maps(strides, constants | {'INDEX': _index(largest)})


def _index(largest: int) -> Any:
    """Type of numbers up to this one, and of some more beyond the borders of maps."""
    return tl.int32 if largest < 2 ** 30 else tl.int64


def _is_unit(x: torch.Tensor) -> bool:
    """True if the channels of all heads lie one after another in memory."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _precision() -> str:
    """How factors of float32 products are rounded; those of half precision are exact in any case."""
    return 'tf32' if allows_tf32() else 'ieee'


def _line_sizes(query: torch.Tensor, value: torch.Tensor, block: int = _BLOCK) -> dict[str, Any]:
    depth, value_depth, length = query.shape[2], value.shape[2], query.shape[3]
    size = max(16, min(block, triton.next_power_of_2(length)))
    return dict(
        DEPTH=depth, D=max(16, triton.next_power_of_2(depth)),
        VDEPTH=value_depth, E=max(16, triton.next_power_of_2(value_depth)),
        B=size, SINGLE=length <= size, PRECISION=_precision(),
        num_warps=4 if size > _BLOCK or (length > _BLOCK and max(depth, value_depth) > 16) else 1,
    )


def _embeds_first(query: torch.Tensor, value: torch.Tensor) -> bool:
    """True if embeddings go into the product with the values before the queries do.

    out[x] = sum over d of query[x, d] * (sum over i of table[i - x, d] * value[i]) has d / 2 times as many
    multiply-adds, but in products of which one side is the same for all lines, with nothing to be picked from logits.
    """
    depth, length = value.shape[2], query.shape[3]
    return length > _BLOCK and query.shape[2] <= 8 and depth == 8 and query.dtype != torch.float32


def _tile_sizes(query: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    heads, depth = value.shape[1:3]
    lines = 128 // depth
    return dict(
        DEPTH=query.shape[2], E=depth, B=_TILE, LINES=lines, HEADS=math.gcd(lines, heads), PRECISION=_precision(),
        num_warps=4,
    )


def _head_sizes(x: torch.Tensor) -> dict[str, Any]:
    depth = x.shape[2]
    used = max(1, 16 // depth) * depth  # channels of whole heads
    return dict(
        DEPTH=depth, USED=used, C=max(16, triton.next_power_of_2(used)), P=128 if used <= 32 else 64,
        PRECISION=_precision(), num_warps=4 if used <= 64 else 8,
    )


# Launches.


def attend(
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
        context: torch.Tensor | None = None,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The column step.

    Args:
        query: Map of shape (B, heads, d, H, W).
        value: Map of shape (B, heads, e, H, W) and the dtype of `query`.
        table: Embeddings of shape (2 * H - 1, d). As factors of products they are rounded to the dtype of `query`.
        context: Matrices of shape (B, heads, d, e), float32; their products with the queries are added.
        affine: Factor and summand of each channel, (heads * e,), which are applied to the result.

    Returns:
        Map of shape (B, heads, e, H, W) and the dtype of `value`.
    """
    out = torch.empty_like(value)
    batch, heads, _, length, across = query.shape
    if out.numel() == 0:
        return out
    branches: dict[str, Any] = dict(CONTENT=context is not None, AFFINE=affine is not None)
    more = table if context is None else context, *(affine or (table, table))
    maps = _lines_of(Q=query, V=value, O=out)
    with torch.cuda.device_of(query):
        if _embeds_first(query, value):
            sizes = _tile_sizes(query, value)
            blocks = triton.cdiv(length, _TILE)
            tiles = batch * triton.cdiv(across, sizes['LINES'] // sizes['HEADS']) * (heads // sizes['HEADS'])
            _attend_tiles[grid_of(tiles * blocks)](
                query, value, _embedding(table, length, query.dtype), *more, out, heads, across, length, blocks,
                *maps.strides, **maps.constants, **sizes, **branches,
            )
        else:
            lines, sizes = batch * heads * across, _line_sizes(query, value)
            _attend[grid_of(triton.cdiv(lines, _EACH))](
                query, value, table.contiguous(), *more, out,
                lines, _EACH, heads, across, length, triton.cdiv(length, sizes['B']),
                *maps.strides, **maps.constants, **sizes, **branches,
            )
    return out


def _embedding(table: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """(d, L, L) embeddings of the offsets i - x, [d, x, i]; 0 up to whole blocks."""
    depth, padded = table.shape[1], triton.cdiv(length, _TILE) * _TILE
    out = table.new_empty(depth, padded, padded, dtype=dtype)
    count, each = out.numel(), 1024
    _unfold[grid_of(triton.cdiv(count, each))](
        table.contiguous(), out, count, length, padded, DEPTH=depth, N=each, INDEX=_index(count))
    return out


def attend_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend` to query, value and table, each of its dtype, from that of its result."""
    batch, heads, depth, length, across = query.shape
    lines = batch * heads * across
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    if lines == 0:
        return grad_query, grad_value, torch.zeros_like(table)
    # One block of 64 where shared memory of any device holds it, as sums over several go through memory.
    twice = query.dtype != torch.float32 and max(depth, value.shape[2]) <= 16
    sizes = _line_sizes(query, value, 2 * _BLOCK if twice else _BLOCK)
    blocks, each = triton.cdiv(length, sizes['B']), triton.cdiv(lines, _PROGRAMS)
    programs = triton.cdiv(lines, each)
    new = query.new_empty if blocks == 1 else query.new_zeros
    partial = new(programs, 2 * blocks - 1, 2 * sizes['B'], sizes['D'], dtype=torch.float32)
    value_sums = grad_value if blocks == 1 else torch.zeros_like(value, dtype=torch.float32)
    maps = _lines_of(Q=query, V=value, G=grad, DQ=grad_query, DV=value_sums)
    with torch.cuda.device_of(query):
        _attend_backward[grid_of(programs)](
            query, value, grad, table.contiguous(), grad_query, value_sums, partial,
            lines, each, heads, across, length, blocks, *maps.strides, **maps.constants, **sizes,
        )
    if blocks > 1:
        grad_value.copy_(value_sums)
    return grad_query, grad_value, _table_gradient(partial.sum(0), length, depth).to(table.dtype)


def _table_gradient(sums: torch.Tensor, length: int, depth: int) -> torch.Tensor:
    """(2 * L - 1, d) from the sums (2 * blocks - 1, 2 * size, D) of pairs of blocks at each distance."""
    slots, size = sums.shape[0], sums.shape[1] // 2
    # Slot s holds the offsets from (s - blocks) * size + 1 on.
    out = sums.new_zeros((slots + 1) * size, sums.shape[2])
    for slot in range(slots):
        out[slot * size:(slot + 2) * size] += sums[slot]
    first = (slots + 1) // 2 * size - length
    return out[first:first + 2 * length - 1, :depth]


class _Context(NamedTuple):
    """Sums over the positions of maps, float32.

    matrices: Of weight value^T or softmax(weight) value^T, (B, heads, d, d).
    lse: log sum exp of the weights of each channel, (B, heads, d), where there is a softmax.
    """

    matrices: torch.Tensor
    lse: torch.Tensor


def _contexts(weight: torch.Tensor, value: torch.Tensor, softmax: bool) -> _Context:
    batch, heads, depth, height, width = value.shape
    sizes = _head_sizes(value)
    if sizes['C'] <= 32:
        sizes['num_warps'] = 2
    blocks = batch * triton.cdiv(heads * depth, sizes['USED'])
    splits, per_split = _splits(blocks, height * width, sizes['P'])
    matrices = value.new_empty(splits, batch, heads, depth, depth, dtype=torch.float32)
    lse = value.new_empty(splits, batch, heads, depth, dtype=torch.float32)
    maps = _pixels_of(W=weight, V=value)
    with torch.cuda.device_of(value):
        _context[grid_of(blocks * splits)](
            weight, value, matrices, lse, batch, heads, height * width, width, splits, per_split,
            *maps.strides, **maps.constants, **sizes, SOFTMAX=softmax, num_stages=2,
        )
        if splits == 1:
            return _Context(matrices[0], lse[0])
        merged, rows, each = _Context(torch.empty_like(matrices[0]), torch.empty_like(lse[0])), lse[0].numel(), 16
        _merge[grid_of(triton.cdiv(rows, each))](
            matrices, lse, *merged, rows, splits,
            DEPTH=depth, D=triton.next_power_of_2(depth), R=each, SOFTMAX=softmax, num_warps=1,
        )
    return merged


def _splits(blocks: int, positions: int, step: int) -> tuple[int, int]:
    """Programs that share the positions of an image, and positions of each: whole steps, two at least."""
    splits = min(triton.cdiv(_CONTEXTS, blocks), triton.cdiv(positions, 2 * step))
    per_split = triton.cdiv(triton.cdiv(positions, splits), step) * step
    return triton.cdiv(positions, per_split), per_split


def content(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Content attention of query, key and value (B, heads, d, H, W), of equal dtypes."""
    out = torch.empty_like(value)
    if out.numel() == 0:
        return out
    context, sizes, maps = _contexts(key, value, softmax=True), _head_sizes(value), _pixels_of(Q=query, O=out)
    grid, extent = _pixel_grid(value, sizes)
    with torch.cuda.device_of(query):
        _content[grid](query, context.matrices, out, *extent, *maps.strides, **maps.constants, **sizes)
    return out


def _pixel_grid(x: torch.Tensor, sizes: dict[str, Any]) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """Grid of a kernel that takes P positions and a block of heads; heads, positions, width, and chunks of an image."""
    batch, heads, depth, height, width = x.shape
    chunks = triton.cdiv(height * width, sizes['P'])
    grid = grid_of(batch * triton.cdiv(heads * depth, sizes['USED']) * chunks)
    return grid, (heads, height * width, width, chunks)


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
    context, grad_context = _contexts(key, value, softmax=True), _contexts(query, grad, softmax=False).matrices
    delta = (context.matrices * grad_context).sum(-1)
    sizes = _head_sizes(value)
    grid, extent = _pixel_grid(value, sizes)
    maps = _pixels_of(K=key, V=value, G=grad, DQ=grads[0], DK=grads[1], DV=grads[2])
    with torch.cuda.device_of(query):
        _content_backward[grid](
            key, value, grad, context.matrices, grad_context, context.lse, delta, *grads, *extent,
            *maps.strides, **maps.constants, **sizes, ADD=add,
        )
    return grads


def gather(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> torch.Tensor:
    """Content, and the row step of what the column step gave, of query, key, value, column (B, heads, d, H, W)."""
    if value.numel() == 0:
        return torch.empty_like(value)
    context = _contexts(key, value, softmax=True).matrices
    return attend(query.mT, column.mT, table, context=context).mT


def gather_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        column: torch.Tensor,
        table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `gather` to its five tensors from that of its result."""
    grad_query, grad_column, grad_table = attend_backward(grad.mT, query.mT, column.mT, table)
    grads = content_backward(grad, query, key, value, grad_query.mT)
    return *grads, grad_column.mT, grad_table


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

"""The networks of `timm_gsa.ops.san` on a GPU: Triton kernels that keep every relation in registers.

Plain functions on tensors that launch kernels; operators and their derivatives are for the caller. With
a = relu(query - key of a place), h = folded [a; 1] and dy the gradient of h:

    rectified_moments             sum [a; 1] [a; 1]^T
    difference_logits             weight2 relu(h) + bias2
    difference_products           sum grad relu(h)^T, sum dy [a; 1]^T, sum grad, for dy = weight2^T grad where h > 0
    difference_input_gradients    da = back dy - correction [a; 1] where a > 0, summed over places (query) and over
                                  the positions that see a key (padded)

and with z = scale_k * key + shift_k at place k:

    patch_hidden                  sum over k of weight_k relu(z)
    patch_gradients               of padded: sum over k of scale_k * (weight_k^T grad where z > 0). Of the others from
                                  sums over positions of grad 1[z > 0]^T and of grad (key 1[z > 0])^T alone

A program holds P positions with all their channels and goes through the places; what it multiplies is padded to powers
of two, or to one and 16 more where that is less: SAN's pairwise networks have 2^n channels and 2 of the position.
Gradients of keys are gathered over the padded map, which takes no atomic sums; sums over positions go to a buffer of
one matrix for each program, which PyTorch adds. So every result is the same whenever it is computed again.

Bytes. Maps and their gradients are read and written once, but for what the first-level cache does not keep of
neighbouring rows; the logits, K * K * G numbers a position, are most of them. They lie with groups innermost, then
places, which is how `timm_gsa.ops.aggregation` reads them fastest.

Matrices may have another floating-point type than the maps. Factors of products are rounded to the type of weight2, so
that differences of float32 maps are exact before; those of patches to that of the keys. Sums are float32.

Loads are of 16 bytes where channels are innermost in memory, and these and all strides are multiples of 16 bytes. To
18 channels a caller may add 6 that are zero, with columns of zeros in the matrices: that saves a fourth of the
registers and a seventh of the instructions.
"""
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._backend import allows_tf32
from .._kernels import grid_of, layout_of

__all__ = [
    'difference_input_gradients',
    'difference_logits',
    'difference_memory',
    'difference_products',
    'patch_gradients',
    'patch_hidden',
    'patch_memory',
    'rectified_moments',
]

_PROGRAMS = 4096  # at most so many leave a matrix of sums each: several for every one that a GPU runs at once
_BUFFER = 2 ** 23  # numbers that those matrices may hold together

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Sizes and strides, none of which is worth another compilation.
_NUMBERS = (
    'count', 'height', 'width', 'positions', 'tiles', 'batch', 'per_program', 'places',
    'q_b', 'q_c', 'q_h', 'q_w', 'k_b', 'k_c', 'k_h', 'k_w', 'g_b', 'g_c', 'g_p', 'g_h', 'g_w',
)


@triton.jit
def _rows(tile, count, height, width, P: tl.constexpr, INDEX: tl.constexpr):
    """The P positions (image, row, column) of a tile, and which exist; the others repeat the last one."""
    n = tl.full([], P, INDEX) * tile + tl.arange(0, P)
    exists = n < count
    n = tl.minimum(n, count - 1)
    line = n // width
    return n.to(tl.int64), (line // height).to(tl.int64), line % height, n % width, exists


@triton.jit
def _offsets(image, y, x, stride_b, stride_h, stride_w, V: tl.constexpr):
    return (image * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w) * V


@triton.jit
def _step(place, stride_h, stride_w, V: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """From a position to what it sees at a place of the padded map, in numbers of memory."""
    return (stride_h.to(tl.int64) * (place // K * D) + stride_w.to(tl.int64) * (place % K * D)) * V


@triton.jit
def _piece(i: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr):
    """Channels of the i-th piece: 0 to CB - 1, then REST more."""
    if i == 0:
        c = tl.arange(0, CB)
    else:
        c = CB + tl.arange(0, REST)
    return c


@triton.jit
def _load(base, rows, c, stride_c, mask, UNIT: tl.constexpr, OTHER: tl.constexpr = 0.):
    """Tile (P, channels) of a map."""
    if UNIT:
        at = rows[:, None] + c[None, :]
    else:
        at = rows[:, None] + c[None, :].to(tl.int64) * stride_c
    return tl.load(base + at, mask=mask, other=OTHER)


@triton.jit
def _matrix(base, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, stride_row, stride_column):
    """Tile of a matrix, 0 beyond its rows and columns."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(base + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=mask, other=0.)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0., propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rectified(query, key):
    return _relu(query.to(tl.float32) - key.to(tl.float32))


@triton.jit
def _tiles(base, rows, stride_c, UNIT: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr):
    """Pieces (P, channels) of a map, 0 beyond its channels."""
    tiles = ()
    for i in tl.static_range(1 + (REST > 0)):
        c = _piece(i, CB, REST)
        tiles = tiles + (_load(base, rows, c, stride_c, (c < C)[None, :], UNIT),)
    return tiles


@triton.jit
def _with_one(tiles, exists, C: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr):
    """Queries with a 1 after their channels, of which all rectifiers leave 0 where no position exists."""
    new = ()
    for i in tl.static_range(1 + (REST > 0)):
        tile = tl.where((_piece(i, CB, REST) == C)[None, :], 1., tiles[i].to(tl.float32))
        new = new + (tl.where(exists[:, None], tile, -float('inf')),)
    return new


@triton.jit
def _first_layer(
        folded, dtype: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr, MB: tl.constexpr,
):
    """Pieces (channels, MB) of a matrix (M, C + 1), and its last column as a row of summands."""
    m = tl.arange(0, MB)
    factors = ()
    for i in tl.static_range(1 + (REST > 0)):
        factors = factors + (_matrix(folded, _piece(i, CB, REST), m, C, M, 1, C + 1).to(dtype),)
    return factors, tl.load(folded + m * (C + 1) + C, mask=m < M, other=0.).to(tl.float32)[None, :]


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _hidden(pieces, factors, summands, P: tl.constexpr, MB: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr):
    hidden = tl.broadcast_to(summands, [P, MB])
    for i in tl.static_range(1 + (REST > 0)):
        hidden = _dot(pieces[i], factors[i], hidden, PRECISION)
    return hidden


@triton.jit
def _relations(queries, keys, dtype: tl.constexpr, REST: tl.constexpr):
    """Pieces (P, channels) of relu(query - key), as factors of products."""
    pieces = ()
    for i in tl.static_range(1 + (REST > 0)):
        pieces = pieces + (_rectified(queries[i], keys[i]).to(dtype),)
    return pieces


@triton.jit
def _grad_hidden(grad, second, hidden, P: tl.constexpr, MB: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient (P, MB) of what the second rectifier is applied to, from that of the logits (P, GB)."""
    return tl.where(hidden > 0, _dot(grad, second, tl.zeros([P, MB], tl.float32), PRECISION), 0.)


@triton.jit(do_not_specialize=_NUMBERS)
def _rectified_moments(
        query, padded, sums, count, height, width, tiles, places,
        q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
        DTYPE: tl.constexpr,
):
    start = tl.program_id(1) * places
    stop = tl.minimum(start + places, K * K)
    main = tl.zeros([CB, CB], tl.float32)
    if REST:
        beside = tl.zeros([CB, REST], tl.float32)
        rest = tl.zeros([REST, REST], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, image, y, x, exists = _rows(tile, count, height, width, P, INDEX)
        queries = _tiles(query, _offsets(image, y, x, q_b, q_h, q_w, Q_V), q_c, Q_UNIT, C, CB, REST)
        queries = _with_one(queries, exists, C, CB, REST)
        keys_at = _offsets(image, y, x, k_b, k_h, k_w, K_V)
        for place in range(start, stop):
            keys = _tiles(padded + _step(place, k_h, k_w, K_V, K, D), keys_at, k_c, K_UNIT, C, CB, REST)
            a = _rectified(queries[0], keys[0]).to(DTYPE)
            main = _dot(tl.trans(a), a, main, PRECISION)
            if REST:
                b = _rectified(queries[1], keys[1]).to(DTYPE)
                beside = _dot(tl.trans(a), b, beside, PRECISION)
                rest = _dot(tl.trans(b), b, rest, PRECISION)
    sums += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * ((C + 1) * (C + 1))
    i = tl.arange(0, CB)[:, None]
    j = tl.arange(0, CB)[None, :]
    tl.store(sums + i * (C + 1) + j, main, mask=(i <= C) & (j <= C))
    if REST:
        j = CB + tl.arange(0, REST)[None, :]
        tl.store(sums + i * (C + 1) + j, beside, mask=j <= C)
        tl.store(sums + j * (C + 1) + i, beside, mask=j <= C)
        i = CB + tl.arange(0, REST)[:, None]
        tl.store(sums + i * (C + 1) + j, rest, mask=(i <= C) & (j <= C))


@triton.jit(do_not_specialize=_NUMBERS)
def _difference_logits(
        query, padded, out, folded, weight2, bias2, count, height, width, places,
        q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
        CB: tl.constexpr, REST: tl.constexpr, MB: tl.constexpr, GB: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = weight2.dtype.element_ty
    n, image, y, x, exists = _rows(tl.program_id(0), count, height, width, P, INDEX)
    queries = _tiles(query, _offsets(image, y, x, q_b, q_h, q_w, Q_V), q_c, Q_UNIT, C, CB, REST)
    keys_at = _offsets(image, y, x, k_b, k_h, k_w, K_V)
    factors, summands = _first_layer(folded, dtype, C, M, CB, REST, MB)
    g = tl.arange(0, GB)
    second = _matrix(weight2, tl.arange(0, MB), g, M, G, 1, M).to(dtype)
    last = tl.broadcast_to(tl.load(bias2 + g, mask=g < G, other=0.).to(tl.float32)[None, :], [P, GB])
    results = out + (n * (K * K * G))[:, None] + g[None, :]
    keep = exists[:, None] & (g < G)[None, :]
    start = tl.program_id(1) * places
    for place in range(start, tl.minimum(start + places, K * K)):
        keys = _tiles(padded + _step(place, k_h, k_w, K_V, K, D), keys_at, k_c, K_UNIT, C, CB, REST)
        hidden = _relu(_hidden(_relations(queries, keys, dtype, REST), factors, summands, P, MB, REST, PRECISION))
        logits = _dot(hidden.to(dtype), second, last, PRECISION)
        tl.store(results + place * G, logits.to(dtype), mask=keep)


@triton.jit(do_not_specialize=_NUMBERS)
def _difference_products(
        grad, query, padded, sums_weight2, sums_bias2, sums, folded, weight2,
        count, height, width, tiles, places,
        g_b, g_c, g_p, g_h, g_w, q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w,
        G_UNIT: tl.constexpr, G_V: tl.constexpr,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
        CB: tl.constexpr, REST: tl.constexpr, MB: tl.constexpr, GB: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = weight2.dtype.element_ty
    factors, summands = _first_layer(folded, dtype, C, M, CB, REST, MB)
    g = tl.arange(0, GB)
    m = tl.arange(0, MB)
    second = _matrix(weight2, g, m, G, M, M, 1).to(dtype)
    products = (tl.zeros([MB, CB], tl.float32),)
    if REST:
        products = products + (tl.zeros([MB, REST], tl.float32),)
    grad_weight2 = tl.zeros([GB, MB], tl.float32)
    grad_bias2 = tl.zeros([P, GB], tl.float32)
    start = tl.program_id(1) * places
    stop = tl.minimum(start + places, K * K)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, image, y, x, exists = _rows(tile, count, height, width, P, INDEX)
        queries = _tiles(query, _offsets(image, y, x, q_b, q_h, q_w, Q_V), q_c, Q_UNIT, C, CB, REST)
        queries = _with_one(queries, exists, C, CB, REST)
        keys_at = _offsets(image, y, x, k_b, k_h, k_w, K_V)
        grads_at = _offsets(image, y, x, g_b, g_h, g_w, G_V)
        keep = exists[:, None] & (g < G)[None, :]
        for place in range(start, stop):
            keys = _tiles(padded + _step(place, k_h, k_w, K_V, K, D), keys_at, k_c, K_UNIT, C, CB, REST)
            pieces = _relations(queries, keys, dtype, REST)
            hidden = _hidden(pieces, factors, summands, P, MB, REST, PRECISION)
            d = _load(grad + g_p.to(tl.int64) * place * G_V, grads_at, g, g_c, keep, G_UNIT)
            grad_bias2 += d.to(tl.float32)
            d = d.to(dtype)
            grad_hidden = tl.trans(_grad_hidden(d, second, hidden, P, MB, PRECISION).to(dtype))
            grad_weight2 = _dot(tl.trans(d), _relu(hidden).to(dtype), grad_weight2, PRECISION)
            new = ()
            for i in tl.static_range(1 + (REST > 0)):
                new = new + (_dot(grad_hidden, pieces[i], products[i], PRECISION),)
            products = new
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    for i in tl.static_range(1 + (REST > 0)):
        c = _piece(i, CB, REST)
        at = sums + program * (M * (C + 1)) + m[:, None] * (C + 1) + c[None, :]
        tl.store(at, products[i], mask=(m < M)[:, None] & (c <= C)[None, :])
    at = sums_weight2 + program * (G * M) + g[:, None] * M + m[None, :]
    tl.store(at, grad_weight2, mask=(g < G)[:, None] & (m < M)[None, :])
    tl.store(sums_bias2 + program * G + g, tl.sum(grad_bias2, 0), mask=g < G)


@triton.jit
def _is_inside(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _tiles_or(
        base, rows, stride_c, exists, other: tl.constexpr,
        UNIT: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr,
):
    """`_tiles` with another number where a position does not exist, and beyond the channels."""
    tiles = ()
    for i in tl.static_range(1 + (REST > 0)):
        c = _piece(i, CB, REST)
        tiles = tiles + (_load(base, rows, c, stride_c, exists[:, None] & (c < C)[None, :], UNIT, other),)
    return tiles


@triton.jit
def _masked_relations(queries, keys, dtype: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr):
    """`_relations`, kept for the mask of their gradients."""
    pieces = ()
    for i in tl.static_range(1 + (REST > 0)):
        a = _rectified(queries[i], keys[i])
        # Changes nothing, but keeps Triton from computing all of `a` anew for the mask.
        a = tl.where((_piece(i, CB, REST) >= 0)[None, :], a, 0.)
        pieces = pieces + (a.to(dtype),)
    return pieces


@triton.jit
def _back(
        back, dtype: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr, MB: tl.constexpr, P: tl.constexpr,
):
    """Sums (P, channels) of 0, and pieces (MB, channels) of the matrix (C, M) from gradients of hidden channels."""
    sums = (tl.zeros([P, CB], tl.float32),)
    if REST:
        sums = sums + (tl.zeros([P, REST], tl.float32),)
    backs = ()
    for i in tl.static_range(1 + (REST > 0)):
        backs = backs + (_matrix(back, tl.arange(0, MB), _piece(i, CB, REST), M, C, 1, M).to(dtype),)
    return sums, backs


@triton.jit
def _correction(
        correction, dtype: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, REST: tl.constexpr,
):
    """Pieces (channels, channels) of a matrix (C, C + 1) with its sign changed, and its last column as rows."""
    slopes = ()
    constants = ()
    for i in tl.static_range(1 + (REST > 0)):
        c = _piece(i, CB, REST)
        constant = -tl.load(correction + c * (C + 1) + C, mask=c < C, other=0.).to(tl.float32)
        constants = constants + (constant[None, :],)
        for j in tl.static_range(1 + (REST > 0)):
            slope = _matrix(correction, _piece(j, CB, REST), c, C, C, 1, C + 1)
            slopes = slopes + ((-slope).to(dtype),)
    return slopes, constants


@triton.jit
def _with_place(
        sums, pieces, grad_hidden, backs, slopes, constants,
        REST: tl.constexpr, CORRECTED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds to the sums the gradients of the relations `pieces` of one place, where they pass the rectifier."""
    PIECES: tl.constexpr = 1 + (REST > 0)
    new = ()
    for i in tl.static_range(PIECES):
        da = tl.zeros_like(sums[i])
        if CORRECTED:
            da += constants[i]
            for j in tl.static_range(PIECES):
                da = _dot(pieces[j], slopes[i * PIECES + j], da, PRECISION)
        da = _dot(grad_hidden, backs[i], da, PRECISION)
        new = new + (sums[i] + tl.where(pieces[i].to(tl.float32) > 0, da, 0.),)
    return new


@triton.jit(do_not_specialize=_NUMBERS)
def _difference_input_gradient(
        grad, query, padded, out, folded, weight2, back, correction,
        count, height, width,
        g_b, g_c, g_p, g_h, g_w, q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w,
        G_UNIT: tl.constexpr, G_V: tl.constexpr,
        Q_UNIT: tl.constexpr, Q_V: tl.constexpr, K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
        CB: tl.constexpr, REST: tl.constexpr, MB: tl.constexpr, GB: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
        OF_KEY: tl.constexpr, CORRECTED: tl.constexpr,
):
    """Of the query, or of the padded key, each position of which gathers from those that see it."""
    dtype: tl.constexpr = weight2.dtype.element_ty
    PIECES: tl.constexpr = 1 + (REST > 0)
    PAD: tl.constexpr = (K - 1) * D * OF_KEY
    n, image, y, x, exists = _rows(tl.program_id(0), count, height + PAD, width + PAD, P, INDEX)
    queries_at = _offsets(image, y, x, q_b, q_h, q_w, Q_V)
    keys_at = _offsets(image, y, x, k_b, k_h, k_w, K_V)
    grads_at = _offsets(image, y, x, g_b, g_h, g_w, G_V)
    g = tl.arange(0, GB)
    factors, summands = _first_layer(folded, dtype, C, M, CB, REST, MB)
    second = _matrix(weight2, g, tl.arange(0, MB), G, M, M, 1).to(dtype)
    sums, backs = _back(back, dtype, C, M, CB, REST, MB, P)
    slopes, constants = backs, backs  # neither is read without a correction
    if CORRECTED:
        slopes, constants = _correction(correction, dtype, C, CB, REST)
    if OF_KEY:
        own = _tiles(padded, keys_at, k_c, K_UNIT, C, CB, REST)
    else:
        own = _tiles(query, queries_at, q_c, Q_UNIT, C, CB, REST)
    for place in range(K * K):
        inside = exists
        d_at = grad + g_p.to(tl.int64) * place * G_V
        if OF_KEY:
            d_at -= _step(place, g_h, g_w, G_V, K, D)
            inside = exists & _is_inside(y - place // K * D, x - place % K * D, height, width)
            others = query - _step(place, q_h, q_w, Q_V, K, D)
            # Nothing passes the rectifier where no position sees the key.
            queries = _tiles_or(others, queries_at, q_c, inside, -float('inf'), Q_UNIT, C, CB, REST)
            pieces = _masked_relations(queries, own, dtype, CB, REST)
        else:
            others = padded + _step(place, k_h, k_w, K_V, K, D)
            pieces = _masked_relations(own, _tiles(others, keys_at, k_c, K_UNIT, C, CB, REST), dtype, CB, REST)
        hidden = _hidden(pieces, factors, summands, P, MB, REST, PRECISION)
        d = _load(d_at, grads_at, g, g_c, inside[:, None] & (g < G)[None, :], G_UNIT).to(dtype)
        grad_hidden = _grad_hidden(d, second, hidden, P, MB, PRECISION).to(dtype)
        sums = _with_place(sums, pieces, grad_hidden, backs, slopes, constants, REST, CORRECTED, PRECISION)
    for i in tl.static_range(PIECES):
        c = _piece(i, CB, REST)
        result = (sums[i] * (1 - 2 * OF_KEY)).to(out.dtype.element_ty)
        tl.store(out + (n * C)[:, None] + c[None, :], result, mask=exists[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
def _patch_hidden(
        padded, out, scale, shift, weight, count, height, width,
        k_b, k_c, k_h, k_w,
        K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, MB: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    """scale, shift: (K * K, C). weight: (K * K, C, M)."""
    dtype: tl.constexpr = padded.dtype.element_ty
    n, image, y, x, exists = _rows(tl.program_id(0), count, height, width, P, INDEX)
    keys_at = _offsets(image, y, x, k_b, k_h, k_w, K_V)
    c = tl.arange(0, CB)
    m = tl.arange(0, MB)
    hidden = tl.zeros([P, MB], tl.float32)
    for place in range(K * K):
        key = _load(padded + _step(place, k_h, k_w, K_V, K, D), keys_at, c, k_c, (c < C)[None, :], K_UNIT)
        factor = tl.load(scale + place * C + c, mask=c < C, other=0.).to(tl.float32)[None, :]
        summand = tl.load(shift + place * C + c, mask=c < C, other=0.).to(tl.float32)[None, :]
        rectified = _relu(tl.fma(key.to(tl.float32), factor, summand)).to(dtype)
        factors = _matrix(weight + place * (C * M), c, m, C, M, M, 1).to(dtype)
        hidden = _dot(rectified, factors, hidden, PRECISION)
    at = out + (n * M)[:, None] + m[None, :]
    tl.store(at, hidden.to(out.dtype.element_ty), mask=exists[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
def _patch_input_gradient(
        grad, padded, out, scale, shift, weight, count, height, width,
        g_b, g_c, g_h, g_w, k_b, k_c, k_h, k_w,
        G_UNIT: tl.constexpr, G_V: tl.constexpr, K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, MB: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    """scale, shift: (K * K, C). weight: (K * K, M, C)."""
    dtype: tl.constexpr = padded.dtype.element_ty
    PAD: tl.constexpr = (K - 1) * D
    n, image, y, x, exists = _rows(tl.program_id(0), count, height + PAD, width + PAD, P, INDEX)
    grads_at = _offsets(image, y, x, g_b, g_h, g_w, G_V)
    c = tl.arange(0, CB)
    m = tl.arange(0, MB)
    key = _load(padded, _offsets(image, y, x, k_b, k_h, k_w, K_V), c, k_c, (c < C)[None, :], K_UNIT).to(tl.float32)
    sums = tl.zeros([P, CB], tl.float32)
    for place in range(K * K):
        inside = _is_inside(y - place // K * D, x - place % K * D, height, width)
        d_at = grad - _step(place, g_h, g_w, G_V, K, D)
        d = _load(d_at, grads_at, m, g_c, inside[:, None] & (m < M)[None, :], G_UNIT).to(dtype)
        factor = tl.load(scale + place * C + c, mask=c < C, other=0.).to(tl.float32)[None, :]
        summand = tl.load(shift + place * C + c, mask=c < C, other=0.).to(tl.float32)[None, :]
        back = _matrix(weight + place * (C * M), m, c, M, C, C, 1).to(dtype)
        grad_rectified = _dot(d, back, tl.zeros([P, CB], tl.float32), PRECISION)
        sums += tl.where(tl.fma(key, factor, summand) > 0, grad_rectified * factor, 0.)
    at = out + (n * C)[:, None] + c[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=exists[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
def _patch_products(
        grad, padded, sums, scale, shift, batch, positions, width, per_program, places,
        g_b, g_c, g_h, g_w, k_b, k_c, k_h, k_w,
        G_UNIT: tl.constexpr, G_V: tl.constexpr, K_UNIT: tl.constexpr, K_V: tl.constexpr,
        C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, MB: tl.constexpr,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):
    """scale, shift: (K * K, C). sums: (programs, K * K, M, C, 2), of grad 1[z > 0]^T and grad (key 1[z > 0])^T.

    A program takes the same P positions of several images, for several places one after another.
    """
    dtype: tl.constexpr = padded.dtype.element_ty
    across = tl.cdiv(positions, P)
    n = (tl.program_id(0) % across).to(INDEX) * P + tl.arange(0, P)
    exists = n < positions
    n = tl.minimum(n, positions - 1)
    first = tl.program_id(0) // across * per_program
    stop = tl.minimum(first + per_program, batch)
    grads_at = _offsets(tl.zeros([P], tl.int64), n // width, n % width, g_b, g_h, g_w, G_V)
    keys_at = _offsets(tl.zeros([P], tl.int64), n // width, n % width, k_b, k_h, k_w, K_V)
    c = tl.arange(0, CB)
    m = tl.arange(0, MB)
    keep = exists[:, None] & (m < M)[None, :]
    both = tl.arange(0, 2 * CB)[None, :]
    sums += tl.program_id(0).to(tl.int64) * (K * K * M * C * 2) + m[:, None] * (C * 2) + both
    written = (m < M)[:, None] & (both < C * 2)
    start = tl.program_id(1) * places
    for place in range(start, tl.minimum(start + places, K * K)):
        factor = tl.load(scale + place * C + c, mask=c < C, other=0.).to(tl.float32)[None, :]
        summand = tl.load(shift + place * C + c, mask=c < C, other=0.).to(tl.float32)[None, :]
        keys = padded + _step(place, k_h, k_w, K_V, K, D)
        products = tl.zeros([MB, 2 * CB], tl.float32)
        for image in range(first, stop):
            d = _load(grad + g_b.to(tl.int64) * image * G_V, grads_at, m, g_c, keep, G_UNIT).to(dtype)
            key = _load(keys + k_b.to(tl.int64) * image * K_V, keys_at, c, k_c, (c < C)[None, :], K_UNIT).to(tl.float32)
            passes = tl.fma(key, factor, summand) > 0
            passing = tl.join(tl.where(passes, 1., 0.), tl.where(passes, key, 0.)).to(dtype)
            products = _dot(tl.trans(d), tl.reshape(passing, [P, 2 * CB]), products, PRECISION)
        tl.store(sums + place * (M * C * 2), products, mask=written)


class _Maps(NamedTuple):
    """Arguments of a kernel for its maps: strides, in the order of the maps, and constants."""

    steps: list[int]
    constants: dict[str, Any]


def _maps(**maps: torch.Tensor) -> _Maps:
    """Of maps with channels along axis 1, by their prefixes in the kernel."""
    steps: list[int] = []
    constants: dict[str, Any] = {}
    for name, x in maps.items():
        unit = x.stride(1) == 1 or x.shape[1] == 1
        layout = layout_of(x, (1,) if unit else ())
        steps += layout.steps
        constants |= {f'{name}_UNIT': unit, f'{name}_V': layout.factor}
    return _Maps(steps, constants)


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


def _pieces(channels: int) -> dict[str, int]:
    """Into what channels are split: a power of two, and 16 more where that is less than the next power."""
    whole = _padded(channels)
    if whole > 32 and channels <= whole // 2 + 16:
        return {'CB': whole // 2, 'REST': 16}
    return {'CB': whole, 'REST': 0}


def _tile(dtype: torch.dtype, width: int, most: int = 128) -> tuple[int, int]:
    """Positions, at most so many, and warps of a program whose widest tile has so many columns."""
    if dtype == torch.float32:  # no tensor cores: each thread multiplies a part of the tile, written out in code
        return 16, 4 if width <= 64 else 8
    return (most, 4) if width <= 32 else (64, 4 if width <= 64 else 8)


def _numbers(count: int) -> dict[str, Any]:
    """Constants: the type of numbers of positions, and how factors of float32 products are rounded."""
    return {'INDEX': tl.int32 if count < 2 ** 30 else tl.int64, 'PRECISION': 'tf32' if allows_tf32() else 'ieee'}


def _split(tiles: int, places: int, numbers: int) -> tuple[int, int]:
    """How many programs share the tiles, and how many places each goes through, where each leaves so many numbers."""
    programs = max(min(tiles, _PROGRAMS, _BUFFER // max(numbers, 1)), 1)
    splits = min(places, triton.cdiv(_PROGRAMS, programs), max(_BUFFER // max(numbers * programs, 1), 1))
    return programs, triton.cdiv(places, splits)


def _launch(
        kernel: Any,
        grid: tuple[int, int],
        tensors: list[torch.Tensor],
        numbers: list[int],
        constants: dict[str, Any],
        warps: int,
) -> None:
    grid_of(grid[0])  # grows with the maps; axis 1 has one program, or some for the places
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, *numbers, **constants, num_warps=warps, num_stages=1)


def _innermost(*maps: torch.Tensor) -> list[torch.Tensor]:
    """The same maps with channels innermost in memory: a copy of a small map costs less than to read it otherwise."""
    return [x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last) for x in maps]


def _empty_map(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    return like.new_empty(len(like), height, width, channels).permute(0, 3, 1, 2)


def difference_memory(channels: int, hidden: int, groups: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory that the kernels of differences take at most, which a device must have for one block.

    They hold all matrices at once. This counts 193 kB for the last stage of SAN in half precision, more than any device
    has in float32, and 71 kB or less for the others in half precision. `shared_memory_per_block_optin` of
    `torch.cuda.get_device_properties` says what exists is.
    """
    c, m, g = sum(_pieces(channels).values()), _padded(hidden), _padded(groups)
    p = _tile(dtype, max(_pieces(channels)['CB'], hidden), most=64)[0]
    return dtype.itemsize * (2 * c * m + m * g + c * c + p * (2 * c + m + g))


def patch_memory(channels: int, hidden: int, dtype: torch.dtype) -> int:
    """`difference_memory` of the kernels of patches."""
    c, m = _padded(channels), _padded(hidden)
    p = _tile(dtype, max(channels, hidden))[0]
    return max(dtype.itemsize * (c * m + 2 * p * (c + m)), 8 * c * m)


def rectified_moments(
        query: torch.Tensor,
        padded: torch.Tensor,
        kernel_size: int,
        dilation: int,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Sum over batch, places and positions of [a; 1] [a; 1]^T for a = relu(query - key of the place).

    Args:
        query: Map of shape (B, C, H, W), float32, bfloat16 or float16, in any layout.
        padded: Keys of shape (B, C, H + 2 * padding, W + 2 * padding), of the same type.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.
        dtype: What differences are rounded to as factors; float32, bfloat16 or float16.

    Returns:
        Matrix (C + 1, C + 1), float64.
    """
    batch, channels, height, width = query.shape
    query, padded = _innermost(query, padded)
    count, places = batch * height * width, kernel_size ** 2
    if count == 0:
        return query.new_zeros(channels + 1, channels + 1, dtype=torch.float64)
    pieces = _pieces(channels + 1)
    p, warps = _tile(dtype, pieces['CB'])
    tiles = triton.cdiv(count, p)
    programs, per_program = _split(tiles, places, (channels + 1) ** 2)
    splits = triton.cdiv(places, per_program)
    sums = query.new_empty(programs * splits, channels + 1, channels + 1, dtype=torch.float32)
    maps = _maps(Q=query, K=padded)
    _launch(
        _rectified_moments, (programs, splits), [query, padded, sums],
        [count, height, width, tiles, per_program, *maps.steps],
        {
            **maps.constants, 'C': channels, **pieces,
            'K': kernel_size, 'D': dilation, 'P': p, **_numbers(count), 'DTYPE': _TYPES[dtype],
        },
        warps,
    )
    return sums.sum(0, dtype=torch.float64)


def difference_logits(
        query: torch.Tensor,
        padded: torch.Tensor,
        folded: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """weight2 relu(folded [a; 1]) + bias2 for a = relu(query - key of the place).

    Args:
        query: Map of shape (B, C, H, W), float32, bfloat16 or float16, in any layout.
        padded: Keys of shape (B, C, H + 2 * padding, W + 2 * padding), of the same type.
        folded: Matrix of shape (M, C + 1).
        weight2: Matrix of shape (G, M), of the type that factors of products are rounded to.
        bias2: Vector of shape (G,).
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Tensor of shape (B, G, K * K, H, W) of the type of weight2, groups innermost in memory, then places.
    """
    batch, channels, height, width = query.shape
    query, padded = _innermost(query, padded)
    hidden, groups, count, places = len(folded), len(weight2), batch * height * width, kernel_size ** 2
    out = query.new_empty(batch, height, width, places, groups, dtype=weight2.dtype)
    if count > 0:
        pieces = _pieces(channels)
        p, warps = _tile(weight2.dtype, max(pieces['CB'], hidden))
        tiles = triton.cdiv(count, p)
        per_program = triton.cdiv(places, min(places, triton.cdiv(_PROGRAMS, 4 * tiles)))
        maps = _maps(Q=query, K=padded)
        _launch(
            _difference_logits, (tiles, triton.cdiv(places, per_program)),
            [query, padded, out, folded.contiguous(), weight2.contiguous(), bias2.contiguous()],
            [count, height, width, per_program, *maps.steps],
            {
                **maps.constants, **_sizes(channels, hidden, groups), **pieces,
                'K': kernel_size, 'D': dilation, 'P': p, **_numbers(count),
            },
            warps,
        )
    return out.permute(0, 4, 3, 1, 2)


def _sizes(channels: int, hidden: int, groups: int) -> dict[str, int]:
    return {'C': channels, 'M': hidden, 'G': groups, 'MB': _padded(hidden), 'GB': _padded(groups)}


def difference_products(
        grad: torch.Tensor,
        query: torch.Tensor,
        padded: torch.Tensor,
        folded: torch.Tensor,
        weight2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the gradients of the matrices of `difference_logits` follow from: sums over batch, places and positions.

    Args:
        grad: Gradient of the logits, (B, G, K * K, H, W), in any layout.
        query, padded, folded, weight2, kernel_size, dilation: As for `difference_logits`.

    Returns:
        Gradient of weight2, (G, M); sum of dy [a; 1]^T, (M, C + 1), for the gradient dy of what the second rectifier
        is applied to; gradient of bias2, (G,). All float32.
    """
    batch, channels, height, width = query.shape
    query, padded = _innermost(query, padded)
    hidden, groups, count, places = len(folded), len(weight2), batch * height * width, kernel_size ** 2
    pieces = _pieces(channels + 1)
    p, warps = _tile(weight2.dtype, max(pieces['CB'], hidden), most=64)
    tiles = triton.cdiv(count, p)
    programs, per_program = _split(tiles, places, hidden * (channels + 1) + groups * (hidden + 1))
    splits = triton.cdiv(places, per_program)
    shapes = (groups, hidden), (groups,), (hidden, channels + 1)
    if count == 0:
        grad_weight2, grad_bias2, products = (query.new_zeros(shape, dtype=torch.float32) for shape in shapes)
        return grad_weight2, products, grad_bias2
    sums = [query.new_empty(programs * splits, *shape, dtype=torch.float32) for shape in shapes]
    maps = _maps(G=grad, Q=query, K=padded)
    _launch(
        _difference_products, (programs, splits),
        [grad, query, padded, *sums, folded.contiguous(), weight2.contiguous()],
        [count, height, width, tiles, per_program, *maps.steps],
        {
            **maps.constants, **_sizes(channels, hidden, groups), **pieces,
            'K': kernel_size, 'D': dilation, 'P': p, **_numbers(count),
        },
        warps,
    )
    grad_weight2, grad_bias2, products = (x.sum(0) for x in sums)
    return grad_weight2, products, grad_bias2


def difference_input_gradients(
        grad: torch.Tensor,
        query: torch.Tensor,
        padded: torch.Tensor,
        folded: torch.Tensor,
        back: torch.Tensor,
        correction: torch.Tensor | None,
        weight2: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and padded from da = back dy - correction [a; 1] where a > 0.

    Args:
        grad: Gradient of the logits, (B, G, K * K, H, W), in any layout.
        back: Matrix of shape (C, M) from the gradient dy of what the second rectifier is applied to.
        correction: Matrix of shape (C, C + 1), the part of a batch norm; None without one.
        query, padded, folded, weight2, kernel_size, dilation: As for `difference_logits`.

    Returns:
        Maps like query and padded, channels innermost in memory.
    """
    batch, channels, height, width = query.shape
    query, padded = _innermost(query, padded)
    hidden, groups = len(folded), len(weight2)
    pieces = _pieces(channels)
    p, warps = _tile(weight2.dtype, max(pieces['CB'], hidden), most=64)
    maps = _maps(G=grad, Q=query, K=padded)
    matrices = [folded, weight2, back, folded if correction is None else correction]
    outs = [_empty_map(x, channels, *x.shape[2:]) for x in (query, padded)]
    for of_key, out in enumerate(outs):
        count = out[:, 0].numel()
        if count == 0:
            continue
        _launch(
            _difference_input_gradient, (triton.cdiv(count, p), 1),
            [grad, query, padded, out, *(x.contiguous() for x in matrices)],
            [count, height, width, *maps.steps],
            {
                **maps.constants, **_sizes(channels, hidden, groups), **pieces,
                'K': kernel_size, 'D': dilation, 'P': p, **_numbers(count),
                'OF_KEY': of_key, 'CORRECTED': correction is not None,
            },
            warps,
        )
    return outs[0], outs[1]


def _by_place(x: torch.Tensor, channels: int, kernel_size: int, order: tuple[int, ...]) -> torch.Tensor:
    """A matrix (M, C * K * K) in another order of its axes M, C and K * K."""
    return x.reshape(-1, channels, kernel_size ** 2).permute(order).contiguous()


def patch_hidden(
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> torch.Tensor:
    """Sum over channels and places of weight * relu(scale * key + shift), as `patch_network` of padded keys.

    Args:
        padded: Keys of shape (B, C, H + 2 * padding, W + 2 * padding), float32, bfloat16 or float16, in any layout.
        scale: Factors of shape (C * K * K,), places of a channel one after another in row-major order.
        shift: Summands, laid out as `scale`.
        weight: Matrix of shape (M, C * K * K), columns laid out as `scale`.
        kernel_size: Odd number K of places a side.
        dilation: Distance in pixels between neighbouring places.

    Returns:
        Map of shape (B, M, H, W) of the type of the keys, channels innermost in memory.
    """
    batch, channels, height, width = _unpadded_shape(padded, kernel_size, dilation)
    [padded] = _innermost(padded)
    hidden, count = len(weight), batch * height * width
    out = _empty_map(padded, hidden, height, width)
    if count > 0:
        p, warps = _tile(padded.dtype, max(channels, hidden))
        maps = _maps(K=padded)
        scale, shift = (_by_place(x, channels, kernel_size, (0, 2, 1)) for x in (scale, shift))
        weight = _by_place(weight.to(padded.dtype), channels, kernel_size, (2, 1, 0))
        _launch(
            _patch_hidden, (triton.cdiv(count, p), 1), [padded, out, scale, shift, weight],
            [count, height, width, *maps.steps],
            {
                **maps.constants, 'C': channels, 'M': hidden, 'CB': _padded(channels), 'MB': _padded(hidden),
                'K': kernel_size, 'D': dilation, 'P': p, **_numbers(count),
            },
            warps,
        )
    return out


def _unpadded_shape(padded: torch.Tensor, kernel_size: int, dilation: int) -> tuple[int, int, int, int]:
    """Batch, channels, and height and width of the map before it was padded."""
    batch, channels, height, width = padded.shape
    return batch, channels, height - dilation * (kernel_size - 1), width - dilation * (kernel_size - 1)


def patch_gradients(
        grad: torch.Tensor,
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of what `patch_hidden` takes.

    Args:
        grad: Gradient of its output, (B, M, H, W), in any layout.
        padded, scale, shift, weight, kernel_size, dilation: As for `patch_hidden`.

    Returns:
        Gradients of padded, of its type and with channels innermost in memory, and of scale, shift and weight, float32.
    """
    channels, hidden, places = padded.shape[1], len(weight), kernel_size ** 2
    grad, padded = _innermost(grad, padded)
    scale, shift = (_by_place(x, channels, kernel_size, (0, 2, 1)).view(places, 1, channels) for x in (scale, shift))
    by_place = _by_place(weight, channels, kernel_size, (2, 0, 1))
    grad_padded = _empty_map(padded, channels, *padded.shape[2:])
    if len(padded) == 0:
        sums = padded.new_zeros(places, hidden, channels, 2, dtype=torch.float32)
    else:
        p, warps = _tile(padded.dtype, max(channels, hidden))
        maps = _maps(G=grad, K=padded)
        constants = {
            **maps.constants, 'C': channels, 'M': hidden, 'CB': _padded(channels), 'MB': _padded(hidden),
            'K': kernel_size, 'D': dilation, 'P': p, **_numbers(padded[:, 0].numel()),
        }
        _launch(
            _patch_input_gradient, (triton.cdiv(padded[:, 0].numel(), p), 1),
            [grad, padded, grad_padded, scale, shift, by_place.to(padded.dtype)],
            [padded[:, 0].numel(), *grad.shape[2:], *maps.steps], constants, warps,
        )
        sums = _patch_sums(grad, padded, scale, shift, maps.steps, constants, warps)
    passing, passing_keys = sums.unbind(-1)  # (K * K, M, C)
    grad_scale, grad_shift = ((x * by_place).sum(1).t().flatten() for x in (passing_keys, passing))
    grad_weight = (passing_keys * scale + passing * shift).permute(1, 2, 0)
    return grad_padded, grad_scale, grad_shift, grad_weight.reshape(weight.shape)


def _patch_sums(
        grad: torch.Tensor,
        padded: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        steps: list[int],
        constants: dict[str, Any],
        warps: int,
) -> torch.Tensor:
    """Sums over positions of grad 1[z > 0]^T and of grad (key 1[z > 0])^T, (K * K, M, C, 2)."""
    batch, hidden, height, width = grad.shape
    places, channels = len(scale), padded.shape[1]
    across = triton.cdiv(height * width, constants['P'])
    most = min(_PROGRAMS, _BUFFER // (places * 2 * hidden * channels)) // across
    images = triton.cdiv(batch, max(min(batch, most), 1))
    shares = triton.cdiv(batch, images)
    per_program = triton.cdiv(places, min(places, triton.cdiv(_PROGRAMS, across * shares)))
    buffer = padded.new_empty(across * shares, places, hidden, channels, 2, dtype=torch.float32)
    _launch(
        _patch_products, (across * shares, triton.cdiv(places, per_program)), [grad, padded, buffer, scale, shift],
        [batch, height * width, width, images, per_program, *steps], constants, warps,
    )
    return buffer.sum(0)

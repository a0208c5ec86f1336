"""Triton kernels of one decoding step: a matrix is read once, and what stands before and after it is done on the way.

A token of a 7B model is 13 GB of weights read from memory, so everything else must hide behind that reading. A layer
is five kernels: norm, query, key and value with their rotary turn and the write into the cache; attention over the
tokens that are there; the output map with the residual; norm, gate and up with their product; down with the residual.
`decode_plain` computes the same in plain torch. The vectors are float32, the weights as they are.

A program of `paired` or `single` holds a few rows of the matrix and goes along them in wide steps, so that each thread
keeps several 16-byte reads under way. With PDL (programmatic dependent launch, compute capability 9) a kernel starts
before the last one has ended, asks for its first weights, and only then waits for its input.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(w_ptr, row, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights of some rows [R] from column k on -> [R, BLOCK_K] in float32; they are read once, so not kept in L1."""
    column = k + tl.arange(0, BLOCK_K)
    place = w_ptr + row[:, None].to(tl.int64) * K + column[None, :]
    if K % BLOCK_K == 0:
        tile = tl.load(place, cache_modifier=".cg")
    else:
        tile = tl.load(place, mask=(column < K)[None, :], other=0.0, cache_modifier=".cg")
    return tile


@triton.jit
def _vector(x_ptr, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    column = k + tl.arange(0, BLOCK_K)
    if K % BLOCK_K == 0:
        part = tl.load(x_ptr + column)
    else:
        part = tl.load(x_ptr + column, mask=column < K, other=0.0)
    return part.to(tl.float32)


@triton.jit
def _normed_pair(
    x_ptr, g_ptr, w_ptr, first, second, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two sets of rows times rmsnorm(x): the scale is a number, so it is applied at the end. -> 2 x [ROWS]"""
    w1 = _tile(w_ptr, first, 0, K, BLOCK_K)
    w2 = _tile(w_ptr, second, 0, K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = _vector(x_ptr, 0, K, BLOCK_K)
    square = x * x
    x = x * _vector(g_ptr, 0, K, BLOCK_K)
    sum1 = w1.to(tl.float32) * x[None, :]
    sum2 = w2.to(tl.float32) * x[None, :]
    for k in range(BLOCK_K, K, BLOCK_K):
        w1 = _tile(w_ptr, first, k, K, BLOCK_K)
        w2 = _tile(w_ptr, second, k, K, BLOCK_K)
        x = _vector(x_ptr, k, K, BLOCK_K)
        square += x * x
        x = x * _vector(g_ptr, k, K, BLOCK_K)
        sum1 += w1.to(tl.float32) * x[None, :]
        sum2 += w2.to(tl.float32) * x[None, :]
    scale = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
    return tl.sum(sum1, axis=1) * scale, tl.sum(sum2, axis=1) * scale


@triton.jit
def qkv_kernel(
    x_ptr, g_ptr, w_ptr, cos_ptr, sin_ptr, length_ptr, q_ptr, k_ptr, v_ptr, eps, capacity,
    K: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [K], w [(H + 2 H_kv) * d, K] -> q [H, d] float32, and keys and values at place `length` of their caches
    [H_kv, capacity, d]. A program has rows i and i + d/2 of one head: the pairs that rotary positions turn."""
    per_head: tl.constexpr = HALF // ROWS
    head = tl.program_id(0) // per_head
    row = (tl.program_id(0) % per_head) * ROWS + tl.arange(0, ROWS)
    first = head * 2 * HALF + row
    a, b = _normed_pair(x_ptr, g_ptr, w_ptr, first, first + HALF, eps, K, ROWS, BLOCK_K, PDL)
    length = tl.load(length_ptr)
    if head < HEADS + KV_HEADS:
        cos = tl.load(cos_ptr + length * HALF + row)
        sin = tl.load(sin_ptr + length * HALF + row)
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    if head < HEADS:
        tl.store(q_ptr + first, a)
        tl.store(q_ptr + first + HALF, b)
    else:
        if head < HEADS + KV_HEADS:
            place = k_ptr + ((head - HEADS).to(tl.int64) * capacity + length) * 2 * HALF + row
            tl.store(place, a.to(k_ptr.dtype.element_ty))
            tl.store(place + HALF, b.to(k_ptr.dtype.element_ty))
        else:
            place = v_ptr + ((head - HEADS - KV_HEADS).to(tl.int64) * capacity + length) * 2 * HALF + row
            tl.store(place, a.to(v_ptr.dtype.element_ty))
            tl.store(place + HALF, b.to(v_ptr.dtype.element_ty))


@triton.jit
def gate_up_kernel(
    x_ptr, g_ptr, w_ptr, out_ptr, eps,
    K: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [K], w [2 * HIDDEN, K], gate above up -> silu(gate) * up, [HIDDEN] in out's dtype."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate, up = _normed_pair(x_ptr, g_ptr, w_ptr, row, row + HIDDEN, eps, K, ROWS, BLOCK_K, PDL)
    hidden = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row, hidden.to(out_ptr.dtype.element_ty))


@triton.jit
def residual_kernel(a_ptr, w_ptr, x_ptr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """x [N] += w [N, K] times a [K], in place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w = _tile(w_ptr, row, 0, K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = w.to(tl.float32) * _vector(a_ptr, 0, K, BLOCK_K)[None, :]
    for k in range(BLOCK_K, K, BLOCK_K):
        w = _tile(w_ptr, row, k, K, BLOCK_K)
        total += w.to(tl.float32) * _vector(a_ptr, k, K, BLOCK_K)[None, :]
    tl.store(x_ptr + row, tl.load(x_ptr + row) + tl.sum(total, axis=1))


@triton.jit
def _combine(part_ptr, top_ptr, sum_ptr, out_ptr, head, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of one query head, each softmaxed by itself, as one: [SPLITS, d] -> [d]."""
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, DP)
    top = tl.load(top_ptr + head * SPLITS + split, cache_modifier=".cg")
    weight = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(sum_ptr + head * SPLITS + split, cache_modifier=".cg"), axis=0)
    place = part_ptr + (head * SPLITS + split)[:, None] * D + column[None, :]
    part = tl.load(place, mask=(column < D)[None, :], other=0.0, cache_modifier=".cg")
    mixed = tl.sum(part * weight[:, None], axis=0) / total
    tl.store(out_ptr + head * D + column, mixed.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, part_ptr, top_ptr, sum_ptr, count_ptr, out_ptr, capacity, scale,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query of every head over places 0..length of the cache [H_kv, capacity, d] -> out [H, d].

    Program (key head, split) reads its share of the keys once for the GROUP query heads that use them; the last of
    the splits to arrive puts the parts together. Nothing beyond `length` is read.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tokens = tl.load(length_ptr) + 1
    share = tl.cdiv(tl.cdiv(tokens, SPLITS), BLOCK_S) * BLOCK_S
    start = split * share
    end = tl.minimum(start + share, tokens)
    group = tl.arange(0, GROUP_P)
    column = tl.arange(0, DP)
    inside = (group < GROUP)[:, None] & (column < D)[None, :]
    q = tl.load(q_ptr + (head * GROUP + group)[:, None] * D + column[None, :], mask=inside, other=0.0) * scale
    top = tl.full([GROUP_P], -1.0e30, tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    mixed = tl.zeros([GROUP_P, DP], tl.float32)
    base = head.to(tl.int64) * capacity * D
    for s in range(start, end, BLOCK_S):
        place = s + tl.arange(0, BLOCK_S)
        valid = (place < end)[:, None] & (column < D)[None, :]
        k = tl.load(k_ptr + base + place[:, None] * D + column[None, :], mask=valid, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + base + place[:, None] * D + column[None, :], mask=valid, other=0.0).to(tl.float32)
        score = tl.sum(q[:, None, :] * k[None, :, :], axis=2)  # [GROUP_P, BLOCK_S]
        score = tl.where((place < end)[None, :], score, -1.0e30)
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        weight = tl.where((place < end)[None, :], weight, 0.0)
        old = tl.exp(top - higher)
        total = total * old + tl.sum(weight, axis=1)
        mixed = mixed * old[:, None] + tl.sum(weight[:, :, None] * v[None, :, :], axis=1)
        top = higher
    row = (head * GROUP + group) * SPLITS + split
    tl.store(part_ptr + row[:, None] * D + column[None, :], mixed, mask=inside)
    tl.store(top_ptr + row, top, mask=group < GROUP)
    tl.store(sum_ptr + row, total, mask=group < GROUP)
    tl.debug_barrier()  # every thread's part is written before the program counts itself
    arrived = tl.atomic_add(count_ptr + head, 1)
    if arrived == SPLITS - 1:
        tl.store(count_ptr + head, 0)  # for the next layer
        for member in range(GROUP):
            _combine(part_ptr, top_ptr, sum_ptr, out_ptr, head * GROUP + member, D, DP, SPLITS)


@triton.jit
def head_kernel(
    x_ptr, g_ptr, w_ptr, best_ptr, which_ptr, eps, words, banned,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [K], w [V, K] -> the best logit among each program's 2 * ROWS words, and which word it is."""
    row = tl.program_id(0) * 2 * ROWS + tl.arange(0, ROWS)
    last = words - 1  # the last program's rows may lie beyond the vocabulary: they read its last row instead
    one, two = _normed_pair(
        x_ptr, g_ptr, w_ptr, tl.minimum(row, last), tl.minimum(row + ROWS, last), eps, K, ROWS, BLOCK_K, PDL
    )
    one = tl.where((row < words) & (row != banned), one, -1.0e30)
    two = tl.where((row + ROWS < words) & (row + ROWS != banned), two, -1.0e30)
    best1 = tl.max(one, axis=0)
    best2 = tl.max(two, axis=0)
    which1 = tl.min(tl.where(one == best1, row, 2147483647), axis=0)
    which2 = tl.min(tl.where(two == best2, row + ROWS, 2147483647), axis=0)
    tl.store(best_ptr + tl.program_id(0), tl.maximum(best1, best2))
    tl.store(which_ptr + tl.program_id(0), tl.where(best1 >= best2, which1, which2))


@triton.jit
def choose_kernel(
    best_ptr, which_ptr, embedding_ptr, x_ptr, length_ptr, written_ptr, tokens_ptr, programs,
    PROGRAMS_P: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best word of all: noted, counted, and its embedding is the next step's x. One program; of equal logits the
    first word wins."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.arange(0, PROGRAMS_P)
    best = tl.load(best_ptr + place, mask=place < programs, other=-3.0e38)
    which = tl.load(which_ptr + place, mask=place < programs, other=2147483647)
    token = tl.min(tl.where(best == tl.max(best, axis=0), which, 2147483647), axis=0)
    written = tl.load(written_ptr)
    length = tl.load(length_ptr)
    tl.store(tokens_ptr + written, token.to(tl.int64))
    tl.store(written_ptr, written + 1)
    tl.store(length_ptr, length + 1)
    for k in range(0, K, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        e = tl.load(embedding_ptr + token.to(tl.int64) * K + column, mask=column < K, other=0.0)
        tl.store(x_ptr + column, e.to(tl.float32), mask=column < K)

"""The kernels of a decoder layer that torch lacks or launches in pieces: for `bench decode` alone."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["position"])
def rope_and_cache(qkv, k_cache, v_cache, position, CONTEXT: tl.constexpr, Q: tl.constexpr, KV: tl.constexpr,
                   D: tl.constexpr):  # fmt: skip
    """Rotate each q and k head of a row in place; store k and v at `position` of the caches [T, KV, CONTEXT, D]."""
    row, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    lanes = tl.arange(0, HALF)
    at = qkv + (row * (Q + 2 * KV) + head) * D + lanes
    low, high = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
    if head < Q + KV:
        angle = position * tl.exp2(lanes.to(tl.float32) * (-2 * 13.2877 / D))  # theta: 10,000
        cosine, sine = tl.cos(angle), tl.sin(angle)
        low, high = low * cosine - high * sine, high * cosine + low * sine
        tl.store(at, low.to(qkv.dtype.element_ty))
        tl.store(at + HALF, high.to(qkv.dtype.element_ty))
    if head >= Q:
        kv_head = (head - Q) % KV
        place = ((row * KV + kv_head).to(tl.int64) * CONTEXT + position) * D + lanes
        cache = k_cache if head < Q + KV else v_cache
        tl.store(cache + place, low.to(qkv.dtype.element_ty))
        tl.store(cache + place + HALF, high.to(qkv.dtype.element_ty))


@triton.jit
def silu_and_multiply(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(x[:, :WIDTH]) * x[:, WIDTH:]"""
    row, lanes = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * WIDTH + lanes, mask=lanes < WIDTH, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + lanes, mask=lanes < WIDTH, other=0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + lanes, value.to(out.dtype.element_ty), mask=lanes < WIDTH)


@triton.jit
def route(logits, chosen, scales, E: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr):
    """The softmax over the experts that a row was given, as its scales."""
    row, lanes = tl.program_id(0), tl.arange(0, WIDTH)
    mine = tl.load(chosen + row * TOP + lanes, mask=lanes < TOP, other=0)
    value = tl.load(logits + row * E + mine, mask=lanes < TOP, other=float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, axis=0))
    tl.store(scales + row * TOP + lanes, value / tl.sum(value, axis=0), mask=lanes < TOP)


@triton.jit(do_not_specialize=["count"])
def order_by_expert(chosen, order, starts, count, E: tl.constexpr, BLOCK: tl.constexpr):
    """order: the (row, choice) pairs sorted by expert, stable; starts[e]: where expert e's begin. Each program counts
    how many pairs lie before its own."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_pair = mine < count
    expert = tl.load(chosen + mine, mask=is_pair, other=E)
    place, before = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    first = 0
    while first < count:
        others = first + tl.arange(0, BLOCK)
        theirs = tl.load(chosen + others, mask=others < count, other=E)
        earlier = (theirs[None, :] < expert[:, None]) | (
            (theirs[None, :] == expert[:, None]) & (others[None, :] < mine[:, None])
        )
        place += tl.sum(earlier.to(tl.int32), axis=1)
        before += tl.sum((theirs[None, :] < mine[:, None]).to(tl.int32), axis=1)  # here `mine` stands for experts
        first += BLOCK
    tl.store(order + place, mine, mask=is_pair)
    tl.store(starts + mine, before, mask=mine <= E)


@triton.jit
def experts(x, weights, out, scales, order, starts, IN: tl.constexpr, OUT: tl.constexpr, TOP: tl.constexpr,
            GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """The rows of one expert times some columns of its weights [E, (2) OUT, IN].

    GATED: the first product of an expert, whose rows are tokens, with silu and gate behind it. Else the second, whose
    rows are pairs, times the pair's scale.
    """
    expert, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    number, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    HEIGHT: tl.constexpr = 2 * OUT if GATED else OUT
    base = weights + expert.to(tl.int64) * HEIGHT * IN
    lanes = tl.arange(0, DEPTH)
    fits = columns < OUT
    while number < last:
        places = number + tl.arange(0, ROWS)
        live = places < last
        pair = tl.load(order + places, mask=live, other=0)
        row = pair // TOP if GATED else pair
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, IN, DEPTH):
            inner = start + lanes
            a = tl.load(x + row[:, None] * IN + inner[None, :], mask=live[:, None] & (inner < IN)[None, :], other=0)
            at = base + columns[None, :] * IN + inner[:, None]
            mask = fits[None, :] & (inner < IN)[:, None]
            total = tl.dot(a, tl.load(at, mask=mask, other=0), total)
            if GATED:
                up = tl.dot(a, tl.load(at + OUT * IN, mask=mask, other=0), up)
        if GATED:
            total = total / (1 + tl.exp(-total)) * up
        else:
            total *= tl.load(scales + pair, mask=live, other=0)[:, None]
        tl.store(out + pair[:, None] * OUT + columns[None, :], total.to(out.dtype.element_ty),
                 mask=live[:, None] & fits[None, :])  # fmt: skip
        number += ROWS


@triton.jit(do_not_specialize=["row_stride", "group_stride", "count"])
def fp8_product(x, x_scales, row_stride, group_stride, weights, weight_scales, out, order, starts, count,
                IN: tl.constexpr, OUT: tl.constexpr, TOP: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """x times some columns of the weights [OUT, IN]; or the first product of one expert, of weights [E, 2 OUT, IN],
    with silu and gate behind it, as `experts`."""
    expert, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    GROUPS: tl.constexpr = IN // 128
    HEIGHT: tl.constexpr = 2 * OUT if EXPERTS else OUT
    number, last = 0, count
    if EXPERTS:
        number, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    base = weights + expert.to(tl.int64) * HEIGHT * IN
    scales = weight_scales + expert * ((HEIGHT + 127) // 128 * GROUPS)
    lanes, fits = tl.arange(0, 128), columns < OUT
    while number < last:
        places = number + tl.arange(0, ROWS)
        live = places < last
        pair = tl.load(order + places, mask=live, other=0) if EXPERTS else places
        row = pair // TOP
        total, up = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        for group in range(GROUPS):
            inner = group * 128 + lanes
            a = tl.load(x + row[:, None] * IN + inner[None, :], mask=live[:, None], other=0.0)
            of_rows = tl.load(x_scales + row * row_stride + group * group_stride, mask=live, other=0)
            at = base + columns[None, :] * IN + inner[:, None]
            of_columns = tl.load(scales + columns // 128 * GROUPS + group, mask=fits, other=0)
            part = tl.dot(a, tl.load(at, mask=fits[None, :], other=0.0))
            total += part * (of_rows[:, None] * of_columns[None, :])
            if EXPERTS:
                of_columns = tl.load(scales + (columns + OUT) // 128 * GROUPS + group, mask=fits, other=0)
                part = tl.dot(a, tl.load(at + OUT * IN, mask=fits[None, :], other=0.0))
                up += part * (of_rows[:, None] * of_columns[None, :])
        if EXPERTS:
            total = total / (1 + tl.exp(-total)) * up
        tl.store(out + pair[:, None] * OUT + columns[None, :], total.to(out.dtype.element_ty),
                 mask=live[:, None] & fits[None, :])  # fmt: skip
        number += ROWS


@triton.jit
def sum_of_choices(parts, shared, out, TOP: tl.constexpr, H: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of parts[t, :] in their order, and of the shared expert."""
    row, lanes = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP):
        total += tl.load(parts + (row * TOP + choice) * H + lanes, mask=lanes < H, other=0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + row * H + lanes, mask=lanes < H, other=0).to(tl.float32)
    tl.store(out + row * H + lanes, total.to(out.dtype.element_ty), mask=lanes < H)

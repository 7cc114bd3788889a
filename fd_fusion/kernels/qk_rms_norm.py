"""Normalise every q and k head of packed rows, in one Triton kernel.

A row holds its q heads, then its k heads, then v. Each q and k head x of width D becomes

    y = round(x * rsqrt(mean(x^2) + eps) * (weight + weight_offset))

in fp32, rounded once; q heads use one weight, k heads the other. v is never read or written.
A program takes HEADS heads out of the rows x (q heads + k heads) of the whole call, so that no lane
idles whatever the counts are.

A head's bits depend on the head and the weight alone, for two reasons:
- a head is summed by halving: neighbours first, then neighbours of those sums. Each step adds two numbers,
  so no layout, tile, alignment or number of warps can change the order;
- launches pass enable_fp_fusion=False, so that no compiler contracts a step of that tree in one tile only.
"""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # before Triton 3.5
    gdc_wait = None

NUM_WARPS = 8


def tile(head_dim: int, item_bytes: int) -> dict[str, int]:
    """Return the constants of a launch, which never depend on T: one 16-byte vector a thread."""
    log2_width = (head_dim - 1).bit_length()
    return {"LOG2_WIDTH": log2_width, "HEADS": max(1, NUM_WARPS * 32 * 16 // (item_bytes << log2_width))}


@triton.jit
def sum_by_halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG2_WIDTH: tl.constexpr):
    """Sum [ROWS, WIDTH] to [ROWS, 1] in one fixed order."""
    for step in tl.static_range(LOG2_WIDTH):
        x = tl.sum(tl.reshape(x, (ROWS, WIDTH >> (step + 1), 2)), axis=2)
    return x


@triton.jit
def round_to(y, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """Round fp32 to dtype, to nearest even. BY_HAND: in integers, since Triton's interpreter truncates to bf16."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        bits = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)


@triton.jit(do_not_specialize=["rows"])
def qk_rms_norm_kernel(
    qkv,  # [rows, >= (Q_HEADS + KV_HEADS) * D], rows qkv_stride apart
    q_out,  # [rows, Q_HEADS * D], rows q_stride apart; unused if IN_PLACE
    k_out,  # [rows, KV_HEADS * D], rows k_stride apart; unused if IN_PLACE
    q_weight,  # [D]
    k_weight,  # [D]
    rows,
    qkv_stride,
    q_stride,
    k_stride,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    LOG2_WIDTH: tl.constexpr,  # a head is padded to WIDTH lanes
    HEADS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROUND_BY_HAND: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:  # launched before the kernel in front has ended: wait for the end of it, then read
        gdc_wait()
    WIDTH: tl.constexpr = 1 << LOG2_WIDTH
    ROW_HEADS: tl.constexpr = Q_HEADS + KV_HEADS
    item = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
    row = item // ROW_HEADS
    head = item % ROW_HEADS
    d = tl.arange(0, WIDTH)[None, :]
    in_head = d < D
    live = (row < rows) & in_head
    is_q = head < Q_HEADS

    row = row.to(tl.int64)  # rows * stride may pass 2^31
    place = qkv + row * qkv_stride + (head * D + d)
    stored = tl.load(place, mask=live, other=0.0)
    # The stored weights are chosen by address: one load of the layout of `stored`, so nothing crosses threads.
    # Chosen behind `+ d`: between the two bases Triton 3.9 forgets their alignment.
    w = tl.load(tl.where(is_q, q_weight + d, k_weight + d), mask=in_head, other=0.0).to(tl.float32)
    if WEIGHT_OFFSET != 0.0:
        w += WEIGHT_OFFSET

    x = stored.to(tl.float32)
    scale = tl.rsqrt(sum_by_halves(x * x, HEADS, WIDTH, LOG2_WIDTH) * (1.0 / D) + EPS)
    y = round_to(x * scale * w, stored.dtype, ROUND_BY_HAND)

    if IN_PLACE:
        tl.store(place, y, mask=live)
    else:
        tl.store(q_out + row * q_stride + (head * D + d), y, mask=live & is_q)
        tl.store(k_out + row * k_stride + ((head - Q_HEADS) * D + d), y, mask=live & (head >= Q_HEADS))

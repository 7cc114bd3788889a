"""Rows as 8-byte lanes: a lane holds four halves or two floats, and travels as one or two 8-byte words.

Everything is elementwise on 1-D tensors of one shape, so no layout is ever converted.
"""

import triton
import triton.language as tl

NAN_LANE = tl.constexpr(0x7FFF7FFF7FFF7FFF)  # NaN in bf16, fp16 and fp32 alike


@triton.jit
def at(address, TYPE: tl.constexpr):
    """A pointer that is known to be 16-byte aligned; the hint counts only after the cast."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _halves(pair, DTYPE: tl.constexpr):
    if DTYPE == "bfloat16":
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def unpack(lane, DTYPE: tl.constexpr):
    """The elements of a lane as four fp32 tensors; for fp32 the last two are zero and vanish."""
    low = lane.to(tl.uint32)
    high = (lane >> 32).to(tl.uint32)
    if DTYPE == "float32":
        a = low.to(tl.float32, bitcast=True)
        b = high.to(tl.float32, bitcast=True)
        c = tl.zeros_like(a)
        d = c
    else:
        a, b = _halves(low, DTYPE)
        c, d = _halves(high, DTYPE)
    return a, b, c, d


@triton.jit
def _bits(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round to DTYPE, to nearest even; the bits as uint32. The interpreter truncates to bf16 and keeps the
    payload of a NaN, the hardware does neither."""
    if DTYPE == "float32":
        bits = value.to(tl.uint32, bitcast=True)
    elif DTYPE == "bfloat16" and INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif DTYPE == "bfloat16":
        bits = value.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    if INTERPRETED:
        bits = tl.where(value == value, bits, 0x7FFFFFFF if DTYPE == "float32" else 0x7FFF)
    return bits


@triton.jit
def pack(a, b, c, d, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Four fp32 tensors rounded into lanes."""
    low = _bits(a, DTYPE, INTERPRETED)
    high = _bits(b, DTYPE, INTERPRETED)
    if DTYPE != "float32":
        low = low | (high << 16)
        high = _bits(c, DTYPE, INTERPRETED) | (_bits(d, DTYPE, INTERPRETED) << 16)
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def load_weight(address, lanes, mask, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr):
    """The weights of the elements in these lanes, whose own dtype is DTYPE, as four fp32 tensors."""
    if (DTYPE == "float32") == (WEIGHT_DTYPE == "float32"):
        a, b, c, d = unpack(tl.load(at(address, tl.uint64) + lanes, mask=mask, other=0), WEIGHT_DTYPE)
    elif DTYPE == "float32":
        a, b = _halves(tl.load(at(address, tl.uint32) + lanes, mask=mask, other=0), WEIGHT_DTYPE)
        c = tl.zeros_like(a)
        d = c
    else:
        wide = at(address, tl.uint64) + 2 * lanes
        a, b, _, _ = unpack(tl.load(wide, mask=mask, other=0), "float32")
        c, d, _, _ = unpack(tl.load(wide + 1, mask=mask, other=0), "float32")
    return a, b, c, d


@triton.jit
def guard(lane):
    """The one pattern that cannot be sent as a word, a NaN or a pair of them, becomes another such NaN."""
    low = lane.to(tl.uint32)
    high = (lane >> 32).to(tl.uint32)
    low = tl.where(low == 0xFFFFFFFF, 0x7FFFFFFF, low)
    high = tl.where(high == 0xFFFFFFFF, 0x7FFFFFFF, high)
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def send(words, lanes, mask, lane, epoch, SLICE: tl.constexpr, SENTINEL: tl.constexpr):
    """Store a slice as words. `.wt` makes it a 16-byte store of system scope."""
    if SENTINEL:
        tl.store(words + lanes, guard(lane), mask=mask, cache_modifier=".wt")
    else:
        tl.store(words + lanes, (lane << 32) | epoch, mask=mask, cache_modifier=".wt")
        high = ((lane >> 32) << 32) | epoch
        tl.store(words + SLICE + lanes, high, mask=mask, cache_modifier=".wt")


@triton.jit
def receive(words, lanes, mask, epoch, SLICE: tl.constexpr, SENTINEL: tl.constexpr):
    """One look at a slice of words. Returns the lanes, and 1 for each that is not there yet."""
    low = tl.load(words + lanes, mask=mask, other=0, volatile=True)
    if SENTINEL:
        lane = low
        late = (low.to(tl.uint32) == 0xFFFFFFFF) | ((low >> 32).to(tl.uint32) == 0xFFFFFFFF)
    else:
        high = tl.load(words + SLICE + lanes, mask=mask, other=0, volatile=True)
        lane = (low >> 32) | ((high >> 32) << 32)
        late = (low.to(tl.uint32) != epoch.to(tl.uint32)) | (high.to(tl.uint32) != epoch.to(tl.uint32))
    return lane, (late & mask).to(tl.int32)


@triton.jit
def clear(words, lanes, mask):
    """Make received words unsent again: sentinel words carry no epoch that would age by itself."""
    tl.store(words + lanes, tl.full(lanes.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64), mask=mask, cache_modifier=".wt")

"""Convert rows to 4-byte words and back: a word holds two halves or one float, bit for bit.

Every function is elementwise on 1-D tensors of one shape, so no layout is ever converted. The slots are filled with
SENTINEL, which means "not yet"; as payload that word is a NaN or a pair of them.
"""

import triton
import triton.language as tl

SENTINEL = tl.constexpr(0xFFFFFFFF)
NAN = tl.constexpr(0x7FFF7FFF)  # a word of NaN in bf16, fp16 and fp32 alike


@triton.jit
def pointer(address, TYPE: tl.constexpr):
    """Cast an address to a pointer with the hint of 16-byte alignment, which counts only after the cast."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def mask_if(mask, condition):
    """mask & condition, for a scalar condition: its broadcast is no mask in the interpreter of Triton 3.9."""
    return tl.where(condition, mask, mask ^ mask)


@triton.jit
def without_sentinel(word):
    """Replace SENTINEL, the one word that cannot be sent, by another NaN or pair of NaNs."""
    return tl.where(word == SENTINEL, 0x7FFFFFFF, word)


@triton.jit
def unpack(word, DTYPE: tl.constexpr):
    """Return the elements of a word as two fp32 tensors; for fp32 the second is zero and vanishes."""
    if DTYPE == "float32":
        a = word.to(tl.float32, bitcast=True)
        b = tl.zeros_like(a)
    elif DTYPE == "bfloat16":
        a = (word << 16).to(tl.float32, bitcast=True)
        b = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        a = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        b = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return a, b


@triton.jit
def _round_by_bits(value, DTYPE: tl.constexpr):
    """Round for the interpreter, which truncates to bf16 and keeps the payload of a NaN, unlike the hardware."""
    bits = value.to(tl.uint32, bitcast=True)
    if DTYPE == "bfloat16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif DTYPE == "float16":
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return tl.where(value == value, bits, 0x7FFFFFFF if DTYPE == "float32" else 0x7FFF)


@triton.jit
def pack(a, b, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round two fp32 tensors to nearest even, as words. For halves one instruction, which Triton itself misses."""
    if INTERPRETED:
        word = _round_by_bits(a, DTYPE)
        if DTYPE != "float32":
            word = word | (_round_by_bits(b, DTYPE) << 16)
    elif DTYPE == "float32":
        word = a.to(tl.uint32, bitcast=True)
    elif DTYPE == "bfloat16":
        word = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], tl.uint32, True, 1)
    else:
        word = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], tl.uint32, True, 1)
    return word


@triton.jit
def load_weight(address, offsets, mask, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr):
    """Load the weights of the elements in these words of a row of DTYPE, as two fp32 tensors."""
    if (DTYPE == "float32") == (WEIGHT_DTYPE == "float32"):
        a, b = unpack(tl.load(pointer(address, tl.uint32) + offsets, mask=mask, other=0), WEIGHT_DTYPE)
    elif DTYPE == "float32":
        half = tl.load(pointer(address, tl.uint16) + offsets, mask=mask, other=0).to(tl.uint32)
        a, b = unpack(half, WEIGHT_DTYPE)
    else:
        two_floats = tl.load(pointer(address, tl.uint64) + offsets, mask=mask, other=0)
        a = two_floats.to(tl.uint32).to(tl.float32, bitcast=True)
        b = (two_floats >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return a, b

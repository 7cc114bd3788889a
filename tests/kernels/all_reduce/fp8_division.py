"""The divisions of `scales.py` as a GPU does them, under the interpreter: every half as the largest of a group.

The interpreter gets what it lacks: a fused multiply-add that rounds once, and the hardware's reciprocal, which may be
off by a unit in the last place, here by each of -2 to 2 units. Run with TRITON_INTERPRET=1.
"""

import sys

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce.scales import divisors_and_scales, factors_and_scales, quotient_of
from fd_fusion.reference import quantise, round_to_e4m3

BITS = {"bfloat16": 7, "float16": 10}  # of the mantissa


@triton.jit
def multiply(sizes, factors, scales, COUNT: tl.constexpr, POW2: tl.constexpr):
    at = tl.arange(0, COUNT)
    found = factors_and_scales(tl.load(sizes.to(tl.pointer_type(tl.float32)) + at), POW2, False)
    tl.store(factors.to(tl.pointer_type(tl.float32)) + at, found[0])
    tl.store(scales.to(tl.pointer_type(tl.float32)) + at, found[1])


@triton.jit
def divide(sizes, x, quotients, scales, COUNT: tl.constexpr, SEVENTH: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, COUNT)
    divisors, found = divisors_and_scales(tl.load(sizes.to(tl.pointer_type(tl.float32)) + at), SEVENTH, DTYPE, False)
    values = tl.load(x.to(tl.pointer_type(tl.float32)) + at)
    tl.store(quotients.to(tl.pointer_type(tl.float32)) + at, quotient_of(values, divisors, DTYPE, False))
    tl.store(scales.to(tl.pointer_type(tl.float32)) + at, found)


class Asm:
    """In the place of PTX: the reciprocal, `off` units in the last place away from the nearest number."""

    off = 0

    def __init__(self, text, values):
        assert text.startswith("rcp.approx"), text
        near = (np.float32(1) / values[0].data).astype(np.float32)
        moves = np.isfinite(near) & (near > 0)
        moved = (near.view(np.int32) + Asm.off).view(np.float32)
        self._result = interpreter.TensorHandle(np.where(moves, moved, near), tl.float32)

    def get_result(self, _):
        return self._result


def fma(_, x, y, z):
    exact = x.data.astype(np.longdouble) * y.data + z.data  # of 64 bits
    return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)


def run(kernel, inputs, **constants):
    """Launch on arrays padded to a power of two; returns two outputs."""
    count = len(inputs[0])
    padded = 1 << (count - 1).bit_length()
    held = [np.resize(one, padded).astype(np.float32) for one in inputs] + [
        np.empty(padded, np.float32) for _ in "ab"
    ]
    launch = triton_launch.prepare(kernel, (), {"COUNT": padded, **constants}, "cpu").launch
    launch(1, *(one.ctypes.data for one in held))
    return held[-2][:count], held[-1][:count]


def halves(dtype):
    """Every size that a half can have, Inf too."""
    if dtype == "float16":
        return np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    return (np.arange(0x7F81, dtype=np.uint32) << 16).view(np.float32)


def same(got, want):
    return (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))


def check_multiply(dtype, pow2):
    sizes = halves(dtype)
    with np.errstate(all="ignore"):
        factors, scales = run(multiply, [sizes], POW2=pow2)
        rows = np.repeat(sizes[:, None], 128, axis=1)
        codes, want = quantise(rows, "multiply_pow2" if pow2 else "multiply")
        assert (same(scales, want[:, 0])).all(), (dtype, pow2, sizes[~same(scales, want[:, 0])][:5])
        assert (round_to_e4m3(sizes * factors) == codes[:, 0]).all(), (dtype, pow2)
        if not pow2:  # the factor itself: of a size that is not zero, nor so small that it is infinite
            usual = (sizes > 0) & np.isfinite(np.float32(448) / sizes)
            assert same(factors, np.float32(448) / sizes)[usual].all()


def pairs(dtype):
    """(largest, x): every two mantissas, x smaller by so many powers of two; and special ones."""
    bits, one = BITS[dtype], 1 << BITS[dtype]
    mantissas = (one + np.arange(one)) / one
    largest, x = np.meshgrid(mantissas, mantissas if bits == 7 else mantissas[::5])
    largest, x = largest.ravel(), x.ravel()
    exponents = [-20, 0, 15] if bits == 10 else [-33, 0, 110, 118, 119, 120, 125, 126, 127]
    for exponent in exponents:
        for smaller in range(21) if bits == 7 else (0, 1, 14, 15, 16, 17, 18):
            if bits == 7 or exponent == 0:
                yield largest * 2.0**exponent, x * 2.0 ** (exponent - smaller)
    below = np.concatenate([mantissas * 2.0**-exponent for exponent in range(34, 60)])
    yield np.full_like(below, 1e-11), below  # the divisor is 1e-10
    if dtype == "bfloat16":
        tiny = (np.arange(0x2EDC, dtype=np.uint32) << 16).view(np.float32)  # to 1e-10
        yield tiny, tiny
    most = 65504.0 if bits == 10 else float(np.uint32(0x7F7F0000).view(np.float32))
    special = np.array([0, 1, most, np.inf, np.nan])
    largest, x = np.meshgrid(np.array([0, 1, most, np.inf]), special)
    yield largest.ravel(), x.ravel()


def check_divide(dtype, seventh):
    seven, checked = np.float32(7 if seventh else 1), 0
    with np.errstate(all="ignore"):
        for largest, x in pairs(dtype):
            largest, x = largest.astype(np.float32), x.astype(np.float32)
            x[1::2] *= -1
            quotients, scales = run(divide, [largest, x], SEVENTH=seventh, DTYPE=dtype)
            divisor = np.maximum(largest, np.float32(1e-10)) * seven
            assert same(scales, divisor / np.float32(448)).all(), (dtype, seventh, "scales")
            got, want = round_to_e4m3(quotients), round_to_e4m3(x * np.float32(448) / divisor)
            possible = ~(np.abs(x) > largest)  # of a group's largest
            wrong = (got != want) & possible
            assert not wrong.any(), (dtype, seventh, Asm.off, largest[wrong][:3], x[wrong][:3])
            checked += int(possible.sum())
    return checked


if __name__ == "__main__":
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.create_inline_asm = lambda _, text, __, values, *___: Asm(text, values)
    for Asm.off in map(int, sys.argv[1:]):
        for dtype in BITS:
            for flag in (False, True):
                check_multiply(dtype, flag)
                print(Asm.off, dtype, flag, check_divide(dtype, flag), "quotients")

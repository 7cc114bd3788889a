"""The PTX that quantises, run for the 32 lanes of a warp by a few lines of NumPy."""

import re

import numpy as np
import pytest

from fd_fusion.kernels.all_reduce import quantise_ptx
from fd_fusion.reference import FP8_GROUP, quantise

LANES = np.arange(32, dtype=np.uint32)
INFINITY = {"bf16x2": 0x7F80, "f16x2": 0x7C00}


def larger(kind, a, b):
    """Per half the larger of two sizes; NaN only where both are."""
    found = np.zeros_like(a)
    for shift in (0, 16):
        x, y = (a >> shift) & 0xFFFF, (b >> shift) & 0xFFFF
        x_nan, y_nan = x > INFINITY[kind], y > INFINITY[kind]
        largest = np.where(x_nan, np.where(y_nan, 0x7FFF, y), np.where(y_nan, x, np.maximum(x, y)))
        found |= largest.astype(np.uint32) << np.uint32(shift)
    return found


def step(name, kind, x):
    """One instruction, for all lanes."""
    if name == "max":
        return np.maximum(*x) if kind[0] == "u32" else larger(kind[0], *x)
    if name == "setp":
        return {"eq": np.equal, "gt": np.greater, "ne": np.not_equal}[kind[0]](*x)
    return {
        "mov": lambda a: a,
        "and": lambda a, b: a & b,
        "shr": lambda a, b: a >> b,
        "abs": lambda a: a & 0x7FFF7FFF,
        "selp": lambda a, b, chosen: np.where(chosen, a, b),
        "redux": lambda a, lanes: np.full(32, a.max()),
        "shfl": lambda a, lane, shape, lanes: a[(LANES & (shape >> 8)) | lane],
        "mad": lambda a, b, c: a.astype(np.int64) * b.astype(np.int64) + c.astype(np.int64),
    }[name](*x)


def run(text, operands):
    """`operands`: the values of $0, $1 ... by lane, [32]; those that come out are set. Returns what is stored."""
    memory, registers = {}, {f"${number}": value for number, value in enumerate(operands)} | {"%laneid": LANES}

    def value(name):
        if name in registers:
            return registers[name]
        return np.full(32, int(name, 0) & 0xFFFFFFFF, np.uint32)

    for line in re.sub(r"^\{|\}$", "", text).split(";"):
        words = re.split(r"[\s,]+", line.strip().replace("[", "").replace("]", ""))
        where = registers[words.pop(0)[1:]] if words[0].startswith("@") else np.ones(32, bool)
        (name, *kind), names = words[0].split("."), words[1:]
        if name == "st":
            for lane in np.flatnonzero(where):
                place, stored = value(names[0])[lane], value(names[1])[lane]
                assert memory.setdefault(int(place), stored) == stored, "two lanes, two values"
        elif name:  # no declaration
            registers[names[0]] = step(name, kind, [value(one) for one in names[1:]])
    for number in range(len(operands)):
        operands[number] = registers[f"${number}"]
    return memory


def warp(units, dtype, seed):
    """Groups of halves [2 * units, 128], and their words as a warp has them: [units, 32 lanes, 4 words]."""
    rng = np.random.default_rng(seed)
    halves = rng.integers(0, 1 << 16, (2 * units, FP8_GROUP), dtype=np.uint16)
    halves[0, 3:] = 0x7FFF  # NaN
    halves[-1] = rng.integers(0, 0x3000, FP8_GROUP)
    halves[1 % units, ::2] = 0
    if seed == 1:
        halves[0] = 0xFFFF
    words = halves.reshape(-1).view(np.uint32).reshape(units, 32, 4)
    return halves, words


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("units", [1, 2, 4])
def test_a_lane_has_the_largest_of_its_group_and_every_word_gets_that_of_its_own(units, dtype, seed):
    halves, words = warp(units, dtype, seed)
    wide = halves.view(np.float16).astype("f4") if dtype == "float16" else (halves.astype("u4") << 16).view("f4")
    infinity = 0x7C00 if dtype == "float16" else 0x7F80
    sizes = np.where((halves & 0x7FFF) > infinity, 0, halves & 0x7FFF).max(1)
    assert np.isfinite(quantise(wide, "divide")[1]).sum() > 0, "these are groups of the contract"
    count = 4 * units
    operands = [np.zeros(32, np.uint32)] * count + [words[n // 4, :, n % 4] for n in range(count)]
    run(quantise_ptx.largest(units, dtype), operands)
    group_of_lane = 2 * (LANES % units) + LANES // 16
    for number in range(count):
        np.testing.assert_array_equal(operands[number], sizes[group_of_lane])
    operands = [np.zeros(32, np.uint32)] * count + operands[:count]
    run(quantise_ptx.gather(units), operands)
    for number in range(count):
        np.testing.assert_array_equal(operands[number], sizes[2 * (number // 4) + LANES // 16])


@pytest.mark.parametrize("units", [1, 2, 4])
def test_every_group_that_is_there_gets_one_scale(units):
    count, first, stride, row = 4 * units, 5, 12, 1 << 20
    group_of_lane = 2 * (LANES % units) + LANES // 16
    group = [(first + 2 * (n // 4) + LANES // 16).astype(np.uint32) for n in range(count)]
    there = [(g < first + 2 * units - 1).astype(np.uint32) for g in group]  # the last one is behind the slice
    inputs = [np.full(32, row, np.int64)] * count + [(1000 + group_of_lane).astype(np.uint32)] * count
    inputs += group + [np.full(32, stride, np.uint32)] * count + there
    stored = run(quantise_ptx.store_scale(units), [np.zeros(32, np.uint32)] * count + inputs)
    assert stored == {row + (first + g) * stride: 1000 + g for g in range(2 * units - 1)}


def test_the_interpreter_runs_no_ptx():
    assert set(quantise_ptx.quantising(4, "bfloat16", True).values()) == {None}
    made = quantise_ptx.quantising(2, "float16", False)
    assert made["OPERANDS_OF_WORDS"] == ",".join(["=&r"] * 8 + ["r"] * 8)
    assert made["OPERANDS_OF_SCALES"].count("l") == 8 and len(made["OPERANDS_OF_SCALES"].split(",")) == 48

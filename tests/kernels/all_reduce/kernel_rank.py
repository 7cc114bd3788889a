"""One rank of the all-reduce kernel under the interpreter: a process that runs a list of cases on shared memory.

Run by test_kernel.py: `python kernel_rank.py FOLDER RANK`. FOLDER holds cases.json and one file of
shared memory; the outputs of each step go to FOLDER/RANK.npz.
"""

import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.error_page import ERROR_PAGE_BYTES
from tests.support import tensors

BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


def to_bits(values, dtype):
    """fp32 numbers rounded to nearest even, as the bits of `dtype`."""
    return tensors.to_bits(values, dtype).view(BITS[dtype])


def inputs(case, rank, step):
    """x of this rank, and residual and weight, which are the same on all ranks; as bits."""
    rows, hidden, dtype = case["rows"][step], case["hidden_size"], case["dtype"]
    seed = 0 if case.get("same_rows") else step  # then a call of fewer rows has the first ones of a call of more
    x = np.random.default_rng([seed, rank]).standard_normal((rows, hidden)).astype(np.float32)
    common = np.random.default_rng([seed, 99])
    weight = common.standard_normal(hidden).astype(np.float32)
    if case.get("tiny"):  # a group whose largest number is too small for a factor of fp32, and one of zeros
        weight[:128] *= 2.0**-125
        weight[128:256] = 0
    residual = common.standard_normal((rows, hidden)).astype(np.float32)
    x = to_bits(x, dtype)
    if case.get("payload") == "special":  # -0.0, subnormals, Inf, NaN and the patterns that words use themselves
        ones = np.iinfo(x.dtype).max
        top = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}[dtype]
        odd = [0, ones // 2 + 1, 1, ones // 2 + 2, top, top + ones // 2 + 1, top + 1, ones, ones, ones]
        x[0, : len(odd)] = odd
        x[-1] = [0, ones // 2 + 1][rank % 2]
        if rows > 2:
            x[1] = ones
    return x, to_bits(residual, dtype), to_bits(weight, case["weight_dtype"])


class Rank:
    """A rank's memory for one case, and its calls. `region` is the shared memory of all ranks for this case."""

    def __init__(self, case, rank, region):
        self.case, self.rank = case, rank
        self.plan = plan_of(case)
        size = plans.symmetric_bytes(self.plan, case["slots"])
        self.page = np.zeros(ERROR_PAGE_BYTES // 8, np.int64)
        base = region.ctypes.data
        words = plans.state_memory_words(
            self.plan,
            case["slots"],
            limit=int(case.get("limit_s", 30) * 1e9),
            error_page=self.page.ctypes.data,
            addresses=[base + peer * size for peer in range(case["size"])],
        )
        self.state_memory = np.array(words + [-1] * 64, np.int64)  # with words behind it that nobody may touch
        self.state_memory[plans.COUNTER] = case.get("launches", 0) * plans.COUNTER_STEP

    def call(self, step, rows, x, residual, weight, two_shot=False):
        """Returns norm_out and residual_out, as bits, by name, of a case with FP8 codes and scales too. x and
        residual may be written over."""
        aliased = self.case.get("aliased")
        norm_out = x if aliased else np.full_like(x, 0x1234)
        residual_out = residual if aliased else np.full_like(x, 0x1234)
        at_once = self.case["programs"], self.case["programs"]
        cut = plans.launches(self.plan, self.case["slots"], at_once, rows, two_shot)
        constants = plans.constants(
            self.plan,
            weight_dtype=self.case["weight_dtype"],
            has_residual=self.case.get("residual", True),
            two_shot=two_shot,
            residual_stays=self.case.get("residual_stays", False),
            rounds=cut[0].rounds > 1,
            fp8=self.case.get("fp8"),
        )
        fp8 = Fp8(self.case, rows) if self.case.get("fp8") else None
        # Loaded here: the test process reads this module's inputs, and must not load Triton in this mode.
        module, name = ("kernel_fp8", "all_reduce_rms_norm_fp8") if fp8 else ("kernel", "all_reduce_rms_norm")
        kernel = triton_launch.load_kernel(f"all_reduce.{module}", name)
        launch = triton_launch.prepare(kernel, (), constants, "cpu").launch
        for programs, start, count, rounds in cut:
            address = [t.ctypes.data + start * x.strides[0] for t in (x, residual, weight, norm_out, residual_out)]
            address[2:3] = [weight.ctypes.data]
            address += [self.state_memory.ctypes.data, int(self.state_memory[2 + self.rank])]
            numbers = count, rounds, self.rank, step, 1e-5, self.case.get("weight_offset", 0.0)
            launch(programs, *address, *numbers, *(fp8.arguments(start) if fp8 else ()))
        return {"norm": norm_out, "residual": residual_out, **(fp8.outputs() if fp8 else {})}


class Fp8:
    """Codes and scales of one call, with room behind them that nobody may touch."""

    def __init__(self, case, rows):
        self.rows, self.hidden, self.by_column = rows, case["hidden_size"], case.get("scales") == "by column"
        groups = self.hidden // 128
        self.codes = aligned(np.full((rows + 1, self.hidden), 0xA5, np.uint8))
        self.scales = np.full((groups, rows + 3) if self.by_column else (rows + 1, groups), -7, np.float32)
        self.static_factor = float(np.float32(1) / np.float32(case.get("static_scale", 1.0)))

    def arguments(self, start):
        strides = [stride // 4 for stride in self.scales.strides]
        row_stride, group_stride = strides[::-1] if self.by_column else strides
        scales = self.scales.ctypes.data + 4 * start * row_stride
        return self.codes.ctypes.data + start * self.hidden, scales, row_stride, group_stride, self.static_factor

    def outputs(self):
        scales = self.scales.T if self.by_column else self.scales
        assert (self.codes[self.rows :] == 0xA5).all() and (scales[self.rows :] == -7).all(), "stores behind the rows"
        return {"codes": self.codes[: self.rows], "scales": np.ascontiguousarray(scales[: self.rows])}


def aligned(bits):
    """The same array at an address that is a multiple of 16."""
    room = np.zeros(bits.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + bits.nbytes].view(bits.dtype).reshape(bits.shape)
    copy[...] = bits
    return copy


def plan_of(case):
    fp8 = bool(case.get("fp8"))
    return plans.plan_for(case["size"], case["hidden_size"], case["dtype"], interpreted=True, fp8=fp8)


def region_bytes(case):
    return case["size"] * plans.symmetric_bytes(plan_of(case), case["slots"])


def fill(case, region):
    """The shared memory of one case before its first call."""
    region[:] = plans.SLOT_FILL
    region.reshape(case["size"], -1)[:, : plans.CONTROL_BYTES] = 0


def main(folder, rank):
    cases = json.loads((folder / "cases.json").read_text())
    with open(folder / "memory", "r+b") as file:
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    results, start = {}, 0
    for number, case in enumerate(cases):
        member = Rank(case, rank, memory[start : start + region_bytes(case)])
        start += region_bytes(case)
        for step, rows in enumerate(case["rows"]):
            if case.get("absent") == [rank, step]:
                break
            if case.get("late") == [rank, step]:
                time.sleep(case["late_s"])
            if case.get("other_stream") == [rank, step]:
                threading.Timer(1, member.state_memory.__setitem__, (plans.COUNTER, 7 * plans.COUNTER_STEP)).start()
            x, residual, weight = (aligned(bits) for bits in inputs(case, rank, step))
            outputs = member.call(step, rows, x, residual, weight, two_shot=case["two_shot"][step])
            results |= {f"{number}.{step}.{name}": output for name, output in outputs.items()}
        results[f"{number}.page"] = member.page
        assert (member.state_memory[-64:] == -1).all(), "stores behind the state memory"
    np.savez(folder / f"{rank}.npz", **results)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    main(Path(sys.argv[1]), int(sys.argv[2]))

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
        self.plan = plans.plan_for(case["size"], case["hidden_size"], case["dtype"], interpreted=True)
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
        """Returns norm_out and residual_out, as bits. x and residual may be written over."""
        aliased = self.case.get("aliased")
        norm_out = x if aliased else np.full_like(x, 0x1234)
        residual_out = residual if aliased else np.full_like(x, 0x1234)
        constants = plans.constants(
            self.plan,
            weight_dtype=self.case["weight_dtype"],
            has_residual=self.case.get("residual", True),
            two_shot=two_shot,
            residual_stays=self.case.get("residual_stays", False),
        )
        # Imported here: the test process reads this module's inputs, and must not load Triton in this mode.
        from fd_fusion.kernels.all_reduce.kernel import all_reduce_rms_norm

        for start, count in plans.launches(self.case["slots"], rows):
            address = [t.ctypes.data + start * x.strides[0] for t in (x, residual, weight, norm_out, residual_out)]
            address[2:3] = [weight.ctypes.data]
            address += [self.state_memory.ctypes.data, int(self.state_memory[2 + self.rank])]
            launch = all_reduce_rms_norm[plans.grid(self.plan, self.case["programs"], count, two_shot)]
            launch(*address, count, self.rank, step, 1e-5, self.case.get("weight_offset", 0.0), **constants)
        return norm_out, residual_out


def aligned(bits):
    """The same array at an address that is a multiple of 16."""
    room = np.zeros(bits.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + bits.nbytes].view(bits.dtype).reshape(bits.shape)
    copy[...] = bits
    return copy


def region_bytes(case):
    plan = plans.plan_for(case["size"], case["hidden_size"], case["dtype"], interpreted=True)
    return case["size"] * plans.symmetric_bytes(plan, case["slots"])


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
            results[f"{number}.{step}.norm"], results[f"{number}.{step}.residual"] = outputs
        results[f"{number}.page"] = member.page
        assert (member.state_memory[-64:] == -1).all(), "stores behind the state memory"
    np.savez(folder / f"{rank}.npz", **results)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""The exchange of sums between the programs of a row, by the interpreter: one program waits, the test plays the rest.

Run by test_kernel.py: `python neighbour_sums.py`. It prints the sum that the waiting program returned.
"""

import os
import threading
import time

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl

from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce import wait as _wait
from fd_fusion.kernels.all_reduce.context import Call, Memory, Polling, Row, Shape
from fd_fusion.kernels.all_reduce.error_page import ERROR_PAGE_BYTES, read_error_page
from fd_fusion.kernels.all_reduce.packing import pointer
from fd_fusion.kernels.all_reduce.slice_sums import clear_sums, exchange_sums
from fd_fusion.kernels.all_reduce.wait import COUNTER, COUNTER_STEP

HEAD_WORDS = tl.constexpr(plans.HEAD_WORDS)


@triton.jit
def wait_for_neighbour(state_memory, own_slots, out):
    """Program 0 of the 2 of a row, with the sum 1.0 of its own slice."""
    sums = pointer(state_memory, tl.uint32) + 2 * HEAD_WORDS
    state_memory, own_slots = pointer(state_memory, tl.uint64), pointer(own_slots, tl.uint32)
    launch, zero = tl.load(state_memory + COUNTER, volatile=True) // COUNTER_STEP, tl.full((), 0, tl.int32)
    memory = Memory(own_slots, state_memory, sums, (own_slots,))
    call = Call(zero, zero, launch, 1, zero, 1e-5, 0.0)
    own = tl.full((), 1.0, tl.float32)
    row = Row(zero, zero, zero, zero, zero, zero, own_slots)
    shape = Shape(2, 256, 128, 128, 2, 1, 1, "float32", "float32", False, False, 2, False)
    total = exchange_sums((own, own), zero, row, memory, call, shape, Polling(None, None, None, 1, True))
    clear_sums(zero, memory, call, shape)
    tl.store(pointer(out, tl.float32), total)


def main():
    own_slots, out = np.zeros(64, np.uint32), np.zeros(4, np.float32)
    page, state_memory = np.zeros(ERROR_PAGE_BYTES // 8, np.int64), np.zeros(64, np.int64)
    state_memory[:4] = 30_000_000_000, page.ctypes.data, own_slots.ctypes.data, own_slots.ctypes.data
    state_memory[plans.COUNTER] = 7 * plans.COUNTER_STEP
    sums = state_memory[plans.HEAD_WORDS : plans.HEAD_WORDS + 2 * plans.LINE_BYTES // 8].view(np.uint32)
    sums[:] = 0xFFFFFFFF

    def others():
        while sums[plans.LINE_BYTES // 4] == 0xFFFFFFFF:  # its own sum, for program 1
            time.sleep(0.001)
        state_memory[plans.COUNTER] = 8 * plans.COUNTER_STEP  # all programs of this launch have begun
        while checks[0] < 2:
            time.sleep(0.001)
        sums[1] = np.float32(2.0).view(np.uint32)

    checks = count_checks()
    threading.Thread(target=others, daemon=True).start()
    launch = triton_launch.prepare(wait_for_neighbour, (), {}, "cpu").launch
    launch(1, state_memory.ctypes.data, own_slots.ctypes.data, out.ctypes.data)
    assert sums[1] == 0xFFFFFFFF, "the sum that was read is not SENTINEL again"
    print(out[0], read_error_page(page.tolist()))


def count_checks():
    """How often the program has checked its wait: each check reads the clock once."""
    count, clock = [0], _wait.host_clock

    def counting():
        count[0] += 1
        return clock()

    counting.__triton_builtin__ = True
    _wait.host_clock = counting
    return count


main()

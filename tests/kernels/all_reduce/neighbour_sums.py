"""The exchange of sums between the programs of a row, by the interpreter: one program waits, the test plays the rest.

Run by test_kernel.py: `python neighbour_sums.py`. It prints the sum that the waiting program got.
"""

import os
import threading
import time

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce import wait as _wait
from fd_fusion.kernels.all_reduce.error_page import ERROR_PAGE_BYTES, read_error_page
from fd_fusion.kernels.all_reduce.packing import at
from fd_fusion.kernels.all_reduce.wait import COUNTER, HEAD, TURN, clear_sums, sum_slices


@triton.jit
def wait_for_neighbour(local, home, out):
    """Program 0 of the 2 of a row, with the sum 1.0 of its own slice."""
    sums = at(local, tl.uint32) + 2 * HEAD
    local, home = at(local, tl.uint64), at(home, tl.uint32)
    turn, zero = tl.load(local + COUNTER, volatile=True) // TURN, tl.full((), 0, tl.int32)
    own = tl.full((), 1.0, tl.float32)
    total = sum_slices(own, zero, local, home, sums, zero, turn, zero, zero, 2, 2, 32, True)
    clear_sums(sums, zero, 2)
    tl.store(at(out, tl.float32), total)


def main():
    home, out = np.zeros(64, np.uint32), np.zeros(4, np.float32)
    page, local = np.zeros(ERROR_PAGE_BYTES // 8, np.int64), np.zeros(64, np.int64)
    local[:4] = 30_000_000_000, page.ctypes.data, home.ctypes.data, home.ctypes.data
    local[plans.COUNTER] = 7 * plans.TURN
    sums = local[plans.HEAD_WORDS : plans.HEAD_WORDS + 2 * plans.LINE // 8].view(np.uint32)
    sums[:] = 0xFFFFFFFF

    def others():
        while sums[plans.LINE // 4] == 0xFFFFFFFF:  # its own sum, for program 1
            time.sleep(0.001)
        local[plans.COUNTER] = 8 * plans.TURN  # all programs of this launch have begun
        while looked[0] < 2:
            time.sleep(0.001)
        sums[1] = np.float32(2.0).view(np.uint32)

    looked = count_look_ups()
    threading.Thread(target=others, daemon=True).start()
    wait_for_neighbour[(1,)](local.ctypes.data, home.ctypes.data, out.ctypes.data)
    assert sums[1] == 0xFFFFFFFF, "the sum that was read is not unsent again"
    print(out[0], read_error_page(page.tolist()))


def count_look_ups():
    """How often the program has asked whether it waits for nothing: the clock is read once each time."""
    count, clock = [0], _wait.host_clock

    def counting():
        count[0] += 1
        return clock()

    counting.__triton_builtin__ = True
    _wait.host_clock = counting
    return count


main()

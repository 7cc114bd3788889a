"""The exchange of sums between the programs of a row, by the interpreter: one program waits, the test plays the rest.

Run by test_all_reduce_kernel.py: `python neighbour_sums.py`. It prints the sum that the waiting program got.
"""

import os
import threading
import time

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl

from fd_fusion.kernels import _wait
from fd_fusion.kernels import plan as plans
from fd_fusion.kernels._wait import HEAD, sum_slices
from fd_fusion.kernels._words import at

EPOCH = 7


@triton.jit
def wait_for_neighbour(local, home, out):
    """Program 0 of the 2 of a row, with the sum 1.0 of its own slice."""
    local, home = at(local, tl.uint64), at(home, tl.uint32)
    epochs = local + HEAD
    before, zero = tl.load(epochs, volatile=True), tl.full((), 0, tl.int32)
    own = tl.full((), 1.0, tl.float32)
    total = sum_slices(own, zero, local, home, epochs, 0, zero, zero, before, before + 1, 2, 2, 32, True)
    tl.store(at(out, tl.float32), total)


def main():
    home, out = np.zeros(64, np.uint32), np.zeros(4, np.float32)
    page, local = np.zeros(plans.ERROR_PAGE_BYTES // 8, np.int64), np.zeros(64, np.int64)
    local[:4] = 30_000_000_000, page.ctypes.data, home.ctypes.data, home.ctypes.data
    epochs = local[plans.PROGRAM_WORDS :]
    epochs[0] = EPOCH - 1

    def others():
        while epochs[1 + EPOCH % 2] == 0:  # its own sum, with the epoch
            time.sleep(0.001)
        epochs[0] = EPOCH  # thread 0 of the program has seen everything, and is done before its other threads
        while looked[0] < 2:
            time.sleep(0.001)
        epochs[3 + 1 + EPOCH % 2] = (int(np.float32(2.0).view(np.uint32)) << 32) | EPOCH

    looked = count_look_ups()
    threading.Thread(target=others, daemon=True).start()
    wait_for_neighbour[(1,)](local.ctypes.data, home.ctypes.data, out.ctypes.data)
    print(out[0], plans.read_error_page(page.tolist()))


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

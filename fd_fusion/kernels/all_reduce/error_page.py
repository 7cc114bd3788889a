"""The codes of a failed wait, and the error page on which the kernel writes them.

Standard library only: the process beside a rank reads the page too, and loads no NumPy, Triton or framework.
"""

from __future__ import annotations

from typing import Any

from fd_fusion.reasons import Reason, because

ERROR_PAGE_BYTES = 64

# A record of the error page has one of these codes in its bits 0..3. ERROR_ABORTED: another rank failed first.
ERROR_TIMED_OUT, ERROR_ABORTED, ERROR_TWO_STREAMS = 1, 2, 3

# The state of a wait inside the kernel: 0 when all words have come, otherwise a sum of these bits.
WAIT_MISSING, WAIT_ABORTED, WAIT_TIMED_OUT, WAIT_TWO_STREAMS = 1, 2, 4, 8


def read_error_page(words: list[int]) -> dict[str, Any] | None:
    """Decode the int64 words of an error page; None if no call has failed.

    Returns: code (ERROR_TIMED_OUT, ERROR_ABORTED or ERROR_TWO_STREAMS), op, row, launch, missing (ranks).
    """
    for record, launch in ((words[0], words[1]), (words[2], words[3])):
        if record:
            return {
                "code": record & 15,
                "op": record >> 16 & 0xFFFFFF,
                "row": record >> 40 & 0x7FFFFF,
                "launch": launch,
                "missing": [rank for rank in range(8) if record >> (4 + rank) & 1],
            }
    return None


def reason_of(words: list[int]) -> Reason | None:
    """Return the reason that the words of an error page give, or None for a page without an error."""
    error = read_error_page(words)
    if error is None:
        return None
    where = {name: error[name] for name in ("op", "row", "launch")}
    if error["code"] == ERROR_TWO_STREAMS:
        return because("two_streams", **where)
    if error["code"] == ERROR_ABORTED:
        return because("aborted")
    return because("dead_group", **where, missing=", ".join(map(str, error["missing"])) or "unknown")

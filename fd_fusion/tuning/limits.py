"""How many rows are worth fusing.

The limits built in here are the ones below which fusing won on the machines named in examples/results; a table
measured on the machine itself (`python -m fd_fusion tune`, kept by `table.py`) takes their place.
"""

from __future__ import annotations

from fd_fusion.spec import OpSpec

NEVER = 2**31 - 1  # as `two_shot_rows`: no call has so many rows


def row_limit(spec: OpSpec, *, stays: bool = False) -> int | None:
    """Return the most rows T that a fused call may have; None means any number.

    Deterministic mode fuses every T, so that no table chooses by T; then an explicit limit; then the tuning table's;
    then the built-in one. stays: of calls whose residual stays with the owners of its rows.
    """
    if spec.deterministic:
        return None
    if spec.max_token_num is not None:
        return spec.max_token_num
    if spec.tuned_rows is not None:
        return max(spec.tuned_rows, spec.tuned_staying_rows if stays else 0)
    return built_in_limit(spec.device, spec.size, spec.hidden_size, stays=stays)


def limit_source(spec: OpSpec) -> str:
    """Return the name of what set `row_limit`, for the report."""
    if spec.deterministic:
        return "deterministic mode"
    if spec.max_token_num is not None:
        return "max_token_num"
    return "tuning table" if spec.tuned_rows is not None else "built in"


def built_in_limit(device: str, size: int, hidden_size: int, *, stays: bool = False) -> int:
    """Return the rows up to which fusing is expected to win: a fixed number of bytes that a rank sends, by group
    size, and no more than 2048 rows of two ranks, 1024 of four, 64 of others. stays: more bytes of four ranks, where
    the residual stays with the owners of its rows; else it is sent back. Over NVLink no measured size below was
    slower than an all-reduce that pulls, as FastDeploy's own, or NCCL's, and a norm (rivals_n*.json in
    examples/results, and all_reduce_24mb_n4.json for what stays; four H). Groups of 3 and 5 to 8 were never measured.

    On a CPU fusing never wins, and the number only bounds the memory of a gather.
    """
    if device == "cpu":
        return 512
    if size == 2:
        return max(1, min(2048, (1 << 24) // hidden_size))
    if size == 4:
        return max(1, min(1024, (1 << 23 if stays else 1 << 21) // hidden_size))
    return max(1, min(64, (1 << 19 if size == 3 else 1 << 18) // hidden_size))

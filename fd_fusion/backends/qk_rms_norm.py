"""The launch of the QK norm's Triton kernel on Paddle or torch tensors: on a GPU, or interpreted on a CPU.

A kernel is compiled once for each layout of the heads, never for a T, and launched without Triton's binder:
eager prefill launches one in every layer, so the host's time counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fd_fusion.frameworks.tensors import dtype_name
from fd_fusion.frameworks.triton_launch import interpreting, prepare, require_mode, uses_pdl
from fd_fusion.reference import DTYPE_BYTES

_MOST_HEADS = 2**31 - 4096  # of all rows together: the kernel counts them in 32 bits


def qk_rms_norm(
    qkv: Any,
    q_weight: Any,
    k_weight: Any,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    weight_offset: float = 0.0,
    out: tuple[Any, Any] | None = None,
) -> Any:
    """Normalise each head of q and of k in packed rows; v is neither read nor written.

        x = round(x * rsqrt(mean(x^2) + eps) * (weight + weight_offset)),   in fp32, rounded once

    A head's bits depend on the head and the weight alone, not on T or its place in the batch.

    Args:
        qkv: [T, at least (q_heads + kv_heads) D], q heads then k heads then anything; bf16, fp16 or fp32; rows
            may be strided. Multiples of 16 bytes in address and 16 elements in stride are the fast path.
        q_weight, k_weight: [D], contiguous, of one dtype, which may differ from that of qkv.
        weight_offset: added in fp32; 1.0 for Gemma.
        out: (q [T, q_heads D], k [T, kv_heads D]) to write to, rows may be strided; None: in place.
    Returns: qkv, changed in place, or `out`.
    Raises: ValueError: shapes, strides or dtypes that do not fit. FusionError: no Triton here, or Triton was
        imported in the other mode (`TRITON_INTERPRET`).
    """
    q_size, k_size = q_heads * head_dim, kv_heads * head_dim
    rows, stride = _rows(qkv, "qkv", q_size + k_size)
    dtype, weight_dtype = qkv.dtype, q_weight.dtype
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.ndim != 1 or weight.shape[0] != head_dim or not weight.is_contiguous():
            raise ValueError(f"qk_rms_norm: {name} is {list(weight.shape)}, expected [{head_dim}], contiguous")
    if k_weight.dtype != weight_dtype:
        raise ValueError(f"qk_rms_norm: q_weight is {weight_dtype}, k_weight {k_weight.dtype}; expected one dtype")
    address = qkv.data_ptr()
    addresses = (address, address, address, q_weight.data_ptr(), k_weight.data_ptr())
    strides = (stride, 0, 0)
    if out is not None:
        places = [_rows(part, f"out[{i}]", (q_size, k_size)[i], rows, dtype) for i, part in enumerate(out)]
        addresses = (address, out[0].data_ptr(), out[1].data_ptr(), *addresses[3:])
        strides = (stride, places[0][1], places[1][1])
    if rows:
        bits = 0
        for number in (*addresses, *strides):
            bits |= number
        launch = launcher(
            *(qkv.is_cuda, dtype, weight_dtype, q_heads, kv_heads, head_dim),
            *(float(eps), float(weight_offset), out is None, not bits & 15),
        )
        launch(rows, addresses, strides)
    return qkv if out is None else out


def _rows(tensor: Any, name: str, width: int, rows: int | None = None, dtype: Any = None) -> tuple[int, int]:
    """Return (T, row stride) of a tensor whose rows hold `width` elements side by side, or more if `rows` is None."""
    shape = tensor.shape
    fits = len(shape) == 2 and (shape[1] >= width if rows is None else tuple(shape) == (rows, width))
    if not fits or (dtype is not None and tensor.dtype != dtype):
        expected = f"[T, at least {width}]" if rows is None else f"[{rows}, {width}] of {dtype}"
        raise ValueError(f"qk_rms_norm: {name} is {list(shape)} of {tensor.dtype}, expected {expected}")
    stride = tensor.stride()
    if stride[1] != 1 and shape[0]:  # Paddle's strides of an empty tensor mean nothing
        raise ValueError(f"qk_rms_norm: {name} has strides {list(stride)}, expected [any, 1]: make it contiguous")
    return shape[0], stride[0] if shape[0] > 1 else 0  # one row's stride is anything


@functools.cache
def launcher(
    on_gpu: bool,
    dtype: Any,
    weight_dtype: Any,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    weight_offset: float,
    in_place: bool,
    aligned: bool,
) -> Callable[[int, tuple, tuple], None]:
    """Compile a kernel and return its launch, a function of (rows, addresses, strides). A process drives one GPU."""
    names = [dtype_name(dtype), dtype_name(weight_dtype)]
    for name in names:
        if name not in DTYPE_BYTES:
            raise ValueError(f"qk_rms_norm: dtype {name}, expected one of {sorted(DTYPE_BYTES)}")
    if min(q_heads, kv_heads, head_dim) < 1:
        raise ValueError(f"qk_rms_norm: {q_heads} q heads and {kv_heads} kv heads of {head_dim} elements")
    device = "gpu" if on_gpu else "cpu"
    with interpreting(device):
        require_mode(device)
        from fd_fusion.kernels import qk_rms_norm as kernels
    shape, pdl = kernels.tile(head_dim, DTYPE_BYTES[names[0]]), on_gpu and uses_pdl()
    constants = shape | {"EPS": eps, "WEIGHT_OFFSET": weight_offset, "PDL": pdl, "ROUND_BY_HAND": not on_gpu}
    constants |= {"Q_HEADS": q_heads, "KV_HEADS": kv_heads, "D": head_dim, "IN_PLACE": in_place}
    constants |= {"num_warps": kernels.NUM_WARPS, "enable_fp_fusion": False} | ({"launch_pdl": True} if pdl else {})
    row_heads, heads = q_heads + kv_heads, shape["HEADS"]
    types = [names[0]] * 3 + [names[1]] * 2
    address, stride = (16, 16) if aligned else (2, 2)  # all that Triton looks at is whether 16 divides them
    like = (*(Pointer(address, name) for name in types), 2, stride, stride, stride)
    kernel = prepare(kernels.qk_rms_norm_kernel, like, constants, device)

    def launch(rows: int, addresses: tuple, strides: tuple) -> None:
        if rows * row_heads > _MOST_HEADS:
            raise ValueError(f"qk_rms_norm: {rows} rows of {row_heads} heads, expected at most {_MOST_HEADS} heads")
        programs = -(-rows * row_heads // heads)
        if on_gpu:
            kernel.launch(programs, *addresses, rows, *strides)
            return
        with interpreting("cpu"):  # Triton imports parts of itself at the first launch
            kernel.launch(programs, *map(Pointer, addresses, types), rows, *strides)

    return launch


class Pointer:
    """An address and an element type in the form of a tensor, for Triton to compile or interpret a kernel with.

    Triton reads `data_ptr` and the last part of `str(dtype)`; its interpreter reads the storage besides.
    """

    def __init__(self, address: int, dtype: str):
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address

    def _itself(self, *args: Any, **kwargs: Any) -> Pointer:
        return self

    untyped_storage = cpu = copy_ = new_empty = set_ = _itself

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    stride = size

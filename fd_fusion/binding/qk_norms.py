"""The RMSNorm of q and k by one kernel: chosen, tried and compared with the stock formula at bind, layer by layer.

The ranks exchange nothing, so they do not vote: each rank normalises its own heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_runtime
from fd_fusion.frameworks.tensors import dtype_name, numbers
from fd_fusion.kernels.all_reduce.plan import SMALLEST
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import UNIT_ROUNDOFF

# What the squares of a row's numbers may be without being lost in this dtype.
_LEAST_SQUARE = {"float32": 1e-30, "bfloat16": 1e-30, "float16": 1e-12}
# Below it an element has no full precision; far below what a head has after its norm.
_SMALL = {"float32": 1e-30, "bfloat16": 1e-30, "float16": 2.0**-14}


@dataclass(frozen=True)
class QKNorm:
    """A layer that normalises q and k on packed q|k|v rows [T, width]. `stock` returns them normalised.

    `attach(kernel)` makes the layer call kernel(qkv), in place, and returns the undo.
    """

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    width: int
    numbers: Callable[[], tuple[float, float]]  # eps and weight_offset, read at each call, as the stock formula does
    weights: Callable[[], tuple[Any, Any]]
    stock: Callable[[Any], Any]
    attach: Callable[[Callable[[Any], Any]], Callable[[], None]]
    dtype: str | None = None  # of the rows; that of the weights where nothing else is known


def choose_qk_norms(norms: Sequence[QKNorm], config: FusionConfig) -> tuple[list[QKNorm], dict[str, Reason]]:
    """Try each layer's kernel. Returns (the layers that get one, why the others stay stock, by name)."""
    rule, device = None, paddle_runtime.device_of()[0]  # a rule is never an error
    if not config.enable_qk_rms_norm:
        rule = because("disabled", flag="enable_qk_rms_norm")
    elif config.backend != "triton" and (config.backend, device) != ("auto", "gpu"):
        rule = because("qk_stock", backend=config.backend, device=device)
    reasons = {norm.name: rule or _try(norm) for norm in norms}
    return [norm for norm in norms if reasons[norm.name] is None], {k: v for k, v in reasons.items() if v is not None}


class Kernel:
    """qkv -> qkv, changed in place, with the numbers and the weights of each call. A copy of its layer has none."""

    def __init__(self, norm: QKNorm):
        from fd_fusion.backends.qk_rms_norm import qk_rms_norm

        heads = {"q_heads": norm.q_heads, "kv_heads": norm.kv_heads, "head_dim": norm.head_dim}
        self._weights, self._numbers = norm.weights, norm.numbers
        self._run = functools.partial(qk_rms_norm, **heads)

    def __call__(self, qkv: Any) -> Any:
        eps, weight_offset = self._numbers()
        return self._run(qkv, *self._weights(), eps=eps, weight_offset=weight_offset)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def _try(norm: QKNorm) -> Reason | None:
    """Compile, run on rows that show every part of the formula, compare with the stock one element by element."""
    eps, _ = norm.numbers()
    if not SMALLEST <= eps < np.inf:
        return because("eps", got=eps)
    dtype = norm.dtype or dtype_name(norm.weights()[0])
    rows = paddle.to_tensor(_rows(norm, dtype)).astype(dtype)
    before = numbers(rows)
    try:
        want = numbers(norm.stock(rows.clone()))
        got = numbers(Kernel(norm)(rows))
    except Exception as error:  # a broken package or a failed compile: the reason is reported
        return because("backend_failed", backend="triton", error=f"{type(error).__name__}: {error}")
    q, k = norm.q_heads * norm.head_dim, norm.kv_heads * norm.head_dim
    if not (want[:, :q].any() and want[:, q : q + k].any()):
        return because("qk_zero", site=norm.name)
    if (got[:, q + k :] != before[:, q + k :]).any():
        return because("qk_wrote_v", site=norm.name)
    allowed = _allowed(norm.head_dim, dtype)
    got, want = got[:, : q + k], want[:, : q + k]
    error = (np.abs(got - want) / (np.abs(want) + _SMALL[dtype])).max()
    if not error <= allowed:
        facts = {"error": f"{error:.2e}", "budget": f"{allowed:.2e}"}
        return because("qk_differs", site=norm.name, **facts)
    return None


def _rows(norm: QKNorm, dtype: str) -> np.ndarray:
    """Return rows of both signs; the root mean square of a head is 1/4, 1, and many times that of eps.

    The first kind shows eps, the last the rest. No generator but our own is used.
    """
    of_eps = max(norm.numbers()[0], _LEAST_SQUARE[dtype]) ** 0.5
    sizes = np.array([0.25, 1.0, 0.0, 0.0]) * of_eps + [0.0, 0.0, 1.0, 30.0]
    values = np.random.default_rng(0).standard_normal((len(sizes), norm.width))
    return (values * sizes[:, None]).astype(np.float32)


def _allowed(head_dim: int, dtype: str) -> float:
    """Return the relative error that an element may have. We round once; a host three times at most: x * scale, the
    weight with its offset, and their product. Beside it float32 arithmetic: D additions in any order, half of whose
    error is in the root, and ten roundings and approximations of either side.
    """
    return 4 * UNIT_ROUNDOFF[dtype] + (head_dim + 20) * UNIT_ROUNDOFF["float32"]

"""FP8 for layers of FastDeploy's `block_wise_fp8`: the norm that they read is quantised in the kernel of its Site.

The tensor that the Site gives carries its codes and scales. While such a Site is bound FastDeploy's quantisers return
these for that very tensor, unchanged since, where they are asked for the same form; any other tensor they quantise as
ever. So the layers are the host's, in whichever method of theirs the quantiser is called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import paddle

from fd_fusion.binding.attributes import set_attribute, undo_in_turn
from fd_fusion.frameworks.paddle_ops import is_eager
from fd_fusion.frameworks.tensors import bytes_of, numbers
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import FP8_GROUP, quantise
from fd_fusion.site import Site
from fd_fusion.spec import Fp8

_LINEAR = "BlockWiseFP8LinearMethod"
_EXPERTS = ("BlockWiseFP8MoEMethod", "DeepGemmFusedMoeMethod")
_CARRIED = "_fd_fusion_fp8"
_PHI = ("paddle.incubate.nn.functional", "fp8_quant_blockwise")
_OPS = "fastdeploy.model_executor.ops.gpu"


class Carried(NamedTuple):
    """What a tensor carries: its codes and scales, and what these were made for."""

    codes: Any
    scales: Any  # [T, H / 128]
    form: Fp8
    site: Site
    state: tuple[int, int]  # of the tensor: another one shows that it is not the norm any more


def form_for(reader: Any, hidden_size: int, dtype: str) -> Fp8 | Reason | None:
    """Return in which form the FP8 layers in `reader`, which reads a norm of H columns, take it; None without any; or
    why that cannot be had: the host's quantiser gives the bits of no known formula, for example."""
    methods = [getattr(part, "quant_method", None) for part in reader.sublayers(include_self=True)] if reader else []
    linears = [one for one in methods if type(one).__name__ == _LINEAR]
    experts = [one for one in methods if type(one).__name__ in _EXPERTS]
    if not linears and not experts:
        return None
    from fastdeploy import envs

    if getattr(envs, "FD_USE_BLOCK_WISE_CUDA_GRAPH", False):  # such a graph would keep the address of the codes
        return because("no_fp8", got="FD_USE_BLOCK_WISE_CUDA_GRAPH=1", need="where no layer has a graph of its own")
    if dtype == "float32":
        return because("no_fp8", got=dtype, need="bfloat16 or float16")
    config = (linears or experts)[0].quant_config
    if config.deepgemm_scale_ue8m0 or hidden_size % FP8_GROUP or list(config.weight_block_size) != [FP8_GROUP] * 2:
        need = f"in groups of {FP8_GROUP}, with float32 scales"
        return because("no_fp8", got=f"H={hidden_size}, blocks of {config.weight_block_size}", need=need)
    found = formula_of(bool(linears), dtype)
    if isinstance(found, Reason):
        return found
    return Fp8(found, by_column=bool(linears))


def formula_of(by_column: bool, dtype: str) -> str | Reason:
    """Return the formula of the quantiser that the host calls now, of which it gives every bit.

    Paddle's op has two kernels, one of them for whole blocks of 128 rows.
    """
    x = paddle.to_tensor(_samples(dtype)).view(dtype)
    starts = 0, len(x) % 128
    assert starts[1], "these are whole blocks already"
    try:
        found = [by_host(x[start:], by_column) for start in starts]
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        return because("fp8_differs", detail=f"it raised {type(error).__name__}: {error}")
    formulas = found[0][0]
    for formula in formulas:
        want_codes, want_scales = _wanted(dtype, formula)
        if all(
            np.array_equal(bytes_of(codes), want_codes[start:])
            and np.array_equal(numbers(scales).view(np.uint32), want_scales[start:].view(np.uint32))
            for start, (_, codes, scales) in zip(starts, found)
        ):
            return formula
    return because("fp8_differs", detail=f"its bits are not those of {' or '.join(formulas)}")


def by_host(x: Any, by_column: bool) -> tuple[tuple[str, ...], Any, Any]:
    """Quantise by the host's own quantiser, as its layers call it now. Returns (formulas that it may be of, codes,
    scales [T, H / 128])."""
    from fastdeploy import envs

    if envs.FD_USE_PHI_FP8_QUANT:
        pow2 = bool(envs.FD_FP8_QUANT_WITH_POW2SCALE)
        codes, scales = _symbol(*_PHI)(x, using_pow2_scale=pow2, output_scale_transpose=by_column)
        formulas, scales = ("multiply_pow2",) if pow2 else ("multiply",), scales.T if by_column else scales
    else:
        formulas, name = ("divide", "divide_7"), "per_token_quant_padding" if by_column else "per_token_quant"
        codes, scales = _symbol(_OPS, name)(x, FP8_GROUP, False)
    return formulas, codes, scales[: len(x)]


@functools.cache  # a model asks for each of its pairs
def _samples(dtype: str) -> np.ndarray:
    """Return words of halves, groups [T, 128]: many sizes of the largest, zeros, all kinds of others, Inf and NaN.

    The largest is zero, or from 2^-100 on: what is subnormal a CPU takes for zero.
    """
    random = np.random.default_rng(5)
    largest = np.arange(0x0D80 if dtype == "bfloat16" else 0, 0x8000, 43)
    special = [0, 0x7F7F, 0x7F80] if dtype == "bfloat16" else [1, 0x7BFF, 0x7C00]
    largest = np.append(largest, special).astype(np.uint16)
    words = random.integers(0, 1 << 16, (len(largest), FP8_GROUP), dtype=np.uint16)
    words = np.where((words & 0x7FFF) <= largest[:, None], words, (words & 0x8000) | largest[:, None])
    words[:, 3], words[::7, 5] = largest, 0x7FFF
    return words.view(np.int16)


@functools.cache
def _wanted(dtype: str, formula: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what `formula` makes of the samples; a row's codes and scales do not depend on the others."""
    return quantise(numbers(paddle.to_tensor(_samples(dtype)).view(dtype)), formula)


def carry(norm: Any, codes: Any, scales: Any, form: Fp8, site: Site) -> None:
    """Let a norm carry its codes and scales to the layers that read it."""
    setattr(norm, _CARRIED, Carried(codes, scales, form, site, _state(norm)))


def _state(x: Any) -> tuple[int, int]:
    """Return what a change in place changes: the version, also by a view, or the memory (`x.data = ...`)."""
    return x.inplace_version, x.data_ptr()


_installed: list[Callable[[], None]] = []  # the undos
_users = 0


def install() -> Callable[[], None]:
    """Let the host's quantisers return what a tensor carries. Returns the undo, which the last user's undo is."""
    global _users
    if not _users:
        for where, name, asked in (
            (*_PHI, _asked_of_phi),
            (_OPS, "per_token_quant", functools.partial(_asked_of_ops, False)),
            (_OPS, "per_token_quant_padding", functools.partial(_asked_of_ops, True)),
        ):
            with contextlib.suppress(ImportError, AttributeError):  # one that is called was found by `formula_of`
                module = importlib.import_module(where)
                _installed.append(set_attribute(module, name, _carrying(getattr(module, name), asked)))
    _users += 1
    return functools.cache(_leave)  # once


def _leave() -> None:
    global _users
    _users -= 1
    if not _users:
        undo_in_turn(_installed)


def _symbol(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)


def _carrying(stock: Callable, asked: Callable[..., tuple[tuple[str, ...], bool, bool] | None]) -> Callable:
    """Return the quantiser that gives what a tensor carries. `asked`: what the other arguments ask for."""

    def quantiser(x, *args, **kwargs):
        if not is_eager():  # a graph that is being traced calls the stock one, and must not look into a tensor
            return stock(x, *args, **kwargs)
        carried = getattr(x, _CARRIED, None)
        if carried is None or carried.state != _state(x):
            return stock(x, *args, **kwargs)
        form = carried.form
        formulas, by_column, transposed = asked(*args, **kwargs) or ((), False, False)
        if form.formula not in formulas or (by_column and not form.by_column):
            return stock(x, *args, **kwargs)
        carried.site.count_taken()
        # By rows they are the stock ones in their strides too: for each others the experts' kernel is compiled anew.
        scales = carried.scales if by_column == form.by_column else carried.scales.contiguous()
        return carried.codes, scales.T if transposed else scales

    quantiser.__wrapped__ = stock
    return quantiser


def _asked_of_phi(*args, using_pow2_scale=None, output_scale_transpose=None, using_ue8m0_scale=False, **others):
    """Return (formulas, by column, given transposed) of a call of `fp8_quant_blockwise`, as the host writes it; None
    of one with anything else in it, or that leaves it to Paddle's defaults."""
    if args or others or using_ue8m0_scale or using_pow2_scale is None or output_scale_transpose is None:
        return None
    formulas = ("multiply_pow2",) if using_pow2_scale else ("multiply",)
    return formulas, output_scale_transpose, output_scale_transpose


def _asked_of_ops(by_column: bool, block_size=None, use_ue8m0=None, *args, **others):
    """Return the same of a call of one of FastDeploy's ops, which give the scales by columns as a view."""
    if args or others or use_ue8m0 is not False or block_size != FP8_GROUP:
        return None
    return ("divide", "divide_7"), by_column, False

"""FP8 in groups of 128: Paddle's quantiser, DeepGEMM's product, and the host's Triton kernel for experts."""

import ml_dtypes
import numpy as np
import paddle

from cpu_host.ops.memory import flat, view

OPS = ("tritonmoe_preprocess_func",)
_MOST, _GROUP = np.float32(448), 128


def fp8_quant_blockwise(x, *, using_pow2_scale=True, output_scale_transpose=True, using_ue8m0_scale=False):
    """code = x * factor in e4m3, scale = 1 / factor; factor = 448 / max |x| of each group of 128 along a row, rounded
    down to a power of two if asked. A group of zeros has 1; NaN is no maximum.

    Returns: codes [T, H], and scales [T, H / 128], or [H / 128, T rounded up to 4].
    """
    assert not using_ue8m0_scale
    values = x.astype("float32").numpy().reshape(x.shape[0], -1, _GROUP)
    largest = np.nanmax(np.where(np.isnan(values), 0, np.abs(values)), -1, keepdims=True, initial=0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        factor = np.where(largest == 0, np.float32(1), _MOST / largest)
        top = np.float32(2.0**127 if using_pow2_scale else float.fromhex("0x1.FEp127"))
        factor = np.where(np.isinf(factor), top, factor)
        if using_pow2_scale:
            factor = (factor.view(np.uint32) & 0x7F800000).view(np.float32)
        codes = np.clip(values * factor, -_MOST, _MOST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        scales = (np.float32(1) / factor)[..., 0]
        codes = np.where(np.isnan(values * factor), np.uint8(0x7F), codes).reshape(x.shape)
    if output_scale_transpose:
        scales = np.ascontiguousarray(np.pad(scales, ((0, -len(scales) % 4), (0, 0))).T)
    return paddle.to_tensor(codes).view("float8_e4m3fn"), paddle.to_tensor(scales)


def _values(codes, scales, block_rows=1):
    """What codes [R, K] stand for: scales [R / block_rows, K / 128], both rounded up."""
    wide = np.repeat(np.repeat(scales, block_rows, 0), _GROUP, 1)
    return codes.astype(np.float32) * wide[: codes.shape[0], : codes.shape[1]]


def fp8_gemm_nt(a, b, out):
    """out = A B^T, in place. a: codes [T, K] and scales [T, K / 128], in any strides. b: [N, K], in blocks of 128."""
    rows, weight = _values(view(a[0]), a[1].numpy()), _values(view(b[0]), b[1].numpy(), _GROUP)
    view(out)[...] = rows @ weight.T


def tritonmoe_preprocess_func(topk_ids, experts, block):
    """The numbers of all (row, choice) by expert, each expert's padded to whole blocks by a number that is none.

    Returns: these, the expert of each block, and how many they are, in [1].
    """
    ids = flat(topk_ids)
    parts, owners = [], []
    for expert in range(experts):
        chosen = np.flatnonzero(ids == expert)
        parts.append(np.pad(chosen, (0, -len(chosen) % block), constant_values=len(ids)))
        owners += [expert] * (len(parts[-1]) // block)
    order = np.concatenate(parts).astype(np.int32)
    to = paddle.to_tensor
    return to(order), to(np.array(owners, np.int32)), to(np.array([len(order)], np.int32))


class ExpertsProduct:
    """`fused_moe_kernel_paddle`, launched on a grid: out[i] = x[i // top_k] weight[expert of i]^T, or that times the
    weight of i."""

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, x, weight, out, x_scale, scale, weights, order, owners, count, most, valid, **how):
        rows, codes, scales, target = _values(view(x), x_scale.numpy()), view(weight), view(scale), view(out)
        numbers = view(order)[: flat(count)[0]].reshape(-1, how["BLOCK_SIZE_M"])
        for expert in np.unique(view(owners)):
            chosen = numbers[view(owners) == expert].reshape(-1)
            chosen = chosen[chosen < valid]
            product = rows[chosen // how["top_k"]] @ _values(codes[expert], scales[expert], _GROUP).T
            target[chosen] = product * flat(weights)[chosen][:, None] if how["MUL_ROUTED_WEIGHT"] else product

"""Attention over the paged cache."""

import numpy as np
import paddle
from paddle.static import MetaTensor, register_op

from cpu_host.fault import strike
from cpu_host.ops.memory import flat, view

OPS = ("append_attention",)
# Where these stand among the arguments behind `block_tables`.
_ROTARY, _SINKS, _HALVES, _WINDOW = 10, 26, 30, 43


def append_attention(
    qkv, key_cache, value_cache, encoder, decoder, this_time, batch_ids, starts, block_tables, *args
):
    """The arguments that the formula needs."""
    state = qkv, key_cache, value_cache, decoder, this_time, starts, block_tables, args[_ROTARY]
    return _attention(*state, args[_HALVES], args[_WINDOW], args[_SINKS])


@register_op(
    name="cpu_host_append_attention",
    infer_meta=lambda qkv, keys, values, decoder, now, starts, tables, rotary, halves, window, sinks: MetaTensor(
        shape=[qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]], dtype=qkv.dtype
    ),
    input_names=["qkv", "keys", "values", "decoder", "now", "starts", "tables", "rotary"],
    output_names=["out"],
)
def _attention(qkv, keys, values, decoder, now, starts, tables, rotary, halves, window, sinks):
    """softmax(rope(q) rope(k)^T / sqrt(D)) v over all rows of a slot up to each row's own; k and v go to the cache.
    One op to a graph that is being traced, and only without sinks.

    A window lets a row see so many rows at most, its own among them; a head's sink takes part in the softmax alone.
    qkv: [T, (heads + 2 kv_heads) D]. Caches: [blocks, kv_heads, block size, D]. Returns [T, heads D].
    """
    keys, values, tables = view(keys), view(values), view(tables)
    first, now, dec = flat(starts), flat(now), flat(decoder)
    kv_heads, block_size, dim = keys.shape[1:]
    x = qkv.astype("float32").numpy().reshape(qkv.shape[0], -1, dim)
    heads = x.shape[1] - 2 * kv_heads
    out = np.zeros((len(x), heads, dim), np.float32)
    strike(now.max(initial=0))
    for i in np.flatnonzero(now):
        rows, before = slice(first[i], first[i] + now[i]), int(dec[i])
        position = before + np.arange(now[i])
        turned = _rope(x[rows, : heads + kv_heads], position, rotary, halves)
        block, place = tables[i][position // block_size], position % block_size
        keys[block, :, place], values[block, :, place] = turned[:, heads:], x[rows, heads + kv_heads :]
        past = np.arange(before + now[i])
        block, place = tables[i][past // block_size], past % block_size
        seen = (cache[block, :, place].astype(np.float32) for cache in (keys, values))
        out[rows] = attend(turned[:, :heads], *seen, position, window, sinks)
    return paddle.to_tensor(out.reshape(len(x), -1)).astype(qkv.dtype)


def _rope(x, position, rotary, halves):
    """Turn [rows, heads, D] by the angles of its positions; `rotary` holds cos and sin by position."""
    table = view(rotary).reshape(2, -1, rotary.shape[-1])
    if halves and table.shape[-1] < x.shape[-1]:  # a part of the head alone is turned, and half of that is given
        table = np.concatenate([table, table], -1)
    cos, sin = table[0][position][:, None], table[1][position][:, None]
    size, out = cos.shape[-1], x.copy()
    if halves:  # (first half, second half) turn together
        part, half = x[..., :size], size // 2
        out[..., :size] = part * cos + np.concatenate([-part[..., half:], part[..., :half]], -1) * sin
    else:  # neighbours turn together, and each pair has one angle
        a, b = x[..., 0 : 2 * size : 2], x[..., 1 : 2 * size : 2]
        out[..., 0 : 2 * size : 2], out[..., 1 : 2 * size : 2] = a * cos - b * sin, b * cos + a * sin
    return out


def attend(q, k, v, position, window=0, sinks=None, scale=None):
    """Causal attention of [n, heads, D] to [m, kv_heads, D]; row i of q stands at position[i]."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    score = np.einsum("nhd,mhd->hnm", q, k) * (scale or q.shape[-1] ** -0.5)
    ahead = np.arange(len(k)) - position[:, None]
    score[:, (ahead > 0) | ((ahead <= -window) & (window > 0))] = -np.inf
    most = score.max(-1, keepdims=True)
    score = np.exp(score - most)
    total = score.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(view(sinks)[:, None, None] - most)
    return np.einsum("hnm,mhd->nhd", score / total, v)

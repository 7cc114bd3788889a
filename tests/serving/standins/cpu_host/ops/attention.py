"""Attention over the paged cache."""

import numpy as np
import paddle

from cpu_host.fault import strike
from cpu_host.ops.memory import flat, view

OPS = ("append_attention",)
_ROTARY, _HALVES = 10, 30  # where among the arguments behind `block_tables` the tables of rope and their kind stand


def append_attention(
    qkv, key_cache, value_cache, encoder, decoder, this_time, batch_ids, starts, block_tables, *args
):
    """softmax(rope(q) rope(k)^T / sqrt(D)) v over all rows of a slot up to each row's own; k and v go to the cache.

    qkv: [T, (heads + 2 kv_heads) D]. Caches: [blocks, kv_heads, block size, D]. Returns [T, heads D].
    """
    keys, values, tables = view(key_cache), view(value_cache), view(block_tables)
    first, now, dec = flat(starts), flat(this_time), flat(decoder)
    kv_heads, block_size, dim = keys.shape[1:]
    x = qkv.astype("float32").numpy().reshape(qkv.shape[0], -1, dim)
    heads = x.shape[1] - 2 * kv_heads
    out = np.zeros((len(x), heads, dim), np.float32)
    strike(now.max(initial=0))
    for i in np.flatnonzero(now):
        rows, before = slice(first[i], first[i] + now[i]), int(dec[i])
        position = before + np.arange(now[i])
        turned = _rope(x[rows, : heads + kv_heads], position, args[_ROTARY], args[_HALVES])
        block, place = tables[i][position // block_size], position % block_size
        keys[block, :, place], values[block, :, place] = turned[:, heads:], x[rows, heads + kv_heads :]
        past = np.arange(before + now[i])
        block, place = tables[i][past // block_size], past % block_size
        out[rows] = _attend(turned[:, :heads], keys[block, :, place], values[block, :, place], position)
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


def _attend(q, k, v, position):
    """Causal attention of [n, heads, D] to [m, kv_heads, D]; row i of q stands at position[i]."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    score = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(q.shape[-1])
    score = np.where(np.arange(len(k)) > position[None, :, None], -np.inf, score)
    score = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("hnm,mhd->nhd", score / score.sum(-1, keepdims=True), v)

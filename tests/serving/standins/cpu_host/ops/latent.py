"""DeepSeek's latent attention: the cache holds one latent row and one row of rope a token, for all heads together."""

import numpy as np
import paddle

from cpu_host.ops.attention import attend
from cpu_host.ops.memory import flat, view

OPS = (
    "get_position_ids_and_mask_encoder_batch",
    "get_position_ids_and_slot_mapping",
    "fused_rotary_position_encoding",
    "prefill_mla_write_cache",
    "decode_mla_write_cache",
    "multi_head_latent_attention",
    "merge_prefill_decode_output",
)
_RANK, _SCALE = -9, -7  # where the size of the latent and the softmax scale stand among the last arguments


def get_position_ids_and_mask_encoder_batch(encoder, decoder, this_time, position_ids):
    """The place of each row in its sequence. [T]"""
    places = _places(flat(decoder), flat(this_time))
    flat(position_ids)[: len(places)] = places


def get_position_ids_and_slot_mapping(encoder, decoder, this_time, slots, tables, position_ids, mapping, block_size):
    """The same, and the place of each row in the cache: block * block_size + place in the block. [T], [T]"""
    places = _places(flat(decoder), flat(this_time))
    flat(position_ids)[: len(places)] = places
    blocks = view(tables)[flat(slots)[: len(places)], places // block_size]
    flat(mapping)[: len(places)] = blocks.astype(np.int64) * block_size + places % block_size


def _places(before, now):
    return np.concatenate([before[i] + np.arange(now[i]) for i in range(len(now))])


def fused_rotary_position_encoding(query, key, position_ids, table, head_size, halves):
    """Turn the first part of each head of query and key in place; a row of `table` is cos, then sin. [T, heads D]"""
    cos, sin = np.split(view(table)[flat(position_ids)[: query.shape[0]]], 2, -1)  # [T, part / 2] each
    for tensor in (query, key):
        x = view(tensor).reshape(query.shape[0], -1, head_size)
        size = 2 * cos.shape[-1]
        one, two = (slice(0, size // 2), slice(size // 2, size)) if halves else (slice(0, size, 2), slice(1, size, 2))
        a, b = x[..., one].copy(), x[..., two].copy()
        x[..., one] = a * cos[:, None] - b * sin[:, None]
        x[..., two] = b * cos[:, None] + a * sin[:, None]


def prefill_mla_write_cache(latent, rope, cache, lens, decoder, slots, starts, tables, *rest):
    """The rows of all slots with lens[i] > 0 go to the cache, [blocks, 1, block size, latent + rope]."""
    _write(latent, rope, cache, flat(lens) > 0, decoder, starts, tables)


def decode_mla_write_cache(latent, rope, cache, decoder, encoder, slots, starts, tables, *rest):
    """The rows of all slots that decode go to the cache."""
    _write(latent, rope, cache, flat(encoder) == 0, decoder, starts, tables)


def _write(latent, rope, cache, wanted, decoder, starts, tables):
    rows = np.concatenate([view(latent), view(rope).reshape(len(view(latent)), -1)], -1)
    first, dec, kept, blocks = flat(starts), flat(decoder), view(cache), view(tables)
    for i in np.flatnonzero(wanted[: len(first) - 1]):
        here = np.arange(first[i], first[i + 1])
        place = dec[i] + here - first[i]
        size = kept.shape[2]
        kept[blocks[i][place // size], 0, place % size] = rows[here]


def multi_head_latent_attention(query, cache, same, decoder, this_time, starts, slots, tables, *rest):
    """softmax(q k^T scale) latent, of the slots that have rows in the cache before this step: k is the cached row.

    query: [T, heads (latent + rope)]. Returns [T, heads latent], 0 for the rows of other slots.
    """
    kept, blocks, first, dec, now = view(cache), view(tables), flat(starts), flat(decoder), flat(this_time)
    size, width = kept.shape[2:]
    q = query.numpy().reshape(query.shape[0], -1, width)
    out = np.zeros((*q.shape[:2], rest[_RANK]), np.float32)
    for i in np.flatnonzero((dec[: len(now)] > 0) & (now > 0)):
        past = np.arange(dec[i] + now[i])
        k = kept[blocks[i][past // size], 0, past % size][:, None]
        rows = slice(first[i], first[i] + now[i])
        out[rows] = attend(q[rows], k, k[..., : rest[_RANK]], dec[i] + np.arange(now[i]), scale=rest[_SCALE])
    return paddle.to_tensor(out.reshape(len(q), -1))


def merge_prefill_decode_output(prefill, decode, encoder, decoder, this_time, starts, heads, dim, *rest):
    """The rows of the slots that decode, put into `prefill` in place. [T, heads D]"""
    into, rows, first, now = view(prefill), decode.numpy(), flat(starts), flat(this_time)
    for i in np.flatnonzero((flat(encoder)[: len(now)] == 0) & (flat(decoder)[: len(now)] > 0)):
        into[first[i] : first[i] + now[i]] = rows[first[i] : first[i] + now[i]]


def flash_attn_unpadded(q, k, v, starts_q, starts_k, most_q, most_k, scale, causal=True, training=False):
    """Attention slot by slot, rows [T, heads, D] one behind the other; the last row of q stands at the last of k."""
    first_q, first_k, out = flat(starts_q), flat(starts_k), np.zeros(q.shape[:2] + v.shape[2:], np.float32)
    for i in range(len(first_q) - 1):
        rows, seen = slice(first_q[i], first_q[i + 1]), slice(first_k[i], first_k[i + 1])
        position = first_k[i + 1] - first_k[i] + np.arange(first_q[i] - first_q[i + 1], 0)
        if len(position):
            out[rows] = attend(q.numpy()[rows], k.numpy()[seen], v.numpy()[seen], position, scale=scale)
    return paddle.to_tensor(out), None

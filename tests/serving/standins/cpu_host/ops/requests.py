"""The ops that move the state of the requests of a batch from step to step.

Slot i: now[i] rows in this step, enc[i] of them of the prompt; dec[i] rows in the cache before them; stop[i].
"""

import ctypes

import numpy as np
import paddle
from paddle.static import MetaTensor, register_op

from cpu_host.ops.memory import flat, view

OPS = (
    "custom_numpy_to_tensor",
    "set_data_ipc",
    "unset_data_ipc",
    "recover_decode_task",
    "get_padding_offset",
    "set_value_by_flags_and_idx",
    "rebuild_padding",
    "update_inputs_v1",
    "get_block_shape_and_split_kv_block",
)


def custom_numpy_to_tensor(array, tensor):
    """tensor = array, in place."""
    array = np.ascontiguousarray(array)
    ctypes.memmove(tensor.data_ptr(), array.ctypes.data, array.nbytes)
    return tensor


def set_data_ipc(tensor, name):
    """Gives the cache a name for other processes: nobody asks for it here."""


def unset_data_ipc(tensor, name, *flags):
    """The undo of `set_data_ipc`."""


def get_block_shape_and_split_kv_block(encoder, decoder, this_time, *args):
    """The longest of all slots. How a GPU cuts attention into tiles is left out: nothing is cut here."""
    _longest(encoder, decoder, this_time, args[5])


@register_op(
    name="cpu_host_longest",
    infer_meta=lambda encoder, decoder, this_time, longest: MetaTensor(shape=[1], dtype=longest.dtype),
    input_names=["encoder", "decoder", "this_time", "longest"],
    output_names=["out"],
)
def _longest(encoder, decoder, this_time, longest):
    """In place, the longest of all slots: rows now, rows of a prompt, cached rows, both, cached rows of the slots
    that decode, both where there are cached rows. One op to a graph that is being traced, which wants a result.
    """
    enc, dec, now, into = flat(encoder), flat(decoder), flat(this_time), flat(longest)
    n = len(now)
    enc, dec, busy = enc[:n], dec[:n], now > 0
    both = (dec + now) * busy
    for i, lens in enumerate((now, enc, dec, both, dec * (busy & (enc <= 0)), both * (dec > 0))):
        into[i] = lens.max(initial=0)
    return paddle.zeros([1], longest.dtype)


def recover_decode_task(
    stop_flags, this_time, encoder, decoder, step_decoder, block_tables, is_block_step, *draft_and_sizes
):
    """A slot that waited for a block of the cache goes on where it stopped, once its next block is there."""
    block_size = draft_and_sizes[-2]
    stop, now, enc, dec = flat(stop_flags), flat(this_time), flat(encoder), flat(decoder)
    step, tables, waits = flat(step_decoder), view(block_tables), flat(is_block_step)
    for i in range(len(now)):
        if waits[i] and tables[i, step[i] // block_size] != -1:
            waits[i], now[i], stop[i], enc[i], dec[i] = False, 1, False, 0, step[i]


def get_padding_offset(input_ids, seq_len, *rest):
    """The rows of all slots one behind the other: (ids [T], slot of each row [T], where each slot starts, twice).

    rest: release/2.6 (draft_tokens, encoder, token_num); develop (encoder, decoder, draft_tokens, token_num).
    The last result counts cached rows of a prompt as well.
    """
    ids, lens, token_num = view(input_ids), flat(seq_len), rest[-1]
    n = len(lens)
    cached = np.zeros(n, np.int64)
    if len(rest) == 4:
        enc, dec = flat(rest[0])[:n], flat(rest[1])[:n]
        cached = np.where((dec > 0) & (enc > 0), dec, 0)
    starts, starts_k = np.zeros(n + 1, np.int32), np.zeros(n + 1, np.int32)
    starts[1:], starts_k[1:] = np.cumsum(lens), np.cumsum(lens + cached)
    out, slot = np.full(token_num, 2, np.int64), np.full(token_num, -1, np.int32)
    for i in range(n):
        out[starts[i] : starts[i + 1]] = ids[i, : lens[i]]
        slot[starts[i] : starts[i + 1]] = i
    return [paddle.to_tensor(part) for part in (out, slot, starts, starts_k)]


def set_value_by_flags_and_idx(
    token_ids_all, input_ids, this_time, encoder, decoder, prompt_lens, step_idx, stop_flags
):
    """all[i, prompt[i] + step[i]] = the token that slot i was given last, for running slots past their first."""
    tokens, ids, stop = view(token_ids_all), view(input_ids), flat(stop_flags)
    enc, dec, prompt, step = flat(encoder), flat(decoder), flat(prompt_lens), flat(step_idx)
    for i in range(this_time.shape[0]):
        if not stop[i] and (dec[i] or enc[i]) and step[i] > 0:
            tokens[i, prompt[i] + step[i]] = ids[i, enc[i] - 1 if enc[i] > 0 else 0]


def rebuild_padding(hidden, starts, this_time, decoder, encoder, *more):
    """out[i] = the last row of slot i, 0 for an idle slot. [T, H] -> [B, H]."""
    first, now, dec, enc = flat(starts), flat(this_time), flat(decoder), flat(encoder)
    n = len(first) - 1
    if hidden.shape[0] == 0:
        return paddle.zeros([n, hidden.shape[1]], hidden.dtype)
    rows, live = np.zeros(n, np.int64), np.zeros((n, 1), np.float32)
    for i in range(min(n, len(now))):
        if now[i] and (dec[i] or enc[i]):
            rows[i], live[i] = first[i] + max(enc[i] - 1, 0), 1
    return paddle.gather(hidden, paddle.to_tensor(rows)) * paddle.to_tensor(live).astype(hidden.dtype)


def update_inputs_v1(
    stop_flags,
    not_need_stop,
    this_time,
    encoder,
    decoder,
    step_decoder,
    prompt_lens,
    topk_ids,
    input_ids,
    block_tables,
    next_tokens,
    is_block_step,
    block_size,
):
    """The state behind a step: a slot whose prompt is done decodes, one that stopped is idle, one whose next block
    is not there waits, and one with more of its prompt to come waits for the scheduler. A token of -1: no token yet.
    """
    stop, now, enc, dec = flat(stop_flags), flat(this_time), flat(encoder), flat(decoder)
    step, prompt, top, ids = flat(step_decoder), flat(prompt_lens), flat(topk_ids), view(input_ids)
    tables, following, waits = view(block_tables), flat(next_tokens), flat(is_block_step)
    for i in range(len(now)):
        done = now[i] + dec[i] >= prompt[i]
        if not done:
            top[i] = -1
        if stop[i] or not done:
            stop[i], now[i], dec[i], enc[i] = True, 0, 0, 0
            continue
        dec[i] += now[i]
        now[i], enc[i], ids[i, 0] = 1, 0, following[i]
        if tables[i, dec[i] // block_size] == -1:
            waits[i], stop[i], now[i], step[i], dec[i] = True, True, 0, dec[i], 0
    stopped = len(stop) - len(now) + int(stop[: len(now)].sum())
    flat(not_need_stop)[0] = stopped < len(stop)

"""The ops between the logits and the next token."""

import numpy as np
import paddle

from cpu_host.ops.memory import flat, view

OPS = ("get_token_penalty_multi_scores", "set_stop_value_multi_ends", "top_k_renorm_probs")
_NEVER = -1e10


def get_token_penalty_multi_scores(
    token_ids_all, logits, repetition, frequency, presence, temperature, bad, bad_lens, prompt_lens, step, least, eos
):
    """In place, for each slot: eos is impossible before `least` tokens; then, for a word said n times,

        z = (z < 0 ? z * repetition : z / repetition) - n * frequency - presence,   z = z / temperature

    (a word of the prompt alone counts for the repetition, with n = 0); bad words are impossible.
    """
    values, tokens, bad = view(logits), view(token_ids_all), view(bad)
    a, b, c, heat = flat(repetition), flat(frequency), flat(presence), flat(temperature)
    bad_lens, prompt, step, least, eos = flat(bad_lens), flat(prompt_lens), flat(step), flat(least), flat(eos)
    for i, row in enumerate(values):
        if 0 <= step[i] < least[i]:
            row[eos] = _NEVER
        if (a[i], b[i], c[i]) != (1, 0, 0) and step[i] >= 0:
            _penalise(row, tokens[i, : prompt[i]], tokens[i, prompt[i] :], a[i], b[i], c[i])
        if heat[i] != 1:
            row /= heat[i]
        banned = bad[i, : min(bad_lens[i], bad.shape[1])]
        row[banned[(banned >= 0) & (banned < len(row))]] = _NEVER
    return logits


def _penalise(row, prompt, made, repetition, frequency, presence):
    times = np.bincount(made[made >= 0], minlength=len(row))
    met = times > 0
    met[prompt[prompt >= 0]] = True
    row[met] = np.where(row[met] < 0, row[met] * repetition, row[met] / repetition)
    row -= np.where(times > 0, times * frequency + presence, 0)


def set_stop_value_multi_ends(
    topk_ids,
    stop_flags,
    seq_lens,
    end_ids,
    next_tokens,
    token_ids_all,
    prompt_lens,
    step_idx,
    seqs,
    seqs_len,
    least,
    beam,
):
    """A slot stops at an end token, or behind a stop sequence, once it has `least` tokens; its token is then the end
    token. A slot that had stopped gives the end token again, or -1 where it is empty.
    """
    top, stop, lens, ends, following = (flat(t) for t in (topk_ids, stop_flags, seq_lens, end_ids, next_tokens))
    tokens, prompt, step = view(token_ids_all), flat(prompt_lens), flat(step_idx)
    seqs, seqs_len, least = view(seqs), view(seqs_len), flat(least)
    for i in range(topk_ids.shape[0]):
        if stop[i] and lens[i] == 0:
            top[i] = -1
        else:
            top[i] = following[i] = ends[0] if stop[i] else top[i]
        if step[i] < least[i]:
            continue
        made = list(tokens[i, prompt[i] : prompt[i] + step[i]])
        found = any(0 < n <= step[i] and made[-n:] == list(seqs[i, j, :n]) for j, n in enumerate(seqs_len[i]))
        if found or (not beam and top[i] in ends):
            stop[i], top[i], following[i] = True, ends[0], ends[0]


def top_k_renorm_probs(probs, top_k):
    """All but the k most probable words set to 0, and the rest made to add up to 1. k of 0 keeps all. [B, V]"""
    out = probs.numpy().copy()
    for i, row in enumerate(out):
        k = int(flat(top_k)[i])
        if 0 < k < len(row):
            row[np.argsort(-row, kind="stable")[k:]] = 0
            row /= row.sum()
    return paddle.to_tensor(out)


def top_p_sampling(x, ps, threshold=None, topp_seed=None, seed=-1, k=0, mode="truncated", return_top=False):
    """One word a row of [B, V], of the most probable ones that together reach p (p = 0: the most probable), drawn by
    one uniform number from the row's seed. Returns (its probability, its id), [B, 1].
    """
    ids = []
    for i, row in enumerate(x.numpy()):
        p = float(ps.numpy().reshape(-1)[i])
        order = np.argsort(-row, kind="stable")
        total = np.cumsum(row[order])
        keep = min(len(row), int(np.searchsorted(total, p)) + 1) if p > 0 else 1
        own = int(topp_seed.numpy().reshape(-1)[i]) if topp_seed is not None else 0
        drawn = np.random.default_rng(own & 0xFFFFFFFF).random() * total[keep - 1]
        ids.append(order[min(int(np.searchsorted(total[:keep], drawn)), keep - 1)])
    ids = paddle.to_tensor(np.array(ids, dtype="int64").reshape(-1, 1))
    return paddle.take_along_axis(x, ids, 1), ids

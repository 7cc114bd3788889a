"""Mixture of experts: choose, sort rows by expert, two products an expert, and add up."""

import numpy as np
import paddle

OPS = ("noaux_tc", "moe_topk_select", "moe_expert_dispatch", "moe_expert_ffn", "moe_expert_reduce")


def noaux_tc(scores, with_bias, n_group, topk_group, topk, renormalize, scale):
    """The topk experts of each row by score and bias, from its topk_group best groups; weighed by the score alone.

    weight = scale * score / (sum of the chosen scores if renormalize). Groups rank by their two best experts.
    Returns (weights in place [T, E], weights [T, topk], ids [T, topk]).
    """
    scores, choose = scores.numpy(), with_bias.numpy().copy()
    n = len(scores)
    if n_group > 1:
        groups = choose.reshape(n, n_group, -1)
        best = np.sort(groups, -1)[..., -2:].sum(-1)
        for i, left_out in enumerate(np.argsort(-best, -1, kind="stable")[:, topk_group:]):
            groups[i, left_out] = -np.inf
    ids = np.argsort(-choose, -1, kind="stable")[:, :topk]
    weights = np.take_along_axis(scores, ids, 1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    out = np.zeros_like(scores)
    np.put_along_axis(out, ids, weights * scale, 1)
    to = paddle.to_tensor
    return to(out), to((weights * scale).astype("float32")), to(ids.astype("int64"))


def moe_topk_select(gate_out, bias, top_k, apply_norm_weight, fused):
    """The top_k experts of each row by softmax(gate) + bias, weighed by softmax(gate), which add up to 1 if asked.

    Returns (ids [T, top_k], weights [T, top_k]).
    """
    score = paddle.nn.functional.softmax(gate_out, -1).numpy()
    choose = score if bias is None else score + bias.numpy().reshape(1, -1)
    ids = np.argsort(-choose, -1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(score, ids, 1)
    if apply_norm_weight:
        weights = weights / weights.sum(-1, keepdims=True)
    return paddle.to_tensor(ids), paddle.to_tensor(weights)


def moe_expert_dispatch(x, gate_out, bias, in_scale, top_k, group_moe, quant_type, topk_only_mode=False):
    """Choose top_k experts a row by softmax(gate) (+ bias), or by the gate itself, and sort the rows by expert.

    Returns: rows by expert [T top_k, H], where each expert ends, the place of (choice, row) among them [top_k, T],
    the weights [T, top_k], the experts [T, top_k], the expert of each sorted row, and two that nobody reads here.
    """
    gate = gate_out.numpy()
    if not topk_only_mode:
        gate = np.exp(gate - gate.max(-1, keepdims=True))
        gate /= gate.sum(-1, keepdims=True)
    choose = gate if bias is None else gate + bias.numpy().reshape(1, -1)
    ids = np.argsort(-choose, -1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(gate, ids, 1).astype("float32")
    expert = ids.T.reshape(-1)
    order = np.argsort(expert, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ends = np.cumsum(np.bincount(expert, minlength=gate.shape[1])).astype("int64")
    to = paddle.to_tensor
    rows = paddle.gather(x, to(order % len(gate))) if len(order) else paddle.zeros([0, x.shape[1]], x.dtype)
    places = to(place.reshape(top_k, -1).astype("int32"))
    found = to(ids.astype("int32")), to(expert[order].astype("int32"))
    return rows, to(ends), places, to(weights), *found, None, to(np.array([0], "int32"))


def moe_expert_ffn(x, ends, up_gate, down, scale, up_gate_bias, *rest):
    """act(up_gate x + bias), then down, for the rows of each expert. [rows, H] -> [rows, H]"""
    act = _clamped_swiglu if rest[-1] == "swigluoai" else paddle.nn.functional.swiglu
    parts, start = [], 0
    for expert, end in enumerate(ends.numpy()):
        if end > start:
            hidden = paddle.matmul(x[start:end], up_gate[expert])
            hidden = hidden if up_gate_bias is None else hidden + up_gate_bias[expert]
            parts.append(paddle.matmul(act(hidden), down[expert]))
        start = int(end)
    return paddle.concat(parts) if parts else paddle.zeros_like(x)


def _clamped_swiglu(x):
    """a sigmoid(1.702 a) (b + 1), a and b side by side: a at most 7, b from -7 to 7. [rows, 2 I] -> [rows, I]"""
    a, b = x[:, 0::2].clip(max=7.0), x[:, 1::2].clip(-7.0, 7.0)
    return a * paddle.nn.functional.sigmoid(1.702 * a) * (b + 1)


def moe_expert_reduce(x, weights, places, ids, bias, norm_topk_prob=True, routed_scaling_factor=1.0):
    """out[t] = scale * sum over k of weight[t, k] / (sum of weight[t] if norm_topk_prob) * x[places[k, t]]"""
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    top_k, rows = places.shape
    out = paddle.zeros([rows, x.shape[1]], "float32")
    for k in range(top_k):
        out += paddle.gather(x, places[k]).astype("float32") * weights[:, k : k + 1]
    return (out * routed_scaling_factor).astype(x.dtype)

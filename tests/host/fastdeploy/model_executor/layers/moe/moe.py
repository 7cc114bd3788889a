"""A mixture of experts, cut over the tensor-parallel group; reduces inside unless told not to."""

import paddle
from paddle import nn

from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.utils import rank_slice


class FusedMoE(nn.Layer):
    def __init__(
        self,
        fd_config,
        hidden_size=-1,
        reduce_results=True,
        moe_intermediate_size=-1,
        num_experts=-1,
        top_k=-1,
        layer_idx=-1,
    ):
        super().__init__()
        parallel, hidden = fd_config.parallel_config, fd_config.model_config.hidden_size
        self.fd_config, self.layer_idx, self.reduce_results = fd_config, layer_idx, reduce_results
        self.tp_size, self.tp_rank = parallel.tensor_parallel_size, parallel.tensor_parallel_rank
        self.tp_group, self.ep_size = parallel.tp_group, parallel.expert_parallel_size
        self.num_experts, self.top_k = num_experts, top_k
        if self.ep_size > 1:  # each rank has whole experts; here all of them
            self.tp_size, self.tp_rank = 1, 0
        width = moe_intermediate_size // self.tp_size
        zero = nn.initializer.Constant(0)
        dtype = self._helper.get_default_dtype()
        self.up_gate_proj_weight = self.create_parameter(
            [num_experts, hidden, 2 * width], dtype=dtype, default_initializer=zero
        )
        self.down_proj_weight = self.create_parameter(
            [num_experts, width, hidden], dtype=dtype, default_initializer=zero
        )
        for param in (self.up_gate_proj_weight, self.down_proj_weight):
            param.weight_loader = self.weight_loader

    def weight_loader(self, param, loaded_weight, expert_id, shard_id=None):
        full = paddle.to_tensor(loaded_weight).astype(param.dtype)
        part = rank_slice(full, 0 if shard_id == "down" else -1, self.tp_rank, self.tp_size)
        value = param.clone()
        width = self.down_proj_weight.shape[1]
        if shard_id == "down":
            value[expert_id] = part
        else:
            start = 0 if shard_id == "gate" else width
            value[expert_id, :, start : start + width] = part
        param.copy_(value, False)

    def forward(self, x, gate, forward_meta=None, shared_experts=None):
        scores = paddle.nn.functional.softmax(gate(x.astype("float32")), axis=-1)
        values, chosen = paddle.topk(scores, self.top_k, axis=-1)
        weights = paddle.nn.functional.one_hot(chosen, self.num_experts) * values.unsqueeze(-1)
        weights = weights.sum(1)  # [T, experts]
        wide = x.astype("float32")
        up_gate = paddle.einsum("th,ehw->tew", wide, self.up_gate_proj_weight.astype("float32"))
        a, b = up_gate.chunk(2, axis=-1)
        inner = paddle.nn.functional.silu(a) * b
        out = paddle.einsum("tew,ewh,te->th", inner, self.down_proj_weight.astype("float32"), weights)
        out = out.astype(x.dtype)
        if self.reduce_results and self.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

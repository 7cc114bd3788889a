"""RMSNorm returns (out, residual_out), always; it computes in the dtype of its weight and casts back."""

import paddle
from paddle import nn

from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce

flashinfer_is_there = True
upstream_fused = []  # the layers whose own fusion ran, call by call


@paddle.jit.not_to_static
def _count(layer):
    upstream_fused.append(layer.prefix)


def fused_rms_norm(x, norm_weight, epsilon, residual=None):
    # A CPU has no half-precision sum, so it is taken in float32; what is given on has the dtype of x.
    wide = x.astype("float32")
    if residual is not None:
        wide = wide + residual.astype("float32")
    out = wide * paddle.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon) * norm_weight.astype("float32")
    return out.astype(x.dtype), wide.astype(x.dtype)


class RMSNorm(nn.Layer):
    def __init__(
        self,
        fd_config,
        hidden_size,
        eps=1e-5,
        prefix="",
        bias=None,
        quant_scale=None,
        begin_norm_axis=1,
        dtype=None,
        layer_id=-1,
    ):
        super().__init__()
        self.fd_config, self.prefix, self.hidden_size = fd_config, prefix, hidden_size
        self.eps, self.norm_func, self.bias, self.quant_scale = eps, fused_rms_norm, bias, quant_scale
        self._norm_weight_dtype = dtype or self._helper.get_default_dtype()
        self.begin_norm_axis, self.layer_id = begin_norm_axis, layer_id
        parallel = fd_config.parallel_config
        self.tp_size, self.tp_rank = parallel.tensor_parallel_size, parallel.tensor_parallel_rank
        self.tp_group = parallel.tp_group
        # By its prefix alone: in a decoder whose linears do not take part, the flag reduces twice.
        self.enable_all_reduce_fusion = parallel.enable_flashinfer_allreduce_fusion and (
            "post_attention_layernorm" in prefix or ("input_layernorm" in prefix and layer_id != 0)
        )
        self.is_last_norm = prefix.endswith(".norm")
        self.split_x = self.allgather_out = False
        self.weight = self.create_parameter(
            shape=[hidden_size],
            default_initializer=nn.initializer.Constant(1.0),
            dtype=self._norm_weight_dtype,
        )

    def weight_loader(self, param, loaded_weight, shard_id=None):
        param.copy_(paddle.to_tensor(loaded_weight).astype(self._norm_weight_dtype), False)

    def forward(self, x, residual_input=None, forward_meta=None, proxy_rmsnorm=None):
        x_dtype = x.dtype
        x = x.astype(self.weight.dtype)
        residual_out = x
        if residual_input is not None:
            residual_dtype = residual_input.dtype
            residual_input = residual_input.astype(self.weight.dtype)
        if proxy_rmsnorm is not None:
            x = x if residual_input is None else x + residual_input
            norm_out = proxy_rmsnorm(x, self.weight, self.eps), x
        else:
            if self.enable_all_reduce_fusion and x.shape[0] <= 2048:
                assert flashinfer_is_there, "no fused result"
                _count(self)
                x = tensor_model_parallel_all_reduce(x, self.tp_group)
            norm_out = self.norm_func(x, self.weight, self.eps, residual=residual_input)
        if residual_input is not None:
            residual_out = norm_out[1].astype(residual_dtype)
        return norm_out[0].astype(x_dtype), residual_out


class QKRMSNorm(nn.Layer):
    """RMSNorm of every q head and every k head of [T, q + k + v]. One version needs `forward_meta`."""

    def __init__(self, fd_config, head_dim, q_size, kv_size, eps=1e-5, prefix="", begin_norm_axis=1, dtype=None):
        super().__init__()
        self.fd_config, self.prefix, self.head_dim, self.eps = fd_config, prefix, head_dim, eps
        self.q_size, self.kv_size = q_size, kv_size
        model_eps = fd_config.model_config.rms_norm_eps
        self.q_norm = RMSNorm(fd_config, head_dim, model_eps, f"{prefix}.q_norm", begin_norm_axis=begin_norm_axis)
        self.k_norm = RMSNorm(fd_config, head_dim, model_eps, f"{prefix}.k_norm", begin_norm_axis=begin_norm_axis)
        self.qk_norm_fused = False

    def forward(self, qkv_out, forward_meta, proxy_rmsnorm=None):
        q, k, v = qkv_out.split([self.q_size, self.kv_size, self.kv_size], axis=-1)
        heads = [-1, self.q_size // self.head_dim, self.head_dim]
        q = self.q_norm(q.reshape(heads), proxy_rmsnorm=proxy_rmsnorm)[0].reshape(q.shape)
        heads = [-1, self.kv_size // self.head_dim, self.head_dim]
        k = self.k_norm(k.reshape(heads), proxy_rmsnorm=proxy_rmsnorm)[0].reshape(k.shape)
        return paddle.concat([q, k, v], axis=-1)

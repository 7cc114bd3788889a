"""Linear layers: `forward` is `forward_cuda`, bound to the instance in the constructor."""

import paddle
from paddle import nn

import fastdeploy
from fastdeploy import envs
from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.utils import default_weight_loader, rank_slice, set_weight_attrs


class UnquantizedLinearMethod:
    def create_weights(self, layer, **attrs):
        layer.weight = layer.create_parameter(
            shape=layer.weight_shape,
            dtype=layer.weight_dtype,
            default_initializer=nn.initializer.Constant(0),
        )
        set_weight_attrs(layer.weight, attrs)

    def apply(self, layer, x):
        # A CPU has no half-precision matmul, so it is taken in float32; the result has the dtype of x.
        out = paddle.matmul(x.astype("float32"), layer.weight.astype("float32"))
        if layer.with_bias:
            out = out + layer.bias.astype("float32")
        return out.astype(x.dtype)


class BlockWiseFP8LinearMethod(UnquantizedLinearMethod):
    """x in FP8, by the quantiser that the environment names; the weight as it is, so that no kernel is needed."""

    def __init__(self, quant_config):
        self.quant_config = quant_config

    def apply(self, layer, x):
        if not envs.FD_USE_PHI_FP8_QUANT:
            codes, scales = fastdeploy.model_executor.ops.gpu.per_token_quant_padding(
                x, self.quant_config.weight_block_size[0], self.quant_config.deepgemm_scale_ue8m0
            )
            scales = scales[: x.shape[0], ...]
        else:
            codes, scales = paddle.incubate.nn.functional.fp8_quant_blockwise(
                x,
                using_pow2_scale=self.quant_config.deepgemm_scale_ue8m0 or envs.FD_FP8_QUANT_WITH_POW2SCALE,
                output_scale_transpose=True,
                using_ue8m0_scale=self.quant_config.deepgemm_scale_ue8m0,
            )
            scales = scales.T[: x.shape[0], ...]
        value = codes.astype("float32").reshape([x.shape[0], -1, 128]) * scales.unsqueeze(-1)
        return super().apply(layer, value.reshape(x.shape)).astype(x.dtype)


class LinearBase(nn.Layer):
    def __init__(
        self,
        fd_config,
        prefix="",
        input_size=None,
        output_size=None,
        with_bias=False,
        skip_quant=False,
        weight_dtype="",
    ):
        super().__init__()
        self.forward = self.forward_cuda
        self.fd_config = fd_config
        self.input_size, self.output_size, self.with_bias = input_size, output_size, with_bias
        self.weight_dtype = weight_dtype or self._helper.get_default_dtype()
        self.weight_shape = [input_size, output_size]
        quantised = fd_config.quant_config is not None and not skip_quant and input_size % 128 == 0
        self.quant_method = (
            BlockWiseFP8LinearMethod(fd_config.quant_config) if quantised else UnquantizedLinearMethod()
        )
        self.bias = None
        if with_bias:
            self.bias = self.create_parameter(shape=[output_size], dtype=self.weight_dtype, is_bias=True)
            self.bias.weight_loader = getattr(self, "weight_loader", default_weight_loader(fd_config))

    def _create_weights(self, **attrs):
        loader = getattr(self, "weight_loader", None) or default_weight_loader(self.fd_config)
        self.quant_method.create_weights(self, weight_loader=loader, **attrs)

    def forward_cuda(self, x):
        return self.quant_method.apply(self, x)


class ReplicatedLinear(LinearBase):
    def __init__(self, fd_config, prefix="", input_size=None, output_size=None, with_bias=False, weight_dtype=""):
        super().__init__(fd_config, prefix, input_size, output_size, with_bias, weight_dtype=weight_dtype)
        self._create_weights(output_dim=None)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel weights side by side; the loader knows them by shard id."""

    shards = ("gate", "up")

    def __init__(self, fd_config, prefix="", input_size=None, output_size=None, with_bias=False, activation="silu"):
        self.tp_size = fd_config.parallel_config.tensor_parallel_size
        self.tp_rank = fd_config.parallel_config.tensor_parallel_rank
        super().__init__(fd_config, prefix, input_size, output_size // self.tp_size, with_bias)
        self._create_weights(output_dim=True)

    def weight_loader(self, param, loaded_weight, shard_id=None):
        part = rank_slice(paddle.to_tensor(loaded_weight), -1, self.tp_rank, self.tp_size).astype(param.dtype)
        width = param.shape[-1] // len(self.shards)
        start = self.shards.index(shard_id) * width
        value = param.clone()
        value[..., start : start + width] = part
        param.copy_(value, False)


class QKVParallelLinear(MergedColumnParallelLinear):
    shards = ("q", "k", "v")

    def __init__(self, fd_config, prefix="", with_bias=False):
        model = fd_config.model_config
        width = model.num_attention_heads * model.head_dim
        super().__init__(fd_config, prefix, model.hidden_size, 3 * width, with_bias)


class RowParallelLinear(LinearBase):
    """Y = X A with A split by rows: each rank has a partial sum, which is reduced unless told otherwise."""

    def __init__(
        self,
        fd_config,
        prefix="",
        input_size=None,
        output_size=None,
        with_bias=False,
        reduce_results=True,
        skip_quant=False,
        weight_dtype="",
        layer_id=-1,
        enable_all_reduce_fusion=None,
    ):
        parallel = fd_config.parallel_config
        self.enable_all_reduce_fusion = bool(parallel.enable_flashinfer_allreduce_fusion and enable_all_reduce_fusion)
        self.tp_size, self.tp_group = parallel.tensor_parallel_size, parallel.tp_group
        self.layer_id = layer_id
        self.split_token = parallel.use_sequence_parallel_moe and layer_id >= 0
        super().__init__(
            fd_config, prefix, input_size // self.tp_size, output_size, with_bias, weight_dtype=weight_dtype
        )
        self._create_weights(output_dim=False)
        self.reduce_results = reduce_results and not self.split_token
        if self.with_bias and self.tp_size > 1 and self.reduce_results:
            set_weight_attrs(self.bias, {"tp_row_bias": True})

    def forward_cuda(self, x):
        out = self.quant_method.apply(self, x)
        upstream_fuses = self.enable_all_reduce_fusion and out.shape[0] <= 2048
        if self.reduce_results and self.tp_size > 1 and not upstream_fuses:
            out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

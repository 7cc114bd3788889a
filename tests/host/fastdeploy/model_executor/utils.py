"""How a full weight of the checkpoint becomes this rank's parameter (loader v1)."""

import paddle


def set_weight_attrs(param, attrs):
    for key, value in attrs.items():
        setattr(param, key, value)


def rank_slice(tensor, axis, rank, size):
    """The part of `tensor` along `axis` that rank `rank` of `size` owns."""
    step = tensor.shape[axis] // size
    return tensor.slice([axis % tensor.ndim], [rank * step], [(rank + 1) * step])


def default_weight_loader(fd_config):
    def load(param, loaded_weight, shard_id=None):
        parallel = fd_config.parallel_config
        rank, size = parallel.tensor_parallel_rank, parallel.tensor_parallel_size
        weight = paddle.to_tensor(loaded_weight).astype(param.dtype)
        output_dim = getattr(param, "output_dim", None)
        if size > 1 and output_dim is not None:
            weight = rank_slice(weight, -1 if output_dim else 0, rank, size)
        if size > 1 and getattr(param, "tp_row_bias", False):
            weight = weight / size
        param.copy_(weight, False)

    return load

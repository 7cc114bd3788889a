"""The all-reduce that every layer imports by name: in place by the group, or out of place as a custom kernel is."""

from contextlib import contextmanager

import paddle
import paddle.distributed as dist

from fastdeploy.utils import register_custom_python_op

out_of_place = False  # as the custom all-reduce kernel is
_TP_AR = None


@contextmanager
def capture_custom_allreduce():
    yield


def use_custom_allreduce(tp_group=None, custom_all_reduce_max_bytes=None):
    """Its kernels are not here, so the layers reduce by the group."""
    global _TP_AR
    from fastdeploy.distributed.custom_all_reduce import CustomAllreduce

    _TP_AR = CustomAllreduce(tp_group, custom_all_reduce_max_bytes)


def _infer_meta(x, group_):
    return paddle.static.MetaTensor(shape=x.shape, dtype=x.dtype)


@register_custom_python_op(
    name="tensor_model_parallel_all_reduce",
    infer_meta=_infer_meta,
    input_names=["input_"],
    output_names=["out"],
    inplace_map={},
)
def tensor_model_parallel_all_reduce(input_, group_=None):
    if input_.shape[0] == 0:
        return input_
    if out_of_place:
        input_ = input_.clone()
    dist.all_reduce(input_, group=group_)
    return input_

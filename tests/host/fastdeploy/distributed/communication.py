"""The all-reduce that every layer imports by name: in place by the group, or out of place as a custom kernel is."""

import paddle
import paddle.distributed as dist

from fastdeploy.utils import register_custom_python_op

out_of_place = False  # as the custom all-reduce kernel is


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

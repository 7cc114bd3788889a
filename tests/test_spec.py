"""The protocols of a backend and of its op: every backend of this package brings all that they ask for."""

import importlib
import inspect

import pytest

from fd_fusion.config import BACKENDS
from fd_fusion.spec import Backend, FusedOp, OpSpec, StayingOp

CLASSES = {"triton": "triton.TritonOp", "flashinfer": "flashinfer.op.FlashInferOp", "paddle": "paddle.PaddleOp"}


def methods(protocol):
    return {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_a_backend_has_what_the_protocols_ask_for(name):
    module = importlib.import_module(f"fd_fusion.backends.{name}")
    path, _, kind = CLASSES[name].rpartition(".")
    op = getattr(importlib.import_module(f"fd_fusion.backends.{path}"), kind)
    kinds = (FusedOp, StayingOp) if name == "triton" else (FusedOp,)
    for owner, protocols in ((module, (Backend,)), (op, kinds)):
        for method, asked in {key: value for one in protocols for key, value in methods(one).items()}.items():
            assert parameters(getattr(owner, method)) == parameters(asked), f"{name}: {method}"
    given = {*dir(op), *op.__init__.__code__.co_names}  # with what it stores, as in `self.limit = ...`
    asked = {key for one in kinds for key in one.__annotations__}
    assert {"limit", "fp8", "bytes"} < asked <= given
    assert isinstance(op.in_rank_order, bool)


def test_weights_have_the_dtype_of_the_partial_sum_unless_they_are_named():
    spec = OpSpec(0, 2, 64, "float16")
    assert spec.weight_dtypes == ("float16",)
    assert OpSpec(0, 2, 64, "float16", weight_dtypes=("float32", "bfloat16", "float32")).weight_dtypes == (
        "bfloat16",
        "float32",
    )

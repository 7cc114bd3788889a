"""The triton backend's first calls: every variant is launched, in the same order on all ranks, and compared."""

import numpy as np
import paddle
import pytest

from fd_fusion import exact, reference
from fd_fusion.backends.triton_first_calls import run_all
from fd_fusion.reasons import FusionError
from fd_fusion.tuning import Facts
from tests.test_triton_backend import FACTS

SIZE, HIDDEN = 2, 64


class Opened:
    """Stands for a workspace: the contract in NumPy, with one wrong variant."""

    def __init__(self, dtype, wrong=None, bug="nothing", weight_dtypes=("float32",)):
        self.programs, self._two_shot_rows, self.seen = 4, 7, []
        self._launches = {
            (name, two, bare): None for name in weight_dtypes for two in (False, True) for bare in (False, True)
        }
        self._dtype, self._wrong, self._bug = dtype, wrong, bug

    def finish(self, partial, residual, weight, eps, weight_offset):
        rows, bare = partial.shape[0], residual is None
        variant = (str(weight.dtype).rpartition(".")[2], rows >= self._two_shot_rows, bare, rows)
        self.seen.append(variant)
        bug = self._bug if self._wrong == variant[1:3] else "nothing"
        parts = [exact.known_partial(rank, rows, HIDDEN, self._dtype) for rank in range(SIZE)]
        parts = parts[:1] if bug == "rank dropped" else parts
        total = exact.rank_order_sum(parts, None if bare else residual.astype("float32").numpy())
        eps = eps * 1.5 if bug == "wrong eps" else eps
        offset = 0.0 if bug == "offset forgotten" else weight_offset
        w = weight.astype("float32").numpy()
        norm = reference.rms_norm(total, w, eps=eps, weight_offset=offset)
        out = reference.round_to(total, self._dtype).astype(np.float32)
        if bug == "one column truncated":
            out[:, 3] = np.where(out[:, 3] == total[:, 3], out[:, 3], out[:, 3] * (1 + 2.0**-7))
        return tuple(
            paddle.to_tensor(reference.round_to(x.astype(np.float32), self._dtype).astype(np.float32)).astype(
                self._dtype
            )
            for x in (norm, out)
        )


def facts_of(dtype):
    return Facts(**{**FACTS, "dtype": dtype, "weight_dtype": "float32", "hidden_size": HIDDEN})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_right_kernels_pass_and_each_is_launched(dtype):
    opened = Opened(dtype)
    run_all(opened, facts_of(dtype), paddle)
    assert {seen[:3] for seen in opened.seen} == set(opened._launches)
    assert {seen[3] for seen in opened.seen} == {1, 5}, "one row, and more rows than programs"
    assert opened._two_shot_rows == 7, "what chooses the path is as before"


def test_each_weight_dtype_that_has_a_kernel_is_run():
    opened = Opened("bfloat16", weight_dtypes=("float32", "bfloat16"))
    run_all(opened, facts_of("bfloat16"), paddle)
    assert {seen[:3] for seen in opened.seen} == set(opened._launches)


@pytest.mark.parametrize("bug", ["rank dropped", "offset forgotten", "wrong eps", "one column truncated"])
@pytest.mark.parametrize("variant", [(False, False), (False, True), (True, False), (True, True)])
def test_a_wrong_variant_is_named_after_all_were_launched(variant, bug):
    opened = Opened("bfloat16", variant, bug)
    with pytest.raises(FusionError) as error:
        run_all(opened, facts_of("bfloat16"), paddle)
    assert error.value.reason.code == "first_call_wrong" and len(opened.seen) == 4
    two_shot, bare = variant
    text = str(error.value.reason)
    assert ("two-shot" in text) == two_shot and ("without a residual" in text) == bare
    assert ("residual_out" in text) == (bug in ("rank dropped", "one column truncated")), text

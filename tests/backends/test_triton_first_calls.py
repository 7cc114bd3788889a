"""The triton backend's first calls: every variant is launched, in the same order on all ranks, and compared."""

import itertools

import numpy as np
import paddle
import pytest

from fd_fusion import exact, reference
from fd_fusion.backends import triton_first_calls
from fd_fusion.backends.triton_first_calls import run_all, run_all_fp8
from fd_fusion.backends.triton_setup import ONE_SHOT, STAYS, TWO_SHOT
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.reasons import FusionError
from fd_fusion.spec import Fp8, OpSpec
from tests.backends.test_triton import PLAIN

SIZE, HIDDEN = 2, 64


class FakeOp:
    """Stands for a workspace: the contract in NumPy, with one wrong variant."""

    def __init__(self, dtype, wrong=None, bug="nothing", weight_dtypes=("float32",), stays=False):
        self._slots, self._two_shot_rows, self.seen = 100, 7, []
        self.at_once = {ONE_SHOT: (4, 4), TWO_SHOT: (3, 3), STAYS: (3, 3)}
        variants = [(path, bare) for path in (ONE_SHOT, TWO_SHOT) for bare in (False, True)]
        variants += [(STAYS, False)] * stays
        keys = itertools.product(weight_dtypes, variants, (False, True))
        self._launches = {(name, *variant, in_rounds): None for name, variant, in_rounds in keys}
        self._dtype, self._wrong, self._bug = dtype, wrong, bug

    def launches(self, rows, path):
        plan = plans.plan_for(SIZE, HIDDEN, self._dtype)
        return plans.launches(plan, self._slots, self.at_once[path], rows, path != ONE_SHOT)

    def finish(self, partial, residual, weight, eps, weight_offset, stays=False):
        rows, bare = partial.shape[0], residual is None
        path = STAYS if stays else int(rows >= self._two_shot_rows)
        variant = (str(weight.dtype).rpartition(".")[2], path, bare, rows)
        self.seen.append((*variant[:3], self.launches(rows, path)[0].rounds > 1, rows))
        here = self._wrong == variant[1:3] and (self._bug != "later launches wrong" or rows > self._slots)
        bug = self._bug if here else "nothing"
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
        if bug == "later launches wrong":
            out[-1] = 0
        if stays:
            owned = list(range(0, rows, SIZE))
            elsewhere = [row for row in range(rows) if row not in owned]
            out[elsewhere] = 1 if bug == "stale elsewhere" else np.nan
            out[owned[1:]] = np.nan if bug == "an owned row is missing" else out[owned[1:]]
        return tuple(
            paddle.to_tensor(reference.round_to(x.astype(np.float32), self._dtype).astype(np.float32)).astype(
                self._dtype
            )
            for x in (norm, out)
        )


def spec_of(dtype, **changes):
    return OpSpec(**{**PLAIN, "dtype": dtype, "hidden_size": HIDDEN, **changes})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_right_kernels_pass_and_each_is_launched(dtype):
    op = FakeOp(dtype)
    run_all(op, spec_of(dtype), paddle)
    assert [seen[:4] for seen in op.seen] == list(op._launches)
    rows = {(path, bare, in_rounds): rows for _, path, bare, in_rounds, rows in op.seen}
    alone = {key: count for key, count in rows.items() if not key[2]}
    assert alone == {
        (ONE_SHOT, True, False): 1,
        (ONE_SHOT, False, False): 2,  # more rows than programs
        (TWO_SHOT, True, False): 1,
        (TWO_SHOT, False, False): 3,
    }
    assert {(path, count) for (path, _, in_rounds), count in rows.items() if in_rounds} == {(0, 3), (1, 5)}
    assert (op._two_shot_rows, op._slots) == (7, 100), "what chooses path and launches is as before"


@pytest.mark.parametrize("slots", [1, 2, 4, 5, 100])
def test_on_a_gpu_every_variant_runs_in_every_shape(slots):
    plan = plans.plan_for(SIZE, HIDDEN, "bfloat16")
    for size, at_once in ((1, min(4, slots)), (SIZE, min(3, slots))):  # one-shot and two-shot
        for bare in (False, True):
            shapes = triton_first_calls._shapes(size, at_once, slots, "gpu", bare, False)
            real = [(1, slots, at_once), (at_once + 1, slots, at_once)]
            assert shapes == real, "one row, and more rows than programs, by the real slots"
        if size * at_once > slots:
            continue  # no call has rounds
        for device, bare in itertools.product(("cpu", "gpu"), (False, True)):
            ((rows, as_if, few),) = triton_first_calls._shapes(size, at_once, slots, device, bare, True)
            found = plans.launch_in_rounds(plan, as_if, few, rows, size > 1)
            assert found.rounds == 2 and as_if <= slots and few <= at_once
            if size * few < slots:  # rounds of other lengths, a program with a second row, or batch, in one of them
                assert rows % 2 and as_if > size * few and -(-rows // 2) % size == 1 % size


def test_each_weight_dtype_that_has_a_kernel_is_run():
    op = FakeOp("bfloat16", weight_dtypes=("float32", "bfloat16"))
    run_all(op, spec_of("bfloat16"), paddle)
    assert [seen[:4] for seen in op.seen] == list(op._launches)


@pytest.mark.parametrize("bug", ["rank dropped", "offset forgotten", "wrong eps", "one column truncated"])
@pytest.mark.parametrize("variant", [(False, False), (False, True), (True, False), (True, True)])
def test_a_wrong_variant_is_named_after_all_were_launched(variant, bug):
    op = FakeOp("bfloat16", variant, bug)
    with pytest.raises(FusionError) as error:
        run_all(op, spec_of("bfloat16"), paddle)
    assert error.value.reason.code == "first_call_wrong" and len(op.seen) == 8
    two_shot, bare = variant
    text = str(error.value.reason)
    assert ("two-shot" in text) == two_shot and ("without a residual" in text) == bare
    assert ("residual_out" in text) == (bug in ("rank dropped", "one column truncated")), text


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_call_of_several_rounds_is_compared_too(two_shot):
    op = FakeOp("bfloat16", (two_shot, False), "later launches wrong")
    with pytest.raises(FusionError, match=r"T=5 in 2 rounds, .*row 4" if two_shot else r"T=3 in 2 rounds, .*row 2"):
        run_all(op, spec_of("bfloat16"), paddle)
    assert (op._two_shot_rows, op._slots) == (7, 100), "also where it raises"


@pytest.mark.parametrize("bug", ["nothing", "rank dropped", "an owned row is missing", "stale elsewhere"])
def test_a_residual_that_stays_is_compared_in_the_rows_that_a_rank_owns_and_nan_elsewhere(bug):
    op = FakeOp("bfloat16", (STAYS, False), bug, stays=True)
    if bug == "nothing":
        run_all(op, spec_of("bfloat16"), paddle)
        assert [seen[:4] for seen in op.seen] == list(op._launches)
        return
    with pytest.raises(FusionError, match=r"two-shot kernel with a residual that stays, .*residual_out"):
        run_all(op, spec_of("bfloat16"), paddle)


class FakeFp8Op(FakeOp):
    """Quantises by the contract, with a bug."""

    def __init__(self, forms, bug="nothing"):
        super().__init__("bfloat16", stays=True)
        self._fp8_launches = {(*variant, form.kernel): None for variant in self._launches for form in forms}
        self._fp8_bug = bug

    def finish_fp8(self, partial, residual, weight, eps, weight_offset, fp8, stays=False):
        norm, summed = self.finish(partial, residual, weight, eps, weight_offset, stays)
        codes, scales = reference.quantise(norm.astype("float32").numpy(), fp8.formula)
        if self._fp8_bug == "one code":
            codes[-1, 77] ^= 1
        if self._fp8_bug == "one scale":
            scales[0, 0] = np.nextafter(scales[0, 0], np.float32(1))
        if self._fp8_bug == "norm":
            norm[0, 5] = norm[0, 5] * 1.01
        norm_out = norm if fp8.keeps_norm else None
        return norm_out, paddle.to_tensor(codes).view("float8_e4m3fn"), paddle.to_tensor(scales), summed


@pytest.mark.parametrize("bug", ["nothing", "one code", "one scale", "norm"])
def test_fp8_is_compared_bit_for_bit(bug, monkeypatch):
    monkeypatch.setattr("tests.backends.test_triton_first_calls.HIDDEN", 128)
    forms = (Fp8("divide"), Fp8("multiply", keeps_norm=False))
    op, spec = FakeFp8Op(forms, bug), spec_of("bfloat16", hidden_size=128, fp8=forms)
    if bug == "nothing":
        run_all_fp8(op, spec, paddle)
        kernels = [key[:4] for key in op._fp8_launches for _ in range(2)]
        assert [seen[:4] for seen in op.seen] == kernels, "each kernel, beside it one without FP8"
    else:
        wrong = {"one code": "codes", "one scale": "scales", "norm": "norm_out"}[bug]
        with pytest.raises(FusionError, match=f"FP8.*{wrong}"):
            run_all_fp8(op, spec, paddle)

"""Rank script: the triton backend as real processes: interpreted on CPU memory, or on a GPU with `--device gpu`.

    triton_calls.py WHAT [--device gpu] [--hidden H] [--rows T ...]     WHAT: a function below

Each function prints a digest of the bits of all outputs: the test compares the ranks' digests.
"""

import argparse
import dataclasses
import hashlib
import os
import sys
import time
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

from fd_fusion import reference
from fd_fusion.backends import triton as backend
from fd_fusion.backends.triton_setup import STAYS, TWO_SHOT
from fd_fusion.comm.group import working
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.reasons import FusionError
from fd_fusion.frameworks.tensors import bytes_of
from fd_fusion.frameworks.tensors import numbers as numbers_of
from fd_fusion.spec import Fp8, OpSpec
from tests.support import tensors
from tests.support.all_reduce_cases import Case, judge
from tests.support.ranks import this_group, this_rank

digest = hashlib.sha256()


def spec_for(group, case, options, **changes):
    made = OpSpec(
        *(group.rank, group.size, case.hidden, case.dtype),
        weight_dtypes=(case.weight_dtype,),
        weight_offset=case.weight_offset,
        eps=case.eps,
        device=options.device,
        arch=90 if options.device == "gpu" else None,
        workspace_bytes=options.workspace_mb << 20,
        timeout_s=options.timeout_s,
    )
    made = dataclasses.replace(made, **changes)
    refusal = backend.supports(made)
    assert refusal is None, refusal
    return made


def open_op(group, case, options, **changes):
    with working(group):
        op = backend.open(spec_for(group, case, options, **changes), group)
    if options.two_shot_rows and options.device == "cpu":  # on a GPU the plan decides
        op._two_shot_rows = options.two_shot_rows
    return op


def host_us(part, synchronize):
    """The host's time for `part`, which starts work on a GPU: the median of 12 means of 50, none behind a full queue."""
    times = []
    for _ in range(12):
        part()
        synchronize()
        start = time.perf_counter()
        for _ in range(50):
            part()
        times.append((time.perf_counter() - start) / 50 * 1e6)
        synchronize()
    return sorted(times)[6]


def call(op, case, rank, device):
    """One call; the bits of both outputs."""
    residual, weight = case.common()
    x = tensors.tensor(case.partial(rank), case.dtype, device)
    residual = None if residual is None else tensors.tensor(residual, case.dtype, device)
    weight = tensors.tensor(weight, case.weight_dtype, device)
    outputs = op.finish(x, residual, weight, case.eps, case.weight_offset)
    return tuple(tensors.bits_of(out, case.dtype) for out in outputs)


def check(op, case, rank, device):
    """One call, judged and added to the digest."""
    norm, summed = call(op, case, rank, device)
    op.check()
    worst = judge(case, norm, summed)
    assert worst <= 1, f"{case}: error {worst:.2f} times the budget"
    digest.update(norm.tobytes())
    digest.update(summed.tobytes())
    return norm, summed


def numbers(group, options):
    """Every dtype, weight dtype, with and without residual and offset; T changing from call to call."""
    kinds = [
        ("float32", "float32", True, 0.0),
        ("bfloat16", "bfloat16", True, 0.0),
        ("bfloat16", "float32", False, 1.0),
        ("float16", "float16", True, 1.0),
    ]
    for dtype, weight_dtype, residual, offset in kinds:
        case = Case(group.size, 1, options.hidden, dtype, weight_dtype, residual, offset)
        op = open_op(group, case, options)
        rows = {}
        for step, T in enumerate(options.rows):
            norm, summed = check(op, dataclasses.replace(case, rows=T), group.rank, options.device)
            for t in range(T):
                bits = norm[t].tobytes() + summed[t].tobytes()
                assert rows.setdefault(t, bits) == bits, f"row {t} differs at T={T}, step {step}"
            if step == len(options.rows) // 2:
                op.freeze()
        print(op.stats())
        op.close()


def at_once(rows):
    """Inside, an op is opened as if the device held the programs of so many rows."""
    original = plans.rows_at_once

    def few(plan, slots, *, programs, two_shot):
        programs = rows * plan.split // plan.slices(two_shot)
        return original(plan, slots, programs=programs, two_shot=two_shot)

    return mock.patch.object(plans, "rows_at_once", few)


def stays(group, options):
    """A chain of calls whose residual stays with its owners gives the norms, and at its end the residual, of one whose
    residual comes back, in rounds or in launches; a call of the other path needs and leaves a whole one."""
    case = Case(group.size, 1, options.hidden)
    plan = plans.plan_for(group.size, case.hidden, case.dtype, interpreted=options.device == "cpu")
    for slots in options.slots:
        changes = {"two_shot_rows": options.two_shot_rows, "tuned_rows": 2, "tuned_staying_rows": 64}
        with at_once(group.size - 1):
            op = open_op(group, case, options, workspace_bytes=plans.total_bytes(plan, slots), **changes)
        assert op.may_stay == (slots >= group.size)
        assert (op.limit, op.staying_limit, op._slots) == (2, 64 if op.may_stay else 2, slots)
        for T in options.rows:
            _chain(op, dataclasses.replace(case, rows=T), group, options.device)
        in_rounds = op.may_stay and op.at_once[STAYS][1] > 0
        assert in_rounds == (group.size <= slots < op.staying_limit)
        several = [T for T in options.rows if T > slots] if in_rounds else []
        assert all(len(op.launches(T, STAYS)) == 1 for T in several), "of rounds"
        op.at_once[TWO_SHOT] = op.at_once[TWO_SHOT][0], 0
        for T in several:
            assert len(op.launches(T, TWO_SHOT)) > 1
            _chain(op, dataclasses.replace(case, rows=T), group, options.device)
        op.close()


def _chain(op, case, group, device):
    residual, weight = case.common()
    weight = tensors.tensor(weight, case.weight_dtype, device)
    whole = kept = tensors.tensor(residual, case.dtype, device)
    for link in range(4):
        x = tensors.tensor(dataclasses.replace(case, seed=link).partial(group.rank), case.dtype, device)
        norm, whole = op.finish(x, whole, weight, case.eps, 0.0)
        kept_norm, kept = op.finish(x, kept, weight, case.eps, 0.0, link < 3)
        got, want = (tensors.bits_of(one, case.dtype) for one in (kept_norm, norm))
        assert (got == want).all(), (case, link)
        got, want = (tensors.bits_of(one, case.dtype) for one in (kept, whole))
        digest.update(want.tobytes())
        owned = range(group.rank, case.rows, group.size)
        elsewhere = [row for row in range(case.rows) if row not in owned]
        assert (got[owned] == want[owned]).all(), (case, link)
        if link < 3 and op.residual_stays(case.rows):
            assert (got[elsewhere] == 0x7FFF).all(), "NaN where a rank does not own the row"
        else:
            assert (got == want).all(), (case, link)


def payload(group, options):
    """-0.0, subnormals, Inf, NaN and the patterns that the words themselves use: all arrive, nobody waits."""
    for dtype in ("bfloat16", "float16", "float32"):
        case = Case(group.size, 1, options.hidden, dtype, dtype, False, payload="special")
        op = open_op(group, case, options)
        for T in options.rows:
            if T:
                _, summed = check(op, dataclasses.replace(case, rows=T), group.rank, options.device)
                assert (summed[-1] == -(1 << (8 * summed.itemsize - 1))).all(), "a sum of -0.0 is -0.0"
        op.close()


def delayed(group, options):
    """Ranks that take turns in being late change nothing."""
    case = Case(group.size, 3, options.hidden)
    op = open_op(group, case, options)
    for step in range(2 * group.size):
        if step % group.size == group.rank:
            time.sleep(0.3)
        check(op, dataclasses.replace(case, rows=1 + step % 4, seed=step), group.rank, options.device)
    op.close()


def together(group, options):
    """Two hidden sizes and two dtypes open at once and used in turn; one closed and opened again."""
    cases = [
        Case(group.size, 2, options.hidden),
        Case(group.size, 2, 2 * options.hidden),
        Case(group.size, 2, options.hidden, "float32", "float32"),
    ]
    ops = [open_op(group, case, options) for case in cases]
    for seed in range(3):
        for number, case in enumerate(cases):
            check(ops[number], dataclasses.replace(case, seed=seed), group.rank, options.device)
        ops[seed].close()
        ops[seed] = open_op(group, cases[seed], options)
    for one in ops:
        one.close()


def subgroups(group, options):
    """Groups of two ranks beside a group of all, each with a workspace of its own."""
    pair = this_rank() // 2
    half = this_group(f"pair{pair}", (2 * pair, 2 * pair + 1))
    case, small = Case(group.size, 3, options.hidden, seed=1), Case(2, 3, options.hidden, seed=10 + pair)
    inner, outer = open_op(half, small, options), open_op(group, case, options)
    for _ in range(3):
        check(inner, small, half.rank, options.device)
        check(outer, case, group.rank, options.device)
    outer.close()
    inner.close()
    global digest
    digest = hashlib.sha256()  # the pairs hold different numbers; each rank has judged its own


def strange_inputs(group, options):
    """Inputs that are not contiguous, or not on a 16-byte boundary; wrong shapes are refused."""
    case = Case(group.size, 2, options.hidden)
    op = open_op(group, case, options)
    residual, weight = case.common()
    wide = tensors.tensor(case.partial(group.rank).repeat(2, axis=1), case.dtype, options.device)
    weight = tensors.tensor(weight, case.weight_dtype, options.device)
    residual = tensors.tensor(residual, case.dtype, options.device)
    x = wide[:, ::2]
    for strange in (x, x.t().contiguous().t()):
        outputs = op.finish(strange, residual, weight, case.eps, 0.0)
        assert judge(case, *(tensors.bits_of(out, case.dtype) for out in outputs)) <= 1
    longer = tensors.tensor(case.partial(group.rank).astype("int32"), "float32", options.device)
    for partial, wrong in ((residual, wide), (residual, residual[:1]), (residual, longer), (longer, None)):
        try:
            op.finish(partial, wrong, weight, case.eps, 0.0)
        except ValueError as error:
            assert str(options.hidden) in str(error)
        else:
            raise AssertionError("a wrong shape was taken")
    kept = op.finish
    op.close()
    calls = [lambda run=run: run(x, residual, weight, case.eps, 0.0) for run in (kept, op.finish)]
    for use in (*calls, op.check, op.freeze, op.reset):
        assert _is_closed(use), use
    assert op.stats()["device"] is None


def _is_closed(use):
    try:
        use()
    except FusionError as error:
        return error.reason.code == "closed"
    return False


def weights(group, options):
    """Weights of several dtypes in one workspace, in turn; another dtype or length is refused, and nothing is read."""
    kinds = ("bfloat16", "float32", "float16")
    case = Case(group.size, 2, options.hidden)
    op = open_op(group, case, options, weight_dtypes=kinds[:2])
    op.freeze()
    for seed in range(2):
        for kind in kinds[:2]:
            check(op, dataclasses.replace(case, weight_dtype=kind, seed=seed), group.rank, options.device)
    x = tensors.tensor(case.partial(group.rank), case.dtype, options.device)
    weight = case.common()[1]
    for wrong, dtype in ((weight, "float16"), (weight[:-8], case.dtype), (weight[None], case.dtype)):
        try:
            op.finish(x, None, tensors.tensor(wrong, dtype, options.device), case.eps, 0.0)
        except ValueError as error:
            assert "weights" in str(error), error
        else:
            raise AssertionError("a wrong weight was taken")
    check(op, case, group.rank, options.device)
    op.close()


def few_slots(group, options):
    """Calls of more rows than there are slots are several launches, or rounds, and count as such."""
    case = Case(group.size, 7, options.hidden)
    plan = plans.plan_for(group.size, case.hidden, case.dtype, interpreted=options.device == "cpu")
    op = open_op(group, case, options, workspace_bytes=plans.total_bytes(plan, 4))
    assert op._slots == 4, op._slots
    before = op.stats()["device"]
    for rows, two_shot_rows in ((7, 1 << 62), (2, 1), (7, 1), (1, 1 << 62), (4, 1 << 62)):
        if options.device == "cpu":
            op._two_shot_rows = two_shot_rows
        check(op, dataclasses.replace(case, rows=rows, seed=rows), group.rank, options.device)
    after = op.stats()["device"]
    assert (after["rows"] - before["rows"], after["calls"] - before["calls"]) == (21, 7), (before, after)
    op.close()


def other_launches(group, options):
    """Ranks that would not launch the same programs refuse, all of them."""
    try:
        with at_once(group.rank + 1):
            open_op(group, Case(group.size, 1, options.hidden), options)
    except FusionError as error:
        assert error.reason.code == "launches_differ" and dict(error.reason.facts)["rank"] == 1, error
    else:
        raise AssertionError("opened")


def rounds(group, options):
    """Calls of several rounds, in turn with calls of one round and of the other path: each row has the bits that it has
    in a call of one round."""
    few = 1 if options.device == "cpu" else group.size + 1
    slots = 2 * group.size * few
    counts = 2 * slots + 1, 1, 2 * slots, slots, 3 * slots + 1
    case = Case(group.size, max(counts), options.hidden)
    plan = plans.plan_for(group.size, case.hidden, case.dtype, interpreted=options.device == "cpu")
    with at_once(few):
        op = open_op(group, case, options, workspace_bytes=plans.total_bytes(plan, slots))
    assert op._slots == slots, (op._slots, slots)
    paths = sorted({path for _, path, _, in_rounds in op._launches if in_rounds} - {STAYS})
    assert paths == sorted(op.at_once.keys() - {STAYS})
    residual, weight = case.common()
    weight, x = tensors.tensor(weight, case.weight_dtype, options.device), case.partial(group.rank)

    def finish(start, end):
        given = (tensors.tensor(part[start:end], case.dtype, options.device) for part in (x, residual))
        return [tensors.bits_of(out, case.dtype) for out in op.finish(*given, weight, case.eps, 0.0)]

    for step, count in enumerate(2 * counts):
        path = paths[step % len(paths)]
        op._two_shot_rows = 1 if path else 1 << 62
        assert [one.rounds for one in op.launches(count, path)] == [-(-count // slots)]
        whole = finish(0, count)
        op.check()
        parts = zip(*(finish(start, min(start + slots, count)) for start in range(0, count, slots)))
        for got, want in zip(whole, parts):
            assert (got == np.concatenate(want)).all(), (step, count)
            digest.update(got.tobytes())
    op.close()


CODES, FP8_ROWS = "float8_e4m3fn", (1, 5, 0, 3)
FP8 = (
    Fp8(),
    Fp8("divide", by_column=True, keeps_norm=False),
    Fp8("multiply_pow2", by_column=True),
    Fp8("static", static_scale=0.02),
)


def fp8(group, options):
    """Codes and scales are the contract's bits for the norm that the call without FP8 gives, which it still gives."""
    case, on_cpu = Case(group.size, 7, max(256, options.hidden)), options.device == "cpu"
    plan = plans.plan_for(group.size, case.hidden, case.dtype, interpreted=on_cpu, fp8=True)
    few = plans.total_bytes(plan, max(3, group.size))  # then a call of 5 rows has rounds, or launches
    for forms, room in ((FP8[:2], options.workspace_mb << 20), (FP8[2:], few)):
        changes = {"workspace_bytes": room, "two_shot_rows": options.two_shot_rows}
        op = open_op(group, case, options, fp8=forms, **changes)
        assert op.may_stay == (group.size > 2)
        for rows in FP8_ROWS:
            one = dataclasses.replace(case, rows=rows, seed=rows, residual=rows != 3)
            norm, summed = check(op, one, group.rank, options.device)
            residual, weight = one.common()
            x = tensors.tensor(one.partial(group.rank), one.dtype, options.device)
            residual = None if residual is None else tensors.tensor(residual, one.dtype, options.device)
            weight = tensors.tensor(weight, one.weight_dtype, options.device)
            for form in forms:
                arguments = x, residual, weight, one.eps, 0.0, form
                check_fp8(form, op.finish_fp8(*arguments), norm, summed, one.dtype)
                if residual is None or not op.residual_stays(rows):
                    continue
                *quantised, kept = op.finish_fp8(*arguments, True)
                kept = tensors.bits_of(kept, one.dtype)
                owned = np.arange(rows) % group.size == group.rank
                assert (kept[~owned] == 0x7FFF).all() and (kept[owned] == summed[owned]).all()
                whole = tensors.tensor(summed, one.dtype, options.device)
                check_fp8(form, (*quantised, whole), norm, summed, one.dtype)
        op.close()


def check_fp8(form, outputs, norm, summed, dtype):
    """One call with FP8 against the bits of the same call without."""
    norm_out, codes, scales, residual_out = outputs
    want = reference.quantise(tensors.from_bits(norm, dtype), form.formula, form.static_scale)
    assert (tensors.bits_of(residual_out, dtype) == summed).all()
    assert (norm_out is None) != form.keeps_norm
    assert norm_out is None or (tensors.bits_of(norm_out, dtype) == norm).all()
    assert str(codes.dtype).endswith(CODES) and list(codes.shape) == list(norm.shape)
    assert (bytes_of(codes) == want[0]).all(), f"{form}: codes"
    digest.update(bytes_of(codes).tobytes())
    if form.formula == "static":
        assert scales is None
    elif len(norm):
        assert list(scales.shape) == list(want[1].shape)
        assert (numbers_of(scales).view("uint32") == want[1].view("uint32")).all(), f"{form}: scales"
        padded = -(-len(norm) // 4) * 4
        strides = scales.strides if hasattr(scales, "strides") else scales.stride()
        assert list(strides) == ([1, padded] if form.by_column else [want[1].shape[1], 1])


def wrap(group, options):
    """The count of rows goes on where a counter of 32 bits would wrap, and through a reset, whatever was last seen."""
    case = Case(group.size, 3, options.hidden)
    op = open_op(group, case, options)

    def rows():
        return op.stats()["device"]["rows"]

    place = op._workspace.local + 8 * plans.COUNTER
    op._provider.write(place, ((2**32 - 2) * plans.COUNTER_STEP).to_bytes(8, "little"))
    before = rows()
    for number in range(1, 6):
        check(op, dataclasses.replace(case, seed=number), group.rank, options.device)
        if number != 3:
            assert rows() == before + 3 * number, (number, rows(), before)
    check(op, case, group.rank, options.device)
    op.reset()
    assert rows() == before + 18
    check(op, case, group.rank, options.device)
    assert rows() == before + 21 and op.stats()["device"]["calls"] > 2**32
    op.reset()  # and through another, at once after a count and with none since
    op.reset()
    assert rows() == before + 21
    check(op, case, group.rank, options.device)
    assert rows() == before + 24
    op.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=72)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 3, 0, 9, 2, 17])
    parser.add_argument("--timeout_s", type=float, default=20)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--two_shot_rows", type=int)
    parser.add_argument("--slots", type=int, nargs="+", default=[12, 64])
    parser.add_argument("--workspace_mb", type=int, default=4)
    options = parser.parse_args()
    group = this_group()
    if options.device == "gpu" and not tensors.HAS_PADDLE:
        import torch

        torch.cuda.set_device(this_rank() % torch.cuda.device_count())
        torch.zeros(1, device="cuda")
    for what in options.what:
        start = time.monotonic()
        globals()[what](group, options)
        print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    print("digest", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main()

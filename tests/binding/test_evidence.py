"""What the proving pass tells a right kernel from a wrong one by, on simulated ranks: NumPy alone, every dtype.

A kernel is simulated as the contract says it, in float32 in rank order, or as FlashInfer does it; each bug is seeded
at one Site of many, and must be refused there by name.
"""

import functools

import numpy as np
import pytest

from fd_fusion import exact
from fd_fusion.binding.evidence import (
    BARE,
    WITH,
    Contract,
    columns_of,
    joint_refusal,
    own_refusal,
    probe_refusal,
    words_of,
)
from fd_fusion.binding.proof import vacuous
from fd_fusion.reference import round_to

HIDDEN, EPS, DTYPES = 256, 1e-6, ("bfloat16", "float16", "float32")


def contract_of(dtype, size, offset=0.0, site="the site", in_rank_order=True):
    return Contract(site, size, dtype, EPS, offset, in_rank_order)


def to(x, dtype):
    with np.errstate(over="ignore"):
        return round_to(np.asarray(x, np.float32), dtype).astype(np.float32)


def kernel(contract, partials, residual, weight, bug=None):
    """(norm_out, residual_out) of every rank: the contract in float32, or FlashInfer's roundings, with a bug."""
    eps, offset = contract.eps, contract.weight_offset
    eps = 1e-5 if bug == "wrong eps" else eps
    offset = 0.0 if bug == "offset forgotten" else offset
    weight = weight[::-1] if bug == "wrong weight" else weight
    residual = None if bug == "residual forgotten" else residual
    partials = partials[:-1] if bug == "rank dropped" else partials
    partials = partials[:1] if bug == "adds nothing" else partials
    if contract.in_rank_order:
        total = exact.rank_order_sum(list(partials), residual)
    else:
        total = to(functools.reduce(np.add, [p.astype(np.float32) for p in partials[::-1]]), contract.dtype)
        total = total if residual is None else total + residual
    out = to(total, contract.dtype)
    if bug == "one column truncated":
        out[:, -1] = truncated(total[:, -1], contract.dtype)
    scale = 1 / np.sqrt((total * total).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return to(total * scale * (weight + np.float32(offset)), contract.dtype), out


def truncated(x, dtype):
    """Rounded toward zero where the right rounding goes away from it; one last place more where it does not."""
    near = to(x, dtype)
    step = 2 * exact.half_ulp(near, dtype)
    return np.where(np.abs(near) > np.abs(x), near - np.sign(x) * step, near + np.sign(x) * step).astype(np.float32)


def host(contract, partials, residual, weight):
    """The host's own: any order, and a norm that rounds before the weight."""
    total = sum(p.astype(np.float64) for p in partials)
    total = total + (0 if residual is None else residual)
    scaled = to(total / np.sqrt((total * total).mean(-1, keepdims=True) + contract.eps), contract.dtype)
    return to(scaled * to(weight + contract.weight_offset, contract.dtype), contract.dtype), to(total, contract.dtype)


def real(rng, dtype, size, ratio, rows=4, hidden=HIDDEN):
    partials = [to(rng.standard_normal((rows, hidden)), dtype) for _ in range(size)]
    return partials, to(ratio * size**0.5 * rng.standard_normal((rows, hidden)), dtype)


def both(run, residual):
    return {WITH: run(residual), BARE: run(None)}


def judge(contract, partials, residual, weight, bug=None):
    """The refusal that all ranks come to at one Site."""
    fused = both(lambda r: kernel(contract, partials, r, weight, bug), residual)
    words = [words_of(partial, residual, fused) for partial in partials]
    rows = [exact.probe_partial(r, contract.size, HIDDEN, EPS, contract.dtype) for r in range(contract.size + 1)]
    known = both(lambda r: kernel(contract, rows[:-1], r, weight, bug), rows[-1])
    stock = both(lambda r: host(contract, rows[:-1], r, weight), rows[-1])
    return (
        own_refusal(contract, weight, fused)
        or probe_refusal(contract, known, stock)
        or joint_refusal(contract, words)
    )


BUGS = ["rank dropped", "adds nothing", "residual forgotten", "wrong eps", "wrong weight", "offset forgotten"]


@pytest.mark.parametrize("in_rank_order", [True, False], ids=["rank order", "rounds twice"])
@pytest.mark.parametrize("sites", [6, 92])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_seeded_bug_is_refused_at_its_site(dtype, size, sites, in_rank_order):
    """The bug is in the last of the sites; nothing that is allowed grows with their number."""
    rng = np.random.default_rng(size)
    for ratio in (1, 10, 100):
        for bug in [*BUGS, *(["one column truncated"] if in_rank_order else [])]:
            offset = 1.0 if bug == "offset forgotten" else 0.0
            contract = contract_of(dtype, size, offset, f"layers.{sites - 1}", in_rank_order)
            partials, residual = real(rng, dtype, size, ratio)
            weight = to(rng.uniform(0.5, 1.5, HIDDEN) - offset, dtype)
            refusal = judge(contract, partials, residual, weight, bug)
            assert refusal is not None and refusal.code == "proof_failed", (bug, ratio)
            assert f"layers.{sites - 1}:" in str(refusal)
            assert judge(contract, partials, residual, weight) is None, (ratio, "a right kernel")


@pytest.mark.parametrize("seeds", [range(250), pytest.param(range(250, 1000), marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_kernel_passes_a_thousand_seeds(dtype, seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        size, ratio, offset = (2, 4, 8)[seed % 3], (0.01, 1, 10, 100)[seed % 4], float(seed % 2)
        contract = contract_of(dtype, size, offset, in_rank_order=seed % 5 > 0)
        partials, residual = real(rng, dtype, size, ratio)
        scale = 2.0 ** rng.integers(-6, 4)
        partials, residual = [to(p * scale, dtype) for p in partials], to(residual * scale, dtype)
        weight = to(rng.standard_normal(HIDDEN), "float32" if seed % 7 else dtype)
        assert (refusal := judge(contract, partials, residual, weight)) is None, (seed, str(refusal))


def test_sums_beyond_float16_are_right_where_the_host_is_inf():
    """The kernel adds in float32: 60000 + 60000 - 60000 is a number."""
    contract = contract_of("float16", 2)
    partials = [np.full((1, HIDDEN), 60000, np.float32), np.full((1, HIDDEN), 60000, np.float32)]
    residual = np.full((1, HIDDEN), -60000, np.float32)
    weight = np.ones(HIDDEN, np.float32)
    assert judge(contract, partials, residual, weight) is None
    assert np.isinf(kernel(contract, partials, None, weight)[1]).all(), "and inf where the sum itself is too large"


def test_nan_and_inf_in_real_sums_are_no_refusal():
    contract = contract_of("bfloat16", 2)
    partials, residual = real(np.random.default_rng(0), "bfloat16", 2, 1)
    partials[0][0, :3], partials[1][1, 5] = np.nan, np.inf
    assert judge(contract, partials, residual, np.ones(HIDDEN, np.float32)) is None


def test_a_residual_that_differs_between_ranks():
    contract, weight = contract_of("bfloat16", 2), np.ones(HIDDEN, np.float32)
    partials, residual = real(np.random.default_rng(0), "bfloat16", 2, 1)
    words = []
    for rank, own in enumerate((residual, to(residual * 1.5, "bfloat16"))):
        words.append(words_of(partials[rank], own, both(lambda r: kernel(contract, partials, r, weight), own)))
    assert joint_refusal(contract, words).code == "residual_differs"
    words[1].pop("residual")
    assert joint_refusal(contract, words).code == "residual_differs"


def test_zeros_prove_nothing_and_equal_shards_do():
    zeros, ones = np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)
    for ranks, code in (
        ([zeros, zeros], "zeros"),
        ([zeros * np.nan] * 2, "not_finite"),  # what was poisoned is no zero
        ([ones, ones], None),
        ([zeros, ones], None),
    ):
        reason = vacuous([{"site": words_of(partial, None, {})} for partial in ranks])
        assert (reason and reason.code) == code


def test_the_columns_are_both_ends_and_others_and_the_same_everywhere():
    columns = columns_of(4096)
    assert {0, 1, 4094, 4095} <= set(columns) and len(set(columns)) == 16
    assert (columns == columns_of(4096)).all() and list(columns_of(8)) == list(range(8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_known_numbers_are_exact_and_make_eps_visible(dtype, size, eps):
    rows = [exact.probe_partial(rank, size, 4096, eps, dtype) for rank in range(size + 1)]
    for row in rows:
        assert (to(row, dtype) == row).all()
    assert len({row.tobytes() for row in rows}) == size + 1, "no rank is like another"
    total = exact.rank_order_sum(rows[:-1], rows[-1])
    assert (to(total, dtype) == total).all() and (total == exact.rank_order_sum(rows[-2::-1], rows[-1])).all()
    assert 0.2 < (total.astype(np.float64) ** 2).mean() / eps < 5 or (dtype == "float16" and eps == 1e-12)


def all_reduced(parts, dtype):
    """By a host that rounds after each addition."""
    return functools.reduce(lambda a, b: to(a + b, dtype), parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_are_reduced_together_are_near_their_sums_and_a_part_too_many_is_not(dtype):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        size = (2, 4, 8)[seed % 3]
        routed, shared = ([to(rng.standard_normal((2, 256)), dtype) for _ in range(size)] for _ in range(2))

        host = to(all_reduced(routed, dtype) + all_reduced(shared, dtype), dtype)
        parts = [to(a + b, dtype) for a, b in zip(routed, shared)]
        ours = to(exact.rank_order_sum(parts, None), dtype)
        assert exact.regrouped(ours, host, parts[0], size, dtype)
        for wrong in (
            ours + all_reduced(shared, dtype),
            ours - all_reduced(shared, dtype),
            ours - 0.25 * all_reduced(shared, dtype),
            ours - parts[1],
        ):
            assert not exact.regrouped(wrong, host, parts[0], size, dtype)

"""How the kernel is called: through the recorded signature of every release, by keyword or by position."""

import pytest
from support.flashinfer_releases import RELEASES

from fd_fusion.backends.flashinfer.calls import BASE, Fixed, block_threads, compiled_call, parse, python_call, rules
from fd_fusion.reasons import FusionError
from tests.support.sites import make_site

FIXED = Fixed(size=4, rank=1, hidden_size=64, rows=8, is_fp32=False, pointers="table")
BEFORE_0_2_9 = ("use_oneshot" if n == "trigger_completion_at_end" else n for n in BASE if n != "use_oneshot")


class Rows:
    """Stands in for a tensor of some rows."""

    def __init__(self, rows=3):
        self.shape = [rows, 64]


def recorder(names, extra=()):
    """A function with these parameters; it returns nothing and keeps what it was called with."""
    calls = []
    text = ", ".join([*names, *(f"{name}=None" for name in extra)])
    space = {"calls": calls}
    exec(f"def function({text}):\n    calls.append(dict(locals()))", space)
    return space["function"], calls


def one_call(call, bias=0.0):
    x = Rows()
    call(x, "residual", "norm_out", "residual_out", "weight", 1e-6, bias, True)
    return x


EXPECTED = {
    "world_size": 4,
    "world_rank": 1,
    "token_num": 3,
    "hidden_dim": 64,
    "workspace_ptrs": "table",
    "launch_with_pdl": False,
    "trigger_completion_at_end": True,
    "fp32_acc": True,
    "pattern_code": 1,
    "use_oneshot": True,
    "allreduce_out": None,
    "residual_in": "residual",
    "residual_out": "residual_out",
    "norm_out": "norm_out",
    "quant_out": None,
    "scale_out": None,
    "rms_gamma": "weight",
    "rms_eps": 1e-6,
    "scale_factor": None,
    "layout_code": None,
}


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.version)
def test_every_release_gets_its_own_arguments(release):
    function, calls = recorder(BASE, release.extra)
    call, adds_bias = python_call(function, FIXED, release.version)
    x = one_call(call, 1.0 if adds_bias else 0.0)
    got = calls[0]
    assert got.pop("allreduce_in") is x
    assert {name: got.pop(name) for name in EXPECTED} == EXPECTED
    assert adds_bias == ("weight_bias" in release.extra) == rules(release.version).weight_bias
    assert set(got) == set(release.extra)
    if release.extra:
        assert got["weight_bias"] == 1.0 and got["block_quant_group_size"] is None
        assert got["metadata"] == {
            "tp_rank": 1,
            "tp_size": 4,
            "max_token_num": 8,
            "hidden_dim": 64,
            "use_fp32_lamport": False,
        }


def test_the_order_before_0_2_9_does_not_matter():
    function, calls = recorder([*BEFORE_0_2_9, "trigger_completion_at_end"])
    one_call(python_call(function, FIXED, "0.2.8")[0])
    assert calls[0]["use_oneshot"] is True and calls[0]["trigger_completion_at_end"] is True


def test_an_unknown_signature_is_a_reason():
    function, _ = recorder([*BASE, "moe_rank"])
    with pytest.raises(FusionError, match=r"FlashInfer 0.9 takes moe_rank, which fd_fusion does not know"):
        python_call(function, FIXED, "0.9")
    function, _ = recorder([name for name in BASE if name != "rms_gamma"])
    with pytest.raises(FusionError, match="takes no rms_gamma"):
        python_call(function, FIXED, "0.9")


@pytest.mark.parametrize("version, count", [("0.4.1.1", 21), ("0.6.11", 22), ("0.6.12", 23), ("0.7.2.post1", 23)])
def test_the_compiled_entry_takes_its_arguments_by_position(version, count):
    calls = []
    call, adds_bias = compiled_call(lambda *args: calls.append(args), FIXED, version)
    x = one_call(call, 1.0 if adds_bias else 0.0)
    head = (x, 4, 1, 3, 64, "table", False, True, True, True, 1)
    outputs = (None, "residual", "residual_out", "norm_out", None, None, "weight", 1e-6, None, None)
    assert calls[0] == (*head, *outputs, None, 1.0)[:count] and len(calls[0]) == count


def test_every_gemma_site_passes_its_offset():
    """A Site whose norm adds one to its weight calls with weight_bias 1.0, the others with 0.0."""
    function, calls = recorder(BASE, ("metadata", "block_quant_group_size", "weight_bias"))
    call, _ = python_call(function, FIXED, "0.7.2")
    offsets = {"layers.0 o_proj": 1.0, "layers.0 down_proj": 1.0, "layers.1 o_proj": 0.0, "norm": 1.0}
    for name, offset in offsets.items():

        def fused(partial, residual, offset=offset):
            call(partial, residual, "norm_out", "residual_out", "weight", 1e-6, offset, True)
            return partial, residual

        site = make_site(name, fused=fused, limit=8)
        site.end_proof(True)
        site.finish(site.hand_over(Rows()), Rows())
    assert [one["weight_bias"] for one in calls] == list(offsets.values())


def test_versions_compare_as_numbers():
    assert parse("0.7.2.post1") == (0, 7, 2) and parse("0.6.10") > parse("0.6.9") and parse("nightly") == (0,)
    assert parse("0.4.1") < parse("0.4.1.1") < parse("0.4.1.3") < parse("0.5.0")
    assert parse("0.6.11") < parse("0.6.12rc1") < parse("0.6.12") and parse("0.7.0rc3") < parse("0.7.0")


def test_the_table_and_the_rules_agree():
    for release in RELEASES:
        rule = rules(release.version)
        assert rule.c_args == release.c_args and rule.weight_bias == ("weight_bias" in release.extra)
    early = ("0.6.10rc1", "0.6.11rc1", "0.6.11.post3", "0.6.12rc1", "0.6.12.dev20260523", "0.6.13rc1")
    assert [rules(v).c_args for v in early] == [21, 22, 22, 23, 23, 23]  # as their sources have it
    assert [rules(v).two_shot for v in ("0.6.17", "0.7.1", "0.7.2rc1", "0.7.2")] == [False, False, False, True]
    assert [rules(v).whole_warps for v in ("0.4.1.1", "0.6.14", "0.6.15")] == [True, True, False]
    assert 12 in rules("0.6.17").arch_majors and 12 not in rules("0.6.12").arch_majors


@pytest.mark.parametrize(
    "hidden_size, e, threads",
    [(4096, 2, 128), (8192, 2, 128), (1024, 2, 128), (2880, 2, 180), (4608, 2, 144), (7168, 2, 224), (2880, 4, 180)],
)
def test_the_blocks_of_a_row(hidden_size, e, threads):
    assert block_threads(hidden_size, e) == threads

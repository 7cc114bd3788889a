"""How the kernel is called: by the position of its arguments, in every release."""

import pytest
from support.flashinfer_releases import RELEASES

from fd_fusion.backends.flashinfer.calls import block_threads, compiled_call, parse, rules
from tests.support.sites import make_site


class Rows:
    """Stands in for a tensor of some rows."""

    def __init__(self, rows=3):
        self.shape = [rows, 64]


@pytest.mark.parametrize("version, count", [("0.4.1.1", 21), ("0.6.11", 22), ("0.6.12", 23), ("0.7.2.post1", 23)])
def test_the_compiled_entry_takes_its_arguments_by_position(version, count):
    calls, x = [], Rows()
    call = compiled_call(lambda *args: calls.append(args), version, 4, 1, 64, "table")
    call(x, "residual", "norm_out", "residual_out", "weight", 1e-6, 1.0, True)
    head = (x, 4, 1, 3, 64, "table", False, True, True, True, 1)
    outputs = (None, "residual", "residual_out", "norm_out", None, None, "weight", 1e-6, None, None)
    assert calls[0] == (*head, *outputs, None, 1.0)[:count] and len(calls[0]) == count


def test_every_gemma_site_passes_its_offset():
    """A Site whose norm adds one to its weight calls with weight_bias 1.0, the others with 0.0."""
    calls = []
    call = compiled_call(lambda *args: calls.append(args), "0.7.2", 4, 1, 64, "table")
    offsets = {"layers.0 o_proj": 1.0, "layers.0 down_proj": 1.0, "layers.1 o_proj": 0.0, "norm": 1.0}
    for name, offset in offsets.items():

        def fused(partial, residual, offset=offset):
            call(partial, residual, "norm_out", "residual_out", "weight", 1e-6, offset, True)
            return partial, residual

        site = make_site(name, fused=fused, limit=8)
        site.end_proof(True)
        site.finish(site.hand_over(Rows()), Rows())
    assert [one[-1] for one in calls] == list(offsets.values())


def test_versions_compare_as_numbers():
    assert parse("0.7.2.post1") == (0, 7, 2) and parse("0.6.10") > parse("0.6.9") and parse("nightly") == (0,)
    assert parse("0.4.1") < parse("0.4.1.1") < parse("0.4.1.3") < parse("0.5.0")
    assert parse("0.6.11") < parse("0.6.12rc1") < parse("0.6.12") and parse("0.7.0rc3") < parse("0.7.0")


def test_the_table_and_the_rules_agree():
    for release in RELEASES:
        rule = rules(release.version)
        assert rule.c_args == release.c_args and rule.weight_bias == (release.c_args == 23)
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

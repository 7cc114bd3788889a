"""The rank scripts of tests/dist, as real processes (gloo, no GPU), one of them under paddle.distributed.launch."""

import pytest
from support.launch import launch, ranks, spawn


@pytest.mark.parametrize("nproc, args", [(1, []), (2, []), (4, ["auto", "eager"]), (2, ["triton", "eager"])])
def test_bind_model(nproc, args, tmp_path):
    results = ranks("bind_model.py", nproc, tmp_path, *args)
    assert len({result.get("bits") for result in results}) == 1, "all ranks hold the same bits"


@pytest.mark.parametrize("backend", ["triton", "paddle"])
def test_a_model_with_quantised_norms(backend, tmp_path):
    results = ranks("fp8_model.py", 2, tmp_path, backend)
    assert results[0] == results[1], "all ranks hold the same bits"


@pytest.mark.parametrize("nproc", [2, 4])
def test_ops(nproc, tmp_path):
    start = launch if nproc == 2 else ranks
    for result in start("ops.py", nproc, tmp_path):
        assert result["worst"] <= 1


def test_refusal(tmp_path):
    cases = "refuses", "refuses-strict", "silent"
    first, second = ranks("refusal.py", 2, tmp_path, *cases)
    assert first == second and set(first) == set(cases), "every rank tells the same reason"


def test_subgroups(tmp_path):
    results = ranks("subgroups.py", 4, tmp_path)
    bits = [result["bits"] for result in results]
    assert bits[0] == bits[1] != bits[2] == bits[3]


def test_paddle_spawn(tmp_path):
    for result in spawn("spawned.py", 2, tmp_path):
        assert result["sites"] == 2 and result["off"] is None and result["worst"] < 1e-5


WHOLE = {"same": True, "whole": ["111111"], "paths": ["111111"], "staying": 0, "told": 1}
STAYS = WHOLE | {"paths": ["222221"], "staying": 5, "residual": None, "told": 0}


def staying(tmp_path, *scenarios, timeout_s=240):
    first, *others = ranks("staying_residual.py", 4, tmp_path, *scenarios, timeout_s=timeout_s)
    assert all(other == first for other in others), "all ranks choose alike"
    return first


def test_a_residual_stays_where_it_was_proven_that_the_next_norm_alone_reads_it(tmp_path):
    first = staying(tmp_path, "last_residual", "read_inside", "no_nan_allowed")
    assert first["last_residual"] == STAYS
    assert first["read_inside"] == WHOLE | {"residual": first["read_inside"]["residual"]}
    assert first["read_inside"]["residual"].startswith("what feeds layers.1.self_attn.o_proj ->")
    assert first["no_nan_allowed"] == WHOLE | {"residual": "NaN"}, "ranks that raise do so in the same place"


@pytest.mark.exhaustive
def test_a_residual_that_stays_in_more_models(tmp_path):
    more = "healthy", "aux_hidden_states", "copied", "stock_norm_between", "read_at_other_T", "another_norm"
    more += "read_by_one_rank", "read_in_a_hidden_row", "watched", "two_limits"
    first = staying(tmp_path, *more, "through_faults", timeout_s=900)
    assert first["aux_hidden_states"] == WHOLE | {"residual": "the model's output"}
    several = {"whole": ["000000", *["111111"] * 3], "paths": ["000000", *["222221"] * 3]}
    assert first["healthy"] == {"example": STAYS | several, "first": STAYS}, "below two-shot nothing stays"
    assert first["copied"]["copied"] == STAYS | {"paths": ["122221"], "staying": 4}, "a copy is read elsewhere"
    assert first["copied"]["in_place"] == WHOLE | {"residual": first["copied"]["in_place"]["residual"]}
    assert first["stock_norm_between"] == STAYS | {"whole": ["11111"], "paths": ["21221"], "staying": 3}
    assert first["read_by_one_rank"] == WHOLE | {"residual": first["read_by_one_rank"]["residual"]}
    assert first["read_in_a_hidden_row"] == [0, False]
    assert first["two_limits"] == [[5, 8, 8, 8, 8, 8], ["122221", "22221", "22221", ""], [True] * 4]
    hooks = {"norm": "a hook of layers.1.input_layernorm", "layer": "a hook of layers.1"}
    watched = hooks | {"kept": "the model keeps one after its forward"}
    assert first["watched"] == {kind: WHOLE | {"residual": why} for kind, why in watched.items()}
    assert first["read_at_other_T"] == [5, True], "what no proof can see is NaN"
    assert first["another_norm"] == [[True] * 3] * 3
    assert first["through_faults"] == [True, True, True, True, True, "222221", True, 5]


SITE = "layers.1.self_attn.o_proj -> layers.1.post_attention_layernorm"
MISSES = {  # scenario: (reason, what its sentence names)
    "delta_in_place": ("changed_in_place", SITE),
    "overwritten_in_place": ("overwritten", SITE),
    "reduced_again": ("outputs_differ", SITE),
    "reader_between": ("outputs_differ", "layers.1.mlp.down_proj -> layers.2.input_layernorm"),
    "reader_after": ("outputs_differ", "output 0"),
    "another_tensor": ("other_tensor", SITE),
}


def test_what_the_proving_pass_sees(tmp_path):
    first, second = ranks("proof_scenarios.py", 2, tmp_path)
    assert first == second, "both ranks come to the same end"
    for name, (code, text) in MISSES.items():
        for found in first[name].values():
            assert found["codes"] == [code] and text in found["text"], (name, found)
            assert found["stock"] and not found["proven"], name
    for name in ("healthy", "equal_shards", "nan_in_stock"):
        for found in first[name].values():
            assert found["proven"] and found["calls"] == 6 and not found["codes"], (name, found)
    # By order alone it is bound wrong, and stays stock; its input is not summed in place. Named, it is proven.
    for name in ("example", "first"):
        proven, codes, stock, input_kept = first["a_wrong_order"][name]
        assert not proven and codes == ["nothing_handed_over"] and stock and input_kept, first["a_wrong_order"]
    assert first["a_wrong_order"]["named"] == [True, [], True, True]
    hooks = first["hooks"]
    assert hooks["producer"]["codes"] == ["hooked"] and hooks["producer"]["calls"] == 5
    assert hooks["around"]["codes"] == ["hooked"] and "layers.1.self_attn has" in hooks["around"]["text"]
    assert hooks["around"]["stock"] and first["changed_after_bind"] == {"code": "changed_in_place"}
    for found in first["zeros_then_weights"].values():
        assert found == {"waiting": "zeros", "proven": True, "fused": 6, "near": True, "left": False}
    assert first["no_rows_first"] == {"waiting": "no_rows_yet", "codes": [], "proven": True, "fused": 6}
    nothing, seen = [False, "no_outputs", True], [False, ["outputs_differ"], True]
    assert first["outputs_of_a_kind"] == {"none": nothing, "iterator": nothing, "numpy": seen, "slots": seen}
    assert first["nothing_finite"] == [[False, "not_finite"], True] * 2
    assert first["traced_before_proven"] == [True, True]
    raised = first["every_forward_raises"]
    assert [one["raised"] for one in raised] == [False, True] * 3
    for one, which in zip(raised, (1, 1, 2, 2, 3, 3)):
        assert f"on purpose in forward {which}" in one["text"] and "rank 1" in one["text"]
    step = "rank 1 left the stock forward of bind"
    by_example, all_by_example, by_first, all_by_first = zip(*first["ranks_out_of_step"])
    for found, off, unbound in (*by_example, *by_first):
        assert off == "out_of_step" and unbound and "wrong numbers" not in found, found
    for (told,), *_ in by_example:
        assert told.startswith("out_of_step") and step in told and "on purpose" in told
    for rank, (found, *_) in enumerate(by_first):
        assert found[0] == "on purpose" if rank else step in found[0]
        assert all(step in one for one in found[1:]), "no forward of it goes on, until it is unbound"
    for found, off, unbound in all_by_example:
        assert found == ["bound", "right", "right", "right"] and off is None and unbound
    for found, off, unbound in all_by_first:
        assert found == ["right"] * 3 and off is None and unbound
    assert first["stock_does_not_repeat"] == {
        "within": {"proven": True, "codes": [], "spread": True},
        "stock_repeats": {"proven": False, "codes": ["outputs_differ"], "spread": False},
    }

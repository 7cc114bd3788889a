"""Which layer feeds which norm in a model of this package's layers: by order, by paths, by a Decoder."""

import pytest
from paddle import nn
from support.tiny import DemoDecoder

import fd_fusion
from fd_fusion import Decoder, FusionConfig, QKRMSNorm, RMSNorm, RowParallelLinear
from fd_fusion.hosts.decoder import links_by_order, named_links, unnamed
from fd_fusion.hosts.own_layers import find_pairs

H = 8


class Block(nn.Layer):
    """A block that reduces once, with a linear in it that does not."""

    site, group, reduce_results = None, None, True

    def __init__(self):
        super().__init__()
        self.inner = RowParallelLinear(H, H, reduce_results=False)


class Rung(nn.Layer):
    """Layers and norms in any order among each other; q and k have norms of their own."""

    def __init__(self, dense):
        super().__init__()
        self.out = RowParallelLinear(H, H)
        self.qk, self.k_norm = QKRMSNorm(H, 1, 1), RMSNorm(H // 2)
        self.first, self.second = RMSNorm(H), RMSNorm(H)
        self.ffn = nn.Layer()
        if dense:
            self.ffn.down = RowParallelLinear(H, H)
        else:
            self.ffn = Block()


class Ladder(nn.Layer):
    def __init__(self, rungs=2, last_first=False):
        super().__init__()
        if last_first:
            self.last = RMSNorm(H)
        self.inside = nn.Layer()
        self.inside.rungs = nn.LayerList([Rung(dense=not i) for i in range(rungs)])
        if not last_first:
            self.last = RMSNorm(H)


NAMES = [
    "inside.rungs.0.out -> inside.rungs.0.second",
    "inside.rungs.0.ffn.down -> inside.rungs.1.first",
    "inside.rungs.1.out -> inside.rungs.1.second",
    "inside.rungs.1.ffn -> last",
]
DECODER = Decoder(
    layers="inside.rungs",
    attention="out",
    post_norm="second",
    mlp=("ffn.down", "ffn"),
    input_norm="first",
    final_norm="last",
)
PATHS = [
    ("inside.rungs.{i}.out", "inside.rungs.{i}.second"),
    ("inside.rungs.0.ffn.down", "inside.rungs.1.first"),
    ("inside.rungs.-1.ffn", "last"),
]


def names(links):
    return sorted(link.name for link in links)


def test_a_model_is_paired_by_the_order_in_which_it_defines_its_layers():
    links, unclear = links_by_order(Ladder())
    assert [link.name for link in links] == NAMES and unclear is None
    links, _ = links_by_order(DemoDecoder(0, 1, layers=1))
    assert names(links) == [
        "layers.0.mlp.down_proj -> norm",
        "layers.0.self_attn.o_proj -> layers.0.post_attention_layernorm",
    ]


def test_what_the_order_does_not_show_is_said_with_both_numbers():
    model = Ladder()
    model.inside.rungs[0].third = RMSNorm(H)
    report = fd_fusion.bind(model, FusionConfig())
    (line,) = report.rejected
    assert line.reason.code == "unclear_pairs" and "Ladder has 4 layers" in str(line.reason)
    assert "6 RMSNorms" in str(line.reason) and "pairs=" in line.reason.remedy
    fd_fusion.unbind(model)
    links, unclear = links_by_order(model)
    (rejected,) = find_pairs(model)
    assert links == [] and rejected.reason == unclear == line.reason
    assert links_by_order(nn.Linear(1, 1)) == ([], None)


def test_a_norm_of_another_width_is_no_norm_of_these_sums():
    model = Ladder()
    model.other = RMSNorm(2 * H)
    assert [link.name for link in links_by_order(model)[0]] == NAMES


def test_a_layer_that_no_pair_names_is_in_the_report():
    rejected = [pair for pair in find_pairs(Ladder(), PATHS[:1]) if hasattr(pair, "reason")]
    assert [(pair.name, pair.reason.code) for pair in rejected] == [
        ("inside.rungs.0.ffn.down", "unnamed"),
        ("inside.rungs.1.ffn", "unnamed"),
    ]


@pytest.mark.parametrize("pairs", [PATHS, DECODER, [list(pair) for pair in PATHS]], ids=["paths", "decoder", "lists"])
@pytest.mark.parametrize("last_first", [False, True])
def test_pairs_that_are_named(pairs, last_first):
    model = Ladder(last_first=last_first)
    links = named_links(model, pairs)
    assert names(links) == sorted(NAMES) and unnamed(model, links) == []
    for link in links:
        producer, norm = link.name.split(" -> ")
        found = dict(model.named_sublayers())
        assert found[producer] is link.producer and found[norm] is link.norm


def test_one_layer_has_no_next_one():
    assert names(named_links(Ladder(1), DECODER)) == [
        "inside.rungs.0.ffn.down -> last",
        "inside.rungs.0.out -> inside.rungs.0.second",
    ]
    with pytest.raises(ValueError, match=r"'inside\.rungs\.0\.wrong' is not in Ladder"):
        named_links(Ladder(1), [("inside.rungs.{i}.wrong", "inside.rungs.{i+1}.first")])


def test_a_model_may_be_the_list_itself():
    rungs = Ladder().inside.rungs
    assert names(named_links(rungs, [("{i}.out", "{i}.second")])) == ["0.out -> 0.second", "1.out -> 1.second"]


@pytest.mark.parametrize(
    "pair, says",
    [
        (
            ("inside.rungs.0.atn", "last"),
            r"'inside.rungs.0.atn' is not in Ladder: expected 'atn' among out, qk",
        ),
        (("inside.rung.{i}.out", "last"), r"'inside.rung.\{i\}.out' is not in Ladder: expected 'rung' among rungs"),
        (("inside.rungs.{i}.first", "last"), r"'inside.rungs.0.first' is of class RMSNorm, expected a Row"),
        (("inside.rungs.0.out", "inside.rungs.7.first"), r"'inside.rungs.7.first' is not in Ladder: expected '7'"),
        (("inside.rungs.0.out", "inside.rungs.0.qk"), r"is of class QKRMSNorm, expected an RMSNorm"),
        (("inside.rungs.0.out", "inside.rungs.0.first.weight.x"), r"expected 'x' among no layers"),
        (("inside.rungs.{i}.outt", "last"), r"'inside.rungs.0.outt' is not in Ladder: expected 'outt'"),
        (("inside.rungs.{i}.out", "inside.rungs.{i}.before"), r"'inside.rungs.0.before' is not in Ladder"),
        (("inside.rungs.0.out", "inside.rungs.1.ffn"), r"is of class Block, expected an RMSNorm"),
        (("inside.rungs.-2.ffn", "last"), r"expected '-2' among 0, 1"),
        (("", "last"), r"is not \(path of a layer"),
        ((1, 2), r"is not \(path of a layer"),
        (("a", "b", "c"), r"is not \(path of a layer that all-reduces, path of its norm\)"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_that_says_what_is_there(pair, says):
    with pytest.raises(ValueError, match=f"bind: pairs: .*{says}"):
        fd_fusion.bind(Ladder(), FusionConfig(), pairs=[pair])


def test_one_path_is_no_list_of_pairs():
    with pytest.raises(ValueError, match=r"is not \(path of a layer that all-reduces, path of its norm\)"):
        named_links(Ladder(), "inside.rungs.{i}.out")


def test_paths_are_not_looked_at_where_fusion_is_not_asked_for():
    assert fd_fusion.bind(Ladder(), pairs=[("no", "where")]).off.code == "not_asked"


def test_help_says_what_a_model_must_look_like():
    text = fd_fusion.bind.__doc__
    for word in ("RowParallelLinear", "reduce_or_hand_over", "RMSNorm", "QKRMSNorm", "{i+1}", "Decoder", "-1"):
        assert word in text, word


def test_named_pairs_reach_the_report():
    model = Ladder(last_first=True)
    report = fd_fusion.bind(model, FusionConfig(), pairs=DECODER)
    assert sorted(one.name for one in report.rejected) == sorted(NAMES)
    assert {one.reason.code for one in report.rejected} == {"one_rank"}
    fd_fusion.unbind(model)

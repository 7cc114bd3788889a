"""Which layer feeds which norm: by paths, by a `Decoder`, by the order of definition. What is wrong is said."""

import pytest
from paddle import nn

import fd_fusion
from fd_fusion import RMSNorm, RowParallelLinear
from fd_fusion.hosts.decoder import links_by_order, named_links, unnamed
from fd_fusion.hosts.own_layers import find_pairs
from fd_fusion.layers import QKRMSNorm

H = 8


class Mixer(nn.Layer):
    """A block that reduces once, for the linear inside it too."""

    site, group, reduce_results = None, None, True

    def __init__(self):
        super().__init__()
        self.inner = RowParallelLinear(H, H, reduce_results=False)


class Rung(nn.Layer):
    def __init__(self):
        super().__init__()
        self.before_out, self.out = RMSNorm(H), RowParallelLinear(H, H)
        self.qk, self.before_mixer, self.mixer = QKRMSNorm(4, 1, 1), RMSNorm(H), Mixer()


class Ladder(nn.Layer):
    def __init__(self, rungs=2):
        super().__init__()
        self.rungs, self.last = nn.LayerList([Rung() for _ in range(rungs)]), RMSNorm(H)


PAIRS = [
    ("rungs.{i}.out", "rungs.{i}.before_mixer"),
    ("rungs.{i}.mixer", "rungs.{i+1}.before_out"),
    ("rungs.-1.mixer", "last"),
]
NAMES = [
    "rungs.0.out -> rungs.0.before_mixer",
    "rungs.0.mixer -> rungs.1.before_out",
    "rungs.1.out -> rungs.1.before_mixer",
    "rungs.1.mixer -> last",
]
DECODER = fd_fusion.Decoder(
    layers="rungs", attention="out", post_norm="before_mixer", mlp=("no_such", "mixer"), input_norm="before_out",
    final_norm="last",
)  # fmt: skip


@pytest.mark.parametrize("pairs", [PAIRS, DECODER, [list(pair) for pair in PAIRS]], ids=["paths", "Decoder", "lists"])
def test_the_pairs_that_are_named(pairs):
    model = Ladder()
    links = named_links(model, pairs)
    assert sorted(link.name for link in links) == sorted(NAMES) and unnamed(model, links) == []
    first = next(link for link in links if link.name == NAMES[0])
    assert first.producer is model.rungs[0].out and first.norm is model.rungs[0].before_mixer


def test_the_order_of_definition_shows_them_too():
    links, unclear = links_by_order(Ladder())
    assert [link.name for link in links] == NAMES and unclear is None


def test_another_number_of_norms_than_the_order_needs():
    model = Ladder()
    model.more = RMSNorm(H)
    links, unclear = links_by_order(model)
    assert links == [] and unclear.code == "unclear_pairs"
    assert "4 layers" in str(unclear) and "6 RMSNorms" in str(unclear)
    (rejected,) = find_pairs(model)
    assert rejected.reason == unclear
    assert links_by_order(nn.Linear(2, 2)) == ([], None)


def test_a_norm_of_another_width_is_no_norm_of_these_sums():
    model = Ladder()
    model.other = RMSNorm(2 * H)
    assert [link.name for link in links_by_order(model)[0]] == NAMES


def test_a_layer_that_no_pair_names_is_in_the_report():
    rejected = [pair for pair in find_pairs(Ladder(), PAIRS[:1]) if hasattr(pair, "reason")]
    assert [(pair.name, pair.reason.code) for pair in rejected] == [
        ("rungs.0.mixer", "unnamed"),
        ("rungs.1.mixer", "unnamed"),
    ]


@pytest.mark.parametrize(
    "pairs, says",
    [
        ([("rungs.{i}.outt", "rungs.{i}.before_mixer")], "'rungs.0.outt' is not in Ladder: expected 'outt'"),
        ([("rung.{i}.out", "last")], "expected 'rung' among rungs, last"),
        ([("rungs.{i}.out", "rungs.{i}.before")], "'rungs.0.before' is not in Ladder"),
        ([("rungs.{i}.out", "rungs.{i}.mixer")], "is of class Mixer, expected an RMSNorm"),
        ([("rungs.{i}.before_out", "last")], "is of class RMSNorm, expected a RowParallelLinear"),
        ([("rungs.-2.mixer", "last")], "expected '-2' among 0, 1"),
        ("rungs.{i}.out", "is not (path of a layer that all-reduces, path of its norm)"),
        ([("a", "b", "c")], "is not (path of a layer"),
        ([(1, 2)], "is not (path of a layer"),
        ([("", "last")], "is not (path of a layer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_names_is_said(pairs, says):
    with pytest.raises(ValueError) as error:
        named_links(Ladder(), pairs)
    assert says in str(error.value)

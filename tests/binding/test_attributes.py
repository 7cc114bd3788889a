"""An attribute that is set for a time: on an instance, a class or a module, and never as a sublayer."""

import types

import pytest
from paddle import nn

from fd_fusion.binding.attributes import follow, set_attribute, undo_in_turn


class Base:
    @classmethod
    def made(cls):
        return cls.__name__


class Derived(Base):
    pass


@pytest.mark.parametrize("owner", [nn.Linear(2, 2), types.ModuleType("module"), Derived])
def test_an_undo_leaves_no_trace(owner):
    before = dict(vars(owner))
    undo = [set_attribute(owner, "made", nn.Linear(1, 1)), set_attribute(owner, "made", 2)]
    assert owner.made == 2 and Base.made() == "Base"
    undo[1]()
    assert isinstance(owner.made, nn.Linear)
    undo_in_turn(undo[:1])
    assert dict(vars(owner)) == before and undo
    set_attribute(owner, "other", 1)()
    assert not hasattr(owner, "other")


def test_what_was_set_before_comes_back_as_it_was():
    class Own(Base):
        made = classmethod(lambda cls: "own")

    undo = set_attribute(Own, "made", 1)
    undo()
    assert Own.made() == "own" and isinstance(vars(Own)["made"], classmethod)
    undo = set_attribute(Own, "late", 1)
    del Own.late
    undo()


def test_a_dotted_path_ends_early_as_none():
    model = nn.Sequential(nn.Linear(1, 1))
    assert follow(model, "0.weight") is model[0].weight and follow(model, "0.no.weight") is None

"""One rank refuses, or never votes: all ranks run unfused, every report names that rank and why. 2 or more ranks.

argv: "refuses", "refuses-strict" to insist, or "silent"; several run one after another.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import rank as this
from support.tiny import DemoDecoder, hidden

import fd_fusion
from fd_fusion.backends import paddle as backend
from fd_fusion.reasons import BindError, because

rank, size = this.start()
culprit = size - 1


def reason_of(case):
    """The reason that this rank got, once all is as it was."""
    how, _, insists = case.partition("-")
    model, slept = DemoDecoder(rank, size), []

    def stub(spec):
        """The paddle backend, but for the last rank."""
        if spec.rank == culprit and how == "refuses":
            return because("backend_failed", backend="stub", error="out of memory on purpose")
        if spec.rank == culprit and not slept:
            slept.append(time.sleep(12))  # says nothing for four times the limit
        return None

    backend.supports = stub
    x = hidden(5)
    stock = model(x)
    config = fd_fusion.FusionConfig(timeout_s=3, strict=bool(insists))
    try:
        report = fd_fusion.bind(model, config, example=lambda: (model(x[:2]),))
        raised = False
        assert not report.sites and len(report.rejected) == 6, case
        assert {one.ranks for one in report.rejected} == {(culprit,)}, case
        reason = str(report.rejected[0].reason)
    except BindError as error:
        raised, reason = True, str(error.reason)
    assert raised == bool(insists), case
    assert f"rank {culprit}" in reason, (case, reason)
    assert ("out of memory on purpose" if how == "refuses" else "never voted") in reason, (case, reason)
    assert (model(x) == stock).all() and "site" not in model.norm.__dict__, case
    return reason


this.record(**{case: reason_of(case) for case in sys.argv[1:] or ["refuses"]})

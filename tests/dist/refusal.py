"""One rank refuses, or never votes: all ranks run unfused, every report names that rank and why. 2 or more ranks.

argv: "refuses" or "silent", then "strict" to insist.
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

how, strict = (sys.argv[1:] + ["refuses"])[0], "strict" in sys.argv
rank, size = this.start()
model = DemoDecoder(rank, size)
x = hidden(5)
stock = model(x)
culprit = size - 1


def stub(spec):
    """The paddle backend, but for the last rank."""
    if spec.rank == culprit and how == "refuses":
        return because("backend_failed", backend="stub", error="out of memory on purpose")
    if spec.rank == culprit and not slept:
        slept.append(time.sleep(12))  # says nothing for four times the limit
    return None


slept = []
backend.supports = stub
config = fd_fusion.FusionConfig(timeout_s=3, strict=strict)
try:
    report = fd_fusion.bind(model, config, example=lambda: (model(x[:2]),))
    raised = None
    assert not report.sites and len(report.rejected) == 6
    assert {one.ranks for one in report.rejected} == {(culprit,)}
    reason = str(report.rejected[0].reason)
except BindError as error:
    raised, reason = True, str(error.reason)
assert bool(raised) == strict
assert f"rank {culprit}" in reason, reason
assert ("out of memory on purpose" if how == "refuses" else "never voted") in reason, reason
assert (model(x) == stock).all() and "site" not in model.norm.__dict__
this.record(ok=True, reason=reason)

"""A CUDA driver that only counts, for what calls it through ctypes."""

import ctypes
from collections import Counter


def count_calls(monkeypatch):
    """How often each function of the driver is called from now on. A context is current; each call succeeds."""
    calls = Counter()

    class Driver:
        def __getattr__(self, name):
            def call(*args):
                calls[name] += 1
                if name == "cuThreadExchangeStreamCaptureMode":
                    calls.mode, args[0]._obj.value = args[0]._obj.value, calls.mode
                calls.modes[name] = calls.mode
                if name in ("cuCtxGetCurrent", "cuStreamCreate"):
                    args[0]._obj.value = 1
                return calls.refused.get(name, 0)

            return call

    calls.mode = 1  # of capture, of the thread that calls
    calls.modes = {}  # function -> the mode of its last call
    calls.refused = {}  # function -> the code of its error
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    return calls

"""Virtual ranks without a GPU: what a graph that is captured makes them wait for."""

import contextlib
import gc
import importlib
import itertools
import sys
import types
import weakref
from unittest.mock import MagicMock

import bench
import pytest

from fd_fusion.kernels.all_reduce.plan import plan_for


class FakeTorch(types.ModuleType):
    """torch.cuda's streams, of which there are 32, handed out in turn; it notes what each launch depends on."""

    def __init__(self):
        super().__init__("torch")
        self.turn, self.current, self.before, self.Tensor = itertools.count(), [], {}, object
        cuda = self.cuda = types.SimpleNamespace(
            CUDAGraph=type("CUDAGraph", (), {}), current_stream=lambda: self.current[-1]
        )
        cuda.Stream, cuda.stream, cuda.graph = lambda: Stream(self), self.on, self.graph

    @contextlib.contextmanager
    def on(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        self.default = getattr(self, "default", None) or self.cuda.Stream()
        self.before = {}
        with self.on(stream or self.default):
            yield


class Stream:
    def __init__(self, torch):
        self.torch, self.number = torch, next(torch.turn) % 32

    def wait_stream(self, other):
        behind = self.torch.before.get(other.number, set())
        self.torch.before.setdefault(self.number, set()).update(behind)


@pytest.fixture
def torch(monkeypatch):
    """A fake one for virtual_ranks.py, and no Triton, which this process may need in its other mode."""
    fake, kernel = FakeTorch(), types.ModuleType("kernel")
    kernel.all_reduce_rms_norm = None
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "fd_fusion.kernels.all_reduce.kernel", kernel)
    monkeypatch.setattr(bench, "virtual_ranks", None, raising=False)
    monkeypatch.setitem(sys.modules, "bench.virtual_ranks", None)
    del sys.modules["bench.virtual_ranks"]  # and what takes its place goes with the fixture
    return fake


@pytest.mark.parametrize("size", range(2, 9))
def test_no_rank_of_a_graph_waits_for_another(size, torch):
    """However many graphs have been captured before: the kernels wait for each other, so all must run at once."""
    virtual_ranks = importlib.import_module("bench.virtual_ranks")
    for number in range(40):

        def launch(rank, number=number):
            behind = torch.before.setdefault(torch.current[-1].number, set())
            assert not behind - {rank}, f"graph {number}: rank {rank} starts when ranks {behind} are done"
            behind.add(rank)

        virtual_ranks.capture(size, [launch])


def test_a_graph_keeps_the_memory_whose_addresses_it_holds(torch):
    """What captured it may be gone by the time it is replayed; other tensors must not come to lie there."""

    class Memory:
        def launch(self, rank):
            pass

    memory = Memory()
    kept = weakref.ref(memory)
    graph = importlib.import_module("bench.virtual_ranks").capture(2, [memory.launch])
    del memory
    gc.collect()
    assert kept() is not None
    del graph
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "size, hidden, dtype, most",
    [(8, 7168, "bfloat16", 8), (8, 8192, "float32", 4), (8, 16384, "bfloat16", 6), (2, 4096, "bfloat16", 8)],
)
def test_all_programs_of_all_ranks_run_at_once(torch, monkeypatch, size, hidden, dtype, most):
    """Eight ranks of 64 programs of 128 threads: of fp32 132 multiprocessors hold two each, which are four ranks."""
    virtual_ranks = importlib.import_module("bench.virtual_ranks")
    monkeypatch.setattr(virtual_ranks, "torch", fake := MagicMock())
    fake.cuda.get_device_properties.return_value.multi_processor_count = 132
    ranks = virtual_ranks.VirtualRanks(plan_for(size, hidden, dtype), 8)
    assert ranks.programs == most

"""The scripts of tests/gpu/paddle, as far as they need neither a wheel of 759 MB nor a GPU."""

import importlib.util
import itertools
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import paddle
import pytest

from fd_fusion.frameworks import triton_launch
from fd_fusion.frameworks.triton_launch import Loaded
from fd_fusion.kernels.all_reduce import plan as plans

FOLDER = Path(__file__).parent / "gpu/paddle"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fatbin(*codes):
    """A fatbin of cubins: a header of 16 bytes, then for each a header of 64 and its code."""
    body = b"".join(struct.pack("<HHIQ48x", 2, 0x101, 64, len(code)) + code for code in codes)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_the_code_of_cubins_becomes_zeros_and_nothing_else(tmp_path):
    library = tmp_path / "library.so"
    around = [b"\x7fELF before", b"between two", b"after"]
    full = fatbin(b"\x11" * 24, b"\x22" * 8), fatbin(b"\x33" * 40)
    empty = fatbin(bytes(24), bytes(8)), fatbin(bytes(40))
    library.write_bytes(around[0] + full[0] + around[1] + full[1] + around[2])
    assert load("make_pieces").zero_cubins(library) == 72
    assert library.read_bytes() == around[0] + empty[0] + around[1] + empty[1] + around[2]


def test_the_pieces_are_read_as_one(tmp_path):
    run = load("run")
    for number, data in enumerate((b"abc", b"de")):
        (tmp_path / f"paddle.tar.xz.{number}").write_bytes(data)
    pieces = run.Pieces(tmp_path)
    assert [pieces.read(2) for _ in range(5)] == [b"ab", b"c", b"de", b"", b""]


@pytest.mark.parametrize("gpus, skipped", [(1, 6), (2, 1), (4, 0)])
@pytest.mark.parametrize("fails", [None, "late"])
def test_what_needs_more_gpus_is_skipped_and_never_passed(monkeypatch, tmp_path, gpus, skipped, fails):
    """The run with cases that only note how they were asked for."""
    run, asked = load("run"), []

    def noting(*words, **options):
        asked.append((words, options))
        return lambda limit: (fails is None or fails not in words, "said")

    for kind in ("ranks", "launched", "command"):
        monkeypatch.setattr(run, kind, noting)
    monkeypatch.setattr(run, "staying", noting("staying"))
    monkeypatch.setattr(run, "count_gpus", lambda: gpus)
    monkeypatch.setattr(run, "unpack", lambda: tmp_path)
    monkeypatch.setattr(run, "environment", lambda site: {})
    monkeypatch.setenv("FD_PORTS", "")
    monkeypatch.setenv("PYTHONPATH", "")

    assert run.main(tmp_path, []) == (1 if fails else 0)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found) == 28
    need = {name: f"needs {number} GPUs" for name, number in run.NEEDS.items() if number > gpus}
    assert {name: case["skipped"] for name, case in found.items() if "skipped" in case} == need
    ran = {name: case["passed"] for name, case in found.items() if "skipped" not in case}
    assert len(need) == skipped and len(ran) == 28 - skipped
    assert [name for name, passed in ran.items() if not passed] == ([fails] if fails else [])
    assert (tmp_path / "log.txt").read_text().count(": skipped: needs ") == skipped
    replays = next(words for words, _ in asked if "many_replays" in words)
    assert replays[-1] == (100_000 if gpus > 1 else 2_000)


def test_calls_of_more_rows_than_slots_can_be_of_rounds():
    """`triton_calls.stays` asks for one launch of them, with 3 rows of four ranks at once."""
    run, plan = load("run"), plans.plan_for(4, 1024, "bfloat16")
    for words in (run.FOUR, run.IN_ROUNDS):
        at = words.index("--slots")
        rows, slots = words[words.index("--rows") + 1 : at], words[at + 1 :]
        more = [(most, count) for most, count in itertools.product(slots, rows) if count > most]
        assert more and all(plans.launch_in_rounds(plan, most, 3, count, True) for most, count in more)


def test_every_part_of_the_host_time_can_be_called(monkeypatch, capsys):
    """Each calls something of the op's own, which may change."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    part = load("host_time")
    monkeypatch.setattr(part.timeit, "repeat", lambda call, **_: [call() is not None])
    part.on_a_cpu()
    assert "finish, dtypes interned, norm_out in place" in capsys.readouterr().out


def test_the_host_time_with_a_real_launch_is_measured_to_its_end(monkeypatch, capsys):
    """Without driver and kernels: the product's whole way from tensors to Triton's C function runs."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    part, launched, sources = load("host_time_33"), [], []

    class Run:
        def __init__(self):
            self.launch = lambda *given: launched.append(given)

        def __call__(self, *given):
            self.launch(*given)

    def prepare(kernel, like, constants, device):
        assert paddle.cuda.current_device() == 0 and paddle._C._cuda_getCurrentRawStream(0) == 32
        made = SimpleNamespace(run=Run(), function=5, packed_metadata=(4, 1, 0))
        return Loaded(triton_launch.launcher(made, lambda: 32, like, tuple(constants)), 2)

    kernel = SimpleNamespace(src="def kernel(x,\n    N: tl.constexpr):  # why\n    tl.store(x, N)\n")
    kernel._unsafe_update_src = sources.append
    gpu = SimpleNamespace(name="none", stream=32, capability=(9, 0), synchronize=int, triton_driver=None)
    monkeypatch.setattr(part, "Gpu", lambda: gpu)
    monkeypatch.setattr(part, "_prepare", prepare)
    monkeypatch.setattr(part, "_load_kernel", lambda module, name: kernel)
    monkeypatch.setattr(part.calls, "host_us", lambda call, synchronize: float(bool(call())))
    monkeypatch.setattr(part.paddle, "set_grad_enabled", lambda enabled: None)
    part.main()
    assert set(sources) == {"def kernel(x,\n    N: tl.constexpr):\n    return\n"}
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["microseconds"]
    assert {
        "finish",
        "finish_fp8",
        "finish, launch: through Triton's Python",
        "bare launch, prepared",
    } <= found.keys()
    assert launched and all(given[3] == 32 for given in launched)

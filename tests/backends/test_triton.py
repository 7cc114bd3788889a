"""The triton backend as real processes under the interpreter: see tests/dist/triton_calls.py."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fd_fusion.backends import triton as backend
from fd_fusion.backends import triton_setup
from fd_fusion.backends.triton_setup import ONE_SHOT, STAYS, TWO_SHOT
from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.spec import OpSpec
from tests.support.ranks import ROOT, run_ranks


@pytest.mark.parametrize("shape", [list, tuple])
def test_the_shape_of_a_weight_is_a_list_of_paddle_or_a_tuple_of_torch(shape):
    op = object.__new__(backend.TritonOp)
    op._spec = SimpleNamespace(hidden_size=8, weight_dtypes=("bfloat16",))
    op._of_weights = [("bf16", {(False, False): "a launch"})]
    assert op._launches_for(SimpleNamespace(shape=shape([8]), dtype="bf16")) == {(False, False): "a launch"}
    for wrong in ([7], [8, 1], [1, 8]):
        with pytest.raises(ValueError, match="opened for weights"):
            op._launches_for(SimpleNamespace(shape=shape(wrong), dtype="bf16"))


PLAIN = {
    "rank": 0,
    "size": 2,
    "hidden_size": 64,
    "dtype": "bfloat16",
    "weight_dtypes": ("float32",),
    "workspace_bytes": 1 << 20,
    "timeout_s": 1.0,
}


def agreed(size, *args, timeout_s=120):
    """Run the ranks; all must end well, with the same bits."""
    ended = run_ranks("triton_calls.py", size, *args, timeout_s=timeout_s)
    assert [rank.status for rank in ended] == [0] * size, "\n".join(rank.text for rank in ended)
    assert len({re.search("digest (.*)", rank.text)[1] for rank in ended}) == 1


def test_numbers_of_two_ranks():
    agreed(2, "numbers", "--rows", 1, 3, 0, 6, 2, "--two_shot_rows", 6)


def test_special_payloads_and_delays_of_three_ranks():
    agreed(3, "payload", "delayed", "--rows", 1, 4, "--two_shot_rows", 3)


@pytest.mark.parametrize("size, slots, rows", [(4, 3, (2, 7)), (4, 64, (3, 7, 5)), (4, 16, (27,)), (3, 9, (14,))])
def test_a_residual_that_stays_with_its_owners(size, slots, rows):
    """Of more rows than slots too: what calls leave in rounds the last one reads, in rounds or in launches. With
    fewer slots than ranks nothing stays, whoever asks for it."""
    agreed(size, "stays", "--rows", *rows, "--two_shot_rows", 5, "--slots", slots)


def test_with_two_ranks_no_kernel_leaves_the_residual():
    spec = OpSpec(**PLAIN)
    assert STAYS not in triton_setup.paths_of(spec, triton_setup.plan_of(spec))


@pytest.mark.parametrize(
    "changes, slots, in_rounds",
    [
        ({"size": 2, "max_token_num": 2048}, 2048, []),
        ({"size": 2, "max_token_num": 2048}, 2047, [ONE_SHOT]),
        ({"size": 2, "deterministic": True}, 1 << 20, [ONE_SHOT]),
        ({"size": 2, "deterministic": True}, 9, []),  # fewer than programs
        ({"size": 3, "max_token_num": 64}, 64, []),  # where one-shot ends behind the limit
        ({"size": 4, "max_token_num": 512}, 512, []),
        ({"size": 4, "max_token_num": 512}, 511, [TWO_SHOT, STAYS]),  # one-shot has fewer than 40 rows
        ({"size": 4, "max_token_num": 80}, 79, [TWO_SHOT, STAYS]),
        ({"size": 4, "max_token_num": 79}, 78, []),  # two rounds, one of 39 rows
        ({"size": 4, "max_token_num": 512}, 40, [TWO_SHOT, STAYS]),
        ({"size": 4, "max_token_num": 512}, 39, []),  # no row for each program and owner
        ({"size": 4, "max_token_num": 512, "two_shot_rows": 50}, 40, [ONE_SHOT, TWO_SHOT, STAYS]),
        ({"size": 4, "max_token_num": 45, "two_shot_rows": 50}, 40, [ONE_SHOT]),  # no call takes two-shot
        # Two-shot reads what has stayed.
        ({"size": 4, "tuned_rows": 512, "tuned_staying_rows": 1024}, 512, [TWO_SHOT, STAYS]),
        ({"size": 4, "tuned_rows": 512, "tuned_staying_rows": 1024}, 1024, []),
    ],
)
def test_a_path_has_a_kernel_of_rounds_where_a_call_may_have_them(changes, slots, in_rounds, monkeypatch):
    monkeypatch.setattr(triton_launch, "uses_pdl", lambda: True)
    spec = OpSpec(
        **{**PLAIN, "device": "gpu", "arch": 90, "hidden_size": 4096, "workspace_bytes": 40 << 20, **changes}
    )
    plan = triton_setup.plan_of(spec)
    at_once = dict.fromkeys(triton_setup.paths_of(spec, plan), 10)
    assert triton_setup.paths_in_rounds(spec, plan, slots, at_once) == in_rounds
    compiled = [key for key, how in triton_setup.variants(spec, in_rounds, True) if how["rounds"]]
    bares = [(path, bare) for path in in_rounds for bare in ((False,) if path == STAYS else (False, True))]
    assert compiled == [("float32", *variant, True) for variant in bares]


def test_rounds_work_on_no_more_rows_at_once(monkeypatch):
    """The kernel of rounds has fewer registers, so more programs would fit, and its rounds end in short batches."""

    def prepare(kernel, like, constants, device):
        return (
            triton_launch.Loaded(None, 5 if constants["ROUNDS"] else 4) if constants else SimpleNamespace(launch=None)
        )

    monkeypatch.setattr(backend, "CudaIpc", lambda: SimpleNamespace(multiprocessors=lambda: 132))
    fakes = {"require_mode": None, "load_kernel": None, "uses_pdl": True}
    for name, value in fakes.items():
        monkeypatch.setattr(triton_launch, name, lambda *_, value=value: value)
    monkeypatch.setattr(triton_launch, "prepare", prepare)
    changes = {"size": 4, "hidden_size": 4096, "device": "gpu", "arch": 90, "max_token_num": 2048}
    op = backend.TritonOp(OpSpec(**{**PLAIN, **changes, "workspace_bytes": 40 << 20}), SimpleNamespace(rank=0))
    assert op.at_once == {ONE_SHOT: (66, 0), TWO_SHOT: (131, 131), STAYS: (131, 131)}
    assert op.launches(2048, STAYS) == [(262, 0, 2048, 3)]


@pytest.mark.parametrize("room, stays", [(-1, False), (0, True)])
def test_no_residual_stays_without_a_slot_for_each_rank(room, stays):
    """A call of more rows would be cut where its rows have other owners than those of the call before."""
    spec = OpSpec(**{**PLAIN, "size": 4, "two_shot_rows": 2, "max_token_num": 64})
    bytes_of = plans.total_bytes(triton_setup.plan_of(spec), 4) + room
    spec = dataclasses.replace(spec, workspace_bytes=bytes_of)
    assert (STAYS in triton_setup.paths_of(spec, triton_setup.plan_of(spec))) == stays


def test_several_workspaces_and_strange_inputs_of_two_ranks():
    agreed(2, "together", "strange_inputs", "weights", "few_slots", "wrap", "rounds", "other_launches")


@pytest.mark.parametrize("size", [2, 3])  # of three ranks a residual may stay
def test_fp8(size):
    agreed(size, "fp8", "--two_shot_rows", 5)


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, None),
        ({"device": "gpu", "arch": 89}, None),
        ({"device": "gpu", "arch": 86}, ("no_fp8", {"got": "sm_86", "need": "from sm_89 on"})),
        (
            {"hidden_size": 2880},
            ("no_fp8", {"got": "H=2880 bfloat16, 2 ranks", "need": "rows of whole groups of 128"}),
        ),
        ({"dtype": "float32"}, ("no_fp8", {"got": "H=4096 float32, 2 ranks", "need": "bfloat16 or float16"})),
    ],
)
def test_where_the_backend_quantises(changes, want):
    reason = backend.refuses_fp8(OpSpec(**{**PLAIN, "hidden_size": 4096, **changes}))
    assert (reason and (reason.code, dict(reason.facts))) == want


def test_subgroups_beside_the_whole_group():
    agreed(4, "subgroups")


@pytest.mark.exhaustive
@pytest.mark.parametrize("two_shot_rows", [4, 1000])
@pytest.mark.parametrize("hidden", [72, 4096])
@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_numbers(size, hidden, two_shot_rows):
    rows = (1, size - 1, 0, 15, 16, 17, 2)
    agreed(size, "numbers", "--hidden", hidden, "--rows", *rows, "--two_shot_rows", two_shot_rows, timeout_s=1200)


def test_through_the_launcher_of_paddle(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path), str(ROOT / "tests/dist/triton_calls.py"), "delayed"]
    env = {**os.environ, "PADDLE_DISTRI_BACKEND": "gloo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, timeout=120, capture_output=True, text=True)
    logs = [(tmp_path / f"workerlog.{rank}").read_text() for rank in range(2)]
    assert done.returncode == 0, "\n".join(logs)
    assert len({re.search("digest (.*)", log)[1] for log in logs}) == 1


@pytest.mark.parametrize(
    "changes, code",
    [
        ({}, None),
        ({"size": 9}, "world_size"),
        ({"dtype": "float64"}, "dtype"),
        ({"weight_dtypes": ("int8",)}, "dtype"),
        ({"weight_dtypes": ("bfloat16", "int8")}, "dtype"),
        ({"eps": 0.0}, "eps"),
        ({"eps": -1e-6}, "eps"),
        ({"eps": 1e-50}, "eps"),  # zero in float32
        ({"eps": float("nan")}, "eps"),
        ({"hidden_size": 60}, "hidden_size"),
        ({"workspace_bytes": 100}, "workspace_small"),
        ({"device": "gpu", "arch": 75}, "old_gpu"),
        ({"device": "gpu", "arch": 90}, None),
    ],
)
def test_supports(changes, code):
    refusal = backend.supports(OpSpec(**{**PLAIN, **changes}))
    assert (refusal.code if refusal else None) == code


@pytest.mark.parametrize(
    "num_warps, registers, most",
    [(1, 24, 16), (1, 136, 12), (2, 32, 16), (2, 168, 6), (4, 121, 4), (8, 128, 2), (32, 64, 1)],
)
def test_programs_that_a_multiprocessor_holds(num_warps, registers, most):
    """An sm_86 takes 16 blocks, and warps of 136 registers three a quarter: more would never run at the same time."""
    assert triton_launch.programs_at_once(num_warps, registers) == most


@pytest.mark.parametrize(
    "torch_gpu, before, after",
    [(None, None, None), (True, None, None), (False, None, "ours"), (False, "host's", "host's")],
)
def test_triton_is_left_our_driver_only_where_it_could_have_none(monkeypatch, torch_gpu, before, after):
    """Triton 3.8 asks for a driver at every launch, and raises beside a torch that sees no GPU."""
    with triton_launch.interpreting("gpu" if os.path.exists("/dev/nvidiactl") else "cpu"):  # for all later tests
        driver = importlib.import_module("triton.runtime.driver").driver
    monkeypatch.setattr(driver, "_active", before)
    monkeypatch.setattr(triton_launch, "_paddle_driver", lambda: "ours")
    monkeypatch.setattr(triton_launch, "paddle_or_torch", lambda: SimpleNamespace(__name__="paddle"))
    torch = None if torch_gpu is None else SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: torch_gpu))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with triton_launch.triton_driver():
        assert driver.active == "ours"
    assert driver._active == after
    with triton_launch.triton_driver():
        assert driver.active == "ours"
    assert driver._active == after


def test_importing_the_backend_loads_neither_triton_nor_a_framework():
    code = (
        "import sys, fd_fusion.backends.triton; print([m for m in ('triton', 'paddle', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr

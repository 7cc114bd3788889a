"""Run everything of Paddle's own CUDA runtime, from the two pieces, on two GPUs with no network:

    python3 tests/gpu/paddle/run.py OUT_FOLDER [CASE ...]

On one GPU both ranks take turns on it, and what NCCL or `tune` would refuse there is skipped.
OUT_FOLDER/results.json gets how each case ended, log.txt beside it what its processes printed. The pieces lie in
`.paddle_gpu`, where `make_pieces.py` puts them.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from fd_fusion.cli.processes.ranks import free_ports
from tests.support.launch import launch
from tests.support.ranks import run_ranks

PIECES = ROOT / ".paddle_gpu"
LIMIT_S = int(os.environ.get("LIMIT_S", "340"))
DIES = -signal.SIGKILL
FOUR = ("--two_shot_rows", 5, "--rows", 3, 7, 5, 64, "--slots", 16, 64)  # 64 in 16 slots are rounds
IN_ROUNDS = ("--two_shot_rows", 6, "--rows", 3, 46, 130, 7, "--slots", 24, 64)  # 46 and 130 in 24 slots
MANY = ("--workspace_mb", 128, "--rows", 2, 2200)  # more rows than run at once: batches of N for a program
ROWS = ("--rows", 1, 3, 15, 17, 600, 2)
NEEDS = dict.fromkeys(("own_layers", "demo", "two_ranks_launched", "nccl_in_turn", "tune"), 2)  # NCCL: one rank a GPU
NEEDS["staying"] = 4


class Pieces:
    """The pieces as one file that is read from its begin to its end."""

    def __init__(self, folder: Path):
        self.files = [path.open("rb") for path in sorted(folder.glob("paddle.tar.xz.*"))]

    def read(self, count):
        while self.files:
            if data := self.files[0].read(count):
                return data
            self.files.pop(0).close()
        return b""

    def seekable(self):
        return False


def count_gpus() -> int:
    """As the driver counts them, without a context."""
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    assert code == 0 and count.value, f"the driver finds no GPU: error {code}"
    return count.value


def unpack(folder: Path = PIECES) -> Path:
    """Unpack into a folder outside the checkout, once for each content of the pieces."""
    sizes = [path.stat().st_size for path in sorted(folder.glob("paddle.tar.xz.*"))]
    site = Path(tempfile.gettempdir(), "_".join(map(str, (folder.name.lstrip("."), *sizes))))
    if not site.exists():
        assert len(sizes) == 2, f"two pieces are to lie in {folder}"
        making = Path(f"{site}.part")
        with lzma.LZMAFile(Pieces(folder)) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(making)
        making.rename(site)
    return site


def environment(site: Path) -> dict[str, str]:
    """What the processes of all cases need: this Paddle, what is filled in, and the machine's NCCL under its name."""
    libraries = Path(tempfile.mkdtemp(prefix="paddle_gpu_libraries_"))
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in glob.glob(f"{folder}/nccl/lib/libnccl.so.2"):
            (libraries / "libnccl.so").symlink_to(path)
    paths = [str(HERE / "fill"), str(site), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "NCCL_NVLS_ENABLE": "0",  # NVLink multicast: a program that dies while it uses it can take the GPUs away
        "FLAGS_allocator_strategy": "auto_growth",
    }


class Results:
    def __init__(self, out: Path):
        self.out, self.begin, self.lock = out, time.monotonic(), threading.Lock()
        self.cases = {}
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")

    def left(self) -> float:
        return LIMIT_S - (time.monotonic() - self.begin)

    def add(self, name: str, passed: bool, seconds: float, text: str) -> None:
        found = {"passed": passed, "seconds": round(seconds, 1)}
        self._say(name, found, f"{'passed' if passed else 'FAILED'}, {seconds:.1f} s", text)

    def skip(self, name: str, why: str) -> None:
        self._say(name, {"skipped": why}, f"skipped: {why}", "")

    def _say(self, name: str, found: dict, how: str, text: str) -> None:
        with self.lock:
            self.cases[name] = found
            (self.out / "results.json").write_text(json.dumps(self.cases, indent=1))
            with (self.out / "log.txt").open("a") as log:
                log.write(f"==== {name}: {how}\n{text}\n")
            print(f"{name}: {how}", flush=True)


def ranks(script: str, *what: object, size: int = 2, seconds: int = 60, dies: bool = False):
    """A case of some ranks: all end with status 0, but the last one where it `dies`, and their digests are equal."""

    def run(limit: float) -> tuple[bool, str]:
        ended = run_ranks(f"../gpu/paddle/{script}", size, *what, "--device", "gpu", timeout_s=min(seconds, limit))
        text = "\n".join(f"-- rank {number}: status {one.status}\n{one.text}" for number, one in enumerate(ended))
        digests = {found[1] for one in ended if (found := re.search("digest (.*)", one.text))}
        return [one.status for one in ended] == [0] * (size - 1) + [DIES if dies else 0] and len(digests) == 1, text

    return run


def launched(script: str, backend: str, *args: str, seconds: int = 100):
    """A case of a rank script under Paddle's launcher, with NCCL and TCPStore; the same on the CPU by gloo and the
    `paddle` backend: Triton 3.6's interpreter does not run with the NumPy that this Paddle needs.

    What the ranks record as `bits` must be the same on both ranks, and float32 numbers close to those of the CPU.
    """

    def run(limit: float) -> tuple[bool, str]:
        path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])

        def on(collectives: str) -> list[np.ndarray]:
            env = {"PYTHONPATH": path, "PADDLE_DISTRI_BACKEND": collectives}
            chosen = backend if collectives == "nccl" else "paddle"
            with tempfile.TemporaryDirectory() as folder:
                found = launch(script, 2, Path(folder), chosen, *args, timeout_s=min(seconds, limit), env=env)
            return [np.frombuffer(bytes.fromhex(one["bits"]), np.float32) for one in found]

        with ThreadPoolExecutor(2) as pool:
            gpu, cpu = pool.map(on, ("nccl", "gloo"))
        worst = max(float(np.abs(one - cpu[0]).max()) for one in gpu)
        text = f"largest number {np.abs(cpu[0]).max():.4f}; GPU and CPU differ by at most {worst:.2e}"
        return (gpu[0] == gpu[1]).all() and worst <= 1e-5 * float(np.abs(cpu[0]).max()), text

    return run


def staying(limit: float) -> tuple[bool, str]:
    """Whole models of four ranks, by two-shot: a residual stays where the next norm alone reads it."""
    env = {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)]), "PADDLE_DISTRI_BACKEND": "nccl"}
    scenarios = "healthy", "aux_hidden_states", "read_at_other_T", "another_norm"
    with tempfile.TemporaryDirectory() as folder:
        found = launch("staying_residual.py", 4, Path(folder), *scenarios, timeout_s=min(150, limit), env=env)
    stays, read = found[0]["healthy"]["example"], found[0]["aux_hidden_states"]
    passed = [
        all(one == found[0] for one in found),
        stays["same"] and stays["staying"] == 5 and stays["paths"] == ["000000", *["222221"] * 3],
        read["same"] and read["staying"] == 0 and read["residual"] == "the model's output",
        found[0]["read_at_other_T"] == [5, True],
        found[0]["another_norm"] == [[True] * 3] * 3,
    ]
    return all(passed), f"{passed}\n{found[0]}"


def command(*words: object, seconds: int = 60, env: dict | None = None):
    """A case of one command line, which starts its own processes."""

    def run(limit: float) -> tuple[bool, str]:
        line = ["timeout", "-k", "5", str(int(min(seconds, limit))), *map(str, words)]
        ended = subprocess.run(line, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True)
        return ended.returncode == 0, f"status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"

    return run


def cases(scratch: str, gpus: int) -> tuple[dict, dict]:
    """Those that may run beside others, and those whose times are read or that need the GPUs for themselves."""
    wide = "--hidden", 4096
    calls = 100_000 if gpus > 1 else 2_000  # each waits for its turn on a shared GPU
    python = sys.executable
    beside = {
        "own_layers": launched("bind_model.py", "triton", "eager", "old"),
        "demo": command(python, "-m", "fd_fusion", "demo", "--device", "gpu", "--backend", "triton", seconds=120),
        "staying": staying,
        "fp8": ranks("runtime.py", "fp8", "--hidden", 1024, seconds=90),
        "four_ranks": ranks("runtime.py", "stays", "fp8", "--hidden", 1024, *FOUR, size=4, seconds=120),
        "rounds": ranks("runtime.py", "rounds", "stays", "--hidden", 1024, *IN_ROUNDS, size=4, seconds=120),
        "batches": ranks("runtime.py", "numbers", "--hidden", 1024, *MANY, size=4, seconds=120),
        "numbers": ranks("runtime.py", "numbers", "payload", "together", "--hidden", 1024, *ROWS, seconds=100),
        "two_ranks_launched": command(
            *(python, "-m", "paddle.distributed.launch", "--nproc_per_node", 2),
            *("--log_dir", f"{scratch}/log", "examples/two_ranks.py"),
            env={"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])},
        ),
        "nccl_in_turn": ranks("runtime.py", "nccl_in_turn", *wide),
        "graph_modes": ranks("runtime.py", "graph_modes", *wide),
        "graph_after_reset": ranks("runtime.py", "graph_after_reset", *wide, seconds=90),
        "dies_in_replay": ranks("runtime.py", "dies_in_replay", *wide, dies=True),
        "dies_between_replays": ranks("runtime.py", "dies_between_replays", *wide, dies=True),
        "dies_eager": ranks("runtime.py", "dies_eager", *wide, dies=True),
        "late": ranks("runtime.py", "late", *wide, seconds=90),
        "growing_pools": ranks("runtime.py", "growing_pools", *wide),
        "two_streams": ranks("runtime.py", "two_streams", *wide),
        "qk_norm": ranks("runtime.py", "qk_norm"),
        "leaves_open": ranks("runtime.py", "leaves_open", *wide),
        "doctor": command(python, "-m", "fd_fusion", "doctor", seconds=90),
        "strange_inputs": ranks("runtime.py", "strange_inputs", *wide),
        "tune": command(
            *(python, "-m", "fd_fusion", "tune", "--nproc", 2, "--hidden-size", 4096, "--rows", "1,8"),
            env={"XDG_CACHE_HOME": scratch},
            seconds=120,
        ),
    }
    alone = {
        "host_time": ranks("host_time.py", "host_time", *wide, seconds=90),
        "many_replays": ranks("runtime.py", "many_replays", *wide, "--calls", calls, seconds=90),
        "little_memory": ranks("runtime.py", "little_memory", *wide),
    }
    return beside, alone


def run_case(results: Results, name: str, case) -> None:
    start = time.monotonic()
    if results.left() < 10:
        return results.add(name, False, 0.0, "not run: no time was left")
    try:
        passed, text = case(results.left())
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        passed, text = False, f"{type(error).__name__}: {error}"
    results.add(name, passed, time.monotonic() - start, text)


def main(out: Path, wanted: list[str]) -> int:
    gpus, results, start = count_gpus(), Results(out), time.monotonic()
    os.environ["FD_PORTS"] = ",".join(map(str, free_ports(3)))
    os.environ.update(environment(unpack()))
    results.add("unpack", True, time.monotonic() - start, "")
    say = "import paddle; print(paddle.__version__, paddle.version.full_version, paddle.device.cuda.device_count())"
    run_case(results, "import", command(sys.executable, "-c", say))
    with tempfile.TemporaryDirectory() as scratch:
        beside, alone = cases(scratch, gpus)
        for together, group in ((1, alone), (3 if gpus > 1 else 2, beside)):
            with ThreadPoolExecutor(together) as pool:
                for name, case in group.items():
                    if wanted and name not in wanted:
                        continue
                    if gpus < (needed := NEEDS.get(name, 1)):
                        results.skip(name, f"needs {needed} GPUs")
                    else:
                        pool.submit(run_case, results, name, case)
    return 0 if all(case.get("passed", True) for case in results.cases.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))

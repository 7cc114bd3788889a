"""The scripts of tests/gpu with a python3 that only says what it was asked for: steps, logs, exit codes, paths."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
case "$*" in
  *device_count*) echo $GPUS ;;
  *compile-only*) ;;
  *" tune "*) echo "$XDG_CACHE_HOME $*" ;;
  *"-k $WRONG"*) exit 3 ;;
  *) echo "$*" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    tools = {"python3": PYTHON, "nvidia-smi": "#!/bin/bash\n", "nvidia-cuda-mps-control": "#!/bin/bash\n"}
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "build.so").touch()

    def run(name, *args, gpus=1, wrong="nothing", **more):
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "GPUS": str(gpus), "WRONG": wrong, **more}
        command = ["bash", "-u", ROOT / "tests/gpu" / name, *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("gpus, sizes", [(1, [2]), (2, [2]), (3, [2]), (4, [4, 2]), (8, [8, 4, 2])])
def test_every_size_that_fits_is_measured_and_tuned(script, tmp_path, gpus, sizes):
    done = script("run_multi_gpu.sh", "out", "build.so", gpus=gpus)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    logs = {path.stem for path in out.glob("*.log")}
    assert logs == {
        "faults",
        "processes",
        "replays",
        *(["tune"] if gpus > 1 else []),
        *(f"bench_n{n}" for n in sizes),
    }
    for size in sizes:
        text = (out / f"bench_n{size}.log").read_text()
        assert f"--size {size} " in text and f"--flashinfer {tmp_path / 'build.so'}" in text
        assert f"--out {out}/all_reduce_n{size}.json" in text
    if gpus > 1:
        tuned = (out / "tune.log").read_text().splitlines()
        assert len(tuned) == 5 * len(sizes) and all(line.startswith(f"{out} ") for line in tuned)


def test_a_step_that_fails_stops_nothing_and_shows_in_the_exit_code(script, tmp_path):
    done = script("run_one_gpu.sh", "out", wrong="faults")
    assert done.returncode == 1 and "faults: status 3" in done.stdout
    logs = {path.stem for path in (tmp_path / "out").glob("*.log")}
    assert logs == {"ranks", "qk", "faults", "processes", "replays", "doctor", "bench_all_reduce"}


def test_only_some_steps(script, tmp_path):
    done = script("run_one_gpu.sh", "out", "build.so", STEPS="doctor", QK_REFERENCE="build.so")
    assert done.returncode == 0 and [path.name for path in (tmp_path / "out").iterdir()] == ["doctor.log"]


def test_the_figures_are_made_by_both_benchmarks(script, tmp_path):
    done = script("run_figures.sh", "out", "build.so", "build.so", gpus=2)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    rivals, decode = ((out / f"{name}.log").read_text() for name in ("rivals", "decode"))
    assert f"--out {out}/rivals_n2.json" in rivals and "--host examples/results/all_reduce_rivals_n2.json" in rivals
    assert f"decode --ranks 2 --output {out}/decode_n2.json" in decode
    assert all(f"--flashinfer {tmp_path / 'build.so'}" in text for text in (rivals, decode))
    assert f"--qk-reference {tmp_path / 'build.so'}" in decode
    assert len(list(out.iterdir())) <= 8


@pytest.mark.parametrize("name", ["run_one_gpu.sh", "run_multi_gpu.sh", "run_figures.sh"])
def test_a_wrong_file_name_ends_it_before_anything_runs(script, tmp_path, name):
    done = script(name, "out", "missing.so")
    assert done.returncode == 1 and "missing.so" in done.stderr and not (tmp_path / "out").exists()


def test_no_gpu_is_no_success(script):
    done = script("run_multi_gpu.sh", "out", gpus=0)
    assert done.returncode == 1 and "torch sees no GPU" in done.stdout
    done = script("run_figures.sh", "out", gpus=1)
    assert done.returncode == 1 and "torch sees 1 GPUs" in done.stdout

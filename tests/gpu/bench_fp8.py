"""FP8 out of the fused kernel: virtual ranks on one GPU, two processes over NVLink, then speed against a quantiser.

python tests/gpu/bench_fp8.py --out FOLDER     two GPUs, 210 s at most; fp8.json, fp8.md, ranks.log, virtual.log

`--forms FOLDER...`: each with a copy of fd_fusion/kernels that is timed beside the package's.
`--rehearse`: on a CPU, by the interpreter, at small sizes: the times mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.test_fp8_virtual_ranks import CASES  # noqa: E402
from tests.support.ranks import run_ranks  # noqa: E402

SMALL = ["--hidden", 256, "--rows", 1, 3, "--most", 5, "--rounds", 1, "--workspace_mb", 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=int, default=200, help="for everything")
    parser.add_argument("--forms", type=lambda text: Path(text).resolve(), nargs="*", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"], began, failed = "1", time.monotonic(), []

    def left():
        return options.seconds - (time.monotonic() - began)

    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
        with ThreadPoolExecutor() as pool:
            compiling = pool.submit(compile_all, options.forms)
            failed += virtual_ranks(options.out, min(60, left() - 60))
            compiling.result()
    args = [*(SMALL if options.rehearse else []), "--seconds", int(left() - 25)]
    args += ["--forms", *options.forms] if options.forms else []
    ended = run_ranks("fp8_rank.py", 2, *args, timeout_s=int(left() - 5))
    text = "".join(f"--- rank {rank}, status {one.status}\n{one.text}\n" for rank, one in enumerate(ended))
    (options.out / "ranks.log").write_text(text)
    found = {key: json.loads(line[len(key) :]) for line in ended[0].text.splitlines() for key in
             ("VALUES", "RESULT", "FORMS") if line.startswith(key)}  # fmt: skip
    values, rows = found.get("VALUES", {"right": 0, "wrong": ["not reached"]}), found.get("RESULT", [])
    wrong_forms = found.get("FORMS", [])
    result = {**circumstances(options), "values": values, "wrong_forms": wrong_forms, "rows": rows}
    (options.out / "fp8.json").write_text(json.dumps(result, indent=1))
    (options.out / "fp8.md").write_text(table(rows))
    print(table(rows))
    print(f"bits: {values['right']} cases right, {len(values['wrong'])} wrong {values['wrong'][:3]}")
    failed += [f"rank {rank}: status {one.status}" for rank, one in enumerate(ended) if one.status]
    failed += ["wrong bits"] if values["wrong"] else []
    failed += [f"forms: {wrong_forms}"] if wrong_forms else []
    print(f"{time.monotonic() - began:.0f} s; {'; '.join(failed) or 'nothing failed'}")
    if failed:
        print(text[-3000:])
    sys.exit(bool(failed or not rows))


def compile_all(forms):
    """All at once, into Triton's cache: specs 0 to 10 of fp8_rank.py, and of those that are timed each form."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/dist/fp8_rank.py"), "--compile"]
    env, start = {**os.environ, "CUDA_MODULE_LOADING": "LAZY", "PYTHONPATH": str(ROOT)}, time.monotonic()
    jobs = [[str(number)] for number in range(11)]
    jobs += [[number, "--forms", form] for form in forms for number in ("0", "7", "9")]
    jobs = [subprocess.Popen([*command, *job], env=env, cwd=ROOT) for job in jobs]
    for job in jobs:
        try:
            job.wait(timeout=max(1, 80 - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            job.kill()
    print(f"compiled in {time.monotonic() - start:.0f} s: {[job.returncode for job in jobs]}", flush=True)


def virtual_ranks(out, seconds):
    """All cases in one process, which starts once."""
    env = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    command = [sys.executable, "-W", "ignore", "tests/gpu/test_fp8_virtual_ranks.py", *CASES]
    with open(out / "virtual.log", "w") as log:
        to_log = {"stdout": log, "stderr": subprocess.STDOUT}
        try:
            status = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds, **to_log).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    print(f"virtual ranks: status {status}\n{(out / 'virtual.log').read_text()[-1500:]}", flush=True)
    return [f"virtual ranks: {status}"] if status else []


def circumstances(options):
    if options.rehearse:
        return {"device": "rehearsed on a CPU"}
    from tests.gpu.bench_processes import circumstances as of_processes

    options.size, options.flashinfer = 2, None
    return of_processes(options)


def table(rows):
    """us a call; the quantiser in its best shape for each cell."""
    columns = [name for name in dict.fromkeys(row["name"] for row in rows) if "quantiser" not in name]
    heads = ["H", "T", *columns, "bf16, quantiser", "its shape", "FP8 added", "fused / apart"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for hidden, count in sorted({(row["H"], row["T"]) for row in rows}):
        us = {row["name"]: row["us"] for row in rows if (row["H"], row["T"]) == (hidden, count)}
        rivals = {name: value for name, value in us.items() if "quantiser" in name}
        best = min(rivals, key=rivals.get)
        both = us["bf16 + FP8"]
        cells = [f"{us[name]:.2f}" for name in (*columns, best)] + [best.partition("(")[2][:-1]]
        cells += [f"{both - us['bf16']:+.2f}", f"{both / us[best]:.3f}"]
        lines.append(f"| {hidden} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

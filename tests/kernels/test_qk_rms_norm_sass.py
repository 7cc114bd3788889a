"""The QK norm compiled with no GPU: 16-byte accesses, nothing through shared memory, full occupancy.

Run as a program it compiles the cases and prints what is in them: Triton decides at import whether it compiles
or interprets, and the other tests of this process interpret.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BASE = {"arch": 90, "dtype": "bf16", "weight": "bf16", "D": 128, "IN_PLACE": True, "WEIGHT_OFFSET": 0.0, "PDL": False}
CASES = {
    "sm_80": {"arch": 80},
    "sm_86": {"arch": 86},
    "sm_89": {"arch": 89},
    "sm_90": {},
    "sm_100": {"arch": 100},
    "pdl": {"PDL": True},
    "gemma": {"WEIGHT_OFFSET": 1.0},
    "separate": {"IN_PLACE": False},
    "fp16 D=64": {"dtype": "fp16", "weight": "fp16", "D": 64},
    "fp32": {"dtype": "fp32", "weight": "fp32"},
    "D=80": {"D": 80},
    "D=192, fp32 weights": {"D": 192, "weight": "fp32"},
}


def main():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fd_fusion.kernels.qk_rms_norm import NUM_WARPS, qk_rms_norm_kernel, tile

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = {}
    for name, case in CASES.items():
        case = BASE | case
        arch, dtype, weight = (case.pop(key) for key in ("arch", "dtype", "weight"))
        shape = tile(case["D"], 4 if dtype == "fp32" else 2)
        case |= shape | {"EPS": 1e-6, "Q_HEADS": 32, "KV_HEADS": 4, "ROUND_BY_HAND": False}
        types = {
            **dict.fromkeys(("qkv", "q_out", "k_out"), f"*{dtype}"),
            "q_weight": f"*{weight}",
            "k_weight": f"*{weight}",
        }
        names = qk_rms_norm_kernel.arg_names
        signature = {n: "constexpr" if n in case else types.get(n, "i32") for n in names}
        aligned = [i for i, n in enumerate(names) if n in types or "stride" in n]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        compiled = triton.compile(
            ASTSource(qk_rms_norm_kernel, signature, case, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": NUM_WARPS, "enable_fp_fusion": False},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
            usage = subprocess.run(
                [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
            ).stdout
        operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", sass, re.M)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        found[name] = {"operations": operations, "registers": registers, "stack": stack, **shape}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=300, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_one_wide_load_and_store_a_thread(found, name):
    operations, case = found[name]["operations"], BASE | CASES[name]
    memory = [op for op in operations if op.startswith(("LD", "ST", "RED", "ATOM")) and not op.startswith("LDC")]
    loads = 2 + (case["weight"] == "fp32" and case["dtype"] != "fp32")  # a fp32 weight takes two for 8 elements
    assert memory == ["LDG.E.128"] * loads + ["STG.E.128"] * (1 if case["IN_PLACE"] else 2)
    assert not any(op.startswith(("BAR", "LDS", "STS")) for op in operations)
    assert not any(op.startswith("FFMA") for op in operations)  # a contracted sum would depend on the tile
    # 256 threads x 8 programs fill a multiprocessor up to 32 registers a thread
    assert found[name]["registers"] <= 32
    assert found[name]["stack"] == 0
    assert sum(op != "NOP" for op in operations) <= 135


def test_pdl_waits_before_it_reads(found):
    operations = found["pdl"]["operations"]
    assert operations.index("ACQBULK") < operations.index("LDG.E.128")
    assert "PREEXIT" not in operations  # the next kernel is never let in early
    assert "ACQBULK" not in found["sm_90"]["operations"]


if __name__ == "__main__":
    main()

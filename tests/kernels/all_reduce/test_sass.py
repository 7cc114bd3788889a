"""The all-reduce kernel compiled with no GPU: what is pushed and polled, and how.

Run as a program it compiles the cases and prints what is in them: Triton decides at import whether it compiles
or interprets, and the other tests of this process interpret.
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fd_fusion.kernels.all_reduce import plan as plans

STAYS = 2  # in place of two-shot: the residual stays, so a result is one row
ROUNDS = "rounds"
DEFAULT = [  # arch, N, H, dtype, weight dtype, two-shot; behind these ROUNDS of a kernel that has them
    (80, 4, 4096, "bfloat16", "bfloat16", False),
    (86, 2, 2880, "float16", "float32", False),
    (89, 3, 5120, "float16", "float16", True),
    (90, 2, 4096, "bfloat16", "bfloat16", False),
    (90, 8, 8192, "bfloat16", "bfloat16", False),
    (90, 8, 7168, "bfloat16", "float32", True),
    (90, 4, 4096, "bfloat16", "bfloat16", STAYS),
    (90, 2, 8192, "bfloat16", "bfloat16", False, ROUNDS),
    (90, 4, 4096, "bfloat16", "bfloat16", STAYS, ROUNDS),
    (100, 6, 6144, "float32", "float32", False),
    # Behind these, or ROUNDS: OUTPUT and FORMULA of the kernel that quantises.
    (89, 3, 5120, "float16", "float16", True, "both", "divide_7"),
    (90, 2, 4096, "bfloat16", "bfloat16", False, "both", "multiply"),
    (90, 2, 7168, "bfloat16", "bfloat16", False, "both", "multiply"),
    (90, 2, 7168, "bfloat16", "bfloat16", True, "codes", "multiply"),
    (90, 4, 5120, "bfloat16", "float32", False, "codes", "divide"),
    (90, 8, 8192, "bfloat16", "bfloat16", True, "both", "static"),
    (90, 4, 4096, "bfloat16", "bfloat16", STAYS, "codes", "multiply"),
    (90, 4, 4096, "bfloat16", "bfloat16", STAYS, ROUNDS, "codes", "multiply"),
    (100, 4, 7168, "bfloat16", "bfloat16", False, "both", "multiply_pow2"),
]
EVERY = [
    (arch, size, hidden, dtype, dtype, two_shot, *rounds)
    for arch, size, (hidden, dtype), two_shot, rounds in itertools.product(
        (80, 86, 89, 90, 100),
        range(2, 9),
        ((2880, "bfloat16"), (7168, "float16"), (8192, "bfloat16"), (5120, "float32")),
        (False, True, STAYS),
        ((), (ROUNDS,)),
    )
] + [
    (arch, size, hidden, dtype, dtype, two_shot, *rounds, output, "multiply")
    for arch, size, (hidden, dtype), two_shot, rounds, output in itertools.product(
        (89, 90, 100),
        range(2, 9),
        ((4096, "bfloat16"), (5120, "float16"), (7168, "bfloat16")),
        (False, True),
        ((), (ROUNDS,)),
        ("both", "codes"),
    )
]


# Bytes that a variant may spill, compiled by Triton 3.9, all others none: the registers that cure it cost rows in
# flight on sm_90.
SPILLS = {
    (80, 4, 8192, "bfloat16", "bfloat16", True): 40,
    (80, 4, 8192, "bfloat16", "bfloat16", True, ROUNDS): 56,
    (80, 4, 8192, "bfloat16", "bfloat16", STAYS): 40,
    (80, 4, 8192, "bfloat16", "bfloat16", STAYS, ROUNDS): 56,
    (80, 7, 8192, "bfloat16", "bfloat16", True, ROUNDS): 8,
    (80, 7, 8192, "bfloat16", "bfloat16", STAYS, ROUNDS): 8,
    (80, 8, 5120, "float32", "float32", True, ROUNDS): 16,
    (80, 8, 5120, "float32", "float32", STAYS, ROUNDS): 16,
    (86, 8, 5120, "float32", "float32", True, ROUNDS): 8,
    (86, 8, 5120, "float32", "float32", STAYS, ROUNDS): 8,
    (89, 8, 5120, "float32", "float32", True, ROUNDS): 8,
    (89, 8, 5120, "float32", "float32", STAYS, ROUNDS): 8,
    (90, 4, 8192, "bfloat16", "bfloat16", STAYS): 16,
    (90, 4, 8192, "bfloat16", "bfloat16", STAYS, ROUNDS): 16,
    (89, 2, 5120, "float16", "float16", False, "both", "multiply"): 16,
    (89, 2, 5120, "float16", "float16", False, ROUNDS, "both", "multiply"): 16,
    (89, 2, 5120, "float16", "float16", False, "codes", "multiply"): 8,
    (89, 2, 5120, "float16", "float16", False, ROUNDS, "codes", "multiply"): 8,
    (90, 2, 5120, "float16", "float16", False, "both", "multiply"): 16,
    (90, 2, 5120, "float16", "float16", False, "codes", "multiply"): 16,
}


def compile_case(arch, size, hidden, dtype, weight_dtype, two_shot, *behind):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fd_fusion.kernels.all_reduce.kernel import all_reduce_rms_norm
    from fd_fusion.kernels.all_reduce.kernel_fp8 import all_reduce_rms_norm_fp8

    in_rounds, fp8 = ROUNDS in behind, tuple(one for one in behind if one != ROUNDS)
    kernel = all_reduce_rms_norm_fp8 if fp8 else all_reduce_rms_norm
    plan = plans.plan_for(size, hidden, dtype, fp8=bool(fp8))
    plan = dataclasses.replace(plan, two_shot_rows=1) if two_shot else plan
    pdl = arch >= 90
    how = {"has_residual": True, "residual_stays": two_shot == STAYS, "rounds": in_rounds, "fp8": fp8 or None}
    constants = plans.constants(plan, weight_dtype=weight_dtype, two_shot=two_shot != 0, pdl=pdl, **how)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
    options["launch_pdl"] = constants.pop("launch_pdl", False)
    types = dict.fromkeys(("rows", "rounds", "rank", "op", "row_stride", "group_stride"), "i32")
    types |= dict.fromkeys(("eps", "weight_offset", "static_factor"), "fp32")
    signature = {n: "constexpr" if n in constants else types.get(n, "i64") for n in kernel.arg_names}
    source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    return {
        # Labels as they stand, instructions without address and predicate.
        "sass": re.findall(r"^(\.L_\S+:|\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\S.*;)", sass, re.M),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        # Stores of 8 bytes by so many threads, each its own: scalars are stored by thread 0 alone.
        "reported_by": [
            int(count) for count in re.findall(r"tt\.store .*: tensor<(\d+)x!tt\.ptr<i64>", compiled.asm["ttgir"])
        ],
        "split": plan.split,
        "convert_layout": compiled.asm["ttgir"].count("convert_layout"),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "units": plan.units * plan.slices(two_shot != 0),
        "threads": 32 * plan.num_warps,
    }


def found(cases, timeout_s):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[3])
    command = [sys.executable, __file__, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def polling_loops(sass):
    """The instructions of the loops that poll for words: from a label to the branch back to it."""
    places = {line[:-1]: number for number, line in enumerate(sass) if line.startswith(".L_")}
    for number, line in enumerate(sass):
        target = re.search(r"BRA (?:U?P\d+, )?`\((\S+)\)", line)
        if target and places.get(target[1], number) < number:
            body = sass[places[target[1]] : number]
            if any("LDG.E.128" in one for one in body) and not any(re.search("BAR|STG", one) for one in body):
                yield body


def check(case, got):
    (_, size, *_, two_shot), behind = case[:6], case[6:]
    fp8 = [one for one in behind if one != ROUNDS]
    name, sass = f"{case}", got["sass"]
    local = any(re.search(r"\b(LDL|STL)\b", line) for line in sass)
    assert got["stack"] <= SPILLS.get(tuple(case), 0), f"{name} spills {got['stack']} bytes"
    assert local == (got["stack"] > 0), name
    assert got["convert_layout"] == 0, name
    assert got["registers"] * got["threads"] * 2 <= 65536, f"{name}: two programs do not fit"
    loops = list(polling_loops(sass))
    assert len(loops) == 1 + (two_shot > 0), f"{name}: {len(loops)} loops that poll"
    for body in loops:
        loads = [line for line in body if "LDG" in line]
        assert all("LDG.E.128.STRONG.SYS" in line for line in loads), (name, loads)
    assert max(len([line for line in body if "LDG" in line]) for body in loops) >= size, name
    stores = [line for line in sass if re.search(r"\bSTG\.E\.128\b", line)]
    strong = [line for line in stores if ".STRONG.SYS" in line]
    # Pushed: a row to each peer, at two places, and by two-shot its results; made unsent: a row of each peer, by
    # two-shot its results. The rest: output.
    results = (0, 2, 1)[two_shot]
    most = (3 * (size - 1) + results * size) * got["units"]
    assert size <= len(strong) <= most, (name, len(strong), most)
    # Both outputs, and NaN in both: by two-shot those of a row of its own, and of another rank's.
    assert len(stores) - len(strong) <= 4 * got["units"] * (1 + (two_shot > 0)), name
    # One fence in a kernel of rounds, between two of them, and none in another: no row waits for one.
    fences = [line for line in sass if re.search(r"\bMEMBAR\b", line)]
    assert len(fences) == (ROUNDS in behind), f"{name}: a row waits for a fence: {fences}"
    assert all("MEMBAR.ALL.SYS" in line for line in fences), fences
    assert not any(re.search(r"\b(MEMBAR|ERRBAR|CCTL)\b", line) for body in loops for line in body), name
    counted = [line for line in sass if re.search(r"\b(ATOM|RED)G?\b", line)]
    assert len(counted) == 2 and all("RED" in line for line in counted), f"{name}: somebody waits to count: {counted}"
    # A thread that waits for a neighbour's sum reports by itself when its time is over: launch and record.
    assert got["reported_by"] == [got["threads"]] * 2 * (got["split"] > 1), (name, got["reported_by"])
    touching = [bool(re.search(r"\b(LDG|STG|RED|ATOM)", line)) for line in sass]
    waits = [number for number, line in enumerate(sass) if "ACQBULK" in line]
    assert len(waits) == (case[0] >= 90), f"{name}: {len(waits)} waits for the kernel in front"
    assert not any(touching[: waits[0]] if waits else []), f"{name}: memory is touched too early"
    assert not any("PREEXIT" in line for line in sass), f"{name}: the next kernel may start too early"
    wide = [line for line in sass if re.search(r"\b(LDG|STG)\.E\.(U8|U16|S8|S16)", line)]
    assert not wide, (name, wide)
    if fp8:
        check_quantised(name, got, got["units"] * (1 + (two_shot > 0)), fp8[0] == "both", fp8[1] != "static")


def check_quantised(name, got, units, stores_norm, stores_scales):
    """A thread stores the codes of each of its units in 8 bytes, twice for a row that failed, and one scale; at two
    places by two-shot, as above. It divides without a branch: one division would wait for another."""
    assert not any("div" in line for line in got["sass"]), f"{name}: a branch that divides"
    stores = [line for line in got["sass"] if re.search(r"\bSTG\.E\b", line) and ".STRONG" not in line]
    by_bytes = [len([line for line in stores if re.search(rf"STG\.E{width} ", line)]) for width in (r"\.64", "")]
    assert by_bytes[0] >= 2 * units, (name, by_bytes)
    assert by_bytes[1] == stores_scales * (units // got["units"]), (name, by_bytes)
    whole = [line for line in stores if "STG.E.128 " in line]
    assert len(whole) == (4 if stores_norm else 3) * units, (name, len(whole))


@pytest.fixture(scope="module")
def default():
    return found(DEFAULT, 300)


@pytest.mark.parametrize("number", range(len(DEFAULT)), ids=lambda number: "-".join(map(str, DEFAULT[number])))
def test_pushes_and_polls(default, number):
    check(DEFAULT[number], default[number])


@pytest.mark.exhaustive
def test_pushes_and_polls_of_every_plan():
    for start in range(0, len(EVERY), 20):
        part = EVERY[start : start + 20]
        for case, got in zip(part, found(part, 900)):
            check(case, got)


if __name__ == "__main__":
    print(json.dumps([compile_case(*case) for case in json.loads(sys.argv[1])]))

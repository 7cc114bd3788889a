"""The kernels of `bench decode` compiled with no GPU, for the shapes of its models: weights in whole vectors.

Run as a program it compiles: Triton decides at import whether it compiles or interprets.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
BF16, F32, I32 = "*bf16", "*fp32", "*i32"
TILE = {"TOP": 8, "ROWS": 16, "DEPTH": 64}
CASES = {  # kernel: [(constants, types of the arguments that are no int32)]
    "rope_and_cache": [
        ({"CONTEXT": 1024, "Q": 48, "KV": 4, "D": 128}, {"qkv": BF16, "k_cache": BF16, "v_cache": BF16})
    ],
    "silu_and_multiply": [({"WIDTH": 704, "BLOCK": 1024}, {"x": BF16, "out": BF16})],
    "route": [({"E": 128, "TOP": 8, "WIDTH": 8}, {"logits": BF16, "chosen": I32, "scales": F32})],
    "order_by_expert": [({"E": 128, "BLOCK": 64}, dict.fromkeys(("chosen", "order", "starts"), I32))],
    "sum_of_choices": [
        ({"TOP": 8, "H": 4096, "SHARED": True, "BLOCK": 1024}, dict.fromkeys(("parts", "shared", "out"), BF16))
    ],
    "experts": [
        (
            {"IN": wide, "OUT": narrow, "GATED": gated, "COLUMNS": columns, **TILE},
            {"x": BF16, "weights": BF16, "out": BF16, "scales": F32, "order": I32, "starts": I32},
        )
        for wide, narrow, gated, columns in ((4096, 704, True, 32), (704, 4096, False, 64), (2048, 384, True, 64))
    ],
    "fp8_product": [
        (
            {"IN": 4096, "OUT": out, "TOP": top, "EXPERTS": top > 1, "ROWS": 16, "COLUMNS": columns},
            {"x": "*fp8e4nv", "x_scales": F32, "weights": "*fp8e4nv", "weight_scales": F32, "out": BF16, "order": I32}
            | {"starts": I32},
        )
        for out, top, columns in ((704, 8, 32), (704, 8, 64), (7168, 1, 32))
    ],
}


def main():
    import triton
    from bench import decode_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for name, cases in CASES.items():
        kernel = getattr(decode_kernels, name)
        for constants, types in cases:
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
            source = ASTSource(kernel, signature, constants, aligned)
            options = {"num_warps": 4, "num_stages": 4}
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            found.setdefault(name, []).append({"ptx": made.asm["ptx"], "shared": made.metadata.shared})
    print(json.dumps(found))


def test_all_kernels_compile_and_stream_the_weights_in_whole_vectors():
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.keys() == CASES.keys()
    for made in found["experts"] + found["fp8_product"]:
        assert len(re.findall(r"cp\.async\.cg\.shared\.global", made["ptx"])) >= 4, "weights are not prefetched"
        assert "mma.sync" in made["ptx"] or "wgmma" in made["ptx"]
        assert made["shared"] < 100 << 10  # two programs a multiprocessor
    for name in ("silu_and_multiply", "sum_of_choices"):
        assert re.search(r"ld\.global\.v4\.b32", found[name][0]["ptx"]), name


if __name__ == "__main__":
    main()

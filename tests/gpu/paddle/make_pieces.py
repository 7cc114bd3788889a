"""Make what the GPU machine needs of Paddle 2.6.2, PyPI's newest GPU build, on a machine with a network:

    python tests/gpu/paddle/make_pieces.py          # .paddle_gpu
    python tests/gpu/paddle/make_pieces.py --cpu    # .paddle_cpu: the CPU build of 3.3.1, for host_time_33.py

The folder gets `paddle.tar.xz.0` and `.1`, two pieces of under 60 MB, for CPython 3.12 on x86-64. The GPU code of
2.6.2 is cubins for sm_61 to sm_86 and no PTX: no kernel of it runs on Hopper, and zeros in its place pack to nothing.
What is left is Paddle's runtime: allocator, memcpy, streams, events, CUDA graphs, process groups of NCCL, TCPStore.

Of 3.3.1 what tensors and host time need is packed: no BLAS, nothing else that it loads when it is first used. What it
imports (NumPy, protobuf, Pillow, networkx, httpx, opt_einsum, safetensors) the machine must have; any version did.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

WHEEL, CPU_WHEEL = "paddlepaddle-gpu==2.6.2", "paddlepaddle==3.3.1"
# What 2.6.2 imports, in versions that it was built for.
BESIDE = [
    "numpy==1.26.4",
    "protobuf==3.20.2",
    "opt_einsum==3.3.0",
    "astor",
    "decorator",
    "safetensors",
    "setuptools<81",
]
TARGET = ["--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:", "--no-deps", "--quiet"]
PLATFORMS = [f"--platform={name}_x86_64" for name in ("manylinux1", "manylinux2014", "manylinux_2_17")]
LIBRARIES = ("base/libpaddle.so", "libs/libphi.so")
LEFT_OUT = ("include", "libs/libflashattn.so")
_LATER = ("mklml_intel.so", "openvino_intel_cpu_plugin.so", "lapack.so.3", "blas.so.3", "gfortran.so.3")
CPU_LEFT_OUT = ("include", *(f"libs/lib{name}" for name in _LATER))
MOST = 60_000_000  # bytes of a piece
_MAGIC = struct.pack("<I", 0xBA55ED50)


def zero_cubins(path: Path) -> int:
    """Write zeros over the code in all fatbins of a library; their headers stay. Returns how many bytes."""
    zeroed = position = 0
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        while (at := data.find(_MAGIC, position)) >= 0:
            header_bytes, body_bytes = struct.unpack("<HQ", data[at + 6 : at + 16])
            entry, position = at + header_bytes, at + header_bytes + body_bytes
            while entry + 16 <= position:
                entry_bytes, code_bytes = struct.unpack("<IQ", data[entry + 4 : entry + 16])
                if not entry_bytes:
                    break
                data[entry + entry_bytes : entry + entry_bytes + code_bytes] = bytes(code_bytes)
                zeroed, entry = zeroed + code_bytes, entry + entry_bytes + code_bytes
    return zeroed


def install(site: Path, packages: Sequence[str], left_out: Sequence[str]) -> None:
    """Install packages into a folder, for the other machine's Python."""
    pip = [sys.executable, "-m", "pip", "install", "--target", str(site), *TARGET, *PLATFORMS]
    subprocess.run([*pip, *packages], check=True)
    for name in left_out:
        path = site / "paddle" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(folder: Path, cpu: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        site, packed = Path(temporary, "site"), Path(temporary, "paddle.tar.xz")
        install(site, *(([CPU_WHEEL], CPU_LEFT_OUT) if cpu else ([WHEEL, *BESIDE], LEFT_OUT)))
        for library in () if cpu else sorted(site.glob("paddle/**/*.so*")):
            if zeroed := zero_cubins(library):
                print(f"{library.relative_to(site)}: {zeroed >> 20} MiB of cubins are zeros", flush=True)
        preset = 2 if cpu else 6  # 2 is small enough there, and sooner
        with tarfile.open(packed, "w:xz", preset=preset) as archive:
            archive.add(site, ".", filter=lambda entry: None if "__pycache__" in entry.name else entry)
        data = packed.read_bytes()
        half = -(-len(data) // 2)
        if half > MOST:
            raise SystemExit(f"{len(data)} bytes do not fit two pieces of {MOST}")
        for number in range(2):
            (folder / f"paddle.tar.xz.{number}").write_bytes(data[number * half : (number + 1) * half])
        print(f"two pieces of {half} bytes in {folder}")


if __name__ == "__main__":
    of_cpu = sys.argv[1:] == ["--cpu"]
    main(Path(".paddle_cpu" if of_cpu else ".paddle_gpu"), of_cpu)

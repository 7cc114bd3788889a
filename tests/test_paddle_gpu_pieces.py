"""The scripts of tests/gpu/paddle, as far as they need neither a wheel of 759 MB nor a GPU."""

import importlib.util
import struct
from pathlib import Path

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
    run.PIECES = tmp_path
    for number, data in enumerate((b"abc", b"de")):
        (tmp_path / f"paddle.tar.xz.{number}").write_bytes(data)
    pieces = run.Pieces()
    assert [pieces.read(2) for _ in range(5)] == [b"ab", b"c", b"de", b"", b""]

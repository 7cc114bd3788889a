"""The demo's checkpoint: GLM-4.5's weight names in safetensors, written at random, read a rank's shard at a time."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fd_fusion.cli.demo.config import DecoderConfig, Weight, expected_weights
from fd_fusion.cli.messages import to_json

# The names that safetensors gives to dtypes. NumPy has no bfloat16: its bits are widened after reading.
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}


def write_checkpoint(folder: Path, config: DecoderConfig, seed: int) -> None:
    """Write config.json and model.safetensors with float32 weights, scaled so that activations stay near one.

    Raises: OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    weights = {name: _random(rng, name, weight) for name, weight in expected_weights(config).items()}
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "np"})
    except SafetensorError as error:  # a full disk raises it too
        text = f"the checkpoint cannot be written to {folder}: {error}; set TMPDIR to a folder with room"
        raise OSError(text) from None
    (folder / "config.json").write_text(to_json(config.to_json(), 2) + "\n")


def _random(rng: np.random.Generator, name: str, weight: Weight) -> np.ndarray:
    values = rng.standard_normal(weight.shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.1) * values
    if len(weight.shape) == 1:
        return np.float32(0.1) * values
    return values if name == "model.embed_tokens.weight" else values / np.float32(math.sqrt(weight.shape[1]))


class Stored(NamedTuple):
    """Where a weight lies: `offset` in bytes from the start of its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """A folder with config.json and *.safetensors, checked against the names and shapes that its config asks for.

    Raises: ValueError: no such folder, an unreadable file, or missing, extra or misshapen weights (named).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = DecoderConfig.from_json(_read_config(folder))
        self.expected = expected_weights(self.config)
        self.stored: dict[str, Stored] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.stored |= _read_header(file)
        self._leave_out_prediction_layers()
        self._check()

    def read(self, name: str, rank: int = 0, size: int = 1) -> np.ndarray:
        """Copy a weight as float32 (float64 stays); with `size` > 1 only the part of this rank."""
        stored, split = self.stored[name], self.expected[name].split
        whole = np.memmap(stored.file, DTYPES[stored.dtype], "r", stored.offset, stored.shape)
        if split is not None and size > 1:
            width = stored.shape[split] // size
            whole = whole[(slice(None),) * split + (slice(rank * width, (rank + 1) * width),)]
        if stored.dtype == "BF16":
            return (whole.astype(np.uint32) << 16).view(np.float32)
        return np.array(whole, np.float64 if stored.dtype == "F64" else np.float32)

    def _leave_out_prediction_layers(self) -> None:
        """Leave out the multi-token-prediction layers, which GLM-4.5 stores behind the decoder's."""
        first = self.config.num_hidden_layers
        for name in list(self.stored):
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer and first <= int(layer[1]) < first + self.config.num_nextn_predict_layers:
                del self.stored[name]

    def _check(self) -> None:
        expected = {name: weight.shape for name, weight in self.expected.items()}
        shapes = {name: stored.shape for name, stored in self.stored.items()}
        wrong = [name for name, shape in expected.items() if shapes.get(name, shape) != shape]
        faults = (
            ([name for name in expected if name not in shapes], " missing"),
            ([name for name in shapes if name not in expected], " not expected"),
            ([f"{name} is {list(shapes[name])} instead of {list(expected[name])}" for name in wrong], ""),
        )
        if found := [f"{_first(names)}{what}" for names, what in faults if names]:
            raise ValueError(
                f"checkpoint {self.folder}: {'; '.join(found)}; give a checkpoint whose weights fit its config.json"
            )


def _first(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read_config(folder: Path) -> dict:
    try:
        data = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {folder}: config.json cannot be read: {error}; give a folder that has one"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(
            f"checkpoint {folder}: config.json holds a {type(data).__name__}, expected an object; give a GLM-4.5 one"
        )
    return data


def _read_header(file: Path) -> dict[str, Stored]:
    """Read the names in a safetensors file: eight bytes of length, a JSON header, then the data."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        header.pop("__metadata__", None)
        stored = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
            if (
                start < 0
                or stop - start != math.prod(shape) * dtype.itemsize
                or 8 + length + stop > file.stat().st_size
            ):
                raise ValueError(f"{name} has not the bytes of its shape")
            stored[name] = Stored(file, entry["dtype"], shape, 8 + length + start)
        return stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {file}: not a readable safetensors file of {', '.join(DTYPES)}: {error!r}; write it anew"
        ) from None

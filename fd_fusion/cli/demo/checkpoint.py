"""The demo's checkpoint: GLM-4.5's weight names in safetensors, written at random, read a rank's shard at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fd_fusion.cli.demo.config import DecoderConfig, expected_shapes, split_axis
from fd_fusion.cli.messages import to_json
from fd_fusion.reference import FP8_GROUP, FP8_MAX, round_to_e4m3

with contextlib.suppress(ImportError):  # NumPy has no bfloat16 without it
    import ml_dtypes  # noqa: F401

_DTYPES = ("F32", "F16", "F64", "BF16")  # as safetensors calls them


def write_checkpoint(folder: Path, config: DecoderConfig, seed: int) -> None:
    """Write config.json and model.safetensors with float32 weights, scaled so that activations stay near one.

    Raises: OSError: it cannot be written.
    """
    rng = np.random.default_rng(seed)
    weights = {name: _random(rng, name, shape) for name, shape in expected_shapes(config).items()}
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "np"})
    except SafetensorError as error:  # a full disk raises it too
        text = f"the checkpoint cannot be written to {folder}: {error}; set TMPDIR to a folder with room"
        raise OSError(text) from None
    (folder / "config.json").write_text(to_json(config.to_json(), 2) + "\n")


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.1) * values
    if len(shape) == 1:
        return np.float32(0.1) * values
    return values if name == "model.embed_tokens.weight" else values / np.float32(math.sqrt(shape[1]))


class Checkpoint:
    """A folder with config.json and *.safetensors, checked against the names and shapes that its config asks for.

    `stored` has the weights by name, not yet read. quantised: see `DecoderConfig`; weights are quantised when read.
    Raises: ValueError: no such folder, an unreadable file, or missing, extra or misshapen weights (named).
    """

    def __init__(self, folder: Path, quantised: bool = False):
        self.folder = folder
        self.config = dataclasses.replace(DecoderConfig.from_json(_read_config(folder)), quantised=quantised)
        self.stored: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.stored |= _open(file)
        self._leave_out_prediction_layers()
        self._check()

    def read(self, name: str, rank: int = 0, size: int = 1) -> np.ndarray:
        """Copy a weight as float32 (float64 stays); with `size` > 1 only the part of this rank."""
        stored, axis = self.stored[name], split_axis(name)
        part = [slice(None)] * len(stored.get_shape())
        if axis is not None and size > 1:
            width = stored.get_shape()[axis] // size
            part[axis] = slice(rank * width, (rank + 1) * width)
        values = stored[tuple(part)]
        return values if values.dtype == np.float64 else values.astype(np.float32)

    def read_blocks(self, name: str, rank: int = 0, size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Quantise a linear in blocks of 128 x 128 -> e4m3 codes [out, in] of this rank's rows, and their scales."""
        weight = self.read(name)
        padded = np.abs(np.pad(weight, ((0, -len(weight) % FP8_GROUP), (0, 0))))
        largest = padded.reshape(-1, FP8_GROUP, weight.shape[1] // FP8_GROUP, FP8_GROUP).max(axis=(1, 3))
        scales = np.where(largest == 0, np.float32(1), largest / np.float32(FP8_MAX))
        codes = round_to_e4m3(weight / wide_blocks(scales)[: len(weight)])
        start, stop = len(weight) * rank // size, len(weight) * (rank + 1) // size
        return codes[start:stop], scales[start // FP8_GROUP : -(-stop // FP8_GROUP)]

    def _leave_out_prediction_layers(self) -> None:
        """Leave out the multi-token-prediction layers, which GLM-4.5 stores behind the decoder's."""
        first = self.config.num_hidden_layers
        for name in list(self.stored):
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer and first <= int(layer[1]) < first + self.config.num_nextn_predict_layers:
                del self.stored[name]

    def _check(self) -> None:
        expected = expected_shapes(self.config)
        shapes = {name: tuple(stored.get_shape()) for name, stored in self.stored.items()}
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


def wide_blocks(scales: np.ndarray) -> np.ndarray:
    """Return the scale of each weight in whole blocks."""
    return scales.repeat(FP8_GROUP, axis=0).repeat(FP8_GROUP, axis=1)


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


def _open(file: Path) -> dict[str, Any]:
    """Map a safetensors file: its weights by name, each read when it is sliced."""
    try:
        weights = safe_open(file, "np")
        found = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        for name, weight in found.items():
            if weight.get_dtype() not in _DTYPES:
                raise ValueError(f"{name} is of {weight.get_dtype()}")
            weight[:0]  # TypeError: NumPy has no such dtype
        return found
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {file}: not a readable safetensors file of {', '.join(_DTYPES)}, the last with the package "
            f"ml_dtypes: {error!r}; write it anew"
        ) from None

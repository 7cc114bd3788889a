"""The table of limits that `python -m fd_fusion tune` measured: JSON in the user's cache directory, read by `bind`.

An entry counts for one fingerprint: GPU, ranks, exact hidden size, dtype, versions. An entry that does not match, or
cannot be trusted (another owner, writable by others, out of range), is not used, and a reason says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fd_fusion import __version__
from fd_fusion.reasons import Reason, because

_SCHEMA = 2  # 1: without staying_rows
_LARGEST = 1 << 20  # bytes of a file, and rows of a limit, that are accepted
_BACKENDS = ("triton", "flashinfer")
_KEYS = ("gpu", "size", "hidden_size", "dtype")


@dataclass(frozen=True)
class Fingerprint:
    """What an entry was measured for. `versions`: those that `versions_here` returned."""

    gpu: str
    size: int
    hidden_size: int
    dtype: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Limits:
    """The outcome of a measurement.

    rows: by backend, the most rows T for which it beat the unfused path; 0 for never.
    order: the backends that win somewhere, best first.
    two_shot_rows: from how many rows on triton's two-shot is the faster path; None for never.
    staying_rows: the most rows T for which triton beat the unfused path by a residual that stays with its owners; 0
        where it did not, or was not measured.
    """

    rows: Mapping[str, int]
    order: tuple[str, ...]
    two_shot_rows: int | None = None
    staying_rows: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that cannot be a measurement."""
        numbers = [*self.rows.values(), 1 if self.two_shot_rows is None else self.two_shot_rows, self.staying_rows]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _LARGEST for n in numbers):
            raise ValueError(f"limits {self.to_dict()}: expected 0 to {_LARGEST}")
        if self.two_shot_rows == 0 or not set(self.rows) <= set(_BACKENDS):
            raise ValueError(f"limits of {sorted(self.rows)}, two-shot {self.two_shot_rows}: expected {_BACKENDS}")
        if sorted(self.order) != sorted(name for name, rows in self.rows.items() if rows):
            raise ValueError(f"order {list(self.order)} is not that of the limits {dict(self.rows)}")

    @classmethod
    def from_dict(cls, data: Any) -> Limits:
        """Read the limits of an entry. Raises ValueError."""
        try:
            return cls(dict(data["rows"]), tuple(data["order"]), data["two_shot_rows"], data["staying_rows"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an entry of limits: {type(error).__name__}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": dict(self.rows), "order": list(self.order)}


def versions_here() -> dict[str, str]:
    """Return the versions of all that changes a time, and of what `tune` measures against."""
    found = {"fd_fusion": __version__, "rival": "2"}  # 1: NCCL alone
    for key, names in (
        ("framework", ("paddlepaddle-gpu", "paddlepaddle", "torch")),
        ("triton", ("triton",)),
        ("fastdeploy", ("fastdeploy-gpu",)),
        ("flashinfer", ("flashinfer-python-paddle", "flashinfer-python")),
    ):
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError, KeyError):  # or its METADATA is broken
                found.setdefault(key, f"{name} {importlib.metadata.version(name)}")
    return found


def table_path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return limits.json in the user's cache directory; None for a user with neither a home nor such a directory."""
    base = environ.get("XDG_CACHE_HOME") or ""
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # a container's user, with neither HOME nor an entry in the password file
        return None
    return root / "fd_fusion" / "limits.json" if root.is_absolute() else None


def read_limits(key: Fingerprint, path: Path | None) -> tuple[Limits | None, Reason | None]:
    """Return the limits of a fingerprint, or the reason why none are used. (None, None): nothing was measured."""
    if path is None:
        return None, None
    try:
        entries = _read(path)
        same = [one for one in entries if all(one["for"][name] == getattr(key, name) for name in _KEYS)]
        for one in same:
            if one["for"]["versions"] == dict(key.versions):
                return Limits.from_dict(one["limits"]), None
        if not same:
            return None, None
        return None, because("table_stale", got=_text_of(same[-1]["for"]["versions"]), need=_text_of(key.versions))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return None, because("table_unusable", path=str(path), error=text)


def store_limits(key: Fingerprint, limits: Limits, path: Path) -> None:
    """Write an entry into the table; for the holder of `table_lock`. Raises OSError."""
    try:
        entries = [one for one in _read(path) if one["for"] != asdict(key)]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        entries = []  # no table yet, or one that cannot be read
    entry = {
        "for": asdict(key),
        "limits": limits.to_dict(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    text = json.dumps({"schema": _SCHEMA, "entries": [*entries, entry]}, indent=1, allow_nan=False)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "x", opener=_open_own) as file:
            file.write(text)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def table_lock(path: Path) -> Iterator[None]:
    """Lock the table for a measurement, and make its folder. The lock ends with the process, however that ends.

    Raises: BlockingIOError: another process measures. OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a", opener=_open_own) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the entries of the file. Raises OSError, and ValueError for a file that cannot be trusted."""
    with open(path, encoding="utf-8", opener=_open_own) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise ValueError("it is not a small regular file")
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ValueError("others own it or may write to it")
        data = json.load(file)
    if not isinstance(data, dict) or data.get("schema") != _SCHEMA or not isinstance(data.get("entries"), list):
        raise ValueError(f"it is not of schema {_SCHEMA}")
    return data["entries"]


def _open_own(path: str, flags: int) -> int:
    """Follow no link and wait for no pipe; what is made is this user's alone."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _text_of(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" if name == "fd_fusion" else version for name, version in versions.items())

"""A store for votes on the files of a folder, and files that are written whole."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from urllib.parse import quote


class FolderStore:
    """`set`, `get` and an atomic `add` on files of one folder, as a vote needs them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def set(self, key: str, value: str) -> None:
        write_whole(self.folder / quote(key, safe=""), value)

    def get(self, key: str) -> str:
        return (self.folder / quote(key, safe="")).read_text()

    def add(self, key: str, amount: int) -> int:
        with open(self.folder / f"{quote(key, safe='')}.count", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            total = int(file.read() or 0) + amount
            if amount:
                file.truncate(0)
                file.write(str(total))
        return total


def write_whole(path: Path, text: str) -> None:
    """Write so that a reader finds either nothing or all of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)

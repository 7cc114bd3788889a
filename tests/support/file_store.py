"""A key-value store in a folder, for tests with plain processes: no launcher and no port."""

import fcntl
import os
from pathlib import Path
from urllib.parse import quote


class FileStore:
    """`set`, `get` and an atomic `add`, as a vote needs them. `get` of a key that is not set raises."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / quote(key, safe="")

    def set(self, key: str, value: str) -> None:
        path = self._path(key)
        draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
        draft.write_text(value)
        draft.rename(path)

    def get(self, key: str) -> str:
        return self._path(key).read_text()

    def add(self, key: str, amount: int) -> int:
        with open(self._path(f"{key}.count"), "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            total = int(file.read() or 0) + amount
            if amount:
                file.truncate(0)
                file.write(str(total))
                file.flush()
            return total

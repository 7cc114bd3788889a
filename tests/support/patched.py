"""Trees of the shape of FastDeploy that the patches apply to."""

import re
from pathlib import Path

SHAPES = Path(__file__).parents[1] / "host/patched"
PATCHES = sorted((Path(__file__).parents[2] / "patches").glob("*.patch"))


def hunks(patch):
    """{file: [the lines before the patch, of each hunk]}."""
    found = {}
    for line in patch.read_text().splitlines():
        if line.startswith("--- a/"):
            current = found.setdefault(line[6:], [])
        elif line.startswith("@@"):
            current.append([])
        elif found and current and line[:1] in (" ", "-"):
            current[-1].append(line[1:])
    return found


def build(patch, folder):
    """The tree before the patch: our own shapes, with the host's lines out of the patch's context."""
    for file, blocks in hunks(patch).items():
        lines = []
        for line in (SHAPES / f"{Path(file).name}.txt").read_text().splitlines():
            mark = re.match(r"\s*# hunk (\d)$", line)
            lines += blocks[int(mark[1]) - 1] if mark else [line]
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
